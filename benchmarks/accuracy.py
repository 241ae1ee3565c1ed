"""Accuracy and health of trained networks, mean and spread over seeds.

    python benchmarks/accuracy.py --data digits
    python benchmarks/accuracy.py --data mnist --data-root ~/data

A cell is one rule with one seed. It is written to the result file as soon as it is done, so a run can be stopped at any time:
the same command goes on where it was left. It skips cells whose settings, the defaults of the rule and of the network among
them, are still the same, and makes the others anew. Several processes with the same command share the work.

Hyperparameters are chosen with ``--on validation``, which never looks at the test part; ``--on test``, after training on the
training and validation parts together, is for the final figures. ``--without-validation`` leaves the validation part out there.
``--on folds`` is for small data: four-fold cross-validation over the training and validation parts, fold ``seed % 4`` of the
shuffle ``seed // 4``, so that ``--seeds 0 1 ... 11`` looks at every sample three times.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, Cells, Key, ResultFile, header
from sklearn.model_selection import StratifiedKFold

import spikeprop as sp
from spikeprop.catalogue import RULES, configure
from spikeprop.models import mlp
from spikeprop.rules.base import Rule
from spikeprop.training import default_batch_size

BENCHMARKS = {  # the network and how long it is trained
    "digits": {"hidden": [256, 256], "num_steps": 8, "epochs": 20, "noise": 0.0},
    "mnist": {"hidden": [512, 512], "num_steps": 8, "epochs": 6, "noise": 0.0},
    "fashion-mnist": {"hidden": [512, 512], "num_steps": 8, "epochs": 6, "noise": 0.0},
}
TRACES: dict[str, Any] = {"digits": "exact", "mnist": "shared"}
LEARNING_RATES = {  # of other rules than SigProp, chosen on validation among 5e-4, 1e-3, 2e-3 and 4e-3
    ("bptt", "mnist"): 2e-3,  # 4e-3 with homeostasis
    ("bptt", "fashion-mnist"): 2e-3,
}
DEFAULT_RULES = ("sigprop-surrogate", "sigprop-membrane", "sigprop-raw-membrane")
OPTIONS = ("readout", "nearest", "tree")
HEALTH = ("dead", "nearly_dead", "saturated", "rate")


def make_rule(name: str, arguments: argparse.Namespace) -> Rule:
    """The library's own recipe, changed only where an option was given."""
    rule: Any = RULES[name]
    given = {option: getattr(arguments, option) for option in ("temperature", "learning_rate", "homeostasis")}
    if isinstance(rule, sp.SigProp):
        given["trace"] = arguments.trace or TRACES.get(arguments.data)
    elif given["learning_rate"] is None:
        given["learning_rate"] = LEARNING_RATES.get((name, arguments.data))
    rule = configure(name, given)
    if arguments.highest_rate is not None:
        rule = replace(rule, homeostasis=sp.Homeostasis(highest=arguments.highest_rate))
    return rule


def make_network(data: sp.data.Data, settings: dict[str, Any], seed: int) -> sp.Network:
    neuron = sp.LIF(beta=0.9, threshold=1.0)
    gain = {} if settings["gain"] is None else {"gain": settings["gain"]}
    return mlp(data.input_shape, settings["hidden"], data.num_classes, neuron=neuron, seed=seed, **gain)


