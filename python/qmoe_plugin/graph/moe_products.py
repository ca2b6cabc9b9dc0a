"""Matrix products with constant weights, seen through what exporters put around these."""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qmoe_plugin.graph.describe import STOCK_DOMAIN, UnsupportedError, describe
from qmoe_plugin.graph.external_data import raw_bytes
from qmoe_plugin.graph.inputs import FLOATS, constant_tensor, given, integer, real
from qmoe_plugin.graph.matmul_nbits import FORMAT_ATTRIBUTE
from qmoe_plugin.graph.packed import LAYOUT_ATTRIBUTE
from qmoe_plugin.library import DOMAIN

Array = npt.NDArray[Any]

_G_IDX, _NBITS_BIAS = 4, 5  # input numbers of MatMulNBits


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
class Product(abc.ABC):
    """A product with constant weights: of one expert, or of a stack of them.

    Attributes:
        node: The node.
        activations: Its other operand.
        n: Rows of its weights.
        k: Columns.
        bias: What is added to it, and where that is in a stack.
        result: With the bias.
    """

    node: ir.Node
    activations: ir.Value
    n: int
    k: int
    bias: Source | None
    result: ir.Value

    @property
    @abc.abstractmethod
    def dtype(self) -> np.dtype[Any]:
        """Type of the activations."""

    @property
    @abc.abstractmethod
    def kind(self) -> tuple[object, ...]:
        """What the products of all experts must have in common."""

    @property
    @abc.abstractmethod
    def attributes(self) -> dict[str, int | str]:
        """What a node QMoE says of such weights; nothing if it is MoE."""

    @abc.abstractmethod
    def rows(self, expert: int) -> dict[str, Array]:
        """The weights of an expert, where this is a stack, else its own, [N, ...] each.

        That is "weights", and "scales" and "zero_points" of quantised ones.
        """

    @property
    def stack(self) -> int:
        """How many matrices it multiplies with; 0 for a single one."""
        return 0

    @property
    def place(self) -> int | None:
        """Which matrix of a stack it is; None if it is of all, or not of a stack."""
        return None

    def bias_row(self, expert: int) -> Array:
        """Its bias [N], or that of an expert; zeros if it has none."""
        if self.bias is None:
            return np.zeros(self.n, self.dtype)
        values = self.bias.tensor.numpy()
        if values.size == self.n:
            return values.reshape(self.n)
        row: Array = values.reshape(-1, self.n)[
            expert if self.bias.index is None else self.bias.index
        ]
        return row


@dataclass(frozen=True, eq=False)
class FloatProduct(Product):
    """MatMul or Gemm.

    Attributes:
        source: The weights: a matrix, or a stack of them.
        transposed: Whether matrices are [K, N], not [N, K].
    """

    source: Source
    transposed: bool

    @property
    def attributes(self) -> dict[str, int | str]:
        """Nothing, as it becomes part of a MoE."""
        return {}

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the activations."""
        return np.dtype(self.source.tensor.dtype.numpy())

    @property
    def kind(self) -> tuple[object, ...]:
        """What the products of all experts must have in common."""
        return (self.dtype,)

    @property
    def stack(self) -> int:
        """How many matrices it multiplies with; 0 for a single one."""
        shape = self.source.tensor.shape.numpy()
        return shape[0] if len(shape) == 3 and self.source.index is None else 0

    @property
    def place(self) -> int | None:
        """Which matrix of a stack it is; None if it is of all, or not of a stack."""
        return self.source.index

    def rows(self, expert: int) -> dict[str, Array]:
        """The weights [N, K] of an expert."""
        tensor = self.source.tensor
        *lead, a, b = tensor.shape.numpy()
        place = (expert if self.source.index is None else self.source.index) if lead else 0
        size = tensor.nbytes // math.prod(lead)
        raw = raw_bytes(tensor, place * size, size)
        matrix: Array = raw.view(tensor.dtype.numpy()).reshape(a, b)
        return {"weights": matrix.T if self.transposed else matrix}


@dataclass(frozen=True, eq=False)
class QuantizedProduct(Product):
    """MatMulNBits with integers.

    Attributes:
        bits: Of a code.
        block_size: Columns that share a scale.
        accuracy_level: What activations may be rounded to.
        codes: uint8 [N, blocks, bytes].
        scales: [N, blocks] or flat.
        zero_points: Packed along blocks, [N, bytes] or flat; None if there are none.
    """

    bits: int
    block_size: int
    accuracy_level: int
    codes: ir.TensorProtocol
    scales: ir.TensorProtocol
    zero_points: ir.TensorProtocol | None

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the activations."""
        return np.dtype(self.scales.dtype.numpy())

    @property
    def kind(self) -> tuple[object, ...]:
        """What the products of all experts must have in common."""
        zeros = self.zero_points is not None
        return (self.dtype, self.bits, self.block_size, self.accuracy_level, zeros)

    @property
    def attributes(self) -> dict[str, int | str]:
        """What a node QMoE says of such weights."""
        said: dict[str, int | str] = {"expert_weight_bits": self.bits, "quant_type": "int"}
        said |= {"block_size": self.block_size, "weights_prepacked": 0}
        return said | ({"accuracy_level": self.accuracy_level} if self.accuracy_level else {})

    def rows(self, expert: int) -> dict[str, Array]:
        """Codes [N, bytes], scales [N, blocks] and zero points [N, bytes]."""
        found = {"weights": self.codes, "scales": self.scales, "zero_points": self.zero_points}
        return {
            name: tensor.numpy().reshape(self.n, -1)
            for name, tensor in found.items()
            if tensor is not None
        }


