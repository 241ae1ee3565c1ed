"""Decoupled neural interfaces (Jaderberg et al., arXiv 1608.05343): every layer learns from a guess of its own gradient.

    g_l = M_l [h_l, y, 1]                         the synthetic gradient dL/dh_l, from the layer's activity and the label (cDNI)
    R_l = 1/2 |g_l - a_l|^2                       M_l learns by regression, a_l held constant
    a_l = dh_{l+1}/dh_l^T g_{l+1},  a_L = dL/dh_L the guess of the layer above, through that one layer; the true one at the top

A layer updates as soon as its own window is over: it waits neither for the layers above nor for the loss. Only M_l waits, for
one neighbour. All M_l start at zero, so nothing but the readout and M_L moves at first.

The spiking form is ours (the paper's is for layers, and for time in recurrent networks): h_l is the mean activity over the
window, g_l / k f'(U[t]) the error at the membrane, times eligibility; a_l is for a displacement of h_l that lasts through the
window. A recurrent layer's own past is left to its eligibility. On rate neurons with one step this is the published rule.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from spikeprop.local_targets import at_drive, at_membrane
from spikeprop.network import Network
from spikeprop.rules.base import Facts
from spikeprop.rules.windowed import AtOutput, Errors, LayerwiseRule, Passage, WindowedState, present


@dataclass(frozen=True)
class DecoupledInterfaces(LayerwiseRule):
    """The rule; see the module. Arguments as for :class:`~spikeprop.rules.windowed.LayerwiseRule`."""

    facts = Facts(
        paper="Jaderberg et al. 2017, arXiv 1608.05343",
        backward="one layer",
        time="O(B k w)",
        memory="O(B k n)",
        extra_weights="M_l, n_l x (n_l + outputs + 1), learned",
        symmetric_weights=True,
        stored_history=True,
        global_error=True,  # M_L learns from it, and through M_L the others
        by_row=True,
    )

    def own_weights(self, network: Network, generator: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return {f"model.{index}": network.readout.weight.new_zeros(size) for index, size in enumerate(_sizes(network))}, {}

    def memory(self, network: Network, batch_size: int, num_steps: int) -> int:
        own = sum(neurons * seen for neurons, seen in _sizes(network))
        return super().memory(network, batch_size, num_steps) + 5 * network.readout.weight.element_size() * own

    def errors(
        self, network: Network, state: WindowedState, passages: list[Passage], labels: Tensor, output: AtOutput
    ) -> Errors:
        steps, batch = passages[0].spikes.shape[:2]
        errors: list[Tensor | None] = []
        losses, own = [], []
        label = present(labels)
        if not network.regression:
            label = F.one_hot(label, network.outputs).to(output.delta)
        arriving = output.at_activity * (steps * batch)  # of one row's loss, by the mean activity
        for index in range(len(passages) - 1, -1, -1):
            layer, _, spikes, _, _, slope = passages[index]
            seen = torch.cat([spikes.mean(0).flatten(1), label, torch.ones_like(label[:, :1])], 1)
            synthetic = seen @ state.own[f"model.{index}"].T
            error = at_membrane(synthetic.view_as(arriving), slope)
            errors.append(error / batch)
            wrong = synthetic - arriving.flatten(1)
            losses.append(0.5 * wrong.square().sum(1).mean())
            own.append(wrong.T @ seen / batch)
            if index > 0:
                driven = at_drive(layer.neuron, error, spikes, gated=self.trace == "exact")
                arriving = layer.synapse.adjoint(driven, layer.input_shape)
        return Errors(errors[::-1], losses[::-1], own[::-1])


def _sizes(network: Network) -> list[tuple[int, int]]:
    """Neurons of every layer, and how many numbers its model sees: them, the label, and a constant."""
    return [(layer.rate.numel(), layer.rate.numel() + network.outputs + 1) for layer in network.layers]
