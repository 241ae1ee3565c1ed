"""Loihi in integers: quantise a network, code its inputs, and simulate it exactly as Lava and the chip run it.

    chip = quantize(network, inputs="graded", input_range=(0, 1))
    messages = encode(chip, inputs, num_steps=8)        # the integers that the simulator and Lava both receive
    counts = simulate(chip, messages).counts[-1]        # [B, n] spikes of the last layer, for the network's readout

The neuron is :func:`spikeprop.neuron.advance`, the one that training uses, with :data:`LOIHI` arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from spikeprop.backends.loihi_network import (
    ALIGNMENT_SHIFT,
    DECAY_LIMIT,
    DECAY_UNITY,
    REGISTER_LIMIT,
    Integers,
    LoihiLayer,
    LoihiNetwork,
    load,
    save,
)
from spikeprop.backends.loihi_quantize import quantize
from spikeprop.errors import InputError
from spikeprop.neuron import NeuronState, advance

__all__ = ["LOIHI", "LoihiLayer", "LoihiNetwork", "Simulation", "encode", "load", "quantize", "save", "simulate"]

EXACT_IN_FLOAT32 = 2**24  # every integer up to here is a float32, so sums that stay below are exact in any order
BLOCK_NUMBERS = 2**21  # numbers of the widest layer held at once: 8 MiB per array, about the second-level caches
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


LOIHI = LoihiArithmetic()


@dataclass(frozen=True, eq=False)
class Simulation:
    """What :func:`simulate` returns, one array per layer.

    counts: spikes per neuron over all steps, ``[B, n]``.
    spikes: 0 or 1, ``[T, B, n]``; empty if only counts were recorded.
    membranes: the membrane register before the reset, ``[T, B, n]``; empty unless everything was recorded.
    state: what the layers carry on, for a further call.
    """

    counts: list[Integers]
    spikes: list[NDArray[np.int8]]
    membranes: list[Integers]
    state: list[NeuronState[Integers]]

    @property
    def membranes_after_reset(self) -> list[Integers]:
        """What Lava calls v, and a probe reads: the membrane at the end of each step."""
        return [membrane * (1 - spikes) for membrane, spikes in zip(self.membranes, self.spikes, strict=True)]


def encode(network: LoihiNetwork, inputs: Any, num_steps: int | None = None) -> Integers:
    """Real inputs as the first layer's messages, ``[T, B, features]``.

    inputs: a tensor or an array ``[T, B, *input_shape]``, or ``[B, *input_shape]`` with ``num_steps``, for a current that stays
        constant. What is constant in time (stride 0, an encoder's expanded view) stays so and takes the memory of one step.

    Raises InputError if the shape does not fit, or a value is outside the input range (graded) or not 0 or 1 (spikes).
    """
    values = np.asarray(inputs.detach().cpu().numpy() if hasattr(inputs, "detach") else inputs)
    shape = network.input_shape
    if values.shape[1:] == shape and num_steps is not None:
        values = np.broadcast_to(values, (num_steps, *values.shape))
    elif values.shape[2:] != shape or values.ndim != 2 + len(shape):
        features = ", ".join(map(str, shape))
        raise InputError(f"inputs have shape {values.shape}, expected [T, B, {features}], or [B, {features}] with num_steps")
    steps, batch = values.shape[:2]
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
    messages = np.rint((flat - low) / (high - low) * network.message_limit).astype(np.int32)
    np.clip(messages, 0, network.message_limit, out=messages)
    return np.broadcast_to(messages, (steps, *messages.shape[1:])) if constant else messages


def check_messages(network: LoihiNetwork, messages: Any) -> Integers:
    """``messages`` as int32 ``[T, B, features]``. Raises InputError if they are not what the network takes."""
    messages = np.asarray(messages)
    width = math.prod(network.input_shape)
    if messages.ndim != 3 or messages.shape[2] != width or 0 in messages.shape:
        raise InputError(f"messages have shape {messages.shape}, expected [T, B, {width}] with at least one step and sample")
    if messages.dtype.kind not in "biu":
        raise InputError(f"messages are {messages.dtype}, expected integers: encode the inputs first")
    if messages.min() < 0 or messages.max() > network.message_limit:
        raise InputError(f"messages reach from {messages.min()} to {messages.max()}, expected 0 to {network.message_limit}")
    checked: Integers = messages.astype(np.int32, copy=False)
    return checked


def simulate(
    network: LoihiNetwork,
    messages: Any,
    state: Sequence[NeuronState[Integers]] | None = None,
    *,
    record: Literal["all", "spikes", "counts"] = "spikes",
) -> Simulation:
    """Run the integers ``messages [T, B, features]``. A layer sees the spikes of the one before in the same step.

    state: where to start, from a former result; by default at rest.
    record: ``"counts"`` for large sets, ``"all"`` to see the membranes too.

    Raises InputError if messages or state do not fit the network.
    """
    messages = check_messages(network, messages)
    steps, batch = messages.shape[:2]
    widths = [layer.outputs for layer in network.layers]
    if state is None:
        states = [NeuronState(np.zeros((batch, n), np.int32), np.zeros((batch, n), np.int32)) for n in widths]
    else:
        states = [NeuronState(carried.current.copy(), carried.membrane.copy()) for carried in state]
        if [carried.membrane.shape for carried in states] != [(batch, n) for n in widths]:
            raise InputError(f"the state is not that of {batch} samples in layers of {widths} neurons")
    run = Simulation(
        counts=[np.zeros((batch, n), np.int32) for n in widths],
        spikes=[np.zeros((steps, batch, n), np.int8) for n in widths if record != "counts"],
        membranes=[np.zeros((steps, batch, n), np.int32) for n in widths if record == "all"],
        state=states,
    )
    weights = [_transposed(layer, 1 if index else network.message_limit) for index, layer in enumerate(network.layers)]
    # Blocks keep one layer's activity in the cache and the memory independent of T and B.
    per_step = max(*widths, messages.shape[2])
    rows = min(batch, max(1, BLOCK_NUMBERS // per_step // min(steps, 8)))
    length = min(steps, max(1, BLOCK_NUMBERS // per_step // rows))
    for start in range(0, batch, rows):
        block = slice(start, start + rows)
        for time in range(0, steps, length):
            _run_block(network, weights, messages[time : time + length, block], run, slice(time, time + length), block)
    return run


def _transposed(layer: LoihiLayer, message_limit: int) -> NDArray[Any]:
    """Weights ``[inputs, outputs]`` in the smaller floating-point type whose sums of products are exact; both multiply fast."""
    largest = int(np.abs(layer.weight, dtype=np.int64).sum(1).max()) * message_limit
    exact: Any = np.float32 if largest < EXACT_IN_FLOAT32 else np.float64
    return np.asarray(layer.weight.T, exact)


def _run_block(
    network: LoihiNetwork, weights: list[NDArray[Any]], arriving: NDArray[Any], run: Simulation, time: slice, block: slice
) -> None:
    """Some samples for some steps through all layers, into ``run``."""
    for index, layer in enumerate(network.layers):
        drives = _drive(layer, weights[index], arriving)
        before = run.state[index]
        state = NeuronState(before.current[block], before.membrane[block])
        # With du = 4095 nothing is left of the current, which the neuron step knows as a plain zero.
        alpha = 0.0 if np.all(layer.du == DECAY_LIMIT) else DECAY_LIMIT - layer.du
        spikes = np.zeros(drives.shape, np.int8)
        for step, drive in enumerate(drives):
            spikes[step], membrane, state = advance(
                state,
                drive,
                alpha=alpha,
                beta=DECAY_UNITY - layer.dv,
                bias=layer.bias,
                threshold=layer.vth << ALIGNMENT_SHIFT,
                arithmetic=LOIHI,
            )
            if run.membranes:
                run.membranes[index][time.start + step, block] = membrane
        before.current[block], before.membrane[block] = state
        run.counts[index][block] += spikes.sum(0, dtype=np.int32)
        if run.spikes:
            run.spikes[index][time, block] = spikes
        arriving = spikes


def _drive(layer: LoihiLayer, weight: NDArray[Any], arriving: NDArray[Any]) -> NDArray[np.int32]:
    """What a step adds to the current register, ``[T, B, n]``."""
    constant = len(arriving) > 1 and arriving.strides[0] == 0
    once = arriving[:1] if constant else arriving
    sums = (once.reshape(-1, once.shape[2]).astype(weight.dtype) @ weight).astype(np.int32)
    sums = sums << layer.weight_exp if layer.weight_exp > 0 else sums >> -layer.weight_exp
    drive = (sums << ALIGNMENT_SHIFT).reshape(*once.shape[:2], -1)
    return np.broadcast_to(drive, (len(arriving), *drive.shape[1:]))
