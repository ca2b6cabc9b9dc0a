"""Finds the matrix products that decide the routing of a Mixture of Experts.

Rounding their weights to few bits makes a token go to another expert, which no later layer makes
good. They are a thousandth of a model's weights, so there is nothing to gain.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from qmoe_plugin.graph.describe import STOCK_DOMAIN
from qmoe_plugin.graph.inputs import given, integer
from qmoe_plugin.graph.walk import Body
from qmoe_plugin.library import DOMAIN

ROUTER = "it computes router logits, and rounding them changes which experts are chosen"
GATE = "it computes the gate of a shared expert, one number a token"

_PRODUCTS = ("MatMul", "Gemm")

# Inputs of MoE and QMoE with logits or weights of experts.
_ROUTING_INPUTS = {"MoE": (1,), "QMoE": (1, 14)}

# fmt: off
_FROM_LOGITS = frozenset((
    "Abs", "Add", "Cast", "Clip", "Concat", "Div", "Exp", "Expand", "Flatten", "Gather",
    "GatherElements", "Identity", "Log", "LogSoftmax", "Max", "Min", "Mul", "Neg", "Pow",
    "ReduceMax", "ReduceSum", "Reshape", "ScatterElements", "Sigmoid", "Slice", "Softmax",
    "Softplus", "Split", "Sqrt", "Squeeze", "Sub", "Tanh", "TopK", "Transpose", "Unsqueeze",
    "Where",
))
# fmt: on
"""What lies between logits and the choice of experts, biases and groups of experts included."""

_FROM_GATE = frozenset(["Add", "Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze"])


def routing_products(body: Body) -> dict[ir.Node, str]:
    """The MatMul and Gemm nodes that decide the routing, each with the reason."""
    found: dict[ir.Node, str] = {}
    for node in body.nodes():
        for value in _routing_inputs(node):
            found |= dict.fromkeys(_products_before(value, _FROM_LOGITS), ROUTER)
    for node in body.nodes():
        if node.domain == "" and node.op_type == "Sigmoid":
            for product in _products_before(node.inputs[0], _FROM_GATE):
                if _columns(product) == 1:
                    found.setdefault(product, GATE)
    return found


def products_before_scores(topk: ir.Node) -> list[ir.Node]:
    """The MatMul, Gemm and MatMulNBits nodes that a TopK's scores come from."""
    return list(_products_before(topk.inputs[0], _FROM_LOGITS, quantized=True))


def routed_size(moe: ir.Node) -> int | None:
    """Length of what the router of a MoE or QMoE multiplies; None if the model does not say."""
    products = _products_before(moe.inputs[1], _FROM_LOGITS, quantized=True)
    sizes = {_sizes(product)[0] for product in products}
    return sizes.pop() if len(sizes) == 1 else None


def _routing_inputs(node: ir.Node) -> Iterator[ir.Value | None]:
    if node.domain == "" and node.op_type == "TopK":
        yield node.inputs[0]
    elif node.domain in (STOCK_DOMAIN, DOMAIN):
        for index in _ROUTING_INPUTS.get(node.op_type, ()):
            if given(node, index):
                yield node.inputs[index]


def _products_before(
    value: ir.Value | None, through: frozenset[str], *, quantized: bool = False
) -> Iterator[ir.Node]:
    """The nearest matrix products that a value is computed from, through these ops only."""
    waiting, seen = [value], set()
    while waiting:
        current = waiting.pop()
        node = None if current is None else current.producer()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.domain != "":
            if quantized and node.op_type == "MatMulNBits":
                yield node
            continue
        if node.op_type in _PRODUCTS:
            yield node
        elif node.op_type in through:
            waiting += node.inputs


def _columns(product: ir.Node) -> int | None:
    """How many numbers a product gives for each token; None if the model does not say."""
    return _sizes(product)[1]


def _sizes(product: ir.Node) -> tuple[int | None, int | None]:
    """K and N of a product of activations with weights; None where the model does not say."""
    if product.op_type == "MatMulNBits":
        return integer(product, "K", 0) or None, integer(product, "N", 0) or None
    weights = product.inputs[1]
    if weights is None or weights.shape is None or len(weights.shape) != 2:
        return None, None
    k, n = (size if isinstance(size, int) else None for size in weights.shape)
    transposed = "transB" in product.attributes and product.attributes["transB"].as_int()
    return (n, k) if transposed else (k, n)
