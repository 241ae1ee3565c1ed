"""Does a stream of a thousand steps need more memory than one of ten? Peak over the import baseline, in fresh processes.

    python benchmarks/memory.py

Each measurement is a process of its own: it imports everything, lets a toy network learn two steps so that the machine code in use
is loaded, and sets the baseline there. Then it builds the network (weights, Adam's moments and all), streams T steps of a Poisson
input, each drawn when it is due, through ``rule.learn`` and reports its highest resident memory above the baseline. For comparison
the mode "whole" hands over the sequence at once and updates once, at its end.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import LEARN_ON, RESULTS, header, write_json

import spikeprop as sp
from spikeprop.models import mlp

MIB = 2**20
TOLERANCE = 0.05
# Without them glibc's heap, not the program, decides the peak: a heap per thread, and blocks that stay with the heap or go back to
# the system depending on what was freed before.
ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def resident(field: str) -> float:
    """VmRSS (now) or VmHWM (highest so far) of this process in MiB; where there is no /proc, the highest so far for both."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (MIB if sys.platform == "darwin" else 1024)
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def reset_peak() -> bool:
    """Forget the highest value so far, so that a peak during the imports hides nothing; False where the system does not allow it."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        return False
    return True


def learn(settings: dict[str, Any], num_steps: int) -> None:
    """Build the network and teach it one Poisson sequence, streamed or whole."""
    batch, classes = settings["batch_size"], 10
    generator = torch.Generator().manual_seed(settings["seed"])
    network = mlp((settings["inputs"],), settings["hidden"], classes, neuron=sp.LIF(beta=0.9, threshold=1.0), seed=settings["seed"])
    streamed = settings["mode"] == "stream"
    rule = sp.SigProp(learn_on=LEARN_ON[settings["rule"]], update_every=settings["update_every"] if streamed else None)
    state = rule.begin(rule.initial_state(network, generator=generator))
    intensity = torch.rand(batch, settings["inputs"], generator=generator)
    labels = torch.randint(classes, (batch,), generator=generator)
    encoder = sp.Poisson(rate=settings["input_rate"])
    for _ in range(num_steps if streamed else 1):
        _, state = rule.learn(network, state, encoder(intensity, 1 if streamed else num_steps, generator), labels)


def measure(settings: dict[str, Any], num_steps: int) -> dict[str, Any]:
    """In a fresh process: peak over the baseline in MiB, and milliseconds per step."""
    learn(settings | {"inputs": 16, "hidden": [16, 16], "batch_size": 2, "update_every": 1}, 2)
    was_reset = reset_peak()
    baseline, started = resident("VmRSS"), time.perf_counter()
    learn(settings, num_steps)
    seconds = time.perf_counter() - started
    return {
        "baseline_mib": baseline,
        "peak_mib": resident("VmHWM") - baseline,
        "ms_per_step": 1000 * seconds / num_steps,
        "peak_was_reset": was_reset,
    }


def measure_fresh(settings: dict[str, Any], num_steps: int) -> dict[str, Any]:
    """:func:`measure` in a process of its own."""
    order = [sys.executable, str(Path(__file__).resolve()), "--child", json.dumps(settings), "--num-steps", str(num_steps)]
    run = subprocess.run(order, env=os.environ | ALLOCATOR, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        raise SystemExit(f"the measurement {settings} at T = {num_steps} failed:\n{run.stderr}")
    return json.loads(run.stdout.splitlines()[-1])


def points(arguments: argparse.Namespace) -> list[tuple[str, str, int]]:
    """Rule, mode and T of every point; a sequence held whole is measured up to 100 steps."""
    streamed = [(rule, "stream", steps) for rule in arguments.rules for steps in arguments.num_steps]
    whole = [(rule, "whole", steps) for rule in arguments.rules for steps in arguments.num_steps if steps <= 100]
    return streamed + ([] if arguments.no_whole else whole)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rules", nargs="+", choices=LEARN_ON, default=["sigprop-surrogate", "sigprop-membrane"])
    parser.add_argument("--num-steps", nargs="+", type=int, default=[10, 100, 1000], help="lengths T, shortest first")
    parser.add_argument("--inputs", type=int, default=784)
    parser.add_argument("--hidden", nargs="+", type=int, default=[512, 512])
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--update-every", type=int, default=5, help="steps between weight updates, the same for every T")
    parser.add_argument("--repeats", type=int, default=3, help="processes per point; their median counts")
    parser.add_argument("--no-whole", action="store_true", help="leave out the comparison with whole sequences")
    parser.add_argument("--out", type=Path, default=RESULTS / "memory.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    if arguments.child is not None:
        print(json.dumps(measure(json.loads(arguments.child), arguments.num_steps[0])))
        return 0
    settings = {name: getattr(arguments, name) for name in ("inputs", "hidden", "batch_size", "update_every", "repeats")}
    settings |= {"input_rate": 0.1, "seed": 0}
    results = header("memory", sys.argv[1:] if argv is None else argv)
    results |= {"settings": settings | {"allocator": ALLOCATOR, "tolerance": TOLERANCE}, "cells": []}
    print("rule                  mode          T   peak over baseline [MiB]   of each process   ms per step")
    for rule, mode, num_steps in points(arguments):
        runs = [measure_fresh(settings | {"rule": rule, "mode": mode}, num_steps) for _ in range(arguments.repeats)]
        cell = {"rule": rule, "mode": mode, "num_steps": num_steps, "peak_mib": statistics.median(run["peak_mib"] for run in runs)}
        results["cells"].append(cell | {"runs": runs})
        each = " ".join(f"{run['peak_mib']:.1f}" for run in runs)
        pace = statistics.median(run["ms_per_step"] for run in runs)
        print(f"{rule:20}  {mode:6}  {num_steps:7}  {cell['peak_mib']:25.2f}   {each:15}  {pace:12.1f}", flush=True)

    shortest, longest = min(arguments.num_steps), max(arguments.num_steps)
    peak = {(cell["rule"], cell["mode"], cell["num_steps"]): cell["peak_mib"] for cell in results["cells"]}
    ratios = {rule: peak[rule, "stream", longest] / peak[rule, "stream", shortest] for rule in arguments.rules}
    passed = all(ratio <= 1.0 + TOLERANCE for ratio in ratios.values())
    results["summary"] = {"shortest": shortest, "longest": longest, "ratio": ratios, "passed": passed}
    write_json(arguments.out, results)
    for rule, ratio in ratios.items():
        verdict = "PASS" if ratio <= 1.0 + TOLERANCE else "FAIL"
        print(f"{verdict}  {rule}: peak at T = {longest} is {ratio:.3f} of that at T = {shortest} (at most {1 + TOLERANCE:.2f})")
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
