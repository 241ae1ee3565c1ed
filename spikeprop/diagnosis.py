"""Why neurons are dead: one cause for each, and what would have to change for its first spike.

A neuron that never spikes is never reset. Its membrane is then a plain sum of parts that leak alike,

    U = excitation - inhibition + centring + bias,

the terms ``weight * input`` above and below 0 (recurrent ones included), the mean that centring subtracts (see
``Network.fold_bias``) and the layer's own bias. What it would have been without one of the parts follows from the same pass
over the data. The cause is the first line that holds of the largest membrane over every step of every sample:

===========  =========================================================  ======================================================
cause        what holds                                                 what lifts the membrane above the threshold
===========  =========================================================  ======================================================
competition  U exceeds the threshold, but rivals always win             the same neurons without competition
chance       U exceeds the threshold, but no spike was drawn            it is above: more samples bring a spike
no input     nothing arrives: no weight, or silent where there is one   input
bias         U exceeds the threshold with the negative bias at 0        the bias at 0
threshold    weights times a factor of at most 10 would do              weights times the factor, or a threshold below U
inhibition   U exceeds it with the terms below 0 left out               negative weights dropped (for inputs of 0 and more)
centring     U exceeds it with centring left out                        the same layer without centring
threshold    weights times some larger factor would do                  weights times the factor
several      there is excitation, but no single change helps            no negative bias, centring, inhibition; times the factor
no input     none of these: nothing ever excites it                     input
===========  =========================================================  ======================================================

Weights that change take along the mean that centring subtracts. Factors are bounds: anything above them does. The threshold
comes before inhibition because most neurons of a wide layer would spike without their negative weights, also where only the
scale is wrong. Competition is that of ``WinnerTakeAll``, chance that of ``Bernoulli``.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spikeprop.data import Split
from spikeprop.encoding import Encoder
from spikeprop.evaluation import Health, LayerHealth, dead_neurons
from spikeprop.homeostasis import REFERENCE_BATCH, Homeostasis
from spikeprop.network import Network, is_constant
from spikeprop.neuron import Activity, Bernoulli, WinnerTakeAll, advance
from spikeprop.synapse import Synapse

CAUSES = ("no input", "bias", "threshold", "inhibition", "centring", "competition", "chance", "several")
LARGEST_FACTOR = 10.0  # of the weights that still counts as a matter of scale
NEGLIGIBLE = 1e-5  # thresholds; below it a sum of parts in single precision says nothing
QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)
MOST = 0.9  # share of the neurons of one cause that an advised value revives


@dataclass(frozen=True)
class LayerDiagnosis:
    """One layer: its health, and the neurons, counted in C order of the layer's shape, that are not well.

    Attributes:
        health: the shares, and per neuron the spikes and the distance to the threshold.
        causes: the dead neurons of each of :data:`CAUSES`.
        nearly_dead: neurons that spike, but in less than 1 % of the samples.
        saturated: neurons that spike at every step of every sample.
        threshold: per neuron ``[n]``.
        factor: per neuron ``[n]``: the first spike needs weights larger by this factor; infinite where no factor does. For the
            cause "several" it is that of the excitation alone.
        lift: per neuron ``[n]``: or it needs a bias larger by this, whatever the cause, in membrane units.
        weightless: of the neurons without input, how many have no weight; the inputs of the others are silent.
        uncentred: how many of the dead neurons would rise above their threshold without centring, whatever their cause.
        rivals: the most spikes per step that the layer's competition allows; None without competition.
    """

    health: LayerHealth
    causes: dict[str, list[int]]
    nearly_dead: list[int]
    saturated: list[int]
    threshold: Tensor = field(repr=False)
    factor: Tensor = field(repr=False)
    lift: Tensor = field(repr=False)
    weightless: int = 0
    uncentred: int = 0
    rivals: int | None = None

    @property
    def peak(self) -> Tensor:
        """The largest membrane of each neuron in units of its threshold, ``[n]``; 1 is the threshold."""
        return self.health.deficits.flatten() / self.threshold + 1.0

    @property
    def dead(self) -> list[int]:
        """All dead neurons."""
        return sorted(neuron for neurons in self.causes.values() for neuron in neurons)

    def deficits(self) -> list[float] | None:
        """How far the dead neurons' largest membranes stay below their thresholds, in thresholds: quantiles, least first."""
        return None if not self.dead else _quantiles(1.0 - self.peak[self.dead], QUANTILES)

    def to_dict(self) -> dict[str, Any]:
        """Figures and neurons for JSON; the dead ones' values stand in the order of ``neurons`` of their cause."""
        causes = {
            cause: {
                "neurons": neurons,
                "peak": _plain(self.peak[neurons]),
                "factor": _plain(self.factor[neurons]),
                "lift": _plain(self.lift[neurons]),
            }
            for cause, neurons in self.causes.items()
        }
        return {
            **self.health.to_dict(),
            "causes": causes,
            "deficits": self.deficits(),
            "nearly_dead_neurons": self.nearly_dead,
            "saturated_neurons": self.saturated,
            "weightless": self.weightless,
            "uncentred": self.uncentred,
        }


