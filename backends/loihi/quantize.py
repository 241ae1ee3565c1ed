"""From a trained network to Loihi's integers, or a refusal that says which layer does not fit and what to change.

Per layer, with W the weights, S the scale, M the largest message and x = low + message (high - low) / M a graded input:

    weight  = W Sw rounded to the grid of weight_bits;  Sw = 254 / max|W| at 8 bits
    S       = Sw M / (high - low) 2**weight_exp         (S = Sw 2**weight_exp where spikes arrive)
    vth     = round(threshold S)
    du      = round((1 - alpha) 4096) - 1;  dv = round((1 - beta) 4096)
    bias    = round(b 64 S) as mantissa << exponent;    b = layer bias - W (mean - low) / (1 - alpha), W as rounded

The weight exponent is the largest one, at most 0, at which no possible message can wrap the current and threshold and bias fit.
It floors the sum of a step: an error of at most 1/S in units of U. Lava's convolution has no exponent; there the weights
themselves get coarser by powers of two, and graded messages get fewer bits where that costs less.
"""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from spikeprop.backends.loihi.network import (
    ALIGNMENT_SHIFT,
    BIAS_EXPONENT_LIMIT,
    BIAS_MANTISSA_LIMITS,
    DECAY_LIMIT,
    DECAY_UNITY,
    MESSAGE_BITS_LIMIT,
    REGISTER_LIMIT,
    THRESHOLD_LIMIT,
    WEIGHT_EXPONENT_LIMITS,
    Convolution,
    Inputs,
    LoihiLayer,
    LoihiNetwork,
    check_register,
    output_shape,
    project,
    weight_step,
)
from spikeprop.errors import InputError, RangeError, UnsupportedError

Reals = NDArray[np.float64]

DEFAULT_MESSAGE_BITS = 8  # pixels have no more
Target = Literal["lava", "netx"]
BIAS_EXPONENTS = {"lava": range(BIAS_EXPONENT_LIMIT + 1), "netx": range(6, 7)}  # netx gives every neuron the same one

ON_GRID = 1e-6  # relative rounding error up to which weights count as rounded before: float32 leaves that much
MINIMUM_MESSAGE_BITS = 2  # fewer say so little of a current that the search for bits does not go there by itself


class Rounded(NamedTuple):
    """Weights on a grid of integers. ``codes / scale`` are the weights that the chip has."""

    codes: NDArray[np.int64]
    scale: float
    clipped: int


