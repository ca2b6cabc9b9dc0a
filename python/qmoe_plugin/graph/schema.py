"""The schemas of our ops, so that the tools of ONNX understand models that have them.

Importing qmoe_plugin registers them with `onnx.defs`: then `onnx.checker` (with full_check, too)
checks our nodes, `onnx.shape_inference` infers types and shapes across them, and so do the tools
built upon them, onnx-ir's passes among them. Names, attributes and types are those that the modules
beside this one check nodes by.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import onnx
import onnx_ir as ir
from onnx import AttributeProto, TypeProto, defs
from onnx.shape_inference import InferenceContext, InferenceError

from qmoe_plugin.graph import matmul_block_quantized, matmul_nbits, moe, qmoe
from qmoe_plugin.graph.attributes import Attribute
from qmoe_plugin.graph.inputs import FLOATS
from qmoe_plugin.graph.retarget import DOMAIN_VERSION
from qmoe_plugin.graph.scales import SCALE_TYPES
from qmoe_plugin.library import DOMAIN

OPS: Mapping[str, tuple[Mapping[str, Attribute], Sequence[str]]] = {
    "QMoE": (qmoe.ATTRIBUTES, qmoe.INPUTS),
    "MoE": (moe.ATTRIBUTES, moe.STOCK_INPUTS),
    "MatMulNBits": (matmul_nbits.ATTRIBUTES, matmul_nbits.INPUTS),
    "MatMulBlockQuantizedFp8Weight": (
        matmul_block_quantized.FP8_ATTRIBUTES,
        matmul_block_quantized.FP8_STOCK_INPUTS,
    ),
    "MatMulBlockQuantizedFp4Weight": (
        matmul_block_quantized.FP4_ATTRIBUTES,
        matmul_block_quantized.FP4_STOCK_INPUTS,
    ),
}
"""Attributes and inputs of each op."""

_REQUIRED = "input|router_probs|A|B|fc[12]_experts_weights"
"""Names of inputs that every node has. Packed weights (`prepack`) need no others."""

_FLOAT32 = (ir.DataType.FLOAT,)
_CODES = (ir.DataType.UINT8, ir.DataType.FLOAT8E4M3FN)

_TYPES = {
    "input|A": FLOATS,
    "router_(probs|weights)": FLOATS,
    "B|fc[123]_experts_weights": _CODES,
    "(fc[123]_)?scales|fc[12]_act_block_scale": (*SCALE_TYPES["any"], ir.DataType.UINT8),
    "b_scale": FLOATS,
    "weight_scale": _CODES,
    "(fc[12]_)?(global|act)_scale|a_scale|weight_scale_2|input_scale": _FLOAT32,
    "(fc[123]_)?zero_points": (ir.DataType.UINT8, *FLOATS),
    "(fc[123]_experts_)?bias|(fc[12]_)?codebook": FLOATS,
    "g_idx": (ir.DataType.INT32,),
}
"""The types that inputs may have, by what their names match."""

_PLAIN = (*FLOATS, ir.DataType.UINT8)
"""Weights that are not quantised; as bytes, if they are packed."""

_ATTRIBUTE_TYPES = {
    int: defs.OpSchema.AttrType.INT,
    float: defs.OpSchema.AttrType.FLOAT,
    str: defs.OpSchema.AttrType.STRING,
}

_DOC = """com.microsoft.{op} with kernels for the CPU and for NVIDIA GPUs, in all weight
formats of docs/support.md. What is computed: docs/semantics.md."""


def register_schemas() -> None:
    """Registers the schemas of our ops with `onnx.defs`; again does nothing."""
    for op in OPS:
        if not defs.has(op, domain=DOMAIN):
            defs.register_schema(schema(op))


def schema(op: str) -> defs.OpSchema:
    """The schema of one of our ops, with type and shape inference."""
    attributes, inputs = OPS[op]
    types = {name: _PLAIN if _is_plain(op, name) else _types(name) for name in inputs}
    activations, *others = inputs
    parameters = [_parameter(activations, "T")]
    parameters += [_parameter(name, f"T_{name}") for name in others]
    constraints = [("T", _names(types[activations]), "Activations.")]
    constraints += [(f"T_{name}", _names(types[name]), "") for name in others]
    output = "output" if activations == "input" else "Y"
    made = defs.OpSchema(
        op,
        DOMAIN,
        DOMAIN_VERSION,
        _DOC.format(op=op),
        inputs=parameters,
        outputs=[defs.OpSchema.FormalParameter(output, "T", "Like the first input.")],
        type_constraints=constraints,
        attributes=[_attribute(name, attribute) for name, attribute in attributes.items()],
    )
    made.set_type_and_shape_inference_function(_infer_product if "A" in inputs else _infer_experts)
    return made


def _is_plain(op: str, name: str) -> bool:
    """Whether an input holds weights that are not quantised."""
    return op == "MoE" and name.endswith("_weights")


def _types(name: str) -> tuple[ir.DataType, ...]:
    return next(types for pattern, types in _TYPES.items() if re.fullmatch(pattern, name))


def _names(types: tuple[ir.DataType, ...]) -> list[str]:
    """As ONNX writes them, as in "tensor(float16)"."""
    return [f"tensor({dtype.name.lower()})" for dtype in dict.fromkeys(types)]


def _parameter(name: str, type_name: str) -> defs.OpSchema.FormalParameter:
    required = re.fullmatch(_REQUIRED, name)
    option = defs.OpSchema.FormalParameterOption
    return defs.OpSchema.FormalParameter(
        name, type_name, param_option=option.Single if required else option.Optional
    )


def _attribute(name: str, attribute: Attribute) -> defs.OpSchema.Attribute:
    if attribute.default is not None:
        value = onnx.helper.make_attribute(name, attribute.default)
        return defs.OpSchema.Attribute(name, value)
    kind = _ATTRIBUTE_TYPES[attribute.kind]
    return defs.OpSchema.Attribute(name, kind, required=attribute.required)


def _infer_experts(context: InferenceContext) -> None:
    """Of QMoE and MoE: the output is like the input."""
    found = context.get_input_type(0)
    if found is not None:
        context.set_output_type(0, found)


def _infer_product(context: InferenceContext) -> None:
    """Of the others: the last dimension becomes N."""
    found = context.get_input_type(0)
    if found is None:
        return
    made = TypeProto()
    made.CopyFrom(found)
    if made.tensor_type.HasField("shape") and made.tensor_type.shape.dim:
        last = made.tensor_type.shape.dim[-1]
        k, n = _attribute_value(context, "K"), _attribute_value(context, "N")
        if k is not None and last.HasField("dim_value") and last.dim_value != k:
            raise InferenceError(f"A has {last.dim_value} columns, but K is {k}")
        last.Clear()
        n = _rows(context) if n is None else n
        if n is not None:
            last.dim_value = n
    context.set_output_type(0, made)


def _attribute_value(context: InferenceContext, name: str) -> int | None:
    attribute: AttributeProto | None = context.get_attribute(name)
    return None if attribute is None else int(attribute.i)


def _rows(context: InferenceContext) -> int | None:
    """The rows of B, of the ops that have no attribute N."""
    weights = context.get_input_type(1)
    if weights is None or not weights.tensor_type.shape.dim:
        return None
    rows = weights.tensor_type.shape.dim[0]
    return int(rows.dim_value) if rows.HasField("dim_value") else None
