"""Networks: streams equal sequences, centring is a bias, synapses are linear maps with the right transpose."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

import spikeprop as sp
from spikeprop.errors import InputError
from spikeprop.models import conv, heterogeneous, mlp
from spikeprop.network import network_from_config

SYNAPSES = [
    (sp.Dense(6, 4), (6,)),
    (sp.Conv2d(2, 4, 3), (2, 7, 6)),
    (sp.Conv2d(2, 4, 3, stride=2, padding=1, groups=2), (2, 7, 6)),
    (sp.AvgPool2d(2), (2, 7, 5)),
    (sp.Flatten(), (2, 3, 4)),
    (sp.Chain(sp.AvgPool2d(2), sp.Conv2d(2, 3, 3, padding=1), sp.AvgPool2d(2), sp.Flatten()), (2, 9, 8)),
]


@pytest.mark.parametrize(("synapse", "shape"), SYNAPSES)
def test_synapses_have_the_adjoint_and_gradient_that_autograd_finds(
    synapse: sp.network.Synapse, shape: tuple[int, ...]
) -> None:
    synapse = copy.deepcopy(synapse).double()
    x = torch.randn(5, *shape, dtype=torch.float64, requires_grad=True)
    if synapse.weight is not None:
        synapse.weight.requires_grad_()
    drive = synapse(x)
    assert tuple(drive.shape[1:]) == synapse.output_shape(shape)
    error = torch.randn_like(drive)
    wanted = torch.autograd.grad((drive * error).sum(), [x] if synapse.weight is None else [x, synapse.weight])
    assert torch.allclose(synapse.adjoint(error, shape), wanted[0], atol=1e-12)
    if synapse.weight is not None:
        assert torch.allclose(synapse.weight_gradient(error, x), wanted[1], atol=1e-12)


def small(kind: str, **neuron: float) -> sp.Network:
    lif = sp.LIF(0.8, 0.5, **neuron)
    network = (
        mlp((2, 3), [8, 5], 3, neuron=lif)
        if kind == "mlp"
        else conv((1, 8, 8), [3, 4], 3, kernel_size=3, stride=1, pool=2, hidden=[6], neuron=lif, gain=3.0)
    )
    for layer in network.layers:
        layer.rate.uniform_(0, 0.3)
        layer.bias.uniform_(0, 0.2)
    network.input_mean.uniform_()
    return network.double()


@pytest.mark.parametrize("kind", ["mlp", "conv"])
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_steps_with_state_passed_along_equal_the_whole_sequence(kind: str, alpha: float) -> None:
    network = small(kind, alpha=alpha)
    inputs = torch.rand(9, 4, *network.input_shape, dtype=torch.float64)
    whole = network.run(inputs)
    state, untouched = network.initial_state(4), network.initial_state(4)
    for step, x in enumerate(inputs):
        activities, state = network.step(state, x)
        for (spikes, membrane), (all_spikes, all_membranes) in zip(activities, whole, strict=True):
            assert torch.equal(spikes, all_spikes[step])
            assert torch.allclose(membrane, all_membranes[step], atol=1e-12)
    assert all(torch.equal(now.membrane, torch.zeros_like(now.membrane)) for now in untouched)
    assert whole[-1].spikes.sum() > 0


@pytest.mark.parametrize("kind", ["mlp", "conv"])
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_centring_is_a_bias(kind: str, alpha: float) -> None:
    """Moved into per-neuron biases, an uncentred network does the same; at alpha = 0 so does one fed with centred inputs."""
    network = small(kind, alpha=alpha)
    inputs = torch.rand(6, 4, *network.input_shape, dtype=torch.float64)
    folded = copy.deepcopy(network)
    folded.centred = False
    for index, layer in enumerate(folded.layers):
        layer.bias = torch.nn.Parameter(network.fold_bias(index), requires_grad=False)
    for one, other in zip(network.run(inputs), folded.run(inputs), strict=True):
        assert torch.equal(one.spikes, other.spikes)
    if alpha == 0.0:
        plain = copy.deepcopy(network)
        plain.input_mean.zero_()
        assert torch.allclose(network.run(inputs)[0].membrane, plain.run(inputs - network.input_mean)[0].membrane, atol=1e-12)


def test_a_constant_input_is_multiplied_once_and_counts_the_same() -> None:
    network = small("mlp")
    x = torch.rand(4, 2, 3, dtype=torch.float64)
    seen = []
    network.layers[0].synapse.register_forward_hook(lambda module, arguments, out: seen.append(len(out)))
    constant = network.run(x.expand(7, *x.shape))
    assert seen == [4, 1]  # one batch for all seven steps, and the folded mean
    for one, other in zip(constant, network.run(x.repeat(7, 1, 1, 1)), strict=True):
        assert torch.equal(one.spikes, other.spikes)


def test_the_seed_fixes_everything() -> None:
    first, again, other = (mlp((5,), [4, 4], 2, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["layers.0.synapse.weight"], other["layers.0.synapse.weight"])


def test_neurons_spike_from_the_start() -> None:
    data = sp.data.load("digits")
    for network in (
        mlp(data.input_shape, [256, 256, 256], 10),
        conv(data.input_shape, [8, 16], 10, kernel_size=3, stride=1, pool=2),
    ):
        network.input_mean.copy_(data.train.inputs.mean(0))
        health = sp.dead_neurons(network, data.validation, 8)
        assert max(health.share("dead")[:3]) < (0.02 if network.layers[0].bias.dim() == 1 else 0.2), health
        assert min(health.share("rate")) > 0.03, health
        assert max(health.share("rate")) < 0.3, health
    assert max(sp.dead_neurons(mlp(data.input_shape, [256, 256], 10, gain=0.02), data.validation, 8).share("dead")) == 1.0


def test_configuration_rebuilds_the_network() -> None:
    network = sp.Network(
        (2, 8, 8),
        [
            (
                sp.Conv2d(2, 4, 3, stride=2, padding=1, groups=2),
                sp.LIF(torch.rand(4, 1, 1), 0.4, alpha=0.2, reset_mechanism="subtract"),
            ),
            (sp.Chain(sp.AvgPool2d(2), sp.Flatten(), sp.Dense(16, 5)), sp.Rate()),
        ],
        3,
    )
    network.attach_target(learned=False)
    again = network_from_config(network.config())
    again.load_state_dict(network.state_dict())
    x = torch.rand(4, 3, 2, 8, 8)
    for one, other in zip(network.run(x), again.run(x), strict=True):
        assert torch.equal(one.membrane, other.membrane)
    assert not again.target.learned


def test_initial_weights_have_the_stated_scale() -> None:
    network = mlp((400,), [300, 200], 10, gain=0.5)
    for layer, gain in zip(network.layers, (0.5, 0.5), strict=True):
        weight = layer.synapse.weight
        assert weight.std().item() == pytest.approx(gain / math.sqrt(weight.shape[1]), rel=0.02)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mlp((4,), [], 2), r"mlp: the hidden layers are \[\]"),
        (lambda: mlp((4,), [8, 0], 2), r"each at least 1"),
        (lambda: conv((1, 8, 8), [4], 2, kernel_size=4), "an odd size"),
        (lambda: conv((1, 3, 3), [4, 4, 4], 2, kernel_size=3, stride=1, pool=2), r"AvgPool2d\(2\): the input has shape"),
        (lambda: sp.Network((4,), [], 2), "0 layers and 2 outputs"),
        (
            lambda: sp.Network((4,), [(sp.Dense(4, 3), sp.LIF()), (sp.Dense(5, 3), sp.LIF())], 2),
            r"layer 2: Dense\(5, 3\): the input has shape \(3,\)",
        ),
        (lambda: sp.Network((1, 4, 4), [(sp.Dense(16, 3), sp.LIF())], 2), r"layer 1: Dense.*put Flatten\(\) before it"),
        (lambda: sp.Network((1, 4, 4), [(sp.Conv2d(2, 3, 3), sp.LIF())], 2), r"layer 1: Conv2d: the input has shape"),
        (lambda: sp.Network((4,), [(tied := sp.Dense(4, 4), sp.LIF(), tied)], 2), "layer 1: its recurrent synapse is the one"),
        (lambda: sp.Conv2d(3, 4, 3, groups=2), "groups = 2 must divide"),
        (lambda: sp.Conv2d(1, 1, 5).output_shape((1, 3, 3)), "larger than the padded input"),
        (lambda: sp.Chain(sp.Dense(4, 4), sp.Dense(4, 4)), "2 of its parts have weights"),
    ],
)  # fmt: skip
def test_bad_architectures_are_named(make, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_heterogeneous_neurons_have_time_constants_of_their_own() -> None:
    """Drawn uniformly in the logarithm within the range: as many per octave; other layers draw others; a seed repeats them."""
    make = heterogeneous((2.0, 32.0), (4.0, 64.0))
    network = mlp((5,), [4000, 30], 3, neuron=make, seed=1)
    taus, slow = (-1.0 / torch.log(decay) for decay in (network.layers[0].neuron.beta, network.layers[0].neuron.alpha))
    for found, low in ((taus, 2.0), (slow, 4.0)):
        assert found.min() >= low * (1 - 1e-5) and found.max() <= 16 * low * (1 + 1e-5)
        per_octave = torch.bincount((found / low).log2().floor().long().clamp(0, 3), minlength=4)
        assert (per_octave - 1000).abs().max() < 5 * (4000 * 0.25 * 0.75) ** 0.5
    assert not torch.equal(taus, slow / 2)
    assert network.layers[1].neuron.beta.shape == (30,)
    again = mlp((5,), [4000, 30], 3, neuron=make, seed=1)
    assert torch.equal(again.layers[0].neuron.beta, network.layers[0].neuron.beta)
    assert heterogeneous((5.0, 5.0))(3, torch.Generator()).alpha == 0.0
    for wrong in ((0.0, 2.0), (3.0, 2.0), (1.0, float("inf"))):
        with pytest.raises(InputError, match="must be a range of steps with 0 < shortest <= longest"):
            heterogeneous(wrong)


def test_a_strided_network_has_the_shapes_of_a_pooled_one_with_fewer_neurons() -> None:
    strided = conv((1, 28, 28), [3, 5], 10, kernel_size=5, stride=2, pool=1, hidden=[7])
    assert [layer.output_shape for layer in strided.layers] == [(3, 14, 14), (5, 7, 7), (7,)]
    pooled = conv((1, 28, 28), [3, 5], 10, kernel_size=3, stride=1, pool=2, hidden=[7])
    assert [layer.output_shape for layer in pooled.layers] == [(3, 28, 28), (5, 14, 14), (7,)]
    assert strided.layers[2].synapse.weight.shape == pooled.layers[2].synapse.weight.shape == (7, 5 * 7 * 7)


def test_convolutions_are_rounded_only_where_medium_precision_allows_it() -> None:
    """In bfloat16 a weight or a drive is off by at most 2^-8 of itself; without permission nothing changes."""
    generator = torch.Generator().manual_seed(0)
    synapse = sp.Conv2d(8, 16, 3, padding=1, generator=generator)
    x = (torch.rand(4, 8, 9, 9, generator=generator) < 0.3).float()
    error = torch.randn(4, 16, 9, 9, generator=generator)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        rough = synapse(x), synapse.weight_gradient(error, x)
        torch.set_float32_matmul_precision("highest")
        fine = synapse(x), synapse.weight_gradient(error, x)
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(fine[0], F.conv2d(x, synapse.weight, padding=1))
    for low, high in zip(rough, fine, strict=True):
        assert low.dtype == torch.float32
        assert float((low - high).norm()) < 2**-7 * float(high.norm())


@pytest.mark.parametrize(("size", "groups", "padding", "extent"), [(2, 1, 2, 9), (2, 2, 0, 10), (3, 1, 1, 12)])
def test_a_mean_after_a_convolution_is_part_of_its_kernel(size, groups, padding, extent) -> None:
    generator = torch.Generator().manual_seed(0)
    convolution = sp.Conv2d(4, 6, 5, padding=padding, groups=groups, generator=generator).double()
    together = sp.Chain(convolution, sp.AvgPool2d(size))
    x = torch.randn(3, 4, extent, extent, generator=generator, dtype=torch.float64)
    drive = F.avg_pool2d(F.conv2d(x, convolution.weight, padding=padding, groups=groups), size)
    torch.testing.assert_close(together(x), drive)
    error = torch.randn(drive.shape, generator=generator, dtype=torch.float64)
    apart = convolution.weight_gradient(sp.AvgPool2d(size).adjoint(error, convolution(x).shape[1:]), x)
    torch.testing.assert_close(together.weight_gradient(error, x), apart)
