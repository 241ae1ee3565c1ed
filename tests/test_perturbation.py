"""Weight and node perturbation: their expectation against autograd on rate neurons, a closed form for one spiking neuron, and
finite differences of the smoothed loss of spiking networks. Deviations are measured in standard errors of the mean of the
draws.
"""

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from oracle import gradients, random_batch, random_network, raw_update
from torch import Tensor

import spikeprop as sp
from spikeprop.models import mlp
from spikeprop.network import Network
from spikeprop.rules.base import learned_by
from spikeprop.rules.node_perturbation import NodePerturbation
from spikeprop.rules.weight_perturbation import WeightPerturbation

STILL = partial(torch.optim.SGD, lr=0.0)
RULES = [WeightPerturbation, NodePerturbation]


def assert_mean(draws: list[list[Tensor]], truth: list[Tensor], *, bound: float = 5.0, noise: float = 0.5) -> None:
    """The mean of the draws is the truth within ``bound`` standard errors everywhere, and these are small beside the truth."""
    squared, scale = 0.0, 0.0
    for number, expected in enumerate(truth):
        found = torch.stack([draw[number] for draw in draws])
        error = found.std(0) / len(draws) ** 0.5
        assert torch.isfinite(error).all()
        assert float(((found.mean(0) - expected).abs() / (error + 1e-12)).max()) < bound
        squared, scale = squared + float(error.square().sum()), scale + float(expected.square().sum())
    assert (squared / scale) ** 0.5 < noise


def rate_network(kind: str) -> Network:
    network = random_network("conv" if kind == "conv" else "rate", recurrent=kind == "recurrent")
    for layer in network.layers:
        layer.neuron = sp.Rate()
    return network


