"""Feedback alignment and Kolen-Pollack against autograd through synapses whose way back has other weights, in float64."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from oracle import Spike, forward, gradients, random_batch, random_network, raw_update
from torch import Tensor, nn

import spikeprop as sp
from spikeprop.feedback import replaced_weights
from spikeprop.models import mlp
from spikeprop.rules.base import learned_by
from spikeprop.rules.feedback_alignment import FeedbackAlignment
from spikeprop.rules.kolen_pollack import KolenPollack

RULES = [FeedbackAlignment(), KolenPollack(decay=0.0)]
STILL = partial(torch.optim.SGD, lr=0.0)
NETWORKS = [
    ("lif", {}),
    ("lif", {"alpha": 0.4}),
    ("lif", {"reset_mechanism": "subtract", "threshold": 0.75}),
    ("lif", {"recurrent": True}),
    ("lif", {"recurrent": True, "alpha": 0.4, "reset_mechanism": "none"}),
    ("lif", {"recurrent": True, "beta": torch.linspace(0.2, 0.9, 7), "reset_mechanism": "zero"}),
    ("conv", {"alpha": 0.4}),
    ("rate", {}),
    ("rate", {"recurrent": True}),
]


def build(kind: str, settings: dict) -> sp.Network:
    if isinstance(settings.get("beta"), Tensor):  # per neuron, so both layers must be as wide
        network = mlp((5,), [7, 7], 4, neuron=sp.LIF(settings["beta"], 0.7), gain=1.5, recurrent=True).double()
        network.readout.weight.normal_(generator=torch.Generator().manual_seed(0))
        return network
    return random_network(kind, **settings)


class Replaced(nn.Module):
    """Forward through W, backward through B; written as a sum whose second part is zero."""

    def __init__(self, synapse: sp.Dense, feedback: Tensor) -> None:
        super().__init__()
        self.synapse, self.back = synapse, copy.deepcopy(synapse)
        [parameter.data.copy_(feedback) for parameter in self.back.parameters()]

    @property
    def weight(self) -> Tensor:
        return self.synapse.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.synapse(x.detach()) + self.back(x) - self.back(x).detach()


def oracle(
    network: sp.Network, feedback: dict[str, Tensor], inputs: Tensor, labels: Tensor, run: Callable = forward
) -> list[Tensor]:
    twin = copy.deepcopy(network)
    weights = learned_by(twin)
    [weight.requires_grad_() for weight in weights]
    for index, layer in enumerate(twin.layers):
        if index > 0:
            layer.synapse = Replaced(layer.synapse, feedback[f"synapse.{index}"])
        if layer.recurrent is not None:
            layer.recurrent = Replaced(layer.recurrent, feedback[f"recurrent.{index}"])
    rates = torch.stack(run(twin, inputs)[-1]).mean(0).flatten(1)
    back = rates @ feedback["readout"].T
    outputs = rates.detach() @ twin.readout.weight.T + back - back.detach() + twin.readout.bias
    return list(torch.autograd.grad(F.cross_entropy(outputs, labels), weights))


def own_weights(rule: object, network: sp.Network) -> dict[str, Tensor]:
    return rule.initial_state(network, generator=torch.Generator().manual_seed(0)).own


@pytest.mark.parametrize("rule", RULES, ids=["fa", "kp"])
@pytest.mark.parametrize(("kind", "settings"), NETWORKS)
def test_is_backpropagation_through_other_weights(rule, kind, settings):
    network = build(kind, settings)
    inputs, labels = random_batch(network)
    theirs = oracle(network, own_weights(rule, network), inputs, labels)
    assert all(float(x.abs().max()) > 0 for x in theirs)
    for a, b in zip(raw_update(rule, network, inputs, labels), theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rule", RULES, ids=["fa", "kp"])
@pytest.mark.parametrize(("kind", "settings"), NETWORKS)
def test_with_the_forward_weights_it_is_bptt(rule, kind, settings):
    network = build(kind, settings)
    inputs, labels = random_batch(network)
    twin = copy.deepcopy(network)
    state = rule.initial_state(twin)
    for name, weight in replaced_weights(twin).items():
        state.own[name].copy_(weight)
    rule.learn(twin, rule.begin(state), inputs, labels)
    for weight, b in zip(learned_by(twin), gradients(network, inputs, labels), strict=True):
        torch.testing.assert_close(weight.grad, b, rtol=1e-9, atol=1e-12)


def test_on_rate_neurons_it_is_lillicraps():
    """The published rule, written out: delta_l = (delta_{l+1} B_{l+1}) f'(a_l), dW_l = delta_l^T h_{l-1}."""
    network = random_network("rate")
    network.centred = False
    inputs, labels = random_batch(network, steps=1)
    (w1, b1), (w2, b2) = (layer.weights() for layer in network.layers)
    feedback = own_weights(FeedbackAlignment(), network)
    a1 = inputs[0] @ w1.T + b1
    a2 = a1.relu() @ w2.T + b2
    outputs = a2.relu() @ network.readout.weight.T + network.readout.bias
    error = (outputs.softmax(1) - F.one_hot(labels, 4)) / len(labels)
    delta2 = (error @ feedback["readout"]) * (a2 > 0)
    delta1 = (delta2 @ feedback["synapse.1"]) * (a1 > 0)
    wanted = [delta1.T @ inputs[0], delta1.sum(0), delta2.T @ a1.relu(), delta2.sum(0), error.T @ a2.relu(), error.sum(0)]
    for a, b in zip(raw_update(FeedbackAlignment(), network, inputs, labels), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def ungated(network: sp.Network, inputs: Tensor) -> list[list[Tensor]]:
    """What a reset to zero takes off the membrane is held constant, rather than the spike."""
    everything, x = [], list(inputs)
    for layer, mean in zip(network.layers, [network.input_mean, network.layers[0].rate], strict=True):
        membrane, spikes = torch.zeros(1, dtype=torch.float64), []
        for present in x:
            membrane = 0.8 * membrane + layer.synapse(present) + layer.bias - layer.synapse(mean[None])
            spikes.append(Spike.apply(membrane - 0.7))
            membrane = membrane - (membrane * spikes[-1]).detach()
        everything.append(spikes)
        x = spikes
    return everything


@pytest.mark.parametrize("rule", [FeedbackAlignment(trace="shared"), KolenPollack(decay=0.0, trace="shared")])
def test_the_shared_trace_holds_the_reset_constant(rule):
    network = random_network()
    inputs, labels = random_batch(network)
    feedback = own_weights(rule, network)
    ours, theirs = raw_update(rule, network, inputs, labels), oracle(network, feedback, inputs, labels, ungated)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(theirs[0], oracle(network, feedback, inputs, labels)[0], rtol=1e-3)


def test_scale_is_the_standard_deviation_of_the_feedback():
    network = mlp((20,), [400, 900], 300)
    found = own_weights(FeedbackAlignment(scale=3.0), network)
    assert set(found) == {"synapse.1", "readout"}
    for weight in found.values():
        assert float(weight.std()) * weight.shape[1] ** 0.5 == pytest.approx(3.0, rel=0.02)


def test_a_stream_of_single_steps_is_answered_as_the_whole():
    network = random_network(recurrent=True)
    network.centred = False
    inputs, labels = random_batch(network)
    rule = FeedbackAlignment(optimizer=STILL)
    whole, _ = rule.learn(network, rule.initial_state(network), inputs, labels)
    state = rule.begin(rule.initial_state(network))
    for x in inputs:
        answer, state = rule.learn(network, state, x[None], labels)
    torch.testing.assert_close(answer.outputs, whole.outputs)
    assert float(learned_by(network)[0].grad.abs().max()) > 0.0


@pytest.mark.parametrize(
    "optimizer",
    [
        partial(torch.optim.SGD, lr=0.2),
        partial(torch.optim.SGD, lr=0.05, momentum=0.9),
        partial(torch.optim.Adam, lr=0.01),
    ],
)
def test_kolen_pollack_forgets_the_difference_at_a_rate_known_in_advance(optimizer):
    network = random_network(recurrent=True)
    inputs, labels = random_batch(network)
    rule = KolenPollack(decay=0.1 / optimizer.keywords["lr"], optimizer=optimizer)
    state = rule.initial_state(network)
    forward_weights = replaced_weights(network)
    before = {name: (weight.clone(), state.own[name].clone()) for name, weight in forward_weights.items()}
    updates = 20
    for _ in range(updates):
        _, state = rule.learn(network, rule.begin(state), inputs, labels)
    left = (1.0 - 0.1) ** updates
    for name, weight in forward_weights.items():
        w, b = before[name]
        torch.testing.assert_close(weight - state.own[name], left * (w - b), rtol=1e-9, atol=1e-12)
        assert float((weight - left * w).abs().max()) > 1e-3  # it also learned


def test_kolen_pollack_decays_with_the_rate_of_the_moment():
    network = random_network()
    inputs, labels = random_batch(network)
    rule = KolenPollack(decay=2.0, optimizer=partial(torch.optim.SGD, lr=0.1))
    state = rule.initial_state(network)
    before = network.readout.weight - state.own["readout"]
    for lr in (0.1, 0.05):
        state.optimizer.param_groups[0]["lr"] = lr
        _, state = rule.learn(network, rule.begin(state), inputs, labels)
    torch.testing.assert_close(network.readout.weight - state.own["readout"], before * 0.8 * 0.9, rtol=1e-9, atol=1e-12)


def test_negative_decay_is_refused():
    with pytest.raises(sp.errors.InputError, match=r"KolenPollack: decay = -1 must be at least 0"):
        KolenPollack(decay=-1.0).initial_state(random_network())


@pytest.mark.parametrize(
    ("rule", "floor"),
    [(FeedbackAlignment(), 0.1), (KolenPollack(decay=1.0, optimizer=partial(torch.optim.Adam, lr=8e-3)), 0.9)],
)
def test_weights_align_while_digits_are_learned(rule, floor):
    """By chance cosines would stay within a few hundredths: 1 / sqrt(1024) is a standard deviation for 32 x 32 weights."""
    data = sp.data.load("digits")
    network = mlp(data.input_shape, [32, 32], 10)
    seen = []
    sp.fit(
        network,
        rule,
        data,
        num_steps=8,
        epochs=3,
        progress=False,
        observe=lambda network, state: seen.append(rule.weight_alignment(network, state)) or {},
    )
    assert sp.evaluate(network, data.validation, 8).accuracy["readout"] > 0.85
    assert min(seen[-1].values()) > floor
