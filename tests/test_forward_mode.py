"""Real-time recurrent learning against autograd through the unrolled network, whole and streamed; UORO's expectation, too."""

import copy
from functools import partial

import pytest
import torch
from oracle import gradients, random_batch, random_network, raw_update

import spikeprop as sp
from spikeprop.models import mlp
from spikeprop.network import Network
from spikeprop.rules import uoro
from spikeprop.rules.base import learned_by
from spikeprop.rules.forward_mode import ForwardMode
from spikeprop.rules.uoro import UORO
from spikeprop.rules.windowed import at_output

STILL = partial(torch.optim.SGD, lr=0.0)


def irregular_network() -> Network:
    """Pooling, then a recurrent layer between two that are not; decays and thresholds per neuron; neurons without a synapse."""
    generator = torch.Generator().manual_seed(5)

    def draw(low: float, high: float, n: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(n, generator=generator, dtype=torch.float64)

    layers = [
        (sp.AvgPool2d(2), sp.LIF(0.7, 0.3, bias=0.1, alpha=0.2)),
        (
            sp.Chain(sp.Flatten(), sp.Dense(8, 5, gain=2.0, generator=generator)),
            sp.LIF(draw(0.6, 0.9, 5), draw(0.5, 0.8, 5), alpha=draw(0.1, 0.5, 5), reset_mechanism="subtract"),
        ),
        (sp.Dense(5, 4, gain=2.0, generator=generator), sp.LIF(0.8, 0.5), sp.Dense(4, 4, gain=2.0, generator=generator)),
        (sp.Dense(4, 5, gain=2.0, generator=generator), sp.LIF(draw(0.6, 0.9, 5), 0.5)),
    ]
    network = Network((2, 5, 4), layers, 3).double()
    for tensor in [network.input_mean, network.readout.weight, *(layer.bias for layer in network.layers)]:
        tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator))
    for layer in network.layers:
        layer.rate.add_(0.2 * torch.rand(layer.rate.shape, generator=generator))
    return network


def streamed(rule: object, network: Network, inputs: torch.Tensor, labels: torch.Tensor, seed: int = 0) -> list[torch.Tensor]:
    """The gradients found after the last step, one step per call."""
    twin = copy.deepcopy(network)
    state = rule.begin(rule.initial_state(twin, generator=torch.Generator().manual_seed(seed)))
    for present in inputs:
        _, state = rule.learn(twin, state, present[None], labels)
    return [weight.grad.clone() for weight in learned_by(twin)]


def assert_equal(ours, theirs, rtol=1e-9):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-13)


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("reset", ["zero", "subtract", "none"])
@pytest.mark.parametrize("alpha", [0.0, 0.4])
@pytest.mark.parametrize("recurrent", [False, True])
def test_is_bptt(recurrent, alpha, reset, attached):
    network = random_network(recurrent=recurrent, alpha=alpha, reset_mechanism=reset)
    inputs, labels = random_batch(network)
    theirs = gradients(network, inputs, labels, attached_reset=attached)
    assert all(float(x.abs().max()) > 0 for x in theirs)
    rule = ForwardMode(reset_gradient="attached" if attached else "detached")
    assert_equal(raw_update(rule, network, inputs, labels), theirs)


@pytest.mark.parametrize("recurrent", [False, True])
def test_on_rate_neurons_it_is_backpropagation(recurrent):
    network = random_network("rate", recurrent=recurrent)
    inputs, labels = random_batch(network)
    assert_equal(raw_update(ForwardMode(), network, inputs, labels), gradients(network, inputs, labels))


@pytest.mark.parametrize("attached", [False, True])
def test_layers_of_every_kind(attached):
    network = irregular_network()
    inputs, labels = random_batch(network, steps=8)
    theirs = gradients(network, inputs, labels, attached_reset=attached)
    assert all(float(x.abs().max()) > 0 for x in theirs)
    rule = ForwardMode(reset_gradient="attached" if attached else "detached")
    assert_equal(raw_update(rule, network, inputs, labels), theirs)


@pytest.mark.parametrize("alpha", [0.0, 0.4])
@pytest.mark.parametrize("recurrent", [False, True])
def test_windows_do_not_truncate(recurrent, alpha):
    """Streamed a step at a time, the last step's gradient is that of the whole sequence. TBPTT's is not."""
    network = random_network(recurrent=recurrent, alpha=alpha)
    network.centred = False  # running rates would move from call to call
    inputs, labels = random_batch(network)
    theirs = gradients(network, inputs, labels)
    assert_equal(streamed(ForwardMode(optimizer=STILL), network, inputs, labels), theirs)
    assert_equal(raw_update(ForwardMode(optimizer=STILL, update_every=2), network, inputs, labels), theirs)
    truncated = streamed(sp.BPTT(optimizer=STILL), network, inputs, labels)
    assert not torch.allclose(truncated[0], theirs[0], rtol=0.1)


@pytest.mark.parametrize("rule", [ForwardMode(), UORO()])
def test_what_it_carries_does_not_grow_and_fits_its_estimate(rule):
    network = random_network(recurrent=True, alpha=0.4)
    inputs, labels = random_batch(network, steps=30)
    state = rule.begin(rule.initial_state(network))
    sizes = []
    for present in inputs:
        _, state = rule.learn(network, state, present[None], labels)
        duals = [part for neurons in state.stream.neurons for part in neurons] + [state.stream.own["count"]]
        held = [tensor for dual in duals for tensor in (dual.value, dual.tangent)] + state.stream.own.get("theta", [])
        sizes.append(sum(tensor.numel() * tensor.element_size() for tensor in held))
    assert sizes[0] == sizes[-1]
    assert sizes[-1] < rule.memory(network, 3, 1)


