"""What every learning rule must do, one line per rule in :data:`FLOORS`; its facts are held against what it does."""

import copy
from dataclasses import replace

import pytest
import torch
from oracle import random_batch, random_network, raw_update

import spikeprop as sp
from spikeprop.catalogue import RULES
from spikeprop.errors import InputError, UnsupportedError
from spikeprop.models import mlp
from spikeprop.rules.base import learned_by

# Validation accuracy on digits (mlp:32,32, T = 8, EPOCHS epochs, Adam) that the rule must exceed at this learning rate: well
# below what it reached with two seeds, above the floor of all, which is "shallow" (.63 and .71 at this rate).
EPOCHS = 4
FLOORS = {
    "bptt": (0.90, 1e-2),
    "bptt-hard": (0.72, 1e-2),
    "shallow": (0.50, 1e-2),
    "sigprop-surrogate": (0.90, 1e-2),
    "sigprop-membrane": (0.90, 1e-2),
    "sigprop-raw-membrane": (0.80, 1e-2),
    "sigprop-hebbian": (0.82, 1e-2),
    "error-forward": (0.80, 4e-3),
    "forward-forward": (0.82, 1e-2),
    "feedback-alignment": (0.88, 1e-2),
    "direct-feedback-alignment": (0.88, 1e-2),
    "kolen-pollack": (0.88, 1e-2),
    "local-classifier": (0.88, 1e-2),
    "e-prop": (0.88, 1e-2),
    "forward-mode": (0.80, 1e-2),
    "uoro": (0.75, 1e-2),
    "weight-perturbation": (0.75, 1e-2),
    "node-perturbation": (0.85, 1e-2),
    "lra-diff": (0.90, 1e-2),
    "lra-fdbk": (0.88, 1e-2),
    "target-propagation": (0.88, 1e-2),
    "decoupled-interfaces": (0.88, 1e-2),
    "contrastive-hebbian": (0.88, 1e-2),
}
NAMES = list(FLOORS)
every_rule = pytest.mark.parametrize("name", NAMES)


def refuses(name: str, kind: str) -> bool:
    return kind in RULES[name].facts.refuses


def learn(rule, network, inputs, labels, *, seed=0, updates=1):
    state = rule.initial_state(network, generator=torch.Generator().manual_seed(seed))
    for _ in range(updates):
        answer, state = rule.learn(network, rule.begin(state), inputs, labels)
    return answer, state


def test_the_table_is_whole():
    assert set(FLOORS) == set(RULES)


@every_rule
def test_deterministic_under_a_seed(name):
    network = random_network()
    inputs, labels = random_batch(network)
    twins = [copy.deepcopy(network) for _ in range(2)]
    for twin in twins:
        learn(RULES[name], twin, inputs, labels, updates=3)
    first, second = (twin.state_dict() for twin in twins)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], value) for key, value in network.state_dict().items() if key in first)


@every_rule
@pytest.mark.parametrize("what", ["silence", "saturation", "noise"])
def test_finite_whatever_the_input(name, what):
    network = random_network()
    inputs, labels = random_batch(network)
    inputs = {"silence": torch.zeros_like(inputs), "saturation": inputs * 1000.0, "noise": inputs}[what]
    answer, _ = learn(RULES[name], network, inputs, labels, updates=10)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in [*network.state_dict().values(), answer.outputs, answer.loss])


@every_rule
@pytest.mark.parametrize("steps", [1, 5])
def test_the_answer_is_that_of_the_network_over_all_steps_given(name, steps):
    network = random_network()
    inputs, labels = random_batch(network, steps=steps)
    activity = [layer.spikes for layer in network.run(inputs)]
    expected = network.readout(activity[-1].mean(0))
    answer, _ = learn(RULES[name], network, inputs, labels)
    torch.testing.assert_close(answer.outputs, expected)
    for found, spikes in zip(answer.activity, activity, strict=True):
        torch.testing.assert_close(found, spikes.mean((0, 1)))
    assert answer.loss.shape == (2,)


@every_rule
def test_a_stream_carries_its_state_and_does_not_grow(name):
    """Step by step, the last answer is still that of the whole sequence, and what the rule holds stays the same size."""
    network = random_network()
    still = replace(RULES[name], optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0), homeostasis=None)
    network.centred = False  # the running rates, which centring reads, move with every call
    inputs, labels = random_batch(network, steps=12)
    expected = network.readout(network.run(inputs)[-1].spikes.mean(0))
    state, sizes = still.begin(still.initial_state(network)), []
    for x in inputs:
        answer, state = still.learn(network, state, x.unsqueeze(0), labels)
        sizes.append(_numbers(state))
    torch.testing.assert_close(answer.outputs, expected)
    assert sizes[-1] == sizes[2]


