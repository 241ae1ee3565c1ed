"""What the files of evidence.py and stress.py say: rows, goals reached and missed, claims, and what is missing."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import evidence
import stress
from common import Key, read_json
from tasks import RULES_OF_THE_TABLE, TASKS, default_homeostasis, homeostasis_of, recipe, settings_of

Row = dict[str, Any]
Found = dict[str, dict[str, Any]]  # by the file's name its content, without cells where there is no file
Start = tuple[str, float]  # dial and level

SEEDS = (0, 1, 2)  # a goal is judged by no fewer
SIGPROP = {"sigprop-surrogate": "SigProp surrogate", "sigprop-membrane": "SigProp membrane"}
GOALS = {
    "mnist-mlp": 0.986,
    "fashion-mnist-mlp": 0.900,
    "mnist-conv": 0.993,
    "fashion-mnist-conv": 0.920,
    "nmnist": 0.95,
    "braille": 0.95,
}
BEHIND = 0.003  # accuracy that a SigProp option may lie below our own BPTT
COST = 0.001  # accuracy that homeostasis may take
ROUNDING = 1e-9  # of differences between such figures
DEAD, RATE = 0.005, 0.15  # the most of any layer
STRESSED, REVIVAL, LOST = 0.8, 0.95, 0.005  # at this level: the least revived, the most accuracy lost to the healthy start
GOAL_NAMES = (
    "accuracy",
    "within 0.3 points of our BPTT",
    "dead ≤ 0.5 % in every layer",
    "rate ≤ 0.15 in every layer",
    "homeostasis costs ≤ 0.1 points",
)
STRESS_GOAL_NAMES = ("revival ≥ 95 %", "accuracy within 0.5 points of the healthy start")
STRESS = tuple(stress.BENCHMARKS)
STARTS: list[Start] = [("healthy", 0.0), *itertools.product(stress.DIALS, sorted(filter(None, stress.LEVELS)))]


# --- Rows --------------------------------------------------------------------------------------------------------------------


def read(folder: Path) -> Found:
    names = [f"{kind}-{task}" for kind in ("evidence", "tuning") for task in TASKS] + [f"stress-{data}" for data in STRESS]
    return {name: read_json(folder / f"{name}.json") or {"cells": []} for name in names}


def rows_of(file: dict[str, Any]) -> list[Row]:
    """evidence.py's summary per rule, homeostasis, settings and number of training images, with these and the cells."""
    groups: dict[str, dict[Key, Any]] = {}
    for cell in file["cells"]:
        settings, images = settings_without_watch(cell), cell["samples"]["train"]
        key = json.dumps([cell["rule"], cell["homeostasis"], settings, images], sort_keys=True)
        groups.setdefault(key, {})[(cell["seed"],)] = cell | {"settings": settings}
    rows = []
    for own in groups.values():
        cells = list(own.values())
        extra = {"cells": cells, "settings": cells[0]["settings"], "images": cells[0]["samples"]["train"]}
        rows.append(evidence.summarise(own)[0] | extra)
    return rows


def settings_without_watch(cell: dict[str, Any]) -> dict[str, Any]:
    """A cell's settings, but for whether its training was watched, which changes no figure."""
    return {name: value for name, value in cell["settings"].items() if name != "watch"}


def stress_rows(file: dict[str, Any]) -> list[Row]:
    """stress.py's summary per rule, homeostasis, dial and level."""
    return stress.summarise({tuple(cell[name] for name in stress.NAMES): cell for cell in file["cells"]})


def is_of(row: Row, rule: str, homeostasis: str) -> bool:
    return (row["rule"], row["homeostasis"]) == (rule, homeostasis)


def is_final(task: str, row: Row) -> bool:
    """Whether a row has the settings that tasks.py gives the final cells."""
    wanted = settings_of(task, row["rule"], row["homeostasis"])
    return bool(row["settings"] == json.loads(json.dumps(wanted | {"recipe": recipe(row["rule"], wanted, row["homeostasis"])})))


def chosen_homeostasis(found: Found, task: str, rule: str) -> str:
    """By validation accuracy on the whole training part, with the final settings where they were tried; else the default."""
    rows = [row for row in rows_of(found[f"tuning-{task}"]) if row["rule"] == rule]
    rows = [row for row in rows if row["images"] == max(other["images"] for other in rows)]
    rows = [row for row in rows if is_final(task, row)] or rows
    best = max(rows, key=lambda row: row["accuracy"]["readout"]["mean"], default={"homeostasis": default_homeostasis(rule)})
    return str(best["homeostasis"])


