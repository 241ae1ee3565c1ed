"""Run folders: what a training run remembers, so that every later command needs only its path.

========================  ================================================================================================
config.json               data, encoder, T, model, rule and its settings, seed, versions; written before training starts
checkpoint.safetensors    network and optimiser after the last whole epoch; training continues from it
history.json              the figures of every epoch
network.safetensors       the trained network
result.json               what the trained network does on the test split; written last, so that a run that has it is finished
========================  ================================================================================================
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import spikeprop
from spikeprop import data as datasets
from spikeprop.backends import loihi, parity
from spikeprop.backends.loihi.network import Inputs
from spikeprop.backends.loihi.quantize import Target
from spikeprop.data import Data, Split
from spikeprop.encoding import Current, Encoder, from_config
from spikeprop.errors import CheckpointError, InputError
from spikeprop.evaluation import Health, dead_neurons, encode_in_batches
from spikeprop.models import conv, mlp
from spikeprop.network import Network
from spikeprop.neuron import LIF
from spikeprop.storage import load_network, write_text
from spikeprop.training import CHECKPOINT, History, centre_inputs

CONFIG, NETWORK, HISTORY, RESULT = "config.json", "network.safetensors", "history.json", "result.json"
ENGINES = ("float", "integer", "lava")  # those of parity.ENGINES that need no other library's reading of the network
BATCH = 500  # samples at a time; the same as in evaluate(), so that random encoders draw the same spikes

NEEDED = {"data", "data_root", "full_train", "encoder", "input_coding", "num_steps", "model", "rule", "seed", "epochs"}
NEEDED |= {"beta", "threshold", "learning_rate", "temperature", "batch_size"}
ADDED = {  # what later versions added to a configuration, as earlier ones had it
    "trace": "shared",
    "delay_line": [],
    "noise": 0.0,
    "shift": 0,
    "flip": False,
    "drop": 0.0,
    "delay": 0,
    "update_every": None,
    "read_every": None,
    "chunk": None,
    "recurrent": False,
    "truncate": None,
    "broadcast": None,
    "reset_gradient": None,
    "homeostasis": "on",
    "rate_band": [0.02, 0.2, 0.02],
    "weight_bits": None,
    "start_from": None,
    "health_before_training": None,
}
SpikeTrains = list[NDArray[np.int8]]  # per layer [T, B, n]


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, ``config`` and ``result`` as the files hold them, the trained network."""

    path: Path
    config: dict[str, Any]
    network: Network
    history: History
    result: dict[str, Any]

    @property
    def encoder(self) -> Encoder:
        """The encoder that the network was trained with."""
        return from_config(self.config["encoder"])

    def settings(self) -> dict[str, Any]:
        """How inputs become spikes, for ``evaluate`` and ``dead_neurons``."""
        return {"num_steps": self.config["num_steps"], "encoder": self.encoder, "seed": self.config["seed"]}

    def data(self, root: str | None = None) -> Data:
        """The data set the run was trained on, from ``root`` if its files have moved."""
        return load_data(self.config, root)

    def batches(self, inputs: torch.Tensor) -> Iterator[torch.Tensor]:
        """Inputs ``[B, ...]`` as the run's encoder makes them, some at a time, ``[T, b, *input_shape]``."""
        settings = (self.config["num_steps"], self.encoder, BATCH, self.config["seed"])
        return (x for _, x in encode_in_batches(self.network, inputs, *settings))

    def encoded(self, inputs: torch.Tensor) -> torch.Tensor:
        """All of :meth:`batches` at once, ``[T, B, *input_shape]``."""
        batches = list(self.batches(inputs))
        return batches[0] if len(batches) == 1 else torch.cat(batches, 1)

    def quantize(self, weight_bits: int | None = None, target: Target = "lava") -> loihi.LoihiNetwork:
        """The network in Loihi's integers, with inputs coded as the run's encoder makes them.

        weight_bits: by default those that the run was trained with, else 8.
        """
        weight_bits = weight_bits or self.config["weight_bits"] or 8
        coding = self.config["input_coding"]
        low, high = coding["input_range"]
        return loihi.quantize(self.network, weight_bits, inputs=coding["inputs"], input_range=(low, high), target=target)


