"""A NIR graph run by snnTorch and by Norse, through their own importers, to compare with what a network does here.

NIR's equations leave less room than its importers take. What they do differently (snnTorch 1.0.0, Norse 1.1.0) and would not
say is refused here with a BackendError:

    snnTorch    has dt = 1e-4 s built in; reads IF as a leaky neuron of beta = 0.9; takes one gain per layer
    Norse       ignores the resistance r of LIF (:func:`unit_resistance` rewrites the graph) and r dt of IF; drops AvgPool2d
                nodes from the graph; adds a CubaLIF's v_leak to its synaptic current too
    both        ignore v_reset and the padding of SumPool2d

Both flatten the batch with the features where a Flatten node starts at dimension 0, as NIR's count (it has no batch). So every
sample runs by itself, from rest. Both compute in float32, Norse in another order of operations.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.util
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from spikeprop.backends.nir import NEURON_FIELDS, chain, load_graph, time_step
from spikeprop.errors import BackendError, InputError

__all__ = ["PeerRun", "available", "run_in_norse", "run_in_snntorch", "unit_resistance"]

SNNTORCH_DT = 1e-4  # seconds; a constant in its importer
INSTALL = {
    "snntorch": "pip install snntorch==1.0.0 nir nirtorch",
    # Its torchvision requirement does not go with a CPU build of torch, and is not needed here.
    "norse": "pip install nir nirtorch && pip install --no-deps --no-build-isolation norse==1.1.0",
}


@dataclass(frozen=True, eq=False)
class PeerRun:
    """What a peer's neurons did, one entry per node of neurons, first to last.

    nodes: the nodes' names in the graph.
    spikes: 0 or 1, ``[T, B, n]``.
    membranes: after the reset, ``[T, B, n]``. snnTorch divides thresholds by a LIF's input gain where that is not 1, and its
        membranes are in that unit.
    """

    nodes: list[str]
    spikes: list[NDArray[np.int8]]
    membranes: list[NDArray[np.float32]]


def available(name: str) -> bool:
    """Whether ``"snntorch"`` or ``"norse"`` is installed, with what its importer needs; nothing is imported."""
    return all(importlib.util.find_spec(module) is not None for module in (name, "nir", "nirtorch"))


def run_in_snntorch(graph: Any | str | os.PathLike[str], inputs: Tensor | NDArray[Any], dt: float | None = None) -> PeerRun:
    """Run a graph in snnTorch.

    graph: a ``nir.NIRGraph`` or the path of one.
    inputs: ``[T, B, *input_shape]``.
    dt: length of a step in seconds, where the graph does not say it. It must be snnTorch's 1e-4.

    Raises BackendError where snnTorch is missing, or cannot or would not compute what the graph says; as
    :func:`spikeprop.backends.nir.load_graph` for the file, InputError for inputs of another shape.
    """
    graph = _prepare("snntorch", graph)
    _check_snntorch(graph, time_step(graph, dt))

    def load() -> Any:
        return importlib.import_module("snntorch.import_nir").import_from_nir(graph)

    def start(model: Any) -> None:
        for module in model.modules():
            if hasattr(module, "reset_mem"):
                module.reset_mem()

    def step(model: Any, x: Tensor, state: None) -> None:
        model(x)

    def observe(module: Any, output: Any) -> tuple[Tensor, Tensor]:
        return output, module.mem

    return _run("snntorch", graph, inputs, load, start, step, observe)


def run_in_norse(graph: Any | str | os.PathLike[str], inputs: Tensor | NDArray[Any], dt: float | None = None) -> PeerRun:
    """Run a graph in Norse. Arguments and errors are those of :func:`run_in_snntorch`, but dt is free.

    Norse would start a LIF at v_leak; here it starts at 0, like every neuron of a network (NIR leaves this open).
    """
    graph = _prepare("norse", graph)
    step_length = time_step(graph, dt)
    _check_norse(graph, step_length)

    def load() -> Any:
        return importlib.import_module("norse.torch.utils.import_nir").from_nir(graph, dt=step_length, ignore_warnings=True)

    def start(model: Any) -> Any:
        rest = importlib.import_module("norse.torch.functional.lif_box").LIFBoxFeedForwardState
        state = importlib.import_module("nirtorch.graph_executor").GraphExecutorState()
        for name, node in graph.nodes.items():
            if type(node).__name__ == "LIF":
                state.state[name.replace(".", "_")] = (rest(v=torch.zeros(node.v_threshold.shape)),)
        return state

    def step(model: Any, x: Tensor, state: Any) -> Any:
        return model(x, state)[1]

    def observe(module: Any, output: Any) -> tuple[Tensor, Tensor]:
        spikes, state = output
        return spikes, (state if hasattr(state, "v") else state[-1]).v  # a CubaLIF has the synapse's state too

    return _run("norse", graph, inputs, load, start, step, observe)


def unit_resistance(graph: Any) -> Any:
    """An equal graph whose LIF nodes have r = 1, with the resistance in the weights and biases before them: what Norse reads.

    r (W x + b) = (r W) x + r b, so only rounding differs. Raises BackendError where no weights stand directly before the node,
    or where r differs within a channel.
    """
    graph = copy.deepcopy(graph)
    nodes = chain(graph)
    for (_, before), (name, node) in pairwise(nodes):
        if type(node).__name__ != "LIF" or np.allclose(node.r, 1.0):
            continue
        shared = type(before).__name__ == "Conv2d"
        rows = node.r.reshape(len(node.r), -1)
        if not hasattr(before, "weight") or (rows != rows[:, :1]).any():
            raise BackendError(
                f"node '{name}': r = {node.r.flat[0]:g} has no weights directly before it that could hold it"
                f"{', one value per channel' if shared else ''}; put the weights directly before the neurons"
            )
        before.weight = before.weight * rows[:, 0].reshape(-1, *[1] * (before.weight.ndim - 1))
        if hasattr(before, "bias"):
            before.bias = before.bias * rows[:, 0]
        node.r = np.ones_like(node.r)
    return graph


def _prepare(name: str, graph: Any) -> Any:
    if not available(name):
        raise BackendError(f"{name}, nir and nirtorch are needed and not all installed; run: {INSTALL[name]}")
    # snnTorch's importer rearranges the graph that it is given.
    return load_graph(graph) if isinstance(graph, str | os.PathLike) else copy.deepcopy(graph)


def _check_snntorch(graph: Any, dt: float) -> None:
    if not np.isclose(dt, SNNTORCH_DT, atol=0.0):
        _refuse("snntorch", f"takes every graph to have dt = {SNNTORCH_DT:g} s, this one has {dt:g} s", "write it with dt=1e-4")
    for name, node in chain(graph):
        kind = type(node).__name__
        if kind == "IF":
            _refuse("snntorch", f"reads IF (node '{name}') as leaky, with beta = 0.9", "use beta < 1")
        _check_ignored("snntorch", name, node)
        if kind not in NEURON_FIELDS:
            continue
        gain = node.r * dt / node.tau if kind == "LIF" else node.w_in * dt / node.tau_syn
        if not np.allclose(gain, 1.0) and np.unique(gain).size > 1:
            _refuse(
                "snntorch",
                f"takes the first neuron's input gain for the whole layer, node '{name}' has {gain.min():g} to {gain.max():g}",
                "fold the gains into the weights",
            )


def _check_norse(graph: Any, dt: float) -> None:
    for name, node in chain(graph):
        kind = type(node).__name__
        if kind == "AvgPool2d":
            _refuse("norse", f"leaves AvgPool2d (node '{name}') out of the graph, without a word", "use strides instead")
        _check_ignored("norse", name, node)
        if kind == "LIF" and not np.allclose(node.r, 1.0):
            _refuse("norse", f"ignores r, which is {node.r.flat[0]:g} at node '{name}'", "pass unit_resistance(graph)")
        if kind == "IF" and not np.allclose(node.r * dt, 1.0):
            _refuse("norse", f"takes r dt to be 1, it is {node.r.flat[0] * dt:g} at node '{name}'", "set r = 1 / dt")
        if kind == "CubaLIF" and node.v_leak.any():
            _refuse("norse", f"adds v_leak to the synaptic current too (node '{name}')", "train without bias and centring")


def _check_ignored(library: str, name: str, node: Any) -> None:
    """Fields that both importers leave unread."""
    kind = type(node).__name__
    field = "v_reset" if kind in NEURON_FIELDS else "padding" if kind == "SumPool2d" else None
    if field is not None and np.any(getattr(node, field)):
        _refuse(library, f"ignores {field}, which is not 0 at node '{name}'", "set it to 0")


def _refuse(library: str, what: str, remedy: str) -> None:
    raise BackendError(f"{library} {version(library)} {what}; {remedy}")


def _run(
    library: str,
    graph: Any,
    inputs: Tensor | NDArray[Any],
    load: Callable[[], Any],
    start: Callable[[Any], Any],
    step: Callable[[Any, Tensor, Any], Any],
    observe: Callable[[Any, Any], tuple[Tensor, Tensor]],
) -> PeerRun:
    """Sample by sample, step by step, with a hook at every neuron node that keeps what ``observe`` sees there."""
    nodes = chain(graph)
    shape = tuple(int(extent) for extent in nodes[0][1].input_type["input"])
    steps = torch.as_tensor(inputs, dtype=torch.float32)
    if steps.shape[2:] != shape or 0 in steps.shape[:2] or steps.dim() != 2 + len(shape):
        expected = ", ".join(map(str, shape))
        raise InputError(f"the input has shape {tuple(steps.shape)}, the graph expects [T, B, {expected}] with T, B >= 1")
    names = [name for name, node in nodes if type(node).__name__ in NEURON_FIELDS]
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in names}
    with _quietly(library), torch.no_grad():
        model = load()
        modules = dict(model.named_modules())
        for name in names:

            def keep(module: nn.Module, _: Any, output: Any, name: str = name) -> None:
                spikes, membrane = observe(module, output)
                seen[name].append((spikes.flatten().clone(), membrane.flatten().clone()))

            modules[name.replace(".", "_")].register_forward_hook(keep)
        for sample in steps.transpose(0, 1):
            state = start(model)
            for x in sample:
                state = step(model, x, state)
        times, batch = steps.shape[:2]
        spikes, membranes = (
            [torch.stack([pair[part] for pair in seen[name]]).unflatten(0, (batch, times)).transpose(0, 1) for name in names]
            for part in (0, 1)
        )
    return PeerRun(names, [layer.to(torch.int8).numpy() for layer in spikes], [layer.float().numpy() for layer in membranes])


@contextlib.contextmanager
def _quietly(library: str) -> Iterator[None]:
    """Without the importers' prints and warnings; what they stumble over becomes a BackendError."""
    level = logging.root.level
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            logging.root.setLevel(logging.ERROR)
            yield
    except Exception as error:  # whatever a foreign importer may raise
        reason = " ".join(str(error).split()) or "without a message"
        raise BackendError(f"{library} {version(library)} cannot take the graph: {type(error).__name__}, {reason}") from error
    finally:
        logging.root.setLevel(level)