class _Layer(NamedTuple):
    """What one layer asks for, as real numbers; decays and threshold are one number or one per neuron."""

    where: str
    weight: Reals
    convolution: Convolution | None
    has_exponent: bool
    bias_exponents: range
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
    target: Target = "lava",
) -> LoihiNetwork:
    """The network in Loihi's fixed point: layers of LIF neurons that reset to zero, behind dense or convolutional weights.

    Average pooling and flattening become part of the weights they stand beside, exactly: a mean over a window is the same sum
    under another scale. What is no plain convolution then (pictures that the pooling does not divide, before a padded
    convolution) becomes a dense matrix.

    network: a :class:`spikeprop.network.Network`. Its input centring and the centring of its spikes become part of the biases,
        one per neuron: under zero padding they differ at the borders.
    weight_bits: 2 to 8, with the sign.
    inputs: ``"graded"`` for constant currents, sent as integers; ``"spikes"`` for 0 and 1.
    input_range: the lowest and highest current that can be sent (graded inputs).
    num_message_bits: bits of a graded message; by default 8, or as many fewer as the current register demands.
    target: ``"lava"``, or ``"netx"`` for what lava-dl's ``.net`` can say: no weight exponent, so that dense layers are treated
        as convolutions are, and biases in multiples of 64.

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
    if target not in BIAS_EXPONENTS:
        raise InputError(f"target = {target!r} is none of {', '.join(BIAS_EXPONENTS)}")
    layers = [_read(network, index, target) for index in range(len(network.layers))]
    if inputs == "spikes":
        bits, first = 0, _place(layers[0], weight_bits, 0.0, 1.0, 1)
    else:
        bits, first = _place_first(layers[0], weight_bits, low, high, num_message_bits)
    rest = (_place(layer, weight_bits, 0.0, 1.0, 1) for layer in layers[1:])
    return LoihiNetwork((first, *rest), tuple(network.input_shape), inputs, bits, low, high)


def _place_first(
    layer: _Layer, weight_bits: int, low: float, high: float, num_message_bits: int | None
) -> tuple[int, LoihiLayer]:
    """The layer that takes graded messages, with the bits asked for or else those that lose least."""
    if num_message_bits is None:
        candidates = list(range(DEFAULT_MESSAGE_BITS, MINIMUM_MESSAGE_BITS - 1, -1))
    else:
        check_register("inputs", "num_message_bits", num_message_bits, 1, MESSAGE_BITS_LIMIT, "choose fewer bits")
        candidates = [num_message_bits]
    best: tuple[float, int, LoihiLayer] | None = None
    rounded = round_weights(layer.weight, weight_bits)
    on_grid = _rms(rounded.codes / rounded.scale - layer.weight) < ON_GRID * _rms(layer.weight)
    # Weights that were trained on the chip's grid stay there if fewer message bits make that possible.
    attempts = [(bits, coarser) for coarser in ((False, True) if on_grid else (True,)) for bits in candidates]
    for bits, coarser in attempts:
        if coarser and on_grid and best is not None:
            break
        largest = 2**bits - 1
        try:
            placed = _place(layer, weight_bits, low, (high - low) / largest, largest, coarser)
        except RangeError:
            if (bits, coarser) == attempts[-1] and best is None:
                raise
            continue
        # Relative errors of the weights and of an input spread evenly over its range.
        error = math.hypot(placed.report["weight_error"], 0.5 / largest)
        if best is None or error < best[0]:
            best = error, bits, placed
        if layer.has_exponent:
            break  # it costs next to nothing, so more bits are always better
    assert best is not None
    return best[1:]


def _read(network: Any, index: int, target: Target) -> _Layer:
    """One layer's real numbers. Raises for everything that a layer on Loihi is not."""
    layer, where = network.layers[index], f"layer {index + 1}"
    neuron = layer.neuron
    if type(neuron).__name__ != "LIF":
        raise UnsupportedError(f"{where}: {type(neuron).__name__} neurons do not spike as Loihi's do; train with LIF neurons")
    if layer.recurrent is not None:
        raise UnsupportedError(
            f"{where}: recurrent synapses are not exported (Lava would delay them by a second step, beside the layer's own); "
            "build the network with recurrent=False (train it without --recurrent)"
        )
    if neuron.reset_mechanism != "zero":
        raise UnsupportedError(
            f"{where}: reset_mechanism '{neuron.reset_mechanism}' does not exist on Loihi, which resets to zero; "
            "train with reset_mechanism='zero'"
        )
    weight, convolution = _lower(where, layer)

    def per_neuron(values: Any) -> Reals:
        values = _real(values)
        return values.reshape(()) if values.size == 1 else np.broadcast_to(values, layer.output_shape).reshape(-1)

    mean = network.centre(index)
    read = _Layer(
        where,
        weight,
        convolution,
        target == "lava" and convolution is None,  # Lava ignores a convolution's
        BIAS_EXPONENTS[target],
        np.broadcast_to(_real(layer.bias), layer.output_shape).reshape(-1),
        None if mean is None else _real(mean).reshape(-1),
        *(per_neuron(getattr(neuron, name)) for name in ("alpha", "beta", "threshold")),
    )
    for name in ("weight", "bias", "mean", "alpha", "beta", "threshold"):
        values = getattr(read, name)
        if values is not None and not np.isfinite(values).all():
            raise InputError(f"{where}: {name} holds NaN or infinity; the network did not train")
    if not weight.any():
        raise InputError(f"{where}: every weight is zero, so there is nothing to scale; train the network first")
    for name in ("alpha", "beta"):
        values = getattr(read, name)
        if values.min() < 0 or values.max() > 1:
            raise InputError(f"{where}: {name} lies outside 0..1 ({values.min():g} to {values.max():g}); it is a share kept")
    return read


def _lower(where: str, layer: Any) -> tuple[Reals, Convolution | None]:
    """A layer's synapse as one kernel, or one matrix, with the pooling around the weights in it."""
    parts = list(layer.synapse.parts) if type(layer.synapse).__name__ == "Chain" else [layer.synapse]
    kinds = [type(part).__name__ for part in parts]
    for kind in kinds:
        if kind not in ("Dense", "Conv2d", "AvgPool2d", "Flatten"):
            raise UnsupportedError(f"{where}: a {kind} synapse has no form on Loihi; use Dense, Conv2d, AvgPool2d or Flatten")
    if "Dense" not in kinds and "Flatten" not in kinds and (lowered := _kernel(parts, kinds, layer)) is not None:
        return lowered
    # Row i of the matrix is what output i sees of each input: the transposed map of a one at i.
    ones = torch.eye(math.prod(layer.output_shape), dtype=torch.float64).view(-1, *layer.output_shape)
    matrix = copy.deepcopy(layer.synapse).double().adjoint(ones, layer.input_shape)
    return _real(matrix).reshape(len(ones), -1), None