def _numbers(thing, seen=None) -> int:
    """How many numbers all tensors hold that can be reached from an object."""
    seen = set() if seen is None else seen
    if id(thing) in seen or isinstance(thing, (str, int, float, type(None), torch.Generator, torch.nn.Module)):
        return 0
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        return thing.untyped_storage().nbytes() // thing.element_size()
    if isinstance(thing, dict):
        return sum(_numbers(part, seen) for part in thing.values())
    if isinstance(thing, (list, tuple)):
        return sum(_numbers(part, seen) for part in thing)
    return sum(_numbers(part, seen) for part in getattr(thing, "__dict__", {}).values())


@every_rule
def test_local_rules_do_not_look_above(name):
    """What the first layer learns depends on the layers above exactly where the facts say that something comes from there.

    Over a few updates: learned feedback and synthetic gradients start from nothing.
    """
    network, facts = random_network(), RULES[name].facts
    inputs, labels = random_batch(network)
    other = copy.deepcopy(network)
    other.layers[1].synapse.weight.neg_()
    other.readout.weight.neg_()
    for found in (network, other):
        learn(RULES[name], found, inputs, labels, updates=4)
    first, second = (found.layers[0].synapse.weight for found in (network, other))
    local = facts.backward == "nothing" and not facts.global_error
    assert torch.equal(first, second) == local


# Rules with an error from the output; those that learn classes alone cannot have one of zero, or be given one of our choice.
WITH_ERROR = [name for name in NAMES if RULES[name].facts.global_error and not refuses(name, "regression")]
# Carry sensitivities forward, probe the loss, or start from nothing: the readout's weights show in other ways.
OTHERWISE = ("forward-mode", "uoro", "weight-perturbation", "node-perturbation", "decoupled-interfaces")


@pytest.mark.parametrize("name", [name for name in WITH_ERROR if name not in OTHERWISE])
def test_symmetric_weights_are_used_where_the_facts_say_so(name):
    """The same error at the output through three times the readout: only a rule that sends it down those weights notices."""
    found = []
    for factor in (1.0, 3.0):
        network = random_network()
        network.regression = True
        network.readout.weight.mul_(factor)
        inputs, _ = random_batch(network)
        outputs = network.readout(network.run(inputs)[-1].spikes.mean(0))
        found.append(raw_update(RULES[name], network, inputs, outputs + 0.5)[2])
    assert torch.allclose(*found) != RULES[name].facts.symmetric_weights


@every_rule
def test_weights_of_its_own_are_those_of_the_facts(name):
    """And they are saved: whatever the rule holds besides the network's tensors is in its checkpoint."""
    network = random_network()
    rule = RULES[name]
    state = rule.initial_state(network, generator=torch.Generator().manual_seed(0))
    own = getattr(state, "own", {})
    has_some = bool(own) or network.target is not None
    assert has_some == (rule.facts.extra_weights != "none")
    kept = rule.tensors(state)
    assert all(any(tensor is weight for tensor in kept.values()) for weight in own.values())


@pytest.mark.parametrize("name", WITH_ERROR)
def test_no_error_no_update(name):
    """Rules with an error from the output: where the output is right, no hidden weight is asked to move."""
    rule, probing = RULES[name], hasattr(RULES[name], "sigma")
    network = random_network("rate" if probing else "lif")
    network.regression = True
    if probing:  # perturbations see the loss around the network; near enough, on a smooth one, it is flat at its minimum
        rule = replace(rule, sigma=1e-6)
    inputs, _ = random_batch(network)
    right = network.readout(network.run(inputs)[-1].spikes.mean(0))
    *hidden, weight, bias = raw_update(rule, network, inputs, right)
    assert all(float(gradient.abs().max()) < (1e-4 if probing else 1e-12) for gradient in [*hidden, weight, bias])
    hidden = raw_update(rule, network, inputs, right + 0.5)[:-2]
    starts_from_nothing = ("shallow", "decoupled-interfaces")
    assert name in starts_from_nothing or max(float(gradient.abs().max()) for gradient in hidden) > 1e-3


