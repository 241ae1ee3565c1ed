"""Runs a quantised network in Intel's Lava (``lava-nc`` 0.10.0, its fixed-point models), many samples in one run.

Lava itself runs in a process group of its own, from the script ``worker.py``, under the eye of ``guard.py``. Nothing here
imports Lava. ``bundle.py`` writes a network to a folder that runs in Lava where there is no spikeprop.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spikeprop.backends.lava import guard
from spikeprop.backends.loihi import LoihiNetwork, check_messages, save
from spikeprop.backends.loihi.network import Integers
from spikeprop.errors import BackendError, UnsupportedError

__all__ = ["LavaRun", "available", "install_command", "run"]

BYTE_LIMIT = 127  # a signed byte, where Lava keeps kernel size, stride, padding and groups
WORKER = Path(__file__).with_name("worker.py")


@dataclass(frozen=True, eq=False)
class LavaRun:
    """What Lava recorded, one array per layer, with the delay of one step per layer taken out.

    spikes: 0 or 1, ``[T, B, n]``.
    membranes: Lava's v at the end of each step, so after the reset, ``[T, B, n]``; empty if not asked for.
    seconds: of Lava's run itself, without starting and building it.
    """

    spikes: list[NDArray[np.int8]]
    membranes: list[Integers]
    seconds: float


def available() -> bool:
    """Whether Lava is installed; it is not imported, which would change this process's multiprocessing settings."""
    return importlib.util.find_spec("lava") is not None


def install_command() -> str:
    """How to install Lava 0.10.0, the last version, under the running Python."""
    if sys.version_info[:2] == (3, 10):
        return "pip install lava-nc==0.10.0"
    # Its metadata asks for Python 3.10 and numpy < 2, but it runs on 3.11 to 3.13; with numpy 2.4 its processes die.
    return (
        "pip install --no-deps --ignore-requires-python lava-nc==0.10.0 && "
        'pip install asteval networkx scipy scikit-learn "numpy<2.4"'
    )


def run(
    network: LoihiNetwork, messages: Any, *, timeout: float = 600.0, membranes: bool = False, _worker: Path = WORKER
) -> LavaRun:
    """Run the integers ``messages [T, B, features]``, each sample from rest, and wait for the result.

    timeout: seconds after which the run is ended. Lava takes about 1 ms per step (T * B steps) and a few seconds to start.
    membranes: also record v of every layer, which takes about twice as long.

    Raises BackendError if Lava is not installed, fails, or does not answer in time; InputError if the messages do not fit;
    UnsupportedError for a convolution that Lava cannot hold.
    """
    messages = check_messages(network, messages)
    check_convolutions(network)
    if not available():
        raise BackendError(f"Lava is not installed for this Python ({sys.executable}). Install it with:\n  {install_command()}")
    with tempfile.TemporaryDirectory(prefix="spikeprop-lava-") as name:
        folder = Path(name)
        save(network, folder / "network.npz")
        np.savez(folder / "messages.npz", messages=messages, membranes=np.array(membranes))
        try:
            guard.run_worker(_worker, folder, folder / "network.npz", timeout)
        except guard.WorkerError as error:
            raise BackendError(str(error)) from None
        try:
            with np.load(folder / "out.npz", allow_pickle=False) as out:
                numbers = range(1, len(network.layers) + 1)
                recorded = [out[f"membranes{number}"] for number in numbers] if membranes else []
                return LavaRun([out[f"spikes{number}"] for number in numbers], recorded, float(out["seconds"]))
        except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise BackendError(f"Lava ended without a result: {error}{guard.last_lines(folder)}") from error


def check_convolutions(network: LoihiNetwork) -> None:
    """Raises UnsupportedError for geometry beyond Lava's signed bytes, in which it computes without a check."""
    for number, layer in enumerate(network.layers, 1):
        if layer.convolution is None:
            continue
        _, *size = layer.convolution.input_shape
        padded = [extent + 2 * pad for extent, pad in zip(size, layer.convolution.padding, strict=True)]
        numbers = {"padded picture": padded, "kernel": layer.weight.shape[2:], "stride": layer.convolution.stride}
        for name, values in {**numbers, "number of groups": [layer.convolution.groups]}.items():
            if max(values) > BYTE_LIMIT:
                raise UnsupportedError(
                    f"layer {number}: its {name} of {max(values)} exceeds {BYTE_LIMIT}, the most that Lava's convolution "
                    "counts to; use smaller pictures or a larger stride before it"
                )
