"""Does a stream of a thousand steps need more memory than one of ten? Peak over the import baseline, in fresh processes.

    python benchmarks/memory.py

Each measurement is a process of its own: it imports everything, lets a toy network learn 200 steps, so that the machine code
in use is loaded and the interpreter has taken what it takes once (Python's allocator takes 1 MiB at a time, which is 5 % of
what is measured), and sets the baseline there. Then it builds the network (weights, Adam's moments and all), streams T steps
of a Poisson input, each drawn when it is due, through ``rule.learn`` and reports its highest resident memory above the
baseline. Two other modes for comparison: "stream-system" streams under the system's allocator as it comes, "whole" hands over
the sequence at once and updates once, at its end. Networks of other depths are streamed, too (``--depths``), and another
library's step is measured on whole sequences (``--peers``), all with hidden layers as wide as the first.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, header, write_json
from speed_steps import CONTESTANTS, Work, missing

import spikeprop as sp
from spikeprop.catalogue import RULES
from spikeprop.models import mlp
from spikeprop.runs import forget_peak, memory_mib, peak_memory_mib

TOLERANCE, WARM_UP = 0.05, 200
# Blocks above it are the system's own. Left alone it begins at 131072 and rises to the size of the first large block freed;
# from then on blocks of megabytes (gradients) lie in the heap, and its gaps, 5 to 14 MiB that differ from run to run, drown the
# figure. At 131072 one kind of block, a step's drawn spikes (100,352 bytes), still leaves gaps of half a MiB.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536"}
MODES = ("stream", "stream-system", "whole")
PEERS = ("snntorch", "BPTT by hand, bfloat16")


def learn(settings: dict[str, Any], num_steps: int) -> None:
    """Build the network and teach it one Poisson sequence, streamed or whole."""
    if settings["rule"] in PEERS:
        size = {"width": settings["hidden"][0], "depth": len(settings["hidden"])}
        step = CONTESTANTS[settings["rule"]](Work("mlp", num_steps, settings["batch_size"], settings["input_rate"], **size))
        step(), step()
        return
    batch, classes = settings["batch_size"], 10
    generator = torch.Generator().manual_seed(settings["seed"])
    neuron = sp.LIF(beta=0.9, threshold=1.0)
    network = mlp((settings["inputs"],), settings["hidden"], classes, neuron=neuron, seed=settings["seed"])
    streamed = settings["mode"] != "whole"
    rule = dataclasses.replace(RULES[settings["rule"]], update_every=settings["update_every"] if streamed else None)
    state = rule.begin(rule.initial_state(network, generator=generator))
    intensity = torch.rand(batch, settings["inputs"], generator=generator)
    labels = torch.randint(classes, (batch,), generator=generator)
    encoder = sp.Poisson(rate=settings["input_rate"])
    for _ in range(num_steps if streamed else 1):
        _, state = rule.learn(network, state, encoder(intensity, 1 if streamed else num_steps, generator), labels)


def measure(settings: dict[str, Any], num_steps: int) -> dict[str, Any]:
    """In a fresh process: what this process holds at the baseline, and its peak above that."""
    learn(settings | {"inputs": 16, "hidden": [16, 16], "batch_size": 2, "update_every": 1}, WARM_UP)
    was_reset = forget_peak()
    baseline, started = memory_mib(), time.perf_counter()
    learn(settings, num_steps)
    return {
        "baseline_mib": baseline,
        "peak_mib": peak_memory_mib() - baseline,
        "seconds": time.perf_counter() - started,
        "peak_was_reset": was_reset,
    }


def measure_fresh(settings: dict[str, Any], num_steps: int) -> dict[str, Any]:
    """:func:`measure` in a process of its own."""
    order = [sys.executable, str(Path(__file__).resolve()), "--child", json.dumps(settings), "--num-steps", str(num_steps)]
    environment = os.environ | ({} if settings["mode"] == "stream-system" else ALLOCATOR)
    run = subprocess.run(order, env=environment, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        raise SystemExit(f"the measurement {settings} at T = {num_steps} failed:\n{run.stderr}")
    return json.loads(run.stdout.splitlines()[-1])


def points(arguments: argparse.Namespace) -> list[tuple[str, str, int, list[int]]]:
    """Rule, mode, T and widths of every point; a sequence held whole is measured up to 100 steps."""
    wanted = itertools.product(arguments.modes, arguments.rules, sorted(arguments.num_steps))
    found = [(rule, mode, steps, arguments.hidden) for mode, rule, steps in wanted if mode != "whole" or steps <= 100]
    shortest, width = min(arguments.num_steps), arguments.hidden[0]
    deep = [[width] * depth for depth in arguments.depths]
    found += [(rule, "stream", shortest, one) for rule in arguments.rules for one in deep if one != arguments.hidden]
    peers = itertools.product(arguments.peers, sorted(arguments.num_steps))
    return found + [(peer, "whole", steps, arguments.hidden) for peer, steps in peers if steps <= 100]


def held_mib(inputs: int, hidden: list[int], classes: int = 10) -> float:
    """What no training by Adam does without: weights, two moments, and once the gradient."""
    sizes = [inputs, *hidden]
    weights = sum(before * after + after for before, after in itertools.pairwise(sizes))
    return 4 * 4 * (weights + classes * (hidden[0] + hidden[-1] + 1)) / 2**20  # target synapses and readout, too


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rules", nargs="+", choices=RULES, default=["sigprop-surrogate", "sigprop-membrane"])
    parser.add_argument("--num-steps", nargs="+", type=int, default=[10, 100, 1000], help="lengths T")
    parser.add_argument("--inputs", type=int, default=784)
    parser.add_argument("--hidden", nargs="+", type=int, default=[512, 512])
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--update-every", type=int, default=5, help="steps between weight updates, the same for every T")
    parser.add_argument("--repeats", type=int, default=3, help="processes per point; their median counts")
    parser.add_argument("--depths", nargs="*", type=int, default=[2, 4, 8, 16], help="hidden layers of further networks")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=[peer for peer in PEERS if not missing(peer)])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help='"stream" must be among them')
    parser.add_argument("--out", type=Path, default=RESULTS / "memory.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if "stream" not in arguments.modes:
        parser.error('the mode "stream" is what is judged and cannot be left out')
    if min(arguments.num_steps) < 2 * arguments.update_every:
        # Before the first update the optimiser has no moments: the peak comes at the second.
        parser.error(f"every T must hold two updates: at least {2 * arguments.update_every} steps")
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    if arguments.child is not None:
        print(json.dumps(measure(json.loads(arguments.child), arguments.num_steps[0])))
        return 0
    settings = {name: getattr(arguments, name) for name in ("inputs", "batch_size", "update_every", "repeats")}
    settings |= {"input_rate": 0.1, "seed": 0}
    results = header("memory", sys.argv[1:] if argv is None else argv)
    results |= {
        "settings": settings | {"allocator": ALLOCATOR, "tolerance": TOLERANCE, "hidden": arguments.hidden},
        "cells": [],
    }
    print("rule                    mode              T  layers   peak over baseline [MiB]   of each process")
    for rule, mode, num_steps, hidden in points(arguments):
        own = settings | {"rule": rule, "mode": mode, "hidden": hidden}
        runs = [measure_fresh(own, num_steps) for _ in range(arguments.repeats)]
        peak = statistics.median(run["peak_mib"] for run in runs)
        cell = {"rule": rule, "mode": mode, "num_steps": num_steps, "hidden": hidden, "peak_mib": peak}
        results["cells"].append({**cell, "held_mib": held_mib(arguments.inputs, hidden), "runs": runs})
        each = " ".join(f"{run['peak_mib']:.2f}" for run in runs)
        print(f"{rule:22}  {mode:13}  {num_steps:5}  {len(hidden):6}  {peak:25.2f}   {each}", flush=True)

    shortest, longest = min(arguments.num_steps), max(arguments.num_steps)
    peaks = {
        (cell["rule"], cell["mode"], cell["num_steps"]): cell["peak_mib"]
        for cell in results["cells"]
        if cell["hidden"] == arguments.hidden
    }
    ratios = {rule: peaks[rule, "stream", longest] / peaks[rule, "stream", shortest] for rule in arguments.rules}
    passed = all(ratio <= 1.0 + TOLERANCE for ratio in ratios.values())
    slopes = {}
    for rule, mode in {key[:2] for key in peaks}:
        if len(own := sorted((key[2], peak) for key, peak in peaks.items() if key[:2] == (rule, mode))) > 1:
            slopes[f"{rule}, {mode}"] = statistics.linear_regression(*zip(*own, strict=True)).slope
    results["summary"] = {"shortest": shortest, "longest": longest, "ratio": ratios, "passed": passed, "mib_per_step": slopes}
    write_json(arguments.out, results)
    for rule, ratio in ratios.items():
        verdict = "PASS" if ratio <= 1.0 + TOLERANCE else "FAIL"
        print(f"{verdict}  {rule}: T = {longest} peaks at {ratio:.3f} of T = {shortest} (at most {1 + TOLERANCE:.2f})")
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