@dataclass(frozen=True)
class Diagnosis:
    """What :func:`diagnose` found, layer by layer, over ``samples`` samples of ``num_steps`` steps."""

    layers: list[LayerDiagnosis]
    samples: int
    num_steps: int

    @property
    def health(self) -> Health:
        """The measurement alone, for example to compare two by :func:`spikeprop.changes`."""
        return Health([layer.health for layer in self.layers], self.samples, self.num_steps)

    def to_dict(self) -> dict[str, Any]:
        layers = [layer.to_dict() for layer in self.layers]
        return {"layers": layers, "samples": self.samples, "num_steps": self.num_steps, "advice": advise(self)}

    def __str__(self) -> str:
        found = [cause for cause in CAUSES if any(cause in layer.causes for layer in self.layers)]
        lines = [str(self.health), ""]
        if not found:
            lines.append("no neuron is dead")
        else:
            lines.append("dead by cause  " + "  ".join(f"{cause:>9}" for cause in found))
            for number, layer in enumerate(self.layers, 1):
                counts = ((cause, len(layer.causes.get(cause, []))) for cause in found)
                lines.append(f"{f'layer {number}':<13}  " + "  ".join(f"{n:{max(9, len(c))}d}" for c, n in counts))
        for number, layer in enumerate(self.layers, 1):
            deficits = layer.deficits()
            if deficits is not None:
                low, _, middle, _, high = deficits
                lines.append(
                    f"layer {number}: below the threshold by {low:.2g} to {high:.2g} thresholds, typically {middle:.2g}"
                )
            named = {**layer.causes, "nearly dead": layer.nearly_dead, "saturated": layer.saturated}
            lines += [f"layer {number}, {name}: {_some(neurons)}" for name, neurons in named.items() if neurons]
            if layer.uncentred:
                lines.append(f"layer {number}: {layer.uncentred} of the dead would rise above the threshold without centring")
        return "\n".join(lines)


def diagnose(
    network: Network,
    split: Split | tuple[Tensor, Tensor],
    num_steps: int | None = None,
    *,
    encoder: Encoder | None = None,
    batch_size: int = 500,
    seed: int = 0,
) -> Diagnosis:
    """Which neurons never spike over a whole pass through a data set, and why; the rule is that of this module.

    One pass with running maxima: memory does not grow with the data.

    Args: as for :func:`spikeprop.dead_neurons`.

    Raises:
        InputError: data that do not fit the network or are empty, or a layer whose neurons do not spike.
    """
    watches: list[_Watch] = []

    def observe(inputs: Tensor, activities: list[Activity]) -> None:
        if not watches:
            watches.extend(_Watch(network, index) for index in range(len(network.layers)))
        for watch, activity in zip(watches, activities, strict=True):
            watch.see(inputs, activity)
            inputs = activity.spikes

    settings: Any = {"encoder": encoder, "batch_size": batch_size, "seed": seed}
    health = dead_neurons(network, split, num_steps, observe=observe, **settings)
    with torch.inference_mode():
        layers = [watch.conclude(health, layer) for watch, layer in zip(watches, health.layers, strict=True)]
    return Diagnosis(layers, health.samples, health.num_steps)


# --- The measurement ---------------------------------------------------------------------------------------------------------


