"""What quant_type says of a QMoE node's weights: their format, and the scales that come with them.

The rules are those of ops/ort/qmoe_scales.h.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from qmoe_plugin import formats
from qmoe_plugin.graph.describe import UnsupportedError
from qmoe_plugin.graph.inputs import FLOATS, Constant, constant, given, has, integer, string
from qmoe_plugin.library import runtime, runtime_minor

GLOBAL_SCALES = {"fc1": 15, "fc2": 16}
"""Input numbers of the factors an expert."""

_ACT_SCALES, _ACT_BLOCK_SCALES = (17, 18), (19, 20)

_E8M0_SINCE = 27

_SCALE_TYPES = {
    "float": FLOATS,
    "float8e8m0": (ir.DataType.FLOAT8E8M0, ir.DataType.UINT8),
    "float8e4m3fn": (ir.DataType.FLOAT8E4M3FN,),
}


@dataclass(frozen=True)
class ScalePlan:
    """The scales of a node, the same for all its projections.

    Attributes:
        quant_type: The attribute.
        format: A format of it; they differ in the number of bits only.
        block_size: Along K; 0 = one scale a row, or an expert.
    """

    quant_type: str
    format: formats.Format
    block_size: int

    @property
    def is_integer(self) -> bool:
        """Whether codes are integers, of 2, 4 or 8 bits as other attributes say."""
        return self.quant_type == "int"

    @property
    def has_scales(self) -> bool:
        """Whether each projection has scales of its rows or blocks."""
        return not self.format.square_blocks or self.block_size > 0

    @property
    def has_global_scales(self) -> bool:
        """Whether each projection has a factor an expert."""
        return self.format.only_block_size is not None or not self.has_scales

    @property
    def partial_blocks(self) -> bool:
        """Whether the last block of a row may be smaller."""
        return self.format.square_blocks or self.block_size == 0

    def shape(self, experts: int, n: int, k: int) -> tuple[int, int, int]:
        """Shape of the scales of a projection: [E, rows of blocks, blocks in a row]."""
        height = self.block_size if self.format.square_blocks else 1
        return (experts, -(-n // height), self.format.groups(k, self.block_size))


def plan_scales(node: ir.Node, *, has_fc3: bool) -> ScalePlan:
    """Checks quant_type and block_size, and which activation scales are given."""
    name = string(node, "quant_type", "int")
    known = {each for fmt in formats.FORMATS.values() for each in fmt.quant_types}
    if name not in known:
        raise UnsupportedError(f"quant_type is '{name}'; allowed are {', '.join(sorted(known))}")
    fmt = formats.for_attributes(name)
    plan = ScalePlan(name, fmt, _block_size(node, name, fmt))
    if has_fc3 and plan.has_global_scales:
        raise UnsupportedError(
            f"fc3 is given, but quant_type '{name}' needs a global scale for each projection, and "
            "there is no input for that of fc3"
        )
    _check_act_scales(node, quantizes=name == "wfp4afp8")
    return plan


def check_scales(plan: ScalePlan, scales: Constant | None, name: str) -> None:
    """Refuses scales of another type or rank than quant_type and block_size say."""
    allowed = _SCALE_TYPES[plan.format.scale_type]
    if not plan.has_scales:
        if scales is not None:
            raise UnsupportedError(
                f"{scales}: quant_type '{plan.quant_type}' without block_size has a factor an "
                "expert and no other scales"
            )
        return
    if scales is None:
        raise UnsupportedError(
            f"{name} scales are missing; quant_type '{plan.quant_type}' needs them"
        )
    if ir.DataType.FLOAT8E8M0 in allowed and scales.dtype in FLOATS:
        raise UnsupportedError(
            f"quant_type is '{plan.quant_type}', but {scales} is not float8e8m0. The model builder "
            "of onnxruntime-genai 0.18 writes such nodes for Qwen3.5-MoE with "
            "moe_quant_type=mxfp4: they hold prepacked int4 weights. Export the model again with "
            "moe_quant_type=int4"
        )
    if scales.dtype not in allowed:
        names = ", ".join(dtype.name.lower() for dtype in allowed)
        raise UnsupportedError(
            f"{scales} must be one of {names} for quant_type '{plan.quant_type}'"
        )
    if scales.dtype is ir.DataType.FLOAT8E8M0 and runtime_minor() < _E8M0_SINCE:
        raise UnsupportedError(
            f"{scales}: onnxruntime has this type since 1.{_E8M0_SINCE}, this is "
            f"{runtime().__version__}; upgrade it, or store the scales as uint8"
        )
    if len(scales.shape) not in (2, 3) or 0 in scales.shape:
        raise UnsupportedError(
            f"{scales} must have shape [experts, rows] or [experts, rows, blocks]"
        )


def weight_format(
    plan: ScalePlan, node: ir.Node, attribute: str, bits: int | None = None
) -> formats.Format:
    """The format of a projection.

    Args:
        plan: What quant_type says.
        node: The node.
        attribute: What says its bits.
        bits: Taken if it does not.
    """
    return find_format(
        plan.quant_type, integer(node, attribute, 0) if has(node, attribute) else bits
    )


def find_format(quant_type: str, bits: int | None) -> formats.Format:
    """The format of this type and width; bits None = what the type has, 4 for "int"."""
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


def check_global_scales(node: ir.Node, plan: ScalePlan, experts: int) -> None:
    """Refuses global scales that are not one float an expert, or not as quant_type has them."""
    for index in GLOBAL_SCALES.values():
        if given(node, index) != plan.has_global_scales:
            problem = "missing" if plan.has_global_scales else "not supported"
            raise UnsupportedError(
                f"input {index}, a global scale, is {problem} for quant_type '{plan.quant_type}' "
                f"with block_size {plan.block_size}"
            )
        _check_per_expert(node, index, [(experts,)])


def check_act_scales(node: ir.Node, experts: int) -> None:
    """Refuses activation scales that are not one float, or one float an expert."""
    for index in _ACT_SCALES:
        _check_per_expert(node, index, [(experts,), (1,)])


def _check_per_expert(node: ir.Node, index: int, shapes: list[tuple[int, ...]]) -> None:
    scale = constant(node, index, "scale")
    if scale is None:
        return
    if scale.dtype is not ir.DataType.FLOAT or scale.shape not in shapes:
        allowed = " or ".join(str(list(shape)) for shape in shapes)
        raise UnsupportedError(f"input {index}, {scale}, must be float32 of shape {allowed}")


def _block_size(node: ir.Node, quant_type: str, fmt: formats.Format) -> int:
    block_size = integer(node, "block_size", fmt.only_block_size or 0)
    if fmt.only_block_size is not None:
        if block_size != fmt.only_block_size:
            raise UnsupportedError(
                f"block_size is {block_size}; quant_type '{quant_type}' has blocks of "
                f"{fmt.only_block_size}"
            )
    elif block_size:
        check_block_size(block_size)
    return block_size


def _check_act_scales(node: ir.Node, *, quantizes: bool) -> None:
    for index in (*_ACT_SCALES, *_ACT_BLOCK_SCALES):
        if given(node, index) and not quantizes:
            raise UnsupportedError(
                f"input {index}, a scale of activations, belongs to quant_type 'wfp4afp8'"
            )
    for index in _ACT_BLOCK_SCALES:
        if given(node, index):
            raise UnsupportedError(
                f"input {index}, block scales of activations, is not supported: they are found at "
                "run time"
            )
    if given(node, _ACT_SCALES[0]) != given(node, _ACT_SCALES[1]):
        raise UnsupportedError("one of inputs 17 and 18, activation scales, is missing")
