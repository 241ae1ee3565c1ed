"""Contrastive Hebbian learning: both phases written out, Xie and Seung's theorem; recirculation's closed forms."""

import functools

import pytest
import torch
import torch.nn.functional as F
from oracle import gradients, random_batch, random_network, raw_update
from torch import Tensor

import spikeprop as sp
from spikeprop.errors import InputError
from spikeprop.models import mlp
from spikeprop.rules.base import learned_by
from spikeprop.rules.contrastive_hebbian import Autoencoder, ContrastiveHebbian, recirculate

STANDSTILL = functools.partial(torch.optim.SGD, lr=0.0)


def phi(neuron: sp.network.Neuron, membrane: Tensor) -> Tensor:
    return torch.atan(torch.pi * (membrane - neuron.threshold)) / torch.pi + 0.5 if neuron.spiking else membrane.relu()


class Loop:
    """A network as plain loops over time, one step of all layers at a time; U depends on the weights, the spikes do not."""

    def __init__(self, network: sp.Network, batch: int) -> None:
        self.network = network
        zero = [torch.zeros(batch, *layer.output_shape, dtype=torch.float64) for layer in network.layers]
        self.current, self.after, self.spikes = list(zero), list(zero), list(zero)

    def step(self, x: Tensor, nudges: list[Tensor | float]) -> list[Tensor]:
        membranes = []
        for index, layer in enumerate(self.network.layers):
            neuron, bias = layer.neuron, layer.bias
            if self.network.centred:
                mean = self.network.input_mean if index == 0 else self.network.layers[index - 1].rate
                bias = bias - layer.synapse(mean.unsqueeze(0))[0] / (1.0 - neuron.alpha)
            drive = layer.synapse(x) + nudges[index]
            if layer.recurrent is not None:
                drive = drive + layer.recurrent(self.spikes[index])
            self.current[index] = neuron.alpha * self.current[index] + drive
            membrane = neuron.beta * self.after[index] + self.current[index] + bias
            x = (membrane > neuron.threshold).double() if neuron.spiking else membrane.detach().relu()
            resets = {"zero": membrane * x, "subtract": neuron.threshold * x, "none": 0.0}
            self.after[index], self.spikes[index] = membrane - resets[neuron.reset_mechanism], x
            membranes.append(membrane)
        return membranes


def feedback(network: sp.Network, index: int, signal: Tensor) -> Tensor:
    """The transpose of the weights above, as autograd has it: the derivative of <signal, W x> by x."""
    x = torch.zeros(len(signal), *network.layers[index].output_shape, dtype=torch.float64, requires_grad=True)
    last = index + 1 == len(network.layers)
    y = x.flatten(1) @ network.readout.weight.T if last else network.layers[index + 1].synapse(x)
    return torch.autograd.grad((y * signal).sum(), x)[0]


def expected(network: sp.Network, inputs: Tensor, labels: Tensor, gamma: float, down=feedback) -> list[Tensor]:
    weights, depth = learned_by(network), len(network.layers)
    for weight in weights:
        weight.requires_grad_(True)
    try:
        free, clamped, count = Loop(network, len(labels)), Loop(network, len(labels)), 0.0
        membranes = []
        for x in inputs:
            membranes.append(free.step(x, [0.0] * depth))
            count = count + free.spikes[-1]
        outputs = (count / len(inputs)).flatten(1) @ network.readout.weight.T + network.readout.bias
        total = F.cross_entropy(outputs, labels)
        delta = outputs.detach().softmax(1) - F.one_hot(labels, network.outputs)
        above = [torch.zeros(len(labels), *layer.output_shape, dtype=torch.float64) for layer in network.layers[1:]] + [-delta]
        for x, own in zip(inputs, membranes, strict=True):
            found = clamped.step(x, [gamma * down(network, index, signal) for index, signal in enumerate(above)])
            pairs = [
                (phi(layer.neuron, a), phi(layer.neuron, c)) for layer, a, c in zip(network.layers, own, found, strict=True)
            ]
            for index, (a, c) in enumerate(pairs):
                scale = gamma ** (depth - index) * len(inputs) * len(labels)
                total = total + ((a - c).detach() * own[index]).sum() / scale
            above = [*((c - a).detach() for a, c in pairs[1:]), -delta]
        return list(torch.autograd.grad(total, weights))
    finally:
        for weight in weights:
            weight.requires_grad_(False)


