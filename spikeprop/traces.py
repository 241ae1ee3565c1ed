"""Eligibility: how far each synapse is responsible for the membrane its error is attached to.

With the spikes held constant a LIF membrane is a linear filter of its inputs, and dU/dW is that filter of the presynaptic
activity. Three forms:

* :class:`SharedTrace` runs forward in time, one trace per input and row, shared by all neurons of the layer:
  c[t] = alpha c[t-1] + x[t], trace[t] = beta trace[t-1] + c[t], dW += error[t]^T trace[t].
  It holds the amount taken off the membrane by a reset constant. Memory does not depend on time.
* :class:`WindowTrace` holds only the spike constant. Under reset to zero a spike wipes the neuron's memory, and with it the
  eligibility of everything before: lambda[t] = error[t] + beta (1 - S[t]) lambda[t+1], dW = sum_t lambda[t]^T x[t]. The scan
  runs back in time inside one update window, never across windows and never across layers; the window is buffered.
  What lies before the window counts through the shared trace. It also serves decays that differ between the neurons of a layer,
  where no trace can be shared.
* :class:`SynapseTrace` runs forward in time with the same meaning, one trace per synapse and row, and sums the activity's
  sensitivity instead of errors, so that one error at the end serves all steps since the sequence began:
  trace[t] = beta (1 - S[t-1]) trace[t-1] + c[t], dW = sum_rows error sum_t f'(U[t]) trace[t]. Memory O(B w), at any time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from spikeprop import compiled, scan
from spikeprop.network import Layer, is_constant
from spikeprop.neuron import Neuron
from spikeprop.synapse import Chain, Synapse, product_type


class Source(NamedTuple):
    """A synapse into a layer and the rows of the layer it drives."""

    synapse: Synapse
    rows: slice


@dataclass(frozen=True)
class Factored:
    """The error of m steps of a dense layer: at the input rows the product of ``weights`` and ``responses``, of low rank."""

    weights: Tensor  # [m, B, C]
    responses: Tensor  # [m, C, n]
    contexts: Tensor  # [m, C, n]: the error at the context rows

    def __len__(self) -> int:
        return len(self.weights)

    def at(self, rows: slice) -> Tensor | Factored:
        """The error at the contexts' rows, or at rows that begin with the inputs'."""
        return self.contexts if rows.start else self

    def times(self, factor: Tensor) -> Factored:
        """Every step times a number of its own, ``[m]``."""
        factor = factor.view(-1, 1, 1)
        return Factored(self.weights * factor, self.responses, self.contexts * factor)

    def facing(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        """The two factors of a weight gradient, responsibility ``[.., n]`` and input ``[.., *input_shape]``: m C rows, not m B.

        A gradient is linear in either factor, so that the rows can be summed on the side of the input. ``seen [m, rows,
        *input_shape]`` is what the input rows see, or they and the contexts.
        """
        input_shape, seen = seen.shape[2:], seen.flatten(2)
        batch = self.weights.shape[1]
        own, met = [self.responses], [self.weights.to(seen).mT @ seen[:, :batch]]
        if seen.shape[1] > batch:
            own, met = [*own, self.contexts], [*met, seen[:, batch:]]
        return torch.cat(own, 1).flatten(0, 1), torch.cat(met, 1).flatten(0, 1).unflatten(1, input_shape)


class Eligibility:
    """Collects, over an update window, what a layer's errors ask of its synapses and of its bias.

    Attributes:
        rounds: whether errors and inputs only go into products, so that they may come in the products' type.
    """

    rounds = False

    def __init__(self, layer: Layer, sources: list[Source]) -> None:
        self.layer, self.sources = layer, sources
        self.synapses = list(dict.fromkeys(source.synapse for source in sources))

    def observe(
        self,
        inputs: list[Tensor],
        error: Tensor | Factored,
        spikes: Tensor,
        error_sum: Tensor | None = None,
        at: list[int] | None = None,
    ) -> None:
        """Take in k steps: per source ``[k, rows, *input_shape]``; error and spikes ``[k, R, *output_shape]``.

        ``error_sum``: the error summed over rows, where that is known. ``at``: the steps that the error is of, if not of all;
        it is zero at the others.
        """
        raise NotImplementedError

    def _by_synapse(self, gradients: dict[Synapse, Tensor]) -> list[Tensor]:
        """Zero where a synapse has no gradient, or no weight."""
        found = []
        for synapse in self.synapses:
            like = self.layer.bias.new_zeros(()) if synapse.weight is None else synapse.weight
            found.append(gradients[synapse] if synapse in gradients else torch.zeros_like(like))
        return found

    def collect(self) -> tuple[list[Tensor], Tensor]:
        """The gradient of each synapse's weight, in the order of the sources, and of the membrane's bias summed over rows.

        Since the last call; sources that share a synapse share its gradient.
        """
        raise NotImplementedError


def low_pass(
    x: Tensor, keep: float, before: Tensor | None, into: torch.dtype | None = None, at: list[int] | None = None
) -> tuple[Tensor, Tensor]:
    """y[t] = keep y[t-1] + x[t] along the first axis, from y[-1] = before (None: from rest), which is given away.

    Returns y, at the steps ``at`` (None: at all), in the type ``into`` (by default that of x); and its last step, exactly.
    """
    exact = torch.float32 if x.dtype == torch.bfloat16 else x.dtype
    if keep == 0.0:
        return x if at is None else x[at], x[-1].to(exact, copy=True)
    last = torch.zeros_like(x[0], dtype=exact) if before is None else before
    places = compiled.places(at, len(x))
    filtered = torch.empty_like(x if at is None else x[: len(at)], dtype=into or x.dtype)
    laid = [in_memory(part) for part in (x, filtered, last.unsqueeze(0))]
    alike = {_channels_last(part) for part in (x, filtered, last.unsqueeze(0))}  # shapes alone would not tell C = H = W
    whole = all(part.is_contiguous() for part in laid) and len(alike) == 1 and len(filtered) > 0
    present, out, state = (part.flatten(1) for part in laid) if whole else laid
    if whole and scan.low_pass(present, out, state, keep, places):
        return filtered, last
    for present, place in zip(x, places, strict=True):
        last = torch.add(present.to(exact), last, alpha=keep)
        if place >= 0:
            filtered[place] = last
    return filtered, last


def in_memory(x: Tensor) -> Tensor:
    """A view of maps ``[k, R, C, H, W]`` in the order in which they lie in memory; torch sums others ten times as slowly."""
    return x.movedim(2, -1) if _channels_last(x) else x


def _channels_last(x: Tensor) -> bool:
    return x.dim() == 5 and x.stride(2) == 1 and x.shape[2] > 1


def over_rows(error: Tensor) -> Tensor:
    """The sum over rows, ``[k, *features]``."""
    total = in_memory(error).sum(1)
    return total.movedim(-1, 1) if _channels_last(error) else total


def over_steps(response: Tensor, error: Tensor) -> Tensor:
    """The sum over steps, each weighted by ``response [k]``: ``[R, *features]``."""
    total = torch.tensordot(response, in_memory(error), 1)
    return total.movedim(-1, 1) if _channels_last(error) else total


def kept(neuron: Neuron, spikes: Tensor, *, gated: bool) -> float | Tensor:
    """dU[t+1]/dU[t] given the spikes at t; a reset to zero gates it, one that subtracts a constant leaves it alone."""
    return neuron.beta * (1.0 - spikes) if gated and neuron.reset_mechanism == "zero" else neuron.beta


def step_back(
    neuron: Neuron, error: Tensor, spikes: Tensor, later: tuple[Tensor, Tensor] | None, *, gated: bool
) -> tuple[Tensor, Tensor]:
    """One step of the adjoint scan: how a step's membrane and its current bear on all errors from that step on.

    Args:
        error, spikes: of the step, at the membrane before the reset.
        later: what this function gave for the step after; None at the end.
        gated: whether a spike wipes its neuron's responsibility, under reset to zero.
    """
    if later is None:
        return error, error
    at_membrane = error + kept(neuron, spikes, gated=gated) * later[0]
    return at_membrane, at_membrane + neuron.alpha * later[1]


def scan_back(neuron: Neuron, error: Tensor, spikes: Tensor, *, gated: bool) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """:func:`step_back` over a window ``[k, R, *features]``, from its end to its start.

    Returns what is at the current at every step, the sum over rows and steps of what is at the membrane, and what is at the
    membrane and at the current of the first step.
    """
    responsible, bias_gradient = torch.empty_like(error), torch.zeros_like(error[0, 0])
    if error.is_contiguous() and spikes.is_contiguous():
        alpha, beta = (torch.zeros_like(bias_gradient) + keep for keep in (neuron.alpha, neuron.beta))
        wipes = gated and neuron.reset_mechanism == "zero"
        if first := scan.back(error, spikes, alpha, beta, wipes, responsible, bias_gradient):
            return responsible, bias_gradient, first
    later: tuple[Tensor, Tensor] | None = None
    for step in range(len(error) - 1, -1, -1):
        later = step_back(neuron, error[step], spikes[step], later, gated=gated)
        responsible[step] = later[1]
        bias_gradient += later[0].sum(0)
    assert later is not None
    return responsible, bias_gradient, later


class SharedTrace(Eligibility):
    """The forward trace, shared by all neurons of a layer. Needs one alpha and one beta per layer."""

    rounds = True

    def __init__(self, layer: Layer, sources: list[Source]) -> None:
        super().__init__(layer, sources)
        self.alpha, self.beta = float(layer.neuron.alpha), float(layer.neuron.beta)
        self.traces: list[tuple[Tensor | None, Tensor] | None] = [None] * len(sources)  # of the current, if it fades; of U
        self.bias_trace = 0.0
        self._clear()

    def _clear(self) -> None:
        nothing = torch.zeros((), dtype=self.layer.bias.dtype, device=self.layer.bias.device)
        self.gradients: dict[Synapse, Tensor] = {}
        self.bias_gradient = nothing

    def follow(self, inputs: list[Tensor], steps: int, at: list[int] | None = None) -> tuple[Tensor, list[Tensor | None]]:
        """Move the traces on by some steps of input.

        Returns the filter's response to a constant 1 (the bias's trace) per step ``[k]``, and each source's traces ``[k, rows,
        *input_shape]``, or None where the input is constant from rest and its trace is just the response times the input; both
        at the steps ``at`` only, if they are given.
        """
        responses = []
        for _ in range(steps):
            self.bias_trace = 1.0 + self.beta * self.bias_trace
            responses.append(self.bias_trace)
        response = torch.tensor(responses, dtype=torch.float64, device=self.layer.bias.device)
        followed: list[Tensor | None] = []
        for index, x in enumerate(inputs):
            before = self.traces[index]
            if before is None and is_constant(x) and self.alpha == 0.0:
                followed.append(None)
                self.traces[index] = (None, x[0] * self.bias_trace)
            else:
                current, trace = before or (None, None)
                weight = self.sources[index].synapse.weight
                exact, low = (x.dtype, x.dtype) if weight is None else (weight.dtype, product_type(weight))
                currents, current = (x, None) if self.alpha == 0.0 else low_pass(x, self.alpha, current, exact)
                traces, trace = low_pass(currents, self.beta, trace, low, at)
                followed.append(traces)
                self.traces[index] = (current, trace)
        return response if at is None else response[at], followed

    def observe(
        self,
        inputs: list[Tensor],
        error: Tensor | Factored,
        spikes: Tensor,
        error_sum: Tensor | None = None,
        at: list[int] | None = None,
    ) -> None:
        response, followed = self.follow(inputs, len(spikes), at)
        if len(error) == 0:
            return
        if error_sum is None:
            assert isinstance(error, Tensor)
            error_sum = over_rows(error)
        self.bias_gradient = self.bias_gradient + torch.tensordot(response.to(error_sum), error_sum, 1)
        for source, x, traces in zip(self.sources, inputs, followed, strict=True):
            if source.synapse.weight is None:
                continue
            wrong = error.at(source.rows) if isinstance(error, Factored) else error[:, source.rows]
            if isinstance(wrong, Factored):
                if traces is None:
                    wrong, traces = wrong.times(response.to(wrong.weights)), x[: len(wrong)]
                own, seen = wrong.facing(traces)
            elif traces is None:  # one product serves all steps, and all rows that see the same
                own, seen = over_steps(response.to(wrong), wrong), x[0]
                if is_constant(seen):
                    own, seen = own.sum(0, keepdim=True), seen[:1]
            else:
                own, seen = wrong.flatten(0, 1), traces.flatten(0, 1)
            onto = self.gradients.get(source.synapse)
            self.gradients[source.synapse] = source.synapse.weight_gradient(own, seen, onto)

    def collect(self) -> tuple[list[Tensor], Tensor]:
        gradients, bias_gradient = self.gradients, self.bias_gradient
        self._clear()
        return self._by_synapse(gradients), bias_gradient


class WindowTrace(Eligibility):
    """The window's adjoint scan: exact under every reset if ``gated``; otherwise the shared trace's meaning, per neuron.

    What came before the window counts through the shared trace, gated by the last spike before it; where decays differ
    between the neurons of a layer there is no shared trace, and credit ends at the window's start.
    """

    def __init__(self, layer: Layer, sources: list[Source], *, gated: bool) -> None:
        super().__init__(layer, sources)
        self.gated = gated
        self.window: list[tuple[list[Tensor], Tensor, Tensor]] = []
        self.before: SharedTrace | None = None
        self.last_spikes: Tensor | None = None
        neuron = layer.neuron
        if not isinstance(neuron.alpha, Tensor) and not isinstance(neuron.beta, Tensor):
            self.before = SharedTrace(layer, sources)

    def observe(
        self,
        inputs: list[Tensor],
        error: Tensor | Factored,
        spikes: Tensor,
        error_sum: Tensor | None = None,
        at: list[int] | None = None,
    ) -> None:
        assert isinstance(error, Tensor)
        if at is not None:
            whole = error.new_zeros(len(spikes), *error.shape[1:])
            whole[at] = error
            error = whole
        self.window.append((inputs, error, spikes))

    def collect(self) -> tuple[list[Tensor], Tensor]:
        inputs = [
            parts[0] if len(parts) == 1 else torch.cat(parts)
            for parts in zip(*(entry[0] for entry in self.window), strict=True)
        ]
        error = torch.cat([entry[1] for entry in self.window])
        spikes = torch.cat([entry[2] for entry in self.window]).to(error.dtype)
        self.window = []
        responsible, bias_gradient, later = scan_back(self.layer.neuron, error, spikes, gated=self.gated)
        gradients: dict[Synapse, Tensor] = {}
        for source, x in zip(self.sources, inputs, strict=True):
            if source.synapse.weight is not None:
                own = responsible[:, source.rows]
                own, seen = (own.sum(0), x[0]) if is_constant(x) else (own.flatten(0, 1), x.flatten(0, 1))
                gradients[source.synapse] = source.synapse.weight_gradient(own, seen, gradients.get(source.synapse))
        if self.before is not None:
            if self.last_spikes is not None:
                bias_gradient = bias_gradient + self._add_what_came_before(gradients, *later)
            self.before.follow(inputs, len(error))
            self.last_spikes = spikes[-1].clone()
        return self._by_synapse(gradients), bias_gradient

    def _add_what_came_before(self, gradients: dict[Synapse, Tensor], at_membrane: Tensor, at_current: Tensor) -> Tensor:
        """The first step's responsibility for the membrane and current that the window began with; returns the bias's."""
        assert self.before is not None
        assert self.last_spikes is not None
        at_membrane = kept(self.layer.neuron, self.last_spikes, gated=self.gated) * at_membrane
        at_current = self.layer.neuron.alpha * at_current
        for source, traces in zip(self.sources, self.before.traces, strict=True):
            if source.synapse.weight is not None and traces is not None:
                for responsible, trace in zip((at_current, at_membrane), traces, strict=True):
                    if trace is not None:
                        source.synapse.weight_gradient(responsible[source.rows], trace, gradients[source.synapse])
        return at_membrane.sum(0) * self.before.bias_trace


class SynapseTrace:
    """The forward trace per synapse and row, and the activity's sensitivity to each weight summed since the sequence began.

    For synapses whose weights are a matrix, one row per neuron; spikes are held constant.
    """

    def __init__(self, layer: Layer, sources: list[Source], *, gated: bool) -> None:
        self.layer, self.sources, self.gated = layer, sources, gated
        nothing = torch.zeros((), dtype=layer.bias.dtype, device=layer.bias.device)
        self.currents, self.traces, self.sums = ([nothing] * len(sources) for _ in range(3))
        self.keep = self.bias_trace = self.bias_sum = nothing

    def observe(self, inputs: list[Tensor], slope: Tensor, spikes: Tensor) -> None:
        """Take in k steps: per source ``[k, B, *input_shape]``; dS/dU and spikes ``[k, B, *output_shape]``."""
        neuron = self.layer.neuron
        alpha = torch.as_tensor(neuron.alpha, dtype=slope.dtype, device=slope.device).unsqueeze(-1)
        seen = [_at_weights(source.synapse, x) for source, x in zip(self.sources, inputs, strict=True)]
        for step, sensitivity in enumerate(slope):
            self.bias_trace = 1.0 + self.keep * self.bias_trace
            self.bias_sum = self.bias_sum + sensitivity * self.bias_trace
            keep = self.keep.unsqueeze(-1)  # [B, n, 1]; [1] where all neurons share one trace [B, 1, inputs]
            for index, x in enumerate(seen):
                if x is None:
                    continue
                self.currents[index] = alpha * self.currents[index] + x[step].unsqueeze(1)
                self.traces[index] = torch.addcmul(self.currents[index], keep, self.traces[index])
                self.sums[index] = torch.addcmul(self.sums[index], sensitivity.unsqueeze(-1), self.traces[index])
            self.keep = torch.as_tensor(kept(neuron, spikes[step], gated=self.gated), dtype=slope.dtype, device=slope.device)

    def collect(self, error: Tensor) -> tuple[list[Tensor], Tensor]:
        """As :meth:`Eligibility.collect`; ``error [B, *output_shape]`` is that at the activity, the same at every step."""
        gradients = [
            total if source.synapse.weight is None else torch.einsum("bn,bni->ni", error, total)
            for source, total in zip(self.sources, self.sums, strict=True)
        ]
        return gradients, (error * self.bias_sum).sum(0)


def _at_weights(synapse: Synapse, x: Tensor) -> Tensor | None:
    """What a synapse's weights see of its input ``[k, B, *input_shape]``, the parts of a chain before them applied."""
    if synapse.weight is None:
        return None
    rows = x.flatten(0, 1)
    if isinstance(synapse, Chain):
        for part in synapse.parts[: synapse.weighted]:
            rows = part(rows)
    return rows.unflatten(0, x.shape[:2])


def eligibility(layer: Layer, sources: list[Source], *, exact: bool) -> Eligibility:
    """The cheapest form that is right: the shared trace, unless the exact one is asked for or decays differ in the layer."""
    neuron = layer.neuron
    if exact or isinstance(neuron.alpha, Tensor) or isinstance(neuron.beta, Tensor):
        return WindowTrace(layer, sources, gated=exact)
    return SharedTrace(layer, sources)
