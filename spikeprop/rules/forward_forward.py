"""Forward-forward (Hinton 2022, arXiv 2212.13345): each layer is to be lively on true data and quiet on false data.

True is an input with its own label, false the same input with a wrong one. A layer's goodness is the mean over its neurons of
the squared activity, which on spiking neurons (the form here is ours) is the rate r since the sequence began:

    G = mean_i r_i^2        L = softplus((theta - G_true) / T) + softplus((G_false - theta) / T)
    e[t] = dL/dr f'(U[t]) / steps          dW = sum_t e[t]^T trace[t]

Every layer descends its own loss; nothing passes from one to another but activity. The label, as one-hot minus 1/C, enters the
neurons of layer 1 through synapses of its own, which is the same as concatenating it with the input. Hinton's neutral label,
1/C for each class, is then no drive at all: the plain network's forward pass is his one-pass classification, and the readout
learns by the delta rule on a third, neutral pass. The other way, all labels in turn, is :func:`predict_by_goodness`.

Hinton divides a layer's activity by its length before the next layer sees it, or that could read the goodness off the length.
Spikes have no length to divide by, and a network must run as it was trained; here only the centring of layers stands against
it, and takes away no more than the mean. The cost grows with depth: on digits the neutral readout of one, two, three layers of
32 neurons reaches .93, .93, .83, goodness .90, .93, .90.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from spikeprop.differentiable import slope
from spikeprop.errors import InputError
from spikeprop.network import Network, is_constant
from spikeprop.neuron import State
from spikeprop.rules.base import Facts
from spikeprop.rules.windowed import LayerwiseRule, Passage, Stream, Window, WindowedState, at_output
from spikeprop.surrogate import ATan, LearnOn
from spikeprop.traces import Source, eligibility

Negative = Literal["confident", "uniform"]


@dataclass(frozen=True)
class ForwardForward(LayerwiseRule):
    """The rule; see the module.

    Args:
        threshold: theta, between the goodness of true and of false data; on spiking neurons between 0 and 1.
        temperature: T; small ones leave a row alone soon after it is on the right side. 1 / neurons makes G / T Hinton's sum.
        negative: how the wrong label of a row is drawn, once per sequence: "confident", in proportion to what the readout
            believes on the neutral pass of the sequence's first window, or "uniform".
        scale: the label's weights start from N(0, scale^2); they are saved with the network.
        trace: "shared" learns faster here, which is why it is the default.
        Others as for :class:`~spikeprop.rules.windowed.LayerwiseRule`.
    """

    facts = Facts(
        paper="Hinton 2022, arXiv 2212.13345",
        backward="nothing",
        time="O(B k w)",
        memory="O(B k n)",
        extra_weights="label synapses into layer 1, learned",
        stored_history=True,
        global_error=True,  # the readout's belief, by which wrong labels are drawn
        refuses=("regression",),
    )

    threshold: float = 0.3
    temperature: float = 0.025
    negative: Negative = "confident"
    scale: float = 0.5
    trace: Literal["shared", "exact"] = "shared"

    def __post_init__(self) -> None:
        if self.negative not in get_args(Negative):
            raise InputError(f"ForwardForward: negative = {self.negative!r} is not one of {get_args(Negative)}")
        if not self.temperature > 0:
            raise InputError(f"ForwardForward: temperature = {self.temperature} must be above 0")
        if self.negative == "uniform":  # nothing from the output then reaches a layer
            object.__setattr__(self, "facts", replace(self.facts, global_error=False))

    def check(self, network: Network, batch_size: int | None = None) -> None:
        super().check(network, batch_size)
        if network.outputs < 2:
            raise InputError(
                f"ForwardForward: a network of {network.outputs} class has no wrong labels; build one of 2 or more"
            )

    def memory(self, network: Network, batch_size: int, num_steps: int) -> int:
        return super().memory(network, 3 * batch_size, num_steps)  # neutral, true and false rows

    def own_weights(self, network: Network, generator: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return {"label": network.attach_target(scale=self.scale, beside_input=True, generator=generator).weight}, {}

    def window(self, network: Network, state: WindowedState, stream: Stream, x: Tensor, labels: Tensor) -> Window:
        neutral = self.run(network, stream, x)
        output = at_output(network, stream, labels)
        if not stream.own:
            label = Source(network.attach_target(beside_input=True), slice(None))
            stream.own = {
                "shift": self.wrong(output.outputs, labels[-1], state.generator) - labels[-1],
                "neurons": network.initial_state(2 * len(output.outputs)),
                "count": [torch.zeros_like(layer.rate) for layer in network.layers],
                "label": eligibility(network.layers[0], [label], exact=self.trace == "exact"),
            }
        classes = torch.cat([labels, (labels + stream.own["shift"]) % network.outputs], 1)
        passages = labelled(network, stream.own["neurons"], repeated(x, 2), classes, self.surrogate)

        errors: list[Tensor | None] = []
        losses = []
        for index, passage in enumerate(passages):
            stream.own["count"][index] = stream.own["count"][index] + passage.spikes.sum(0)
            loss, at_rate = self.loss(stream.own["count"][index] / stream.steps)
            errors.append(at_rate / stream.steps * passage.slope)
            losses.append(loss)
        gradients = self.collect(network, stream, passages, errors)
        assert errors[0] is not None
        stream.own["label"].observe([code(network, classes)], errors[0], passages[0].spikes)
        (at_label,), _ = stream.own["label"].collect()
        activity = [passage.spikes.sum((0, 1)) for passage in neutral]
        return Window(output.outputs, torch.stack(losses), activity, [*gradients, *output.gradients, at_label])

    def wrong(self, outputs: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """A class ``[B]`` other than the row's own."""
        belief = outputs if self.negative == "confident" else torch.zeros_like(outputs)
        belief = belief.scatter(1, labels.unsqueeze(1), -torch.inf).softmax(1)
        return torch.multinomial(belief.cpu(), 1, generator=generator).squeeze(1).to(labels)

    def loss(self, rates: Tensor) -> tuple[Tensor, Tensor]:
        """The local loss of a layer, from rates of the true rows and then the false ones; its derivative by the rates."""
        rows = len(rates) // 2
        sign = torch.tensor([-1.0, 1.0]).repeat_interleave(rows).to(rates)
        excess = sign * (goodness(rates) - self.threshold) / self.temperature
        at_goodness = sign * excess.sigmoid() / (self.temperature * rows)
        by_row = at_goodness.view(-1, *[1] * (rates.dim() - 1))
        return F.softplus(excess).sum() / rows, by_row * rates * (2.0 / rates[0].numel())


