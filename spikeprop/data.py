"""Data sets: digits (shipped with scikit-learn), MNIST, Fashion-MNIST, N-MNIST, Braille letters, and arrays of one's own.

Files are found below a root folder, given as an argument or by the environment variable ``SPIKEPROP_DATA``, in the layouts of
torchvision and Tonic. Nothing is ever downloaded. Splits are fixed: they do not depend on any seed.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral  # also numpy's integers
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spikeprop.data_files import READERS, ROOT_VARIABLE, stratified
from spikeprop.errors import InputError

__all__ = ["ROOT_VARIABLE", "Data", "Split", "delay_line", "from_arrays", "from_datasets", "load", "stratified"]


class Split(NamedTuple):
    """``inputs [N, *features]`` (temporal: ``[N, T, *features]``) and ``labels``, int64 ``[N]`` or, for regression, ``[N, K]``.

    Inputs are float32; temporal data that came as uint8 stay so, which is a quarter of the memory.
    """

    inputs: Tensor
    labels: Tensor


@dataclass(frozen=True, eq=False, repr=False)
class Data:
    """A data set, checked: finite inputs, labels in range, splits of one shape.

    ``input_shape`` is one sample's shape without time, ``num_classes`` the number of classes or of regression outputs.
    ``temporal`` says that the inputs carry their own time axis of ``num_steps`` steps (None otherwise).
    """

    name: str
    train: Split
    validation: Split | None
    test: Split | None
    input_shape: tuple[int, ...]
    num_classes: int
    regression: bool = False
    temporal: bool = False
    num_steps: int | None = None

    def __repr__(self) -> str:
        named = (("train", self.train), ("validation", self.validation), ("test", self.test))
        sizes = ", ".join(f"{name} {len(split.labels)}" for name, split in named if split is not None)
        time = f", {self.num_steps} steps" if self.temporal else ""
        outputs = "outputs" if self.regression else "classes"
        return f"Data({self.name!r}: {sizes}; input {self.input_shape}{time}, {self.num_classes} {outputs})"


def load(
    name: str,
    root: str | os.PathLike[str] | None = None,
    *,
    full_train: bool = False,
    num_steps: int | None = None,
    delays: Sequence[int] = (),
) -> Data:
    """Load a data set by name.

    =============== ================= ======================================= ==========================================
    name            input_shape       files below the root                    validation part
    =============== ================= ======================================= ==========================================
    digits          (1, 8, 8)         none (scikit-learn ships them)          20 % (train 60 %, test 20 %), stratified
    mnist           (1, 28, 28)       MNIST/raw/*-ubyte[.gz] (IDX)            the last 5,000 training images
    fashion-mnist   (1, 28, 28)       FashionMNIST/raw/*-ubyte[.gz] (IDX)     the last 5,000 training images
    nmnist          T x (2, 34, 34)   NMNIST/Train, NMNIST/Test (folders or   a stratified fifth of the training samples
                                      .zip), or NMNIST-small/nmnist_small.zip
    braille         256 x (12,)       braille/braille7_th1_distinct.npz       a stratified fifth of the training trials
    =============== ================= ======================================= ==========================================

    Pixels are scaled to [0, 1]. N-MNIST's events (polarity, y, x) fall into ``num_steps`` equal bins (default 20) over 310 ms,
    1 where there was at least one event; later events, 0.015 % of them, are left out. Each sample takes 2,312 bytes per bin.
    Braille has 256 steps of 5 ms, and any other ``num_steps`` is refused; pictures have no time axis of their own and
    ``num_steps`` does not concern them.

    ``full_train=True`` gives the validation part back to the training part and leaves ``validation`` None. ``delays``: see
    :func:`delay_line`.

    Raises DataNotFoundError (which files, where it looked, what to do) and InputError (unknown name; damaged files).
    """
    if name not in READERS:
        raise InputError(f"unknown data set {name!r}; known: {', '.join(READERS)}")
    if num_steps is not None and (not isinstance(num_steps, Integral) or isinstance(num_steps, bool) or num_steps < 1):
        raise InputError(f"num_steps must be a whole number of at least 1, got {num_steps!r}")
    files = READERS[name](root, num_steps)

    def split(part: str, inputs: NDArray[Any], labels: NDArray[Any]) -> Split:
        checked = _check_split(part, inputs, labels, files.temporal)
        return checked if files.pixel_max is None else Split(checked.inputs.div_(files.pixel_max), checked.labels)

    train, held_out = files.train, files.validation
    data = _assemble(
        name,
        split("train", *train) if full_train else split("train", train[0][~held_out], train[1][~held_out]),
        None if full_train else split("validation", train[0][held_out], train[1][held_out]),
        split("test", *files.test),
        files.temporal,
        files.num_classes,
    )
    return delay_line(data, delays) if len(delays) > 0 else data


def delay_line(data: Data, delays: Sequence[int]) -> Data:
    """Every input channel once per delay, that many steps late, as axons of different lengths would bring it.

    A layer sees a stretch of the past at once, so that neurons which forget within a few steps can tell orders and intervals.
    Inputs ``[N, T, C, *rest]`` become ``[N, T, D C, *rest]``, delay after delay; before the start nothing arrives.

    Args:
        data: with a time axis of its own.
        delays: in steps, whole numbers from 0 to T - 1, each once. Loihi's synapses know delays up to 62 steps.

    Raises:
        InputError: data without a time axis, or delays that are none.
    """
    if not data.temporal or data.num_steps is None:
        raise InputError(f"delay_line: the inputs of {data.name} have no time axis to be delayed on; leave the delays out")
    whole = all(isinstance(delay, Integral) and not isinstance(delay, bool) for delay in delays)
    if not whole or not delays or min(delays) < 0 or max(delays) >= data.num_steps or len(set(delays)) < len(delays):
        raise InputError(
            f"delay_line: delays = {list(delays)} must be whole numbers from 0 to {data.num_steps - 1}, each once: "
            f"{data.name} has {data.num_steps} steps"
        )

    def delayed(split: Split | None) -> Split | None:
        if split is None:
            return None
        x = split.inputs
        late = x.new_zeros(*x.shape[:2], len(delays) * x.shape[2], *x.shape[3:])
        for index, delay in enumerate(delays):
            own = late[:, :, index * x.shape[2] : (index + 1) * x.shape[2]]
            own[:, delay:] = x[:, : x.shape[1] - delay]
        return Split(late, split.labels)

    shape = (len(delays) * data.input_shape[0], *data.input_shape[1:])
    train = delayed(data.train)
    assert train is not None
    return replace(data, train=train, validation=delayed(data.validation), test=delayed(data.test), input_shape=shape)


def from_arrays(
    train: tuple[Any, Any],
    validation: tuple[Any, Any] | None = None,
    test: tuple[Any, Any] | None = None,
    *,
    temporal: bool = False,
    name: str = "arrays",
    num_classes: int | None = None,
) -> Data:
    """Make a data set of pairs (inputs, labels) of numpy arrays or tensors.

    inputs: ``[N, *features]``, or ``[N, T, *features]`` with ``temporal=True``. The values are taken as they are.
    labels: whole numbers 0..num_classes - 1 ``[N]`` (``num_classes`` defaults to the largest training label + 1), or
    floating-point targets ``[N, K]`` or ``[N]``, which make it a regression with K outputs.

    Arrays are copied; tensors that have the right type already are kept as they are. Recordings larger than the memory may
    stay in a file: ``numpy.load(file, mmap_mode="r")`` of uint8 or float32 is not copied, and ``fit(chunk=k)`` reads k steps
    at a time.

    Raises InputError: empty data, NaN or infinity, lengths or shapes that differ, labels that are no class.
    """

    def split(part: str, pair: Any) -> Split:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise InputError(f"{part} must be a pair (inputs, labels), got {type(pair).__name__}")
        return _check_split(part, pair[0], pair[1], temporal)

    return _assemble(
        name,
        split("train", train),
        None if validation is None else split("validation", validation),
        None if test is None else split("test", test),
        temporal,
        num_classes,
    )


def from_datasets(
    train: Any,
    validation: Any = None,
    test: Any = None,
    *,
    temporal: bool = False,
    name: str = "datasets",
    num_classes: int | None = None,
) -> Data:
    """Make a data set of map-style torch Datasets that yield (x, y); each is read once, into memory.

    x is a tensor or array of one shape for all samples, y a whole number or floating-point targets. Else as
    :func:`from_arrays`.
    """
    return from_arrays(
        _read_dataset("train", train),
        None if validation is None else _read_dataset("validation", validation),
        None if test is None else _read_dataset("test", test),
        temporal=temporal,
        name=name,
        num_classes=num_classes,
    )


# --- Checks: one place for files, arrays and Datasets ------------------------------------------------------------------------


def _check_split(part: str, inputs: Any, labels: Any, temporal: bool) -> Split:
    x, y = _tensor(inputs, f"{part} inputs"), _tensor(labels, f"{part} labels")
    axes = "[N, T, *features]" if temporal else "[N, *features]"
    if x.numel() == 0:
        raise InputError(f"{part} inputs are empty: shape {list(x.shape)}")
    if x.ndim < (3 if temporal else 2):
        raise InputError(f"{part} inputs must be {axes}, got shape {list(x.shape)}")
    if y.ndim == 0 or len(y) != len(x):
        raise InputError(f"{part} has {len(x)} inputs but {y.numel() if y.ndim == 0 else len(y)} labels")
    x = x.to(torch.uint8 if temporal and x.dtype in (torch.uint8, torch.bool) else torch.float32)
    _refuse_non_finite(x, f"{part} inputs")
    if not y.is_floating_point():
        if y.ndim != 1:
            remedy = "flatten a column, or take the argmax of one-hot rows"
            raise InputError(f"{part} labels must be [N], got shape {list(y.shape)}; {remedy}")
        return Split(x, y.to(torch.int64))
    y = y.to(torch.float32)
    _refuse_non_finite(y, f"{part} labels")
    if y.ndim == 1 and bool((y == y.round()).all()):
        raise InputError(
            f"{part} labels are whole numbers stored as floating-point: classes or targets? "
            "Cast them to integers for classes, or reshape to [N, 1] for regression"
        )
    if y.ndim > 2:
        raise InputError(f"{part} labels of a regression must be [N, K] or [N], got shape {list(y.shape)}")
    return Split(x, y.reshape(len(y), -1))


def _assemble(
    name: str, train: Split, validation: Split | None, test: Split | None, temporal: bool, num_classes: int | None
) -> Data:
    """Check what concerns several splits at once, and the labels against the number of classes."""
    named = (("train", train), ("validation", validation), ("test", test))
    splits = [(part, split) for part, split in named if split is not None]
    regression = train.labels.is_floating_point()
    shape = tuple(train.inputs.shape[1:])
    for part, split in splits:
        if tuple(split.inputs.shape[1:]) != shape:
            raise InputError(f"{part} samples have shape {list(split.inputs.shape[1:])}, train samples {list(shape)}")
        if split.labels.is_floating_point() != regression or split.labels.shape[1:] != train.labels.shape[1:]:
            raise InputError(
                f"{part} labels are {split.labels.dtype} of shape {list(split.labels.shape)}, "
                f"train labels {train.labels.dtype} of shape {list(train.labels.shape)}"
            )
    if num_classes is not None and (not isinstance(num_classes, Integral) or isinstance(num_classes, bool) or num_classes < 1):
        raise InputError(f"num_classes must be a whole number of at least 1, got {num_classes!r}")
    if regression:
        outputs = train.labels.shape[1]
        if num_classes is not None and num_classes != outputs:
            raise InputError(
                f"num_classes = {num_classes}, but the labels are floating-point targets with {outputs} columns; "
                "classes need labels that are integers"
            )
    else:
        inferred = num_classes is None
        outputs = max(int(train.labels.max()), 0) + 1 if num_classes is None else int(num_classes)
        for part, split in splits:
            wrong = ((split.labels < 0) | (split.labels >= outputs)).nonzero().flatten()
            if len(wrong):
                index = int(wrong[0])
                hint = "; the bound is the largest training label: give num_classes if there are more" if inferred else ""
                raise InputError(
                    f"{part} label {int(split.labels[index])} at index {index} is outside 0..{outputs - 1} "
                    f"({len(wrong)} of {len(split.labels)} are){hint}"
                )
    steps = shape[0] if temporal else None
    return Data(name, train, validation, test, shape[1:] if temporal else shape, outputs, regression, temporal, steps)


def _tensor(values: Any, what: str) -> Tensor:
    try:
        if isinstance(values, Tensor):
            tensor = values.detach()
        elif isinstance(values, np.memmap) and _can_stay(values):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # nobody writes to data
                tensor = torch.from_numpy(values)
        else:  # a copy: arrays may be read-only, and the caller may go on writing to them
            tensor = torch.from_numpy(np.array(values))
    except (TypeError, ValueError) as error:
        raise InputError(f"{what} are no array of numbers: {error}") from None
    if tensor.is_complex():
        raise InputError(f"{what} must be real numbers, got {tensor.dtype}")
    return tensor


def _can_stay(values: np.memmap) -> bool:
    """Whether an array may stay in its file: nobody writes to it, and torch can look at it as it lies."""
    return values.dtype in (np.float32, np.uint8) and not values.flags.writeable and min(values.strides, default=0) >= 0


def _refuse_non_finite(values: Tensor, what: str) -> None:
    if not values.is_floating_point():
        return
    some = max(1, 2**22 // max(1, values[:1].numel()))  # samples looked at together: no array of the size of the data
    if all(bool(torch.isfinite(part).all()) for part in values.split(some)):
        return
    wrong = (~torch.isfinite(values)).nonzero()
    index = wrong[0].tolist()
    value, count = values[tuple(index)].item(), f"{len(wrong)} of {values.numel()}"
    raise InputError(f"{what} hold {value} at index {index} ({count} are not finite as float32)")


def _read_dataset(part: str, dataset: Any) -> tuple[Tensor, Tensor]:
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise InputError(f"{part} must be a map-style Dataset (with len() and indexing), got {type(dataset).__name__}")
    if len(dataset) == 0:
        raise InputError(f"{part} Dataset is empty")
    inputs: list[Tensor] = []
    labels: list[Tensor] = []
    for index in range(len(dataset)):
        sample = dataset[index]
        if not isinstance(sample, (tuple, list)) or len(sample) != 2:
            raise InputError(f"{part} sample {index} must be a pair (x, y), got {type(sample).__name__}")
        for values, kept, what in zip(sample, (inputs, labels), ("x", "y"), strict=True):
            kept.append(_tensor(values, f"{part} sample {index}: {what}"))
            if (kept[-1].shape, kept[-1].dtype) != (kept[0].shape, kept[0].dtype):
                raise InputError(
                    f"{part} sample {index}: {what} is {kept[-1].dtype} of shape {list(kept[-1].shape)}, "
                    f"that of sample 0 {kept[0].dtype} of shape {list(kept[0].shape)}"
                )
    return torch.stack(inputs), torch.stack(labels)
