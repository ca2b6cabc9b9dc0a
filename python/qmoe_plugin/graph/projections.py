"""Checks of one quantised matrix per expert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from qmoe_plugin import formats
from qmoe_plugin.graph.describe import UnsupportedError
from qmoe_plugin.graph.inputs import FLOATS, Constant, constant, required
from qmoe_plugin.graph.scales import ScalePlan, check_scales

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Tensors:
    """The tensors of a projection of a QMoE node: types and shapes only.

    Attributes:
        name: "fc1", "fc2" or "fc3".
        plan: Its scales, and its format.
        codes: [E, N, K * bits / 8], or [E, K, N * bits / 8] in other layouts than raw.
        scales: As the format has them; None if there is a factor an expert only.
        zero_points: Optional.
        bias: Optional, [E, N].
    """

    name: str
    plan: ScalePlan
    codes: Constant
    scales: Constant | None
    zero_points: Constant | None
    bias: Constant | None


@dataclass(frozen=True)
class Projection:
    """The tensors of a projection, taken for a matrix [n, k] for each of the experts."""

    tensors: Tensors
    experts: int
    n: int
    k: int

    def check(self) -> None:
        """Refuses tensors that do not fit together."""
        t, plan, fmt = self.tensors, self.tensors.plan, self.tensors.plan.format
        check_columns(t.name, self.k, plan)
        if t.scales is not None:
            shape = plan.shape(self.experts, self.n, self.k)
            _require_shape(t.scales, float_shapes(shape), "[experts, rows, blocks]")
        check_code_type(t.codes, fmt)
        if t.bias is not None:
            _require_shape(t.bias, {(self.experts, self.n)}, "[experts, rows]")
        if t.zero_points is not None:
            groups = fmt.groups(self.k, plan.block_size)
            check_zero_points(t.zero_points, fmt, (self.experts, self.n, groups), plan.block_size)


def check_columns(name: str, k: int, plan: ScalePlan) -> None:
    """Refuses a row that does not end with a block."""
    if k % 8 or k % plan.unit:
        raise UnsupportedError(
            f"{name} has {k} columns; they must be a multiple of {plan.unit}"
            + ("" if plan.unit == 8 else ", the block size")
        )


def check_code_type(codes: Constant, fmt: formats.Format) -> None:
    """Refuses codes that are no bytes; e4m3 ones may be called what they are."""
    is_float8 = fmt.name == "fp8_e4m3" and codes.dtype is ir.DataType.FLOAT8E4M3FN
    if codes.dtype is not ir.DataType.UINT8 and not is_float8:
        raise UnsupportedError(f"{codes} must be uint8 for format {fmt.name}")


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


def read_tensors(node: ir.Node, name: str, plan: ScalePlan, indices: Sequence[int]) -> Tensors:
    """Reads the tensors of a projection.

    Args:
        node: The QMoE node.
        name: "fc1", "fc2" or "fc3".
        plan: What scales there must be.
        indices: Input numbers of weights, scales, bias and zero points.
    """
    codes = required(node, indices[0], f"{name} weights")
    scales = constant(node, indices[1], f"{name} scales")
    check_scales(plan, scales, name)
    bias = constant(node, indices[2], f"{name} bias")
    if bias is not None and bias.dtype not in FLOATS:
        raise UnsupportedError(f"{bias} must be float32, float16 or bfloat16")
    zero_points = constant(node, indices[3], f"{name} zero points")
    if len(codes.shape) != 3 or 0 in codes.shape:
        raise UnsupportedError(f"{codes} must have three dimensions, none of them 0")
    return Tensors(name, plan, codes, scales, zero_points, bias)
