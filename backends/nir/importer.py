"""NIR graphs and files as networks."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from spikeprop.backends.nir.common import (
    DECAY_ROUNDING,
    DT_ROUNDING,
    LINEAR_NODES,
    NEURON_FIELDS,
    ROUNDING,
    Reals,
    check_dt,
    finite,
    library,
    ungroup,
)
from spikeprop.errors import CheckpointError, InputError, SpikepropError, UnsupportedError
from spikeprop.network import Network
from spikeprop.neuron import LIF
from spikeprop.synapse import AvgPool2d, Chain, Conv2d, Dense, Flatten, Shape, Synapse


class _Linear(NamedTuple):
    """One linear node: ``scale`` times the part with this weight, plus a bias per neuron or channel."""

    part: Synapse
    scale: float = 1.0
    weight: Reals | None = None
    bias: Reals | None = None


class _Spiking(NamedTuple):
    """One neuron node in steps of dt. ``gain`` multiplies the drive, ``bias`` is added to the membrane; all per neuron."""

    alpha: Reals
    beta: Reals
    threshold: Reals
    gain: Reals
    bias: Reals


class _Layer(NamedTuple):
    synapse: Synapse
    neuron: LIF
    weight: Reals | None
    bias: Reals


def from_graph(
    graph: Any,
    dt: float | None = None,
    *,
    outputs: int | None = None,
    regression: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Network:
    """A network that computes what the graph computes in Euler steps of dt. Inverse of :func:`to_graph`, spike for spike.

    The gains r dt / tau and w_in dt / tau_syn, and the window size of sum pooling, are folded into the weights. Centring is in
    the biases already. A linear map at the end, without neuron, becomes ``network.readout``.

    graph: a ``nir.NIRGraph``: one chain of Input, layers (Affine, Linear, Conv2d, AvgPool2d, SumPool2d, Flatten, then IF, LIF
        or CubaLIF), perhaps a linear map, Output.
    dt: length of a time step in seconds; by default what the graph's metadata say.
    outputs: for a graph without linear map at its end. By default every neuron of its last layer is an output, the mean of its
        spikes; another number gives a readout of zeros, to be trained.
    regression: whether the outputs are real values rather than classes; NIR does not say.
    dtype: of the network. The float64 numbers of a file that :func:`write` made from a float32 network are float32 numbers.

    Raises UnsupportedError for nodes, values and connections that a network has not, InputError for NaN, shapes that do not
    fit, or a dt that is missing, not positive, or not the graph's.
    """
    if type(graph).__name__ != "NIRGraph":
        raise InputError(f"a nir.NIRGraph is needed, this is a {type(graph).__name__}; read(path) takes files")
    dt = time_step(graph, dt)
    nodes = chain(graph)
    shape = input_shape = tuple(int(extent) for extent in np.ravel(nodes[0][1].input_type["input"]))
    layers: list[_Layer] = []
    waiting: list[tuple[str, Any]] = []
    for name, node in nodes[1:-1]:
        kind = type(node).__name__
        if kind in LINEAR_NODES:
            waiting.append((name, node))
        elif kind in NEURON_FIELDS:
            layer, shape = _import_layer(waiting, name, node, shape, dt)
            layers.append(layer)
            waiting = []
        else:
            known = ", ".join((*LINEAR_NODES, *NEURON_FIELDS))
            raise UnsupportedError(f"node '{name}' is of type {kind}, a network has none; replace it by {known}")
    if not layers:
        raise UnsupportedError(f"the graph has no spiking neurons; a network needs one of {', '.join(NEURON_FIELDS)}")
    weight, bias = _import_readout(waiting, shape, outputs, nodes[-1])
    network = Network(
        input_shape, [(layer.synapse, layer.neuron) for layer in layers], len(weight), centred=False, regression=regression
    ).double()
    for ours, layer in zip(network.layers, layers, strict=True):
        if layer.weight is not None and ours.synapse.weight is not None:
            ours.synapse.weight.copy_(torch.from_numpy(layer.weight))
        ours.bias.copy_(torch.from_numpy(layer.bias))
    network.readout.weight.copy_(torch.from_numpy(weight))
    network.readout.bias.copy_(torch.from_numpy(bias))
    return network.to(dtype)


def read(
    path: str | os.PathLike[str],
    dt: float | None = None,
    *,
    outputs: int | None = None,
    regression: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Network:
    """:func:`from_graph` of a file, ours or another framework's.

    Raises as :func:`from_graph`, and CheckpointError for a file that is missing, damaged, or not NIR.
    """
    graph = load_graph(path)
    try:
        return from_graph(graph, dt, outputs=outputs, regression=regression, dtype=dtype)
    except SpikepropError as error:
        raise type(error)(f"{path}: {error}") from None


def load_graph(path: str | os.PathLike[str]) -> Any:
    """The ``nir.NIRGraph`` in a file. Raises CheckpointError (missing, damaged, foreign) or UnsupportedError (node types).

    The HDF5 library itself can crash on a file that was tampered with: 2 of 400 files with 20 random bytes each did it, none of
    400 with one, and no truncated one.
    """
    nir, path = library(), Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file" if path.exists() else f"{path} does not exist")
    try:
        # nir 1.0.8's type check refuses valid graphs (convolutions in groups); from_graph checks shapes itself.
        graph = nir.read(path, type_check=False)
    except (OSError, RuntimeError, LookupError, ValueError, TypeError, AttributeError, AssertionError) as error:
        if isinstance(error, AssertionError):
            _refuse_unknown_types(path)
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(
            f"{path} is damaged or not a NIR file ({reason}); take an older copy or export it again"
        ) from None
    if type(graph).__name__ != "NIRGraph":
        raise UnsupportedError(f"{path} holds a single {type(graph).__name__} node; wrap it in a nir.NIRGraph")
    return graph


def _refuse_unknown_types(path: Path) -> None:
    """Name the node of a type that nir does not know: nir itself stops at a bare assertion."""
    import h5py

    try:
        with h5py.File(path, "r") as file:
            kinds = {name: bytes(node["type"][()]).decode() for name, node in file["node/nodes"].items()}
    except (OSError, RuntimeError, LookupError, ValueError, TypeError, AttributeError):
        return
    for name, kind in kinds.items():
        if not hasattr(library(), kind):
            raise UnsupportedError(
                f"{path}: node '{name}' is of type {kind}, which the installed nir does not know; update nir"
            )


def time_step(graph: Any, dt: float | None) -> float:
    """The length of a step in seconds: the metadata's, else ``dt``. Raises InputError where it is missing, bad, or disputed."""
    stored = graph.metadata.get("dt")
    for value, what in ((dt, "dt"), (stored, "dt in the graph's metadata")):
        if value is not None:
            check_dt(value, what)
    if stored is None:
        if dt is None:
            raise InputError("the graph does not say its time step; give it in seconds, for example dt=1e-3")
        return float(dt)
    if dt is not None and not math.isclose(dt, stored, rel_tol=DT_ROUNDING):
        raise InputError(f"dt = {dt:g} s contradicts the graph, which was written for dt = {stored:g} s; leave dt out")
    return float(stored)


