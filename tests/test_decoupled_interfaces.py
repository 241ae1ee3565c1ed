"""Synthetic gradients: the layers' updates, the models' regression and where it ends, against autograd, float64."""

import pytest
import torch
import torch.nn.functional as F
from oracle import NETWORKS, gradients, mean_activity, random_batch, random_network
from torch import Tensor

import spikeprop as sp
from spikeprop.models import mlp
from spikeprop.network import Network
from spikeprop.rules.base import learned_by
from spikeprop.rules.decoupled_interfaces import DecoupledInterfaces


def at_top(network: Network, rates: Tensor, labels: Tensor) -> Tensor:
    """dL/dh of the last layer's activity, per row."""
    rates = rates.clone().requires_grad_()
    outputs = rates.flatten(1) @ network.readout.weight.T + network.readout.bias
    loss = 0.5 * (outputs - labels).square().sum() if network.regression else F.cross_entropy(outputs, labels, reduction="sum")
    return torch.autograd.grad(loss, rates)[0]


def seen(network: Network, rates: Tensor, labels: Tensor) -> Tensor:
    """What a model is shown."""
    label = labels if network.regression else torch.eye(network.outputs, dtype=torch.float64)[labels]
    return torch.cat([rates.flatten(1), label, torch.ones(len(labels), 1, dtype=torch.float64)], 1)


def random_models(rule: DecoupledInterfaces, network: Network) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    own = rule.initial_state(network).own
    return [0.3 * torch.randn(weight.shape, generator=generator, dtype=torch.float64) for weight in own.values()]


def learn(network: Network, inputs: Tensor, labels: Tensor, models: list[Tensor]):
    """One update from given models: the gradients of the network, those of the models, and the answer."""
    rule = DecoupledInterfaces()
    state = rule.begin(rule.initial_state(network))
    for own, wanted in zip(state.own.values(), models, strict=True):
        own.copy_(wanted)
    answer, state = rule.learn(network, state, inputs, labels)
    return [weight.grad for weight in learned_by(network)], [weight.grad for weight in state.own.values()], answer


@pytest.mark.parametrize("regression", [False, True])
@pytest.mark.parametrize(("kind", "options"), NETWORKS)
def test_layers_and_models_against_autograd(kind, options, regression):
    """A layer descends <g, h> with g constant; its model the squared distance to what arrives through the layer above."""
    network = random_network(kind, **options)
    network.regression = regression
    inputs, labels = random_batch(network)
    if regression:
        labels = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    models = random_models(DecoupledInterfaces(), network)
    activities = network.run(inputs)
    rates = [activity.spikes.mean(0) for activity in activities]
    arriving = at_top(network, rates[-1], labels)
    by_layers: list[Tensor] = []
    by_models: list[Tensor] = []
    losses: list[Tensor] = []
    for index in reversed(range(len(rates))):
        model = models[index].clone().requires_grad_()
        synthetic = seen(network, rates[index], labels) @ model.T
        loss = 0.5 * (synthetic - arriving.flatten(1)).square().sum(1).mean()
        by_models[:0] = torch.autograd.grad(loss, model)
        losses.insert(0, loss.detach())

        below = inputs if index == 0 else activities[index - 1].spikes
        weights = network.layers[index].weights()
        displacement = torch.zeros_like(below[0], requires_grad=True)
        for weight in weights:
            weight.requires_grad_()
        activity = mean_activity(network, index, below + displacement)
        *found, arriving = torch.autograd.grad(
            (synthetic.detach().view_as(activity) * activity).sum(), [*weights, displacement]
        )
        by_layers[:0] = [gradient / len(labels) for gradient in found]
        for weight in weights:
            weight.requires_grad_(False)
    (*ours, _, _), of_models, answer = learn(network, inputs, labels, models)
    assert all(float(gradient.abs().max()) > 0 for gradient in [*by_layers, *by_models])
    for a, b in zip([*ours, *of_models], [*by_layers, *by_models], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(answer.loss, torch.stack(losses).float(), check_dtype=False, rtol=1e-6, atol=1e-9)


def true_gradients(network: Network, inputs: Tensor, labels: Tensor) -> list[Tensor]:
    """dL/dh of every layer of rate neurons under one step, per row, through all layers above."""
    found = [at_top(network, network.run(inputs)[-1].spikes[0], labels)]
    for index in reversed(range(1, len(network.layers))):
        x = network.run(inputs)[index - 1].spikes.requires_grad_()
        activity = mean_activity(network, index, x)
        found[:0] = [torch.autograd.grad((activity * found[0]).sum(), x)[0][0]]
    return found


@pytest.mark.parametrize("steps", [1, 4])
def test_with_the_true_gradient_it_is_backpropagation(steps):
    """Models with more inputs than there are rows can state every row's gradient; a constant input has one for all steps."""
    network = random_network("rate")
    inputs, labels = random_batch(network, steps=1)
    rates = [activity.spikes[0] for activity in network.run(inputs)]
    models = [
        (torch.linalg.pinv(seen(network, activity, labels)) @ wanted).T
        for activity, wanted in zip(rates, true_gradients(network, inputs, labels), strict=True)
    ]
    inputs = inputs.expand(steps, -1, -1)
    theirs = gradients(network, inputs, labels)
    ours, of_models, _ = learn(network, inputs, labels, models)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert all(float(gradient.abs().max()) < 1e-12 for gradient in of_models)  # nothing is left to regress


def test_synthetic_gradients_become_the_true_ones():
    """On a fixed batch and a network that stands still, from zero; layer 1 only ever hears from the layer above it."""
    generator = torch.Generator().manual_seed(0)
    network = mlp((5,), [12, 12], 4, neuron=sp.Rate(bias=0.5), centred=False).double()
    network.readout.weight.add_(torch.randn(4, 12, generator=generator))
    inputs, labels = random_batch(network, steps=1, batch=8)
    rule = DecoupledInterfaces(optimizer=lambda parameters: torch.optim.Adam(parameters[-2:], lr=0.02))
    state = rule.initial_state(network)
    for _ in range(400):
        _, state = rule.learn(network, rule.begin(state), inputs, labels)
    rates = [activity.spikes[0] for activity in network.run(inputs)]
    for model, activity, true in zip(state.own.values(), rates, true_gradients(network, inputs, labels), strict=True):
        synthetic = seen(network, activity, labels) @ model.T
        assert float(F.cosine_similarity(synthetic.flatten(), true.flatten(), dim=0)) > 0.95


def test_at_first_only_the_readout_learns():
    network = random_network()
    inputs, labels = random_batch(network)
    models = [torch.zeros_like(model) for model in random_models(DecoupledInterfaces(), network)]
    (*hidden, readout, _), of_models, _ = learn(network, inputs, labels, models)
    assert all(float(gradient.abs().max()) == 0.0 for gradient in hidden)
    assert float(readout.abs().max()) > 0 and float(of_models[-1].abs().max()) > 0
    assert float(of_models[0].abs().max()) == 0.0  # nothing has reached the first model yet


def test_a_layer_does_not_wait_for_the_loss():
    """Its update is the same whatever the layers above and the readout are."""
    inputs, labels = random_batch(random_network())
    models = random_models(DecoupledInterfaces(), random_network())
    found = []
    for factor in (1.0, -3.0):
        network = random_network()
        network.layers[1].synapse.weight.mul_(factor)
        network.readout.weight.mul_(factor)
        found.append(learn(network, inputs, labels, models)[0][:2])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
