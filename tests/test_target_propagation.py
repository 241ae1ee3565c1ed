"""Target propagation: inverses, targets and hidden updates against autograd and closed forms, float64."""

import pytest
import torch
import torch.nn.functional as F
from oracle import NETWORKS, alone, forward, gradients, random_batch, random_network, raw_update
from torch import Tensor

import spikeprop as sp
from spikeprop.models import mlp
from spikeprop.network import Network
from spikeprop.rules.target_propagation import TargetPropagation


def learn(rule: TargetPropagation, network: Network, inputs: Tensor, labels: Tensor, inverses: list[Tensor] | None = None):
    """One update; the gradients of the inverses and the answer. ``inverses`` replace those that were drawn."""
    state = rule.begin(rule.initial_state(network, generator=torch.Generator().manual_seed(0)))
    for own, wanted in zip(state.own.values(), inverses or [], strict=False):
        own.copy_(wanted)
    answer, state = rule.learn(network, state, inputs, labels)
    return [weight.grad for weight in state.own.values()], answer


def drawn_inverses(rule: TargetPropagation, network: Network) -> list[Tensor]:
    state = rule.initial_state(network, generator=torch.Generator().manual_seed(0))
    return [weight.clone() for weight in state.own.values()]


def at_top(network: Network, rates: Tensor, labels: Tensor) -> Tensor:
    """dL/dh of the last layer's activity, per row."""
    rates = rates.clone().requires_grad_()
    outputs = rates.flatten(1) @ network.readout.weight.T + network.readout.bias
    (found,) = torch.autograd.grad(F.cross_entropy(outputs, labels, reduction="sum"), rates)
    return found


def targets(network: Network, rates: list[Tensor], labels: Tensor, step: float, inverses: list[Tensor]) -> list[Tensor]:
    """The targets of all layers, with g written as a function of activities."""

    def g(index: int, above: Tensor) -> Tensor:
        weight, bias = inverses[index][:, :-1], inverses[index][:, -1]
        return (above.flatten(1) @ weight.T + bias).view_as(rates[index])

    found = [rates[-1] - step * at_top(network, rates[-1], labels)]
    for index in reversed(range(len(rates) - 1)):
        found.insert(0, rates[index] + g(index, found[0]) - g(index, rates[index + 1]))
    return found


@pytest.mark.parametrize(("kind", "options"), NETWORKS)
def test_each_layer_descends_the_distance_from_its_target(kind, options):
    network = random_network(kind, **options)
    inputs, labels = random_batch(network)
    rule = TargetPropagation(step=0.3)
    *ours, _, _ = raw_update(rule, network, inputs, labels)
    activities = network.run(inputs)
    rates = [activity.spikes.mean(0) for activity in activities]
    wanted = targets(network, rates, labels, 0.3, drawn_inverses(rule, network))
    theirs = []
    for index, layer in enumerate(network.layers):
        below = inputs if index == 0 else activities[index - 1].spikes
        weights = layer.weights()
        for weight in weights:
            weight.requires_grad_()
        activity = torch.stack(forward(alone(network, index), below, cut_recurrence=True)[0]).mean(0)
        theirs += torch.autograd.grad((activity - wanted[index]).square().sum() / len(labels), weights)
    assert all(float(gradient.abs().max()) > 0 for gradient in theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("kind", "options"), NETWORKS)
