"""The small float types of scales, and the values of small floats that are weights.

e4m3 is float8e4m3fn: bias 7, no infinity, NaN is 0x7f and 0xff, the largest number 448. e8m0 is a
power of two, 2^(code - 127), except that code 0 is zero, as onnxruntime decodes it, and 255 is NaN.
"""

from __future__ import annotations

from typing import Any, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

ScaleType = Literal["float", "float8e8m0", "float8e4m3fn", "any"]
"""Types of scales: any of float32, float16 and bfloat16; that one; any of all of these."""

E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)

E2M1_VALUES: npt.NDArray[np.float64] = np.array(
    [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
)
E4M3_VALUES: npt.NDArray[np.float64] = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float64)
E4M3_MAX = 448.0


def scale_type_of(dtype: np.dtype[Any]) -> ScaleType:
    """The kind of scales that are stored as this type."""
    if dtype == E8M0:
        return "float8e8m0"
    return "float8e4m3fn" if dtype == E4M3 else "float"


def decode_scales(scales: Array, scale_type: ScaleType) -> npt.NDArray[np.float64]:
    """Scales as numbers.

    Args:
        scales: Any float type; uint8 for e8m0 bytes, where scale_type says so.
        scale_type: Of the format.

    Returns:
        float64, the shape of `scales`. Raises ValueError for e8m0 code 255.
    """
    if scale_type == "float8e8m0" and scales.dtype == np.uint8:
        scales = scales.view(E8M0)
    if scales.dtype != E8M0:
        return scales.astype(np.float64)
    codes = scales.view(np.uint8)
    if (codes == 255).any():
        raise ValueError("scales hold the float8e8m0 code 255, which is NaN")
    return np.where(codes == 0, 0.0, np.exp2(codes.astype(np.float64) - 127))


def e8m0_covering(magnitudes: Array, largest: float) -> Array:
    """The smallest power of two s with magnitude <= largest * s, as e8m0; 2^-126 at the least.

    Args:
        magnitudes: Not negative.
        largest: The largest number of scale 1 that still rounds to a code.

    Returns:
        float8_e8m0fnu, the shape of `magnitudes`. Code 0, of which decoders differ, is never taken.
    """
    fraction, exponent = np.frexp(magnitudes.astype(np.float64) / largest)
    exponent = np.where(fraction == 0.5, exponent - 1, exponent)
    exponent = np.where(magnitudes == 0, -126, np.clip(exponent, -126, 127))
    return (exponent + 127).astype(np.uint8).view(E8M0)


def round_to_e4m3(values: Array) -> Array:
    """The nearest e4m3 numbers, ties to even, saturated at +-448; NaN stays NaN.

    Args:
        values: float32, so that nothing is rounded twice.

    Returns:
        float8_e4m3fn, the shape of `values`.
    """
    return np.clip(values.astype(np.float32), -E4M3_MAX, E4M3_MAX).astype(E4M3)
