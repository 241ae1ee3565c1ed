"""The integer simulator, the quantiser and the file format. What Lava itself says is in test_lava.py."""

from __future__ import annotations

import errno
import importlib.util
import itertools
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spikeprop.backends import loihi
from spikeprop.backends.loihi import LOIHI, Convolution, LoihiLayer, LoihiNetwork, load, save, simulate
from spikeprop.errors import CheckpointError, InputError, RangeError
from spikeprop.neuron import NeuronState

LIMIT = 2**23
REGISTER_EDGES = [0, 1, -1, 25, 4095, 4096, -4097, LIMIT - 1, LIMIT, 1 - LIMIT, 2**30, -(2**30)]


def test_decay_rounds_towards_zero_at_the_register_edges() -> None:
    for keep in (0, 1, 163, 2048, 3933, 4095, 4096):
        decayed = LOIHI.decay(np.array(REGISTER_EDGES, np.int32), keep)
        assert decayed.tolist() == [int(math.copysign(abs(x) * keep // 4096, x)) for x in REGISTER_EDGES]


@given(st.integers(-(2**31) + 1, 2**31 - 1), st.integers(0, 4096))
def test_decay_equals_exact_division(value: int, keep: int) -> None:
    expected = abs(value) * keep // 4096
    assert int(LOIHI.decay(np.array([value], np.int32), keep)[0]) == (expected if value >= 0 else -expected)


def test_current_wraps_once() -> None:
    values = [LIMIT - 1, LIMIT, LIMIT + 1, 1 - LIMIT, -LIMIT, -LIMIT - 1, 3 * LIMIT + 5, -3 * LIMIT - 5]
    wrapped = [LIMIT - 1, LIMIT, 1 - LIMIT, 1 - LIMIT, LIMIT, LIMIT - 1, LIMIT + 5, -LIMIT - 5]
    assert LOIHI.current(np.array(values, np.int32)).tolist() == wrapped


def test_membrane_saturates() -> None:
    values = [LIMIT - 2, LIMIT - 1, LIMIT, 2 * LIMIT, 2 - LIMIT, 1 - LIMIT, -LIMIT, -2 * LIMIT]
    assert LOIHI.membrane(np.array(values, np.int32)).tolist() == [LIMIT - 2] + [LIMIT - 1] * 3 + [2 - LIMIT] + [1 - LIMIT] * 3


def random_network(
    seed: int, *, sizes: tuple[int, ...] = (7, 9, 5), inputs: loihi.LoihiNetwork | Any = "spikes"
) -> LoihiNetwork:
    """Registers drawn over much of their ranges, so that currents wrap and membranes saturate somewhere."""
    rng = np.random.default_rng(seed)
    layers = []
    for before, n in itertools.pairwise(sizes):
        per_neuron = n if rng.random() < 0.5 else None
        layers.append(
            LoihiLayer.build(
                rng.integers(-128, 128, (n, before)) * 2,
                du=rng.choice([4095, rng.integers(0, 4095)], per_neuron),
                dv=rng.integers(0, 4096, per_neuron),
                vth=rng.integers(0, rng.choice([500, 131072]), per_neuron),
                bias_mant=rng.integers(-4096, 4096, n),
                bias_exp=rng.integers(0, rng.choice([3, 8]), n),
                weight_exp=int(rng.choice([0, -2, 3])),
            )
        )
    return LoihiNetwork(tuple(layers), (sizes[0],), inputs, 8 if inputs == "graded" else 0)


def random_messages(network: LoihiNetwork, steps: int, batch: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, network.message_limit + 1, (steps, batch, *network.input_shape))


def plain(network: LoihiNetwork, messages: Any) -> tuple[list[Any], list[Any]]:
    """The equations once more, one Python integer at a time: spikes and pre-reset membranes."""
    arriving, all_spikes, all_membranes = messages, [], []
    for layer in network.layers:
        n = layer.outputs
        du, dv, vth = (np.broadcast_to(values, n).tolist() for values in (layer.du, layer.dv, layer.vth))
        spikes, membranes = np.zeros((*arriving.shape[:2], n), int), np.zeros((*arriving.shape[:2], n), int)
        for sample in range(arriving.shape[1]):
            u, v = [0] * n, [0] * n
            for step in range(len(arriving)):
                for i in range(n):
                    total = sum(int(w) * int(m) for w, m in zip(layer.weight[i], arriving[step, sample], strict=True))
                    total = math.floor(total * 2.0**layer.weight_exp)
                    current = int(math.copysign(abs(u[i]) * (4095 - du[i]) // 4096, u[i])) + 64 * total
                    u[i] = current - 2**24 if current > LIMIT else current + 2**24 if current <= -LIMIT else current
                    bias = int(layer.bias_mant[i]) * 2 ** int(layer.bias_exp[i])
                    membrane = int(math.copysign(abs(v[i]) * (4096 - dv[i]) // 4096, v[i])) + u[i] + bias
                    membranes[step, sample, i] = v[i] = max(1 - LIMIT, min(LIMIT - 1, membrane))
                    if v[i] > 64 * vth[i]:
                        spikes[step, sample, i], v[i] = 1, 0
        all_spikes.append(spikes)
        all_membranes.append(membranes)
        arriving = spikes
    return all_spikes, all_membranes


@pytest.mark.parametrize("inputs", ["spikes", "graded"])
def test_simulator_equals_the_equations_written_out(inputs: str) -> None:
    for seed in range(8):
        network = random_network(seed, inputs=inputs)
        messages = random_messages(network, 20, 2)
        result = simulate(network, messages, record="all")
        spikes, membranes = plain(network, messages)
        for layer in range(2):
            np.testing.assert_array_equal(result.spikes[layer], spikes[layer])
            np.testing.assert_array_equal(result.membranes[layer], membranes[layer])
            np.testing.assert_array_equal(result.membranes_after_reset[layer], membranes[layer] * (1 - spikes[layer]))
            np.testing.assert_array_equal(result.counts[layer], spikes[layer].sum(0))


def random_pictures(seed: int, inputs: Any) -> LoihiNetwork:
    """Two convolutions (strides, padding, groups, kernels that are not square) and a dense layer."""
    rng = np.random.default_rng(seed)
    first = Convolution((2, 7, 6), (1, 2), (int(rng.integers(0, 3)), 1), 1 + seed % 2)
    second_input = first.output_shape((4, 2 // first.groups, 3, 2))
    second = Convolution(second_input, (2, 1), (1, 2), 2)
    layers = []
    for convolution, kernel in ((first, (4, 2 // first.groups, 3, 2)), (second, (6, 2, 2, 3))):
        n = math.prod(convolution.output_shape(kernel))
        neurons = {"dv": rng.integers(0, 4096, n), "bias_mant": rng.integers(-500, 500, n), "du": int(rng.choice([4095, 900]))}
        weight = rng.integers(-128, 128, kernel) * 2
        layers.append(LoihiLayer.build(weight, vth=rng.integers(0, 900, n), convolution=convolution, **neurons))
    layers.append(LoihiLayer.build(rng.integers(-128, 128, (5, layers[-1].outputs)) * 2, vth=600, dv=200))
    return LoihiNetwork(tuple(layers), (2, 7, 6), inputs, 6 if inputs == "graded" else 0)


@pytest.mark.parametrize("inputs", ["spikes", "graded"])
def test_convolutions_equal_their_matrices(inputs: str) -> None:
    """torch's own conv2d, asked for the response to each single input, gives the matrix of a dense layer that does the same."""
    for seed in range(4):
        network = random_pictures(seed, inputs)
        dense = []
        for layer in network.layers:
            matrix = layer.weight
            if layer.convolution is not None:
                ones = torch.eye(layer.inputs, dtype=torch.float64).view(-1, *layer.input_shape)
                how = (layer.convolution.stride, layer.convolution.padding, 1, layer.convolution.groups)
                matrix = torch.conv2d(ones, torch.tensor(layer.weight, dtype=torch.float64), None, *how).flatten(1).T.numpy()
            registers = {name: getattr(layer, name) for name in ("du", "dv", "vth", "bias_mant", "bias_exp")}
            dense.append(LoihiLayer.build(matrix, **registers))
        twin = LoihiNetwork(tuple(dense), (2, 7, 6), network.inputs, network.num_message_bits)
        messages = random_messages(network, 12, 3, seed)
        spikes, membranes = plain(twin, messages.reshape(12, 3, -1))
        result = simulate(network, messages.reshape(12, 3, -1), record="all")
        for layer in range(3):
            assert spikes[layer].any()
            np.testing.assert_array_equal(result.spikes[layer], spikes[layer])
            np.testing.assert_array_equal(result.membranes[layer], membranes[layer])


@pytest.mark.parametrize("density", [0.02, 0.1, 0.5, 1.0])
def test_compiled_kernels_equal_the_reference(density: float) -> None:
    """Sparse inputs add up rows, dense ones are multiplied; all registers agree with plain numpy around the one neuron."""
    pytest.importorskip("numba")
    networks = [random_network(seed, sizes=(300, 40, 30)) for seed in range(6)]
    networks += [random_pictures(seed, "spikes") for seed in range(4)]
    for seed, network in enumerate(networks):
        features = math.prod(network.input_shape)
        messages = (np.random.default_rng(seed).random((15, 4, features)) < density).astype(int)
        fast, plainly = (simulate(network, messages, record="all", engine=engine) for engine in ("auto", "reference"))
        for name in ("spikes", "membranes", "currents", "counts"):
            for left, right in zip(getattr(fast, name), getattr(plainly, name), strict=True):
                assert left.dtype == right.dtype
                np.testing.assert_array_equal(left, right)
        for left, right in zip(fast.state, plainly.state, strict=True):
            np.testing.assert_array_equal(left.current, right.current)
            np.testing.assert_array_equal(left.membrane, right.membrane)


def test_more_rows_than_16_bits_hold() -> None:
    """2000 spikes through weights of -256 at once: partial sums are 16 bits, the whole is not."""
    network = LoihiNetwork((LoihiLayer.build(np.full((3, 20_000), -256), vth=0, dv=0),), (20_000,))
    messages = np.zeros((1, 1, 20_000), np.int8)
    messages[..., ::10] = 1
    assert simulate(network, messages, record="all").membranes[0].tolist() == [[[1 - LIMIT] * 3]]
    network = LoihiNetwork((LoihiLayer.build(np.full((3, 20_000), 254), vth=0, weight_exp=-4),), (20_000,))
    assert simulate(network, messages, record="all").membranes[0].tolist() == [[[2000 * 254 // 16 * 64] * 3]]


def test_registers_cannot_change_behind_a_simulators_back() -> None:
    mine = np.array([[2, 4]])
    layer = LoihiLayer.build(mine, vth=[1])
    network = LoihiNetwork((layer,), (2,))
    before = simulate(network, np.ones((3, 1, 2), int)).counts[0]
    for array in (layer.weight, layer.vth, layer.bias_mant):
        with pytest.raises(ValueError, match="read-only"):
            array[:] = 0  # type: ignore[index]
    mine[:] = 0
    np.testing.assert_array_equal(simulate(network, np.ones((3, 1, 2), int)).counts[0], before)
    assert network.prepared.keys() == {"auto"}


def test_without_numba_the_reference_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not loihi.Simulator(random_network(0)).layers[0].compiled


def test_blocks_stretches_and_constant_inputs_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    network = random_network(3)
    messages = np.broadcast_to(random_messages(network, 1, 11), (30, 11, 7))
    whole = simulate(network, messages.copy(), record="all")
    first = simulate(network, messages[:13], record="all")
    second = simulate(network, messages[13:], first.state, record="all")
    monkeypatch.setattr(loihi.simulator, "BLOCK_NUMBERS", 100)
    blocks = simulate(network, messages, record="all")
    for layer in range(2):
        for name in ("spikes", "membranes"):
            expected = getattr(whole, name)[layer]
            assert expected.any()
            np.testing.assert_array_equal(getattr(blocks, name)[layer], expected)
            np.testing.assert_array_equal(np.concatenate([getattr(part, name)[layer] for part in (first, second)]), expected)
        np.testing.assert_array_equal(blocks.state[layer].membrane, second.state[layer].membrane)
        np.testing.assert_array_equal(blocks.state[layer].current, second.state[layer].current)
        np.testing.assert_array_equal(simulate(network, messages, record="counts").counts[layer], whole.counts[layer])


def test_sums_beyond_float32_stay_exact() -> None:
    """16 * 128 * 2**15 + 2 * 3 = 2**26 + 6, which float32 would round to 2**26 + 8, one more after the exponent."""
    layer = LoihiLayer.build([[128] * 16 + [2]], vth=0, weight_exp=-2)
    network = LoihiNetwork((layer,), (17,), "graded", 16)
    state = simulate(network, [[[2**15] * 16 + [3]]]).state[0]
    assert state.current.item() == 64 * (2**24 + 1) - 2**24


@pytest.mark.parametrize(("weight", "matches"), [(10, True), (9, False), (11, False), (8, False), (12, False)])
def test_loihi_2_trace(weight: int, matches: bool) -> None:
    """One neuron, 1000 steps, recorded on Loihi 2 and in Lava by the NIR paper; both delay the input by one step."""
    folder = Path(os.environ.get("SPIKEPROP_DATA", "data")) / "nir-lif"
    if not folder.is_dir():
        pytest.skip(f"the stored Loihi 2 trace is not in {folder}; set SPIKEPROP_DATA")
    drive, voltage, _ = np.genfromtxt(folder / "lif_lava_cpu_fixed.csv", delimiter=",").T
    chip_drive, _, chip_spikes = np.genfromtxt(folder / "lif_lava_loihi_fixed.csv", delimiter=",").T
    np.testing.assert_array_equal(drive, chip_drive)
    # Twice the weight, halved by the exponent: odd weights are not on the grid of signed 8 bits.
    layer = LoihiLayer.build([[2 * weight]], weight_exp=-1, du=4095, dv=163, vth=25)
    delayed = np.concatenate([[0], drive[:-1]]).astype(int).reshape(-1, 1, 1)
    result = simulate(LoihiNetwork((layer,), (1,)), delayed, record="all")
    wrong_voltages = int((result.membranes_after_reset[0].ravel() != voltage).sum())
    wrong_spikes = int((result.spikes[0].ravel() != chip_spikes).sum())
    assert (wrong_voltages == 0) == matches
    assert (wrong_spikes == 0) == matches
    assert not matches or np.flatnonzero(result.spikes[0]).tolist() == [461, 511, 711, 761]


@pytest.mark.parametrize(
    ("registers", "message"),
    [
        ({"du": 5000}, "layer 1: current decay du 5000 exceeds Loihi's 12-bit limit 4095; keep alpha"),
        ({"du": -1}, "layer 1: current decay du -1 is below Loihi's lower limit 0"),
        ({"dv": [0, 4096]}, "layer 1: membrane decay dv 4096 exceeds Loihi's 12-bit limit 4095; keep beta"),
        ({"vth": 300000}, "layer 1: threshold 300000 exceeds Loihi's 17-bit limit 131071; lower the threshold"),
        ({"vth": -1}, "layer 1: threshold -1 is below"),
        ({"bias_mant": 4096}, "layer 1: bias mantissa 4096 exceeds Loihi's 13-bit limit 4095"),
        ({"bias_exp": 8}, "layer 1: bias exponent 8 exceeds Loihi's 3-bit limit 7"),
        ({"weight": [[256, 0], [0, 0]]}, "layer 1: weight 256 lies outside Loihi's -256 to 254; rescale"),
        ({"weight": [[3, 0], [0, 0]]}, "layer 1: 8-bit signed weights are multiples of 2"),
        ({"weight": [[30, 0], [0, 0]], "weight_bits": 4}, "layer 1: 4-bit signed weights are multiples of 32"),
        ({"weight_exp": 0.5}, r"layer 1: weight exponent 0\.5 is no whole number; round it"),
        ({"weight_bits": 7.5}, r"layer 1: weight bits 7\.5 is no whole number"),
        ({"weight_exp": -9}, "layer 1: weight exponent -9 is below Loihi's lower limit -8"),
        ({"weight": [[2, 0, 0], [0, 0, 0]]}, "layer 1: its weights take 3 inputs but 2 arrive"),
        ({"dv": [1, 2, 3]}, r"layer 1: dv has shape \(3,\)"),
        ({"dv": 0.5}, "whole numbers"),
        ({"weight": [1, 2]}, r"weight must be \[outputs, inputs\]"),
    ],
)
def test_every_register_is_checked(registers: dict[str, Any], message: str) -> None:
    with pytest.raises((RangeError, InputError), match=message):
        LoihiNetwork((LoihiLayer.build(**{"weight": [[2, 4], [6, 8]], "vth": 100, **registers}),), (2,))


PLACE = Convolution((2, 4, 4))


@pytest.mark.parametrize(
    ("kernel", "arguments", "message"),
    [
        ((1, 2, 3, 3), {"weight_exp": -1}, "layer 1: weight exponent -1 of a convolution, which Lava ignores; use 0"),
        ((1, 1, 3, 3), {}, r"a kernel of shape \(1, 1, 3, 3\) in 1 groups does not fit 2 channels"),
        ((3, 1, 3, 3), {"convolution": Convolution((2, 4, 4), groups=2)}, r"in 2 groups does not fit 2 channels"),
        ((1, 2, 5, 3), {}, r"a kernel of 5 x 3 is larger than the padded input \(2, 4, 4\)"),
        ((2, 3), {}, r"weight must be \[C_out, C_in / groups, height, width\]"),
        ((1, 2, 3, 3), {"dv": [1, 2]}, r"layer 1: dv has shape \(2,\), expected one number or \(4,\)"),
    ],
)
def test_convolutions_are_checked(kernel: tuple[int, ...], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((RangeError, InputError), match=message):
        LoihiNetwork((LoihiLayer.build(np.full(kernel, 2), **{"vth": 9, "convolution": PLACE, **arguments}),), (2, 4, 4))


def test_sums_that_a_convolution_clamps_are_refused() -> None:
    layer = LoihiLayer.build(np.full((1, 2, 3, 3), 254), vth=9, convolution=PLACE)
    with pytest.raises(RangeError, match=r"layer 1: sums of up to 3e\+08 do not fit 24 bits; use fewer message bits"):
        LoihiNetwork((layer,), (2, 4, 4), "graded", 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inputs": "grade"}, "inputs = 'grade' is none of"),
        (
            {"inputs": "graded", "num_message_bits": 4, "input_low": 3.0, "input_high": 3.0},
            "input range 3.0 to 3.0: the second",
        ),
        ({"inputs": "graded", "num_message_bits": 4, "input_high": math.inf}, "both finite"),
    ],
)
def test_input_coding_is_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        LoihiNetwork((LoihiLayer.build([[2, 4]], vth=1),), (2,), **arguments)


def test_simulate_refuses_what_is_no_message() -> None:
    network = random_network(0)
    for wrong, message in (
        (np.zeros((3, 2, 6), int), r"shape \(3, 2, 6\), expected \[T, B, 7\]"),
        (np.zeros((3, 2, 7)), "messages are float64, expected integers"),
        (np.full((3, 2, 7), 2), "reach from 2 to 2, expected 0 to 1"),
    ):
        with pytest.raises(InputError, match=message):
            simulate(network, wrong)
    state = simulate(network, np.zeros((3, 2, 7), int)).state
    with pytest.raises(InputError, match="not that of 4 samples"):
        simulate(network, np.zeros((3, 4, 7), int), state)
    current, membrane = (np.zeros((2, n), np.int32) for n in (9, 9))
    for broken, message in (  # the compiled kernels would read beyond the array
        ([NeuronState(current[:1, :1], membrane), state[1]], "not that of 2 samples"),
        ([NeuronState(current.astype(float), membrane), state[1]], "not that of 2 samples"),
        (state[:1], "not that of 2 samples"),
        ([NeuronState(current + 2**23 + 1, membrane), state[1]], "beyond the 24-bit registers"),
    ):
        with pytest.raises(InputError, match=message):
            simulate(network, np.zeros((3, 2, 7), int), broken)
    with pytest.raises(InputError, match="record = 'al' is none of"):
        simulate(network, np.zeros((3, 2, 7), int), record="al")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="engine = 'fast' is neither 'auto' nor 'reference'"):
        loihi.Simulator(network, engine="fast")  # type: ignore[arg-type]


def test_saved_network_is_the_same(tmp_path: Path) -> None:
    for saved in (random_network(5, inputs="graded"), random_network(6), random_pictures(1, "graded")):
        save(saved, tmp_path / "chip.npz")
        loaded = load(tmp_path / "chip.npz")
        assert [layer.convolution for layer in loaded.layers] == [layer.convolution for layer in saved.layers]
        messages = random_messages(saved, 10, 3).reshape(10, 3, -1)
        for left, right in zip(simulate(saved, messages).spikes, simulate(loaded, messages).spikes, strict=True):
            np.testing.assert_array_equal(left, right)
        assert loaded.report == saved.report
        assert (loaded.input_low, loaded.input_high, loaded.input_shape) == (
            saved.input_low,
            saved.input_high,
            saved.input_shape,
        )
    assert os.listdir(tmp_path) == ["chip.npz"]


def test_files_of_version_1_still_load(tmp_path: Path) -> None:
    network, path = random_network(6), tmp_path / "chip.npz"
    save(network, path)
    with np.load(path) as archive:
        arrays = dict(archive)
    metadata = json.loads(str(arrays["metadata"])) | {"version": 1}
    for layer in metadata["layers"]:
        del layer["convolution"]
    np.savez(path, **{**arrays, "metadata": np.array(json.dumps(metadata))})
    messages = random_messages(network, 10, 3)
    for left, right in zip(simulate(load(path), messages).spikes, simulate(network, messages).spikes, strict=True):
        np.testing.assert_array_equal(left, right)


def test_load_refuses(tmp_path: Path) -> None:
    path = tmp_path / "chip.npz"
    with pytest.raises(CheckpointError, match="no such file"):
        load(path)
    save(random_network(0), path)
    whole = path.read_bytes()
    for content in (b"", b"hello", whole[: len(whole) // 2], whole[:-1], whole[:200] + b"\0" * 50 + whole[250:]):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"chip\.npz: not a Loihi network saved by spikeprop, or damaged"):
            load(path)
    np.savez(path, weights=np.zeros(3))
    with pytest.raises(CheckpointError, match="not a Loihi network"):
        load(path)
    np.savez(path, metadata=np.array(json.dumps({"format": "other"})))
    with pytest.raises(CheckpointError, match="not a Loihi network"):
        load(path)
    np.savez(path, metadata=np.array(json.dumps({"format": loihi.network.FORMAT, "version": 99})))
    with pytest.raises(CheckpointError, match="version 99"):
        load(path)


def test_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "chip.npz"
    save(random_network(0), path)
    before = path.read_bytes()

    def full(file: Any, **_: Any) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(CheckpointError, match=r"chip\.npz could not be written \(No space left on device\)"):
        save(random_network(1), path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["chip.npz"]
