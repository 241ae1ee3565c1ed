"""Signal Propagation on spiking networks (Kohan, Rietman, Siegelmann, arXiv 2204.01723).

The target travels forward through the same network as the input, as extra rows: one per class, which enter the first layer through
synapses of their own and share every weight after it. Each layer learns while the two pass through it:

    h = phi(U of the input rows) [B, n]        t = phi(U of the target rows) [C, n]
    L = cross_entropy(similarity(h, t) / temperature, label)
    e = dL/dU = dL/dphi phi'(U)                        closed form; the spike function is never differentiated
    dW += e^T trace                                    trace: the membrane's own filter of the presynaptic activity

Nothing crosses a layer or an update window backwards, so all of it runs under ``torch.inference_mode()``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from spikeprop.errors import InputError
from spikeprop.homeostasis import Homeostasis
from spikeprop.losses import LocalLoss, SimilarityCrossEntropy
from spikeprop.network import Network, is_constant
from spikeprop.neuron import NeuronState
from spikeprop.rules.base import Answer, OptimizerFactory, Rule, check_labels, descend, make_optimizer
from spikeprop.signals import FixedProjection, LearnedProjection
from spikeprop.surrogate import LearnOn, Membrane
from spikeprop.traces import Eligibility, Source, eligibility


@dataclass
class SigPropState:
    """What :class:`SigProp` carries along. ``optimizer`` and ``means`` live as long as the training, the rest one sequence."""

    optimizer: torch.optim.Optimizer
    parameters: list[Tensor]
    means: list[Tensor | None]  # per layer: running mean of phi over input rows, for batches of one
    neurons: Sequence[NeuronState[Tensor]] | None = None
    eligibilities: list[Eligibility] = field(default_factory=list)
    count: Tensor | None = None  # activity of the last layer summed since the sequence began [B, n]
    steps: int = 0  # since the sequence began
    window: int = 0  # steps since the last update
    activity: list[Tensor | float] = field(default_factory=list)  # per layer, summed over the window's steps and rows
    phi: list[Tensor | float] = field(default_factory=list)


@dataclass(frozen=True)
class SigProp(Rule):
    """The rule and its settings.

    Args:
        learn_on: ``Membrane()``, ``Membrane(clip=None)`` (raw), or a surrogate: ``ATan()``, ``Sigmoid()``, ``FastSigmoid()``.
        loss: local loss of every layer.
        target: how labels enter the first layer, learned or fixed.
        trace: "shared" (online, one trace per input) or "exact" (a spike wipes its neuron's trace; buffers the window).
        update_every: steps between weight updates; None updates once, at the end of each call of ``learn``.
        optimizer: makes any ``torch.optim`` optimiser that only reads ``.grad`` from a list of tensors.
        homeostasis: the band that holds every neuron's rate, or None.
    """

    learn_on: LearnOn = Membrane()
    loss: LocalLoss = SimilarityCrossEntropy()
    target: LearnedProjection | FixedProjection = LearnedProjection()
    trace: Literal["shared", "exact"] = "shared"
    update_every: int | None = None
    optimizer: OptimizerFactory = partial(torch.optim.Adam, lr=4e-3, fused=True)
    homeostasis: Homeostasis | None = Homeostasis()

    def initial_state(self, network: Network, *, generator: torch.Generator | None = None) -> SigPropState:
        if self.update_every is not None and self.update_every < 1:
            raise InputError(f"SigProp: update_every = {self.update_every} must be at least 1, or None for once per call")
        for layer in network.layers:
            if self.homeostasis is not None:
                self.homeostasis.prepare(layer)
        target = network.attach_target(scale=self.target.scale, learned=self.target.learned, generator=generator)
        weights = [layer.synapse.weight for layer in network.layers if layer.synapse.weight is not None]
        parameters = [*weights, *(layer.bias for layer in network.layers), *network.readout.parameters()]
        parameters += [target.weight] if target.learned else []
        return SigPropState(make_optimizer(self.optimizer, parameters), parameters, [None] * len(network.layers))

    def begin(self, state: SigPropState) -> SigPropState:
        return SigPropState(state.optimizer, state.parameters, state.means)

    def tensors(self, state: SigPropState) -> dict[str, Tensor]:
        return {str(index): mean for index, mean in enumerate(state.means) if mean is not None}

    def restore(self, state: SigPropState, tensors: dict[str, Tensor]) -> None:
        for index, mean in tensors.items():
            state.means[int(index)] = mean

    @torch.inference_mode()
    def learn(self, network: Network, state: SigPropState, inputs: Tensor, labels: Tensor) -> tuple[Answer, SigPropState]:
        network.check(inputs)
        labels = check_labels(network, inputs, labels)
        if inputs.shape[1] < self.loss.smallest_batch or (network.regression and inputs.shape[1] < 2):
            raise InputError(
                f"SigProp: a batch of {inputs.shape[1]} has no pairs to compare, which {type(self.loss).__name__} with "
                f"{'real targets' if network.regression else 'class targets'} learns from; use a batch of at least 2"
            )
        losses, seen, start = [], [], 0
        while start < len(inputs):
            stop = len(inputs) if self.update_every is None else min(len(inputs), start + self.update_every - state.window)
            present = labels if network.regression else labels[start:stop]
            loss, activity = self._propagate(network, state, inputs[start:stop], present)
            outputs, delta = self._answer(network, state, present if network.regression else present[-1])
            losses.append(loss)
            seen.append(activity)
            if state.window == self.update_every or (self.update_every is None and stop == len(inputs)):
                self._update(network, state, delta)
            start = stop
        with torch.inference_mode(False):  # what the caller keeps are ordinary tensors
            state.neurons = [NeuronState(*(part.clone() for part in neurons)) for neurons in state.neurons or ()]
            mean = [sum(parts).div(inputs.shape[0] * inputs.shape[1]) for parts in zip(*seen, strict=True)]
            return Answer(outputs.clone(), torch.stack(losses).sum(0).div(len(inputs)), mean), state

    def _propagate(self, network: Network, state: SigPropState, x: Tensor, labels: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Both streams through every layer for k steps; local losses summed over steps, activity summed over steps and rows."""
        steps, batch = x.shape[:2]
        if network.regression:  # every sample is its own context
            targets, labels = labels, torch.arange(batch, device=x.device).expand(steps, batch)
        else:
            targets = torch.eye(network.outputs, dtype=x.dtype, device=x.device)
        targets = targets.expand(steps, *targets.shape)
        if state.neurons is None:
            self._rest(network, state, batch, targets.shape[1])
        losses, activities, states = [], [], []
        for index, layer in enumerate(network.layers):
            drive, sources = layer.drive(x), [x]
            if index == 0:
                context = network.target(targets[0]).expand(steps, -1, *layer.output_shape)
                drive, sources = torch.cat([drive, context], 1), [x, targets]
            (spikes, membrane), neurons = layer.neuron.run(state.neurons[index], drive, network.fold_bias(index))

            phi, slope = self.learn_on(membrane, layer.neuron.threshold)
            phi = phi.flatten(2)
            loss, dh, dt = self.loss(phi[:, :batch], phi[:, batch:], labels, state.means[index] if batch == 1 else None)
            error = torch.cat([dh, dt], 1).view_as(membrane)
            state.eligibilities[index].observe(sources, error if slope is None else error * slope, spikes)

            losses.append(loss.sum())
            activities.append(spikes[:, :batch].sum((0, 1)))
            states.append(neurons)
            state.activity[index] = state.activity[index] + activities[index]
            state.phi[index] = state.phi[index] + phi[:, :batch].sum((0, 1))
            x = spikes
        state.neurons = states
        state.count = state.count + x[:, :batch].sum(0)
        state.steps += steps
        state.window += steps
        return torch.stack(losses), activities

    def _rest(self, network: Network, state: SigPropState, batch: int, contexts: int) -> None:
        """The start of a sequence: membranes, traces and counts at zero."""
        state.neurons = network.initial_state(batch + contexts)
        for index, layer in enumerate(network.layers):
            sources = [Source(layer.synapse, slice(None))]
            if index == 0:
                sources = [Source(layer.synapse, slice(0, batch)), Source(network.target, slice(batch, None))]
            state.eligibilities.append(eligibility(layer, sources, exact=self.trace == "exact"))
        state.count = 0.0
        state.activity, state.phi = [0.0] * len(network.layers), [0.0] * len(network.layers)

    def _answer(self, network: Network, state: SigPropState, targets: Tensor) -> tuple[Tensor, Tensor]:
        outputs = network.readout(state.count / state.steps)
        return outputs, network.readout.delta(outputs, targets)[1]

    def _update(self, network: Network, state: SigPropState, delta: Tensor) -> None:
        """One step of the optimiser, then homeostasis and the running means, all from this window alone."""
        batch = len(delta)
        weights, biases, target = [], [], []
        for index, layer in enumerate(network.layers):
            gradients, at_bias = state.eligibilities[index].collect()
            if layer.synapse.weight is not None:
                mean, weight = network.centre(index), gradients[0]
                if mean is not None:  # the folded bias depends on the weights too
                    through = (at_bias / (1.0 - layer.neuron.alpha)).unsqueeze(0)
                    weight = weight - layer.synapse.weight_gradient(through, mean.unsqueeze(0))
                weights.append(weight / state.window)
            biases.append(at_bias.sum_to_size(layer.bias.shape) / state.window)
            target += [gradients[1] / state.window] if index == 0 and network.target.learned else []
        readout = [delta.T @ (state.count.flatten(1) / state.steps) / batch, delta.mean(0)]
        descend(state.optimizer, state.parameters, [*weights, *biases, *readout, *target])

        for index, layer in enumerate(network.layers):
            samples = state.window * batch
            Homeostasis.follow(layer, state.activity[index] / samples, batch)
            if self.homeostasis is not None:
                self.homeostasis.regulate(layer, batch)
            mean = state.phi[index] / samples
            state.means[index] = mean if state.means[index] is None else state.means[index].lerp(mean, min(0.1, batch / 128))
            state.activity[index], state.phi[index] = 0.0, 0.0
        state.window = 0