def chain(graph: Any) -> list[tuple[str, Any]]:
    """The graph's nodes by name, from its Input to its Output. Raises UnsupportedError unless they form one chain."""
    following: dict[str, list[str]] = {name: [] for name in graph.nodes}
    preceding: dict[str, list[str]] = {name: [] for name in graph.nodes}
    for source, target in graph.edges:
        if source not in following or target not in following:
            raise InputError(f"the edge '{source}' -> '{target}' ends at a node that the graph does not have; export it again")
        following[source].append(target)
        preceding[target].append(source)
    for kind in ("Input", "Output"):
        names = [name for name, node in graph.nodes.items() if type(node).__name__ == kind]
        if len(names) != 1:
            raise UnsupportedError(
                f"the graph has {len(names)} {kind} nodes {names}; a network has exactly one: add or join them"
            )
    for name in graph.nodes:
        if name in _reachable(name, following):
            raise UnsupportedError(f"node '{name}' is part of a loop; networks are feed-forward: remove the recurrent edge")
    for name in graph.nodes:
        for neighbours, what in ((following[name], "successors"), (preceding[name], "predecessors")):
            if len(neighbours) > 1:
                raise UnsupportedError(
                    f"node '{name}' has {len(neighbours)} {what} {neighbours}; a network is one chain: remove the branch"
                )
    name = next(name for name, node in graph.nodes.items() if type(node).__name__ == "Input")
    path = [name]
    while following[path[-1]]:
        path.extend(following[path[-1]])
    if len(path) < len(graph.nodes) or type(graph.nodes[path[-1]]).__name__ != "Output":
        stray = [name for name in graph.nodes if name not in path]
        raise UnsupportedError(
            f"the chain from Input ends at '{path[-1]}' and leaves out {stray}; connect all nodes or remove them"
        )
    return [(name, graph.nodes[name]) for name in path]


def _reachable(start: str, following: dict[str, list[str]]) -> set[str]:
    found: set[str] = set()
    frontier = list(following[start])
    while frontier:
        name = frontier.pop()
        if name not in found:
            found.add(name)
            frontier.extend(following[name])
    return found


