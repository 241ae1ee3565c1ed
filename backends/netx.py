"""Integer networks as lava-dl's ``.net`` files (HDF5): written for its loader, ``lava.lib.dl.netx.hdf5.Network``, and read.

A file is a row of entries ``layer/0``, ``layer/1`` and so on: an input with its shape, then dense, conv and flatten. Pictures
are (C, H, W), kernels ``[C_out, C_in / groups, height, width]`` and pairs (vertical, horizontal), all as here; netx turns them
round for Lava. One number per neuron of a picture is the exception: netx hands such arrays on as they are, so they stand as
(W, H, C). Lava then holds the registers of :class:`spikeprop.backends.loihi.LoihiLayer`:

    du = iDecay - 1;  dv = vDecay;  vth = vThMant;  bias_mant = bias, with bias_exp = 6 always;  weight = weight

A neuron of type CUBA or LOIHI becomes Lava's LIF, the neuron of ``backends/loihi``. netx derives width, exponent and sign of
dense weights from the weights, which leaves what they do unchanged but for the few matrices that :func:`write` refuses.

The format does not say whether inputs are graded, how registers came from a trained network, and how a bias was split. Notes
on that (``notes``, ``biasExp``) stand beside the datasets that netx reads; it does not look at them.

Source: lava-dl 0.6.0 (``netx/hdf5.py``, ``netx/utils.py``, ``netx/blocks/process.py``, ``slayer/block/base.py``) and lava-nc
0.10.0; the tests run netx itself.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from spikeprop.backends.lava import check_convolutions
from spikeprop.backends.loihi import Convolution, LoihiLayer, LoihiNetwork
from spikeprop.backends.loihi.network import (
    BIAS_EXPONENT_LIMIT,
    BIAS_MANTISSA_LIMITS,
    MESSAGE_BITS_LIMIT,
    SUM_LIMIT,
    WEIGHT_LIMITS,
    check_register,
    check_registers,
    largest_sums,
    output_shape,
)
from spikeprop.backends.loihi.quantize import BIAS_EXPONENTS
from spikeprop.errors import BackendError, CheckpointError, InputError, SpikepropError, UnsupportedError
from spikeprop.storage import atomic_write

__all__ = ["library", "loader_options", "read", "write"]

Shape = tuple[int, ...]
Whole = NDArray[np.int64]
Entry = dict[str, Any]  # one entry of the file: dataset name -> what it holds

(BIAS_EXPONENT,) = BIAS_EXPONENTS["netx"]
NEURON_TYPES = ("CUBA", "LOIHI")  # one neuron under two names; slayer writes the first
# What changes a neuron in slayer, and only there: netx passes over it. The value is the one that changes nothing.
IGNORED_BY_NETX = {"refDelay": 1, "gradedSpike": 0, "messageBits": 0, "wgtExp": 0, "weight_exp": 0}
COMPACT_BYTES = 2**12  # up to here a dataset stands in its header, whose checksum then covers it
# From this version of the file format on, HDF5 checks its own headers. Every HDF5 library since 2008 reads it.
HDF5_VERSION = "v108"
NOTES_VERSION = 1


def library() -> Any:
    """The package ``h5py``, imported when first needed. Raises BackendError with the install command where it is missing."""
    try:
        import h5py
    except ImportError as error:
        raise BackendError(f".net files are HDF5, and h5py is not installed ({error}); run: pip install h5py") from None
    return h5py


def loader_options(network: LoihiNetwork, num_steps: int) -> dict[str, int]:
    """What netx needs to be told beside the file: ``hdf5.Network(net_config=path, **loader_options(network, num_steps))``.

    The samples then follow each other without a gap, ``num_steps`` each, and every one starts from rest: layer l (from 1) sees
    step t of the input at step t + l, and clears its registers before a sample's first step. Input pictures go in as (W, H, C),
    inputs of a dense layer flat, in C order of (C, H, W).
    """
    options = {"reset_interval": num_steps, "reset_offset": 1}
    return options if network.inputs == "spikes" else {**options, "input_message_bits": network.num_message_bits}


# ---------------------------------------------------------------------------------------------------------------- export


def write(network: LoihiNetwork, path: str | os.PathLike[str]) -> None:
    """Write the network for netx, whole or not at all. :func:`read` returns it with the same integers in every register.

    Raises UnsupportedError for what netx would not run exactly as :func:`spikeprop.backends.loihi.simulate` does, naming layer,
    value and remedy; CheckpointError if the file cannot be written (what stood at ``path`` is then unchanged); BackendError
    without h5py.
    """
    check_convolutions(network)
    h5py, entries = library(), _entries(network)
    # HDF5 can neither report a full disk reliably nor recover from it, so it writes to memory.
    image = io.BytesIO()
    with h5py.File(image, "w", libver=(HDF5_VERSION, HDF5_VERSION)) as file:
        for number, entry in enumerate(entries):
            for name, values in entry.items():
                _store(h5py, file, f"layer/{number}/{name}", values)
    with atomic_write(path) as temporary:
        temporary.write_bytes(image.getvalue())


def _store(h5py: Any, file: Any, name: str, values: Any) -> None:
    """One dataset, such that damage to it is found: small ones share their header's checksum, large ones have their own."""
    values = np.array(values, order="C")
    if values.nbytes > COMPACT_BYTES:
        file.create_dataset(name, data=values, compression="gzip", fletcher32=True)
        return
    folder, _, own = name.rpartition("/")
    compact = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    compact.set_layout(h5py.h5d.COMPACT)  # create_dataset (h5py 3.16) has no word for it
    kind = h5py.h5t.py_create(values.dtype, logical=True)
    space = h5py.h5s.create_simple(values.shape) if values.shape else h5py.h5s.create(h5py.h5s.SCALAR)
    stored = h5py.h5d.create(file.require_group(folder).id, own.encode(), kind, space, dcpl=compact)
    stored.write(h5py.h5s.ALL, h5py.h5s.ALL, values)


