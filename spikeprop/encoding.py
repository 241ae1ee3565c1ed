"""Encoders: how a batch of inputs becomes the drive of ``num_steps`` time steps.

An encoder is called as ``encoder(inputs, num_steps, generator=None)`` with ``inputs [B, *features]`` and returns
``[T, B, *features]``, T = ``num_steps``. The result has the inputs' dtype if that is floating-point, else float32. Every
encoder raises :class:`~spikeprop.errors.InputError` for inputs that are empty, hold NaN or infinity, or lie outside its range.

An encoder is a value: equal settings compare equal, :meth:`Encoder.config` gives a dict for JSON and :func:`from_config`
gives the encoder back, so that a run remembers how its inputs were encoded.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from numbers import Integral  # also numpy's integers
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from spikeprop.errors import InputError


@dataclass(frozen=True)
class Encoder(ABC):
    """Base of all encoders; a new one defines ``name`` and :meth:`encode`, and is a frozen dataclass of its settings."""

    name: ClassVar[str]
    temporal: ClassVar[bool] = False  # whether the inputs carry their own time axis, [B, T, *features]

    def __call__(self, inputs: Tensor, num_steps: int, generator: Generator | None = None) -> Tensor:
        """Return ``[T, B, *features]``. ``generator`` is used by random encoders and must live on the inputs' device."""
        if not isinstance(num_steps, Integral) or isinstance(num_steps, bool) or num_steps < 1:
            raise InputError(f"num_steps must be a whole number of at least 1, got {num_steps!r}")
        axes = "[B, T, *features]" if self.temporal else "[B, *features]"
        if not isinstance(inputs, Tensor):
            raise InputError(f"{self.name} encoder: inputs must be a tensor {axes}, got {type(inputs).__name__}")
        if inputs.ndim < (2 if self.temporal else 1) or inputs.numel() == 0:
            raise InputError(f"{self.name} encoder: inputs must be {axes} and not empty, got shape {list(inputs.shape)}")
        if inputs.is_complex():
            raise InputError(f"{self.name} encoder: inputs must be real numbers, got {inputs.dtype}")
        if inputs.is_floating_point() and not bool(torch.isfinite(inputs).all()):
            raise InputError(f"{self.name} encoder: inputs hold NaN or infinity")
        return self.encode(inputs, int(num_steps), generator)

    def stretches(
        self,
        inputs: Tensor,
        num_steps: int,
        chunk: int | None,
        generator: Generator | None = None,
        rows: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """What a call returns, ``chunk`` steps at a time (None: all at once), without holding more of it than that.

        ``rows``: only these samples; of recordings no more is picked at a time than a stretch, so that they may lie in a file.
        Poisson draws the same spikes on the CPU as a call does.
        """
        if chunk is not None and chunk < 1:
            raise InputError(f"chunk = {chunk} must be at least 1 step, or None for a whole sequence at once")
        if chunk is None or chunk >= num_steps:
            yield self(inputs if rows is None else inputs[rows], num_steps, generator)
            return
        if rows is not None and not self.temporal:
            inputs, rows = inputs[rows], None
        for start in range(0, num_steps, chunk):
            yield self._stretch(inputs, num_steps, start, min(num_steps, start + chunk), generator, rows)

    @abstractmethod
    def _stretch(
        self,
        inputs: Tensor,
        num_steps: int,
        start: int,
        stop: int,
        generator: Generator | None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Steps ``start`` to ``stop`` of a call with ``num_steps``; stretches are asked for in order.

        ``rows``: of these samples only; given to encoders of recordings.
        """

    @abstractmethod
    def encode(self, inputs: Tensor, num_steps: int, generator: Generator | None) -> Tensor:
        """Do the encoding; the arguments are those of a call, already checked to be finite and not empty."""

    def config(self) -> dict[str, Any]:
        """Return the settings as a dict that JSON can hold, for :func:`from_config`."""
        return {"name": self.name, **asdict(self)}


@dataclass(frozen=True)
class Current(Encoder):
    """The constant current ``scale * x`` at every step.

    The result is an expanded view with stride 0 in time: it takes the memory of one step whatever T is, and must not be
    written to in place.
    """

    name: ClassVar[str] = "current"
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise InputError(f"current encoder: scale must be finite, got {self.scale}")

    def encode(self, inputs: Tensor, num_steps: int, generator: Generator | None) -> Tensor:
        current = _floating(inputs)
        if self.scale != 1.0:
            current = current * self.scale
        return current.expand(num_steps, *current.shape)

    def _stretch(
        self,
        inputs: Tensor,
        num_steps: int,
        start: int,
        stop: int,
        generator: Generator | None,
        rows: Tensor | None = None,
    ) -> Tensor:
        return self(inputs, stop - start)


@dataclass(frozen=True)
class Poisson(Encoder):
    """Independent 0/1 spikes, each with probability ``rate * x`` (a Bernoulli process: the Poisson process in discrete time).

    ``rate`` is the number of spikes per step of an input of 1; every ``rate * x`` must lie in [0, 1], nothing is clipped.
    On the CPU the random numbers are drawn step by step: encoding 3 steps and then 5 more with one generator gives the same
    spikes as encoding 8 at once, so a long sequence can be streamed in pieces.
    """

    name: ClassVar[str] = "poisson"
    rate: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.rate) and self.rate > 0):
            raise InputError(f"poisson encoder: rate must be finite and above 0, got {self.rate}")

    def encode(self, inputs: Tensor, num_steps: int, generator: Generator | None) -> Tensor:
        probability = _floating(inputs) * self.rate
        _refuse_outside_unit(probability, f"poisson encoder: rate * inputs (rate = {self.rate:g})")
        # A uniform number is in [0, 1): probability 0 never spikes and probability 1 always does.
        uniform = torch.rand(
            (num_steps, *inputs.shape), generator=generator, dtype=probability.dtype, device=probability.device
        )
        return (uniform < probability).to(probability.dtype)

    def _stretch(
        self,
        inputs: Tensor,
        num_steps: int,
        start: int,
        stop: int,
        generator: Generator | None,
        rows: Tensor | None = None,
    ) -> Tensor:
        return self(inputs, stop - start, generator)


@dataclass(frozen=True)
class Latency(Encoder):
    """At most one spike per feature, the earlier the larger x is. Inputs lie in [0, 1]; the first step is 0.

    ``tau=None``, linear: the spike falls at step ``round((T - 1)(1 - x))`` and inputs below ``threshold`` are silent.
    Equals snnTorch's ``spikegen.latency(linear=True, normalize=True, clip=True)``.

    ``tau > 0``, logarithmic: the spike falls at step ``round(tau ln(x / (x - threshold)))``, the time at which a leaky
    integrator with a time constant of ``tau`` steps, charged by the constant current x, reaches ``threshold``. Inputs that
    do not exceed ``threshold``, or would reach it only after the last step, are silent. Equals snnTorch's
    ``spikegen.latency(tau=tau, clip=True, bypass=True)``; there is no normalisation by the largest time of the batch,
    because then a sample's code would depend on the other samples.

    Halves round to even. An input of 0 never spikes.
    """

    name: ClassVar[str] = "latency"
    threshold: float = 0.01
    tau: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < 1:
            raise InputError(f"latency encoder: threshold must be in [0, 1), got {self.threshold}")
        if self.tau is not None and not (math.isfinite(self.tau) and self.tau > 0):
            raise InputError(f"latency encoder: tau must be None (linear) or a finite number of steps above 0, got {self.tau}")
        if self.tau is not None and self.threshold == 0:
            raise InputError("latency encoder: with tau, threshold must be above 0, or every input would spike at step 0")

    def encode(self, inputs: Tensor, num_steps: int, generator: Generator | None) -> Tensor:
        return self._stretch(inputs, num_steps, 0, num_steps, generator)

    def _stretch(
        self,
        inputs: Tensor,
        num_steps: int,
        start: int,
        stop: int,
        generator: Generator | None,
        rows: Tensor | None = None,
    ) -> Tensor:
        intensity = _floating(inputs)
        _refuse_outside_unit(intensity, "latency encoder: inputs")
        if self.tau is None:
            time = (num_steps - 1) * (1 - intensity)
            silent = (intensity < self.threshold) | (intensity == 0)
        else:
            time = self.tau * torch.log(intensity / (intensity - self.threshold))
            silent = intensity <= self.threshold
        # -1 is no step at all; comparing as floating-point numbers keeps times beyond the range of integers harmless.
        spike_step = torch.where(silent, -1.0, torch.round(time))
        steps = torch.arange(start, stop, dtype=intensity.dtype, device=intensity.device)
        return (spike_step == steps.view(-1, *[1] * intensity.ndim)).to(intensity.dtype)


@dataclass(frozen=True)
class Events(Encoder):
    """Inputs that carry time already: ``[B, T, *features]`` becomes ``[T, B, *features]``, values as they are.

    ``num_steps`` must be the inputs' own T: a sequence is neither cut nor padded in silence.
    """

    name: ClassVar[str] = "events"
    temporal: ClassVar[bool] = True

    def encode(self, inputs: Tensor, num_steps: int, generator: Generator | None) -> Tensor:
        return self._stretch(inputs, num_steps, 0, num_steps, generator)

    def _stretch(
        self,
        inputs: Tensor,
        num_steps: int,
        start: int,
        stop: int,
        generator: Generator | None,
        rows: Tensor | None = None,
    ) -> Tensor:
        if inputs.shape[1] != num_steps:
            raise InputError(
                f"events encoder: num_steps = {num_steps}, but the inputs {list(inputs.shape)} have {inputs.shape[1]} time "
                f"steps (axis 1); use num_steps = {inputs.shape[1]} or bin the data anew"
            )
        seen = inputs[:, start:stop]
        return _floating((seen if rows is None else seen[rows]).transpose(0, 1))


ENCODERS: dict[str, type[Encoder]] = {encoder.name: encoder for encoder in (Current, Poisson, Latency, Events)}


def from_config(config: Mapping[str, Any]) -> Encoder:
    """Build the encoder that :meth:`Encoder.config` described; settings left out take their defaults.

    Raises InputError for an unknown name or setting.
    """
    settings = dict(config)
    name = settings.pop("name", None)
    if name not in ENCODERS:
        raise InputError(f"unknown encoder {name!r}; known: {', '.join(ENCODERS)}")
    try:
        return ENCODERS[name](**settings)
    except TypeError as error:
        raise InputError(f"{name} encoder: settings {settings} do not fit: {error}") from None


def default_encoder(temporal: bool) -> Encoder:
    """Return :class:`Events` for data with their own time axis, else :class:`Current`."""
    return Events() if temporal else Current()


def _floating(inputs: Tensor) -> Tensor:
    return inputs if inputs.is_floating_point() else inputs.to(torch.float32, memory_format=torch.contiguous_format)


def _refuse_outside_unit(values: Tensor, what: str) -> None:
    low, high = (bound.item() for bound in values.aminmax())
    if low < 0 or high > 1:
        raise InputError(f"{what} must lie in [0, 1], found {low:g} to {high:g}; scale the data first")
