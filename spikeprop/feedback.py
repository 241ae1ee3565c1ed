"""Feedback synapses: errors travel down a network through weights of their own, in place of the transposed forward ones.

    a_l[t]      = B_{l+1}^T lambda_{l+1}[t]  +  C_l^T lambda_l[t+1]      at the activity; the second in recurrent layers
    e_l[t]      = a_l[t] f'(U_l[t])                                      at the membrane
    lambda_l[t] = e_l[t] + beta (1 - S_l[t]) lambda_l[t+1]               at the drive (alpha = 0, reset to zero)

B_l stands for the forward weights W_l, C_l for the recurrent ones, and each has the shape of what it stands for. With B = W and
C = V this is backpropagation through time with the reset held constant.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from spikeprop.network import Layer, Network
from spikeprop.synapse import Synapse
from spikeprop.traces import step_back


def replaced_weights(network: Network) -> dict[str, Tensor]:
    """The forward weights whose transpose an error would need on its way down, by name: all but those of layer 1."""
    found: dict[str, Tensor] = {}
    for index, layer in enumerate(network.layers):
        if index > 0 and layer.synapse.weight is not None:
            found[f"synapse.{index}"] = layer.synapse.weight
        if layer.recurrent is not None and layer.recurrent.weight is not None:
            found[f"recurrent.{index}"] = layer.recurrent.weight
    return found | {"readout": network.readout.weight}


def draw_feedback(network: Network, scale: float, generator: torch.Generator) -> dict[str, Tensor]:
    """A feedback weight for each of :func:`replaced_weights`, from N(0, scale^2 / fan-in of the forward one)."""
    return {
        name: torch.randn(weight.shape, generator=generator).to(weight) * (scale / weight[0].numel() ** 0.5)
        for name, weight in replaced_weights(network).items()
    }


def weight_alignment(network: Network, feedback: dict[str, Tensor]) -> dict[str, float]:
    """The cosine between every feedback weight and the forward weight that it stands for."""
    return {
        name: float(F.cosine_similarity(feedback[name].flatten(), weight.flatten(), dim=0))
        for name, weight in replaced_weights(network).items()
    }


def errors_at_membranes(
    network: Network,
    feedback: dict[str, Tensor],
    slopes: list[Tensor],
    spikes: list[Tensor],
    at_outputs: Tensor,
    *,
    gated: bool,
) -> list[Tensor]:
    """The error of every layer at its membrane ``[k, B, *output_shape]``.

    Args:
        slopes, spikes: dS/dU and S of every layer in the window, ``[k, B, *output_shape]``.
        at_outputs: the error at the outputs, the same at every step ``[B, outputs]``.
        gated: whether a spike wipes its neuron's responsibility, under reset to zero.
    """
    steps, batch = slopes[-1].shape[:2]
    arriving = (at_outputs @ feedback["readout"]).view_as(slopes[-1][0]).expand_as(slopes[-1])
    errors = []
    for index in range(len(network.layers) - 1, -1, -1):
        layer = network.layers[index]
        loop = layer.recurrent and _with_weight(layer.recurrent, feedback.get(f"recurrent.{index}"))
        error, at_drive = _through_layer(layer, arriving, slopes[index], spikes[index], loop, gated=gated)
        errors.append(error)
        if index > 0:
            synapse = _with_weight(layer.synapse, feedback.get(f"synapse.{index}"))
            arriving = synapse.adjoint(at_drive.flatten(0, 1), layer.input_shape).unflatten(0, (steps, batch))
    return errors[::-1]


def _through_layer(
    layer: Layer, at_activity: Tensor, slope: Tensor, spikes: Tensor, loop: Synapse | None, *, gated: bool
) -> tuple[Tensor, Tensor]:
    """The error at a layer's membrane, and at the drive it gets from below, ``[k, B, *output_shape]`` each."""
    error, at_drive = torch.empty_like(slope), torch.empty_like(slope)
    later: tuple[Tensor, Tensor] | None = None
    for step in range(len(slope) - 1, -1, -1):
        arriving = at_activity[step]
        if loop is not None and later is not None:
            arriving = arriving + loop.adjoint(later[1], layer.output_shape)
        error[step] = arriving * slope[step]
        later = step_back(layer.neuron, error[step], spikes[step], later, gated=gated)
        at_drive[step] = later[1]
    return error, at_drive


def _with_weight(synapse: Synapse, weight: Tensor | None) -> Synapse:
    """A synapse of the same kind with another weight, shared, not copied."""
    return synapse if weight is None else copy.deepcopy(synapse, {id(synapse.weight): weight})
