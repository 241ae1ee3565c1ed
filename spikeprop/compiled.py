"""When the compiled loops of :mod:`spikeprop.kernels` can be used: float32 on a CPU, where numba is installed."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor


@functools.cache
def available() -> bool:
    """Whether numba is installed."""
    return importlib.util.find_spec("numba") is not None


def suits(*tensors: Tensor) -> bool:
    """Whether the loops can work on such tensors here."""
    return all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in tensors) and available()


def loops() -> Any:
    """The module, imported (and at first compiled) only when it is needed."""
    from spikeprop import kernels

    return kernels


def float32(value: float) -> Any:
    """A number of that type, which the loops compute with."""
    return torch.tensor(value, dtype=torch.float32).numpy()[()]
