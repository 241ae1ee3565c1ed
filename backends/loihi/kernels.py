"""Compiled loops of the simulator. Each computes what plain numpy and ``neuron.advance`` compute, integer for integer.

Imported only where numba is installed. One thread each: processes, not threads, are the way to use more cores.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from spikeprop.backends.loihi.network import ALIGNMENT_SHIFT, DECAY_UNITY, REGISTER_LIMIT

SAFE_ROWS = 252  # as many 8-bit numbers always fit a 16-bit sum, whose loops are twice as fast as 32-bit ones
_SHARE, _WRAP, _LIMIT, _ALIGN = 1 / DECAY_UNITY, 2 * REGISTER_LIMIT, REGISTER_LIMIT, ALIGNMENT_SHIFT


@njit(cache=True, nogil=True)
def add_rows(events: Any, rows: Any, sums: Any) -> None:
    """``sums [N, n]`` = ``events [N, m]`` (0 or 1) times ``rows [m, n]``, visiting only the rows of ones."""
    count, features = events.shape
    outputs = rows.shape[1]
    active = np.empty(features, np.int64)
    part = np.empty(outputs, np.int16)
    for row in range(count):
        found = 0
        for feature in range(features):
            active[found] = feature
            found += events[row, feature]
        total = sums[row]
        total[:] = 0
        for start in range(0, found, SAFE_ROWS):
            stop = min(found, start + SAFE_ROWS)
            part[:] = 0
            index = start
            while index + 4 <= stop:  # four rows per pass: the sums are loaded and stored once
                one, two = rows[active[index]], rows[active[index + 1]]
                three, four = rows[active[index + 2]], rows[active[index + 3]]
                for n in range(outputs):
                    part[n] += np.int16(np.int16(one[n]) + np.int16(two[n])) + np.int16(np.int16(three[n]) + np.int16(four[n]))
                index += 4
            while index < stop:
                one = rows[active[index]]
                for n in range(outputs):
                    part[n] += one[n]
                index += 1
            for n in range(outputs):
                total[n] += part[n]


def taps(kernel: NDArray[np.int8], groups: int) -> NDArray[np.int8]:
    """A kernel ``[out, in / groups, h, w]`` as ``[in, h, w, out / groups]``: what an input sends to its group."""
    parts = np.split(kernel, groups)
    return np.ascontiguousarray(np.concatenate([part.transpose(1, 2, 3, 0) for part in parts]))


@njit(cache=True, nogil=True)
def add_taps(events: Any, kernel: Any, how: Any, sums: Any) -> None:
    """The same for a convolution: every input that spikes adds its ``taps`` to the outputs it reaches.

    how: input shape (C, H, W), output shape (C, H, W), stride and padding (vertical, horizontal).
    """
    channels, height, width, out_channels, out_height, out_width, down, right, above, left = how
    _, kernel_height, kernel_width, share = kernel.shape
    per_group = channels * share // out_channels  # input channels of one group
    total = np.empty((out_height, out_width, out_channels), np.int32)
    for row in range(events.shape[0]):
        total[:] = 0
        feature = 0
        for channel in range(channels):
            first = channel // per_group * share
            for y in range(height):
                for x in range(width):
                    if events[row, feature]:
                        for i in range(kernel_height):
                            at_y = y + above - i
                            if at_y < 0 or at_y % down or at_y // down >= out_height:
                                continue
                            for j in range(kernel_width):
                                at_x = x + left - j
                                if at_x < 0 or at_x % right or at_x // right >= out_width:
                                    continue
                                to = total[at_y // down, at_x // right]
                                tap = kernel[channel, i, j]
                                for n in range(share):
                                    to[first + n] += tap[n]
                    feature += 1
        for channel in range(out_channels):
            for y in range(out_height):
                for x in range(out_width):
                    sums[row, (channel * out_height + y) * out_width + x] = total[y, x, channel]


@njit(cache=True, nogil=True)
def run_neurons(
    sums: Any,
    exponent: int,
    memory: bool,
    keep_current: Any,
    keep_membrane: Any,
    bias: Any,
    threshold: Any,
    current: Any,
    membrane: Any,
    counts: Any,
    spikes: Any,
    currents: Any,
    membranes: Any,
) -> None:
    """``neuron.advance`` with Loihi's arithmetic over ``sums [T or 1, B, n]`` (halved) and T steps, in place.

    Casts to 32 bits stand wherever the array version holds 32-bit arrays. Decays are exact in float64, whose products of 31 and
    13 bits lose nothing and whose conversion rounds towards zero. The loops are short so that each is vectorised.
    """
    steps, batch, neurons = spikes.shape
    once, recording = sums.shape[0] == 1, currents.shape[0] > 0
    up, down = max(exponent, 0), max(-exponent, 0)
    arriving = np.empty(neurons, np.int32)
    for row in range(batch):
        u, v, count = current[row], membrane[row], counts[row]
        for step in range(steps):
            half, spiking = sums[0 if once else step, row], spikes[step, row]
            for n in range(neurons):
                arriving[n] = np.int32(np.int32(np.int32(half[n] << 1) << up) >> down) << _ALIGN
            if memory:
                for n in range(neurons):
                    arriving[n] += np.int32(np.float64(u[n]) * np.float64(keep_current[n]) * _SHARE)
            for n in range(neurons):
                now = arriving[n]
                now = np.int32(now - _WRAP) if now > _LIMIT else now
                u[n] = np.int32(now + _WRAP) if now <= -_LIMIT else now
            for n in range(neurons):
                kept = np.int32(np.float64(v[n]) * np.float64(keep_membrane[n]) * _SHARE)
                level = np.int32(kept + np.int32(u[n] + bias[n]))
                v[n] = min(max(level, np.int32(1 - _LIMIT)), np.int32(_LIMIT - 1))
            if recording:
                currents[step, row] = u
                membranes[step, row] = v
            for n in range(neurons):
                spike = v[n] > threshold[n]
                spiking[n] = spike
                count[n] += spike
                v[n] = np.int32(0) if spike else v[n]