def _entries(network: LoihiNetwork) -> list[Entry]:
    """The whole file. Raises UnsupportedError for what it cannot say."""
    shape = network.input_shape
    coding = {name: getattr(network, name) for name in ("inputs", "num_message_bits", "input_low", "input_high")}
    entries: list[Entry] = [{**_kind("input", shape), "notes": _notes(coding)}]
    for number, layer in enumerate(network.layers, 1):
        where, limit = f"layer {number}", network.message_limit if number == 1 else 1
        if layer.convolution is not None and layer.input_shape != shape:
            raise UnsupportedError(
                f"{where}: its convolution takes pictures of shape {layer.input_shape} but {shape} arrive, and netx knows no "
                "reshaping; let inputs or the layer before have that shape, or use dense weights"
            )
        if layer.convolution is None and len(shape) > 1:
            entries.append(_kind("flatten", (layer.inputs,)))
        _check_synapse(where, layer, limit)
        notes = {name: getattr(layer, name) for name in ("weight_bits", "scale", "report")}
        entries.append({**_synapse(layer), **_neurons(where, layer), "notes": _notes(notes)})
        shape = layer.output_shape
    return entries


def _kind(kind: str, shape: Shape) -> Entry:
    return {"type": _name(kind), "shape": np.array(shape)}


def _name(name: str) -> NDArray[np.bytes_]:
    return np.array([name.encode()], "S10")


def _notes(notes: dict[str, Any]) -> NDArray[np.bytes_]:
    """JSON as an array of one byte string, which HDF5 can keep under a checksum."""
    return np.array([json.dumps({"version": NOTES_VERSION, **notes}).encode()])


def _check_synapse(where: str, layer: LoihiLayer, message_limit: int) -> None:
    """Raises UnsupportedError for weights that would not act in Lava, loaded by netx, as they do here."""
    if layer.weight_exp:
        raise UnsupportedError(
            f"{where}: weight exponent {layer.weight_exp}, for which the format has no place; quantize(network, target='netx') "
            "keeps it at 0"
        )
    if layer.convolution is None:
        _check_scaling(where, layer, message_limit)