CASES = [
    ("lif", False, {"reset_mechanism": "zero"}),
    ("lif", True, {"reset_mechanism": "subtract", "threshold": 0.75}),
    ("lif", True, {"reset_mechanism": "none", "alpha": 0.4}),
    ("conv", False, {"alpha": 0.4}),
    ("rate", False, {}),
    ("rate", True, {}),
]


@pytest.mark.parametrize(("kind", "recurrent", "neuron"), CASES)
def test_equals_the_two_phases_written_out(kind, recurrent, neuron):
    network = random_network(kind, recurrent=recurrent, **neuron)
    inputs, labels = random_batch(network)
    ours = raw_update(ContrastiveHebbian(gamma=0.6), network, inputs, labels)
    theirs = expected(network, inputs, labels, 0.6)
    assert all(float(x.abs().max()) > 0 for x in theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["lif", "conv", "rate"])
def test_random_feedback_stands_in_for_the_transposes(kind):
    network = random_network(kind)
    inputs, labels = random_batch(network)
    rule = ContrastiveHebbian(gamma=0.6, feedback="random")
    drawn = rule.initial_state(network, generator=torch.Generator().manual_seed(0)).own
    fixed = [drawn[f"feedback.{index}"] for index in range(len(network.layers))]

    def down(network, index, signal):
        return (signal.flatten(1) @ fixed[index]).unflatten(1, network.layers[index].output_shape)

    for a, b in zip(raw_update(rule, network, inputs, labels), expected(network, inputs, labels, 0.6, down), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def settled(network: sp.Network, inputs: Tensor, labels: Tensor, gamma: float) -> list[Tensor]:
    """The update at the end of a long constant input, where feedback has arrived everywhere; weights held still."""
    rule = ContrastiveHebbian(gamma=gamma, update_every=1, optimizer=STANDSTILL)
    state = rule.begin(rule.initial_state(network))
    rule.learn(network, state, inputs.expand(30, *inputs.shape[1:]), labels)
    # Every window's error is for one step out of all so far.
    count = len(network.layers) * 2
    return [weight.grad * (30 if index < count else 1) for index, weight in enumerate(learned_by(network))]


def test_settled_with_small_gain_it_is_backpropagation():
    """Xie and Seung's theorem: the deviation from the gradient is of the order of gamma."""
    network = random_network("rate")
    network.centred = False
    inputs, labels = random_batch(network, steps=1)
    theirs = gradients(network, inputs, labels)
    assert all(float(x.abs().max()) > 0 for x in theirs)
    deviation = []
    for gamma in (1e-3, 1e-4, 1e-5):
        pairs = list(zip(settled(network, inputs, labels, gamma), theirs, strict=True))
        deviation.append(max(float((a - b).norm() / b.norm()) for a, b in pairs))
    assert deviation[0] < 1e-2
    assert deviation[1] == pytest.approx(deviation[0] / 10, rel=0.1)
    assert deviation[2] == pytest.approx(deviation[1] / 10, rel=0.1)


def test_the_phases_settle_where_their_equations_say():
    """c_1 = f(W_1 x + gamma W_2^T (c_2 - a_2)), c_2 = f(W_2 c_1 - gamma V^T delta), solved by iteration at a gain of 0.1."""
    network = random_network("rate")
    network.centred = False
    inputs, labels = random_batch(network, steps=1)
    first, second = network.layers
    w1, w2, x = first.synapse.weight, second.synapse.weight, inputs[0]
    a1 = (x @ w1.T + first.bias).relu()
    a2 = (a1 @ w2.T + second.bias).relu()
    delta = network.readout(a2).softmax(1) - F.one_hot(labels, 4)
    c1, c2 = a1, a2
    for _ in range(200):
        c1 = (x @ w1.T + first.bias + 0.1 * (c2 - a2) @ w2).relu()
        c2 = (c1 @ w2.T + second.bias - 0.1 * delta @ network.readout.weight).relu()
    theirs = [(a1 - c1).T @ x / 0.01, (a1 - c1).sum(0) / 0.01, (a2 - c2).T @ a1 / 0.1, (a2 - c2).sum(0) / 0.1]
    for a, b in zip(settled(network, inputs, labels, 0.1)[:4], theirs, strict=True):
        torch.testing.assert_close(a, b / len(labels), rtol=1e-7, atol=1e-9)


def test_both_phases_of_a_later_window_start_from_the_free_state():
    """Otherwise they would differ by much more than gamma, by which the difference is divided."""
    network = random_network(recurrent=True, alpha=0.4)
    inputs, labels = random_batch(network)
    rule = ContrastiveHebbian(gamma=1e-6, update_every=2, optimizer=STANDSTILL)
    assert all(0.0 < float(gradient.abs().max()) < 10.0 for gradient in raw_update(rule, network, inputs, labels))


def test_settings_are_checked():
    with pytest.raises(InputError, match="gamma = 0"):
        ContrastiveHebbian(gamma=0.0)
    with pytest.raises(InputError, match="feedback = 'learned' is not one of"):
        ContrastiveHebbian(feedback="learned")


def test_learns_digits():
    data = sp.data.load("digits")
    accuracy = []
    for rule in (sp.Shallow(), ContrastiveHebbian(), ContrastiveHebbian(feedback="random")):
        network = mlp(data.input_shape, [32, 32], 10)
        sp.fit(network, rule, data, num_steps=8, epochs=4, progress=False)
        accuracy.append(sp.evaluate(network, data.validation, 8).accuracy["readout"])
    floor, symmetric, random = accuracy
    assert symmetric > floor + 0.2
    assert random > floor + 0.1


def small_autoencoder(seed: int = 0) -> tuple[Autoencoder, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = [(3, 5), (5, 3), (3,), (5,), (4, 5)]
    *parts, visible = (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)
    return Autoencoder(*parts), visible.sigmoid()


def test_recirculation_is_its_equations():
    (w, v, c, b), visible = small_autoencoder()
    reconstruction, ours = recirculate(Autoencoder(w, v, c, b), visible, regression=0.6)
    theirs = [torch.zeros_like(part) for part in (w, v, c, b)]
    for row, v0 in enumerate(visible):
        h1 = 1 / (1 + torch.exp(-(w @ v0 + c)))
        answer = 1 / (1 + torch.exp(-(v @ h1 + b)))
        v2 = 0.6 * v0 + 0.4 * answer
        h3 = 0.6 * h1 + 0.4 / (1 + torch.exp(-(w @ v2 + c)))
        changes = (torch.outer(h1 - h3, v2), torch.outer(v0 - v2, h1), h1 - h3, v0 - v2)
        theirs = [total - change / len(visible) for total, change in zip(theirs, changes, strict=True)]
        torch.testing.assert_close(reconstruction[row], answer)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_recirculation_through_symmetric_weights_is_gradient_descent():
    """Linear units, V = W^T, lambda near 1: the gradient of the squared reconstruction error, by 1 - lambda, squared for W."""
    autoencoder, visible = small_autoencoder()
    autoencoder = autoencoder._replace(decode=autoencoder.encode.T.clone())
    leaves = [part.clone().requires_grad_(True) for part in autoencoder]
    w, v, c, b = leaves
    loss = 0.5 * (visible - ((visible @ w.T + c) @ v.T + b)).square().sum(1).mean()
    theirs = torch.autograd.grad(loss, leaves)
    step = 1e-6
    _, ours = recirculate(autoencoder, visible, regression=1.0 - step, activation=lambda x: x)
    for part, target, power in zip(ours, theirs, (2, 1, 2, 1), strict=True):
        torch.testing.assert_close(part / step**power, target, rtol=1e-4, atol=1e-4)


def test_recirculation_learns_to_reconstruct_digits():
    visible = sp.data.load("digits").train[0].flatten(1)
    generator = torch.Generator().manual_seed(0)
    w, v = (0.1 * torch.randn(size, generator=generator) for size in ((32, 64), (64, 32)))
    autoencoder = Autoencoder(w, v, torch.zeros(32), torch.zeros(64))
    errors = []
    for _ in range(60):
        for rows in torch.randperm(len(visible), generator=generator).split(100):
            _, gradient = recirculate(autoencoder, visible[rows])
            autoencoder = Autoencoder(*(part - 2.0 * g for part, g in zip(autoencoder, gradient, strict=True)))
        errors.append(float((recirculate(autoencoder, visible)[0] - visible).square().mean()))
    mean_image = float((visible.mean(0) - visible).square().mean())
    assert errors[-1] < 0.5 * mean_image < errors[0]


def test_a_regression_of_one_is_refused():
    autoencoder, visible = small_autoencoder()
    with pytest.raises(InputError, match="regression = 1"):
        recirculate(autoencoder, visible, regression=1.0)
