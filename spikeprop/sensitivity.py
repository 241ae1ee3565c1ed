"""How a network's state changes with its weights, carried forward beside the state: what needs no step back in time.

A neuron's drive and its bias are linear in the neuron's own row of weights, those of the synapse, of the recurrent synapse,
and the bias. :func:`by_own_row` is that derivative; :func:`step` takes it, as tangents of the drive and the bias, through the
neuron's dynamics, which are those of :func:`spikeprop.neuron.advance` on :class:`~spikeprop.differentiable.Dual` numbers.
For dense synapses, where each weight belongs to one neuron.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from spikeprop.differentiable import Dual
from spikeprop.network import Layer, Network
from spikeprop.neuron import Arithmetic, RecurrentState, State
from spikeprop.synapse import Synapse


def presynaptic(synapse: Synapse, x: Tensor) -> Tensor:
    """What the weights of a dense synapse multiply: ``[N, *input_shape]`` to ``[N, I]``."""
    for part in getattr(synapse, "parts", [synapse]):
        if part.weight is not None:
            break
        x = part(x)
    return x.flatten(1)


def has_memory(layer: Layer) -> bool:
    """Whether the synaptic current lasts from step to step. If not, a bias is as good as a drive."""
    return not (isinstance(layer.neuron.alpha, float) and layer.neuron.alpha == 0.0)


def row_length(layer: Layer) -> int:
    """I, the parameters of one neuron."""
    *weights, _ = layer.weights()
    return sum(weight.shape[1] for weight in weights) + 1


def by_own_row(network: Network, index: int, x: Tensor, state: State) -> tuple[Tensor, Tensor | None]:
    """Derivatives by a neuron's own I parameters: of its drive ``[B, n or 1, I]`` and of its bias ``[1, n or 1, I]``.

    ``x``: the layer's input ``[B, *input_shape]``; ``state``: before the step. The bias holds the centring, and so a derivative
    by the weights. Without synaptic memory all is a derivative of the drive, and None is given for the bias.
    """
    layer, mean = network.layers[index], network.centre(index)
    inputs, centre = [], []
    if layer.synapse.weight is not None:
        inputs.append(presynaptic(layer.synapse, x))
        kept = torch.as_tensor(layer.neuron.alpha, dtype=x.dtype, device=x.device).reshape(-1, 1)
        subtracted = torch.zeros_like(x[:1]) if mean is None else mean.unsqueeze(0)
        centre.append(-presynaptic(layer.synapse, subtracted) / (1.0 - kept))
    if layer.recurrent is not None:
        assert isinstance(state, RecurrentState)
        inputs.append(presynaptic(layer.recurrent, state.spikes.value))
        centre.append(x.new_zeros(len(centre[0]) if centre else 1, inputs[-1].shape[1]))
    at_drive = torch.cat([*inputs, x.new_zeros(len(x), 1)], 1).unsqueeze(1)
    at_bias = torch.cat([*centre, x.new_ones(len(centre[0]) if centre else 1, 1)], 1).unsqueeze(0)
    return (at_drive, at_bias) if has_memory(layer) else (at_drive + at_bias, None)


def as_weights(layer: Layer, rows: Tensor) -> list[Tensor]:
    """Gradients by every neuron's own row ``[n, I]`` as gradients of ``layer.weights()``."""
    *weights, bias = layer.weights()
    *found, last = rows.split([*(weight.shape[1] for weight in weights), 1], 1)
    return [*found, last.reshape(layer.output_shape).sum_to_size(bias.shape)]


def constants(state: State) -> State:
    """A state that no parameter has reached yet."""
    return type(state)(*(Dual.constant(part) for part in state))


def linear(function: Callable[[Tensor], Tensor], x: Dual) -> Dual:
    """A linear map of rows, on a value and its tangents."""
    if x.is_constant:
        return Dual.constant(function(x.value))
    return Dual(function(x.value), function(x.tangent.flatten(0, 1)).unflatten(0, x.tangent.shape[:2]))


def step(layer: Layer, state: State, drive: Dual, bias: Dual | Tensor, arithmetic: Arithmetic) -> tuple[Dual, State]:
    """One time step of a layer from the drive below ``[B, *output_shape]``, its recurrent synapse included."""
    if layer.recurrent is not None:
        assert isinstance(state, RecurrentState)
        drive = drive + linear(layer.recurrent, state.spikes)
    activity, after = layer.neuron.step(state, drive, bias, arithmetic)
    spikes: Dual = activity.spikes  # type: ignore[assignment]
    if not has_memory(layer):
        after = after._replace(current=Dual.constant(after.current.value))  # nothing reads it again
    return spikes, after if layer.recurrent is None else RecurrentState(*after, spikes)
