"""The training steps that speed.py times: the same network, input and optimiser in several libraries, and by hand.

Each maker returns a function that makes one whole step: from rest through the sequence, loss, gradients, one step of Adam. All
get spikes ``[T, B, *features]`` and class labels ``[B]``. LIF neurons with decay 0.9, threshold 1 and reset to zero (each
library's own class), the derivative of the arctangent (Norse: SuperSpike's) in place of the spike's,
and the last layer's mean activity through a linear readout.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spikeprop as sp
from spikeprop.catalogue import RULES
from spikeprop.models import mlp

BETA, THRESHOLD, CLASSES = 0.9, 1.0, 10
Step = Callable[[], Any]


@dataclass(frozen=True)
class Work:
    """What a step does: ``kind`` "mlp" (784-512-512-10) or "conv" (1 x 28 x 28, twice convolution 5 x 5 and mean of 2 x 2)."""

    kind: str
    num_steps: int
    batch: int
    density: float
    width: int = 512
    depth: int = 2

    def inputs(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        shape = (784,) if self.kind == "mlp" else (1, 28, 28)
        x = (torch.rand(self.num_steps, self.batch, *shape, generator=generator) < self.density).float()
        return x, torch.randint(0, CLASSES, (self.batch,), generator=generator)

    def widths(self) -> list[int]:
        return [784, *[self.width] * self.depth]


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-3, fused=True)


# --- ours ---------------------------------------------------------------------------------------------------------------------


def spikeprop_step(work: Work, rule_name: str, **changed: Any) -> Step:
    """A step of ``fit`` with the rule's defaults, but for what is changed."""
    x, labels = work.inputs()
    neuron = sp.LIF(BETA, THRESHOLD)
    if work.kind == "mlp":
        network = mlp((784,), work.widths()[1:], CLASSES, neuron=neuron)
    else:
        layers = [
            (sp.Chain(sp.Conv2d(before, after, 5, padding=2), sp.AvgPool2d(2)), sp.LIF(BETA, THRESHOLD))
            for before, after in ((1, 32), (32, 64))
        ]
        network = sp.Network((1, 28, 28), layers, CLASSES)
        for layer in network.layers:
            layer.bias.add_(THRESHOLD * (1.0 - BETA))
    network.input_mean.fill_(work.density)
    rule: Any = replace(RULES[rule_name], **changed)  # type: ignore[type-var]
    state = rule.initial_state(network, generator=torch.Generator().manual_seed(0))

    def step() -> None:
        nonlocal state
        state = rule.begin(state)
        _, state = rule.learn(network, state, x, labels)

    return step


# --- by hand: one product per layer for all steps, then a scan over time; the strongest form of BPTT known to us ------------


class _Scan(torch.autograd.Function):
    """LIF neurons over ``[T, B, ...]`` with the derivative of the arctangent; few passes over memory, no graph inside."""

    @staticmethod
    def forward(ctx: Any, drive: Tensor) -> Tensor:
        distance, spikes = torch.empty_like(drive), torch.empty_like(drive)
        membrane = torch.zeros_like(drive[0])
        for present, before, spike in zip(drive, distance, spikes, strict=True):
            torch.add(present, membrane, alpha=BETA, out=before)
            torch.gt(before, THRESHOLD, out=spike)
            membrane = torch.addcmul(before, before, spike, value=-1.0)
        ctx.save_for_backward(distance.sub_(THRESHOLD), spikes)
        return spikes

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        distance, spikes = ctx.saved_tensors
        slope = distance.mul_(math.pi).square_().add_(1.0).reciprocal_()
        at_membrane = gradient * slope
        for step in range(len(gradient) - 2, -1, -1):
            later = at_membrane[step + 1]
            at_membrane[step].add_(later, alpha=BETA).addcmul_(later, spikes[step], value=-BETA)
        return at_membrane


def folded(weight: Tensor) -> Tensor:
    """A kernel whose strided convolution is that of ``weight`` followed by means of 2 x 2."""
    mean = weight.new_full((1, 1, 2, 2), 0.25)
    return F.conv2d(weight.flatten(0, 1).unsqueeze(1), mean, padding=1).view(*weight.shape[:2], 6, 6)


def by_hand_step(work: Work, dtype: torch.dtype) -> Step:
    """BPTT layer by layer, products in ``dtype``, neurons in float32; averages folded into strided convolutions."""
    x, labels = work.inputs()
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> nn.Parameter:
        return nn.Parameter(torch.randn(*shape, generator=generator) / math.sqrt(math.prod(shape[1:])))

    if work.kind == "mlp":
        sizes = work.widths()
        weights = [draw(after, before) for before, after in itertools.pairwise(sizes)]
        readout = draw(CLASSES, sizes[-1])
    else:
        weights, readout = [draw(32, 1, 5, 5), draw(64, 32, 5, 5)], draw(CLASSES, 64 * 49)
    biases = [nn.Parameter(torch.zeros(len(weight))) for weight in weights]
    parameters = [*weights, *biases, readout]
    optimizer = adam(parameters)
    x = x.to(dtype)

    def step() -> None:
        spikes = x
        for weight, bias in zip(weights, biases, strict=True):
            rows = spikes.flatten(0, 1)
            if work.kind == "mlp":
                drive = F.linear(rows, weight.to(dtype)).float() + bias
            else:
                drive = F.conv2d(rows, folded(weight).to(dtype), None, 2, 2).float() + bias.view(-1, 1, 1)
            spikes = _Scan.apply(drive.unflatten(0, (work.num_steps, work.batch))).to(dtype)
        outputs = spikes.float().mean(0).flatten(1) @ readout.T
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(outputs, labels).backward()
        optimizer.step()

    return step


