"""Writes docs/results.md, the measured results, and its plots.

    python benchmarks/results_page.py

Every figure comes from the cells of ``evidence-<task>.json`` and ``tuning-<task>.json`` (evidence.py), of
``stress-<data>.json`` (stress.py) and of the files that results_speed.py reads, in ``benchmarks/results/``, but for published
ones, which stand below with their sources. Files and cells may be missing: the page then says by what command they come.
``results/notes.md``, written by hand, becomes the section on misses.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import results_speed
import stress
from common import RESULTS, ROOT
from results_plots import plots, write
from results_rows import (
    GOAL_NAMES,
    GOALS,
    SEEDS,
    SIGPROP,
    STARTS,
    STRESS,
    STRESS_GOAL_NAMES,
    STRESSED,
    Found,
    Row,
    behind,
    claims,
    goals_of,
    headline,
    is_final,
    missing,
    percent,
    points,
    read,
    rows_of,
    settings_without_watch,
    start_of,
    stress_goals,
    stress_rows,
    tally,
)
from rules_page import markdown
from tasks import COMMON, RULES_OF_THE_TABLE, TASKS

from spikeprop.storage import write_text

DOCS = ROOT / "docs"
NEUROTRAIN, PAPER = "NeuroTrain, arXiv 2605.15058, its table", "Kohan et al., arXiv 2204.01723, its spiking table"
FFGAF, OURS = "Xu et al., arXiv 2507.23643, abstract", "our own, measured once; no result file"
PUBLISHED = {  # task: (what, accuracy, source)
    "mnist-mlp": [("Traces Propagation", 0.975, NEUROTRAIN), ("BPTT", 0.978, NEUROTRAIN)],
    "fashion-mnist-mlp": [("Traces Propagation", 0.862, NEUROTRAIN), ("BPTT", 0.837, NEUROTRAIN)],
    "mnist-conv": [
        ("SigProp, surrogate", 0.9899, PAPER),
        ("SigProp, voltage", 0.9737, PAPER),
        ("backpropagation, surrogate", 0.9916, PAPER),
        ("shallow", 0.9276, PAPER),
        ("FFGAF-SNN, forward-only", 0.9958, FFGAF),
    ],
    "fashion-mnist-conv": [
        ("SigProp, surrogate", 0.9049, PAPER),
        ("SigProp, voltage", 0.8932, PAPER),
        ("backpropagation, surrogate", 0.9330, PAPER),
        ("shallow", 0.8358, PAPER),
        ("FFGAF-SNN, forward-only", 0.9213, FFGAF),
    ],
    "nmnist": [("logistic regression on 3 time bins, the same samples", 0.91, OURS)],
    "braille": [
        ("logistic regression on time bins, the same samples", 0.889, OURS),
        ("recurrent network trained by BPTT, another split", 0.95, "the NIR paper"),
    ],
}


def accuracy(value: dict[str, float | None] | None) -> str:
    if value is None or value["mean"] is None:
        return "-"
    return f"{value['mean']:.4f}" + ("" if value["std"] is None else f" ± {value['std']:.4f}")


def headline_table(found: Found) -> str:
    def shown(task: str, row: Row | None) -> str:
        if row is None:
            return "missing"
        remarks = [row["homeostasis"]]
        remarks += [f"{len(row['seeds'])} of {len(SEEDS)} seeds"] * (len(row["seeds"]) < len(SEEDS))
        remarks += ["older settings"] * (not is_final(task, row))
        return f"{accuracy(row['accuracy']['readout'])} ({', '.join(remarks)})"

    lines = []
    for task, goal in GOALS.items():
        rows = {rule: headline(found, task, rule) for rule in (*SIGPROP, "bptt")}
        lost = " / ".join(points(behind(rows[rule], rows["bptt"])) for rule in SIGPROP)
        reached = " / ".join(goals_of(found, task, rule)[0][1] for rule in SIGPROP)
        lines.append([task, *(shown(task, row) for row in rows.values()), lost, f"{goal:.3f}", reached])
    return markdown(["task", *SIGPROP.values(), "BPTT", "difference to BPTT", "goal", "reached?"], lines)


def changed_settings(task: str, row: Row) -> str:
    base = COMMON | TASKS[task]
    told = [
        f"{name}={value}"
        for name, value in row["settings"].items()
        if name != "recipe" and (name not in base or base[name] != value)
    ]
    return " ".join(told) or "the task's own"


def task_section(found: Found, task: str) -> str:
    own, rows = TASKS[task], rows_of(found[f"evidence-{task}"])
    parts = [f"### {task}", f"`{own['model']}`, T = {own['num_steps']}, {own['epochs']} epochs, where no setting differs."]
    lines = []
    for row in rows:
        line = [f"`{row['rule']}`", row["homeostasis"], " ".join(map(str, sorted(row["seeds"])))]
        line += [accuracy(row["accuracy"].get(option)) for option in ("readout", "nearest", "tree")]
        line += [accuracy(row.get("loihi"))]
        start, end = row["worst_at_start"], row["worst"]
        line += [f"{100 * start[name]:.1f} → {100 * end[name]:.1f}" for name in ("dead", "nearly_dead", "saturated")]
        line += [f"{start['rate']:.3f} → {end['rate']:.3f}", f"{row['seconds']:.0f}", changed_settings(task, row)]
        lines.append([*line[:-1], line[-1] + ("" if is_final(task, row) else " (older)")])
    head = [
        "rule",
        "homeostasis",
        "seeds",
        "readout",
        "nearest",
        "tree",
        "8 bits",
        "dead %",
        "nearly dead %",
        "saturated %",
        "rate",
    ]
    picture = f"![Dead share and rate of {task} over the epochs](results-{task}.svg)"
    parts += [markdown([*head, "seconds", "settings"], lines), picture] if rows else ["No final cell yet."]
    tried = rows_of(found[f"tuning-{task}"])
    lines = []
    for row in sorted(tried, key=lambda row: (row["rule"], -row["images"], -row["accuracy"]["readout"]["mean"])):
        line = [f"`{row['rule']}`", row["homeostasis"], changed_settings(task, row), str(row["images"]), str(len(row["seeds"]))]
        line += [accuracy(row["accuracy"]["readout"]), f"{100 * row['worst']['dead']:.1f}", f"{row['worst']['rate']:.3f}"]
        lines.append([*line, "yes" * is_final(task, row)])
    if lines:
        head = ["rule", "homeostasis", "settings", "trained on", "seeds", "validation accuracy", "dead %", "rate", "final"]
        parts.append(f"<details><summary>Tried on the validation part</summary>\n\n{markdown(head, lines)}\n\n</details>")
    return "\n\n".join(parts)


def tried_table(found: Found) -> str:
    """Distinct configurations per rule and task, and how many networks were trained for them."""
    tried = {task: found[f"tuning-{task}"]["cells"] for task in TASKS}
    rules = list(dict.fromkeys([*RULES_OF_THE_TABLE, *(cell["rule"] for cells in tried.values() for cell in cells)]))
    lines = []
    for task, cells in tried.items():
        own = [
            [(cell["homeostasis"], settings_without_watch(cell)) for cell in cells if cell["rule"] == rule] for rule in rules
        ]
        lines.append([task, *(f"{len({json.dumps(one, sort_keys=True) for one in found})} ({len(found)})" for found in own)])
    return markdown(["task", *(f"`{rule}`" for rule in rules)], lines)


def provenance(found: Found) -> str:
    rows = []
    for name, file in found.items():
        if file["cells"]:
            commits = " ".join(sorted({cell["commit"][:12] + "+" * cell["commit"].endswith("+") for cell in file["cells"]}))
            versions = ", ".join(f"{key} {value}" for key, value in file["versions"].items())
            rows.append([f"`{name}.json`", str(len(file["cells"])), f"`{file['command']}`", commits, versions])
    return markdown(["file", "cells", "command", "commits", "versions"], rows) if rows else "No result file yet."


def stress_section(found: Found, data: str) -> str:
    file, recipe = found[f"stress-{data}"], stress.BENCHMARKS[data]
    network = f"`mlp:{','.join(map(str, recipe['hidden']))}`, T = {recipe['num_steps']}, {recipe['epochs']} epochs"
    parts = [f"### {data}", f"{recipe['train_samples']:,} training images, {network}."]
    if not file["cells"]:
        return "\n\n".join([*parts, "No cell yet."])
    rows = stress_rows(file)
    by = {(row["rule"], row["homeostasis"], row["dial"], row["level"]): row for row in rows}
    kinds = list(dict.fromkeys(key[:2] for key in by))
    starts = [start for start in STARTS if any(key[2:] == start for key in by)]
    seeds = sorted({cell["seed"] for cell in file["cells"]})
    parts.append(
        f"Means over what there is of the seeds {' '.join(map(str, seeds))}, at {len(starts)} of {len(STARTS)} starts:"
    )
    parts.append("\n".join(f"- {claim}" for claim in claims(rows)))
    parts.append(f"![Dead share and accuracy of {data} by the dials](results-stress-{data}.svg)")
    head = [start_of({"dial": dial, "level": level}) for dial, level in starts]
    for measure, title in stress.MEASURES.items():
        none = {measure: {"mean": None, "std": None}}
        values = {kind: [by.get((*kind, *start), none)[measure] for start in starts] for kind in kinds}
        lines = [[f"`{rule}`", homeostasis, *map(_percent_and_std, own)] for (rule, homeostasis), own in values.items()]
        parts.append(f"{title[0].upper()}{title[1:]}, %:\n\n{markdown(['rule', 'homeostasis', *head], lines)}")
    lines = []
    for dial, level in starts:
        cells = [cell for cell in file["cells"] if (cell["dial"], cell["level"]) == (dial, level)]
        values_of = [cell["value"] for cell in cells if cell["value"] is not None]
        layers = zip(*(cell["layers"]["before"]["dead"] for cell in cells), strict=True)
        line = [f"{statistics.mean(values_of):.3g}" if values_of else "-"]
        line += [percent(statistics.mean(cell["dead"]["before"] for cell in cells))]
        lines.append([dial, f"{level:g}", *line, " / ".join(percent(statistics.mean(layer)) for layer in layers)])
    parts.append("The starts:\n\n" + markdown(["dial", "level", "its value", "dead", "dead per layer"], lines))
    return "\n\n".join(parts)


def _percent_and_std(value: dict[str, float | None]) -> str:
    mean, std = (None if part is None else f"{100 * part:.1f}" for part in (value["mean"], value["std"]))
    return "-" if mean is None else mean if std is None else f"{mean} ± {std}"


def page(folder: Path = RESULTS) -> str:
    """The whole page, from the result files of a folder."""
    found, notes = read(folder), folder / "notes.md"
    goals = {(task, rule): goals_of(found, task, rule) for task, rule in itertools.product(TASKS, SIGPROP)}
    under = {
        (data, rule, homeostasis, dial): stress_goals(stress_rows(found[f"stress-{data}"]), rule, homeostasis, dial)
        for data, rule, homeostasis, dial in itertools.product(STRESS, SIGPROP, ("on", "off"), stress.DIALS)
    }
    score = [f"- {name}: {tally(goal[place][1] for goal in goals.values())}" for place, name in enumerate(GOAL_NAMES)]
    for place, name in enumerate(STRESS_GOAL_NAMES):
        verdicts = [goal[place][1] for (_, _, homeostasis, _), goal in under.items() if homeostasis == "on"]
        score.append(f"- {name}, from {100 * STRESSED:g} % dead, with homeostasis: {tally(verdicts)}")
    goal_lines = [[task, SIGPROP[rule], *map(_judged, goal)] for (task, rule), goal in goals.items()]
    under_lines = [[data, SIGPROP[rule], *kind, *map(_judged, goal)] for (data, rule, *kind), goal in under.items()]
    published = [[task, what, f"{value:.4f}", source] for task, rows in PUBLISHED.items() for what, value, source in rows]
    gaps = missing(found)
    return TEXT.format(
        picture=PICTURE if "results.svg" in plots(found) else "No picture yet: there is no result.",
        headline=headline_table(found),
        missing="Nothing is missing."
        if not gaps
        else "Some cells are missing: [which, and how to make them](#how-to-reproduce).",
        score="\n".join(score),
        goals=markdown(["task", "option", *GOAL_NAMES], goal_lines),
        published=markdown(["task", "what", "accuracy", "source"], published),
        tried=tried_table(found),
        provenance=provenance(found),
        tasks="\n\n".join(task_section(found, task) for task in TASKS),
        under=markdown(["data", "option", "homeostasis", "dial", *STRESS_GOAL_NAMES], under_lines),
        stress="\n\n".join(stress_section(found, data) for data in STRESS),
        speed=results_speed.section(results_speed.read(folder)),
        notes=notes.read_text(encoding="utf-8").strip() if notes.exists() else "No notes yet.",
        gaps=markdown(["file", "cells", "command"], gaps) if gaps else "None.",
    )


def _judged(goal: tuple[str, str]) -> str:
    figure, reached = goal
    return f"{reached} ({figure})"


PICTURE = """![Test accuracy by task; dead share after training against that at the start](results.svg)

