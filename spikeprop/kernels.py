"""Compiled loops of training: one pass through a layer's neurons and its local loss, while what it needs is in the cache.

They compute what :func:`spikeprop.neuron.advance`, the options of :mod:`spikeprop.surrogate` and
:class:`spikeprop.losses.SimilarityCrossEntropy` compute, in float32: spikes and membranes bit for bit, errors but for rounding
(the order of sums, a polynomial for the arctangent). Imported only where numba is installed, by :mod:`spikeprop.compiled`; one
thread each.

A layer's features are ``[P, C]``: C channels at each of P positions; dense layers have one position.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
from numba import njit

BLOCK = 1024  # features of a filter worked on at a time, so that they stay in the first-level cache
TOGETHER = 16  # rows worked on at a time, for the same reason
RAW, CLIPPED, ATAN = range(3)
ZERO, SUBTRACT, NONE = range(3)
_ATAN = (  # of atan(z) / z on [0, 1], in powers of z^2, fitted at Chebyshev nodes; largest error 1.6e-7
    *(1.0, -0.33333066, 0.19992484, -0.14202571, 0.10636754),
    *(-0.07495446, 0.04258761, -0.01600503, 0.00283406),
)
_A0, _A1, _A2, _A3, _A4, _A5, _A6, _A7, _A8 = (np.float32(value) for value in _ATAN)
_HALF_PI, _ONE, _ZERO = np.float32(np.pi / 2), np.float32(1.0), np.float32(0.0)
_TINY = np.float32(
    2.0**-96
)  # of a derivative of the loss: less counts as nothing, as it would make subnormal products, which are slow
_NARROW_ONE, _NARROW_ZERO = np.uint16(0x3F80), np.uint16(0)  # in bfloat16
Loop = TypeVar("Loop", bound=Callable[..., Any])


# Each loop becomes part of the one that calls it. A call would lead to the copy that was compiled on its own, in the process
# that compiled both, but to the one beside its caller where that came out of the cache: runs would round differently.
COMMON: Any = {"cache": True, "nogil": True, "error_model": "numpy", "forceinline": True}


def exact(loop: Loop) -> Loop:
    """Compile with every operation as it is written: what decides a spike must be bit for bit the plain path's."""
    return cast(Loop, njit(**COMMON)(loop))


def free(loop: Loop) -> Loop:
    """Compile with sums in any order."""
    return cast(Loop, njit(**COMMON, fastmath={"reassoc", "nsz", "arcp", "contract", "afn"})(loop))


@exact
def advance_row(
    drive: Any,
    bias: Any,
    alpha: Any,
    beta: Any,
    threshold: Any,
    reset: int,
    has_current: bool,
    current: Any,
    membrane: Any,
    before: Any,
) -> None:
    """One step of one row ``[n]``: ``current`` and ``membrane`` move on in place; ``before`` is U before the reset.

    Several short loops, because a loop over many arrays is not vectorised.
    """
    if has_current:
        for j in range(drive.shape[0]):
            current[j] = current[j] * alpha[j] + drive[j]
        seen = current
    else:
        seen = drive
    for j in range(drive.shape[0]):
        before[j] = membrane[j] * beta[j] + (seen[j] + bias[j])
    if reset == ZERO:
        for j in range(drive.shape[0]):
            membrane[j] = before[j] - (before[j] if before[j] > threshold[j] else _ZERO)
    elif reset == SUBTRACT:
        for j in range(drive.shape[0]):
            membrane[j] = before[j] - (threshold[j] if before[j] > threshold[j] else _ZERO)
    else:
        membrane[:] = before


@exact
def mark(before: Any, threshold: Any, spikes: Any) -> None:
    """The spikes of a row: 1 where the membrane is above threshold, 0 elsewhere."""
    for j in range(before.shape[0]):
        spikes[j] = _ONE if before[j] > threshold[j] else _ZERO


