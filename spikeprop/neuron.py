"""The spiking neuron, written once.

    I[t] = alpha I[t-1] + drive[t]            synaptic current; drive = synapse(input spikes), no delay
    U[t] = beta  U[t-1] + I[t] + bias         membrane
    S[t] = 1 if U[t] > threshold else 0       spike
    U[t] <- 0             where S[t] = 1      reset_mechanism "zero" (Loihi, Lava, NIR)
    U[t] <- U[t] - threshold                  "subtract"
    U[t] <- U[t]                              "none"

:func:`advance` is this block: training and inference call it with floating-point tensors, the Loihi simulator calls it with
integers and :data:`spikeprop.backends.loihi.LOIHI` arithmetic (its compiled loop is held to it by tests). The arguments may be
torch tensors or numpy arrays.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor, nn

from spikeprop import scan
from spikeprop.errors import InputError

Reset = Literal["zero", "subtract", "none"]


class NeuronState(NamedTuple):
    """What a neuron carries from step to step: synaptic current I and membrane U after the reset, each ``[B, *features]``.

    Torch tensors, or numpy arrays in the integer simulator.
    """

    current: Any
    membrane: Any


class RecurrentState(NamedTuple):
    """The state of neurons that a recurrent synapse drives: as :class:`NeuronState`, and the spikes of the step before."""

    current: Any
    membrane: Any
    spikes: Any


State = NeuronState | RecurrentState


class Activity(NamedTuple):
    """What a layer shows at each step. ``spikes`` is the layer's output; ``membrane`` is U before the reset.

    Both have shape ``[B, *features]`` for one step and ``[T, B, *features]`` for a sequence.
    """

    spikes: Tensor
    membrane: Tensor


class Arithmetic(Protocol):
    """How a number decays, what a full register does, and what a spike is.

    See :data:`FLOAT`, ``backends.loihi.LOIHI``, and the differentiable ones of :mod:`spikeprop.differentiable`.
    """

    def decay(self, value: Any, keep: Any) -> Any:
        """``keep`` times the value, as a new array: :func:`advance` adds to it in place."""

    def current(self, value: Any) -> Any: ...
    def membrane(self, value: Any) -> Any: ...
    def spike(self, membrane: Any, threshold: Any) -> Any:
        """Which neurons spike, as booleans or as 0 and 1."""

    def at_reset(self, spikes: Any) -> Any:
        """The spikes as the reset sees them; a differentiable arithmetic may hide them from the gradient here."""


class FloatArithmetic:
    """Real numbers: decay multiplies, registers are unbounded, a spike is sent above the threshold."""

    def decay(self, value: Any, keep: Any) -> Any:
        return value * keep

    def current(self, value: Any) -> Any:
        return value

    def membrane(self, value: Any) -> Any:
        return value

    def spike(self, membrane: Any, threshold: Any) -> Any:
        if not isinstance(membrane, Tensor):
            return membrane > threshold
        # As numbers at once: booleans made into numbers take ten times as long, and times a float have another precision.
        return torch.gt(membrane.detach(), threshold, out=torch.empty_like(membrane))

    def at_reset(self, spikes: Any) -> Any:
        return spikes


def as_numbers(spikes: Any, membrane: Any) -> Any:
    """Booleans as 0 and 1 of the membrane's type."""
    return spikes.to(membrane.dtype) if isinstance(spikes, Tensor) else spikes


def less(membrane: Any, amount: Any, spikes: Any) -> Any:
    """``membrane - amount * spikes``, in one pass where all are torch tensors."""
    if all(isinstance(part, Tensor) for part in (membrane, amount, spikes)):
        return torch.addcmul(membrane, amount, spikes, value=-1.0)
    return membrane - amount * spikes


FLOAT = FloatArithmetic()


