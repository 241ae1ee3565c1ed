"""Forward-mode differentiation: real-time recurrent learning of the spiking dynamics (Williams, Zipser 1989).

    dU[t] = beta dU_after[t-1] + dI[t] + dbias        dS[t] = f'(U[t]) dU[t]        d: the derivative by every weight
    dI[t] = alpha dI[t-1] + W dS_below[t] + V dS[t-1] + (what each weight multiplies itself)
    dL/dw = sum_B delta . W_readout sum_t dS_last[t] / steps

The derivatives of all neurons by all weights travel forward beside the state, through all layers, in time and through the
recurrence: the same gradient as BPTT over the whole sequence, with nothing stored of the past and no step back. Windows do not
truncate it. The weights change at a window's end, and what was carried so far was found with the old ones: RTRL's usual
approximation, exact in the limit of small learning rates.

Exact gradients have their price: the memory grows with weights times neurons. The structure saves a part: a weight reaches no
layer below its own and, in a layer without recurrence, no neuron but its own, so there one direction [B, n] serves one weight
of every neuron at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from spikeprop.differentiable import Dual, Forward, ResetGradient, check_reset_gradient
from spikeprop.network import Layer, Network
from spikeprop.rules.base import Facts
from spikeprop.rules.windowed import Stream, Window, WindowedRule, WindowedState, at_output
from spikeprop.sensitivity import as_weights, by_own_row, constants, row_length, step
from spikeprop.surrogate import ATan, LearnOn


@dataclass(frozen=True)
class ForwardMode(WindowedRule):
    """The rule; see the module.

    Args:
        surrogate: its derivative stands for that of the spike.
        reset_gradient: whether a derivative passes through the reset, see :mod:`spikeprop.differentiable`.
        Others as for :class:`~spikeprop.rules.windowed.WindowedRule`.
    """

    facts = Facts(
        paper="Williams, Zipser 1989",
        backward="nothing",
        time="O(B k n w)",
        memory="O(B n w)",
        global_error=True,
        refuses=("conv",),
        by_row=True,
    )

    surrogate: LearnOn = ATan()
    reset_gradient: ResetGradient = "detached"

    def initial_state(self, network: Network, *, generator: torch.Generator | None = None) -> WindowedState:
        check_reset_gradient(self, self.reset_gradient)
        return super().initial_state(network, generator=generator)

    def memory(self, network: Network, batch_size: int, num_steps: int) -> int:
        below, most, kept = 0, 0, 0
        for layer in network.layers:
            n, length = layer.rate.numel(), row_length(layer)
            present = (below + length * (1 if layer.recurrent is None else n)) * n
            most, kept = max(most, present), kept + present * (2 + (layer.recurrent is not None))
            below += length * n
        tangents = batch_size * (kept + 12 * most + below * network.outputs)
        return super().memory(network, batch_size, num_steps) + network.readout.weight.element_size() * tangents

    def window(self, network: Network, state: WindowedState, stream: Stream, x: Tensor, labels: Tensor) -> Window:
        if not stream.own:
            stream.own["count"] = Dual.constant(stream.count)
            stream.neurons = [constants(neurons) for neurons in stream.neurons]
        activity = [torch.zeros_like(layer.rate) for layer in network.layers]
        for present in x:
            below, own = Dual(present, present.new_zeros(0, *present.shape)), 0
            for index, layer in enumerate(network.layers):
                at_drive, at_bias = by_own_row(network, index, below.value, stream.neurons[index])
                tangents = [*pass_on(layer.synapse, below.tangent, own), directions(layer, at_drive)]
                drive = Dual(layer.synapse(below.value), torch.cat(tangents))
                bias: Dual | Tensor = network.fold_bias(index)
                if at_bias is not None:
                    tangent = directions(layer, at_bias)
                    nothing = tangent.new_zeros(len(drive.tangent) - len(tangent), *tangent.shape[1:])
                    bias = Dual(network.fold_bias(index), torch.cat([nothing, tangent]))
                arithmetic = Forward(self.surrogate, self.reset_gradient, layer.neuron.arithmetic)
                below, stream.neurons[index] = step(layer, stream.neurons[index], drive, bias, arithmetic)
                own = row_length(layer) if layer.recurrent is None else 0
                activity[index] += below.value.sum(0)
            stream.own["count"] = stream.own["count"] + below
        stream.count, stream.steps = stream.own["count"].value, stream.steps + len(x)
        output = at_output(network, stream, labels)

        def readout(counts: Tensor) -> Tensor:
            return F.linear(counts.flatten(1), network.readout.weight)

        outputs = torch.cat(pass_on(readout, stream.own["count"].tangent, own))
        found = torch.einsum("pbo,bo->p", outputs, output.delta) / stream.steps
        rows = found.split([layer.rate.numel() * row_length(layer) for layer in network.layers])
        gradients = [
            gradient
            for layer, part in zip(network.layers, rows, strict=True)
            for gradient in as_weights(layer, part.view(layer.rate.numel(), -1))
        ]
        loss = output.loss.expand(len(network.layers))
        return Window(output.outputs, loss, activity, [*gradients, *output.gradients])


def directions(layer: Layer, by_row: Tensor) -> Tensor:
    """Derivatives by a neuron's own row ``[B, n or 1, I]`` as tangents ``[P, B, *output_shape]``.

    Without recurrence P = I: direction i moves the i-th weight of every neuron, and no neuron sees another's. With it P = n I.
    """
    tangent = by_row.expand(-1, layer.rate.numel(), -1).permute(2, 0, 1)
    if layer.recurrent is not None:
        tangent = torch.diag_embed(tangent, dim1=0, dim2=3).flatten(0, 1)
    return tangent.unflatten(-1, layer.output_shape)


def pass_on(synapse: Callable[[Tensor], Tensor], tangent: Tensor, own: int) -> list[Tensor]:
    """Tangents ``[P, B, *features]`` through a linear map to where neurons meet, in parts.

    The last ``own`` directions, each of which moves a weight of every neuron, become ``n * own``: neuron by neuron.
    """
    together, each = tangent.split([len(tangent) - own, own])
    met = synapse(together.flatten(0, 1)).unflatten(0, together.shape[:2])
    if own == 0:
        return [met]
    shape = tangent.shape[2:]
    columns = synapse(torch.eye(shape.numel()).to(tangent).view(-1, *shape))  # what each neuron contributes
    each = each.flatten(2).permute(2, 0, 1)  # [n, own, B]
    apart = each[(..., *[None] * (columns.dim() - 1))] * columns[:, None, None]
    return [met, apart.flatten(0, 1)]
