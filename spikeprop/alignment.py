"""How far a rule's update points the way of backpropagation's: per layer, the cosine between the two on the same batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from spikeprop.network import Network
from spikeprop.rules.base import Rule, learned_by
from spikeprop.rules.bptt import BPTT


def updates(network: Network, rule: Rule, state: Any, inputs: Tensor, labels: Tensor) -> list[list[Tensor]]:
    """What a rule would hand to its optimiser for a batch, per layer and then for the readout; nothing is changed.

    Args:
        state: the rule's state as training left it, or a fresh one.
        inputs, labels: as for :meth:`spikeprop.rules.base.Rule.learn`.

    Returns:
        Gradients (an update goes against them) of the weights of every layer, its bias last, and of the readout's.
    """
    twin, state = copy.deepcopy((network, state))  # together, so that the optimiser's tensors stay the network's
    if getattr(rule, "update_every", None) is not None:  # one window, or only the last one's gradient would be seen
        rule = replace(rule, update_every=None)  # type: ignore[type-var]
    seen: list[Tensor] = []

    def note(*_: Any) -> None:
        seen.extend(weight.grad.clone() for weight in learned_by(twin) if weight.grad is not None)

    state.optimizer.register_step_pre_hook(note)
    rule.learn(twin, rule.begin(state), inputs, labels)
    gradients = iter(seen)
    per_layer = [[next(gradients) for _ in layer.weights()] for layer in twin.layers]
    return [*per_layer, list(gradients)]


def alignment(network: Network, rule: Rule, state: Any, inputs: Tensor, labels: Tensor) -> list[float | None]:
    """Per layer the cosine, in -1..1, between the rule's update and the gradient of :class:`~spikeprop.rules.bptt.BPTT` (reset
    detached) on the same batch: all weights of the layer as one vector, the bias left out.

    None where either is zero, as before the readout has learned anything. Arguments as for :func:`updates`.
    """
    reference = BPTT()
    ours = updates(network, rule, state, inputs, labels)
    twin = copy.deepcopy(network)  # a fresh state drops what belongs to another rule
    theirs = updates(twin, reference, reference.initial_state(twin), inputs, labels)
    found: list[float | None] = []
    for a, b in zip(ours[:-1], theirs[:-1], strict=True):
        first, second = (torch.cat([part.flatten().double() for part in parts[:-1]]) for parts in (a, b))
        norms = float(first.norm() * second.norm())
        found.append(float(first @ second) / norms if norms > 0.0 else None)
    return found


def observer(rule: Rule, inputs: Tensor, labels: Tensor) -> Callable[[Network, Any], dict[str, Any]]:
    """For ``fit(observe=...)``: the alignment on a fixed batch after every epoch, under the name ``alignment``."""
    return lambda network, state: {"alignment": alignment(network, rule, state, inputs, labels)}
