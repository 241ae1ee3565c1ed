"""Prediction and diagnosis over a data set: accuracy by every prediction option, and which neurons live.

Both passes run in batches under ``torch.inference_mode()`` and keep running sums only, so memory does not grow with the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from spikeprop.data import Split
from spikeprop.encoding import Encoder, default_encoder
from spikeprop.errors import InputError
from spikeprop.network import Network
from spikeprop.neuron import Activity
from spikeprop.prediction import build_tree, class_responses, directions, nearest, search_tree


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` found.

    Attributes:
        accuracy: share of samples predicted rightly, 0..1, by prediction option: "readout", "nearest", "tree" (the last two
            where the network has target synapses). Empty for regression.
        error: mean squared error of the readout, for regression; else None.
        comparisons: class responses compared per sample, by "nearest" and "tree".
        confusion: ``confusion[true][predicted]``, counts, by the readout.
        samples, num_steps: what it was measured on.
    """

    accuracy: dict[str, float]
    error: float | None
    comparisons: dict[str, float]
    confusion: list[list[int]]
    samples: int
    num_steps: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        over = f"over {self.samples} samples, T = {self.num_steps}"
        if self.error is not None:
            return f"mean squared error {self.error:.4g} {over}"
        shares = "  ".join(f"{option} {share:.4f}" for option, share in self.accuracy.items())
        saved = ""
        if self.comparisons:
            saved = f" (the tree compared {self.comparisons['tree']:.1f} of {self.comparisons['nearest']:.0f} class responses)"
        return f"accuracy {shares} {over}{saved}"


