"""What rounding to Loihi's weights costs a trained network, and what training on with them gives back.

    python benchmarks/loihi_accuracy.py --data digits
    python benchmarks/loihi_accuracy.py --data mnist --data-root ~/data

Networks are those of accuracy.py, trained the same way (digits: on the training part alone). Each is then run on the integer
simulator, over the whole test part, with 8-bit weights and with 4-bit weights as they come; and with 4-bit weights after
training on with those in the loop (``QuantizationAware``), a quarter of the epochs at a quarter of the learning rate.
Agreement is the share of samples with the same prediction as the float network before quantising, and the share of its
spikes that are in the same place. A cell is one rule with one seed, written as soon as it is done; the same command goes on
where it was left.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import accuracy
import numpy as np
import torch
from common import RESULTS, commit, header, read_json, write_json

import spikeprop as sp
from spikeprop import catalogue
from spikeprop.backends import loihi
from spikeprop.backends.loihi import QuantizationAware

BATCH = 500
KINDS = ("8 bits", "4 bits", "4 bits, trained on")
LIMITS = {"8 bits": 0.002, "4 bits, trained on": 0.01}  # the most that may be lost


@torch.inference_mode()
def on_chip(network: sp.Network, reference: sp.Network, bits: int, split: sp.data.Split, num_steps: int) -> dict[str, Any]:
    """Accuracy on the integer simulator, and agreement with a float network."""
    chip = loihi.quantize(network, bits)
    right = agreeing = 0
    common, total = np.zeros(len(network.layers)), np.zeros(len(network.layers))
    for rows in torch.arange(len(split.labels)).split(BATCH):
        x = split.inputs[rows].expand(num_steps, -1, *split.inputs.shape[1:])
        real = reference.run(x)
        ours = loihi.simulate(chip, loihi.encode(chip, x))
        predicted = network.readout(torch.from_numpy(ours.counts[-1]) / num_steps).argmax(1)
        right += int((predicted == split.labels[rows]).sum())
        agreeing += int((predicted == reference.readout(real[-1].spikes.mean(0)).argmax(1)).sum())
        for index, (activity, spikes) in enumerate(zip(real, ours.spikes, strict=True)):
            marks = activity.spikes.flatten(2).numpy() > 0
            common[index] += (marks & (spikes > 0)).sum()
            total[index] += marks.sum()
    samples = len(split.labels)
    return {
        "accuracy": right / samples,
        "prediction_agreement": agreeing / samples,
        "spike_agreement": (common / total).tolist(),
        "weight_error": [layer["weight_error"] for layer in chip.report["layers"]],
    }


def run_cell(data: sp.data.Data, name: str, seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Train, quantise, train on, and look at the test part after each."""
    limits = {name: settings[name] for name in ("num_steps", "batch_size")}
    network = accuracy.make_network(data, {**settings, "gain": None}, seed)
    rule: Any = catalogue.configure(name, {"trace": accuracy.TRACES[settings["data"]]})
    sp.fit(network, rule, data, epochs=settings["epochs"], seed=seed, **limits)
    slower = catalogue.configure(name, {"trace": rule.trace, "learning_rate": rule.optimizer.keywords["lr"] / 4})
    with tempfile.TemporaryDirectory() as folder:
        sp.save(network, Path(folder) / "network.safetensors")
        tuned = sp.load(Path(folder) / "network.safetensors")
    sp.fit(tuned, QuantizationAware(slower, 4), data, epochs=settings["epochs_on"], seed=seed, **limits)
    look = functools.partial(on_chip, reference=network, split=data.test, num_steps=settings["num_steps"])
    found = {"8 bits": look(network, bits=8), "4 bits": look(network, bits=4), "4 bits, trained on": look(tuned, bits=4)}
    real = sp.evaluate(network, data.test, num_steps=settings["num_steps"]).accuracy["readout"]
    for part in found.values():
        part["lost"] = real - part["accuracy"]
    return {"float": real, **found}


def summarise(cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Per rule, means over seeds; ``passed`` says that the mean loss is within the limits."""
    summary: dict[str, Any] = {}
    for rule in dict.fromkeys(cell["rule"] for cell in cells):
        own = [cell for cell in cells if cell["rule"] == rule]
        found: dict[str, Any] = {"seeds": [cell["seed"] for cell in own], "float": statistics.mean(c["float"] for c in own)}
        for kind in KINDS:
            found[kind] = {
                key: statistics.mean(cell[kind][key] for cell in own) for key in ("accuracy", "lost", "prediction_agreement")
            }
            found[kind]["spike_agreement"] = [
                statistics.mean(layers) for layers in zip(*(cell[kind]["spike_agreement"] for cell in own), strict=True)
            ]
        found["passed"] = all(found[kind]["lost"] <= limit for kind, limit in LIMITS.items())
        summary[rule] = found
    return summary


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=accuracy.BENCHMARKS, required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rules", nargs="+", choices=catalogue.RULES, default=["sigprop-surrogate", "sigprop-membrane"])
    parser.add_argument("--epochs", type=int, help="instead of the benchmark's own")
    parser.add_argument("--data-root", type=Path, help=f"folder of the data files; else {sp.data.ROOT_VARIABLE} names it")
    parser.add_argument("--out", type=Path, help="result file; default: benchmarks/results/loihi-accuracy-<data>.json")
    arguments = parser.parse_args(argv)
    torch.set_float32_matmul_precision("medium")
    data = sp.data.load(arguments.data, root=arguments.data_root, full_train=arguments.data == "mnist")
    path = arguments.out or RESULTS / f"loihi-accuracy-{arguments.data}.json"
    settings = {"data": arguments.data, **accuracy.BENCHMARKS[arguments.data]}
    settings["epochs"] = arguments.epochs or settings["epochs"]
    settings |= {"epochs_on": -(-settings["epochs"] // 4), "batch_size": accuracy.default_batch_size(len(data.train.labels))}
    kept = read_json(path) or {"cells": []}
    cells = [cell for cell in kept["cells"] if cell["settings"] == settings]
    for seed in arguments.seeds:
        for name in arguments.rules:
            if any((cell["rule"], cell["seed"]) == (name, seed) for cell in cells):
                continue
            print(f"{name}, seed {seed}:", flush=True)
            found = run_cell(data, name, seed, settings)
            cells.append({"rule": name, "seed": seed, "settings": settings, "commit": commit(), **found})
            results = header("loihi_accuracy", argv) | {"settings": settings, "cells": cells, "summary": summarise(cells)}
            write_json(path, results)
    for rule, found in summarise(cells).items():
        print(f"{rule}: float {found['float']:.4f}")
        for kind in KINDS:
            part = found[kind]
            print(f"  {kind}: {part['accuracy']:.4f}, predictions agree {part['prediction_agreement']:.2%}")
        print(f"  {'passed' if found['passed'] else 'FAILED'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
