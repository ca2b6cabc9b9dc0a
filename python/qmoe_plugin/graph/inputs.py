"""Reads attributes of a node, and types and shapes of its inputs. Never reads a weight."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import onnx_ir as ir

from qmoe_plugin.graph.describe import UnsupportedError
from qmoe_plugin.library import runtime, runtime_minor

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
"""The types that activations, scales and biases may have."""

_OUTER_CONSTANTS_SINCE = 29

_DTYPE_NAMES = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.BFLOAT16: "bfloat16",
}


@dataclass(frozen=True)
class Constant:
    """Type and shape of a constant input."""

    name: str
    dtype: ir.DataType
    shape: tuple[int, ...]

    def __str__(self) -> str:
        """As in "fc1 scales float[4, 64, 2]"."""
        return f"{self.name} {self.dtype.name.lower()}{list(self.shape)}"


def constant(node: ir.Node, index: int, name: str) -> Constant | None:
    """Type and shape of the constant at an input of a node; None if it was left out.

    Raises:
        UnsupportedError: If something that is not constant is there.
    """
    tensor = constant_tensor(node, index, name)
    return None if tensor is None else Constant(name, tensor.dtype, tuple(tensor.shape.numpy()))


def constant_tensor(node: ir.Node, index: int, name: str) -> ir.TensorProtocol | None:
    """The constant at an input of a node; None if it was left out.

    Constant is what ONNX Runtime hands to a kernel when it is made: an initializer of this graph or
    (since 1.29) of one around it, or the output of a Constant node.

    Raises:
        UnsupportedError: If something that is not constant is there.
    """
    value = node.inputs[index] if given(node, index) else None
    if value is None:
        return None
    return _constant_tensor(node, value, f"{name} (input {index}, '{value.name}')")


def required(node: ir.Node, index: int, name: str) -> Constant:
    """Like `constant`, for an input that must be there."""
    found = constant(node, index, name)
    if found is None:
        raise UnsupportedError(f"{name} (input {index}) is missing")
    return found


def given(node: ir.Node, index: int) -> bool:
    """Whether an optional input is there."""
    return index < len(node.inputs) and node.inputs[index] is not None


def has(node: ir.Node, name: str) -> bool:
    """Whether the node has an attribute of this name."""
    return name in node.attributes


def _constant_tensor(node: ir.Node, value: ir.Value, what: str) -> ir.TensorProtocol:
    if value.graph is not node.graph and runtime_minor() < _OUTER_CONSTANTS_SINCE:
        raise UnsupportedError(
            f"{what} belongs to a graph around the node's own; onnxruntime gives such weights to a "
            f"kernel since 1.{_OUTER_CONSTANTS_SINCE}, this is {runtime().__version__}"
        )
    producer = value.producer()
    if producer is not None:
        attribute = producer.attributes.get("value")
        is_constant = producer.domain == "" and producer.op_type == "Constant"
        if not is_constant or attribute is None or attribute.type is not ir.AttributeType.TENSOR:
            raise UnsupportedError(
                f"{what} is computed by {producer.op_type} '{producer.name}'; weights are packed "
                "once, so they must be initializers. Fold the constants of the model first"
            )
        return attribute.as_tensor()
    if value.is_initializer() and value.const_value is not None:
        if value.is_graph_input():
            raise UnsupportedError(
                f"{what} is an initializer and a graph input, so that callers may replace it; "
                "take it off the graph's inputs"
            )
        return value.const_value
    raise UnsupportedError(
        f"{what} is an input of the graph or function; weights are packed once, so they must be "
        "initializers"
    )


def integer(node: ir.Node, name: str, default: int) -> int:
    """An integer attribute."""
    value = _attribute(node, name, ir.AttributeType.INT)
    return default if value is None else value.as_int()


def real(node: ir.Node, name: str, default: float) -> float:
    """A float attribute."""
    value = _attribute(node, name, ir.AttributeType.FLOAT)
    return default if value is None else value.as_float()


def accuracy_level(node: ir.Node) -> int:
    """The attribute of that name, which both ops have."""
    level = integer(node, "accuracy_level", 0)
    if not 0 <= level <= 4:
        raise UnsupportedError(f"accuracy_level is {level}; allowed are 0 to 4")
    return level


def string(node: ir.Node, name: str, default: str) -> str:
    """A string attribute."""
    value = _attribute(node, name, ir.AttributeType.STRING)
    return default if value is None else value.as_string()


def _attribute(node: ir.Node, name: str, wanted: ir.AttributeType) -> ir.Attr | None:
    attribute = node.attributes.get(name)
    if attribute is None:
        return None
    if attribute.is_ref():
        raise UnsupportedError(
            f"attribute {name} is a parameter of the function that holds the node; inline the "
            "function first"
        )
    if attribute.type is not wanted:
        raise UnsupportedError(
            f"attribute {name} is {attribute.type.name}; it must be {wanted.name}"
        )
    return attribute


def float_name(dtype: ir.DataType) -> str:
    """The name of a type in `FLOATS`, which is also that of the format of such weights."""
    return _DTYPE_NAMES[dtype]


def float_type(name: str) -> ir.DataType:
    """The type in `FLOATS` of this name, as `float_name` gives it."""
    return next(dtype for dtype, known in _DTYPE_NAMES.items() if known == name)


def known_attributes(node: ir.Node, known: Iterable[str]) -> None:
    """Refuses a node with an attribute that we do not know: it may change what the node means."""
    unknown = sorted(set(node.attributes) - set(known))
    if unknown:
        raise UnsupportedError(
            f"attribute {', '.join(unknown)} is not known to {node.op_type} of this qmoe_plugin"
        )


def known_inputs(node: ir.Node, count: int) -> None:
    """Refuses a node with more inputs than these."""
    for index in range(count, len(node.inputs)):
        if given(node, index):
            raise UnsupportedError(f"input {index} is given, but the op has {count}")


def activation_dtype(node: ir.Node, *others: Constant | None) -> str:
    """Type of the activations.

    A model need not say the types of the values inside it. Then it is taken from other tensors of
    the node, which exporters write in the same type.

    Raises:
        UnsupportedError: If it is none that our ops take.
    """
    values = [*node.inputs[:1], *node.outputs[:1]]
    found = [value.dtype for value in values if value is not None and value.dtype is not None]
    found += [other.dtype for other in others if other is not None and other.dtype in FLOATS]
    if not found:
        raise UnsupportedError("neither the activations nor the scales or biases say their type")
    if found[0] not in FLOATS:
        allowed = ", ".join(_DTYPE_NAMES.values())
        raise UnsupportedError(f"activations are {found[0].name.lower()}; allowed are {allowed}")
    return _DTYPE_NAMES[found[0]]
