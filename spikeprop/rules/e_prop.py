"""e-prop (Bellec, Scherr, Subramoney, Hajek, Salaj, Legenstein, Maass 2020, Nature Communications 11:3625).

Each synapse keeps a trace of how far it is responsible for its neuron's membrane, and the sum of what that meant for the
neuron's activity; a learning signal, broadcast to the neurons, turns the sum into an update. All of it runs forward in time.

    trace_ji[t] = beta (1 - S_j[t-1]) trace_ji[t-1] + x_i[t]          eligibility vector; with alpha, the current's trace of x
    sum_ji[t]   = sum_ji[t-1] + f'(U_j[t]) trace_ji[t]                eligibility trace, filtered as the readout filters S_j
    dW_ji       = sum_rows L_j sum_ji                                 since the sequence began, across windows

Our readout is on the mean activity so far, a filter with no leak; L_j = dLoss/dS_j is thus the same for all steps. What is left
out of the gradient are all paths from neuron to neuron. Bellec's network is one recurrent layer that the readout sees, and his
are the two learning signals there: "symmetric", the readout's error through its own weights, which is exact up to the paths
left out; "random", through fixed random weights, for every layer. The paper has no stacked layers. For one below the last
"random" needs no further definition (the signal is broadcast, as in direct feedback alignment); "symmetric" is ours:

    L_l = W_{l+1}^T (L_{l+1} g_{l+1})       g_j: mean over steps of what a constant current of 1 does to S_j, by the trace

which is how the mean activity of the layer above moves with that below if the change is constant in time. On rate neurons and
a single step it is backpropagation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from spikeprop.errors import InputError
from spikeprop.network import Network, spikes_before
from spikeprop.rules.base import Facts, layer_gradients
from spikeprop.rules.windowed import AtOutput, LayerwiseRule, Stream, Window, WindowedState, at_output, sources
from spikeprop.traces import SynapseTrace

Broadcast = Literal["symmetric", "random"]


@dataclass(frozen=True)
class EProp(LayerwiseRule):
    """The rule; see the module.

    Args:
        broadcast: "random" or "symmetric", which takes the signal down through transposed forward weights,
            a layer at a time.
        scale: random broadcast weights are drawn from N(0, scale^2 / outputs).
        trace: "exact", as above, or "shared": what a reset takes off the membrane is held constant, so that the trace needs no
            gate and is one per input and row (the paper's, whose neurons subtract). The sums are per synapse either way.
        Others as for :class:`~spikeprop.rules.windowed.LayerwiseRule`.
    """

    facts = Facts(
        paper="Bellec et al. 2020, Nature Communications 11:3625",
        backward="nothing",
        time="O(B k w)",
        memory="O(B w)",
        extra_weights="B_l, outputs x n, fixed",
        global_error=True,
        refuses=("conv",),
        by_row=True,
    )

    broadcast: Broadcast = "random"
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.broadcast not in get_args(Broadcast):
            raise InputError(f"EProp: broadcast = {self.broadcast!r} is not one of {get_args(Broadcast)}")
        if self.broadcast == "symmetric":  # the two variants differ in what they ask of a machine
            facts = replace(self.facts, backward="one layer", symmetric_weights=True, extra_weights="none")
            object.__setattr__(self, "facts", facts)

    def own_weights(self, network: Network, generator: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        if self.broadcast == "symmetric":
            return {}, {}
        outputs = network.outputs
        return {}, {
            f"broadcast.{index}": torch.randn(outputs, layer.rate.numel(), generator=generator).to(layer.bias)
            * (self.scale / outputs**0.5)
            for index, layer in enumerate(network.layers)
        }

    def memory(self, network: Network, batch_size: int, num_steps: int) -> int:
        synapses = sum(weight.numel() for layer in network.layers for weight in layer.weights())
        held = 4 * batch_size * synapses  # trace and sum, one of them anew; currents where their decays differ
        return super().memory(network, batch_size, num_steps) + network.readout.weight.element_size() * held

    def window(self, network: Network, state: WindowedState, stream: Stream, x: Tensor, labels: Tensor) -> Window:
        passages = self.run(network, stream, x)
        output = at_output(network, stream, labels)
        traces: list[SynapseTrace] = stream.own.setdefault(
            "traces", [SynapseTrace(layer, sources(layer), gated=self.trace == "exact") for layer in network.layers]
        )
        for passage, trace in zip(passages, traces, strict=True):
            arriving = [passage.inputs]
            if passage.layer.recurrent is not None:
                arriving.append(spikes_before(passage.before, passage.spikes))
            trace.observe(arriving, passage.slope, passage.spikes)
        gradients = []
        for index, signal in enumerate(self.signals(network, state, traces, output)):
            gradients += layer_gradients(network, index, *traces[index].collect(signal))
        activity = [passage.spikes.sum((0, 1)) for passage in passages]
        return Window(output.outputs, output.loss.expand(len(passages)), activity, [*gradients, *output.gradients])

    def signals(self, network: Network, state: WindowedState, traces: list[SynapseTrace], output: AtOutput) -> list[Tensor]:
        """The learning signal of every layer, at its activity ``[B, *output_shape]``."""
        if self.broadcast == "random":
            arriving = [output.delta @ weight / output.steps for weight in state.own.values()]
            return [part.unflatten(1, layer.output_shape) for part, layer in zip(arriving, network.layers, strict=True)]
        signals = [output.at_activity]
        for index in range(len(network.layers) - 1, 0, -1):
            layer = network.layers[index]
            gain = traces[index].bias_sum / (output.steps * (1.0 - layer.neuron.alpha))
            signals.append(layer.synapse.adjoint(signals[-1] * gain, layer.input_shape))
        return signals[::-1]