def _import_layer(linear: Iterable[tuple[str, Any]], name: str, node: Any, shape: Shape, dt: float) -> tuple[_Layer, Shape]:
    """One layer and its output shape: the linear nodes in front of a neuron node, and that node."""
    parts: list[_Linear] = []
    bias: Tensor | None = None  # of the weights' node, carried through the parts behind it
    for part_name, part_node in linear:
        read = _import_linear(part_name, part_node, shape)
        if read.weight is not None and any(part.weight is not None for part in parts):
            raise UnsupportedError(
                f"node '{part_name}': a second weighted node with no neuron in between; multiply the two into one"
            )
        shape = read.part.output_shape(shape)
        if bias is not None:
            bias = read.part(bias) * read.scale
        if read.bias is not None:
            bias = _per_neuron(torch.from_numpy(read.bias), shape)
        parts.append(read)
    if not parts:
        raise UnsupportedError(f"node '{name}' follows the Input or another neuron directly; put weights or pooling before it")
    neuron = _import_neuron(name, node, shape, dt)
    membrane = neuron.bias
    if bias is not None:
        constant = bias[0].numpy()
        if (constant * neuron.alpha).any():
            raise UnsupportedError(
                f"node '{name}': a bias of up to {abs(constant).max():g} before it adds up in its synaptic current, but a "
                "network's bias acts on the membrane; set it to 0 and put what it tends to, r w_in bias, into v_leak"
            )
        membrane = membrane + constant * neuron.gain
    membrane = _per_channel(membrane)
    weight = _fold_gain(name, parts, neuron.gain)
    synapse = parts[0].part if len(parts) == 1 else Chain(*(part.part for part in parts))
    return _Layer(synapse, _lif(name, neuron, membrane, shape), weight, membrane), shape


def _lif(name: str, neuron: _Spiking, bias: Reals, shape: Shape) -> LIF:
    # A layer of pictures has one bias per channel, unless its neurons bring a whole map.
    whole_map = len(shape) == 3 and bias.shape == shape
    try:
        return LIF(
            _compact(neuron.beta),
            _compact(neuron.threshold),
            alpha=_compact(neuron.alpha),
            bias=torch.from_numpy(bias) if whole_map else 0.0,
        )
    except InputError as error:
        raise InputError(f"node '{name}': {error}") from None


def _per_neuron(bias: Tensor, shape: Shape) -> Tensor:
    """``[n]`` or ``[C]`` to ``[1, *shape]``."""
    return bias.reshape(-1, *[1] * (len(shape) - 1)).expand(shape).unsqueeze(0)


def _fold_gain(name: str, parts: list[_Linear], gain: Reals) -> Reals | None:
    """The layer's weight with all gains in it; None where it has none, and needs none."""
    scale = math.prod(part.scale for part in parts)
    weight = next((part.weight for part in parts if part.weight is not None), None)
    total = _per_channel(gain) * scale
    if (total == total.flat[0]).all():
        total = total.reshape(-1)[:1]
    if weight is None:
        if (total != 1).any():
            raise UnsupportedError(
                f"node '{name}': its input is scaled by {total.flat[0]:g} (r dt / tau, and the window of sum pooling), but the "
                "layer has no weights to hold that; set r = tau / dt and use AvgPool2d"
            )
        return None
    per_row = total.reshape(-1)
    if len(per_row) > 1 and (parts[-1].weight is None or len(per_row) != len(weight)):
        raise UnsupportedError(
            f"node '{name}': r dt / tau differs from neuron to neuron ({total.min():g} to {total.max():g}) where weights are "
            "shared; use one value per channel directly behind the weights"
        )
    return weight * per_row.reshape(-1, *[1] * (weight.ndim - 1))


def _import_neuron(name: str, node: Any, shape: Shape, dt: float) -> _Spiking:
    kind = type(node).__name__
    values = {field: _parameter(name, node, field, shape) for field in NEURON_FIELDS[kind]}
    reset = values["v_reset"]
    if reset.any():
        raise UnsupportedError(f"node '{name}': v_reset = {reset[reset != 0].flat[0]:g}, but neurons reset to 0; shift it to 0")
    zeros = np.zeros(shape)
    if kind == "IF":
        return _Spiking(zeros, np.ones(shape), values["v_threshold"], _gain(values["r"] * dt), zeros)
    membrane = "tau" if kind == "LIF" else "tau_mem"
    beta = _decay(name, membrane, values[membrane], dt, node.metadata.get("beta"))
    bias = values["v_leak"] * dt / values[membrane]
    gain = _gain(values["r"] * dt / values[membrane])
    if kind == "LIF":
        return _Spiking(zeros, beta, values["v_threshold"], gain, bias)
    alpha = _decay(name, "tau_syn", values["tau_syn"], dt, node.metadata.get("alpha"))
    return _Spiking(alpha, beta, values["v_threshold"], gain * _gain(values["w_in"] * dt / values["tau_syn"]), bias)


