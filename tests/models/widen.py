"""Makes bfloat16 graphs run on the CPU, where ONNX Runtime's own ops know no bfloat16.

All but the nodes of our ops becomes float32; those stay, between Casts, with the weights they have.
"""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper, numpy_helper

# Inputs that are no weights.
_ACTIVATIONS = {"QMoE": (0, 1, 14), "MoE": (0, 1), "MatMulNBits": (0,)}
OPS = tuple(_ACTIVATIONS)


def widen(model: onnx.ModelProto) -> None:
    """Changes the model, whose external data must be in memory.

    Raises:
        ValueError: If a node of ours shares a weight with another.
    """
    graph = model.graph
    ours = {name for node in graph.node if node.op_type in OPS for name in _weights(node)}
    theirs = {name for node in graph.node if node.op_type not in OPS for name in node.input}
    for tensor in graph.initializer:
        if tensor.data_type != TensorProto.BFLOAT16:
            continue
        if tensor.name not in ours:
            _widen_tensor(tensor)
        elif tensor.name in theirs:
            raise ValueError(f"{tensor.name!r} is a weight of a node of ours and of another")
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type == TensorProto.BFLOAT16:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    nodes = list(graph.node)
    del graph.node[:]
    for node in nodes:
        if node.op_type in OPS:
            graph.node.extend(_between_casts(node))
        else:
            _widen_attributes(node)
            graph.node.append(node)


def _weights(node: onnx.NodeProto) -> list[str]:
    return [
        name for i, name in enumerate(node.input) if name and i not in _ACTIVATIONS[node.op_type]
    ]


def _widen_tensor(tensor: onnx.TensorProto) -> None:
    wide = numpy_helper.to_array(tensor).astype("float32")
    tensor.CopyFrom(numpy_helper.from_array(wide, tensor.name))


def _widen_attributes(node: onnx.NodeProto) -> None:
    """The values of constants, and what Cast makes."""
    for attribute in node.attribute:
        if attribute.t.data_type == TensorProto.BFLOAT16:
            _widen_tensor(attribute.t)
        if node.op_type == "Cast" and attribute.i == TensorProto.BFLOAT16:
            attribute.i = TensorProto.FLOAT


def _between_casts(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    before = []
    for index in _ACTIVATIONS[node.op_type]:
        if index < len(node.input) and node.input[index]:
            wide, narrow = node.input[index], f"{node.name}/narrow_{index}"
            before.append(helper.make_node("Cast", [wide], [narrow], to=TensorProto.BFLOAT16))
            node.input[index] = narrow
    wide, node.output[0] = node.output[0], f"{node.name}/narrow"
    after = helper.make_node("Cast", [node.output[0]], [wide], to=TensorProto.FLOAT)
    return [*before, node, after]
