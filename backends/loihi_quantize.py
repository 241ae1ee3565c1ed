"""From a trained network to Loihi's integers, or a refusal that says which layer does not fit and what to change.

Per layer, with W the weights, S the scale, M the largest message and x = low + message (high - low) / M a graded input:

    weight  = W Sw rounded to the grid of weight_bits;  Sw = 254 / max|W| at 8 bits
    S       = Sw M / (high - low) 2**weight_exp         (S = Sw 2**weight_exp where spikes arrive)
    vth     = round(threshold S)
    du      = round((1 - alpha) 4096) - 1;  dv = round((1 - beta) 4096)
    bias    = round(b 64 S) as mantissa << exponent;    b = layer bias - W (mean - low) / (1 - alpha), W as rounded

The weight exponent is the largest one, at most 0, at which no possible message can wrap the current and threshold and bias fit.
It floors the sum of a step: an error of at most 1/S in units of U.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from spikeprop.backends.loihi_network import (
    ALIGNMENT_SHIFT,
    BIAS_EXPONENT_LIMIT,
    BIAS_MANTISSA_LIMITS,
    DECAY_LIMIT,
    DECAY_UNITY,
    MESSAGE_BITS_LIMIT,
    REGISTER_LIMIT,
    THRESHOLD_LIMIT,
    WEIGHT_EXPONENT_LIMITS,
    WEIGHT_LIMITS,
    Inputs,
    LoihiLayer,
    LoihiNetwork,
    check_register,
    weight_step,
)
from spikeprop.errors import InputError, RangeError, UnsupportedError

Reals = NDArray[np.float64]

DEFAULT_MESSAGE_BITS = 8  # pixels have no more
MINIMUM_MESSAGE_BITS = 2  # fewer say so little of a current that the search for bits does not go there by itself


class _Weights(NamedTuple):
    """Rounded weights. ``codes / scale`` are the weights that the chip has."""

    codes: NDArray[np.int64]
    scale: float
    clipped: int


class _Layer(NamedTuple):
    """What one layer asks for, as real numbers; parameters broadcast over the neurons."""

    where: str
    weight: Reals
    bias: Reals
    mean: Reals | None
    alpha: Reals
    beta: Reals
    threshold: Reals


def quantize(
    network: Any,
    weight_bits: int = 8,
    *,
    inputs: Inputs = "graded",
    input_range: tuple[float, float] = (0.0, 1.0),
    num_message_bits: int | None = None,
) -> LoihiNetwork:
    """The network in Loihi's fixed point. Dense layers of LIF neurons that reset to zero.

    network: a :class:`spikeprop.network.Network`. Its input centring and the centring of its spikes become part of the biases.
    weight_bits: 2 to 8, with the sign.
    inputs: ``"graded"`` for constant currents, sent as integers; ``"spikes"`` for 0 and 1.
    input_range: the lowest and highest current that can be sent (graded inputs).
    num_message_bits: bits of a graded message; by default 8, or as many fewer as the current register demands.

    ``result.report`` says per layer what was chosen and what rounding cost. ``weight_error`` is relative (root mean square),
    ``threshold_error`` relative, ``bias_error`` in thresholds; ``bias_use`` and ``current_use`` are the largest shares of their
    registers in use, over all possible messages; ``membrane_range`` is where the membrane saturates, in thresholds.

    Raises UnsupportedError for what the chip has not (other layers, neurons, resets), RangeError for a register that cannot
    hold its value, InputError for NaN and the like.
    """
    if weight_bits not in range(2, 9):
        raise InputError(f"weight_bits = {weight_bits!r}: Loihi has signed weights of 2 to 8 bits")
    low, high = (float(bound) for bound in input_range)
    if inputs not in ("graded", "spikes"):
        raise InputError(f"inputs = {inputs!r} is neither 'graded' nor 'spikes'")
    if inputs == "spikes":
        if num_message_bits:
            raise InputError("spikes are single bits: leave num_message_bits out, or say inputs='graded'")
        low, high = 0.0, 1.0
    elif not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise InputError(f"input_range = {input_range}: the second number must be the larger one, and both finite")
    layers = [_read(network, index) for index in range(len(network.layers))]
    bits = 0 if inputs == "spikes" else DEFAULT_MESSAGE_BITS if num_message_bits is None else num_message_bits
    if inputs == "graded":
        check_register("inputs", "num_message_bits", bits, 1, MESSAGE_BITS_LIMIT, "choose fewer bits")
    while True:
        largest_message = 2**bits - 1 if inputs == "graded" else 1
        try:
            first = _place(layers[0], weight_bits, low, (high - low) / largest_message, largest_message)
            break
        except RangeError:
            if num_message_bits is not None or bits <= MINIMUM_MESSAGE_BITS:
                raise
            bits -= 1
    rest = (_place(layer, weight_bits, 0.0, 1.0, 1) for layer in layers[1:])
    return LoihiNetwork((first, *rest), tuple(network.input_shape), inputs, bits, low, high)


def _read(network: Any, index: int) -> _Layer:
    """One layer's real numbers. Raises for everything that a dense Loihi layer is not."""
    layer, where = network.layers[index], f"layer {index + 1}"
    parts = list(layer.synapse.parts) if type(layer.synapse).__name__ == "Chain" else [layer.synapse]
    kinds = [type(part).__name__ for part in parts]
    for kind in kinds:
        if kind not in ("Dense", "Flatten"):
            raise UnsupportedError(f"{where}: {kind} cannot be quantised yet; use Dense synapses (Flatten before them is free)")
    if kinds.count("Dense") != 1:
        raise UnsupportedError(f"{where}: needs exactly one Dense synapse, has {kinds.count('Dense')}; give each its own layer")
    neuron = layer.neuron
    if type(neuron).__name__ != "LIF":
        raise UnsupportedError(f"{where}: {type(neuron).__name__} neurons do not spike as Loihi's do; train with LIF neurons")
    if neuron.reset_mechanism != "zero":
        raise UnsupportedError(
            f"{where}: reset_mechanism '{neuron.reset_mechanism}' does not exist on Loihi, which resets to zero; "
            "train with reset_mechanism='zero'"
        )
    weight, mean = _real(parts[kinds.index("Dense")].weight), network.centre(index)
    bias = np.zeros(len(weight)) if layer.bias is None else _real(layer.bias).reshape(-1)
    numbers = {name: _real(getattr(neuron, name)).reshape(-1) for name in ("alpha", "beta", "threshold")}
    numbers = {name: values[0] if len(values) == 1 else values for name, values in numbers.items()}
    read = _Layer(where, weight, bias, None if mean is None else _real(mean).reshape(-1), **numbers)
    for name in ("weight", "bias", "mean", "alpha", "beta", "threshold"):
        values = getattr(read, name)
        if values is not None and not np.isfinite(values).all():
            raise InputError(f"{where}: {name} holds NaN or infinity; the network did not train")
    if not weight.any():
        raise InputError(f"{where}: every weight is zero, so there is nothing to scale; train the network first")
    for name in ("alpha", "beta"):
        if numbers[name].min() < 0 or numbers[name].max() > 1:
            raise InputError(f"{where}: {name} lies outside 0..1 ({numbers[name].min():g} to {numbers[name].max():g})")
    return read