class _Watch:
    """One layer's running maxima over all steps of all samples, ``[*output_shape]``: what its membranes were and could be."""

    def __init__(self, network: Network, index: int) -> None:
        self.layer = layer = network.layers[index]
        self.threshold = layer.bias.new_zeros(layer.output_shape) + layer.neuron.threshold
        self.bias = layer.bias.expand(layer.output_shape)
        self.centring = (network.fold_bias(index) - layer.bias).expand(layer.output_shape)
        self.excitation = _Excitation(layer.synapse)
        self.own_excitation = None if layer.recurrent is None else _Excitation(layer.recurrent)
        mean = network.centre(index)
        self.excited_centring = torch.zeros_like(self.bias)  # what centring would subtract from the excitation alone
        if mean is not None:
            self.excited_centring = -self.excitation(mean.unsqueeze(0))[0] / (1.0 - layer.neuron.alpha)
        parts = ("membrane", "without_bias", "without_centring", "without_inhibition", "net", "excitation", "headroom")
        self.largest = {part: torch.full_like(self.bias, -torch.inf) for part in parts}
        self.inputs = layer.bias.new_zeros(layer.input_shape)
        self.spikes = torch.zeros_like(self.bias)

    def see(self, inputs: Tensor, activity: Activity) -> None:
        """Take in a stretch from rest: the layer's inputs ``[T, B, *input_shape]`` and its activity."""
        neuron, constant = self.layer.neuron, is_constant(inputs)
        state, drive = neuron.initial_state(activity.spikes[0]), torch.empty(0)
        unit: Any = 0.0  # what a bias of 1 has become
        for step, (spikes, membrane) in enumerate(zip(activity.spikes, activity.membrane, strict=True)):
            if step == 0 or not constant:
                self.inputs = torch.maximum(self.inputs, inputs[step].abs().amax(0))
                drive = self.excitation(inputs[step])
            excited = drive
            if self.own_excitation is not None and step > 0:
                excited = drive + self.own_excitation(activity.spikes[step - 1])
            self.spikes = torch.maximum(self.spikes, spikes.amax(0))
            _, excited, state = advance(
                state,
                excited,
                alpha=neuron.alpha,
                beta=neuron.beta,
                bias=0.0,
                threshold=torch.inf,
                reset_mechanism="none",
            )
            unit = neuron.beta * unit + 1.0
            self._compare(membrane.amax(0), excited.amax(0), unit)

    def _compare(self, membrane: Tensor, excited: Tensor, unit: Any) -> None:
        """Raise the maxima by one step's: everything else in a membrane is the same for all samples."""
        bias, centring = self.bias * unit, self.centring * unit  # left out where they excite, they only lower a membrane
        room, room_excited = self.threshold - bias, self.threshold - bias.clamp(min=0.0)
        present = {
            "membrane": membrane,
            "without_bias": membrane - bias,
            "without_centring": membrane - centring,
            "without_inhibition": excited + self.excited_centring * unit + bias,
            "net": torch.where(room > 0, (membrane - bias) / room, -torch.inf),
            "excitation": torch.where(room_excited > 0, excited / room_excited, torch.inf),
            "headroom": (membrane - self.threshold) / unit,
        }
        for part, value in present.items():
            self.largest[part] = torch.maximum(self.largest[part], value)

    def conclude(self, whole: Health, health: LayerHealth) -> LayerDiagnosis:
        """The cause of every dead neuron, by the rule at the top of the module."""
        arriving, possible = self.excitation.reach(self.inputs), self.excitation.reach(torch.ones_like(self.inputs))
        if self.own_excitation is not None:
            arriving = arriving + self.own_excitation.reach(self.spikes)
            possible = possible + self.own_excitation.reach(torch.ones_like(self.spikes))
        largest, threshold, neuron = self.largest, self.threshold, self.layer.neuron
        nothing, net = arriving <= NEGLIGIBLE * threshold, largest["net"]
        above = {part: largest[part] > threshold for part in largest}
        rule = (
            ("competition", above["membrane"] & isinstance(neuron, WinnerTakeAll)),
            ("chance", above["membrane"] & isinstance(neuron, Bernoulli)),
            ("no input", nothing),
            ("bias", above["without_bias"]),
            ("threshold", net >= 1.0 / LARGEST_FACTOR),
            ("inhibition", above["without_inhibition"]),
            ("centring", above["without_centring"]),
            ("threshold", net > NEGLIGIBLE),
            ("several", largest["excitation"] > NEGLIGIBLE),
            ("no input", torch.ones_like(nothing)),
        )
        dead = left = (health.spike_counts == 0).to(nothing.device)
        found: dict[str, Tensor] = {}
        for cause, holds in rule:
            found[cause] = found.get(cause, torch.zeros_like(dead)) | (left & holds)
            left = left & ~holds
        ratio = torch.where(found["several"], largest["excitation"], net)
        counts, few = health.spike_counts, health.active_samples < 0.01 * whole.samples
        return LayerDiagnosis(
            health=health,
            causes={cause: _indices(found[cause]) for cause in CAUSES if found[cause].any()},
            nearly_dead=_indices(few & (counts > 0)),
            saturated=_indices(counts == whole.samples * whole.num_steps),
            threshold=threshold.flatten().cpu(),
            factor=torch.where(ratio > NEGLIGIBLE, 1.0 / ratio, torch.inf).flatten().cpu(),
            lift=-largest["headroom"].flatten().cpu(),
            weightless=int((found["no input"] & (possible <= NEGLIGIBLE * threshold)).sum()),
            uncentred=int((dead & above["without_centring"] & ~above["membrane"]).sum()),
            rivals=neuron.winners if isinstance(neuron, WinnerTakeAll) else None,
        )


