"""Dead neurons under stress: the same network, started with ever more of its neurons dead, trained by several rules.

    python benchmarks/stress.py --data-root ~/data
    python benchmarks/stress.py --data digits

Three dials kill the neurons of a freshly initialised network: "weights" multiplies every layer's weights, "thresholds" every
layer's threshold, and "biases" takes a number of thresholds from every neuron's bias. A level is the share of all hidden
neurons that are dead at the start, that is, never spike over the training images used and T. For levels below 1 the dial stands
at the mildest value that reaches the level (found by bisection, to 0.1 %); for level 1 it stands 1.25 times as far as the
mildest value at which every neuron is dead: weights are divided by 1.25 more, the others multiplied. The healthy start, level
0, is the network as it comes; the three dials share it.

The dial is the same for all layers. A layer gets less input as the one before it falls silent, so the last layer dies first;
every cell has the dead share of each layer. Two equal layers at level 0.5 mean that the last is silent altogether.

The readout starts from N(0, 1 / fan-in), as the layers do. The library's own starts at zero (``--readout zero``), and under a
silent last layer it stays there: no rule that takes its error through the readout would then move any weight, whatever its
surrogate, and the comparison would be one of readouts.

A cell is one rule, with or without homeostasis, at one start with one seed. The input mean is set before the dial is turned, as
training does it. Health is measured over the training images used, with the same images before and after training. Revival is
the share of the neurons dead at the start that spike after training; death is the share of those alive at the start that are
dead after it.

Cells are written as soon as they are done, so a run can be stopped at any time: the same command goes on where it was left, and
several processes with the same command share the work. ``--on validation`` never looks at the test part: it is for choosing
learning rates, with ``--levels 0 --learning-rate R --out FILE``.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, Cells, Key, ResultFile, header, spread

import spikeprop as sp
from spikeprop.catalogue import RULES, configure
from spikeprop.encoding import default_encoder
from spikeprop.errors import InputError
from spikeprop.evaluation import changes, total_change
from spikeprop.models import mlp
from spikeprop.rules.base import Rule
from spikeprop.training import centre_inputs, default_batch_size

BENCHMARKS: dict[str, dict[str, Any]] = {  # the network and how long it is trained, on how many of the first training images
    "fashion-mnist": {"hidden": [512, 512], "num_steps": 8, "epochs": 6, "train_samples": 20_000},
    "digits": {"hidden": [32, 32], "num_steps": 8, "epochs": 10, "train_samples": 1085},
}
# Chosen on validation from the healthy start. Those of digits came with the package, for this network (learning_rates.json).
LEARNING_RATES: dict[str, dict[str, float]] = {
    "fashion-mnist": {
        "bptt-hard": 4e-3,
        "bptt": 4e-3,
        "sigprop-surrogate": 2e-3,
        "sigprop-membrane": 2e-3,
        "sigprop-raw-membrane": 2e-3,
    },
    "digits": {
        "bptt-hard": 0.1,
        "bptt": 0.01,
        "sigprop-surrogate": 0.01,
        "sigprop-membrane": 0.003,
        "sigprop-raw-membrane": 0.01,
        "direct-feedback-alignment": 0.01,
        "local-classifier": 0.03,
        "target-propagation": 0.01,
    },
}
DIALS = ("weights", "thresholds", "biases")
LEVELS = (0.0, 0.8, 1.0, 0.5)  # in the order in which they are run
BEYOND = 1.25  # how far past the first death of all neurons level 1 lies
PRECISION = 1e-3  # of a dial's value, relative
HARDEST = 1e6  # a dial that has not reached its level by then will not
NAMES = ("rule", "homeostasis", "dial", "level", "seed")
HEALTH = ("dead", "nearly_dead", "saturated", "rate", "deficit")
MEASURES = {"accuracy": "accuracy", "dead": "dead after training", "revival": "revival", "death": "death"}


# --- The start ---------------------------------------------------------------------------------------------------------------


def make_network(data: sp.data.Data, settings: dict[str, Any], seed: int) -> sp.Network:
    """The healthy start: fresh weights, the input mean set as :func:`spikeprop.fit` sets it, and the readout asked for."""
    network = mlp(data.input_shape, settings["hidden"], data.num_classes, neuron=sp.LIF(beta=0.9, threshold=1.0), seed=seed)
    centre_inputs(network, data.train.inputs, settings["num_steps"], default_encoder(data.temporal), seed)
    if settings["readout"] == "random":
        weight = network.readout.weight
        own = torch.Generator().manual_seed(seed + 1_000_003)  # not the numbers that the layers' weights were drawn from
        weight.copy_(torch.randn(weight.shape, generator=own) / weight.shape[1] ** 0.5)
    return network


def turn(network: sp.Network, dial: str, value: float) -> sp.Network:
    """Turn a dial of a network, in place.

    Args:
        dial: "weights" and "thresholds" are multiplied by ``value``, from "biases" ``value`` thresholds are taken.
    """
    for layer in network.layers:
        if dial == "weights":
            layer.weights()[0].mul_(value)
        elif dial == "thresholds":
            layer.neuron.threshold *= value
        else:
            layer.bias.sub_(value * layer.neuron.threshold)
    return network


def dial_at(data: sp.data.Data, settings: dict[str, Any], dial: str, level: float, seed: int) -> float:
    """The dial's value for a level above 0: the mildest that reaches it, and beyond that at level 1."""

    def value(hardness: float) -> float:  # grows as the neurons die
        return 1.0 / hardness if dial == "weights" else hardness

    def reached(hardness: float) -> bool:
        network = turn(make_network(data, settings, seed), dial, value(hardness))
        health = sp.dead_neurons(network, data.train, num_steps=settings["num_steps"])
        return total_change(health, health).dead_before >= level

    low = 0.0 if dial == "biases" else 1.0
    high = low + 1.0
    while not reached(high):
        low, high = high, 2.0 * high
        if high > HARDEST:
            raise InputError(f"{dial} at {value(low):g} leave more than {1 - level:.0%} of the neurons alive; lower num_steps")
    while high - low > PRECISION * high:
        middle = (low + high) / 2.0
        low, high = (low, middle) if reached(middle) else (middle, high)
    return value(high * BEYOND if level == 1.0 else high)


