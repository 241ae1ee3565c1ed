"""Difference target propagation (Lee, Zhang, Fischer, Bengio, arXiv 1412.7525): targets come down through learned inverses.

    t_L = h_L - step dL/dh_L                      the last layer's activity, moved against the readout's error
    t_l = h_l + g_l(t_{l+1}) - g_l(h_{l+1})       g_l: guesses layer l from layer l+1; the difference cancels what it misses
    L_l = |h_l - t_l|^2                           descended by layer l, t_l held constant

Every g_l has weights of its own and learns to undo its layer f_{l+1} around the activity at hand:

    R_l = 1/2 |g_l(f_{l+1}(h_l + noise)) - (h_l + noise)|^2,         noise ~ N(0, sigma^2)

The spiking form is ours: h is the mean activity over the window, the noise is a constant current that lasts through it, and the
layer above is run a second time with it, from the state in which the window began. g_l is linear on activities; the error at
the membrane is dL_l/dh_l / k f'(U[t]), times eligibility. On rate neurons this is the published rule with linear g.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from spikeprop.errors import InputError
from spikeprop.local_targets import at_membrane
from spikeprop.network import Network
from spikeprop.rules.base import Facts
from spikeprop.rules.windowed import AtOutput, Errors, LayerwiseRule, Passage, WindowedState


@dataclass(frozen=True)
class TargetPropagation(LayerwiseRule):
    """The rule; see the module.

    Args:
        step: how far the last layer's target lies from its activity; at 0.5 the last layer descends the readout's loss.
        noise: sigma, in units of activity (a spike at every step is 1).
        Others as for :class:`~spikeprop.rules.windowed.LayerwiseRule`.
    """

    facts = Facts(
        paper="Lee, Zhang, Fischer, Bengio 2015, arXiv 1412.7525",
        backward="one layer",
        time="O(B k w)",
        memory="O(B k n)",
        extra_weights="g_l, n_l x (n_(l+1) + 1), learned",
        symmetric_weights=True,  # the readout's alone, for the last layer's target
        stored_history=True,
        global_error=True,
    )

    step: float = 0.5
    noise: float = 0.1

    def __post_init__(self) -> None:
        if not self.step > 0:
            raise InputError(f"TargetPropagation: step = {self.step} must be above 0, or a layer is its own target")
        if not self.noise >= 0:
            raise InputError(f"TargetPropagation: noise = {self.noise} is a standard deviation and must be at least 0")

    def own_weights(self, network: Network, generator: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        inverses = {}
        for index, (below, above) in enumerate(_sizes(network)):
            weight = torch.randn(below, above, generator=generator) / above**0.5
            inverses[f"inverse.{index}"] = F.pad(weight, (0, 1)).to(network.readout.weight)  # the last column is the bias
        return inverses, {}

    def memory(self, network: Network, batch_size: int, num_steps: int) -> int:
        own = sum(below * (above + 1) for below, above in _sizes(network))
        return super().memory(network, batch_size, num_steps) + 5 * network.readout.weight.element_size() * own

    def errors(
        self, network: Network, state: WindowedState, passages: list[Passage], labels: Tensor, output: AtOutput
    ) -> Errors:
        steps, batch = passages[0].spikes.shape[:2]
        errors: list[Tensor | None] = []
        losses, own = [], []
        missing = self.step * steps * batch * output.at_activity  # h - t of each row
        for index in range(len(passages) - 1, -1, -1):
            passage = passages[index]
            losses.append(missing.flatten(1).square().sum(1).mean())
            errors.append(at_membrane(2.0 * missing / batch, passage.slope))
            if index > 0:
                inverse = state.own[f"inverse.{index - 1}"]
                own.append(self.reconstruction(network, index, inverse, passage, state.generator))
                missing = (missing.flatten(1) @ inverse[:, :-1].T).view_as(passage.inputs[0])
        return Errors(errors[::-1], losses[::-1], own[::-1])

    def reconstruction(
        self, network: Network, index: int, inverse: Tensor, passage: Passage, generator: torch.Generator
    ) -> Tensor:
        """The gradient of R, averaged over rows, by the inverse of layer ``index``."""
        shape, layer = passage.inputs.shape[1:], passage.layer
        noise = self.noise * torch.randn(shape, generator=generator).to(passage.inputs)
        (spikes, _), _ = layer.run(passage.before, layer.drive(passage.inputs + noise), network.fold_bias(index))
        code = F.pad(spikes.mean(0).flatten(1), (0, 1), value=1.0)
        wrong = code @ inverse.T - (passage.inputs.mean(0) + noise).flatten(1)
        return wrong.T @ code / len(code)


def _sizes(network: Network) -> list[tuple[int, int]]:
    """Neurons of every layer but the last and of the one above it."""
    sizes = [layer.rate.numel() for layer in network.layers]
    return list(itertools.pairwise(sizes))
