"""The frame that most rules share: a sequence in windows, one update at the end of each.

:class:`WindowedRule` does what is the same for all of them: it carries the sequence's state from window to window, hands
gradients to the optimiser, follows the firing rates and keeps the rule's own weights. A rule implements ``window``: what went
through the network in some steps, and the gradients that follow from it.

:class:`LayerwiseRule` narrows that down to rules of the form *error at the membrane times eligibility*: it runs the network,
and a rule implements ``errors``. Nothing here records an autograd graph.

The objective of every rule with an error at the output is the same: the cross-entropy (or squared error) of the readout on the
last layer's mean activity since the sequence began, evaluated at the window's end.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from spikeprop.differentiable import slope
from spikeprop.errors import InputError
from spikeprop.homeostasis import Homeostasis
from spikeprop.network import Layer, Network, spikes_before
from spikeprop.neuron import State
from spikeprop.rules.base import (
    Answer,
    OptimizerFactory,
    Rule,
    check_labels,
    descend,
    follow_rates,
    layer_gradients,
    learned_by,
    make_optimizer,
)
from spikeprop.surrogate import ATan, LearnOn
from spikeprop.team import Share
from spikeprop.traces import Eligibility, Source, eligibility


@dataclass
class Stream:
    """A sequence in progress: where its neurons stand, what the last layer has done ``[B, *features]`` in how many steps."""

    neurons: list[State]
    count: Tensor
    steps: int = 0
    eligibilities: list[Eligibility] = field(default_factory=list)
    own: dict[str, Any] = field(default_factory=dict)  # what a rule carries through a sequence besides


@dataclass
class WindowedState:
    """What a rule carries along.

    ``own``: the rule's own weights by name, learned or fixed; ``parameters``: all that the optimiser moves, the network's
    tensors and then the learned ones among ``own``; ``generator``: the rule's random numbers; ``stream``: one per sequence;
    ``share``: which part of the batch this process has, if others have the rest.
    """

    optimizer: torch.optim.Optimizer
    parameters: list[Tensor]
    own: dict[str, Tensor]
    generator: torch.Generator
    stream: Stream | None = None
    share: Share | None = None


class Window(NamedTuple):
    """What came of a window: outputs ``[B, outputs]``, loss per layer ``[layers]``, and per layer the activity summed over rows
    and steps; gradients in the order of ``state.parameters``.
    """

    outputs: Tensor
    loss: Tensor
    activity: list[Tensor]
    gradients: list[Tensor]


@dataclass(frozen=True)
class WindowedRule(Rule):
    """Base of rules that update once per window.

    Args:
        update_every: steps per window; None makes each call of ``learn`` one window. The end of a call ends a window, too.
        optimizer: makes any ``torch.optim`` optimiser that only reads ``.grad`` from a list of tensors.
        homeostasis: the band that holds every neuron's rate, or None.
    """

    update_every: int | None = None
    optimizer: OptimizerFactory = partial(torch.optim.Adam, lr=4e-3, fused=True)
    homeostasis: Homeostasis | None = None

    def own_weights(self, network: Network, generator: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The rule's own weights, by name: those that learn, and those that stay as they are drawn."""
        return {}, {}

    def window(self, network: Network, state: WindowedState, stream: Stream, x: Tensor, labels: Tensor) -> Window:
        """Run some steps ``x [k, B, *input_shape]``, move the stream on, and say what to change.

        ``labels``: classes per step ``[k, B]``, or real vectors ``[B, outputs]``.
        """
        raise NotImplementedError

    def initial_state(self, network: Network, *, generator: torch.Generator | None = None) -> WindowedState:
        self.check(network)
        if self.update_every is not None and self.update_every < 1:
            raise InputError(
                f"{type(self).__name__}: update_every = {self.update_every} must be at least 1, or None for once per call"
            )
        for layer in network.layers:
            if self.homeostasis is not None:
                self.homeostasis.prepare(layer)
        network.target = None  # another rule's, whose class responses this training would make stale
        seed = int(torch.randint(2**62, (), generator=generator))
        own_generator = torch.Generator().manual_seed(seed)
        learned, fixed = self.own_weights(network, own_generator)
        parameters = [*learned_by(network), *learned.values()]
        return WindowedState(make_optimizer(self.optimizer, parameters), parameters, learned | fixed, own_generator)

    def begin(self, state: WindowedState) -> WindowedState:
        return replace(state, stream=None)

    def tensors(self, state: WindowedState) -> dict[str, Tensor]:
        return {"generator": state.generator.get_state(), **{f"own.{name}": tensor for name, tensor in state.own.items()}}

    def restore(self, state: WindowedState, tensors: dict[str, Tensor]) -> None:
        state.generator.set_state(tensors["generator"])
        for name, tensor in state.own.items():
            tensor.copy_(tensors[f"own.{name}"])

    @torch.no_grad()
    def learn(self, network: Network, state: WindowedState, inputs: Tensor, labels: Tensor) -> tuple[Answer, WindowedState]:
        network.check(inputs)
        labels = check_labels(network, inputs, labels)
        batch = inputs.shape[1]
        if state.stream is None:
            self.check(network, batch)
            neurons = network.initial_state(batch)
            state.stream = Stream(neurons, torch.zeros_like(neurons[-1].membrane))
        stream = state.stream
        if len(stream.count) != batch:
            raise InputError(
                f"{type(self).__name__}: the sequence began with a batch of {len(stream.count)} and goes on with one of "
                f"{batch}; call rule.begin(state) before a new sequence"
            )
        found, steps = [], self.update_every or len(inputs)
        for start in range(0, len(inputs), steps):
            x = inputs[start : start + steps]
            window = self.window(network, state, stream, x, labels if network.regression else labels[start : start + steps])
            descend(state.optimizer, state.parameters, window.gradients, state.share)
            rates = [part / (len(x) * batch) for part in window.activity]
            follow_rates(network, rates, batch, self.homeostasis, state.share)
            found.append(window)
        activity = [
            torch.stack(parts).sum(0) / (len(inputs) * batch) for parts in zip(*(w.activity for w in found), strict=True)
        ]
        return Answer(found[-1].outputs, torch.stack([w.loss for w in found]).mean(0), activity), state


