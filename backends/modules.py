"""A torch Sequential of linear modules and another library's neurons as a network: what ``snntorch`` and ``norse`` share.

Linear modules in a row become one synapse, the neurons behind them close the layer. All numbers are copied, the modules stay
as they are. What would compute something else is refused, by its name in the Sequential ("module 3, Conv2d").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spikeprop.errors import InputError, UnsupportedError
from spikeprop.network import Network
from spikeprop.neuron import LIF
from spikeprop.synapse import AvgPool2d, Chain, Conv2d, Dense, Flatten, Shape, Synapse

# From a module's name, the module and the shape of its drive to LIF's arguments, all but the bias.
NeuronReader = Callable[[str, Any, Shape], dict[str, Any]]


def build(
    module: nn.Module,
    input_shape: Sequence[int],
    outputs: int | None,
    readers: Mapping[type, NeuronReader],
    containers: tuple[type, ...] = (nn.Sequential,),
) -> Network:
    """The network of ``module``, a Sequential (of a type in ``containers``) whose neurons are of the types in ``readers``.

    The other arguments and the errors are those of :func:`spikeprop.backends.snntorch.from_module`.
    """
    if type(module) not in containers:
        names = " or ".join(container.__name__ for container in containers)
        raise UnsupportedError(
            f"a {type(module).__name__} does not say in which order its modules run; put them into a {names}"
        )
    shape = tuple(input_shape)
    layers: list[tuple[Synapse, LIF]] = []
    weights: list[Tensor] = []
    for linear, (where, neurons) in _layers(module, readers, containers):
        parts: list[Synapse] = []
        bias = None
        for name, part in linear:
            parts.append(LINEAR[type(part)](name, part, shape))
            try:
                shape = parts[-1].output_shape(shape)
            except InputError as error:
                raise InputError(f"{name}: {error}") from None
            if parts[-1].weight is not None:
                bias = _copy_weights(name, part, parts[-1])
                weights.append(part.weight)
        settings = readers[type(neurons)](where, neurons, shape)
        layers.append((parts[0] if len(parts) == 1 else Chain(*parts), _neurons(where, settings, bias, shape)))
    if outputs is None and len(shape) > 1:
        raise InputError(f"{where}: the last neurons form pictures of shape {shape}; say how many outputs=... to train")
    network = Network(input_shape, layers, shape[0] if outputs is None else outputs, centred=False)
    network.to(weights[0] if weights else torch.empty(0))
    if shape == (network.outputs,):
        network.readout.weight.copy_(torch.eye(network.outputs))
    return network


def per_neuron(where: str, name: str, value: Any, shape: Shape) -> float | Tensor:
    """A parameter of neurons of this shape: a number, or a tensor of as many dimensions that broadcasts over them."""
    numbers = torch.as_tensor(value).detach().cpu()
    if numbers.numel() == 1:
        return float(numbers)
    try:
        fitting = numbers.reshape(numbers.shape[-len(shape) :])  # torch would take a further dimension for the batch
        whole = fitting.expand(shape)
    except RuntimeError:
        raise InputError(
            f"{where}: {name} has shape {tuple(numbers.shape)}, its neurons {shape}; give one number, or one for each neuron"
        ) from None
    return fitting if fitting.dim() == len(shape) else whole


Named = tuple[str, Any]  # a module with its name for messages


def _layers(
    module: nn.Module, readers: Mapping[type, Any], containers: tuple[type, ...]
) -> Iterator[tuple[list[Named], Named]]:
    """The linear modules of each layer, at most one of them with weights, and its neurons."""
    linear: list[Named] = []
    met: dict[int, str] = {}
    where = "the Sequential"
    for where, part in _flat(module, containers):
        if type(part) not in LINEAR and type(part) not in readers:
            known = ", ".join(kind.__name__ for kind in (*LINEAR, nn.Identity, *readers))
            raise UnsupportedError(
                f"{where}: a network is made of {known}; remove what acts in training only, such as Dropout, and fold what is "
                "linear, such as BatchNorm, into the weights"
            )
        weighted = hasattr(part, "weight")
        if weighted and any(hasattr(other, "weight") for _, other in linear):
            raise UnsupportedError(f"{where}: second weights with no neurons since the first; multiply the two into one module")
        if (weighted or type(part) in readers) and met.setdefault(id(part), where) != where:
            raise UnsupportedError(f"{where}: the same object as {met[id(part)]}, but layers share nothing; use copy.deepcopy")
        if type(part) in LINEAR:
            linear.append((where, part))
        elif linear:
            yield linear, (where, part)
            linear = []
        else:
            raise UnsupportedError(f"{where}: nothing drives these neurons; put weights or pooling directly before them")
    if linear or not met:
        raise UnsupportedError(f"{where}: no neurons follow, but a network ends in neurons; add {next(iter(readers)).__name__}")


def _flat(module: nn.Module, containers: tuple[type, ...], prefix: str = "") -> Iterator[Named]:
    for name, part in module._modules.items():  # named_children would leave repetitions out
        if type(part) in containers:
            yield from _flat(part, containers, f"{prefix}{name}.")  # type: ignore[arg-type]
        elif type(part) is not nn.Identity:
            yield f"module {prefix}{name}, {type(part).__name__}", part


def _copy_weights(where: str, part: Any, synapse: Synapse) -> Tensor | None:
    """Give the synapse the module's weights; the module's bias, if any, one number per row of weights."""
    for name in ("weight", "bias"):
        values = getattr(part, name)
        if values is not None and not torch.isfinite(values).all():
            raise InputError(f"{where}: {name} holds NaN or infinity; take weights of a training that converged")
    synapse.to(part.weight.dtype).weight.copy_(part.weight.detach())  # type: ignore[union-attr]
    return None if part.bias is None else part.bias.detach().cpu()


def _neurons(where: str, settings: dict[str, Any], bias: Tensor | None, shape: Shape) -> LIF:
    constant: float | Tensor = 0.0
    if bias is not None and bias.any():
        if torch.as_tensor(settings.get("alpha", 0.0)).any():
            raise UnsupportedError(
                f"{where}: the bias before it, up to {bias.abs().max():g}, builds up in the synaptic current, but a network's "
                "bias acts on the membrane; use bias=False there"
            )
        # Pooling behind the weights leaves a constant as it is, flattening repeats each channel's.
        constant = bias.repeat_interleave(shape[0] // len(bias)) if len(shape) == 1 else bias.view(-1, 1, 1)
    threshold = settings["threshold"]
    if len(shape) > 1 and isinstance(threshold, Tensor) and threshold[0].numel() > 1:
        # Homeostasis moves a bias by parts of its neuron's threshold: both differ within a channel, or neither.
        constant = torch.zeros(shape) + constant
    try:
        return LIF(**settings, bias=constant)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _dense(where: str, linear: nn.Linear, shape: Shape) -> Synapse:
    # The weights drawn here are replaced; a generator of their own leaves the caller's random numbers alone.
    return Dense(linear.in_features, linear.out_features, generator=torch.Generator())


def _conv2d(where: str, conv: nn.Conv2d, shape: Shape) -> Synapse:
    size, stride, dilation = (_one(where, conv, name) for name in ("kernel_size", "stride", "dilation"))
    if dilation != 1 or conv.padding_mode != "zeros":
        raise UnsupportedError(
            f"{where}: dilation = {dilation}, padding_mode = '{conv.padding_mode}'; a network has dilation=1 and "
            "padding_mode='zeros' only"
        )
    if conv.padding == "same" and size % 2 == 0:
        raise UnsupportedError(f"{where}: padding 'same' is uneven for kernel_size = {size}; give it as a number")
    named = {"same": size // 2, "valid": 0}  # torch has "same" at stride 1 only
    padding = named[conv.padding] if isinstance(conv.padding, str) else _one(where, conv, "padding")
    how = {"stride": stride, "padding": padding, "groups": conv.groups}
    return Conv2d(conv.in_channels, conv.out_channels, size, **how, generator=torch.Generator())


def _avg_pool2d(where: str, pool: nn.AvgPool2d, shape: Shape) -> Synapse:
    size, stride, padding = (_one(where, pool, name) for name in ("kernel_size", "stride", "padding"))
    if (stride, padding, pool.ceil_mode, pool.divisor_override) != (size, 0, False, None):
        raise UnsupportedError(
            f"{where}: kernel_size = {size}, stride = {stride}, padding = {padding}, ceil_mode = {pool.ceil_mode}, "
            f"divisor_override = {pool.divisor_override}; a network's windows stand side by side in the picture: use "
            "stride = kernel_size and leave the rest out"
        )
    return AvgPool2d(size)


def _flatten(where: str, flatten: nn.Flatten, shape: Shape) -> Synapse:
    last = len(shape)  # dimension 0 is the batch
    if (flatten.start_dim % (last + 1), flatten.end_dim % (last + 1)) != (1, last):
        raise UnsupportedError(
            f"{where}: start_dim = {flatten.start_dim}, end_dim = {flatten.end_dim}; a network flattens all features of a "
            "sample: use start_dim=1, end_dim=-1"
        )
    return Flatten()


def _one(where: str, module: nn.Module, name: str) -> int:
    value = getattr(module, name)
    height, width = value if isinstance(value, tuple) else (value, value)
    if height != width:
        raise UnsupportedError(f"{where}: {name} = {value}; a network has one number for height and width, make them equal")
    return int(height)


LINEAR: dict[type, Callable[[str, Any, Shape], Synapse]] = {
    nn.Linear: _dense,
    nn.Conv2d: _conv2d,
    nn.AvgPool2d: _avg_pool2d,
    nn.Flatten: _flatten,
}
