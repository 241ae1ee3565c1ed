"""An independent definition of the network for the tests of the rules: plain loops, autograd, nothing of the library's maths.

:func:`forward` unrolls a network over time with ordinary torch operations, :func:`gradients` differentiates the loss that every
rule with an error at the output descends: the readout's on the last layer's mean activity. Options cut gradient paths, so that
a rule that leaves a path out has an exact oracle, too.
"""

import copy
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import spikeprop as sp
from spikeprop.models import conv, mlp
from spikeprop.network import Network
from spikeprop.rules.base import learned_by

NETWORKS: list[tuple[str, dict[str, Any]]] = [  # kinds and settings for random_network
    ("lif", {}),
    ("lif", {"alpha": 0.4, "reset_mechanism": "subtract", "threshold": 0.75}),
    ("lif", {"recurrent": True, "alpha": 0.4}),
    ("conv", {"alpha": 0.4}),
    ("rate", {}),
    ("rate", {"recurrent": True}),
]


class Spike(torch.autograd.Function):
    """A step forward; backward the derivative of the arctangent, 1 / (1 + (pi x)^2), written out again."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient / (1.0 + (torch.pi * x) ** 2)


def forward(
    network: Network,
    inputs: Tensor,
    *,
    attached_reset: bool = False,
    cut_layers: bool = False,
    cut_recurrence: bool = False,
) -> list[list[Tensor]]:
    """Spikes of every layer and step. ``cut_layers``: no gradient from layer to layer; ``cut_recurrence``: none through V."""
    x, everything = list(inputs), []
    for index, layer in enumerate(network.layers):
        mean = (network.input_mean if index == 0 else network.layers[index - 1].rate) if network.centred else None
        neuron, spikes = layer.neuron, []
        bias = layer.bias
        if mean is not None:
            bias = bias - layer.synapse(mean.unsqueeze(0))[0] / (1.0 - neuron.alpha)
        current = membrane = before = torch.zeros(len(inputs[0]), *layer.output_shape, dtype=inputs.dtype)
        for present in x:
            drive = layer.synapse(present.detach() if cut_layers else present)
            if layer.recurrent is not None:
                drive = drive + layer.recurrent(before.detach() if cut_recurrence else before)
            if neuron.spiking:
                current = neuron.alpha * current + drive
                membrane = neuron.beta * membrane + current + bias
                before = Spike.apply(membrane - neuron.threshold)
                reset = before if attached_reset else before.detach()
                if neuron.reset_mechanism == "zero":
                    membrane = membrane * (1.0 - reset)
                elif neuron.reset_mechanism == "subtract":
                    membrane = membrane - neuron.threshold * reset
            else:
                before = F.relu(drive + bias)
            spikes.append(before)
        everything.append(spikes)
        x = spikes
    return everything


def loss_at_readout(network: Network, spikes: list[Tensor], labels: Tensor) -> Tensor:
    """Cross-entropy, or half the squared error, of the readout on mean activity."""
    rates = torch.stack(spikes).mean(0).flatten(1)
    outputs = rates @ network.readout.weight.T + network.readout.bias
    if labels.is_floating_point():
        return 0.5 * (outputs - labels).square().sum(1).mean()
    return F.cross_entropy(outputs, labels)


def gradients(network: Network, inputs: Tensor, labels: Tensor, **options: bool) -> list[Tensor]:
    """Autograd's gradient of the loss, in the order of ``learned_by``."""
    weights = learned_by(network)
    for weight in weights:
        weight.requires_grad_(True)
    try:
        loss = loss_at_readout(network, forward(network, inputs, **options)[-1], labels)
        return list(torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True))
    finally:
        for weight in weights:
            weight.requires_grad_(False)


def random_network(kind: str = "lif", *, recurrent: bool = False, seed: int = 0, **neuron: object) -> Network:
    """A small float64 network with everything that could be forgotten: two layers, biases, centring, a readout that is not 0.

    kind: "lif", "rate" or "conv" (LIF).
    """
    generator = torch.Generator().manual_seed(seed)
    cell = sp.Rate() if kind == "rate" else sp.LIF(**{"beta": 0.8, "threshold": 0.7, **neuron})
    if kind == "conv":
        network = conv((1, 6, 6), [3, 4], 4, kernel_size=3, stride=1, pool=2, hidden=[7], neuron=cell, gain=1.5, seed=seed)
    else:
        network = mlp((5,), [6, 7], 4, neuron=cell, gain=1.5, recurrent=recurrent, seed=seed)
    network = network.double()
    for tensor in [network.input_mean, network.readout.weight, network.readout.bias, *(x.bias for x in network.layers)]:
        tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator))
    for layer in network.layers:
        layer.rate.add_(0.2 * torch.rand(layer.rate.shape, generator=generator))
    return network


def random_batch(network: Network, *, steps: int = 6, batch: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs ``[T, B, *input_shape]`` that change at every step, and labels."""
    generator = torch.Generator().manual_seed(seed + 1000)
    inputs = torch.rand(steps, batch, *network.input_shape, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(network.outputs, (batch,), generator=generator)


def raw_update(rule: object, network: Network, inputs: Tensor, labels: Tensor, seed: int = 0) -> list[Tensor]:
    """The gradients that a rule hands to its optimiser at its last update on one batch, in the order of ``learned_by``.

    Learns on a copy.
    """
    twin = copy.deepcopy(network)
    state = rule.initial_state(twin, generator=torch.Generator().manual_seed(seed))
    seen: list[Tensor] = []

    def note(*_: object) -> None:
        seen[:] = [weight.grad.clone() for weight in learned_by(twin)]

    state.optimizer.register_step_pre_hook(note)
    rule.learn(twin, rule.begin(state), inputs, labels)
    return seen


def alone(network: Network, index: int) -> SimpleNamespace:
    """One layer as a network of its own."""
    mean = network.input_mean if index == 0 else network.layers[index - 1].rate
    return SimpleNamespace(layers=[network.layers[index]], centred=network.centred, input_mean=mean)


def mean_activity(network: Network, index: int, inputs: Tensor) -> Tensor:
    return torch.stack(forward(alone(network, index), inputs, cut_recurrence=True)[0]).mean(0)
