"""Keeping neurons alive: each neuron holds its firing rate in a band, with nothing but running rates of its own layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from spikeprop.errors import InputError
from spikeprop.network import Layer

REFERENCE_BATCH = 128  # rows per update at which strength and momentum are stated; smaller batches move proportionally less


@dataclass(frozen=True)
class Homeostasis:
    """A band for the firing rate, held by the neuron's bias or by its threshold.

    After each update the excitability of a neuron with running rate r moves up by strength * (lowest - r) / lowest thresholds
    if r is below the band, else down by strength * min(1, (r - highest) / highest) if r is above it. A neuron without a spike
    in an update of 128 rows or more counts as r = 0. In layers of maps the r of the ceiling is the mean over the neuron's
    channel; with one bias per channel that of the floor is, too.

    Args:
        lowest, highest: the band, in spikes per step.
        strength: the largest move per update of 128 rows, in units of the threshold; 0 turns homeostasis off.
        act_on: "bias" or "threshold" (the bias goes up or the threshold down).
    """

    lowest: float = 0.02
    highest: float = 0.15
    strength: float = 0.02
    act_on: Literal["bias", "threshold"] = "bias"

    def __post_init__(self) -> None:
        if not 0.0 < self.lowest < self.highest < 1.0:
            raise InputError(f"Homeostasis: the band {self.lowest} to {self.highest} must satisfy 0 < lowest < highest < 1")
        if self.act_on not in ("bias", "threshold"):
            raise InputError(f"Homeostasis: act_on = {self.act_on!r} is neither 'bias' nor 'threshold'")

    @staticmethod
    def follow(layer: Layer, activity: Tensor, batch: int, momentum: float = 0.1) -> None:
        """Move the layer's running rate towards the mean activity ``[*output_shape]`` of an update window."""
        layer.rate.lerp_(activity, momentum * min(1.0, batch / REFERENCE_BATCH))

    def regulate(self, layer: Layer, batch: int, activity: Tensor | None = None) -> None:
        """Move each neuron back towards the band. ``activity``: what :meth:`follow` was given."""
        neuron = layer.neuron
        if not neuron.spiking or self.strength == 0.0:
            return
        rate = layer.rate
        if activity is not None and batch >= REFERENCE_BATCH:
            # Who is silent in so many rows is below the band. A running rate would say so a few windows later, in which the
            # ceiling goes on pushing the neuron down; where its input never changes, that would be most of the time.
            rate = rate.where(activity > 0.0, 0.0)
        shared = layer.rate.mean((1, 2), keepdim=True) if rate.dim() > 1 else rate
        if layer.bias.shape != rate.shape:  # one bias per channel
            rate = shared
        silent = (self.lowest - rate).clamp(min=0.0) / self.lowest
        # The ceiling is the channel's: a neuron whose input never changes spikes equally often in every sequence, in 4 steps at
        # a rate of 0.25 if at all, and a ceiling of its own would silence it, the floor wake it, and so on for ever.
        busy = ((shared - self.highest).clamp(min=0.0) / self.highest).clamp(max=1.0)
        move = torch.where(rate < self.lowest, silent, -busy) * (self.strength * min(1.0, batch / REFERENCE_BATCH))
        if self.act_on == "bias":
            layer.bias.add_(move * neuron.threshold)
        else:
            assert isinstance(neuron.threshold, Tensor)
            neuron.threshold.mul_(1.0 - move)

    def prepare(self, layer: Layer) -> None:
        """Give the layer thresholds of its own where the band is held by them."""
        neuron = layer.neuron
        if self.act_on == "threshold" and neuron.spiking:
            threshold = torch.zeros_like(layer.bias) + neuron.threshold
            del neuron.threshold
            neuron.register_buffer("threshold", threshold)
