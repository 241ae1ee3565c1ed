"""What the learning signal is attached to: SigProp's option f(U), or the membrane U itself.

Each option maps the pre-reset membrane to the value ``phi`` that the local loss reads, and gives ``dphi/dU``. SigProp never
differentiates a spike; rules that need a derivative of one (:class:`spikeprop.BPTT`) put ``dphi/dU`` in its place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from spikeprop.errors import InputError


class LearnOn:
    """An option for ``SigProp(learn_on=...)``, and for the ``surrogate`` of other rules.

    SigProp hands over membrane and threshold in units of the threshold, so that widths and slopes are in thresholds there; the
    other rules hand them over as they are, like other libraries.
    """

    def __call__(self, membrane: Tensor, threshold: float | Tensor) -> tuple[Tensor, Tensor | None]:
        """``(phi, dphi/dU)``, each in the shape of ``membrane``; None stands for a derivative of 1 everywhere."""
        raise NotImplementedError

    def derivative(self, membrane: Tensor, threshold: float | Tensor) -> Tensor | None:
        """``dphi/dU`` alone."""
        return self(membrane, threshold)[1]


@dataclass(frozen=True)
class Membrane(LearnOn):
    """The membrane itself.

    ``clip=None`` reads raw U: phi = U, no derivative of any kind, the method's own "voltage" option.
    ``clip=c`` reads the distance to the threshold in units of the threshold, limited to a window:
    phi = min(max((U - threshold) / threshold, -c), c). Its derivative is a boxcar around the threshold, which is a surrogate
    in all but name, so "no surrogate" is true of ``clip=None`` only.
    """

    clip: float | None = 1.0

    def __post_init__(self) -> None:
        if self.clip is not None and not self.clip > 0:
            raise InputError(f"Membrane: clip = {self.clip} must be above 0, or None for the raw membrane")

    def __call__(self, membrane: Tensor, threshold: float | Tensor) -> tuple[Tensor, Tensor | None]:
        if self.clip is None:
            return membrane, None
        if isinstance(threshold, float) and threshold == 0.0:
            raise InputError(
                f"Membrane(clip={self.clip:g}) reads the distance to the threshold, and rate neurons have none; "
                "use SigProp(learn_on=ReLU()) for them"
            )
        distance = (membrane / threshold).sub_(1.0)
        return distance.clamp(-self.clip, self.clip), distance.abs().le_(self.clip).div_(threshold)


@dataclass(frozen=True)
class ATan(LearnOn):
    """phi = atan(pi (U - threshold) / width) / pi + 1/2, a smooth step of height 1."""

    width: float = 1.0

    def __call__(self, membrane: Tensor, threshold: float | Tensor) -> tuple[Tensor, Tensor | None]:
        distance = membrane - threshold
        phi = (distance * (math.pi / self.width)).atan_().mul_(1.0 / math.pi).add_(0.5)
        return phi, self._derivative(distance)

    def derivative(self, membrane: Tensor, threshold: float | Tensor) -> Tensor:
        return self._derivative(membrane - threshold)

    def _derivative(self, distance: Tensor) -> Tensor:  # in place of the distance
        return distance.square_().mul_(math.pi**2 / self.width).add_(self.width).reciprocal_()


@dataclass(frozen=True)
class Sigmoid(LearnOn):
    """phi = 1 / (1 + exp(-slope (U - threshold)))."""

    slope: float = 4.0

    def __call__(self, membrane: Tensor, threshold: float | Tensor) -> tuple[Tensor, Tensor | None]:
        value = torch.sigmoid((membrane - threshold).mul_(self.slope))
        return value, torch.addcmul(value, value, value, value=-1.0).mul_(self.slope)


@dataclass(frozen=True)
class FastSigmoid(LearnOn):
    """phi = x / (1 + |x|) with x = slope (U - threshold) (Zenke and Ganguli 2018)."""

    slope: float = 4.0

    def __call__(self, membrane: Tensor, threshold: float | Tensor) -> tuple[Tensor, Tensor | None]:
        distance = (membrane - threshold).mul_(self.slope)
        shrink = distance.abs().add_(1.0).reciprocal_()
        return distance * shrink, shrink.square().mul_(self.slope)


@dataclass(frozen=True)
class Hard(LearnOn):
    """phi = S, with a derivative of 1 where the neuron spiked and 0 elsewhere: no smooth surrogate, so a silent neuron is
    blind.

    For :class:`spikeprop.BPTT` on LIF neurons, to show the dead-neuron problem in its pure form. (The literal derivative of a
    step is 0 almost everywhere and would move no hidden weight at all.)
    """

    def __call__(self, membrane: Tensor, threshold: float | Tensor) -> tuple[Tensor, Tensor | None]:
        spikes = membrane.clone().gt_(threshold)
        return spikes, spikes


@dataclass(frozen=True)
class ReLU(LearnOn):
    """phi = max(0, U): the activity of a rate layer, whose true derivative this is. For :class:`spikeprop.Rate` neurons."""

    def __call__(self, membrane: Tensor, threshold: float | Tensor) -> tuple[Tensor, Tensor | None]:
        return membrane.relu(), membrane.clone().gt_(0.0)
