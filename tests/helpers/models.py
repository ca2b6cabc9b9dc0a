"""Builds models of one node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from helpers.dtypes import onnx_type

DOMAIN = "qmoe_plugin"
STOCK_DOMAIN = "com.microsoft"

QMOE_INPUTS = (
    "input",
    "router_probs",
    "fc1_experts_weights",
    "fc1_scales",
    "fc1_experts_bias",
    "fc2_experts_weights",
    "fc2_scales",
    "fc2_experts_bias",
    "fc3_experts_weights",
    "fc3_scales",
    "fc3_experts_bias",
    "fc1_zero_points",
    "fc2_zero_points",
    "fc3_zero_points",
    "router_weights",
    "fc1_global_scale",
    "fc2_global_scale",
    "fc1_act_scale",
    "fc2_act_scale",
    "fc1_act_block_scale",
    "fc2_act_block_scale",
    "fc1_codebook",
    "fc2_codebook",
)
MATMUL_NBITS_INPUTS = (
    "A",
    "B",
    "scales",
    "zero_points",
    "g_idx",
    "bias",
    "codebook",
    "global_scale",
)

MOE_INPUTS = (
    "input",
    "router_probs",
    "fc1_experts_weights",
    "fc1_experts_bias",
    "fc2_experts_weights",
    "fc2_experts_bias",
    "fc3_experts_weights",
    "fc3_experts_bias",
)

INPUT_NAMES: dict[str, tuple[str, ...]] = {
    "QMoE": QMOE_INPUTS,
    "MoE": MOE_INPUTS,
    "MatMulNBits": MATMUL_NBITS_INPUTS,
    "MatMulBlockQuantizedFp8Weight": ("A", "B", "b_scale", "a_scale", "bias"),
    "MatMulBlockQuantizedFp4Weight": (
        "A",
        "B",
        "weight_scale",
        "weight_scale_2",
        "input_scale",
        "bias",
    ),
}
# Known at run time only; every other input is a weight and must be constant.
ACTIVATION_INPUTS = frozenset({"input", "router_probs", "router_weights", "A"})

Attributes = Mapping[str, int | float | str]


def node_inputs(op_type: str, given: Sequence[str] | Mapping[str, object]) -> list[str]:
    """The node's input list: given names in schema order, "" for those left out before the last."""
    names = [name if name in given else "" for name in INPUT_NAMES[op_type]]
    while names and not names[-1]:
        names.pop()
    return names


def one_node_model(
    op_type: str,
    tensors: Mapping[str, np.ndarray],
    attributes: Attributes,
    *,
    domain: str = DOMAIN,
    output_type: int | None = None,
    feed: frozenset[str] = ACTIVATION_INPUTS,
    extra_nodes: Sequence[onnx.NodeProto] = (),
) -> onnx.ModelProto:
    """A model of one node of our ops named "node", whose output is "output".

    Args:
        op_type: Of the node.
        tensors: By input name. Those in `feed` become graph inputs, of which only the rank and the
            last dimension are
            fixed; the others become initializers.
        attributes: Of the node.
        domain: Of the node.
        output_type: TensorProto type of the output; that of the first input by default.
        feed: Names that become graph inputs.
        extra_nodes: Further nodes, put behind the one node; the graph's output stays "output".
    """
    names = node_inputs(op_type, tensors)
    graph_inputs, initializers = [], []
    for name in names:
        if not name:
            continue
        tensor = tensors[name]
        if name in feed:
            lead = [f"{name}_{axis}" for axis in range(tensor.ndim - 1)]
            shape = [*lead, tensor.shape[-1]] if tensor.ndim else []
            graph_inputs.append(helper.make_tensor_value_info(name, onnx_type(tensor.dtype), shape))
        else:
            initializers.append(numpy_helper.from_array(tensor, name))
    node = helper.make_node(op_type, names, ["output"], name="node", domain=domain, **attributes)
    if output_type is None:
        output_type = onnx_type(tensors[names[0]].dtype)
    graph = helper.make_graph(
        [node, *extra_nodes],
        "one_node",
        graph_inputs,
        [helper.make_tensor_value_info("output", output_type, None)],
        initializers,
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(domain, 1)]
    return helper.make_model(graph, ir_version=10, opset_imports=opsets)


def save_external(model: onnx.ModelProto, folder: Path, name: str = "model.onnx") -> Path:
    """Saves the model with every initializer in one external file beside it, `<name>.data`."""
    path = folder / name
    onnx.save_model(
        model,
        path,
        save_as_external_data=True,
        all_tensors_to_one_file=True,
        location=f"{name}.data",
        size_threshold=0,
    )
    return path
