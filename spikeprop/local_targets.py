"""What a layer tells its neighbour below, for rules that step down one layer at a time.

A layer is represented by its mean activity over the update window, h = mean_t S[t]. A derivative dL/dh reaches the membrane of
every step as dL/dh / k f'(U[t]), and what goes to the layer below is how L would change if that layer's activity were displaced
by the same amount at every step of the window: one derivative per neuron, not one per step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spikeprop.neuron import Neuron
from spikeprop.traces import step_back


def at_membrane(at_mean: Tensor, slope: Tensor) -> Tensor:
    """A derivative by the mean activity ``[B, *features]`` as one by the membrane of each step ``[k, B, *features]``."""
    return at_mean / len(slope) * slope


def at_drive(neuron: Neuron, error: Tensor, spikes: Tensor, *, gated: bool) -> Tensor:
    """A derivative by the membrane of each step ``[k, B, *features]`` as one by a displacement of the drive ``[B, *features]``
    that lasts through the window.

    Spikes are held constant; ``gated``: whether one wipes its neuron's responsibility, under reset to zero.
    """
    total = torch.zeros_like(error[0])
    later: tuple[Tensor, Tensor] | None = None
    for step in range(len(error) - 1, -1, -1):
        later = step_back(neuron, error[step], spikes[step], later, gated=gated)
        total += later[1]
    return total
