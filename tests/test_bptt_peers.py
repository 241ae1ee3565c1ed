"""BPTT against snnTorch and Norse: the same weights, inputs and labels give the same spikes, gradients and trained weights.

The peers differ among themselves in whether a gradient passes through the reset. With snnTorch 1.0.0 and Norse 1.1.0, in
float64, biases included, BPTT equals

    snnTorch  reset_delay=False, "zero"            reset_gradient="attached": the spike that resets is not detached
              reset_delay=False, "subtract"        the same, as long as no membrane exceeds twice its threshold
              reset_delay=True, "zero"             reset_gradient="detached": the reset is applied when the next step begins,
                                                   by a detached spike, which is the same membrane at every decision
              reset_delay=True, "subtract"         the same at beta = 1 only: what is taken off has not decayed for a step
              "none"                               either
    Norse     LIFBoxCell                           reset_gradient="attached", for reset_value and reset_subtract
              with the reset's spike detached      reset_gradient="detached"

    snnTorch  surrogate.atan(alpha=2.0)            ATan(); it hands on spikes, and so their gradients, in float32
    Norse     "super", any alpha (it is not read)  FastSigmoid(k) with k = dt / tau, as its membrane is k U
              "tanh", alpha = 2                    Sigmoid(4 k)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import Spike, raw_update
from torch import Tensor

import spikeprop as sp
from spikeprop.models import conv, mlp
from spikeprop.rules.base import learned_by
from spikeprop.surrogate import LearnOn

snntorch = pytest.importorskip("snntorch")
norse = pytest.importorskip("norse.torch", reason="norse is not installed")
atan = pytest.importorskip("snntorch.surrogate").atan(alpha=2.0)

STEPS, BATCH, CLASSES = 10, 6, 4
BETA, THRESHOLD = 0.75, 0.5  # both libraries hold them in float32, where these are exact
GAIN = 1.0 - BETA  # Norse's membrane is GAIN times ours
Step = Callable[[Tensor, Any], tuple[Tensor, Any]]  # drive and state to spikes and state

# --- The peers ----------------------------------------------------------------------------------------------------------------


def leaky(
    reset: str = "zero", *, delay: bool = False, beta: float = BETA, threshold: float = THRESHOLD, spike: Any = Spike.apply
) -> Step:
    cell = snntorch.Leaky(beta, threshold, spike_grad=spike, reset_mechanism=reset, reset_delay=delay).double()
    return lambda drive, membrane: cell(drive, torch.zeros_like(drive) if membrane is None else membrane)


def lif_box(reset: str = "zero", *, detached: bool = False, method: str = "super", alpha: float = 100.0) -> Step:
    theirs = {"zero": norse.functional.reset.reset_value, "subtract": norse.functional.reset.reset_subtract}[reset]

    def hidden_from_the_gradient(spikes: Tensor, *others: Tensor) -> Tensor:
        return theirs(spikes.detach(), *others)

    parameters = norse.LIFBoxParameters(
        tau_mem_inv=torch.as_tensor(GAIN),
        v_leak=torch.as_tensor(0.0),
        v_th=torch.as_tensor(GAIN * THRESHOLD),  # its membrane is GAIN U
        v_reset=torch.as_tensor(0.0),
        method=method,
        alpha=torch.as_tensor(alpha),
        reset_method=hidden_from_the_gradient if detached else theirs,
    )
    return norse.LIFBoxCell(parameters, dt=1.0)


def drive(layer: sp.Layer, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    for part in getattr(layer.synapse, "parts", [layer.synapse]):
        if isinstance(part, sp.Dense):
            x = F.linear(x, weight, bias)
        elif isinstance(part, sp.Conv2d):
            x = F.conv2d(x, weight, bias.flatten(), padding="same")
        else:
            x = F.avg_pool2d(x, 2) if isinstance(part, sp.AvgPool2d) else x.flatten(1)
    return x


def peer_forward(network: sp.Network, weights: list[Tensor], inputs: Tensor, cell: Callable[[], Step]) -> list[Tensor]:
    """Every layer's spikes ``[T, B, ...]`` where its weights drive a peer's neurons."""
    x, everything = list(inputs), []
    for index, layer in enumerate(network.layers):
        step, state, spikes = cell(), None, []
        for present in x:
            sent, state = step(drive(layer, present, *weights[2 * index : 2 * index + 2]), state)
            spikes.append(sent.to(inputs.dtype))
        everything.append(torch.stack(spikes))
        x = spikes
    return everything


def peer_loss(spikes: Tensor, weights: list[Tensor], labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(spikes.mean(0).flatten(1), weights[-2], weights[-1]), labels)


def peer_gradients(
    network: sp.Network, inputs: Tensor, labels: Tensor, cell: Callable[[], Step]
) -> tuple[list[Tensor], list[Tensor]]:
    """A peer's spikes, and the gradients that its ``loss.backward()`` leaves, in the order of ``learned_by``."""
    weights = [weight.clone().requires_grad_() for weight in learned_by(network)]
    spikes = peer_forward(network, weights, inputs, cell)
    peer_loss(spikes[-1], weights, labels).backward()
    return [layer.detach() for layer in spikes], [weight.grad for weight in weights]


