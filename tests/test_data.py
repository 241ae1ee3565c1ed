"""Data sets: facts about the real files, the fixed splits, and what is said about bad ones.

Tests on real files need SPIKEPROP_DATA; all others make their own.
"""

from __future__ import annotations

import gzip
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spikeprop import data
from spikeprop.errors import DataNotFoundError, InputError

TRAIN_COUNTS = {
    "mnist": [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949],
    "fashion-mnist": [6000] * 10,
    "nmnist": [97, 116, 99, 93, 105, 92, 94, 117, 87, 100],
    "braille": [122, 132, 124, 130, 120, 127, 123],
}
TEST_COUNTS = {
    "mnist": [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009],
    "fashion-mnist": [1000] * 10,
    "nmnist": [8, 14, 8, 11, 14, 7, 10, 15, 2, 11],
    "braille": [40] * 7,
}
PICTURES = {"mnist": (0.1307, 0.3081, 5), "fashion-mnist": (0.2860, 0.3530, 9)}  # mean, standard deviation, first label


@pytest.fixture(scope="module")
def root() -> Path:
    folder = os.environ.get(data.ROOT_VARIABLE)
    if not folder:
        pytest.skip(f"needs real data: {data.ROOT_VARIABLE} is not set")
    return Path(folder)


@pytest.fixture
def no_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(data.ROOT_VARIABLE, raising=False)


def rows(*splits: data.Split) -> list[bytes]:
    return [np.ascontiguousarray(sample).tobytes() for split in splits for sample in split.inputs.numpy()]


# --- Digits ------------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_root")
def test_digits_are_split_by_position_within_their_class() -> None:
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    digits = data.load("digits")
    assert (digits.name, digits.input_shape, digits.num_classes, digits.temporal) == ("digits", (1, 8, 8), 10, False)
    images, labels = load_digits(return_X_y=True)
    seen = dict.fromkeys(range(10), 0)
    expected: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
    for index, label in enumerate(labels):
        expected[("train", "train", "train", "validation", "test")[seen[label] % 5]].append(index)
        seen[label] += 1
    assert sum(map(len, expected.values())) == 1797
    for part, indices in expected.items():
        split: data.Split = getattr(digits, part)
        assert torch.equal(split.labels, torch.from_numpy(labels[indices]))
        assert torch.equal(split.inputs, torch.from_numpy(images[indices] / 16).float().reshape(-1, 1, 8, 8))
        assert split.inputs.min() == 0 and split.inputs.max() == 1
    assert [len(indices) for indices in expected.values()] == [1085, 357, 355]


def test_digits_do_not_depend_on_any_seed_and_full_train_joins_the_validation_part() -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    first = data.load("digits")
    torch.manual_seed(2)
    np.random.seed(2)
    second, full = data.load("digits"), data.load("digits", full_train=True)
    assert first.validation is not None and first.test is not None and second.test is not None and full.test is not None
    assert torch.equal(first.train.inputs, second.train.inputs) and torch.equal(first.test.inputs, second.test.inputs)
    assert full.validation is None and torch.equal(full.test.inputs, first.test.inputs)
    assert sorted(rows(full.train)) == sorted(rows(first.train, first.validation))
    assert repr(first) == "Data('digits': train 1085, validation 357, test 355; input (1, 8, 8), 10 classes)"


def test_stratified_gives_every_fold_the_same_share_of_each_class() -> None:
    labels = np.random.default_rng(0).choice(7, size=1000, p=[0.4, 0.2, 0.1, 0.1, 0.1, 0.07, 0.03])
    folds = data.stratified(labels, 4)
    counts = np.array([[np.sum((labels == label) & (folds == fold)) for fold in range(4)] for label in range(7)])
    assert counts.sum() == 1000 and int((counts.max(1) - counts.min(1)).max()) <= 1
    assert data.stratified(["a", "b", "a", "a", "b"], 2).tolist() == [0, 0, 1, 0, 1]
    with pytest.raises(InputError, match=r"labels \[N\] and at least 2 folds, got shape \[3\] and 1"):
        data.stratified([0, 1, 2], 1)


