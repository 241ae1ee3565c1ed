"""The trained classifier layer: a linear map from the last layer's mean activity to the outputs, learned by the delta rule."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Readout(nn.Module):
    """Linear outputs from mean activity (spike counts divided by steps).

    ``weight`` is ``[outputs, features]``, ``bias`` is ``[outputs]``; both start at zero. The layer stays off the chip: the host
    computes it from the spike counts that the chip returns.
    """

    def __init__(self, features: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(outputs, features), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(outputs), requires_grad=False)

    def forward(self, rates: Tensor) -> Tensor:
        """Mean activity ``[B, *features]`` to outputs ``[B, outputs]``."""
        return F.linear(rates.flatten(1), self.weight, self.bias)

    def delta(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Loss per sample ``[B]`` and delta ``[B, outputs]``: what comes out minus what should (Widrow and Hoff 1960).

        Targets are class indices ``[B]``, read through a softmax, or real vectors ``[B, outputs]``, read as they are.
        """
        if targets.is_floating_point():
            difference = outputs - targets
            return 0.5 * difference.square().sum(1), difference
        wanted = F.one_hot(targets, outputs.shape[1]).to(outputs.dtype)
        return F.cross_entropy(outputs, targets, reduction="none"), outputs.softmax(1) - wanted
