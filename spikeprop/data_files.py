"""The files of the known data sets: where they are looked for and how they are read. Used through :mod:`spikeprop.data`."""

from __future__ import annotations

import gzip
import math
import os
import re
import zipfile
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from spikeprop.errors import DataNotFoundError, InputError

ROOT_VARIABLE = "SPIKEPROP_DATA"
Root = str | os.PathLike[str] | None
Arrays = tuple[NDArray[Any], NDArray[Any]]  # inputs [N, ...], labels [N]

IDX_VALIDATION = 5000  # training images at the end of MNIST and Fashion-MNIST that are kept for validation
EVENT_SHAPE = (2, 34, 34)  # polarity, y, x of N-MNIST
EVENT_BYTES = 5
EVENT_WINDOW_US = 310_000  # three saccades of the camera; 669 of the part's 4,518,827 events come later
EVENT_OVERFLOW_ROW = 240  # a record with this y is no event but says that the clock of 2^13 us wrapped (ATIS files)
EVENT_OVERFLOW_US = 2**13
BRAILLE_STEPS = 256


class Files(NamedTuple):
    """What a reader returns: raw arrays, and which training samples are for validation (``validation [N]``, boolean)."""

    train: Arrays
    test: Arrays
    validation: NDArray[np.bool_]
    num_classes: int
    temporal: bool = False
    pixel_max: float | None = None  # inputs are divided by it


def stratified(labels: Any, num_folds: int = 5) -> NDArray[np.int64]:
    """Assign each sample to a fold, without chance: the k-th sample of each class, in the given order, to k mod num_folds.

    ``labels [N]`` -> folds 0..num_folds - 1 ``[N]``. Every fold holds the same share of each class, to within one sample.
    """
    labels = np.asarray(labels)
    if num_folds < 2 or labels.ndim != 1:
        raise InputError(f"stratified needs labels [N] and at least 2 folds, got shape {list(labels.shape)} and {num_folds}")
    folds = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        of_class = labels == label
        folds[of_class] = np.arange(of_class.sum()) % num_folds
    return folds


def read_digits(root: Root, num_steps: int | None) -> Files:
    """Scikit-learn's 1,797 scanned digits, pixels 0..16. Folds 0 to 2 train, 3 validation, 4 test."""
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]  # slow to import, and only needed here

    bunch = load_digits()
    inputs, labels = bunch.images[:, None].astype(np.float32), bunch.target
    folds = stratified(labels)
    train, test = folds < 4, folds == 4
    return Files((inputs[train], labels[train]), (inputs[test], labels[test]), folds[train] == 3, 10, pixel_max=16)


def read_idx_pictures(folder: str, root: Root, num_steps: int | None) -> Files:
    """MNIST or Fashion-MNIST: four IDX files, compressed or not, as torchvision keeps them in ROOT/<folder>/raw."""
    raw = _root(root, folder) / folder / "raw"
    stems = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    paths = _find(
        [[raw / f"{stem}.gz", raw / stem] for stem in stems],
        f"`torchvision.datasets.{folder}(root, download=True)` makes this layout",
    )
    images, labels, test_images, test_labels = (_read_idx(path, ndim) for path, ndim in zip(paths, (3, 1, 3, 1), strict=True))
    if len(images) <= IDX_VALIDATION:
        raise InputError(f"{paths[0]}: {len(images)} images; the last {IDX_VALIDATION} are for validation, none are left over")
    _refuse_unequal(paths[0], images, paths[1], labels)
    _refuse_unequal(paths[2], test_images, paths[3], test_labels)
    validation = np.arange(len(labels)) >= len(labels) - IDX_VALIDATION
    return Files((images[:, None], labels), (test_images[:, None], test_labels), validation, 10, pixel_max=255)


