"""Learning rules on equal terms.

The same network, data, encoder, epochs and batch; each rule's learning rate from one small grid.

A *cell* is one rule with one seed, trained in a fresh process. Cells are written as they are finished, and a comparison that
was stopped goes on where it was; cells made with other settings are made anew. The test part is looked at once per cell, after
the last epoch; learning rates are chosen on the validation part with one seed, and remembered (:data:`KNOWN` holds those that
came with the package).

    python -m spikeprop.comparison < cell.json          # what each process runs
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from spikeprop import catalogue, runs
from spikeprop.alignment import observer
from spikeprop.data import Data
from spikeprop.encoding import from_config
from spikeprop.errors import InputError, SpikepropError
from spikeprop.evaluation import dead_neurons, evaluate
from spikeprop.network import Network
from spikeprop.neuron import LIF
from spikeprop.rules.base import Rule
from spikeprop.training import check_rule, fit

GRID = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
KNOWN = Path(__file__).with_name("learning_rates.json")
RESULTS = "compare.json"
SHARES = {"dead": "dead", "nearly_dead": "nearly_dead", "saturated": "saturated", "firing_rate": "rate"}
PROBE = 128  # training samples on which alignment is measured
MEMORY_UPDATES = 3  # the optimiser's moments are there from the first, every buffer from the second
Settings = dict[str, Any]
Say = Callable[[str], None]


# --- One cell, in a process of its own ---------------------------------------------------------------------------------------


def build(settings: Settings, data: Data, name: str, learning_rate: float | None, seed: int) -> tuple[Network, Rule]:
    """The network and the rule of a cell."""
    neuron = LIF(settings["beta"], settings["threshold"])
    network = runs.build_model(settings["model"], data, neuron=neuron, recurrent=settings["recurrent"], seed=seed)
    homeostasis = None if settings["homeostasis"] == "own" else settings["homeostasis"]
    return network, catalogue.configure(name, {"learning_rate": learning_rate, "homeostasis": homeostasis})


def run_cell(order: dict[str, Any]) -> dict[str, Any]:
    """Train one network and report. ``order``: settings, rule, seed, learning_rate, and what to look at:

    "test": accuracy and health on the test part, alignment over training; "validation": accuracy on the validation part;
    "memory": peak memory of a few updates, above what the process held before.
    """
    settings, name, seed = order["settings"], order["rule"], order["seed"]
    data, encoder = runs.load_data(settings), from_config(settings["encoder"])
    network, rule = build(settings, data, name, order["learning_rate"], seed)
    if order["look_at"] == "memory":
        return {"peak_memory_mib": _peak(network, rule, data, order)}
    how = {"num_steps": settings["num_steps"], "encoder": encoder, "seed": seed}
    observe = None
    if order["look_at"] == "test":
        inputs = encoder(data.train.inputs[:PROBE], settings["num_steps"], torch.Generator().manual_seed(seed))
        observe = observer(rule, inputs, data.train.labels[:PROBE])
    limits = {"epochs": settings["epochs"], "batch_size": settings["batch_size"]}
    history = fit(network, rule, data, progress=False, observe=observe, **limits, **how)
    seconds = statistics.mean(history.series("seconds"))
    if order["look_at"] == "validation":
        return {"accuracy": history.epochs[-1]["validation_accuracy"], "seconds_per_epoch": seconds}
    assert data.test is not None
    found, health = evaluate(network, data.test, **how), dead_neurons(network, data.test, **how)
    return {
        "accuracy": found.accuracy,
        **{key: health.share(share) for key, share in SHARES.items()},
        "samples": found.samples,
        "alignment": history.series("alignment"),
        "validation_accuracy": history.series("validation_accuracy"),
        "seconds_per_epoch": seconds,
    }


def _peak(network: Network, rule: Rule, data: Data, order: dict[str, Any]) -> float:
    """Highest resident memory of some updates, above that of this process with data, network and machine code loaded [MiB]."""
    settings = order["settings"]
    encoder, size = from_config(settings["encoder"]), settings["batch_size"]

    def learn(network: Network, updates: int) -> None:
        state = rule.initial_state(network, generator=torch.Generator().manual_seed(0))
        for number in range(updates):
            inputs = encoder(data.train.inputs[:size], settings["num_steps"], torch.Generator().manual_seed(number))
            state = rule.learn(network, rule.begin(state), inputs, data.train.labels[:size])[1]

    kind, _, sizes = settings["model"].partition(":")
    tiny = {**settings, "model": f"{kind}:{re.sub('[0-9]+', '2', sizes)}"}
    learn(build(tiny, data, order["rule"], order["learning_rate"], 0)[0], 2)  # loads the machine code that is in use
    runs.forget_peak()
    before = runs.memory_mib()
    learn(network, MEMORY_UPDATES)
    return runs.peak_memory_mib() - before


# --- The whole comparison ----------------------------------------------------------------------------------------------------


def compare(
    settings: Settings, names: Sequence[str], seeds: Sequence[int], folder: Path, *, jobs: int, memory_limit: float, say: Say
) -> dict[str, Any]:
    """Run every cell that is not there yet, and summarise all of them.

    Args:
        settings: data, data_root, full_train, model, recurrent, beta, threshold, encoder, num_steps, epochs, batch_size,
            homeostasis ("own": as each rule has it, "on", "off").
        names, seeds: the rules, by the names of the catalogue, and the seeds of each.
        folder: where ``compare.json`` is written, cell by cell.
        jobs: processes at a time, one thread each.
        memory_limit: a rule that is estimated to need more is not run [MiB].
        say: receives progress, line by line.

    Raises:
        InputError: an unknown rule, or a cell that failed (its message is passed on).
    """
    data = runs.load_data(settings)
    refused = {name: reason for name in names if (reason := _refusal(settings, data, name, memory_limit)) is not None}
    if len(refused) == len(names):
        raise InputError("; ".join(refused.values()))
    for reason in refused.values():
        say(f"left out: {reason}")
    able = [name for name in names if name not in refused]
    path = folder / RESULTS
    kept = runs.read_json(path) if path.exists() else {}
    made_by = {"settings": settings, "grid": GRID, "versions": {**runs.versions(), "threads": "1"}}
    same = all(kept.get(key) == json.loads(json.dumps(value)) for key, value in made_by.items())
    done: dict[str, Any] = {
        **made_by,
        "searched": kept.get("searched", {}) if same else {},
        "memory": kept.get("memory", {}) if same else {},
        "cells": kept.get("cells", []) if same else [],
        "seconds": kept.get("seconds", 0.0) if same else 0.0,  # of all cells, without the search
        "jobs": jobs,
    }
    known = {**known_rates(settings), **{name: found["chosen"] for name, found in done["searched"].items()}}

    for name, searched in _search(settings, [name for name in able if name not in known], jobs, say):
        done["searched"][name], known[name] = searched, searched["chosen"]
        runs.write_json(path, done)

    before, started = done["seconds"], time.perf_counter()
    made = {(cell["rule"], cell["seed"]) for cell in done["cells"] if cell["learning_rate"] == known[cell["rule"]]}
    done["cells"] = [cell for cell in done["cells"] if (cell["rule"], cell["seed"]) in made]
    orders = [_order(settings, name, seed, known[name], "test") for seed in seeds for name in able if (name, seed) not in made]
    for order, found in _run(orders, jobs, say):
        cell = {"rule": order["rule"], "seed": order["seed"], "learning_rate": order["learning_rate"], **found}
        done["cells"].append(cell)
        done["seconds"] = before + time.perf_counter() - started
        runs.write_json(path, done)
    orders = [_order(settings, name, 0, known[name], "memory") for name in able if name not in done["memory"]]
    for order, found in _run(orders, jobs, say):
        done["memory"][order["rule"]] = found["peak_memory_mib"]
        done["seconds"] = before + time.perf_counter() - started
        runs.write_json(path, done)

    done["rules"] = [_summary(name, done, seeds, known) for name in able]
    done["rules"] += [{"rule": name, "refused": reason} for name, reason in refused.items()]
    runs.write_json(path, done)
    return done


def _search(settings: Settings, names: Sequence[str], jobs: int, say: Say) -> Iterator[tuple[str, dict[str, Any]]]:
    """Try the grid of learning rates on the validation part, with one seed; each rule's accuracies and the best rate."""
    orders = [_order(settings, name, 0, rate, "validation") for name in names for rate in GRID]
    accuracies: dict[str, float] = {}
    for order, found in _run(orders, jobs, say):
        accuracies[str(order["learning_rate"])] = found["accuracy"]
        if order["learning_rate"] == GRID[-1]:
            chosen = max(accuracies, key=lambda rate: accuracies[rate])
            yield order["rule"], {"chosen": float(chosen), "validation_accuracy": accuracies}
            accuracies = {}