def headline(found: Found, task: str, rule: str) -> Row | None:
    """The row of the final cells with the homeostasis that validation chose; other settings than tasks.py's come last."""
    homeostasis = chosen_homeostasis(found, task, rule)
    rows = [row for row in rows_of(found[f"evidence-{task}"]) if is_of(row, rule, homeostasis)]
    return max(rows, key=lambda row: (is_final(task, row), len(row["seeds"])), default=None)


# --- Goals -------------------------------------------------------------------------------------------------------------------


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def points(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:+.2f}"


def verdict(seeds: Sequence[int], met: bool | None) -> str:
    """Open where a figure is missing or of too few seeds."""
    return "open" if met is None or len(seeds) < len(SEEDS) else "reached" if met else "**missed**"


def tally(verdicts: Iterable[str]) -> str:
    """For example "3 of 4 reached, 1 **missed**"."""
    given = list(verdicts)
    others = [f", {given.count(name)} {name}" for name in ("**missed**", "open") if name in given]
    return f"{given.count('reached')} of {len(given)} reached{''.join(others)}"


def behind(row: Row | None, baseline: Row | None) -> float | None:
    """Accuracy minus that of the baseline."""
    if row is None or baseline is None:
        return None
    return float(row["accuracy"]["readout"]["mean"] - baseline["accuracy"]["readout"]["mean"])


def goals_of(found: Found, task: str, rule: str) -> list[tuple[str, str]]:
    """Figure and verdict per goal of GOAL_NAMES."""
    row, baseline = headline(found, task, rule), headline(found, task, "bptt")
    on, off = (
        next((row for row in rows_of(found[f"evidence-{task}"]) if is_of(row, rule, kind) and is_final(task, row)), None)
        for kind in ("on", "off")
    )
    if row is None:
        return [("-", "open")] * len(GOAL_NAMES)
    seeds, mean, difference = row["seeds"], row["accuracy"]["readout"]["mean"], behind(row, baseline)
    fewest = min(seeds, [] if baseline is None else baseline["seeds"], key=len)
    gained, compared = behind(on, off), min(([] if one is None else one["seeds"] for one in (on, off)), key=len)
    return [
        (f"{mean:.4f}, goal {GOALS[task]:.3f}", verdict(seeds, mean >= GOALS[task])),
        (points(difference), verdict(fewest, None if difference is None else difference >= -BEHIND - ROUNDING)),
        (f"{100 * row['worst']['dead']:.2f} %", verdict(seeds, row["worst"]["dead"] <= DEAD)),
        (f"{row['worst']['rate']:.3f}", verdict(seeds, row["worst"]["rate"] <= RATE)),
        (points(gained), verdict(compared, None if gained is None else gained >= -COST - ROUNDING)),
    ]


def stress_goals(rows: Sequence[Row], rule: str, homeostasis: str, dial: str) -> list[tuple[str, str]]:
    """Figure and verdict per goal of STRESS_GOAL_NAMES."""
    at = [row for row in rows if is_of(row, rule, homeostasis) and (row["dial"], row["level"]) == (dial, STRESSED)]
    if not at:
        return [("-", "open")] * len(STRESS_GOAL_NAMES)
    seeds, back, change = at[0]["seeds"], at[0]["revival"]["mean"], at[0]["accuracy_change"]["mean"]
    return [
        (percent(back), verdict(seeds, None if back is None else back >= REVIVAL)),
        (points(change), verdict(seeds, None if change is None else change >= -LOST)),
    ]


# --- Claims ------------------------------------------------------------------------------------------------------------------


def claims(rows: Sequence[Row]) -> list[str]:
    """What the stress benchmark shows, in sentences that its figures choose: means over seeds, at all starts measured."""
    stressed = [row for row in rows if row["revival"]["mean"] is not None]
    lines = []
    for homeostasis, words in {"off": "Without homeostasis", "on": "With homeostasis"}.items():
        own = [row for row in stressed if row["homeostasis"] == homeostasis]
        revived: dict[str, list[str]] = {}
        kept: dict[str, list[str]] = {}
        for rule in dict.fromkeys(row["rule"] for row in own):
            starts = sorted((row for row in own if row["rule"] == rule), key=lambda row: row["revival"]["mean"])
            least, most = (row["revival"]["mean"] for row in (starts[0], starts[-1]))
            name = f"`{rule}`" + f" (of {len(starts)} starts measured)" * (len(starts) < len(STARTS) - 1)
            if most == 0.0:
                said, which = "every dead neuron stays dead, at every start, under", name
            elif least >= REVIVAL:
                said, which = f"at least {100 * REVIVAL:g} % of the dead neurons come back, at every start, under", name
            else:
                said = "how many come back depends on the start under"
                which = f"`{rule}` ({percent(least)} at {start_of(starts[0])}, {percent(most)} at {start_of(starts[-1])})"
            revived.setdefault(said, []).append(which)
            known = [row for row in starts if row["accuracy_change"]["mean"] is not None]
            if worst := min(known, key=lambda row: row["accuracy_change"]["mean"], default=None):
                change = worst["accuracy_change"]["mean"]
                if change >= -LOST:
                    said, which = f"no start costs more than {100 * LOST:g} points of accuracy under", name
                else:
                    said, which = (
                        "the worst start changes accuracy by",
                        f"{points(change)} points under `{rule}` ({start_of(worst)})",
                    )
                kept.setdefault(said, []).append(which)
        for groups in (revived, kept):
            if groups:
                lines.append(f"{words}, " + "; ".join(f"{said} {', '.join(names)}" for said, names in groups.items()) + ".")
    dying = [row for row in rows if row["death"]["mean"] is not None]
    if worst := max(dying, key=lambda row: row["death"]["mean"], default=None):
        of = f"`{worst['rule']}`, homeostasis {worst['homeostasis']}, {start_of(worst)}"
        share = worst["death"]["mean"]
        said = f"In the worst case {percent(share)} of the neurons alive at the start are dead afterwards ({of})."
        lines.append(said if share else "No neuron that was alive at the start is dead afterwards.")
    return lines


