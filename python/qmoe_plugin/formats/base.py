"""What a quantised weight format is on the Python side, and the arithmetic all formats share.

A weight is ``w = (values[code] - zero_point) * scale``. Shapes, with G = ceil(K / block_size)
blocks along K:

==============  ==================================  =====================================
tensor          block_size > 0                      block_size = 0 (per channel)
==============  ==================================  =====================================
codes           uint8 [..., N, ceil(K*bits/8)]      the same
scales          [..., N, G]                         float [..., N]
zero_points     uint8 [..., N, ceil(G*bits/8)]      uint8 [..., ceil(N*bits/8)]
==============  ==================================  =====================================

Codes and zero points are packed along their last axis, lowest bits first. These are the shapes of
the QMoE inputs; MatMulNBits has the same bytes with K padded to whole blocks.

Formats with scales of a small float type have a global scale too, float32 [...]: one factor an
expert on all of its weights. Formats with square blocks have scales float [..., ceil(N / b),
ceil(K / b)] for block_size b, partial at the edges, and for block_size 0 a global scale only.

The numpy code here is the specification. Where ``qmoe_plugin._native`` is built, it does the same
work faster for formats with float scales, and the tests compare the two bit by bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from qmoe_plugin.formats import scales as small_floats
from qmoe_plugin.formats.packing import Array, native, pack, unpack
from qmoe_plugin.formats.scales import ScaleType


@dataclass(frozen=True)
class Quantized:
    """A quantised matrix, or a stack of them; shapes as in the module's docstring.

    `scales` is None where the global scale is all there is, `global_scale` where there is none.
    """

    codes: Array
    scales: Array | None
    zero_points: Array | None = None
    global_scale: Array | None = None


@dataclass(frozen=True)
class Format:
    """A quantised weight format. Make one in a module of its own in this folder to add it.

    Attributes:
        name: Name of the format, and of its C++ header: "int4".
        bits: Bits a code: 2, 4 or 8.
        values: What each code decodes to, float64 [2^bits]; NaN for codes that are no number.
        default_zero_point: Subtracted from the decoded code when a model gives no zero points.
        zero_points: Whether a model may give zero points.
        qmoe_attributes: Attributes of a QMoE node in this format.
        matmul_nbits_attributes: Attributes of a MatMulNBits node in this format; None if it has no
            such op.
        other_quant_types: Further values of quant_type with these weights.
        scale_type: Type of the scales.
        only_block_size: The one block size that the format has; None = any, and per channel.
        square_blocks: Blocks are block_size rows high, too.
    """

    name: str
    bits: int
    values: Array = field(repr=False)
    default_zero_point: float
    zero_points: bool
    qmoe_attributes: Mapping[str, int | str] = field(repr=False)
    matmul_nbits_attributes: Mapping[str, int] | None = field(default=None, repr=False)
    other_quant_types: tuple[str, ...] = ()
    scale_type: ScaleType = "float"
    only_block_size: int | None = None
    square_blocks: bool = False

    def __post_init__(self) -> None:
        """Checks that there is a value for each code."""
        if self.values.shape != (1 << self.bits,):
            raise ValueError(
                f"{self.name}: values{self.values.shape} for {self.bits} bits, not {1 << self.bits}"
            )

    @property
    def codes_per_byte(self) -> int:
        """How many codes share a byte."""
        return 8 // self.bits

    @property
    def quant_types(self) -> tuple[str, ...]:
        """All values of quant_type with these weights; what quantisers write comes first."""
        return (str(self.qmoe_attributes["quant_type"]), *self.other_quant_types)

    def groups(self, k: int, block_size: int) -> int:
        """How many blocks cover k codes; one for block_size 0 (per channel)."""
        return -(-k // block_size) if block_size else 1

    def scale_shape(self, n: int, k: int, block_size: int) -> tuple[int, ...] | None:
        """Shape of the scales of one matrix [n, k]; None if it has a global scale only."""
        if self.square_blocks:
            return (-(-n // block_size), -(-k // block_size)) if block_size else None
        return (n, self.groups(k, block_size)) if block_size else (n,)

    def has_global_scale(self, block_size: int) -> bool:
        """Whether there is a factor for each expert."""
        return self.scale_type != "float" or (self.square_blocks and not block_size)

    def pack(self, codes: Array) -> Array:
        """Packs codes [..., K] along the last axis, lowest bits first."""
        compiled = native()
        if compiled is None or codes.dtype != np.uint8 or codes.size == 0:
            return pack(codes, self.bits)
        rows = np.ascontiguousarray(codes).reshape(-1, codes.shape[-1])
        packed: Array = compiled.pack(rows, self.bits)
        return packed.reshape(*codes.shape[:-1], -1)

    def unpack(self, packed: Array, k: int) -> Array:
        """Undoes `pack`: uint8 [..., k]."""
        compiled = native()
        if compiled is None or packed.dtype != np.uint8 or packed.size == 0:
            return unpack(packed, self.bits, k)
        rows = np.ascontiguousarray(packed).reshape(-1, packed.shape[-1])
        codes: Array = compiled.unpack(rows, self.bits, k)
        return codes.reshape(*packed.shape[:-1], k)

    def quantize(
        self,
        weights: Array,
        block_size: int | None = None,
        *,
        symmetric: bool = True,
        signed_scales: bool = True,
        scale_dtype: npt.DTypeLike = np.float32,
    ) -> Quantized:
        """Quantises by round-to-nearest.

        All arithmetic is float32, divisions included; ties go to the even code. NaN codes and
        negative zeros are never chosen. Scales of type e8m0 are the smallest that no weight of the
        block exceeds by more than half a step, their global scale is 1; scales of type e4m3 are the
        block's largest magnitude over the largest code, rounded, the global scale such that the
        expert's largest is 448.

        Args:
            weights: [..., N, K], any float type.
            block_size: Codes along K that share a scale; 0 for one scale a row (or an expert, of
                formats with square blocks). A partial last block is fine. None for the only one
                that the format has.
            symmetric: Without zero points. Otherwise each block's range, widened to hold 0, is
                spread over all codes.
            signed_scales: Of a symmetric format with float scales: let the element of the largest
                magnitude take the lowest code, by a negative scale if it is positive, as
                onnxruntime's quantize_matmul_4bits does. Otherwise scales are positive and the
                lowest integer code stays unused.
            scale_dtype: Type of float scales. Codes are chosen for the scales as rounded to it.

        Returns:
            The packed codes, scales, zero points and global scale.
        """
        weights = np.asarray(weights)
        if weights.ndim < 2 or weights.shape[-1] == 0:
            raise ValueError(f"weights must be [..., N, K] with K > 0, given {list(weights.shape)}")
        if not symmetric and not self.zero_points:
            raise ValueError(f"{self.name} has no zero points; quantise it with symmetric=True")
        block_size = self._check_block_size(block_size)
        values = np.ascontiguousarray(weights, dtype=np.float32)
        if not np.isfinite(values).all():
            raise ValueError("weights must be finite, given some NaN or infinity")
        if self.scale_type != "float" or self.square_blocks:
            return self._quantize_by_magnitude(values, block_size, np.dtype(scale_dtype))
        *lead, n, k = values.shape
        groups = self.groups(k, block_size)
        rows = values.reshape(-1, k)

        compiled = native()
        if (
            compiled is not None
            and np.dtype(scale_dtype) == np.float32
            and (signed_scales or not symmetric)
        ):
            packed, scales, zeros = compiled.quantize(rows, self.name, block_size, symmetric)
            codes = packed.reshape(*lead, n, packed.shape[-1])
        else:
            scales, zeros = self._choose_scales(
                rows, block_size, symmetric, signed_scales, scale_dtype
            )
            codes = pack(self._nearest_codes(rows, block_size, scales, zeros), self.bits)
            codes = codes.reshape(*lead, n, codes.shape[-1])

        if not block_size:
            scales = scales.reshape(*lead, n)
            zero_points = None if symmetric else pack(zeros.reshape(*lead, n), self.bits)
        else:
            scales = scales.reshape(*lead, n, groups)
            zero_points = None if symmetric else pack(zeros.reshape(*lead, n, groups), self.bits)
        return Quantized(codes, scales.astype(scale_dtype), zero_points)

    def dequantize(
        self,
        codes: Array,
        scales: Array | None,
        zero_points: Array | None = None,
        *,
        k: int,
        block_size: int,
        global_scale: Array | None = None,
    ) -> Array:
        """Decodes packed weights exactly.

        Args:
            codes: uint8 (or float8_e4m3fn) [..., N, ceil(k * bits / 8)] or longer.
            scales: [..., N, G], or [..., N] when block_size is 0; [..., ceil(N / block_size), G]
                for square blocks; None for 1. uint8 is e8m0 where the format has such scales.
            zero_points: None, or one value a block already unpacked, shaped like `scales`, any
                numeric type.
            k: Codes in a row.
            block_size: Codes that share a scale; 0 = per channel.
            global_scale: None, or [...], a factor on all weights of a matrix.

        Returns:
            float64 [..., N, k].
        """
        weights = self.values[unpack(codes.view(np.uint8), self.bits, k)]
        if zero_points is None:
            weights -= self.default_zero_point
        else:
            weights -= self._per_code(zero_points, k, block_size)
        if scales is not None:
            per_block = small_floats.decode_scales(scales, self.scale_type)
            if self.square_blocks and block_size:
                per_block = np.repeat(per_block, block_size, axis=-2)[..., : weights.shape[-2], :]
            weights *= self._per_code(per_block, k, block_size)
        if global_scale is not None:
            weights *= np.asarray(global_scale).astype(np.float64)[..., None, None]
        return weights

    def unpack_zero_points(self, zero_points: Array, scales_shape: tuple[int, ...]) -> Array:
        """One code a block, in the shape of the scales: [..., N, G], per channel [..., N]."""
        return unpack(zero_points, self.bits, scales_shape[-1]).reshape(scales_shape)

    def _check_block_size(self, block_size: int | None) -> int:
        if block_size is None and self.only_block_size is None:
            raise ValueError(f"{self.name} has blocks of any size; say which (0 = one scale a row)")
        if block_size is None:
            return self.only_block_size or 0
        if block_size < 0 or self.only_block_size not in (None, block_size):
            allowed = self.only_block_size or "0 or positive"
            raise ValueError(f"block_size of {self.name} is {block_size}; it must be {allowed}")
        return block_size

    def _per_code(self, per_block: Array, k: int, block_size: int) -> Array:
        """Spreads one value a block, [..., N, G] or [..., N], over its codes: [..., N, k]."""
        per_block = np.asarray(per_block).astype(np.float64)
        if not block_size:
            return np.repeat(per_block[..., None], k, axis=-1)
        return np.repeat(per_block, block_size, axis=-1)[..., :k]

    def _quantize_by_magnitude(
        self, weights: Array, block_size: int, scale_dtype: np.dtype[Any]
    ) -> Quantized:
        """The quantised float32 weights, of a format whose scales follow the largest magnitudes."""
        *lead, n, k = weights.shape
        top = np.float32(np.nanmax(self.values))
        largest = np.abs(weights).max(axis=(-2, -1))  # of each expert, [...]
        global_scale = np.ones(tuple(lead), dtype=np.float32)
        if self.square_blocks and not block_size:
            global_scale = np.where(largest > 0, largest / top, np.float32(1))
            per_code = np.broadcast_to(global_scale[..., None, None], weights.shape)
            codes = pack(self._nearest(weights, per_code), self.bits)
            return Quantized(codes, None, None, global_scale)

        height = block_size if self.square_blocks else 1
        magnitude = _largest_of_blocks(np.abs(weights), height, block_size)
        if self.scale_type == "float8e8m0":
            steps = np.sort(self.values)
            scales = small_floats.e8m0_covering(magnitude, 1.5 * steps[-1] - 0.5 * steps[-2])
        elif self.scale_type == "float8e4m3fn":
            spread = np.float32(small_floats.E4M3_MAX) * top
            global_scale = np.where(largest > 0, largest / spread, np.float32(1))
            scales = small_floats.round_to_e4m3(magnitude / top / global_scale[..., None, None])
        else:
            scales = (magnitude / top).astype(scale_dtype)
        decoded = small_floats.decode_scales(scales, self.scale_type).astype(np.float32)
        per_code = decoded * global_scale[..., None, None]
        per_code = np.repeat(np.repeat(per_code, height, axis=-2), block_size, axis=-1)
        codes = pack(self._nearest(weights, per_code[..., :n, :k]), self.bits)
        has_global = self.has_global_scale(block_size)
        return Quantized(codes, scales, None, global_scale if has_global else None)

    def _choose_scales(
        self,
        rows: Array,
        block_size: int,
        symmetric: bool,
        signed_scales: bool,
        scale_dtype: npt.DTypeLike,
    ) -> tuple[Array, Array]:
        """Scales float32 [R, G], rounded to scale_dtype, and zero points uint8 [R, G] of [R, K]."""
        k = rows.shape[-1]
        groups = self.groups(k, block_size)
        padded = np.zeros((rows.shape[0], groups * (block_size or k)), dtype=np.float32)
        padded[:, :k] = rows  # the padding never wins: every range below holds 0
        blocks = padded.reshape(rows.shape[0], groups, -1)
        lowest, highest = blocks.min(axis=-1), blocks.max(axis=-1)
        centered = self.values[np.isfinite(self.values)] - self.default_zero_point
        default_zero = np.full(lowest.shape, int(self.default_zero_point), dtype=np.uint8)
        if symmetric:
            magnitude = np.maximum(-lowest, highest)
            if signed_scales and -centered.min() > centered.max():
                # The earlier of -x and +x decides a tie, as in onnxruntime.
                first = np.take_along_axis(
                    blocks, np.argmax(np.abs(blocks), axis=-1)[..., None], axis=-1
                )
                scales = first[..., 0] / np.float32(centered.min())
            else:
                scales = magnitude / np.float32(centered.max())
            return _rounded(scales, scale_dtype), default_zero
        lowest, highest = np.minimum(lowest, 0), np.maximum(highest, 0)
        levels = np.float32((1 << self.bits) - 1)
        scales = _rounded((highest - lowest) / levels, scale_dtype)
        with np.errstate(divide="ignore", invalid="ignore"):
            zeros = np.where(scales != 0, np.rint(-lowest / scales), np.float32(0))
        return scales, np.clip(zeros, 0, levels).astype(np.uint8)

    def _nearest_codes(self, rows: Array, block_size: int, scales: Array, zeros: Array) -> Array:
        """The code nearest to each weight, uint8 [R, K]; that of 0 where the scale is 0."""
        k = rows.shape[-1]
        repeats = block_size or k
        scale = np.repeat(scales, repeats, axis=-1)[:, :k]
        zero = np.repeat(zeros, repeats, axis=-1)[:, :k].astype(np.float32)
        return self._nearest(rows, scale, zero if self._is_integer() else None)

    def _nearest(self, weights: Array, scales: Array, zeros: Array | None = None) -> Array:
        """The code nearest to each weight, all three of one shape; that of 0 where the scale is."""
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            wanted = np.where(scales != 0, weights / scales, np.float32(0))
        return self._encode(wanted if zeros is None else wanted + zeros)

    def _is_integer(self) -> bool:
        """Whether codes decode to themselves, so that a zero point is a code too."""
        return bool(np.array_equal(self.values, np.arange(1 << self.bits)))

    def _encode(self, wanted: Array) -> Array:
        """The code whose value is nearest to each wanted one; of two equally near, the even."""
        if self._is_integer():
            return np.clip(np.rint(wanted), 0, (1 << self.bits) - 1).astype(np.uint8)
        ordered, order = np.unique(self.values, return_index=True)  # equal values: the first code
        ordered = ordered[np.isfinite(ordered)]
        right = np.clip(np.searchsorted(ordered, wanted), 1, len(ordered) - 1)
        below, above = wanted - ordered[right - 1], ordered[right] - wanted
        take_right = (above < below) | ((above == below) & (order[right] % 2 == 0))
        return order[np.where(take_right, right, right - 1)].astype(np.uint8)


def _largest_of_blocks(magnitudes: Array, height: int, width: int) -> Array:
    """The largest of each block of a matrix [..., N, K], partial ones too: [..., N / h, K / w]."""
    *lead, n, k = magnitudes.shape
    rows, columns = -(-n // height), -(-k // width)
    padded = np.zeros((*lead, rows * height, columns * width), dtype=magnitudes.dtype)
    padded[..., :n, :k] = magnitudes
    blocks: Array = padded.reshape(*lead, rows, height, columns, width).max(axis=(-3, -1))
    return blocks


def _rounded(values: Array, dtype: npt.DTypeLike) -> Array:
    """Rounds to `dtype` and back to float32."""
    return values.astype(dtype).astype(np.float32)
