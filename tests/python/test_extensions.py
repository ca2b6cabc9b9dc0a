"""onnxruntime-extensions and our ops in one session: text in, experts out."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from helpers.cases import QMoECase
from helpers.models import one_node_model
from helpers.tolerance import check
from onnx import TensorProto, helper, numpy_helper

import qmoe_plugin

extensions = pytest.importorskip(
    "onnxruntime_extensions",
    reason="onnxruntime-extensions is not installed (pip install '.[extensions]')",
)
pytestmark = pytest.mark.usefixtures("library")

WORDS = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "the", "quick", "brown", "fox", "##es"]
IDS = [1, 5, 6, 7, 8, 9, 2]  # of "the quick brown foxes"


def model(case: QMoECase, domain: str) -> onnx.ModelProto:
    """A tokenizer, an embedding, and the node of a case."""
    tensors = case.tensors()
    made = one_node_model("QMoE", tensors, case.attributes(), domain=domain)
    rng = np.random.default_rng(3)
    tables = {
        "input": rng.standard_normal((len(WORDS), case.hidden)).astype(np.float32),
        "router_probs": rng.standard_normal((len(WORDS), case.experts)).astype(np.float32),
    }
    nodes = [
        helper.make_node(
            "BertTokenizer",
            ["text"],
            ["ids", "types", "mask"],
            domain="ai.onnx.contrib",
            vocab_file="\n".join(WORDS) + "\n",
        )
    ]
    for name, table in tables.items():
        made.graph.initializer.append(numpy_helper.from_array(table, f"{name}_table"))
        nodes.append(helper.make_node("Gather", [f"{name}_table", "ids"], [name]))
    nodes.append(made.graph.node[0])
    graph = helper.make_graph(
        nodes,
        "text_to_experts",
        [helper.make_tensor_value_info("text", TensorProto.STRING, [1])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, None)],
        made.graph.initializer,
    )
    opsets = [*made.opset_import, helper.make_opsetid("ai.onnx.contrib", 1)]
    return helper.make_model(graph, ir_version=10, opset_imports=opsets)


@pytest.mark.parametrize("first", ["ours", "extensions"])
def test_tokenizer_in_the_graph(first: str) -> None:
    case = QMoECase()
    options = onnxruntime.SessionOptions()
    if first == "ours":
        qmoe_plugin.register(options)
    options.register_custom_ops_library(extensions.get_library_path())
    made = model(case, "com.microsoft")
    session = qmoe_plugin.session(made, ["CPUExecutionProvider"], options)
    result = session.run(None, {"text": np.array(["the quick brown foxes"])})[0]
    tables = {tensor.name: numpy_helper.to_array(tensor) for tensor in made.graph.initializer}
    tensors = case.tensors() | {
        name: tables[f"{name}_table"][IDS] for name in ("input", "router_probs")
    }
    check(case, tensors, result)


def test_override() -> None:
    """Our ops in the place of com.microsoft's do not disturb the extensions."""
    case = QMoECase()
    results = []
    for override in (False, True):
        options = onnxruntime.SessionOptions()
        options.register_custom_ops_library(extensions.get_library_path())
        session = qmoe_plugin.session(
            model(case, "com.microsoft"), ["CPUExecutionProvider"], options, override=override
        )
        results.append(session.run(None, {"text": np.array(["the fox"])})[0])
    np.testing.assert_array_equal(*results)
