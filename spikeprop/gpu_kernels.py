"""Compiled loops along time for GPUs (Triton), every neuron of every row for itself.

They compute what :mod:`spikeprop.kernels` and the plain path compute, in float32. Imported only where Triton is installed, by
:mod:`spikeprop.compiled`. With ``TRITON_INTERPRET=1`` in the environment when this is imported they run on a CPU, slowly.
Triton reads a parameter's annotation as code, and knows no name but its own there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

jit: Callable[[Callable[..., None]], Any] = triton.jit
BLOCK = 256
ZERO, SUBTRACT = tl.constexpr(0), tl.constexpr(1)  # as in spikeprop.scan.RESETS
# A product and a sum fused into one operation round once instead of twice; what decides a spike must be bit for bit torch's.
AS_WRITTEN: dict[str, Any] = {"BLOCK": BLOCK, "enable_fp_fusion": False}


def try_out() -> None:
    """One launch on torch's current GPU; raises whatever keeps Triton from working there."""
    x, places = torch.ones(1, 1, device="cuda"), torch.zeros(1, dtype=torch.int64, device="cuda")
    low_pass[grid(1)](x, places, 0.5, torch.zeros_like(x), torch.zeros_like(x), 1, 1, **AS_WRITTEN)


def grid(size: int) -> tuple[int]:
    """How many blocks cover so many numbers."""
    return (triton.cdiv(size, BLOCK),)


@jit
def advance(
    drive: tl.tensor,
    neurons: tl.tensor,
    current: tl.tensor,
    membrane: tl.tensor,
    before: tl.tensor,
    spikes: tl.tensor,
    steps: tl.tensor,
    stride: tl.tensor,
    size: tl.tensor,
    features: tl.tensor,
    RESET: tl.constexpr,
    HAS_CURRENT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """As :func:`spikeprop.kernels.advance`, over arrays flattened to ``[k, size]``; ``stride``: from step to step of the drive.

    ``neurons [4, features]``: bias, alpha, beta and threshold.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside, neuron = at < size, at % features
    bias = tl.load(neurons + neuron, inside)
    alpha = tl.load(neurons + features + neuron, inside)
    beta = tl.load(neurons + 2 * features + neuron, inside)
    threshold = tl.load(neurons + 3 * features + neuron, inside)
    u = tl.load(membrane + at, inside)
    i = u
    if HAS_CURRENT:
        i = tl.load(current + at, inside)
    for _ in range(steps):
        x = tl.load(drive + at, inside)
        if HAS_CURRENT:
            i = i * alpha + x
            x = i
        u = u * beta + (x + bias)
        spiked = u > threshold
        tl.store(before + at, u, inside)
        tl.store(spikes + at, tl.where(spiked, 1.0, 0.0), inside)
        if RESET == ZERO:
            u = tl.where(spiked, 0.0, u)
        elif RESET == SUBTRACT:
            u = tl.where(spiked, u - threshold, u)
        drive += stride
        before += size
        spikes += size
    tl.store(membrane + at, u, inside)
    if HAS_CURRENT:
        tl.store(current + at, i, inside)


@jit
def low_pass(
    x: tl.tensor,
    places: tl.tensor,
    keep: tl.tensor,
    last: tl.tensor,
    filtered: tl.tensor,
    steps: tl.tensor,
    size: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """As :func:`spikeprop.kernels.low_pass`."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    y = tl.load(last + at, inside)
    for step in range(steps):
        y = tl.load(x + at, inside) + keep * y
        place = tl.load(places + step).to(tl.int64)
        if place >= 0:
            tl.store(filtered + place * size + at, y, inside)
        x += size
    tl.store(last + at, y, inside)


@jit
def scan_back(
    error: tl.tensor,
    spikes: tl.tensor,
    alpha: tl.tensor,
    beta: tl.tensor,
    at_membrane: tl.tensor,
    at_current: tl.tensor,
    responsible: tl.tensor,
    total: tl.tensor,
    steps: tl.tensor,
    last: tl.tensor,
    size: tl.tensor,
    features: tl.tensor,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """As :func:`spikeprop.kernels.scan_back`, over arrays flattened to ``[k, size]``.

    ``last``: where the last step begins. ``total [size]``: what is at the membrane, summed over the steps.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside, neuron = at < size, at % features
    a = tl.load(alpha + neuron, inside)
    b = tl.load(beta + neuron, inside)
    u = tl.load(at_membrane + at, inside)
    i = tl.load(at_current + at, inside)
    summed = tl.full([BLOCK], 0.0, tl.float32)
    at += last
    for _ in range(steps):
        keep = b
        if GATED:
            keep = b * (1.0 - tl.load(spikes + at, inside))
        u = tl.load(error + at, inside) + keep * u
        i = u + a * i
        tl.store(responsible + at, i, inside)
        summed += u
        at -= size
    at += size
    tl.store(at_membrane + at, u, inside)
    tl.store(at_current + at, i, inside)
    tl.store(total + at, summed, inside)
