"""What `prepack` does to nodes.

To files: test_prepack_files.py. What sessions make of the result: tests/ops/test_prepack.py.
"""

import copy
import json
import logging

import numpy as np
import onnx_ir as ir
import pytest
from helpers.block_quantized_cases import Fp4WeightCase, Fp8WeightCase
from helpers.cases import MatMulNBitsCase, QMoECase, feeds_of
from helpers.models import one_node_model, save_external
from helpers.moe_cases import MoECase
from helpers.packed import (
    initializers,
    packed_tensors,
    resealed,
    result_of,
    stock_model,
    with_packed,
)
from helpers.run import bits_of, open_session, run
from onnx import TensorProto, helper

import qmoe_plugin
from qmoe_plugin.graph.describe import describe
from qmoe_plugin.graph.inspect import explain_model
from qmoe_plugin.graph.retarget import RESTORE_KEY

pytestmark = pytest.mark.usefixtures("library")

STOCK, OURS = "com.microsoft", "qmoe_plugin"


def attributes_of(node):
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


# --- a node ---------------------------------------------------------------------------------------


def test_a_node_of_com_microsoft():
    case = QMoECase(zero_points=True)
    model = stock_model(case)
    expected = result_of(model, case)
    report = qmoe_plugin.prepack(model)
    (node,) = model.graph.node
    assert node.domain == OURS
    assert list(node.input) == [
        *("input", "router_probs", "fc1_experts_weights.packed", "", ""),
        "fc2_experts_weights.packed",
    ]
    assert set(initializers(model)) == {name for name in node.input if "packed" in name}
    attributes = attributes_of(node)
    assert attributes["weights_layout"] == b"packed"
    assert "weights_prepacked" not in attributes
    assert not node.metadata_props
    (packed,) = report.packed
    assert packed.weights == ("fc1 int4 block 32, 4 x 192 x 64", "fc2 int4 block 32, 4 x 64 x 96")
    assert {choice.stage for choice in packed.kernels} == {"fc1", "fc2"}
    assert (report.kept, report.already, report.target) == ((), 0, "CPU")
    assert result_of(model, case) == expected


def test_a_matmul_nbits_node():
    model = stock_model(MatMulNBitsCase(zero_points="packed"))
    report = qmoe_plugin.prepack(model, sm=90)
    (node,) = model.graph.node
    assert list(node.input) == ["A", "B.packed"]
    assert attributes_of(node)["weights_layout"] == b"packed"
    assert report.packed[0].weights == ("B int4 block 32, 1 x 48 x 96",)
    assert report.target == "CUDA (sm_90)"


def test_a_moe_node():
    model = stock_model(MoECase(dtype="float16", weights="bfloat16", fusion=2))
    report = qmoe_plugin.prepack(model)
    (node,) = model.graph.node
    inputs = [
        "input",
        "router_probs",
        "fc1_experts_weights.packed",
        "",
        "fc2_experts_weights.packed",
    ]
    assert list(node.input) == inputs
    assert (node.domain, node.op_type) == (OURS, "MoE")
    assert attributes_of(node)["weights_layout"] == b"packed"
    (packed,) = report.packed
    assert packed.weights == (
        "fc1 bfloat16 per channel, 4 x 192 x 64",
        "fc2 bfloat16 per channel, 4 x 64 x 96",
    )


@pytest.mark.parametrize("made", [Fp8WeightCase, Fp4WeightCase])
def test_block_quantized_nodes_are_told_their_sizes(made):
    """The shape of B said them; shape inference needs N."""
    case = made(n=48, k=96, a_scale=True)
    model = stock_model(case)
    model.graph.output[0].type.tensor_type.ClearField("shape")
    expected = result_of(model, case)
    qmoe_plugin.prepack(model)
    attributes = attributes_of(model.graph.node[0])
    assert (attributes["N"], attributes["K"]) == (48, 96)
    session = qmoe_plugin.session(model, ["CPUExecutionProvider"])
    assert session.get_outputs()[0].shape[-1] == 48
    assert result_of(model, case) == expected


