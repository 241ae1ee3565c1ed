"""docs/results.md is made from the committed results, and says of known figures what they are."""

from __future__ import annotations

import importlib
import json
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
BENCHMARKS = REPOSITORY / "benchmarks"
VERSIONS = {"python": "3.11", "cpu": "none"}


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The modules of benchmarks/ by their names."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    names = ("results_page", "results_rows", "results_plots", "results_speed", "evidence", "stress", "tasks", "scaling")
    return SimpleNamespace(**{name: importlib.import_module(name) for name in names})


def evidence_cell(
    scripts: Any, task: str, rule: str, homeostasis: str, seed: int, accuracy: float, **more: Any
) -> dict[str, Any]:
    """A final cell of two layers; with ``images`` one that looks at validation. ``dead`` and ``rate`` are those of layer 2."""
    chosen = scripts.tasks.settings_of(task, rule, homeostasis, more.get("settings"))
    recipe = scripts.tasks.recipe(rule, chosen, homeostasis)
    settings = chosen | {"watch": more.get("watch", False), "recipe": recipe}
    health = {"dead": [0.0, more.get("dead", 0.0)], "rate": [0.05, more.get("rate", 0.1)]}
    health |= {"nearly_dead": [0.0, 0.125], "saturated": [0.0, 0.0]}
    cell = {"rule": rule, "homeostasis": homeostasis, "seed": seed, "settings": settings, "commit": "abc", "seconds": 7.0}
    cell |= {"accuracy": {"readout": accuracy}, **health, "start": health | {"dead": [0.25, 0.5]}}
    cell |= {"epochs": {"dead": [[0.2, 0.1], [0.0, 0.3]], "rate": [[0.1, 0.1], [0.2, 0.1]]}}
    final = {"loihi": {"accuracy": accuracy - 0.001}, "samples": {"train": 60_000, "looked_at": 10_000}}
    return cell | ({"samples": {"train": more["images"], "looked_at": 5}} if "images" in more else final)


def stress_cell(
    rule: str, homeostasis: str, dial: str, level: float, seed: int, accuracy: float, revival: float
) -> dict[str, Any]:
    after = level * (1.0 - revival)
    cell = {"rule": rule, "homeostasis": homeostasis, "dial": dial, "level": level, "seed": seed, "accuracy": accuracy}
    cell |= {"value": 2.0 if level else None, "dead": {"before": level, "after": after}, "commit": "abc", "settings": {}}
    cell |= {"revival": revival if level else None, "death": 0.0 if level < 1.0 else None, "seconds": 1.0}
    return cell | {"layers": {"before": {"dead": [level, level]}}}


def write(folder: Path, name: str, cells: list[dict[str, Any]]) -> None:
    content = {"cells": cells, "versions": VERSIONS, "command": f"python benchmarks/{name}.py"}
    (folder / f"{name}.json").write_text(json.dumps(content))


def lines_of(page: str, start: str) -> list[str]:
    return [line for line in page.splitlines() if line.startswith(start)]


