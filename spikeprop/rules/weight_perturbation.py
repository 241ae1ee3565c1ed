"""Weight perturbation (Jabri, Flower 1992; Cauwenberghs 1993): move all weights at random, keep what lowers the loss.

    dW = mean over rows of  (L(W + sigma xi) - L(W - sigma xi)) / (2 sigma)  xi        xi ~ N(0, 1), drawn anew for every row

Nothing is used but losses. The expectation of dW is exactly the gradient of E[L(W + sigma xi)], the loss smoothed by a Gaussian
(Stein's identity). With spikes the loss itself is constant between jumps, and its gradient 0; a finite sigma is what gives it a
slope. For sigma -> 0 on rate neurons dW is an unbiased estimate of backpropagation's gradient, with a variance that grows with
the number of weights.

Only layers are perturbed; the readout learns by the delta rule. The perturbed networks start every window from the state of the
unperturbed one, whose course goes on: as in truncated BPTT, credit ends at the window's start.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spikeprop.errors import InputError
from spikeprop.network import Network
from spikeprop.neuron import Activity, State
from spikeprop.rules.base import Facts
from spikeprop.rules.windowed import Stream, Window, WindowedRule, WindowedState, at_output, copies, present
from spikeprop.sensitivity import presynaptic


@dataclass(frozen=True)
class WeightPerturbation(WindowedRule):
    """The rule; see the module.

    Args:
        sigma: standard deviation of the perturbations.
        samples: pairs of perturbed networks per row.
        Others as for :class:`~spikeprop.rules.windowed.WindowedRule`.
    """

    facts = Facts(
        paper="Jabri, Flower 1992; Cauwenberghs 1993",
        backward="nothing",
        time="O(B k w samples)",
        memory="O(B w samples)",
        global_error=True,
        refuses=("conv",),
    )

    sigma: float = 0.2
    samples: int = 8

    def __post_init__(self) -> None:
        if not self.sigma > 0.0 or self.samples < 1:
            raise InputError(
                f"WeightPerturbation: sigma = {self.sigma:g} must be above 0 and samples = {self.samples} at least 1"
            )

    def memory(self, network: Network, batch_size: int, num_steps: int) -> int:
        weights = sum(weight.numel() for layer in network.layers for weight in layer.weights())
        rows = 2 * self.samples * batch_size
        own = network.readout.weight.element_size() * 4 * rows * weights
        return super().memory(network, batch_size + rows, num_steps) + own

    def window(self, network: Network, state: WindowedState, stream: Stream, x: Tensor, labels: Tensor) -> Window:
        before, count = stream.neurons, stream.count
        activities, stream.neurons = network.advance(before, x)
        stream.count, stream.steps = count + activities[-1].spikes.sum(0), stream.steps + len(x)
        output = at_output(network, stream, labels)

        pairs = self.samples * len(count)
        perturbations = []
        for index, layer in enumerate(network.layers):
            x = copies(x, 2 * self.samples, 1) if index == 0 else x
            moves = [torch.randn(pairs, *weight.shape, generator=state.generator).to(weight) for weight in layer.weights()]
            weights = [
                weight + self.sigma * torch.cat([move, -move]) for weight, move in zip(layer.weights(), moves, strict=True)
            ]
            start = type(before[index])(*(copies(part, 2 * self.samples) for part in before[index]))
            x = run_by_row(network, index, weights, start, x).spikes
            perturbations += moves
        outputs = network.readout((copies(count, 2 * self.samples) + x.sum(0)) / stream.steps)
        higher, lower = network.readout.delta(outputs, copies(present(labels), 2 * self.samples))[0].split(pairs)
        difference = (higher - lower) / (2.0 * self.sigma * pairs)
        gradients = [torch.tensordot(difference, moves, 1) for moves in perturbations]
        activity = [layer.spikes.sum((0, 1)) for layer in activities]
        loss = output.loss.expand(len(network.layers))
        return Window(output.outputs, loss, activity, [*gradients, *output.gradients])


def run_by_row(network: Network, index: int, weights: list[Tensor], state: State, x: Tensor) -> Activity:
    """A stretch ``[k, R, *input_shape]`` of a layer in which every row has weights of its own ``[R, *weight.shape]``."""
    layer, mean = network.layers[index], network.centre(index)
    *rest, bias = weights
    if layer.synapse.weight is None:
        drive, bias = layer.drive(x), bias + (network.fold_bias(index) - layer.bias)
    else:
        weight, inputs = rest[0], presynaptic(layer.synapse, x.flatten(0, 1)).unflatten(0, x.shape[:2])
        drive = torch.bmm(inputs.transpose(0, 1), weight.mT).transpose(0, 1)
        if mean is not None:
            bias = bias - (weight @ presynaptic(layer.synapse, mean.unsqueeze(0))[0]) / (1.0 - layer.neuron.alpha)
    if layer.recurrent is None:
        return layer.neuron.run(state, drive, bias)[0]
    loop, recurrent = layer.recurrent, rest[-1]
    return layer.neuron.run(
        state, drive, bias, recurrent=lambda spikes: torch.einsum("rni,ri->rn", recurrent, presynaptic(loop, spikes))
    )[0]
