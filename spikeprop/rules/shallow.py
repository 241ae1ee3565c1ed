"""Only the readout learns, by the delta rule (Widrow and Hoff 1960); the layers' weights stay as they were drawn.

Where the network is centred, layers still follow the mean rates of those below, and ``homeostasis``, off by default, moves
biases.

The floor of every comparison: a rule that does not beat random features has not learned to assign credit.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from spikeprop.network import Network
from spikeprop.rules.base import Facts
from spikeprop.rules.windowed import AtOutput, Errors, LayerwiseRule, Passage, WindowedState


@dataclass(frozen=True)
class Shallow(LayerwiseRule):
    """The rule; see the module. Arguments as for :class:`~spikeprop.rules.windowed.LayerwiseRule`."""

    facts = Facts(paper="Widrow, Hoff 1960", backward="nothing", time="O(1)", memory="O(1)", by_row=True)

    def errors(
        self, network: Network, state: WindowedState, passages: list[Passage], labels: Tensor, output: AtOutput
    ) -> Errors:
        return Errors([None] * len(passages), [output.loss] * len(passages))