def _read_idx(path: Path, ndim: int) -> NDArray[np.uint8]:
    """Read an IDX file: 2 zero bytes, the type (8 = uint8), the number of axes, big-endian sizes, data."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read, damaged or truncated: {error}") from None
    magic = 0x0800 + ndim
    if raw[:4] != magic.to_bytes(4, "big"):
        raise InputError(f"{path}: bad magic number 0x{raw[:4].hex()}, expected 0x{magic:08x} (IDX, uint8, {ndim} axes)")
    header = 4 + 4 * ndim
    shape = [int.from_bytes(raw[at : at + 4], "big") for at in range(4, header, 4)]
    expected = header + math.prod(shape)
    if len(raw) != expected:
        raise InputError(f"{path}: its header {shape} says {expected} bytes, found {len(raw)}")
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)


def read_nmnist(root: Root, num_steps: int | None) -> Files:
    """N-MNIST (Orchard et al. 2015), whole as Tonic keeps it, else its first part; in the order of MNIST's images."""
    base = _root(root, "NMNIST")
    parts = ("Train", "Test")
    whole = [[base / "NMNIST" / part, base / "NMNIST" / f"{part}.zip"] for part in parts]
    small = base / "NMNIST-small" / "nmnist_small.zip"
    # Never half of the whole and half of the part: once one half of the whole is there, the other must be too.
    any_whole = any(path.exists() for candidates in whole for path in candidates)
    paths = _find(
        whole if any_whole else [[*candidates, small] for candidates in whole],
        "`tonic.datasets.NMNIST(root)` makes this layout, and https://www.garrickorchard.com/datasets/n-mnist has the files",
    )
    train, test = (_read_event_files(path, part, num_steps or 20) for path, part in zip(paths, parts, strict=True))
    return Files(train, test, stratified(train[1]) == 4, 10, temporal=True)


def _read_event_files(source: Path, part: str, num_steps: int) -> Arrays:
    """Read all ``<part>/<label>/<number>.bin`` of a folder (then ``source`` is the part itself) or a zip file, by number."""
    pattern = re.compile(rf"(?:.*/)?{part}/(\d)/(\d+)\.bin")
    try:
        with ExitStack() as stack:
            if source.is_dir():
                names = [path.as_posix() for path in source.glob("*/*.bin")]
                read: Callable[[str], bytes] = lambda name: Path(name).read_bytes()  # noqa: E731
            else:
                archive = stack.enter_context(zipfile.ZipFile(source))
                names, read = archive.namelist(), archive.read
            samples = sorted((int(found[2]), int(found[1]), found[0]) for name in names if (found := pattern.fullmatch(name)))
            if not samples:
                raise InputError(f"{source}: no files {part}/<label>/<number>.bin in it")
            frames = np.zeros((len(samples), num_steps, *EVENT_SHAPE), np.uint8)
            for frame, (_, _, name) in zip(frames, samples, strict=True):
                _bin_events(read(name), frame, name if source.is_dir() else f"{source}: {name}")
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise InputError(f"{source}: cannot be read, damaged or truncated: {error}") from None
    return frames, np.array([label for _, label, _ in samples], np.int64)