def fold(data: sp.data.Data, seed: int) -> sp.data.Data:
    """The training and validation parts, divided anew: three quarters to train on, a quarter (stratified) to validate on."""
    assert data.validation is not None
    inputs, labels = (torch.cat(both) for both in zip(data.train, data.validation, strict=True))
    folds = StratifiedKFold(4, shuffle=True, random_state=seed // 4).split(labels, labels)
    kept, held_out = list(folds)[seed % 4]
    return replace(
        data, train=sp.data.Split(inputs[kept], labels[kept]), validation=sp.data.Split(inputs[held_out], labels[held_out])
    )


def describe(data: sp.data.Data, rule: Rule, settings: dict[str, Any]) -> dict[str, Any]:
    """All that decides what a cell comes out as, besides its seed. A changed default of the library changes it."""
    network = make_network(data, settings, 0)
    spread = [round(float(tensor.std()), 6) for name, tensor in network.state_dict().items() if name.endswith("synapse.weight")]
    return settings | {"rule": repr(rule), "network": network.config(), "initial_weights": spread}


def run_cell(data: sp.data.Data, rule: Rule, settings: dict[str, Any], seed: int) -> dict[str, Any]:
    """Train one network and look at it on the part that is asked about."""
    network, num_steps = make_network(data, settings, seed), settings["num_steps"]
    size = settings["batch_size"]
    limits = {"num_steps": num_steps, "epochs": settings["epochs"], "batch_size": size}
    history = sp.fit(network, rule, data, **limits, augment=sp.Augmentation(settings["noise"]), seed=seed)
    split = data.test if settings["on"] == "test" else data.validation
    health = sp.dead_neurons(network, split, num_steps=num_steps)
    return {
        "accuracy": sp.evaluate(network, split, num_steps=num_steps).accuracy,
        **{name: health.share(name) for name in HEALTH},
        "samples": health.samples,
        "epochs": len(history.epochs),
        "seconds": sum(history.series("seconds")),
    }


def summarise(cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Per rule: mean and sample standard deviation over seeds of every accuracy; the worst dead share and rate of any layer."""
    summary = {}
    for rule in dict.fromkeys(cell["rule"] for cell in cells):
        own = [cell for cell in cells if cell["rule"] == rule]
        options = [option for option in OPTIONS if option in own[0]["accuracy"]]
        accuracies = {option: [cell["accuracy"][option] for cell in own] for option in options}
        summary[rule] = {
            "seeds": [cell["seed"] for cell in own],
            "mean": {option: statistics.mean(found) for option, found in accuracies.items()},
            "std": {option: statistics.stdev(found) if len(found) > 1 else None for option, found in accuracies.items()},
            "worst": {name: max(max(cell[name]) for cell in own) for name in HEALTH},
            "seconds": statistics.mean(cell["seconds"] for cell in own),
        }
    return summary


def table(summary: dict[str, Any], settings: dict[str, Any]) -> str:
    """The summary for people; health is that of the worst layer of the worst seed."""
    lines = [
        f"{settings['data']} ({settings['on']}), mlp:{','.join(map(str, settings['hidden']))}, "
        f"T = {settings['num_steps']}, {settings['epochs']} epochs",
        "rule                   seeds  readout           nearest           tree              dead    rate    seconds",
    ]
    for rule, found in summary.items():
        spread = {option: "" if std is None else f" +- {std:.4f}" for option, std in found["std"].items()}
        shares = "  ".join(f"{mean:.4f}{spread[option]:10}" for option, mean in found["mean"].items())
        worst = found["worst"]
        lines.append(
            f"{rule:21}  {len(found['seeds']):5}  {shares:52}  {worst['dead']:6.2%}  {worst['rate']:.4f}  "
            f"{found['seconds']:7.1f}"
        )
    return "\n".join(lines)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=BENCHMARKS, required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rules", nargs="+", choices=RULES, default=DEFAULT_RULES)
    parser.add_argument(
        "--on", choices=("validation", "folds", "test"), default="test", help="the part looked at after training"
    )
    parser.add_argument("--without-validation", action="store_true", help="train on the training part alone")
    parser.add_argument("--data-root", type=Path, help=f"folder of the data files; else {sp.data.ROOT_VARIABLE} names it")
    parser.add_argument("--out", type=Path, help="result file; default: benchmarks/results/accuracy-<data>[-validation].json")
    recipe = parser.add_argument_group("instead of the library's and the benchmark's own settings")
    recipe.add_argument("--hidden", nargs="+", type=int)
    recipe.add_argument("--num-steps", type=int)
    recipe.add_argument("--epochs", type=int)
    recipe.add_argument("--batch-size", type=int)
    recipe.add_argument("--noise", type=float, help="added to the training inputs, standard deviation")
    recipe.add_argument("--gain", type=float, help="of the initial weights")
    recipe.add_argument("--temperature", type=float, help="of the local loss")
    recipe.add_argument("--trace", choices=("exact", "shared"), help="of eligibility")
    recipe.add_argument("--learning-rate", type=float, help="of Adam")
    recipe.add_argument("--homeostasis", choices=("on", "off"), help="hold the rates in a band")
    recipe.add_argument("--highest-rate", type=float, help="upper end of the homeostatic band")
    parser.add_argument("--precision", choices=("highest", "high", "medium"), default="medium", help="of float32 products")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse(argv)
    torch.set_float32_matmul_precision(arguments.precision)
    full_train = arguments.on == "test" and not arguments.without_validation
    data = sp.data.load(arguments.data, root=arguments.data_root, full_train=full_train)
    part = f"-{arguments.on}" if arguments.on != "test" else "" if full_train else "-without-validation"
    path = arguments.out or RESULTS / f"accuracy-{arguments.data}{part}.json"

    samples = len(data.train.labels)
    settings = {"data": arguments.data, "on": arguments.on, "train_samples": samples}
    settings |= {name: getattr(arguments, name) or default for name, default in BENCHMARKS[arguments.data].items()}
    settings["batch_size"] = arguments.batch_size or default_batch_size(samples)
    settings |= {"gain": arguments.gain, "precision": arguments.precision}
    rules = {name: make_rule(name, arguments) for name in arguments.rules}
    wanted = {name: describe(data, rule, settings) for name, rule in rules.items()}

    def make(key: Key) -> dict[str, Any]:
        name, seed = key
        return run_cell(fold(data, seed) if arguments.on == "folds" else data, rules[name], settings, seed)

    file = ResultFile(path, ("rule", "seed"), lambda key: wanted.get(key[0]), partial(results, argv, settings))
    cells = file.fill([(name, seed) for seed in arguments.seeds for name in arguments.rules], make)
    print(table(summarise(list(cells.values())), settings))
    return 0


def results(argv: Sequence[str], settings: dict[str, Any], cells: Cells) -> dict[str, Any]:
    """The whole result file, cells in the order of rules and seeds."""
    names = list(RULES)
    ordered = [cells[key] for key in sorted(cells, key=lambda key: (names.index(key[0]), key[1]))]
    return header("accuracy", argv) | {"settings": settings, "cells": ordered, "summary": summarise(ordered)}


if __name__ == "__main__":
    raise SystemExit(main())
