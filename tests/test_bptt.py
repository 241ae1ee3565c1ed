"""BPTT against a plain unrolled loop under autograd, float64; truncation, the hard derivative and the literal one."""

from dataclasses import dataclass

import pytest
import torch
from oracle import gradients, random_batch, random_network, raw_update

import spikeprop as sp
from spikeprop.rules.base import learned_by
from spikeprop.surrogate import Hard, LearnOn


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("reset", ["zero", "subtract", "none"])
@pytest.mark.parametrize(
    ("kind", "recurrent", "alpha"), [("lif", False, 0.0), ("lif", True, 0.0), ("lif", True, 0.4), ("conv", False, 0.4)]
)
def test_equals_an_unrolled_loop(kind, recurrent, alpha, reset, attached):
    network = random_network(kind, recurrent=recurrent, alpha=alpha, reset_mechanism=reset)
    inputs, labels = random_batch(network)
    rule = sp.BPTT(reset_gradient="attached" if attached else "detached")
    ours = raw_update(rule, network, inputs, labels)
    theirs = gradients(network, inputs, labels, attached_reset=attached)
    assert all(float(x.abs().max()) > 0 for x in theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("recurrent", [False, True])
def test_on_rate_neurons_it_is_backpropagation(recurrent):
    network = random_network("rate", recurrent=recurrent)
    inputs, labels = random_batch(network)
    for a, b in zip(raw_update(sp.BPTT(), network, inputs, labels), gradients(network, inputs, labels), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_the_options_of_the_reset_differ():
    network = random_network()
    inputs, labels = random_batch(network)
    detached, attached = (
        raw_update(sp.BPTT(reset_gradient=option), network, inputs, labels) for option in ("detached", "attached")
    )
    assert not torch.allclose(detached[0], attached[0], rtol=1e-3)


def test_truncated_to_the_whole_sequence_it_is_bptt():
    network = random_network(recurrent=True)
    inputs, labels = random_batch(network, steps=6)
    whole, cut, short = (raw_update(sp.BPTT(update_every=k), network, inputs, labels) for k in (None, 6, 2))
    assert all(torch.equal(a, b) for a, b in zip(whole, cut, strict=True))
    assert not torch.allclose(whole[0], short[0])


def test_truncation_cuts_the_graph_where_it_says():
    """Windows of two steps are calls of two steps: no gradient passes from one to the next, the state does."""
    network = random_network(recurrent=True)
    inputs, labels = random_batch(network, steps=6)
    ours = raw_update(sp.BPTT(update_every=2), network, inputs, labels)
    rule = sp.BPTT()
    state = rule.begin(rule.initial_state(network))
    for start in (0, 2, 4):
        _, state = rule.learn(network, state, inputs[start : start + 2], labels)
    assert all(torch.equal(a, weight.grad) for a, weight in zip(ours, learned_by(network), strict=True))


def test_hard_derivative_leaves_silent_neurons_alone():
    network = random_network(threshold=1.0)
    network.layers[0].bias[2] = -50.0  # never reaches its threshold
    inputs, labels = random_batch(network)
    smooth, hard = (raw_update(sp.BPTT(surrogate=s), network, inputs, labels) for s in (sp.ATan(), Hard()))
    assert float(hard[0][2].abs().max()) == 0.0
    assert float(hard[0].abs().max()) > 0.0
    assert float(smooth[0][2].abs().max()) > 0.0


@dataclass(frozen=True)
class Literal(LearnOn):
    def __call__(self, membrane, threshold):
        return (membrane > threshold).to(membrane), torch.zeros_like(membrane)


def test_literal_derivative_moves_no_hidden_weight():
    network = random_network()
    inputs, labels = random_batch(network)
    *hidden, weight, bias = raw_update(sp.BPTT(surrogate=Literal()), network, inputs, labels)
    assert all(float(gradient.abs().max()) == 0.0 for gradient in hidden)
    assert float(weight.abs().max()) > 0.0
    assert float(bias.abs().max()) > 0.0


def test_unknown_reset_gradient_is_refused():
    with pytest.raises(sp.errors.InputError, match=r"BPTT: reset_gradient = 'open' is not one of"):
        sp.BPTT(reset_gradient="open").initial_state(random_network())