# --- Cells -------------------------------------------------------------------------------------------------------------------


def make_rule(name: str, homeostasis: str, settings: dict[str, Any], learning_rate: float | None) -> Rule:
    rate = LEARNING_RATES[settings["data"]].get(name) if learning_rate is None else learning_rate
    return configure(name, {"homeostasis": homeostasis, "learning_rate": rate})


def describe(data: sp.data.Data, rule: Rule, settings: dict[str, Any]) -> dict[str, Any]:
    """All that decides what a cell comes out as, besides its key. A changed default of the library changes it."""
    network = make_network(data, settings, 0)
    spreads = [round(float(layer.weights()[0].std()), 6) for layer in network.layers]
    dial = {"beyond": BEYOND, "precision_of_dial": PRECISION}
    return settings | {"rule": repr(rule), "network": network.config(), "initial_weights": spreads, **dial}


def run_cell(
    data: sp.data.Data, rule: Rule, settings: dict[str, Any], dial: str, value: float | None, seed: int
) -> dict[str, Any]:
    """Train one network from one start and look at it. The accuracy is that of the part asked for, by the readout."""
    network, num_steps = make_network(data, settings, seed), settings["num_steps"]
    if value is not None:
        turn(network, dial, value)
    before = sp.dead_neurons(network, data.train, num_steps=num_steps)
    started = time.perf_counter()
    limits = {"num_steps": num_steps, "epochs": settings["epochs"], "batch_size": settings["batch_size"]}
    history = sp.fit(network, rule, replace(data, validation=None), **limits, seed=seed, progress=False)
    seconds = time.perf_counter() - started
    after = sp.dead_neurons(network, data.train, num_steps=num_steps)
    split = data.test if settings["on"] == "test" else data.validation
    assert split is not None
    each, total = changes(before, after), total_change(before, after)
    return {
        "value": value,
        "accuracy": sp.evaluate(network, split, num_steps=num_steps).accuracy["readout"],
        "dead": {"before": total.dead_before, "after": total.dead_after},
        "revival": total.revival,
        "death": total.death,
        "layers": {
            "before": {name: before.share(name) for name in HEALTH},
            "after": {name: after.share(name) for name in HEALTH},
            "dead_per_epoch": history.series("dead"),
            "revival": [change.revival for change in each],
            "death": [change.death for change in each],
        },
        "seconds": seconds,
    }


