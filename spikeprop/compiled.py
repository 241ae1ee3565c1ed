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
    fit = all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in tensors)
    return fit and not watched() and loops() is not None


def watched() -> bool:
    """Whether torch records, transforms or compiles what it computes; it would not see what loops outside it do."""
    if torch.compiler.is_compiling() or torch._C._is_tracing() or torch._C._are_functorch_transforms_active():
        return True
    return torch.autograd.forward_ad._current_level >= 0 or torch._C._len_torch_dispatch_stack() > 0


@functools.cache
def gpu_loops() -> Any:
    """The module, or None without Triton, which torch brings along where it is built for GPUs."""
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        from spikeprop import gpu_kernels

        if torch.cuda.is_available():
            gpu_kernels.try_out()
    except Exception as error:  # no C compiler, no library of the driver, a GPU too old: whatever Triton makes of it
        warnings.warn(f"triton is installed but does not work here ({error}); training on a GPU is slower", stacklevel=2)
        return None
    return gpu_kernels


def suits_gpu(*tensors: Tensor) -> bool:
    """Whether Triton's loops can work on such tensors here."""
    fit = all(tensor.dtype == torch.float32 and tensor.is_cuda for tensor in tensors)
    return fit and not watched() and gpu_loops() is not None


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
