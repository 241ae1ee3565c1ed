"""Forward-forward against autograd of the same local loss on a network whose input is the concatenation with the label."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from oracle import forward, random_batch, random_network
from torch import Tensor

import spikeprop as sp
from spikeprop.errors import InputError, UnsupportedError
from spikeprop.models import mlp
from spikeprop.rules.base import learned_by
from spikeprop.rules.forward_forward import ForwardForward, predict_by_goodness

CLASSES = 4
STANDSTILL = functools.partial(torch.optim.SGD, lr=0.0)


class Concatenated(torch.nn.Module):
    """One linear map of the flattened input and, in its last columns, the label."""

    def __init__(self, synapse: sp.network.Synapse, label: sp.network.Synapse, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.synapse, self.label, self.shape = synapse, label, shape

    def forward(self, x: Tensor) -> Tensor:
        own = self.label.weight.flatten(0, -2) @ x[:, -CLASSES:].T
        return self.synapse(x[:, :-CLASSES].unflatten(1, self.shape)) + own.T.unflatten(1, self.label.weight.shape[:-1])


def expected(network: sp.Network, inputs: Tensor, labels: Tensor, wrong: Tensor, rule: ForwardForward) -> list[Tensor]:
    """In the order of the optimiser's parameters: ``learned_by``, then the label synapses."""
    network = copy.deepcopy(network)
    weights = [*learned_by(network), network.target.weight]
    for weight in weights:
        weight.requires_grad_(True)
    neutral = torch.stack(forward(network, inputs, cut_layers=True)[-1]).mean(0).flatten(1).detach()
    total = F.cross_entropy(neutral @ network.readout.weight.T + network.readout.bias, labels)

    network.layers[0].synapse = Concatenated(network.layers[0].synapse, network.target, network.input_shape)
    network.input_mean = torch.cat([network.input_mean.flatten(), torch.zeros(CLASSES, dtype=torch.float64)])
    for sign, classes in ((-1.0, labels), (1.0, wrong)):
        label = (torch.eye(CLASSES, dtype=torch.float64)[classes] - 1.0 / CLASSES).expand(len(inputs), -1, -1)
        spikes = forward(network, torch.cat([inputs.flatten(2), label], 2), cut_layers=True, cut_recurrence=True)
        for layer in spikes:
            goodness = torch.stack(layer).mean(0).flatten(1).square().mean(1)
            total = total + F.softplus(sign * (goodness - rule.threshold) / rule.temperature).mean()
    return list(torch.autograd.grad(total, weights))


@pytest.mark.parametrize(
    ("kind", "recurrent", "neuron"),
    [
        ("lif", False, {"reset_mechanism": "zero"}),
        ("lif", True, {"reset_mechanism": "zero"}),
        ("lif", True, {"reset_mechanism": "subtract", "alpha": 0.4, "threshold": 0.75}),
        ("lif", False, {"reset_mechanism": "none"}),
        ("conv", False, {"alpha": 0.4}),
        ("rate", False, {}),
        ("rate", True, {}),
    ],
)
def test_equals_autograd_of_the_local_losses(kind, recurrent, neuron):
    network = random_network(kind, recurrent=recurrent, **neuron)
    inputs, labels = random_batch(network)
    rule = ForwardForward(threshold=0.2, temperature=0.3, trace="exact", optimizer=STANDSTILL)
    state = rule.begin(rule.initial_state(network, generator=torch.Generator().manual_seed(0)))
    twin = copy.deepcopy(network)
    answer, state = rule.learn(network, state, inputs, labels)
    wrong = (labels + state.stream.own["shift"]) % CLASSES
    theirs = expected(twin, inputs, labels, wrong, rule)
    assert all(float(x.abs().max()) > 0 for x in theirs)
    for parameter, b in zip(state.parameters, theirs, strict=True):
        torch.testing.assert_close(parameter.grad, b, rtol=1e-9, atol=1e-12)
    assert answer.loss.shape == (len(network.layers),)


