"""Local representation alignment against its own equations written out under autograd, float64, one layer at a time."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from oracle import NETWORKS, gradients, loss_at_readout, mean_activity, random_batch, random_network, raw_update
from torch import Tensor

import spikeprop as sp
from spikeprop.models import mlp
from spikeprop.network import Network
from spikeprop.rules.base import learned_by
from spikeprop.rules.local_representation_alignment import LocalRepresentationAlignment


def smooth(network: Network, index: int, membrane: Tensor) -> tuple[Tensor, Tensor]:
    """The activation that stands for the spike, and its derivative, written out."""
    neuron = network.layers[index].neuron
    if not neuron.spiking:
        return F.relu(membrane), (membrane > 0).to(membrane)
    distance = torch.pi * (membrane - neuron.threshold)
    return torch.atan(distance) / torch.pi, 1.0 / (1.0 + distance**2)


def penalty(missing: Tensor) -> Tensor:
    """The log-penalty, summed over rows and neurons."""
    return torch.log(1.0 + missing**2).sum()


def by_autograd(network: Network, inputs: Tensor, labels: Tensor, rule, feedback: list[Tensor]) -> list[Tensor]:
    """Gradients of every layer's local loss by its own weights, from the top down."""
    activities = network.run(inputs)
    below = [inputs, *(activity.spikes for activity in activities[:-1])]
    rates = activities[-1].spikes.mean(0).requires_grad_()
    outputs = rates.flatten(1) @ network.readout.weight.T + network.readout.bias
    outputs.retain_grad()
    loss = 0.5 * (outputs - labels).square().sum() if network.regression else F.cross_entropy(outputs, labels, reduction="sum")
    loss.backward()
    arriving, above = rates.grad, outputs.grad
    found = []
    for index in reversed(range(len(activities))):
        membrane = activities[index].membrane
        value, slope = smooth(network, index, membrane)
        direction = arriving * slope if rule.feedback == "diff" else (above.flatten(1) @ feedback[index]).view_as(arriving)
        moved = smooth(network, index, membrane - rule.step * direction)[0]
        target = activities[index].spikes.mean(0) + (moved - value).mean(0)

        weights = network.layers[index].weights()
        displacement = torch.zeros_like(below[index][0], requires_grad=True)
        for weight in weights:
            weight.requires_grad_()
        activity = mean_activity(network, index, below[index] + displacement)
        loss = penalty(activity - target)
        *by_weights, arriving, above = torch.autograd.grad(
            loss, [*weights, displacement, activity], allow_unused=True, materialize_grads=True
        )
        found[:0] = [gradient / inputs.shape[1] for gradient in by_weights]
        for weight in weights:
            weight.requires_grad_(False)
    return found


