"""Quantising by round-to-nearest: the scale of each block, and the code of each weight.

All arithmetic is float32, divisions included. `Format.quantize` is the way in, and says what is
chosen.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qmoe_plugin.formats import packing
from qmoe_plugin.formats import scales as small_floats
from qmoe_plugin.formats.packing import Array, pack

if TYPE_CHECKING:
    from qmoe_plugin.formats.base import Format

DType = np.dtype[Any]

_LANES = 16  # as in ops/rounding.cc


@dataclass(frozen=True)
class Quantized:
    """A quantised matrix, or a stack of them; shapes as in `qmoe_plugin.formats.base`.

    `scales` is None where the global scale is all there is, `global_scale` and `codebook` where
    there is none.
    """

    codes: Array
    scales: Array | None
    zero_points: Array | None = None
    global_scale: Array | None = None
    codebook: Array | None = None


def by_codebook(
    fmt: Format, weights: Array, block_size: int, signed_scales: bool, scale_dtype: DType
) -> Quantized:
    """Float32 weights [..., N, K] in a format whose codebook is known, with scales of any type."""
    kind = small_floats.scale_type_of(scale_dtype)
    fixed = dataclasses.replace(fmt, scale_type=kind)
    if kind == "float":
        quantized = by_range(fixed, weights, block_size, True, signed_scales, scale_dtype)
    else:
        quantized = by_magnitude(fixed, weights, block_size, scale_dtype)
    if kind == "float8e8m0":  # its global scale is 1, and need not be there
        quantized = dataclasses.replace(quantized, global_scale=None)
    return dataclasses.replace(quantized, codebook=fmt.values.astype(np.float32))


def by_range(
    fmt: Format,
    weights: Array,
    block_size: int,
    symmetric: bool,
    signed_scales: bool,
    scale_dtype: DType,
) -> Quantized:
    """Float32 weights [..., N, K] in a format with float scales of rows or blocks."""
    *lead, n, k = weights.shape
    rows = weights.reshape(-1, k)
    compiled = None if fmt.codebook else packing.native()
    if compiled is not None and scale_dtype == np.float32 and (signed_scales or not symmetric):
        packed, scales, zeros = compiled.quantize(rows, fmt.name, block_size, symmetric)
    else:
        scales, zeros = _choose_scales(fmt, rows, block_size, symmetric, signed_scales, scale_dtype)
        blocks = Blocks(rows, 1, block_size or k)
        packed = blocks.codes(fmt, scales, zeros.astype(np.float32) if is_integer(fmt) else None)
    shape = (*lead, n, fmt.groups(k, block_size)) if block_size else (*lead, n)
    zero_points = None if symmetric else pack(zeros.reshape(shape), fmt.bits)
    codes = packed.reshape(*lead, n, packed.shape[-1])
    return Quantized(codes, scales.reshape(shape).astype(scale_dtype), zero_points)


def by_magnitude(
    fmt: Format,
    weights: Array,
    block_size: int,
    scale_dtype: DType,
    largest_of_all: float | None = None,
) -> Quantized:
    """Float32 weights [..., N, K] in a format whose scales follow the largest magnitudes."""
    *lead, n, k = weights.shape
    top = np.float32(min(np.nanmax(fmt.values), -np.nanmin(fmt.values)))
    if top <= 0:
        raise ValueError("values of both signs are needed for scales of a small float type")
    if largest_of_all is None:
        largest = np.abs(weights).max(axis=(-2, -1))  # of each expert, [...]
    else:
        largest = np.full(tuple(lead), largest_of_all, dtype=np.float32)
    global_scale = np.ones(tuple(lead), dtype=np.float32)
    if fmt.square_blocks and not block_size:
        global_scale = np.where(largest > 0, largest / top, np.float32(1))
        codes = _codes_of_all(fmt, weights, n, k, global_scale[..., None, None])
        return Quantized(codes, None, None, global_scale)

    height, width = block_size if fmt.square_blocks else 1, block_size or k
    magnitude = as_blocks(np.abs(weights), height, width).max(axis=(-3, -1))
    if fmt.scale_type == "float8e8m0":
        below = np.abs(fmt.values)[np.abs(fmt.values) < top].max()
        scales = small_floats.e8m0_covering(magnitude, 1.5 * float(top) - 0.5 * below)
    elif fmt.scale_type == "float8e4m3fn":
        spread = np.float32(small_floats.E4M3_MAX) * top
        global_scale = np.where(largest > 0, largest / spread, np.float32(1))
        scales = small_floats.round_to_e4m3(magnitude / top / global_scale[..., None, None])
    else:
        scales = (magnitude / top).astype(scale_dtype)
    decoded = small_floats.decode_scales(scales, fmt.scale_type).astype(np.float32)
    codes = _codes_of_all(fmt, weights, height, width, decoded * global_scale[..., None, None])
    has_global = fmt.has_global_scale(block_size)
    scales = scales if block_size else scales[..., 0]
    return Quantized(codes, scales, None, global_scale if has_global else None)


def _codes_of_all(fmt: Format, weights: Array, height: int, width: int, scales: Array) -> Array:
    """The packed codes of a stack of matrices, [..., N, bytes], each with scales of its own."""
    *lead, n, k = weights.shape
    matrices = weights.reshape(-1, n, k)
    factors = scales.reshape(len(matrices), *scales.shape[-2:])
    packed = [
        Blocks(matrix, height, width).codes(fmt, of, None)
        for matrix, of in zip(matrices, factors, strict=True)
    ]
    return np.stack(packed).reshape(*lead, n, -1)


@dataclass(frozen=True)
class Blocks:
    """A matrix in blocks that share a scale, and what rounding to codes makes of it.

    Where `qmoe_plugin._native` is built it does the work, to the same bits.

    Attributes:
        weights: float32 [N, K].
        height: Rows of a block; the last ones may be partial.
        width: Its columns.
    """

    weights: Array
    height: int
    width: int

    def codes(self, fmt: Format, scales: Array, zeros: Array | None) -> Array:
        """The code nearest to each weight, packed, uint8 [N, bytes].

        Args:
            fmt: The format.
            scales: float32 [N / height, K / width], rounded up.
            zeros: Zero points likewise; None for the default one, and for formats without.
        """
        compiled = packing.native()
        if compiled is None or not self.weights.size:
            return pack(self._nearest(fmt, scales, zeros), fmt.bits)
        return np.asarray(compiled.round_to_codes(**self._arguments(fmt, scales, zeros)))

    def errors(
        self, fmt: Format, scales: Array, zeros: Array | None, importance: Array | None = None
    ) -> Array:
        """The sum of squared errors of each block after rounding, float32, the shape of `scales`.

        Sums are over every 16th column first, row by row, then over these 16.

        Args:
            fmt: The format.
            scales: As for `codes`, and so `zeros`.
            zeros: Likewise.
            importance: Factors on the squared errors of each column, float32 [K]; None for 1.
        """
        compiled = packing.native()
        if compiled is not None and self.weights.size:
            arguments = self._arguments(fmt, scales, zeros)
            return np.asarray(compiled.rounding_errors(**arguments, importance=importance))
        codes = self._nearest(fmt, scales, zeros)
        decoded = fmt.values.astype(np.float32)[codes]
        decoded -= self._per_code(self._zeros(fmt, scales, zeros))
        decoded *= self._per_code(scales)
        decoded -= self.weights
        np.square(decoded, out=decoded)
        if importance is not None:
            decoded *= importance
        return self._sums(decoded)

    def _sums(self, values: Array) -> Array:
        blocks = as_blocks(values, self.height, self.width)
        rows, height, columns, width = blocks.shape
        lanes = np.zeros((rows, columns, height, -(-width // _LANES) * _LANES), np.float32)
        lanes[..., :width] = blocks.transpose(0, 2, 1, 3)
        lanes = lanes.reshape(rows, columns, -1, _LANES)
        by_lane = np.add.accumulate(lanes, axis=-2)[..., -1, :]  # one after the other
        sums: Array = np.add.accumulate(by_lane, axis=-1)[..., -1]
        return sums

    def _nearest(self, fmt: Format, scales: Array, zeros: Array | None) -> Array:
        per_code = None
        if is_integer(fmt):
            per_code = self._per_code(self._zeros(fmt, scales, zeros))
        return nearest(fmt, self.weights, self._per_code(scales), per_code)

    def _zeros(self, fmt: Format, scales: Array, zeros: Array | None) -> Array:
        return np.full_like(scales, fmt.default_zero_point) if zeros is None else zeros

    def _per_code(self, per_block: Array) -> Array:
        """Spreads one value a block over its codes: [N, K]."""
        n, k = self.weights.shape
        wide: Array = np.repeat(np.repeat(per_block, self.height, axis=0), self.width, axis=1)
        return wide[:n, :k]

    def _arguments(self, fmt: Format, scales: Array, zeros: Array | None) -> dict[str, Any]:
        return {
            "weights": np.ascontiguousarray(self.weights, np.float32),
            "values": fmt.values.tolist(),
            "scales": np.ascontiguousarray(scales, np.float32),
            "zeros": None if zeros is None else np.ascontiguousarray(zeros, np.float32),
            "default_zero": fmt.default_zero_point,
            "height": self.height,
            "width": self.width,
        }


def _choose_scales(
    fmt: Format,
    rows: Array,
    block_size: int,
    symmetric: bool,
    signed_scales: bool,
    scale_dtype: npt.DTypeLike,
) -> tuple[Array, Array]:
    """Scales float32 [R, G], rounded to scale_dtype, and zero points uint8 [R, G] of [R, K]."""
    k = rows.shape[-1]
    groups = fmt.groups(k, block_size)
    padded = np.zeros((rows.shape[0], groups * (block_size or k)), dtype=np.float32)
    padded[:, :k] = rows  # the padding never wins: every range below holds 0
    blocks = padded.reshape(rows.shape[0], groups, -1)
    lowest, highest = blocks.min(axis=-1), blocks.max(axis=-1)
    centered = fmt.values[np.isfinite(fmt.values)] - fmt.default_zero_point
    default_zero = np.full(lowest.shape, int(fmt.default_zero_point), dtype=np.uint8)
    if symmetric:
        magnitude = np.maximum(-lowest, highest)
        if signed_scales and -centered.min() > centered.max():
            # The earlier of -x and +x decides a tie, as in onnxruntime.
            first = np.take_along_axis(
                blocks, np.argmax(np.abs(blocks), axis=-1)[..., None], axis=-1
            )
            scales = first[..., 0] / np.float32(centered.min())
        elif centered.max() > 0:
            scales = magnitude / np.float32(centered.max())
        else:
            raise ValueError("a codebook without positive values needs signed_scales=True")
        return _rounded(scales, scale_dtype), default_zero
    lowest, highest = np.minimum(lowest, 0), np.maximum(highest, 0)
    levels = np.float32((1 << fmt.bits) - 1)
    scales = _rounded((highest - lowest) / levels, scale_dtype)
    with np.errstate(divide="ignore", invalid="ignore"):
        zeros = np.where(scales != 0, np.rint(-lowest / scales), np.float32(0))
    return scales, np.clip(zeros, 0, levels).astype(np.uint8)


def nearest(fmt: Format, weights: Array, scales: Array, zeros: Array | None = None) -> Array:
    """The code nearest to each weight, all three of one shape; that of 0 where the scale is."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        wanted = np.where(scales != 0, weights / scales, np.float32(0))
    return _encode(fmt, wanted if zeros is None else wanted + zeros)