def load_data(config: dict[str, Any], root: str | None = None) -> Data:
    """The data set that a configuration names."""
    return datasets.load(
        config["data"],
        root or config["data_root"],
        full_train=config["full_train"],
        num_steps=config["num_steps"],
        delays=config.get("delay_line", ()),
    )


def load_run(path: str | Path) -> Run:
    """Read a finished run. Raises CheckpointError, which says what is missing, for anything else."""
    path = Path(path)
    config = read_config(path)
    if not (path / RESULT).is_file() or not (path / NETWORK).is_file():
        missing = RESULT if (path / NETWORK).is_file() else NETWORK
        raise CheckpointError(
            f"{path} is an unfinished run: {missing} is missing; finish it with: spikeprop train --resume --out {path}"
        )
    history, result = read_json(path / HISTORY), read_json(path / RESULT)
    return Run(path, config, load_network(path / NETWORK), History(history.get("epochs", [])), result)


def read_config(path: Path) -> dict[str, Any]:
    """The configuration of a run, finished or not. Raises CheckpointError if the folder is none."""
    if not path.is_dir():
        raise CheckpointError(f"{path} is no run folder: there is no such folder; make one with: spikeprop train --out {path}")
    if not (path / CONFIG).is_file():
        raise CheckpointError(f"{path} is no run folder: {CONFIG} is missing; make one with: spikeprop train --out FOLDER")
    config = read_json(path / CONFIG)
    if missing := NEEDED - set(config):
        raise CheckpointError(f"{path / CONFIG} was not written by spikeprop train: it has no {', '.join(sorted(missing))}")
    return {**ADDED, **config}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError if it is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is missing or damaged ({error}); take an older copy or train again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is damaged: it holds no JSON object; take an older copy or train again")
    return content


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole or not at all."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def refuse_loss(path: Path) -> None:
    """Raise InputError if a new run in ``path`` would destroy something."""
    if path.exists() and not path.is_dir():
        raise InputError(f"--out {path} is a file; name a folder")
    found = [name for name in (RESULT, NETWORK, HISTORY, CHECKPOINT) if (path / name).exists()]
    if found:
        kind = "a finished run" if RESULT in found else f"an unfinished run ({found[-1]})"
        raise InputError(
            f"{path} holds {kind}; choose another --out, continue it with --resume, or replace it with --overwrite"
        )
    if (path / CONFIG).exists():  # ours, from a run that ended before its first epoch, or somebody else's
        read_config(path)


def clear(path: Path) -> None:
    """Remove a run's files and what was found out about them, and nothing else, from its folder."""
    reports = [f"{name}.{kind}" for name in ("diagnosis", "parity") for kind in ("json", "html")]
    for name in (RESULT, NETWORK, HISTORY, CHECKPOINT, CONFIG, *reports):
        (path / name).unlink(missing_ok=True)


def build_model(text: str, data: Data, *, neuron: LIF, seed: int, recurrent: bool = False) -> Network:
    """A network from ``mlp:256,256`` (neurons per layer) or ``conv:20,40-128`` (channels, then neurons per dense layer)."""
    kind, _, sizes = text.partition(":")
    parts = [part.split(",") for part in sizes.split("-")]
    whole = all(size.isdecimal() and int(size) > 0 for part in parts for size in part)
    if not whole or (kind, len(parts)) not in (("mlp", 1), ("conv", 1), ("conv", 2)):
        raise InputError(
            f"model {text!r} is not understood; write mlp:256,256 (neurons per layer) "
            "or conv:20,40-128 (channels per layer, then neurons per dense layer)"
        )
    widths = [[int(size) for size in part] for part in parts]
    if kind == "mlp":
        kinds = {"regression": data.regression, "recurrent": recurrent}
        return mlp(data.input_shape, widths[0], data.num_classes, neuron=neuron, seed=seed, **kinds)
    if recurrent:
        raise InputError(f"model {text!r} cannot be recurrent; use mlp:256,256 with --recurrent")
    if len(data.input_shape) != 3:
        raise InputError(f"model {text!r} needs pictures (C, H, W), the data set {data.name} has inputs of {data.input_shape}")
    hidden = widths[1] if len(widths) == 2 else []
    return conv(data.input_shape, widths[0], data.num_classes, hidden=hidden, neuron=neuron, seed=seed)


