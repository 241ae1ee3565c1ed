"""The integer simulator, the quantiser and the file format. What Lava itself says is in test_lava.py."""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spikeprop.backends import loihi, loihi_network
from spikeprop.backends.loihi import LOIHI, LoihiLayer, LoihiNetwork, load, save, simulate
from spikeprop.backends.parity import compare
from spikeprop.errors import CheckpointError, InputError, RangeError

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


def test_blocks_stretches_and_constant_inputs_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    network = random_network(3)
    messages = np.broadcast_to(random_messages(network, 1, 11), (30, 11, 7))
    whole = simulate(network, messages.copy(), record="all")
    first = simulate(network, messages[:13], record="all")
    second = simulate(network, messages[13:], first.state, record="all")
    monkeypatch.setattr(loihi, "BLOCK_NUMBERS", 100)
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


def test_saved_network_is_the_same(tmp_path: Path) -> None:
    for saved in (random_network(5, inputs="graded"), random_network(6)):
        save(saved, tmp_path / "chip.npz")
        loaded = load(tmp_path / "chip.npz")
        messages = random_messages(saved, 10, 3)
        for left, right in zip(simulate(saved, messages).spikes, simulate(loaded, messages).spikes, strict=True):
            np.testing.assert_array_equal(left, right)
        assert loaded.report == saved.report
        assert (loaded.input_low, loaded.input_high, loaded.input_shape) == (
            saved.input_low,
            saved.input_high,
            saved.input_shape,
        )
    assert os.listdir(tmp_path) == ["chip.npz"]


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
    np.savez(path, metadata=np.array(json.dumps({"format": loihi_network.FORMAT, "version": 99})))
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


def test_compare() -> None:
    left, right = np.array([[[1, 0, 1]]]), np.array([[[1, 1, 0]]])
    assert compare([left, left], [left, right]) == [{"spikes": 2, "differing": 0}, {"spikes": 2, "differing": 2}]
    with pytest.raises(InputError, match="layer 1: cannot compare spikes of shape"):
        compare([left], [right[0]])
    with pytest.raises(InputError, match="1 layers with 2"):
        compare([left], [left, right])
