"""What ``spikeprop compare`` prints and draws: a table for the terminal, CSV, and an HTML page with plots."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from html import escape
from typing import Any

from spikeprop.report import svg
from spikeprop.report_page import COLOURS, style, table

Content = dict[str, Any]

LETTERS = {"S": "symmetric_weights", "H": "stored_history", "G": "global_error"}
LEGEND = (
    "needs: B something travels backwards through layers or time (b: one layer only), S symmetric weights, H stored history, "
    "G an error from the output, W weights of its own. Shares per layer, on the test part; aligned: cosine of the update with "
    "BPTT's gradient after the last epoch, per layer"
)


def ranked(found: Content) -> list[Content]:
    """The rows that ran, best first."""
    return sorted((row for row in found["rules"] if "accuracy" in row), key=lambda row: -row["accuracy"]["mean"])


def needs(row: Content) -> str:
    """What a rule asks of a machine, as letters; see :data:`LEGEND`."""
    backward = {"nothing": "", "one layer": "b"}.get(row["needs"]["backward"], "B")
    letters = backward + "".join(letter for letter, need in LETTERS.items() if row["needs"][need])
    return letters + ("W" if row["needs"]["extra_weights"] != "none" else "") or "-"


def text(found: Content) -> str:
    """The comparison for the terminal, best first."""
    lines = [
        describe(found["settings"]),
        f"{'rule':26} {'accuracy':17} {'dead %':>11} {'nearly %':>11} {'satur. %':>11} {'rate':>10} {'aligned':>11} "
        f"{'rate l.':>8} {'s/epoch':>8} {'MiB':>6}  needs",
    ]
    for row in ranked(found):
        shares = " ".join(f"{_percents(row[key]):>11}" for key in ("dead", "nearly_dead", "saturated"))
        lines.append(
            f"{row['rule']:26} {_accuracy(row):17} {shares} {_layers(row['firing_rate'], '.2f'):>10} "
            f"{_layers(row['alignment'], '.2f'):>11} {row['learning_rate']:8g} {row['seconds_per_epoch']:8.2f} "
            f"{memory(row):>6}  {needs(row)}"
        )
    lines += [f"{row['rule']:26} left out: {row['refused']}" for row in found["rules"] if "refused" in row]
    return "\n".join([*lines, LEGEND])


def describe(settings: Content) -> str:
    """The settings in one line."""
    return (
        f"{settings['data']}, {settings['model']}{', recurrent' * settings['recurrent']}, T = {settings['num_steps']}, "
        f"{settings['epochs']} epochs, batch {settings['batch_size']}, {settings['encoder']['name']} encoder, "
        f"homeostasis {'as each rule has it' if settings['homeostasis'] == 'own' else settings['homeostasis']}"
    )


def as_csv(found: Content) -> str:
    """One line per rule; figures per layer in columns of their own."""
    out = io.StringIO()
    rows = ranked(found)
    per_layer = [(key, number) for key in PER_LAYER for number in range(len(rows[0][key]))]
    plain = ["learning_rate", "seconds_per_epoch", "peak_memory_mib"]
    writer = csv.writer(out, lineterminator="\n")
    head = [f"{key}_layer{number + 1}" for key, number in per_layer]
    writer.writerow(["rule", "accuracy_mean", "accuracy_std", *head, *plain, *rows[0]["needs"], "paper"])
    for row in rows:
        layers = [row[key][number] for key, number in per_layer]
        values = [row[key] for key in plain]
        writer.writerow(
            [
                row["rule"],
                row["accuracy"]["mean"],
                row["accuracy"]["std"],
                *layers,
                *values,
                *row["needs"].values(),
                row["paper"],
            ]
        )
    return out.getvalue()


PER_LAYER = ("dead", "nearly_dead", "saturated", "firing_rate", "alignment")


def page(found: Content) -> str:
    """The comparison as one HTML document that needs nothing else."""
    rows = ranked(found)
    figures = [
        _figure(_accuracies(rows), "Mean over seeds, bars: one standard deviation, dots: seeds."),
        _figure(
            _curves(rows, "validation_accuracy"),
            "Validation accuracy over training, mean over seeds; the best six and the floor.",
        ),
        _figure(_dead(rows), "Share of neurons that never spike on the test part, worst layer."),
        _figure(_cost(rows), "Training time per epoch and peak memory, each in a process of its own."),
    ]
    layers = len(rows[0]["alignment"])
    alignments = [_figure(_alignment(rows, layer), ALIGNMENT) for layer in range(layers)]
    left_out = [[row["rule"], row["refused"]] for row in found["rules"] if "refused" in row]
    return PAGE.format(
        style=style(),
        facts=escape(describe(found["settings"])),
        seeds=len(rows[0]["accuracy"]["seeds"]),
        samples=rows[0]["samples"],
        figures="".join(figures),
        alignment="".join(alignments),
        accuracy=table(
            ["rule", "accuracy", "dead", "nearly dead", "saturated", "rate", "aligned", "learning rate", "s per epoch", "MiB"],
            [
                [
                    row["rule"],
                    _accuracy(row),
                    *(_percents(row[key]) + " %" for key in ("dead", "nearly_dead", "saturated")),
                    _layers(row["firing_rate"], ".3f"),
                    _layers(row["alignment"], ".2f"),
                    f"{row['learning_rate']:g}",
                    f"{row['seconds_per_epoch']:.2f}",
                    memory(row),
                ]
                for row in rows
            ],
        ),
        needs=table(
            [
                "rule",
                "travels backwards",
                "symmetric weights",
                "stored history",
                "error from the output",
                "weights of its own",
                "source",
            ],
            [
                [
                    row["rule"],
                    row["needs"]["backward"],
                    *("yes" if row["needs"][need] else "no" for need in LETTERS.values()),
                    row["needs"]["extra_weights"],
                    row["paper"],
                ]
                for row in rows
            ],
        ),
        left_out=table(["left out", "because"], left_out) if left_out else "",
        versions=escape(", ".join(f"{name} {version}" for name, version in found["versions"].items())),
    )


def memory(row: Content) -> str:
    """Peak memory in MiB; below one, machine code and the allocator's pages are most of it."""
    return "< 1" if row["peak_memory_mib"] < 1.0 else f"{row['peak_memory_mib']:.1f}"


