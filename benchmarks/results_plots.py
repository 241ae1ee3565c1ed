"""The drawings of docs/results.md: SVG files, each of which carries the figures that it was drawn from.

A plot is plain data: panels side by side, each with lines of points. Two plots of the same data are the same file with the same
matplotlib; another matplotlib draws other bytes from the same data, so what is compared is :func:`held`, not the file.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import results_speed
import stress
from results_rows import GOALS, SIGPROP, STRESS, Found, Row, headline, is_of, rows_of, stress_rows
from tasks import TASKS

from spikeprop.report import STYLE
from spikeprop.report_page import COLOURS
from spikeprop.storage import atomic_write

Plot = dict[str, Any]

PALETTE = {
    "sigprop-surrogate": COLOURS["blue"],
    "sigprop-membrane": "#009e73",
    "sigprop-raw-membrane": "#56b4e9",
    "bptt": COLOURS["red"],
    "bptt-hard": COLOURS["ink"],
    "shallow": COLOURS["muted"],
    "direct-feedback-alignment": "#cc79a7",
    "local-classifier": "#e69f00",
    "target-propagation": "#8b5e3c",
    "goal": COLOURS["ink"],
    "BPTT by hand, bfloat16": COLOURS["red"],
    "snntorch": "#e69f00",
}
HOMEOSTASIS = {"on": "-", "off": ":"}


# --- What is drawn -----------------------------------------------------------------------------------------------------------


def plots(found: Found, timed: dict[str, Any] | None = None) -> dict[str, Plot]:
    """By the file's name under docs/. What has no figures has no plot. ``timed``: see :func:`results_speed.read`."""
    made: dict[str, Plot] = {}
    if own := results_speed.panels(timed or {}):
        made["results-speed.svg"] = {"panels": own, "columns": len(own)}
    first = [_panel("Test accuracy", _accuracies(found), "%", names=list(TASKS))]
    if data := next((data for data in STRESS if found[f"stress-{data}"]["cells"]), None):
        rows = [row for row in stress_rows(found[f"stress-{data}"]) if row["rule"] in (*SIGPROP, "bptt", "bptt-hard")]
        first += [_by_level(rows, dial, "dead", f"{data}: {dial}", "dead after training (%)") for dial in stress.DIALS]
    if len(first[0]["lines"]) > 1 or len(first) > 1:  # more than goals
        made["results.svg"] = {"panels": first, "columns": len(first)}
    for task in TASKS:
        if rows := rows_of(found[f"evidence-{task}"]):
            curves = [_over_epochs(rows, "dead", 100.0, "dead, worst layer (%)", top=1.0)]
            curves += [_over_epochs(rows, "rate", 1.0, "rate, worst layer", top=0.2)]
            made[f"results-{task}.svg"] = {"panels": curves, "columns": len(curves)}
    for data in STRESS:
        if rows := stress_rows(found[f"stress-{data}"]):
            words = {"dead": "dead after training (%)", "accuracy": "accuracy (%)"}
            panels = [_by_level(rows, dial, key, dial, words[key]) for key in words for dial in stress.DIALS]
            made[f"results-stress-{data}.svg"] = {"panels": panels, "columns": len(stress.DIALS)}
    return made


def _line(rule: str, homeostasis: str | None, x: Iterable[float], y: Iterable[float], **errors: list[float]) -> dict[str, Any]:
    """Points of one rule, joined where ``homeostasis`` is "on" or "off"; ``xerr`` and ``yerr`` are half the length of bars."""
    numbers = {"x": x, "y": y, **errors}
    return {
        "rule": rule,
        "homeostasis": homeostasis,
        **{name: [round(v, 5) for v in values] for name, values in numbers.items()},
    }


def _panel(title: str, lines: list[dict[str, Any]], xlabel: str, ylabel: str = "", **more: Any) -> dict[str, Any]:
    """One pair of axes; y goes from 0 to ``top`` or beyond, or counts ``names`` from the top."""
    return {"title": title, "lines": lines, "xlabel": xlabel, "ylabel": ylabel, **more}


def _accuracies(found: Found) -> list[dict[str, Any]]:
    lines = [_line("goal", None, [100 * goal for goal in GOALS.values()], [list(TASKS).index(task) for task in GOALS])]
    for place, rule in enumerate((*SIGPROP, "bptt")):
        rows = {index: row for index, task in enumerate(TASKS) if (row := headline(found, task, rule)) is not None}
        x, bars = _percents(row["accuracy"]["readout"] for row in rows.values())
        if rows:
            lines.append(_line(rule, None, x, [index + 0.2 * (place - 1) for index in rows], xerr=bars))
    return lines


