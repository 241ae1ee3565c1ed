"""Node perturbation (Widrow, Lehr 1990; Werfel, Xie, Seung 2005): noise on every neuron's drive, kept where it lowers the loss.

    d_l[t] = W_l x_l[t] + sigma xi_l[t]        xi ~ N(0, 1); every row runs in pairs, with xi and with -xi
    dW_l = mean over runs of  (L(xi) - L(0)) / sigma  sum_t xi_l[t] (x) x_l[t]        x_l: what arrived in that very run

A neuron is told a number, how much the loss of the whole network changed, and multiplies it with its own noise and its input.
The expectation of dW is exactly the gradient of E[L(xi)], the loss smoothed by the noise: (xi / sigma) (x) x is the derivative
of the log-probability of the noisy drive (Stein; Williams 1992), and L(0), the loss without noise, takes variance off and adds
no bias. So spikes need no derivative. For sigma -> 0 on rate neurons it is an unbiased estimate of backpropagation's gradient,
with a variance that grows with the number of neurons and steps, not of weights.

A bias reaches the membrane beside the synaptic current; as a drive it is 1 at a window's first step and 1 - alpha at the
others. The perturbed networks start every window from the state of the unperturbed one, whose course goes on: as in truncated
BPTT, credit ends at the window's start. The readout learns by the delta rule.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from spikeprop.errors import InputError
from spikeprop.network import Network, spikes_before
from spikeprop.rules.base import Facts, layer_gradients
from spikeprop.rules.windowed import Stream, Window, WindowedRule, WindowedState, at_output, copies, present


@dataclass(frozen=True)
class NodePerturbation(WindowedRule):
    """The rule; see the module.

    Args:
        sigma: standard deviation of the noise at the drive.
        samples: pairs of perturbed runs per row.
        noise: "step" draws it anew at every step; "window" keeps it through a window. The latter varies less, and finds only
            the part of the gradient that a neuron's mean input carries: all of it for an input that is constant in time.
        Others as for :class:`~spikeprop.rules.windowed.WindowedRule`.
    """

    facts = Facts(
        paper="Widrow, Lehr 1990; Werfel, Xie, Seung 2005",
        backward="nothing",
        time="O(B k w samples)",
        memory="O(B k n samples)",
        stored_history=True,
        global_error=True,
    )

    sigma: float = 0.5
    samples: int = 8
    noise: Literal["step", "window"] = "step"

    def __post_init__(self) -> None:
        if not self.sigma > 0.0 or self.samples < 1 or self.noise not in ("step", "window"):
            raise InputError(
                f"NodePerturbation: sigma = {self.sigma:g} must be above 0, samples = {self.samples} at least 1, "
                f"and noise = {self.noise!r} 'step' or 'window'"
            )

    def memory(self, network: Network, batch_size: int, num_steps: int) -> int:
        return super().memory(network, (1 + 2 * self.samples) * batch_size, num_steps)

    def window(self, network: Network, state: WindowedState, stream: Stream, x: Tensor, labels: Tensor) -> Window:
        before, count, runs = stream.neurons, stream.count, 2 * self.samples
        activities, stream.neurons = network.advance(before, x)
        stream.count, stream.steps = count + activities[-1].spikes.sum(0), stream.steps + len(x)
        output = at_output(network, stream, labels)

        steps, drawn, arrived = len(x), [], []
        x = copies(x, runs, 1)
        for index, layer in enumerate(network.layers):
            shape = (steps if self.noise == "step" else 1, self.samples * len(count), *layer.output_shape)
            noise = torch.randn(shape, generator=state.generator).to(layer.bias)
            noise = torch.cat([noise, -noise], 1).expand(steps, *[-1] * (noise.dim() - 1))
            start = type(before[index])(*(copies(part, runs) for part in before[index]))
            activity = layer.run(start, layer.drive(x) + self.sigma * noise, network.fold_bias(index))[0]
            arrived.append([x] if layer.recurrent is None else [x, spikes_before(start, activity.spikes)])
            drawn.append(noise)
            x = activity.spikes
        targets = present(labels)
        quiet = network.readout.delta(output.outputs, targets)[0]
        outputs = network.readout((copies(count, runs) + x.sum(0)) / stream.steps)
        change = network.readout.delta(outputs, copies(targets, runs))[0] - copies(quiet, runs)
        change = change / (self.sigma * len(change) * (1 if self.noise == "step" else steps))
        gradients = []
        for index, (layer, noise, inputs) in enumerate(zip(network.layers, drawn, arrived, strict=True)):
            at_drive = change.view(-1, *[1] * len(layer.output_shape)) * noise
            synapses = [layer.synapse] if layer.recurrent is None else [layer.synapse, layer.recurrent]
            at_weights = [
                at_drive.new_zeros(())
                if synapse.weight is None
                else synapse.weight_gradient(at_drive.flatten(0, 1), arriving.flatten(0, 1))
                for synapse, arriving in zip(synapses, inputs, strict=True)
            ]
            at_bias = at_drive[0].sum(0) + (1.0 - layer.neuron.alpha) * at_drive[1:].sum((0, 1))
            gradients += layer_gradients(network, index, at_weights, at_bias)
        loss = output.loss.expand(len(network.layers))
        return Window(output.outputs, loss, [layer.spikes.sum((0, 1)) for layer in activities], [*gradients, *output.gradients])
