"""snnTorch modules as networks that spike as they do, to train on without a backward pass and to export.

network = from_module(nn.Sequential(nn.Linear(64, 10), snn.Leaky(0.9, reset_mechanism="zero", reset_delay=False)), (64,))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from spikeprop.backends.modules import build, per_neuron
from spikeprop.errors import BackendError, InputError, UnsupportedError
from spikeprop.network import Network
from spikeprop.synapse import Shape

__all__ = ["from_module"]

RESETS = {"_base_sub": "subtract", "_base_zero": "zero", "_base_int": "none"}  # by the function that a neuron was built with


def from_module(module: nn.Module, input_shape: Sequence[int], outputs: int | None = None) -> Network:
    """A network that spikes as ``module`` does from rest, with copies of its weights, biases, decays, thresholds and resets.

    Learned parameters (``learn_beta`` and the like) are copied as they stand; hidden state is not. The equations are equal, the
    order of rounding need not be. One difference: under ``reset_mechanism="subtract"``, where a membrane exceeds twice its
    threshold, snnTorch subtracts once more before it decides on the next spike, and the network does not.

    module: a ``nn.Sequential`` (nested ones included) of Linear, Conv2d, AvgPool2d, Flatten and Identity, where one
        ``snntorch.Leaky`` or ``snntorch.Synaptic``, with ``reset_delay=False``, follows each module with weights and is last.
    input_shape: shape of one input at one time step, for example ``(1, 28, 28)``.
    outputs: number of classes. By default one per neuron of the last layer, and the readout is the identity: the neuron that
        spikes most is the prediction, before any training. Any other number gives a readout of zeros, to be trained.

    The network is not centred. It has the dtype and the device of the first weights.

    Raises UnsupportedError for modules and options that a network has not, InputError for shapes that do not fit, values out of
    range and NaN, all with the module's name in the Sequential; BackendError where snnTorch is not installed.
    """
    try:
        import snntorch
    except ImportError as error:
        raise BackendError(f"snnTorch is not installed ({error}); run: pip install snntorch==1.0.0") from None
    return build(module, input_shape, outputs, {snntorch.Leaky: _leaky, snntorch.Synaptic: _synaptic})


def _synaptic(where: str, neurons: Any, shape: Shape) -> dict[str, Any]:
    return {**_leaky(where, neurons, shape), "alpha": _decay(where, "alpha", neurons.alpha, shape)}


def _leaky(where: str, neurons: Any, shape: Shape) -> dict[str, Any]:
    for name in ("inhibition", "state_quant"):
        if getattr(neurons, name):
            raise UnsupportedError(f"{where}: {name} is set, but a network has no such thing; build it without")
    factor = neurons.graded_spikes_factor
    if (factor != 1).any():
        raise UnsupportedError(
            f"{where}: graded_spikes_factor = {factor[factor != 1].max():g}, but a network's spikes are 0 or 1; multiply the "
            "weights behind it by the factor and set it to 1"
        )
    reset = neurons.reset_mechanism
    # A state dictionary or an assignment changes what snnTorch does in its step only in part.
    if not reset == RESETS[neurons.state_function.__name__] == list(neurons.reset_dict)[neurons.reset_mechanism_val]:
        raise UnsupportedError(
            f"{where}: reset_mechanism = '{reset}' is not what it was built with, or not what was loaded; build it with the "
            "mechanism that it should have"
        )
    if neurons.reset_delay and reset != "none":
        raise UnsupportedError(
            f"{where}: reset_delay = True resets one step after the spike, a network in the same step; use reset_delay=False"
        )
    around = torch.linspace(-2.0, 2.0, 401, device=factor.device)
    with torch.no_grad():
        if not torch.equal(neurons.spike_grad(around), (around > 0).to(around)):
            raise UnsupportedError(f"{where}: spike_grad must give 1 above 0 and else 0; use one of snntorch.surrogate")
    threshold = per_neuron(where, "threshold", neurons.threshold, shape)
    return {"beta": _decay(where, "beta", neurons.beta, shape), "threshold": threshold, "reset_mechanism": reset}


def _decay(where: str, name: str, kept: Any, shape: Shape) -> Any:
    if (outside := kept[kept.clamp(0, 1) != kept]).numel():
        raise InputError(
            f"{where}: {name} = {outside[0]:g} lies outside [0, 1], where snnTorch clamps it at each step; clamp it for good: "
            f"{name}.data.clamp_(0, 1)"
        )
    return per_neuron(where, name, kept, shape)
