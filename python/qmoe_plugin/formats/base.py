"""What a quantised weight format is on the Python side, and the arithmetic all formats share.

A weight is ``w = (values[code] - zero_point) * scale``. Shapes, with G = ceil(K / block_size)
blocks along K:

==============  ==================================  =====================================
tensor          block_size > 0                      block_size = 0 (per channel)
==============  ==================================  =====================================
codes           uint8 [..., N, ceil(K*bits/8)]      the same
scales          float [..., N, G]                   float [..., N]
zero_points     uint8 [..., N, ceil(G*bits/8)]      uint8 [..., ceil(N*bits/8)]
==============  ==================================  =====================================

Codes and zero points are packed along their last axis, lowest bits first. These are the shapes of
the QMoE inputs; MatMulNBits has the same bytes with K padded to whole blocks.

The numpy code here is the specification. Where ``qmoe_plugin._native`` is built, it does the same
work faster, and the tests compare the two bit by bit.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@functools.cache
def native() -> ModuleType | None:
    """The compiled module, or None in a tree that was never built; a broken build raises."""
    try:
        return importlib.import_module("qmoe_plugin._native")
    except ModuleNotFoundError:
        return None


def pack(codes: Array, bits: int) -> Array:
    """Packs codes along the last axis, lowest bits first; the last byte is padded with zero codes.

    Args:
        codes: uint8 [..., K], each below 2^bits.
        bits: 1, 2, 4 or 8 bits a code.

    Returns:
        uint8 [..., ceil(K * bits / 8)].
    """
    codes = np.asarray(codes)
    if bits not in (1, 2, 4, 8):
        raise ValueError(f"bits is {bits}; a byte holds whole codes of 1, 2, 4 or 8 bits")
    if codes.size and (codes.min() < 0 or codes.max() >= 1 << bits):
        raise ValueError(
            f"codes lie in [{codes.min()}, {codes.max()}]; "
            f"{bits}-bit codes lie in [0, {(1 << bits) - 1}]"
        )
    codes = codes.astype(np.uint8)
    per_byte = 8 // bits
    padding = -codes.shape[-1] % per_byte
    if padding:
        codes = np.concatenate(
            [codes, np.zeros((*codes.shape[:-1], padding), dtype=np.uint8)], axis=-1
        )
    parts = codes.reshape(*codes.shape[:-1], codes.shape[-1] // per_byte, per_byte)
    packed = np.zeros(parts.shape[:-1], dtype=np.uint8)
    for i in range(per_byte):
        packed |= parts[..., i] << np.uint8(i * bits)
    return packed


def unpack(packed: Array, bits: int, k: int) -> Array:
    """Undoes `pack`.

    Args:
        packed: uint8 [..., at least ceil(k * bits / 8)].
        bits: 1, 2, 4 or 8 bits a code.
        k: How many codes to return.

    Returns:
        uint8 [..., k].
    """
    packed = np.asarray(packed)
    per_byte = 8 // bits
    if packed.dtype != np.uint8 or packed.shape[-1] * per_byte < k:
        raise ValueError(
            f"{k} codes of {bits} bits need {-(-k // per_byte)} bytes of uint8, "
            f"given {packed.dtype}{list(packed.shape)}"
        )
    shifts = (np.arange(per_byte) * bits).astype(np.uint8)
    codes = (packed[..., None] >> shifts) & np.uint8((1 << bits) - 1)
    return codes.reshape(*packed.shape[:-1], packed.shape[-1] * per_byte)[..., :k]


@dataclass(frozen=True)
class Quantized:
    """A quantised matrix, or a stack of them; shapes as in the module's docstring."""

    codes: Array
    scales: Array
    zero_points: Array | None = None


