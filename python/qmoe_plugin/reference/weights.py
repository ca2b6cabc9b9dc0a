"""The weights of a projection, from the tensors of the node."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qmoe_plugin import formats
from qmoe_plugin.formats.scales import E2M1_VALUES, E4M3_VALUES, decode_scales

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Projection:
    """The inputs of one projection of a QMoE or MoE node, as stored, in the raw layout.

    Attributes:
        codes: uint8 (or float8_e4m3fn) [E, N, K * bits / 8], packed, lowest bits first; of a MoE
            the weights themselves, [E, N, K] in float32, float16 or bfloat16.
        scales: [E, N, G]; per channel [E, N] or [E, N, 1]; of square blocks [E, ceil(N / b),
            ceil(K / b)]. Of type e8m0 also as uint8. None if the global scale is all there is.
        zero_points: None, or as `expand_zero_points` takes them.
        bias: None or [E, N].
        global_scale: None or [E].
        codebook: None, or float [2^bits], the same for all experts.
    """

    codes: Array
    scales: Array | None
    zero_points: Array | None = None
    bias: Array | None = None
    global_scale: Array | None = None
    codebook: Array | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the codes are the weights themselves: types of more than a byte."""
        return self.codes.dtype.itemsize > 1

    def expert(self, index: int) -> Projection:
        """The same with one expert only."""

        def part(tensor: Array | None) -> Array | None:
            return None if tensor is None else tensor[index : index + 1]

        return Projection(
            self.codes[index : index + 1],
            part(self.scales),
            part(self.zero_points),
            part(self.bias),
            part(self.global_scale),
            self.codebook,
        )


