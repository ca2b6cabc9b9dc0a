"""Weights drawn on a quantization grid, so that exporting them to that grid loses nothing.

Every weight is `q * scale` with an integer `q` and a scale of eight significant bits: float32,
float16 and bfloat16 hold the scale exactly, and float16 holds the product exactly. Each block of 32
along the contraction axis holds the grid's extremes, so that an exporter finds the scale again:

* `int4`: q in -8..7, both ends present, the sign of the scale random. Symmetric quantizers map the
  element of largest magnitude to -8, asymmetric ones divide the range by 15. The same values are
  exact in int8 as well (scale / 16 and q * 16).
* `int4_channel`: as `int4`, with one positive scale a row: per-channel quantizers are exact too,
  and so are all block sizes.
* `int4_asymmetric`: q in -z..15-z with a random z a block, both ends present, positive scales.
* `int2`: q in -2..1, both ends present, a scale (with a sign) for each 64 weights, as the builder's
  blocks are at least that.
* `mxfp4`: q in {0, 1, 2, 3, 4, 6, 8} with signs, the scale a power of two, that is, twice what FP4
  E2M1 holds; -8 (4.0) in each block and +8 in none: on the int4 grid and on the MXFP4 grid.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

BLOCK = 32
INT2_BLOCK = 64
Grid = Literal["int4", "int4_channel", "int4_asymmetric", "int2", "mxfp4"]
F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]

# Eight significant bits: mantissas 128/128 .. 255/128.
_MANTISSAS = np.arange(128, 256, dtype=np.float32) / 128
# Integers of the mxfp4 grid, in units of half an FP4 step; +8 is left out on purpose.
_MXFP4_UNITS = np.array([-6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6], dtype=np.int8)
_E2M1_TWICE = np.array([0, 1, 2, 3, 4, 6, 8, 12], dtype=np.int8)  # code -> 2 * value


def draw(rng: np.random.Generator, shape: tuple[int, ...], grid: Grid, gain: float = 1.0) -> F32:
    """Draws weights `[..., N, K]` on a grid, standard deviation about gain / sqrt(K)."""
    *lead, k = shape
    if k % BLOCK:
        raise ValueError(f"the contraction axis has {k} elements; it must be a multiple of {BLOCK}")
    blocks = (*lead, k // BLOCK)
    q = _draw_units(rng, (*blocks, BLOCK), grid)
    target = gain / np.sqrt(k) / np.float32(np.std(q))
    if grid == "mxfp4":
        exponent = np.floor(np.log2(target)) + rng.integers(0, 2, blocks)
        scale = np.exp2(exponent) * rng.choice([-1.0, 1.0], blocks)
    else:
        width = {"int4_channel": k, "int2": INT2_BLOCK}.get(grid, BLOCK)
        if k % width:
            raise ValueError(f"the contraction axis has {k} elements; {grid} has blocks of {width}")
        scale_shape = (*lead, k // width)
        exponent = np.floor(np.log2(target)) + rng.integers(-1, 1, scale_shape)
        sign = rng.choice([-1.0, 1.0], scale_shape) if grid in ("int4", "int2") else 1.0
        scale = np.exp2(exponent) * rng.choice(_MANTISSAS, scale_shape) * sign
        scale = np.repeat(scale, width // BLOCK, axis=-1)
    return (q * scale[..., None]).astype(np.float32).reshape(shape)


def _draw_units(rng: np.random.Generator, shape: tuple[int, ...], grid: Grid) -> NDArray[np.int8]:
    """Draws the integers of blocks `[..., 32]`, each with the grid's extremes in random places."""
    if grid == "mxfp4":
        q = rng.choice(_MXFP4_UNITS, shape)
        extremes = [-8]
    elif grid == "int2":
        q = rng.integers(-2, 2, shape).astype(np.int8)
        extremes = [-2, 1]
    else:
        q = rng.integers(-8, 8, shape).astype(np.int8)
        extremes = [-8, 7]
    places = np.argsort(rng.random(shape, dtype=np.float32), axis=-1)[..., : len(extremes)]
    np.put_along_axis(q, places, np.array(extremes, dtype=np.int8), axis=-1)
    if grid == "int4_asymmetric":
        q += rng.integers(-3, 4, (*shape[:-1], 1)).astype(np.int8)
    return q


def encode_mxfp4(weights: F32) -> tuple[U8, U8]:
    """Encodes weights `[E, N, K]` of the mxfp4 grid as checkpoints store them.

    Returns:
        Blocks `[E, N, K/32, 16]`, the even element in the low nibble; E8M0 scales `[E, N, K/32]`.
    """
    blocks = weights.reshape(*weights.shape[:-1], -1, BLOCK)
    # The extreme is 4.0 = 8 half steps, so a half step is its eighth and the FP4 scale its quarter.
    scale = np.abs(blocks).max(-1) / 4
    exponent = np.log2(scale)
    twice = np.rint(2 * blocks / scale[..., None]).astype(np.int8)
    codes = np.searchsorted(_E2M1_TWICE, np.abs(twice)).astype(np.uint8)
    if not np.array_equal(_E2M1_TWICE[codes] * np.sign(twice) * scale[..., None] / 2, blocks):
        raise ValueError("the weights are not on the mxfp4 grid")
    codes |= (twice < 0).astype(np.uint8) << 3
    packed = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return packed, (exponent + 127).astype(np.uint8)


def split_int4(weights: F32, asymmetric: bool = False) -> tuple[U8, F32, U8]:
    """Splits weights `[..., N, K]` of an int4 grid into what quantized checkpoints store.

    Returns:
        Codes 0..15 `[..., N, K]`, scales and zero points `[..., N, K/32]` (8 if symmetric).
    """
    blocks = weights.reshape(*weights.shape[:-1], -1, BLOCK)
    if asymmetric:
        scales = (blocks.max(-1) - blocks.min(-1)) / np.float32(15)
        zeros = np.rint(-blocks.min(-1) / scales)
    else:
        place = np.abs(blocks).argmax(-1)[..., None]
        scales = np.take_along_axis(blocks, place, -1)[..., 0] / np.float32(-8)
        zeros = np.full(scales.shape, 8.0)
    codes = np.rint(blocks / scales[..., None]) + zeros[..., None]
    restored = (codes - zeros[..., None]).astype(np.float32) * scales[..., None]
    if codes.min() < 0 or codes.max() > 15 or not np.array_equal(restored, blocks):
        raise ValueError("the weights are not on the int4 grid")
    return codes.astype(np.uint8).reshape(weights.shape), scales, zeros.astype(np.uint8)