def start_of(row: Row) -> str:
    return f"{row['dial']} {row['level']:g}" if row["level"] else "healthy"


# --- Gaps --------------------------------------------------------------------------------------------------------------------


def missing(found: Found) -> list[list[str]]:
    """Per gap: the file, its cells in words, and the command that makes them."""
    gaps = []
    for task in TASKS:
        rows, name = rows_of(found[f"evidence-{task}"]), f"evidence-{task}"
        have = {
            (row["rule"], row["homeostasis"], "", 0.0, seed) for row in rows if is_final(task, row) for seed in row["seeds"]
        }
        usual, chosen = [], []
        for rule in RULES_OF_THE_TABLE:
            own = homeostasis_of(rule)
            usual += [(rule, homeostasis) for homeostasis in own]
            chosen += [(rule, one) for one in [chosen_homeostasis(found, task, rule)] if one not in own]
        gaps += _gaps(name, f"evidence.py --task {task}", usual, [("", 0.0)], have)
        gaps += _gaps(name, f"evidence.py --task {task}", chosen, [("", 0.0)], have, whole=False)
        tuned = {row["rule"] for row in rows_of(found[f"tuning-{task}"])}
        if lacking := [rule for rule in RULES_OF_THE_TABLE if rule not in tuned]:
            command = f"`python benchmarks/evidence.py --task {task} --rules {' '.join(lacking)} --try`"
            gaps.append([f"tuning-{task}", f"nothing tried: {' '.join(lacking)}", command])
    for data in STRESS:
        have = {tuple(cell[name] for name in stress.NAMES) for cell in found[f"stress-{data}"]["cells"]}
        kinds = list(itertools.product(stress.LEARNING_RATES[data], ("off", "on")))
        gaps += _gaps(f"stress-{data}", f"stress.py --data {data}", kinds, STARTS, have)
    return gaps


def _gaps(
    file: str, order: str, kinds: Sequence[tuple[str, str]], starts: Sequence[Start], have: set[Any], whole: bool = True
) -> list[list[str]]:
    """Cells lacking the same seeds share a line. With ``whole``, the bare command makes all of the kinds."""
    alike: dict[Any, list[str]] = {}  # homeostasis, seeds and starts: rules
    for rule, homeostasis in kinds:
        lacking: dict[Any, list[Start]] = {}
        for start in starts:
            lacking.setdefault(tuple(seed for seed in SEEDS if (rule, homeostasis, *start, seed) not in have), []).append(start)
        for seeds, own in lacking.items():
            if seeds:
                alike.setdefault((homeostasis, seeds, tuple(own)), []).append(rule)
    total = sum(len(seeds) * len(own) * len(rules) for (_, seeds, own), rules in alike.items())
    if whole and total == len(kinds) * len(starts) * len(SEEDS):
        return [[file, f"all {total}", f"`python benchmarks/{order}`"]]
    gaps = []
    for (homeostasis, seeds, own), rules in alike.items():
        options = f"--rules {' '.join(rules)} --homeostasis {homeostasis} --seeds {' '.join(map(str, seeds))}"
        words = options.replace("--", "")
        if len(starts) > 1:
            words += ": " + ("all starts" if len(own) == len(starts) else ", ".join(f"{dial} {level:g}" for dial, level in own))
        if len(own) < len(starts):
            dials = [dial for dial in stress.DIALS if dial in dict(own)]
            options += f" --dials {' '.join(dials)}" * bool(dials) + f" --levels {' '.join(sorted({f'{s[1]:g}' for s in own}))}"
        gaps.append([file, words, f"`python benchmarks/{order} {options}`"])
    return gaps
