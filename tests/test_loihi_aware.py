"""Quantisation-aware training: the weights in the loop are the chip's, and the chip's network is the one that learned."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import spikeprop as sp
from spikeprop.backends import loihi
from spikeprop.backends.loihi import QuantizationAware
from spikeprop.errors import InputError, RangeError, SpikepropError, UnsupportedError
from spikeprop.models import conv, mlp

DATA = sp.data.load("digits")
LITTLE = sp.data.from_arrays(train=(DATA.train.inputs[:200], DATA.train.labels[:200]), validation=DATA.validation)


def fit(network: sp.Network, rule: sp.Rule, folder: Path | None = None, epochs: int = 2, **more: object) -> None:
    sp.fit(network, rule, LITTLE, num_steps=4, epochs=epochs, batch_size=20, seed=0, folder=folder, progress=False, **more)


@pytest.mark.parametrize(("bits", "threshold"), [(8, 1.0), (8, 0.3), (5, 1.0), (4, 1.0), (2, 1.0)])
@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_the_chip_gets_the_very_weights_that_learned(bits: int, threshold: float, kind: str) -> None:
    """Quantising afterwards rounds nothing: weights and decays are on the chip's grids already."""
    neuron = sp.LIF(0.9, threshold, alpha=0.3)
    network = (
        mlp((1, 8, 8), [40, 30], 10, neuron=neuron)
        if kind == "mlp"
        else conv((1, 8, 8), [3, 4], 10, kernel_size=3, stride=1, pool=2, neuron=neuron)
    )
    before = [layer.synapse.weight.clone() for layer in network.layers]
    fit(network, QuantizationAware(sp.SigProp(), bits, rescale_every=7))
    assert all((layer.synapse.weight != weight).any() for layer, weight in zip(network.layers, before, strict=True))
    chip = loihi.quantize(network, bits, inputs="spikes")
    for layer in chip.report["layers"]:
        assert layer["weight_error"] < 1e-6
        assert layer["clipped_weights"] == layer["zeroed_weights"] == layer["alpha_error"] == layer["beta_error"] == 0
    assert len(np.unique(chip.layers[-1].weight)) <= 2**bits


@pytest.mark.parametrize("bits", [8, 4])
def test_trained_weights_stay_behind_graded_inputs(bits: int) -> None:
    """Where convolution and graded messages compete for the current register, the messages give way, not the weights."""
    network = conv((1, 8, 8), [3], 10, kernel_size=3, stride=1, pool=2, neuron=sp.LIF(torch.tensor(0.9), 1.0))
    free = loihi.quantize(network, bits)
    fit(network, QuantizationAware(sp.SigProp(), bits), epochs=1)
    chip = loihi.quantize(network, bits)
    assert [layer["weight_error"] < 1e-6 for layer in chip.report["layers"]] == [True, True]
    assert 2 <= chip.num_message_bits <= free.num_message_bits < 8


def test_the_optimiser_sees_the_real_weights() -> None:
    """One plain gradient step: the real weights move by the gradient that the same rule finds at the rounded weights."""
    x, labels = DATA.train.inputs[:30].expand(4, 30, 1, 8, 8), DATA.train.labels[:30]
    descent = partial(torch.optim.SGD, lr=0.5)
    rule = sp.SigProp(optimizer=descent, homeostasis=None)
    network = mlp((1, 8, 8), [20], 10, neuron=sp.LIF(3686 / 4096))
    start = network.layers[0].synapse.weight.clone()
    aware = QuantizationAware(rule, 3)
    state = aware.initial_state(network, generator=torch.Generator().manual_seed(0))
    rounded = network.layers[0].synapse.weight.clone()
    assert len(rounded.unique()) <= 8
    _, state = aware.learn(network, aware.begin(state), x, labels)
    moved = state.weights[0].real - start

    twin = mlp((1, 8, 8), [20], 10, neuron=sp.LIF(3686 / 4096))
    twin.layers[0].synapse.weight.copy_(rounded)
    plain = rule.initial_state(twin, generator=torch.Generator().manual_seed(0))
    rule.learn(twin, rule.begin(plain), x, labels)
    np.testing.assert_allclose(moved, twin.layers[0].synapse.weight - rounded, atol=1e-6)
    assert moved.abs().max() > 1e-4
    assert len(network.layers[0].synapse.weight.unique()) <= 8


def test_resuming_gives_the_weights_of_an_uninterrupted_run(tmp_path: Path) -> None:
    aware = QuantizationAware(sp.SigProp(), 4, rescale_every=3)
    whole, first, resumed = (mlp((1, 8, 8), [20], 10, seed=seed) for seed in (0, 0, 99))
    fit(whole, aware, schedule="constant")
    with pytest.MonkeyPatch.context() as patch:
        original = sp.training._save

        def save_then_die(*arguments: object) -> None:
            original(*arguments)
            raise KeyboardInterrupt

        patch.setattr(sp.training, "_save", save_then_die)
        with pytest.raises(KeyboardInterrupt):
            fit(first, aware, tmp_path, schedule="constant")
    fit(resumed, aware, tmp_path, schedule="constant", resume=True)
    for (name, tensor), again in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(tensor, again), name


def test_two_bits_learn() -> None:
    """Rounding a trained network to 2 bits costs points; training on at 2 bits gives them back (three seeds, validation)."""
    rounded, learned = [], []
    for seed in range(3):
        network = mlp((1, 8, 8), [128, 128], 10, seed=seed)
        sp.fit(network, sp.SigProp(), DATA, num_steps=8, epochs=6, seed=seed, progress=False)

        def on_chip(network: sp.Network = network) -> float:
            chip = loihi.quantize(network, 2)
            inputs, labels = DATA.validation
            counts = loihi.simulate(chip, loihi.encode(chip, inputs, 8), record="counts").counts[-1]
            return float((network.readout(torch.from_numpy(counts) / 8).argmax(1) == labels).double().mean())

        rounded.append(on_chip())
        aware = QuantizationAware(sp.SigProp(optimizer=partial(torch.optim.Adam, lr=1e-3)), 2)
        sp.fit(network, aware, DATA, num_steps=8, epochs=4, seed=seed, progress=False)
        learned.append(on_chip())
    assert sum(learned) / 3 > max(sum(rounded) / 3 + 0.005, 0.95)


@pytest.mark.parametrize(
    ("network", "arguments", "error", "message"),
    [
        (mlp((4,), [5], 2, neuron=sp.LIF(reset_mechanism="subtract")), {}, UnsupportedError, "layer 1: reset_mechanism 'sub"),
        (mlp((4,), [5], 2, neuron=sp.LIF(0.0)), {}, RangeError, "layer 1: membrane decay dv 4096 exceeds"),
        (mlp((4,), [5], 2), {"weight_bits": 9}, InputError, "weight_bits = 9: Loihi has signed weights of 2 to 8 bits"),
        (mlp((4,), [5], 2), {"rescale_every": 0}, InputError, "rescale_every = 0 must be at least 1"),
        (
            sp.Network((1, 6, 6), [(sp.Chain(sp.Conv2d(1, 2, 3), sp.AvgPool2d(2)), sp.LIF())], 2),
            {},
            UnsupportedError,
            "layer 1: pooling behind a convolution becomes one wider kernel .*; put the pooling before the next",
        ),
    ],
)
def test_refusals(network: sp.Network, arguments: dict[str, int], error: type[SpikepropError], message: str) -> None:
    with pytest.raises(error, match=message):
        QuantizationAware(sp.SigProp(), **arguments).initial_state(network)