@dataclass(frozen=True)
class Format:
    """A quantised weight format. Make one in a module of its own in this folder to add it.

    Attributes:
        name: Name of the format, and of its C++ header: "int4".
        bits: Bits a code: 2, 4 or 8.
        values: What each code decodes to, float64 [2^bits].
        default_zero_point: Subtracted from the decoded code when a model gives no zero points.
        zero_points: Whether a model may give zero points.
        qmoe_attributes: Attributes of a QMoE node in this format.
        matmul_nbits_attributes: Attributes of a MatMulNBits node in this format; None if it has no
            such op.
    """

    name: str
    bits: int
    values: Array = field(repr=False)
    default_zero_point: float
    zero_points: bool
    qmoe_attributes: Mapping[str, int | str] = field(repr=False)
    matmul_nbits_attributes: Mapping[str, int] | None = field(default=None, repr=False)

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

    def groups(self, k: int, block_size: int) -> int:
        """How many blocks cover k codes; one for block_size 0 (per channel)."""
        return -(-k // block_size) if block_size else 1

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
        block_size: int,
        *,
        symmetric: bool = True,
        signed_scales: bool = True,
        scale_dtype: npt.DTypeLike = np.float32,
    ) -> Quantized:
        """Quantises by round-to-nearest.

        All arithmetic is float32, divisions included; ties go to the even code.

        Args:
            weights: [..., N, K], any float type.
            block_size: Codes along K that share a scale; 0 for one scale a row. A partial last
                block is fine.
            symmetric: Without zero points. Otherwise each block's range, widened to hold 0, is
                spread over all codes.
            signed_scales: Of a symmetric format: let the element of the largest magnitude take the
                lowest code, by a negative scale if it is positive, as onnxruntime's
                quantize_matmul_4bits does. Otherwise scales are positive and the lowest integer
                code stays unused.
            scale_dtype: Type of the scales. Codes are chosen for the scales as rounded to it.

        Returns:
            The packed codes, scales and zero points.
        """
        weights = np.asarray(weights)
        if weights.ndim < 2 or weights.shape[-1] == 0:
            raise ValueError(f"weights must be [..., N, K] with K > 0, given {list(weights.shape)}")
        if not symmetric and not self.zero_points:
            raise ValueError(f"{self.name} has no zero points; quantise it with symmetric=True")
        *lead, n, k = weights.shape
        groups = self.groups(k, block_size)
        rows = np.ascontiguousarray(weights, dtype=np.float32).reshape(-1, k)
        if not np.isfinite(rows).all():
            raise ValueError("weights must be finite, given some NaN or infinity")

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
        scales: Array,
        zero_points: Array | None = None,
        *,
        k: int,
        block_size: int,
    ) -> Array:
        """Decodes packed weights exactly.

        Args:
            codes: uint8 [..., N, ceil(k * bits / 8)] or longer.
            scales: [..., N, G], or [..., N] when block_size is 0.
            zero_points: None, or one value a block already unpacked, shaped like `scales`, any
                numeric type.
            k: Codes in a row.
            block_size: Codes that share a scale; 0 = per channel.

        Returns:
            float64 [..., N, k].
        """
        weights = self.values[unpack(codes, self.bits, k)]
        if zero_points is None:
            weights -= self.default_zero_point
        else:
            weights -= self._per_code(zero_points, k, block_size)
        weights *= self._per_code(scales, k, block_size)
        return weights

    def unpack_zero_points(self, zero_points: Array, scales_shape: tuple[int, ...]) -> Array:
        """One code a block, in the shape of the scales: [..., N, G], per channel [..., N]."""
        return unpack(zero_points, self.bits, scales_shape[-1]).reshape(scales_shape)

    def _per_code(self, per_block: Array, k: int, block_size: int) -> Array:
        """Spreads one value a block, [..., N, G] or [..., N], over its codes: [..., N, k]."""
        per_block = np.asarray(per_block).astype(np.float64)
        if not block_size:
            return np.repeat(per_block[..., None], k, axis=-1)
        return np.repeat(per_block, block_size, axis=-1)[..., :k]

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
        centered = self.values - self.default_zero_point
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
        with np.errstate(divide="ignore", invalid="ignore"):
            wanted = np.where(scale != 0, rows / scale, np.float32(0))
        return self._encode(wanted + zero if self._is_integer() else wanted)

    def _is_integer(self) -> bool:
        """Whether codes decode to themselves, so that a zero point is a code too."""
        return bool(np.array_equal(self.values, np.arange(1 << self.bits)))

    def _encode(self, wanted: Array) -> Array:
        """The code whose value is nearest to each wanted one; of two equally near, the even."""
        if self._is_integer():
            return np.clip(np.rint(wanted), 0, (1 << self.bits) - 1).astype(np.uint8)
        order = np.argsort(self.values, kind="stable")
        ordered = self.values[order]
        right = np.clip(np.searchsorted(ordered, wanted), 1, len(ordered) - 1)
        below, above = wanted - ordered[right - 1], ordered[right] - wanted
        take_right = (above < below) | ((above == below) & (order[right] % 2 == 0))
        return order[np.where(take_right, right, right - 1)].astype(np.uint8)


def _rounded(values: Array, dtype: npt.DTypeLike) -> Array:
    """Rounds to `dtype` and back to float32."""
    return values.astype(dtype).astype(np.float32)
