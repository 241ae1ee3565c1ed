"""The quantiser: what it makes of a network, and what it refuses."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from spikeprop.backends.loihi import LoihiNetwork, encode, quantize, simulate
from spikeprop.backends.loihi.network import project
from spikeprop.backends.loihi.quantize import _lower
from spikeprop.errors import InputError, RangeError, SpikepropError, UnsupportedError
from spikeprop.models import conv, mlp
from spikeprop.network import Network
from spikeprop.neuron import LIF, Rate
from spikeprop.synapse import AvgPool2d, Chain, Conv2d, Dense, Flatten, Synapse


def dense_network(
    sizes: tuple[int, ...] = (30, 20, 10), *, neuron: LIF | Rate | None = None, gain: float = 2.0, seed: int = 0
) -> Network:
    generator = torch.Generator().manual_seed(seed)
    neuron = neuron or LIF(0.9, 1.0)
    pairs = [(Dense(a, b, gain=gain, generator=generator), neuron) for a, b in itertools.pairwise(sizes)]
    return Network((sizes[0],), pairs, sizes[-1])


@pytest.mark.parametrize("alpha", [0.0, 0.6])
@pytest.mark.parametrize("inputs", ["graded", "spikes"])
def test_quantised_network_follows_the_real_one(alpha: float, inputs: Any) -> None:
    """Against the float network with the rounded weights, decays and inputs, only the rounding of registers remains."""
    beta, low, high = 3687 / 4096, (0.0 if alpha else -1.0), 3.0
    alpha = round(alpha * 4096) / 4096
    network = dense_network(neuron=LIF(beta, torch.full((10,), 1.5), alpha=alpha), sizes=(30, 10))
    network.input_mean += 0.3
    network.layers[0].bias += torch.randn(10, generator=torch.Generator().manual_seed(1)) * 0.1
    chip = quantize(network, inputs=inputs, input_range=(low, high))
    x = torch.rand(6, 5, 30, generator=torch.Generator().manual_seed(2)) * (high - low) + low
    x = x if inputs == "graded" else (x > 1).float()
    messages = encode(chip, x)
    real = network.double()
    weight = chip.layers[0].weight * np.abs(real.layers[0].synapse.weight.numpy()).max() / 254
    real.layers[0].synapse.weight.copy_(torch.from_numpy(weight))
    step = (high - low) / chip.message_limit if inputs == "graded" else 1.0
    offset = low if inputs == "graded" else 0.0
    spikes, membrane = real.run(torch.from_numpy(messages * step + offset))[0]
    result = simulate(chip, messages, record="all")
    assert spikes.sum() > 10
    np.testing.assert_array_equal(result.spikes[0], spikes.numpy())
    unit = 64 * chip.layers[0].scale
    # The sum of a step is floored to 1/S, the memories multiply that; the bias is rounded to 2**exponent of the register.
    tolerance = (64 + 2.0 ** int(chip.layers[0].bias_exp.max()) + 1) / unit / (1 - alpha) / (1 - beta)
    assert np.abs(result.membranes[0] / unit - membrane.numpy()).max() < tolerance < 0.2


def test_a_model_is_quantised_as_it_comes() -> None:
    """Pictures are flattened, parameters stay per neuron, centring goes into the biases: read back, the registers agree."""
    generator = torch.Generator().manual_seed(0)
    neuron = LIF(torch.rand(64, generator=generator) * 0.1 + 0.85, torch.rand(64, generator=generator) + 0.5)
    network = mlp((1, 8, 8), [64, 64], 10, neuron=neuron, seed=0).double()
    network.input_mean += 0.3
    network.layers[0].rate += 0.05
    network.layers[1].bias += 0.1
    x = torch.rand(50, 1, 8, 8, generator=generator)
    chip = quantize(network)
    messages = encode(chip, x, 8)
    read_back = []
    for index, layer in enumerate(chip.layers):
        assert np.shape(layer.dv) == np.shape(layer.vth) == (64,)
        beta, threshold = (torch.from_numpy(np.asarray(v)) for v in (1 - layer.dv / 4096, layer.vth / layer.scale))
        np.testing.assert_allclose(layer.bias / layer.scale / 64, network.fold_bias(index), atol=0.02)
        bias = torch.from_numpy(layer.bias / layer.scale / 64)
        read_back.append((Dense(64, 64), LIF(beta, threshold, bias=bias)))
    twin = Network((64,), read_back, 10, centred=False).double()
    for layer, real, original in zip(chip.layers, twin.layers, network.layers, strict=True):
        weight = original.synapse.parts[1].weight if hasattr(original.synapse, "parts") else original.synapse.weight
        real.synapse.weight.copy_(torch.from_numpy(layer.weight / 254) * weight.abs().max())
        assert (real.synapse.weight - weight).abs().max() <= weight.abs().max() / 254
    for activity, integer in zip(twin.run(torch.from_numpy(messages / 255)), simulate(chip, messages).spikes, strict=True):
        assert activity.spikes.sum() > 500
        assert np.abs(activity.spikes.numpy() - integer).sum() < 0.02 * activity.spikes.sum().item()


def test_accuracy_survives_quantising() -> None:
    """Digits, through 256 random LIF neurons and a ridge readout on their spike counts: 8 bits cost at most half a point."""
    from sklearn.datasets import load_digits

    pictures, labels = load_digits(return_X_y=True)
    pictures = torch.from_numpy(pictures / 16).float()
    network = dense_network((64, 256), gain=2.5)
    network.input_mean += pictures[:1200].mean(0)
    network.layers[0].bias += 0.1
    chip = quantize(network)
    counts = {"float": network.run(pictures.expand(16, -1, -1))[0].spikes.sum(0).numpy()}
    counts["integer"] = simulate(chip, encode(chip, pictures, 16), record="counts").counts[0]
    train = np.c_[counts["float"][:1200], np.ones(1200)]
    readout = np.linalg.solve(train.T @ train + 10 * np.eye(257), train.T @ np.eye(10)[labels[:1200]])
    accuracy = {
        name: float(((np.c_[count, np.ones(len(count))] @ readout).argmax(1) == labels)[1200:].mean())
        for name, count in counts.items()
    }
    assert accuracy["float"] > 0.9
    assert accuracy["integer"] > accuracy["float"] - 0.005
    differing = np.abs(counts["float"] - counts["integer"]).sum() / counts["float"].sum()
    assert differing < 0.03


SYNAPSES = {
    "dense": ((7,), Dense(7, 5), False),
    "stride, padding, groups": ((4, 7, 6), Conv2d(4, 6, 3, stride=2, padding=1, groups=2), True),
    "pooling alone": ((3, 7, 8), AvgPool2d(2), True),
    "flattening alone": ((2, 3, 2), Flatten(), False),
    "pooling, then a convolution": ((2, 9, 8), Chain(AvgPool2d(2), Conv2d(2, 3, 2, stride=2)), True),
    "pooling, then a padded convolution": (
        (2, 8, 12),
        Chain(AvgPool2d(2), AvgPool2d(2), Conv2d(2, 4, 3, padding=1, groups=2)),
        True,
    ),
    "pooling with a rest, then a padded one": ((2, 9, 8), Chain(AvgPool2d(2), Conv2d(2, 3, 3, padding=1)), False),
    "a convolution, then pooling": ((2, 11, 9), Chain(Conv2d(2, 3, 3, stride=2, padding=2), AvgPool2d(2), AvgPool2d(2)), True),
    "pooling on both sides": ((1, 12, 12), Chain(AvgPool2d(2), Conv2d(1, 2, 3, padding=1), AvgPool2d(3)), True),
    "pooling, flattening, dense": ((2, 5, 4), Chain(AvgPool2d(2), Flatten(), Dense(8, 3)), False),
    "a convolution, then flattening": ((1, 5, 4), Chain(Conv2d(1, 2, 2), Flatten()), False),
}


@pytest.mark.parametrize(("shape", "synapse", "is_kernel"), SYNAPSES.values(), ids=SYNAPSES)
def test_every_synapse_becomes_one_kernel_or_matrix(shape: tuple[int, ...], synapse: Synapse, is_kernel: bool) -> None:
    """The lowered weights do to random inputs what the synapse does."""
    layer = Network(shape, [(synapse, LIF())], 2).double().layers[0]
    weight, convolution = _lower("layer 1", layer)
    x = torch.randn(6, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(project(weight, convolution, x.flatten(1).numpy()), synapse(x).flatten(1).numpy(), atol=1e-12)
    assert (convolution is not None) == is_kernel


@pytest.mark.parametrize("inputs", ["graded", "spikes"])
def test_a_convolutional_model_is_quantised_as_it_comes(inputs: Any) -> None:
    """Centring under zero padding is a bias that differs at the borders; with it, the chip spikes as the network does."""
    generator = torch.Generator().manual_seed(0)
    network = conv(
        (1, 8, 8), [4, 6], 10, kernel_size=3, stride=1, pool=2, hidden=[20], neuron=LIF(0.9, 0.7), biases="channel", seed=0
    ).double()
    network.input_mean += torch.rand(1, 8, 8, generator=generator)
    for layer in network.layers:
        layer.rate += torch.rand(layer.rate.shape, generator=generator) * 0.1
        layer.bias += torch.randn(layer.bias.shape, generator=generator) * 0.05
    low = -0.5 if inputs == "graded" else 0.0
    x = torch.rand(16, 20, 1, 8, 8, generator=generator) * 1.5 + low
    x = x.double() if inputs == "graded" else (x > 0.7).double()
    chip = quantize(network, inputs=inputs, input_range=(low, 1.0))
    assert [layer.report["synapse"] for layer in chip.layers] == ["conv", "conv", "dense"]
    assert chip.layers[0].weight_exp == 0
    for index, layer in enumerate(chip.layers[1:], 1):
        bias = layer.bias / layer.scale / 64
        np.testing.assert_allclose(bias, network.fold_bias(index).flatten(), atol=0.02)
        if layer.convolution is not None:
            maps = bias.reshape(layer.output_shape)
            assert np.abs(maps[:, 0, 0] - maps[:, 1, 1]).max() > 0.02  # far more than rounding: a corner is not the middle
    messages = encode(chip, x)
    for index, (activity, layer) in enumerate(zip(network.run(x), chip.layers, strict=True)):  # each on the same input
        coding = (chip.inputs, chip.num_message_bits, chip.input_low, chip.input_high) if index == 0 else ("spikes",)
        ours = simulate(LoihiNetwork((layer,), layer.input_shape, *coding), messages).spikes[0]
        expected = activity.spikes.flatten(2).numpy()
        assert expected.sum() > 300
        assert np.abs(expected - ours).sum() < 0.08 * expected.sum()  # a spike one step late counts twice
        messages = expected.astype(np.int8)


@pytest.mark.parametrize("alpha", [0.0, 0.9])
def test_no_message_can_wrap_the_current(alpha: float) -> None:
    """The worst message there is, held for long: the current register equals the one that a wider register would hold."""
    network = dense_network((400, 30), neuron=LIF(0.9, 1.0, alpha=alpha))
    chip = quantize(network)
    layer = chip.layers[0]
    assert layer.report["current_use"] <= 1 and layer.weight_exp <= 0
    for sign in (1, -1):
        messages = np.where(layer.weight * sign > 0, chip.message_limit, 0).astype(int)  # one sample per neuron, the diagonal
        state = simulate(chip, np.broadcast_to(messages, (300, 30, 400))).state[0]
        sums = (messages * layer.weight.astype(int)).sum(1) >> -layer.weight_exp
        expected = 64 * sums * 4096 / (np.asarray(layer.du) + 1)
        reached = np.diag(state.current)
        assert (np.sign(reached) == sign).all()
        assert np.abs(reached - expected).max() < 4096 / (np.asarray(layer.du) + 1).min() + 1


def test_a_wide_convolution_gets_coarser_weights() -> None:
    """Lava's convolution has no exponent to shift a sum; its weights shrink until nothing can wrap, and the report says so."""
    generator = torch.Generator().manual_seed(0)
    network = Network((600, 3, 3), [(Conv2d(600, 2, 2, generator=generator), LIF(0.9, 2.0))], 5)
    layer = quantize(network, inputs="spikes").layers[0]
    assert layer.weight_exp == 0
    assert 0.4 < layer.report["current_use"] <= 1
    assert 0.006 < layer.report["weight_error"] < 0.1
    with pytest.raises(RangeError, match=r"layer 1: the inputs can send \S+ in a step.* wraps, even 256 times smaller"):
        quantize(Network((600, 3, 3), [(Conv2d(600, 2, 2), LIF(alpha=0.999))], 5), num_message_bits=12)


