"""Quantisation-aware training: any rule, with the chip's weights and decays in the loop, so that the chip's network learns.

    rule = QuantizationAware(SigProp(), weight_bits=4)
    fit(network, rule, data, ...)                   # from scratch, or on from a trained network
    quantize(network, weight_bits=4)                # the very weights that were trained: rounding them again changes nothing

Inputs are not rounded: how many bits their messages have shows when the network is quantised, and ``parity.report`` says what
that costs.

The network computes with rounded weights; the optimiser moves real ones behind them, by the gradient found at the rounded ones
(the straight-through estimator of Bengio et al., arXiv 1308.3432). No autograd is involved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spikeprop.backends.loihi.network import weight_step
from spikeprop.backends.loihi.quantize import decay_registers, kept_shares, round_weights
from spikeprop.backends.loihi.quantize import quantize as quantize_for_loihi
from spikeprop.errors import InputError, UnsupportedError
from spikeprop.network import Layer, Network
from spikeprop.rules.base import Answer, Rule


@dataclass
class _Rounded:
    """One layer's real weights, the scale they are rounded at, and the number of updates so far."""

    parameter: nn.Parameter
    real: Tensor
    weight_bits: int
    scale: float = 0.0
    updates: int = 0

    def round(self, rescale_every: int) -> None:
        """Put the rounded weights into the network. The scale is chosen anew now and then, and when its largest code is idle:
        as long as that code is in use, rounding the rounded weights again finds the same scale.
        """
        step, highest = weight_step(self.weight_bits), 2**8 - weight_step(self.weight_bits)
        if self.updates % rescale_every == 0 or self.real.abs().max().item() * self.scale < highest - step / 2:
            self.scale = round_weights(self.real.double().cpu().numpy(), self.weight_bits).scale
        codes = (self.real * (self.scale / step)).round_().mul_(step).clamp_(-highest, highest)
        self.parameter.copy_(codes / self.scale)
        self.updates += 1


@dataclass
class QuantizationAwareState:
    """The wrapped rule's state, and the real weights behind the rounded ones."""

    inner: Any
    weights: list[_Rounded]

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.inner.optimizer


@dataclass(frozen=True)
class QuantizationAware(Rule):
    """A rule on a network with Loihi's weights and decays.

    Args:
        rule: what learns, for example ``SigProp()``; its optimiser gets to see the real weights.
        weight_bits: 2 to 8, with the sign.
        rescale_every: updates after which a layer's scale is chosen anew.

    ``initial_state`` raises what :func:`spikeprop.backends.loihi.quantize` raises for a network that does not fit the chip,
    and sets the network's decays to those of the chip's registers.
    """

    rule: Rule
    weight_bits: int = 8
    rescale_every: int = 50

    def initial_state(self, network: Network, *, generator: torch.Generator | None = None) -> QuantizationAwareState:
        if self.rescale_every < 1:
            raise InputError(f"QuantizationAware: rescale_every = {self.rescale_every} must be at least 1")
        self.check(network)
        quantize_for_loihi(network, self.weight_bits, inputs="spikes")
        for number, layer in enumerate(network.layers, 1):
            self._prepare(f"layer {number}", layer)
        inner = self.rule.initial_state(network, generator=generator)
        parameters = [layer.synapse.weight for layer in network.layers if layer.synapse.weight is not None]
        weights = [_Rounded(parameter, parameter.detach().clone(), self.weight_bits) for parameter in parameters]
        for weight in weights:
            weight.round(self.rescale_every)

        # The optimiser was given the network's tensors: for the time of its step they hold the real weights.
        def before(*_: Any) -> None:
            for weight in weights:
                weight.parameter.copy_(weight.real)

        def after(*_: Any) -> None:
            for weight in weights:
                weight.real.copy_(weight.parameter)
                weight.round(self.rescale_every)

        inner.optimizer.register_step_pre_hook(before)
        inner.optimizer.register_step_post_hook(after)
        return QuantizationAwareState(inner, weights)

    def check(self, network: Network, batch_size: int | None = None) -> None:
        if self.rule.moves_weights:
            raise UnsupportedError(
                f"{type(self.rule).__name__} changes weights past the optimiser, which rounding would undo; "
                "train without rounded weights (no --weight-bits), or by another rule"
            )
        self.rule.check(network, batch_size)

    def by_row(self, network: Network) -> bool:
        return False  # not built: the share of the batch would have to reach the rule inside

    def memory(self, network: Network, batch_size: int, num_steps: int) -> int:
        return self.rule.memory(network, batch_size, num_steps)

    def begin(self, state: QuantizationAwareState) -> QuantizationAwareState:
        return QuantizationAwareState(self.rule.begin(state.inner), state.weights)

    def learn(
        self, network: Network, state: QuantizationAwareState, inputs: Tensor, labels: Tensor
    ) -> tuple[Answer, QuantizationAwareState]:
        answer, inner = self.rule.learn(network, state.inner, inputs, labels)
        return answer, QuantizationAwareState(inner, state.weights)

    def tensors(self, state: QuantizationAwareState) -> dict[str, Tensor]:
        kept = {f"inner.{name}": tensor for name, tensor in self.rule.tensors(state.inner).items()}
        for index, weight in enumerate(state.weights):
            kept[f"real.{index}"] = weight.real
            kept[f"scale.{index}"] = torch.tensor([weight.scale, weight.updates], dtype=torch.float64)
        return kept

    def restore(self, state: QuantizationAwareState, tensors: dict[str, Tensor]) -> None:
        inner = {name.removeprefix("inner."): tensor for name, tensor in tensors.items() if name.startswith("inner.")}
        self.rule.restore(state.inner, inner)
        for index, weight in enumerate(state.weights):
            weight.real.copy_(tensors[f"real.{index}"])
            scale, updates = tensors[f"scale.{index}"].tolist()
            weight.scale, weight.updates = scale, int(updates)

    def _prepare(self, where: str, layer: Layer) -> None:
        """Round the layer's decays, and refuse a synapse whose weights reach the chip only as sums of several."""
        kinds = [type(part).__name__ for part in getattr(layer.synapse, "parts", [layer.synapse])]
        if "Conv2d" in kinds and "AvgPool2d" in kinds[kinds.index("Conv2d") :]:
            raise UnsupportedError(
                f"{where}: pooling behind a convolution becomes one wider kernel on Loihi, whose weights are sums of the "
                "trained ones; put the pooling before the next layer's weights"
            )
        neuron: Any = layer.neuron
        shares = kept_shares(*decay_registers(where, neuron.alpha, neuron.beta))
        for name, share in zip(("alpha", "beta"), shares, strict=True):
            value = getattr(neuron, name)
            if isinstance(value, Tensor):
                value.copy_(torch.as_tensor(share))
            else:
                setattr(neuron, name, float(share))