def _bin_events(raw: bytes, frame: NDArray[np.uint8], where: str) -> None:
    """Set ``frame [T, polarity, y, x]`` to 1 where there is an event: bytes x and y, 1 bit polarity, 23 bits time in us."""
    if not raw or len(raw) % EVENT_BYTES:
        raise InputError(f"{where}: {len(raw)} bytes, expected one or more whole events of {EVENT_BYTES} bytes")
    record = np.frombuffer(raw, np.uint8).reshape(-1, EVENT_BYTES).astype(np.int64)
    x, y, polarity = record[:, 0], record[:, 1], record[:, 2] >> 7
    overflow = y == EVENT_OVERFLOW_ROW
    time = ((record[:, 2] & 127) << 16 | record[:, 3] << 8 | record[:, 4]) + EVENT_OVERFLOW_US * np.cumsum(overflow)
    _, height, width = EVENT_SHAPE
    foreign = ~overflow & ((x >= width) | (y >= height))
    if foreign.any():
        at = int(foreign.argmax())
        raise InputError(f"{where}: event {at} is at x = {x[at]}, y = {y[at]}, outside {width} x {height}")
    kept = ~overflow & (time < EVENT_WINDOW_US)
    frame[time[kept] * len(frame) // EVENT_WINDOW_US, polarity[kept], y[kept], x[kept]] = 1


def read_braille(root: Root, num_steps: int | None) -> Files:
    """Tactile Braille letters (Mueller-Cleve et al. 2022), 7 classes, 12 taxels, 0/1, threshold 1, 256 steps of 5 ms."""
    if num_steps not in (None, BRAILLE_STEPS):
        raise InputError(f"braille has {BRAILLE_STEPS} time steps, num_steps = {num_steps} is not to be had; leave it out")
    (path,) = _find(
        [[_root(root, "braille") / "braille" / "braille7_th1_distinct.npz"]],
        "it holds x_train, y_train, x_test, y_test made of the trials in https://github.com/neuromorphic-polito/L2MU-Braille",
    )
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = {"x_train", "y_train", "x_test", "y_test"} - set(archive.files)
            if missing:
                raise InputError(f"{path}: no arrays {', '.join(sorted(missing))} in it")
            train, test = (archive["x_train"], archive["y_train"]), (archive["x_test"], archive["y_test"])
    except InputError:
        raise
    # AttributeError: np.load returns a bare array, not an archive, for a file that is a .npy in truth.
    except (OSError, EOFError, ValueError, AttributeError, TypeError, zlib.error, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: cannot be read, damaged or truncated: {error}") from None
    for part, (inputs, labels) in (("train", train), ("test", test)):
        if inputs.shape[1:] != (BRAILLE_STEPS, 12):
            raise InputError(f"{path}: x_{part} has shape {list(inputs.shape)}, expected [N, {BRAILLE_STEPS}, 12]")
        _refuse_unequal(f"{path}: x_{part}", inputs, f"y_{part}", labels)
    return Files(train, test, stratified(train[1]) == 4, 7, temporal=True)


def _refuse_unequal(inputs_from: Path | str, inputs: NDArray[Any], labels_from: Path | str, labels: NDArray[Any]) -> None:
    if labels.shape != (len(inputs),):
        raise InputError(f"{inputs_from} holds {len(inputs)} samples, {labels_from} labels of shape {list(labels.shape)}")


def _root(root: Root, folder: str) -> Path:
    chosen = root if root is not None else os.environ.get(ROOT_VARIABLE)
    if not chosen:
        raise DataNotFoundError(
            f"no data root for {folder}: neither was a root given nor is {ROOT_VARIABLE} set; "
            f"set one of them to the folder that holds {folder}/ (nothing is downloaded)"
        )
    return Path(chosen).expanduser()


def _find(wanted: list[list[Path]], origin: str) -> list[Path]:
    """Return the first existing path of each list of candidates, or say everything that was looked at."""
    found = [next((path for path in candidates if path.exists()), None) for candidates in wanted]
    lacking = [candidates for candidates, path in zip(wanted, found, strict=True) if path is None]
    if lacking:
        raise DataNotFoundError(
            f"missing data files ({len(lacking)} of {len(wanted)}): "
            + "; ".join(" or ".join(str(path) for path in candidates) for candidates in lacking)
            + f". Give the right root or set {ROOT_VARIABLE}; {origin}"
        )
    return [path for path in found if path is not None]


READERS: dict[str, Callable[[Root, int | None], Files]] = {
    "digits": read_digits,
    "mnist": partial(read_idx_pictures, "MNIST"),
    "fashion-mnist": partial(read_idx_pictures, "FashionMNIST"),
    "nmnist": read_nmnist,
    "braille": read_braille,
}
