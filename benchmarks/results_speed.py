"""The section on speed, memory and scale of docs/results.md, from the files of speed.py, scaling.py, memory.py and paths.py."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import scaling
from common import RESULTS, read_json
from rules_page import markdown
from speed import WORKS

FILES = ("speed", "scaling", "memory", "paths")
BY_HAND, BY_HAND_EXACT, PEER = "BPTT by hand, bfloat16", "BPTT by hand, float32", "snntorch"
OPTIONS = ("sigprop-surrogate", "sigprop-membrane")
LOW_RANK = "sigprop, dot product on U"
# Work, precision, contestants of ours, against whom, how many times as fast; all on one thread.
GOALS = [
    *((work, "medium", OPTIONS, PEER, 3.0) for work in ("mlp, T = 25", "mlp, T = 100")),
    *((work, "medium", OPTIONS, BY_HAND, 1.7) for work in ("mlp, T = 25", "mlp, T = 100")),
    *((work, "medium", (LOW_RANK,), PEER, 5.0) for work in ("mlp, T = 25", "mlp, T = 100")),
    *((work, "medium", (LOW_RANK,), BY_HAND, 2.8) for work in ("mlp, T = 25", "mlp, T = 100")),
    *((work, "highest", OPTIONS, BY_HAND_EXACT, 1.6) for work in ("mlp, T = 25", "mlp, T = 100")),
    ("conv, T = 10", "medium", OPTIONS, PEER, 4.0),
    ("conv, T = 10", "medium", OPTIONS, BY_HAND, 1.5),
    ("conv, T = 10", "medium", (LOW_RANK,), PEER, 5.0),
    ("conv, T = 10", "medium", (LOW_RANK,), BY_HAND, 2.0),
]
MEMORY_GOALS = {"peak": 20.0, "ratio": 1.05}


def read(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """The files that there are, by their names."""
    found = {name: read_json(folder / f"{name}.json") for name in FILES}
    return {name: content for name, content in found.items() if content}


def goals(found: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Lines of a table: what is compared, the goal, the medians, reached or missed; "open" where there is no figure."""
    cells = {(cell["work"], cell["precision"], cell["threads"]): cell for cell in found.get("speed", {"cells": []})["cells"]}
    lines = []
    for work, precision, options, other, goal in GOALS:
        times = cells.get((work, precision, 1), {"times": {}})["times"]
        known = [times[name][other]["median"] for name in options if other in times.get(name, {})]
        verdict = "open" if len(known) < len(options) else "reached" if min(known) >= goal else "**missed**"
        shown = " / ".join(f"{value:.2f}" for value in known) or "-"
        lines.append([work, precision, " / ".join(options), other, f"{goal:g}", shown, verdict])
    return lines


def speed_table(file: dict[str, Any]) -> str:
    names = list(dict.fromkeys(name for cell in file["cells"] for name in cell["ms"]))
    order = {work: place for place, work in enumerate(WORKS)}
    lines = []
    for cell in sorted(file["cells"], key=lambda cell: (order[cell["work"]], cell["precision"] != "medium", cell["threads"])):
        figures = [cell["ms"].get(name) for name in names]
        shown = ["-" if one is None else f"{one['median']:.0f} ({one['low']:.0f}-{one['high']:.0f})" for one in figures]
        lines.append([cell["work"], cell["precision"], str(cell["threads"]), *shown, cell["commit"][:7]])
    return markdown(["work", "precision", "threads", *names, "commit"], lines)


def scaling_table(file: dict[str, Any]) -> str:
    names = list(dict.fromkeys(name for own in file["exponents"].values() for name in own))
    lines = []
    for axis, own in file["exponents"].items():
        values = sorted(cell["value"] for cell in file["cells"] if cell["axis"] == axis)
        fitted = ["-" if name not in own else f"{own[name]['exponent']:.2f} ± {own[name]['error']:.2f}" for name in names]
        lines.append([axis, f"{values[0]:g} to {values[-1]:g}", *fitted])
    return markdown(["quantity", "from, to", *names], lines)


def memory_table(file: dict[str, Any]) -> str:
    lines = []
    for cell in file["cells"]:
        layers = str(len(cell["hidden"])) if "hidden" in cell else "-"
        line = [cell["rule"], cell["mode"], str(cell["num_steps"]), layers, f"{cell['peak_mib']:.1f}"]
        lines.append([*line, f"{cell['held_mib']:.1f}" if "held_mib" in cell else "-"])
    return markdown(["who", "mode", "T", "hidden layers", "peak, MiB", "of which weights, moments, gradient"], lines)