Left: mean and sample standard deviation over seeds; bars upright: goals. Right: the stress benchmark, the share of neurons dead
after training against that at the start, by what killed them."""

TEXT = """# Results

{picture}

{headline}

Accuracy on the test part by the readout. In brackets: homeostasis on or off, whichever was better on the validation part; the
rule's default where nothing was tried there. Differences (points) and verdicts: surrogate / membrane. A goal is judged by
unrounded means of three seeds; with fewer it is open. {missing}

{score}

{goals}

Dead share and rate (spikes per neuron and step) are those of the worst layer of the worst seed, over the test part.

## Published figures to compare with

{published}

Networks and training differ from ours in all of them: sizes, encoders, epochs, augmentation and normalisation are the authors'
own. They place our figures; they are no contest on equal terms. The figures are quoted, not measured again.

## Protocol

- Settings are chosen on a validation part: the last 5,000 training images, or a stratified fifth of a small training set.
- The final network is trained on the whole training set with the chosen settings. The test part is read once, after the
  last epoch.
- SigProp and BPTT are trained with and without homeostasis. SigProp without it has the settings chosen with it.
- Figures are the mean and sample standard deviation of three seeds. A seed sets weights, order and projections, not the split.
- All rules of a task have the same network, encoder, epochs, batch and augmentation; the column "settings" names exceptions.
- Health is measured over the test part, before and after training, and during training over the epochs. Dead: never spikes.
  Nearly dead: spikes in less than 1 % of the samples. Saturated: spikes at every step.

