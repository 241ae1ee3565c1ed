"""What NIR export and import share: the package itself, the nodes they know, and how numbers are read."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from spikeprop.errors import BackendError, InputError

Reals = NDArray[np.float64]

NEURON_FIELDS = {
    "IF": ("r", "v_threshold", "v_reset"),
    "LIF": ("tau", "r", "v_leak", "v_threshold", "v_reset"),
    "CubaLIF": ("tau_syn", "tau_mem", "r", "w_in", "v_leak", "v_threshold", "v_reset"),
}
LINEAR_NODES = ("Affine", "Linear", "Conv2d", "AvgPool2d", "SumPool2d", "Flatten")

# r dt / tau and 1 - dt / tau take two rounded operations on numbers that were rounded once: they are known up to this.
ROUNDING = 4 * np.finfo(np.float64).eps
# Some frameworks write float32, where tau = dt comes out a little below dt.
DECAY_ROUNDING = 2.0**-22
DT_ROUNDING = 1e-9  # relative; one time step computed in two ways


def library() -> Any:
    """The package ``nir``, imported when first needed. Raises BackendError with the install command where it is missing."""
    try:
        import nir
    except ImportError as error:
        raise BackendError(f"NIR is not installed ({error}); run: pip install nir") from None
    return nir


def check_dt(dt: Any, what: str) -> None:
    """Raises InputError unless ``dt`` is a positive number of seconds."""
    try:
        good = math.isfinite(dt) and dt > 0
    except (TypeError, ValueError):
        good = False
    if not good:
        raise InputError(f"{what} = {dt!r} is no time step; it is a number of seconds above 0, for example 1e-3")


def to_reals(value: Any) -> Reals:
    """A tensor, an array or a number as float64."""
    return torch.as_tensor(value, dtype=torch.float64).detach().cpu().numpy()


def finite(what: str, value: Any) -> Reals:
    """As float64. Raises InputError for what is not a finite number."""
    try:
        numbers = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError(f"{what} is not made of numbers; export it again") from None
    if not np.isfinite(numbers).all():
        raise InputError(f"{what} holds NaN or infinite values; train or export it again")
    return numbers


def ungroup(weight: Reals, groups: int) -> Reals:
    """``[out, in / groups, k, k]`` to ``[out, in, k, k]``, zero between the groups."""
    outputs, inputs, *kernel = weight.shape
    full = np.zeros((groups, outputs // groups, groups, inputs, *kernel))
    for group, block in enumerate(weight.reshape(groups, outputs // groups, inputs, *kernel)):
        full[group, :, group] = block
    return full.reshape(outputs, groups * inputs, *kernel)
