"""Eligibility: how far each synapse is responsible for the membrane its error is attached to.

With the spikes held constant a LIF membrane is a linear filter of its inputs, and dU/dW is that filter of the presynaptic
activity. Two forms:

* :class:`SharedTrace` runs forward in time, one trace per input and row, shared by all neurons of the layer:
  c[t] = alpha c[t-1] + x[t], trace[t] = beta trace[t-1] + c[t], dW += error[t]^T trace[t].
  It holds the amount taken off the membrane by a reset constant. Memory does not depend on time.
* :class:`WindowTrace` holds only the spike constant. Under reset to zero a spike wipes the neuron's memory, and with it the
  eligibility of everything before: lambda[t] = error[t] + beta (1 - S[t]) lambda[t+1], dW = sum_t lambda[t]^T x[t]. The scan
  runs back in time inside one update window, never across windows and never across layers; the window is buffered.
  What lies before the window counts through the shared trace. It also serves decays that differ between the neurons of a layer,
  where no trace can be shared.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spikeprop.network import Layer, is_constant
from spikeprop.synapse import Synapse


class Source(NamedTuple):
    """A synapse into a layer and the rows of the layer it drives."""

    synapse: Synapse
    rows: slice


class Eligibility:
    """Collects, over an update window, what a layer's errors ask of its synapses and of its bias."""

    def __init__(self, layer: Layer, sources: list[Source]) -> None:
        self.layer, self.sources = layer, sources

    def observe(self, inputs: list[Tensor], error: Tensor, spikes: Tensor) -> None:
        """Take in k steps: per source ``[k, rows, *input_shape]``; error and spikes ``[k, R, *output_shape]``."""
        raise NotImplementedError

    def collect(self) -> tuple[list[Tensor], Tensor]:
        """The gradient of each source's weight, and of the membrane's bias summed over rows, since the last call."""
        raise NotImplementedError


def low_pass(x: Tensor, keep: float, before: Tensor | None) -> Tensor:
    """y[t] = keep y[t-1] + x[t] along the first axis, from y[-1] = before (None: from rest)."""
    if keep == 0.0:
        return x
    filtered = torch.empty_like(x, memory_format=torch.contiguous_format)
    for step, present in enumerate(x):
        filtered[step] = present if before is None else torch.add(present, before, alpha=keep)
        before = filtered[step]
    return filtered


class SharedTrace(Eligibility):
    """The forward trace, shared by all neurons of a layer. Needs one alpha and one beta per layer."""

    def __init__(self, layer: Layer, sources: list[Source]) -> None:
        super().__init__(layer, sources)
        self.alpha, self.beta = float(layer.neuron.alpha), float(layer.neuron.beta)
        self.traces: list[tuple[Tensor, Tensor] | None] = [None] * len(sources)
        self.bias_trace = torch.zeros((), dtype=torch.float64)
        self._clear()

    def _clear(self) -> None:
        nothing = torch.zeros((), dtype=self.layer.bias.dtype, device=self.layer.bias.device)
        self.gradients, self.bias_gradient = [nothing] * len(self.sources), nothing

    def follow(self, inputs: list[Tensor], steps: int) -> tuple[Tensor, list[Tensor | None]]:
        """Move the traces on by some steps of input.

        Returns the filter's response to a constant 1 (the bias's trace) per step ``[k]``, and each source's traces ``[k, rows,
        *input_shape]``, or None where the input is constant from rest and its trace is just the response times the input.
        """
        response = low_pass(torch.ones(steps, dtype=torch.float64), self.beta, self.bias_trace)
        self.bias_trace = response[-1].clone()
        followed: list[Tensor | None] = []
        for index, x in enumerate(inputs):
            before = self.traces[index]
            if before is None and is_constant(x) and self.alpha == 0.0:
                followed.append(None)
                self.traces[index] = (x[0], x[0] * float(response[-1]))
            else:
                current, trace = before or (None, None)
                currents = low_pass(x, self.alpha, current)
                traces = low_pass(currents, self.beta, trace)
                followed.append(traces)
                self.traces[index] = (currents[-1].clone(), traces[-1].clone())
        return response, followed

    def observe(self, inputs: list[Tensor], error: Tensor, spikes: Tensor) -> None:
        response, followed = self.follow(inputs, len(error))
        response = response.to(error)
        self.bias_gradient = self.bias_gradient + torch.tensordot(response, error.sum(1), 1)
        for index, (source, x, traces) in enumerate(zip(self.sources, inputs, followed, strict=True)):
            if source.synapse.weight is None:
                continue
            own = error[:, source.rows]
            if traces is None:  # one product serves all steps
                gradient = source.synapse.weight_gradient(torch.tensordot(response, own, 1), x[0])
            else:
                gradient = source.synapse.weight_gradient(own.flatten(0, 1), traces.flatten(0, 1))
            self.gradients[index] = self.gradients[index] + gradient

    def collect(self) -> tuple[list[Tensor], Tensor]:
        collected = self.gradients, self.bias_gradient
        self._clear()
        return collected