def known_rates(settings: Settings) -> dict[str, float]:
    """The learning rates that came with the package for these very settings, by rule."""
    wanted = json.loads(json.dumps({key: value for key, value in settings.items() if key != "data_root"}))
    for entry in runs.read_json(KNOWN)["entries"] if KNOWN.exists() else []:
        if entry["settings"] == wanted:
            return {name: found["chosen"] for name, found in entry["searched"].items()}
    return {}


def _refusal(settings: Settings, data: Data, name: str, memory_limit: float) -> str | None:
    """Why a rule cannot be part of this comparison, or None."""
    network, rule = build(settings, data, name, None, 0)
    samples, size, steps = len(data.train.labels), settings["batch_size"], settings["num_steps"]
    try:
        check_rule(rule, network, samples, size, steps)
        runs.check_memory(rule.memory(network, max(size, PROBE), steps) / 2**20, memory_limit, f"{name} on {settings['model']}")
    except SpikepropError as error:
        return str(error)
    return None


def _order(settings: Settings, name: str, seed: int, learning_rate: float, look_at: str) -> dict[str, Any]:
    return {"settings": settings, "rule": name, "seed": seed, "learning_rate": learning_rate, "look_at": look_at}


def _run(orders: list[dict[str, Any]], jobs: int, say: Say) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Every order in a fresh process, some at a time, in order."""
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(_fresh_process, order) for order in orders]
        try:
            for number, (order, future) in enumerate(zip(orders, futures, strict=True), 1):
                found = future.result()
                shown = found.get("accuracy", found.get("peak_memory_mib"))
                shown = f"{shown['readout']:.4f}" if isinstance(shown, dict) else f"{shown:.4g}"
                what = f"{order['rule']}, seed {order['seed']}, learning rate {order['learning_rate']:g}"
                say(f"[{number}/{len(orders)}] {order['look_at']}: {what}: {shown}")
                yield order, found
        finally:
            for future in futures:
                future.cancel()


def _fresh_process(order: dict[str, Any]) -> dict[str, Any]:
    """:func:`run_cell` in a process of its own, on one thread."""
    settled = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    settled["MALLOC_MMAP_THRESHOLD_"] = "131072"  # left alone it rises, and gaps in the heap drown the memory figure
    command = [sys.executable, "-m", "spikeprop.comparison"]
    done = subprocess.run(
        command, input=json.dumps(order), env=os.environ | settled, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit status {done.returncode}"
        raise InputError(f"{order['rule']} with seed {order['seed']} failed: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def _summary(name: str, done: dict[str, Any], seeds: Sequence[int], rates: dict[str, float]) -> dict[str, Any]:
    """One row: means over seeds, per layer where it says so."""
    cells = [cell for cell in done["cells"] if cell["rule"] == name and cell["seed"] in seeds]
    accuracies = [cell["accuracy"]["readout"] for cell in cells]
    facts = catalogue.find(name).facts
    epochs = list(zip(*(cell["alignment"] for cell in cells), strict=True))
    return {
        "rule": name,
        "accuracy": {"mean": statistics.mean(accuracies), "std": _spread(accuracies), "seeds": accuracies},
        **{key: _means([cell[key] for cell in cells]) for key in SHARES},
        "alignment": _means([cell["alignment"][-1] for cell in cells]),
        "alignment_over_training": [_means(list(epoch)) for epoch in epochs],
        "validation_accuracy": [
            statistics.mean(epoch) for epoch in zip(*(cell["validation_accuracy"] for cell in cells), strict=True)
        ],
        "learning_rate": rates[name],
        "seconds_per_epoch": statistics.mean(cell["seconds_per_epoch"] for cell in cells),
        "peak_memory_mib": done["memory"][name],
        "samples": cells[0]["samples"],
        "needs": {
            "backward": facts.backward,
            "symmetric_weights": facts.symmetric_weights,
            "stored_history": facts.stored_history,
            "global_error": facts.global_error,
            "extra_weights": facts.extra_weights,
            "autograd": facts.autograd,
        },
        "paper": facts.paper,
    }


def _means(per_cell: Sequence[Sequence[float | None]]) -> list[float | None]:
    """Per layer the mean over cells, of those where there is a figure."""
    layers = [[value for value in layer if value is not None] for layer in zip(*per_cell, strict=True)]
    return [statistics.mean(layer) if layer else None for layer in layers]


def _spread(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _end_with(parent: int) -> None:
    """End this process when the one that started it is gone, by whatever signal."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    try:
        print(json.dumps(run_cell(json.loads(sys.stdin.read()))))
    except SpikepropError as error:
        sys.exit(" ".join(str(error).split()))