def memory_verdict(file: dict[str, Any]) -> str:
    summary, hidden = file["summary"], file["settings"]["hidden"]
    streamed = [cell for cell in file["cells"] if cell["mode"] == "stream" and cell.get("hidden", hidden) == hidden]
    peak = max(cell["peak_mib"] for cell in streamed)
    ratio = max(summary["ratio"].values())
    words = {True: "reached", False: "**missed**"}
    said = [
        f"streamed input peaks at {peak:.1f} MiB (goal {MEMORY_GOALS['peak']:g}: {words[peak <= MEMORY_GOALS['peak']]}), "
        f"and at T = {summary['longest']} at {ratio:.3f} times what it takes at T = {summary['shortest']} (goal "
        f"{MEMORY_GOALS['ratio']:g}: {words[ratio <= MEMORY_GOALS['ratio']]})"
    ]
    slopes = summary.get("mib_per_step", {})
    said += [f"{name}: {slope:.3f} MiB per step" for name, slope in sorted(slopes.items()) if "system" not in name]
    return "; ".join(said) + "."


def paths_table(file: dict[str, Any]) -> str:
    groups: dict[tuple[str, ...], list[float]] = {}
    for cell in file["cells"]:
        key = (cell["data"], cell["rule"], cell["path"], "every step" if cell["read_every"] == 1 else "as by default")
        groups.setdefault(key, []).append(cell["accuracy"])
    lines = []
    for key, values in groups.items():
        std = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        lines.append([*key, str(len(values)), f"{statistics.mean(values):.4f}{std}"])
    return markdown(["data", "rule", "path", "the loss reads", "seeds", "validation accuracy"], lines)


def section(found: dict[str, dict[str, Any]]) -> str:
    """Markdown; says what is missing and how to make it."""
    parts = [
        "Median milliseconds of a training step, and in brackets its quartiles, of contestants interleaved in one run "
        "(`benchmarks/speed.py`): `mlp` is 784-512-512-10 at B = 128, `conv` two 5 x 5 convolutions of 32 and 64 "
        "channels, each with means of 2 x 2, at B = 64; inputs of density 0.1. BPTT by hand is one product per layer for "
        "all steps, a scan and no graph inside: the strongest form known to us; for it averages are folded into the "
        "convolutions, too. `medium` lets torch round products for everybody.",
    ]
    if "speed" in found:
        parts += [speed_table(found["speed"])]
        parts += ["How many times as fast, on one thread (medians of the ratios within a round):"]
        head = ["work", "precision", "ours", "against", "goal", "measured", "reached?"]
        parts += [markdown(head, goals(found))]
    if "scaling" in found:
        parts += ["Time grows as quantity^p; p by least squares, with its standard error (`benchmarks/scaling.py`):"]
        parts += [scaling_table(found["scaling"]), "![Training steps against the size of the work](results-speed.svg)"]
    if "memory" in found:
        parts += [f"Memory over the imports, in fresh processes (`benchmarks/memory.py`): {memory_verdict(found['memory'])}"]
        parts += [memory_table(found["memory"])]
    if "paths" in found:
        parts += [
            "What the compiled path reaches beside the plain one, and a loss that reads the membrane as rarely as by default "
            "beside one that reads it at every step (`benchmarks/paths.py`, T = 25):",
            paths_table(found["paths"]),
        ]
    absent = [name for name in FILES if name not in found]
    if absent:
        parts.append("Missing: " + ", ".join(f"`python benchmarks/{name}.py`" for name in absent) + ".")
    return "\n\n".join(parts)


def panels(found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """One pair of logarithmic axes per quantity that was changed."""
    if "scaling" not in found:
        return []
    made = []
    for axis in scaling.AXES:
        own = sorted((cell for cell in found["scaling"]["cells"] if cell["axis"] == axis), key=lambda cell: cell["value"])
        names = list(dict.fromkeys(name for cell in own for name in cell["ms"]))
        lines = []
        for name in names:
            points = [(cell["value"], cell["ms"][name]["median"]) for cell in own if name in cell["ms"]]
            x, y = (list(values) for values in zip(*points, strict=True))
            lines.append({"rule": name, "homeostasis": "on", "x": x, "y": [round(value, 3) for value in y]})
        if lines:
            title = axis.replace("_", " ")
            made.append({"title": "", "lines": lines, "xlabel": title, "ylabel": "ms per step", "log": True})
    return made
