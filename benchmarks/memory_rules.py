"""How does the memory of every rule grow with the number of time steps? Peak over the import baseline, in fresh processes.

    python benchmarks/memory_rules.py

Each rule learns one Poisson sequence of T steps in the way it is meant to: rules that keep no history are streamed, one step at
a time; rules that need the activity of past steps at their update (see "stored history" in the table of rules) get the sequence
as one window. The slope is that of a straight line through the points, in KiB per step. How a point is measured: see memory.py.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import numpy as np
from common import RESULTS, header, read_json, write_json
from memory import ALLOCATOR, measure_fresh

from spikeprop.catalogue import RULES

NETWORK = {"inputs": 64, "hidden": [32, 32], "batch_size": 32, "update_every": 1, "input_rate": 0.1, "seed": 0}


def mode(name: str) -> str:
    """How a rule sees a sequence here."""
    return "whole" if RULES[name].facts.stored_history else "stream"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--num-steps", nargs="+", type=int, default=[10, 100, 1000], help="lengths T")
    parser.add_argument("--repeats", type=int, default=3, help="processes per point; their median counts")
    parser.add_argument("--out", type=Path, default=RESULTS / "memory-rules.json")
    arguments = parser.parse_args(argv)
    settings = NETWORK | {"repeats": arguments.repeats}
    results = header("memory_rules", sys.argv[1:] if argv is None else argv) | {"settings": settings | {"allocator": ALLOCATOR}}
    before = read_json(arguments.out) or {}
    same = before.get("settings") == results["settings"]
    results["rules"] = {name: row for name, row in before.get("rules", {}).items() if same and name in RULES}
    print(
        "rule                        seen as  "
        + "  ".join(f"T = {steps:5} [MiB]" for steps in arguments.num_steps)
        + "  KiB per step"
    )
    for name in arguments.rules:
        if name not in results["rules"] or results["rules"][name]["num_steps"] != arguments.num_steps:
            peaks = []
            for steps in arguments.num_steps:
                order = settings | {"rule": name, "mode": mode(name)}
                peaks.append(statistics.median(measure_fresh(order, steps)["peak_mib"] for _ in range(arguments.repeats)))
            slope = float(np.polyfit(arguments.num_steps, peaks, 1)[0]) * 1024
            row = {"mode": mode(name), "num_steps": arguments.num_steps, "peak_mib": peaks, "kib_per_step": slope}
            results["rules"][name] = row
            results["rules"] = {known: results["rules"][known] for known in RULES if known in results["rules"]}
            write_json(arguments.out, results)  # a run that is stopped goes on where it was
        row = results["rules"][name]
        shown = "  ".join(f"{peak:15.1f}" for peak in row["peak_mib"])
        print(f"{name:27} {row['mode']:7}  {shown}  {row['kib_per_step']:12.2f}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
