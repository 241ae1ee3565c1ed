"""Norse modules as networks that spike as they do, to train on without a backward pass and to export.

    network = from_module(norse.torch.SequentialState(nn.Linear(64, 10), norse.torch.LIFBoxCell()), (64,))

With k = dt tau_mem_inv, Norse's LIFBoxCell computes v <- v + k (input + v_leak - v). In units of U = (v - v_leak) / k that is a
network's neuron behind the same weights and biases:

    U <- (1 - k) U + input;    beta = 1 - k;    threshold = (v_th - v_leak) / k;    reset to v_leak: U <- 0
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spikeprop.backends.modules import build, per_neuron
from spikeprop.errors import BackendError, InputError, UnsupportedError
from spikeprop.network import Network
from spikeprop.synapse import Shape

__all__ = ["from_module"]

RESETS = {"reset_value": "zero", "reset_subtract": "subtract"}  # by Norse's function


def from_module(module: nn.Module, input_shape: Sequence[int], outputs: int | None = None) -> Network:
    """A network that spikes as ``module`` does from its own initial state, v = v_leak, with copies of its weights and biases.

    module: a ``norse.torch.SequentialState`` or ``nn.Sequential`` (nested ones included) for one time step, of Linear, Conv2d,
        AvgPool2d, Flatten and Identity, where one ``norse.torch.LIFBoxCell`` follows each module with weights and is last.
        It resets to v_leak (``reset_value``), or by v_th where v_leak = 0 (``reset_subtract``).

    The equations are equal, but rounding differs. The other arguments, the result and the errors are those of
    :func:`spikeprop.backends.snntorch.from_module`; BackendError where Norse is not installed.
    """
    try:
        import norse.torch
    except ImportError as error:
        raise BackendError(
            f"Norse is not installed ({error}); run: pip install --no-deps --no-build-isolation norse==1.1.0"
        ) from None
    return build(module, input_shape, outputs, {norse.torch.LIFBoxCell: _lif_box}, (nn.Sequential, norse.torch.SequentialState))


def _lif_box(where: str, cell: Any, shape: Shape) -> dict[str, Any]:
    def real(name: str, value: Any) -> Tensor:
        return torch.as_tensor(per_neuron(where, name, value, shape), dtype=torch.float64)

    gain = real("dt tau_mem_inv", cell.dt * cell.p.tau_mem_inv)  # multiplied as Norse does, in the tensor's precision
    leak, rest, threshold = (real(name, getattr(cell.p, name)) for name in ("v_leak", "v_reset", "v_th"))
    if (outside := gain[(gain <= 0) | (gain > 1)]).numel():
        raise InputError(
            f"{where}: dt tau_mem_inv = {outside[0]:g} lies outside (0, 1], a network's 1 - beta; use 0 < dt <= 1 / tau_mem_inv"
        )
    method = cell.p.reset_method.__name__
    if method not in RESETS:
        raise UnsupportedError(f"{where}: a network does not reset by {method}; use {' or '.join(RESETS)}")
    if method == "reset_value" and (rest != leak).any():
        raise UnsupportedError(
            f"{where}: v_reset and v_leak are up to {(rest - leak).abs().max():g} apart, but a network resets to its rest; "
            "make them equal"
        )
    if method == "reset_subtract" and leak.any():
        raise UnsupportedError(
            f"{where}: v_leak of up to {leak.abs().max():g} with reset_subtract, but a network subtracts what lies "
            "between rest and threshold; use v_leak = 0"
        )
    height, kept = (threshold - leak) / gain, 1 - gain
    numbers = {"threshold": per_neuron(where, "v_th", height, shape), "beta": per_neuron(where, "tau_mem_inv", kept, shape)}
    return {**numbers, "reset_mechanism": RESETS[method]}
