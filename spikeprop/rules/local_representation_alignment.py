"""Local representation alignment (Ororbia, Mali, Kifer, Giles, arXiv 1803.01834; Ororbia and Mali, arXiv 1805.11703).

Every layer descends a saturating loss towards a target of its own, which is held constant:

    L_l = sum_i log(1 + (z_i - y_i)^2)            e_l = dL_l/dz_l = 2 (z_l - y_l) / (1 + (z_l - y_l)^2)

The target is the layer's pre-activation moved so that the layer above comes closer to its own target, then activated:

    y_l = f(u_l - step d_l)       "diff": d_l = dL_{l+1}/du_l, through the transpose of that one layer
                                  "fdbk": d_l = e_{l+1} E_{l+1}, error weights drawn at random, fixed (2018) or learned (2019)

At the top e is the readout's error. Nothing travels further than one layer at a time, but y_l waits for y_{l+1}.

The papers know no time. The spiking form is ours: z_l is the mean activity over the window (a single step's 0 or 1 leaves a
target nowhere to go) and y_l - z_l = mean_t [f(U[t] - step d_l[t]) - f(U[t])], with f the smooth step whose derivative is the
surrogate. On rate neurons f is the rectifier and this is the published target. e_l / k f'(U[t]) is the error at the membrane.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from spikeprop.errors import InputError
from spikeprop.local_targets import at_drive, at_membrane
from spikeprop.network import Network
from spikeprop.rules.base import Facts
from spikeprop.rules.windowed import AtOutput, Errors, LayerwiseRule, Passage, WindowedState
from spikeprop.surrogate import ReLU

Feedback = Literal["diff", "fdbk"]


@dataclass(frozen=True)
class LocalRepresentationAlignment(LayerwiseRule):
    """The rule; see the module.

    Args:
        feedback: what makes the targets, "diff" or "fdbk".
        step: how far a target lies from where the layer is; at 0.5 and small errors "diff" is gradient descent on the readout's
            loss, with one slope more per layer.
        scale: E_{l+1}, ``[neurons of l+1, neurons of l]``, is drawn from N(0, scale^2 / neurons of l+1).
        learn_feedback: whether E_{l+1} learns as the forward weight of layer l+1 does, by (dL_{l+1}/du_{l+1})^T z_l,
            z_l centred as the layer sees it.
        Others as for :class:`~spikeprop.rules.windowed.LayerwiseRule`.
    """

    facts = Facts(
        paper="Ororbia, Mali, Kifer, Giles 2018, arXiv 1803.01834",
        backward="one layer",
        time="O(B k w)",
        memory="O(B k n)",
        symmetric_weights=True,
        stored_history=True,
        global_error=True,
        by_row=True,
    )

    feedback: Feedback = "diff"
    step: float = 0.5
    scale: float = 1.0
    learn_feedback: bool = False

    def __post_init__(self) -> None:
        if self.feedback not in get_args(Feedback):
            raise InputError(f"LocalRepresentationAlignment: feedback = {self.feedback!r} is not one of {get_args(Feedback)}")
        if not self.step > 0:
            raise InputError(f"LocalRepresentationAlignment: step = {self.step} must be above 0, or a layer is its own target")
        if self.learn_feedback and self.feedback == "diff":
            raise InputError(
                "LocalRepresentationAlignment: learn_feedback=True needs feedback='fdbk'; 'diff' has no error weights to learn"
            )
        if self.feedback == "fdbk":  # the two variants differ in what they ask of a machine
            weights = f"E_l, n_l x n_(l-1), {'learned' if self.learn_feedback else 'fixed'}"
            object.__setattr__(self, "facts", replace(self.facts, symmetric_weights=False, extra_weights=weights))

    def own_weights(self, network: Network, generator: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        if self.feedback == "diff":
            return {}, {}
        feedback = {
            f"feedback.{index}": torch.randn(above, here, generator=generator).to(network.readout.weight)
            * (self.scale / above**0.5)
            for index, (here, above) in enumerate(_sizes(network))
        }
        return (feedback, {}) if self.learn_feedback else ({}, feedback)

    def memory(self, network: Network, batch_size: int, num_steps: int) -> int:
        own = sum(here * above for here, above in _sizes(network)) if self.feedback == "fdbk" else 0
        return super().memory(network, batch_size, num_steps) + 5 * network.readout.weight.element_size() * own

    def errors(
        self, network: Network, state: WindowedState, passages: list[Passage], labels: Tensor, output: AtOutput
    ) -> Errors:
        steps, batch = passages[0].spikes.shape[:2]
        errors: list[Tensor | None] = []
        losses, own = [], []
        # Of one row's loss above this layer: the derivatives by that layer's activity and drive, and by this one's activity.
        at_above, driven = (output.delta * batch,) * 2
        arriving, centre = output.at_activity * (steps * batch), None
        for index in range(len(passages) - 1, -1, -1):
            layer, _, spikes, membrane, _, slope = passages[index]
            if self.feedback == "diff":
                move = arriving * slope
            else:
                move = (at_above.flatten(1) @ state.own[f"feedback.{index}"]).view_as(membrane[0])
            if self.learn_feedback:
                mean = spikes.mean(0) if centre is None else spikes.mean(0) - centre
                own.append(driven.flatten(1).T @ mean.flatten(1) / batch)
            f = self.surrogate if layer.neuron.spiking else ReLU()
            threshold = layer.neuron.threshold
            missing = (f(membrane, threshold)[0] - f(membrane - self.step * move, threshold)[0]).mean(0)
            losses.append(missing.square().log1p().flatten(1).sum(1).mean())
            at_above = 2.0 * missing / (1.0 + missing.square())
            error = at_membrane(at_above, slope)
            errors.append(error / batch)
            if index > 0:
                driven, centre = at_drive(layer.neuron, error, spikes, gated=self.trace == "exact"), network.centre(index)
                if self.feedback == "diff":
                    arriving = layer.synapse.adjoint(driven, layer.input_shape)
        return Errors(errors[::-1], losses[::-1], own[::-1])


def _sizes(network: Network) -> list[tuple[int, int]]:
    """Neurons of every layer and of what is above it, the outputs at last."""
    sizes = [*(layer.rate.numel() for layer in network.layers), network.outputs]
    return list(itertools.pairwise(sizes))