def product_of(node: ir.Node) -> Product | None:
    """The product that a node is; None if it is none with weights."""
    if node.domain in (STOCK_DOMAIN, DOMAIN) and node.op_type == "MatMulNBits":
        return _quantized(node)
    if node.domain != "" or node.op_type not in ("MatMul", "Gemm"):
        return None
    for place in (1, 0):
        operand, other = node.inputs[place], node.inputs[1 - place]
        if operand is None or other is None:
            continue
        source = _source(operand)
        if source is None or source.tensor.dtype not in FLOATS:
            continue
        shape = source.tensor.shape.numpy()
        if len(shape) not in (2, 3) or 0 in shape:
            return None
        columns_first = place == 1  # as MatMul has its right operand, [K, N]
        if node.op_type == "Gemm":
            if place == 0 or not _is_plain_gemm(node):
                return None
            columns_first = not integer(node, "transB", 0)
        transposed = columns_first != source.swapped
        n, k = (shape[-1], shape[-2]) if transposed else (shape[-2], shape[-1])
        c = node.inputs[2] if node.op_type == "Gemm" and given(node, 2) else None
        bias, result = _bias(node, n, c)
        return FloatProduct(node, other, n, k, bias, result, source, transposed)
    return None


def _quantized(node: ir.Node) -> QuantizedProduct | None:
    """The product that a MatMulNBits with integers is; None if it is another one."""
    other = (FORMAT_ATTRIBUTE, LAYOUT_ATTRIBUTE, "weight_prepacked")
    if any(name in node.attributes for name in other) or given(node, _G_IDX):
        return None
    try:
        describe(node)
        codes, scales, zeros = (constant_tensor(node, i, "weights") for i in (1, 2, 3))
    except UnsupportedError:
        return None
    activations = node.inputs[0]
    if activations is None or codes is None or scales is None:
        return None
    n, k, bits, block = (integer(node, name, 0) for name in ("N", "K", "bits", "block_size"))
    packed = -(-k // block * bits // 8) * n
    if k % block or (zeros is not None and (zeros.dtype, zeros.size) != (codes.dtype, packed)):
        return None
    c = node.inputs[_NBITS_BIAS] if given(node, _NBITS_BIAS) else None
    bias, result = _bias(node, n, c)
    level = integer(node, "accuracy_level", 0)
    return QuantizedProduct(
        node, activations, n, k, bias, result, bits or 4, block, level, codes, scales, zeros
    )


def _is_plain_gemm(node: ir.Node) -> bool:
    factors = (real(node, "alpha", 1.0), real(node, "beta", 1.0) if given(node, 2) else 1.0)
    return factors == (1.0, 1.0) and not integer(node, "transA", 0)


def _bias(node: ir.Node, n: int, own: ir.Value | None) -> tuple[Source | None, ir.Value]:
    """The constant row that is added to a product, by itself or by an Add, and the sum."""
    result = node.outputs[0]
    if own is not None:
        return _source(own), result
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
