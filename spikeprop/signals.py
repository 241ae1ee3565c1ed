"""Target generators: how a label becomes a signal that enters the first layer beside the input.

The context rows, one per class (or one per sample for real-valued targets), see the mean input that a centred network
subtracts and, through synapses of their own, their target; from there on they travel through the weights of the input rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spikeprop.synapse import Shape, Synapse


@dataclass(frozen=True)
class LearnedProjection:
    """A projection of the label, drawn from N(0, (scale threshold)^2) and learned by the first layer's own local loss."""

    scale: float = 1.0
    learned = True


@dataclass(frozen=True)
class FixedProjection:
    """A random projection of the label, drawn from N(0, (scale threshold)^2) once and kept."""

    scale: float = 1.0
    learned = False


class TargetSynapse(Synapse):
    """The synapses through which labels enter. ``weight`` is ``[*features of layer 1, outputs]``.

    ``beside_input``: labels enter in the rows of the input, as if concatenated with it, not as a stream of their own; the
    network then has no class responses to predict by.
    """

    weight: nn.Parameter

    def __init__(
        self,
        outputs: int,
        features: Shape,
        *,
        scale: float = 1.0,
        learned: bool = True,
        beside_input: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.outputs, self.features, self.learned, self.beside_input = outputs, tuple(features), learned, beside_input
        self.weight = nn.Parameter(torch.randn(*features, outputs, generator=generator) * scale, requires_grad=False)

    def output_shape(self, input_shape: Shape) -> Shape:
        return self.features

    def forward(self, x: Tensor) -> Tensor:
        """Targets ``[R, outputs]`` (one-hot or real) to the drive of layer 1, ``[R, *features]``."""
        return (x @ self.weight.flatten(0, -2).T).unflatten(1, self.features)

    def _weight_gradient(self, error: Tensor, x: Tensor) -> Tensor:
        return (error.flatten(1).to(self.weight.dtype).T @ x.to(self.weight.dtype)).view_as(self.weight)

    def config(self) -> dict[str, Any]:
        return {
            "outputs": self.outputs,
            "features": list(self.features),
            "learned": self.learned,
            "beside_input": self.beside_input,
        }