@pytest.mark.parametrize("feedback", ["diff", "fdbk"])
@pytest.mark.parametrize(("kind", "options"), NETWORKS)
def test_each_layer_descends_its_log_penalty(kind, options, feedback):
    network = random_network(kind, **options)
    inputs, labels = random_batch(network)
    rule = LocalRepresentationAlignment(feedback=feedback, step=0.8)
    own = rule.initial_state(network, generator=torch.Generator().manual_seed(0)).own
    weights = [own[f"feedback.{index}"] for index in range(len(network.layers))] if own else []
    *ours, _, _ = raw_update(rule, network, inputs, labels)
    theirs = by_autograd(network, inputs, labels, rule, weights)
    assert all(float(gradient.abs().max()) > 0 for gradient in theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_real_targets():
    network = random_network()
    network.regression = True
    inputs, _ = random_batch(network)
    wanted = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rule = LocalRepresentationAlignment()
    *ours, _, _ = raw_update(rule, network, inputs, wanted)
    for a, b in zip(ours, by_autograd(network, inputs, wanted, rule, []), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_near_its_target_a_rate_network_is_trained_by_backpropagation():
    """While no unit crosses its kink and the errors are small, the saturating losses' derivatives are those of the readout."""
    network = random_network("rate")
    for layer in network.layers:
        layer.bias.add_(3.0)  # far from the kink
    network.readout.weight.mul_(1e-4)
    inputs, labels = random_batch(network, steps=1)
    ours = raw_update(LocalRepresentationAlignment(step=0.5), network, inputs, labels)
    for a, b in zip(ours, gradients(network, inputs, labels), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-12)


def test_the_penalty_saturates():
    """A hundredfold error at the output moves the last layer less than a moderate one."""
    network = random_network("rate")
    network.layers[-1].bias.add_(5.0)
    inputs, labels = random_batch(network)
    moderate, huge = (
        raw_update(LocalRepresentationAlignment(step=step), network, inputs, labels)[2].abs().sum() for step in (1.0, 100.0)
    )
    assert huge < moderate


def test_learned_feedback_follows_the_forward_weights():
    """On rate neurons and one step, E gets the gradient of the weights that it stands against: of readout and layer 2."""
    network = random_network("rate")
    inputs, labels = random_batch(network, steps=1)
    rule = LocalRepresentationAlignment(feedback="fdbk", learn_feedback=True)
    state = rule.initial_state(network)
    rule.learn(network, rule.begin(state), inputs, labels)
    _, _, second, _, readout, _ = (weight.grad for weight in learned_by(network))
    torch.testing.assert_close(state.own["feedback.0"].grad, second)
    torch.testing.assert_close(state.own["feedback.1"].grad, readout)
    assert float(second.abs().max()) > 0


@pytest.mark.parametrize("learned", [False, True])
def test_feedback_moves_only_if_it_learns(learned):
    network = random_network()
    inputs, labels = random_batch(network)
    rule = LocalRepresentationAlignment(feedback="fdbk", learn_feedback=learned)
    state = rule.initial_state(network)
    before = {name: weight.clone() for name, weight in state.own.items()}
    rule.learn(network, rule.begin(state), inputs, labels)
    assert [not torch.equal(before[name], state.own[name]) for name in before] == [learned, learned]


def test_the_loss_that_it_reports():
    network = random_network()
    inputs, labels = random_batch(network)
    activities = network.run(inputs)
    rates = activities[-1].spikes.mean(0).requires_grad_()
    (arriving,) = torch.autograd.grad(3.0 * loss_at_readout(network, list(rates.expand(6, -1, -1)), labels), rates)
    value, slope = smooth(network, 1, activities[1].membrane)
    moved, _ = smooth(network, 1, activities[1].membrane - 0.5 * arriving * slope)
    rule = LocalRepresentationAlignment()
    answer, _ = rule.learn(network, rule.begin(rule.initial_state(network)), inputs, labels)
    torch.testing.assert_close(answer.loss[1], penalty((moved - value).mean(0)) / 3)


def test_what_it_asks_of_a_machine_depends_on_the_feedback():
    diff, fixed, learned = (
        LocalRepresentationAlignment(**options).facts
        for options in ({}, {"feedback": "fdbk"}, {"feedback": "fdbk", "learn_feedback": True})
    )
    assert (diff.symmetric_weights, diff.extra_weights) == (True, "none")
    assert not fixed.symmetric_weights and "fixed" in fixed.extra_weights and "learned" in learned.extra_weights


@pytest.mark.parametrize("options", [{"feedback": "random"}, {"step": 0.0}, {"learn_feedback": True}])
def test_refuses_what_makes_no_sense(options):
    with pytest.raises(sp.errors.InputError, match=next(iter(options))):
        LocalRepresentationAlignment(**options)


@pytest.mark.parametrize("options", [{}, {"feedback": "fdbk"}, {"feedback": "fdbk", "learn_feedback": True}])
def test_digits_well_above_random_features(options):
    """A readout on the layers as they are drawn stays below 0.7, however long it learns."""
    data = sp.data.load("digits")
    network = mlp(data.input_shape, [32, 32], 10)
    rule = LocalRepresentationAlignment(optimizer=partial(torch.optim.Adam, lr=1.6e-2, fused=True), **options)
    sp.fit(network, rule, data, num_steps=8, epochs=2, progress=False)
    assert sp.evaluate(network, data.validation, 8).accuracy["readout"] > 0.85
