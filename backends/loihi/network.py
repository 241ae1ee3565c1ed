"""A network in Loihi's integers: plain numpy arrays in documented registers, saved to one file.

What each register means, and the step they take part in (u is the synaptic current, v the membrane, both 24 bits signed)::

    a <- (weight @ message) >> -weight_exp                               the sum of one step, floored by the shift
    u <- sgn(u) ((|u| (4096 - (du + 1))) >> 12) + (a << 6)               wraps at 24 bits
    v <- sgn(v) ((|v| (4096 - dv)) >> 12) + u + (bias_mant << bias_exp)  saturates at 24 bits
    spike = v > (vth << 6);  v <- 0 where it spiked

Source: Lava 0.10.0, ``PyLifResetModelBitAcc``, ``PyDenseModelBitAcc`` and ``PyConvModelFixed``; checked against it and against
a trace recorded on Loihi 2 in the tests. The registers' widths are the ones Lava documents; Lava itself checks none of them, so
this module does.
"""

from __future__ import annotations

import json
import math
import os
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import ArrayLike, NDArray

from spikeprop.errors import CheckpointError, InputError, RangeError
from spikeprop.storage import atomic_write

Integers = NDArray[np.int32]
Inputs = Literal["spikes", "graded"]

DECAY_UNITY = 2**12  # a decay of d keeps the fraction (4096 - d) / 4096
DECAY_LIMIT = 2**12 - 1  # du and dv are 12-bit unsigned registers
THRESHOLD_LIMIT = 2**17 - 1  # vth is a 17-bit unsigned register
BIAS_MANTISSA_LIMITS = (-(2**12), 2**12 - 1)  # 13 bits, signed
BIAS_EXPONENT_LIMIT = 2**3 - 1  # 3 bits, unsigned
WEIGHT_LIMITS = (-(2**8), 2**8 - 2)  # mixed sign: 8 bits with the sign, kept times 2, hence even
WEIGHT_EXPONENT_LIMITS = (-8, 7)  # 4 bits, signed
MESSAGE_BITS_LIMIT = 16  # a graded spike's payload; more would leave no room for weights in the 24-bit current
ALIGNMENT_SHIFT = 6  # the chip shifts the synaptic sum and the threshold left by 6 to line them up with u and v
REGISTER_LIMIT = 2**23  # u and v are 24-bit signed registers
SUM_LIMIT = 2**31  # Lava adds the products of one step in 32 bits, before the shift by the weight exponent
CONVOLUTION_SUM_LIMIT = 2**23  # and clamps those of a convolution to 24 bits

FORMAT = "spikeprop-loihi"
VERSION = 2
READABLE = (1, 2)  # version 1 knew dense layers only