def _check_scaling(where: str, layer: LoihiLayer, message_limit: int) -> None:
    """Raises UnsupportedError for dense weights that netx or Lava change.

    netx multiplies the matrix by the largest power of two that keeps it in -256..255, and undoes that in the sum. Lava takes a
    matrix without positive weights for an inhibitory one, whose lowest weight is -255, and cuts off what netx's choice of bits
    leaves out: -256 then comes out as -255, -128 or 0. Other matrices come through unchanged.
    """
    lowest, highest = int(layer.weight.min()), int(layer.weight.max())
    if lowest == highest == 0:
        raise UnsupportedError(f"{where}: all its weights are 0 and netx fails to scale them; leave the layer out, or train it")
    shift = 0
    while lowest << shift + 1 >= WEIGHT_LIMITS[0] and highest << shift + 1 <= WEIGHT_LIMITS[1]:
        shift += 1
    if highest <= 0 and lowest << shift == WEIGHT_LIMITS[0]:
        raise UnsupportedError(
            f"{where}: no weight is positive and the lowest is {lowest}, a power of two, which netx scales to -256 and Lava "
            "cuts off; change that weight by a step, or make one weight positive"
        )
    largest_sum = int(largest_sums(layer.weight).max()) * message_limit << shift
    if largest_sum >= SUM_LIMIT:
        raise UnsupportedError(
            f"{where}: netx multiplies its weights by {2**shift}, and their sums of up to {largest_sum:.2g} then exceed Lava's "
            "32 bits; use fewer message bits or inputs"
        )


def _synapse(layer: LoihiLayer) -> Entry:
    if layer.convolution is None:
        features = {"inFeatures": layer.inputs, "outFeatures": layer.outputs}
        return {**_kind("dense", layer.output_shape), **features, "weight": layer.weight}
    channels = {"inChannels": layer.input_shape[0], "outChannels": layer.output_shape[0]}
    return {**_kind("conv", layer.output_shape), **channels, **_kernel(layer, layer.convolution), "weight": layer.weight}


def _kernel(layer: LoihiLayer, convolution: Convolution) -> Entry:
    """How the kernel is applied, as the datasets' names have it."""
    return {
        "kernelSize": np.array(layer.weight.shape[2:]),
        "stride": np.array(convolution.stride),
        "padding": np.array(convolution.padding),
        "dilation": np.array((1, 1)),
        "groups": convolution.groups,
    }


def _neurons(where: str, layer: LoihiLayer) -> Entry:
    """The neurons' registers, and the bias in steps of 64."""
    bias = layer.bias
    if np.any(bias % 2**BIAS_EXPONENT):
        wrong = int(bias[bias % 2**BIAS_EXPONENT != 0][0])
        raise UnsupportedError(
            f"{where}: bias {wrong} is no multiple of 64, and netx has no others; quantize(network, target='netx') makes none"
        )
    mantissa = bias >> BIAS_EXPONENT
    lowest, highest = BIAS_MANTISSA_LIMITS
    if mantissa.min() < lowest or mantissa.max() > highest:
        raise UnsupportedError(
            f"{where}: bias {bias[np.abs(bias).argmax()]} does not fit netx, whose biases reach from {lowest * 64} to "
            f"{highest * 64}; lower the bias"
        )
    entry: Entry = {
        "neuron/type": _name(NEURON_TYPES[0]),
        "neuron/iDecay": _compact(layer.du, layer.output_shape) + 1,
        "neuron/vDecay": _compact(layer.dv, layer.output_shape),
        "neuron/vThMant": _compact(layer.vth, layer.output_shape),
        "neuron/refDelay": 1,
        "neuron/gradedSpike": False,
    }
    if mantissa.any():
        entry["bias"] = _compact(mantissa, layer.output_shape, share=False)
    if np.any(layer.bias_exp != BIAS_EXPONENT):
        entry["biasExp"] = layer.bias_exp
    return entry


def _compact(values: ArrayLike, shape: Shape, share: bool = True) -> NDArray[Any]:
    """One number for all neurons (if these may ``share``), one per channel, or one per neuron in Lava's order, (W, H, C)."""
    every = np.broadcast_to(np.asarray(values).reshape(-1), math.prod(shape)).reshape(shape)
    if share and np.all(every == every.flat[0]):
        return np.asarray(every.flat[0])
    if len(shape) > 1 and np.all(every == every[:, :1, :1]):
        return every[:, 0, 0]
    return every.T


# ---------------------------------------------------------------------------------------------------------------- import


