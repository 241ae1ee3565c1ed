"""Comparing engines: the counts, the report of a network, and what it asks of the hardware."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from spikeprop.backends import lava, loihi, parity
from spikeprop.backends.loihi import Convolution, LoihiLayer, LoihiNetwork
from spikeprop.backends.nir import peers
from spikeprop.errors import BackendError, InputError
from spikeprop.models import conv, mlp
from spikeprop.network import Network
from spikeprop.neuron import LIF


def test_compare() -> None:
    left, right = np.array([[[1, 0, 1]]]), np.array([[[1, 1, 0]]])
    assert parity.compare([left, left], [left, right]) == [{"spikes": 2, "differing": 0}, {"spikes": 2, "differing": 2}]
    with pytest.raises(InputError, match="layer 1: cannot compare spikes of shape"):
        parity.compare([left], [right[0]])
    with pytest.raises(InputError, match="1 layers with 2"):
        parity.compare([left], [left, right])


@pytest.fixture(scope="module")
def case() -> tuple[Network, loihi.LoihiNetwork, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    network = mlp((1, 6, 6), [20, 15], 4, seed=1)
    network.input_mean += 0.4
    network.readout.weight += torch.randn(4, 15, generator=generator)
    x = torch.rand(12, 1, 6, 6, generator=generator).expand(10, 12, 1, 6, 6)
    return network, loihi.quantize(network), x, torch.arange(12) % 4


@pytest.mark.skipif(not (peers.available("snntorch") and peers.available("norse")), reason="no snnTorch or Norse")
def test_report_of_every_engine(case: Any) -> None:
    """The counts against the engines run by hand; Lava and the NIR round trip have nothing to differ by."""
    network, chip, x, labels = case
    found = json.loads(json.dumps(parity.report(network, chip, x, labels, timeout=120)))
    assert (found["samples"], found["num_steps"]) == (12, 10)
    ran = set(parity.ENGINES) - (set() if lava.available() else {"lava"})
    assert set(found["engines"]) == ran and set(found["not_run"]) == set(parity.ENGINES) - ran
    activities = network.run(x)
    result = loihi.simulate(chip, loihi.encode(chip, x), record="all")
    pairs = {(pair["reference"], pair["other"]): pair for pair in found["comparisons"]}
    for index, layer in enumerate(pairs["float", "integer"]["layers"]):
        real, integer = activities[index].spikes.numpy(), result.spikes[index]
        per_step = (real != integer).sum((1, 2))
        assert layer["differing_per_step"] == per_step.tolist() and layer["differing"] == per_step.sum() > 0
        assert layer["first_differing_step"] == np.flatnonzero(per_step)[0] + 1
        after = activities[index].membrane.numpy() * (1 - real)
        apart = np.abs(after - result.membranes_after_reset[index] / 64 / chip.layers[index].scale).max()
        assert layer["largest_membrane_difference"] == pytest.approx(apart)
        sample = found["sample"]["layers"][index]
        assert len(sample["both"]) + len(sample["only_float"]) == real[:, 0].sum()
        assert len(sample["both"]) + len(sample["only_integer"]) == integer[:, 0].sum()
    exact = [("float", "nir"), ("float", "snntorch"), ("float", "norse"), *([("integer", "lava")] if lava.available() else [])]
    for pair in exact:
        assert pairs[pair]["differing_spikes"] == 0 and pairs[pair]["prediction_agreement"] == 1
        assert all(layer["first_differing_step"] is None and layer["spikes"] > 0 for layer in pairs[pair]["layers"])
        tolerance = 0 if pair[1] in ("lava", "nir") else 1e-4
        assert max(layer["largest_membrane_difference"] for layer in pairs[pair]["layers"]) <= tolerance
    counts = torch.from_numpy(result.counts[-1])
    predicted = network.readout(counts / 10).argmax(1)
    assert found["engines"]["integer"]["accuracy"] == pytest.approx(float((predicted == labels).double().mean()))
    real = network.readout(activities[-1].spikes.mean(0)).argmax(1)
    assert pairs["float", "integer"]["prediction_agreement"] == pytest.approx(float((predicted == real).double().mean()))


def test_accuracy_lost_to_input_rounding_is_that_of_the_rounded_inputs(case: Any) -> None:
    network, _, x, labels = case
    coarse = loihi.quantize(network, num_message_bits=1)
    found = parity.report(network, coarse, x, labels, engines=["integer"])["input_rounding"]
    rates = [network.run(inputs)[-1].spikes.mean(0) for inputs in (x, (x >= 0.5).float())]
    exact, rounded = (float((network.readout(rate).argmax(1) == labels).double().mean()) for rate in rates)
    assert found == pytest.approx({"accuracy": rounded, "lost": exact - rounded})
    assert exact != rounded


def test_what_an_engine_cannot_take_is_reported() -> None:
    """A bias that differs within a channel has no place in snnTorch; the other engines still run."""
    network = conv((1, 6, 6), [3], 4, kernel_size=3, stride=1, pool=2, hidden=[6], neuron=LIF(0.9), seed=0)
    network.input_mean += 0.5
    x = torch.rand(3, 1, 6, 6, generator=torch.Generator().manual_seed(0)).expand(5, 3, 1, 6, 6)
    found = parity.report(network, loihi.quantize(network), x, torch.arange(3), engines=["snntorch", "nir"])
    assert "snntorch" in found["not_run"] and found["not_run"]["snntorch"].startswith("snntorch")
    assert set(found["engines"]) == {"float", "integer", "nir"}


def test_refusals(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    network, chip, x, labels = case
    with pytest.raises(InputError, match="engine 'loihi' is none of float, integer"):
        parity.report(network, chip, x, labels, engines=["loihi"])
    with pytest.raises(InputError, match="11 labels for 12 samples"):
        parity.report(network, chip, x, labels[:11])
    monkeypatch.setattr(lava, "available", lambda: False)
    assert "pip install" in parity.report(network, chip, x, labels, engines=["lava"])["not_run"]["lava"]
    with pytest.raises(BackendError, match="Lava is not installed"):
        parity.record("lava", network, chip, x)


# --- Hardware ----------------------------------------------------------------------------------------------------------------


def matrix(layer: LoihiLayer) -> Any:
    """The layer's weights as torch's own conv2d spreads them, ``[outputs, inputs]``."""
    if layer.convolution is None:
        return layer.weight
    ones = torch.eye(layer.inputs, dtype=torch.float64).view(-1, *layer.input_shape)
    how = (layer.convolution.stride, layer.convolution.padding, 1, layer.convolution.groups)
    return torch.conv2d(ones, torch.tensor(layer.weight, dtype=torch.float64), None, *how).flatten(1).T.numpy()


@pytest.mark.parametrize("convolution", [None, Convolution((4, 6, 5), (2, 1), (1, 2), 2)])
def test_account_against_the_written_out_matrix(convolution: Convolution | None) -> None:
    rng = np.random.default_rng(0)
    shape = (7, 120) if convolution is None else (6, 2, 3, 2)
    first = LoihiLayer.build(rng.integers(-2, 3, shape) * 2, vth=20, convolution=convolution)
    second = LoihiLayer.build(rng.integers(-1, 2, (5, first.outputs)) * 32, vth=9, weight_bits=4)
    network = LoihiNetwork((first, second), (4, 6, 5) if convolution else (120,), "graded", 3)
    messages = rng.integers(0, 8, (6, 3, 120)) * (rng.random((6, 3, 120)) < 0.3)
    found = loihi.account(network, messages)
    arriving = messages
    for layer, counted in zip(network.layers, found["layers"], strict=True):
        present = matrix(layer) != 0
        assert counted["neurons"] == len(present) and counted["synapses"] == present.sum()
        assert counted["fan_in"] == {"mean": pytest.approx(present.sum(1).mean()), "largest": present.sum(1).max()}
        assert counted["fan_out"] == {"mean": pytest.approx(present.sum(0).mean()), "largest": present.sum(0).max()}
        events = (arriving != 0).sum((0, 1)) / 3
        assert counted["events_in"] == pytest.approx(events.sum())
        assert counted["synaptic_operations"] == pytest.approx((present.sum(0) * events).sum())
        assert counted["weight_memory_bits"] == layer.weight.size * layer.weight_bits
        arriving = loihi.simulate(network, messages).spikes[0]
    dense = network.layers[0] if convolution is None else first
    ones = LoihiLayer.build(np.full(dense.weight.shape, 2), vth=1, convolution=convolution)
    assert found["layers"][0]["dense_macs"] == (matrix(ones) != 0).sum()
    assert found["layers"][0]["dense_macs_all_steps"] == 6 * found["layers"][0]["dense_macs"]
    spikes = loihi.simulate(network, messages).spikes
    assert [layer["spikes"] for layer in found["layers"]] == [pytest.approx(layer.sum() / 3) for layer in spikes]
    for name, total in found["total"].items():
        assert total == pytest.approx(sum(layer[name] for layer in found["layers"]))