def input_coding(encoder: Encoder, data: Data) -> dict[str, Any]:
    """How a chip receives these inputs: as spikes where they are 0 or 1, else as graded messages over the range they span."""
    low, high, binary = 0.0, 1.0, not isinstance(encoder, Current)
    if isinstance(encoder, Current) or encoder.temporal:
        for split in (data.train, data.validation, data.test):
            if split is not None:
                values = split.inputs * encoder.scale if isinstance(encoder, Current) else split.inputs
                low, high = min(low, float(values.min())), max(high, float(values.max()))
                binary = binary and bool(((values == 0) | (values == 1)).all())
    kind: Inputs = "spikes" if binary else "graded"
    return {"inputs": kind, "input_range": [low, high]}


def health_before_training(network: Network, data: Data, split: Split, **settings: Any) -> Health:
    """Dead neurons of a network as training finds it: fresh weights, input centred on the training mean. Sets that mean."""
    if network.centred:
        centre_inputs(network, data.train.inputs, settings["num_steps"], settings["encoder"], settings["seed"])
    return dead_neurons(network, split, **settings)


@torch.inference_mode()
def spike_trains(run: Run, engine: str, inputs: torch.Tensor, chip: loihi.LoihiNetwork, timeout: float = 600.0) -> SpikeTrains:
    """The spikes of every layer, ``[T, B, n]`` each, computed by one of :data:`ENGINES`.

    "float" is the network as trained; "integer" (our simulator) and "lava" receive the identical integer messages.
    """
    if engine == "lava":  # all in one run: each takes seconds to start
        return parity.record(engine, run.network, chip, run.encoded(inputs), timeout, membranes=False).spikes
    batches = [parity.record(engine, run.network, chip, x, membranes=False).spikes for x in run.batches(inputs)]
    return [np.concatenate(layer, 1) for layer in zip(*batches, strict=True)]


def accuracy_of(network: Network, spikes: SpikeTrains, labels: torch.Tensor) -> float:
    """Share predicted rightly by the readout from the last layer's spike counts: what the host does beside the chip."""
    return float((parity.predict(network, spikes[-1]) == labels).double().mean())


def versions() -> dict[str, str]:
    """What a result depends on besides its settings."""
    return {
        "spikeprop": spikeprop.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "threads": str(torch.get_num_threads()),
    }


def check_memory(needed: float, limit: float | None, what: str) -> None:
    """Raise InputError if an estimate of memory exceeds a limit, by default the machine's own memory [MiB]."""
    limit = machine_memory_mib() if limit is None else limit
    if needed > limit:
        raise InputError(
            f"{what} would need about {needed:,.4g} MiB, more than {limit:,.4g}; use a smaller model or batch, fewer steps or "
            "another rule, or raise --memory-limit"
        )


def machine_memory_mib() -> float:
    """What memory this machine has; infinity where it does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**20
    except (ValueError, OSError, AttributeError):
        return math.inf


def peak_memory_mib() -> float:
    """The most memory this process held (resident set) since it began or since :func:`forget_peak`, libraries included."""
    return _resident("VmHWM")  # the kernel's own mark for this program; getrusage would count the process that started it, too


def memory_mib() -> float:
    """The memory this process holds now (resident set); where there is no /proc, the most it ever held."""
    return _resident("VmRSS")


def forget_peak() -> bool:
    """Begin the peak anew, so that one during the imports hides nothing; False where the system does not allow it."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _resident(field: str) -> float:
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) for line in status if line.startswith(field)) / 1024
    except (OSError, StopIteration):
        import resource  # not on every system

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (1024 * 1024 if sys.platform == "darwin" else 1024)
