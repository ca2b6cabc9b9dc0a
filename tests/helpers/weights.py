"""Random quantised weights of any format, as a node stores them in the raw layout.

Codes and scales are random rather than quantised floats: that reaches all codes and both signs of
the scales, and costs nothing. They are scaled so that a product with N(0, 1) inputs is about
N(0, 1) again.
"""

from __future__ import annotations

import math

import numpy as np

from qmoe_plugin import formats
from qmoe_plugin.formats.scales import E4M3, E8M0, round_to_e4m3

Tensors = dict[str, np.ndarray]

E8M0_MIDDLE = -5  # exponents of e8m0 scales lie around it
E4M3_MIDDLE = 64.0  # e4m3 scales lie around it


def random_weights(
    rng: np.random.Generator,
    fmt: formats.Format,
    shape: tuple[int, ...],
    block_size: int,
    scale_dtype: np.dtype,
    *,
    signs: bool,
    zero_points: bool,
    powers_of_two: bool = False,
) -> Tensors:
    """The tensors of a stack of matrices [..., N, K] that the format has.

    codes         uint8 [..., N, ceil(K * bits / 8)]
    scales        in the format's type, or scale_dtype
    zero_points   packed
    global_scale  float32 [...], a power of two if asked for
    """
    *lead, n, k = shape
    numbers = np.flatnonzero(np.isfinite(fmt.values)).astype(np.uint8)
    codes = numbers[rng.integers(0, len(numbers), shape, dtype=np.uint8)]
    scale = 1 / (np.std(fmt.values[numbers]) * math.sqrt(k))
    tensors = {"codes": fmt.pack(codes)}
    scale_shape = fmt.scale_shape(n, k, block_size)
    if fmt.has_global_scale(block_size):
        if fmt.scale_type == "float8e8m0":
            exponents = rng.integers(-1, 2, (*lead, *scale_shape)) + E8M0_MIDDLE
            tensors["scales"] = (exponents + 127).astype(np.uint8).view(E8M0)
            scale /= 1.3 * 2.0**E8M0_MIDDLE
        elif fmt.scale_type == "float8e4m3fn":
            values = _random_scales(rng, (*lead, *scale_shape), E4M3_MIDDLE, signs)
            tensors["scales"] = round_to_e4m3(values)
            scale /= E4M3_MIDDLE
        factors = _random_scales(rng, tuple(lead), scale, signs)
        if powers_of_two:
            factors = np.exp2(np.rint(np.log2(np.abs(factors))))
        tensors["global_scale"] = factors.astype(np.float32)
        return tensors
    assert scale_shape is not None
    tensors["scales"] = _random_scales(rng, (*lead, *scale_shape), scale, signs).astype(scale_dtype)
    if zero_points:
        tensors["zero_points"] = _random_zero_points(rng, fmt, (*lead, *scale_shape))
    return tensors


def _random_scales(
    rng: np.random.Generator, shape: tuple[int, ...], middle: float, signs: bool
) -> np.ndarray:
    scales = rng.uniform(0.5, 1.5, shape) * middle
    return scales * rng.choice([-1.0, 1.0], shape) if signs else scales


def _random_zero_points(
    rng: np.random.Generator, fmt: formats.Format, shape: tuple[int, ...]
) -> np.ndarray:
    middle, quarter = int(fmt.default_zero_point), (1 << fmt.bits) // 4
    zeros = rng.integers(middle - quarter, middle + quarter + 1, shape, dtype=np.uint8)
    extreme = rng.random(shape) < 0.05  # the two ends of the range too
    zeros[extreme] = rng.choice([0, (1 << fmt.bits) - 1], int(extreme.sum()))
    return formats.pack(zeros, fmt.bits)


def typed(codes: np.ndarray, fmt: formats.Format) -> np.ndarray:
    """Codes of 8-bit floats as a float8e4m3fn tensor; others are bytes anyway."""
    return codes.view(E4M3) if fmt.name == "fp8_e4m3" else codes