def advance(
    state: State,
    drive: Any,
    *,
    alpha: Any,
    beta: Any,
    bias: Any,
    threshold: Any,
    reset_mechanism: Reset = "zero",
    arithmetic: Arithmetic = FLOAT,
) -> tuple[Any, Any, NeuronState]:
    """One time step of the equations above, elementwise over arrays of any shape; state and drive have one shape and type.

    Returns the spikes (as the arithmetic has them: numbers 0 and 1, or booleans), the membrane before the reset, and the state
    after it.
    """
    # Without synaptic memory the current is the drive itself; the product with zero would only cost time.
    no_memory = isinstance(alpha, float) and alpha == 0.0
    current = arithmetic.current(drive if no_memory else arithmetic.decay(state.current, alpha) + drive)
    membrane = arithmetic.decay(state.membrane, beta)
    membrane += current + bias  # in place, as nobody else has the product: a pass over memory costs more than its arithmetic
    membrane = arithmetic.membrane(membrane)
    spikes = arithmetic.spike(membrane, threshold)
    if reset_mechanism == "zero":
        after = less(membrane, membrane, arithmetic.at_reset(spikes))
    elif reset_mechanism == "subtract":
        after = less(membrane, threshold, arithmetic.at_reset(spikes))
    else:
        after = membrane
    return spikes, membrane, NeuronState(current, after)


class Neuron(nn.Module):
    """A layer's neurons: how a drive becomes activity. Stateless itself; the state is passed in and out.

    Attributes:
        alpha, beta, threshold: a float for the whole layer or a tensor that broadcasts over its features.
        spiking: whether the activity is 0 or 1, so that firing rates and dead neurons are defined.
        arithmetic: how a step is computed unless the caller says otherwise.
    """

    alpha: float | Tensor
    beta: float | Tensor
    threshold: float | Tensor
    bias: float | Tensor
    reset_mechanism: Reset
    spiking: bool

    @property
    def arithmetic(self) -> Arithmetic:
        return FLOAT

    @property
    def unit(self) -> float:
        """What the layer's weights, biases and membranes are measured in: its threshold (the mean, if there are several).

        1 for neurons without a threshold.
        """
        threshold = self.threshold if isinstance(self.threshold, float) else float(self.threshold.mean())
        return threshold or 1.0

    def initial_state(self, drive: Tensor) -> NeuronState:
        """The resting state, zero, for a drive of one step ``[B, *features]`` (shape, dtype and device are taken from it)."""
        rest = torch.zeros_like(drive, memory_format=torch.contiguous_format)
        return NeuronState(rest, rest)

    def step(
        self, state: State, drive: Any, bias: Any = None, arithmetic: Arithmetic | None = None
    ) -> tuple[Activity, NeuronState]:
        """One time step: ``drive`` and the activity are ``[B, *features]``.

        ``bias`` and ``arithmetic`` replace the neuron's own.
        """
        raise NotImplementedError

    def run(
        self,
        state: State,
        drive: Tensor,
        bias: float | Tensor | None = None,
        arithmetic: Arithmetic | None = None,
        recurrent: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Activity, State]:
        """A sequence: ``drive`` and the activity are ``[T, B, *features]``.

        ``recurrent`` maps the layer's own spikes to a drive that arrives one step later; it needs a :class:`RecurrentState`.
        """
        steps = []
        for present in drive:
            if recurrent is None:
                activity, state = self.step(state, present, bias, arithmetic)
            else:
                assert isinstance(state, RecurrentState)
                activity, after = self.step(state, present + recurrent(state.spikes), bias, arithmetic)
                state = RecurrentState(*after, activity.spikes)
            steps.append(activity)
        spikes, membrane = zip(*steps, strict=True)
        return Activity(torch.stack(spikes), torch.stack(membrane)), state

    def config(self) -> dict[str, Any]:
        """The arguments that rebuild this neuron; per-neuron tensors are left to the state dictionary and stand as None."""
        raise NotImplementedError

    def _parameter(self, name: str, value: float | Tensor, lowest: float, highest: float, meaning: str) -> None:
        extremes = (value.min().item(), value.max().item()) if isinstance(value, Tensor) else (float(value),) * 2
        for extreme in extremes:
            if not lowest <= extreme <= highest:
                raise InputError(
                    f"{type(self).__name__}: {name} = {extreme:g} lies outside [{lowest:g}, {highest:g}]; {meaning}"
                )
        if isinstance(value, Tensor):
            self.register_buffer(name, value.clone())
        else:
            setattr(self, name, float(value))


