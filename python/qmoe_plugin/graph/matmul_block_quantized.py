"""Describes MatMulBlockQuantizedFp8Weight and MatMulBlockQuantizedFp4Weight nodes.

They are MatMulNBits with other formats: fp8_e4m3 with a float scale for each block of a row, and
nvfp4.
"""

from __future__ import annotations

import onnx_ir as ir

from qmoe_plugin import formats
from qmoe_plugin.graph.attributes import INT, STRING, Attribute, default
from qmoe_plugin.graph.describe import Description, UnsupportedError
from qmoe_plugin.graph.inputs import (
    FLOATS,
    Constant,
    activation_dtype,
    constant,
    given,
    has,
    integer,
    known_attributes,
    known_inputs,
    required,
)
from qmoe_plugin.graph.packed import (
    LAYOUT_ATTRIBUTE,
    is_packed,
    read_packed,
    refuse_other_inputs,
    refuse_other_layouts,
)
from qmoe_plugin.graph.projections import float_shapes
from qmoe_plugin.graph.scales import check_block_size
from qmoe_plugin.kernels import Problem

FP8_STOCK_ATTRIBUTES = {"block_size": default(128)}
FP4_STOCK_ATTRIBUTES = {"block_size": default(16)}
"""The attributes in onnxruntime 1.32.0."""

FP8_STOCK_INPUTS = ("A", "B", "b_scale", "a_scale", "bias")
"""The inputs of MatMulBlockQuantizedFp8Weight there."""

FP4_STOCK_INPUTS = ("A", "B", "weight_scale", "weight_scale_2", "input_scale", "bias")
"""The inputs of MatMulBlockQuantizedFp4Weight there."""

_SIZES = ("N", "K")
_OWN_ATTRIBUTES = {LAYOUT_ATTRIBUTE: STRING, **dict.fromkeys(_SIZES, INT)}

FP8_ATTRIBUTES = {**FP8_STOCK_ATTRIBUTES, **_OWN_ATTRIBUTES}
FP4_ATTRIBUTES = {**FP4_STOCK_ATTRIBUTES, **_OWN_ATTRIBUTES}
"""With those of ours, which packed weights have."""

_BYTES = (ir.DataType.UINT8, ir.DataType.FLOAT8E4M3FN)


def describe_fp8_weight(node: ir.Node) -> Description:
    """Describes a MatMulBlockQuantizedFp8Weight node.

    Raises:
        UnsupportedError: If our op cannot run it.
    """
    scale = constant(node, 3, "a_scale")
    if scale is not None:
        _check_scalar(scale)
    return _describe(
        node, "fp8_e4m3", FP8_ATTRIBUTES, FP8_STOCK_INPUTS, weights=_BYTES, scales=FLOATS
    )


def describe_fp4_weight(node: ir.Node) -> Description:
    """Describes a MatMulBlockQuantizedFp4Weight node.

    Raises:
        UnsupportedError: If our op cannot run it.
    """
    if not is_packed(node):
        _check_scalar(required(node, 3, "weight_scale_2"))
    input_scale = constant(node, 4, "input_scale")  # of no effect
    if input_scale is not None:
        _check_scalar(input_scale)
    weights = (ir.DataType.UINT8,)
    return _describe(
        node, "nvfp4", FP4_ATTRIBUTES, FP4_STOCK_INPUTS, weights=weights, scales=_BYTES
    )


def _describe(
    node: ir.Node,
    format_name: str,
    attributes: dict[str, Attribute],
    inputs: tuple[str, ...],
    *,
    weights: tuple[ir.DataType, ...],
    scales: tuple[ir.DataType, ...],
) -> Description:
    """The common part.

    Args:
        node: The node.
        format_name: Of the weights.
        attributes: All that the op has.
        inputs: All input names; the bias comes last.
        weights: Types that B may have.
        scales: Types that its scales may have.
    """
    known_attributes(node, attributes)
    known_inputs(node, len(inputs))
    block_size = integer(node, "block_size", int(attributes["block_size"].default or 0))
    check_block_size(block_size)
    fmt = formats.get(format_name)
    refuse_other_layouts(node)
    if is_packed(node):
        return _describe_packed(node, fmt, block_size, inputs)
    if any(has(node, name) for name in _SIZES):
        raise UnsupportedError("attributes N and K are for packed weights; leave them out")
    b, scale = required(node, 1, "B"), required(node, 2, inputs[2])
    bias = constant(node, len(inputs) - 1, "bias")
    if b.dtype not in weights or len(b.shape) != 2 or 0 in b.shape:
        names = " or ".join(dtype.name.lower() for dtype in weights)
        raise UnsupportedError(f"{b} must be {names} with two dimensions, none of them 0")
    n, k = b.shape[0], b.shape[1] * fmt.codes_per_byte
    groups = fmt.groups(k, block_size)
    if scale.dtype not in scales or scale.shape not in float_shapes((n, groups)):
        names = " or ".join(dtype.name.lower() for dtype in scales)
        raise UnsupportedError(f"{scale} must be {names}{[n, groups]} = [N, blocks]")
    if bias is not None and (bias.dtype not in FLOATS or bias.shape != (n,)):
        raise UnsupportedError(f"{bias} must be a float tensor of shape {[n]}")
    gemm = Problem(
        stage="dense",
        format=fmt.name,
        n=n,
        k=k,
        dtype=activation_dtype(node, bias),
        block_size=block_size,
    )
    return Description((gemm,))


def _describe_packed(
    node: ir.Node, fmt: formats.Format, block_size: int, inputs: tuple[str, ...]
) -> Description:
    """Describes a node that `qmoe_plugin.prepack` packed."""
    beside = {inputs.index(name) for name in ("A", "B", "a_scale", "input_scale") if name in inputs}
    refuse_other_inputs(node, beside)
    if not all(has(node, name) for name in _SIZES):
        raise UnsupportedError("packed weights need attributes N and K beside them")
    n, k = (integer(node, name, 0) for name in _SIZES)
    weights = read_packed(node, 1, "B", fmt, block_size)
    scaled = "a_scale" in inputs and given(node, inputs.index("a_scale"))
    weights.check_matrix(1, n, k, gated=False, scaled=scaled)
    gemm = Problem(
        stage="dense",
        format=fmt.name,
        n=n,
        k=k,
        dtype=activation_dtype(node),
        block_size=block_size,
    )
    return Description((gemm,), packed=(weights,))


def _check_scalar(scale: Constant) -> None:
    if scale.dtype is not ir.DataType.FLOAT or scale.shape not in {(), (1,)}:
        raise UnsupportedError(f"{scale} must be a float32 scalar")