def _kernel(parts: list[Any], kinds: list[str], layer: Any) -> tuple[Reals, Convolution] | None:
    """Pooling, at most one convolution, pooling, as one convolution; None where no single one does the same."""
    channels, *size = layer.input_shape
    at = kinds.index("Conv2d") if "Conv2d" in kinds else len(parts)
    before = math.prod(part.size for part in parts[:at])
    if at == len(parts):  # pooling alone: each channel through a kernel of its own
        kernel, stride, padding, groups = np.ones((channels, 1, 1, 1)), 1, 0, channels
    else:
        kernel, arguments = _real(parts[at].weight), parts[at].arguments
        stride, padding, groups = (arguments[name] for name in ("stride", "padding", "groups"))
    if padding and any(extent % before for extent in size):
        return None  # the pixels that pooling leaves out would stand where the padding's zeros belong
    kernel = np.kron(kernel, np.ones((before, before))) / before**2
    stride, padding = stride * before, padding * before
    for part in parts[at + 1 :]:  # the mean of neighbouring outputs: shifted copies of the kernel, added up
        extent, reach = np.array(kernel.shape[2:]), stride * (part.size - 1)
        wide = np.zeros((*kernel.shape[:2], *(extent + reach)))
        for down, right in itertools.product(range(0, reach + 1, stride), repeat=2):
            wide[:, :, down : down + extent[0], right : right + extent[1]] += kernel / part.size**2
        kernel, stride = wide, stride * part.size
    return kernel, Convolution((channels, size[0], size[1]), (stride, stride), (padding, padding), groups)


def _real(values: Any) -> Reals:
    """A tensor, an array or a number as float64."""
    return np.asarray(values.detach().double().cpu().numpy() if hasattr(values, "detach") else values, np.float64)


def decay_registers(where: str, alpha: Any, beta: Any) -> tuple[Reals, Reals]:
    """du and dv for the shares kept of current and membrane. Raises RangeError where 12 bits do not hold them."""
    du, dv = np.rint((1 - _real(alpha)) * DECAY_UNITY) - 1, np.rint((1 - _real(beta)) * DECAY_UNITY)
    check_register(where, "current decay du", du, 0, DECAY_LIMIT, "alpha is too close to 1, lower it to 0.9997 or less")
    check_register(where, "membrane decay dv", dv, 0, DECAY_LIMIT, "beta is too close to 0, raise it to 1/4096 or more")
    return du, dv


def kept_shares(du: Any, dv: Any) -> tuple[Any, Any]:
    """alpha and beta as the registers have them: the inverse of :func:`decay_registers`."""
    return (DECAY_UNITY - 1 - du) / DECAY_UNITY, (DECAY_UNITY - dv) / DECAY_UNITY