def test_act_scales_and_router_weights_stay():
    case = QMoECase(
        "mxfp4", quant_type="wfp4afp8", act_scales="experts", router_weights=True
    ).fitted()
    model = stock_model(case)
    qmoe_plugin.prepack(model)
    given = {name for name in model.graph.node[0].input if name}
    assert {"router_weights", "fc1_act_scale", "fc2_act_scale"} <= given
    assert not {"fc1_global_scale", "fc1_scales"} & given


@pytest.mark.parametrize(
    ("activation", "attributes"),
    [
        ("silu", {"activation_type": b"swiglu", "activation_alpha": 1.0, "activation_beta": 0.0}),
        ("swiglu", {"activation_type": b"swiglu", "activation_alpha": 1.5, "swiglu_limit": 7.0}),
        ("swiglu", {"swiglu_limit": 7.0, "swiglu_limit_after_activation": 1}),
        ("geglu", {"activation_type": b"geglu"}),
    ],
)
def test_ups_of_their_own_become_part_of_fc1(activation, attributes):
    limit = None if activation == "geglu" else 7.0
    after = "swiglu_limit_after_activation" in attributes
    case = QMoECase(
        fusion=0, fc3=True, activation=activation, alpha=1.5, limit=limit, limit_after=after
    )
    model = stock_model(case)
    qmoe_plugin.prepack(model)
    written = attributes_of(model.graph.node[0])
    assert attributes.items() <= written.items()
    assert written["swiglu_fusion"] == 1
    assert ("swiglu_limit" in written) == (activation == "swiglu")


def test_a_guessed_layout_is_reported(caplog):
    case = QMoECase(hidden=128, inter=128, activation="relu")
    model = stock_model(case)
    (node,) = model.graph.node
    kept = [attribute for attribute in node.attribute if attribute.name != "weights_prepacked"]
    del node.attribute[:]
    node.attribute.extend(kept)
    with caplog.at_level(logging.WARNING, "qmoe_plugin"):
        report = qmoe_plugin.prepack(model)
    assert "they are read as raw" in report.packed[0].warning
    assert "they are read as raw" in caplog.text


def test_a_node_is_told_the_type_of_its_activations():
    """Scales and biases told it, and are gone."""
    case = QMoECase(dtype="float16", rank=3)
    tensors = case.tensors()
    model = case.model(tensors, STOCK)
    node = model.graph.node[0]
    identity = [
        helper.make_node("Identity", ["input"], ["inner_input"]),
        helper.make_node("Identity", ["inner_output"], ["output"]),
    ]
    node.input[0], node.output[0] = "inner_input", "inner_output"
    ordered = [identity[0], copy.deepcopy(node), identity[1]]
    del model.graph.node[:]
    model.graph.node.extend(ordered)
    expected = result_of(model, case)
    assert len(qmoe_plugin.prepack(model, sm=90).packed) == 1
    graph = ir.from_proto(model).graph
    assert [p.dtype for p in describe(graph[1]).gemms] == ["float16", "float16"]
    again = case.model(tensors, STOCK)
    qmoe_plugin.prepack(again)
    assert result_of(again, case) == expected


# --- nodes that are left --------------------------------------------------------------------------


def kept_reason(model, **options):
    """The reason of the only node, which must still run as before."""
    report = qmoe_plugin.prepack(model, **options)
    assert not report.packed
    return report.kept[0].reason


def test_g_idx():
    case = MatMulNBitsCase(g_idx="shuffled")
    model = stock_model(case)
    expected = result_of(model, case)
    assert "B has a g_idx" in kept_reason(model)
    assert model.graph.node[0].domain == OURS
    assert result_of(model, case) == expected


def test_weights_that_are_not_finite():
    tensors = QMoECase().tensors()
    tensors["fc2_scales"][2, 5, 1] = np.nan
    model = one_node_model("QMoE", tensors, QMoECase().attributes(), domain=STOCK)
    before = [copy.deepcopy(tensor) for tensor in model.graph.initializer]
    assert "fc2 scale" in kept_reason(model)
    assert list(model.graph.initializer) == before