# --- other libraries, as their own documentation writes them -------------------------------------------------------------


def _layers(work: Work, neuron: Callable[[], nn.Module]) -> nn.ModuleList:
    """Alternately a linear map and its neurons, then the readout; always the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _drawn_layers(work, neuron)


def _drawn_layers(work: Work, neuron: Callable[[], nn.Module]) -> nn.ModuleList:
    made: list[nn.Module] = []
    if work.kind == "mlp":
        sizes = work.widths()
        for before, after in itertools.pairwise(sizes):
            made += [nn.Linear(before, after), neuron()]
        return nn.ModuleList([*made, nn.Linear(sizes[-1], CLASSES)])
    for before, after in ((1, 32), (32, 64)):
        made += [nn.Sequential(nn.Conv2d(before, after, 5, padding=2), nn.AvgPool2d(2)), neuron()]
    return nn.ModuleList([*made, nn.Linear(64 * 49, CLASSES)])


def _descend(optimizer: torch.optim.Optimizer, outputs: Tensor, labels: Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    F.cross_entropy(outputs, labels).backward()
    optimizer.step()


def _unrolled(work: Work, layers: nn.ModuleList, kind: type[nn.Module], start: Callable[[Any], Any]) -> Step:
    """A loop over time around layers that take and return their state."""
    x, labels = work.inputs()
    optimizer = adam(layers.parameters())

    def step() -> None:
        states = [start(layer) if isinstance(layer, kind) else None for layer in layers]
        total: Tensor | float = 0.0
        for present in x:
            for index, layer in enumerate(layers[:-1]):
                if isinstance(layer, kind):
                    present, states[index] = layer(present, states[index])
                else:
                    present = layer(present)
            total = total + present
        _descend(optimizer, layers[-1](total.flatten(1) / work.num_steps), labels)

    return step


def snntorch_step(work: Work) -> Step:
    import snntorch as snn
    from snntorch import surrogate

    settings = {"beta": BETA, "threshold": THRESHOLD, "spike_grad": surrogate.atan(), "reset_mechanism": "zero"}
    return _unrolled(work, _layers(work, lambda: snn.Leaky(**settings)), snn.Leaky, lambda layer: layer.init_leaky())


def norse_step(work: Work) -> Step:
    """Its neurons take a tenth of their drive per step, which ten times the weights make up for; SuperSpike's derivative."""
    from norse.torch import LIFBoxCell, LIFBoxParameters

    rate, dt = 100.0, 0.001
    how = {"tau_mem_inv": torch.tensor(rate), "v_th": torch.tensor(THRESHOLD)}
    parameters = LIFBoxParameters(**how, method="super", alpha=torch.tensor(10.0))
    layers = _layers(work, lambda: LIFBoxCell(parameters, dt=dt))
    with torch.no_grad():
        for parameter in layers[:-1].parameters():
            parameter.div_(rate * dt)
    return _unrolled(work, layers, LIFBoxCell, lambda layer: None)


def spikingjelly_step(work: Work) -> Step:
    """Multi-step mode: each layer sees the whole sequence at once, which is the library's fast form."""
    from spikingjelly.activation_based import functional, layer, neuron, surrogate

    x, labels = work.inputs()
    tau = 1.0 / (1.0 - BETA)
    settings = {
        "tau": tau,
        "decay_input": False,
        "v_threshold": THRESHOLD,
        "v_reset": 0.0,
        "detach_reset": True,
        "step_mode": "m",
    }
    layers = _layers(work, lambda: neuron.LIFNode(surrogate_function=surrogate.ATan(), **settings))
    hidden = nn.ModuleList(part if isinstance(part, neuron.LIFNode) else layer.SeqToANNContainer(part) for part in layers[:-1])
    optimizer = adam(layers.parameters())

    def step() -> None:
        functional.reset_net(hidden)
        present = x
        for part in hidden:
            present = part(present)
        _descend(optimizer, layers[-1](present.mean(0).flatten(1)), labels)

    return step


LOW_RANK = {"loss": sp.SimilarityCrossEntropy(similarity="dot"), "learn_on": sp.Membrane(clip=None)}
CONTESTANTS: dict[str, Callable[[Work], Step]] = {
    "sigprop-membrane": partial(spikeprop_step, rule_name="sigprop-membrane"),
    "sigprop-surrogate": partial(spikeprop_step, rule_name="sigprop-surrogate"),
    "sigprop, dot product on U": partial(spikeprop_step, rule_name="sigprop-membrane", **LOW_RANK),
    "spikeprop's bptt": partial(spikeprop_step, rule_name="bptt"),
    "BPTT by hand, float32": partial(by_hand_step, dtype=torch.float32),
    "BPTT by hand, bfloat16": partial(by_hand_step, dtype=torch.bfloat16),
    "snntorch": snntorch_step,
    "norse": norse_step,
    "spikingjelly": spikingjelly_step,
}


def missing(name: str) -> bool:
    """Whether a contestant's library is not installed."""
    return name in ("snntorch", "norse", "spikingjelly") and importlib.util.find_spec(name) is None