def _place(
    layer: _Layer, weight_bits: int, low: float, message_step: float, message_limit: int, coarser: bool = True
) -> LoihiLayer:
    """One layer in registers; ``message_step`` is what a message of 1 stands for. Raises RangeError if they cannot hold it.

    coarser: whether a layer without exponent may get coarser weights.
    """
    where = layer.where
    du, dv = decay_registers(where, layer.alpha, layer.beta)
    alpha, beta = kept_shares(du, dv)
    weights = round_weights(layer.weight, weight_bits)
    finest = weights.scale
    # With memory the current adds up to 1 / (1 - alpha) times the sum of a step; below this sum it cannot leave the register.
    sum_limit = np.ceil((REGISTER_LIMIT >> ALIGNMENT_SHIFT) * (du + 1) / DECAY_UNITY) - 1
    problem: RangeError | None = None
    for shift in range(1 - WEIGHT_EXPONENT_LIMITS[0]):
        exponent = -shift if layer.has_exponent else 0
        if shift and not layer.has_exponent and not coarser:
            break
        if shift and not layer.has_exponent:
            weights = round_weights(layer.weight, weight_bits, finest / 2**shift)
            if not weights.codes.any():
                break
        bias = _fold(layer, weights, alpha, low)
        scale = weights.scale / message_step * 2.0**exponent
        vth, wanted_bias = np.rint(layer.threshold * scale), bias * scale * 2**ALIGNMENT_SHIFT
        largest_sum = np.repeat(_largest_sums(weights.codes, message_limit, -exponent), len(bias) // len(weights.codes))
        bias_limit = BIAS_MANTISSA_LIMITS[1] << layer.bias_exponents[-1]
        problem = _overflow(where, largest_sum, sum_limit, vth, wanted_bias, bias_limit)
        if problem is None:
            break
    if problem is not None:
        raise problem
    if (vth == 0).any():
        raise RangeError(
            f"{where}: threshold {layer.threshold.min():g} rounds to 0, the largest weight being {_largest(layer.weight):g}; "
            "raise the threshold or make the weights smaller"
        )
    mantissa, bias_exponent = _split_bias(wanted_bias, layer.bias_exponents)
    # Shares are in 0..1; errors are the largest absolute ones, except where they say otherwise.
    report = {
        "synapse": "dense" if layer.convolution is None else "conv",
        "output_shape": list(output_shape(weights.codes, layer.convolution)),
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
        "bias_use": _largest(wanted_bias) / bias_limit,
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
        convolution=layer.convolution,
        weight_exp=exponent,
        weight_bits=weight_bits,
        scale=scale,
        report=report,
    )


def _fold(layer: _Layer, weights: Rounded, alpha: Reals, low: float) -> Reals:
    """The layer's bias, the centring of its input and the offset of its messages, as one bias per neuron in units of U.

    The rounded weights and decay are used, so that what rounding changed acts on the centred input only.
    """
    if low != 0 and layer.alpha.any():
        raise UnsupportedError(
            f"{layer.where}: messages start at 0 but the input range at {low:g}, and with synaptic memory (alpha > 0) that "
            "offset is no constant bias; shift the inputs to start at 0, or use alpha = 0 in this layer"
        )
    rounded, bias = weights.codes / weights.scale, layer.bias
    if low != 0:
        inputs = rounded.shape[1] if layer.convolution is None else math.prod(layer.convolution.input_shape)
        bias = bias + project(rounded, layer.convolution, np.full((1, inputs), low))[0]
    return bias if layer.mean is None else bias - project(rounded, layer.convolution, layer.mean[None])[0] / (1 - alpha)


def round_weights(weight: Reals, bits: int, scale: float | None = None) -> Rounded:
    """Weights on the grid of ``bits`` signed bits; weights that lie on such a grid stay as they are.

    At 8 bits the largest weight sets the scale. Below, most weights would vanish under it, so the scale is the one with the
    least squared error, and the few weights above the range are clipped. A given ``scale`` is taken as it is.
    The grid is symmetric: its lowest code, -256, is not used, so that the largest weight always shows the scale.
    """
    step, highest = weight_step(bits), 2**8 - weight_step(bits)
    shares = np.linspace(1.0, 0.1, 1 if bits == 8 else 46)
    best: tuple[float, Rounded] | None = None
    for candidate in highest / (shares * np.abs(weight).max()) if scale is None else [scale]:
        wanted = np.rint(weight * candidate / step) * step
        codes = np.clip(wanted, -highest, highest)
        error = float(np.square(codes / candidate - weight).sum())
        if best is None or error < best[0]:
            best = error, Rounded(codes.astype(np.int64), float(candidate), int((codes != wanted).sum()))
    assert best is not None
    return best[1]


def _largest_sums(codes: NDArray[np.int64], message_limit: int, shift: int) -> NDArray[np.int64]:
    """Per row or kernel the largest magnitude in a step: what excitation alone, or inhibition alone, sends, then shifted."""
    rows = codes.reshape(len(codes), -1)
    most, least = (np.where(rows * sign > 0, rows, 0).sum(1) * message_limit for sign in (1, -1))
    return np.maximum(most >> shift, -(least >> shift))


def _overflow(where: str, largest_sum: Any, sum_limit: Any, vth: Reals, bias: Reals, bias_limit: int) -> RangeError | None:
    """The first register that is too small, as the error to raise."""
    how = f"even {2 ** -WEIGHT_EXPONENT_LIMITS[0]} times smaller"
    over = largest_sum - sum_limit
    if over.max() > 0:
        worst = int(np.argmax(over))
        limit = np.broadcast_to(sum_limit, over.shape)[worst]
        return RangeError(
            f"{where}: the inputs can send {largest_sum[worst]:.6g} in a step, which exceeds {limit:.6g}, beyond which Loihi's "
            f"24-bit current wraps, {how}; use fewer message bits, fewer inputs or a lower alpha"
        )
    try:
        check_register(where, "threshold", vth, 0, THRESHOLD_LIMIT, "lower the threshold or raise the weights")
    except RangeError as error:
        return error
    if (largest := np.abs(bias).max()) > bias_limit:
        return RangeError(
            f"{where}: bias {largest:.6g} exceeds {bias_limit}, the most that Loihi's 13-bit mantissa and 3-bit exponent hold, "
            f"{how}; lower the bias, or centre the input on a smaller mean"
        )
    return None


def _split_bias(bias: Reals, exponents: range) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Each bias as mantissa and exponent, with the smallest exponent that lets the mantissa fit."""
    mantissa, exponent = np.zeros(bias.shape, np.int64), np.full(bias.shape, -1)
    for candidate in exponents:
        rounded = np.rint(bias / 2**candidate)
        fits = (exponent < 0) & (rounded >= BIAS_MANTISSA_LIMITS[0]) & (rounded <= BIAS_MANTISSA_LIMITS[1])
        mantissa[fits], exponent[fits] = rounded[fits], candidate
    return mantissa, exponent


def _largest(values: Reals) -> float:
    return float(np.abs(values).max())


def _rms(values: Reals) -> float:
    return float(np.sqrt(np.square(values).mean()))
