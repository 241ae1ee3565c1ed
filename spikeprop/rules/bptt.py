"""Backpropagation through time with a surrogate for the spike (Werbos 1990; Neftci, Mostafa, Zenke 2019, arXiv 1901.09948).

The baseline that everything else is measured against. The loss of the readout on the last layer's mean activity is
differentiated through all layers and all steps of a window by autograd:

    dL/dU[t] = dL/dS[t] f'(U[t]) + beta dL/dU[t+1] (dU_after[t]/dU[t])          and through W and I to the layers below

A window that is the whole sequence is BPTT; ``update_every=k`` cuts the graph, and updates, every k steps (TBPTT, Williams and
Peng 1990). The network's own forward pass is used, bit for bit; only the derivative of the spike is replaced.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spikeprop.differentiable import Backward, ResetGradient, check_reset_gradient
from spikeprop.network import Network
from spikeprop.neuron import State
from spikeprop.rules.base import Facts, learned_by
from spikeprop.rules.windowed import Stream, Window, WindowedRule, WindowedState, present
from spikeprop.surrogate import ATan, LearnOn


@dataclass(frozen=True)
class BPTT(WindowedRule):
    """The rule; see the module.

    Args:
        surrogate: its derivative stands for that of the spike. ``Hard()`` is 1 where the neuron spiked and 0 elsewhere:
            a silent neuron then never learns.
        reset_gradient: whether a gradient flows through the reset, see :mod:`spikeprop.differentiable`.
        Others as for :class:`~spikeprop.rules.windowed.WindowedRule`.
    """

    facts = Facts(
        paper="Werbos 1990; Neftci, Mostafa, Zenke 2019, arXiv 1901.09948",
        backward="layers and time",
        time="O(B k w)",
        memory="O(B k n)",
        symmetric_weights=True,
        stored_history=True,
        global_error=True,
        autograd=True,
        by_row=True,
    )

    surrogate: LearnOn = ATan()
    reset_gradient: ResetGradient = "detached"

    def initial_state(self, network: Network, *, generator: torch.Generator | None = None) -> WindowedState:
        check_reset_gradient(self, self.reset_gradient)
        return super().initial_state(network, generator=generator)

    def window(self, network: Network, state: WindowedState, stream: Stream, x: Tensor, labels: Tensor) -> Window:
        weights = learned_by(network)
        try:
            for weight in weights:
                weight.requires_grad_(True)
            with torch.enable_grad():
                activity = []
                for index, layer in enumerate(network.layers):
                    arithmetic = Backward(self.surrogate, self.reset_gradient, layer.neuron.arithmetic)
                    state_before, drive = stream.neurons[index], layer.drive(x)
                    (x, _), after = layer.run(state_before, drive, network.fold_bias(index), arithmetic)
                    stream.neurons[index] = detached(after)
                    activity.append(x.detach().sum((0, 1)))
                stream.count, stream.steps = stream.count + x.sum(0), stream.steps + len(x)
                outputs = network.readout(stream.count / stream.steps)
                loss = network.readout.delta(outputs, present(labels))[0].mean()
                gradients = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
        finally:
            for weight in weights:
                weight.requires_grad_(False)
        stream.count = stream.count.detach()
        return Window(outputs.detach(), loss.detach().expand(len(network.layers)), activity, list(gradients))


def detached(state: State) -> State:
    """The same state without its history."""
    return type(state)(*(part.detach() for part in state))
