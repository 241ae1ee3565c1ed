"""The comparison of rules: every cell is what the library gives, a stopped one goes on, and what cannot run says so first."""

import csv
import json
from functools import partial

import pytest
import torch
from oracle import gradients, random_batch, random_network

import spikeprop as sp
from spikeprop import alignment, catalogue, comparison
from spikeprop.cli import main
from spikeprop.models import mlp
from spikeprop.rules.base import learned_by

TINY = ["--model", "mlp:12,12", "--num-steps", "3", "--epochs", "1", "--batch-size", "64"]


@pytest.fixture(scope="module", autouse=True)
def coarse_grid():
    """Two learning rates instead of five: each is a process that takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "GRID", (3e-3, 1e-2))
        yield


@pytest.fixture(scope="module")
def compared(tmp_path_factory, coarse_grid):
    """Two rules, two seeds, one epoch."""
    folder = tmp_path_factory.mktemp("compare")
    assert main(["compare", "--rules", "sigprop-membrane,bptt", "--seeds", "2", *TINY, "--out", str(folder), "--json"]) == 0
    return folder, json.loads((folder / "compare.json").read_text())


def test_a_row_says_what_was_promised(compared):
    rows = {row["rule"]: row for row in compared[1]["rules"]}
    assert list(rows) == ["sigprop-membrane", "bptt"]
    for name, row in rows.items():
        assert 0.0 < row["accuracy"]["mean"] < 1.0 and row["accuracy"]["std"] >= 0.0 and len(row["accuracy"]["seeds"]) == 2
        assert all(len(row[key]) == 2 for key in ("dead", "nearly_dead", "saturated", "firing_rate", "alignment"))
        assert row["seconds_per_epoch"] > 0 and row["peak_memory_mib"] > 0 and row["samples"] == 355
        assert row["learning_rate"] in comparison.GRID
        assert row["paper"] == catalogue.find(name).facts.paper
    assert rows["bptt"]["alignment"] == pytest.approx([1.0, 1.0])
    assert rows["bptt"]["needs"]["backward"] == "layers and time" and rows["sigprop-membrane"]["needs"]["backward"] == "nothing"
    assert all(abs(value) < 0.999 for value in rows["sigprop-membrane"]["alignment"])
    searched = compared[1]["searched"]["bptt"]
    accuracies = searched["validation_accuracy"]
    assert set(accuracies) == {str(rate) for rate in comparison.GRID}
    assert accuracies[str(searched["chosen"])] == max(accuracies.values())


def test_a_cell_is_what_the_library_gives(compared):
    cell = next(cell for cell in compared[1]["cells"] if (cell["rule"], cell["seed"]) == ("sigprop-membrane", 1))
    data = sp.data.load("digits")
    network = mlp(data.input_shape, [12, 12], 10, seed=1)
    rule = sp.SigProp(optimizer=partial(torch.optim.Adam, lr=cell["learning_rate"], fused=True))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        sp.fit(network, rule, data, num_steps=3, epochs=1, batch_size=64, seed=1, progress=False)
    finally:
        torch.set_num_threads(threads)
    assert cell["accuracy"] == sp.evaluate(network, data.test, 3).accuracy
    assert cell["dead"] == sp.dead_neurons(network, data.test, 3).share("dead")


def test_page_and_csv_hold_the_figures(compared):
    folder, found = compared
    rows = list(csv.DictReader((folder / "compare.csv").open()))
    means = {row["rule"]: row["accuracy"]["mean"] for row in found["rules"]}
    assert {row["rule"]: float(row["accuracy_mean"]) for row in rows} == means
    page = (folder / "compare.html").read_text()
    assert all(f"{mean:.4f}" in page for mean in means.values())
    assert page.count("<svg") == 6 and "http" not in page.replace("http://www.w3.org", "")


def test_it_goes_on_where_it_was(compared, capsys):
    """A second run makes nothing anew; a removed cell is made again, to the same figures."""
    folder, found = compared
    order = ["compare", "--rules", "sigprop-membrane,bptt", "--seeds", "2", *TINY, "--out", str(folder), "--json"]
    assert main(order) == 0
    assert "seed" not in capsys.readouterr().err
    lost = {**found, "cells": [cell for cell in found["cells"] if cell["seed"] == 0 or cell["rule"] == "bptt"]}
    (folder / "compare.json").write_text(json.dumps(lost))
    assert main(order) == 0
    shown = capsys.readouterr()
    assert shown.err.count("test: sigprop-membrane, seed 1") == 1 and "bptt" not in shown.err
    again = json.loads(shown.out)
    for before, after in zip(found["rules"], again["rules"], strict=True):
        assert before["accuracy"] == after["accuracy"] and before["alignment"] == after["alignment"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rules", "bptt,backprop"], "unknown rule 'backprop'; known: bptt, bptt-hard, shallow"),
        (
            ["--rules", "bptt", "--memory-limit", "0.01"],
            "MiB, more than 0.01; use a smaller model or batch, fewer steps or another",
        ),
        (
            ["--rules", "e-prop, forward-mode", "--model", "conv:2-4"],
            "which is convolutional; use dense layers (mlp), or another rule",
        ),
        (["--encoder", "events"], "the events encoder does not suit the data set digits"),
        (["--seeds", "0"], "'0' is not a whole number of at least 1"),
        (["--model", "mlp:x"], "model 'mlp:x' is not understood"),
    ],
)
def test_what_cannot_run_says_so_first(words, message, tmp_path, capsys):
    assert main(["compare", *TINY, *words, "--out", str(tmp_path / "x")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_batches_larger_than_the_data_are_compared_and_what_a_rule_refuses_is_left_out(tmp_path, capsys):
    names, tiny = "shallow,e-prop", ["--model", "conv:2-4", "--num-steps", "2", "--epochs", "1", "--batch-size", "2000"]
    assert main(["compare", "--rules", names, "--seeds", "1", *tiny, "--out", str(tmp_path), "--json"]) == 0
    shown, refused = json.loads(capsys.readouterr().out)["rules"]
    assert (shown["rule"], refused["rule"]) == ("shallow", "e-prop")
    assert shown["accuracy"]["std"] is None and "EProp cannot train layer 1" in refused["refused"]
    assert "EProp cannot train layer 1" in (tmp_path / "compare.html").read_text()


def test_alignment_sees_all_steps_of_a_rule_that_updates_often():
    network = random_network()
    inputs, labels = random_batch(network, steps=6)
    often = sp.BPTT(update_every=2)
    assert alignment.alignment(network, often, often.initial_state(network), inputs, labels) == pytest.approx([1.0, 1.0])
    rare = sp.SigProp(update_every=7)
    once = alignment.updates(network, sp.SigProp(), sp.SigProp().initial_state(network), inputs, labels)
    assert torch.equal(alignment.updates(network, rare, rare.initial_state(network), inputs, labels)[0][0], once[0][0])


def test_alignment_is_the_cosine_of_the_weights():
    network = random_network()
    inputs, labels = random_batch(network)
    before = [tensor.clone() for tensor in learned_by(network)]
    rule = sp.SigProp()
    state = rule.initial_state(network, generator=torch.Generator().manual_seed(0))
    found = alignment.alignment(network, rule, state, inputs, labels)
    ours = alignment.updates(network, rule, state, inputs, labels)
    theirs = gradients(network, inputs, labels)
    expected = [
        torch.nn.functional.cosine_similarity(layer[0].flatten(), theirs[2 * index].flatten(), dim=0).item()
        for index, layer in enumerate(ours[:-1])
    ]
    assert found == pytest.approx(expected, abs=1e-9)
    assert all(torch.equal(a, b) for a, b in zip(before, learned_by(network), strict=True))
    assert alignment.alignment(network, sp.BPTT(), sp.BPTT().initial_state(network), inputs, labels) == pytest.approx(
        [1.0, 1.0]
    )
    network.readout.weight.zero_()  # backpropagation has nothing to send down
    assert alignment.alignment(network, rule, state, inputs, labels) == [None, None]
