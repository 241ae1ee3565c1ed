"""Signal Propagation on spiking networks (Kohan, Rietman, Siegelmann, arXiv 2204.01723).

The target travels forward through the same network as the input, as extra rows: one per class, which enter the first layer
beside the mean input, through synapses of their own, and share every weight after it. Each layer learns while the two pass:

    h = phi(U of the input rows) [B, n]        t = phi(U of the target rows) [C, n]
    L = cross_entropy(similarity(h, t) / temperature, label)
    e = dL/dU = dL/dphi phi'(U)                        closed form; the spike function is never differentiated
    dW += e^T trace                                    trace: the membrane's own filter of the presynaptic activity

U, the target's drive and the learning rate are measured in units of the layer's threshold (its mean, if there are several), so
that learning does not depend on the scale in which a layer is written down.

Nothing crosses a layer or an update window backwards, so all of it runs under ``torch.inference_mode()``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from spikeprop import fused
from spikeprop.errors import InputError
from spikeprop.fused import Local
from spikeprop.homeostasis import Homeostasis
from spikeprop.losses import LocalLoss, SimilarityCrossEntropy
from spikeprop.network import Layer, Network, is_constant, spikes_before
from spikeprop.neuron import Neuron, State
from spikeprop.rules.base import (
    Answer,
    Facts,
    OptimizerFactory,
    Rule,
    check_labels,
    descend,
    follow_rates,
    layer_gradients,
    learned_by,
    make_optimizer,
)
from spikeprop.signals import FixedProjection, LearnedProjection
from spikeprop.surrogate import LearnOn, Membrane
from spikeprop.team import Share
from spikeprop.traces import Eligibility, SharedTrace, Source, eligibility

# Numbers of a layer's activity worked on at a time: on a CPU so few that what follows from them is still in the cache, on a GPU
# so many that the start of an operation does not count.
CACHED, LAUNCHED = 2**18, 2**24
READINGS = 5  # of the membrane by the local loss in an update window, that are always enough


@dataclass
class Stream:
    """A sequence in progress: where its neurons, traces and counts stand."""

    neurons: list[State]  # per layer, B + C rows
    eligibilities: list[Eligibility]
    count: Tensor  # activity of the last layer since the sequence began [B, *features]
    spikes: Tensor  # of the last layer, in all rows, in the last steps that passed
    activity: list[Tensor]  # per layer, summed over the rows and steps since the last update
    phi: list[Tensor]  # what the losses read, summed likewise
    regions: list[Tensor | None]  # per layer, see :func:`region_means`
    steps: int = 0  # since the sequence began
    window: int = 0  # since the last update
    readings: list[int] = field(default_factory=list)  # per layer, of the loss since the last update


@dataclass
class SigPropState:
    """What :class:`SigProp` carries along: optimiser and running means as long as the training lasts, a stream per sequence."""

    optimizer: torch.optim.Optimizer
    parameters: list[Tensor]
    means: list[Tensor | None]  # per layer: running mean of phi over input rows, for batches of one
    stream: Stream | None = None
    share: Share | None = None  # which part of the batch this process has, if others have the rest
    entered: bool = False  # whether the rows that come hold the contexts already: the network is the upper part of another one


@dataclass(frozen=True)
class SigProp(Rule):
    """The rule and its settings.

    Args:
        learn_on: ``Membrane()``, ``Membrane(clip=None)`` (raw), or a surrogate: ``ATan()``, ``Sigmoid()``, ``FastSigmoid()``.
        loss: local loss of every layer.
        target: how labels enter the first layer, learned or fixed.
        regions: the loss reads phi of a convolutional layer as means over ``regions x regions`` parts of each map, so that a
            feature may stand anywhere in its part; None, and maps that are no larger, are read neuron by neuron.
        trace: "shared" (online, one trace per input and row) or "exact" (a spike wipes its neuron's trace; buffers one update
            window, and wants about half the learning rate).
        update_every: steps between weight updates; None updates once, at the end of each call of ``learn``. Steps left over
            when a sequence ends are not learned from.
        read_every: steps between the local loss's readings of the membrane, counted within the window. None: as many as change
            the update little: half a membrane time constant, but at least five readings per window; and every step where the
            trace is exact or decays differ in the layer (credit is then a scan over all steps anyway).
        optimizer: makes any ``torch.optim`` optimiser that only reads ``.grad`` from a list of tensors (or of parameter groups,
            if a threshold is not 1). Its learning rate is that of weights in units of their layer's threshold.
        homeostasis: the band that holds every neuron's rate, or None.
    """

    facts = Facts(
        paper="Kohan, Rietman, Siegelmann 2022, arXiv 2204.01723",
        backward="nothing",
        time="O(B k w)",
        memory="O(B n)",
        extra_weights="target synapses into layer 1",
        by_row=True,
    )

    learn_on: LearnOn = Membrane()
    loss: LocalLoss = SimilarityCrossEntropy()
    target: LearnedProjection | FixedProjection = LearnedProjection()
    regions: int | None = 4
    trace: Literal["shared", "exact"] = "shared"
    update_every: int | None = None
    read_every: int | None = None
    optimizer: OptimizerFactory = partial(torch.optim.Adam, lr=4e-3, fused=True)
    homeostasis: Homeostasis | None = Homeostasis()

    def __post_init__(self) -> None:
        if self.trace == "exact":  # it buffers a window
            object.__setattr__(self, "facts", replace(self.facts, memory="O(B k n)", stored_history=True))

    def check(self, network: Network, batch_size: int | None = None) -> None:
        super().check(network, batch_size)
        smallest = max(self.loss.smallest_batch, 2 if network.regression else 1)
        if batch_size is not None and batch_size < smallest:
            raise InputError(
                f"SigProp: a batch of {batch_size} has no pairs to compare, which {type(self.loss).__name__} with "
                f"{'real targets' if network.regression else 'class targets'} learns from; use a batch of at least {smallest}"
            )

    def by_row(self, network: Network) -> bool:
        return self.loss.by_row and not network.regression

    def memory(self, network: Network, batch_size: int, num_steps: int) -> int:
        rows = batch_size + (batch_size if network.regression else network.outputs)
        return super().memory(network, rows, num_steps)

    def initial_state(
        self, network: Network, *, generator: torch.Generator | None = None, entered: bool = False
    ) -> SigPropState:
        if self.update_every is not None and self.update_every < 1:
            raise InputError(f"SigProp: update_every = {self.update_every} must be at least 1, or None for once per call")
        if self.read_every is not None and not 1 <= self.read_every <= (self.update_every or self.read_every):
            window = "" if self.update_every is None else f" and at most update_every = {self.update_every}"
            raise InputError(f"SigProp: read_every = {self.read_every} must be at least 1{window}, or None to choose it")
        if self.regions is not None and self.regions < 1:
            raise InputError(f"SigProp: regions = {self.regions} must be at least 1, or None to compare neuron by neuron")
        for layer in network.layers:
            if self.homeostasis is not None:
                self.homeostasis.prepare(layer)
        parameters = learned_by(network)
        if not entered:
            scale = self.target.scale * network.layers[0].neuron.unit
            target = network.attach_target(scale=scale, learned=self.target.learned, generator=generator)
            parameters += [target.weight] if target.learned else []
        optimizer = make_optimizer(self.optimizer, parameters, _units(network))
        return SigPropState(optimizer, parameters, [None] * len(network.layers), entered=entered)

    def begin(self, state: SigPropState) -> SigPropState:
        return replace(state, stream=None)

    def tensors(self, state: SigPropState) -> dict[str, Tensor]:
        return {str(index): mean for index, mean in enumerate(state.means) if mean is not None}

    def restore(self, state: SigPropState, tensors: dict[str, Tensor]) -> None:
        for index, mean in tensors.items():
            state.means[int(index)] = mean

    @torch.inference_mode()
    def learn(self, network: Network, state: SigPropState, inputs: Tensor, labels: Tensor) -> tuple[Answer, SigPropState]:
        changing = inputs.dim() > 1 and inputs.is_floating_point() and not is_constant(inputs)
        if changing and len(inputs) <= (self.update_every or len(inputs)):  # a single window; half as much is checked then
            inputs = network.layers[0].synapse.as_multiplied(inputs)
        network.check(inputs)
        batch = inputs.shape[1]
        if state.entered:
            batch -= batch // 2 if network.regression else network.outputs
        labels = check_labels(network, inputs[:, :batch], labels)
        self.check(network, batch if state.share is None else state.share.total)
        if state.stream is None:
            with torch.inference_mode(False):
                state.stream = self._rest(network, batch, state.entered)
        stream = state.stream
        if len(stream.count) != batch:
            raise InputError(
                f"SigProp: the sequence began with a batch of {len(stream.count)} and goes on with one of {batch}; "
                "call rule.begin(state) before a new sequence"
            )
        losses, read, seen, start = [], network.readout.weight.new_zeros(len(network.layers)), [], 0
        while start < len(inputs):
            stop = len(inputs) if self.update_every is None else min(len(inputs), start + self.update_every - stream.window)
            present = labels if network.regression else labels[start:stop]
            loss, readings, activity = self._propagate(network, state, stream, inputs[start:stop], present)
            rates = stream.count / stream.steps
            outputs = network.readout(rates)
            losses.append(loss)
            read = read + readings
            seen.append(activity)
            if stream.window == self.update_every or (self.update_every is None and stop == len(inputs)):
                delta = network.readout.delta(outputs, labels if network.regression else present[-1])[1]
                self._update(network, state, stream, [delta.T @ rates.flatten(1) / len(delta), delta.mean(0)])
            start = stop
        with torch.inference_mode(False):  # what the caller keeps are ordinary tensors
            stream.neurons = [type(neurons)(*map(_ordinary, neurons)) for neurons in stream.neurons]
            activity = [torch.stack(parts).sum(0) / (len(inputs) * batch) for parts in zip(*seen, strict=True)]
            return Answer(outputs.clone(), torch.stack(losses).sum(0) / read, activity, read), state

    def _propagate(
        self, network: Network, state: SigPropState, stream: Stream, x: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Both streams through every layer for k steps.

        Per layer: local losses summed over their readings, how many these were, and activity summed over steps and rows.

        A target enters beside the mean input because centring takes that away from every row: without it the contexts would sit
        at an offset of -W mean that no input row has, and where the mean is large nothing else would be left of them.
        """
        steps, batch = len(x), len(stream.count)
        alone = batch == 1 if state.share is None else state.share.total == 1
        if network.regression:  # every sample is its own context
            targets, labels = labels, torch.arange(batch, device=x.device).expand(steps, batch)
        else:
            targets = torch.eye(network.outputs, dtype=network.layers[0].bias.dtype, device=x.device)
        losses, readings, activities = [], [], []
        for index, layer in enumerate(network.layers):
            contexts, sources = None, [x]
            if layer.synapse.weight is None:  # nothing else would bring spikes back from the type of products
                x = x.to(layer.bias.dtype)
            before, mean = stream.neurons[index], state.means[index] if alone else None
            apart = self._steps_between_readings(stream.eligibilities[index], self.update_every or steps)
            at = [step for step in range(steps) if (stream.window + step + 1) % apart == 0]
            compiled = not network.regression and state.share is None and fused.fits(layer, self.learn_on, self.loss)
            with layer.synapse.rounded_once():
                if index == 0 and not state.entered:
                    x, seen = fused.laid_out(x, layer), network.input_mean
                    contexts = layer.synapse(seen.unsqueeze(0)) + network.attach_target()(targets)
                    sources = [x, seen.expand(steps, len(targets), *seen.shape), targets.expand(steps, *targets.shape)]
                if not is_constant(x):
                    x = sources[0] = layer.synapse.as_multiplied(x)
                drive, bias = layer.drive(x, as_multiplied=compiled), network.fold_bias(index)
            settings = (layer, self.learn_on, self.loss, stream.regions[index], before, drive, contexts, bias)
            if compiled:
                last, rounded = index == len(network.layers) - 1, stream.eligibilities[index].rounds
                ranks = batch, len(before.membrane) - batch
                factored = rounded and fused.factors(layer, self.learn_on, self.loss, *ranks)
                found = fused.learn(*settings, labels, mean, at, count=last, rounded=rounded, factored=factored)
            else:
                found = learn_locally(*settings, labels, mean, at, state.share)
            stream.neurons[index], spikes = found.state, found.spikes
            if layer.recurrent is not None:
                sources.append(spikes_before(before, spikes))
            stream.eligibilities[index].observe(sources, found.error, spikes, found.error_sum, None if len(at) == steps else at)

            losses.append(found.loss)
            readings.append(len(at))
            activities.append(found.activity)
            stream.phi[index] = stream.phi[index] + found.phi
            stream.activity[index] = stream.activity[index] + found.activity
            x = spikes
        assert found.counts is not None
        stream.count, stream.spikes = stream.count + found.counts, x
        stream.steps += steps
        stream.window += steps
        stream.readings = [before + new for before, new in zip(stream.readings, readings, strict=True)]
        return torch.stack(losses), losses[0].new_tensor(readings), activities

    def _steps_between_readings(self, eligibility: Eligibility, window: int) -> int:
        if self.read_every is not None:
            return min(self.read_every, window)
        if not isinstance(eligibility, SharedTrace):
            return 1
        constant = 1.0 / (1.0 - eligibility.beta) if eligibility.beta < 1.0 else math.inf
        return int(max(1, min(constant / 2, window // READINGS)))

    def _rest(self, network: Network, batch: int, entered: bool) -> Stream:
        """The start of a sequence: membranes, traces and counts at zero."""
        neurons = network.initial_state(batch + (batch if network.regression else network.outputs))
        eligibilities = []
        for index, layer in enumerate(network.layers):
            sources = [Source(layer.synapse, slice(None))]
            if index == 0 and not entered:
                rows = slice(batch, None)
                sources = [
                    Source(layer.synapse, slice(batch)),
                    Source(layer.synapse, rows),
                    Source(network.attach_target(), rows),
                ]
            if layer.recurrent is not None:
                sources.append(Source(layer.recurrent, slice(None)))
            eligibilities.append(eligibility(layer, sources, exact=self.trace == "exact"))
        silence = [torch.zeros_like(layer.rate) for layer in network.layers]
        nothing = [layer.rate.new_zeros(()) for layer in network.layers]
        regions = [region_means(layer.rate, self.regions) for layer in network.layers]
        rest = neurons[-1].membrane
        read = [0] * len(neurons)
        return Stream(neurons, eligibilities, rest[:batch], rest[:0], silence, nothing, regions, readings=read)

    def _update(self, network: Network, state: SigPropState, stream: Stream, readout: list[Tensor]) -> None:
        """One step of the optimiser, then homeostasis and the running means, all from this window alone."""
        gradients, target = [], []
        for index in range(len(network.layers)):
            collected, at_bias = stream.eligibilities[index].collect()
            if index == 0 and not state.entered:
                at_target = collected.pop(1)
                target = [at_target / stream.readings[0]] if network.attach_target().learned else []
            gradients += [part.div_(stream.readings[index]) for part in layer_gradients(network, index, collected, at_bias)]
        gradients += [*readout, *target]
        descend(state.optimizer, state.parameters, gradients, state.share, leave=False)

        batch, samples = len(stream.count), stream.window * len(stream.count)
        follow_rates(network, [activity / samples for activity in stream.activity], batch, self.homeostasis, state.share)
        phi = [phi / (readings * len(stream.count)) for phi, readings in zip(stream.phi, stream.readings, strict=True)]
        if state.share is not None:
            batch, phi = state.share.total, state.share.mean(phi)
        for index, (layer, mean) in enumerate(zip(network.layers, phi, strict=True)):
            before = state.means[index]
            if before is None or before.shape != mean.shape:  # of a checkpoint made with other regions
                before = mean
            state.means[index] = before.lerp(mean, min(0.1, batch / 128))
            stream.activity[index], stream.phi[index] = torch.zeros_like(layer.rate), torch.zeros_like(mean)
        stream.window, stream.readings = 0, [0] * len(network.layers)


def learn_locally(
    layer: Layer,
    learn_on: LearnOn,
    loss: LocalLoss,
    regions: Tensor | None,
    state: State,
    drive: Tensor,
    contexts: Tensor | None,
    bias: Tensor,
    labels: Tensor,
    mean: Tensor | None,
    at: list[int],
    share: Share | None = None,
) -> Local:
    """k steps of a layer's neurons, and the error that its local loss finds at every membrane.

    Args:
        layer, learn_on, loss: whose neurons, how their membranes are read, and what compares the readings.
        regions: see :func:`region_means`; None reads neuron by neuron.
        state: of R rows: the B input rows, then the contexts.
        drive: ``[k, R, *features]``, or ``[k, B, *features]`` beside the ``contexts [C, *features]``, whose drive is always the
            same.
        bias: with the centring folded in, in place of the layer's own.
        labels: the context of each input row at each step ``[k, B]``.
        mean: replaces the rows' own mean ``[m]`` in batches of one.
        at: the steps that the loss reads.
        share: which part of the batch these rows are; their mean is that of all parts then.
    """
    if contexts is not None:
        seen = drive[:1] if is_constant(drive) else drive
        seen = torch.cat([seen.to(contexts), contexts.expand(len(seen), *contexts.shape)], 1)
        drive = seen.expand(len(drive), *seen.shape[1:])
    (spikes, membrane), state = layer.run(state, drive, bias)
    batch = labels.shape[1]
    if len(at) < len(labels):
        membrane, labels = membrane[at], labels[at]
    error, total = torch.empty_like(membrane), membrane.new_zeros(())
    phi_sum = membrane.new_zeros(())
    together = membrane.shape[1] if share is None else share.total  # as many pieces in every process
    size = max(1, (CACHED if membrane.device.type == "cpu" else LAUNCHED) // (together * layer.rate.numel()))
    for some, present, room in zip(membrane.split(size), labels.split(size), error.split(size), strict=True):
        phi, slope = read(learn_on, some, layer.neuron)
        phi = phi if regions is None else phi.flatten(3) @ regions
        h, t = phi.flatten(2).tensor_split([batch], 1)
        if share is None or mean is not None:
            found, dh, dt = loss(h, t, present, mean)
        else:
            found, dh, dt = loss(h, t, present, share.mean([h.mean(1, keepdim=True)])[0])
            dh = dh - share.mean([dh.sum(1, keepdim=True)])[0] / len(h[0])
        for rows, gradient in ((slice(0, batch), dh), (slice(batch, None), dt)):
            gradient = gradient if regions is None else gradient.view_as(phi[:, rows]) @ regions.T
            gradient = gradient.view_as(some[:, rows])
            torch.mul(gradient, 1.0 if slope is None else slope[:, rows], out=room[:, rows])
        total += found.sum()
        phi_sum = phi_sum + h.sum(1).sum(0)
    counts = spikes.sum(0)[:batch]
    return Local(state, spikes, error, total, phi_sum, counts.sum(0), counts)


def read(learn_on: LearnOn, membrane: Tensor, neuron: Neuron) -> tuple[Tensor, Tensor | None]:
    """phi and dphi/dU, where phi reads the membrane in units of the threshold."""
    if (unit := neuron.unit) == 1.0:
        return learn_on(membrane, neuron.threshold)
    phi, slope = learn_on(membrane / unit, neuron.threshold / unit)
    return phi, torch.full_like(phi, 1.0 / unit) if slope is None else slope / unit


def region_means(maps: Tensor, regions: int | None) -> Tensor | None:
    """Adaptive average pooling of maps ``[C, H, W]`` to ``regions x regions``, as a matrix ``[H * W, regions^2]``.

    None where there is nothing to pool.
    """
    if regions is None or maps.dim() != 3 or min(maps.shape[1:]) <= regions:
        return None
    rows, columns = (
        F.adaptive_avg_pool1d(torch.eye(extent, dtype=maps.dtype, device=maps.device), regions) for extent in maps.shape[1:]
    )
    return torch.kron(rows, columns)


def _ordinary(tensor: Tensor) -> Tensor:
    """A tensor that is none of inference mode's."""
    return tensor.clone() if tensor.is_inference() else tensor


def _units(network: Network) -> dict[int, float]:
    """The threshold behind every weight and bias of a layer, by the tensor's id, where it is not 1."""
    units = {}
    for index, layer in enumerate(network.layers):
        if (unit := layer.neuron.unit) != 1.0:
            target = [network.target.weight] if index == 0 and network.target is not None else []
            units.update({id(tensor): unit for tensor in (*layer.weights(), *target)})
    return units