def read(path: str | os.PathLike[str], *, skip_layers: int = 0, num_layers: int | None = None) -> LoihiNetwork:
    """Read a file of :func:`write` or of lava-dl. Nothing is ever unpickled.

    skip_layers, num_layers: as for netx: entries to leave out at the front, and how many there are, these included. The files
        of lava-dl mostly begin with input neurons, which take currents; with ``skip_layers=1`` the network takes their spikes.

    Inputs are spikes unless :func:`write` noted otherwise.

    Raises CheckpointError for a file that is missing, damaged, foreign or incomplete; UnsupportedError, naming the entry, for
    what is no row of LIF layers or what netx would not run as the file says; RangeError for what no register holds;
    BackendError without h5py.
    """
    h5py = library()
    try:
        with h5py.File(io.BytesIO(Path(path).read_bytes()), "r") as file:
            return _network(file, skip_layers, num_layers)
    except SpikepropError as error:
        raise type(error)(f"{path}: {error}") from None
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (OSError, RuntimeError, LookupError, ValueError, TypeError, AttributeError, MemoryError) as error:
        # HDF5 answers for what it cannot decode with whatever it trips over: all of it means the same to the reader.
        raise CheckpointError(f"{path}: no network of lava-dl, or damaged ({' '.join(str(error).split())})") from error


def _network(file: Any, skip: int, count: int | None) -> LoihiNetwork:
    layers: list[LoihiLayer] = []
    coding: dict[str, Any] = {}
    input_shape = shape = None  # of the whole network's inputs, of what reaches the next entry
    pictures = False  # what a convolution can read; behind a convolution, what a dense layer cannot
    for number, (where, group, kind) in enumerate(_groups(file, count)):
        if number < skip:
            shape = _read_shape(where, group)
            pictures = kind != "dense" and len(shape) == 3
        elif kind == "input":
            shape, coding = _read_input(where, group, number), _read_coding(where, group)
            pictures = len(shape) == 3
        elif kind == "flatten":
            pictures = False
        elif kind in ("dense", "conv"):
            if kind == "conv" and not pictures:
                raise CheckpointError(f"{where} is a convolution, but no pictures (C, H, W) reach it; export it again")
            if kind == "dense" and pictures and layers:
                raise CheckpointError(f"{where} is dense, but pictures reach it; it needs a flatten in front")
            layer = _read_layer(where, group, kind, shape)
            limit = 1 if layers else 2 ** coding.get("num_message_bits", 0) - 1 or 1
            check_registers(where, layer, limit)
            _check_synapse(where, layer, limit)
            input_shape = input_shape or shape or layer.input_shape
            layers.append(layer)
            shape, pictures = layer.output_shape, kind == "conv"
        else:
            raise UnsupportedError(
                f"{where} is of type '{kind}'; a network here is a row of dense and conv layers, with flatten between them"
            )
    if input_shape is None:
        raise CheckpointError("no entry that was to be read is a dense or conv layer")
    return LoihiNetwork(tuple(layers), input_shape, **coding)


def _groups(file: Any, count: int | None) -> Iterator[tuple[str, Any, str]]:
    """The first ``count`` entries in order: where each stands, its group, its type."""
    entries = file.get("layer")
    if not hasattr(entries, "keys"):
        raise CheckpointError("holds no network of lava-dl, which has its layers in the group 'layer'")
    for number in range(len(entries) if count is None else min(count, len(entries))):
        group, where = entries.get(str(number)), f"layer/{number}"
        if not hasattr(group, "keys"):
            raise CheckpointError(f"{where} is missing among {len(entries)} entries; they are numbered from 0")
        yield where, group, _text(where, group, "type")


def _read_input(where: str, group: Any, number: int) -> Shape:
    if number:
        raise UnsupportedError(f"{where} is a second input; a network here has one, in front")
    if "neuron" in group:
        kind = _text(where, group, "neuron/type")
        raise UnsupportedError(
            f"{where} has input neurons (type {kind}), which take currents instead of spikes; skip_layers=1 begins behind "
            "them, with their spikes as inputs"
        )
    return _read_shape(where, group)


def _read_coding(where: str, group: Any) -> dict[str, Any]:
    """How inputs are coded, by the notes; nothing without them."""
    if not (notes := _read_notes(where, group)):
        return {}
    bits = int(notes["num_message_bits"])
    check_register(where, "num_message_bits", bits, 0, MESSAGE_BITS_LIMIT, "export it again")
    if notes["inputs"] not in ("spikes", "graded"):
        raise CheckpointError(f"{where}: inputs = {notes['inputs']!r} is neither 'spikes' nor 'graded'; export it again")
    ends = {name: float(notes[name]) for name in ("input_low", "input_high")}
    return {"inputs": notes["inputs"], "num_message_bits": bits, **ends}