def test_inverses_descend_their_reconstruction_loss(kind, options):
    network = random_network(kind, **options)
    inputs, labels = random_batch(network)
    rule = TargetPropagation(noise=0.3)
    inverses = drawn_inverses(rule, network)
    activities = network.run(inputs)
    state = rule.initial_state(network, generator=torch.Generator().manual_seed(0))
    theirs: list[Tensor] = []
    for index in reversed(range(1, len(network.layers))):  # the noise is drawn from the top down
        below = activities[index - 1].spikes
        corrupted = below + 0.3 * torch.randn(below.shape[1:], generator=state.generator).double()
        code = torch.stack(forward(alone(network, index), corrupted)[0]).mean(0).flatten(1)
        g = inverses[index - 1].requires_grad_()
        wrong = code @ g[:, :-1].T + g[:, -1] - corrupted.mean(0).flatten(1)
        theirs[:0] = torch.autograd.grad(0.5 * wrong.square().sum(1).mean(), g)
    ours, _ = learn(rule, network, inputs, labels)
    assert all(float(gradient.abs().max()) > 0 for gradient in theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def linear_network() -> Network:
    """Three square layers of rate neurons, far from their kink: linear and invertible."""
    generator = torch.Generator().manual_seed(1)
    network = mlp((6,), [6, 6, 6], 4, neuron=sp.Rate(bias=8.0), centred=False).double()
    for layer in network.layers:
        layer.synapse.weight.mul_(0.3).add_(torch.eye(6))
    network.readout.weight.add_(torch.randn(4, 6, generator=generator))
    return network


def test_with_exact_inverses_the_targets_are_those_of_gauss_newton():
    """What a layer is asked to change solves (J^T J) change = -step J^T dL/dh_L, J from it to the last layer by autograd.

    A linear layer's weights get d|change|^2 / dW = -2 change^T x.
    """
    network = linear_network()
    inputs, labels = random_batch(network, steps=1)
    rates = [activity.spikes[0] for activity in network.run(inputs)]
    assert all(float(activity.min()) > 0 for activity in rates)
    error = at_top(network, rates[-1], labels)
    matrices = [layer.synapse.weight.clone() for layer in network.layers]
    inverses = [F.pad(torch.linalg.inv(matrix), (0, 1)) for matrix in matrices[1:]]
    _, answer = learn(TargetPropagation(step=0.3), network, inputs, labels, inverses)
    for index, x in enumerate([inputs[0], *rates[:-1]]):

        def rest(activity: Tensor, start: int = index) -> Tensor:
            for matrix in matrices[start + 1 :]:
                activity = matrix @ activity
            return activity

        jacobian = torch.autograd.functional.jacobian(rest, rates[index][0])
        change = torch.linalg.solve(jacobian.T @ jacobian, -0.3 * jacobian.T @ error.T).T
        torch.testing.assert_close(answer.loss[index], change.square().sum(1).mean())
        torch.testing.assert_close(network.layers[index].synapse.weight.grad, -2.0 * change.T @ x / len(x))


def test_the_last_layer_descends_the_readouts_loss():
    network = random_network()
    inputs, labels = random_batch(network)
    ours = raw_update(TargetPropagation(), network, inputs, labels)
    theirs = gradients(network, inputs, labels, cut_layers=True)
    for a, b in zip(ours[2:], theirs[2:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_the_exact_inverse_has_nothing_to_learn():
    """g(x) = W^-1 (x - b) undoes its layer whatever the noise, and is where R has its minimum."""
    network = linear_network()
    inputs, labels = random_batch(network)
    exact = []
    for layer in network.layers[1:]:
        weight = torch.linalg.inv(layer.synapse.weight)
        exact.append(torch.cat([weight, -(weight @ layer.bias).unsqueeze(1)], 1))
    gradients_there, _ = learn(TargetPropagation(noise=1.0), network, inputs, labels, exact)
    gradients_elsewhere, _ = learn(TargetPropagation(noise=1.0), network, inputs, labels)
    assert all(float(gradient.abs().max()) < 1e-10 for gradient in gradients_there)
    assert all(float(gradient.abs().max()) > 1e-2 for gradient in gradients_elsewhere)


@pytest.mark.parametrize("options", [{"step": -1.0}, {"noise": -0.1}])
def test_refuses_what_makes_no_sense(options):
    with pytest.raises(sp.errors.InputError, match=next(iter(options))):
        TargetPropagation(**options)


def test_same_seed_same_noise():
    network = random_network()
    inputs, labels = random_batch(network)
    (first, _), (second, _) = (learn(TargetPropagation(), random_network(), inputs, labels) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
