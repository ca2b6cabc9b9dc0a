"""Turns single nodes into quantised ones: MatMul and Gemm into MatMulNBits, MoE into QMoE.

Planning checks everything and changes nothing; what was planned can be done.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qmoe_plugin.graph import matmul_nbits, qmoe
from qmoe_plugin.graph.describe import UnsupportedError
from qmoe_plugin.graph.edit import add_initializer, drop_weight, set_attributes
from qmoe_plugin.graph.expert_weights import expert_weights
from qmoe_plugin.graph.inputs import FLOATS, constant_tensor, float_type, given, integer, real
from qmoe_plugin.graph.moe import WEIGHTS, describe_experts, merged_gates
from qmoe_plugin.graph.packed import LAYOUT_ATTRIBUTE
from qmoe_plugin.graph.projections import check_columns
from qmoe_plugin.graph.quantize_rules import Spec
from qmoe_plugin.graph.quantize_weights import Weight
from qmoe_plugin.graph.scales import ScalePlan
from qmoe_plugin.library import DOMAIN

Attributes = dict[str, int | float | str | None]
Tensors = Mapping[str, Mapping[str, ir.TensorProtocol]]
"""By role of the weight, and kind: see `quantize_weight`."""

_BLOCK = 32
_SQUARE_BLOCK = 128  # as in DeepSeek's fp8 checkpoints

_CARRIED = ("Transpose", "Cast", "Identity", "Reshape", "DequantizeLinear")
"""What exporters put between a weight and the node that multiplies with it."""

_QMOE_INPUTS = {
    "codes": "{}_experts_weights",
    "scales": "{}_scales",
    "zero_points": "{}_zero_points",
    "global_scale": "{}_global_scale",
    "codebook": "{}_codebook",
}
_MATMUL_NBITS_INPUTS = {
    "codes": "B",
    "scales": "scales",
    "zero_points": "zero_points",
    "global_scale": "global_scale",
    "codebook": "codebook",
}


@dataclass(frozen=True)
class Plan:
    """What a node becomes.

    Attributes:
        op_type: Its op.
        weights: The weights to quantise.
        attributes: All that it will have, but those of MoE that stay. None takes one off.
        inputs: Its other inputs, by name.
        dtype: Type of its activations.
        bias: The input and the values of a bias that must be made, as no input has them.
    """

    op_type: str
    weights: tuple[Weight, ...]
    attributes: Attributes
    inputs: Mapping[str, ir.Value]
    dtype: ir.DataType
    bias: tuple[str, npt.NDArray[Any]] | None = None

    def apply(self, node: ir.Node, graph: ir.Graph, tensors: Tensors, name: str) -> None:
        """Changes the node.

        Args:
            node: The node that was planned for.
            graph: Gets the new initializers.
            tensors: The quantised weights.
            name: What to call `bias`.
        """
        moe = self.op_type == "QMoE"
        names = qmoe.INPUTS if moe else matmul_nbits.INPUTS
        inputs = dict(self.inputs)
        for role, parts in tensors.items():
            for kind, tensor in parts.items():
                place = (_QMOE_INPUTS if moe else _MATMUL_NBITS_INPUTS)[kind].format(role)
                inputs[place] = add_initializer(graph, tensor)
        if self.bias is not None:
            place, values = self.bias
            inputs[place] = add_initializer(graph, ir.Tensor(values, name=name))
        former = list(node.inputs)
        node.resize_inputs(max(map(names.index, inputs)) + 1)
        for index in range(len(node.inputs)):
            node.replace_input_with(index, inputs.get(names[index]))
        if not moe:
            node.attributes.clear()
        set_attributes(node, self.attributes)
        node.domain, node.op_type = DOMAIN, self.op_type
        if node.outputs[0].type is None:  # scales and biases may not tell it any more
            node.outputs[0].type = ir.TensorType(self.dtype)
        for value in former:
            drop_weight(value)


def is_product_with_weight(node: ir.Node) -> bool:
    """Whether the node is a MatMul or Gemm of activations with something constant."""
    if node.domain != "" or node.op_type not in ("MatMul", "Gemm"):
        return False
    left, right = (_comes_from_constant(value) for value in node.inputs[:2])
    return left != right


def product_weight_name(node: ir.Node) -> str:
    """The name of the weight of such a node."""
    value = node.inputs[1]
    while value is not None and not _is_constant(value):
        producer = value.producer()
        if producer is None or producer.op_type not in _CARRIED:
            break
        value = producer.inputs[0]
    return "" if value is None else value.name or ""


def plan_product(node: ir.Node, spec: Spec) -> Plan:
    """Plans the MatMulNBits that a MatMul or Gemm becomes.

    Raises:
        UnsupportedError: If it cannot become one.
    """
    bias, inputs = None, {}
    transposed = node.op_type == "MatMul"
    activations = node.inputs[0]
    assert activations is not None
    if _comes_from_constant(activations):
        raise UnsupportedError("the constant is on the left; MatMulNBits has weights on the right")
    if node.op_type == "Gemm":
        transposed = not integer(node, "transB", 0)
        _check_gemm(node)
    tensor, transposed = _matrix(node, transposed)
    if tensor.dtype not in FLOATS:
        raise UnsupportedError(f"its weights are {tensor.dtype.name.lower()}, not of a float type")
    if len(tensor.shape) != 2 or 0 in tensor.shape.numpy():
        raise UnsupportedError(
            f"its weights have shape {list(tensor.shape.numpy())}; MatMulNBits has one matrix"
        )
    block_size = spec.block_size
    if block_size is None:
        block_size = _SQUARE_BLOCK if spec.format.square_blocks else _BLOCK
    if block_size == 0 and not spec.format.square_blocks:
        raise UnsupportedError(f"{spec}: MatMulNBits has no scales of rows; say a block size")
    name = product_weight_name(node)
    weight = Weight(
        "B", name, tensor, transposed, spec.format, block_size, spec.symmetric, whole_blocks=True
    )
    _, n, k = weight.shape
    inputs["A"] = activations
    if given(node, 2):
        bias = _gemm_bias(node, n)
        value = node.inputs[2]
        if bias is None and value is not None:
            inputs["bias"] = value
    attributes: Attributes = {**spec.format.matmul_nbits_attributes}
    attributes |= {"K": k, "N": n, "block_size": block_size}
    made = None if bias is None else ("bias", bias)
    return Plan("MatMulNBits", (weight,), attributes, inputs, tensor.dtype, made)


def plan_moe(node: ir.Node, spec_of: Callable[[str, str], Spec]) -> Plan:
    """Plans the QMoE that a MoE becomes: fc3, if there is one, is merged into its fc1.

    Args:
        node: The node.
        spec_of: Of "fc1" or "fc2" and the name of its weights. fc3 has that of fc1.

    Raises:
        UnsupportedError: If it cannot become one.
    """
    found = expert_weights(node)
    described = describe_experts(node, {role: w.constant for role, w in found.items()})
    dtype = float_type(described.gemms[0].dtype)
    specs = {role: spec_of(role, found[role].name) for role in ("fc1", "fc2")}
    block_size = _common_block_size(specs)
    weights = []
    for role, spec in specs.items():
        source, ups = found[role], found.get("fc3") if role == "fc1" else None
        if ups is not None and ups.transposed != source.transposed:
            raise UnsupportedError(
                "fc1 and fc3 are stored in two layouts, one of them behind a Transpose; fold the "
                "constants of the model first"
            )
        own = spec.format.only_block_size
        block = block_size if own is None else own
        check_columns(role, source.constant.shape[-1], ScalePlan(spec.format, block))
        weight = Weight(
            role,
            source.name,
            source.tensor,
            source.transposed,
            spec.format,
            block,
            spec.symmetric,
            whole_blocks=False,
            ups=None if ups is None else ups.tensor,
        )
        weights.append(weight)
    inputs = {"input": node.inputs[0], "router_probs": node.inputs[1]}
    inputs |= {
        f"{r}_experts_bias": node.inputs[WEIGHTS[r] + 1] for r in specs if _has_bias(node, r)
    }
    attributes, bias = _qmoe_attributes(specs, block_size), None
    if "fc3" in found:
        attributes |= merged_gates(node)
        if _has_bias(node, "fc1") or _has_bias(node, "fc3"):
            inputs.pop("fc1_experts_bias", None)
            bias = ("fc1_experts_bias", _merged_bias(node, found["fc1"].constant.shape[:2], dtype))
    present = {name: value for name, value in inputs.items() if value is not None}
    return Plan("QMoE", tuple(weights), attributes, present, dtype, bias)


def _has_bias(node: ir.Node, role: str) -> bool:
    return given(node, WEIGHTS[role] + 1)


def _merged_bias(node: ir.Node, shape: tuple[int, ...], dtype: ir.DataType) -> npt.NDArray[Any]:
    """The biases of gates and ups, alternating, [E, 2 N]; zeros for one that is not there."""
    tensors = [constant_tensor(node, WEIGHTS[role] + 1, f"{role} bias") for role in ("fc1", "fc3")]
    types = {tensor.dtype for tensor in tensors if tensor is not None}
    common = (types.pop() if len(types) == 1 else dtype).numpy()
    parts = [
        np.zeros(shape, common) if tensor is None else tensor.numpy().astype(common)
        for tensor in tensors
    ]
    return np.stack(parts, axis=-1).reshape(shape[0], -1)


def _qmoe_attributes(specs: Mapping[str, Spec], block_size: int) -> Attributes:
    """What says the formats, the layout and the block size."""
    fc1, fc2 = specs["fc1"].format, specs["fc2"].format
    attributes: Attributes = {LAYOUT_ATTRIBUTE: "raw"}
    if fc1.name != fc2.name:
        attributes |= {"fc1_format": fc1.name, "fc2_format": fc2.name}
    else:
        attributes |= fc1.qmoe_attributes
        if attributes["quant_type"] == "int":  # com.microsoft has an attribute for these
            attributes["weights_prepacked"] = 0
            del attributes[LAYOUT_ATTRIBUTE]
    if None in (fc1.only_block_size, fc2.only_block_size):
        attributes["block_size"] = block_size
    elif fc1.only_block_size == fc2.only_block_size:
        attributes["block_size"] = fc1.only_block_size or 0
    return attributes


def _common_block_size(specs: Mapping[str, Spec]) -> int:
    """The one block size that a node has for its formats that leave it open."""
    free = [spec for spec in specs.values() if spec.format.only_block_size is None]
    stated = {spec.block_size for spec in free} - {None}
    if len(stated) > 1:
        texts = " and ".join(f"{role} is {spec}" for role, spec in specs.items())
        raise UnsupportedError(f"{texts}, but a QMoE node has one block_size for both")
    for size in stated:
        return size or 0
    return 0 if all(spec.format.square_blocks for spec in free) else _BLOCK


def _check_gemm(node: ir.Node) -> None:
    if integer(node, "transA", 0):
        raise UnsupportedError("transA is 1; MatMulNBits does not transpose its activations")
    for name in ("alpha", "beta") if given(node, 2) else ("alpha",):
        if real(node, name, 1.0) != 1.0:
            raise UnsupportedError(
                f"{name} is {real(node, name, 1.0):g}; MatMulNBits has no such factor"
            )


def _gemm_bias(node: ir.Node, n: int) -> npt.NDArray[Any] | None:
    """The bias [N] where the one of the node has another shape; None where it can stay."""
    tensor = constant_tensor(node, 2, "C")
    assert tensor is not None
    shape = tuple(tensor.shape.numpy())
    if shape == (n,):
        return None
    if shape not in ((), (1,), (1, 1), (1, n)):
        raise UnsupportedError(f"C has shape {list(shape)}; a bias is {[n]}")
    return np.ascontiguousarray(np.broadcast_to(tensor.numpy().reshape(-1), n))


def _matrix(node: ir.Node, transposed: bool) -> tuple[ir.TensorProtocol, bool]:
    """The weights of a product, and whether they are [K, N], seen through a Transpose."""
    value, index = node.inputs[1], 1
    producer = None if value is None else value.producer()
    if producer is not None and producer.domain == "" and producer.op_type == "Transpose":
        perm = producer.attributes.get("perm")
        if perm is None or list(perm.as_ints()) == [1, 0]:  # missing: the axes reversed
            node, index, transposed = producer, 0, not transposed
    tensor = constant_tensor(node, index, "weights")
    assert tensor is not None
    return tensor, transposed


def _comes_from_constant(value: ir.Value | None) -> bool:
    while value is not None and not _is_constant(value):
        producer = value.producer()
        if producer is None or producer.domain != "" or producer.op_type not in _CARRIED:
            return False
        value = producer.inputs[0]
    return value is not None


def _is_constant(value: ir.Value) -> bool:
    producer = value.producer()
    if producer is not None:
        return producer.domain == "" and producer.op_type == "Constant"
    return value.is_initializer()