@exact
def mark_narrow(before: Any, threshold: Any, spikes: Any) -> None:
    """:func:`mark` as bits of bfloat16."""
    for j in range(before.shape[0]):
        spikes[j] = _NARROW_ONE if before[j] > threshold[j] else _NARROW_ZERO


@exact
def advance(
    drive: Any,
    neurons: Any,
    reset: int,
    has_current: bool,
    current: Any,
    membrane: Any,
    before: Any,
    spikes: Any,
) -> None:
    """k steps of a layer's neurons, without learning; the arguments are :func:`learn`'s, but ``before`` has all steps."""
    bias, alpha, beta, threshold = neurons[0], neurons[1], neurons[2], neurons[3]
    for row in range(membrane.shape[0]):
        own = current[row] if has_current else current[0, :0]
        for step in range(before.shape[0]):
            present, now = drive[step if drive.shape[0] > 1 else 0, row], before[step, row]
            advance_row(present, bias, alpha, beta, threshold, reset, has_current, own, membrane[row], now)
            mark(now, threshold, spikes[step, row])


@exact
def count(before: Any, threshold: Any, total: Any) -> None:
    """Add the spikes of a row to ``total``."""
    for j in range(before.shape[0]):
        total[j] += _ONE if before[j] > threshold[j] else _ZERO


@exact
def read_window(before: Any, threshold: Any, unit: Any, width: Any, phi: Any) -> None:
    """:func:`read_row` for CLIPPED: the distance from the threshold, in thresholds. Exact, because the window ends at some."""
    for j in range(before.shape[0]):
        distance = (before[j] / unit) / (threshold[j] / unit) - _ONE
        phi[j] = min(max(distance, -width), width)


@exact
def apply_window(before: Any, threshold: Any, unit: Any, width: Any, error: Any) -> None:
    """:func:`apply_slope` for CLIPPED."""
    for j in range(before.shape[0]):
        distance = (before[j] / unit) / (threshold[j] / unit) - _ONE
        error[j] = error[j] / threshold[j] if abs(distance) <= width else _ZERO


@free
def read_row(before: Any, threshold: Any, unit: Any, option: int, width: Any, phi: Any) -> None:
    """phi of one row of membranes, RAW or ATAN, in units of ``unit``."""
    if option == RAW:
        for j in range(before.shape[0]):
            phi[j] = before[j] / unit
    else:
        steepness = np.float32(np.pi) / width
        share = np.float32(1.0 / np.pi)
        for j in range(before.shape[0]):
            x = (before[j] / unit - threshold[j] / unit) * steepness
            size = abs(x)
            z = _ONE / size if size > _ONE else size
            s = z * z
            p = _A4 + s * (_A5 + s * (_A6 + s * (_A7 + s * _A8)))
            p = z * (_A0 + s * (_A1 + s * (_A2 + s * (_A3 + s * p))))
            p = _HALF_PI - p if size > _ONE else p
            p = -p if x < _ZERO else p
            phi[j] = p * share + np.float32(0.5)


@free
def apply_slope(before: Any, threshold: Any, unit: Any, option: int, width: Any, error: Any) -> None:
    """Multiply one row of errors by dphi/dU."""
    if option == RAW:
        for j in range(before.shape[0]):
            error[j] /= unit
    else:
        curvature = np.float32(np.pi**2) / width
        for j in range(before.shape[0]):
            x = before[j] / unit - threshold[j] / unit
            error[j] /= (x * x * curvature + width) * unit