@pytest.mark.parametrize("name", [name for name in NAMES if not RULES[name].facts.autograd])
def test_forward_only_rules_never_touch_autograd(name, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a backward pass")

    for place in (torch.Tensor, torch.autograd):
        monkeypatch.setattr(place, "backward", refuse)
    monkeypatch.setattr(torch.autograd, "grad", refuse)
    network = random_network()
    inputs, labels = random_batch(network)
    learn(RULES[name], network, inputs, labels, updates=2)
    assert all(tensor.grad_fn is None and not tensor.requires_grad for tensor in network.state_dict().values())


@every_rule
@pytest.mark.parametrize("kind", ["conv", "recurrent", "rate", "synaptic current", "regression"])
def test_trains_each_kind_of_network_or_refuses_by_name(name, kind):
    if kind == "regression":
        network = mlp((5,), [6, 7], 3, regression=True, seed=0).double()
        inputs, labels = torch.rand(6, 4, 5, dtype=torch.float64), torch.rand(4, 3, dtype=torch.float64)
    else:
        network = {
            "conv": lambda: random_network("conv"),
            "recurrent": lambda: random_network(recurrent=True),
            "rate": lambda: random_network("rate"),
            "synaptic current": lambda: random_network(alpha=0.4),
        }[kind]()
        inputs, labels = random_batch(network, batch=4)
    rule = RULES[name]
    if isinstance(rule, sp.SigProp) and kind == "rate":
        rule = replace(rule, learn_on=sp.ReLU())
    if refuses(name, kind):
        with pytest.raises(UnsupportedError, match=f"{type(rule).__name__} "):
            rule.initial_state(network)
        return
    before = copy.deepcopy(network)
    answer, _ = learn(rule, network, inputs, labels, updates=4)
    moved = [not torch.equal(a, b) for a, b in zip(learned_by(before), learned_by(network), strict=True)]
    assert all(moved) or name == "shallow"
    assert all(bool(torch.isfinite(tensor).all()) for tensor in [*learned_by(network), answer.loss])


@every_rule
def test_a_batch_of_one_is_learned_from_or_refused_before_training(name):
    network = random_network()
    inputs, labels = random_batch(network, batch=1)
    RULES[name].check(network, 1)
    learn(RULES[name], network, inputs, labels, updates=2)


@every_rule
def test_a_resumed_training_ends_in_the_same_bits(name, tmp_path):
    data = sp.data.load("digits")
    data = replace(data, train=sp.data.Split(data.train.inputs[:48], data.train.labels[:48]), validation=None)

    def fresh():
        return mlp(data.input_shape, [8, 8], 10, seed=0)

    how = {"num_steps": 3, "batch_size": 16, "schedule": "constant", "progress": False}
    whole, halves = fresh(), fresh()
    sp.fit(whole, RULES[name], data, epochs=2, **how)
    with pytest.raises(KeyboardInterrupt):
        sp.fit(halves, RULES[name], data, epochs=2, folder=tmp_path, observe=_stop_in_epoch(2), **how)
    resumed = fresh()
    sp.fit(resumed, RULES[name], data, epochs=2, folder=tmp_path, resume=True, **how)
    first, second = whole.state_dict(), resumed.state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


def _stop_in_epoch(number):
    """An observer that ends the training before that epoch is written down."""
    calls = []

    def observe(network, state):
        calls.append(1)
        if len(calls) == number:
            raise KeyboardInterrupt
        return {}

    return observe


@every_rule
def test_learns_digits_above_its_floor(name):
    data = sp.data.load("digits")
    network = mlp(data.input_shape, [32, 32], 10, seed=0)
    floor, rate = FLOORS[name]
    rule = replace(RULES[name], optimizer=lambda parameters: torch.optim.Adam(parameters, lr=rate, fused=True))
    epochs = 1 if name == "forward-mode" else EPOCHS  # exact derivatives take their time
    sp.fit(network, rule, data, num_steps=8, epochs=epochs, progress=False)
    assert sp.evaluate(network, data.validation, 8).accuracy["readout"] > floor


def test_an_unknown_rule_lists_the_known():
    from spikeprop import catalogue

    with pytest.raises(InputError, match=r"unknown rule 'backprop'; known: bptt, bptt-hard, shallow, "):
        catalogue.find("backprop")


def test_an_option_that_a_rule_has_not_is_refused():
    from spikeprop import catalogue

    with pytest.raises(InputError, match=r"--truncate does not apply to the rule shallow; it does to bptt, bptt-hard"):
        catalogue.configure("shallow", {"truncate": 3})
    assert catalogue.configure("bptt", {"truncate": 3, "reset_gradient": "attached"}) == sp.BPTT(
        update_every=3, reset_gradient="attached"
    )
