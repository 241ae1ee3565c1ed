"""Local classifiers on fixed random readouts: DECOLLE (Kaiser, Mostafa, Neftci 2020, Frontiers in Neuroscience 14:424).

Every layer has a readout of its own, drawn once and kept, and at every step its neurons learn to make that readout right:

    y_l[t] = softmax(G_l S_l[t])                              for real targets without the softmax
    e_l[t] = (y_l[t] - target) G_l f'(U_l[t])                 the gradient of the cross-entropy (squared error) at that step
    dW_l   = mean over steps of e_l[t]^T trace_l[t]

As in the paper the readout sees the spikes, the surrogate's derivative stands for theirs, and the traces run forward in time:
nothing travels back through layers or time. A recurrent synapse learns as the others do, from what it has let through, and no
error passes through it. Two choices are this module's: cross-entropy (the paper leaves the loss open and uses a smooth L1), and
no regulariser of the firing rates (``homeostasis`` has that task). On rate neurons the readout sees the activity.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from spikeprop.network import Network
from spikeprop.rules.base import Facts
from spikeprop.rules.windowed import AtOutput, Errors, LayerwiseRule, Passage, WindowedState


@dataclass(frozen=True)
class LocalClassifier(LayerwiseRule):
    """The rule; see the module.

    Args:
        scale: G_l is drawn from N(0, scale^2 / neurons of layer l).
        trace: "shared", the paper's and online, or "exact", see :class:`~spikeprop.rules.windowed.LayerwiseRule`.
        Others as for :class:`~spikeprop.rules.windowed.LayerwiseRule`.
    """

    facts = Facts(
        paper="Kaiser, Mostafa, Neftci 2020, Frontiers in Neuroscience 14:424",
        backward="nothing",
        time="O(B k w)",
        memory="O(B n)",
        extra_weights="G_l, outputs x n, fixed",
        by_row=True,
    )

    trace: Literal["shared", "exact"] = "shared"
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.trace == "exact":  # it buffers a window
            object.__setattr__(self, "facts", replace(self.facts, memory="O(B k n)", stored_history=True))

    def own_weights(self, network: Network, generator: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        sizes = [layer.rate.numel() for layer in network.layers]
        readouts = {
            f"readout.{index}": torch.randn(network.outputs, size, generator=generator).to(network.readout.weight)
            * (self.scale / size**0.5)
            for index, size in enumerate(sizes)
        }
        return {}, readouts

    def errors(
        self, network: Network, state: WindowedState, passages: list[Passage], labels: Tensor, output: AtOutput
    ) -> Errors:
        steps, batch = passages[0].spikes.shape[:2]
        targets = (labels.expand(steps, *labels.shape) if network.regression else labels).flatten(0, 1)
        errors: list[Tensor | None] = []
        losses = []
        for index, passage in enumerate(passages):
            weight = state.own[f"readout.{index}"]
            outputs = passage.spikes.flatten(0, 1).flatten(1) @ weight.T
            loss, delta = network.readout.delta(outputs, targets)
            errors.append((delta @ weight).view_as(passage.slope) * passage.slope / (steps * batch))
            losses.append(loss.mean())
        return Errors(errors, losses)
