"""lava-dl's ``.net`` files: round trips, refusals, damage, and lava-dl's own loader and files, where they can be had."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from spikeprop.backends import lava, netx
from spikeprop.backends.lava import guard
from spikeprop.backends.loihi import Convolution, LoihiLayer, LoihiNetwork, simulate
from spikeprop.errors import BackendError, CheckpointError, RangeError, UnsupportedError

LAVA_DL = "lava-dl==0.6.0"
LAVA_DL_VARIABLE = "SPIKEPROP_LAVA_DL"  # the wheel, or the folder it was unpacked into
LAVA_TIMEOUT = 120.0
REGISTERS = ("weight", "du", "dv", "vth", "bias_mant", "bias_exp")

# Per layer: what a convolution is, or how many neurons. Pictures are wider than high, to tell the axes apart.
DENSE = ((7,), (9, 8, 5))
CONV = (
    (2, 5, 7),
    (
        ((4, 2, 3, 2), Convolution((2, 5, 7), (1, 2), (1, 0))),
        ((6, 2, 2, 3), Convolution((4, 5, 3), (2, 1), (0, 1), 2)),
        6,
    ),
)
FLAT_PICTURE = ((2, 3, 4), (8, 5))


def random_layer(rng: np.random.Generator, inputs: int, what: Any, scale: int) -> LoihiLayer:
    """Registers over much of their ranges: per layer, per channel or per neuron; ``scale`` is what a step may bring."""
    kernel, convolution = ((what, inputs), None) if isinstance(what, int) else what
    shape = (what,) if convolution is None else convolution.output_shape(kernel)
    neurons = int(np.prod(shape))

    def spread(low: int, high: int) -> Any:
        kind = rng.integers(3)
        if kind == 0:
            return int(rng.integers(low, high))
        if kind == 1 and convolution is not None:
            return np.repeat(rng.integers(low, high, shape[0]), neurons // shape[0])
        return rng.integers(low, high, neurons)

    # Signed, and once in a while positive only or negative only, which netx and Lava treat apart.
    low, high = [(-128, 128), (-30, 30), (0, 90), (-90, 0)][rng.choice(4, p=[0.4, 0.3, 0.15, 0.15])]
    weight = rng.integers(low, high, kernel) * 2
    weight.flat[0] = 2 * (low + high) // 2 or 50
    bias_exp = rng.integers(0, 8, neurons)
    bias = np.broadcast_to(spread(-3, 8), neurons) * 128
    return LoihiLayer.build(
        weight,
        du=4095 if rng.random() < 0.4 else spread(100, 4096),
        dv=spread(0, 3000),
        vth=spread(scale // 4, scale),
        bias_mant=bias >> bias_exp,
        bias_exp=bias_exp,
        convolution=convolution,
        scale=float(rng.random()),
        report={"weight_error": float(rng.random()), "output_shape": list(shape)},
    )


def random_network(seed: int, what: Any, inputs: Any = "spikes") -> LoihiNetwork:
    """Networks whose layers all spike, but not always: what is compared then says something."""
    rng = np.random.default_rng(seed)
    shape, described = what
    layers: list[LoihiLayer] = []
    bits = 5 if inputs == "graded" else 0
    for each in described:
        scale = 40 * 2**bits if not layers else 200
        layers.append(random_layer(rng, layers[-1].outputs if layers else int(np.prod(shape)), each, scale))
    return LoihiNetwork(tuple(layers), shape, inputs, bits, -1.0 if bits else 0.0)


def random_messages(network: LoihiNetwork, steps: int, batch: int, seed: int = 0) -> Any:
    shape = (steps, batch, int(np.prod(network.input_shape)))
    return np.random.default_rng(seed).integers(0, network.message_limit + 1, shape)


def per_neuron(layer: LoihiLayer, name: str) -> Any:
    values = np.asarray(getattr(layer, name))
    return values if name == "weight" else np.broadcast_to(values, layer.outputs)


def assert_same(left: LoihiNetwork, right: LoihiNetwork) -> None:
    for name in ("input_shape", "inputs", "num_message_bits", "input_low", "input_high"):
        assert getattr(left, name) == getattr(right, name)
    assert len(left.layers) == len(right.layers)
    for ours, theirs in zip(left.layers, right.layers, strict=True):
        for name in REGISTERS:
            np.testing.assert_array_equal(per_neuron(ours, name), per_neuron(theirs, name), name)
        for name in ("convolution", "weight_exp", "weight_bits", "scale", "report"):
            assert getattr(ours, name) == getattr(theirs, name)


@pytest.mark.parametrize("inputs", ["spikes", "graded"])
@pytest.mark.parametrize("what", [DENSE, CONV, FLAT_PICTURE], ids=["dense", "conv", "flat picture"])
def test_round_trip(what: Any, inputs: str, tmp_path: Path) -> None:
    spikes = 0
    for seed in range(10):
        network = random_network(seed, what, inputs)
        netx.write(network, tmp_path / "net.net")
        loaded = netx.read(tmp_path / "net.net")
        assert_same(network, loaded)
        messages = random_messages(network, 20, 3)
        for ours, theirs in zip(simulate(network, messages).spikes, simulate(loaded, messages).spikes, strict=True):
            np.testing.assert_array_equal(ours, theirs)
            spikes += int(ours.sum())
    assert spikes > 1000
    assert os.listdir(tmp_path) == ["net.net"]


@pytest.mark.parametrize(("bits", "step"), [(8, 2), (5, 16), (2, 128)])
def test_fewer_weight_bits(bits: int, step: int, tmp_path: Path) -> None:
    layer = LoihiLayer.build(np.array([[-1, 1, 0], [1, 0, -1]]) * step, vth=20, weight_bits=bits)
    network = LoihiNetwork((layer,), (3,))
    netx.write(network, tmp_path / "net.net")
    assert_same(network, netx.read(tmp_path / "net.net"))


WEIGHT = [[2, -4], [6, 8]]
PICTURES = Convolution((1, 2, 2))


def one_layer(**registers: Any) -> LoihiNetwork:
    return LoihiNetwork((LoihiLayer.build(**{"weight": WEIGHT, "vth": 9, **registers}),), (2,))


def two_layers(first: LoihiLayer, second: LoihiLayer) -> LoihiNetwork:
    return LoihiNetwork((first, second), first.input_shape)


REFUSED = [
    (one_layer(weight_exp=-2), "layer 1: weight exponent -2, for which the format has no place; quantize.*target='netx'"),
    (one_layer(bias_mant=[64, 65]), r"layer 1: bias 65 is no multiple of 64, .*target='netx'"),
    (one_layer(bias_mant=4095, bias_exp=7), "layer 1: bias 524160 does not fit netx, whose biases reach from -262144 to"),
    (one_layer(weight=[[0, 0], [0, 0]]), "layer 1: all its weights are 0 and netx fails"),
    (one_layer(weight=[[-2, 0], [-64, -6]]), "layer 1: no weight is positive and the lowest is -64, a power of two"),
    (one_layer(weight=[[-256, -256], [-2, -2]]), "layer 1: no weight is positive and the lowest is -256"),
    (
        LoihiNetwork((LoihiLayer.build([[2] * 300], vth=9),), (300,), "graded", 16),
        r"layer 1: netx multiplies its weights by 64, and their sums of up to 2\.5e\+09 then exceed Lava's 32 bits",
    ),
    (
        LoihiNetwork((LoihiLayer.build([[[[2]]]], vth=9, convolution=PICTURES),), (4,)),
        r"layer 1: its convolution takes pictures of shape \(1, 2, 2\) but \(4,\) arrive, and netx knows no reshaping",
    ),
    (
        two_layers(LoihiLayer.build([[2]] * 4, vth=9), LoihiLayer.build([[[[2]]]], vth=9, convolution=PICTURES)),
        r"layer 2: its convolution takes pictures of shape \(1, 2, 2\) but \(4,\) arrive",
    ),
    (
        LoihiNetwork(
            (LoihiLayer.build([[[[2]]]] * 128, vth=9, convolution=Convolution((128, 1, 1), groups=128)),), (128, 1, 1)
        ),
        "layer 1: its number of groups of 128 exceeds 127, the most that Lava's convolution counts to",
    ),
    (
        LoihiNetwork((LoihiLayer.build([[[[2]]]], vth=9, convolution=Convolution((1, 1, 1), stride=(1, 200))),), (1, 1, 1)),
        "layer 1: its stride of 200 exceeds 127",
    ),
]


@pytest.mark.parametrize(("network", "message"), REFUSED)
def test_write_refuses(network: LoihiNetwork, message: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=message):
        netx.write(network, tmp_path / "net.net")
    assert os.listdir(tmp_path) == []


def test_loader_options() -> None:
    assert netx.loader_options(random_network(0, DENSE), 30) == {"reset_interval": 30, "reset_offset": 1}
    graded = netx.loader_options(random_network(0, DENSE, "graded"), 30)
    assert graded == {"reset_interval": 30, "reset_offset": 1, "input_message_bits": 5}


def test_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "net.net"
    netx.write(random_network(0, DENSE), path)
    before = path.read_bytes()

    def full(file: Path, content: bytes) -> None:
        with open(file, "wb") as opened:
            opened.write(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(CheckpointError, match=r"net\.net could not be written \(No space left on device\)"):
        netx.write(random_network(1, DENSE), path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["net.net"]


def test_without_h5py(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    for call in (lambda: netx.write(random_network(0, DENSE), tmp_path / "net.net"), lambda: netx.read(tmp_path / "net.net")):
        with pytest.raises(BackendError, match="pip install h5py"):
            call()
    assert os.listdir(tmp_path) == []


def test_read_refuses_what_is_no_such_file(tmp_path: Path) -> None:
    path = tmp_path / "net.net"
    with pytest.raises(CheckpointError, match=r"net\.net: no such file"):
        netx.read(path)
    with pytest.raises(CheckpointError, match="no network of lava-dl, or damaged"):
        netx.read(tmp_path)
    netx.write(random_network(0, DENSE), path)
    whole = path.read_bytes()
    for content in (b"", b"hello", whole[: len(whole) // 2], whole[:-1]):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"net\.net: no network of lava-dl, or damaged"):
            netx.read(path)


@pytest.mark.parametrize("what", [DENSE, CONV], ids=["dense", "conv"])
def test_damage_is_found(what: Any, tmp_path: Path) -> None:
    """One wrong bit somewhere: either the file is refused, or the bit was none of the network's."""
    network, path = random_network(3, what), tmp_path / "net.net"
    netx.write(network, path)
    whole, rng, found = path.read_bytes(), np.random.default_rng(0), 0
    for place in rng.choice(len(whole), 300, replace=False):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            loaded = netx.read(path)
        except (CheckpointError, UnsupportedError, RangeError):
            found += 1
        else:
            assert_same(network, loaded)
    assert found > 50


