"""Direct feedback alignment (Nokland, arXiv 1609.01596): each layer gets the output's error through a random matrix of its own.

    e_l[t] = (delta B_l) f'(U_l[t])          delta: error at the readout; B_l fixed, drawn once
    dW_l = sum_t e_l[t]^T trace_l[t]

On spiking neurons f' is the surrogate's derivative at each step and the trace the membrane's filter of the input; on rate
neurons this is Nokland's rule.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spikeprop.network import Network
from spikeprop.rules.base import Facts
from spikeprop.rules.windowed import AtOutput, Errors, LayerwiseRule, Passage, WindowedState


@dataclass(frozen=True)
class DirectFeedbackAlignment(LayerwiseRule):
    """The rule; see the module.

    Args:
        scale: B_l is drawn from N(0, scale^2 / outputs).
        Others as for :class:`~spikeprop.rules.windowed.LayerwiseRule`.
    """

    facts = Facts(
        paper="Nokland 2016, arXiv 1609.01596",
        backward="nothing",
        time="O(B k w)",
        memory="O(B k n)",
        extra_weights="B_l, outputs x n, fixed",
        stored_history=True,
        global_error=True,
        by_row=True,
    )

    scale: float = 1.0

    def own_weights(self, network: Network, generator: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        outputs = network.outputs
        feedback = {
            f"feedback.{index}": torch.randn(outputs, layer.rate.numel(), generator=generator).to(layer.bias)
            * (self.scale / outputs**0.5)
            for index, layer in enumerate(network.layers)
        }
        return {}, feedback

    def errors(
        self, network: Network, state: WindowedState, passages: list[Passage], labels: Tensor, output: AtOutput
    ) -> Errors:
        errors: list[Tensor | None] = []
        for index, passage in enumerate(passages):
            at_activity = output.delta @ state.own[f"feedback.{index}"] / output.steps
            errors.append(at_activity.unflatten(1, passage.layer.output_shape) * passage.slope)
        return Errors(errors, [output.loss] * len(passages))