def _real(values: Any) -> Reals:
    """A tensor, an array or a number as float64."""
    return np.asarray(values.detach().double().cpu().numpy() if hasattr(values, "detach") else values, np.float64)


def _place(layer: _Layer, weight_bits: int, low: float, message_step: float, message_limit: int) -> LoihiLayer:
    """One layer in registers; ``message_step`` is what a message of 1 stands for. Raises RangeError if they cannot hold it."""
    where = layer.where
    du = np.rint((1 - layer.alpha) * DECAY_UNITY) - 1
    dv = np.rint((1 - layer.beta) * DECAY_UNITY)
    check_register(where, "current decay du", du, 0, DECAY_LIMIT, "alpha is too close to 1, lower it to 0.9997 or less")
    check_register(where, "membrane decay dv", dv, 0, DECAY_LIMIT, "beta is too close to 0, raise it to 1/4096 or more")
    alpha, beta = (DECAY_UNITY - 1 - du) / DECAY_UNITY, (DECAY_UNITY - dv) / DECAY_UNITY
    weights = _round_weights(layer.weight, weight_bits)
    bias = _fold(layer, weights, alpha, low)

    # The most that excitation alone, and inhibition alone, can send in one step; sums lie between the two.
    most, least = (np.where(weights.codes * sign > 0, weights.codes, 0).sum(1) * message_limit for sign in (1, -1))
    # With memory the current adds up to 1 / (1 - alpha) times the sum of a step; below this sum it cannot leave the register.
    sum_limit = np.ceil((REGISTER_LIMIT >> ALIGNMENT_SHIFT) * (du + 1) / DECAY_UNITY) - 1
    problem: RangeError | None = None
    for exponent in range(0, WEIGHT_EXPONENT_LIMITS[0] - 1, -1):
        scale = weights.scale / message_step * 2.0**exponent
        vth, wanted_bias = np.rint(layer.threshold * scale), bias * scale * 2**ALIGNMENT_SHIFT
        largest_sum = np.maximum(most >> -exponent, -(least >> -exponent))
        problem = _overflow(where, largest_sum, sum_limit, vth, wanted_bias)
        if problem is None:
            break
    if problem is not None:
        raise problem
    if (vth == 0).any():
        raise RangeError(
            f"{where}: threshold {layer.threshold.min():g} rounds to 0, the largest weight being {_largest(layer.weight):g}; "
            "raise the threshold or make the weights smaller"
        )
    mantissa, bias_exponent = _split_bias(wanted_bias)
    # Shares are in 0..1; errors are the largest absolute ones, except where they say otherwise.
    report = {
        "scale": scale,
        "weight_bits": weight_bits,
        "weight_exp": exponent,
        "zeroed_weights": int(((weights.codes == 0) & (layer.weight != 0)).sum()),
        "clipped_weights": weights.clipped,
        "weight_error": _rms(weights.codes / weights.scale - layer.weight) / _rms(layer.weight),
        "alpha_error": _largest(alpha - layer.alpha),
        "beta_error": _largest(beta - layer.beta),
        "threshold_error": _largest(vth / scale / layer.threshold - 1),
        "bias_error": _largest((np.left_shift(mantissa, bias_exponent) - wanted_bias) / (vth * 2**ALIGNMENT_SHIFT)),
        "bias_use": _largest(wanted_bias) / (BIAS_MANTISSA_LIMITS[1] << BIAS_EXPONENT_LIMIT),
        "threshold_register": int(vth.max()),
        "membrane_range": REGISTER_LIMIT / float(vth.max() * 2**ALIGNMENT_SHIFT),
        "worst_case_current": int(largest_sum.max()),
        "worst_case_current_limit": int(sum_limit.min()),
        "current_use": float((largest_sum / sum_limit).max()),
    }
    return LoihiLayer.build(
        weights.codes,
        du=du,
        dv=dv,
        vth=vth,
        bias_mant=mantissa,
        bias_exp=bias_exponent,
        weight_exp=exponent,
        weight_bits=weight_bits,
        scale=scale,
        report=report,
    )


