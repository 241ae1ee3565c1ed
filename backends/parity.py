"""Do two runs of one network spike alike?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from spikeprop.errors import InputError


def compare(reference: Sequence[ArrayLike], other: Sequence[ArrayLike]) -> list[dict[str, int]]:
    """Per layer ``{"spikes": in the reference, "differing": places where one spikes and the other does not}``.

    Both hold one array per layer, ``[T, B, n]`` each. Raises InputError if layers or shapes do not match.
    """
    if len(reference) != len(other):
        raise InputError(f"cannot compare {len(reference)} layers with {len(other)}")
    result = []
    for number, (left, right) in enumerate(zip(reference, other, strict=True), 1):
        left, right = np.asarray(left) != 0, np.asarray(right) != 0
        if left.shape != right.shape:
            raise InputError(f"layer {number}: cannot compare spikes of shape {left.shape} with {right.shape}")
        result.append({"spikes": int(left.sum()), "differing": int((left ^ right).sum())})
    return result
