"""How long a training step takes: SigProp against BPTT by hand and in other libraries, interleaved in one run.

    python benchmarks/speed.py

Every round times one step of every contestant, one after the other, so that a busy machine slows all of them; ratios are taken
within a round, and their median and quartiles over the rounds count. ``--precision highest`` keeps float32 products float32.
Under ``medium`` torch may round matrix products for everybody, "BPTT by hand, float32" included; spikeprop then computes
convolutions in bfloat16, too, which torch does for nobody else: compare those with "BPTT by hand, bfloat16". Libraries that are
not installed are left out, which the file says.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, command, commit, header, read_json, write_json
from speed_steps import CONTESTANTS, Work, missing

WORKS = {
    "mlp, T = 25": Work("mlp", 25, 128, 0.1),
    "mlp, T = 100": Work("mlp", 100, 128, 0.1),
    "conv, T = 10": Work("conv", 10, 64, 0.1),
}


def measure(work: Work, names: Sequence[str], rounds: int) -> dict[str, list[float]]:
    """Milliseconds per step: of each contestant one figure per round."""
    steps = {name: CONTESTANTS[name](work) for name in names}
    for step in steps.values():
        for _ in range(3):  # compilers, allocators and moments of the optimiser
            step()
    order = random.Random(0)
    found: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in order.sample(list(names), len(names)):
            started = time.perf_counter()
            steps[name]()
            found[name].append((time.perf_counter() - started) * 1e3)
    return found


def libraries() -> dict[str, str]:
    """The versions of the libraries that were timed."""
    return {name: metadata.version(name) for name in ("snntorch", "norse", "spikingjelly") if not missing(name)}


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Median and the quartiles around it."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "low": low, "high": high}


def summarise(found: dict[str, list[float]]) -> dict[str, Any]:
    """Milliseconds, and how many times a contestant's step each of ours fits into it."""
    ratios = {
        ours: {
            other: quartiles([theirs / mine for theirs, mine in zip(found[other], found[ours], strict=True)])
            for other in found
            if other != ours
        }
        for ours in found
        if ours.startswith("sigprop")
    }
    return {"ms": {name: quartiles(values) for name, values in found.items()}, "times": ratios}


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--works", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--precision", nargs="+", choices=("highest", "medium"), default=["medium", "highest"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--out", type=Path, default=RESULTS / "speed.json")
    arguments = parser.parse_args(argv)
    absent = [name for name in arguments.contestants if missing(name)]
    names = [name for name in arguments.contestants if name not in absent]
    before = read_json(arguments.out) or {"cells": []}
    cells = {(cell["work"], cell["precision"], cell["threads"]): cell for cell in before["cells"]}
    for precision in arguments.precision:
        torch.set_float32_matmul_precision(precision)
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            for title in arguments.works:
                found = measure(WORKS[title], names, arguments.rounds)
                summary = summarise(found)
                cells[title, precision, threads] = {
                    **{"work": title, "precision": precision, "threads": threads, "absent": absent},
                    **{"settings": vars(WORKS[title]), "rounds": found, "load": os.getloadavg()[0], **summary},
                    **{"commit": commit(), "command": command("speed", argv), "libraries": libraries()},
                }
                print(f"{title}, {precision}, {threads} thread(s)")
                for name, figures in summary["ms"].items():
                    print(
                        f"  {name:26} {figures['median']:8.1f} ms  ({figures['low']:.1f} to {figures['high']:.1f})", flush=True
                    )
                write_json(arguments.out, header("speed", argv) | {"cells": list(cells.values())})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
