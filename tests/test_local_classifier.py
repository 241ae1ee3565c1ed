"""Local classifiers against autograd's gradient of each layer's own loss, paths between neurons cut, in float64."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from oracle import Spike, forward, random_batch, random_network, raw_update
from torch import Tensor

import spikeprop as sp
from spikeprop.models import mlp
from spikeprop.rules.base import learned_by
from spikeprop.rules.local_classifier import LocalClassifier

EXACT, SHARED = LocalClassifier(trace="exact"), LocalClassifier()


def local_readouts(network: sp.Network) -> list[Tensor]:
    state = EXACT.initial_state(network, generator=torch.Generator().manual_seed(0))
    return [state.own[f"readout.{index}"] for index in range(len(network.layers))]


def local_losses(network: sp.Network, everything: list[list[Tensor]], labels: Tensor) -> list[Tensor]:
    """The mean over steps and rows of every layer's cross-entropy (half the squared error)."""
    losses = []
    for spikes, readout in zip(everything, local_readouts(network), strict=True):
        per_step = []
        for step, present in enumerate(spikes):
            outputs = present.flatten(1) @ readout.T
            if labels.is_floating_point():
                per_step.append(0.5 * (outputs - labels).square().sum(1).mean())
            else:
                per_step.append(F.cross_entropy(outputs, labels[step] if labels.dim() == 2 else labels))
        losses.append(torch.stack(per_step).mean())
    return losses


def check(network: sp.Network, inputs: Tensor, labels: Tensor, rule: LocalClassifier = EXACT) -> None:
    weights = [weight for layer in network.layers for weight in layer.weights()]
    [weight.requires_grad_() for weight in weights]
    losses = local_losses(network, forward(network, inputs, cut_layers=True, cut_recurrence=True), labels)
    theirs = torch.autograd.grad(sum(losses), weights)
    [weight.requires_grad_(False) for weight in weights]
    assert all(float(x.abs().max()) > 0 for x in theirs)
    for a, b in zip(raw_update(rule, network, inputs, labels), theirs, strict=False):  # the readout's come after
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    answer, _ = rule.learn(network, rule.initial_state(network, generator=torch.Generator().manual_seed(0)), inputs, labels)
    torch.testing.assert_close(answer.loss, torch.stack(losses).detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("reset", ["zero", "subtract", "none"])
@pytest.mark.parametrize(
    ("kind", "recurrent", "alpha"), [("lif", False, 0.0), ("lif", True, 0.0), ("lif", True, 0.4), ("conv", False, 0.4)]
)
def test_equals_the_gradient_of_the_local_losses(kind, recurrent, alpha, reset):
    network = random_network(kind, recurrent=recurrent, alpha=alpha, reset_mechanism=reset, threshold=0.75)
    check(network, *random_batch(network))


@pytest.mark.parametrize("recurrent", [False, True])
@pytest.mark.parametrize("rule", [EXACT, SHARED], ids=["exact", "shared"])
def test_on_rate_neurons_the_readout_sees_the_activity(rule, recurrent):
    network = random_network("rate", recurrent=recurrent)
    check(network, *random_batch(network), rule)


@pytest.mark.parametrize("kind", ["lif", "conv"])
def test_the_shared_trace_is_exact_where_no_reset_wipes_the_membrane(kind):
    network = random_network(kind, reset_mechanism="subtract", alpha=0.4, threshold=0.75)
    check(network, *random_batch(network), SHARED)


def test_the_shared_trace_holds_the_reset_constant():
    network = random_network()
    inputs, labels = random_batch(network)
    layer = network.layers[0]
    weight, bias = (tensor.detach().clone().requires_grad_() for tensor in layer.weights())
    membrane, spikes = torch.zeros(3, 6, dtype=torch.float64), []
    for x in inputs:
        membrane = layer.neuron.beta * membrane + (x - network.input_mean) @ weight.T + bias
        spikes.append(Spike.apply(membrane - layer.neuron.threshold))
        membrane = membrane - (membrane * spikes[-1]).detach()
    silent = [torch.zeros(3, 7, dtype=torch.float64)]
    theirs = torch.autograd.grad(local_losses(network, [spikes, silent], labels)[0], [weight, bias])
    for a, b in zip(raw_update(SHARED, network, inputs, labels), theirs, strict=False):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_each_step_has_its_own_label():
    network = random_network()
    inputs, _ = random_batch(network)
    check(network, inputs, torch.randint(4, (6, 3), generator=torch.Generator().manual_seed(0)))


def test_regression_descends_squared_errors():
    network = random_network()
    network.regression = True
    inputs, _ = random_batch(network)
    check(network, inputs, torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))


def test_a_stream_of_single_steps_asks_for_what_the_whole_does():
    network = random_network(recurrent=True, alpha=0.4)
    network.centred = False  # or the running rates would move the network between the calls
    inputs, labels = random_batch(network)
    rule = LocalClassifier(optimizer=partial(torch.optim.SGD, lr=0.0))
    whole = raw_update(rule, network, inputs, labels)[:-2]
    state = rule.begin(rule.initial_state(network, generator=torch.Generator().manual_seed(0)))
    total = [torch.zeros_like(gradient) for gradient in whole]
    for x in inputs:
        _, state = rule.learn(network, state, x[None], labels)
        for part, weight in zip(total, learned_by(network), strict=False):
            part += weight.grad / len(inputs)
    for a, b in zip(total, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_the_readouts_stay_as_they_were_drawn_with_a_known_spread():
    network = mlp((20,), [400, 900], 300)
    rule = LocalClassifier(scale=3.0)
    state = rule.initial_state(network)
    before = {name: weight.clone() for name, weight in state.own.items()}
    rule.learn(network, state, torch.rand(2, 4, 20), torch.arange(4))
    for name, weight in state.own.items():
        assert torch.equal(weight, before[name])
        assert float(weight.std()) * weight.shape[1] ** 0.5 == pytest.approx(3.0, rel=0.02)


def test_learns_digits():
    data = sp.data.load("digits")
    network = mlp(data.input_shape, [32, 32], 10)
    sp.fit(network, LocalClassifier(), data, num_steps=8, epochs=4, progress=False)
    assert sp.evaluate(network, data.validation, 8).accuracy["readout"] > 0.85
