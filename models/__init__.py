"""Networks to start from. Each function returns a :class:`spikeprop.Network`; none of them trains."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch

from spikeprop.errors import InputError
from spikeprop.network import Network
from spikeprop.neuron import LIF, Bernoulli, Neuron
from spikeprop.synapse import AvgPool2d, Chain, Conv2d, Dense, Flatten, Synapse

NeuronFactory = Callable[[int, torch.Generator], Neuron]


def mlp(
    input_shape: Sequence[int],
    hidden: Sequence[int],
    outputs: int,
    *,
    neuron: Neuron | NeuronFactory | None = None,
    gain: float = 1.0,
    centred: bool = True,
    regression: bool = False,
    recurrent: bool = False,
    seed: int = 0,
) -> Network:
    """Fully connected layers.

    Args:
        input_shape: shape of one input at one step; pictures are flattened.
        hidden: neurons per layer, for example ``[256, 256]``.
        outputs: number of classes, or of real outputs with ``regression=True``.
        neuron: the neurons of every layer (a copy each), or a function that makes them from a layer's width and a generator,
            such as :func:`heterogeneous` returns; ``LIF()`` by default.
        gain: weights are drawn from N(0, gain^2 / fan-in). Biases start at threshold * (1 - beta), where the membrane of a
            neuron without input settles at its threshold and any drive above the mean makes it spike: neurons spike from the
            start, several layers deep.
        centred: see :class:`spikeprop.Network`.
        recurrent: every layer also gets a synapse from its own spikes, which arrive one step late, with weights of the same
            distribution.
        seed: fixes every weight.

    Raises:
        InputError: no hidden layer, or a width below 1.
    """
    if not hidden or min(hidden) < 1:
        raise InputError(f"mlp: the hidden layers are {list(hidden)}; give at least one width, each at least 1")
    generator = torch.Generator().manual_seed(seed)
    neuron = LIF() if neuron is None else neuron
    widths = [math.prod(input_shape), *hidden]
    layers: list[tuple[Synapse, Neuron, Synapse | None]] = []
    for index, (inputs, width) in enumerate(itertools.pairwise(widths)):
        synapse: Synapse = Dense(inputs, width, gain=gain, generator=generator)
        if index == 0 and len(input_shape) > 1:
            synapse = Chain(Flatten(), synapse)
        loop = Dense(width, width, gain=gain, generator=generator) if recurrent else None
        layers.append((synapse, _make(neuron, index, width, generator), loop))
    return _rest_at_threshold(Network(input_shape, layers, outputs, centred=centred, regression=regression))


def conv(
    input_shape: Sequence[int],
    channels: Sequence[int],
    outputs: int,
    *,
    kernel_size: int = 5,
    stride: int = 2,
    pool: int = 1,
    hidden: Sequence[int] = (128,),
    neuron: Neuron | None = None,
    biases: Literal["neuron", "channel"] = "neuron",
    gain: float = 2.0,
    centred: bool = True,
    seed: int = 0,
) -> Network:
    """Convolutional layers (same padding), each of which shrinks the picture by stride and pool, then fully connected ones.

    Args:
        input_shape: ``(C, H, W)`` of one input at one step.
        channels: channels per convolutional layer.
        kernel_size: odd, so that padding keeps the picture's size.
        stride: of every convolution. A stride of 2 shrinks pictures as pooling does, with a quarter of the neurons.
        pool: size of average pooling windows after each convolution, 1 for none; part of the next layer's synapse.
        hidden: neurons per fully connected layer after the convolutional ones.
        biases: of convolutional layers, one per "neuron" or per "channel". A bias per neuron lets homeostasis reach a neuron
            whose place in the picture is always blank, and a chip holds one per neuron anyway.
        gain: as for :func:`mlp`; at T = 4 networks learned better from 2 than from 1.
        neuron, centred, seed, outputs: as for :func:`mlp`.

    Raises:
        InputError: no layer at all, an unknown kind of biases, an even kernel, or a picture too small for the pooling.
    """
    if not channels or kernel_size % 2 == 0:
        raise InputError(
            f"conv: channels = {list(channels)} with kernel_size = {kernel_size}; give a channel count and an odd size"
        )
    if biases not in ("neuron", "channel"):
        raise InputError(f"conv: biases = {biases!r} is neither 'neuron' nor 'channel'")
    generator = torch.Generator().manual_seed(seed)
    neuron = LIF() if neuron is None else neuron
    layers: list[tuple[Synapse, Neuron]] = []
    shape = tuple(input_shape)
    for index, (before, after) in enumerate(zip([shape[0], *channels[:-1]], channels, strict=True)):
        pooled = pool if index > 0 else 1  # a mean over pool^2 spikes has 1/pool of their standard deviation
        how = {"stride": stride, "padding": kernel_size // 2}
        synapse: Synapse = Conv2d(before, after, kernel_size, **how, gain=gain * pooled, generator=generator)
        if pooled > 1:
            synapse = Chain(AvgPool2d(pool), synapse)
        shape = synapse.output_shape(shape)
        own = _copy(neuron, len(layers))
        layers.append((synapse, _with_biases(own, shape) if biases == "neuron" else own))
    for index, width in enumerate(hidden):
        parts: list[Synapse] = []
        if index == 0:
            parts = [Flatten()] if pool == 1 else [AvgPool2d(pool), Flatten()]
        for part in parts:
            shape = part.output_shape(shape)
        dense = Dense(shape[0], width, gain=gain * (pool if index == 0 else 1), generator=generator)
        layers.append((Chain(*parts, dense) if parts else dense, _copy(neuron, len(layers))))
        shape = (width,)
    return _rest_at_threshold(Network(input_shape, layers, outputs, centred=centred))


def heterogeneous(
    taus: tuple[float, float], current_taus: tuple[float, float] | None = None, *, threshold: float = 1.0
) -> NeuronFactory:
    """LIF neurons each with time constants of its own, for data whose time carries the information.

    A layer of neurons from fast to slow sees the recent and the distant past at once (Perez-Nieves et al. 2021,
    doi 10.1038/s41467-021-26022-3, learn such constants; here they are drawn once and stay). Constants are in steps, drawn
    uniformly in their logarithm.

    Args:
        taus: shortest and longest time constant of the membrane.
        current_taus: of the synaptic current; None for none. A reset wipes the membrane but not the current, so that long
            memory at high rates wants slow currents.

    Returns:
        What :func:`mlp` takes as ``neuron``.

    Raises:
        InputError: a range that does not satisfy 0 < shortest <= longest.
    """
    for name, given in (("taus", taus), ("current_taus", current_taus)):
        if given is not None and not 0.0 < given[0] <= given[1] < math.inf:
            raise InputError(f"heterogeneous: {name} = {given} must be a range of steps with 0 < shortest <= longest")

    def decays(width: int, low: float, high: float, generator: torch.Generator) -> torch.Tensor:
        exponents = torch.rand(width, generator=generator)
        return torch.exp(-1.0 / (low * (high / low) ** exponents))

    def make(width: int, generator: torch.Generator) -> LIF:
        beta = decays(width, *taus, generator)
        alpha = 0.0 if current_taus is None else decays(width, *current_taus, generator)
        return LIF(beta, threshold, alpha=alpha)

    return make


def _make(neuron: Neuron | NeuronFactory, index: int, width: int, generator: torch.Generator) -> Neuron:
    return _copy(neuron, index) if isinstance(neuron, Neuron) else neuron(width, generator)


def _copy(neuron: Neuron, index: int) -> Neuron:
    """A neuron of its own for layer ``index``; where neurons draw random numbers, different ones in every layer."""
    if not isinstance(neuron, Neuron):
        raise InputError(
            f"conv: neuron = {neuron!r} makes neurons for the width of a dense layer; use it with mlp, or give one Neuron here"
        )
    neuron = copy.deepcopy(neuron)
    if isinstance(neuron, Bernoulli):
        neuron.seed += index * 1_000_003  # far apart, so that layers of other networks do not meet either
    return neuron


def _with_biases(neuron: Neuron, shape: tuple[int, ...]) -> Neuron:
    """The neuron with a bias for each place of a picture."""
    bias = neuron.bias
    del neuron.bias
    neuron.register_buffer("bias", torch.zeros(shape) + bias)
    return neuron


def _rest_at_threshold(network: Network) -> Network:
    for layer in network.layers:
        if layer.neuron.spiking:
            layer.bias.add_(layer.neuron.threshold * (1.0 - layer.neuron.beta))
    return network