# --- The real files ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=sorted(PICTURES))
def pictures(request: pytest.FixtureRequest, root: Path) -> data.Data:
    return data.load(request.param, root)


def test_pictures_are_the_published_ones(pictures: data.Data) -> None:
    assert pictures.validation is not None and pictures.test is not None
    mean, deviation, first = PICTURES[pictures.name]
    parts = (pictures.train.inputs, pictures.validation.inputs)
    assert [tuple(part.shape) for part in parts] == [(55_000, 1, 28, 28), (5_000, 1, 28, 28)]
    assert all(part.dtype == torch.float32 and part.min() == 0 and part.max() == 1 for part in parts)
    count = sum(part.numel() for part in parts)
    found_mean = sum(part.sum(dtype=torch.float64).item() for part in parts) / count
    found_square = sum(part.square().sum(dtype=torch.float64).item() for part in parts) / count
    assert found_mean == pytest.approx(mean, abs=6e-5)
    assert (found_square - found_mean**2) ** 0.5 == pytest.approx(deviation, abs=6e-5)
    labels = torch.cat([pictures.train.labels, pictures.validation.labels])
    assert labels[0] == first and labels.bincount().tolist() == TRAIN_COUNTS[pictures.name]
    assert pictures.test.inputs.shape == (10_000, 1, 28, 28)
    assert pictures.test.labels.bincount().tolist() == TEST_COUNTS[pictures.name]


def test_validation_pictures_are_the_last_5000(pictures: data.Data, root: Path) -> None:
    assert pictures.validation is not None
    folder = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}[pictures.name]
    raw = gzip.decompress((root / folder / "raw" / "train-images-idx3-ubyte.gz").read_bytes())
    last = np.frombuffer(raw[-5000 * 784 :], np.uint8).reshape(5000, 1, 28, 28)
    assert torch.equal(pictures.validation.inputs, torch.from_numpy(last / np.float32(255)))