# --- What came out -----------------------------------------------------------------------------------------------------------


def summarise(cells: Cells) -> list[dict[str, Any]]:
    """Per rule, homeostasis, dial and level: mean and sample standard deviation over seeds.

    ``accuracy_change`` is the accuracy minus that of the healthy start of the same rule, homeostasis and seed.
    """
    groups: dict[Key, list[dict[str, Any]]] = {}
    for key, cell in cells.items():
        groups.setdefault(key[:-1], []).append(cell)

    def healthy(cell: dict[str, Any]) -> dict[str, Any] | None:
        return cells.get((cell["rule"], cell["homeostasis"], "healthy", 0.0, cell["seed"]))

    rows = []
    for key, own in groups.items():
        lost = [cell["accuracy"] - start["accuracy"] for cell in own if (start := healthy(cell))]
        rows.append(
            dict(zip(NAMES, key, strict=False))
            | {
                "seeds": [cell["seed"] for cell in own],
                "value": spread(cell["value"] for cell in own),
                "accuracy": spread(cell["accuracy"] for cell in own),
                "accuracy_change": spread(lost),
                "dead_before": spread(cell["dead"]["before"] for cell in own),
                "dead": spread(cell["dead"]["after"] for cell in own),
                "revival": spread(cell["revival"] for cell in own),
                "death": spread(cell["death"] for cell in own),
                "seconds": spread(cell["seconds"] for cell in own),
            }
        )
    return rows


def table(summary: Sequence[dict[str, Any]], settings: dict[str, Any]) -> str:
    """One table per measure: rules and homeostasis down, starts across. Means over seeds, in percent."""
    starts = list(dict.fromkeys((row["dial"], row["level"]) for row in summary))
    found = {(row["rule"], row["homeostasis"], row["dial"], row["level"]): row for row in summary}
    seeds = sorted({len(row["seeds"]) for row in summary})
    lines = [
        f"{settings['data']} ({settings['on']}), {settings['train_samples']} training images, "
        f"mlp:{','.join(map(str, settings['hidden']))}, T = {settings['num_steps']}, {settings['epochs']} epochs, "
        f"{' to '.join(map(str, seeds))} seeds; in percent; on, off: homeostasis"
    ]
    head = "".join((f"{dial} {level:g}" if level else dial).rjust(15) for dial, level in starts)

    def percent(row: dict[str, Any] | None, measure: str) -> str:
        if row is None or row[measure]["mean"] is None:
            return f"{'-':>15}"
        std = row[measure]["std"]
        return f"{100 * row[measure]['mean']:.1f}{'' if std is None else f' +- {100 * std:.1f}'}".rjust(15)

    for measure, title in MEASURES.items():
        lines += ["", f"{title:32}{head}"]
        for rule, homeostasis in dict.fromkeys((row["rule"], row["homeostasis"]) for row in summary):
            cells = "".join(percent(found.get((rule, homeostasis, *start)), measure) for start in starts)
            lines.append(f"{rule:25} {homeostasis:6}{cells}")
    return "\n".join(lines)


