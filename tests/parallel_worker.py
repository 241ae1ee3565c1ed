"""One of several processes of tests/test_parallel.py: runs the cases it is given, in order, and leaves what came of each."""

import json
import os
import sys
from functools import partial
from pathlib import Path

import torch

import spikeprop as sp
from spikeprop import parallel, training
from spikeprop.data import Data, Split
from spikeprop.models import conv, mlp
from spikeprop.storage import write_tensors

STEPS = 5


def data_of(samples: int = 24) -> Data:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(samples, 1, 8, 8, generator=generator), torch.randint(0, 3, (samples,), generator=generator)
    return Data("random", Split(x, y), Split(x[:8], y[:8]), None, (1, 8, 8), 3)


def network_of(kind: str) -> sp.Network:
    if kind == "conv":
        return conv((1, 8, 8), [4, 5], 3, kernel_size=3, stride=1, hidden=(12,), neuron=sp.LIF(0.9), seed=3)
    return mlp((1, 8, 8), [20, 16, 12], 3, neuron=sp.LIF(0.9, 0.5, alpha=0.3), seed=3)


def rule_of(name: str) -> sp.SigProp | sp.BPTT:
    """What "windows" does every two steps leaves the fifth over. SGD shows a wrong gradient where Adam would hide its size."""
    if name == "bptt":
        return sp.BPTT(homeostasis=sp.Homeostasis(), optimizer=partial(torch.optim.SGD, lr=0.1))
    descent = partial(torch.optim.SGD, lr=0.01, momentum=0.5)
    if name == "windows":
        return sp.SigProp(sp.ATan(), update_every=2, trace="exact", optimizer=descent)
    if name == "readings":
        return sp.SigProp(sp.ATan(), update_every=2, read_every=2, optimizer=descent)
    if name == "thresholds":
        return sp.SigProp(sp.ATan(), homeostasis=sp.Homeostasis(strength=0.3, act_on="threshold"))
    return sp.SigProp(sp.Membrane()) if name == "adam" else sp.SigProp(sp.ATan(), optimizer=descent)


def train(case: dict, kind: str | None, folder: Path | None = None) -> tuple[sp.Network, sp.History]:
    """One case, on one process (kind None) or on those of the group."""
    network, epochs = network_of(case["model"]), case.get("epochs", 2)
    if case["parallel"] == "data":  # in float32 another order of sums makes the odd spike come or not, and so another network
        network.double()
    settings = {"batch_size": case["batch"], "seed": 5, "progress": False, "parallel": kind, "folder": folder}
    settings["chunk"] = case.get("chunk")
    torch.set_float32_matmul_precision(case.get("precision", "highest"))
    more = {"encoder": sp.Poisson(), "augment": sp.Augmentation(shift=1)} if case.get("random") else {}
    resume = folder is not None and (folder / "checkpoint.safetensors").exists()
    history = sp.fit(network, rule_of(case["rule"]), data_of(), STEPS, epochs, resume=resume, **settings, **more)
    return network, history


def die_after_the_first_epoch() -> None:
    original = training._save

    def save_then_die(*arguments: object) -> None:
        original(*arguments)
        os._exit(9)

    training._save = save_then_die


if __name__ == "__main__":
    torch.set_num_threads(1)
    out, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    with parallel.start(timeout=60.0):
        for case in cases:
            if case.get("dies"):
                die_after_the_first_epoch()
            folder = out / case["folder"] if "folder" in case else None
            network, history = train(case, case["parallel"], folder)
            path = out / f"{case['name']}-{os.environ['RANK']}.safetensors"
            write_tensors(path, dict(network.state_dict()), {"history": history.to_dict()})