def test_the_goodness_of_a_sequence_goes_on_from_window_to_window():
    """Two windows of a sequence see the rates since its beginning; the second's loss is that of the whole."""
    network = random_network(seed=3)
    network.centred = False
    inputs, labels = random_batch(network, steps=6)
    loss = []
    for windows in ([6], [2, 4], [1] * 6):
        rule = ForwardForward(optimizer=STANDSTILL, negative="uniform")
        twin = copy.deepcopy(network)
        state = rule.begin(rule.initial_state(twin, generator=torch.Generator().manual_seed(0)))
        start = 0
        for steps in windows:
            answer, state = rule.learn(twin, state, inputs[start : start + steps], labels)
            start += steps
        loss.append(answer.loss)
    torch.testing.assert_close(loss[1], loss[0], rtol=1e-9, atol=0)
    torch.testing.assert_close(loss[2], loss[0], rtol=1e-9, atol=0)


def test_wrong_labels_are_wrong_and_drawn_as_they_say():
    outputs = torch.tensor([2.0, 0.0, 1.0, -1.0]).expand(20_000, -1)
    labels = torch.arange(4).repeat(5_000)
    for negative, belief in (("confident", outputs[0].softmax(0)), ("uniform", torch.ones(4))):
        drawn = ForwardForward(negative=negative).wrong(outputs, labels, torch.Generator().manual_seed(0))
        assert not (drawn == labels).any()
        for label in range(4):
            share = torch.bincount(drawn[labels == label], minlength=4) / 5_000
            theirs = belief.clone()
            theirs[label] = 0.0
            # Five standard deviations of a share of 5000 draws are at most 0.035.
            torch.testing.assert_close(share, theirs / theirs.sum(), rtol=0, atol=0.035)


def test_prediction_tries_every_class():
    network = random_network("conv", seed=2)
    network.attach_target(beside_input=True, generator=torch.Generator().manual_seed(1))
    inputs, _ = random_batch(network, batch=5)
    assert torch.equal(predict_by_goodness(network, inputs[:1].expand(6, *[-1] * 4)), slow_prediction(network, inputs[[0] * 6]))
    assert torch.equal(predict_by_goodness(network, inputs), slow_prediction(network, inputs))


def slow_prediction(network: sp.Network, inputs: Tensor) -> Tensor:
    twin = copy.deepcopy(network)
    twin.layers[0].synapse = Concatenated(network.layers[0].synapse, network.target, network.input_shape)
    twin.input_mean = torch.cat([network.input_mean.flatten(), torch.zeros(CLASSES, dtype=torch.float64)])
    total = []
    for label in torch.eye(CLASSES, dtype=torch.float64) - 1.0 / CLASSES:
        spikes = forward(twin, torch.cat([inputs.flatten(2), label.expand(*inputs.shape[:2], -1)], 2))
        total.append(sum(torch.stack(layer).mean(0).flatten(1).square().mean(1) for layer in spikes))
    return torch.stack(total).argmax(0)


def test_what_it_refuses():
    with pytest.raises(InputError, match="no label synapses"):
        predict_by_goodness(random_network(), torch.zeros(2, 1, 5, dtype=torch.float64))
    with pytest.raises(InputError, match="negative = 'random' is not one of"):
        ForwardForward(negative="random")
    with pytest.raises(InputError, match="temperature = 0"):
        ForwardForward(temperature=0.0)
    with pytest.raises(InputError, match="no wrong labels"):
        ForwardForward().initial_state(mlp((3,), [4], 1))
    with pytest.raises(UnsupportedError, match="real outputs"):
        ForwardForward().initial_state(mlp((3,), [4], 2, regression=True))


def test_learns_digits_by_readout_and_by_goodness(tmp_path):
    data = sp.data.load("digits")
    optimizer = functools.partial(torch.optim.Adam, lr=1.6e-2, fused=True)
    networks = []
    for rule in (sp.Shallow(), ForwardForward(optimizer=optimizer)):
        networks.append(mlp(data.input_shape, [32, 32], 10))
        sp.fit(networks[-1], rule, data, num_steps=8, epochs=3, progress=False)
    images, labels = data.validation
    floor, readout = (sp.evaluate(network, data.validation, 8).accuracy["readout"] for network in networks)
    sp.save(networks[1], tmp_path / "network")
    predicted = predict_by_goodness(sp.load(tmp_path / "network"), images.expand(8, *images.shape))
    assert readout > floor + 0.15
    assert float((predicted == labels).float().mean()) > floor + 0.15