class _Excitation:
    """The terms of a synapse's sums that are above 0: positive weights times positive inputs, negative times negative."""

    def __init__(self, synapse: Synapse) -> None:
        self.positive, self.negative, self.size = (copy.deepcopy(synapse) for _ in range(3))
        self.weighted = synapse.weight is not None
        if synapse.weight is not None:
            for part, weight in (
                (self.positive, synapse.weight.clamp(min=0.0)),
                (self.negative, (-synapse.weight).clamp(min=0.0)),
                (self.size, synapse.weight.abs()),
            ):
                assert part.weight is not None
                part.weight.copy_(weight)

    def __call__(self, inputs: Tensor) -> Tensor:
        excitation: Tensor = self.positive(inputs.clamp(min=0.0))
        if self.weighted and bool((inputs < 0).any()):
            excitation = excitation + self.negative((-inputs).clamp(min=0.0))
        return excitation

    def reach(self, inputs: Tensor) -> Tensor:
        """The largest drive of either sign that inputs up to these sizes ``[*input_shape]`` could cause."""
        return self.size(inputs.unsqueeze(0))[0]


def _indices(which: Tensor) -> list[int]:
    return which.flatten().nonzero().flatten().tolist()


def _quantiles(values: Tensor, shares: Sequence[float]) -> list[float]:
    quantiles: list[float] = np.quantile(values.double().numpy(), shares).tolist()
    return quantiles


def _plain(values: Tensor) -> list[float | None]:
    """Numbers that JSON can hold."""
    return [value if math.isfinite(value) else None for value in values.tolist()]


def _some(neurons: list[int], shown: int = 10) -> str:
    more = f" and {len(neurons) - shown} more" if len(neurons) > shown else ""
    return f"{len(neurons)} neuron{'s' * (len(neurons) != 1)} ({', '.join(map(str, neurons[:shown]))}{more})"


# --- Advice ------------------------------------------------------------------------------------------------------------------


def advise(diagnosis: Diagnosis, homeostasis: Homeostasis | None = None) -> list[str]:
    """What to do, one line per layer and cause; a single line where nearly every neuron lives and none is stuck.

    homeostasis: that of the training, if it had one.
    """
    lines = []
    for number, layer in enumerate(diagnosis.layers, 1):
        neurons, below = layer.health.neurons, diagnosis.layers[number - 2].health.dead if number > 1 else 0.0
        if layer.health.dead > 0.01:
            if below > 0.5:
                lines.append(f"layer {number} hears a layer of which {below:.0%} are dead: begin with layer {number - 1}")
            for cause, dead in layer.causes.items():
                lines.append(f"layer {number}, {len(dead)} of {neurons} neurons, {cause}: {_remedy(layer, number, cause)}")
            lines.append(f"layer {number}, any cause: {_by_bias(layer, homeostasis)}")
        if layer.health.saturated > 0.01:
            lines.append(f"layer {number}, {layer.health.saturated:.1%} saturated: raise --threshold or lower --beta")
        if len(layer.nearly_dead) > 0.1 * neurons:
            lines.append(
                f"layer {number}, {len(layer.nearly_dead) / neurons:.1%} hardly spike: make it narrower or lower --threshold"
            )
    return lines or ["none needed, nearly every neuron lives and none is stuck"]