@pytest.mark.parametrize(
    ("rule", "kind"),
    [(rule, kind) for rule in RULES for kind in ("dense", "recurrent")] + [(NodePerturbation, "conv")],
)
def test_on_rate_neurons_it_estimates_backpropagations_gradient(rule, kind):
    """A sigma so small that no neuron crosses its kink."""
    network = rate_network(kind)
    inputs, labels = random_batch(network, steps=2, batch=1) if kind == "conv" else random_batch(network, steps=5, batch=2)
    draws = [raw_update(rule(sigma=1e-6, samples=300), network, inputs, labels, seed=seed) for seed in range(30)]
    truth = gradients(network, inputs, labels)
    assert_mean([draw[:-2] for draw in draws], truth[:-2])
    for found, expected in zip(draws[0][-2:], truth[-2:], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_real_targets():
    network = mlp((4,), [5], 2, neuron=sp.Rate(), regression=True).double()
    network.readout.weight.normal_(generator=torch.Generator().manual_seed(0))
    inputs, _ = random_batch(network, steps=2)
    targets = torch.rand(3, 2, dtype=torch.float64)
    for rule in RULES:
        draws = [raw_update(rule(sigma=1e-6, samples=200), network, inputs, targets, seed=seed) for seed in range(30)]
        assert_mean([draw[:-2] for draw in draws], gradients(network, inputs, targets)[:-2])


def test_noise_that_lasts_a_window_finds_what_the_mean_input_carries():
    """The gradient by the drive, summed over steps, times the mean input; by autograd, with the drives written out."""
    network = random_network("rate")
    inputs, labels = random_batch(network, batch=1)
    x, pushes, arrived = inputs, [], []
    for index, layer in enumerate(network.layers):
        arrived.append(x)
        pushes.append(torch.zeros(len(x), 1, *layer.output_shape, dtype=torch.float64, requires_grad=True))
        mean = network.input_mean if index == 0 else network.layers[0].rate
        x = F.relu((x - mean) @ layer.synapse.weight.T + layer.bias + pushes[-1])
    outputs = x.mean(0) @ network.readout.weight.T + network.readout.bias
    at_drive = torch.autograd.grad(F.cross_entropy(outputs, labels), pushes)
    truth = []
    for index, (x, error) in enumerate(zip(arrived, at_drive, strict=True)):
        mean = network.input_mean if index == 0 else network.layers[0].rate
        truth += [error.sum((0, 1))[:, None] * (x.mean((0, 1)) - mean).detach(), error.sum((0, 1))]
    rule = NodePerturbation(sigma=1e-6, samples=300, noise="window")
    assert_mean([raw_update(rule, network, inputs, labels, seed=seed)[:-2] for seed in range(30)], truth, noise=0.2)


@pytest.mark.parametrize("rule", RULES)
def test_one_spiking_neuron_in_closed_form(rule):
    """P(spike) = Phi(distance / spread) with Gaussian noise, so the smoothed loss and its slope are known."""
    network = Network((2,), [(sp.Dense(2, 1), sp.LIF(0.9, 1.0))], 2).double()
    network.layers[0].synapse.weight.copy_(torch.tensor([[0.7, 0.4]]))
    network.layers[0].bias.fill_(0.2)
    network.input_mean.copy_(torch.tensor([0.1, 0.3]))
    network.readout.weight.copy_(torch.tensor([[1.0], [-0.5]]))
    x, label, sigma = torch.tensor([0.9, 0.4], dtype=torch.float64), torch.tensor([0]), 0.3
    row = torch.cat([x - network.input_mean, x.new_ones(1)])  # what the two weights and the bias multiply
    spread = sigma * (float(row.norm()) if rule is WeightPerturbation else 1.0)
    distance = float(row[:2] @ network.layers[0].synapse.weight[0]) + 0.2 - 1.0
    spiking, silent = (F.cross_entropy(s * torch.tensor([[1.0, -0.5]]), label) for s in (1.0, 0.0))
    density = math.exp(-0.5 * (distance / spread) ** 2) / math.sqrt(2.0 * math.pi)
    slope = float(spiking - silent) * density / spread * row
    draws = [raw_update(rule(sigma=sigma, samples=2000), network, x[None, None], label, seed=seed)[:2] for seed in range(30)]
    assert_mean(draws, [slope[None, :2], slope[2:]], noise=0.03)


def smoothed_loss(
    network: Network, inputs: Tensor, label: int, quiet_steps: int, shift: list[Tensor], sigma: float, at: str, rows: int
) -> Tensor:
    """Losses ``[rows]`` of a noisy spiking network whose weights and noise set in after some quiet steps; plain loops."""
    generator = torch.Generator().manual_seed(1)  # common random numbers: the same for every shift

    def noise(*shape: int) -> Tensor:
        return sigma * torch.randn(rows, *shape, generator=generator).double()

    x = inputs.expand(-1, rows, -1)
    shift = list(shift)
    for index, layer in enumerate(network.layers):
        neuron, mean = layer.neuron, network.input_mean if index == 0 else network.layers[index - 1].rate
        quiet = [layer.synapse.weight, layer.recurrent.weight, layer.bias]
        noisy = []
        for weight in quiet:
            moved = (weight + shift.pop(0)).expand(rows, *weight.shape)
            noisy.append(moved + noise(*weight.shape) if at == "weights" else moved)
        current = membrane = spikes = torch.zeros(rows, *layer.output_shape, dtype=torch.float64)
        out = []
        for number, present in enumerate(x):
            w, v, b = noisy if number >= quiet_steps else [weight.expand(rows, *weight.shape) for weight in quiet]
            drive = torch.einsum("rni,ri->rn", w, present) + torch.einsum("rni,ri->rn", v, spikes)
            if at == "nodes" and number >= quiet_steps:
                drive = drive + noise(*layer.output_shape)
            current = neuron.alpha * current + drive
            membrane = neuron.beta * membrane + current + b - w @ mean / (1.0 - neuron.alpha)
            spikes = (membrane > neuron.threshold).double()
            membrane = membrane * (1.0 - spikes)
            out.append(spikes)
        x = torch.stack(out)
    outputs = x.mean(0) @ network.readout.weight.T + network.readout.bias
    return F.cross_entropy(outputs, torch.full((rows,), label), reduction="none")


@pytest.mark.parametrize(("rule", "at", "sigma"), [(WeightPerturbation, "weights", 0.3), (NodePerturbation, "nodes", 0.4)])
def test_on_spiking_neurons_it_descends_the_smoothed_loss(rule, at, sigma):
    """For each weight tensor, along a direction that half of the draws suggest, in the second of two windows: the other half
    against finite differences.
    """
    generator = torch.Generator().manual_seed(2)
    network = mlp((3,), [4, 3], 3, neuron=sp.LIF(0.8, 0.7, alpha=0.3), recurrent=True, seed=2).double()
    for tensor in [network.input_mean, network.readout.weight, *(layer.bias for layer in network.layers)]:
        tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator))
    network.readout.weight.mul_(8.0)
    network.layers[1].bias.add_(0.2)
    for layer in network.layers:
        layer.rate.add_(0.3 * torch.rand(layer.rate.shape, generator=generator))
    inputs, _ = random_batch(network, steps=6, batch=1)
    quiet, label = 3, 1

    draws, twin = [], network
    for seed in range(40):
        twin = copy.deepcopy(network)
        learner = rule(sigma=sigma, samples=1000, optimizer=STILL)
        state = learner.begin(learner.initial_state(twin, generator=torch.Generator().manual_seed(seed)))
        _, state = learner.learn(twin, state, inputs[:quiet], torch.tensor([label]))
        rates = [layer.rate.clone() for layer in twin.layers]
        _, state = learner.learn(twin, state, inputs[quiet:], torch.tensor([label]))
        draws.append([weight.grad.clone() for weight in learned_by(twin)[:-2]])
    known = copy.deepcopy(network)
    for layer, rate in zip(known.layers, rates, strict=True):
        layer.rate.copy_(rate)
    # the quiet steps were centred on the rates before them; they differ by less than 1e-3, which no spike noticed
    before, after = (net.advance(net.initial_state(1), inputs[:quiet])[0] for net in (network, known))
    assert all(torch.equal(a.spikes, b.spikes) for a, b in zip(before, after, strict=True))

    assert float(before[-1].spikes.sum()) > 0.0  # or the first window could be forgotten and nobody would see

    step = 0.3 * sigma
    for number in range(len(draws[0])):
        direction = torch.stack([draw[number] for draw in draws[:20]]).mean(0)
        direction = direction / direction.norm()
        shifts = [[torch.zeros_like(w) for w in learned_by(known)[:-2]] for _ in range(2)]
        shifts[0][number], shifts[1][number] = step * direction, -step * direction
        higher, lower = (smoothed_loss(known, inputs, label, quiet, shift, sigma, at, 60_000) for shift in shifts)
        slopes = (higher - lower) / (2.0 * step)
        found = torch.stack([(draw[number] * direction).sum() for draw in draws[20:]])
        error = math.hypot(float(found.std()) / len(found) ** 0.5, float(slopes.std()) / len(slopes) ** 0.5)
        assert error < 0.05 * abs(float(slopes.mean()))
        assert abs(float(found.mean() - slopes.mean())) < 5.0 * error