def _accuracy(row: Content) -> str:
    std = row["accuracy"]["std"]
    return f"{row['accuracy']['mean']:.4f}" + ("" if std is None else f" ± {std:.4f}")


def _percents(shares: Sequence[float]) -> str:
    return "/".join(f"{100 * share:.1f}" for share in shares)


def _layers(values: Sequence[float | None], form: str) -> str:
    return "/".join("-" if value is None else f"{value:{form}}" for value in values)


def _figure(drawing: str, caption: str) -> str:
    return f"<figure>{drawing}<figcaption>{escape(caption)}</figcaption></figure>"


def _colour(row: Content) -> str:
    return COLOURS["blue" if row["rule"].startswith("sigprop") else "red" if row["rule"].startswith("bptt") else "muted"]


def _names(axis: Any, rows: Sequence[Content]) -> None:
    axis.set_yticks(range(len(rows)))
    axis.set_yticklabels([row["rule"] for row in rows])
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.grid(axis="x")


def _height(rows: Sequence[Content]) -> float:
    return 1.0 + 0.23 * len(rows)


def _accuracies(rows: list[Content]) -> str:
    def draw(figure: Any) -> None:
        axis = figure.subplots()
        for place, row in enumerate(rows):
            found = row["accuracy"]
            axis.errorbar(found["mean"], place, xerr=found["std"] or 0.0, color=_colour(row), fmt="o", markersize=5, capsize=2)
            axis.plot(found["seeds"], [place] * len(found["seeds"]), ".", color=COLOURS["ink"], markersize=3)
        _names(axis, rows)
        axis.set(title="Test accuracy", xlabel="share predicted rightly")

    return svg("accuracies", (5.6, _height(rows)), draw)