@pytest.mark.parametrize("rule", [ForwardMode(), UORO()])
def test_the_networks_own_course_is_left_alone(rule):
    network = random_network(recurrent=True)
    inputs, labels = random_batch(network)
    expected = network.run(inputs)[-1].spikes
    _, state = rule.learn(network, rule.begin(rule.initial_state(network)), inputs, labels)
    assert torch.equal(state.stream.count, expected.sum(0))
    assert torch.equal(state.stream.neurons[-1].spikes.value, expected[-1])


@pytest.mark.parametrize("rule", [ForwardMode(), UORO()])
def test_convolutions_and_unknown_resets_are_refused(rule):
    with pytest.raises(sp.errors.UnsupportedError, match="convolutional"):
        rule.initial_state(random_network("conv"))
    with pytest.raises(sp.errors.InputError, match="reset_gradient = 'open'"):
        type(rule)(reset_gradient="open").initial_state(random_network())


CALLS, ROWS = 30, 100


def deviation(network, inputs, labels, truth, learn=raw_update) -> tuple[float, float]:
    """The largest deviation of the mean of UORO's draws from the truth, in standard errors; and the standard error of all draws
    together, in lengths of the gradient.
    """
    inputs, labels = inputs.expand(-1, ROWS, *inputs.shape[2:]), labels.expand(ROWS)
    draws = [learn(UORO(optimizer=STILL), network, inputs, labels, seed=seed) for seed in range(CALLS)]
    worst, squared, scale = 0.0, 0.0, 0.0
    for number, expected in enumerate(truth[:-2]):  # the readout's two are exact
        found = torch.stack([draw[number] for draw in draws])
        error = found.std(0) / CALLS**0.5
        assert torch.isfinite(error).all()
        worst = max(worst, float(((found.mean(0) - expected).abs() / (error + 1e-12)).max()))
        squared, scale = squared + float(error.square().sum()), scale + float(expected.square().sum())
    for found, expected in zip(draws[0][-2:], truth[-2:], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    return worst, (squared / scale) ** 0.5


@pytest.mark.parametrize(
    ("kind", "recurrent", "neuron"),
    [("lif", True, {"alpha": 0.4}), ("lif", False, {"reset_mechanism": "subtract"}), ("rate", True, {})],
)
def test_uoro_is_unbiased(kind, recurrent, neuron):
    network = random_network(kind, recurrent=recurrent, **neuron)
    inputs, labels = random_batch(network, batch=1)
    worst, noise = deviation(network, inputs, labels, gradients(network, inputs, labels))
    assert worst < 5.0
    assert noise < 0.3  # of the gradient's length: or a wrong answer would pass, too


def test_uoro_is_unbiased_for_layers_of_every_kind():
    network = irregular_network()
    inputs, labels = random_batch(network, batch=1)
    assert deviation(network, inputs, labels, gradients(network, inputs, labels))[0] < 5.0


def test_uoro_is_unbiased_over_windows():
    network = random_network(recurrent=True, alpha=0.4)
    network.centred = False
    inputs, labels = random_batch(network, batch=1)
    assert deviation(network, inputs, labels, gradients(network, inputs, labels), streamed)[0] < 5.0


def test_uoro_is_biased_with_its_norms_on_one_side_only(monkeypatch):
    network = random_network(recurrent=True)
    inputs, labels = random_batch(network, batch=1)
    both = uoro.by_row
    monkeypatch.setattr(uoro, "by_row", lambda factor, like: factor.new_ones(()) if like.dim() == 3 else both(factor, like))
    assert deviation(network, inputs, labels, gradients(network, inputs, labels))[0] > 10.0


def test_the_norms_of_uoro_reduce_its_variance(monkeypatch):
    network = random_network(recurrent=True)
    inputs, labels = random_batch(network, batch=1, steps=12)
    truth = gradients(network, inputs, labels)
    with_norms = deviation(network, inputs, labels, truth)[1]
    monkeypatch.setattr(uoro, "length", lambda parts: parts[0].new_ones(len(parts[0])))
    worst, without = deviation(network, inputs, labels, truth)
    assert worst < 5.0  # the norms are no matter of the expectation
    assert with_norms < without


def test_uoro_takes_rows_one_by_one():
    """Each row of a batch has an estimate of its own: what one row sees does not enter another's."""
    network = random_network()
    inputs, labels = random_batch(network, batch=2)
    quiet = copy.deepcopy(network)
    rule = UORO(optimizer=STILL)
    state = rule.begin(rule.initial_state(network, generator=torch.Generator().manual_seed(0)))
    _, state = rule.learn(network, state, inputs, labels)
    other = rule.begin(rule.initial_state(quiet, generator=torch.Generator().manual_seed(0)))
    _, other = rule.learn(quiet, other, inputs * torch.tensor([1.0, 0.3])[:, None], labels)
    for a, b in zip(state.stream.own["theta"], other.stream.own["theta"], strict=True):
        assert torch.equal(a[0], b[0]) and not torch.equal(a[1], b[1])
    assert at_output(network, state.stream, labels.expand(1, -1)).steps == len(inputs)


def test_uoro_learns_digits():
    data = sp.data.load("digits")
    network = mlp(data.input_shape, [32, 32], data.num_classes)
    rule = UORO(optimizer=partial(torch.optim.Adam, lr=1.6e-2))
    sp.fit(network, rule, data, num_steps=8, epochs=1, progress=False)
    assert sp.evaluate(network, data.validation, 8).accuracy["readout"] > 0.65  # Shallow needs 8 epochs for .64
