"""How a training step's cost grows with the work: batch, time steps, width, density of the input, depth.

    python benchmarks/scaling.py

From one network (mlp 784-512-512-10, B = 128, T = 25, density 0.1) one quantity at a time is changed. Contestants are timed as
in speed.py, interleaved. An exponent p says that the time grows as quantity^p: the slope of a straight line through the
logarithms of the medians, with its standard error. Points that are in the file already are kept, so that a run can be stopped
and go on.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, command, commit, header, read_json, write_json
from speed import measure, quartiles
from speed_steps import CONTESTANTS, Work, missing

BASE = Work("mlp", 25, 128, 0.1)
AXES: dict[str, list[Any]] = {
    "batch": [32, 64, 128, 256, 512],
    "num_steps": [10, 25, 50, 100, 200],
    "width": [128, 256, 512, 1024],
    "density": [0.02, 0.05, 0.1, 0.2, 0.4],
    "depth": [1, 2, 4, 8],
}
NAMES = ("sigprop-membrane", "sigprop-surrogate", "BPTT by hand, bfloat16", "snntorch")


def exponent(x: Sequence[float], y: Sequence[float]) -> dict[str, float]:
    """The slope of log y over log x by least squares, and its standard error."""
    across, up = ([math.log(value) for value in values] for values in (x, y))
    slope, offset = statistics.linear_regression(across, up)
    left = sum((b - slope * a - offset) ** 2 for a, b in zip(across, up, strict=True))
    spread = sum((a - statistics.mean(across)) ** 2 for a in across)
    return {"exponent": slope, "error": math.sqrt(left / (len(x) - 2) / spread)}


def summarise(cells: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """By axis and contestant; of what has three points or more."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for axis in AXES:
        own = sorted((cell for cell in cells if cell["axis"] == axis), key=lambda cell: cell["value"])
        for name in dict.fromkeys(name for cell in own for name in cell["ms"]):
            points = [(cell["value"], cell["ms"][name]["median"]) for cell in own if name in cell["ms"]]
            if len(points) >= 3:
                x, y = zip(*points, strict=True)
                found.setdefault(axis, {})[name] = exponent(x, y)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(NAMES))
    parser.add_argument("--out", type=Path, default=RESULTS / "scaling.json")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("medium")
    names = [name for name in arguments.contestants if not missing(name)]
    cells = {(cell["axis"], cell["value"]): cell for cell in (read_json(arguments.out) or {"cells": []})["cells"]}
    for axis in arguments.axes:
        for value in AXES[axis]:
            if (axis, value) in cells:
                continue
            found = measure(replace(BASE, **{axis: value}), names, arguments.rounds)
            cells[axis, value] = {
                "axis": axis,
                "value": value,
                "commit": commit(),
                "rounds": arguments.rounds,
                "ms": {name: quartiles(values) for name, values in found.items()},
            }
            print(
                axis,
                value,
                *(f"{name} {statistics.median(values):.1f} ms" for name, values in found.items()),
                sep="  ",
                flush=True,
            )
            made = list(cells.values())
            results = header("scaling", argv) | {"command": command("scaling", argv)}
            write_json(arguments.out, {**results, "cells": made, "exponents": summarise(made)})
    for axis, own in summarise(list(cells.values())).items():
        for name, fitted in own.items():
            print(f"{axis:10} {name:24} {fitted['exponent']:.2f} +- {fitted['error']:.2f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
