"""The command line: what it prints, what it keeps, how it refuses, and that an interrupted training loses nothing."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import spikeprop as sp
from spikeprop import runs
from spikeprop.backends import lava, loihi, netx, nir
from spikeprop.cli import main
from spikeprop.encoding import Current, Events, Latency, Poisson
from spikeprop.errors import BackendError, SpikepropError
from spikeprop.storage import read_tensors

TINY = ["--model", "mlp:24,16", "--num-steps", "4", "--batch-size", "128"]
TRAIN_KEYS = ["accuracy", "dead", "nearly_dead", "saturated", "firing_rate", "seconds", "peak_memory_mib", "run"]
REPOSITORY = Path(sp.__file__).resolve().parent.parent


def call(capsys, *arguments):
    """``spikeprop ... --json`` in this process: status, the object in the last line, everything on standard error."""
    status = main([*map(str, arguments), "--json"])
    captured = capsys.readouterr()
    return status, json.loads(captured.out.splitlines()[-1]) if captured.out else None, captured.err


def refused(capsys, *arguments):
    """The one line with which a command refuses."""
    status = main(list(map(str, arguments)))
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert status == 2 and captured.out == "" and len(lines) == 1, captured
    assert lines[0].startswith("spikeprop: error: ")
    return lines[0]


def command(*arguments, **options):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "spikeprop.cli", *map(str, arguments)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of three epochs."""
    folder = tmp_path_factory.mktemp("runs") / "a"
    assert main(["train", *TINY, "--epochs", "3", "--out", str(folder), "--json"]) == 0
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it that a test may spoil."""
    return Path(shutil.copytree(finished, tmp_path / "a"))


# --- What the commands print -------------------------------------------------------------------------------------------------


def test_a_run_trained_in_stretches_is_evaluated_in_them(tmp_path, capsys, monkeypatch):
    longest, advance = [], sp.Network.advance
    monkeypatch.setattr(sp.Network, "advance", lambda self, state, x: longest.append(len(x)) or advance(self, state, x))
    out = tmp_path / "run"
    result = call(capsys, "train", *TINY, "--encoder", "poisson", "--chunk", 3, "--epochs", 1, "--out", out)[1]
    longest.clear()
    found = call(capsys, "evaluate", out)[1]
    assert found["accuracy"] == result["accuracy"] and max(longest) == 3


@pytest.mark.parametrize("rule", ["sigprop-surrogate", "sigprop-membrane", "sigprop-raw-membrane"])
def test_train_prints_its_contract_and_leaves_a_run(rule, tmp_path, capsys):
    out = tmp_path / "run"
    status, result, progress = call(capsys, "train", *TINY, "--rule", rule, "--epochs", 3, "--out", out)
    assert status == 0 and list(result) == TRAIN_KEYS
    assert list(result["accuracy"]) == ["readout", "nearest", "tree"] and result["accuracy"]["readout"] > 0.3
    assert all(len(result[name]) == 2 for name in ("dead", "nearly_dead", "saturated", "firing_rate"))
    assert result["run"] == str(out) and result["seconds"] > 0 and result["peak_memory_mib"] > 50
    assert "epoch 3/3" in progress
    kept = {path.name for path in out.iterdir()}
    assert kept == {"config.json", "network.safetensors", "checkpoint.safetensors", "history.json", "result.json"}
    config = json.loads((out / "config.json").read_text())
    assert (config["rule"], config["num_steps"], config["data"], config["data_root"]) == (rule, 4, "digits", None)
    assert config["versions"]["torch"] == torch.__version__
    assert len(runs.load_run(out).history.epochs) == 3


def test_every_result_is_that_of_the_library(finished, capsys):
    run = runs.load_run(finished)
    data = sp.data.load("digits")
    expected = sp.evaluate(run.network, data.test, num_steps=4)
    assert run.result["accuracy"] == expected.accuracy
    status, found, _ = call(capsys, "evaluate", finished)
    assert status == 0 and found == {"run": str(finished), "split": "test", **expected.to_dict()}
    _, found, _ = call(capsys, "evaluate", finished, "--split", "validation")
    assert found["accuracy"] == sp.evaluate(run.network, data.validation, num_steps=4).accuracy
    assert run.history.epochs[-1]["validation_accuracy"] == found["accuracy"]["readout"]

    health = sp.dead_neurons(run.network, data.test, num_steps=4)
    assert [run.result[name] for name in ("dead", "firing_rate")] == [health.share("dead"), health.share("rate")]
    _, found, _ = call(capsys, "diagnose", finished)
    for layer, expected in zip(found["layers"], health.to_dict()["layers"], strict=True):
        assert {name: layer[name] for name in expected} == expected
    assert found["samples"] == 355 and found["before_training"] == run.result["health_before_training"]


def test_diagnose_in_terminal_json_and_page(run, tmp_path, capsys):
    (run / "diagnosis.json").unlink(missing_ok=True)
    status, found, _ = call(capsys, "diagnose", run, "--split", "train", "--out", tmp_path / "d")
    assert status == 0 and json.loads((tmp_path / "d" / "diagnosis.json").read_text()) == {
        key: found[key] for key in found if key != "html"
    }
    trained, data = runs.load_run(run), sp.data.load("digits")
    expected = sp.diagnose(trained.network, data.train, num_steps=4)
    assert [{cause: part["neurons"] for cause, part in layer["causes"].items()} for layer in found["layers"]] == [
        layer.causes for layer in expected.layers
    ]
    fresh = sp.models.mlp((1, 8, 8), [24, 16], 10, seed=0)
    fresh.input_mean.copy_(data.train.inputs.mean(0))
    changes = sp.changes(sp.dead_neurons(fresh, data.train, num_steps=4), expected.health)
    assert found["changes"] == [change.to_dict() for change in changes]
    assert found["band"] == [0.02, 0.15] and [epoch["epoch"] for epoch in found["epochs"]] == [1, 2, 3]
    page = (tmp_path / "d" / "diagnosis.html").read_text()
    assert not re.search(r"https?:|<script|<link|@import|url\((?!#)", page) and "train split of digits" in page
    assert not (run / "diagnosis.json").exists()
    assert main(["diagnose", str(run)]) == 0
    text = capsys.readouterr().out
    assert "test split of digits, over 355 samples" in text and f"see {run / 'diagnosis.html'}" in text
    assert (run / "diagnosis.json").exists()


def test_diagnose_over_other_data(tmp_path, capsys, data_root):
    out = tmp_path / "run"
    small = ["--model", "mlp:12", "--num-steps", "2", "--epochs", "1", "--rule", "shallow"]
    assert call(capsys, "train", "--data", "mnist", "--data-root", data_root, *small, "--out", out)[0] == 0
    status, found, _ = call(capsys, "diagnose", out, "--data", "fashion-mnist", "--data-root", data_root)
    assert status == 0 and (found["data"], found["samples"]) == ("fashion-mnist", 10000)
    split = sp.data.load("fashion-mnist", data_root).test
    expected = sp.diagnose(runs.load_run(out).network, split, num_steps=2)
    assert found["layers"][0]["causes"] == json.loads(json.dumps(expected.layers[0].to_dict()["causes"]))
    assert found["before_training"]["samples"] == 10000
    assert "the inputs have shape (355, 1, 8, 8)" in refused(capsys, "diagnose", out, "--data", "digits")


def test_a_delay_line_is_part_of_the_run(tmp_path, capsys, data_root):
    out, small = tmp_path / "run", ["--model", "mlp:8", "--epochs", "1", "--rule", "shallow"]
    line = ["--delay-line", "0", "8"]
    assert call(capsys, "train", "--data", "braille", "--data-root", data_root, *line, *small, "--out", out)[0] == 0
    run = runs.load_run(out)
    assert run.config["delay_line"] == [0, 8] and run.network.input_shape == (24,)
    assert run.data(data_root).input_shape == (24,)
    assert call(capsys, "simulate", out, "--samples", 3)[0] == 0
    again = tmp_path / "again"
    assert call(capsys, "train", "--start-from", out, "--epochs", 1, "--out", again)[0] == 0
    assert runs.load_run(again).network.input_shape == (24,)


def test_diagnose_where_the_start_of_a_training_is_gone(run, tmp_path, capsys):
    start = Path(shutil.copytree(run, tmp_path / "start"))
    out = tmp_path / "on"
    assert call(capsys, "train", "--start-from", start, "--epochs", 1, "--out", out)[0] == 0
    assert call(capsys, "diagnose", out)[1]["before_training"] is not None
    shutil.rmtree(start)
    status, found, _ = call(capsys, "diagnose", out)
    assert status == 0 and found["before_training"] is None and found["total_change"] is None


def test_before_training_is_what_training_starts_from(finished):
    # One step of training with a vanishing learning rate and no homeostasis changes nothing but the input mean.
    data, network = sp.data.load("digits"), sp.models.mlp((1, 8, 8), [24, 16], 10, seed=0)
    rule = sp.SigProp(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0), homeostasis=None)
    sp.fit(network, rule, data, num_steps=4, epochs=1, progress=False)
    for layer in network.layers:
        layer.rate.zero_()
    expected = sp.dead_neurons(network, data.test, num_steps=4).to_dict()
    assert runs.load_run(finished).result["health_before_training"] == expected


def test_text_goes_to_people_and_only_the_object_to_programs(finished, capsys):
    assert main(["evaluate", str(finished)]) == 0
    assert capsys.readouterr().out.startswith("test accuracy readout 0.")
    assert main(["diagnose", str(finished)]) == 0
    text = capsys.readouterr().out
    assert "nearly dead" in text and "before training" in text and "advice" in text
    assert main(["evaluate", str(finished), "--json"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


@pytest.mark.parametrize("against", ["float", "integer", "none"])
def test_simulate_counts_spikes_and_differences(against, finished, capsys):
    status, found, _ = call(capsys, "simulate", finished, "--engine", "integer", "--against", against, "--samples", 30)
    assert status == 0 and list(found) == ["samples", "layers", "differing_spikes", "accuracy"]
    run, inputs = runs.load_run(finished), sp.data.load("digits").test.inputs[:30]
    chip = loihi.quantize(run.network)
    spikes = loihi.simulate(chip, loihi.encode(chip, inputs, 4)).spikes
    assert [layer["spikes"] for layer in found["layers"]] == [int(layer.sum()) for layer in spikes]
    assert found["samples"] == 30 and list(found["accuracy"]) == ["float", "integer"]
    real = [activity.spikes.numpy() for activity in run.network.run(inputs.expand(4, *inputs.shape))]
    differing = [int((mine != theirs).sum()) for mine, theirs in zip(spikes, real, strict=True)]
    expected = {"float": differing, "integer": [0, 0], "none": [None, None]}[against]
    assert [layer["differing"] for layer in found["layers"]] == expected
    assert found["differing_spikes"] == (None if against == "none" else sum(expected))


def test_float_accuracy_from_spike_counts_is_the_readouts(finished, capsys):
    _, found, _ = call(capsys, "simulate", finished, "--samples", 100000)
    assert found["samples"] == 355
    assert found["accuracy"]["float"] == pytest.approx(runs.load_run(finished).result["accuracy"]["readout"], abs=1e-12)


@pytest.mark.skipif(not lava.available(), reason="Lava is not installed")
def test_simulate_against_lava_differs_in_no_spike(finished, capsys):
    arguments = ["simulate", finished, "--engine", "integer", "--against", "lava", "--samples", 8, "--timeout", 120]
    status, found, _ = call(capsys, *arguments)
    assert status == 0 and found["samples"] == 8 and found["differing_spikes"] == 0
    assert all(layer["differing"] == 0 and layer["spikes"] > 0 for layer in found["layers"])
    assert list(found["accuracy"]) == ["float", "integer", "lava"]
    assert found["accuracy"]["lava"] == found["accuracy"]["integer"]


@pytest.mark.parametrize("bits", [8, 4])
def test_export_writes_what_quantize_makes(bits, finished, tmp_path, capsys):
    path = tmp_path / "new" / "chip.npz"
    status, found, _ = call(capsys, "export", finished, "--to", "loihi", "-o", path, "--weight-bits", bits)
    assert status == 0 and list(found) == ["run", "to", "path", "report"]
    chip = loihi.quantize(runs.load_run(finished).network, bits)
    assert found["report"] == json.loads(json.dumps(chip.report))
    assert all((a.weight == b.weight).all() for a, b in zip(chip.layers, loihi.load(path).layers, strict=True))


def test_export_for_lava_dl_and_nir(finished, tmp_path, capsys):
    network = runs.load_run(finished).network
    status, found, _ = call(capsys, "export", finished, "--to", "net", "-o", tmp_path / "a.net")
    chip = loihi.quantize(network, target="netx")
    assert status == 0 and found["report"] == json.loads(json.dumps(chip.report))
    back = netx.read(tmp_path / "a.net")
    assert all((a.weight == b.weight).all() for a, b in zip(chip.layers, back.layers, strict=True))
    status, found, _ = call(capsys, "export", finished, "--to", "nir", "-o", tmp_path / "a.nir", "--dt", "1e-4")
    assert status == 0 and found["dt"] == 1e-4
    inputs = sp.data.load("digits").test.inputs[:20].expand(4, 20, 1, 8, 8)
    for ours, theirs in zip(network.run(inputs), nir.read(tmp_path / "a.nir").run(inputs), strict=True):
        assert torch.equal(ours.spikes, theirs.spikes) and ours.spikes.any()


def test_export_of_a_bundle(finished, tmp_path, capsys):
    status, found, _ = call(capsys, "export", finished, "--to", "lava", "-o", tmp_path / "b", "--samples", 7)
    assert status == 0 and found["path"] == str(tmp_path / "b")
    with np.load(tmp_path / "b" / "sample.npz") as sample:
        assert sample["messages"].shape == (4, 7, 64) and sample["spikes2"].shape == (4, 7, 16)
    assert "is not an empty folder" in refused(capsys, "export", finished, "--to", "lava", "-o", tmp_path / "b")


def test_parity_in_terminal_json_and_page(finished, tmp_path, capsys):
    arguments = ["parity", finished, "--samples", 12, "--engines", "integer", "nir", "snntorch", "norse", "--out", tmp_path]
    status, found, _ = call(capsys, *arguments)
    assert status == 0 and found["samples"] == 12 and list(found["engines"]) == ["float", "integer", "nir", "snntorch", "norse"]
    assert [pair["differing_spikes"] for pair in found["comparisons"][1:]] == [0, 0, 0]
    assert json.loads((tmp_path / "parity.json").read_text()) == {key: found[key] for key in found if key != "html"}
    page = (tmp_path / "parity.html").read_text()
    assert not re.search(r"https?:|<script|<link|@import|url\((?!#)", page) and page.count("<svg") == 4
    for layer in found["comparisons"][0]["layers"]:
        assert f"<td>{layer['spikes']:,}</td><td>{layer['differing']:,}</td>" in page
    assert main(list(map(str, arguments))) == 0
    text = capsys.readouterr().out
    assert "as trained and NIR in snnTorch: predictions agree on 100.00%" in text and "synaptic operations" in text


def test_parity_fails_where_lava_differs(finished, tmp_path, capsys, monkeypatch):
    """A run of Lava that disagrees in one spike is an exit status of 1."""

    def wrong(chip, messages, **_):
        result = loihi.simulate(chip, messages, record="all")
        result.spikes[1][2, 3, 4] ^= 1
        return lava.LavaRun(result.spikes, result.membranes_after_reset, 1.0)

    monkeypatch.setattr(lava, "run", wrong)
    status, found, _ = call(capsys, "parity", finished, "--samples", 5, "--engines", "lava", "--out", tmp_path)
    assert status == 1
    assert [layer["differing"] for layer in found["comparisons"][1]["layers"]] == [0, 1]
    assert found["comparisons"][1]["layers"][1]["first_differing_step"] == 3


def test_training_on_with_the_chips_weights(finished, tmp_path, capsys):
    words = ["--start-from", finished, "--weight-bits", 3, "--epochs", 1, "--batch-size", 128, "--out", tmp_path / "q"]
    assert call(capsys, "train", *words)[0] == 0
    run = runs.load_run(tmp_path / "q")
    assert run.config["model"] == "mlp:24,16" and run.config["num_steps"] == 4 and run.config["weight_bits"] == 3
    assert all(layer["weight_error"] < 1e-6 for layer in run.quantize(3).report["layers"])
    before = runs.load_run(finished)
    assert run.result["health_before_training"] == before.result["health"]
    line = refused(capsys, "train", *words[:-1], tmp_path / "r", "--model", "mlp:9")
    assert "--model mlp:9: the network of" in line and "has mlp:24,16; leave the option out" in line
    assert "is no run folder" in refused(capsys, "train", "--start-from", tmp_path / "no", "--out", tmp_path / "r")


def test_a_run_of_few_bits_is_exported_with_its_bits(tmp_path, capsys):
    words = [
        "--model",
        "mlp:12",
        "--num-steps",
        2,
        "--weight-bits",
        3,
        "--epochs",
        1,
        "--batch-size",
        128,
        "--out",
        tmp_path / "q",
    ]
    assert call(capsys, "train", *words)[0] == 0
    _, found, _ = call(capsys, "export", tmp_path / "q", "--to", "loihi", "-o", tmp_path / "q.npz")
    assert [layer["weight_bits"] for layer in found["report"]["layers"]] == [3]
    _, found, _ = call(capsys, "export", tmp_path / "q", "--to", "loihi", "-o", tmp_path / "q8.npz", "--weight-bits", 8)
    assert [layer["weight_bits"] for layer in found["report"]["layers"]] == [8]


def test_resuming_takes_the_network_of_the_checkpoint(finished, tmp_path, capsys):
    """The first run rounded its decays; the second starts from it, is resumed, and must not fall back to beta = 0.9."""
    few = ["--epochs", 1, "--batch-size", 128]
    assert call(capsys, "train", "--start-from", finished, "--weight-bits", 4, *few, "--out", tmp_path / "q")[0] == 0
    words = ["train", "--start-from", tmp_path / "q", "--epochs", 2, "--batch-size", 128, "--out", tmp_path / "r"]
    assert call(capsys, *words)[0] == 0
    whole = runs.load_run(tmp_path / "r")
    shutil.rmtree(tmp_path / "q")
    for name in ("result.json", "network.safetensors", "history.json"):
        (tmp_path / "r" / name).unlink()
    assert call(capsys, "train", "--resume", "--start-from", f"{tmp_path}/q/", "--out", tmp_path / "r")[0] == 0
    again = runs.load_run(tmp_path / "r")
    assert again.network.layers[0].neuron.beta == whole.network.layers[0].neuron.beta == 3686 / 4096
    assert again.result["health_before_training"] == whole.result["health_before_training"]


@pytest.mark.parametrize(
    "words",
    [
        ["--model", "mlp:16", "--beta", "0", "--weight-bits", "8"],
        ["--model", "mlp:16", "--noise", "0.1", "--encoder", "poisson"],
        ["--start-from", "elsewhere"],
    ],
)
def test_a_refused_run_replaces_nothing(finished, tmp_path, capsys, words):
    kept = tmp_path / "kept"
    shutil.copytree(finished, kept)
    refused(capsys, "train", *words, "--epochs", 1, "--out", kept, "--overwrite")
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == {
        path.name: path.read_bytes() for path in Path(finished).iterdir()
    }


def test_a_run_can_replace_the_one_it_starts_from(finished, tmp_path, capsys):
    kept = tmp_path / "kept"
    shutil.copytree(finished, kept)
    words = ["--start-from", kept, "--epochs", 1, "--batch-size", 128, "--out", kept, "--overwrite"]
    assert call(capsys, "train", *words)[0] == 0
    assert runs.load_run(kept).result["health_before_training"] == runs.load_run(finished).result["health"]


def test_runs_of_earlier_versions_are_read(finished, tmp_path, capsys):
    old = tmp_path / "old"
    shutil.copytree(finished, old)
    config = json.loads((old / "config.json").read_text())
    for name in ("weight_bits", "start_from", "trace", "noise", "health_before_training"):
        del config[name]
    (old / "config.json").write_text(json.dumps(config))
    assert call(capsys, "export", old, "--to", "loihi", "-o", tmp_path / "chip.npz")[0] == 0
    assert call(capsys, "train", "--start-from", old, "--epochs", 1, "--batch-size", 128, "--out", tmp_path / "new")[0] == 0
    del config["beta"]
    (old / "config.json").write_text(json.dumps(config))
    assert "it has no beta" in refused(capsys, "train", "--start-from", old, "--out", tmp_path / "newer")


def test_help_and_version(capsys):
    for arguments in (["--help"], ["--version"], *([name, "--help"] for name in ("train", "simulate", "demo"))):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 0
    text = capsys.readouterr().out
    assert f"spikeprop {sp.__version__}" in text and "examples:" in text and "sigprop-raw-membrane" in text


# --- What a run remembers ----------------------------------------------------------------------------------------------------


def test_defaults_are_the_librarys_own(tmp_path, capsys):
    assert call(capsys, "train", "--model", "mlp:8", "--epochs", 1, "--out", tmp_path / "a")[0] == 0
    network = sp.models.mlp((1, 8, 8), [8], 10, seed=0)
    sp.fit(network, sp.SigProp(), sp.data.load("digits"), num_steps=8, epochs=1, progress=False)
    kept = sp.load(tmp_path / "a" / "network.safetensors").state_dict()
    assert all(torch.equal(kept[name], tensor) for name, tensor in network.state_dict().items())


def test_settings_reach_network_rule_and_encoder(tmp_path, capsys):
    options = [
        "--beta",
        0.8,
        "--threshold",
        0.5,
        "--learning-rate",
        1e-3,
        "--temperature",
        0.2,
        "--trace",
        "exact",
        "--update-every",
        2,
        "--seed",
        3,
    ]
    out = tmp_path / "a"
    arguments = [*TINY, *options, "--encoder", "poisson:rate=0.5", "--full-train", "--epochs", 1, "--out", out]
    assert call(capsys, "train", *arguments)[0] == 0
    run = runs.load_run(out)
    assert run.encoder == Poisson(rate=0.5) and run.data().validation is None
    assert {(layer.neuron.beta, layer.neuron.threshold) for layer in run.network.layers} == {(0.8, 0.5)}
    for name in ("beta", "threshold", "learning_rate", "temperature", "trace", "update_every", "seed"):
        assert run.config[name] == dict(zip(options[::2], options[1::2], strict=True))["--" + name.replace("_", "-")]
    assert run.quantize().inputs == "spikes"
    assert "no validation part" in refused(capsys, "evaluate", out, "--split", "validation")
    status, found, _ = call(capsys, "simulate", out, "--samples", 355)
    assert status == 0 and found["accuracy"]["float"] == pytest.approx(run.result["accuracy"]["readout"], abs=1e-12)


def test_input_coding():
    pictures = sp.data.load("digits")
    assert runs.input_coding(Current(), pictures) == {"inputs": "graded", "input_range": [0.0, 1.0]}
    assert runs.input_coding(Current(scale=-2.0), pictures)["input_range"] == [-2.0, 1.0]
    assert runs.input_coding(Latency(), pictures)["inputs"] == "spikes"
    events = torch.randint(0, 2, (6, 5, 3)).float()
    binary = sp.data.from_arrays((events, torch.arange(6) % 2), temporal=True)
    assert runs.input_coding(Events(), binary)["inputs"] == "spikes"
    counts = sp.data.from_arrays((events * 3, torch.arange(6) % 2), temporal=True)
    assert runs.input_coding(Events(), counts) == {"inputs": "graded", "input_range": [0.0, 3.0]}


@pytest.mark.parametrize(
    ("text", "widths"), [("mlp:5", [5]), ("mlp:7,6", [7, 6]), ("conv:3,4-9", [3, 4, 9]), ("conv:3-9", [3, 9])]
)
def test_model_strings(text, widths):
    network = runs.build_model(text, sp.data.load("digits"), neuron=sp.LIF(), seed=0)
    assert [layer.output_shape[0] for layer in network.layers] == widths


@pytest.mark.parametrize(
    "text", ["", "mlp", "mlp:", "mlp:0", "mlp:a", "mlp:4,", "mlp:4-5", "conv:", "conv:3-4-5", "vgg:11", "mlp:-3", "mlp:²"]
)
def test_bad_model_strings(text):
    with pytest.raises(SpikepropError, match="is not understood; write mlp:256,256"):
        runs.build_model(text, sp.data.load("digits"), neuron=sp.LIF(), seed=0)


# --- Bad input: status 2, one line -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["train", "--rule", "hebb"], "unknown rule 'hebb'; known: bptt, bptt-hard, shallow, sigprop-surrogate, "),
        (["train", "--data", "cifar"], "unknown data set 'cifar'; known: digits"),
        (["train", "--data", "mnist", "--data-root", "/nowhere"], "/nowhere"),
        (["train", "--model", "mlp:x"], "model 'mlp:x' is not understood"),
        (["train", "--beta", "1.5"], "beta = 1.5 lies outside [0, 1]"),
        (["train", "--beta", "nan"], "beta = nan lies outside [0, 1]"),
        (["train", "--threshold", "-1"], "--threshold: '-1' is not a number above 0"),
        (["train", "--learning-rate", "inf"], "'inf' is not a number above 0"),
        (["train", "--epochs", "0"], "'0' is not a whole number of at least 1"),
        (["train", "--seed", "-1"], "--seed"),
        (["train", "--encoder", "fourier"], "unknown encoder 'fourier'; known: current, poisson"),
        (["train", "--encoder", "poisson:speed=1"], "poisson encoder: settings"),
        (["train", "--encoder", "poisson:rate"], "encoder 'poisson:rate' is not understood"),
        (["train", "--encoder", "poisson:rate=-1"], "rate must be finite and above 0"),
        (["train", "--encoder", "events"], "the events encoder does not suit the data set digits"),
        (["train", "--resume", "--out", "/nowhere/run"], "/nowhere/run is no run folder: there is no such folder"),
        (["train", "--rule", "e-prop", "--model", "conv:4-8"], "EProp cannot train layer 1, which is convolutional; use dense"),
        (["train", "--rule", "forward-mode", "--memory-limit", "9"], "forward-mode on mlp:256,256 would need about "),
        (["train", "--update-every", "20", "--num-steps", "4"], "update_every = 20 is longer than a sequence of 4 steps"),
        (
            ["train", "--rule", "bptt", "--update-every", "2"],
            "--update-every does not apply to the rule bptt; for BPTT it is --trunc",
        ),
        (
            ["train", "--rule", "kolen-pollack", "--weight-bits", "4"],
            "KolenPollack changes weights past the optimiser, which round",
        ),
        (
            ["train", "--recurrent", "--model", "conv:4-8"],
            "model 'conv:4-8' cannot be recurrent; use mlp:256,256 with --recurrent",
        ),
        (["evaluate", "/nowhere/run"], "/nowhere/run is no run folder: there is no such folder"),
        (["evaluate"], "required: RUN"),
        (["export", "x", "--to", "tpu", "-o", "y"], "invalid choice: 'tpu'"),
        (["simulate", "x", "--engine", "abacus"], "invalid choice: 'abacus'"),
        (["simulate", "x", "--weight-bits", "9"], "--weight-bits"),
    ],
)
def test_bad_input_is_refused_in_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_no_run_folder_says_which_file_is_missing(run, tmp_path, capsys):
    (run / "result.json").unlink()
    assert "result.json is missing; finish it with: spikeprop train --resume" in refused(capsys, "evaluate", run)
    (run / "network.safetensors").unlink()
    assert "network.safetensors is missing" in refused(capsys, "diagnose", run)
    (run / "config.json").unlink()
    assert "config.json is missing" in refused(capsys, "evaluate", run)
    assert "no such folder" in refused(capsys, "evaluate", tmp_path / "b")
    (tmp_path / "file").write_text("")
    assert "is a file" in refused(capsys, "train", "--out", tmp_path / "file")


def test_damaged_and_foreign_files(run, capsys):
    network = run / "network.safetensors"
    network.write_bytes(network.read_bytes()[:-100])
    assert f"{network} is damaged" in refused(capsys, "evaluate", run)
    save_file({"weight": torch.zeros(3)}, network)
    assert "that spikeprop did not write" in refused(capsys, "simulate", run)
    for text in ("{", "[]", "\x00", '{"data": 1}'):
        (run / "config.json").write_text(text)
        assert "config.json" in refused(capsys, "evaluate", run)


def test_a_run_whose_data_no_longer_fit(run, capsys, monkeypatch):
    shorter = sp.data.from_arrays(*[(torch.rand(20, 5), torch.arange(20) % 4)] * 3)
    monkeypatch.setattr(runs.datasets, "load", lambda *_, **__: shorter)
    assert "the inputs have shape (20, 5), the network expects [N, 1, 8, 8]" in refused(capsys, "evaluate", run)


def test_missing_lava_is_named_with_its_remedy(finished, capsys, monkeypatch):
    monkeypatch.setattr(lava, "available", lambda: False)
    line = refused(capsys, "simulate", finished, "--against", "lava")
    assert "Lava is not installed" in line and "pip install" in line


def test_export_that_cannot_be_written(finished, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    line = refused(capsys, "export", finished, "--to", "loihi", "-o", tmp_path / "file" / "chip.npz")
    assert "could not be written" in line


def test_what_is_not_an_input_error_keeps_its_traceback(finished, monkeypatch):
    monkeypatch.setattr(runs, "load_run", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["evaluate", str(finished)])


def test_several_lines_become_one(finished, capsys, monkeypatch):
    def fail(path):
        raise BackendError("Lava failed;\n  its last words:\n  oh")

    monkeypatch.setattr(runs, "load_run", fail)
    assert refused(capsys, "evaluate", finished) == "spikeprop: error: Lava failed; its last words: oh"


# --- Nothing is lost ---------------------------------------------------------------------------------------------------------


def test_a_finished_run_is_not_replaced_by_accident(run, capsys):
    before = (run / "network.safetensors").read_bytes()
    line = refused(capsys, "train", *TINY, "--out", run)
    assert "holds a finished run" in line and "--resume" in line and "--overwrite" in line
    (run / "result.json").unlink()
    assert "holds an unfinished run" in refused(capsys, "train", *TINY, "--out", run)
    assert (run / "network.safetensors").read_bytes() == before
    (run / "mine.txt").write_text("mine")
    assert call(capsys, "train", *TINY, "--epochs", 1, "--out", run, "--overwrite")[0] == 0
    assert len(runs.load_run(run).history.epochs) == 1 and (run / "mine.txt").exists()


def test_a_foreign_config_is_not_replaced(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"theirs": 1}')
    assert "was not written by spikeprop" in refused(capsys, "train", *TINY, "--out", tmp_path)
    assert (tmp_path / "config.json").read_text() == '{"theirs": 1}'


def test_resume_needs_the_same_settings(run, capsys):
    line = refused(capsys, "train", "--resume", "--out", run, "--epochs", 9)
    assert f"--epochs 9: {run} was started with 3" in line
    assert "--encoder" in refused(capsys, "train", "--resume", "--out", run, "--encoder", "poisson")
    (run / "checkpoint.safetensors").unlink()
    assert "no epoch was finished" in refused(capsys, "train", "--resume", "--out", run)


def test_resume_reaches_the_same_weights_bit_for_bit(finished, tmp_path, capsys, monkeypatch):
    """Stopped by Ctrl-C in its second epoch, continued with nothing but the folder's name."""
    out, learn, calls = tmp_path / "b", sp.SigProp.learn, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 12:  # nine batches an epoch
            os.kill(os.getpid(), signal.SIGINT)
        return learn(*arguments)

    monkeypatch.setattr(sp.SigProp, "learn", interrupted)
    assert main(["train", *TINY, "--epochs", "3", "--out", str(out)]) == 130
    captured = capsys.readouterr()
    expected = f"{out / 'checkpoint.safetensors'} holds the finished epochs, go on with: spikeprop train --resume --out {out}"
    assert captured.out == "" and captured.err.splitlines()[-1] == f"spikeprop: interrupted; {expected}"
    assert "is an unfinished run: network.safetensors is missing" in refused(capsys, "evaluate", out)
    status, result, _ = call(capsys, "train", "--resume", "--out", out)
    assert status == 0
    whole, resumed = runs.load_run(finished), runs.load_run(out)
    pairs = zip(whole.network.state_dict().items(), resumed.network.state_dict().items(), strict=True)
    assert all(name == other and torch.equal(tensor, same) for (name, tensor), (other, same) in pairs)
    assert [epoch["loss"] for epoch in whole.history.epochs] == [epoch["loss"] for epoch in resumed.history.epochs]
    changing = ("seconds", "peak_memory_mib", "run")
    assert all(result[name] == whole.result[name] for name in TRAIN_KEYS if name not in changing)
    # A finished run may be resumed, too: nothing is left to do.
    assert call(capsys, "train", "--resume", "--out", out)[1]["accuracy"] == result["accuracy"]


