"""Networks as NIR graphs and files."""

from __future__ import annotations

import os
from itertools import pairwise
from typing import Any

import numpy as np

from spikeprop.backends.nir.common import Reals, check_dt, finite, library, to_reals, ungroup
from spikeprop.errors import CheckpointError, UnsupportedError
from spikeprop.network import Network
from spikeprop.neuron import LIF
from spikeprop.storage import atomic_write
from spikeprop.synapse import AvgPool2d, Chain, Conv2d, Dense, Flatten, Shape, Synapse


def to_graph(network: Network, dt: float = 1e-3, readout: bool = True) -> Any:
    """The network as a ``nir.NIRGraph`` with float64 parameters, one node after the other.

    Centring becomes part of the biases (``Network.fold_bias``). A convolution in groups is written as the same convolution
    with zeros between the groups, since nir 1.0.8 cannot type-check groups; the metadata ``groups`` lets the import undo it.
    Target synapses are not written: they carry labels, not input.

    network: LIF layers (:func:`spikeprop.neuron.IF` included) that reset to zero, with Dense, Conv2d, AvgPool2d and Flatten.
    dt: length of a time step in seconds.
    readout: end with the delta-rule readout as an Affine without neuron. It is linear in the mean activity, so the mean over
        time of the graph's output is ``network.readout`` of the rates. Without it the graph ends with the last layer's spikes.

    Raises UnsupportedError for what NIR cannot express, InputError for NaN or a dt that is not positive, BackendError without
    the nir package.
    """
    nir = library()
    check_dt(dt, "dt")
    nodes = {"input": nir.Input({"input": np.array(network.input_shape)})}
    for index in range(len(network.layers)):
        nodes.update(_export_layer(network, index, dt))
    shape = network.layers[-1].output_shape
    if readout:
        nodes.update(_export_readout(network, shape))
        shape = (network.outputs,)
    nodes["output"] = nir.Output({"output": np.array(shape)})
    return nir.NIRGraph(nodes, list(pairwise(nodes)), metadata={"dt": float(dt)})


def write(network: Network, path: str | os.PathLike[str], dt: float = 1e-3, readout: bool = True) -> None:
    """Write :func:`to_graph` to an HDF5 file, whole or not at all, after nir has read it back and checked its types.

    Raises as :func:`to_graph`, and CheckpointError where the file cannot be written; what stood at ``path`` is then unchanged.
    """
    nir, graph = library(), to_graph(network, dt, readout)
    with atomic_write(path) as temporary:
        try:
            nir.write(temporary, graph)
            nir.read(temporary)
        except RuntimeError as error:  # HDF5's own, where it could not flush
            raise CheckpointError(f"{path} could not be written ({error}); what stood there is unchanged") from error


def _export_layer(network: Network, index: int, dt: float) -> dict[str, Any]:
    layer, where = network.layers[index], f"layer {index + 1}"
    neuron = layer.neuron
    if type(neuron) is not LIF:
        raise UnsupportedError(f"{where}: NIR has no {type(neuron).__name__} neurons; use LIF neurons")
    if layer.recurrent is not None:
        raise UnsupportedError(f"{where}: recurrent synapses are not written to NIR; build the network with recurrent=False")
    if neuron.reset_mechanism != "zero":
        raise UnsupportedError(
            f"{where}: reset_mechanism '{neuron.reset_mechanism}' cannot be written, NIR's neurons reset to v_reset; "
            "train with reset_mechanism='zero'"
        )
    alpha, beta, threshold, bias = (
        finite(f"{where}: {name}", np.broadcast_to(to_reals(value), layer.output_shape).copy())
        for name, value in (
            ("alpha", neuron.alpha),
            ("beta", neuron.beta),
            ("threshold", neuron.threshold),
            ("bias", network.fold_bias(index, exact=True)),
        )
    )
    parts = _parts(layer.synapse)
    weight_bias, membrane_bias = _place_bias(parts[-1], alpha, bias)
    spiking = _export_neuron(where, alpha, beta, threshold, membrane_bias, dt)
    nodes: dict[str, Any] = {}
    shape = layer.input_shape
    for position, part in enumerate(parts, 1):
        name = f"layer{index + 1}_{type(part).__name__.lower()}"
        name = f"{name}_{position}" if name in nodes else name
        nodes[name] = _export_part(where, part, shape, weight_bias if position == len(parts) else None)
        shape = part.output_shape(shape)
    nodes[f"layer{index + 1}_{type(spiking).__name__.lower()}"] = spiking
    return nodes