def edit(path: Path, changes: dict[str, Any]) -> None:
    """Replace datasets or groups of a file; None removes them."""
    with h5py.File(path, "r+") as file:
        for name, value in changes.items():
            if name in file:
                del file[name]
            if value is not None:
                file[name] = value


DAMAGED: list[tuple[dict[str, Any], Any, str]] = [
    ({"layer": None}, CheckpointError, "holds no network of lava-dl"),
    ({"layer": 3}, CheckpointError, "holds no network of lava-dl"),
    ({"layer/2": None}, CheckpointError, "layer/2 is missing among 3 entries"),
    ({"layer/1/type": None}, CheckpointError, "layer/1: type is missing"),
    ({"layer/1/type": 3}, CheckpointError, "layer/1: type is of type int64, expected text"),
    ({"layer/1/weight": None}, CheckpointError, "layer/1: weight is missing"),
    ({"layer/1/weight": b"text"}, CheckpointError, "layer/1: weight is of type .*, expected numbers"),
    ({"layer/1/weight": np.ones((4, 2, 3))}, CheckpointError, r"layer/1: no conv layer of shape \(4, 5, 3\) has weights"),
    ({"layer/1/weight": np.ones((4, 3, 3, 2))}, CheckpointError, "layer/1: a kernel of shape .* does not fit 2 channels"),
    ({"layer/1/weight": np.full((4, 2, 3, 2), 2.5)}, CheckpointError, "layer/1: weight holds 2.5; a register holds whole"),
    ({"layer/1/weight": np.full((4, 2, 3, 2), np.nan)}, CheckpointError, "layer/1: weight holds nan"),
    ({"layer/1/weight": np.full((4, 2, 3, 2), 1e12)}, CheckpointError, r"layer/1: weight holds 1e\+12|1000000000000.0"),
    ({"layer/1/weight": np.full((4, 2, 3, 2), 3)}, RangeError, "layer/1: 8-bit signed weights are multiples of 2"),
    ({"layer/1/weight": np.full((4, 2, 3, 2), 300)}, RangeError, "layer/1: weight 300 lies outside Loihi's -256 to 254"),
    ({"layer/1/stride": [0, 1]}, CheckpointError, r"layer/1: stride = \[0, 1\], expected two numbers from 1 on"),
    ({"layer/1/groups": [1, 1]}, CheckpointError, "layer/1: groups = "),
    ({"layer/1/dilation": [2, 1]}, UnsupportedError, r"layer/1: dilation \(2, 1\)"),
    ({"layer/1/shape": [4, 3, 5]}, CheckpointError, r"layer/1: weights .* lead to \(4, 5, 3\), but shape = \(4, 3, 5\)"),
    ({"layer/1/shape": [-4, 3, 5]}, CheckpointError, "layer/1: shape = .* expected one to three positive numbers"),
    ({"layer/0/shape": [70]}, CheckpointError, "layer/1 is a convolution, but no pictures"),
    ({"layer/3/type": b"dense_rec"}, UnsupportedError, "layer/3 is of type 'dense_rec'; a network here is a row of"),
    ({"layer/3/type": b"average"}, UnsupportedError, "layer/3 is of type 'average'"),
    ({"layer/3/type": b"input"}, UnsupportedError, "layer/3 is a second input"),
    ({"layer/0/neuron/type": b"CUBA"}, UnsupportedError, r"layer/0 has input neurons \(type CUBA\).* skip_layers=1"),
    ({"layer/1/neuron": None}, UnsupportedError, "layer/1 has no neurons; netx then adds up"),
    ({"layer/1/neuron/type": b"SDNN"}, UnsupportedError, "layer/1 has neurons of type SDNN; layers here have CUBA or LOIHI"),
    ({"layer/1/neuron/refDelay": 2}, UnsupportedError, "layer/1: refDelay = 2, which netx passes over"),
    ({"layer/1/neuron/weight_exp": [0.0, 3.0]}, UnsupportedError, "layer/1: weight_exp = "),
    ({"layer/1/neuron/iDecay": None}, CheckpointError, "layer/1: iDecay is missing"),
    ({"layer/1/neuron/iDecay": 0}, RangeError, "layer/1: current decay du -1 is below"),
    ({"layer/1/neuron/vDecay": 4096}, RangeError, "layer/1: membrane decay dv 4096 exceeds"),
    ({"layer/1/neuron/vThMant": 2**18 - 1}, RangeError, "layer/1: threshold 262143 exceeds Loihi's 17-bit limit"),
    ({"layer/1/neuron/vThMant": [1, 2, 3]}, CheckpointError, r"layer/1: vThMant has shape \(3,\); one number, one per channel"),
    ({"layer/1/bias": np.full(4, 5000), "layer/1/biasExp": None}, RangeError, "layer/1: bias mantissa 5000 exceeds"),
    ({"layer/1/bias": np.full(4, 1), "layer/1/biasExp": np.full(60, 7)}, CheckpointError, "layer/1: biasExp splits another"),
    ({"layer/1/biasExp": np.full(60, 9)}, CheckpointError, "layer/1: biasExp does not hold an exponent per neuron"),
    ({"layer/1/delay": np.full(4, 3.0)}, UnsupportedError, "layer/1 has delays of up to 3 steps"),
    ({"layer/1/notes": b"{"}, CheckpointError, "no network of lava-dl, or damaged"),
    ({"layer/1/notes": b"[]"}, CheckpointError, "no network of lava-dl, or damaged"),
    ({"layer/1/notes": b'{"version": 99}'}, CheckpointError, "layer/1: written as version 99, this spikeprop reads version 1"),
    ({"layer/0/notes": b'{"version": 1, "inputs": "x", "num_message_bits": 0}'}, CheckpointError, "inputs = 'x' is neither"),
    ({"layer/0/notes": b'{"version": 1, "num_message_bits": 99}'}, RangeError, "num_message_bits 99 exceeds"),
]