def _gain(value: Reals) -> Reals:
    return np.where(abs(value - 1.0) <= ROUNDING, 1.0, value)


def _decay(name: str, field: str, tau: Reals, dt: float, written: Any) -> Reals:
    """1 - dt/tau, to the last bit where ``written``, from the metadata, agrees with it."""
    shortest = tau.min()
    if shortest <= 0:
        raise InputError(f"node '{name}': {field} = {shortest:g} s is no time constant; it must be above 0")
    decay = 1.0 - dt / tau
    if decay.min() < -DECAY_ROUNDING:
        raise UnsupportedError(
            f"node '{name}': {field} = {shortest:g} s is shorter than dt = {dt:g} s, so its decay 1 - dt/tau is negative; "
            f"use dt <= {shortest:g}"
        )
    if isinstance(written, np.ndarray) and written.dtype == decay.dtype and written.shape == decay.shape:
        decay = np.where(abs(written - decay) <= ROUNDING, written, decay)
    return np.maximum(decay, 0.0)


def _parameter(name: str, node: Any, field: str, shape: Shape) -> Reals:
    """A neuron's parameter, one per neuron. A single number stands for all, as in files of snnTorch and Norse."""
    values = finite(f"node '{name}': {field}", getattr(node, field))
    if values.size != 1 and values.shape != shape:
        raise InputError(f"node '{name}': {field} has shape {values.shape}, its input has {shape}; they must be the same")
    return np.broadcast_to(values.reshape(-1) if values.size == 1 else values, shape).copy()


def _import_linear(name: str, node: Any, shape: Shape) -> _Linear:
    """One linear node on an input of this shape."""
    kind = type(node).__name__
    if kind == "Flatten":
        read = _import_flatten(name, node, shape)
    elif kind in ("AvgPool2d", "SumPool2d"):
        read = _import_pooling(name, node, kind)
    elif kind == "Conv2d":
        read = _import_conv(name, node, shape)
    else:
        weight = finite(f"node '{name}': weight", node.weight)
        if weight.ndim != 2:
            raise UnsupportedError(f"node '{name}': weight of shape {weight.shape}; a network has two dimensions, [out, in]")
        bias = _bias(name, node.bias, len(weight)) if kind == "Affine" else None
        read = _Linear(_unset(Dense, weight.shape[1], weight.shape[0]), 1.0, weight, bias)
    try:
        read.part.output_shape(shape)
    except InputError as error:
        raise InputError(f"node '{name}': {error}") from None
    return read


def _unset(kind: Any, *arguments: int, **more: int) -> Any:
    """A synapse whose weights will be overwritten; drawing them must not disturb the caller's random numbers."""
    return kind(*arguments, **more, generator=torch.Generator())


def _import_flatten(name: str, node: Any, shape: Shape) -> _Linear:
    start, end = int(node.start_dim), int(node.end_dim)
    if start % len(shape) != 0 or end % len(shape) != len(shape) - 1:
        raise UnsupportedError(
            f"node '{name}': flattens dimensions {start} to {end} of {shape}, a network only all of them; NIR has no batch "
            "dimension: use start_dim=0, end_dim=-1"
        )
    return _Linear(Flatten())


def _import_pooling(name: str, node: Any, kind: str) -> _Linear:
    size, stride = _square(name, "kernel_size", node.kernel_size), _square(name, "stride", node.stride)
    padding = _square(name, "padding", node.padding)
    if stride != size or padding != 0 or size < 1:
        raise UnsupportedError(
            f"node '{name}': kernel_size = {size}, stride = {stride}, padding = {padding}; a network's windows do not "
            "overlap and stay inside the picture: stride = kernel_size, padding = 0"
        )
    return _Linear(AvgPool2d(size), float(size**2) if kind == "SumPool2d" else 1.0)


