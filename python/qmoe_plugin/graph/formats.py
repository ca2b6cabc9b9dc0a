"""Which format the weights of each projection of a QMoE node have.

The rules are those of ops/ort/qmoe_formats.h.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from qmoe_plugin import formats
from qmoe_plugin.graph.describe import UnsupportedError
from qmoe_plugin.graph.inputs import has, integer, string

FORMAT_ATTRIBUTES = ("fc1_format", "fc2_format")
"""Attributes of ours that com.microsoft does not have; fc3 has the format of fc1."""

_STOCK_LAYOUTS = {
    "int": ("raw", "fpa_intb"),
    "fp4": ("k_major", "raw"),
    "nvfp4": ("k_major", "raw"),
    "fp8": ("raw",),
    "wfp4afp8": ("k_major", "raw"),
}
STOCK_QUANT_TYPES = tuple(_STOCK_LAYOUTS)
"""The values of quant_type that com.microsoft has; in our domain it may name any format, too."""


@dataclass(frozen=True)
class QMoEFormats:
    """The formats of a node.

    Attributes:
        fc1: That of fc3, too.
        fc2: That of fc2.
        says: What of the node says so, for messages.
        is_integer: Whether it is quant_type "int" and nothing else.
        layouts: Those that the weights may have, the customary one first.
    """

    fc1: formats.Format
    fc2: formats.Format
    says: str
    is_integer: bool
    layouts: tuple[str, ...]


def find_formats(node: ir.Node) -> QMoEFormats:
    """Reads quant_type, the format attributes and the bits of a QMoE node.

    Raises:
        UnsupportedError: For unknown names, and for bits that the formats do not have.
    """
    quant_type = string(node, "quant_type", "int")
    stock = _STOCK_LAYOUTS.get(quant_type)
    if stock is None and quant_type not in formats.FORMATS:
        allowed = ", ".join((*_STOCK_LAYOUTS, *formats.FORMATS))
        raise UnsupportedError(f"quant_type is '{quant_type}'; allowed are {allowed}")
    common = find_format(quant_type, _bits(node, "expert_weight_bits"))
    fc1_bits = _bits(node, "fc1_expert_weight_bits")
    fc3_bits = _bits(node, "fc3_expert_weight_bits")
    fc1 = _projection(node, "fc1", fc1_bits, common)
    fc2 = _projection(node, "fc2", _bits(node, "fc2_expert_weight_bits"), common)
    fc3 = _projection(node, "fc1", fc1_bits if fc3_bits is None else fc3_bits, common)
    if fc3 is not fc1:
        raise UnsupportedError(
            f"fc3 has {fc3.bits} bits and fc1 {fc1.bits}; gates and ups must have the same"
        )
    own = any(string(node, name, "") for name in FORMAT_ATTRIBUTES)
    return QMoEFormats(
        fc1,
        fc2,
        " or ".join(FORMAT_ATTRIBUTES) if own else f"quant_type '{quant_type}'",
        quant_type == "int" and not own,
        ("raw",) if own or stock is None else stock,
    )


def find_format(quant_type: str, bits: int | None) -> formats.Format:
    """The format of this type and width; bits None = what the type has, 4 for "int"."""
    try:
        return formats.for_attributes(quant_type, bits)
    except ValueError as error:
        raise UnsupportedError(str(error)) from None


def named_format(node: ir.Node, attribute: str, bits: int | None) -> formats.Format | None:
    """The format that a string attribute names; None if it is "" or not there.

    Raises:
        UnsupportedError: If there is no such format, or it has other bits than these.
    """
    name = string(node, attribute, "")
    if not name:
        return None
    try:
        fmt = formats.get(name)
    except ValueError as error:
        raise UnsupportedError(f"{attribute}: {error}") from None
    if bits not in (None, fmt.bits):
        raise UnsupportedError(f"{attribute} '{name}' has {fmt.bits} bits a weight, not {bits}")
    return fmt


def _projection(
    node: ir.Node, name: str, bits: int | None, common: formats.Format
) -> formats.Format:
    """The format of a projection whose own attribute says so many bits."""
    own = named_format(node, f"{name}_format", bits)
    if own is not None:
        return own
    return common if bits is None else find_format(string(node, "quant_type", "int"), bits)


def _bits(node: ir.Node, attribute: str) -> int | None:
    return integer(node, attribute, 0) if has(node, attribute) else None
