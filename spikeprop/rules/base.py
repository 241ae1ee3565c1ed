"""What a learning rule is: an object that holds its settings, while everything that changes is passed in and out.

state = rule.initial_state(network)                       # optimiser and running means; lives as long as the training
for inputs, labels in sequences:
    state = rule.begin(state)                             # a new sequence: membranes and traces at rest
    answer, state = rule.learn(network, state, inputs, labels)    # [k, B, ...]: the whole sequence, or a stretch of it
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch._dynamo  # torch.optim would import it inside the first training step
from torch import Tensor

from spikeprop.errors import InputError, UnsupportedError
from spikeprop.network import Network

OptimizerFactory = Callable[[Iterable[Tensor]], torch.optim.Optimizer]


class Answer(NamedTuple):
    """What the network answered before it learned from the last step it was given.

    ``outputs [B, outputs]``: the readout's, from the activity since the sequence began. ``loss [layers]``: each layer's local
    loss, averaged over the steps given. ``activity``: per layer the mean over those steps and the batch ``[*features]``.
    """

    outputs: Tensor
    loss: Tensor
    activity: list[Tensor]


class Rule:
    """A learning rule. Subclasses implement the first three methods; see :mod:`spikeprop.rules.sigprop` for one."""

    def initial_state(self, network: Network, *, generator: torch.Generator | None = None) -> Any:
        """Everything the rule changes besides the network. May attach what the rule needs to the network (target synapses)."""
        raise NotImplementedError

    def begin(self, state: Any) -> Any:
        """The state at the start of a new sequence."""
        raise NotImplementedError

    def learn(self, network: Network, state: Any, inputs: Tensor, labels: Tensor) -> tuple[Answer, Any]:
        """Learn from a stretch of a sequence ``[k, B, *input_shape]``; changes the network's tensors in place.

        ``labels``: classes ``[B]`` or per step ``[k, B]``, or real vectors ``[B, outputs]``.
        """
        raise NotImplementedError

    def tensors(self, state: Any) -> dict[str, Tensor]:
        """What a checkpoint must keep of the state besides its optimiser."""
        return {}

    def restore(self, state: Any, tensors: dict[str, Tensor]) -> None:
        """Put back what :meth:`tensors` gave."""


def make_optimizer(factory: OptimizerFactory, parameters: list[Tensor]) -> torch.optim.Optimizer:
    """The optimiser, refused if its ``step()`` wants to evaluate the loss again, which no forward-only rule can."""
    optimizer = factory(parameters)
    if isinstance(optimizer, torch.optim.LBFGS):
        raise UnsupportedError(
            "the optimiser LBFGS calls the loss again from its step(); use one that only reads .grad, such as Adam"
        )
    return optimizer


@torch.no_grad()
def descend(optimizer: torch.optim.Optimizer, parameters: list[Tensor], gradients: list[Tensor]) -> None:
    """Hand the gradients to a ``torch.optim`` optimiser and let it step.

    Leaves inference mode for it: the moments that an optimiser creates on its first step, and ``.grad``, must be ordinary
    tensors or the network could not be used in an ordinary training loop afterwards.
    """
    with torch.inference_mode(False):
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)  # an ordinary tensor, unlike the gradient
            parameter.grad.copy_(gradient)
        optimizer.step()


def check_labels(network: Network, inputs: Tensor, labels: Tensor) -> Tensor:
    """Labels per step ``[k, B]`` (classes) or per sample ``[B, outputs]`` (real); InputError if they do not fit."""
    steps, batch = inputs.shape[:2]
    if labels.is_floating_point() != network.regression:
        kinds = ("integer classes", "real vectors")
        raise InputError(f"the labels are of type {labels.dtype}, the network was built for {kinds[network.regression]}")
    if network.regression:
        if labels.shape != (batch, network.outputs):
            raise InputError(
                f"the targets have shape {tuple(labels.shape)}, expected [B, outputs] = {(batch, network.outputs)}"
            )
        if not torch.isfinite(labels.sum()):
            raise InputError("the targets hold NaN or infinite values")
        return labels
    if labels.shape not in ((batch,), (steps, batch)):
        raise InputError(
            f"the labels have shape {tuple(labels.shape)}, expected [B] = ({batch},) or [T, B] = ({steps}, {batch})"
        )
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or highest >= network.outputs:
        found = lowest if lowest < 0 else highest
        raise InputError(f"label {found} lies outside 0..{network.outputs - 1}, the classes of this network")
    return labels.long().expand(steps, batch)