def results(argv: Sequence[str], settings: dict[str, Any], cells: Cells) -> dict[str, Any]:
    """The whole result file, in the order of rules, homeostasis, dials, levels and seeds."""
    rules, dials = list(RULES), ["healthy", *DIALS]
    ordered = {
        key: cells[key] for key in sorted(cells, key=lambda key: (rules.index(key[0]), key[1], dials.index(key[2]), *key[3:]))
    }
    return header("stress", argv) | {
        "settings": settings,
        "cells": list(ordered.values()),
        "summary": summarise(ordered),
    }


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=BENCHMARKS, default="fashion-mnist")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rules", nargs="+", choices=RULES, help="default: those of LEARNING_RATES")
    parser.add_argument("--homeostasis", nargs="+", choices=("off", "on"), default=["off", "on"])
    parser.add_argument("--dials", nargs="+", choices=DIALS, default=DIALS)
    parser.add_argument(
        "--levels", nargs="+", type=float, default=LEVELS, help="shares of dead neurons, in the order to be run"
    )
    parser.add_argument("--on", choices=("validation", "test"), default="test", help="the part looked at after training")
    parser.add_argument("--data-root", type=Path, help=f"folder of the data files; else {sp.data.ROOT_VARIABLE} names it")
    parser.add_argument("--out", type=Path, help="result file; default: benchmarks/results/stress-<data>[-validation].json")
    recipe = parser.add_argument_group("instead of the benchmark's own settings")
    recipe.add_argument("--hidden", nargs="+", type=int)
    recipe.add_argument("--num-steps", type=int)
    recipe.add_argument("--epochs", type=int)
    recipe.add_argument("--train-samples", type=int, help="how many of the first training images are used")
    recipe.add_argument("--batch-size", type=int)
    recipe.add_argument("--readout", choices=("random", "zero"), default="random", help="how the readout's weights start")
    recipe.add_argument("--learning-rate", type=float, help="of Adam, for all rules")
    parser.add_argument("--precision", choices=("highest", "high", "medium"), default="medium", help="of float32 products")
    arguments = parser.parse_args(argv)
    if not all(0.0 <= level <= 1.0 for level in arguments.levels):
        parser.error(f"--levels {arguments.levels}: a level is a share, from 0 (the healthy start) to 1")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse(argv)
    torch.set_float32_matmul_precision(arguments.precision)
    settings: dict[str, Any] = {"data": arguments.data, "on": arguments.on}
    settings |= {name: getattr(arguments, name) or default for name, default in BENCHMARKS[arguments.data].items()}
    data = sp.data.load(arguments.data, root=arguments.data_root)
    data = replace(data, train=sp.data.Split(*(part[: settings["train_samples"]] for part in data.train)))
    settings["train_samples"] = len(data.train.labels)
    settings["batch_size"] = arguments.batch_size or default_batch_size(settings["train_samples"])
    settings |= {"readout": arguments.readout, "precision": arguments.precision}
    part = "" if arguments.on == "test" else f"-{arguments.on}"
    path = arguments.out or RESULTS / f"stress-{arguments.data}{part}.json"

    kinds = list(itertools.product(arguments.rules or LEARNING_RATES[arguments.data], arguments.homeostasis))
    rules = {kind: make_rule(*kind, settings, arguments.learning_rate) for kind in kinds}
    wanted = {kind: describe(data, rule, settings) for kind, rule in rules.items()}
    file = ResultFile(path, NAMES, lambda key: wanted.get(key[:2]), partial(results, argv, settings))

    @cache
    def value(dial: str, level: float, seed: int) -> float | None:
        if level == 0.0:
            return None
        for key, cell in file.cells().items():  # of another rule, in an earlier run or another process
            if key[2:] == (dial, level, seed) and cell["settings"] | {"rule": ""} == wanted[kinds[0]] | {"rule": ""}:
                return cell["value"]
        return dial_at(data, settings, dial, level, seed)

    def make(key: Key) -> dict[str, Any]:
        *_, dial, level, seed = key
        cell = run_cell(data, rules[key[:2]], settings, dial, value(dial, level, seed), seed)
        dead = cell["dead"]
        print(f"  accuracy {cell['accuracy']:.4f}  dead {dead['before']:.1%} -> {dead['after']:.1%}  {cell['seconds']:.1f} s")
        return cell

    levels = sorted(arguments.levels, key=bool)  # the healthy start comes first, the others as they stand
    starts = [(dial, level) for level in levels for dial in (arguments.dials if level else ("healthy",))]
    cells = file.fill([(*kind, *start, seed) for seed in arguments.seeds for start in starts for kind in kinds], make)
    print(table(summarise(cells), settings))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
