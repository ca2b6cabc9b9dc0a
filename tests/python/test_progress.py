"""What `prepack` and `fuse` say of how far they are; `quantize`: test_quantize_big.py."""

import numpy as np
import onnx
import pytest
from helpers.cases import MatMulNBitsCase, QMoECase
from onnx import TensorProto, helper, numpy_helper

import qmoe_plugin

pytestmark = pytest.mark.usefixtures("library")


def test_prepack_counts_nodes():
    first = QMoECase()
    second = MatMulNBitsCase(g_idx="shuffled")  # which stays
    model = first.model(first.tensors(), "qmoe_plugin")
    other = onnx.compose.add_prefix(second.model(second.tensors(), "qmoe_plugin"), "b.").graph
    for field in ("node", "initializer", "input", "output"):
        getattr(model.graph, field).extend(getattr(other, field))
    seen = []
    report = qmoe_plugin.prepack(model, progress=lambda *given: seen.append(given))
    assert (len(report.packed), len(report.kept)) == (1, 1)
    assert seen == [("node", 1, 2), ("b.node", 2, 2)]


def test_fuse_counts_routers():
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["logits"], "router"),
        helper.make_node("TopK", ["logits", "k"], ["values", "indices"], "topk"),
    ]
    constants = [
        numpy_helper.from_array(np.ones((8, 4), np.float32), "w"),
        numpy_helper.from_array(np.array([2]), "k"),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, 8])]
    outputs = [helper.make_tensor_value_info("values", TensorProto.FLOAT, None)]
    graph = helper.make_graph(nodes, "g", inputs, outputs, constants)
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 21)])
    seen = []
    qmoe_plugin.fuse(model, progress=lambda *given: seen.append(given))
    assert seen == [("topk", 0, 1)]