class LIF(Neuron):
    """Leaky integrate-and-fire neurons with the equations at the top of this module.

    Args:
        beta: fraction of the membrane kept per step, in [0, 1]; 0 forgets at once, 1 never (IF). Lava's 1 - dv/4096.
        threshold: a spike is sent when U is strictly above it, as in snnTorch, Norse, NIR and Lava. Above 0.
        alpha: fraction of the synaptic current kept per step, in [0, 1); 0 has no synaptic memory. Lava's 1 - (du + 1)/4096.
        bias: added to the membrane at every step; in a network the value that the layer's learned bias starts from.
        reset_mechanism: "zero" (the chip's), "subtract" or "none".

    Each number may be a tensor that broadcasts over the layer's features (per-neuron or per-channel parameters).

    Raises:
        InputError: a value outside its range, or an unknown reset mechanism.
    """

    spiking = True

    def __init__(
        self,
        beta: float | Tensor = 0.9,
        threshold: float | Tensor = 1.0,
        *,
        alpha: float | Tensor = 0.0,
        bias: float | Tensor = 0.0,
        reset_mechanism: Reset = "zero",
    ) -> None:
        super().__init__()
        kept = "is the fraction kept per step (decay_from_tau(tau, dt) converts a time constant)"
        self._parameter("beta", beta, 0.0, 1.0, f"beta {kept}")
        self._parameter("alpha", alpha, 0.0, 1.0 - 1e-6, f"alpha {kept}, below 1 or the current never fades")
        self._parameter("threshold", threshold, 1e-12, 1e12, "a threshold of 0 or less would spike at rest")
        self._parameter("bias", bias, -1e12, 1e12, "a bias must be finite")
        if reset_mechanism not in get_args(Reset):
            raise InputError(f"{type(self).__name__}: reset_mechanism = {reset_mechanism!r} is not one of {get_args(Reset)}")
        self.reset_mechanism = reset_mechanism

    def step(
        self, state: State, drive: Any, bias: Any = None, arithmetic: Arithmetic | None = None
    ) -> tuple[Activity, NeuronState]:
        spikes, membrane, after = advance(
            state,
            drive,
            alpha=self.alpha,
            beta=self.beta,
            bias=self.bias if bias is None else bias,
            threshold=self.threshold,
            reset_mechanism=self.reset_mechanism,
            arithmetic=self.arithmetic if arithmetic is None else arithmetic,
        )
        return Activity(spikes, membrane), after

    def run(
        self,
        state: State,
        drive: Tensor,
        bias: float | Tensor | None = None,
        arithmetic: Arithmetic | None = None,
        recurrent: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Activity, State]:
        if type(self) is LIF and arithmetic is None and recurrent is None:  # who derives from it may spike otherwise
            found = scan.advance(
                drive,
                state.current,
                state.membrane,
                alpha=self.alpha,
                beta=self.beta,
                bias=self.bias if bias is None else bias,
                threshold=self.threshold,
                reset_mechanism=self.reset_mechanism,
            )
            if found is not None:
                return Activity(*found[:2]), NeuronState(*found[2:])
        return super().run(state, drive, bias, arithmetic, recurrent)

    def config(self) -> dict[str, Any]:
        numbers = {name: getattr(self, name) for name in ("beta", "threshold", "alpha", "bias")}
        return {
            "type": type(self).__name__,
            **{name: list(value.shape) if isinstance(value, Tensor) else value for name, value in numbers.items()},
            "reset_mechanism": self.reset_mechanism,
        }

    def extra_repr(self) -> str:
        config = self.config()
        return ", ".join(f"{key}={value}" for key, value in config.items() if key != "type")


def IF(threshold: float | Tensor = 1.0, *, reset_mechanism: Reset = "zero") -> LIF:
    """Integrate-and-fire: a LIF neuron whose membrane does not leak."""
    return LIF(1.0, threshold, reset_mechanism=reset_mechanism)


