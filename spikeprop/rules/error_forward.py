"""Error forward-propagation: the output's error enters again at the front and travels on through the forward weights.

Kohan, Rietman, Siegelmann 2018, arXiv 1808.03357. The only way back is one loop from the output into layer 1; no layer has
backward connections. The window is run twice from the same state, and a layer's error is what the second pass changes in it:

    free      S_l[t], and delta, the error at the readout when the window ends
    nudged    N_l[t]: the same input, and -gain delta F into the neurons of layer 1 at every step; F fixed, drawn once
    e_l[t] = (S_l[t] - N_l[t]) / gain
    dW_l = sum_t e_l[t]^T trace_l[t]

The sequence goes on from the free pass. On rate neurons this is PEPITA (Dellaferrera and Kreiman 2022, arXiv 2201.11665) in
all but two points: F leads to the neurons of layer 1, not to their inputs, and the presynaptic activity is the free pass's.
Small nudges then give layer 1 direct feedback alignment with F, and layer l the feedback F W_2^T ... W_l^T (through the
slopes).

The papers' networks have graded activity; on spiking neurons this form is ours. The contrast is that of the spikes themselves,
without any surrogate: a nudged membrane spikes earlier and is then the lower one for its reset, so that a contrast of membranes
loses its sign (on digits it learns less than a fixed random network would). A spike has to be gained or lost for an error to
exist, hence the large gain: 1 is too weak for two layers.

The second pass goes through the network itself, so each layer blurs the error once more: this rule weakens with depth.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spikeprop.errors import InputError
from spikeprop.network import Network
from spikeprop.rules.base import Facts
from spikeprop.rules.windowed import AtOutput, Errors, LayerwiseRule, Passage, WindowedState


@dataclass(frozen=True)
class ErrorForward(LayerwiseRule):
    """The rule; see the module.

    Args:
        gain: strength of the nudge, above 0; the errors are divided by it. About 5 moves spikes; rate neurons want 0.1.
        scale: F is drawn from N(0, scale^2 / outputs).
        Others as for :class:`~spikeprop.rules.windowed.LayerwiseRule`; the surrogate is not used.
    """

    facts = Facts(
        paper="Kohan, Rietman, Siegelmann 2018, arXiv 1808.03357",
        backward="nothing",
        time="O(B k w)",
        memory="O(B k n)",
        extra_weights="F, outputs x neurons of layer 1, fixed",
        stored_history=True,
        global_error=True,
        refuses=("stochastic",),
        by_row=True,
    )

    gain: float = 5.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not self.gain > 0:
            raise InputError(f"ErrorForward: gain = {self.gain} must be above 0, or the two passes would be the same")

    def own_weights(self, network: Network, generator: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        first, outputs = network.layers[0], network.outputs
        loop = torch.randn(outputs, first.rate.numel(), generator=generator).to(first.bias)
        return {}, {"loop": loop * (self.scale / outputs**0.5)}

    def errors(
        self, network: Network, state: WindowedState, passages: list[Passage], labels: Tensor, output: AtOutput
    ) -> Errors:
        delta = output.delta * len(output.delta)  # each row's own: how many rows share an update must not weaken its nudge
        nudge = (-self.gain * delta @ state.own["loop"]).view_as(passages[0].spikes[0])
        nudged, errors = passages[0].inputs, list[Tensor | None]()
        for index, passage in enumerate(passages):
            drive = passage.layer.drive(nudged)
            if index == 0:
                drive = drive + nudge
            nudged = passage.layer.run(passage.before, drive, network.fold_bias(index))[0].spikes
            errors.append((passage.spikes - nudged) / (self.gain * len(delta) * output.steps))
        return Errors(errors, [output.loss] * len(passages))
