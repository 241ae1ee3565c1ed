"""e-prop against autograd with every path between neurons cut, in float64; its learning signals; streams in flat memory."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from oracle import Spike, forward, gradients, loss_at_readout, random_batch, random_network, raw_update
from torch import Tensor, nn

import spikeprop as sp
from spikeprop.models import mlp
from spikeprop.rules.base import learned_by
from spikeprop.rules.e_prop import EProp

SYMMETRIC, RANDOM = EProp(broadcast="symmetric"), EProp(broadcast="random")
STILL = partial(torch.optim.SGD, lr=0.0)
NETWORKS = [
    ("lif", {}),
    ("lif", {"alpha": 0.4, "reset_mechanism": "subtract", "threshold": 0.75}),
    ("lif", {"recurrent": True, "alpha": 0.4}),
    ("lif", {"recurrent": True, "reset_mechanism": "none"}),
    ("rate", {}),
    ("rate", {"recurrent": True}),
]


def single_layer(neuron: sp.LIF) -> sp.Network:
    network = mlp((5,), [7], 4, neuron=neuron, gain=1.5).double()
    network.readout.weight.normal_(generator=torch.Generator().manual_seed(0))
    network.input_mean.add_(0.1)
    return network


def check(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert all(float(x.abs().max()) > 0 for x in theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("kind", "settings"), NETWORKS)
def test_below_the_readout_it_is_the_gradient_without_paths_between_neurons(kind, settings):
    network = random_network(kind, **settings)
    inputs, labels = random_batch(network)
    theirs = gradients(network, inputs, labels, cut_layers=True, cut_recurrence=True)
    last = len(network.layers[-1].weights()) + 2  # of the last layer, and of the readout
    check(raw_update(SYMMETRIC, network, inputs, labels)[-last:], theirs[-last:])


def for_signals(network: sp.Network, inputs: Tensor, signals: list[Tensor]) -> list[Tensor]:
    """Autograd's gradient of sum_l signal_l . (mean activity of l), with every path between neurons cut."""
    weights = [weight for layer in network.layers for weight in layer.weights()]
    [weight.requires_grad_() for weight in weights]
    everything = forward(network, inputs, cut_layers=True, cut_recurrence=True)
    total = sum((torch.stack(spikes).mean(0) * signal).sum() for spikes, signal in zip(everything, signals, strict=True))
    found = torch.autograd.grad(total, weights)
    [weight.requires_grad_(False) for weight in weights]
    return list(found)


@pytest.mark.parametrize(("kind", "settings"), NETWORKS)
def test_random_broadcast_sends_every_layer_the_outputs_error(kind, settings):
    network = random_network(kind, **settings)
    inputs, labels = random_batch(network)
    weights = RANDOM.initial_state(network, generator=torch.Generator().manual_seed(0)).own
    outputs = network.readout(torch.stack(forward(network, inputs)[-1]).mean(0))
    delta = (outputs.softmax(1) - F.one_hot(labels, 4)) / len(labels)
    theirs = for_signals(network, inputs, [delta @ weights["broadcast.0"], delta @ weights["broadcast.1"]])
    check(raw_update(RANDOM, network, inputs, labels)[:-2], theirs)


@pytest.mark.parametrize(("kind", "settings"), [("lif", {}), ("lif", {"reset_mechanism": "none"}), ("rate", {})])
def test_symmetric_signal_is_the_derivative_by_a_constant_change(kind, settings):
    network = random_network(kind, **settings)
    inputs, labels = random_batch(network)
    below, above = (torch.stack(spikes) for spikes in forward(network, inputs))
    top = copy.deepcopy(network)
    top.layers = nn.ModuleList([top.layers[1]])
    top.input_mean = network.layers[0].rate
    change, rates = torch.zeros_like(below[0]).requires_grad_(), above.mean(0).requires_grad_()
    signals = [
        *torch.autograd.grad(loss_at_readout(top, forward(top, below + change)[-1], labels), [change]),
        *torch.autograd.grad(loss_at_readout(top, [rates], labels), [rates]),
    ]
    check(raw_update(SYMMETRIC, network, inputs, labels)[:-2], for_signals(network, inputs, signals))


def test_on_rate_neurons_and_a_single_step_symmetric_is_backpropagation():
    generator = torch.Generator().manual_seed(0)
    network = mlp((5,), [6, 7, 8], 4, neuron=sp.Rate(), gain=1.5).double()
    network.readout.weight.normal_(generator=generator)
    inputs, labels = random_batch(network, steps=1)
    check(raw_update(SYMMETRIC, network, inputs, labels), gradients(network, inputs, labels))