@dataclass(frozen=True)
class LayerHealth:
    """How one layer's neurons fare; shares and rates in 0..1.

    Attributes:
        neurons: number of neurons.
        dead: share that never spikes, over all samples and steps.
        nearly_dead: share that spikes in less than 1 % of the samples (the dead included).
        saturated: share that spikes at every step of every sample.
        rate: spikes per neuron per step.
        deficit: largest membrane minus threshold, per neuron, then the median over the dead ones: how far they are from a first
            spike (negative), in membrane units. None if none is dead.
        spike_counts, active_samples, deficits: per neuron: spikes, samples with a spike, largest membrane minus threshold.
    """

    neurons: int
    dead: float
    nearly_dead: float
    saturated: float
    rate: float
    deficit: float | None
    spike_counts: Tensor = field(repr=False)
    active_samples: Tensor = field(repr=False)
    deficits: Tensor = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The figures, without the per-neuron tensors."""
        return {name: getattr(self, name) for name in ("neurons", "dead", "nearly_dead", "saturated", "rate", "deficit")}


@dataclass(frozen=True)
class Health:
    """What :func:`dead_neurons` found, layer by layer, over ``samples`` samples of ``num_steps`` steps."""

    layers: list[LayerHealth]
    samples: int
    num_steps: int

    def share(self, name: str) -> list[float]:
        """One figure of every layer, for example ``share("dead")``."""
        return [getattr(layer, name) for layer in self.layers]

    def to_dict(self) -> dict[str, Any]:
        return {"layers": [layer.to_dict() for layer in self.layers], "samples": self.samples, "num_steps": self.num_steps}

    def __str__(self) -> str:
        lines = [
            f"over {self.samples} samples, T = {self.num_steps}",
            "layer  neurons    dead  nearly dead  saturated    rate  deficit",
        ]
        for number, layer in enumerate(self.layers, 1):
            deficit = "      -" if layer.deficit is None else f"{layer.deficit:7.2f}"
            lines.append(
                f"{number:5d}  {layer.neurons:7d}  {layer.dead:6.2%}  {layer.nearly_dead:11.2%}  {layer.saturated:9.2%}"
                f"  {layer.rate:6.4f}  {deficit}"
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class Change:
    """What became of the neurons between two measurements over the same data and T; shares in 0..1.

    Attributes:
        dead_before, dead_after: share of all neurons.
        revival: share of the neurons dead before that spike after; None if none was dead.
        death: share of the neurons alive before that are dead after; None if none was alive.
    """

    dead_before: float
    dead_after: float
    revival: float | None
    death: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def changes(before: Health, after: Health) -> list[Change]:
    """How many neurons of each layer were revived, and how many died, for example in the course of training.

    Raises:
        InputError: measurements of other layers, or over other numbers of samples or steps, which cannot be compared.
    """
    return [_change(*pair) for pair in zip(*_dead_in_both(before, after), strict=True)]


def total_change(before: Health, after: Health) -> Change:
    """As :func:`changes`, over the neurons of all layers together."""
    return _change(*(torch.cat(dead) for dead in _dead_in_both(before, after)))


def _dead_in_both(before: Health, after: Health) -> tuple[list[Tensor], list[Tensor]]:
    """Which neurons are dead, layer by layer ``[n]``, in each of two measurements that can be compared."""
    for name in ("samples", "num_steps"):
        values = (getattr(before, name), getattr(after, name))
        if values[0] != values[1]:
            raise InputError(
                f"changes: {name} was {values[0]} before and is {values[1]} after; measure over the same data and T"
            )
    if before.share("neurons") != after.share("neurons"):
        raise InputError(
            f"changes: the layers had {before.share('neurons')} neurons before and have {after.share('neurons')} after; "
            "measure the same network twice"
        )
    one, other = ([layer.spike_counts.flatten() == 0 for layer in health.layers] for health in (before, after))
    return one, other


def _change(before: Tensor, after: Tensor) -> Change:
    """Of booleans ``[n]``, dead before and dead after."""

    def share(which: Tensor) -> float | None:
        return float(which.double().mean()) if len(which) else None

    return Change(float(before.double().mean()), float(after.double().mean()), share(~after[before]), share(after[~before]))


def encode_in_batches(
    network: Network, inputs: Tensor, num_steps: int | None, encoder: Encoder | None, batch_size: int, seed: int
) -> Iterator[tuple[slice, Tensor]]:
    """Batch after batch the samples it holds and its encoded inputs ``[T, B, *features]``; see :func:`stream_batches`."""
    for rows, stretches in stream_batches(network, inputs, num_steps, encoder, batch_size, seed, None):
        yield rows, next(stretches)


def stream_batches(
    network: Network,
    inputs: Tensor,
    num_steps: int | None,
    encoder: Encoder | None,
    batch_size: int,
    seed: int,
    chunk: int | None,
) -> Iterator[tuple[slice, Iterator[Tensor]]]:
    """Batch after batch the samples it holds and its encoded inputs ``[k, B, *features]``, ``chunk`` steps at a time or all.

    ``inputs`` are ``[N, *input_shape]``, or ``[N, T, *input_shape]`` for data that carry their own time. Without an encoder the
    first are constant currents and the second events as they are.

    Raises:
        InputError: no samples, a shape that does not fit the network, or no ``num_steps`` where the data have no time axis.
    """
    features = len(network.input_shape)
    if len(inputs) == 0:
        raise InputError("the data set is empty: there is no sample to run")
    if tuple(inputs.shape[-features:]) != network.input_shape or inputs.dim() not in (features + 1, features + 2):
        shape = ", ".join(map(str, network.input_shape))
        raise InputError(f"the inputs have shape {tuple(inputs.shape)}, the network expects [N, {shape}] or [N, T, {shape}]")
    temporal = inputs.dim() == features + 2
    encoder = default_encoder(temporal) if encoder is None else encoder
    if num_steps is None:
        if not temporal:
            raise InputError("num_steps is missing: these inputs have no time axis of their own")
        num_steps = inputs.shape[1]
    generator = torch.Generator().manual_seed(seed)
    weight = network.readout.weight
    for start in range(0, len(inputs), batch_size):
        rows = slice(start, min(start + batch_size, len(inputs)))
        yield rows, (part.to(weight) for part in encoder.stretches(inputs[rows], num_steps, chunk, generator))


@torch.inference_mode()
def evaluate(
    network: Network,
    split: Split | tuple[Tensor, Tensor],
    num_steps: int | None = None,
    *,
    encoder: Encoder | None = None,
    batch_size: int = 500,
    seed: int = 0,
    chunk: int | None = None,
) -> Evaluation:
    """Accuracy over a data set by each prediction option.

    Args:
        network: trained by any rule.
        split: ``(inputs, labels)`` such as ``data.test``; inputs ``[N, *input_shape]`` or ``[N, T, *input_shape]``.
        num_steps: T; may be left out where the data carry time.
        encoder: constant current, or events as they are, by default.
        seed: for random encoders.
        chunk: steps of a sequence that are encoded and run at a time; None: all.

    Raises:
        InputError: data that do not fit the network, or are empty.
    """
    inputs, labels = split
    responses = tree = None
    right: dict[str, int] = {"readout": 0}
    compared = {"nearest": 0, "tree": 0}
    squared = 0.0
    confusion = torch.zeros(network.outputs, network.outputs, dtype=torch.long)
    steps = 0
    for rows, stretches in stream_batches(network, inputs, num_steps, encoder, batch_size, seed, chunk):
        steps, wanted, state = 0, labels[rows], network.initial_state(rows.stop - rows.start)
        total_activity: Tensor | float = 0.0
        for x in stretches:
            activities, state = network.advance(state, x)
            steps, total_activity = steps + len(x), total_activity + activities[-1].spikes.sum(0)
        assert isinstance(total_activity, Tensor)
        activity = total_activity / steps
        outputs = network.readout(activity).cpu()
        if network.regression:
            squared += float((outputs - wanted).square().mean(1).sum())
            continue
        predicted = outputs.argmax(1)
        confusion += torch.bincount(wanted * network.outputs + predicted, minlength=network.outputs**2).view_as(confusion)
        right["readout"] += int((predicted == wanted).sum())
        if network.target is not None and not network.target.beside_input:
            responses = class_responses(network, steps) if responses is None else responses
            samples, classes = directions(network, activity, responses)
            tree = build_tree(classes) if tree is None else tree
            for option, found in (("nearest", nearest(samples, classes)), ("tree", search_tree(samples, tree))):
                right[option] = right.get(option, 0) + int((found.classes.cpu() == wanted).sum())
                compared[option] += int(found.comparisons.sum())
    total = len(inputs)
    return Evaluation(
        accuracy={} if network.regression else {option: count / total for option, count in right.items()},
        error=squared / total if network.regression else None,
        comparisons={} if responses is None else {option: count / total for option, count in compared.items()},
        confusion=[] if network.regression else confusion.tolist(),
        samples=total,
        num_steps=steps,
    )


@torch.inference_mode()
def dead_neurons(
    network: Network,
    split: Split | tuple[Tensor, Tensor],
    num_steps: int | None = None,
    *,
    encoder: Encoder | None = None,
    batch_size: int = 500,
    seed: int = 0,
    chunk: int | None = None,
    observe: Callable[[Tensor, list[Activity]], None] | None = None,
) -> Health:
    """Which neurons never spike over a whole pass through a data set, which hardly, which always.

    Dead means: no spike at any step of any sample. It is not activation sparsity and not silence on one sample, and it is
    always a statement about the data and T at hand. Rate layers have no spikes and are refused.

    Args: as for :func:`evaluate`; the labels are not used. ``observe`` is called with each batch's encoded inputs
        ``[T, B, *input_shape]`` (or ``chunk`` steps of them) and every layer's activity, for whoever measures more in the same
        pass.

    Raises:
        InputError: data that do not fit the network or are empty, or a layer whose neurons do not spike.
    """
    inputs = split[0]
    for number, layer in enumerate(network.layers, 1):
        if not layer.neuron.spiking:
            raise InputError(f"layer {number}: {type(layer.neuron).__name__} neurons do not spike, so none can be dead")
    spikes = [torch.zeros(layer.output_shape, dtype=torch.float64) for layer in network.layers]
    active = [torch.zeros_like(count) for count in spikes]
    highest = [torch.full_like(count, -torch.inf) for count in spikes]
    steps = 0
    for rows, stretches in stream_batches(network, inputs, num_steps, encoder, batch_size, seed, chunk):
        steps, state = 0, network.initial_state(rows.stop - rows.start)
        per_sample = [torch.zeros(rows.stop - rows.start, *layer.output_shape) for layer in network.layers]
        for x in stretches:
            activities, state = network.advance(state, x)
            steps += len(x)
            if observe is not None:
                observe(x, activities)
            for index, activity in enumerate(activities):
                per_sample[index] += activity.spikes.sum(0).cpu()
                above = (activity.membrane - network.layers[index].neuron.threshold).amax((0, 1)).cpu()
                highest[index] = torch.maximum(highest[index], above)
        for index, counts in enumerate(per_sample):
            spikes[index] += counts.sum(0)
            active[index] += (counts > 0).sum(0)
    layers = []
    for count, fired, above in zip(spikes, active, highest, strict=True):
        dead = count == 0
        layers.append(
            LayerHealth(
                neurons=count.numel(),
                dead=float(dead.double().mean()),
                nearly_dead=float((fired < 0.01 * len(inputs)).double().mean()),
                saturated=float((count == steps * len(inputs)).double().mean()),
                rate=float(count.mean()) / (steps * len(inputs)),
                deficit=float(above[dead].median()) if bool(dead.any()) else None,
                spike_counts=count.clone(),
                active_samples=fired.clone(),
                deficits=above.clone(),
            )
        )
    return Health(layers, len(inputs), steps)