def test_a_node_that_no_kernel_takes_stays_in_com_microsoft():
    model = stock_model(MatMulNBitsCase())
    model.graph.node[0].attribute.append(helper.make_attribute("weight_prepacked", 1))
    before = copy.deepcopy(model)
    assert "B cannot be SM80 prepacked" in kept_reason(model)
    assert model.graph.node == before.graph.node
    assert model.graph.initializer == before.graph.initializer


def test_a_node_in_a_function():
    model = stock_model()
    (node,) = model.graph.node
    constants = [
        helper.make_node("Constant", [], [tensor.name], value=tensor)
        for tensor in model.graph.initializer
    ]
    function = helper.make_function(
        "local",
        "Experts",
        ["input", "router_probs"],
        ["output"],
        [*constants, node],
        [helper.make_opsetid("", 21), helper.make_opsetid(STOCK, 1)],
    )
    call = helper.make_node("Experts", ["input", "router_probs"], ["output"], domain="local")
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.append(call)
    model.functions.append(function)
    model.opset_import.append(helper.make_opsetid("local", 1))
    expected = result_of(model, QMoECase())
    assert "inline the function first" in kept_reason(model)
    assert result_of(model, QMoECase()) == expected


def test_nodes_that_were_packed_before():
    model = stock_model()
    qmoe_plugin.prepack(model)
    before = copy.deepcopy(model)
    report = qmoe_plugin.prepack(model)
    assert (report.packed, report.kept, report.already) == ((), (), 1)
    assert "1 were packed before" in str(report)
    reason = kept_reason(model, sm=90)
    assert "fc1 weights were packed for CPUs" in reason
    assert "prepack(model, output, sm=90)" in reason
    assert model == before


def test_no_way_back():
    for name in ("int4", "nvfp4"):
        model = stock_model(QMoECase(name).fitted())
        qmoe_plugin.retarget(model, sm=0)
        qmoe_plugin.prepack(model)
        assert not any(e.key == RESTORE_KEY for e in model.graph.node[0].metadata_props)
        before = copy.deepcopy(model)
        report = qmoe_plugin.unretarget(model)
        assert "its weights are packed" in report.kept[0].reason
        assert model == before


# --- shared tensors, subgraphs, constants ---------------------------------------------------------


def test_weights_that_another_node_reads_too():
    case = MatMulNBitsCase(bias=False)
    model = stock_model(case)
    shape = helper.make_node("Shape", ["B"], ["shape"])
    model.graph.node.append(shape)
    model.graph.output.append(helper.make_tensor_value_info("shape", TensorProto.INT64, [3]))
    expected = result_of(model, case)
    qmoe_plugin.prepack(model)
    assert set(initializers(model)) == {"B", "B.packed"}
    assert result_of(model, case) == expected


def test_two_nodes_with_the_same_weights():
    case = MatMulNBitsCase(n=96, bias=False)
    model = stock_model(case)
    second = copy.deepcopy(model.graph.node[0])
    second.name, second.input[0], second.output[0] = "second", "output", "twice"
    model.graph.node.append(second)
    model.graph.output[0].name = "twice"
    expected = result_of(model, case)
    assert len(qmoe_plugin.prepack(model).packed) == 2
    assert set(initializers(model)) == {"B.packed", "B.packed2"}
    assert result_of(model, case) == expected


def test_weights_in_constant_nodes():
    case = MatMulNBitsCase()
    model = stock_model(case)
    nodes = [
        helper.make_node("Constant", [], [tensor.name], value=tensor)
        for tensor in model.graph.initializer
    ]
    nodes.append(copy.deepcopy(model.graph.node[0]))
    del model.graph.initializer[:], model.graph.node[:]
    model.graph.node.extend(nodes)
    expected = result_of(model, case)
    assert len(qmoe_plugin.prepack(model).packed) == 1
    assert [node.op_type for node in model.graph.node] == ["MatMulNBits"]
    assert result_of(model, case) == expected