def test_what_netx_can_say() -> None:
    """No weight exponent and biases in multiples of 64, paid for with coarser weights and messages; nothing can wrap."""
    network = dense_network((200, 20, 10))
    network.input_mean += 0.5
    free, bound = quantize(network), quantize(network, target="netx")
    assert free.layers[0].weight_exp < 0 and [layer.weight_exp for layer in bound.layers] == [0, 0]
    assert free.layers[0].report["weight_error"] < bound.layers[0].report["weight_error"] < 0.1
    assert 2 <= bound.num_message_bits < 8
    for layer in bound.layers:
        assert set(layer.bias_exp.tolist()) == {6} and layer.report["current_use"] <= 1
    for layer, wanted in zip(bound.layers, free.layers, strict=True):
        np.testing.assert_allclose(layer.bias / layer.scale, wanted.bias / wanted.scale, atol=64 * 0.1)
    with pytest.raises(InputError, match="target = 'chip' is none of lava, netx"):
        quantize(network, target="chip")  # type: ignore[arg-type]


def test_fewer_message_bits_where_eight_do_not_fit() -> None:
    network = dense_network((2000, 4), neuron=LIF(0.9, 1.0, alpha=0.8))
    network.layers[0].synapse.weight.fill_(0.1)
    chip = quantize(network)
    assert chip.num_message_bits == 3 and chip.report["num_message_bits"] == 3
    with pytest.raises(RangeError, match=r"^layer 1: the inputs can send .* exceeds .*24-bit current wraps.*use fewer message"):
        quantize(network, num_message_bits=8)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weights_lie_on_the_grid_and_the_error_shrinks_with_bits(bits: int) -> None:
    network = dense_network()
    chip = quantize(network, bits)
    step = 2 ** (9 - bits)
    for layer in chip.layers:
        assert not (layer.weight % step).any() and layer.weight.min() >= -256 and layer.weight.max() <= 256 - step
        assert layer.report["weight_error"] < 1.2 * 0.5 ** (bits - 1)
    assert bits < 8 or sum(layer.report["clipped_weights"] for layer in chip.layers) == 0
    json.dumps(chip.report)