def test_steady_current_counts_in_the_symmetric_signal():
    """Far below the threshold the surrogate's slope is constant, and a synaptic current multiplies the gain by 1/(1-alpha)."""
    network = random_network(alpha=0.5, beta=0.0, threshold=1000.0)
    for layer in network.layers:
        layer.bias.zero_()
    inputs, labels = random_batch(network, steps=1)
    inputs = inputs.expand(10, -1, -1)
    plain = copy.deepcopy(network)
    for layer in plain.layers:
        layer.neuron.alpha = 0.0
    ours, without = (raw_update(SYMMETRIC, each, inputs, labels) for each in (network, plain))
    torch.testing.assert_close(
        ours[1], 2.0 * without[1], rtol=0.02, atol=0.0
    )  # the bias of layer 1 sees only its signal double


def test_shared_trace_holds_the_reset_constant():
    network = single_layer(sp.LIF(0.8, 0.7))
    inputs, labels = random_batch(network)
    weight, bias = (tensor.detach().clone().requires_grad_() for tensor in network.layers[0].weights())
    membrane, spikes = torch.zeros(3, 7, dtype=torch.float64), []
    for x in inputs:
        membrane = 0.8 * membrane + (x - network.input_mean) @ weight.T + bias
        spikes.append(Spike.apply(membrane - 0.7))
        membrane = membrane - (membrane * spikes[-1]).detach()
    theirs = torch.autograd.grad(loss_at_readout(network, spikes, labels), [weight, bias])
    exact, shared = (
        raw_update(EProp(broadcast="symmetric", trace=t), network, inputs, labels)[:2] for t in ("exact", "shared")
    )
    check(shared, list(theirs))
    assert not torch.allclose(shared[0], exact[0], rtol=1e-3)


@pytest.mark.parametrize("rule", [SYMMETRIC, RANDOM], ids=["symmetric", "random"])
@pytest.mark.parametrize("trace", ["exact", "shared"])
def test_a_stream_accumulates_to_what_the_whole_asks_for(rule, trace):
    network = random_network(recurrent=True, alpha=0.4)
    network.centred = False  # or the running rates would move the network between the calls
    inputs, labels = random_batch(network)
    rule = type(rule)(broadcast=rule.broadcast, trace=trace, optimizer=STILL)
    whole = raw_update(rule, network, inputs, labels)
    state = rule.begin(rule.initial_state(network, generator=torch.Generator().manual_seed(0)))
    for x in inputs:
        _, state = rule.learn(network, state, x[None], labels)
    check([weight.grad for weight in learned_by(network)], whole)


def test_a_stream_needs_no_more_memory_with_time():
    network = random_network(recurrent=True)
    inputs, labels = random_batch(network, steps=30)
    state, held = RANDOM.initial_state(network), []
    for x in inputs:
        _, state = RANDOM.learn(network, state, x[None], labels)
        tensors = [tensor for trace in state.stream.own["traces"] for tensor in (*trace.traces, *trace.sums, *trace.currents)]
        held.append(sum(tensor.untyped_storage().nbytes() for tensor in tensors))
    synapses = sum(weight.numel() for layer in network.layers for weight in layer.weights())
    assert held[2] == held[-1] <= 4 * 8 * inputs.shape[1] * synapses
    assert RANDOM.memory(network, 64, 8) - sp.DirectFeedbackAlignment().memory(network, 64, 8) >= held[-1]


def test_a_chain_with_pooling_before_its_weights():
    synapse = sp.Chain(sp.AvgPool2d(2), sp.Flatten(), sp.Dense(8, 6, generator=torch.Generator().manual_seed(0)))
    network = sp.Network((2, 4, 4), [(synapse, sp.LIF(0.8, 0.3))], 4).double()
    network.readout.weight.normal_(generator=torch.Generator().manual_seed(0))
    network.input_mean.add_(0.1)
    inputs, labels = random_batch(network)
    check(raw_update(SYMMETRIC, network, inputs, labels), gradients(network, inputs, labels))


def test_decays_that_differ_between_neurons():
    network = single_layer(sp.LIF(torch.linspace(0.2, 0.9, 7), 0.7, alpha=torch.linspace(0.1, 0.5, 7)))
    inputs, labels = random_batch(network)
    check(raw_update(SYMMETRIC, network, inputs, labels), gradients(network, inputs, labels))


def test_convolutions_and_unknown_broadcasts_are_refused():
    with pytest.raises(sp.errors.UnsupportedError, match=r"EProp cannot train layer 1, which is convolutional"):
        RANDOM.initial_state(random_network("conv"))
    with pytest.raises(sp.errors.InputError, match=r"EProp: broadcast = 'loud' is not one of"):
        EProp(broadcast="loud").initial_state(random_network())


@pytest.mark.parametrize("rule", [SYMMETRIC, RANDOM], ids=["symmetric", "random"])
def test_learns_digits(rule):
    data = sp.data.load("digits")
    network = mlp(data.input_shape, [32, 32], 10)
    sp.fit(network, rule, data, num_steps=8, epochs=3, progress=False)
    assert sp.evaluate(network, data.validation, 8).accuracy["readout"] > 0.85
