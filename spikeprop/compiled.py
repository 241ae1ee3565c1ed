"""When compiled loops can be used: those of :mod:`spikeprop.kernels` for float32 on a CPU, where numba is installed; those of
:mod:`spikeprop.gpu_kernels` for float32 on a GPU, where Triton is."""

from __future__ import annotations

import functools
import importlib.util
import warnings
from typing import Any

import torch
from torch import Tensor


@functools.cache
def loops() -> Any:
    """The module, or None without numba. What it holds is compiled at its first call, once per machine (about ten seconds)."""
    if importlib.util.find_spec("numba") is None:
        return None
    try:
        from spikeprop import kernels
    except (ImportError, RuntimeError) as error:  # a numpy newer than numba knows, or no folder to keep compiled code in
        warnings.warn(f"numba is installed but does not work here ({error}); training is slower without it", stacklevel=2)
        return None
    return kernels


def suits(*tensors: Tensor) -> bool:
    """Whether the loops can work on such tensors here."""
    return all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in tensors) and loops() is not None


@functools.cache
def gpu_loops() -> Any:
    """The module, or None without Triton, which torch brings along where it is built for GPUs."""
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        from spikeprop import gpu_kernels
    except (ImportError, RuntimeError) as error:
        warnings.warn(f"triton is installed but does not work here ({error}); training on a GPU is slower", stacklevel=2)
        return None
    return gpu_kernels


def suits_gpu(*tensors: Tensor) -> bool:
    """Whether Triton's loops can work on such tensors here."""
    return all(tensor.dtype == torch.float32 and tensor.is_cuda for tensor in tensors) and gpu_loops() is not None


def float32(value: float) -> Any:
    """A number of that type, which the loops compute with."""
    return torch.tensor(value, dtype=torch.float32).numpy()[()]


def by_width(x: Tensor) -> tuple[Any, Any]:
    """An array as float32 and as the bits of bfloat16, for loops that take either; the one that it is not has no entries."""
    if x.dtype == torch.bfloat16:
        return torch.empty(0, *x.shape[1:], dtype=torch.float32, device="cpu").numpy(), x.view(torch.uint16).numpy()
    return x.numpy(), torch.empty(0, *x.shape[1:], dtype=torch.uint16, device="cpu").numpy()


def places(at: list[int] | None, steps: int) -> list[int]:
    """For each of some steps its place among those that are kept (None: all of them), or -1."""
    if at is None:
        return list(range(steps))
    found = [-1] * steps
    for place, step in enumerate(at):
        found[step] = place
    return found