@pytest.mark.parametrize(("changes", "kind", "message"), DAMAGED)
def test_read_refuses(changes: dict[str, Any], kind: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "net.net"
    first = ((4, 2, 3, 2), Convolution((2, 5, 7), (1, 2), (1, 0)))
    netx.write(random_network(1, ((2, 5, 7), (first, CONV[1][1]))), path)
    with h5py.File(path, "r+") as file:
        file.copy("layer/2", "layer/3")
    edit(path, changes)
    with pytest.raises(kind, match=message) as caught:
        netx.read(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_read_refuses_missing_flatten_and_nothing(tmp_path: Path) -> None:
    path = tmp_path / "net.net"
    netx.write(random_network(0, CONV), path)
    with pytest.raises(CheckpointError, match="no entry that was to be read"):
        netx.read(path, num_layers=1)
    with h5py.File(path, "r+") as file:
        file.move("layer/4", "layer/3/moved")
        del file["layer/3/type"], file["layer/3/shape"]
        for name in file["layer/3/moved"]:
            file.move(f"layer/3/moved/{name}", f"layer/3/{name}")
    with pytest.raises(CheckpointError, match="layer/3 is dense, but pictures reach it; it needs a flatten in front"):
        netx.read(path)


def test_parts_of_a_file(tmp_path: Path) -> None:
    """skip_layers and num_layers count entries, as netx does: here input, two convolutions, flatten, dense."""
    network, path = random_network(0, CONV, "graded"), tmp_path / "net.net"
    netx.write(network, path)
    behind_input = replace(network, inputs="spikes", num_message_bits=0, input_low=0.0)
    assert_same(netx.read(path, skip_layers=1), behind_input)
    assert_same(netx.read(path, num_layers=3), replace(network, layers=network.layers[:2]))
    last = netx.read(path, skip_layers=4)
    assert_same(last, LoihiNetwork(network.layers[2:], (36,)))
    middle = netx.read(path, skip_layers=2, num_layers=3)
    assert_same(middle, LoihiNetwork(network.layers[1:2], network.layers[1].input_shape))


# ------------------------------------------------------------------------------------------------------- against lava-dl

PARTS = ("lava/lib/dl/netx/", "tests/lava/lib/dl/netx/")  # of the wheel; the rest is 50 MB of trained models


@pytest.fixture(scope="module")
def lava_dl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds lava/lib/dl: where lava-dl is installed, or where its wheel was unpacked."""
    if lava.available() and (spec := importlib.util.find_spec("lava.lib")) and importlib.util.find_spec("lava.lib.dl"):
        return Path(next(iter(spec.submodule_search_locations or []))).parents[1]
    wheel = Path(os.environ.get(LAVA_DL_VARIABLE) or download(tmp_path_factory.mktemp("wheel")))
    if wheel.is_dir():
        return wheel
    folder = tmp_path_factory.mktemp("lava-dl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if name.startswith(PARTS)])
    return folder


def download(folder: Path) -> Path:
    options = ["--no-deps", "--ignore-requires-python", "--retries", "0", "--timeout", "10", "-q", "-d", str(folder)]
    try:
        command = [sys.executable, "-m", "pip", "download", LAVA_DL, *options]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        return next(folder.glob("*.whl"))
    except (subprocess.SubprocessError, OSError, StopIteration) as error:
        pytest.skip(f"{LAVA_DL} cannot be downloaded ({error}); name its wheel in {LAVA_DL_VARIABLE}")


@pytest.fixture(scope="module")
def own_files(lava_dl: Path) -> Path:
    """lava-dl's own networks, which its wheel carries among the tests."""
    folder = lava_dl / PARTS[1]
    if not folder.is_dir():
        pytest.skip(f"{lava_dl} holds lava-dl without its tests; name its wheel in {LAVA_DL_VARIABLE}")
    return folder


@pytest.mark.parametrize(
    ("name", "part", "outcome"),
    [
        ("mnist.net", {}, r"layer/0 has input neurons \(type CUBA\)"),
        ("mnist.net", {"skip_layers": 1}, "layer/3 has no neurons"),
        ("mnist.net", {"skip_layers": 1, "num_layers": 3}, [(784,), (512,), (512,)]),
        ("tiny.net", {}, r"layer/0 has input neurons \(type LOIHI\)"),
        ("tiny.net", {"skip_layers": 1}, [(3, 16, 16), (24, 6, 6), (36, 1, 1)]),
        ("gts/ntidigits/ntidigits.net", {}, "layer/2 has delays of up to 62 steps"),
        ("gts/pilotnet_lif/network.net", {}, r"layer/0 has input neurons \(type LOIHI\)"),
        ("gts/pilotnet_sdnn/network.net", {}, r"layer/0 has input neurons \(type SDNN\)"),
        ("gts/pilotnet_sdnn/network.net", {"skip_layers": 1}, "layer/1 has neurons of type SDNN"),
        ("gts/pilotnet_sdnn/square_network.net", {"skip_layers": 1}, "layer/1 has neurons of type SDNN"),
    ],
)
def test_files_of_lava_dl(name: str, part: dict[str, int], outcome: Any, own_files: Path, tmp_path: Path) -> None:
    if isinstance(outcome, str):
        with pytest.raises(UnsupportedError, match=outcome):
            netx.read(own_files / name, **part)
        return
    network = netx.read(own_files / name, **part)
    assert [network.input_shape, *(layer.output_shape for layer in network.layers)] == outcome
    netx.write(network, tmp_path / "net.net")
    assert_same(network, netx.read(tmp_path / "net.net"))


def test_pilotnet_as_intel_recorded_it(own_files: Path) -> None:
    """lava-dl's driving network, and what it did on Loihi: current, membrane and spikes of eight layers.

    Recorded as [W, H, C, T], layer l one step later than the layer before, reset after 16 steps. Where a neuron spiked, the
    chip's membrane register holds its refractory counter. The ninth layer's recording does not follow from its input spikes.
    """
    folder = own_files / "gts" / "pilotnet_lif"

    def recorded(name: str) -> Any:
        values = np.load(folder / f"{name}.npy")
        return values.transpose(*range(values.ndim)[::-1]).reshape(values.shape[-1], -1)

    network = netx.read(folder / "network.net", skip_layers=1, num_layers=10)
    result = simulate(network, recorded("input-s")[:16, None].astype(int), record="all")
    names = [f"conv-{index}" for index in range(5)] + [f"fc-{index}" for index in range(3)]
    for index, name in enumerate(names):
        stretch = slice(index + 1, index + 17)
        spikes = result.spikes[index][:, 0]
        assert 0.01 < spikes.mean() < 0.5
        np.testing.assert_array_equal(recorded(name)[stretch], spikes)
        np.testing.assert_array_equal(recorded(f"{name}-u")[stretch], result.currents[index][:, 0])
        membranes = result.membranes[index][:, 0]
        np.testing.assert_array_equal(np.where(spikes, membranes, recorded(f"{name}-v")[stretch]), membranes)


NETX_SCRIPT = '''
"""Runs apart, in the folder of its jobs: networks through netx and Lava, weights through netx's and Lava's scaling."""
import importlib.util, json, sys, traceback, types
import numpy as np

with open(sys.argv[1]) as file:
    jobs = json.load(file)
spec = importlib.util.spec_from_file_location("spikeprop_worker", jobs["worker"])
worker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(worker)
worker.follow_parent()


def stub(name, **attributes):
    """Modules that need torch, of which the loader of spiking networks needs nothing."""
    sys.modules[name] = types.ModuleType(name)
    # Lava imports whatever stands beside a process's modules; beside this script it would find the script itself.
    vars(sys.modules[name]).update(attributes, __file__=f"{jobs['lava_dl']}/{name.replace('.', '/')}.py")


def scaled(weight):
    """What netx and Lava's Dense make of a matrix, as multiples of the unit of its sums."""
    from lava.lib.dl.netx.utils import optimize_weight_bits
    from lava.utils.weightutils import clip_weights, determine_sign_mode, truncate_weights

    weight, bits, exponent, _ = optimize_weight_bits(weight)
    mode = determine_sign_mode(weight)
    return truncate_weights(clip_weights(weight, mode, num_bits=8), mode, bits) / 2.0**-exponent


def run(number, options):
    from lava.lib.dl.netx import hdf5
    from lava.magma.core.run_configs import Loihi2SimCfg
    from lava.proc.io import sink, source
    from lava.proc.io.sink import PyReceiveModelFixed

    class SharedSink(PyReceiveModelFixed):
        def run_spk(self):
            self.proc_params["recording"][self.time_step - 1] = self.a_in.recv()

    messages = np.load(f"messages{number}.npy")
    steps, batch, features = messages.shape
    net = hdf5.Network(net_config=f"{number}.net", **options)
    shape = net.inp.shape
    # [T, B, features] to [*(W, H, C), B T]
    stream = messages.transpose(1, 0, 2).reshape(-1, *shape[::-1]).transpose(*range(len(shape), -1, -1))
    feed = source.RingBuffer(data=stream.astype(np.int32))
    feed.s_out.connect(net.inp)
    recordings = []
    for layer in net.layers:
        recordings.append(worker.shared((steps * batch + len(net), *layer.out.shape), np.int8))
        recorder = sink.RingBuffer(shape=layer.out.shape, buffer=1)
        recorder.proc_params["recording"] = recordings[-1]
        layer.out.connect(recorder.a_in)
    configuration = Loihi2SimCfg(select_tag="fixed_pt", exception_proc_model_map={sink.RingBuffer: SharedSink})
    worker.run(feed, configuration, steps * batch + len(net))
    result = {}
    for layer, recording in enumerate(recordings):
        undelayed = recording[layer + 1 :][: steps * batch]
        in_order = undelayed.transpose(0, *range(undelayed.ndim - 1, 0, -1))
        result[f"{number} {layer}"] = in_order.reshape(batch, steps, -1).transpose(1, 0, 2)
    return result


try:
    worker.import_lava()
    sys.path.append(jobs["lava_dl"])
    stub("lava.lib.dl.slayer", __path__=[])
    stub("lava.lib.dl.slayer.neuron", __path__=[])
    stub("lava.lib.dl.slayer.neuron.rf", neuron_params=None)
    stub("lava.lib.dl.netx.sequential_modules")
    with np.load("weights.npz") as archive:
        result = {name: scaled(archive[name]) for name in archive}
    for number, options in enumerate(jobs["options"]):
        result.update(run(number, options))
    np.savez("out.npz", **result)
except BaseException:
    worker.fail(traceback.format_exc())
'''


def lively(what: Any, inputs: Any, steps: int) -> list[LoihiNetwork]:
    """Two networks, all of whose layers spike neither never nor always."""
    networks = []
    for seed in range(100):
        network = random_network(seed, what, inputs)
        rates = [spikes.mean() for spikes in simulate(network, random_messages(network, steps, 3)).spikes]
        if min(rates) > 0.05 and max(rates) < 0.95:
            networks.append(network)
        if len(networks) == 2:
            return networks
    raise AssertionError("no lively networks")


def random_weights() -> dict[str, Any]:
    """Matrices of every sign and range, small enough that powers of two are often their lowest weight."""
    rng, matrices = np.random.default_rng(0), {}
    for number in range(600):
        low, high = [(-8, 1), (-8, 0), (0, 8), (-8, 8), (-128, 1), (-128, 128)][number % 6]
        unit = 2 ** int(rng.integers(1, 6 if high - low < 20 else 2))
        matrices[f"weight{number}"] = rng.integers(low, high, (2, 2)) * unit
    return {name: weight for name, weight in matrices.items() if weight.any()}


@pytest.mark.skipif(not lava.available(), reason="Lava is not installed")
def test_netx_runs_what_was_written(lava_dl: Path, tmp_path: Path) -> None:
    """The decisive test: netx loads our files, and Lava's spikes are the simulator's, in every layer, sample after sample."""
    steps, batch = 50, 3
    networks = [network for what in (DENSE, CONV) for inputs in ("spikes", "graded") for network in lively(what, inputs, steps)]
    networks.append(lively(FLAT_PICTURE, "spikes", steps)[0])
    messages = [random_messages(network, steps, batch) for network in networks]
    weights = random_weights()
    for number, network in enumerate(networks):
        netx.write(network, tmp_path / f"{number}.net")
        np.save(tmp_path / f"messages{number}.npy", messages[number])
    np.savez(tmp_path / "weights.npz", **weights)
    options = [netx.loader_options(network, steps) for network in networks]
    jobs = {"worker": str(lava.WORKER), "lava_dl": str(lava_dl), "options": options}
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    (tmp_path / "script.py").write_text(NETX_SCRIPT)
    guard.run_worker(tmp_path / "script.py", tmp_path, tmp_path / "jobs.json", LAVA_TIMEOUT)
    with np.load(tmp_path / "out.npz") as out:
        for number, network in enumerate(networks):
            for layer, spikes in enumerate(simulate(network, messages[number]).spikes):
                np.testing.assert_array_equal(out[f"{number} {layer}"], spikes, f"network {number}, layer {layer + 1}")
        assert_only_refused_weights_change({name: (weight, out[name]) for name, weight in weights.items()}, tmp_path)


def assert_only_refused_weights_change(pairs: dict[str, Any], folder: Path) -> None:
    refused = 0
    for weight, in_lava in pairs.values():
        network = LoihiNetwork((LoihiLayer.build(weight, vth=9),), (2,))
        if np.array_equal(weight, in_lava):
            netx.write(network, folder / "weight.net")
        else:
            refused += 1
            with pytest.raises(UnsupportedError, match="power of two"):
                netx.write(network, folder / "weight.net")
    assert 20 < refused < len(pairs) - 300