@exact
def narrow(row: Any, out: Any) -> None:
    """Float32 to the bits of bfloat16, rounded to nearest, ties to even."""
    bits = row.view(np.uint32)
    for j in range(bits.shape[0]):
        out[j] = np.uint16((bits[j] + np.uint32(0x7FFF) + ((bits[j] >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@exact
def widen(row: Any, out: Any) -> None:
    """The bits of bfloat16 to float32."""
    bits = out.view(np.uint32)
    for j in range(bits.shape[0]):
        bits[j] = np.uint32(row[j]) << np.uint32(16)


@free
def _add_to(total: Any, row: Any) -> None:
    for j in range(row.shape[0]):
        total[j] += row[j]


@free
def _add_scaled(total: Any, factor: Any, row: Any) -> None:
    for j in range(row.shape[0]):
        total[j] += factor * row[j]


@free
def _scale(row: Any, factor: Any) -> None:
    for j in range(row.shape[0]):
        row[j] *= factor


@free
def _product(one: Any, two: Any) -> Any:
    total = np.float32(0.0)
    for j in range(one.shape[0]):
        total += one[j] * two[j]
    return total


@free
def _products(rows: Any, row: Any, found: Any) -> None:
    """``found[k]`` = product of ``rows[k]`` and ``row``; four rows per pass, so that ``row`` is loaded once for them."""
    whole = rows.shape[0] // 4 * 4
    for k in range(0, whole, 4):
        r0, r1, r2, r3 = rows[k], rows[k + 1], rows[k + 2], rows[k + 3]
        s0 = s1 = s2 = s3 = np.float32(0.0)
        for j in range(row.shape[0]):
            s0 += row[j] * r0[j]
            s1 += row[j] * r1[j]
            s2 += row[j] * r2[j]
            s3 += row[j] * r3[j]
        found[k], found[k + 1], found[k + 2], found[k + 3] = s0, s1, s2, s3
    for k in range(whole, rows.shape[0]):
        found[k] = _product(rows[k], row)


@free
def _add_combination(total: Any, factors: Any, rows: Any) -> None:
    """``total`` += the sum of ``factors[k] rows[k]``; four rows per pass, so that ``total`` is stored once for them."""
    whole = rows.shape[0] // 4 * 4
    for k in range(0, whole, 4):
        f0, f1, f2, f3 = factors[k], factors[k + 1], factors[k + 2], factors[k + 3]
        r0, r1, r2, r3 = rows[k], rows[k + 1], rows[k + 2], rows[k + 3]
        for j in range(total.shape[0]):
            total[j] += f0 * r0[j] + f1 * r1[j] + (f2 * r2[j] + f3 * r3[j])
    for k in range(whole, rows.shape[0]):
        _add_scaled(total, factors[k], rows[k])


@free
def _inverse_norm(row: Any, smallest: Any) -> Any:
    norm = np.sqrt(_product(row, row))
    return _ZERO if norm < smallest else _ONE / norm


@free
def _pool(phi: Any, places: Any, shares: Any, channels: int, pooled: Any) -> None:
    """Means over regions: ``phi [P * C]`` to ``pooled [M * C]``; position p counts in ``places[p]`` by ``shares[p]``."""
    pooled[:] = 0.0
    for p in range(places.shape[0]):
        row = phi[p * channels : (p + 1) * channels]
        for i in range(places.shape[1]):
            if shares[p, i] != 0.0:
                start = places[p, i] * channels
                _add_scaled(pooled[start : start + channels], shares[p, i], row)


@free
def _spread(pooled: Any, places: Any, shares: Any, channels: int, error: Any) -> None:
    """The transpose of :func:`_pool`."""
    error[:] = 0.0
    for p in range(places.shape[0]):
        row = error[p * channels : (p + 1) * channels]
        for i in range(places.shape[1]):
            if shares[p, i] != 0.0:
                start = places[p, i] * channels
                _add_scaled(row, shares[p, i], pooled[start : start + channels])


@free
def compare(
    h: Any,
    t: Any,
    labels: Any,
    mean: Any,
    temperature: Any,
    cosine: bool,
    smallest: Any,
    total: Any,
    factors: Any,
    responses: Any,
) -> Any:
    """The local loss of one step, with the settings of :func:`learn`; ``h [B, m]`` and ``t [K, m]`` become its derivatives.

    ``mean [m]`` centres h where it is given (else it has no entries); ``total [m]`` gets the sum of h over the rows. Where
    ``factors [B, K]`` and ``responses [K, m]`` have entries their product is the derivative by h instead; not for the cosine.
    """
    batch, contexts, size = h.shape[0], t.shape[0], h.shape[1]
    own = mean.shape[0] == 0
    centre = np.zeros(size, np.float32)
    for b in range(batch):
        _add_to(centre, h[b])
    _add_to(total, centre)
    _scale(centre, np.float32(1.0 / batch))
    if not own:
        centre[:] = mean
    h_scale, t_scale = np.empty(batch, np.float32), np.empty(contexts, np.float32)
    plain = np.float32(size**-0.5)
    for b in range(batch):
        _add_scaled(h[b], -_ONE, centre)
        h_scale[b] = _inverse_norm(h[b], smallest) if cosine else plain
    centre[:] = 0.0
    for k in range(contexts):
        _add_to(centre, t[k])
    _scale(centre, np.float32(1.0 / contexts))
    for k in range(contexts):
        _add_scaled(t[k], -_ONE, centre)
        t_scale[k] = _inverse_norm(t[k], smallest) if cosine else plain

    loss = 0.0
    share = np.float32(1.0 / (batch * temperature))
    along_h, along_t = np.zeros(batch, np.float32), np.zeros(contexts, np.float32)
    weights = np.zeros(contexts, np.float32)
    similarity, delta = np.empty(contexts, np.float32), np.empty((batch, contexts), np.float32)
    for b in range(batch):
        _products(t, h[b], similarity)
        highest = np.float32(-np.inf)
        for k in range(contexts):
            similarity[k] *= h_scale[b] * t_scale[k]
            highest = max(highest, similarity[k] / temperature)
        normaliser = _ZERO
        for k in range(contexts):
            delta[b, k] = np.exp(similarity[k] / temperature - highest)
            normaliser += delta[b, k]
        loss += np.log(normaliser) + highest - similarity[labels[b]] / temperature
        for k in range(contexts):
            wanted = _ONE if k == labels[b] else _ZERO
            d = (delta[b, k] / normaliser - wanted) * share
            d = _ZERO if abs(d) <= _TINY else d
            along_h[b] += d * similarity[k]
            along_t[k] += d * similarity[k]
            delta[b, k] = d * (h_scale[b] * t_scale[k])
            weights[k] += delta[b, k]
        along_h[b] *= h_scale[b] * h_scale[b] if cosine else _ZERO  # what points along a row does not turn it

    dt = np.zeros((contexts, size), np.float32)
    centre[:] = 0.0
    for start in range(0, batch, TOGETHER):
        some = slice(start, min(batch, start + TOGETHER))
        for k in range(contexts):
            _add_combination(dt[k], delta[some, k], h[some])
        if own:
            _add_combination(centre, along_h[some], h[some])
    if factors.shape[0] > 0:
        for b in range(batch):
            for k in range(contexts):
                factors[b, k] = delta[b, k] - (weights[k] / np.float32(batch) if own else _ZERO)
        for k in range(contexts):
            responses[k] = t[k]
    else:
        if own:  # the mean over rows of dh, which centring takes off
            _scale(centre, -_ONE)
            _add_combination(centre, weights, t)
            _scale(centre, np.float32(1.0 / batch))
        for b in range(batch):
            row = h[b]
            for j in range(size):
                row[j] = -along_h[b] * row[j] - centre[j]
            _add_combination(row, delta[b], t)
    centre[:] = 0.0
    for k in range(contexts):
        if cosine:
            _add_scaled(dt[k], -along_t[k] * t_scale[k] * t_scale[k], t[k])
        _add_to(centre, dt[k])
    _scale(centre, np.float32(-1.0 / contexts))
    for k in range(contexts):
        t[k] = dt[k]
        _add_to(t[k], centre)
    return loss / batch


@exact
def learn(
    drive: Any,
    narrow_drive: Any,
    contexts: Any,
    places: Any,
    neurons: Any,
    reset: int,
    has_current: bool,
    current: Any,
    membrane: Any,
    reading: Any,
    regions: Any,
    shares: Any,
    labels: Any,
    mean: Any,
    loss: Any,
    before: Any,
    spikes: Any,
    error: Any,
    narrow_spikes: Any,
    narrow_error: Any,
    phi_sum: Any,
    activity: Any,
    counts: Any,
    error_sum: Any,
    factors: Any,
    responses: Any,
) -> float:
    """k steps of a layer and its local loss; returns the loss summed over the steps that it reads.

    Args:
        drive: ``[k, R, n]``, or ``[1, R, n]`` for a constant one; the first B rows are inputs, the others contexts.
        narrow_drive: the same as bits of bfloat16, if it has entries.
        contexts: ``[C, n]``: the drive of the contexts at every step, if they have no rows in the other.
        places: ``[k]``: the place of a step's error among those that are kept; the loss does not read it if below 0.
        neurons: ``[4, n]``: bias, alpha, beta and threshold.
        reset: ZERO, SUBTRACT or NONE.
        has_current: whether any alpha is above 0.
        current, membrane: ``[R, n]``, moved on in place.
        reading: unit (float32), option (RAW, CLIPPED or ATAN) and its width (float32).
        regions, shares: the regions of a map ``[P, i]``, see :func:`_pool`; no entries: every neuron for itself.
        labels: ``[k, B]``.
        mean: ``[m]``, see :func:`compare`.
        loss: temperature (float32), whether the similarity is the cosine, and the norm below which a row counts as zero
            (float32).
        before: ``[R, n]``: U before the reset, written; that of the last step at the end.
        spikes: ``[k, R, n]`` float32, written, unless narrow_spikes has entries.
        error: ``[k, R, n]`` float32, of the steps that the loss reads, written; ``[1, 1, n]``, a scratch, where narrow_error
            has entries.
        narrow_spikes, narrow_error: the same as bits of bfloat16.
        phi_sum ``[m]``, activity ``[n]``, counts ``[B, n]``: of the input rows, summed over steps (phi: those read), the first
            two over rows as well; added to. Counts without entries are not taken.
        error_sum: ``[k, n]``: the error summed over rows, of the steps read; added to.
        factors, responses: ``[k, B, C]`` and ``[k, C, n]``, of the steps read, written: the error of the input rows is their
            product, and ``error`` has the contexts' rows alone. For the reading RAW without regions or the cosine; otherwise
            ``[1, 0, C]`` and ``[1, 0, n]``.
    """
    steps, batch = labels.shape
    rows, size = before.shape
    unit, option, width = reading
    temperature, cosine, smallest = loss
    pools = regions.shape[0] > 0
    channels = size // regions.shape[0] if pools else size
    is_narrow = narrow_drive.shape[0] > 0
    driven = narrow_drive.shape[1] if is_narrow else drive.shape[1]
    wide, phi = np.empty(size, np.float32), np.empty(size, np.float32)
    read = np.empty((rows, phi_sum.shape[0]), np.float32)
    bias, alpha, beta, threshold = neurons[0], neurons[1], neurons[2], neurons[3]
    total, begin, factored = 0.0, 0, factors.shape[1] > 0
    while begin < steps:
        end = begin + 1  # after the next step that is read
        while end < steps and places[end - 1] < 0:
            end += 1
        place = places[end - 1]
        for first in range(0, rows, TOGETHER):  # through all these steps, while the rows are in the cache
            for step in range(begin, end):
                for row in range(first, min(rows, first + TOGETHER)):
                    now = before[row]
                    if row >= driven:
                        present = contexts[row - driven]
                    elif is_narrow:
                        widen(narrow_drive[step if narrow_drive.shape[0] > 1 else 0, row], wide)
                        present = wide
                    else:
                        present = drive[step if drive.shape[0] > 1 else 0, row]
                    own = current[row] if has_current else current[0, :0]
                    advance_row(present, bias, alpha, beta, threshold, reset, has_current, own, membrane[row], now)
                    if narrow_spikes.shape[0] > 0:
                        mark_narrow(now, threshold, narrow_spikes[step, row])
                    else:
                        mark(now, threshold, spikes[step, row])
                    if row < batch:
                        count(now, threshold, activity)
                        if counts.shape[0] > 0:
                            count(now, threshold, counts[row])
            for row in range(first, min(rows, first + TOGETHER) if place >= 0 else 0):
                now, own = before[row], phi if pools else read[row]
                if option == CLIPPED:
                    read_window(now, threshold, unit, width, own)
                else:
                    read_row(now, threshold, unit, option, width, own)
                if pools:
                    _pool(phi, regions, shares, channels, read[row])
        begin = end
        if place < 0:
            continue
        own_factors, own_responses = factors[place if factored else 0], responses[place if factored else 0]
        own_loss = temperature, cosine, smallest
        total += compare(read[:batch], read[batch:], labels[end - 1], mean, *own_loss, phi_sum, own_factors, own_responses)
        for k in range(own_responses.shape[0]):
            share = _ZERO
            for b in range(batch):
                own_factors[b, k] /= unit
                share += own_factors[b, k]
            _add_scaled(error_sum[place], share, own_responses[k])
        is_rounded = narrow_error.shape[0] > 0
        for row in range(batch if factored else 0, rows):
            wrong = error[0 if is_rounded else place, 0 if is_rounded else row - batch if factored else row]
            if pools:
                _spread(read[row], regions, shares, channels, wrong)
            else:
                wrong[:] = read[row]
            if option == CLIPPED:
                apply_window(before[row], threshold, unit, width, wrong)
            else:
                apply_slope(before[row], threshold, unit, option, width, wrong)
            _add_to(error_sum[place], wrong)
            if is_rounded:
                narrow(wrong, narrow_error[place, row])
    return total


@free
def low_pass(x: Any, narrow_x: Any, places: Any, keep: Any, last: Any, filtered: Any, narrow_filtered: Any) -> None:
    """``y[t] = keep y[t-1] + x[t]`` for ``x [k, N]``, from ``last [N]``, which ends as y at the last step.

    ``places [k]``: where in the output a step's y goes; nowhere if below 0. Input and output are float32 or bits of bfloat16,
    whichever arrays have entries.
    """
    steps, size = max(x.shape[0], narrow_x.shape[0]), last.shape[0]
    wide = np.empty(min(size, BLOCK), np.float32)
    for start in range(0, size, BLOCK):
        stop = min(size, start + BLOCK)
        now = last[start:stop]
        for step in range(steps):
            if narrow_x.shape[0] > 0:
                present = wide[: stop - start]
                widen(narrow_x[step, start:stop], present)
            else:
                present = x[step, start:stop]
            for j in range(stop - start):
                now[j] = present[j] + keep * now[j]
            if places[step] < 0:
                continue
            if narrow_filtered.shape[0] > 0:
                narrow(now, narrow_filtered[places[step], start:stop])
            else:
                filtered[places[step], start:stop] = now


@free
def scan_back(
    error: Any, spikes: Any, alpha: Any, beta: Any, gated: bool, at_membrane: Any, at_current: Any, responsible: Any, bias: Any
) -> None:
    """:func:`spikeprop.traces.step_back` over a window ``[k, R, n]`` from its end; ``alpha`` and ``beta`` are ``[n]``.

    ``at_membrane`` and ``at_current`` ``[R, n]`` must be zero, and become those of the first step. ``responsible`` gets what is
    at the current at every step, ``bias [n]`` the sum of what is at the membrane.
    """
    for row in range(error.shape[1]):
        membrane, current = at_membrane[row], at_current[row]
        for step in range(error.shape[0] - 1, -1, -1):
            now, spiked, share = error[step, row], spikes[step, row], responsible[step, row]
            if gated:
                for j in range(now.shape[0]):
                    membrane[j] = now[j] + (beta[j] * (_ONE - spiked[j])) * membrane[j]
            else:
                for j in range(now.shape[0]):
                    membrane[j] = now[j] + beta[j] * membrane[j]
            for j in range(now.shape[0]):
                current[j] = membrane[j] + alpha[j] * current[j]
            share[:] = current
            for j in range(now.shape[0]):
                bias[j] += membrane[j]
