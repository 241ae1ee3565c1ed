"""A stretch of LIF neurons in one pass over memory: compiled by numba on a CPU, by Triton on a GPU.

Chosen by what is computed, never by the user. :meth:`spikeprop.neuron.Neuron.run`, step by step, is the definition: spikes,
membranes and states are the same bit for bit (where they are finite), and where neither compiler suits, it is what runs. A pass
goes along time, apart for every neuron, so that no number of threads and no size of a block changes what it finds.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from spikeprop import compiled

RESETS = ("zero", "subtract", "none")
A_THREAD = 2**17  # numbers of a step that are worth a thread of their own


def advance(
    drive: Tensor,
    current: Tensor,
    membrane: Tensor,
    *,
    alpha: float | Tensor,
    beta: float | Tensor,
    bias: float | Tensor,
    threshold: float | Tensor,
    reset_mechanism: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Many steps of :func:`spikeprop.neuron.advance`, or None where this module does not suit.

    Args:
        drive: ``[T, B, *features]``, or ``[T, *features]`` of bare neurons.
        current, membrane: the state, ``[B, *features]``; left as they are.
        alpha, beta, bias, threshold: numbers, or tensors that broadcast over the features.

    Returns:
        Spikes and membranes before the reset, in the drive's shape, then current and membrane after the last step.
    """
    given = [part for part in (alpha, beta, bias, threshold) if isinstance(part, Tensor)]
    tensors = [drive, current, membrane, *given]
    if any(type(part) not in (Tensor, nn.Parameter) or part.requires_grad or part.is_neg() for part in tensors):
        return None
    gpu = compiled.suits_gpu(*tensors)
    if not (gpu or (len(drive) > 1 and compiled.suits(*tensors))) or 0 in drive.shape:  # one step alone is sooner done by torch
        return None
    features = drive.shape[1:] if drive.dim() < 3 else drive.shape[2:]
    if any(torch.broadcast_shapes(part.shape, features) != features for part in given):
        return None
    if not current.shape == membrane.shape == drive.shape[1:]:
        return None
    size, rows = features.numel(), drive[0].numel() // features.numel()
    has_current = not (isinstance(alpha, float) and alpha == 0.0)
    before = torch.empty(drive.shape, dtype=drive.dtype, device=drive.device)
    spikes = torch.empty_like(before)
    constant = len(drive) > 1 and drive.stride(0) == 0
    seen = (drive[:1] if constant else drive).contiguous().view(-1, rows, size)
    state = [_moving(current) if has_current else membrane.new_empty(0), _moving(membrane)]
    numbers = torch.stack([_per_neuron(part, features, drive) for part in (bias, alpha, beta, threshold)])
    reset = RESETS.index(reset_mechanism)
    written = [part.view(-1, rows, size) for part in (before, spikes)]
    if gpu:
        _on_gpu(seen, constant, numbers, reset, has_current, *state, *written)
    else:
        _on_cpu(seen, numbers, reset, has_current, *(part.view(-1, size) for part in state), *written)
    return spikes, before, state[0] if has_current else drive[-1], state[1]


def _on_cpu(seen: Tensor, numbers: Tensor, reset: int, has_current: bool, *moving: Tensor) -> None:
    """Rows are shared out among torch's threads: the loops hold no lock of the interpreter."""
    current, membrane, before, spikes = (part.numpy() for part in moving)
    loop, neurons, drive = compiled.loops().advance, numbers.numpy(), seen.numpy()

    def work(some: slice) -> None:
        own = current[some] if has_current else current
        loop(drive[:, some], neurons, reset, has_current, own, membrane[some], before[:, some], spikes[:, some])

    share_out(work, len(membrane), membrane.size)


