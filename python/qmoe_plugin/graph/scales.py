"""The scales of a node: of each projection what its format has, and those of activations.

The rules are those of ops/ort/qmoe_scales.h.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from qmoe_plugin import formats
from qmoe_plugin.graph.describe import UnsupportedError
from qmoe_plugin.graph.formats import QMoEFormats
from qmoe_plugin.graph.inputs import FLOATS, Constant, constant, given, has, integer, string
from qmoe_plugin.library import runtime, runtime_minor

GLOBAL_SCALES = {"fc1": 15, "fc2": 16}
"""Input numbers of the factors an expert."""

CODEBOOKS = {"fc1": 21, "fc2": 22}
"""Input numbers of the codebooks; that of fc1 is for fc3, too. com.microsoft has no such inputs."""

_ACT_SCALES, _ACT_BLOCK_SCALES = (17, 18), (19, 20)

_E8M0_SINCE = 27

SCALE_TYPES = {
    "float": FLOATS,
    "float8e8m0": (ir.DataType.FLOAT8E8M0, ir.DataType.UINT8),
    "float8e4m3fn": (ir.DataType.FLOAT8E4M3FN,),
    "any": (*FLOATS, ir.DataType.FLOAT8E8M0, ir.DataType.FLOAT8E4M3FN),
}
"""Types of scales, by what a format says of them (`Format.scale_type`)."""


@dataclass(frozen=True)
class ScalePlan:
    """The scales of a projection.

    Attributes:
        format: Its format.
        block_size: Along K; 0 = one scale a row, or an expert.
    """

    format: formats.Format
    block_size: int

    @property
    def has_scales(self) -> bool:
        """Whether there are scales of rows or blocks."""
        return not self.format.square_blocks or self.block_size > 0

    @property
    def unit(self) -> int:
        """What the columns must be a multiple of."""
        return 8 if self.format.square_blocks or self.block_size == 0 else self.block_size

    def shape(self, experts: int, n: int, k: int) -> tuple[int, int, int]:
        """Shape of the scales: [E, rows of blocks, blocks in a row]."""
        height = self.block_size if self.format.square_blocks else 1
        return (experts, -(-n // height), self.format.groups(k, self.block_size))


def plan_scales(node: ir.Node, node_formats: QMoEFormats, *, has_fc3: bool) -> dict[str, ScalePlan]:
    """Checks block_size, and which global and activation scales are given.

    Returns:
        The plans of "fc1", "fc2" and "fc3".
    """
    fc1, fc2 = node_formats.fc1, node_formats.fc2
    plans = {
        "fc1": ScalePlan(fc1, _block_size(node, fc1, fc2.only_block_size is None)),
        "fc2": ScalePlan(fc2, _block_size(node, fc2, fc1.only_block_size is None)),
    }
    if has_fc3 and fc1.has_global_scale(plans["fc1"].block_size):
        raise UnsupportedError(
            f"fc3 is given, but {fc1.name} needs a global scale for each projection, and there is "
            "no input for that of fc3"
        )
    if has_fc3 and fc1.may_have_global_scale and given(node, GLOBAL_SCALES["fc1"]):
        raise UnsupportedError(
            "fc3 and a global scale of fc1 are given, but there is no input for that of fc3; put "
            "the factor into the scales"
        )
    _check_act_scales(node, quantizes=string(node, "quant_type", "int") == "wfp4afp8")
    return {**plans, "fc3": plans["fc1"]}


def check_scales(plan: ScalePlan, scales: Constant | None, name: str) -> None:
    """Refuses scales of another type or rank than the format has."""
    if not plan.has_scales:
        if scales is not None:
            raise UnsupportedError(
                f"{scales}: {plan.format.name} without block_size has a factor an expert and no "
                "other scales"
            )
        return
    if scales is None:
        raise UnsupportedError(f"{name} scales are missing; {plan.format.name} needs them")
    check_scale_type(plan.format, scales)
    if len(scales.shape) not in (2, 3) or 0 in scales.shape:
        raise UnsupportedError(
            f"{scales} must have shape [experts, rows] or [experts, rows, blocks]"
        )


def check_scale_type(fmt: formats.Format, scales: Constant) -> None:
    """Refuses scales of a type that the format, or this onnxruntime, does not have."""
    allowed = SCALE_TYPES[fmt.scale_type]
    if fmt.scale_type == "float8e8m0" and scales.dtype in FLOATS:
        raise UnsupportedError(
            f"the weights are {fmt.name}, but {scales} is not float8e8m0. The model builder of "
            "onnxruntime-genai 0.18 writes such nodes with moe_quant_type=mxfp4 for every model "
            "but gpt-oss: they hold prepacked int4 weights. Export the model again with "
            "moe_quant_type=int4"
        )
    if scales.dtype not in allowed:
        names = ", ".join(dtype.name.lower() for dtype in allowed)
        raise UnsupportedError(f"{scales} must be one of {names} for {fmt.name} weights")
    if scales.dtype is ir.DataType.FLOAT8E8M0 and runtime_minor() < _E8M0_SINCE:
        raise UnsupportedError(
            f"{scales}: onnxruntime has this type since 1.{_E8M0_SINCE}, this is "
            f"{runtime().__version__}; upgrade it, or store the scales as uint8"
        )


def check_codebook(node: ir.Node, index: int, fmt: formats.Format) -> None:
    """Refuses a codebook that the format does not take, or that is missing or no codebook."""
    codebook = constant(node, index, "codebook")
    if codebook is None:
        if fmt.codebook:
            raise UnsupportedError(f"input {index}, a codebook, is missing; {fmt.name} needs one")
        return
    if not fmt.codebook:
        raise UnsupportedError(
            f"input {index} is given, but {fmt.name} has values of its own and takes no codebook"
        )
    if codebook.dtype not in FLOATS or codebook.shape != (1 << fmt.bits,):
        raise UnsupportedError(
            f"input {index}, {codebook}, must be a float tensor of shape {[1 << fmt.bits]}"
        )


def check_block_size(block_size: int) -> None:
    """Refuses a block size that no kernel takes."""
    if not 16 <= block_size <= 65536 or block_size & (block_size - 1):
        raise UnsupportedError(
            f"block_size is {block_size}; it must be a power of two from 16 to 65536"
        )


def check_global_scales(node: ir.Node, plans: dict[str, ScalePlan], experts: int) -> None:
    """Refuses global scales and codebooks that are not what the formats have."""
    for name, index in GLOBAL_SCALES.items():
        plan = plans[name]
        check_global_scale(node, index, plan.format, plan.block_size, experts)
        check_codebook(node, CODEBOOKS[name], plan.format)


def check_act_scales(node: ir.Node, experts: int) -> None:
    """Refuses activation scales that are not one float, or one float an expert."""
    for index in _ACT_SCALES:
        _check_factors(node, index, [(experts,), (1,)])


def check_global_scale(
    node: ir.Node, index: int, fmt: formats.Format, block_size: int, experts: int
) -> None:
    """Refuses a global scale that the format does not have, that is missing, or not float32 [E]."""
    needed = fmt.has_global_scale(block_size)
    if given(node, index) != needed and not fmt.may_have_global_scale:
        raise UnsupportedError(
            f"input {index}, a global scale, is {'missing' if needed else 'not supported'} for "
            f"{fmt.name} weights with block_size {block_size}"
        )
    _check_factors(node, index, [(experts,)])


def _check_factors(node: ir.Node, index: int, shapes: list[tuple[int, ...]]) -> None:
    scale = constant(node, index, "scale")
    if scale is None:
        return
    if scale.dtype is not ir.DataType.FLOAT or scale.shape not in shapes:
        allowed = " or ".join(str(list(shape)) for shape in shapes)
        raise UnsupportedError(f"input {index}, {scale}, must be float32 of shape {allowed}")


def _block_size(node: ir.Node, fmt: formats.Format, needed_elsewhere: bool) -> int:
    """The block size of a projection.

    Args:
        node: The node.
        fmt: The projection's format.
        needed_elsewhere: Whether the attribute says the blocks of another projection.
    """
    block_size = integer(node, "block_size", 0)
    if fmt.only_block_size is not None:
        stated = has(node, "block_size") and not needed_elsewhere
        if stated and block_size != fmt.only_block_size:
            raise UnsupportedError(
                f"block_size is {block_size}; {fmt.name} has blocks of {fmt.only_block_size}"
            )
        return fmt.only_block_size
    if block_size:
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