class Passage(NamedTuple):
    """What went through one layer in a window of k steps.

    ``inputs [k, B, *input_shape]``, ``spikes`` and pre-reset ``membrane`` ``[k, B, *output_shape]``, the neurons' state before
    the first step, and ``slope``, dS/dU by the surrogate.
    """

    layer: Layer
    inputs: Tensor
    spikes: Tensor
    membrane: Tensor
    before: State
    slope: Tensor


def present(labels: Tensor) -> Tensor:
    """The targets that hold at a window's end: classes ``[B]`` of the last step, or real vectors ``[B, outputs]``."""
    return labels if labels.is_floating_point() else labels[-1]


def copies(x: Tensor, number: int, dim: int = 0) -> Tensor:
    """The rows of a batch ``number`` times over."""
    return torch.cat([x] * number, dim)


class AtOutput(NamedTuple):
    """What the readout makes of a window's end. ``delta [B, outputs]`` is the derivative of the mean loss by the outputs;
    ``at_activity [B, *features]`` that by the last layer's activity at any one step of the window; ``steps``: since the
    sequence began, over which the activity was averaged.
    """

    outputs: Tensor
    loss: Tensor
    delta: Tensor
    at_activity: Tensor
    gradients: list[Tensor]
    steps: int


def at_output(network: Network, stream: Stream, labels: Tensor) -> AtOutput:
    """Outputs, loss and their derivatives at the readout, from the mean activity so far."""
    rates = stream.count / stream.steps
    outputs = network.readout(rates)
    loss, delta = network.readout.delta(outputs, present(labels))
    delta = delta / len(delta)
    at_activity = (delta @ network.readout.weight / stream.steps).view_as(stream.count)
    return AtOutput(outputs, loss.mean(), delta, at_activity, [delta.T @ rates.flatten(1), delta.sum(0)], stream.steps)


class Errors(NamedTuple):
    """What a layerwise rule makes of a window: per layer an error at the membrane ``[k, B, *output_shape]`` (None: the layer
    does not learn) and a loss; and the gradients of the rule's own learned weights.
    """

    at_membrane: list[Tensor | None]
    loss: list[Tensor]
    own: list[Tensor] = []  # noqa: RUF012 - never changed


@dataclass(frozen=True)
class LayerwiseRule(WindowedRule):
    """Base of rules of the form *error at the membrane times eligibility*.

    Args:
        surrogate: its derivative stands for that of the spike; rate neurons have a derivative of their own.
        trace: how far a synapse is responsible for a membrane: "exact" (within the window, a spike wipes its neuron's trace) or
            "shared" (one per input).
        Others as for :class:`WindowedRule`.
    """

    surrogate: LearnOn = ATan()
    trace: Literal["shared", "exact"] = "exact"

    def errors(
        self, network: Network, state: WindowedState, passages: list[Passage], labels: Tensor, output: AtOutput
    ) -> Errors:
        """The error of every layer, from what went through all of them. ``labels`` as for ``window``."""
        raise NotImplementedError

    def window(self, network: Network, state: WindowedState, stream: Stream, x: Tensor, labels: Tensor) -> Window:
        passages = self.run(network, stream, x)
        output = at_output(network, stream, labels)
        errors = self.errors(network, state, passages, labels, output)
        gradients = self.collect(network, stream, passages, errors.at_membrane)
        activity = [passage.spikes.sum((0, 1)) for passage in passages]
        return Window(output.outputs, torch.stack(errors.loss), activity, [*gradients, *output.gradients, *errors.own])

    def run(self, network: Network, stream: Stream, x: Tensor) -> list[Passage]:
        """Some steps through all layers; moves the stream on."""
        passages = []
        for index, layer in enumerate(network.layers):
            before = stream.neurons[index]
            (spikes, membrane), stream.neurons[index] = layer.run(before, layer.drive(x), network.fold_bias(index))
            slopes = slope(layer.neuron, self.surrogate, membrane)
            passages.append(Passage(layer, x, spikes, membrane, before, slopes))
            x = spikes
        stream.count = stream.count + x.sum(0)
        stream.steps += len(x)
        return passages

    def collect(self, network: Network, stream: Stream, passages: list[Passage], errors: list[Tensor | None]) -> list[Tensor]:
        """Gradients of all layers' weights, as ``learned_by`` orders them, from errors at the membranes."""
        if not stream.eligibilities:
            stream.eligibilities = [eligibility(layer, sources(layer), exact=self.trace == "exact") for layer in network.layers]
        gradients = []
        for index, (passage, error) in enumerate(zip(passages, errors, strict=True)):
            if error is None:
                gradients += [torch.zeros_like(weight) for weight in passage.layer.weights()]
                continue
            arriving = [passage.inputs]
            if passage.layer.recurrent is not None:
                arriving.append(spikes_before(passage.before, passage.spikes))
            stream.eligibilities[index].observe(arriving, error, passage.spikes)
            gradients += layer_gradients(network, index, *stream.eligibilities[index].collect())
        return gradients


def sources(layer: Layer) -> list[Source]:
    """The synapses into a layer, each of which drives all of its rows."""
    return [Source(synapse, slice(None)) for synapse in (layer.synapse, layer.recurrent) if synapse is not None]
