"""Does the fast path, with fewer readings of the membrane, reach what the plain path reaches? Validation accuracy over seeds.

    python benchmarks/paths.py

Each seed trains the same network four times: by the compiled path (products in bfloat16, where the machine has it) and by the
plain one (``learn_locally``, products in float32), each with the local loss read at every step and as rarely as the default
reads it. The test part is not touched; cells that are in the file already are kept.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from common import RESULTS, commit, header, read_json, spread, write_json

import spikeprop as sp
from spikeprop import compiled
from spikeprop.catalogue import configure
from spikeprop.models import mlp

DATA: dict[str, dict[str, Any]] = {  # what is trained, and for how long
    "digits": {"hidden": [256, 256], "num_steps": 25, "epochs": 10, "samples": None},
    "mnist": {"hidden": [512, 512], "num_steps": 25, "epochs": 4, "samples": 20_000},
}
RATES = {"sigprop-surrogate": 2e-3, "sigprop-membrane": 4e-3}  # those of the evidence on MNIST
PATHS = ("compiled", "plain")


def train(data: sp.data.Data, work: dict[str, Any], rule: str, path: str, read_every: int | None, seed: int) -> dict[str, Any]:
    if work["samples"] is not None:
        data = replace(data, train=sp.data.Split(*(part[: work["samples"]] for part in data.train)))
    torch.set_float32_matmul_precision("medium" if path == "compiled" else "highest")
    learner: Any = replace(configure(rule, {"learning_rate": RATES[rule]}), read_every=read_every)  # type: ignore[type-var]
    network = mlp(data.input_shape, work["hidden"], data.num_classes, seed=seed)
    plain = mock.patch.object(compiled, "suits", return_value=False) if path == "plain" else nullcontext()
    with plain:
        history = sp.fit(network, learner, data, work["num_steps"], work["epochs"], seed=seed, progress=False)
    last = history.epochs[-1]
    return {"accuracy": last["validation_accuracy"], "dead": max(last["dead"]), "rate": max(last["rate"])}


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA))
    parser.add_argument("--data-root", default=os.environ.get("SPIKEPROP_DATA"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=RESULTS / "paths.json")
    arguments = parser.parse_args(argv)
    cells: dict[Any, dict[str, Any]] = {}
    for cell in (read_json(arguments.out) or {"cells": []})["cells"]:
        cells[cell["data"], cell["rule"], cell["path"], cell["read_every"], cell["seed"]] = cell
    for name, seed in itertools.product(arguments.data, arguments.seeds):
        data = sp.data.load(name, root=arguments.data_root)
        for key in itertools.product([name], RATES, PATHS, (1, None), [seed]):
            if key in cells:
                continue
            _, rule, path, read_every, _ = key
            kind = {"data": name, "rule": rule, "path": path, "read_every": read_every, "seed": seed, "commit": commit()}
            cells[key] = {**kind, **train(data, DATA[name], rule, path, read_every, seed)}
            print(*key, f"{cells[key]['accuracy']:.4f}", flush=True)
            groups: dict[str, list[float]] = {}
            for cell in cells.values():
                title = f"{cell['data']}, {cell['rule']}, {cell['path']}, read every {cell['read_every'] or 'few'}"
                groups.setdefault(title, []).append(cell["accuracy"])
            summary = {title: spread(values) for title, values in groups.items()}
            write_json(
                arguments.out,
                {**header("paths", argv), "settings": DATA, "cells": list(cells.values()), "summary": summary},
            )
    for name, rule in itertools.product(arguments.data, RATES):
        own = [cell for cell in cells.values() if (cell["data"], cell["rule"]) == (name, rule)]
        for path, read_every in itertools.product(PATHS, (1, None)):
            values = [cell["accuracy"] for cell in own if (cell["path"], cell["read_every"]) == (path, read_every)]
            print(f"{name:8} {rule:18} {path:9} {read_every or 'few':>4}  {statistics.mean(values):.4f}  {values}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
