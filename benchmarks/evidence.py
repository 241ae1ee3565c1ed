"""The evidence table: accuracy, live neurons and the chip's accuracy, on real data, by the protocol of docs/results.md.

    python benchmarks/evidence.py --task mnist-mlp
    python benchmarks/evidence.py --task mnist-mlp --rules bptt --homeostasis on --try learning_rate=2e-3

The first form makes the final figures: training and validation parts together, the settings of tasks.py, and one look at the
test part after the last epoch, by floats and by the integer simulator with 8-bit weights. The second, with ``--try``, chooses
settings: it trains on the training part, looks at the validation part, and keeps every configuration that was ever tried in
``results/tuning-<task>.json``, so that their number can be counted.

A cell is written as soon as it is done; the same command, in as many processes as there are cores, goes on where it was left.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, Cells, Key, ResultFile, header, spread
from tasks import RULES_OF_THE_TABLE, TASKS, augmentation, homeostasis_of, make_network, make_rule, recipe, settings_of

import spikeprop as sp
from spikeprop.backends import loihi
from spikeprop.catalogue import RULES
from spikeprop.runs import input_coding
from spikeprop.training import centre_inputs

BATCH = 250
HEALTH = ("dead", "nearly_dead", "saturated", "rate")
NAMES = ("rule", "homeostasis", "seed")


@torch.inference_mode()
def on_chip(network: sp.Network, data: sp.data.Data, split: sp.data.Split, num_steps: int, bits: int = 8) -> dict[str, Any]:
    """Accuracy of the network in the chip's integers, and the share of the float network's spikes that occur there, too."""
    encoder = sp.encoding.default_encoder(data.temporal)
    coding = input_coding(encoder, data)
    chip = loihi.quantize(network, bits, inputs=coding["inputs"], input_range=coding["input_range"])
    right, common, total = 0, np.zeros(len(network.layers)), np.zeros(len(network.layers))
    for rows in torch.arange(len(split.labels)).split(BATCH):
        x = encoder(split.inputs[rows], num_steps).to(network.readout.weight)
        ours = loihi.simulate(chip, loihi.encode(chip, x))
        right += int((network.readout(torch.from_numpy(ours.counts[-1]) / num_steps).argmax(1) == split.labels[rows]).sum())
        for index, (activity, spikes) in enumerate(zip(network.run(x), ours.spikes, strict=True)):
            marks = activity.spikes.flatten(2).numpy() > 0
            common[index] += (marks & (spikes.reshape(marks.shape) > 0)).sum()
            total[index] += marks.sum()
    return {
        "accuracy": right / len(split.labels),
        "weight_bits": bits,
        "spike_agreement": (common / np.maximum(total, 1)).tolist(),
    }


def train(data: sp.data.Data, rule_name: str, homeostasis: str, seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Train one network and look at it once, on the test part where the validation part was trained on, too."""
    network, rule = make_network(data, settings, seed), make_rule(rule_name, settings, homeostasis)
    split = data.test if data.validation is None else data.validation
    centre_inputs(network, data.train.inputs, settings["num_steps"], sp.encoding.default_encoder(data.temporal), seed)
    start = sp.dead_neurons(network, split, settings["num_steps"])
    limits = {key: settings[key] for key in ("num_steps", "epochs", "batch_size")}
    blind = data if data.validation is None or settings["watch"] else _without_validation(data)
    history = sp.fit(network, rule, blind, **limits, augment=augmentation(settings), seed=seed)
    found = sp.evaluate(network, split, settings["num_steps"])
    health = sp.dead_neurons(network, split, settings["num_steps"])
    cell = {
        "accuracy": found.accuracy,
        **{name: health.share(name) for name in HEALTH},
        "start": {name: start.share(name) for name in HEALTH},
        "epochs": {name: history.series(name) for name in ("train_accuracy", "dead", "rate")},
        "samples": {"train": len(data.train.labels), "looked_at": len(split.labels)},
        "seconds": round(sum(history.series("seconds")), 1),
    }
    if data.validation is None:
        cell["loihi"] = on_chip(network, data, split, settings["num_steps"])
    elif settings["watch"]:
        cell["epochs"]["validation_accuracy"] = history.series("validation_accuracy")
    return cell


def _without_validation(data: sp.data.Data) -> sp.data.Data:
    return sp.data.Data(**{**vars(data), "validation": None})