def goodness(rates: Tensor) -> Tensor:
    """Mean squared activity of a layer, ``[R, *features]`` to ``[R]``."""
    return rates.flatten(1).square().mean(1)


def code(network: Network, classes: Tensor) -> Tensor:
    """Classes to what the label synapses see: one-hot minus 1/C."""
    return F.one_hot(classes, network.outputs).to(network.readout.weight) - 1.0 / network.outputs


def repeated(x: Tensor, times: int) -> Tensor:
    """The rows of ``[k, B, ...]`` several times over, still one product for all steps if x is constant."""
    if is_constant(x):
        return torch.cat([x[0]] * times).expand(len(x), -1, *x.shape[2:])
    return torch.cat([x] * times, 1)


def labelled(network: Network, neurons: list[State], x: Tensor, classes: Tensor, surrogate: LearnOn) -> list[Passage]:
    """Inputs ``[k, R, *input_shape]`` and their labels ``[k, R]`` through all layers; moves ``neurons`` on."""
    passages = []
    for index, layer in enumerate(network.layers):
        before, drive = neurons[index], layer.drive(x)
        if index == 0:
            drive = drive + network.attach_target(beside_input=True)(code(network, classes).flatten(0, 1)).view_as(drive)
        (spikes, membrane), neurons[index] = layer.run(before, drive, network.fold_bias(index))
        passages.append(Passage(layer, x, spikes, membrane, before, slope(layer.neuron, surrogate, membrane)))
        x = spikes
    return passages


@torch.no_grad()
def predict_by_goodness(network: Network, inputs: Tensor) -> Tensor:
    """The class ``[B]`` under whose label the goodness of all layers is the largest in sum, for inputs ``[T, B,
    *input_shape]``.

    Runs the sequence once per class.
    """
    network.check(inputs)
    if network.target is None or not network.target.beside_input:
        raise InputError("predict_by_goodness: the network has no label synapses; train it with ForwardForward first")
    steps, batch = inputs.shape[:2]
    classes = torch.arange(network.outputs, device=inputs.device).repeat_interleave(batch)
    neurons = network.initial_state(len(classes))
    passages = labelled(network, neurons, repeated(inputs, network.outputs), classes.expand(steps, -1), ATan())
    total = torch.stack([goodness(passage.spikes.mean(0)) for passage in passages]).sum(0)
    return total.view(network.outputs, batch).argmax(0)