def Binary(threshold: float | Tensor = 1.0) -> LIF:
    """A threshold unit without memory: activity 1 where the drive exceeds the threshold. LIF with beta = 0 and no reset."""
    return LIF(0.0, threshold, reset_mechanism="none")


@dataclass(frozen=True)
class _Competition(FloatArithmetic):
    """Of the neurons above their threshold, those with the highest membranes above it spike."""

    winners: int

    def spike(self, membrane: Any, threshold: Any) -> Any:
        above = membrane - threshold
        rivals = min(1, above.dim() - 1)  # the first axis of features; bare neurons may come without a batch
        best = above.topk(min(self.winners, above.shape[rivals]), dim=rivals).indices
        return as_numbers(torch.zeros_like(above, dtype=torch.bool).scatter(rivals, best, True) & (above > 0), membrane)


class WinnerTakeAll(LIF):
    """LIF neurons that compete: at each step at most ``winners`` of them spike, those highest above their thresholds.

    In a layer of pictures ``[C, H, W]`` the channels compete at each position, otherwise all neurons of the layer. The losers
    keep their membranes. A local circuit of lateral inhibition in the limit of strong and instant inhibition (Maass 2000).

    Args:
        winners: the largest number of spikes per step (and position), at least 1.
        Others as for :class:`LIF`.
    """

    def __init__(
        self,
        beta: float | Tensor = 0.9,
        threshold: float | Tensor = 1.0,
        *,
        winners: int = 1,
        alpha: float | Tensor = 0.0,
        bias: float | Tensor = 0.0,
        reset_mechanism: Reset = "zero",
    ) -> None:
        super().__init__(beta, threshold, alpha=alpha, bias=bias, reset_mechanism=reset_mechanism)
        if not isinstance(winners, int) or isinstance(winners, bool) or winners < 1:
            raise InputError(f"WinnerTakeAll: winners = {winners!r} must be a whole number of at least 1")
        self.winners = winners

    @property
    def arithmetic(self) -> Arithmetic:
        return _Competition(self.winners)

    def config(self) -> dict[str, Any]:
        return {**super().config(), "winners": self.winners}


class Bernoulli(LIF):
    """LIF neurons with escape noise: a spike is sent with probability sigmoid(slope (U - threshold) / threshold).

    The random numbers belong to the network and are saved with it: the n-th step that these neurons ever make draws from a
    generator seeded with (seed, n), so a training that is resumed, or repeated from the same start, sees the same spikes. Every
    run counts, evaluation too; ``models.mlp`` and ``models.conv`` give each layer a seed of its own.

    Args:
        slope: steepness; infinity would be :class:`LIF`. Above 0.
        seed: of the random numbers.
        Others as for :class:`LIF`.
    """

    draws: Tensor

    def __init__(
        self,
        beta: float | Tensor = 0.9,
        threshold: float | Tensor = 1.0,
        *,
        slope: float = 5.0,
        seed: int = 0,
        alpha: float | Tensor = 0.0,
        bias: float | Tensor = 0.0,
        reset_mechanism: Reset = "zero",
    ) -> None:
        super().__init__(beta, threshold, alpha=alpha, bias=bias, reset_mechanism=reset_mechanism)
        self._parameter("slope", slope, 1e-12, 1e12, "the probability of a spike must rise with the membrane")
        self.slope, self.seed = slope, seed
        self.register_buffer("draws", torch.zeros((), dtype=torch.int64))

    @property
    def arithmetic(self) -> Arithmetic:
        return _Escape(self)

    def config(self) -> dict[str, Any]:
        return {**super().config(), "slope": self.slope, "seed": self.seed}