def expand_zero_points(
    zero_points: Array, fmt: formats.Format, scales_shape: tuple[int, ...], block_size: int
) -> Float64:
    """One zero point a block, float64 [..., N, G].

    Args:
        zero_points: One of
            uint8 [..., N, ceil(G * bits / 8)], packed along the blocks of a row;
            uint8 [..., ceil(N * bits / 8)], packed along the rows, per channel only;
            uint8 or any float type [..., N, G], one value a block. Float zero points may have a
            fraction.
        fmt: The weight format.
        scales_shape: (..., N, G).
        block_size: 0 = per channel.
    """
    *lead, n, groups = scales_shape
    packed = (*lead, n, -(-groups * fmt.bits // 8))
    across_rows = (*lead, -(-n * fmt.bits // 8))
    if zero_points.dtype == np.uint8 and zero_points.shape == packed:
        return formats.unpack(zero_points, fmt.bits, groups).astype(np.float64)
    if zero_points.dtype == np.uint8 and block_size == 0 and zero_points.shape == across_rows:
        return formats.unpack(zero_points, fmt.bits, n).astype(np.float64).reshape(scales_shape)
    if zero_points.size == math.prod(scales_shape):
        return zero_points.astype(np.float64).reshape(scales_shape)
    raise ValueError(
        f"zero points have shape {list(zero_points.shape)}; allowed are {list(packed)} (packed), "
        f"{list(scales_shape)} (one a block) and, per channel, {list(across_rows)} (packed)"
    )


def dequantize_projection(
    projection: Projection, fmt: formats.Format, k: int, block_size: int
) -> Float64:
    """The weights of a projection: float64 [E, N, K].

    w = (value(code) - zero_point) * scale * global_scale, where those that are None play no role.

    Args:
        projection: The stored tensors.
        fmt: Their format.
        k: Columns, K.
        block_size: Codes that share a scale; 0 = one scale a row, or an expert.
    """
    experts, n = projection.codes.shape[:2]
    scales, zero_points = None, None
    if projection.codebook is not None:
        fmt = fmt.with_codebook(projection.codebook)
    shape = fmt.scale_shape(n, k, block_size)
    if shape is not None:
        if projection.scales is None:
            raise ValueError(f"{fmt.name} weights with block_size {block_size} need scales")
        shape = shape if block_size else (n, 1)
        scales = projection.scales.reshape(experts, *shape)
    if fmt.has_global_scale(block_size) and projection.global_scale is None:
        raise ValueError(f"{fmt.name} weights with block_size {block_size} need a global scale")
    if projection.zero_points is not None:
        one_a_block = (experts, n, fmt.groups(k, block_size))
        zero_points = expand_zero_points(projection.zero_points, fmt, one_a_block, block_size)
    # Per channel, the one block is as long as the row.
    return fmt.dequantize(
        projection.codes,
        scales,
        zero_points,
        k=k,
        block_size=block_size or k,
        global_scale=projection.global_scale,
    )


def matmul_nbits_weights(
    b: Array,
    scales: Array | None,
    zero_points: Array | None = None,
    g_idx: Array | None = None,
    codebook: Array | None = None,
    global_scale: Array | None = None,
    *,
    k: int,
    n: int,
    block_size: int,
    fmt: formats.Format,
) -> Float64:
    """The weights of a MatMulNBits node, float64 [N, K].

    Args:
        b: uint8 (or float8_e4m3fn) [N, G, block_size * bits / 8]; the last block may be partial and
            is then padded.
        scales: [N, G], or flat; of square blocks [ceil(N / block_size), G]. uint8 is e8m0 where the
            format has such scales. None where there is a global scale only.
        zero_points: None, uint8 packed [N, ceil(G * bits / 8)], or one value a block [N, G]; or
            flat.
        g_idx: None, or int32 [K]: the block whose scale and zero point each column takes; codes
            stay where they are.
        codebook: None or [2^bits].
        global_scale: None or [1].
        k: Attribute K, columns.
        n: Attribute N, rows.
        block_size: Codes that share a scale; 0 where there is a global scale only.
        fmt: The weight format.
    """
    groups = fmt.groups(k, block_size)
    codes = formats.unpack(b.view(np.uint8).reshape(n, -1), fmt.bits, k)
    scale = np.ones((n, groups))
    if scales is not None:
        height = block_size if fmt.square_blocks else 1
        scale = decode_scales(scales, fmt.scale_type).reshape(-1, groups)
        scale = np.repeat(scale, height, axis=0)[:n]
    zero = np.full((n, groups), fmt.default_zero_point)
    if zero_points is not None:
        zero = expand_zero_points(zero_points.reshape(n, -1), fmt, (n, groups), block_size)
    block_of = np.arange(k) // (block_size or k) if g_idx is None else g_idx.reshape(-1)[:k]
    values = fmt.values if codebook is None else fmt.with_codebook(codebook).values
    factor = 1.0 if global_scale is None else float(global_scale[0])
    return np.asarray((values[codes] - zero[:, block_of]) * scale[:, block_of] * factor)


def fp8_weights(b: Array, b_scale: Array, block_size: int) -> Float64:
    """The weights of a MatMulBlockQuantizedFp8Weight node, float64 [N, K].

    Args:
        b: float8_e4m3fn, or uint8 with the same bytes, [N, K].
        b_scale: Float, [N, ceil(K / block_size)].
        block_size: Codes along K that share a scale.
    """
    per_code = np.repeat(b_scale.astype(np.float64), block_size, axis=-1)[:, : b.shape[1]]
    return np.asarray(E4M3_VALUES[b.view(np.uint8)] * per_code)


def fp4_weights(b: Array, weight_scale: Array, weight_scale_2: Array, block_size: int) -> Float64:
    """The weights of a MatMulBlockQuantizedFp4Weight node, float64 [N, K].

    Args:
        b: uint8 [N, K / 2], e2m1 codes, the lower bits first.
        weight_scale: float8_e4m3fn, or uint8 with the same bytes, [N, ceil(K / block_size)].
        weight_scale_2: A scalar, a factor on all.
        block_size: Codes along K that share a scale.
    """
    k = 2 * b.shape[1]
    scales = E4M3_VALUES[weight_scale.view(np.uint8)] * float(weight_scale_2.reshape(()))
    per_code = np.repeat(scales, block_size, axis=-1)[:, :k]
    return np.asarray(E2M1_VALUES[formats.unpack(b, 4, k)] * per_code)
