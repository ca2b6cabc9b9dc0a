"""Checks of one quantised matrix per expert, and of the order of its bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from qmoe_plugin import formats
from qmoe_plugin.graph.describe import UnsupportedError
from qmoe_plugin.graph.inputs import FLOATS, Constant, constant, required

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Projection:
    """A projection of a QMoE node: types and shapes only.

    Attributes:
        name: "fc1", "fc2" or "fc3".
        format: Weight format.
        codes: [E, N, K * bits / 8] as the schema has them, [E, K, N * bits / 8] if prepacked.
        scales: [E, N] or [E, N, G].
        zero_points: Optional.
        bias: Optional, [E, N].
    """

    name: str
    format: formats.Format
    codes: Constant
    scales: Constant
    zero_points: Constant | None
    bias: Constant | None

    @property
    def experts(self) -> int:
        """E."""
        return self.scales.shape[0]

    @property
    def n(self) -> int:
        """Output features. The scales know them whatever the order of the weights' bytes."""
        return self.scales.shape[1]

    def raw_shape(self, k: int) -> Shape:
        """Shape of the weights in the order of the schema."""
        return (self.experts, self.n, packed_size(k, self.format))

    def prepacked_shape(self, k: int) -> Shape:
        """Shape of the weights in the order that stock CUDA kernels read."""
        return (self.experts, k, packed_size(self.n, self.format))

    def check(self, k: int, block_size: int) -> None:
        """Refuses tensors that do not fit together; `k` is what the other projections imply."""
        shape = (self.experts, self.n, self.format.groups(k, block_size))
        _require_shape(self.scales, float_shapes(shape), "[experts, rows, blocks]")
        if self.codes.dtype is not ir.DataType.UINT8:
            raise UnsupportedError(f"{self.codes} must be uint8 for format {self.format.name}")
        if self.bias is not None:
            _require_shape(self.bias, {shape[:2]}, "[experts, rows]")
        if self.zero_points is not None:
            check_zero_points(self.zero_points, self.format, shape, block_size)


def packed_size(codes: int, fmt: formats.Format) -> int:
    """Bytes of a row of this many codes."""
    return -(-codes * fmt.bits // 8)


def float_shapes(shape: Shape) -> set[Shape]:
    """Shapes that one value a block may have: [..., N, G], or [..., N] if there is one block."""
    return {shape, shape[:-1]} if shape[-1] == 1 else {shape}


def check_zero_points(
    zero_points: Constant, fmt: formats.Format, shape: Shape, block_size: int
) -> None:
    """Refuses zero points of a shape or type that our ops do not take.

    Args:
        zero_points: The input.
        fmt: Weight format.
        shape: [..., N, G].
        block_size: 0 for one scale a row.
    """
    if not fmt.zero_points:
        raise UnsupportedError(f"{zero_points}: format {fmt.name} has no zero points")
    *lead, n, groups = shape
    allowed = float_shapes(shape)
    if zero_points.dtype is ir.DataType.UINT8:
        allowed = {*allowed, (*lead, n, packed_size(groups, fmt))}
        if block_size == 0:
            allowed.add((*lead, packed_size(n, fmt)))
    elif zero_points.dtype not in FLOATS:
        raise UnsupportedError(f"{zero_points} must be uint8 or a float type")
    _require_shape(zero_points, allowed, "packed, or one value a block")


def _require_shape(tensor: Constant, allowed: set[Shape], meaning: str) -> None:
    if tensor.shape not in allowed:
        shapes = " or ".join(str(list(shape)) for shape in sorted(allowed))
        raise UnsupportedError(f"{tensor} must have shape {shapes} ({meaning})")


def read_projection(
    node: ir.Node, name: str, fmt: formats.Format, indices: Sequence[int]
) -> Projection:
    """Reads a projection.

    Args:
        node: The QMoE node.
        name: "fc1", "fc2" or "fc3".
        fmt: Weight format.
        indices: Input numbers of weights, scales, bias and zero points.
    """
    codes = required(node, indices[0], f"{name} weights")
    scales = required(node, indices[1], f"{name} scales")
    bias = constant(node, indices[2], f"{name} bias")
    zero_points = constant(node, indices[3], f"{name} zero points")
    for tensor in (scales, bias):
        if tensor is not None and tensor.dtype not in FLOATS:
            raise UnsupportedError(
                f"{tensor} must be float32, float16 or bfloat16 for format {fmt.name}"
            )
    if len(scales.shape) not in (2, 3) or 0 in scales.shape:
        raise UnsupportedError(
            f"{scales} must have shape [experts, rows] or [experts, rows, blocks]"
        )
    return Projection(name, fmt, codes, scales, zero_points, bias)


def find_format(quant_type: str, bits: int) -> formats.Format:
    """The format of a projection with these attributes."""
    try:
        return formats.for_attributes(quant_type, bits)
    except ValueError as error:
        raise UnsupportedError(str(error)) from None


def check_block_size(block_size: int) -> None:
    """Refuses a block size that no kernel takes."""
    if not 16 <= block_size <= 65536 or block_size & (block_size - 1):
        raise UnsupportedError(
            f"block_size is {block_size}; it must be a power of two from 16 to 65536"
        )