class WindowTrace(Eligibility):
    """The window's adjoint scan: exact under every reset if ``gated``; otherwise the shared trace's meaning, per neuron.

    What came before the window counts through the shared trace, gated by the last spike before it; where decays differ
    between the neurons of a layer there is no shared trace, and credit ends at the window's start.
    """

    def __init__(self, layer: Layer, sources: list[Source], *, gated: bool) -> None:
        super().__init__(layer, sources)
        self.gated = gated and layer.neuron.reset_mechanism == "zero"
        self.window: list[tuple[list[Tensor], Tensor, Tensor]] = []
        self.before: SharedTrace | None = None
        self.last_spikes: Tensor | None = None
        neuron = layer.neuron
        if not isinstance(neuron.alpha, Tensor) and not isinstance(neuron.beta, Tensor):
            self.before = SharedTrace(layer, sources)

    def observe(self, inputs: list[Tensor], error: Tensor, spikes: Tensor) -> None:
        self.window.append((inputs, error, spikes))

    def collect(self) -> tuple[list[Tensor], Tensor]:
        inputs = [
            parts[0] if len(parts) == 1 else torch.cat(parts)
            for parts in zip(*(entry[0] for entry in self.window), strict=True)
        ]
        error = torch.cat([entry[1] for entry in self.window])
        spikes = torch.cat([entry[2] for entry in self.window])
        self.window = []
        at_membrane, at_current = torch.zeros_like(error[0]), torch.zeros_like(error[0])
        responsible, bias_gradient = torch.empty_like(error), torch.zeros_like(error[0, 0])
        for step in range(len(error) - 1, -1, -1):
            at_membrane = error[step] + self._kept(spikes[step]) * at_membrane
            at_current = at_membrane + self.layer.neuron.alpha * at_current
            responsible[step] = at_current
            bias_gradient += at_membrane.sum(0)
        gradients = []
        for source, x in zip(self.sources, inputs, strict=True):
            own = responsible[:, source.rows]
            if source.synapse.weight is None:
                gradients.append(bias_gradient.new_zeros(()))
            elif is_constant(x):
                gradients.append(source.synapse.weight_gradient(own.sum(0), x[0]))
            else:
                gradients.append(source.synapse.weight_gradient(own.flatten(0, 1), x.flatten(0, 1)))
        if self.before is not None:
            if self.last_spikes is not None:
                gradients, bias_gradient = self._add_what_came_before(gradients, bias_gradient, at_membrane, at_current)
            self.before.follow(inputs, len(error))
            self.last_spikes = spikes[-1].clone()
        return gradients, bias_gradient

    def _kept(self, spikes: Tensor) -> float | Tensor:
        """dU[t+1]/dU[t], given the spikes at t."""
        return self.layer.neuron.beta * (1.0 - spikes) if self.gated else self.layer.neuron.beta

    def _add_what_came_before(
        self, gradients: list[Tensor], bias_gradient: Tensor, at_membrane: Tensor, at_current: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """The first step's responsibility for the membrane and current that the window began with."""
        assert self.before is not None
        assert self.last_spikes is not None
        at_membrane = self._kept(self.last_spikes) * at_membrane
        at_current = self.layer.neuron.alpha * at_current
        for index, (source, traces) in enumerate(zip(self.sources, self.before.traces, strict=True)):
            if source.synapse.weight is not None and traces is not None:
                for responsible, trace in zip((at_current, at_membrane), traces, strict=True):
                    gradients[index] = gradients[index] + source.synapse.weight_gradient(responsible[source.rows], trace)
        return gradients, bias_gradient + at_membrane.sum(0) * float(self.before.bias_trace)


def eligibility(layer: Layer, sources: list[Source], *, exact: bool) -> Eligibility:
    """The cheapest form that is right: the shared trace, unless the exact one is asked for or decays differ in the layer."""
    neuron = layer.neuron
    if exact or isinstance(neuron.alpha, Tensor) or isinstance(neuron.beta, Tensor):
        return WindowTrace(layer, sources, gated=exact)
    return SharedTrace(layer, sources)
