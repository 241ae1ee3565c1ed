"""Do several runs of one network spike alike? As trained, in integers, in Lava, and read back from NIR by other libraries.

    chip = loihi.quantize(network)
    found = report(network, chip, encoded, labels)           # encoded [T, B, ...], from an encoder

Counting is :func:`compare`; :func:`report` runs the engines and says everything about every pair that should agree.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from spikeprop.backends import lava, loihi, nir
from spikeprop.backends.nir import peers
from spikeprop.errors import BackendError, InputError, UnsupportedError
from spikeprop.network import Network

ENGINES = ("float", "integer", "lava", "nir", "snntorch", "norse")
PAIRS = (("float", "integer"), ("integer", "lava"), ("float", "nir"), ("float", "snntorch"), ("float", "norse"))
NIR_DT = 1e-4  # seconds; the only step that snnTorch's importer knows


class Recording(NamedTuple):
    """What one engine did, per layer ``[T, B, n]``: spikes, and membranes after the reset in units of the network's U."""

    spikes: list[NDArray[np.int8]]
    membranes: list[NDArray[Any]]


def compare(reference: Sequence[ArrayLike], other: Sequence[ArrayLike]) -> list[dict[str, int]]:
    """Per layer ``{"spikes": in the reference, "differing": places where one spikes and the other does not}``.

    Both hold one array per layer, ``[T, B, n]`` each. Raises InputError if layers or shapes do not match.
    """
    return [
        {"spikes": int(np.count_nonzero(left)), "differing": int(np.count_nonzero(unlike))}
        for left, unlike in zip(reference, _differing(reference, other), strict=True)
    ]


def _differing(reference: Sequence[ArrayLike], other: Sequence[ArrayLike]) -> list[NDArray[np.bool_]]:
    if len(reference) != len(other):
        raise InputError(f"cannot compare {len(reference)} layers with {len(other)}")
    result = []
    for number, (left, right) in enumerate(zip(reference, other, strict=True), 1):
        left, right = np.asarray(left) != 0, np.asarray(right) != 0
        if left.shape != right.shape:
            raise InputError(f"layer {number}: cannot compare spikes of shape {left.shape} with {right.shape}")
        result.append(left ^ right)
    return result


@torch.inference_mode()
def record(
    engine: str,
    network: Network,
    chip: loihi.LoihiNetwork,
    encoded: Tensor,
    timeout: float = 600.0,
    *,
    membranes: bool = True,
) -> Recording:
    """Run one of :data:`ENGINES` on ``encoded [T, B, *input_shape]``.

    "integer" and "lava" receive the same integer messages; "nir" is the network written to NIR and read back here, "snntorch"
    and "norse" are that graph in their own importers. Without ``membranes`` that list may be empty.

    Raises BackendError or UnsupportedError where an engine is missing or cannot take the network.
    """
    if engine in ("float", "nir"):
        runner = network if engine == "float" else nir.from_graph(nir.to_graph(network, NIR_DT), dtype=encoded.dtype)
        activities = runner.run(encoded)
        spikes = [activity.spikes.flatten(2).numpy().astype(np.int8) for activity in activities]
        before = [activity.membrane.flatten(2).numpy() for activity in activities] if membranes else []
        return Recording(spikes, [levels * (1 - marks) for levels, marks in zip(before, spikes, strict=False)])
    if engine in ("snntorch", "norse"):
        graph = nir.to_graph(network, NIR_DT)
        if engine == "snntorch":
            peer = peers.run_in_snntorch(graph, encoded)
        else:
            peer = peers.run_in_norse(peers.unit_resistance(graph), encoded)
        return Recording(peer.spikes, list(peer.membranes))
    messages = loihi.encode(chip, encoded)
    if engine == "integer":
        result = loihi.simulate(chip, messages, record="all" if membranes else "spikes")
        return Recording(result.spikes, _in_units_of_u(chip, result.membranes_after_reset if membranes else []))
    if engine == "lava":
        run = lava.run(chip, messages, timeout=timeout, membranes=membranes)
        return Recording(run.spikes, _in_units_of_u(chip, run.membranes))
    raise InputError(f"engine {engine!r} is none of {', '.join(ENGINES)}")