def _by_level(rows: Sequence[Row], dial: str, key: str, title: str, ylabel: str) -> dict[str, Any]:
    lines = []
    for rule, homeostasis in dict.fromkeys((row["rule"], row["homeostasis"]) for row in rows):
        own = [row for row in rows if is_of(row, rule, homeostasis) and row["dial"] in ("healthy", dial)]
        own.sort(key=lambda row: row["level"])
        y, bars = _percents(row[key] for row in own)
        lines.append(_line(rule, homeostasis, [100 * row["level"] for row in own], y, yerr=bars))
    return _panel(title, lines, "dead at the start (%)", ylabel, top=100.0)


def _over_epochs(rows: Sequence[Row], name: str, unit: float, ylabel: str, top: float) -> dict[str, Any]:
    """The worst layer's figure, mean over seeds."""
    lines = []
    for row in rows:
        worst = [[unit * max(layers) for layers in cell["epochs"][name]] for cell in row["cells"]]
        y = [statistics.mean(values) for values in zip(*worst, strict=True)]
        lines.append(_line(row["rule"], row["homeostasis"], range(1, len(y) + 1), y))
    return _panel("", lines, "epoch", ylabel, top=top)


def _percents(values: Iterable[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """Means and standard deviations, 0 where there is none."""
    known = list(values)
    return [100 * value["mean"] for value in known], [100 * (value["std"] or 0.0) for value in known]


# --- How ---------------------------------------------------------------------------------------------------------------------


def write(path: Path, plot: Plot) -> None:
    """Draw a plot, whole or not at all: no date, no random names, white behind it in light and dark pages."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    panels, columns = plot["panels"], plot["columns"]
    count = -(-len(panels) // columns)
    lines = [each for content in panels for each in content["lines"]]
    rules = sorted({each["rule"] for each in lines}, key=list(PALETTE).index)
    told = [each["homeostasis"] for content in panels for each in content["lines"] if "log" not in content]
    styles = [style for style in HOMEOSTASIS if style in told]
    handles = [Line2D([], [], color=PALETTE[rule], marker=_marker(rule), linestyle="none", label=rule) for rule in rules]
    handles += [
        Line2D([], [], color=COLOURS["muted"], linestyle=HOMEOSTASIS[one], label=f"homeostasis {one}") for one in styles
    ]
    with mpl.rc_context({**STYLE, "svg.hashsalt": path.stem}):
        figure = Figure(figsize=(3.1 * columns + 0.4, 2.7 * count + 0.5), facecolor="white", layout="constrained")
        for axis, content in zip(figure.subplots(count, columns, squeeze=False).flat, panels, strict=True):
            _draw(axis, content)
        figure.legend(handles=handles, loc="outside lower center", ncols=columns + 1)
        with atomic_write(path) as temporary:
            facts = {"Date": None, "Creator": None, "Description": json.dumps(plot)}
            figure.savefig(temporary, format="svg", metadata=facts)


def held(path: Path) -> Plot:
    """The data that a plot was drawn from."""
    text = next(ElementTree.parse(path).iter("{http://purl.org/dc/elements/1.1/}description")).text
    assert text is not None
    plot: Plot = json.loads(text)
    return plot


def _marker(rule: str) -> str:
    return "|" if rule == "goal" else "o"


def _draw(axis: Any, content: dict[str, Any]) -> None:
    rules = list(dict.fromkeys(each["rule"] for each in content["lines"]))
    for each in content["lines"]:
        errors = {name: each[name] for name in ("xerr", "yerr") if name in each}
        style = HOMEOSTASIS.get(each["homeostasis"], "none")
        shape = {"marker": _marker(each["rule"]), "markersize": 10 if each["rule"] == "goal" else 3.5}
        if each["homeostasis"] is not None:  # rings around each other where points coincide; none where they are many
            shape["markersize"] = (
                3.0 + 8.0 * (1.0 - (rules.index(each["rule"]) + 1) / len(rules)) if len(each["x"]) < 8 else 0.0
            )
        axis.errorbar(each["x"], each["y"], color=PALETTE[each["rule"]], linestyle=style, **shape, **errors)
    axis.set(title=content["title"], xlabel=content["xlabel"], ylabel=content["ylabel"])
    if "log" in content:
        axis.set(xscale="log", yscale="log", ylim=(10.0, 1000.0))
        across = sorted({value for each in content["lines"] for value in each["x"]})
        for ticks, values in ((axis.xaxis, across), (axis.yaxis, [10, 30, 100, 300, 1000])):
            ticks.set_ticks(values, [f"{value:g}" for value in values])
            ticks.set_ticks([], minor=True)
        axis.grid(axis="y")
    elif "names" in content:
        axis.set_yticks(range(len(content["names"])), content["names"])
        axis.set_ylim(len(content["names"]) - 0.5, -0.5)
        axis.grid(axis="x")
    else:
        axis.set_ylim(-0.05 * content["top"], max(1.05 * content["top"], axis.get_ylim()[1]))
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(axis="y")