def _remedy(layer: LayerDiagnosis, number: int, cause: str) -> str:
    """What removes one cause in layer ``number``, counted from 1."""
    neurons, here = layer.causes[cause], f"network.layers[{number - 1}]"
    if cause == "threshold":
        factor, peak = _sufficient(layer.factor[neurons]), -_sufficient(-layer.peak[neurons])
        revived = f"which revives {MOST:.0%} of them"
        weights = f"multiply its weights by {1.01 * factor:.3g}" if math.isfinite(factor) else "draw its weights anew, larger"
        if peak <= 0:
            return f"{weights}, {revived}"
        if bool((layer.threshold == layer.threshold[0]).all()):
            now = float(layer.threshold[0])
            lower = f"lower the threshold from {now:.3g} to {_floor(peak * now):g} ({here}.neuron.threshold)"
            return f"{lower}, or {weights}, {revived}"
        return f"multiply the thresholds by {_floor(peak):g} ({here}.neuron.threshold), or {weights}, {revived}"
    if cause == "no input":
        silent = len(neurons) - layer.weightless
        below = f"layer {number - 1} is silent where they listen: revive it first" if number > 1 else SILENT_INPUTS
        parts = [f"nothing that excites reaches {silent} of them: {below}"] * (silent > 0)
        return "; ".join(parts + [f"{layer.weightless} have no weight: draw their weights anew"] * (layer.weightless > 0))
    return {
        "bias": f"raise the biases below 0 to 0: {here}.bias.clamp_(min=0)",
        "inhibition": "negative weights outweigh the positive ones: raise the bias, or weaken the negative weights",
        "centring": "centring takes more than this data gives: set the mean anew on it "
        + ("(spikeprop.training.centre_inputs)" if number == 1 else f"(network.layers[{number - 2}].rate)")
        + ", or build with centred=False",
        "competition": f"rivals always win: allow more than {layer.rivals} winners, or use homeostasis, which tires them",
        "chance": "they rose above the threshold and drew no spike: measure over more samples",
        "several": "no single change helps: raise the bias, and look at gain and thresholds",
    }[cause]


def _by_bias(layer: LayerDiagnosis, homeostasis: Homeostasis | None) -> str:
    """What the bias would have to do for most of the dead neurons, and how soon homeostasis does it."""
    ready = [neuron for neuron in layer.dead if layer.lift[neuron] > 0]
    if not ready:
        return "the bias cannot help"
    off = homeostasis is None or homeostasis.strength == 0.0 or homeostasis.act_on != "bias"
    band = Homeostasis() if homeostasis is None or off else homeostasis
    updates = math.ceil(_sufficient(layer.lift[ready] / layer.threshold[ready]) / band.strength)
    how = "--homeostasis on" if off else "homeostasis, which is on,"
    raised = f"a bias raised by {1.01 * _sufficient(layer.lift[ready]):.3g} revives {MOST:.0%} of them"
    maps = layer.health.spike_counts.dim() == 3
    where = " (with one bias per channel: where the whole channel is below its band)" if maps else ""
    return f"{raised}; {how} does that in about {updates} updates of {REFERENCE_BATCH} samples{where}"


def _sufficient(values: Tensor) -> float:
    """The value that is enough for at least :data:`MOST` of the neurons, each of which needs its own."""
    return float(np.quantile(values.double().numpy(), MOST, method="higher"))


def _floor(value: float) -> float:
    """A little below, with three significant digits, since a membrane must exceed the threshold."""
    step = 10.0 ** (math.floor(math.log10(value)) - 2)
    return (math.ceil(value / step) - 1) * step


SILENT_INPUTS = "their inputs are 0 in all of this data, which harms nobody if it is so in use; else measure over more data"