@pytest.fixture
def known(scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Results of MNIST whose verdicts are known, whatever settings validation chose in truth."""
    monkeypatch.setattr(scripts.tasks, "CHOSEN", {})

    def cells(rule: str, homeostasis: str, accuracies: list[float], **more: Any) -> list[dict[str, Any]]:
        return [
            evidence_cell(scripts, "mnist-mlp", rule, homeostasis, seed, accuracy, **more)
            for seed, accuracy in enumerate(accuracies)
        ]

    final = cells("sigprop-surrogate", "on", [0.985, 0.987, 0.989])
    final += cells("sigprop-membrane", "on", [0.981, 0.979, 0.980], dead=0.006, rate=0.1501)
    final += cells("bptt", "on", [0.988, 0.988, 0.988]) + cells("bptt", "off", [0.990, 0.990, 0.990])
    final[4]["dead"] = [0.0, 0.0]  # the worst seed counts, not the mean
    tried = cells("bptt", "on", [0.98], images=55_000) + cells("bptt", "off", [0.97], images=55_000)
    tried += cells("bptt", "off", [0.99], images=1_000)  # fewer images decide nothing
    tried += cells("bptt", "off", [0.97], images=55_000, watch=True)
    tried += cells("bptt", "off", [0.999], images=55_000, settings={"learning_rate": 0.1})  # nor do other settings
    write(tmp_path, "evidence-mnist-mlp", final)
    write(tmp_path, "tuning-mnist-mlp", tried)
    return tmp_path


def test_the_page_and_its_plots_are_made_from_the_results(scripts: Any) -> None:
    page, order = scripts.results_page, "run: python benchmarks/results_page.py"
    assert page.page() == (page.DOCS / "results.md").read_text(encoding="utf-8"), order
    held = {path.name: scripts.results_plots.held(path) for path in page.DOCS.glob("results*.svg")}
    assert held == scripts.results_plots.plots(scripts.results_rows.read(page.RESULTS), scripts.results_speed.read()), order


def test_goals_of_speed_take_the_slower_option(scripts: Any, tmp_path: Path) -> None:
    def times(option: float) -> dict[str, Any]:
        return {"snntorch": {"median": option}, "BPTT by hand, bfloat16": {"median": 1.8}}

    both = {"sigprop-surrogate": times(3.1), "sigprop-membrane": times(2.9)}
    cell = {"work": "mlp, T = 25", "precision": "medium", "threads": 1, "times": both, "ms": {}, "commit": "abc"}
    write(tmp_path, "speed", [cell, cell | {"work": "mlp, T = 100", "times": {"sigprop-surrogate": times(9.0)}}])
    found = scripts.results_speed.goals(scripts.results_speed.read(tmp_path))
    verdicts = {tuple(line[:4:3]): line[-2:] for line in found if line[1] == "medium" and line[2].startswith("sigprop-")}
    assert verdicts["mlp, T = 25", "snntorch"] == ["3.10 / 2.90", "**missed**"]
    assert verdicts["mlp, T = 25", "BPTT by hand, bfloat16"] == ["1.80 / 1.80", "reached"]
    assert verdicts["mlp, T = 100", "snntorch"] == ["9.00", "open"]  # one option alone judges nothing
    assert verdicts["conv, T = 10", "snntorch"] == ["-", "open"]


def test_an_exponent_is_the_slope_of_the_logarithms(scripts: Any) -> None:
    fitted = scripts.scaling.exponent([1.0, 2.0, 4.0, 8.0], [3.0, 3.0 * 2**1.5, 3.0 * 4**1.5, 3.0 * 8**1.5])
    assert fitted["exponent"] == pytest.approx(1.5) and fitted["error"] == pytest.approx(0.0, abs=1e-9)
    cells = [{"axis": "depth", "value": value, "ms": {"a": {"median": 5.0}}} for value in (1, 2, 4)]
    assert scripts.scaling.summarise(cells)["depth"]["a"]["exponent"] == pytest.approx(0.0)


def test_known_figures_give_known_cells_and_misses(scripts: Any, known: Path) -> None:
    page = scripts.results_page.page(known)
    assert lines_of(page, "| mnist-mlp | 0.") == [
        "| mnist-mlp | 0.9870 ± 0.0020 (on) | 0.9800 ± 0.0010 (on) | 0.9880 ± 0.0000 (on) | -0.10 / -0.80 | 0.986 "
        "| reached / **missed** |"
    ]
    assert lines_of(page, "| mnist-mlp | SigProp") == [
        "| mnist-mlp | SigProp surrogate | reached (0.9870, goal 0.986) | reached (-0.10) | reached (0.00 %) "
        "| reached (0.100) | open (-) |",
        "| mnist-mlp | SigProp membrane | **missed** (0.9800, goal 0.986) | **missed** (-0.80) | **missed** (0.60 %) "
        "| **missed** (0.150) | open (-) |",
    ]
    assert "- accuracy: 1 of 12 reached, 1 **missed**, 10 open" in page
    assert lines_of(page, "| braille | missing") == ["| braille | missing | missing | missing | - / - | 0.950 | open / open |"]
    assert lines_of(page, "| `bptt` | off | 0 1 2") == [
        "| `bptt` | off | 0 1 2 | 0.9900 ± 0.0000 | - | - | 0.9890 ± 0.0000 | 50.0 → 0.0 | 12.5 → 12.5 | 0.0 → 0.0 "
        "| 0.100 → 0.100 | 7 | the task's own |"
    ]


def test_configurations_are_counted_once(scripts: Any, known: Path) -> None:
    """Watched or not, with fewer images or with more seeds, a configuration is one."""
    page = scripts.results_page.page(known)
    assert lines_of(page, "| mnist-mlp | 0 (0)") == ["| mnist-mlp | 0 (0) | 0 (0) | 0 (0) | 3 (5) | 0 (0) |"]
    assert len(lines_of(page, "| `bptt` | off | the task's own | 55000 | 1 | 0.9700")) == 1
    assert len(lines_of(page, "| `bptt` | off | learning_rate=0.1 | 55000 | 1 | 0.9990")) == 1


def test_what_homeostasis_costs_needs_three_seeds_of_both(scripts: Any, tmp_path: Path) -> None:
    on = [evidence_cell(scripts, "braille", "sigprop-surrogate", "on", seed, 0.97) for seed in (0, 1, 2)]
    off = [evidence_cell(scripts, "braille", "sigprop-surrogate", "off", seed, 0.9714 - 0.0002 * seed) for seed in (0, 1, 2)]
    for accuracies, told in ((off, "**missed** (-0.12)"), (off[1:], "open (-0.11)"), ([], "open (-)")):
        write(tmp_path, "evidence-braille", on + accuracies)
        (line,) = lines_of(scripts.results_page.page(tmp_path), "| braille | SigProp surrogate")
        assert line.endswith(f"| {told} |")
    write(tmp_path, "evidence-braille", on + [cell | {"accuracy": {"readout": 0.9709}} for cell in off])
    (line,) = lines_of(scripts.results_page.page(tmp_path), "| braille | SigProp surrogate")
    assert line.endswith("| reached (-0.09) |")


def test_few_seeds_judge_nothing_and_other_settings_are_told(scripts: Any, tmp_path: Path) -> None:
    cells = [evidence_cell(scripts, "braille", "bptt", "off", seed, 0.97) for seed in (0, 1)]
    older = {"settings": {"num_steps": 3}}
    cells += [evidence_cell(scripts, "braille", "sigprop-surrogate", "on", seed, 0.97, **older) for seed in (0, 1, 2)]
    write(tmp_path, "evidence-braille", cells)
    page = scripts.results_page.page(tmp_path)
    assert lines_of(page, "| braille | 0.9700") == [
        "| braille | 0.9700 ± 0.0000 (on, older settings) | missing | 0.9700 ± 0.0000 (off, 2 of 3 seeds) | +0.00 / - | 0.950 "
        "| reached / open |"
    ]
    (line,) = lines_of(page, "| braille | SigProp surrogate")
    assert "open (+0.00)" in line, "two seeds of BPTT are no baseline"
    lines = [line for line in lines_of(page, "| evidence-braille |") if "sigprop-surrogate" in line]
    assert any("--homeostasis on --seeds 0 1 2" in line for line in lines), "cells of other settings are to be made anew"
    assert "--rules bptt --homeostasis off --seeds 2`" in page


def cells_of(scripts: Any, command: str) -> set[tuple[Any, ...]]:
    """The cells that a command makes, by the parsers of the scripts that would run it."""
    python, path, *options = shlex.split(command)
    assert python == "python" and (REPOSITORY / path).exists()
    if path.endswith("evidence.py"):
        asked = scripts.evidence.parse(options)
        return {
            (asked.task, rule, homeostasis, seed)
            for rule in asked.rules
            for homeostasis in asked.homeostasis or scripts.tasks.homeostasis_of(rule)
            for seed in asked.seeds or (0, 1, 2)
            if asked.tried is None
        }
    asked = scripts.stress.parse(options)
    starts = {(dial, level) if level else ("healthy", 0.0) for dial in asked.dials for level in asked.levels}
    rules = asked.rules or scripts.stress.LEARNING_RATES[asked.data]
    return {
        (asked.data, rule, homeostasis, *start, seed)
        for rule in rules
        for homeostasis in asked.homeostasis
        for start in starts
        for seed in asked.seeds
    }


def test_the_commands_make_all_that_is_missing(scripts: Any, known: Path) -> None:
    everything = {command for *_, command in scripts.results_rows.missing(scripts.results_rows.read(known / "nowhere"))}
    wanted = set().union(*(cells_of(scripts, command.strip("`")) for command in everything))
    assert len(wanted) == 6 * 8 * 3 + (5 + 8) * 2 * 10 * 3, "six tasks of eight rows; the starts of the stress benchmark"

    final = json.loads((known / "evidence-mnist-mlp.json").read_text())["cells"]
    have = {("mnist-mlp", cell["rule"], cell["homeostasis"], cell["seed"]) for cell in final}
    stressed = [
        ("bptt", "off", "healthy", 0.0, 0),
        ("bptt", "off", "weights", 0.5, 2),
        ("sigprop-membrane", "on", "biases", 1.0, 1),
    ]
    write(known, "stress-digits", [stress_cell(*key, 0.9, 1.0) for key in stressed])
    have |= {("digits", *key) for key in stressed}
    tried = [evidence_cell(scripts, "nmnist", "shallow", other, 0, accuracy, images=804) for other, accuracy in (("on", 0.9),)]
    write(known, "tuning-nmnist", tried)  # validation chose what evidence.py would not run by itself
    wanted |= {("nmnist", "shallow", "on", seed) for seed in (0, 1, 2)}

    rows = scripts.results_rows.missing(scripts.results_rows.read(known))
    gaps = [row[-1].strip("`") for row in rows]
    assert ["stress-digits", "rules bptt homeostasis off seeds 0 1: weights 0.5"] in [row[:2] for row in rows]
    made = [cells for gap in gaps if (cells := cells_of(scripts, gap))]
    assert set().union(*made) | have == wanted
    assert all(cells - have for cells in made), "a command that makes nothing"
    assert sum(map(len, made)) - len(wanted - have) == 6, "starts with a hole: the hole's three seeds are asked for twice, each"
    page = scripts.results_page.page(known)
    assert all(gap in page for gap in gaps)
    tuning = [gap for gap in gaps if not cells_of(scripts, gap)]
    assert len(tuning) == 6 and "--rules sigprop-surrogate sigprop-membrane sigprop-raw-membrane shallow --try" in tuning[0]


@pytest.mark.parametrize(
    ("revivals", "said"), [((0.0, 0.0), "stays dead"), ((0.0, 0.25), "depends"), ((0.95, 1.0), "come back")]
)
def test_claims_follow_the_figures(scripts: Any, tmp_path: Path, revivals: tuple[float, float], said: str) -> None:
    """A hard derivative that revives nothing, some, or nearly all; beside it BPTT with a surrogate, which revives all."""
    cells = []
    for seed in (0, 1, 2):
        for rule, (first, second), accuracy in (("bptt-hard", revivals, 0.5), ("bptt", (1.0, 1.0), 0.896)):
            cells.append(stress_cell(rule, "off", "healthy", 0.0, seed, 0.9, 0.0))
            cells.append(stress_cell(rule, "off", "weights", 0.8, seed, accuracy, first))
            cells.append(stress_cell(rule, "off", "weights", 1.0, seed, accuracy, second))
    write(tmp_path, "stress-digits", cells)
    revived, kept, died = lines_of(scripts.results_page.page(tmp_path), "- Without homeostasis") + lines_of(
        scripts.results_page.page(tmp_path), "- No neuron"
    )
    (part,) = [part for part in revived.split("; ") if "`bptt-hard`" in part]
    assert said in part and "(of 2 starts measured)" in revived
    assert ("0.0 % at weights 0.8, 25.0 % at weights 1" in part) == (said == "depends")
    assert ("`bptt`" in part) == (said == "come back"), "BPTT with a surrogate revives all"
    hard, soft = kept.split("; ")
    assert (
        "-40.00 points under `bptt-hard` (weights 0.8)" in hard
        and "no start costs more than 0.5 points" in soft
        and "`bptt`" in soft
    )
    assert died == "- No neuron that was alive at the start is dead afterwards."


def test_goals_of_the_stress_benchmark(scripts: Any, tmp_path: Path) -> None:
    cells = []
    for seed in (0, 1, 2):
        for rule, revival, accuracy in (("sigprop-surrogate", 0.96, 0.8951), ("sigprop-membrane", 0.94, 0.894)):
            cells += [stress_cell(rule, "on", "healthy", 0.0, seed, 0.9, 0.0)]
            cells += [stress_cell(rule, "on", dial, 0.8, seed, accuracy, revival) for dial in ("weights", "biases")]
    write(tmp_path, "stress-fashion-mnist", [cell for cell in cells if (cell["dial"], cell["seed"]) != ("biases", 2)])
    page = scripts.results_page.page(tmp_path)
    assert lines_of(page, "| fashion-mnist | SigProp surrogate | on") == [
        "| fashion-mnist | SigProp surrogate | on | weights | reached (96.0 %) | reached (-0.49) |",
        "| fashion-mnist | SigProp surrogate | on | thresholds | open (-) | open (-) |",
        "| fashion-mnist | SigProp surrogate | on | biases | open (96.0 %) | open (-0.49) |",
    ]
    (line,) = lines_of(page, "| fashion-mnist | SigProp membrane | on | weights")
    assert line.endswith("| **missed** (94.0 %) | **missed** (-0.60) |")
    assert "- revival ≥ 95 %, from 80 % dead, with homeostasis: 1 of 12 reached, 1 **missed**, 10 open" in page


def test_plots_hold_what_they_show_and_nothing_of_the_day(scripts: Any, known: Path, tmp_path: Path) -> None:
    write(known, "stress-digits", [stress_cell("bptt", "off", "weights", level, 0, 0.9, 0.5) for level in (0.5, 1.0)])
    (known / "notes.md").write_text("What we missed.\n")
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "results-braille.svg").write_text("left over")
    arguments = ["--results", str(known), "--docs", str(docs)]
    assert scripts.results_page.main(arguments) == 0
    pictures = {path.name: path.read_bytes() for path in docs.glob("*.svg")}
    assert pictures.keys() == {"results.svg", "results-mnist-mlp.svg", "results-stress-digits.svg"}
    text = (docs / "results.md").read_text(encoding="utf-8")
    assert all(f"({name})" in text for name in pictures) and "\nWhat we missed.\n" in text
    assert scripts.results_page.main(arguments) == 0
    assert pictures == {path.name: path.read_bytes() for path in docs.glob("*.svg")}

    curves = scripts.results_plots.held(docs / "results-mnist-mlp.svg")["panels"]
    assert [line["y"] for line in curves[0]["lines"]] == [[20.0, 30.0]] * 4, "the worst layer of each epoch"
    (stressed,) = scripts.results_plots.held(docs / "results.svg")["panels"][1]["lines"]
    assert (stressed["x"], stressed["y"]) == ([50.0, 100.0], [25.0, 50.0])
    accuracies = {line["rule"]: line for line in scripts.results_plots.held(docs / "results.svg")["panels"][0]["lines"]}
    assert accuracies["bptt"]["x"] == [98.8] and accuracies["sigprop-surrogate"]["xerr"] == [0.2]


def test_make_benchmarks_runs_every_task(scripts: Any) -> None:
    text = (REPOSITORY / "Makefile").read_text()
    (tasks,) = [line.partition(":=")[2].split() for line in text.splitlines() if line.startswith("TASKS")]
    assert tasks == list(scripts.tasks.TASKS) == list(scripts.results_rows.GOALS)
    assert scripts.results_page.PUBLISHED.keys() == scripts.tasks.TASKS.keys()