def flawed(change: Any) -> Network:
    network = dense_network()
    change(network)
    return network


REFUSALS = {
    "subtract": (
        dense_network(neuron=LIF(reset_mechanism="subtract")),
        UnsupportedError,
        "layer 1: reset_mechanism 'sub",
    ),
    "no reset": (dense_network(neuron=LIF(reset_mechanism="none")), UnsupportedError, "layer 1: reset_mechanism 'none'.*train"),
    "rate": (dense_network(neuron=Rate()), UnsupportedError, "layer 1: Rate neurons do not spike.*LIF"),
    "unknown synapse": (
        flawed(lambda n: setattr(n.layers[1], "synapse", torch.nn.Bilinear(2, 2, 2))),
        UnsupportedError,
        "layer 2: a Bilinear synapse has no form on Loihi; use Dense, Conv2d",
    ),
    "negative beta": (
        flawed(lambda n: setattr(n.layers[0].neuron, "beta", -0.1)),
        InputError,
        r"layer 1: beta lies outside 0\.\.1 \(-0.1 to -0.1\)",
    ),
    "alpha above 1": (flawed(lambda n: setattr(n.layers[0].neuron, "alpha", 1.5)), InputError, r"layer 1: alpha lies outside"),
    "beta 0": (
        dense_network(neuron=LIF(0.0)),
        RangeError,
        "layer 1: membrane decay dv 4096 exceeds .*12-bit limit 4095; .*",
    ),
    "alpha 1": (dense_network(neuron=LIF(alpha=0.99999)), RangeError, "layer 1: current decay du -1 is below .* 0; .*lower it"),
    "NaN": (flawed(lambda n: n.layers[1].synapse.weight.fill_(math.nan)), InputError, "layer 2: weight holds NaN"),
    "bias": (flawed(lambda n: n.layers[1].bias.fill_(math.inf)), InputError, "layer 2: bias holds NaN or infinity"),
    "zero": (flawed(lambda n: n.layers[1].synapse.weight.zero_()), InputError, "layer 2: every weight is zero"),
    "high": (
        dense_network(neuron=LIF(threshold=1e9)),
        RangeError,
        r"layer 1: threshold \S+e\+\d+ exceeds Loihi's 17-bit limit 131071; lower the threshold",
    ),
    "low": (dense_network(neuron=LIF(threshold=1e-9)), RangeError, "layer 1: threshold 1e-09 rounds to 0.*raise the threshold"),
    "big bias": (
        flawed(lambda n: n.layers[1].bias.fill_(1e6)),
        RangeError,
        r"layer 2: bias \S+ exceeds 524160.*13-bit mantissa.*lower the bias",
    ),
}


