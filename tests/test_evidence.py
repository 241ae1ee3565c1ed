"""The evidence table's script keeps its protocol: what is trained on, what is looked at, and what is counted."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import spikeprop as sp
from spikeprop.models import mlp

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def evidence(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The script with one more task, small enough for a test."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    precision = torch.get_float32_matmul_precision()
    script = importlib.import_module("evidence")
    toy = {"data": "digits", "model": "mlp:16", "num_steps": 2, "epochs": 1, "batch_size": 32, "shift": 1}
    monkeypatch.setitem(script.TASKS, "toy", toy)
    yield script
    torch.set_float32_matmul_precision(precision)


def run(evidence: Any, path: Path, *arguments: str) -> dict[str, Any]:
    assert evidence.main(["--task", "toy", "--out", str(path), *arguments]) == 0
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_final_cells_train_on_everything_and_look_at_the_test_part_once(
    evidence: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_at: list[int] = []
    evaluate = sp.evaluate
    monkeypatch.setattr(
        evidence.sp, "evaluate", lambda n, split, *rest: looked_at.append(len(split[1])) or evaluate(n, split, *rest)
    )
    arguments = ("--rules", "sigprop-membrane", "bptt", "--seeds", "0")
    found = run(evidence, tmp_path / "e.json", *arguments)
    data = sp.data.load("digits", full_train=True)
    assert data.test is not None
    assert [(cell["rule"], cell["homeostasis"]) for cell in found["cells"]] == [
        ("bptt", "off"),
        ("bptt", "on"),
        ("sigprop-membrane", "off"),
        ("sigprop-membrane", "on"),
    ]
    for cell in found["cells"]:
        assert cell["samples"] == {"train": len(data.train.labels), "looked_at": len(data.test.labels)}
        assert cell["loihi"]["weight_bits"] == 8 and 0.0 <= cell["loihi"]["accuracy"] <= 1.0
        assert len(cell["dead"]) == len(cell["start"]["dead"]) == len(cell["epochs"]["dead"][0]) == 1
        assert "validation_accuracy" not in cell["epochs"]
    assert looked_at == [len(data.test.labels)] * 4
    again = run(evidence, tmp_path / "e.json", *arguments)
    assert again == found and len(looked_at) == 4, "nothing is made twice, and no test part is read again"


def test_tried_configurations_never_see_the_test_part_and_are_all_kept(evidence: Any, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    data = sp.data.load("digits")
    assert data.validation is not None
    rule = ("--rules", "sigprop-membrane", "--homeostasis", "on")
    run(evidence, path, *rule, "--try", "learning_rate=1e-3")
    found = run(evidence, path, *rule, "--try", "learning_rate=2e-3", "--samples", "200")
    tried = [(cell["tried"], cell["samples"]) for cell in found["cells"]]
    size = len(data.validation.labels)
    assert tried == [
        ({"learning_rate": 1e-3}, {"train": len(data.train.labels), "looked_at": size}),
        ({"learning_rate": 2e-3}, {"train": 200, "looked_at": size}),
    ]
    assert len(found["summary"]) == 2 and not any("loihi" in cell for cell in found["cells"])


def test_the_chip_is_the_network(evidence: Any) -> None:
    """Eight bits hardly change an untrained network's spikes; two bits do."""
    data = sp.data.load("digits")
    network = mlp(data.input_shape, [32], 10, seed=0)
    many, few = (evidence.on_chip(network, data, data.validation, 8, bits)["spike_agreement"][0] for bits in (8, 2))
    assert many > 0.95 > few