Configurations tried on the validation part, per rule, and in brackets the networks trained for them (the same settings with
another seed or fewer training images are one configuration):

{tried}

Command and versions are those of the last process that wrote to a file; a `+` behind a commit: tracked files had been changed.

{provenance}

## Everything

Shares and rates: at the start → after training, worst layer of the worst seed. 8 bits: the same network in the integers of the
Loihi simulator, with 8-bit weights. Seconds are of training, with whatever else ran on the machine. Older: made with settings
that `benchmarks/tasks.py` no longer has.

{tasks}

## Stress

The same network is started with 0, 50, 80 or 100 % of its hidden neurons dead, by each of three dials: all weights smaller, all
thresholds higher, all biases lower. It is then trained as ever. Revival: the share of the neurons dead at the start that spike
after training. Death: the share of those alive at the start that are dead afterwards. Both are measured over the training
images used. Learning rates are those of the healthy start. `python benchmarks/stress.py --help` has the details.

{under}

{stress}

## Speed, memory and scale

{speed}

## Misses and what was tried

{notes}

## How to reproduce

`make benchmarks DATA=DIR`, where DIR holds the data files (or `SPIKEPROP_DATA` names it), runs everything and writes this page.
It takes hours; every script goes on where it was stopped. This page alone: `python benchmarks/results_page.py`.

Missing cells, and the commands that make them:

{gaps}
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder that the page and its plots are written into")
    arguments = parser.parse_args(argv)
    drawn: dict[str, Any] = plots(read(arguments.results), results_speed.read(arguments.results))
    for name, plot in drawn.items():
        write(arguments.docs / name, plot)
    for path in {*arguments.docs.glob("results*.svg")} - {arguments.docs / name for name in drawn}:
        path.unlink()
    write_text(arguments.docs / "results.md", page(arguments.results))
    print(f"wrote {arguments.docs / 'results.md'} and {len(drawn)} plots")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