def _parts(synapse: Synapse) -> list[Synapse]:
    return [leaf for part in synapse.parts for leaf in _parts(part)] if isinstance(synapse, Chain) else [synapse]  # type: ignore[arg-type]


def _place_bias(last: Synapse, alpha: Reals, bias: Reals) -> tuple[Reals | None, Reals]:
    """Where the bias goes: the part for the weights' node (None without), and the part for the membrane, per neuron."""
    if bias.any() and not alpha.any():  # a synaptic current would sum the bias up
        if isinstance(last, Dense):
            return bias, np.zeros_like(bias)
        if isinstance(last, Conv2d) and (bias == bias[:, :1, :1]).all():
            return bias[:, 0, 0], np.zeros_like(bias)
    return None, bias


def _export_part(where: str, part: Synapse, shape: Shape, bias: Reals | None) -> Any:
    nir = library()
    if isinstance(part, Flatten):
        return nir.Flatten(input_type={"input": np.array(shape)}, start_dim=0, end_dim=-1)
    if isinstance(part, AvgPool2d):
        size = np.array([part.size, part.size])
        return nir.AvgPool2d(kernel_size=size, stride=size, padding=np.array([0, 0]))
    if not isinstance(part, Dense | Conv2d):
        raise UnsupportedError(f"{where}: {type(part).__name__} has no node in NIR; use Dense, Conv2d, AvgPool2d, Flatten")
    weight = finite(f"{where}: weight", to_reals(part.weight))
    if isinstance(part, Dense):
        return nir.Linear(weight=weight) if bias is None else nir.Affine(weight=weight, bias=bias)
    groups = part.arguments["groups"]
    return nir.Conv2d(
        input_shape=shape[1:],
        weight=ungroup(weight, groups),
        stride=part.arguments["stride"],
        padding=part.arguments["padding"],
        dilation=1,
        groups=1,
        bias=np.zeros(len(weight)) if bias is None else bias,
        metadata={"groups": groups} if groups > 1 else {},
    )


def _export_neuron(where: str, alpha: Reals, beta: Reals, threshold: Reals, bias: Reals, dt: float) -> Any:
    nir = library()
    rest = np.zeros_like(threshold)
    if (beta == 1).all() and not alpha.any():
        if bias.any():
            raise UnsupportedError(
                f"{where}: beta = 1 with a bias (up to {abs(bias).max():g}) that differs within a channel or follows pooling, "
                "which NIR's IF and Conv2d cannot hold; use beta < 1, or centred=False with models.conv(biases='channel')"
            )
        return nir.IF(r=np.full_like(threshold, 1.0 / dt), v_threshold=threshold, v_reset=rest)
    if (beta == 1).any():
        raise UnsupportedError(
            f"{where}: beta = 1 has an infinite time constant, which NIR has only where all neurons of the layer share it and "
            "alpha = 0 (IF); use beta < 1"
        )
    tau, tau_syn = dt / (1.0 - beta), dt / (1.0 - alpha)
    membrane = {"r": tau / dt, "v_leak": bias * (tau / dt), "v_threshold": threshold, "v_reset": rest}
    if not alpha.any():
        return nir.LIF(tau=tau, metadata={"beta": beta}, **membrane)
    decays = {"alpha": alpha, "beta": beta}
    return nir.CubaLIF(tau_syn=tau_syn, tau_mem=tau, w_in=tau_syn / dt, metadata=decays, **membrane)


def _export_readout(network: Network, shape: Shape) -> dict[str, Any]:
    nodes = {} if len(shape) == 1 else {"readout_flatten": _export_part("readout", Flatten(), shape, None)}
    weight, bias = (finite("readout", to_reals(value)) for value in (network.readout.weight, network.readout.bias))
    return {**nodes, "readout": library().Affine(weight=weight, bias=bias)}