# --- Ours ---------------------------------------------------------------------------------------------------------------------


def problem(
    kind: str, reset: str, seed: int, beta: float = BETA, threshold: float = THRESHOLD
) -> tuple[sp.Network, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    neuron = sp.LIF(beta, threshold, reset_mechanism=reset)
    if kind == "mlp":
        network = mlp((9,), [12, 11], CLASSES, neuron=neuron, gain=1.2, centred=False, seed=seed).double()
    else:
        network = conv(
            (2, 8, 8),
            [4, 5],
            CLASSES,
            kernel_size=3,
            stride=1,
            pool=2,
            biases="channel",
            hidden=[8],
            neuron=neuron,
            gain=1.2,
            centred=False,
            seed=seed,
        ).double()
    for tensor in [*(layer.bias for layer in network.layers), *network.readout.parameters()]:
        tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
    inputs = torch.rand(STEPS, BATCH, *network.input_shape, generator=generator, dtype=torch.float64)
    return network, inputs, torch.randint(CLASSES, (BATCH,), generator=generator)


def gentle(network: sp.Network) -> None:
    """Weights so small that no membrane exceeds twice its threshold: U <= (beta + 1 + 0.2) threshold."""
    for layer in network.layers:
        layer.synapse.weight.abs_()
        layer.bias.fill_(0.2 * THRESHOLD)
        most = layer.synapse.weight.flatten(1).sum(1).max()
        layer.synapse.weight.mul_(THRESHOLD / most)


def differ(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest difference of any gradient, relative to its norm."""
    assert all(float(gradient.norm()) > 1e-4 for gradient in theirs)
    return max(float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True))


def compare(kind: str, reset: str, seed: int, rule: sp.BPTT, cell: Callable[[], Step], **neuron: float) -> float:
    """Asserts equal spikes; returns how far the gradients lie apart."""
    network, inputs, labels = problem(kind, reset, seed, **neuron)
    if reset == "subtract":
        gentle(network)
    spikes, theirs = peer_gradients(network, inputs, labels, cell)
    for activity, layer in zip(network.run(inputs), spikes, strict=True):
        assert 0.02 < float(layer.mean()) < 0.9
        assert torch.equal(activity.spikes, layer)
        if reset == "subtract":
            assert float(activity.membrane.max()) < 2.0 * THRESHOLD
    return differ(raw_update(rule, network, inputs, labels), theirs)


# --- Equal --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["mlp", "conv"])
@pytest.mark.parametrize(
    ("reset", "delay", "reset_gradient"),
    [
        ("zero", False, "attached"),
        ("zero", True, "detached"),
        ("subtract", False, "attached"),
        ("none", False, "detached"),
        ("none", True, "attached"),
    ],
)
def test_equals_snntorch(kind: str, seed: int, reset: str, delay: bool, reset_gradient: str) -> None:
    rule = sp.BPTT(reset_gradient=reset_gradient)
    assert compare(kind, reset, seed, rule, partial(leaky, reset, delay=delay)) < 1e-12
    assert compare(kind, reset, seed, rule, partial(leaky, reset, delay=delay, spike=atan)) < 1e-5


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_equals_snntorch_that_subtracts_late_from_a_membrane_without_leak(kind: str, seed: int) -> None:
    cell = partial(leaky, "subtract", delay=True, beta=1.0)
    network, inputs, labels = problem(kind, "subtract", seed, beta=1.0)  # at twice the threshold, too
    spikes, theirs = peer_gradients(network, inputs, labels, cell)
    for activity, layer in zip(network.run(inputs), spikes, strict=True):
        assert float(activity.membrane.max()) > 2.0 * THRESHOLD
        assert torch.equal(activity.spikes, layer)
    assert differ(raw_update(sp.BPTT(), network, inputs, labels), theirs) < 1e-12


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["mlp", "conv"])
@pytest.mark.parametrize("reset", ["zero", "subtract"])
@pytest.mark.parametrize("detached", [False, True])
def test_equals_norse(kind: str, seed: int, reset: str, detached: bool) -> None:
    reset_gradient = "detached" if detached else "attached"
    for method, alpha, surrogate in (
        ("super", 100.0, sp.FastSigmoid(GAIN)),  # Norse's own default
        ("super", 1.0, sp.FastSigmoid(GAIN)),
        ("tanh", 2.0, sp.Sigmoid(4.0 * GAIN)),
    ):
        cell = partial(lif_box, reset, detached=detached, method=method, alpha=alpha)
        assert compare(kind, reset, seed, sp.BPTT(surrogate=surrogate, reset_gradient=reset_gradient), cell) < 1e-12


@pytest.mark.parametrize(
    ("rule", "cell"),
    [
        (sp.BPTT(reset_gradient="attached"), leaky),
        (sp.BPTT(reset_gradient="detached"), partial(leaky, delay=True)),
        (sp.BPTT(surrogate=sp.FastSigmoid(GAIN), reset_gradient="attached"), lif_box),
    ],
    ids=["snntorch", "snntorch, late reset", "norse"],
)
def test_training_goes_the_same_way(rule: sp.BPTT, cell: Callable[[], Step]) -> None:
    """Ten steps of Adam, each on another batch."""
    network, _, _ = problem("mlp", "zero", 0)
    start = [weight.clone() for weight in learned_by(network)]
    theirs = [weight.clone().requires_grad_() for weight in start]
    optimizer = torch.optim.Adam(theirs, lr=1e-2)
    rule = replace(rule, optimizer=partial(torch.optim.Adam, lr=1e-2))
    state = rule.initial_state(network)
    for seed in range(10):
        _, inputs, labels = problem("mlp", "zero", seed)
        optimizer.zero_grad()
        peer_loss(peer_forward(network, theirs, inputs, cell)[-1], theirs, labels).backward()
        optimizer.step()
        _, state = rule.learn(network, rule.begin(state), inputs, labels)
    for before, ours, peer in zip(start, learned_by(network), theirs, strict=True):
        assert float((ours - before).abs().max()) > 0.02
        torch.testing.assert_close(ours, peer.detach(), rtol=0.0, atol=1e-9)


# --- Different ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reset", ["zero", "subtract"])
@pytest.mark.parametrize(
    ("peer", "reset_gradient", "surrogate"),
    [
        (leaky, "detached", sp.ATan()),
        (lif_box, "detached", sp.FastSigmoid(GAIN)),
        (partial(lif_box, detached=True), "attached", sp.FastSigmoid(GAIN)),
    ],
    ids=["snntorch", "norse", "norse, detached"],
)
def test_the_gradient_of_the_reset_matters(reset: str, peer: Callable[..., Step], reset_gradient: str, surrogate) -> None:
    """The other setting has the same spikes and another gradient."""
    rule = sp.BPTT(surrogate=surrogate, reset_gradient=reset_gradient)
    assert compare("mlp", reset, 0, rule, partial(peer, reset)) > 0.05


def test_the_late_reset_is_not_attached() -> None:
    assert compare("mlp", "zero", 0, sp.BPTT(reset_gradient="attached"), partial(leaky, delay=True)) > 0.05


@pytest.mark.parametrize("wrong", [sp.ATan(width=1.1), sp.FastSigmoid(), sp.Sigmoid()])
def test_the_surrogate_matters(wrong: LearnOn) -> None:
    rule = sp.BPTT(surrogate=wrong, reset_gradient="attached")
    assert compare("mlp", "zero", 0, rule, leaky) > 0.02


@pytest.mark.parametrize("delay", [False, True], ids=["subtracts twice", "subtracts late"])
def test_where_snntorch_subtracts_otherwise(delay: bool) -> None:
    """Beyond twice the threshold it subtracts once more before it decides; late, what it subtracts has not leaked."""
    network, inputs, labels = problem("mlp", "subtract", 0)
    spikes, _ = peer_gradients(network, inputs, labels, partial(leaky, "subtract", delay=delay))
    ours = network.run(inputs)[0]
    assert float(ours.membrane.max()) > 2.0 * THRESHOLD
    apart = ours.spikes != spikes[0]
    assert apart.any()
    if not delay:  # and nowhere else: not before a neuron first exceeds it
        exceeded = (ours.membrane > 2.0 * THRESHOLD).cummax(0).values
        assert not (apart & ~exceeded).any()


def test_where_norse_subtracts_nothing_differs() -> None:
    """Its subtraction is ours, at twice the threshold, too."""
    network, inputs, labels = problem("mlp", "subtract", 0)
    spikes, theirs = peer_gradients(network, inputs, labels, partial(lif_box, "subtract"))
    for activity, layer in zip(network.run(inputs), spikes, strict=True):
        assert float(activity.membrane.max()) > 2.0 * THRESHOLD
        assert torch.equal(activity.spikes, layer)
    rule = sp.BPTT(surrogate=sp.FastSigmoid(GAIN), reset_gradient="attached")
    assert differ(raw_update(rule, network, inputs, labels), theirs) < 1e-12