def is_integer(fmt: Format) -> bool:
    """Whether codes decode to themselves, so that a zero point is a code too."""
    return bool(np.array_equal(fmt.values, np.arange(1 << fmt.bits)))


def _encode(fmt: Format, wanted: Array) -> Array:
    """The code whose value is nearest to each wanted one; of two equally near, the even."""
    if is_integer(fmt):
        return np.clip(np.rint(wanted), 0, (1 << fmt.bits) - 1).astype(np.uint8)
    ordered, order = np.unique(fmt.values, return_index=True)  # equal values: the first code
    ordered = ordered[np.isfinite(ordered)]
    right = np.clip(np.searchsorted(ordered, wanted), 1, len(ordered) - 1)
    below, above = wanted - ordered[right - 1], ordered[right] - wanted
    take_right = (above < below) | ((above == below) & (order[right] % 2 == 0))
    return order[np.where(take_right, right, right - 1)].astype(np.uint8)


def as_blocks(values: Array, height: int, width: int) -> Array:
    """A matrix [..., N, K] as [..., N / h, h, K / w, w]; partial blocks are filled with zeros."""
    *lead, n, k = values.shape
    rows, columns = -(-n // height), -(-k // width)
    padded = np.zeros((*lead, rows * height, columns * width), dtype=values.dtype)
    padded[..., :n, :k] = values
    return padded.reshape(*lead, rows, height, columns, width)


def _rounded(values: Array, dtype: npt.DTypeLike) -> Array:
    """Rounds to `dtype` and back to float32."""
    return values.astype(dtype).astype(np.float32)
