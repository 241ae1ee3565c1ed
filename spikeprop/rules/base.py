"""What a learning rule is: an object that holds its settings, while everything that changes is passed in and out.

state = rule.initial_state(network)                       # optimiser and running means; lives as long as the training
for inputs, labels in sequences:
    state = rule.begin(state)                             # a new sequence: membranes and traces at rest
    answer, state = rule.learn(network, state, inputs, labels)    # [k, B, ...]: the whole sequence, or a stretch of it
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, cast

import torch
import torch._dynamo  # torch.optim would import it inside the first training step
from torch import Tensor

from spikeprop.errors import InputError, UnsupportedError
from spikeprop.homeostasis import Homeostasis
from spikeprop.network import Network
from spikeprop.neuron import Bernoulli
from spikeprop.team import Share

Kind = Literal["conv", "regression", "stochastic"]
OptimizerFactory = Callable[[Iterable[Tensor]], torch.optim.Optimizer]


class Answer(NamedTuple):
    """What the network answered before it learned from the last step it was given.

    ``outputs [B, outputs]``: the readout's, from the activity since the sequence began. ``loss [layers]``: each layer's local
    loss, averaged over the steps given that it read; NaN where it read none. ``activity``: per layer the mean over those steps
    and the batch ``[*features]``. ``readings [layers]``: how many steps the losses read, if not all.
    """

    outputs: Tensor
    loss: Tensor
    activity: list[Tensor]
    readings: Tensor | None = None


@dataclass(frozen=True)
class Facts:
    """What a rule asks of a machine, and what it can do; the tables of the documentation are made from these.

    Args:
        paper: where the rule comes from.
        backward: what travels backwards: "nothing", "one layer" (targets or errors step down a layer at a time through weights
            of their own or others'), "layers", "time", or "layers and time".
        time, memory: orders of one update, beyond the forward pass and the weights. B rows, k steps of a window, n neurons of
            all layers, w weights of all layers.
        extra_weights: weights besides the network's, "none" or what they are.
        symmetric_weights: whether an error passes through the transpose of a forward weight of another layer.
        stored_history: whether activity of past steps of a window must be kept until the update.
        global_error: whether hidden layers need an error computed at the network's output.
        autograd: whether the implementation records an autograd graph.
        by_row: whether an update is a mean over rows of what each of them asks, or of sums over all of them that processes can
            share, so that the rows of a batch can be spread over several (:class:`spikeprop.team.Share`).
        refuses: kinds of network that it cannot train; "stochastic" are layers of :class:`~spikeprop.neuron.Bernoulli` neurons.
    """

    paper: str
    backward: str
    time: str
    memory: str
    extra_weights: str = "none"
    symmetric_weights: bool = False
    stored_history: bool = False
    global_error: bool = False
    autograd: bool = False
    by_row: bool = False
    refuses: tuple[Kind, ...] = ()


class Rule:
    """A learning rule. Subclasses set ``facts`` and implement ``initial_state``, ``begin`` and ``learn``.

    See :mod:`spikeprop.rules.sigprop` for one, and :mod:`spikeprop.rules.windowed` for a base that does most of the work.
    """

    facts: ClassVar[Facts]
    moves_weights: ClassVar[bool] = False  # whether it also changes the network's weights past the optimiser

    def check(self, network: Network, batch_size: int | None = None) -> None:
        """Raise UnsupportedError for a network, or InputError for a batch, that this rule cannot learn from.

        ``batch_size``: of the smallest batch that will come.
        """
        name = type(self).__name__
        for number, layer in enumerate(network.layers, 1):
            kinds = [type(part).__name__ for part in getattr(layer.synapse, "parts", [layer.synapse])]
            if "conv" in self.facts.refuses and "Conv2d" in kinds:
                raise UnsupportedError(
                    f"{name} cannot train layer {number}, which is convolutional; use dense layers (mlp), or another rule"
                )
            if "stochastic" in self.facts.refuses and isinstance(layer.neuron, Bernoulli):
                raise UnsupportedError(
                    f"{name} cannot train layer {number}, whose Bernoulli neurons would answer its two passes differently by "
                    "chance; use LIF neurons, or another rule"
                )
        if network.regression and "regression" in self.facts.refuses:
            raise UnsupportedError(f"{name} learns classes, and this network was built for real outputs; choose another rule")

    def by_row(self, network: Network) -> bool:
        """Whether the rows of a batch can be spread over processes, see :class:`Facts`."""
        return self.facts.by_row

    def memory(self, network: Network, batch_size: int, num_steps: int) -> int:
        """Bytes that training holds at its peak beyond the interpreter, an estimate from above.

        Weights, gradients, two moments of the optimiser, and a window of activity; the factors were measured. Rules override
        what they hold besides.
        """
        weights = sum(parameter.numel() for parameter in network.parameters())
        neurons = sum(layer.rate.numel() for layer in network.layers)
        inputs = network.input_mean.numel()
        return network.readout.weight.element_size() * (6 * weights + batch_size * num_steps * (14 * neurons + 3 * inputs))

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


def learned_by(network: Network) -> list[Tensor]:
    """The network's own tensors that training changes: every layer's weights and bias, then the readout's."""
    return [*(tensor for layer in network.layers for tensor in layer.weights()), *network.readout.parameters()]


def layer_gradients(network: Network, index: int, at_weights: list[Tensor], at_bias: Tensor) -> list[Tensor]:
    """What an :class:`~spikeprop.traces.Eligibility` collected as gradients of ``layer.weights()``.

    The first gets what reaches it through the centring, which makes the bias on the membrane depend on the weights.
    """
    layer, mean = network.layers[index], network.centre(index)
    gradients = list(at_weights)
    if layer.synapse.weight is None:
        gradients.pop(0)
    elif mean is not None:
        through = (at_bias / (1.0 - layer.neuron.alpha)).unsqueeze(0)
        gradients[0] = layer.synapse.weight_gradient(-through, mean.unsqueeze(0), gradients[0])
    return [*gradients, at_bias.sum_to_size(layer.bias.shape)]


def follow_rates(
    network: Network, activity: list[Tensor], batch: int, homeostasis: Homeostasis | None, share: Share | None = None
) -> None:
    """Move every layer's running rate towards its mean activity ``[*output_shape]``, then hold the rates in their band."""
    if share is not None:
        activity, batch = share.mean(activity), share.total
    for layer, mean in zip(network.layers, activity, strict=True):
        Homeostasis.follow(layer, mean, batch)
        if homeostasis is not None:
            homeostasis.regulate(layer, batch, mean)


def keep_freed_memory() -> None:
    """Let the process keep the memory of freed tensors for the next ones.

    The C library (glibc) hands freed memory back to the system above a threshold, to get it again page by page at the next step
    of the training. It raises the threshold with the largest block it saw freed, up to 32 MiB (mallopt(3)). This one is never
    written to, so it takes no memory.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)


def make_optimizer(
    factory: OptimizerFactory, parameters: list[Tensor], units: dict[int, float] | None = None
) -> torch.optim.Optimizer:
    """The optimiser, refused if its ``step()`` wants to evaluate the loss again, which no forward-only rule can.

    ``units``: by the tensor's id, the unit that a tensor's learning rate is in, where it is not 1.
    """
    keep_freed_memory()
    optimizer = factory(parameters)
    if isinstance(optimizer, torch.optim.LBFGS):
        raise UnsupportedError(
            "the optimiser LBFGS calls the loss again from its step(); use one that only reads .grad, such as Adam"
        )
    if not units:
        return optimizer
    groups: dict[float, list[Tensor]] = {}
    for parameter in parameters:
        groups.setdefault(units.get(id(parameter), 1.0), []).append(parameter)
    optimizer = factory(cast(Any, [{"params": own} for own in groups.values()]))
    for group, unit in zip(optimizer.param_groups, groups, strict=True):
        group["lr"] *= unit
    return optimizer


@torch.no_grad()
def descend(
    optimizer: torch.optim.Optimizer,
    parameters: list[Tensor],
    gradients: list[Tensor],
    share: Share | None = None,
    *,
    leave: bool = True,
) -> None:
    """Hand the gradients, means over a batch's rows, to a ``torch.optim`` optimiser and let it step.

    Leaves inference mode for it: the moments that an optimiser creates on its first step, and what stays in ``.grad``, must be
    ordinary tensors, or the network could not be used in an ordinary training loop afterwards. ``leave=False`` leaves nothing
    in ``.grad`` nor in the list, which saves two copies of all weights; the optimiser must then keep no gradient.
    """
    assert len(gradients) == len(parameters)
    gradients = gradients if share is None else share.mean(gradients)
    with torch.inference_mode(False):
        for place, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
            if not leave and gradient.stride() == parameter.stride():
                parameter.grad = gradient
                continue
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
            parameter.grad.copy_(gradient)
            if not leave:
                gradients[place] = parameter.grad  # so that the one handed over is freed
        optimizer.step()
        if not leave:
            gradients.clear()
            for parameter in parameters:
                parameter.grad = None


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
