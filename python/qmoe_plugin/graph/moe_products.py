"""Matrix products with constant weights, seen through what exporters put around these."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt
import onnx_ir as ir

from qmoe_plugin.graph.external_data import raw_bytes
from qmoe_plugin.graph.inputs import FLOATS, given, integer, real

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Source:
    """Where a computed weight or bias comes from.

    Attributes:
        tensor: The constant.
        swapped: Whether its last two axes changed places on the way.
        index: Which matrix of a stack was taken; None for the tensor as a whole, or by a number
            that the model computes.
    """

    tensor: ir.TensorProtocol
    swapped: bool = False
    index: int | None = None


@dataclass(frozen=True, eq=False)
class Product:
    """MatMul or Gemm with constant weights: of one expert, or of a stack of them.

    Attributes:
        node: The node.
        activations: Its other operand.
        tensor: The weights: a matrix, or a stack of them.
        transposed: Whether matrices are [K, N], not [N, K].
        index: Which matrix of a stack it is; None if it is of all, or not of a stack.
        bias: What is added to it, and where that is in a stack.
        result: With the bias.
    """

    node: ir.Node
    activations: ir.Value
    tensor: ir.TensorProtocol = field(repr=False)
    transposed: bool
    index: int | None
    bias: Source | None
    result: ir.Value

    @property
    def stack(self) -> int:
        """How many matrices it multiplies with; 0 for a single one."""
        shape = self.tensor.shape.numpy()
        return shape[0] if len(shape) == 3 and self.index is None else 0

    @property
    def n(self) -> int:
        """Rows."""
        return int(self.tensor.shape.numpy()[-1 if self.transposed else -2])

    @property
    def k(self) -> int:
        """Columns."""
        return int(self.tensor.shape.numpy()[-2 if self.transposed else -1])

    def matrix(self, expert: int) -> Array:
        """The weights [N, K] of an expert, where this is a stack; else its own."""
        shape = self.tensor.shape.numpy()
        place = (expert if self.index is None else self.index) if len(shape) == 3 else 0
        size = self.tensor.nbytes // (shape[0] if len(shape) == 3 else 1)
        raw = raw_bytes(self.tensor, place * size, size)
        matrix: Array = raw.view(self.tensor.dtype.numpy()).reshape(shape[-2:])
        return matrix.T if self.transposed else matrix

    def bias_row(self, expert: int) -> Array | None:
        """Its bias [N], or that of an expert; None if it has none."""
        if self.bias is None:
            return None
        values = self.bias.tensor.numpy()
        if values.size == self.n:
            return values.reshape(self.n)
        place = expert if self.bias.index is None else self.bias.index
        row: Array = values.reshape(-1, self.n)[place]
        return row


def product_of(node: ir.Node) -> Product | None:
    """The product that a node is; None if it is none with weights."""
    if node.domain != "" or node.op_type not in ("MatMul", "Gemm"):
        return None
    for place in (1, 0):
        operand, other = node.inputs[place], node.inputs[1 - place]
        if operand is None or other is None:
            continue
        source = _source(operand)
        if source is None or source.tensor.dtype not in FLOATS:
            continue
        if len(source.tensor.shape) not in (2, 3) or 0 in source.tensor.shape.numpy():
            return None
        columns_first = place == 1  # as MatMul has its right operand, [K, N]
        if node.op_type == "Gemm":
            if place == 0 or not _is_plain_gemm(node):
                return None
            columns_first = not integer(node, "transB", 0)
        transposed = columns_first != source.swapped
        n = source.tensor.shape.numpy()[-1 if transposed else -2]
        bias, result = _bias(node, n)
        return Product(node, other, source.tensor, transposed, source.index, bias, result)
    return None


def _is_plain_gemm(node: ir.Node) -> bool:
    factors = (real(node, "alpha", 1.0), real(node, "beta", 1.0) if given(node, 2) else 1.0)
    return factors == (1.0, 1.0) and not integer(node, "transA", 0)


def _bias(node: ir.Node, n: int) -> tuple[Source | None, ir.Value]:
    """The constant row that is added to a product, and the sum."""
    result = node.outputs[0]
    if node.op_type == "Gemm" and given(node, 2) and node.inputs[2] is not None:
        return _source(node.inputs[2]), result
    user = _only_user(result)
    if user is not None and user.op_type == "Squeeze":
        result = user.outputs[0]
        user = _only_user(result)
    if user is None or user.op_type != "Add":
        return None, result
    for value in user.inputs:
        source = None if value is None or value is result else _source(value)
        if source is None or source.tensor.dtype not in FLOATS:
            continue
        shape = source.tensor.shape.numpy()
        if shape and shape[-1] == n and math.prod(shape) > 1:
            return source, user.outputs[0]
    return None, result


def _only_user(value: ir.Value) -> ir.Node | None:
    users = {user for user, _ in value.uses()}
    user = next(iter(users)) if len(users) == 1 and not value.is_graph_output() else None
    return user if user is not None and user.domain == "" else None


def _source(value: ir.Value) -> Source | None:
    """The constant that a value is, or is taken from; None if it is computed otherwise."""
    swapped, index = False, None
    current: ir.Value | None = value
    while current is not None:
        producer = current.producer()
        if producer is None or producer.op_type == "Constant":
            tensor = _constant(current)
            return None if tensor is None else Source(tensor, swapped, index)
        if producer.domain != "":
            return None
        if producer.op_type == "Transpose":
            perm = producer.attributes.get("perm")
            axes = None if perm is None else list(perm.as_ints())
            if axes not in (None, [1, 0], [0, 2, 1]):
                return None
            swapped = not swapped
        elif producer.op_type == "Gather":
            if integer(producer, "axis", 0) != 0 or index is not None:
                return None
            index = _single_number(producer.inputs[1])
        elif producer.op_type == "Split":
            if integer(producer, "axis", 0) != 0 or index is not None:
                return None
            index = current.index()
        elif producer.op_type not in ("Identity", "Cast", "Squeeze", "Unsqueeze", "GatherND"):
            return None
        current = producer.inputs[0]
    return None


def _constant(value: ir.Value) -> ir.TensorProtocol | None:
    producer = value.producer()
    if producer is not None:
        attribute = producer.attributes.get("value")
        known = attribute is not None and attribute.type is ir.AttributeType.TENSOR
        return attribute.as_tensor() if known and attribute is not None else None
    return value.const_value if value.is_initializer() and not value.is_graph_input() else None


def _single_number(value: ir.Value | None) -> int | None:
    """The number that a constant is; None if it is computed, or several."""
    tensor = None if value is None else _constant(value)
    if tensor is None or math.prod(tensor.shape.numpy()) != 1:
        return None
    return int(tensor.numpy().reshape(-1)[0])
