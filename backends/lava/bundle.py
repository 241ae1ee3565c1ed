"""A folder that runs a network in Lava where only ``lava-nc`` and numpy are installed: no torch, no spikeprop."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from spikeprop.backends.lava import check_convolutions
from spikeprop.backends.loihi import LoihiNetwork, check_messages, save, simulate
from spikeprop.backends.loihi.network import write_arrays
from spikeprop.errors import CheckpointError, InputError

HERE = Path(__file__).resolve().parent
SCRIPTS = {"bundle_run.py": "run.py", "guard.py": "guard.py", "worker.py": "worker.py"}
README = """A spiking network in Loihi's integers, ready for Intel's Lava (lava-nc 0.10.0, Python 3.10).

    pip install lava-nc==0.10.0
    python run.py --check                          # the stored sample: 0 spikes differ
    python run.py --input x.npz --output y.npz

On Python 3.11 to 3.13:

    pip install --no-deps --ignore-requires-python lava-nc==0.10.0
    pip install asteval networkx scipy scikit-learn "numpy<2.4"

x.npz holds messages [T, B, {features}]: integers from 0 to {limit}, T steps of B samples; features are the input of
shape {shape} in C order. {coding}

y.npz gets, for every layer, spikes1, spikes2 ... and membranes1, membranes2 ... (after the reset), [T, B, neurons]; counts, the
last layer's spikes per neuron [B, neurons]; outputs [B, {outputs}], the host's readout counts / T @ weight.T + bias; and
predictions [B], the largest of them.

network.npz holds the registers (its metadata is JSON), readout.npz the readout, sample.npz an input with its expected spikes.
"""


def write_bundle(
    network: LoihiNetwork, folder: str | os.PathLike[str], messages: Any, weight: ArrayLike, bias: ArrayLike
) -> None:
    """Write the folder; it appears whole or not at all.

    messages: a sample input ``[T, B, features]``, stored with the spikes that the integer simulator expects. Its T is the
        longest sample that ``run.py`` takes without being told.
    weight, bias: the readout, ``[outputs, neurons]`` and ``[outputs]``.

    Raises InputError if the folder holds something already or the messages do not fit, CheckpointError if it cannot be written.
    """
    folder, messages = Path(folder).resolve(), check_messages(network, messages)
    check_convolutions(network)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not an empty folder; choose another, or remove it")
    expected = simulate(network, messages).spikes
    weight, bias = np.asarray(weight, np.float64), np.asarray(bias, np.float64)
    facts = {
        "num_steps": len(messages),
        "features": math.prod(network.input_shape),
        "message_limit": network.message_limit,
        "report": network.report,
    }
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    except OSError as error:
        raise CheckpointError(f"{folder} could not be written ({error.strerror or error}); choose another folder") from error
    try:
        for source, target in SCRIPTS.items():
            shutil.copyfile(HERE / source, temporary / target)
        save(network, temporary / "network.npz")
        write_arrays(temporary / "readout.npz", {"weight": weight, "bias": bias})
        spikes = {f"spikes{number}": layer for number, layer in enumerate(expected, 1)}
        write_arrays(temporary / "sample.npz", {"messages": messages, **spikes})
        (temporary / "bundle.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        (temporary / "README.txt").write_text(_readme(network, len(weight)), encoding="utf-8")
        os.chmod(temporary, 0o755)
        if folder.exists():
            folder.rmdir()
        os.replace(temporary, folder)
    except OSError as error:
        raise CheckpointError(f"{folder} could not be written ({error.strerror or error}); free some space") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _readme(network: LoihiNetwork, outputs: int) -> str:
    coding = "1 is a spike."
    if network.inputs == "graded":
        low, high, limit = network.input_low, network.input_high, network.message_limit
        coding = f"An input x between {low:g} and {high:g} becomes round((x - {low:g}) / {high - low:g} * {limit})."
    shape = " x ".join(map(str, network.input_shape))
    return README.format(
        features=math.prod(network.input_shape), limit=network.message_limit, shape=shape, coding=coding, outputs=outputs
    )