def test_interrupt_before_the_first_epoch(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        sp.SigProp, "learn", lambda *_: os.kill(os.getpid(), signal.SIGINT) or (_ for _ in ()).throw(KeyboardInterrupt)
    )
    assert main(["train", *TINY, "--out", str(tmp_path / "c")]) == 130
    assert "nothing to resume, run the same command again" in capsys.readouterr().err
    monkeypatch.undo()
    assert call(capsys, "train", *TINY, "--epochs", 1, "--out", tmp_path / "c")[0] == 0


def test_ctrl_c_in_a_terminal(tmp_path):
    """The real command, a real signal: status 130, no traceback, a checkpoint that loads."""
    out = tmp_path / "d"
    process = command("train", *TINY, "--epochs", 100000, "--out", out, "--json")
    try:
        deadline = time.monotonic() + 120
        while not (out / "checkpoint.safetensors").exists():
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and output == "" and "Traceback" not in errors
    assert "spikeprop train --resume --out" in errors.splitlines()[-1]
    tensors, header = read_tensors(out / "checkpoint.safetensors")
    assert header["history"] and any(name.startswith("network.") for name in tensors)


def test_refusal_in_a_process_of_its_own(tmp_path):
    process = command("evaluate", tmp_path / "nothing")
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 2 and output == "" and errors.count("\n") == 1 and errors.startswith("spikeprop: error: ")


