"""Augmentation: training inputs changed at random, anew each time they are seen, so that a small data set teaches more.

Only :func:`spikeprop.fit` applies it; evaluation, diagnosis and the centring of inputs see the data as they are.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from spikeprop.encoding import Encoder
from spikeprop.errors import InputError


@dataclass(frozen=True)
class Augmentation:
    """What may happen to a training input; nothing by default.

    Args:
        noise: standard deviation of Gaussian noise added to every entry. For inputs fed as a current.
        shift: pictures move by up to so many pixels in each direction, each sample by its own whole number of pixels; what
            enters at the edge is zero. The frames of one recording move together.
        flip: pictures are mirrored left to right with probability 1/2. Not for digits or letters.
        drop: every entry is set to zero with this probability and the others grow by 1 / (1 - drop), so that the mean input,
            which centring takes away, stays (dropout, Srivastava et al. 2014; on events it makes others than 0 and 1).
        delay: recordings begin up to so many steps earlier or later; what enters at the ends is zero.

    Raises:
        InputError: a value outside its range.
    """

    noise: float = 0.0
    shift: int = 0
    flip: bool = False
    drop: float = 0.0
    delay: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.noise) and self.noise >= 0.0):
            raise InputError(f"Augmentation: noise = {self.noise} is a standard deviation and must be finite and at least 0")
        if not isinstance(self.flip, bool):
            raise InputError(f"Augmentation: flip = {self.flip!r} must be True or False")
        if not 0.0 <= self.drop < 1.0:
            raise InputError(f"Augmentation: drop = {self.drop} is a probability and must be at least 0 and below 1")
        for name, unit in (("shift", "pixels"), ("delay", "steps")):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise InputError(f"Augmentation: {name} = {value!r} must be a whole number of {unit}, at least 0")

    def check(self, input_shape: tuple[int, ...], encoder: Encoder, num_steps: int | None = None) -> None:
        """Raise InputError where it does not suit inputs of this shape (and these steps, of recordings), or this encoder."""
        if self.noise and encoder.name != "current":
            raise InputError(
                f"fit: noise = {self.noise:g} suits inputs fed as a current, not the {encoder.name} encoder; leave it at 0"
            )
        for name in ("shift", "flip"):
            value = getattr(self, name)
            if value and len(input_shape) != 3:
                raise InputError(
                    f"fit: {name} = {value} moves pictures (C, H, W), and one input here has shape {input_shape}; leave it out"
                )
        if self.drop and encoder.name in ("poisson", "latency"):
            raise InputError(
                f"fit: drop = {self.drop:g} enlarges the inputs it leaves, beyond the 1 that the {encoder.name} encoder takes; "
                "leave it at 0"
            )
        if self.shift and self.shift >= min(input_shape[1:]):
            raise InputError(f"fit: shift = {self.shift} can move a picture of {input_shape} out of sight; give less")
        if self.delay and not encoder.temporal:
            raise InputError(
                f"fit: delay = {self.delay} moves recordings in time, and inputs for the {encoder.name} encoder have no time; "
                "leave it out"
            )
        if num_steps is not None and self.delay >= num_steps:
            raise InputError(f"fit: delay = {self.delay} can move a recording of {num_steps} steps out of sight; give less")

    def __call__(self, inputs: Tensor, generator: Generator | None = None) -> Tensor:
        """Inputs ``[B, *features]`` or, for recordings, ``[B, T, *features]`` to changed ones of the same shape."""
        if self.shift:
            inputs = _shift(inputs, self.shift, self.shift, generator)
        if self.delay:
            inputs = _shift(inputs.flatten(2).unsqueeze(1), self.delay, 0, generator).reshape(inputs.shape)
        if self.drop:
            inputs = inputs * (torch.rand(inputs.shape, generator=generator) >= self.drop) / (1.0 - self.drop)
        if self.flip:
            mirrored = torch.rand(len(inputs), generator=generator) < 0.5
            inputs = torch.where(mirrored.view(-1, *[1] * (inputs.dim() - 1)), inputs.flip(-1), inputs)
        if self.noise:
            inputs = inputs + self.noise * torch.randn(inputs.shape, generator=generator)
        return inputs

    def config(self) -> dict[str, Any]:
        return asdict(self)


def _shift(pictures: Tensor, down_most: int, right_most: int, generator: Generator | None) -> Tensor:
    """Each sample of ``[B, ..., H, W]`` moved by its own offset: a window of H by W cut from the picture with a border."""
    height, width = pictures.shape[-2:]
    padded = F.pad(pictures, (right_most, right_most, down_most, down_most)).flatten(1, -3)
    down, right = (torch.randint(0, 2 * most + 1, (len(pictures), 1), generator=generator) for most in (down_most, right_most))
    rows, columns = torch.arange(height) + down, torch.arange(width) + right
    sample = torch.arange(len(pictures)).view(-1, 1, 1)
    moved = padded.movedim(1, -1)[sample, rows.unsqueeze(2), columns.unsqueeze(1)]
    return moved.movedim(-1, 1).reshape(pictures.shape)
