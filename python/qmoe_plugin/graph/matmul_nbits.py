"""Describes a MatMulNBits node."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from qmoe_plugin import formats
from qmoe_plugin.graph.attributes import INT, REQUIRED_INT, default
from qmoe_plugin.graph.describe import Description, UnsupportedError
from qmoe_plugin.graph.formats import find_format, named_format
from qmoe_plugin.graph.inputs import (
    FLOATS,
    Constant,
    accuracy_level,
    activation_dtype,
    constant,
    has,
    integer,
    known_attributes,
    known_inputs,
    required,
)
from qmoe_plugin.graph.layouts import NAMES, refuse_layout
from qmoe_plugin.graph.packed import (
    LAYOUT_ATTRIBUTE,
    is_packed,
    read_packed,
    refuse_other_inputs,
    refuse_other_layouts,
    refuse_stock_layout,
)
from qmoe_plugin.graph.projections import check_code_type, check_zero_points
from qmoe_plugin.graph.scales import (
    check_block_size,
    check_codebook,
    check_global_scale,
    check_scale_type,
)
from qmoe_plugin.kernels import Problem

STOCK_ATTRIBUTES = {
    "K": REQUIRED_INT,
    "N": REQUIRED_INT,
    "accuracy_level": default(0),
    "bits": INT,
    "block_size": REQUIRED_INT,
    "weight_prepacked": default(0),
}
"""The attributes of com.microsoft MatMulNBits in onnxruntime 1.32.0."""

STOCK_INPUTS = ("A", "B", "scales", "zero_points", "g_idx", "bias")
"""Its inputs there."""

FORMAT_ATTRIBUTE = "weight_format"
"""An attribute of ours that com.microsoft does not have: the name of a format."""

ATTRIBUTES = {**STOCK_ATTRIBUTES, FORMAT_ATTRIBUTE: default(""), LAYOUT_ATTRIBUTE: default("")}
"""The attributes of ours."""

INPUTS = (*STOCK_INPUTS, "codebook", "global_scale")
"""The inputs of ours."""


def describe_matmul_nbits(node: ir.Node) -> Description:
    """Describes a MatMulNBits node.

    Raises:
        UnsupportedError: If our op cannot run it.
    """
    known_attributes(node, ATTRIBUTES)
    known_inputs(node, len(INPUTS))
    n, k, block_size = (integer(node, name, 0) for name in ("N", "K", "block_size"))
    if n < 1 or k < 1:
        raise UnsupportedError(f"N is {n} and K is {k}; both must be given and positive")
    fmt = _format(node)
    one_scale = fmt.square_blocks and block_size == 0 and has(node, "block_size")
    if not one_scale:
        check_block_size(block_size)
    if fmt.only_block_size not in (None, block_size):
        raise UnsupportedError(
            f"block_size is {block_size}; {fmt.name} has blocks of {fmt.only_block_size}"
        )
    if is_packed(node):
        return _describe_packed(node, fmt, n, k, block_size)
    refuse_other_layouts(node)
    _check_layout(integer(node, "weight_prepacked", 0), n, k, fmt.bits, block_size)
    groups = fmt.groups(k, block_size)
    codes = required(node, 1, "B")
    scales = constant(node, 2, "scales") if one_scale else required(node, 2, "scales")
    zero_points, bias = constant(node, 3, "zero_points"), constant(node, 5, "bias")
    group_index = constant(node, 4, "g_idx")

    expected = (n, groups, (block_size or k) * fmt.bits // 8)
    check_code_type(codes, fmt)
    if codes.shape != expected:
        raise UnsupportedError(
            f"{codes} must be uint8{list(expected)} = [N, blocks, block_size * bits / 8]"
        )
    if one_scale:
        _refuse_blocks(fmt, scales, group_index)
    elif scales is not None:
        _check_scales(fmt, scales, n, groups, block_size)
    check_codebook(node, INPUTS.index("codebook"), fmt)
    check_global_scale(node, INPUTS.index("global_scale"), fmt, block_size, 1)
    if zero_points is not None:
        check_zero_points(_by_row(zero_points, n), fmt, (n, groups), block_size)
    if group_index is not None and (
        group_index.dtype is not ir.DataType.INT32
        or group_index.shape not in {(k,), (groups * block_size,)}
    ):
        raise UnsupportedError(f"{group_index} must be int32{[k]}")
    if bias is not None and (bias.dtype not in FLOATS or bias.shape != (n,)):
        raise UnsupportedError(f"{bias} must be a float tensor of shape {[n]}")

    gemm = Problem(
        stage="dense",
        format=fmt.name,
        n=n,
        k=k,
        dtype=activation_dtype(node, bias, scales),
        block_size=block_size,
        zero_points=zero_points is not None,
        accuracy_level=accuracy_level(node),
    )
    return Description((gemm,))


def _describe_packed(
    node: ir.Node, fmt: formats.Format, n: int, k: int, block_size: int
) -> Description:
    """Describes a node that `qmoe_plugin.prepack` packed."""
    refuse_other_inputs(node, (0, 1))
    refuse_stock_layout(node, "weight_prepacked", 0)
    weights = read_packed(node, 1, "B", fmt, block_size)
    weights.check_matrix(1, n, k, gated=False, scaled=False)
    gemm = Problem(
        stage="dense",
        format=fmt.name,
        n=n,
        k=k,
        dtype=activation_dtype(node),
        block_size=block_size,
        zero_points=weights.zero_points,
        accuracy_level=accuracy_level(node),
    )
    return Description((gemm,), packed=(weights,))


def _format(node: ir.Node) -> formats.Format:
    """The format that weight_format names, or the integer one of so many bits."""
    bits = integer(node, "bits", 0) if has(node, "bits") else None
    named = named_format(node, FORMAT_ATTRIBUTE, bits)
    if named is None:
        return find_format("int", bits)
    prepacked = integer(node, "weight_prepacked", 0)
    if prepacked:
        raise UnsupportedError(
            f"weight_prepacked is {prepacked}, which belongs to the integers that bits says, not "
            f"to {FORMAT_ATTRIBUTE} '{named.name}'"
        )
    return named


def _check_scales(
    fmt: formats.Format, scales: Constant, n: int, groups: int, block_size: int
) -> None:
    check_scale_type(fmt, scales)
    rows = -(-n // block_size) if fmt.square_blocks else n
    if _by_row(scales, rows).shape != (rows, groups):
        raise UnsupportedError(f"{scales} must have shape {[rows, groups]}")


def _refuse_blocks(
    fmt: formats.Format, scales: Constant | None, group_index: Constant | None
) -> None:
    """Refuses what belongs to blocks where a global scale is all."""
    for tensor in (scales, group_index):
        if tensor is not None:
            raise UnsupportedError(
                f"{tensor}: {fmt.name} with block_size 0 has no blocks, only a factor on all "
                "weights; leave it out, or set block_size"
            )


_LAYOUTS = ("raw", "fpa_intb", "fpa_intb90")  # by weight_prepacked


def _check_layout(prepacked: int, n: int, k: int, bits: int, block_size: int) -> None:
    if prepacked not in (0, 1, 2):
        raise UnsupportedError(f"weight_prepacked is {prepacked}; allowed are 0, 1 and 2")
    layout = _LAYOUTS[prepacked]
    refusal = refuse_layout(layout, n, k, bits)
    if prepacked and k % block_size:
        refusal = f"it has no partial blocks, and K is {k} and block_size {block_size}"
    if refusal:
        raise UnsupportedError(
            f"weight_prepacked is {prepacked}, but B cannot be {NAMES[layout]}: {refusal}"
        )


def _by_row(tensor: Constant, n: int) -> Constant:
    """The tensor as [N, x]; older exporters wrote it flat."""
    if len(tensor.shape) == 1 and tensor.shape[0] > 0 and tensor.shape[0] % n == 0:
        return dataclasses.replace(tensor, shape=(n, tensor.shape[0] // n))
    return tensor