def _import_conv(name: str, node: Any, shape: Shape) -> _Linear:
    weight = finite(f"node '{name}': weight", node.weight)
    if weight.ndim != 4 or weight.shape[2] != weight.shape[3]:
        raise UnsupportedError(f"node '{name}': weight of shape {weight.shape}; a network has square kernels, [out, in, k, k]")
    size, stride, dilation = weight.shape[2], _square(name, "stride", node.stride), _square(name, "dilation", node.dilation)
    if dilation != 1 or stride < 1:
        raise UnsupportedError(f"node '{name}': dilation = {dilation}, stride = {stride}; use dilation 1, stride >= 1")
    padding = node.padding
    if isinstance(padding, str):
        if padding == "same" and (stride != 1 or size % 2 == 0):
            raise UnsupportedError(
                f"node '{name}': padding 'same' at stride {stride} and kernel {size} is uneven; give it as a number"
            )
        padding = size // 2 if padding == "same" else 0
    padding, bias = _square(name, "padding", padding), _bias(name, node.bias, len(weight))
    weight, groups = _regroup(weight, int(node.groups), node.metadata.get("groups", 1))
    try:
        part = _unset(Conv2d, weight.shape[1] * groups, len(weight), size, stride=stride, padding=padding, groups=groups)
    except InputError as error:
        raise InputError(f"node '{name}': {error}") from None
    return _Linear(part, 1.0, weight, bias)


def _regroup(weight: Reals, groups: int, written: Any) -> tuple[Reals, int]:
    """Undo :func:`ungroup` where the metadata say so and the weights agree; the weights decide what is computed."""
    outputs, inputs, *kernel = weight.shape
    hint = int(written) if isinstance(written, int | np.integer) else 1
    if groups != 1 or hint < 2 or outputs % hint or inputs % hint:
        return weight, groups
    blocks = weight.reshape(hint, outputs // hint, hint, inputs // hint, *kernel)
    grouped = np.stack([blocks[group, :, group] for group in range(hint)]).reshape(outputs, inputs // hint, *kernel)
    return (grouped, hint) if np.array_equal(ungroup(grouped, hint), weight) else (weight, groups)


def _import_readout(
    linear: list[tuple[str, Any]], shape: Shape, outputs: int | None, last: tuple[str, Any]
) -> tuple[Reals, Reals]:
    """Weight and bias of the readout, from the linear nodes behind the last neuron."""
    reads: list[_Linear] = []
    for name, node in linear:
        kind = type(node).__name__
        if kind not in ("Flatten", "Affine", "Linear") or any(read.weight is not None for read in reads):
            raise UnsupportedError(
                f"node '{name}' of type {kind} has no neuron behind it; the graph may end in one Affine or Linear"
            )
        reads.append(_import_linear(name, node, shape))
        shape = reads[-1].part.output_shape(shape)
    name, node = last
    declared = tuple(int(extent) for extent in np.ravel(node.output_type["output"]))
    if declared != shape:
        raise InputError(f"node '{name}': declared with shape {declared}, but {shape} arrives; correct the Output node")
    if reads and reads[-1].weight is not None:
        weight, bias = reads[-1].weight, reads[-1].bias
        if outputs not in (None, len(weight)):
            raise InputError(f"outputs = {outputs}, but the graph ends in a linear map to {len(weight)}; leave outputs out")
        return weight, np.zeros(len(weight)) if bias is None else bias
    features = math.prod(shape)
    if outputs is None and len(shape) > 1:
        raise InputError(f"the graph ends in pictures of shape {shape} without a linear map; say how many outputs=... to train")
    if outputs in (None, features):
        return np.eye(features), np.zeros(features)
    if outputs is None or outputs < 1:
        raise InputError(f"outputs = {outputs}; at least one is needed")
    return np.zeros((outputs, features)), np.zeros(outputs)


def _bias(name: str, value: Any, rows: int) -> Reals:
    bias = finite(f"node '{name}': bias", value)
    if bias.shape != (rows,):
        raise InputError(f"node '{name}': bias of shape {bias.shape} for {rows} rows of weights; it must be ({rows},)")
    return bias


def _square(name: str, field: str, value: Any) -> int:
    """The one number of a pair. NIR keeps integers, tuples or arrays here, a file only the latter."""
    numbers = np.ravel(np.asarray(value))
    if not np.issubdtype(numbers.dtype, np.integer) or numbers.size not in (1, 2) or numbers[0] != numbers[-1]:
        raise UnsupportedError(f"node '{name}': {field} = {numbers.tolist()}; a network has one integer for height and width")
    return int(numbers[0])


def _per_channel(values: Reals) -> Reals:
    """``[C, H, W]`` as ``[C, 1, 1]`` where each channel holds one value."""
    if values.ndim == 3 and (values == values[:, :1, :1]).all():
        return values[:, :1, :1].copy()
    return values


def _compact(values: Reals) -> float | Tensor:
    """A number for the layer, for each channel, or for each neuron: the shortest that says the same."""
    if (values == values.flat[0]).all():
        return float(values.flat[0])
    return torch.from_numpy(_per_channel(values))
