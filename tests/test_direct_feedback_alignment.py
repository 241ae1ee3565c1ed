"""Direct feedback alignment: autograd of <projected error, activity>, layer by layer, with all else held constant."""

import pytest
import torch
from oracle import forward, loss_at_readout, random_batch, random_network

import spikeprop as sp
from spikeprop import alignment, models
from spikeprop.rules.base import learned_by


def claimed(network, feedback, inputs, labels):
    """The gradient of sum_l <delta B_l, mean activity of layer l>, each layer's inputs and the error constant."""
    weights = [weight for layer in network.layers for weight in layer.weights()]
    for weight in weights:
        weight.requires_grad_(True)
    try:
        spikes = forward(network, inputs, cut_layers=True, cut_recurrence=True)
        rates = [torch.stack(layer).mean(0).flatten(1) for layer in spikes]
        outputs = (rates[-1] @ network.readout.weight.T + network.readout.bias).detach().requires_grad_(True)
        delta = torch.autograd.grad(loss_at_outputs(outputs, labels), outputs)[0]
        total = sum((delta @ matrix * rate).sum() for matrix, rate in zip(feedback, rates, strict=True))
        return torch.autograd.grad(total, weights)
    finally:
        for weight in weights:
            weight.requires_grad_(False)


def loss_at_outputs(outputs, labels):
    if labels.is_floating_point():
        return 0.5 * (outputs - labels).square().sum(1).mean()
    return torch.nn.functional.cross_entropy(outputs, labels)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("lif", {}),
        ("lif", {"recurrent": True, "alpha": 0.4}),
        ("lif", {"reset_mechanism": "none"}),
        ("conv", {}),
        ("rate", {}),
    ],
)
def test_equals_the_gradient_of_what_it_descends(kind, settings):
    network = random_network(kind, **settings)
    inputs, labels = random_batch(network)
    rule = sp.DirectFeedbackAlignment()
    state = rule.initial_state(network, generator=torch.Generator().manual_seed(1))
    feedback = [state.own[f"feedback.{index}"] for index in range(len(network.layers))]
    expected = claimed(network, feedback, inputs, labels)
    loss = loss_at_readout(network, forward(network, inputs)[-1], labels)
    answer, _ = rule.learn(network, rule.begin(state), inputs, labels)
    for weight, gradient in zip(learned_by(network), expected, strict=False):
        torch.testing.assert_close(weight.grad, gradient, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(answer.loss, loss.expand(len(network.layers)))


def test_its_update_turns_towards_backpropagation():
    """Nokland's point: the forward weights learn to make a fixed feedback useful."""
    data = sp.data.load("digits")
    network = models.mlp(data.input_shape, [32, 32], 10, seed=0)
    rule = sp.DirectFeedbackAlignment()
    observe = alignment.observer(rule, data.train.inputs[:128].expand(8, -1, -1, -1, -1), data.train.labels[:128])
    history = sp.fit(network, rule, data, 8, epochs=3, progress=False, observe=observe)
    last = history.epochs[-1]["alignment"]
    assert min(last) > 0.3
