"""The Kolen-Pollack rule (Kolen and Pollack 1994; Akrout, Wilson, Humphreys, Lillicrap, Tweed 2019, arXiv 1904.05391).

Feedback alignment whose feedback weights learn: each gets the update of the forward weight that it stands for, which is a
product of the same two local quantities, and both decay.

    W <- (1 - rate decay) W + update        B <- (1 - rate decay) B + update

so W - B = (W_0 - B_0) prod (1 - rate decay): the two become equal whatever is learned, and feedback alignment becomes
backpropagation. This holds to the letter for every optimiser that computes its step from the gradients alone (SGD, momentum,
Adam), because the decay does not pass through it. The error's way down is that of :mod:`spikeprop.feedback`, through time on
spiking neurons; on rate neurons and a single step it is the rule of the papers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spikeprop.errors import InputError
from spikeprop.feedback import draw_feedback, errors_at_membranes, replaced_weights, weight_alignment
from spikeprop.network import Network
from spikeprop.rules.base import Facts, learned_by
from spikeprop.rules.windowed import AtOutput, Errors, LayerwiseRule, Passage, Stream, Window, WindowedState


@dataclass(frozen=True)
class KolenPollack(LayerwiseRule):
    """The rule; see the module.

    Args:
        scale: feedback weights are drawn from N(0, scale^2 / fan-in of the forward weights they stand for).
        decay: share of W and of B that is lost per update, divided by the learning rate. At least 0.
        Others as for :class:`~spikeprop.rules.windowed.LayerwiseRule`.
    """

    facts = Facts(
        paper="Kolen, Pollack 1994; Akrout et al. 2019, arXiv 1904.05391",
        backward="layers and time",
        time="O(B k w)",
        memory="O(B k n)",
        extra_weights="B, one per weight above layer 1, learned",
        stored_history=True,
        global_error=True,
        by_row=True,
    )

    moves_weights = True  # the decay

    scale: float = 1.0
    decay: float = 0.3

    def initial_state(self, network: Network, *, generator: torch.Generator | None = None) -> WindowedState:
        if not self.decay >= 0.0:
            raise InputError(f"KolenPollack: decay = {self.decay:g} must be at least 0, or the weights grow without bound")
        return super().initial_state(network, generator=generator)

    def own_weights(self, network: Network, generator: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return draw_feedback(network, self.scale, generator), {}

    def errors(
        self, network: Network, state: WindowedState, passages: list[Passage], labels: Tensor, output: AtOutput
    ) -> Errors:
        slopes, spikes = [passage.slope for passage in passages], [passage.spikes for passage in passages]
        at_outputs, gated = output.delta / output.steps, self.trace == "exact"
        errors = errors_at_membranes(network, state.own, slopes, spikes, at_outputs, gated=gated)
        return Errors([*errors], [output.loss] * len(passages))

    def window(self, network: Network, state: WindowedState, stream: Stream, x: Tensor, labels: Tensor) -> Window:
        window = super().window(network, state, stream, x, labels)
        asked = {id(weight): gradient for weight, gradient in zip(learned_by(network), window.gradients, strict=True)}
        forward, rate = replaced_weights(network), float(state.optimizer.param_groups[0]["lr"])
        for weight in [*forward.values(), *state.own.values()]:
            weight.mul_(1.0 - rate * self.decay)
        return window._replace(gradients=[*window.gradients, *(asked[id(weight)] for weight in forward.values())])

    def weight_alignment(self, network: Network, state: WindowedState) -> dict[str, float]:
        """The cosine between every feedback weight and the forward weight that it stands for, by name; it goes to 1."""
        return weight_alignment(network, state.own)
