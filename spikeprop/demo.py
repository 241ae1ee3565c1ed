"""What ``make demo`` runs: train on digits by two options, put one network on Loihi's integers, and check it against Lava."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spikeprop import report, runs
from spikeprop.backends import lava, loihi, parity
from spikeprop.errors import BackendError
from spikeprop.evaluation import encode_in_batches

DEPLOYED = "sigprop-membrane"
TRAINED = ("sigprop-surrogate", DEPLOYED)
SETTINGS = {"--data": "digits", "--model": "mlp:256,256", "--num-steps": "8", "--trace": "exact", "--seed": "0"}
LAVA_TIMEOUT = 120.0  # seconds; a run takes about ten


class Demo(NamedTuple):
    """The table for people, the figures for ``--json``, and the exit status: 1 unless Lava agreed spike for spike."""

    text: str
    summary: dict[str, Any]
    status: int


def run(out: Path, *, epochs: int = 20, samples: int | None = None, picture: Path | None = None) -> Demo:
    """Do it all; leaves two runs, ``report.html`` and ``report.json`` in ``out`` and replaces earlier ones.

    Raises BackendError if matplotlib is missing or a training fails. A missing Lava is said in table and report instead.
    """
    started = time.perf_counter()
    report.require_matplotlib()
    trained = []
    for number, rule in enumerate(TRAINED, 1):
        _say(f"[{number}/4] training by {rule}: forward passes only")
        trained.append(_train(out / rule, rule, epochs))
    deployed = trained[TRAINED.index(DEPLOYED)]
    data = deployed.data()
    assert data.validation is not None
    assert data.test is not None
    inputs, labels = data.test
    samples = min(samples or len(labels), len(labels))
    _say(f"[3/4] {DEPLOYED} in Loihi's integers: {len(labels)} test samples in our simulator, {samples} in Lava")
    content: dict[str, Any] = {
        "created": time.strftime("%Y-%m-%d %H:%M"),
        "versions": deployed.config["versions"],
        "config": deployed.config,
        "data": {"train": len(data.train.labels), "validation": len(data.validation.labels), "test": len(labels)},
        "trainings": [_training(run) for run in trained],
        "activity": _activity(deployed, inputs[:1], int(labels[0])),
        "hardware": _hardware(deployed, inputs, labels, samples),
    }
    _say("[4/4] drawing the report")
    content["seconds"] = time.perf_counter() - started
    report.write(content, out)
    if picture is not None:
        report.write_picture(content, picture)
    hardware = content["hardware"]
    agreed = hardware["lava"] is not None and not any(layer["differing"] for layer in hardware["lava"]["layers"])
    summary = {
        "trainings": {run.config["rule"]: {key: run.result[key] for key in SUMMARISED} for run in trained},
        **{key: hardware[key] for key in ("integer", "lava", "lava_not_run", "accuracy")},
        "seconds": content["seconds"],
        "report": str(out / report.HTML),
    }
    return Demo(describe(content, out), summary, 0 if agreed else 1)


SUMMARISED = ("accuracy", "dead", "nearly_dead", "saturated", "firing_rate", "seconds", "peak_memory_mib", "run")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _train(folder: Path, rule: str, epochs: int) -> runs.Run:
    """One run of ``spikeprop train`` in a process of its own, so that its peak memory is its own, too; on one thread."""
    options = {**SETTINGS, "--rule": rule, "--epochs": str(epochs), "--out": str(folder)}
    arguments = ["train", *(word for pair in options.items() for word in pair), "--overwrite"]
    _say("$ spikeprop " + " ".join(arguments))
    # Layers this small gain nothing from threads, and on busy cores threads that wait for each other cost ten times as much.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "spikeprop.cli", *arguments, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, env=environment, check=False)  # progress: straight to our stderr
    if done.returncode != 0:
        raise BackendError(f"the training by {rule} ended with exit status {done.returncode}; its own message stands above")
    return runs.load_run(folder)


def _training(run: runs.Run) -> dict[str, Any]:
    result = run.result
    return {
        "rule": run.config["rule"],
        "accuracy": result["accuracy"],
        "comparisons": result["evaluation"]["comparisons"],
        "layers": result["health"]["layers"],
        "layers_before": result["health_before_training"]["layers"],
        "seconds": result["seconds"],
        "peak_memory_mib": result["peak_memory_mib"],
        "memory_before_training_mib": result["memory_before_training_mib"],
        "epochs": run.history.epochs,
        "run": str(run.path),
    }


def _hardware(run: runs.Run, inputs: Tensor, labels: Tensor, samples: int) -> dict[str, Any]:
    """The quantised network: the whole test set in our simulator and against the floats, the first samples in Lava."""
    chip = run.quantize()
    integer, real = (runs.spike_trains(run, engine, inputs, chip) for engine in ("integer", "float"))
    accuracy = {"float": runs.accuracy_of(run.network, real, labels), "integer": runs.accuracy_of(run.network, integer, labels)}
    found: dict[str, Any] = {
        "rule": run.config["rule"],
        "report": chip.report,
        "integer": {"samples": len(labels), "layers": parity.compare(integer, real)},
        "lava": None,
        "lava_not_run": None,
        "accuracy": accuracy,
    }
    try:
        spikes = runs.spike_trains(run, "lava", inputs[:samples], chip, LAVA_TIMEOUT)
    except BackendError as error:
        found["lava_not_run"] = str(error) if lava.available() else f"Lava is not installed; {lava.install_command()}"
        _say(f"Lava did not run: {found['lava_not_run']}")
        return found
    count = spikes[0].shape[1]
    found["lava"] = {
        "samples": count,
        "layers": parity.compare([layer[:, :count] for layer in integer], spikes),
        "accuracy_integer": runs.accuracy_of(run.network, [layer[:, :count] for layer in integer], labels[:count]),
    }
    accuracy["lava"] = runs.accuracy_of(run.network, spikes, labels[:count])
    return found


@torch.inference_mode()
def _activity(run: runs.Run, inputs: Tensor, label: int) -> dict[str, Any]:
    """What every layer does on one sample: all its spikes, and the membranes of three neurons in floats and in integers."""
    chip, settings = run.quantize(), run.settings()
    steps, encoder, seed = (settings[name] for name in ("num_steps", "encoder", "seed"))
    _, encoded = next(encode_in_batches(run.network, inputs, steps, encoder, 1, seed))
    on_chip = loihi.simulate(chip, loihi.encode(chip, encoded), record="all")
    layers = []
    for index, activity in enumerate(run.network.run(encoded)):
        layer: Any = run.network.layers[index]
        spikes, membrane = activity.spikes[:, 0].flatten(1), activity.membrane[:, 0].flatten(1)
        threshold = torch.as_tensor(layer.neuron.threshold).flatten().expand(spikes.shape[1])
        registers = on_chip.membranes[index][:, 0] / (2**6 * chip.layers[index].scale)
        traces = [
            {
                "neuron": neuron,
                "membrane": membrane[:, neuron].tolist(),
                "spikes": spikes[:, neuron].int().tolist(),
                "integer": registers[:, neuron].tolist(),
                "threshold": float(threshold[neuron]),
            }
            for neuron in _typical(spikes, membrane - threshold)
        ]
        layers.append({"neurons": spikes.shape[1], "spikes": spikes.nonzero().tolist(), "traces": traces})
    shown = {"label": label, "picture": inputs[0, 0].tolist(), "steps": len(encoded)}
    return {"rule": run.config["rule"], **shown, "layers": layers}


def _typical(spikes: Tensor, above: Tensor) -> list[int]:
    """Three neurons worth a look: one that spikes at about every other step, one that spikes once, a silent one close to it."""
    counts, highest = spikes.sum(0), above.amax(0)
    single, silent = (highest.masked_fill(counts != wanted, -torch.inf) for wanted in (1, 0))
    return list(dict.fromkeys(int(score.argmax()) for score in (-(counts - len(spikes) / 2).abs(), single, silent)))


def describe(content: dict[str, Any], out: Path) -> str:
    """The table that the command prints."""
    config, trainings, hardware = content["config"], content["trainings"], content["hardware"]
    lines = [
        f"digits: {content['data']['train']} training and {content['data']['test']} test samples; {config['model']}, "
        f"T = {config['num_steps']}, {config['epochs']} epochs, seed {config['seed']}",
        "",
        f"{'':<34}" + "".join(f"{training['rule']:>20}" for training in trainings),
    ]

    def row(name: str, *cells: str) -> None:
        lines.append(f"{name:<34}" + "".join(f"{cell:>20}" for cell in cells))

    for option in ("readout", "nearest", "tree"):
        row(f"test accuracy, {option}", *(f"{training['accuracy'][option]:.4f}" for training in trainings))
    for index in range(len(trainings[0]["layers"])):
        row(f"dead neurons, layer {index + 1}", *(_dead(training["layers"][index]) for training in trainings))
        before = trainings[0]["layers_before"][index]
        lines[-1] += f"   (before training: {_dead(before)})"
    for index in range(len(trainings[0]["layers"])):
        rates = (training["layers"][index]["rate"] for training in trainings)
        row(f"spikes per neuron and step, layer {index + 1}", *(f"{rate:.3f}" for rate in rates))
    row("training time, s", *(f"{training['seconds']:.1f}" for training in trainings))
    row("peak memory of the process, MiB", *(f"{training['peak_memory_mib']:.0f}" for training in trainings))
    row("  of it before training", *(f"{training['memory_before_training_mib']:.0f}" for training in trainings))
    lines += ["", f"{hardware['rule']} in Loihi's integers, {hardware['report']['layers'][0]['weight_bits']}-bit weights"]
    lines += _engines(hardware)
    lines += ["", f"{content['seconds']:.0f} s in all; see {out / report.HTML}"]
    return "\n".join(lines)


def _engines(hardware: dict[str, Any]) -> list[str]:
    """Spikes per layer in our simulator, and how many differ elsewhere."""
    real, accuracy = hardware["lava"], hardware["accuracy"]
    widths = (10, 10, 21, 18)
    rows = [("", "spikes", "differ from floats", "differ in Lava")]
    for number, layer in enumerate(hardware["integer"]["layers"], 1):
        elsewhere = real["layers"][number - 1]["differing"] if real else "not run"
        rows.append((f"layer {number}", layer["spikes"], layer["differing"], elsewhere))
    lines = ["".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines.append(
        f"over {hardware['integer']['samples']} test samples" + (f", in Lava the first {real['samples']}" if real else "")
    )
    lines.append("accuracy: " + "  ".join(f"{engine} {share:.4f}" for engine, share in accuracy.items()))
    if real is None:
        lines.append(f"Lava did not run: {hardware['lava_not_run']}")
    elif real["samples"] < hardware["integer"]["samples"]:
        lines.append(f"          (on Lava's samples the integer simulator has {real['accuracy_integer']:.4f})")
    return lines


def _dead(layer: dict[str, Any]) -> str:
    return f"{round(layer['dead'] * layer['neurons'])} of {layer['neurons']}"
