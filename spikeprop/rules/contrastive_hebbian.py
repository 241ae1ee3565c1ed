"""Contrastive Hebbian learning (Movellan 1991; Xie and Seung 2003), and recirculation, its form for one hidden layer.

The window is run twice from the same state: free, and with the output clamped to its target, of which feedback of gain gamma
tells the layers below, one step late. A layer learns from the difference of its activity a = phi(U) in the two phases:

    free       a_l[t], and delta, what the readout answers minus what it should, when the window ends
    clamped    c_l[t]: the same input, and into the drive    gamma G_l (c_{l+1} - a_{l+1})[t-1]
                                                             -gamma G_L delta for the last layer L
    e_l[t] = (a_l[t] - c_l[t]) / gamma^(L - l + 1)           dW_l = sum_t e_l[t]^T trace_l[t]

G_l is the transpose of the weights above (Xie and Seung), or a fixed random matrix (Detorakis, Bartley, Neftci 2019). Where the
phases settle and gamma is small, the update through transposes is backpropagation's gradient (Xie and Seung's theorem), the
division by powers of gamma included.

Two things differ from the papers, and vanish with gamma there. Feedback tells the difference between the phases, so that the
free phase is the network's plain forward pass, which needs no feedback once it is trained. And the Hebbian products c_l c_{l-1}
and a_l a_{l-1} share the presynaptic a_{l-1}; on spiking neurons its trace, filtered as the membrane filters. The spiking form
is ours: a is the surrogate's own phi, through which the phases differ before a spike is won or lost, and the layers below hear
of it. Feedback by the spikes alone learns, too, but not as deep.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from spikeprop.errors import InputError
from spikeprop.network import Layer, Network
from spikeprop.rules.base import Facts
from spikeprop.rules.windowed import AtOutput, Errors, LayerwiseRule, Passage, WindowedState
from spikeprop.surrogate import ReLU

Feedback = Literal["symmetric", "random"]


@dataclass(frozen=True)
class ContrastiveHebbian(LayerwiseRule):
    """The rule; see the module.

    Args:
        gamma: gain of the feedback, above 0. Spikes want about 1; on rate neurons Xie and Seung take 0.05.
        feedback: "symmetric", through the transposes of the weights above, or "random", through fixed matrices.
        scale: the random matrices are drawn from N(0, scale^2 / neurons above).
        Others as for :class:`~spikeprop.rules.windowed.LayerwiseRule`; of the surrogate phi itself is used, not its slope.
    """

    facts = Facts(
        paper="Movellan 1991; Xie, Seung 2003; Detorakis, Bartley, Neftci 2019",
        backward="one layer",
        time="O(B k w)",
        memory="O(B k n)",
        symmetric_weights=True,
        stored_history=True,
        global_error=True,
        refuses=("stochastic",),
        by_row=True,
    )

    gamma: float = 1.0
    feedback: Feedback = "symmetric"
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not self.gamma > 0:
            raise InputError(f"ContrastiveHebbian: gamma = {self.gamma} must be above 0, or the two phases would be the same")
        if self.feedback not in get_args(Feedback):
            raise InputError(f"ContrastiveHebbian: feedback = {self.feedback!r} is not one of {get_args(Feedback)}")
        if self.feedback == "random":  # the two variants differ in what they ask of a machine
            weights = "G_l, neurons of layer l + 1 x neurons of layer l, fixed"
            object.__setattr__(self, "facts", replace(self.facts, symmetric_weights=False, extra_weights=weights))

    def own_weights(self, network: Network, generator: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        if self.feedback == "symmetric":
            return {}, {}
        sizes = [*(layer.rate.numel() for layer in network.layers), network.outputs]
        return {}, {
            f"feedback.{index}": torch.randn(above, below, generator=generator).to(network.readout.weight)
            * (self.scale / above**0.5)
            for index, (below, above) in enumerate(itertools.pairwise(sizes))
        }

    def errors(
        self, network: Network, state: WindowedState, passages: list[Passage], labels: Tensor, output: AtOutput
    ) -> Errors:
        assert state.stream is not None
        steps, delta = len(passages[0].inputs), output.delta * len(output.delta)  # delta: each row's own
        free = [self.phi(passage.layer, passage.membrane) for passage in passages]
        clamped = [torch.empty_like(activity) for activity in free]
        # What each layer hears from above: how far that was from its free activity a step ago, also across windows.
        late = state.stream.own.get("late") or [torch.zeros_like(activity[0]) for activity in free]
        neurons, biases = [passage.before for passage in passages], [network.fold_bias(i) for i in range(len(passages))]
        for step in range(steps):
            x = passages[0].inputs[step : step + 1]
            above = [*late[1:], -delta]
            for index, passage in enumerate(passages):
                drive = passage.layer.drive(x) + self.gamma * self.down(network, state, index, above[index])
                (x, membrane), neurons[index] = passage.layer.run(neurons[index], drive, biases[index])
                clamped[index][step] = self.phi(passage.layer, membrane[0])
            late = [c[step] - a[step] for c, a in zip(clamped, free, strict=True)]
        state.stream.own["late"] = late
        errors: list[Tensor | None] = [
            (a - c) / (self.gamma ** (len(passages) - index) * len(delta) * output.steps)
            for index, (a, c) in enumerate(zip(free, clamped, strict=True))
        ]
        return Errors(errors, [output.loss] * len(passages))

    def phi(self, layer: Layer, membrane: Tensor) -> Tensor:
        """The activity that the phases are compared by: graded on spiking neurons, the true one of rate neurons."""
        return (self.surrogate if layer.neuron.spiking else ReLU())(membrane, layer.neuron.threshold)[0]

    def down(self, network: Network, state: WindowedState, index: int, signal: Tensor) -> Tensor:
        """What the layer above ``index``, or the readout, makes of a signal ``[B, ...]`` of its own for the one below it."""
        shape = network.layers[index].output_shape
        if self.feedback == "random":
            return (signal.flatten(1) @ state.own[f"feedback.{index}"]).view(-1, *shape)
        if index + 1 == len(network.layers):
            return (signal @ network.readout.weight).view(-1, *shape)
        return network.layers[index + 1].synapse.adjoint(signal, shape)


class Autoencoder(NamedTuple):
    """Rate units in a loop: ``encode [n, m]`` from m visible to n hidden units, ``decode [m, n]`` back, a bias each."""

    encode: Tensor
    decode: Tensor
    hidden_bias: Tensor
    visible_bias: Tensor


@torch.no_grad()
def recirculate(
    autoencoder: Autoencoder,
    visible: Tensor,
    *,
    regression: float = 0.75,
    activation: Callable[[Tensor], Tensor] = torch.sigmoid,
) -> tuple[Tensor, Autoencoder]:
    """Recirculation (Hinton and McClelland 1988): data go around the loop twice, and what changes on the way is the error.

        h1 = f(W v0)    v2 = lambda v0 + (1 - lambda) f(V h1)    h3 = lambda h1 + (1 - lambda) f(W v2)
        dV = eps (v0 - v2) h1^T                                  dW = eps (h1 - h3) v2^T

    Args:
        autoencoder: W, V and their biases.
        visible: data v0 ``[B, m]``.
        regression: lambda in [0, 1), how much of the old activity stays; near 1 the visible units change little, and with
            symmetric weights the updates are those of gradient descent.
        activation: f.

    Returns:
        The reconstruction f(V h1) ``[B, m]``, and the updates as gradients to descend, -dV / eps and so on, averaged over
        rows.
    """
    if not 0.0 <= regression < 1.0:
        raise InputError(f"recirculate: regression = {regression} lies outside [0, 1); at 1 nothing would change on the way")
    encode, decode, hidden_bias, visible_bias = autoencoder
    hidden = activation(visible @ encode.T + hidden_bias)
    reconstruction = activation(hidden @ decode.T + visible_bias)
    again = visible.lerp(reconstruction, 1.0 - regression)
    hidden_again = hidden.lerp(activation(again @ encode.T + hidden_bias), 1.0 - regression)
    at_visible, at_hidden = (again - visible) / len(visible), (hidden_again - hidden) / len(visible)
    return reconstruction, Autoencoder(at_hidden.T @ again, at_visible.T @ hidden, at_hidden.sum(0), at_visible.sum(0))