def _read_notes(where: str, group: Any) -> dict[str, Any]:
    """What :func:`_notes` wrote, or nothing."""
    if "notes" not in group:
        return {}
    notes: dict[str, Any] = json.loads(_text(where, group, "notes"))
    if notes["version"] != NOTES_VERSION:
        raise CheckpointError(
            f"{where}: written as version {notes['version']}, this spikeprop reads version {NOTES_VERSION}; update it"
        )
    return notes


def _read_layer(where: str, group: Any, kind: str, arriving: Shape | None) -> LoihiLayer:
    """A dense or conv entry behind what has the shape ``arriving``, with its neurons."""
    if "delay" in group and (delay := _numbers(where, group, "delay")).any():
        raise UnsupportedError(f"{where} has delays of up to {delay.max()} steps; layers here have none")
    neuron = _read_neuron(where, group)
    declared = _read_shape(where, group)
    weight = _read_weight(where, group, kind, declared)
    convolution = _read_convolution(where, group, arriving) if kind == "conv" and arriving is not None else None
    takes = weight.shape[1:2] if convolution is None else convolution.input_shape
    try:
        shape = output_shape(weight, convolution)
    except InputError as error:
        raise CheckpointError(f"{where}: {error}; export it again") from None
    if shape != (declared if kind == "conv" else (math.prod(declared),)):
        raise CheckpointError(f"{where}: weights {weight.shape} lead to {shape}, but shape = {declared}; export it again")
    if math.prod(takes) != math.prod(arriving or takes):
        raise CheckpointError(f"{where}: weights {weight.shape} do not fit the {arriving} that arrives; export it again")
    notes = _read_notes(where, group)
    mantissa, exponent = _read_bias(where, group, shape)
    return LoihiLayer.build(
        weight,
        du=_per_neuron(where, neuron, "iDecay", shape) - 1,
        dv=_per_neuron(where, neuron, "vDecay", shape),
        vth=_per_neuron(where, neuron, "vThMant", shape),
        bias_mant=mantissa,
        bias_exp=exponent,
        convolution=convolution,
        weight_bits=int(notes.get("weight_bits", 8)),
        scale=float(notes.get("scale", 1.0)),
        report=dict(notes.get("report", {})),
    )


def _read_neuron(where: str, group: Any) -> Any:
    """The group that describes a layer's neurons. Raises UnsupportedError where these are not Loihi's LIF."""
    if "neuron" not in group:
        raise UnsupportedError(
            f"{where} has no neurons; netx then adds up currents without decay (iDecay 0, vDecay 4096), which no register here "
            "holds. num_layers leaves it out at the end"
        )
    neuron = group["neuron"]
    if (kind := _text(where, neuron, "type")) not in NEURON_TYPES:
        raise UnsupportedError(f"{where} has neurons of type {kind}; layers here have {' or '.join(NEURON_TYPES)}")
    for name, neutral in IGNORED_BY_NETX.items():
        if name in neuron and np.any((values := _numbers(where, neuron, name)) != neutral):
            raise UnsupportedError(
                f"{where}: {name} = {values.flat[0]}, which netx passes over, so that the file says one thing and does "
                f"another; train with {name} = {neutral}"
            )
    return neuron


def _read_weight(where: str, group: Any, kind: str, declared: Shape) -> Whole:
    """Weights ``[outputs, inputs]``, or a kernel ``[C_out, C_in / groups, height, width]``."""
    if hasattr(group.get("weight"), "keys"):
        raise UnsupportedError(f"{where} has complex weights; layers here have real ones")
    weight = _numbers(where, group, "weight")
    if kind == "dense" and weight.ndim == 1 and weight.size % math.prod(declared) == 0:
        weight = weight.reshape(math.prod(declared), -1)
    if kind == "conv" and weight.ndim == 5 and weight.shape[4] == 1:  # slayer's last axis is time
        weight = weight[..., 0]
    if weight.ndim != (2 if kind == "dense" else 4) or weight.size == 0:
        raise CheckpointError(f"{where}: no {kind} layer of shape {declared} has weights {weight.shape}; export it again")
    return weight


