"""The integer simulator: a quantised network, bit for bit as Lava and the chip run it.

The neuron is :func:`spikeprop.neuron.advance`, the one that training uses, with :data:`LOIHI` arithmetic. Where numba is
installed, compiled kernels (``kernels.py``) take its place and, where few inputs spike, that of the matrix product; the tests
hold them to the same integers.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from spikeprop.backends.loihi.network import (
    ALIGNMENT_SHIFT,
    DECAY_LIMIT,
    DECAY_UNITY,
    REGISTER_LIMIT,
    Integers,
    LoihiLayer,
    LoihiNetwork,
    largest_sums,
    project,
)
from spikeprop.errors import InputError
from spikeprop.neuron import NeuronState, advance

EXACT_IN_FLOAT32 = 2**24  # every integer up to here is a float32, so sums that stay below are exact in any order
BLOCK_NUMBERS = 2**19  # numbers of the widest layer held at once: 2 MiB of sums, which stay in the second-level cache
WINDOW_NUMBERS = 2**23  # numbers of a convolution's windows, laid out for one product
# Share of spiking inputs below which adding up their weights beats the product. On one Xeon core the two meet at 0.7 for
# 784 dense inputs of 512 neurons, and at 0.16 for a 3 x 3 convolution of 16 channels to 32.
SPARSE_DENSE, SPARSE_CONVOLUTION = 0.5, 0.15
INPUT_TOLERANCE = 1e-6  # of the input range: what rounding in the caller's own scaling may overshoot


class LoihiArithmetic:
    """Decay and overflow of Loihi's 24-bit registers, on int32 arrays. ``keep`` is out of 4096.

    Equal, bit for bit, to the fixed-point models of Lava 0.10.0, also where 32-bit intermediates overflow.
    """

    def decay(self, value: Any, keep: Any) -> Any:
        """sgn(value) ((|value| keep) >> 12): rounds towards zero."""
        product = np.multiply(value, keep, dtype=np.int64)
        # A shift alone rounds down; 4095 more makes it round up where the product is negative.
        product += (product >> 63) & (DECAY_UNITY - 1)
        product >>= 12
        return product.astype(np.int32)

    def current(self, value: Any) -> Any:
        """Wraps, once, into (-2^23, 2^23]: Lava adds or takes away 2^24 a single time, however far out the value lies."""
        value = np.where(value > REGISTER_LIMIT, value - 2 * REGISTER_LIMIT, value)
        return np.where(value <= -REGISTER_LIMIT, value + 2 * REGISTER_LIMIT, value)

    def membrane(self, value: Any) -> Any:
        """Saturates at +-(2^23 - 1)."""
        return np.clip(value, 1 - REGISTER_LIMIT, REGISTER_LIMIT - 1)

    def spike(self, membrane: Any, threshold: Any) -> Any:
        return membrane > threshold

    def at_reset(self, spikes: Any) -> Any:
        return spikes


LOIHI = LoihiArithmetic()


@dataclass(frozen=True, eq=False)
class Simulation:
    """What a simulation returns, one array per layer; neurons of pictures are counted in C order of (C, H, W).

    counts: spikes per neuron over all steps, ``[B, n]``.
    spikes: 0 or 1, ``[T, B, n]``; empty if only counts were recorded.
    membranes: the membrane register before the reset, ``[T, B, n]``; empty unless everything was recorded.
    currents: the current register, ``[T, B, n]``; empty unless everything was recorded.
    state: what the layers carry on, for a further call.
    """

    counts: list[Integers]
    spikes: list[NDArray[np.int8]]
    membranes: list[Integers]
    currents: list[Integers]
    state: list[NeuronState]

    @property
    def membranes_after_reset(self) -> list[Integers]:
        """What Lava calls v, and a probe reads: the membrane at the end of each step."""
        return [membrane * (1 - spikes) for membrane, spikes in zip(self.membranes, self.spikes, strict=True)]


def encode(network: LoihiNetwork, inputs: Any, num_steps: int | None = None) -> NDArray[Any]:
    """Real inputs as the first layer's messages, ``[T, B, features]``.

    inputs: a tensor or an array ``[T, B, *input_shape]``, or ``[B, *input_shape]`` with ``num_steps``, for a current that stays
        constant. What is constant in time (stride 0, an encoder's expanded view) stays so and takes the memory of one step.

    Raises InputError if the shape does not fit, or a value is outside the input range (graded) or not 0 or 1 (spikes).
    """
    if hasattr(inputs, "detach"):
        inputs = inputs.detach().cpu()
        inputs = inputs.float() if "bfloat16" in str(inputs.dtype) else inputs  # a type that numpy has not
    values, shape = np.asarray(inputs), network.input_shape
    if values.shape[1:] == shape and num_steps is not None:
        values = np.broadcast_to(values, (num_steps, *values.shape))
    elif values.shape[2:] != shape or values.ndim != 2 + len(shape):
        features = ", ".join(map(str, shape))
        raise InputError(f"inputs have shape {values.shape}, expected [T, B, {features}], or [B, {features}] with num_steps")
    steps, batch = values.shape[:2]
    if num_steps not in (None, steps):
        raise InputError(f"inputs have {steps} steps already, num_steps = {num_steps}; leave num_steps out")
    if not steps or not batch:
        raise InputError(f"inputs have shape {values.shape}: at least one step and one sample are needed")
    constant = steps > 1 and values.strides[0] == 0
    flat: NDArray[np.float64] = (values[:1] if constant else values).reshape(-1, batch, math.prod(shape)).astype(np.float64)
    low, high = (network.input_low, network.input_high) if network.inputs == "graded" else (0.0, 1.0)
    slack = INPUT_TOLERANCE * (high - low)
    if not (flat.min() >= low - slack and flat.max() <= high + slack):
        raise InputError(
            f"inputs reach from {flat.min():g} to {flat.max():g} but this network was quantised for {low:g} to {high:g}; "
            "scale the inputs or quantise with that input_range"
        )
    if network.inputs == "spikes" and not np.isin(flat, (0, 1)).all():
        raise InputError("this network was quantised for spikes, but the inputs hold values other than 0 and 1")
    messages = np.rint((flat - low) / (high - low) * network.message_limit)
    messages = np.clip(messages, 0, network.message_limit).astype(np.int8 if network.message_limit == 1 else np.int32)
    return np.broadcast_to(messages, (steps, *messages.shape[1:])) if constant else messages


def decode(network: LoihiNetwork, messages: Any) -> NDArray[np.float64]:
    """The currents or spikes that ``messages [T, B, features]`` stand for, ``[T, B, *input_shape]``: what rounding left."""
    values = network.input_low + np.asarray(messages) * ((network.input_high - network.input_low) / network.message_limit)
    return np.asarray(values, np.float64).reshape(*values.shape[:2], *network.input_shape)


def check_messages(network: LoihiNetwork, messages: Any) -> NDArray[Any]:
    """``messages`` as integers ``[T, B, features]``: int8 for spikes, else int32. Raises InputError if they do not fit."""
    messages = np.asarray(messages)
    width = math.prod(network.input_shape)
    if messages.ndim != 3 or messages.shape[2] != width or 0 in messages.shape:
        raise InputError(f"messages have shape {messages.shape}, expected [T, B, {width}] with at least one step and sample")
    if messages.dtype.kind not in "biu":
        raise InputError(f"messages are {messages.dtype}, expected integers: encode the inputs first")
    if messages.min() < 0 or messages.max() > network.message_limit:
        raise InputError(f"messages reach from {messages.min()} to {messages.max()}, expected 0 to {network.message_limit}")
    return messages.astype(np.int8 if network.message_limit == 1 else np.int32, copy=False)


Record = Literal["all", "spikes", "counts"]
Engine = Literal["auto", "reference"]


def simulate(
    network: LoihiNetwork,
    messages: Any,
    state: Sequence[NeuronState] | None = None,
    *,
    record: Record = "spikes",
    engine: Engine = "auto",
) -> Simulation:
    """Run ``messages`` through a network: :meth:`Simulator.run`. The simulator is kept with the network for the next call."""
    if engine not in network.prepared:
        network.prepared[engine] = Simulator(network, engine=engine)
    result: Simulation = network.prepared[engine].run(messages, state, record=record)
    return result


class Simulator:
    """A network made ready to run.

    Args:
        network: from :func:`spikeprop.backends.loihi.quantize` or built by hand.
        engine: "auto" uses compiled kernels where numba is installed; "reference" is plain numpy around the one neuron.
            Both return the same integers.
    """

    def __init__(self, network: LoihiNetwork, *, engine: Engine = "auto") -> None:
        if engine not in ("auto", "reference"):
            raise InputError(f"engine = {engine!r} is neither 'auto' nor 'reference'")
        self.network = network
        compiled = engine == "auto" and importlib.util.find_spec("numba") is not None
        limits = [network.message_limit] + [1] * (len(network.layers) - 1)
        self.layers = [_Prepared(layer, limit, compiled) for layer, limit in zip(network.layers, limits, strict=True)]

    def initial_state(self, batch: int) -> list[NeuronState]:
        """Every layer at rest, for ``batch`` samples."""
        shapes = [(batch, layer.outputs) for layer in self.network.layers]
        return [NeuronState(np.zeros(shape, np.int32), np.zeros(shape, np.int32)) for shape in shapes]

    def run(self, messages: Any, state: Sequence[NeuronState] | None = None, *, record: Record = "spikes") -> Simulation:
        """Run the integers ``messages [T, B, features]``. A layer sees the spikes of the one before in the same step.

        state: where to start, from a former result; by default at rest.
        record: ``"counts"`` for large sets, ``"all"`` to see the registers too.

        Raises InputError if messages or state do not fit the network.
        """
        messages = check_messages(self.network, messages)
        steps, batch = messages.shape[:2]
        widths = [layer.outputs for layer in self.network.layers]
        if record not in get_args(Record):
            raise InputError(f"record = {record!r} is none of {get_args(Record)}")
        states = self.initial_state(batch) if state is None else _carried(state, batch, widths)
        registers = widths if record == "all" else []
        run = Simulation(
            counts=[np.zeros((batch, n), np.int32) for n in widths],
            spikes=[np.empty((steps, batch, n), np.int8) for n in widths if record != "counts"],
            membranes=[np.empty((steps, batch, n), np.int32) for n in registers],
            currents=[np.empty((steps, batch, n), np.int32) for n in registers],
            state=states,
        )
        # Blocks keep one layer's activity in the cache and the memory independent of T and B.
        per_step = max(*widths, messages.shape[2])
        rows = min(batch, max(1, BLOCK_NUMBERS // per_step // min(steps, 8)))
        length = min(steps, max(1, BLOCK_NUMBERS // per_step // rows))
        for start in range(0, batch, rows):
            block = slice(start, start + rows)
            for time in range(0, steps, length):
                self._run_block(messages[time : time + length, block], run, slice(time, time + length), block)
        return run

    def _run_block(self, arriving: NDArray[Any], run: Simulation, time: slice, block: slice) -> None:
        """Some samples for some steps through all layers, into ``run``."""
        steps = len(arriving)
        for index, layer in enumerate(self.layers):
            current, membrane = (register[block] for register in run.state[index])
            recorded = [registers[index][time, block] for registers in (run.currents, run.membranes) if registers]
            spikes = np.empty((steps, *membrane.shape), np.int8)
            layer.neurons(layer.sums(arriving), NeuronState(current, membrane), run.counts[index][block], spikes, recorded)
            if run.spikes:
                run.spikes[index][time, block] = spikes
            arriving = spikes


def _carried(state: Sequence[NeuronState], batch: int, widths: list[int]) -> list[NeuronState]:
    """A copy of a former state. Raises InputError unless it is one of this network and batch: kernels check no bounds."""
    states = [NeuronState(*(np.asarray(register) for register in carried)) for carried in state]
    wanted = [(batch, n) for n in widths for _ in NeuronState._fields]
    registers = [register for carried in states for register in carried]
    if [register.shape for register in registers] != wanted or any(register.dtype.kind != "i" for register in registers):
        raise InputError(
            f"the state is not that of {batch} samples in layers of {widths} neurons; take it from a former result"
        )
    if max(np.abs(register).max() for register in registers) > REGISTER_LIMIT:
        raise InputError(f"the state holds values beyond the 24-bit registers, +-{REGISTER_LIMIT}")
    return [NeuronState(*(np.array(register, np.int32, order="C") for register in carried)) for carried in states]


class _Prepared:
    """A layer's arrays in the form that is fast to run. Weights are halved: they are even, and so fit 8 bits."""

    def __init__(self, layer: LoihiLayer, message_limit: int, compiled: bool) -> None:
        self.layer, self.compiled, self.spikes_arrive = layer, compiled, message_limit == 1
        half = layer.weight >> 1
        # The smaller floating-point type whose sums of products are exact; both multiply fast.
        exact: Any = np.float32 if int(largest_sums(half).max()) * message_limit < EXACT_IN_FLOAT32 else np.float64
        self.weight = half.astype(exact)
        # Neuron parameters, one per neuron. With du = 4095 nothing is left of the current, which the step knows as plain zero.
        every = (layer.outputs,)
        self.memory = not np.all(layer.du == DECAY_LIMIT)
        self.keep_current = np.broadcast_to(np.int32(DECAY_LIMIT) - layer.du, every).astype(np.int32)
        self.keep_membrane = np.broadcast_to(np.int32(DECAY_UNITY) - layer.dv, every).astype(np.int32)
        self.threshold = np.broadcast_to(np.left_shift(layer.vth, ALIGNMENT_SHIFT), every).astype(np.int32)
        self.bias = layer.bias
        if compiled:
            from spikeprop.backends.loihi import kernels

            self.kernels = kernels
            if layer.convolution is None:
                self.rows = np.ascontiguousarray(half.T.astype(np.int8))  # [inputs, outputs]
            else:
                self.taps = kernels.taps(half.astype(np.int8), layer.convolution.groups)

    def sums(self, arriving: NDArray[Any]) -> Integers:
        """Half of what reaches each neuron in a step, ``[T, B, n]``; T is 1 where the input is one step seen T times."""
        constant = len(arriving) > 1 and arriving.strides[0] == 0
        arriving = arriving[:1] if constant else arriving
        steps, batch, features = arriving.shape
        convolution = self.layer.convolution
        sparse = SPARSE_DENSE if convolution is None else SPARSE_CONVOLUTION
        if self.compiled and self.spikes_arrive and np.count_nonzero(arriving) < sparse * arriving.size:
            events = np.ascontiguousarray(arriving.reshape(-1, features), np.int8)
            sums = np.empty((len(events), self.layer.outputs), np.int32)
            if convolution is None:
                self.kernels.add_rows(events, self.rows, sums)
            else:
                how = (*convolution.input_shape, *self.layer.output_shape, *convolution.stride, *convolution.padding)
                self.kernels.add_taps(events, self.taps, np.array(how), sums)
            return sums.reshape(steps, batch, -1)
        rows = arriving.reshape(-1, features)
        if convolution is None:
            sums = project(self.weight, None, rows).astype(np.int32)
        else:
            windows = math.prod(self.layer.output_shape[1:]) * math.prod(self.weight.shape[1:]) * convolution.groups
            size = max(1, WINDOW_NUMBERS // windows)
            parts = [project(self.weight, convolution, rows[at : at + size]) for at in range(0, len(rows), size)]
            sums = np.concatenate(parts).astype(np.int32)
        return sums.reshape(steps, batch, -1)

    def neurons(
        self,
        sums: Integers,
        state: NeuronState,
        counts: Integers,
        spikes: NDArray[np.int8],
        recorded: Sequence[Integers],
    ) -> None:
        """Run the neurons over half ``sums``, in place: state, counts, ``spikes [T, B, n]``, if wanted current and membrane."""
        exponent = self.layer.weight_exp
        if self.compiled:
            none = np.empty((0, *spikes.shape[1:]), np.int32)
            parameters = (self.keep_current, self.keep_membrane, self.bias, self.threshold)
            self.kernels.run_neurons(
                sums, exponent, self.memory, *parameters, *state, counts, spikes, *(recorded or (none, none))
            )
            return
        whole = sums << 1
        drives = (whole << exponent if exponent > 0 else whole >> -exponent) << ALIGNMENT_SHIFT
        now = state
        for step, drive in enumerate(np.broadcast_to(drives, spikes.shape)):
            spikes[step], membrane, now = advance(
                now,
                drive,
                alpha=self.keep_current if self.memory else 0.0,
                beta=self.keep_membrane,
                bias=self.bias,
                threshold=self.threshold,
                arithmetic=LOIHI,
            )
            for register, value in zip(recorded, (now.current, membrane), strict=False):
                register[step] = value
        state.current[:], state.membrane[:] = now
        counts += spikes.sum(0, dtype=np.int32)
