"""Unbiased online recurrent optimisation (Tallec, Ollivier 2017, arXiv 1702.05043): RTRL's derivatives as one outer product.

The derivative of the state s by the weights, which :class:`~spikeprop.rules.forward_mode.ForwardMode` carries whole, is
estimated per row of the batch by s~ theta~^T, whose expectation it is. With random signs nu of every neuron at every step:

    a = ds[t]/ds[t-1] s~        b = ds[t]/d(drive) nu        c = nu d(drive)/dtheta = nu_j (x_i, s_i, 1) for neuron j, input i
    s~ <- rho_0 a + rho_1 b     theta~ <- theta~ / rho_0 + c / rho_1
    rho_0^2 = |theta~| / |a|    rho_1^2 = |c| / |b|          which makes both factors of either term equally long
    dL/dtheta ~ sum_B (dL/ds . s~) theta~

E[nu nu^T] = 1 makes b c^T the derivative that the step adds, and the cross terms vanish because the norms do not depend on the
common sign of nu. The paper draws signs for the whole state and finds c by a step of backpropagation through the network. Here
the noise enters at every neuron's drive: c is then local, and b travels forward through the layers above, beside a, as a second
tangent. No backward pass is left even within a step. With synaptic currents the bias, which bypasses them, has signs of its
own. The state includes the last layer's accumulated activity, on which the loss depends.

Windows do not truncate; the weights change between them, as in real-time recurrent learning.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spikeprop.differentiable import Dual, Forward, ResetGradient, check_reset_gradient
from spikeprop.network import Network
from spikeprop.rules.base import Facts
from spikeprop.rules.windowed import Stream, Window, WindowedRule, WindowedState, at_output
from spikeprop.sensitivity import as_weights, by_own_row, constants, linear, row_length, step
from spikeprop.surrogate import ATan, LearnOn

TINY = 1e-12  # keeps the quotient of two norms defined where nothing has been influenced yet


@dataclass(frozen=True)
class UORO(WindowedRule):
    """The rule; see the module. Arguments as for :class:`~spikeprop.rules.forward_mode.ForwardMode`."""

    facts = Facts(
        paper="Tallec, Ollivier 2017, arXiv 1702.05043",
        backward="nothing",
        time="O(B k w)",
        memory="O(B w)",
        global_error=True,
        refuses=("conv",),
    )

    surrogate: LearnOn = ATan()
    reset_gradient: ResetGradient = "detached"

    def initial_state(self, network: Network, *, generator: torch.Generator | None = None) -> WindowedState:
        check_reset_gradient(self, self.reset_gradient)
        return super().initial_state(network, generator=generator)

    def memory(self, network: Network, batch_size: int, num_steps: int) -> int:
        weights = sum(layer.rate.numel() * row_length(layer) for layer in network.layers)
        tangents = batch_size * (6 * weights + 20 * sum(layer.rate.numel() for layer in network.layers))
        return super().memory(network, batch_size, num_steps) + network.readout.weight.element_size() * tangents

    def window(self, network: Network, state: WindowedState, stream: Stream, x: Tensor, labels: Tensor) -> Window:
        if not stream.own:
            stream.own["count"] = Dual.constant(stream.count)
            stream.own["theta"] = [
                stream.count.new_zeros(len(stream.count), layer.rate.numel(), row_length(layer)) for layer in network.layers
            ]
            stream.neurons = [constants(neurons) for neurons in stream.neurons]
        activity = [torch.zeros_like(layer.rate) for layer in network.layers]
        for present in x:
            below, added = Dual.constant(present), []
            for index, layer in enumerate(network.layers):
                at_drive, at_bias = by_own_row(network, index, below.value, stream.neurons[index])
                noise = self.signs(state, stream.count, layer.output_shape)
                drive = with_noise(linear(layer.synapse, below), noise)
                gained = noise.flatten(1).unsqueeze(2) * at_drive
                bias: Dual | Tensor = network.fold_bias(index)
                if at_bias is not None:
                    noise = self.signs(state, stream.count, layer.output_shape)
                    bias = with_noise(Dual.constant(network.fold_bias(index)), noise)
                    gained = gained + noise.flatten(1).unsqueeze(2) * at_bias
                added.append(gained)
                arithmetic = Forward(self.surrogate, self.reset_gradient, layer.neuron.arithmetic)
                below, stream.neurons[index] = step(layer, stream.neurons[index], drive, bias, arithmetic)
                activity[index] += below.value.sum(0)
            stream.own["count"] = stream.own["count"] + below
            merge(stream, added)
        stream.count, stream.steps = stream.own["count"].value, stream.steps + len(x)
        output = at_output(network, stream, labels)
        influence = (output.at_activity * stream.own["count"].tangent[0]).flatten(1).sum(1)
        gradients = [
            gradient
            for layer, theta in zip(network.layers, stream.own["theta"], strict=True)
            for gradient in as_weights(layer, torch.tensordot(influence, theta, 1))
        ]
        loss = output.loss.expand(len(network.layers))
        return Window(output.outputs, loss, activity, [*gradients, *output.gradients])

    @staticmethod
    def signs(state: WindowedState, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Independent random signs ``[B, *shape]``."""
        return torch.randint(2, (len(like), *shape), generator=state.generator).to(like) * 2.0 - 1.0


def with_noise(x: Dual, noise: Tensor) -> Dual:
    """A value whose second tangent is moved by noise ``[B, *features]``; the first is the old influence."""
    return Dual(x.value, x.tangent + torch.stack([torch.zeros_like(noise), noise]))


def merge(stream: Stream, added: list[Tensor]) -> None:
    """Make one outer product of the old influence and what the step added; clears the second tangents for the next noise."""
    count, theta = stream.own["count"], stream.own["theta"]
    moved = [part for part in (*(part for neurons in stream.neurons for part in neurons), count) if not part.is_constant]
    old, fresh = (length([part.tangent[direction] for part in moved]) for direction in (0, 1))
    rho_0, rho_1 = (length(theta) / old).sqrt(), (length(added) / fresh).sqrt()

    def merged(part: Dual) -> Dual:
        if part.is_constant:
            return part
        both = by_row(rho_0, part.tangent[0]) * part.tangent[0] + by_row(rho_1, part.tangent[1]) * part.tangent[1]
        return Dual(part.value, torch.stack([both, torch.zeros_like(both)]))

    stream.neurons = [type(neurons)(*(merged(part) for part in neurons)) for neurons in stream.neurons]
    stream.own["count"] = merged(count)
    stream.own["theta"] = [
        before / by_row(rho_0, before) + gained / by_row(rho_1, gained) for before, gained in zip(theta, added, strict=True)
    ]


def length(parts: list[Tensor]) -> Tensor:
    """The Euclidean length of every row of several tensors ``[B, ...]`` together, never quite 0: ``[B]``."""
    return torch.cat([part.flatten(1) for part in parts], 1).norm(dim=1) + TINY


def by_row(factor: Tensor, like: Tensor) -> Tensor:
    """A factor per row ``[B]`` in a shape that multiplies ``[B, ...]``."""
    return factor.view(-1, *[1] * (like.dim() - 1))
