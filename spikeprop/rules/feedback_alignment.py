"""Feedback alignment (Lillicrap, Cownden, Tweed, Akerman 2016): backpropagation through fixed random feedback weights.

    e_l[t] = (B_{l+1}^T lambda_{l+1}[t] + C_l^T lambda_l[t+1]) f'(U_l[t])        B, C: fixed, drawn once
    dW_l   = sum_t e_l[t]^T trace_l[t]

lambda is how a layer's drive bears on its errors from t on (:mod:`spikeprop.feedback`). The readout's weights and those of
recurrent synapses have a random counterpart, too, so no error passes through a transposed forward weight. On rate neurons and a
single step lambda = e and the trace is the input: Lillicrap's rule. The paper has no spiking form; here it is backpropagation
through time with the reset held constant and every transpose replaced. An error does not leave its window on its way back in
time, while a synapse's trace reaches back beyond it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spikeprop.feedback import draw_feedback, errors_at_membranes, weight_alignment
from spikeprop.network import Network
from spikeprop.rules.base import Facts
from spikeprop.rules.windowed import AtOutput, Errors, LayerwiseRule, Passage, WindowedState


@dataclass(frozen=True)
class FeedbackAlignment(LayerwiseRule):
    """The rule; see the module.

    Args:
        scale: feedback weights are drawn from N(0, scale^2 / fan-in of the forward weights they stand for).
        Others as for :class:`~spikeprop.rules.windowed.LayerwiseRule`.
    """

    facts = Facts(
        paper="Lillicrap, Cownden, Tweed, Akerman 2016, Nature Communications 7:13276",
        backward="layers and time",
        time="O(B k w)",
        memory="O(B k n)",
        extra_weights="B, one per weight above layer 1, fixed",
        stored_history=True,
        global_error=True,
        by_row=True,
    )

    scale: float = 1.0

    def own_weights(self, network: Network, generator: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return {}, draw_feedback(network, self.scale, generator)

    def errors(
        self, network: Network, state: WindowedState, passages: list[Passage], labels: Tensor, output: AtOutput
    ) -> Errors:
        slopes, spikes = [passage.slope for passage in passages], [passage.spikes for passage in passages]
        at_outputs, gated = output.delta / output.steps, self.trace == "exact"
        errors = errors_at_membranes(network, state.own, slopes, spikes, at_outputs, gated=gated)
        return Errors([*errors], [output.loss] * len(passages))

    def weight_alignment(self, network: Network, state: WindowedState) -> dict[str, float]:
        """The cosine between every feedback weight and the forward weight that it stands for, by name."""
        return weight_alignment(network, state.own)