@dataclass(frozen=True)
class _Escape(FloatArithmetic):
    """Spikes by chance, drawn from the neurons' own random numbers."""

    neuron: Bernoulli

    def spike(self, membrane: Any, threshold: Any) -> Any:
        number = int(self.neuron.draws)
        self.neuron.draws += 1
        generator = torch.Generator(membrane.device).manual_seed((self.neuron.seed * 0x9E3779B97F4A7C15 + number) % 2**63)
        probability = torch.sigmoid(self.neuron.slope * (membrane / threshold - 1.0))
        uniform = torch.rand(membrane.shape, generator=generator, dtype=membrane.dtype, device=membrane.device)
        return as_numbers(uniform < probability, membrane)


class Rate(Neuron):
    """A continuous unit without memory: activity max(0, drive + bias). Its "membrane" is the argument of the rectifier."""

    spiking = False
    alpha = 0.0
    beta = 0.0
    threshold = 0.0
    reset_mechanism: Reset = "none"

    def __init__(self, bias: float | Tensor = 0.0) -> None:
        super().__init__()
        self._parameter("bias", bias, -1e12, 1e12, "a bias must be finite")

    def step(
        self, state: State, drive: Any, bias: Any = None, arithmetic: Arithmetic | None = None
    ) -> tuple[Activity, NeuronState]:
        membrane = drive + (self.bias if bias is None else bias)
        return Activity(membrane.relu(), membrane), NeuronState(state.current, state.membrane)

    def config(self) -> dict[str, Any]:
        return {"type": "Rate", "bias": list(self.bias.shape) if isinstance(self.bias, Tensor) else self.bias}


def neuron_from_config(config: dict[str, Any]) -> Neuron:
    """Inverse of :meth:`Neuron.config`; per-neuron tensors come back as ones and wait for the state dictionary."""
    arguments = {key: torch.full(value, 0.5) if isinstance(value, list) else value for key, value in config.items()}
    kinds: dict[str, type[Neuron]] = {kind.__name__: kind for kind in (LIF, WinnerTakeAll, Bernoulli, Rate)}
    return kinds[str(arguments.pop("type"))](**arguments)


def lif(neuron: Neuron, drive: Tensor) -> Activity:
    """Run bare neurons from rest over a drive.

    Args:
        neuron: for example ``LIF(beta=0.9)``.
        drive: synaptic input ``[T, ...]``, any floating dtype.

    Returns:
        Spikes and pre-reset membranes ``[T, ...]`` in the drive's dtype.
    """
    if drive.dim() < 1 or len(drive) < 1:
        raise InputError(f"lif: the drive has shape {tuple(drive.shape)}, but time comes first: [T, ...] with T >= 1")
    return neuron.run(neuron.initial_state(drive[0]), drive)[0]


def decay_from_tau(tau: float, dt: float, method: Literal["exact", "euler"] = "exact") -> float:
    """Fraction kept per step for a time constant: exp(-dt/tau) ("exact"), or 1 - dt/tau ("euler", NIR's and Norse's).

    Args:
        tau: time constant, in the unit of ``dt``; infinity gives 1.
        dt: length of one step, > 0.

    Raises:
        InputError: tau or dt not positive, or dt > tau under "euler", where the decay would be negative.
    """
    if not tau > 0 or not dt > 0:
        raise InputError(f"decay_from_tau: tau = {tau:g} and dt = {dt:g} must both be positive")
    if method == "exact":
        return math.exp(-dt / tau)
    if dt > tau:
        raise InputError(
            f"decay_from_tau: dt = {dt:g} exceeds tau = {tau:g}, so 1 - dt/tau is negative; use a smaller dt or 'exact'"
        )
    return 1.0 - dt / tau


def tau_from_decay(decay: float, dt: float, method: Literal["exact", "euler"] = "exact") -> float:
    """Inverse of :func:`decay_from_tau`; 1 gives infinity. Raises InputError outside (0, 1] ("exact") or [0, 1] ("euler")."""
    if not 0.0 <= decay <= 1.0 or (decay == 0.0 and method == "exact"):
        raise InputError(f"tau_from_decay: decay = {decay:g} has no time constant; it must lie in (0, 1]")
    if decay == 1.0:
        return math.inf
    return -dt / math.log(decay) if method == "exact" else dt / (1.0 - decay)