def test_full_train_is_all_60000(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(data.ROOT_VARIABLE, str(root))
    full = data.load("fashion-mnist", full_train=True)
    assert full.validation is None and full.train.labels.bincount().tolist() == [6000] * 10


@pytest.mark.parametrize(("name", "folds"), [("nmnist", (804, 196)), ("braille", (705, 173))])
def test_event_data_have_their_counts_and_disjoint_stratified_splits(root: Path, name: str, folds: tuple[int, int]) -> None:
    loaded = data.load(name, root, num_steps=3 if name == "nmnist" else None)
    assert loaded.validation is not None and loaded.test is not None and loaded.temporal
    assert (len(loaded.train.labels), len(loaded.validation.labels)) == folds
    together = torch.cat([loaded.train.labels, loaded.validation.labels]).bincount()
    assert together.tolist() == TRAIN_COUNTS[name] and loaded.test.labels.bincount().tolist() == TEST_COUNTS[name]
    assert loaded.validation.labels.bincount().tolist() == [count // 5 for count in TRAIN_COUNTS[name]]
    samples = rows(loaded.train, loaded.validation, loaded.test)
    assert len(set(samples)) == len(samples)


def test_nmnist_bins_equal_an_independent_reading_of_the_events(root: Path) -> None:
    archive_path = root / "NMNIST-small" / "nmnist_small.zip"
    num_steps = 31
    loaded = data.load("nmnist", root, num_steps=num_steps, full_train=True)
    assert loaded.test is not None
    assert (loaded.input_shape, loaded.num_steps, loaded.num_classes) == ((2, 34, 34), num_steps, 10)
    assert loaded.train.inputs.shape == (1000, num_steps, 2, 34, 34) and loaded.train.inputs.dtype == torch.uint8
    events = []
    with zipfile.ZipFile(archive_path) as archive:
        for number in range(1, 101):
            (name,) = [name for name in archive.namelist() if name.endswith(f"/{number:05d}.bin") and name.startswith("Test")]
            raw = archive.read(name)
            events.append(len(raw) // 5)
            assert int(name.split("/")[1]) == loaded.test.labels[number - 1]
            bins = set()
            for x, y, high, middle, low in zip(*(raw[byte::5] for byte in range(5)), strict=True):
                time = int.from_bytes(bytes([high & 127, middle, low]), "big")
                if time < 310_000:
                    bins.add((time // 10_000, high >> 7, y, x))
            found = {tuple(index) for index in loaded.test.inputs[number - 1].nonzero().tolist()}
            assert found == bins
        sizes = [entry.file_size // 5 for entry in archive.infolist()]
    assert (min(sizes), max(sizes)) == (1069, 7152)
    assert loaded.test.inputs.max() == 1 and 0.5 < int(loaded.test.inputs.sum(dtype=torch.int64)) / sum(events) < 1


def test_nmnist_samples_are_in_the_order_of_mnist(root: Path) -> None:
    raw = gzip.decompress((root / "MNIST" / "raw" / "train-labels-idx1-ubyte.gz").read_bytes())
    loaded = data.load("nmnist", root, num_steps=1, full_train=True)
    assert loaded.train.labels.tolist() == list(raw[8:1008])


def test_braille_is_the_published_share_of_ones(root: Path) -> None:
    loaded = data.load("braille", root, num_steps=256, full_train=True)
    assert (loaded.input_shape, loaded.num_steps, loaded.num_classes, loaded.validation) == ((12,), 256, 7, None)
    assert loaded.train.inputs.shape == (878, 256, 12) and loaded.train.inputs.dtype == torch.uint8
    assert loaded.train.inputs.max() == 1 and loaded.train.inputs.float().mean().item() == pytest.approx(0.226, abs=5e-4)
    assert loaded.train.inputs.sum().item() / 878 == pytest.approx(694, abs=0.5)
    assert repr(loaded) == "Data('braille': train 878, test 280; input (12,), 256 steps, 7 classes)"


# --- Where files are looked for ----------------------------------------------------------------------------------------------


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match="unknown data set 'cifar'; known: digits, mnist, fashion-mnist, nmnist, braille"):
        data.load("cifar")


@pytest.mark.parametrize("num_steps", [0, -3, 2.5, True])
def test_num_steps_must_be_a_count(num_steps: int) -> None:
    with pytest.raises(InputError, match="num_steps must be a whole number of at least 1, got"):
        data.load("nmnist", ".", num_steps=num_steps)


@pytest.mark.usefixtures("no_root")
@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "nmnist", "braille"])
def test_without_a_root_the_error_says_how_to_give_one(name: str) -> None:
    with pytest.raises(DataNotFoundError, match=r"no data root .* neither was a root given nor is SPIKEPROP_DATA set"):
        data.load(name)


@pytest.mark.parametrize(
    ("name", "looked_at", "remedy"),
    [
        ("mnist", ["MNIST/raw/train-images-idx3-ubyte.gz", "MNIST/raw/t10k-labels-idx1-ubyte"], "torchvision.datasets.MNIST"),
        ("fashion-mnist", ["FashionMNIST/raw/train-labels-idx1-ubyte"], "torchvision.datasets.FashionMNIST"),
        ("nmnist", ["NMNIST/Train", "NMNIST/Test.zip", "NMNIST-small/nmnist_small.zip"], "tonic.datasets.NMNIST"),
        ("braille", ["braille/braille7_th1_distinct.npz"], "L2MU-Braille"),
    ],
)
@pytest.mark.parametrize("by_variable", [True, False])
def test_missing_files_say_where_they_were_looked_for(
    name: str, looked_at: list[str], remedy: str, by_variable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(data.ROOT_VARIABLE, str(tmp_path / "of-variable"))
    folder = tmp_path / ("of-variable" if by_variable else "of-argument")
    with pytest.raises(DataNotFoundError, match="missing data files") as caught:
        data.load(name, None if by_variable else folder)
    message = str(caught.value)
    assert all(str(folder / path) in message for path in looked_at)
    assert remedy in message and "Give the right root or set SPIKEPROP_DATA" in message


# --- IDX files ---------------------------------------------------------------------------------------------------------------


def idx(values: np.ndarray[Any, Any]) -> bytes:
    return bytes([0, 0, 8, values.ndim]) + b"".join(size.to_bytes(4, "big") for size in values.shape) + values.tobytes()


IDX_FILES = {
    "train-images-idx3-ubyte": idx(np.arange(5003 * 2, dtype=np.uint8).reshape(5003, 2, 1)),
    "train-labels-idx1-ubyte": idx((np.arange(5003) % 10).astype(np.uint8)),
    "t10k-images-idx3-ubyte": idx(np.full((4, 2, 1), 51, np.uint8)),
    "t10k-labels-idx1-ubyte": idx(np.array([9, 8, 7, 6], np.uint8)),
}


def write_idx(root: Path, **replaced: bytes) -> Path:
    """Write the made-up MNIST, the training files compressed and the test files not; ``name__gz=bytes`` replaces one."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for name, content in IDX_FILES.items():
        compressed = name.startswith("train")
        path = folder / (f"{name}.gz" if compressed else name)
        path.write_bytes(gzip.compress(content, mtime=0) if compressed else content)
    for name, content in replaced.items():
        (folder / name.replace("__", ".").replace("_", "-")).write_bytes(content)
    return root


def test_idx_files_compressed_or_not(tmp_path: Path) -> None:
    loaded = data.load("mnist", write_idx(tmp_path))
    assert loaded.validation is not None and loaded.test is not None
    assert torch.equal(loaded.train.inputs, torch.tensor([0.0, 1, 2, 3, 4, 5]).div(255).view(3, 1, 2, 1))
    assert loaded.train.labels.tolist() == [0, 1, 2] and len(loaded.validation.labels) == 5000
    assert loaded.test.labels.tolist() == [9, 8, 7, 6] and torch.equal(loaded.test.inputs, torch.full((4, 1, 2, 1), 0.2))
    assert loaded.input_shape == (1, 2, 1)


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        (
            {"train_images_idx3_ubyte__gz": gzip.compress(IDX_FILES["train-labels-idx1-ubyte"])},
            r"train-images-idx3-ubyte.gz: bad magic number 0x00000801, expected 0x00000803 \(IDX, uint8, 3 axes\)",
        ),
        (
            {"train_images_idx3_ubyte__gz": gzip.compress(IDX_FILES["train-images-idx3-ubyte"])[:-40]},
            "train-images-idx3-ubyte.gz: cannot be read, damaged or truncated",
        ),
        ({"train_labels_idx1_ubyte__gz": b"not gzip at all"}, "train-labels-idx1-ubyte.gz: cannot be read, damaged"),
        ({"train_labels_idx1_ubyte__gz": b""}, "train-labels-idx1-ubyte.gz: bad magic number 0x, expected 0x00000801"),
        (
            {"t10k_images_idx3_ubyte": IDX_FILES["t10k-images-idx3-ubyte"][:-3]},
            r"t10k-images-idx3-ubyte: its header \[4, 2, 1\] says 24 bytes, found 21",
        ),
        ({"t10k_labels_idx1_ubyte": b"\0\0\x08\x01\0\0"}, "t10k-labels-idx1-ubyte: its header .* bytes, found 6"),
        (
            {"t10k_labels_idx1_ubyte": idx(np.zeros(3, np.uint8))},
            r"t10k-images-idx3-ubyte holds 4 samples, .*t10k-labels-idx1-ubyte labels of shape \[3\]",
        ),
        ({"t10k_labels_idx1_ubyte": idx(np.array([0, 1, 77, 2], np.uint8))}, r"test label 77 at index 2 is outside 0\.\.9"),
        (
            {"train_images_idx3_ubyte__gz": gzip.compress(idx(np.zeros((5000, 2, 1), np.uint8)))},
            "train-images-idx3-ubyte.gz: 5000 images; the last 5000 are for validation, none are left over",
        ),
    ],
)
def test_damaged_idx_files_are_named(replaced: dict[str, bytes], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        data.load("mnist", write_idx(tmp_path, **replaced))


def test_one_missing_idx_file_is_the_only_one_named(tmp_path: Path) -> None:
    (write_idx(tmp_path) / "MNIST" / "raw" / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataNotFoundError, match=r"missing data files \(1 of 4\): \S+t10k-labels-idx1-ubyte.gz or \S+ubyte\."):
        data.load("mnist", tmp_path)


# --- Event files -------------------------------------------------------------------------------------------------------------


def event(x: int, y: int, polarity: int, time: int) -> bytes:
    return bytes([x, y, polarity << 7 | time >> 16, time >> 8 & 255, time & 255])


WRAP = event(0, 240, 0, 0)
EVENT_FILES = {
    # Number 2 sorts before number 10 whatever its class. The last event is later than the window.
    "Train/7/00010.bin": event(0, 0, 0, 0) + event(0, 0, 0, 5) + event(33, 32, 1, 309_999) + event(1, 1, 1, 310_000),
    # The clock wraps: the same time of 10 us is 10 us, then 8,202 us, then 311,306 us (38 wraps), which is too late.
    "Train/3/00002.bin": b"".join([event(5, 6, 1, 10), WRAP, event(5, 7, 1, 10), WRAP * 37, event(5, 8, 1, 10)]),
    "Train/0/00011.bin": event(2, 2, 0, 77_500),
    "Test/1/00001.bin": event(3, 4, 1, 154_999) + event(3, 4, 1, 155_000),
}


def write_folder(root: Path, **replaced: bytes) -> Path:
    for name, content in {**EVENT_FILES, **replaced}.items():
        path = root / "NMNIST" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def write_zips(root: Path) -> Path:
    (root / "NMNIST").mkdir()
    for part in ("Train", "Test"):
        with zipfile.ZipFile(root / "NMNIST" / f"{part}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in EVENT_FILES.items():
                if name.startswith(part):
                    archive.writestr(name, content)
    return root


def write_small(root: Path) -> Path:
    (root / "NMNIST-small").mkdir()
    with zipfile.ZipFile(root / "NMNIST-small" / "nmnist_small.zip", "w") as archive:
        for name, content in EVENT_FILES.items():
            archive.writestr(name, content)
    return root


@pytest.mark.parametrize("write", [write_folder, write_zips, write_small])
def test_event_files_in_every_layout(write: Callable[[Path], Path], tmp_path: Path) -> None:
    loaded = data.load("nmnist", write(tmp_path), num_steps=4, full_train=True)
    assert loaded.test is not None
    assert loaded.train.labels.tolist() == [3, 7, 0]
    assert [sample.nonzero().tolist() for sample in loaded.train.inputs] == [
        [[0, 1, 6, 5], [0, 1, 7, 5]],
        [[0, 0, 0, 0], [3, 1, 32, 33]],
        [[1, 0, 2, 2]],
    ]
    assert loaded.test.inputs[0].nonzero().tolist() == [[1, 1, 4, 3], [2, 1, 4, 3]]


def test_the_default_is_20_bins(tmp_path: Path) -> None:
    assert data.load("nmnist", write_folder(tmp_path), full_train=True).num_steps == 20


def test_half_of_the_whole_is_never_completed_by_the_part(tmp_path: Path) -> None:
    write_small(write_zips(tmp_path))
    (tmp_path / "NMNIST" / "Test.zip").unlink()
    with pytest.raises(DataNotFoundError, match=r"missing data files \(1 of 2\): \S+NMNIST/Test or \S+NMNIST/Test.zip\. Give"):
        data.load("nmnist", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (event(0, 0, 0, 0)[:-1], r"NMNIST/Train/0/00011.bin: 4 bytes, expected one or more whole events of 5 bytes"),
        (b"", r"NMNIST/Train/0/00011.bin: 0 bytes"),
        (event(1, 1, 1, 1) + event(34, 3, 0, 2), r"00011.bin: event 1 is at x = 34, y = 3, outside 34 x 34"),
    ],
)
def test_damaged_event_files_are_named(content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        data.load("nmnist", write_folder(tmp_path, **{"Train/0/00011.bin": content}))


def test_damaged_event_archives_are_named(tmp_path: Path) -> None:
    path = write_small(tmp_path) / "NMNIST-small" / "nmnist_small.zip"
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    with pytest.raises(InputError, match=r"nmnist_small.zip: cannot be read, damaged or truncated"):
        data.load("nmnist", tmp_path)
    at = whole.index(event(2, 2, 0, 77_500))
    path.write_bytes(whole[:at] + b"\1" + whole[at + 1 :])
    with pytest.raises(InputError, match=r"nmnist_small.zip: cannot be read, damaged or truncated: Bad CRC-32"):
        data.load("nmnist", tmp_path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("Train/readme.txt", "none")
    with pytest.raises(InputError, match=r"nmnist_small.zip: no files Train/<label>/<number>.bin in it"):
        data.load("nmnist", tmp_path)


# --- The Braille archive -----------------------------------------------------------------------------------------------------


def braille_arrays() -> dict[str, np.ndarray[Any, Any]]:
    generator = np.random.default_rng(0)
    labels = np.arange(35, dtype=np.uint8) % 7
    inputs = generator.integers(0, 2, (35, 256, 12), np.uint8)
    return {"x_train": inputs, "y_train": labels, "x_test": inputs[:7], "y_test": labels[:7]}


def write_braille(root: Path, **arrays: Any) -> Path:
    (root / "braille").mkdir()
    path = root / "braille" / "braille7_th1_distinct.npz"
    np.savez_compressed(path, **{name: values for name, values in {**braille_arrays(), **arrays}.items() if values is not None})
    return path


def test_braille_validation_is_the_last_of_every_five(tmp_path: Path) -> None:
    write_braille(tmp_path)
    loaded = data.load("braille", tmp_path)
    assert loaded.validation is not None
    assert torch.equal(loaded.validation.inputs, torch.from_numpy(braille_arrays()["x_train"][28:]))
    assert loaded.validation.labels.tolist() == list(range(7)) and len(loaded.train.labels) == 28


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"y_test": None, "x_train": None}, r"braille7_th1_distinct.npz: no arrays x_train, y_test in it"),
        ({"x_test": np.zeros((7, 256, 11), np.uint8)}, r"x_test has shape \[7, 256, 11\], expected \[N, 256, 12\]"),
        ({"y_train": np.zeros(34, np.uint8)}, r"x_train holds 35 samples, y_train labels of shape \[34\]"),
        ({"y_train": np.full(35, 9, np.uint8)}, r"train label 9 at index 0 is outside 0\.\.6 \(28 of 28 are\)"),
        ({"x_train": np.array([{}], object)}, r"cannot be read.*Object arrays cannot be loaded"),
    ],
)
def test_bad_braille_arrays_are_named(arrays: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_braille(tmp_path, **arrays)
    with pytest.raises(InputError, match=message):
        data.load("braille", tmp_path)


def test_damaged_braille_archives_are_named(tmp_path: Path) -> None:
    path = write_braille(tmp_path)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"garbage", whole[:200] + b"\0" * 50 + whole[250:]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"braille7_th1_distinct.npz: cannot be read, damaged or truncated"):
            data.load("braille", tmp_path)
    with path.open("wb") as file:
        np.save(file, np.zeros(3))  # an array where an archive should be
    with pytest.raises(InputError, match=r"braille7_th1_distinct.npz: cannot be read"):
        data.load("braille", tmp_path)
    with pytest.raises(InputError, match="braille has 256 time steps, num_steps = 20 is not to be had"):
        data.load("braille", tmp_path, num_steps=20)


# --- Arrays and Datasets -----------------------------------------------------------------------------------------------------

X = np.random.default_rng(0).random((6, 3, 2))
Y = np.array([0, 1, 2, 2, 1, 0])


class Pairs(torch.utils.data.Dataset[Any]):
    def __init__(self, samples: list[Any]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.samples[index]


def test_arrays_tensors_and_datasets_give_the_same_data() -> None:
    made = [
        data.from_arrays((X, Y), test=(X[:2], Y[:2]), num_classes=4),
        data.from_arrays((torch.from_numpy(X), torch.from_numpy(Y)), test=(X[:2].tolist(), [0, 1]), num_classes=4),
        data.from_datasets(
            Pairs(list(zip(X, Y.tolist(), strict=True))),
            test=torch.utils.data.TensorDataset(torch.from_numpy(X[:2]), torch.from_numpy(Y[:2])),
            num_classes=4,
        ),
    ]
    for each in made:
        assert (each.input_shape, each.num_classes, each.regression, each.temporal) == ((3, 2), 4, False, False)
        assert each.train.inputs.dtype == torch.float32 and each.train.labels.dtype == torch.int64
        assert each.validation is None and each.test is not None and each.test.inputs.shape == (2, 3, 2)
        np.testing.assert_array_equal(each.train.inputs.numpy(), X.astype(np.float32))
        assert each.train.labels.tolist() == Y.tolist()
    assert data.from_arrays((X, Y)).num_classes == 3
    assert data.from_arrays((X, Y), num_classes=Y.max() + np.int64(3)).num_classes == 5


def test_arrays_are_copied_and_may_be_read_only_or_reversed() -> None:
    mine = X.astype(np.float32)
    taken = data.from_arrays((mine, Y))
    mine[:] = 0
    assert taken.train.inputs.abs().sum() > 0
    frozen = X[::-1]
    frozen.flags.writeable = False
    np.testing.assert_array_equal(data.from_arrays((frozen, Y)).train.inputs.numpy(), X[::-1].astype(np.float32))


def test_temporal_arrays_keep_their_bytes() -> None:
    spikes = (X > 0.5).astype(np.uint8)
    made = data.from_arrays((spikes, Y), (spikes.astype(bool), Y), temporal=True)
    assert (made.input_shape, made.num_steps, made.temporal) == ((2,), 3, True)
    assert made.validation is not None and made.train.inputs.dtype == made.validation.inputs.dtype == torch.uint8
    assert data.from_arrays((spikes, Y)).train.inputs.dtype == torch.float32
    assert data.from_arrays((X, Y), temporal=True).train.inputs.dtype == torch.float32


def test_floating_labels_make_a_regression() -> None:
    targets = np.random.default_rng(1).normal(size=(6, 4))
    made = data.from_arrays((X, targets), test=(X, targets))
    assert made.regression and made.num_classes == 4 and made.train.labels.dtype == torch.float32
    single = data.from_datasets(Pairs(list(zip(X, targets[:, 0].tolist(), strict=True))))
    assert single.regression and single.num_classes == 1 and single.train.labels.shape == (6, 1)
    assert repr(made).endswith("input (3, 2), 4 outputs)")


def spoiled(value: float) -> np.ndarray[Any, Any]:
    inputs: np.ndarray[Any, Any] = X.copy()
    inputs[4, 1, 0] = value
    inputs[5, 0, 0] = value
    return inputs


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train": (X[:0], Y[:0])}, r"train inputs are empty: shape \[0, 3, 2\]"),
        ({"train": (X, Y), "test": (X[:0], Y[:0])}, r"test inputs are empty: shape \[0, 3, 2\]"),
        ({"train": (spoiled(np.nan), Y)}, r"train inputs hold nan at index \[4, 1, 0\] \(2 of 36 are not finite"),
        ({"train": (X, Y), "validation": (spoiled(-np.inf), Y)}, r"validation inputs hold -inf at index \[4, 1, 0\]"),
        ({"train": (spoiled(1e300), Y)}, r"train inputs hold inf at index \[4, 1, 0\] \(2 of 36 are not finite as float32\)"),
        ({"train": (X, Y[:5])}, "train has 6 inputs but 5 labels"),
        ({"train": (X, 3)}, "train has 6 inputs but 1 labels"),
        ({"train": ([], [])}, r"train inputs are empty: shape \[0\]"),
        ({"train": (X[:, 0, 0], Y)}, r"train inputs must be \[N, \*features\], got shape \[6\]"),
        ({"train": (X[:, 0], Y), "temporal": True}, r"train inputs must be \[N, T, \*features\], got shape \[6, 2\]"),
        ({"train": (X, Y), "test": (X[:, :2], Y)}, r"test samples have shape \[2, 2\], train samples \[3, 2\]"),
        ({"train": (X, Y - 1)}, r"train label -1 at index 0 is outside 0\.\.1 \(2 of 6 are\)"),
        ({"train": (X, Y), "num_classes": 2}, r"train label 2 at index 2 is outside 0\.\.1 \(2 of 6 are\)$"),
        (
            {"train": (X, Y), "test": (X, Y + 1)},
            r"test label 3 at index 2 is outside 0\.\.2 .*: give num_classes if there are more",
        ),
        (
            {"train": (X, Y + 0.5), "num_classes": 3},
            "num_classes = 3, but the labels are floating-point targets with 1 columns",
        ),
        ({"train": (X, Y.astype(float))}, "train labels are whole numbers stored as floating-point: classes or targets?"),
        (
            {"train": (X, np.eye(3, dtype=int)[Y])},
            r"train labels must be \[N\], got shape \[6, 3\]; flatten a column, or take the argmax",
        ),
        ({"train": (X, X[:, :, :, None])}, r"labels of a regression must be \[N, K\] or \[N\], got shape \[6, 3, 2, 1\]"),
        ({"train": (X, spoiled(np.nan)[:, 1])}, r"train labels hold nan at index \[4, 0\] \(1 of 12"),
        ({"train": (X, X[:, 0]), "test": (X, Y)}, r"test labels are torch.int64 of shape \[6\], train labels torch.float32"),
        ({"train": (X, X[:, 0]), "test": (X, X[:, :, 0])}, r"test labels are torch.float32 of shape \[6, 3\], train labels"),
        ({"train": (X, Y), "num_classes": 0}, "num_classes must be a whole number of at least 1, got 0"),
        ({"train": X}, r"train must be a pair \(inputs, labels\), got ndarray"),
        ({"train": None}, r"train must be a pair \(inputs, labels\), got NoneType"),
        ({"train": (X, Y), "validation": (X, Y, Y)}, r"validation must be a pair \(inputs, labels\), got tuple"),
        ({"train": (["a", "b"], [0, 1])}, "train inputs are no array of numbers"),
        ({"train": ([[1.0], [1.0, 2.0]], [0, 1])}, "train inputs are no array of numbers"),
        ({"train": (X + 1j, Y)}, "train inputs must be real numbers, got torch.complex128"),
    ],
)
def test_bad_arrays_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        data.from_arrays(**arguments)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (iter([(X[0], 0)]), r"train must be a map-style Dataset \(with len\(\) and indexing\), got list_iterator"),
        (Pairs([]), "train Dataset is empty"),
        (Pairs([(X[0], 0), X[1]]), r"train sample 1 must be a pair \(x, y\), got ndarray"),
        (
            Pairs([(X[0], 0), (X[1], 1), (X[2][:2], 2)]),
            r"train sample 2: x is torch.float64 of shape \[2, 2\], that of sample 0",
        ),
        (Pairs([(X[0], 0), (X[1], 0.5)]), "train sample 1: y is torch.float64 of shape .* that of sample 0 torch.int64"),
        (Pairs([("picture", 0)]), "train sample 0: x are no array of numbers"),
        (Pairs([(X[0], 0), (spoiled(np.nan)[4], 1)]), r"train inputs hold nan at index \[1, 1, 0\]"),
    ],
)
def test_bad_datasets_are_refused(dataset: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        data.from_datasets(dataset)


def test_a_delay_line_brings_every_channel_once_per_delay() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = (torch.rand(3, 9, 2, 4, generator=generator) < 0.5).to(torch.uint8)
    plain = data.from_arrays((inputs, torch.tensor([0, 1, 1])), temporal=True)
    late = data.delay_line(plain, [0, 2, 8])
    assert (late.input_shape, late.num_steps, late.train.inputs.dtype) == ((6, 4), 9, torch.uint8)
    for index, delay in enumerate([0, 2, 8]):
        own = late.train.inputs[:, :, 2 * index : 2 * index + 2]
        assert not own[:, :delay].any()
        for step in range(delay, 9):
            assert torch.equal(own[:, step], inputs[:, step - delay])
    assert late.test is None


@pytest.mark.parametrize("delays", [[], [9], [-1], [1, 1], [0.5], [True]])
def test_delays_that_are_none_are_refused(delays) -> None:
    plain = data.from_arrays((np.zeros((3, 9, 2), np.uint8), [0, 1, 1]), temporal=True)
    with pytest.raises(InputError, match=re.escape(f"delays = {delays} must be whole numbers from 0 to 8, each once")):
        data.delay_line(plain, delays)


def test_pictures_have_no_delay_line() -> None:
    with pytest.raises(InputError, match="the inputs of digits have no time axis to be delayed on; leave the delays out"):
        data.load("digits", delays=[0, 1])