def _dead(rows: list[Content]) -> str:
    def draw(figure: Any) -> None:
        axis = figure.subplots()
        for place, row in enumerate(rows):
            axis.barh(place, 100 * max(row["dead"]), 0.6, color=_colour(row))
        _names(axis, rows)
        axis.set(title="Dead neurons", xlabel="% of the worst layer")

    return svg("dead", (5.6, _height(rows)), draw)


def _cost(rows: list[Content]) -> str:
    def draw(figure: Any) -> None:
        axes = figure.subplots(1, 2, sharey=True)
        for axis, key, title, unit in zip(
            axes, ("seconds_per_epoch", "peak_memory_mib"), ("Time", "Memory"), UNITS, strict=True
        ):
            for place, row in enumerate(rows):
                smallest = 1.0 if key == "peak_memory_mib" else 0.0  # finer than that the measurement is not
                axis.plot(max(row[key], smallest), place, "o", color=_colour(row), markersize=5)
            _names(axis, rows)
            axis.set(title=title, xlabel=unit, xscale="log")
            axis.xaxis.set_major_formatter("{x:g}")
            axis.minorticks_off()

    return svg("cost", (7.4, _height(rows)), draw)


UNITS = ("seconds per epoch", "MiB at the peak")


def _lines(rows: list[Content], name: str, title: str, series: Any) -> str:
    """One line per rule over the epochs: six colours told apart by line style, then by label."""

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        for place, row in enumerate(rows):
            colour, line = COLOURS[("blue", "red", "ink")[place % 3]], ("-", "--", ":")[place // 3 % 3]
            values = series(row)
            axis.plot(range(1, len(values) + 1), values, color=colour, linestyle=line, label=row["rule"])
        axis.set(title=title, xlabel="epoch")
        axis.grid(axis="y")
        axis.xaxis.get_major_locator().set_params(integer=True)
        if rows:
            figure.legend(loc="outside right upper", fontsize=7.5)  # beside the lines, which fill the axis

    return svg(name, (7.0, 3.6), draw)


def _curves(rows: list[Content], key: str) -> str:
    shown = rows[:6] + [row for row in rows[6:] if row["rule"] == "shallow"]
    return _lines(shown, key, "Accuracy over training", lambda row: row[key])


def _alignment(rows: list[Content], layer: int) -> str:
    shown = [row for row in rows if row["alignment"][layer] is not None and not row["rule"].startswith("bptt")][:9]

    def series(row: Content) -> list[float]:
        return [float("nan") if epoch[layer] is None else epoch[layer] for epoch in row["alignment_over_training"]]

    return _lines(shown, f"alignment{layer + 1}", f"Layer {layer + 1}: cosine with BPTT's gradient", series)


ALIGNMENT = "Update against the gradient of BPTT on the same batch, mean over seeds; the nine best rules that have one."

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>spikeprop compare</title><style>{style}</style></head><body>
<h1>Learning rules on equal terms</h1>
<p class="quiet">{facts}; {seeds} seeds, {samples} test samples. The same network, data, encoder, epochs and batch for every
rule; each rule&rsquo;s learning rate was chosen on the validation part, with one seed, from the same grid.</p>
{accuracy}
<p class="quiet">Shares per layer, first to last. A neuron is dead if it never spikes on the test part, nearly dead if it spikes
in less than 1 % of the samples, saturated if it spikes at every step. Aligned: cosine of the rule&rsquo;s update with
BPTT&rsquo;s gradient, after the last epoch. MiB: peak of a few updates in a fresh process. Rules that lie within a standard
deviation of each other are not told apart by so few seeds and samples.</p>
<div class="grid">{figures}</div>
<h2>Do the updates point the way of backpropagation&rsquo;s?</h2>
<div class="grid">{alignment}</div>
<h2>What each rule needs</h2>
{needs}
{left_out}
<footer>{versions}. All figures are in <code>compare.json</code> and <code>compare.csv</code> beside this page.</footer>
</body></html>
"""