def summarise(cells: Cells) -> list[dict[str, Any]]:
    """Per rule and homeostasis, or per configuration: mean and sample standard deviation over seeds; the worst of any layer."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for cell in cells.values():
        groups.setdefault(json.dumps([cell["rule"], cell["homeostasis"], cell["settings"]], sort_keys=True), []).append(cell)
    rows = []
    for own in groups.values():
        worst = {name: max(max(cell[name]) for cell in own) for name in HEALTH}
        row = {
            **{name: own[0][name] for name in ("rule", "homeostasis")},
            "seeds": [cell["seed"] for cell in own],
            "accuracy": {option: spread(cell["accuracy"][option] for cell in own) for option in own[0]["accuracy"]},
            "worst": worst,
            "worst_at_start": {name: max(max(cell["start"][name]) for cell in own) for name in HEALTH},
            "seconds": spread(cell["seconds"] for cell in own)["mean"],
        }
        if "loihi" in own[0]:
            row["loihi"] = spread(cell["loihi"]["accuracy"] for cell in own)
        if "tried" in own[0]:
            row["tried"] = own[0]["tried"]
        rows.append(row)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The summary for people; dead share and rate are those of the worst layer of the worst seed."""
    lines = [f"{'rule':22} {'homeostasis':11} seeds  readout           8 bits              dead    rate  seconds  tried"]
    for row in rows:
        shown = []
        for found in (row["accuracy"]["readout"], row.get("loihi", {"mean": None, "std": None})):
            mean, std = ("" if value is None else f"{value:.4f}" for value in (found["mean"], found["std"]))
            shown.append(f"{mean}{' +- ' if std else ''}{std}")
        tried = " ".join(f"{key}={value}" for key, value in row.get("tried", {}).items())
        lines.append(
            f"{row['rule']:22} {row['homeostasis']:11} {len(row['seeds']):5}  {shown[0]:16}  {shown[1]:16}  "
            f"{row['worst']['dead']:6.2%}  {row['worst']['rate']:6.4f}  {row['seconds']:7.1f}  {tried}"
        )
    return "\n".join(lines)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--rules", nargs="+", choices=RULES, default=RULES_OF_THE_TABLE)
    parser.add_argument(
        "--homeostasis", nargs="+", choices=("on", "off"), help="default: both; for raw membrane and shallow the rule's own"
    )
    parser.add_argument("--seeds", nargs="+", type=int, help="default: 0 1 2; with --try 0")
    parser.add_argument("--try", nargs="*", metavar="NAME=VALUE", dest="tried", help="look at the validation part with these")
    parser.add_argument("--samples", type=int, help="with --try: train on the first so many training samples")
    parser.add_argument("--watch", action="store_true", help="with --try: validation accuracy after every epoch, too")
    parser.add_argument("--data-root", type=Path, help=f"folder of the data files; else {sp.data.ROOT_VARIABLE} names it")
    parser.add_argument("--out", type=Path, help="result file; default: benchmarks/results/evidence-TASK or tuning-TASK")
    return parser.parse_args(argv)


def read_settings(pairs: Sequence[str]) -> dict[str, Any]:
    """``name=value`` pairs; values are JSON where they can be read so, else text."""
    found = {}
    for pair in pairs:
        name, _, text = pair.partition("=")
        try:
            found[name] = json.loads(text)
        except json.JSONDecodeError:
            found[name] = text
    return found


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse(argv)
    task, final = arguments.task, arguments.tried is None
    tried = read_settings(arguments.tried or [])
    own = {**TASKS[task], **tried}
    how = {"num_steps": _bins(task, tried), "delays": own.get("delays", ())}
    data = sp.data.load(own["data"], root=arguments.data_root, full_train=final, **how)
    if arguments.samples is not None:
        data = sp.data.Data(**{**vars(data), "train": sp.data.Split(*(part[: arguments.samples] for part in data.train))})
    kinds = itertools.product(arguments.rules, ("off", "on"))
    configurations = {}
    for rule, homeostasis in kinds:
        chosen = settings_of(task, rule, homeostasis, tried)
        configurations[rule, homeostasis] = chosen | {
            "watch": arguments.watch,
            "recipe": recipe(rule, chosen, homeostasis),
        }
    torch.set_float32_matmul_precision(next(iter(configurations.values()))["precision"])
    label = json.dumps(tried | {"samples": len(data.train.labels)}, sort_keys=True)

    def settings(key: Key) -> dict[str, Any] | None:
        asked = key[:2] in configurations and (final or key[3] == label)
        return configurations[key[:2]] if asked else None

    def make(key: Key) -> dict[str, Any]:
        found = train(data, *key[:3], settings=configurations[key[:2]])
        return found if final else found | {"tried": tried}

    def whole(cells: Cells) -> dict[str, Any]:
        ordered = [cells[key] for key in sorted(cells, key=lambda key: (list(RULES).index(key[0]), *map(str, key[1:])))]
        rows = summarise({(index,): cell for index, cell in enumerate(ordered)})
        part = {"task": task, "on": "test" if final else "validation"}
        return header("evidence", argv) | {"settings": part, "cells": ordered, "summary": rows}

    names = NAMES if final else (*NAMES, "configuration")
    path = arguments.out or RESULTS / f"{'evidence' if final else 'tuning'}-{task}.json"
    order = [
        (rule, homeostasis, seed, *(() if final else (label,)))
        for seed, rule in itertools.product(arguments.seeds or ([0, 1, 2] if final else [0]), arguments.rules)
        for homeostasis in arguments.homeostasis or homeostasis_of(rule)
    ]
    cells = ResultFile(path, names, settings, whole).fill(order, make)
    print(table(summarise(cells)))
    return 0


def _bins(task: str, tried: dict[str, Any]) -> int | None:
    """Event recordings are binned when they are read; all other data have the steps they have."""
    own = {**TASKS[task], **tried}
    return own["num_steps"] if own["data"] == "nmnist" else None


if __name__ == "__main__":
    raise SystemExit(main())