def _fold(layer: _Layer, weights: _Weights, alpha: Reals, low: float) -> Reals:
    """The layer's bias, the centring of its input and the offset of its messages, as one bias per neuron in units of U.

    The rounded weights and decay are used, so that what rounding changed acts on the centred input only.
    """
    if low != 0 and layer.alpha.any():
        raise UnsupportedError(
            f"{layer.where}: messages start at 0 but the input range at {low:g}, and with synaptic memory (alpha > 0) that "
            "offset is no constant bias; shift the inputs to start at 0, or use alpha = 0 in this layer"
        )
    rounded = weights.codes / weights.scale
    bias: Reals = np.broadcast_to(layer.bias, len(rounded)) + low * rounded.sum(1)
    return bias if layer.mean is None else bias - rounded @ layer.mean / (1 - alpha)


def _round_weights(weight: Reals, bits: int) -> _Weights:
    """Weights on the grid of ``bits`` signed bits.

    At 8 bits the largest weight sets the scale. Below, most weights would vanish under it, so the scale is the one with the
    least squared error, and the few weights above the range are clipped.
    """
    step, lowest, highest = weight_step(bits), WEIGHT_LIMITS[0], 2**8 - weight_step(bits)
    best: tuple[float, _Weights] | None = None
    for share in np.linspace(1.0, 0.1, 1 if bits == 8 else 46):
        scale = highest / (share * np.abs(weight).max())
        wanted = np.rint(weight * scale / step) * step
        codes = np.clip(wanted, lowest, highest)
        error = float(np.square(codes / scale - weight).sum())
        if best is None or error < best[0]:
            best = error, _Weights(codes.astype(np.int64), float(scale), int((codes != wanted).sum()))
    assert best is not None
    return best[1]


def _overflow(where: str, largest_sum: Any, sum_limit: Any, vth: Reals, bias: Reals) -> RangeError | None:
    """The first register that is too small, as the error to raise."""
    deepest = WEIGHT_EXPONENT_LIMITS[0]
    over = largest_sum - sum_limit
    if over.max() > 0:
        worst = int(np.argmax(over))
        limit = np.broadcast_to(sum_limit, over.shape)[worst]
        return RangeError(
            f"{where}: the inputs can send {largest_sum[worst]:.6g} in a step, which exceeds {limit:.6g}, beyond which Loihi's "
            f"24-bit current wraps, even at weight exponent {deepest}; use fewer message bits, fewer inputs or a lower alpha"
        )
    bias_limit = BIAS_MANTISSA_LIMITS[1] << BIAS_EXPONENT_LIMIT
    try:
        check_register(where, "threshold", vth, 0, THRESHOLD_LIMIT, "lower the threshold or raise the weights")
    except RangeError as error:
        return error
    if (largest := np.abs(bias).max()) > bias_limit:
        return RangeError(
            f"{where}: bias {largest:.6g} exceeds {bias_limit}, the most that Loihi's 13-bit mantissa and 3-bit exponent hold, "
            f"even at weight exponent {deepest}; lower the bias, or centre the input on a smaller mean"
        )
    return None


def _split_bias(bias: Reals) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Each bias as mantissa and exponent, with the smallest exponent that lets the mantissa fit."""
    mantissa, exponent = np.zeros(bias.shape, np.int64), np.full(bias.shape, -1)
    for candidate in range(BIAS_EXPONENT_LIMIT + 1):
        rounded = np.rint(bias / 2**candidate)
        fits = (exponent < 0) & (rounded >= BIAS_MANTISSA_LIMITS[0]) & (rounded <= BIAS_MANTISSA_LIMITS[1])
        mantissa[fits], exponent[fits] = rounded[fits], candidate
    return mantissa, exponent


def _largest(values: Reals) -> float:
    return float(np.abs(values).max())


def _rms(values: Reals) -> float:
    return float(np.sqrt(np.square(values).mean()))