@pytest.mark.parametrize(("network", "error", "message"), REFUSALS.values(), ids=REFUSALS)
def test_quantize_refuses(network: Network, error: type[SpikepropError], message: str) -> None:
    with pytest.raises(error, match=message):
        quantize(network)


def test_quantize_refuses_arguments() -> None:
    network = dense_network()
    for arguments, message in (
        ({"weight_bits": 9}, "weight_bits = 9.*2 to 8"),
        ({"inputs": "analog"}, "inputs = 'analog' is neither"),
        ({"input_range": (1, 1)}, "the second number must be the larger"),
        ({"inputs": "spikes", "num_message_bits": 8}, "spikes are single bits"),
        ({"num_message_bits": 40}, "inputs: num_message_bits 40 exceeds"),
    ):
        with pytest.raises(SpikepropError, match=message):
            quantize(network, **arguments)
    with pytest.raises(UnsupportedError, match=r"layer 1: .*alpha > 0.*shift the inputs to start at 0"):
        quantize(dense_network(neuron=LIF(alpha=0.5)), input_range=(-1, 1))


def test_encode() -> None:
    chip = quantize(dense_network())
    with pytest.raises(InputError, match=r"inputs have 4 steps already, num_steps = 9; leave num_steps out"):
        encode(chip, torch.zeros(4, 2, 30), 9)
    np.testing.assert_array_equal(encode(chip, torch.ones(2, 30, dtype=torch.bfloat16), 3), encode(chip, torch.ones(2, 30), 3))
    chip = quantize(dense_network((4, 3)), input_range=(-1.0, 1.0), num_message_bits=4)
    inputs = torch.tensor([[-1.0, -0.99, 0.0, 1.0]])
    constant = encode(chip, inputs, 5)
    assert constant.shape == (5, 1, 4) and constant.strides[0] == 0
    assert constant[0, 0].tolist() == [0, 0, 8, 15]
    np.testing.assert_array_equal(encode(chip, inputs.expand(5, 1, 4)), constant)
    for wrong, message in (
        (inputs[None] * 1.1, "reach from -1.1 to 1.1 but this network was quantised for -1 to 1"),
        (inputs[None] * math.nan, "nan"),
        (inputs[:, :3].expand(5, 1, 3), r"shape \(5, 1, 3\), expected"),
        (inputs, r"shape \(1, 4\), expected \[T, B, 4\], or \[B, 4\] with num_steps"),
        (inputs[None, :0], "at least one step and one sample"),
    ):
        with pytest.raises(InputError, match=message):
            encode(chip, wrong)
    spiking = quantize(dense_network((4, 3)), inputs="spikes")
    with pytest.raises(InputError, match="other than 0 and 1"):
        encode(spiking, inputs[None].abs())
