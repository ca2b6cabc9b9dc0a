"""Random quantised weights of any format, as a node stores them in the raw layout.

Codes and scales are random rather than quantised floats: that reaches all codes and both signs of
the scales, and costs nothing. They are scaled so that a product with N(0, 1) inputs is about
N(0, 1) again.
"""

from __future__ import annotations

import math

import numpy as np

from qmoe_plugin import formats
from qmoe_plugin.formats.scales import E4M3, E8M0, round_to_e4m3, scale_type_of

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
    global_scale: bool = False,
    codebook: np.ndarray | None = None,
) -> Tensors:
    """The tensors of a stack of matrices [..., N, K] that the format has.

    codes         uint8 [..., N, ceil(K * bits / 8)]
    scales        in the format's type, or scale_dtype
    zero_points   packed
    global_scale  float32 [...], a power of two if asked for; if the format leaves it open, only
                  with `global_scale`
    codebook      float32 [16], the given one or a random one
    """
    *lead, n, k = shape
    tensors = {}
    if fmt.codebook:
        tensors["codebook"] = random_codebook(rng) if codebook is None else codebook
        fmt = fmt.with_codebook(tensors["codebook"])
    kind = scale_type_of(scale_dtype) if fmt.scale_type == "any" else fmt.scale_type
    numbers = np.flatnonzero(np.isfinite(fmt.values)).astype(np.uint8)
    codes = numbers[rng.integers(0, len(numbers), shape, dtype=np.uint8)]
    scale = 1 / (np.std(fmt.values[numbers]) * math.sqrt(k))
    tensors["codes"] = fmt.pack(codes)
    scale_shape = fmt.scale_shape(n, k, block_size)
    if fmt.has_global_scale(block_size) or (fmt.may_have_global_scale and global_scale):
        if scale_shape is not None:
            middle = {"float8e8m0": 2.0**E8M0_MIDDLE, "float8e4m3fn": E4M3_MIDDLE}.get(kind, 1.0)
            scales = _random_scales(rng, (*lead, *scale_shape), kind, middle, signs)
            tensors["scales"] = scales if kind != "float" else scales.astype(scale_dtype)
            scale /= middle * (1.3 if kind == "float8e8m0" else 1.0)
        factors = _random_scales(rng, tuple(lead), "float", scale, signs)
        if powers_of_two:
            factors = np.exp2(np.rint(np.log2(np.abs(factors))))
        tensors["global_scale"] = factors.astype(np.float32)
        return tensors
    assert scale_shape is not None
    scales = _random_scales(rng, (*lead, *scale_shape), kind, scale, signs)
    tensors["scales"] = scales if kind != "float" else scales.astype(scale_dtype)
    if zero_points:
        tensors["zero_points"] = _random_zero_points(rng, fmt, (*lead, *scale_shape))
    return tensors


def random_codebook(rng: np.random.Generator) -> np.ndarray:
    """Values of 4-bit codes in no order, of both signs, one of them 0 and two alike."""
    values = rng.standard_normal(16)
    values[rng.permutation(16)[:3]] = [0.0, 1.5, 1.5]
    return values.astype(np.float32)


def _random_scales(
    rng: np.random.Generator, shape: tuple[int, ...], kind: str, middle: float, signs: bool
) -> np.ndarray:
    """Scales around `middle`: of float64, or in the small float type."""
    if kind == "float8e8m0":
        exponents = rng.integers(-1, 2, shape) + round(math.log2(middle))
        return (exponents + 127).astype(np.uint8).view(E8M0)
    scales = rng.uniform(0.5, 1.5, shape) * middle
    scales = scales * rng.choice([-1.0, 1.0], shape) if signs else scales
    return round_to_e4m3(scales) if kind == "float8e4m3fn" else scales


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
