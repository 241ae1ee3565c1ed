"""Layers of synapses and neurons, and the network they form. State passes in and out; time comes first.

A network also carries what its prediction needs: the means that centre its inputs, the readout, and the target synapses through
which class labels enter beside the input. All of it is saved with the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from spikeprop.errors import InputError
from spikeprop.neuron import Activity, Arithmetic, Neuron, RecurrentState, State, neuron_from_config
from spikeprop.readout import Readout
from spikeprop.signals import TargetSynapse
from spikeprop.synapse import Shape, Synapse, channels_last_if_one, synapse_from_config, unrounded_products


def is_constant(inputs: Tensor) -> bool:
    """Whether a sequence ``[T, ...]`` is one step seen T times (an expanded view), so that one product serves every step."""
    return len(inputs) > 1 and inputs.stride(0) == 0


class Layer(nn.Module):
    """A synapse and the neurons it drives.

    Attributes:
        bias: learned, one per neuron ``[n]``; for pictures one per channel ``[C, 1, 1]``, or one per neuron ``[C, H, W]`` where
            the neuron was given a bias of that shape, as by :func:`spikeprop.models.conv`.
        recurrent: a synapse from the layer's own spikes, which arrive one step late; None for most layers.
        rate: running mean of the neurons' activity ``[*output_shape]``, kept by training; the next layer is centred on it.
    """

    rate: Tensor

    def __init__(self, synapse: Synapse, neuron: Neuron, input_shape: Shape, recurrent: Synapse | None = None) -> None:
        super().__init__()
        if recurrent is synapse:
            raise InputError(
                "its recurrent synapse is the one from below; give it a synapse of its own, with weights of its own"
            )
        self.synapse, self.neuron, self.recurrent = synapse, neuron, recurrent
        self.input_shape = tuple(input_shape)
        self.output_shape = synapse.output_shape(self.input_shape)
        shape = self.output_shape if len(self.output_shape) == 1 else (self.output_shape[0], 1, 1)
        self.bias = nn.Parameter(torch.zeros(shape) + neuron.bias, requires_grad=False)
        self.register_buffer("rate", torch.zeros(self.output_shape))
        if recurrent is not None and recurrent.output_shape(self.output_shape) != self.output_shape:
            raise InputError(
                f"the recurrent synapse maps {self.output_shape} to {recurrent.output_shape(self.output_shape)}; "
                "it must map the layer's own spikes to the layer's own neurons"
            )

    def initial_state(self, batch: int) -> State:
        """The neurons at rest, for ``batch`` rows."""
        state = self.neuron.initial_state(self.rate.new_zeros(batch, *self.output_shape))
        return state if self.recurrent is None else RecurrentState(*state, torch.zeros_like(state.membrane))

    def run(
        self, state: State, drive: Tensor, bias: float | Tensor | None = None, arithmetic: Arithmetic | None = None
    ) -> tuple[Activity, State]:
        """A stretch of time: the drive from below ``[T, B, *output_shape]`` to activity, the recurrent synapse included."""
        return self.neuron.run(state, drive, bias, arithmetic, self.recurrent)

    def drive(self, inputs: Tensor, *, as_multiplied: bool = False) -> Tensor:
        """Inputs ``[T, B, *input_shape]`` to drive ``[T, B, *output_shape]``; a constant input is multiplied only once.

        ``as_multiplied`` leaves what changes in time in the type of products (:func:`spikeprop.synapse.product_type`).
        """
        steps, batch = inputs.shape[:2]
        if is_constant(inputs):
            return self.synapse(inputs[0]).expand(steps, batch, *self.output_shape)
        rows = inputs.flatten(0, 1)
        if rows.dim() == 4:  # flattening forgets the place of a single channel
            rows = channels_last_if_one(rows, inputs.stride(2) == 1)
        return (self.synapse.product if as_multiplied else self.synapse)(rows).unflatten(0, (steps, batch))

    def weights(self) -> list[Tensor]:
        """What learning changes: the weights of the synapse (if it has any) and of the recurrent one, then the bias."""
        synapses = [self.synapse] if self.recurrent is None else [self.synapse, self.recurrent]
        return [*(synapse.weight for synapse in synapses if synapse.weight is not None), self.bias]

    def config(self) -> dict[str, Any]:
        recurrent = {} if self.recurrent is None else {"recurrent": self.recurrent.config()}
        return {"synapse": self.synapse.config(), "neuron": self.neuron.config(), **recurrent}


def spikes_before(state: State, spikes: Tensor) -> Tensor:
    """What a recurrent synapse read at each step of a stretch from ``state``: the spikes ``[T, B, ...]``, a step late."""
    assert isinstance(state, RecurrentState)
    return torch.cat([state.spikes.unsqueeze(0), spikes[:-1]])


class Network(nn.Module):
    """A network of layers in a row, each of which may also be recurrent.

    Args:
        input_shape: shape of one input at one time step, for example ``(1, 28, 28)``.
        layers: pairs of a synapse and its neurons, first to last; a third entry is a recurrent synapse.
        outputs: number of classes, or of real outputs.
        centred: subtract the mean input of the training set and, between layers, the running mean activity. Both act as a
            bias on the membrane, bias - W mean / (1 - alpha), so a chip gets them for nothing (``fold_bias``).
        regression: whether the outputs are real values rather than classes.

    Raises:
        InputError: a synapse that does not fit the shape before it (the layer is named).
    """

    input_mean: Tensor
    layers: Sequence[Layer]

    def __init__(
        self,
        input_shape: Sequence[int],
        layers: Sequence[tuple[Synapse, Neuron] | tuple[Synapse, Neuron, Synapse | None]],
        outputs: int,
        *,
        centred: bool = True,
        regression: bool = False,
    ) -> None:
        super().__init__()
        if not layers or outputs < 1:
            raise InputError(f"Network: {len(layers)} layers and {outputs} outputs; at least one of each is needed")
        self.input_shape: Shape = tuple(input_shape)
        self.outputs, self.centred, self.regression = outputs, centred, regression
        built: list[Layer] = []
        for number, (synapse, neuron, *recurrent) in enumerate(layers, 1):
            try:
                built.append(Layer(synapse, neuron, built[-1].output_shape if built else self.input_shape, *recurrent))
            except InputError as error:
                raise InputError(f"layer {number}: {error}") from None
        self.layers = cast(Sequence[Layer], nn.ModuleList(built))
        self.register_buffer("input_mean", torch.zeros(self.input_shape))
        self.readout = Readout(built[-1].bias.new_zeros(built[-1].output_shape).numel(), outputs)
        self.target: TargetSynapse | None = None

    def part(self, start: int, stop: int) -> Network:
        """Layers ``start`` to ``stop`` (from 0, without the last) as a network of its own, which shares their tensors.

        Its input is centred on ``input_mean`` as this network's layer ``start`` is on the layer before, but not tied to that.
        A part without the last layer has a readout of its own, one without the first no target synapses.
        """
        part = Network.__new__(Network)
        nn.Module.__init__(part)
        inside = list(self.layers)[start:stop]
        part.input_shape, part.outputs = inside[0].input_shape, self.outputs
        part.centred, part.regression = self.centred, self.regression
        part.layers = cast(Sequence[Layer], nn.ModuleList(inside))
        part.register_buffer("input_mean", self.input_mean if start == 0 else self.layers[start - 1].rate.clone())
        last = stop == len(self.layers)
        part.readout = self.readout if last else Readout(inside[-1].rate.numel(), self.outputs).to(self.readout.weight)
        part.target = self.target if start == 0 else None
        return part

    def initial_state(self, batch: int) -> list[State]:
        """Every layer at rest, for ``batch`` rows."""
        return [layer.initial_state(batch) for layer in self.layers]

    def centre(self, index: int) -> Tensor | None:
        """The mean subtracted from the input of layer ``index`` (from 0), in the input's shape; None if not centred."""
        if not self.centred:
            return None
        return self.input_mean if index == 0 else self.layers[index - 1].rate

    def fold_bias(self, index: int, *, exact: bool = False) -> Tensor:
        """The bias that layer ``index`` really has: its own, with the centring of its input folded in.

        ``exact``: with products that are not rounded, for those who take the weights away. Within a run they are rounded as all
        others are, so that an input equal to its mean is no drive.

        Per neuron ``[*output_shape]``, also where the layer's own bias is per channel: under zero padding the mean's
        contribution differs at the borders.
        """
        layer, mean = self.layers[index], self.centre(index)
        if mean is None:
            return layer.bias
        with unrounded_products() if exact else nullcontext():
            return layer.bias - layer.synapse(mean.unsqueeze(0))[0] / (1.0 - layer.neuron.alpha)

    def advance(self, state: list[State], inputs: Tensor) -> tuple[list[Activity], list[State]]:
        """Run a stretch of time, ``inputs [T, B, *input_shape]``, from ``state``; layer by layer, as no delay lies between.

        Returns:
            For every layer spikes and pre-reset membrane ``[T, B, *output_shape]``, and the state after the last step.
        """
        self.check(inputs)
        activities, states, x = [], [], inputs
        for index, layer in enumerate(self.layers):
            activity, after = layer.run(state[index], layer.drive(x), self.fold_bias(index))
            activities.append(activity)
            states.append(after)
            x = activity.spikes
        return activities, states

    def step(self, state: list[State], x: Tensor) -> tuple[list[Activity], list[State]]:
        """One time step: ``x [B, *input_shape]``; every layer's activity ``[B, *output_shape]`` and the state after it."""
        activities, state = self.advance(state, x.unsqueeze(0))
        return [Activity(activity.spikes[0], activity.membrane[0]) for activity in activities], state

    def run(self, inputs: Tensor) -> list[Activity]:
        """A whole sequence from rest: for every layer spikes and pre-reset membrane, each ``[T, B, *output_shape]``."""
        self.check(inputs)
        return self.advance(self.initial_state(inputs.shape[1]), inputs)[0]

    def check(self, inputs: Tensor) -> None:
        """Raise InputError unless ``inputs`` is a finite floating sequence ``[T, B, *input_shape]`` with T, B >= 1."""
        expected = f"[T, B, {', '.join(map(str, self.input_shape))}]"
        if tuple(inputs.shape[2:]) != self.input_shape or inputs.dim() != 2 + len(self.input_shape):
            hint = "; the time axis comes first, an encoder adds it" if tuple(inputs.shape[1:]) == self.input_shape else ""
            raise InputError(f"the input has shape {tuple(inputs.shape)}, the network expects {expected}{hint}")
        if 0 in inputs.shape[:2]:
            raise InputError(f"the input has shape {tuple(inputs.shape)}: no time step or no sample in {expected}")
        if not inputs.is_floating_point():
            raise InputError(f"the input is of type {inputs.dtype}; convert it with inputs.float()")
        if not torch.isfinite((inputs[0] if is_constant(inputs) else inputs).sum()):
            raise InputError(
                "the input holds NaN or infinite values; clean the data (torch.nan_to_num) before the network sees it"
            )

    @torch.no_grad()
    def attach_target(
        self,
        *,
        scale: float = 1.0,
        learned: bool = True,
        beside_input: bool = False,
        generator: torch.Generator | None = None,
    ) -> TargetSynapse:
        """Give the network target synapses into layer 1, unless it has such ones; returns them. See :class:`TargetSynapse`."""
        if self.target is None or self.target.beside_input != beside_input:
            first, kind = self.layers[0], {"learned": learned, "beside_input": beside_input}
            target = TargetSynapse(self.outputs, first.output_shape, scale=scale, generator=generator, **kind)
            self.target = target.to(first.bias)
        return self.target

    def config(self) -> dict[str, Any]:
        """Everything but the tensors; :func:`network_from_config` rebuilds the network from it."""
        return {
            "input_shape": list(self.input_shape),
            "layers": [layer.config() for layer in self.layers],
            "outputs": self.outputs,
            "centred": self.centred,
            "regression": self.regression,
            "target": None if self.target is None else self.target.config(),
        }


def network_from_config(config: dict[str, Any]) -> Network:
    """Inverse of :meth:`Network.config`; the tensors wait for the state dictionary."""
    layers = [
        (
            synapse_from_config(layer["synapse"]),
            neuron_from_config(layer["neuron"]),
            synapse_from_config(layer["recurrent"]) if "recurrent" in layer else None,
        )
        for layer in config["layers"]
    ]
    network = Network(
        config["input_shape"], layers, config["outputs"], centred=config["centred"], regression=config["regression"]
    )
    if config["target"] is not None:
        network.attach_target(**{key: config["target"][key] for key in ("learned", "beside_input") if key in config["target"]})
    return network