@pytest.mark.parametrize("rule", RULES)
def test_pairs_cancel_the_curvature(rule):
    """Where the loss is quadratic a pair measures the slope exactly: no draw points uphill, however large the noise."""
    network = mlp((1,), [1], 1, neuron=sp.Rate(), regression=True).double()
    network.layers[0].bias.fill_(500.0)  # far from the kink
    network.readout.weight.fill_(1.0)
    inputs, targets = torch.ones(1, 1, 1, dtype=torch.float64), network.layers[0].bias[None] - 1.0
    truth = gradients(network, inputs, targets)
    for seed in range(50):
        draw = raw_update(rule(sigma=20.0, samples=1), network, inputs, targets, seed=seed)
        assert sum(float((a * b).sum()) for a, b in zip(draw[:2], truth[:2], strict=True)) > 0.0


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("recurrent", [False, True])
def test_the_networks_own_course_is_left_alone(rule, recurrent):
    """State, count and answer after two windows are those of the network without noise."""
    network = random_network(recurrent=recurrent, alpha=0.4)
    network.centred = False  # running rates move between windows
    inputs, labels = random_batch(network, steps=6)
    quiet, after = network.advance(network.initial_state(3), inputs)
    learner = rule(optimizer=STILL, sigma=1.0, update_every=3)
    state = learner.begin(learner.initial_state(network))
    answer, state = learner.learn(network, state, inputs, labels)
    assert torch.equal(state.stream.count, quiet[-1].spikes.sum(0))
    for ours, theirs in zip(state.stream.neurons, after, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    torch.testing.assert_close(answer.outputs, network.readout(quiet[-1].spikes.mean(0)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_noise_too_small_to_move_a_spike_moves_no_hidden_weight(rule):
    """Also in later windows: the perturbed networks set out from where the unperturbed one stands."""
    network = random_network(recurrent=True, alpha=0.4)
    inputs, labels = random_batch(network, steps=6)
    learner = rule(optimizer=STILL, sigma=1e-9)
    state = learner.begin(learner.initial_state(network))
    for present in inputs:
        _, state = learner.learn(network, state, present[None], labels)
        *hidden, weight, _ = (parameter.grad for parameter in learned_by(network))
        assert all(float(gradient.abs().max()) < 1e-5 for gradient in hidden)  # rounding, divided by sigma
    assert float(weight.abs().max()) > 0.0


def test_what_is_refused():
    with pytest.raises(sp.errors.UnsupportedError, match="convolutional"):
        WeightPerturbation().initial_state(random_network("conv"))
    for rule in RULES:
        with pytest.raises(sp.errors.InputError, match=r"sigma = 0 must be above 0"):
            rule(sigma=0.0)
        with pytest.raises(sp.errors.InputError, match=r"samples = 0"):
            rule(samples=0)
    with pytest.raises(sp.errors.InputError, match=r"noise = 'pink'"):
        NodePerturbation(noise="pink")


@pytest.mark.parametrize(("rule", "lowest"), [(WeightPerturbation, 0.7), (NodePerturbation, 0.8)])
def test_it_learns_digits(rule, lowest):
    data = sp.data.load("digits")
    network = mlp(data.input_shape, [32, 32], data.num_classes)
    learner = rule(optimizer=partial(torch.optim.Adam, lr=1.6e-2))
    sp.fit(network, learner, data, num_steps=8, epochs=2, progress=False)
    assert sp.evaluate(network, data.validation, 8).accuracy["readout"] > lowest  # Shallow needs 8 epochs for .64