@pytest.mark.parametrize("outer", [False, True])
def test_a_node_in_a_subgraph(outer):
    """Weights stay in the graph that they were in."""
    case = MatMulNBitsCase()
    inner = stock_model(case).graph
    branches = []
    for name in ("then", "else"):
        kept = [] if outer else [copy.deepcopy(tensor) for tensor in inner.initializer]
        node = copy.deepcopy(inner.node[0])
        node.name, node.output[0] = name, f"{name}_y"
        if not outer:
            for tensor in kept:
                tensor.name = f"{name}_{tensor.name}"
            node.input[1:] = [f"{name}_{each}" if each else "" for each in node.input[1:]]
        output = helper.make_tensor_value_info(f"{name}_y", TensorProto.FLOAT, None)
        branches.append(helper.make_graph([node], name, [], [output], kept))
    graph = helper.make_graph(
        [
            helper.make_node(
                "If", ["cond"], ["output"], then_branch=branches[0], else_branch=branches[1]
            )
        ],
        "outer",
        [*inner.input, helper.make_tensor_value_info("cond", TensorProto.BOOL, [])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, None)],
        inner.initializer if outer else [],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(STOCK, 1)]
    model = helper.make_model(graph, ir_version=10, opset_imports=opsets)
    feeds = {**feeds_of(case.tensors()), "cond": np.array(True)}
    expected = run(open_session(case.model(case.tensors(), OURS)), feeds_of(case.tensors()))
    report = qmoe_plugin.prepack(model)
    assert len(report.packed) == 2
    assert len(model.graph.initializer) == (2 if outer else 0)
    session = open_session(model)
    assert bits_of(session.run(None, feeds)[0]) == bits_of(expected)


def test_names_that_are_taken():
    model = stock_model(MatMulNBitsCase())
    model.graph.node.append(helper.make_node("Identity", ["output"], ["B.packed"]))
    qmoe_plugin.prepack(model)
    assert model.graph.node[0].input[1] == "B.packed2"


# --- explanations ---------------------------------------------------------------------------------


def explained(path_or_model, sm):
    (answer,) = explain_model(path_or_model, sm=sm)
    return answer


@pytest.mark.parametrize(
    "case",
    [
        QMoECase(zero_points=True),
        QMoECase(fusion=0, fc3=True, activation="silu"),
        MatMulNBitsCase(),
    ],
    ids=str,
)
def test_a_packed_node_is_explained_as_before(case, tmp_path):
    before = explained(ir.from_proto(case.model(case.tensors(), OURS)), 0)
    path = save_external(stock_model(case), tmp_path)
    qmoe_plugin.prepack(path, tmp_path / "packed.onnx")
    after = explained(tmp_path / "packed.onnx", 0)
    assert after.runs
    assert after.explanations == before.explanations


def test_a_node_packed_for_another_device_is_explained():
    model = stock_model(QMoECase(dtype="bfloat16"))
    qmoe_plugin.prepack(model, sm=90)
    answer = explained(ir.from_proto(model), 0)
    assert (
        "fc1 weights were packed for GPUs (layout cuda_tile16x64), and this is CPU" in answer.reason
    )
    assert "prepack(model, output, sm=None)" in answer.reason
    assert "packed for" not in explained(ir.from_proto(model), 90).reason
    model = stock_model(QMoECase(dtype="bfloat16"))
    qmoe_plugin.prepack(model)
    assert "fc1 weights were packed for CPUs" in explained(ir.from_proto(model), 90).reason


def test_damaged_weights_are_explained():
    model = stock_model()
    qmoe_plugin.prepack(model)
    changed = {"fc2": resealed(packed_tensors(model)["fc2"], version=9)}
    answer = explained(ir.from_proto(with_packed(model, changed)), 0)
    assert "fc2: packed weights are of version 9; this build reads version 1" in answer.reason


def test_the_report_is_json():
    report = qmoe_plugin.prepack(stock_model())
    row = json.loads(json.dumps(report.to_dict()))
    assert row["packed"][0]["weights"][0] == "fc1 int4 block 32, 4 x 192 x 64"
    assert str(report).splitlines()[0] == "packed 1 of 1 nodes for CPU"
