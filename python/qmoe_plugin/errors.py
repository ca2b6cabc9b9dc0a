"""How far one result is from another."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from qmoe_plugin.ort_values import Array


@dataclass(frozen=True)
class Error:
    """The difference of two tensors.

    Attributes:
        cosine: Of the angle between them; 1 is best. 0 if only one of them is all zeros.
        sqnr: Signal to (quantisation) noise ratio in dB, 10 log10(sum a^2 / sum (a - b)^2):
            infinite if they are equal, 20 for a relative error of 10 %.
        max: The largest difference.
        rms: Root of the mean squared difference.
        broken: Elements that are NaN or infinite in one of them only; then the others are -inf
            (sqnr), 0 (cosine) and inf.
    """

    cosine: float
    sqnr: float
    max: float
    rms: float
    broken: int = 0

    def to_dict(self) -> dict[str, float | int | None]:
        """For JSON, which has no infinity: None."""
        return {name: value if math.isfinite(value) else None for name, value in vars(self).items()}


def compare(expected: Array, found: Array) -> Error:
    """The error of `found`.

    Elements that are the same infinity, or NaN in both, count as equal.

    Raises:
        ValueError: If they have different shapes.
    """
    if expected.shape != found.shape:
        raise ValueError(
            f"shapes differ: {list(expected.shape)} is expected, {list(found.shape)} was found"
        )
    a, b = expected.astype(np.float64).reshape(-1), found.astype(np.float64).reshape(-1)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    finite = np.isfinite(a) & np.isfinite(b)
    broken = int(np.count_nonzero(~same & ~finite))
    if broken:
        return Error(0.0, -math.inf, math.inf, math.inf, broken)
    a, b = a[finite], b[finite]
    difference = a - b
    signal, noise = float(a @ a), float(difference @ difference)
    lengths = math.sqrt(signal) * math.sqrt(float(b @ b))
    if noise == 0:
        return Error(1.0, math.inf, 0.0, 0.0)
    return Error(
        float(a @ b) / lengths if lengths else 0.0,
        10 * math.log10(signal / noise) if signal else -math.inf,
        float(np.abs(difference).max()),
        math.sqrt(noise / len(a)),
    )