def _read_convolution(where: str, group: Any, arriving: Shape) -> Convolution:
    if (dilation := _pair(where, group, "dilation", 1)) != (1, 1):
        raise UnsupportedError(f"{where}: dilation {dilation}; kernels here are dense: put zeros between their weights")
    groups = _numbers(where, group, "groups")
    if groups.size != 1 or groups.min() < 1:
        raise CheckpointError(f"{where}: groups = {groups.tolist()}, expected one positive number; export it again")
    channels, height, width = arriving
    stride, padding = _pair(where, group, "stride", 1), _pair(where, group, "padding", 0)
    return Convolution((channels, height, width), stride, padding, int(groups.flat[0]))


def _pair(where: str, group: Any, name: str, lowest: int) -> tuple[int, int]:
    """(vertical, horizontal)."""
    values = _numbers(where, group, name).reshape(-1)
    if values.size not in (1, 2) or values.min() < lowest:
        raise CheckpointError(f"{where}: {name} = {values.tolist()}, expected two numbers from {lowest} on; export it again")
    return int(values[0]), int(values[-1])


def _read_bias(where: str, group: Any, shape: Shape) -> tuple[Whole, Whole]:
    """Mantissas and exponents, one number or one per neuron; split as noted, else as netx has them."""
    bias = _per_neuron(where, group, "bias", shape) if "bias" in group else np.array(0)
    if "biasExp" not in group:
        return bias, np.array(BIAS_EXPONENT)
    exponent = _numbers(where, group, "biasExp")
    whole = bias << BIAS_EXPONENT
    if exponent.shape != (math.prod(shape),) or exponent.min() < 0 or exponent.max() > BIAS_EXPONENT_LIMIT:
        raise CheckpointError(f"{where}: biasExp does not hold an exponent per neuron; remove it, netx has no use for it")
    if np.any(whole % (1 << exponent)):
        raise CheckpointError(f"{where}: biasExp splits another bias than this one; remove it, netx has no use for it")
    return whole >> exponent, exponent


def _per_neuron(where: str, group: Any, name: str, shape: Shape) -> Whole:
    """One number, or one per neuron in C order of ``shape``: the inverse of :func:`_compact`."""
    values = _numbers(where, group, name)
    if values.size == 1:
        return values.reshape(())
    if len(shape) > 1 and values.shape == shape[:1]:
        return np.repeat(values, math.prod(shape[1:]))
    if values.shape != shape[::-1]:
        raise CheckpointError(
            f"{where}: {name} has shape {values.shape}; one number, one per channel or {shape[::-1]} would fit. Export it again"
        )
    return values.T.reshape(-1)


def _read_shape(where: str, group: Any) -> Shape:
    shape = _numbers(where, group, "shape")
    if shape.ndim != 1 or shape.size not in (1, 2, 3) or shape.min() < 1:
        raise CheckpointError(f"{where}: shape = {shape.tolist()}, expected one to three positive numbers; export it again")
    return tuple(shape.tolist())


def _numbers(where: str, group: Any, name: str) -> Whole:
    """A dataset of whole numbers, whatever type they were stored as. Raises CheckpointError for anything else."""
    stored = _dataset(where, group, name)
    if stored.dtype.kind not in "iufb":
        raise CheckpointError(f"{where}: {name} is of type {stored.dtype}, expected numbers; export it again")
    values = np.asarray(stored[()])
    real = values.astype(np.float64)
    wrong = values[~(np.abs(real) < SUM_LIMIT) | (real != np.trunc(real))]
    if wrong.size:
        raise CheckpointError(f"{where}: {name} holds {wrong.flat[0]}; a register holds whole numbers. Export it again")
    return values.astype(np.int64)


def _text(where: str, group: Any, name: str) -> str:
    stored = _dataset(where, group, name)
    text = np.ravel(stored[()])[0] if stored.size else None
    if not isinstance(text, bytes):
        raise CheckpointError(f"{where}: {name} is of type {stored.dtype}, expected text; export it again")
    return text.decode("ascii")


def _dataset(where: str, group: Any, name: str) -> Any:
    stored = group.get(name)
    if not hasattr(stored, "dtype"):
        raise CheckpointError(f"{where}: {name} is missing or damaged; take an older copy or export it again")
    return stored