@dataclass(frozen=True)
class Convolution:
    """How a kernel is applied: cross-correlation over ``[C, H, W]``, as ``torch.nn.Conv2d`` has it.

    input_shape: (C, H, W). stride, padding: (vertical, horizontal). groups: as in torch.
    """

    input_shape: tuple[int, int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    groups: int = 1

    def output_shape(self, kernel_shape: Sequence[int]) -> tuple[int, int, int]:
        """(C, H, W) after a kernel ``[out, in / groups, height, width]``. Raises InputError if it does not fit."""
        channels, *size = self.input_shape
        outputs, inputs, *kernel = kernel_shape
        if inputs * self.groups != channels or outputs % self.groups:
            raise InputError(
                f"a kernel of shape {tuple(kernel_shape)} in {self.groups} groups does not fit {channels} channels"
            )
        spans = [extent + 2 * pad - k for extent, pad, k in zip(size, self.padding, kernel, strict=True)]
        if min(spans) < 0:
            raise InputError(f"a kernel of {kernel[0]} x {kernel[1]} is larger than the padded input {self.input_shape}")
        height, width = (span // step + 1 for span, step in zip(spans, self.stride, strict=True))
        return (outputs, height, width)


def project(weight: NDArray[Any], convolution: Convolution | None, rows: NDArray[Any]) -> NDArray[Any]:
    """``rows [N, inputs]`` through dense or convolutional weights, ``[N, outputs]``, in the dtype of the weights."""
    rows = rows.astype(weight.dtype, copy=False)
    if convolution is None:
        return rows @ weight.T
    (up, side), (vertical, horizontal) = convolution.padding, convolution.stride
    view: Any = sliding_window_view  # numpy's own types know one axis only
    padded = np.pad(rows.reshape(-1, *convolution.input_shape), ((0, 0), (0, 0), (up, up), (side, side)))
    windows = view(padded, tuple(weight.shape[2:]), (2, 3))[:, :, ::vertical, ::horizontal]  # [N, C, H, W, h, w]
    per_group = windows.shape[1] // convolution.groups
    parts = []
    for group, kernel in enumerate(np.split(weight, convolution.groups)):
        seen = windows[:, group * per_group : (group + 1) * per_group].transpose(0, 2, 3, 1, 4, 5)
        products = seen.reshape(-1, math.prod(kernel.shape[1:])) @ kernel.reshape(len(kernel), -1).T
        parts.append(products.reshape(len(rows), -1, len(kernel)).transpose(0, 2, 1))
    return np.concatenate(parts, 1).reshape(len(rows), -1)


@dataclass(frozen=True, eq=False)
class LoihiLayer:
    """Synapses into one population of neurons that reset to zero.

    weight: ``[outputs, inputs]``, or for a convolution ``[C_out, C_in / groups, height, width]``; even integers in -256..254
        (a multiple of ``2 ** (9 - weight_bits)``).
    convolution: how the kernel is applied, None for dense weights. Neurons and inputs are counted in C order of (C, H, W).
    weight_exp: power of two applied to the sum of a step; a negative one floors the sum. 0 for a convolution: Lava ignores it.
    du, dv, vth: decay of the current, decay of the membrane, threshold; one number, or one per neuron ``[outputs]``. Lava's
        processor models take either, though its documentation promises one per population.
    bias_mant, bias_exp: the bias added to the membrane every step, per neuron ``[outputs]``.
    scale: membrane register = 64 * scale * U of the network that was quantised (1 where there was none).
    report: what quantising chose and lost; JSON types only. See :func:`spikeprop.backends.loihi.quantize`.
    """

    weight: Integers
    du: int | Integers
    dv: int | Integers
    vth: int | Integers
    bias_mant: Integers
    bias_exp: Integers
    convolution: Convolution | None = None
    weight_exp: int = 0
    weight_bits: int = 8
    scale: float = 1.0
    report: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Simulators keep these arrays in other forms, so they must not change; a copy leaves the caller's own array writable.
        for name in ("weight", "du", "dv", "vth", "bias_mant", "bias_exp"):
            if isinstance(values := getattr(self, name), np.ndarray) and values.flags.writeable:
                fixed = values.copy()
                fixed.flags.writeable = False
                object.__setattr__(self, name, fixed)

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (int(self.weight.shape[1]),) if self.convolution is None else self.convolution.input_shape

    @property
    def output_shape(self) -> tuple[int, ...]:
        return output_shape(self.weight, self.convolution)

    @property
    def inputs(self) -> int:
        return math.prod(self.input_shape)

    @property
    def outputs(self) -> int:
        return math.prod(self.output_shape)

    @property
    def bias(self) -> Integers:
        """What is added to the membrane register every step, ``[outputs]``."""
        return np.left_shift(self.bias_mant, self.bias_exp)

    @staticmethod
    def build(
        weight: ArrayLike,
        *,
        du: ArrayLike = DECAY_LIMIT,
        dv: ArrayLike = 0,
        vth: ArrayLike,
        bias_mant: ArrayLike = 0,
        bias_exp: ArrayLike = 0,
        convolution: Convolution | None = None,
        weight_exp: int = 0,
        weight_bits: int = 8,
        scale: float = 1.0,
        report: dict[str, Any] | None = None,
    ) -> LoihiLayer:
        """A layer from anything that holds integers; biases are spread over the neurons. Raises InputError on fractions."""
        weight = np.asarray(weight)
        if weight.ndim != (2 if convolution is None else 4):
            wanted = "[outputs, inputs]" if convolution is None else "[C_out, C_in / groups, height, width]"
            raise InputError(f"weight must be {wanted}, got shape {weight.shape}")
        neurons = math.prod(output_shape(weight, convolution))
        return LoihiLayer(
            weight=_integers(weight),
            du=_one_or_more(du),
            dv=_one_or_more(dv),
            vth=_one_or_more(vth),
            bias_mant=np.broadcast_to(_integers(bias_mant), neurons).copy(),
            bias_exp=np.broadcast_to(_integers(bias_exp), neurons).copy(),
            convolution=convolution,
            weight_exp=weight_exp,
            weight_bits=weight_bits,
            scale=scale,
            report=report or {},
        )


def output_shape(weight: NDArray[Any], convolution: Convolution | None) -> tuple[int, ...]:
    """Shape of the neurons behind a synapse."""
    return (len(weight),) if convolution is None else convolution.output_shape(weight.shape)


def largest_sums(weight: NDArray[Any]) -> NDArray[np.int64]:
    """The most, in magnitude, that each row or kernel can add up to in a step of single spikes."""
    return np.abs(weight, dtype=np.int64).reshape(len(weight), -1).sum(1)


def _integers(values: ArrayLike) -> Integers:
    values = np.asarray(values)
    if not np.array_equal(values, np.trunc(values)) or np.abs(values, dtype=np.float64).max(initial=0) >= SUM_LIMIT:
        raise InputError("a register holds whole numbers of at most 32 bits; round first")
    return values.astype(np.int32)


def _one_or_more(values: ArrayLike) -> int | Integers:
    whole = _integers(values)
    return whole if whole.ndim else int(whole)


@dataclass(frozen=True, eq=False)
class LoihiNetwork:
    """Layers in a row and how inputs become the first layer's messages. Every register is checked when it is built.

    inputs: ``"spikes"``, 0 or 1, or ``"graded"``, integers 0 .. 2**num_message_bits - 1 that stand for input_low .. input_high.
    input_shape: shape of one sample at one step; messages are flattened in C order.

    Raises RangeError, naming layer, value, bound and remedy, if a register cannot hold its value; InputError if shapes differ.
    """

    layers: tuple[LoihiLayer, ...]
    input_shape: tuple[int, ...]
    inputs: Inputs = "spikes"
    num_message_bits: int = 0
    input_low: float = 0.0
    input_high: float = 1.0
    prepared: dict[str, Any] = field(default_factory=dict, init=False, repr=False)  # simulators by engine; see simulate()

    def __post_init__(self) -> None:
        if self.inputs not in get_args(Inputs):
            raise InputError(f"inputs = {self.inputs!r} is none of {get_args(Inputs)}")
        if not (math.isfinite(self.input_low) and math.isfinite(self.input_high) and self.input_low < self.input_high):
            raise InputError(f"input range {self.input_low} to {self.input_high}: the second must be larger, and both finite")
        if self.inputs == "spikes" and self.num_message_bits != 0:
            raise InputError(f"spikes are single bits: num_message_bits must be 0, got {self.num_message_bits}")
        if self.inputs == "graded":
            check_register("inputs", "num_message_bits", self.num_message_bits, 1, MESSAGE_BITS_LIMIT, "choose fewer bits")
        if not self.layers:
            raise InputError("a network needs at least one layer")
        width, limit = math.prod(self.input_shape), self.message_limit
        for number, layer in enumerate(self.layers, 1):
            if layer.inputs != width:
                raise InputError(f"layer {number}: its weights take {layer.inputs} inputs but {width} arrive")
            check_registers(f"layer {number}", layer, limit)
            width, limit = layer.outputs, 1

    @property
    def message_limit(self) -> int:
        """The largest input message."""
        return 2**self.num_message_bits - 1 if self.inputs == "graded" else 1

    @property
    def report(self) -> dict[str, Any]:
        """How inputs are coded and, per layer, what quantising chose and lost; JSON types only."""
        coding: dict[str, Any] = {"inputs": self.inputs, "input_shape": list(self.input_shape)}
        if self.inputs == "graded":
            step = (self.input_high - self.input_low) / self.message_limit
            coding |= {"num_message_bits": self.num_message_bits, "input_range": [self.input_low, self.input_high]}
            coding |= {"input_rounding": step / 2}
        return {**coding, "layers": [layer.report for layer in self.layers]}


def check_register(where: str, name: str, value: Any, low: int, high: int, remedy: str) -> None:
    """Raises RangeError unless every element of ``value`` is a whole number in low..high."""
    values = np.asarray(value, np.float64)
    if not np.array_equal(values, np.rint(values)):
        raise RangeError(f"{where}: {name} {values[values != np.rint(values)].flat[0]:g} is no whole number; round it")
    for extreme, outside, problem in (
        (values.max(), values.max() > high, f"exceeds Loihi's {(high - low).bit_length()}-bit limit {high}"),
        (values.min(), values.min() < low, f"is below Loihi's lower limit {low}"),
    ):
        if outside:
            shown = f"{extreme:.6g}" if abs(extreme) < 1e6 else f"{extreme:.2g}"
            raise RangeError(f"{where}: {name} {shown} {problem}; {remedy}")


def check_registers(where: str, layer: LoihiLayer, message_limit: int) -> None:
    """Raises RangeError for the first register of the layer that does not hold its value, InputError for shapes."""
    for name in ("du", "dv", "vth", "bias_mant", "bias_exp"):
        if (shape := np.shape(getattr(layer, name))) not in ((), (layer.outputs,)):
            raise InputError(f"{where}: {name} has shape {shape}, expected one number or ({layer.outputs},)")
    check_register(where, "weight bits", layer.weight_bits, 1, 8, "Loihi has 1 to 8")
    lowest, highest, step = *WEIGHT_LIMITS, weight_step(layer.weight_bits)
    if (wrong := layer.weight[(layer.weight < lowest) | (layer.weight > highest)]).size:
        raise RangeError(f"{where}: weight {wrong[0]} lies outside Loihi's {lowest} to {highest}; rescale the weights")
    if np.any(layer.weight % step):
        raise RangeError(f"{where}: {layer.weight_bits}-bit signed weights are multiples of {step}; round them to that grid")
    check_register(where, "weight exponent", layer.weight_exp, *WEIGHT_EXPONENT_LIMITS, "rescale the layer")
    if layer.convolution is not None and layer.weight_exp:
        raise RangeError(f"{where}: weight exponent {layer.weight_exp} of a convolution, which Lava ignores; use 0")
    check_register(where, "current decay du", layer.du, 0, DECAY_LIMIT, "keep alpha between 0 and 4095/4096")
    check_register(where, "membrane decay dv", layer.dv, 0, DECAY_LIMIT, "keep beta between 1/4096 and 1")
    check_register(where, "threshold", layer.vth, 0, THRESHOLD_LIMIT, "lower the threshold")
    check_register(where, "bias mantissa", layer.bias_mant, *BIAS_MANTISSA_LIMITS, "lower the bias or raise bias_exp")
    check_register(where, "bias exponent", layer.bias_exp, 0, BIAS_EXPONENT_LIMIT, "lower the bias")
    largest_sum, limit = int(largest_sums(layer.weight).max()) * message_limit, SUM_LIMIT
    if layer.convolution is not None:
        limit = CONVOLUTION_SUM_LIMIT
    if largest_sum >= limit:
        bits = limit.bit_length()
        raise RangeError(f"{where}: sums of up to {largest_sum:.2g} do not fit {bits} bits; use fewer message bits or inputs")


def weight_step(weight_bits: int) -> int:
    """Spacing of signed weights of that many bits: 2 at 8 bits, twice as much for each bit less (Lava's truncate_weights)."""
    return int(2 ** (9 - weight_bits))


def save(network: LoihiNetwork, path: str | os.PathLike[str]) -> None:
    """Writes one ``.npz`` file: integer arrays, and a JSON text with everything else. It appears whole or not at all.

    Raises CheckpointError if it cannot be written; an earlier file at ``path`` is then unchanged.
    """
    arrays: dict[str, Any] = {}
    layers = []
    for number, layer in enumerate(network.layers, 1):
        for name in ("weight", "du", "dv", "vth", "bias_mant", "bias_exp"):
            arrays[f"layer{number}_{name}"] = np.asarray(getattr(layer, name))
        plain = {name: getattr(layer, name) for name in ("weight_exp", "weight_bits", "scale", "report")}
        convolution = None if layer.convolution is None else asdict(layer.convolution)
        layers.append({"kind": "conv" if convolution else "dense", "convolution": convolution, **plain})
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "inputs": network.inputs,
        "input_shape": list(network.input_shape),
        "num_message_bits": network.num_message_bits,
        "input_low": network.input_low,
        "input_high": network.input_high,
        "layers": layers,
    }
    write_arrays(path, {"metadata": np.array(json.dumps(metadata)), **arrays})


def write_arrays(path: str | os.PathLike[str], arrays: dict[str, NDArray[Any]]) -> None:
    """``numpy.savez_compressed`` that leaves either the whole file or none."""
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def load(path: str | os.PathLike[str]) -> LoihiNetwork:
    """Reads what :func:`save` wrote. Raises CheckpointError if the file is missing, damaged, foreign or of another version."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            metadata = json.loads(str(archive["metadata"]))
            if metadata.get("format") != FORMAT:
                raise CheckpointError(f"{path}: not a Loihi network saved by spikeprop")
            if metadata["version"] not in READABLE:
                raise CheckpointError(
                    f"{path}: saved as version {metadata['version']}, this spikeprop reads up to version {VERSION}; update it"
                )
            return LoihiNetwork(
                layers=_layers(archive, metadata["layers"]),
                input_shape=tuple(metadata["input_shape"]),
                inputs=metadata["inputs"],
                num_message_bits=metadata["num_message_bits"],
                input_low=metadata["input_low"],
                input_high=metadata["input_high"],
            )
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error, KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        # numpy answers for a foreign file with whatever its parsers trip over: all of it means the same to the reader
        raise CheckpointError(f"{path}: not a Loihi network saved by spikeprop, or damaged ({error})") from error


def _layers(archive: Any, described: Sequence[dict[str, Any]]) -> tuple[LoihiLayer, ...]:
    return tuple(
        LoihiLayer.build(
            archive[f"layer{number}_weight"],
            **{name: archive[f"layer{number}_{name}"] for name in ("du", "dv", "vth", "bias_mant", "bias_exp")},
            **{name: layer[name] for name in ("weight_exp", "weight_bits", "scale", "report")},
            convolution=_convolution(layer.get("convolution")),
        )
        for number, layer in enumerate(described, 1)
    )


def _convolution(described: dict[str, Any] | None) -> Convolution | None:
    if described is None:
        return None
    channels, height, width = described["input_shape"]
    stride, padding = ((int(pair[0]), int(pair[1])) for pair in (described["stride"], described["padding"]))
    return Convolution((channels, height, width), stride, padding, described["groups"])
