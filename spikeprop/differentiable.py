"""The neuron's step with a derivative: the same :func:`spikeprop.neuron.advance`, on numbers that carry one.

No rule needs the true derivative of the spike, which is zero almost everywhere; every arithmetic here puts a surrogate in its
place (Neftci, Mostafa, Zenke 2019). Two directions:

* :class:`Backward` records an autograd graph: gradients travel back through layers and time.
* :class:`Forward` carries tangents along with the values (:class:`Dual`): sensitivities travel forward, nothing is stored.

``reset_gradient`` says whether a gradient also flows through the reset. "detached", the default, holds the reset's spike
constant: dU_after/dU = 1 - S under a reset to zero, as in snnTorch with its delayed reset. "attached" follows it as well:
dU_after/dU = 1 - S - U dS/dU, as in Norse and in snnTorch with ``reset_delay=False``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from spikeprop.errors import InputError
from spikeprop.neuron import FLOAT, Arithmetic, FloatArithmetic, Neuron
from spikeprop.surrogate import LearnOn, ReLU

ResetGradient = Literal["detached", "attached"]


def slope(neuron: Neuron, surrogate: LearnOn, membrane: Tensor) -> Tensor:
    """dS/dU of spiking neurons by the surrogate, the rectifier's true derivative of rate neurons; in the membrane's shape."""
    found = (surrogate if neuron.spiking else ReLU()).derivative(membrane, neuron.threshold)
    return torch.ones_like(membrane) if found is None else found


def check_reset_gradient(rule: object, value: str) -> None:
    """Raise InputError unless ``value`` is a :data:`ResetGradient`."""
    if value not in get_args(ResetGradient):
        raise InputError(f"{type(rule).__name__}: reset_gradient = {value!r} is not one of {get_args(ResetGradient)}")


class _Spike(torch.autograd.Function):
    """Spikes as they are; on the way back the surrogate's slope."""

    @staticmethod
    def forward(ctx: Any, membrane: Tensor, threshold: float | Tensor, surrogate: LearnOn, spike: Any) -> Tensor:
        ctx.save_for_backward(membrane)
        ctx.threshold, ctx.surrogate = threshold, surrogate
        return spike(membrane, threshold)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        found = ctx.surrogate.derivative(ctx.saved_tensors[0], ctx.threshold)
        return gradients[0] if found is None else gradients[0] * found, None, None, None


@dataclass(frozen=True)
class Backward(FloatArithmetic):
    """Real numbers with an autograd graph: ``forward`` decides which neurons spike, ``surrogate`` how that is derived."""

    surrogate: LearnOn
    reset_gradient: ResetGradient = "detached"
    forward: Arithmetic = FLOAT

    def spike(self, membrane: Any, threshold: Any) -> Any:
        return _Spike.apply(  # type: ignore[no-untyped-call]
            membrane, threshold, self.surrogate, self.forward.spike
        )

    def at_reset(self, spikes: Any) -> Any:
        return spikes.detach() if self.reset_gradient == "detached" else spikes


class Dual:
    """A value ``[B, ...]`` and its tangents ``[P, B, ...]``, derivatives of the value along P directions (Clifford 1871).

    As many operators as :func:`spikeprop.neuron.advance` and :class:`~spikeprop.neuron.Rate` use. A tangent without axes is
    the zero of a constant.
    """

    def __init__(self, value: Tensor, tangent: Tensor) -> None:
        self.value, self.tangent = value, tangent

    @classmethod
    def constant(cls, value: Tensor) -> Dual:
        """A value that moves along no direction."""
        return cls(value, value.new_zeros(()))

    @property
    def is_constant(self) -> bool:
        """Whether this was made by :meth:`constant`."""
        return self.tangent.dim() == 0

    def __add__(self, other: Any) -> Dual:
        if isinstance(other, Dual):
            return Dual(self.value + other.value, self.tangent + other.tangent)
        return Dual(self.value + other, self.tangent)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Dual:
        if isinstance(other, Dual):
            return Dual(self.value - other.value, self.tangent - other.tangent)
        return Dual(self.value - other, self.tangent)

    def __mul__(self, other: Any) -> Dual:
        if isinstance(other, Dual):
            return Dual(self.value * other.value, self.tangent * other.value + self.value * other.tangent)
        return Dual(self.value * other, self.tangent * other)

    __rmul__ = __mul__

    def relu(self) -> Dual:
        return Dual(self.value.relu(), self.tangent * (self.value > 0))


@dataclass(frozen=True)
class Forward(FloatArithmetic):
    """Real numbers with tangents, :class:`Dual`; as :class:`Backward` otherwise."""

    surrogate: LearnOn
    reset_gradient: ResetGradient = "detached"
    forward: Arithmetic = FLOAT

    def spike(self, membrane: Any, threshold: Any) -> Any:
        spikes = self.forward.spike(membrane.value, threshold)
        found = self.surrogate.derivative(membrane.value, threshold)
        return Dual(spikes, membrane.tangent if found is None else membrane.tangent * found)

    def at_reset(self, spikes: Any) -> Any:
        return spikes.value if self.reset_gradient == "detached" else spikes
