"""The stress benchmark kills as many neurons as it says, counts them rightly, and goes on where it stopped."""

from __future__ import annotations

import importlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import spikeprop as sp
from spikeprop import comparison
from spikeprop.evaluation import LayerHealth

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
SETTINGS = {"hidden": [24, 24], "num_steps": 8, "readout": "random"}
SMALL = [
    "--data",
    "digits",
    "--hidden",
    "8",
    "8",
    "--num-steps",
    "6",
    "--epochs",
    "1",
    "--train-samples",
    "64",
    "--batch-size",
    "32",
]
SMALL += ["--rules", "bptt", "sigprop-membrane", "--dials", "weights", "biases", "--levels", "0.8", "0", "--seeds", "0"]


@pytest.fixture
def stress(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """benchmarks/stress.py in this process."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    precision = torch.get_float32_matmul_precision()
    yield importlib.import_module("stress")
    torch.set_float32_matmul_precision(precision)


@pytest.fixture(scope="module")
def digits() -> sp.data.Data:
    data = sp.data.load("digits")
    return replace(data, train=sp.data.Split(data.train.inputs[:300], data.train.labels[:300]))


def dead_by_hand(network: sp.Network, inputs: torch.Tensor) -> float:
    """The share of all hidden neurons without a spike, from the whole record of the run."""
    spikes = [activity.spikes for activity in network.run(inputs.expand(8, *inputs.shape))]
    return float(torch.cat([part.sum((0, 1)) == 0 for part in spikes]).double().mean())


@pytest.mark.parametrize("dial", ["weights", "thresholds", "biases"])
def test_a_dial_reaches_its_level_and_no_more_than_it_must(stress: Any, digits: sp.data.Data, dial: str) -> None:
    def share(value: float) -> float:
        return dead_by_hand(stress.turn(stress.make_network(digits, SETTINGS, 3), dial, value), digits.train.inputs)

    def harder(value: float, factor: float) -> float:
        return value / factor if dial == "weights" else value * factor

    assert share(0.0 if dial == "biases" else 1.0) < 0.1
    for level in (0.25, 0.8):
        value = stress.dial_at(digits, SETTINGS, dial, level, seed=3)
        assert level <= share(value) <= level + 1 / 24, "at most two neurons of 48 more than asked for"
        assert share(harder(value, 1 / 1.005)) < level
    value = stress.dial_at(digits, SETTINGS, dial, 1.0, seed=3)
    assert share(value) == 1.0 == share(harder(value, 1 / 1.24)) > share(harder(value, 1 / 1.26))


def test_dials_turn_what_they_are_named_after(stress: Any, digits: sp.data.Data) -> None:
    """Only ratios to the threshold count: a threshold 3 times as high is weights and biases at a third."""
    inputs = digits.train.inputs[:50].expand(8, 50, 1, 8, 8)
    higher = stress.turn(stress.make_network(digits, SETTINGS, 0), "thresholds", 3.0)
    lower = stress.turn(stress.make_network(digits, SETTINGS, 0), "weights", 1 / 3.0)
    stress.turn(lower, "biases", 0.1 * (1 - 1 / 3.0))  # from 0.1, where mlp starts them
    for one, other in zip(higher.run(inputs), lower.run(inputs), strict=True):
        torch.testing.assert_close(one.membrane, 3.0 * other.membrane, rtol=1e-4, atol=1e-5)
    assert stress.make_network(digits, SETTINGS | {"readout": "zero"}, 0).readout.weight.abs().max() == 0.0


def test_revival_and_death_of_a_pair_made_by_hand(stress: Any) -> None:
    def health(*layers: list[int]) -> sp.Health:
        def layer(counts: list[int]) -> LayerHealth:
            spikes = torch.tensor(counts).double()
            return LayerHealth(len(counts), 0.0, 0.0, 0.0, 0.0, None, spikes, spikes, spikes)

        return sp.Health([layer(counts) for counts in layers], 10, 5)

    before, after = health([0, 0, 0, 7], [1, 2]), health([0, 3, 1, 9], [0, 5])
    first, second = stress.changes(before, after)
    assert (first.dead_before, first.dead_after, first.revival, first.death) == (0.75, 0.25, pytest.approx(2 / 3), 0.0)
    assert (second.dead_before, second.dead_after, second.revival, second.death) == (0.0, 0.5, None, 0.5)
    total = stress.total_change(before, after)
    assert (total.dead_before, total.dead_after) == (0.5, pytest.approx(2 / 6))
    assert (total.revival, total.death) == (pytest.approx(2 / 3), pytest.approx(1 / 3))


def test_a_stopped_run_goes_on_and_makes_no_cell_twice(
    stress: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, run_cell, made = tmp_path / "stress.json", stress.run_cell, []

    def counted(*arguments: Any) -> dict[str, Any]:
        if len(made) == 7:
            raise KeyboardInterrupt
        made.append(arguments[3:])
        return run_cell(*arguments)

    monkeypatch.setattr(stress, "run_cell", counted)
    with pytest.raises(KeyboardInterrupt):
        stress.main([*SMALL, "--out", str(path)])
    assert [dial for dial, *_ in made] == ["healthy"] * 4 + ["weights"] * 3, "healthy starts first, then start by start"
    first = json.loads(path.read_text())["cells"]
    made.clear()
    assert stress.main([*SMALL, "--out", str(path)]) == 0
    results = json.loads(path.read_text())
    assert len(first) == 7 and len(made) == 5 and len(results["cells"]) == 12
    assert all(cell in results["cells"] for cell in first), "their seconds alone would differ had they been made again"
    assert "weights 0.8" in capsys.readouterr().out

    for cell in results["cells"]:
        layers, dead = cell["layers"], cell["dead"]
        assert dead["before"] == statistics.mean(layers["before"]["dead"])  # layers of one size
        assert dead["before"] >= cell["level"] and len(layers["dead_per_epoch"]) == 1
        assert (cell["revival"] is None) == (dead["before"] == 0.0) and (cell["value"] is None) == (cell["level"] == 0.0)
        alike = [
            other["value"] for other in results["cells"] if (other["dial"], other["level"]) == (cell["dial"], cell["level"])
        ]
        assert alike == [cell["value"]] * 4, "all rules start from the same network"
        healthy = next(other for other in results["cells"] if list(other.values())[:3] == [*list(cell.values())[:2], "healthy"])
        row = next(row for row in results["summary"] if list(row.values())[:4] == list(cell.values())[:4])
        assert row["accuracy"] == {"mean": cell["accuracy"], "std": None}
        assert row["accuracy_change"]["mean"] == pytest.approx(cell["accuracy"] - healthy["accuracy"])


def test_mean_and_deviation_leave_out_what_is_missing(stress: Any) -> None:
    assert stress.spread([1.0, None, 2.0]) == {"mean": 1.5, "std": pytest.approx(0.5**0.5)}
    assert stress.spread([None]) == {"mean": None, "std": None}


WORKER = """
import os, sys, time
from common import ResultFile
def make(key):
    time.sleep(float(sys.argv[2]))
    return {"pid": os.getpid()}
file = ResultFile(sys.argv[1], ("rule", "seed"), lambda key: {}, lambda cells: {"cells": list(cells.values())})
input()
file.fill([("r", seed) for seed in range(20)], make)
"""


def test_processes_share_one_file_and_a_killed_one_blocks_nobody(stress: Any, tmp_path: Path) -> None:
    path = tmp_path / "cells.json"
    folders = os.pathsep.join([str(BENCHMARKS), str(BENCHMARKS.parent)])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": folders, "PYTHONUNBUFFERED": "1"}
    orders = [[sys.executable, "-c", WORKER, str(path), seconds] for seconds in ("600", "0.05", "0.05")]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    slow, *others = processes = [subprocess.Popen(order, **pipes) for order in orders]
    try:
        assert slow.stdin is not None and slow.stdout is not None
        slow.stdin.write("\n")
        slow.stdin.flush()
        assert slow.stdout.readline() == "r, seed 0:\n"
        for process in others:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        said = [line for process in others for line in process.communicate(timeout=60)[0].splitlines() if line.endswith(":")]
        cells = json.loads(path.read_text())["cells"]
        assert sorted(cell["seed"] for cell in cells) == list(range(1, 20)), "all but the one that the slow process is at"
        assert sorted(said) == sorted(f"r, seed {seed}:" for seed in range(1, 20)), "each was begun once"
        assert {cell["pid"] for cell in cells} <= {process.pid for process in others}
        slow.kill()
        slow.wait(timeout=60)
    finally:
        for process in processes:
            process.kill()
    file = stress.ResultFile(path, ("rule", "seed"), lambda key: {}, lambda cells: {"cells": list(cells.values())})
    assert len(file.fill([("r", seed) for seed in range(20)], lambda key: {"pid": 0})) == 20
    assert [cell["seed"] for cell in json.loads(path.read_text())["cells"] if cell["pid"] == 0] == [0]


def test_learning_rates_of_digits_are_those_that_came_with_the_package(stress: Any) -> None:
    recipe, rates = stress.BENCHMARKS["digits"], stress.LEARNING_RATES["digits"]
    entries = json.loads(comparison.KNOWN.read_text())["entries"]
    model = "mlp:" + ",".join(map(str, recipe["hidden"]))
    wanted = {"data": "digits", "model": model, "epochs": recipe["epochs"], "num_steps": recipe["num_steps"], "batch_size": 8}
    (entry,) = [entry for entry in entries if entry["settings"].items() >= wanted.items()]
    assert rates == {name: entry["searched"][name]["chosen"] for name in rates}