def test_a_fresh_process_is_lean_and_charged_with_its_own_memory_only():
    big = torch.ones(30_000_000)  # 114 MiB, which a child must not be charged with
    program = (
        "import sys, spikeprop.cli; from spikeprop.runs import peak_memory_mib as peak;"
        "names = ('matplotlib', 'sklearn', 'lava', 'snntorch', 'norse', 'nir');"
        "print([name for name in names if name in sys.modules]);"
        "before = peak(); held = bytearray(60 * 2**20); print(before, peak())"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    loaded, peaks = done.stdout.splitlines()
    before, after = map(float, peaks.split())
    assert loaded == "[]" and 55 < after - before < 70
    assert before < runs.peak_memory_mib() and big[0] == 1


def test_every_option_of_a_rule_arrives(tmp_path, capsys):
    out = tmp_path / "run"
    words = ["--rule", "bptt", "--truncate", "2", "--reset-gradient", "attached", "--homeostasis", "on", "--recurrent"]
    status, result, _ = call(capsys, "train", *TINY, *words, "--out", out)
    assert status == 0 and list(result["accuracy"]) == ["readout"]
    config = json.loads((out / "config.json").read_text())
    assert (config["truncate"], config["reset_gradient"], config["homeostasis"]) == (2, "attached", "on")
    assert (config["recurrent"], config["update_every"], config["trace"], config["learning_rate"]) == (True, None, None, 4e-3)
    network = runs.load_run(out).network
    assert all(layer.recurrent is not None for layer in network.layers)
    assert "layer 1: recurrent synapses are not exported" in refused(capsys, "export", out, "--to", "loihi", "-o", out / "x")
    assert "layer 1: recurrent synapses are not written to NIR" in refused(
        capsys, "export", out, "--to", "nir", "-o", out / "x"
    )
    assert call(capsys, "evaluate", out)[0] == 0 and call(capsys, "diagnose", out)[0] == 0


def test_a_network_taken_over_keeps_its_loops(finished, tmp_path, capsys):
    message = refused(capsys, "train", "--start-from", finished, "--recurrent", "--out", tmp_path / "b")
    assert f"--recurrent True: the network of {finished} has False; leave the option out" in message
