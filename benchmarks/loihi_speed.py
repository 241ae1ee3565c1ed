"""Throughput of the integer simulator against Lava's own continuous run, in one interleaved run.

    python benchmarks/loihi_speed.py

784-512-512-10, T = 32, 10 % of the inputs spiking at random. Each round runs the simulator on batches of 512, sample by sample
(batch 1), and Lava on all its samples in one continuous run, one after the other, so that a busy machine slows all of them; the
ratios are taken within a round and their median counts. The simulator uses one thread; Lava forks its processes over all
cores, and only the time of its run counts, not that of starting and building it. All see the same integers, and their spikes
are compared.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, header, write_json

from spikeprop.backends import lava
from spikeprop.backends.loihi import LoihiLayer, LoihiNetwork, Simulator

SIZES = (784, 512, 512, 10)
STEPS, BATCH, DENSITY = 32, 512, 0.1
GOALS = {"batch_512": 300, "batch_1": 30}  # times Lava's throughput


def network() -> LoihiNetwork:
    """Random 8-bit weights and thresholds that give every layer some activity."""
    rng = np.random.default_rng(0)
    layers = []
    for before, n, threshold in zip(SIZES, SIZES[1:], (1900, 1100, 900), strict=False):
        weight = np.clip(np.rint(rng.normal(0, 50, (n, before))), -127, 127) * 2
        layers.append(LoihiLayer.build(weight, dv=410, vth=threshold, bias_mant=200, bias_exp=3))
    return LoihiNetwork(tuple(layers), (SIZES[0],))


def measure(work: Callable[[], Any], least: float) -> float:
    """Seconds per call, over as many calls as fill ``least`` seconds."""
    work()
    calls, started = 0, time.perf_counter()
    while (spent := time.perf_counter() - started) < least:
        work()
        calls += 1
    return spent / calls


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--lava-samples", type=int, default=60, help="in one continuous run")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each simulator measurement")
    parser.add_argument("--out", type=Path, default=RESULTS / "loihi-speed.json")
    arguments = parser.parse_args(argv)
    if not lava.available():
        parser.error(f"Lava is not installed: {lava.install_command()}")
    chip = network()
    messages = (np.random.default_rng(1).random((STEPS, BATCH, SIZES[0])) < DENSITY).astype(np.int8)
    few, one = messages[:, : arguments.lava_samples], np.ascontiguousarray(messages[:, :1])
    fast, plain = Simulator(chip), Simulator(chip, engine="reference")
    expected = fast.run(messages)
    rates = [float(spikes.mean()) for spikes in expected.spikes]
    cells: list[dict[str, Any]] = []
    for number in range(arguments.rounds):
        cell = {
            "round": number,
            "batch_512": BATCH / measure(lambda: fast.run(messages), arguments.seconds),
            "batch_1": 1 / measure(lambda: fast.run(one), arguments.seconds),
            "reference_batch_512": BATCH / measure(lambda: plain.run(messages), arguments.seconds),
        }
        ran = lava.run(chip, few, timeout=600)
        cell["lava"] = few.shape[1] / ran.seconds
        differing = sum(
            int((ours[:, : few.shape[1]] != theirs).sum()) for ours, theirs in zip(expected.spikes, ran.spikes, strict=True)
        )
        cells.append({**cell, "differing_spikes": differing})
        print("  ".join(f"{name} {value:,.1f}/s" for name, value in cell.items() if name != "round"), flush=True)
    ratios = {name: [cell[name] / cell["lava"] for cell in cells] for name in ("batch_512", "batch_1", "reference_batch_512")}
    summary = {
        "samples_per_second": {name: statistics.median(cell[name] for cell in cells) for name in (*ratios, "lava")},
        "times_lava": {name: statistics.median(found) for name, found in ratios.items()},
        "times_lava_least": {name: min(found) for name, found in ratios.items()},
        "goals": GOALS,
        "passed": all(statistics.median(ratios[name]) >= goal for name, goal in GOALS.items()),
        "differing_spikes": sum(cell["differing_spikes"] for cell in cells),
    }
    settings = {"sizes": SIZES, "num_steps": STEPS, "batch": BATCH, "density": DENSITY, "rates": rates, "threads": 1}
    settings["compiled"] = fast.layers[0].compiled
    write_json(arguments.out, header("loihi_speed", argv) | {"settings": settings, "cells": cells, "summary": summary})
    print("times Lava's throughput: " + ", ".join(f"{name} {ratio:,.0f}" for name, ratio in summary["times_lava"].items()))
    return 0 if summary["passed"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