def share_out(work: Callable[[slice], None], rows: int, numbers: int) -> None:
    """Call ``work`` on parts of so many rows, which together have so many numbers, in as many threads as torch may use."""
    parts = max(1, min(torch.get_num_threads(), rows, numbers // A_THREAD))
    slices = [slice(rows * part // parts, rows * (part + 1) // parts) for part in range(parts)]
    if parts == 1:
        work(slices[0])
    else:
        list(_threads(torch.get_num_threads(), os.getpid()).map(work, slices))


@functools.lru_cache(maxsize=1)
def _threads(count: int, process: int) -> ThreadPoolExecutor:
    """Kept, because to start threads takes as long as a small layer; a forked process has none of its parent's."""
    return ThreadPoolExecutor(count, thread_name_prefix="spikeprop")


def _on_gpu(
    seen: Tensor,
    constant: bool,
    numbers: Tensor,
    reset: int,
    has_current: bool,
    current: Tensor,
    membrane: Tensor,
    before: Tensor,
    spikes: Tensor,
) -> None:
    size = membrane.numel()
    with on_its_device(membrane):
        kernels = compiled.gpu_loops()
        kernels.advance[kernels.grid(size)](
            *(seen, numbers, current, membrane, before, spikes),
            *(len(before), 0 if constant else size, size, numbers.shape[1]),
            RESET=reset,
            HAS_CURRENT=has_current,
            **kernels.AS_WRITTEN,
        )


def low_pass(x: Tensor, filtered: Tensor, last: Tensor, keep: float, places: list[int]) -> bool:
    """:func:`spikeprop.traces.low_pass`, if this module suits: contiguous ``x [k, N]``, ``filtered [m, N]``, ``last [1, N]``.

    ``last`` moves on in place; ``places [k]``: where in ``filtered`` a step goes, nowhere if below 0.
    """
    if compiled.suits_gpu(x, filtered, last):
        kernels, size, into = compiled.gpu_loops(), last.numel(), torch.tensor(places, device=x.device)
        with on_its_device(x):
            kernels.low_pass[kernels.grid(size)](x, into, keep, last, filtered, len(x), size, **kernels.AS_WRITTEN)
    elif compiled.suits(last) and {x.dtype, filtered.dtype} <= {torch.float32, torch.bfloat16}:
        numbers, state = torch.tensor(places, device="cpu").numpy(), last[0].numpy()
        factor = compiled.float32(keep)
        compiled.loops().low_pass(*compiled.by_width(x), numbers, factor, state, *compiled.by_width(filtered))
    else:
        return False
    return True


def back(
    error: Tensor, spikes: Tensor, alpha: Tensor, beta: Tensor, gated: bool, responsible: Tensor, at_bias: Tensor
) -> tuple[Tensor, Tensor] | None:
    """:func:`spikeprop.traces.scan_back` on contiguous arrays, or None where this module does not suit.

    Args:
        error, spikes: ``[k, R, *features]``.
        alpha, beta: ``[*features]``.
        responsible, at_bias: ``[k, R, *features]`` and ``[*features]``, written; the second must be zero.

    Returns:
        What is at the membrane and at the current of the first step, ``[R, *features]``.
    """
    arrays = (error, spikes, alpha, beta, responsible, at_bias)
    if not (gpu := compiled.suits_gpu(*arrays)) and not compiled.suits(*arrays):
        return None
    first = torch.zeros_like(error[0]), torch.zeros_like(error[0])
    if gpu:
        total, size = torch.empty_like(error[0]), error[0].numel()
        with on_its_device(error):
            kernels = compiled.gpu_loops()
            kernels.scan_back[kernels.grid(size)](
                *(error, spikes, alpha, beta, *first, responsible, total),
                *(len(error), (len(error) - 1) * size, size, at_bias.numel()),
                GATED=gated,
                **kernels.AS_WRITTEN,
            )
        at_bias += total.sum(0)
        return first
    decays = [part.reshape(-1).numpy() for part in (alpha, beta)]
    moving = [part.flatten(1).numpy() for part in first]
    whole = [part.flatten(2).numpy() for part in (error, spikes, responsible)]
    compiled.loops().scan_back(*whole[:2], *decays, gated, *moving, whole[2], at_bias.view(-1).numpy())
    return first


def on_its_device(x: Tensor) -> AbstractContextManager[Any]:
    """Triton starts kernels on torch's current device, which need not be that of the data."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _moving(part: Tensor) -> Tensor:
    """A copy that the loops move on; an ordinary tensor, because a state outlives inference mode."""
    with torch.inference_mode(False):
        return torch.empty(part.shape, dtype=part.dtype, device=part.device).copy_(part)


def _per_neuron(value: float | Tensor, features: torch.Size, like: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value.expand(features).reshape(-1)
    return torch.full((features.numel(),), value, dtype=like.dtype, device=like.device)