def _in_units_of_u(chip: loihi.LoihiNetwork, registers: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
    return [values / (2**6 * layer.scale) for values, layer in zip(registers, chip.layers, strict=False)]


def report(
    network: Network,
    chip: loihi.LoihiNetwork,
    encoded: Tensor,
    labels: Tensor,
    *,
    engines: Sequence[str] = ENGINES,
    timeout: float = 600.0,
) -> dict[str, Any]:
    """Run the engines and compare every pair of :data:`PAIRS` that ran; JSON types only.

    ``engines``: per engine ``accuracy`` (by the network's readout from the last layer's spikes) and ``seconds``.
    ``not_run``: per engine that is missing or refused the network, why.
    ``comparisons``: ``reference``, ``other``, ``differing_spikes``, ``prediction_agreement`` (share of samples) and per layer
        ``spikes`` (the reference's), ``differing``, ``first_differing_step`` (from 1; None if none), the
        ``largest_membrane_difference`` after the reset, in units of U, and both per step.
    ``input_rounding``: accuracy of the float network fed with what the integer messages stand for, and what that lost.
    ``sample``: the first sample's spikes, per layer ``[step, neuron]`` from 0, in ``both`` or in one of float and integer.
    ``hardware``: :func:`spikeprop.backends.loihi.account` of these samples.

    Raises InputError for an unknown engine or labels that do not fit, and whatever the float or integer run raises.
    """
    unknown = [engine for engine in engines if engine not in ENGINES]
    if unknown:
        raise InputError(f"engine {unknown[0]!r} is none of {', '.join(ENGINES)}")
    if len(labels) != encoded.shape[1]:
        raise InputError(f"{len(labels)} labels for {encoded.shape[1]} samples")
    wanted = [engine for engine in ENGINES if engine in {"float", "integer", *engines}]
    recordings: dict[str, Recording] = {}
    not_run: dict[str, str] = {}
    seconds: dict[str, float] = {}
    for engine in wanted:
        started = time.perf_counter()
        try:
            recordings[engine] = record(engine, network, chip, encoded, timeout)
        except (BackendError, UnsupportedError) as error:
            if engine in ("float", "integer"):
                raise
            not_run[engine] = str(error)
        seconds[engine] = time.perf_counter() - started
    predictions = {engine: predict(network, found.spikes[-1]) for engine, found in recordings.items()}
    accuracy = {engine: _share(found == labels) for engine, found in predictions.items()}
    messages = loihi.encode(chip, encoded)
    rounded = record("float", network, chip, torch.from_numpy(loihi.decode(chip, messages)).to(encoded), membranes=False)
    accuracy_rounded = _share(predict(network, rounded.spikes[-1]) == labels)
    return {
        "samples": encoded.shape[1],
        "num_steps": encoded.shape[0],
        "engines": {name: {"accuracy": accuracy[name], "seconds": seconds[name]} for name in recordings},
        "not_run": not_run,
        "comparisons": [_pair(*pair, recordings, predictions) for pair in PAIRS if set(pair) <= set(recordings)],
        "sample": {"layers": _sample(recordings["float"], recordings["integer"])},
        "input_rounding": {"accuracy": accuracy_rounded, "lost": accuracy["float"] - accuracy_rounded},
        "hardware": loihi.account(chip, messages),
    }


def _pair(reference: str, other: str, recordings: dict[str, Recording], predictions: dict[str, Tensor]) -> dict[str, Any]:
    one, two = recordings[reference], recordings[other]
    counted = compare(one.spikes, two.spikes)
    layers = []
    for index, unlike in enumerate(_differing(one.spikes, two.spikes)):
        per_step = unlike.sum((1, 2))
        apart = np.abs(one.membranes[index] - two.membranes[index]).max((1, 2))
        layers.append(
            {
                **counted[index],
                "first_differing_step": int(np.argmax(per_step > 0)) + 1 if per_step.any() else None,
                "largest_membrane_difference": float(apart.max()),
                "differing_per_step": per_step.tolist(),
                "membrane_difference_per_step": apart.tolist(),
            }
        )
    return {
        "reference": reference,
        "other": other,
        "differing_spikes": sum(layer["differing"] for layer in layers),
        "prediction_agreement": _share(predictions[reference] == predictions[other]),
        "layers": layers,
    }


def _sample(real: Recording, integer: Recording) -> list[dict[str, Any]]:
    layers = []
    for one, two in zip(real.spikes, integer.spikes, strict=True):
        left, right = one[:, 0] != 0, two[:, 0] != 0
        places = {"both": left & right, "only_float": left & ~right, "only_integer": right & ~left}
        layers.append({"neurons": left.shape[1], **{name: np.argwhere(where).tolist() for name, where in places.items()}})
    return layers


@torch.inference_mode()
def predict(network: Network, spikes: NDArray[np.int8]) -> Tensor:
    """The readout's class from the last layer's spikes ``[T, B, n]``: what the host computes beside the chip."""
    return network.readout(torch.from_numpy(spikes).to(network.readout.weight).mean(0)).argmax(1)


def _share(same: Tensor) -> float:
    return float(same.double().mean())
