"""Error forward-propagation against both passes written out as plain loops, in float64; its limit; digits."""

import functools

import pytest
import torch
import torch.nn.functional as F
from oracle import random_batch, random_network, raw_update
from torch import Tensor

import spikeprop as sp
from spikeprop.errors import InputError
from spikeprop.models import mlp
from spikeprop.rules.base import learned_by
from spikeprop.rules.error_forward import ErrorForward

STANDSTILL = functools.partial(torch.optim.SGD, lr=0.0)


def loop_of(rule: ErrorForward, network: sp.Network) -> Tensor:
    """The matrix that the rule draws under seed 0, as in ``raw_update`` and ``fit``."""
    return rule.initial_state(network, generator=torch.Generator().manual_seed(0)).own["loop"]


def run(network: sp.Network, inputs: Tensor, nudge: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Spikes and pre-reset membranes of every layer from rest; the membranes depend on the weights, the spikes do not."""
    everything, membranes, x = [], [], inputs
    for index, layer in enumerate(network.layers):
        neuron = layer.neuron
        bias = layer.bias
        if network.centred:
            mean = network.input_mean if index == 0 else network.layers[index - 1].rate
            bias = bias - layer.synapse(mean.unsqueeze(0))[0] / (1.0 - neuron.alpha)
        current = after = before = torch.zeros(inputs.shape[1], *layer.output_shape, dtype=inputs.dtype)
        spikes, found = [], []
        for present in x:
            drive = layer.synapse(present) + (nudge.view_as(before) if index == 0 else 0.0)
            if layer.recurrent is not None:
                drive = drive + layer.recurrent(before)
            current = neuron.alpha * current + drive
            membrane = neuron.beta * after + current + bias
            before = (membrane > neuron.threshold).double() if neuron.spiking else membrane.detach().relu()
            resets = {"zero": membrane * before, "subtract": neuron.threshold * before, "none": 0.0}
            after = membrane - resets[neuron.reset_mechanism]
            spikes.append(before)
            found.append(membrane)
        x = torch.stack(spikes)
        everything.append(x)
        membranes.append(torch.stack(found))
    return everything, membranes


def expected(network: sp.Network, inputs: Tensor, labels: Tensor, loop: Tensor, gain: float) -> list[Tensor]:
    weights = learned_by(network)
    for weight in weights:
        weight.requires_grad_(True)
    try:
        free, membranes = run(network, inputs, torch.zeros(inputs.shape[1], len(loop.T), dtype=inputs.dtype))
        outputs = free[-1].mean(0).flatten(1) @ network.readout.weight.T + network.readout.bias
        loss = F.cross_entropy(outputs, labels)
        delta = outputs.detach().softmax(1) - F.one_hot(labels, network.outputs)
        nudged, _ = run(network, inputs, -gain * delta @ loop)
        pull = sum(((s - n) * u).sum() for s, n, u in zip(free, nudged, membranes, strict=True))
        objective = pull / (gain * inputs.shape[0] * inputs.shape[1]) + loss  # the spikes are cut off: loss moves the readout
        return list(torch.autograd.grad(objective, weights))
    finally:
        for weight in weights:
            weight.requires_grad_(False)


CASES = [
    *(("lif", recurrent, {"reset_mechanism": reset}) for recurrent in (False, True) for reset in ("zero", "subtract", "none")),
    ("lif", True, {"alpha": 0.4}),
    ("conv", False, {"alpha": 0.4, "reset_mechanism": "subtract"}),
    ("conv", False, {}),
    ("rate", False, {}),
    ("rate", True, {}),
]


@pytest.mark.parametrize(("kind", "recurrent", "neuron"), CASES)
def test_equals_the_two_passes_written_out(kind, recurrent, neuron):
    network = random_network(kind, recurrent=recurrent, **neuron)
    inputs, labels = random_batch(network)
    rule = ErrorForward(gain=3.0)
    ours = raw_update(rule, network, inputs, labels)
    theirs = expected(network, inputs, labels, loop_of(rule, network), 3.0)
    assert all(float(x.abs().max()) > 0 for x in theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_on_rate_neurons_it_is_the_error_driven_modulation_of_the_input():
    """PEPITA's equations for one step and one row, without centring: dW_l = (h_l - h_l^err) h_{l-1}^T."""
    network = random_network("rate")
    network.centred = False
    inputs, labels = random_batch(network, steps=1, batch=1)
    first, second = network.layers
    w1, w2, x = first.synapse.weight, second.synapse.weight, inputs[0, 0]
    h1 = (w1 @ x + first.bias).relu()
    h2 = (w2 @ h1 + second.bias).relu()
    e = (network.readout.weight @ h2 + network.readout.bias).softmax(0) - torch.eye(4, dtype=torch.float64)[labels[0]]
    rule = ErrorForward(gain=0.5)
    h1_err = (w1 @ x - 0.5 * e @ loop_of(rule, network) + first.bias).relu()
    h2_err = (w2 @ h1_err + second.bias).relu()
    theirs = [torch.outer(h1 - h1_err, x), h1 - h1_err, torch.outer(h2 - h2_err, h1), h2 - h2_err]
    theirs = [part / 0.5 for part in theirs] + [torch.outer(e, h2), e]
    for a, b in zip(raw_update(rule, network, inputs, labels), theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_small_nudges_are_feedback_alignment():
    """On rate neurons, layer 1 gets delta F through its slope; layer 2 the same through W_2."""
    network = random_network("rate")
    inputs, labels = random_batch(network)
    rule = ErrorForward(gain=1e-6)
    loop = loop_of(rule, network)
    free, membranes = run(network, inputs, torch.zeros(3, 6, dtype=torch.float64))
    outputs = free[-1].mean(0) @ network.readout.weight.T + network.readout.bias
    delta = (outputs.softmax(1) - F.one_hot(labels, 4)) / (inputs.shape[0] * inputs.shape[1])
    at_first = delta @ loop * (membranes[0] > 0)
    at_second = at_first @ network.layers[1].synapse.weight.T * (membranes[1] > 0)
    ours = raw_update(rule, network, inputs, labels)
    for bias, error in ((ours[1], at_first), (ours[3], at_second)):
        torch.testing.assert_close(bias, error.sum((0, 1)), rtol=1e-6, atol=1e-9)


def test_the_sequence_goes_on_from_the_free_pass():
    network = random_network(recurrent=True, alpha=0.4)
    inputs, labels = random_batch(network)
    rule = ErrorForward(optimizer=STANDSTILL)
    state = rule.begin(rule.initial_state(network))
    network.centred = False  # its means move with every update
    _, after = network.advance(network.initial_state(inputs.shape[1]), inputs)
    for step in range(len(inputs)):
        _, state = rule.learn(network, state, inputs[step : step + 1], labels)
    for ours, theirs in zip(state.stream.neurons, after, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_both_passes_of_a_later_window_start_from_the_free_state():
    """A nudge too small to move a spike leaves no error, in any window."""
    network = random_network(recurrent=True, alpha=0.4)
    inputs, labels = random_batch(network)
    *layers, weight, _ = raw_update(ErrorForward(gain=1e-9, update_every=2, optimizer=STANDSTILL), network, inputs, labels)
    assert all(float(gradient.abs().max()) == 0.0 for gradient in layers)
    assert float(weight.abs().max()) > 0.0


def test_a_gain_of_zero_is_refused():
    with pytest.raises(InputError, match="ErrorForward: gain = 0"):
        ErrorForward(gain=0.0)


def test_learns_digits_and_the_nudge_comes_to_lower_the_loss():
    data = sp.data.load("digits")
    accuracy = {}
    for rule in (sp.Shallow(), ErrorForward()):
        network = mlp(data.input_shape, [32, 32], 10)
        sp.fit(network, rule, data, num_steps=8, epochs=5, progress=False)
        accuracy[type(rule)] = sp.evaluate(network, data.validation, 8).accuracy["readout"]
    assert accuracy[ErrorForward] > accuracy[sp.Shallow] + 0.15

    images, labels = data.validation
    inputs = images.expand(8, *images.shape)
    loop = loop_of(ErrorForward(), network)
    loss, nudge, drive = [], torch.zeros(()), network.layers[0].drive(inputs)
    for _ in ("free", "nudged"):
        x = network.layers[0].run(network.layers[0].initial_state(len(images)), drive + nudge, network.fold_bias(0))[0].spikes
        second = network.layers[1]
        x = second.run(second.initial_state(len(images)), second.drive(x), network.fold_bias(1))[0].spikes
        outputs = network.readout(x.mean(0))
        loss.append(float(F.cross_entropy(outputs, labels)))
        nudge = -ErrorForward().gain * (outputs.softmax(1) - F.one_hot(labels, 10)) @ loop
    assert loss[1] < 0.8 * loss[0]
