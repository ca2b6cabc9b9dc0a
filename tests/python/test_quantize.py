"""`quantize`: what routes, rules, reports and wrong options."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from helpers.moe_cases import MoECase
from helpers.quantized import initializers
from helpers.run import open_session
from onnx import helper, numpy_helper

import qmoe_plugin

pytestmark = pytest.mark.usefixtures("library")


def routed_model(between=("Softmax",), sink="MoE"):
    """x -> MatMul "router" -> between -> TopK, or MoE's logits; MatMul "up" beside it."""
    case = MoECase(bias=False)
    tensors = case.tensors()
    model = case.model(tensors)
    graph = model.graph
    rng = np.random.default_rng(0)
    table = {"Wr": (64, 4), "Wu": (64, 64), "Wg": (64, 1), "Br": (4,)}
    for name, shape in table.items():
        values = rng.standard_normal(shape).astype(np.float32)
        graph.initializer.append(numpy_helper.from_array(values, name))
    nodes = [
        helper.make_node("MatMul", ["input", "Wr"], ["logits0"], name="router"),
        helper.make_node("MatMul", ["input", "Wu"], ["up"], name="up"),
        helper.make_node("MatMul", ["up", "Wg"], ["gate0"], name="gate"),
        helper.make_node("Sigmoid", ["gate0"], ["gate1"]),
    ]
    last = "logits0"
    for index, op_type in enumerate(between):
        extra = ["Br"] if op_type == "Add" else []
        attributes = {"to": onnx.TensorProto.FLOAT} if op_type == "Cast" else {}
        made = f"logits{index + 1}"
        nodes.append(helper.make_node(op_type, [last, *extra], [made], **attributes))
        last = made
    if sink == "TopK":
        two = np.array([2], np.int64)
        graph.initializer.append(numpy_helper.from_array(two, "two"))
        nodes.append(helper.make_node("TopK", [last, "two"], ["best", "which"]))
    else:
        graph.node[0].input[1] = last
        del graph.input[1]
    for node in reversed(nodes):
        graph.node.insert(0, node)
    kind = onnx.TensorProto.FLOAT
    graph.output.append(helper.make_tensor_value_info("gate1", kind, None))
    return model


@pytest.mark.parametrize("sink", ["MoE", "TopK"])
@pytest.mark.parametrize("between", [(), ("Softmax",), ("Cast", "Add", "Sigmoid", "Identity")])
def test_routers_and_gates_stay_in_float(between, sink):
    model = routed_model(between, sink)
    report = qmoe_plugin.quantize(model)
    assert {n.name for n in report.quantized} == {"up", "node"}
    reasons = {n.name: n.reason for n in report.kept}
    assert reasons.keys() == {"router", "gate"}
    assert "which experts are chosen" in reasons["router"]
    assert "gate of a shared expert" in reasons["gate"]
    assert "stays in float unless a rule names it" in str(report)
    open_session(model)


def test_a_rule_may_quantise_a_router():
    report = qmoe_plugin.quantize(routed_model(), rules=[("router", "int8")], format="keep")
    (node,) = report.quantized
    assert node.name == "router"
    assert node.warning.startswith("router=int8 quantises it, though it computes router logits")
    assert "in doubt" in str(report)


# --- rules and reports ----------------------------------------------------------------------------


def test_the_first_rule_counts():
    rules = [("^up$", "int8"), ("up|gate", "int4"), ("Wu", "mxfp4"), ("nothing", "int4")]
    report = qmoe_plugin.quantize(routed_model(), rules=rules, format="keep")
    weights = {n.name: n.weights for n in report.quantized}
    assert weights["up"] == ("B int8 block 32, 64 x 64",)
    assert weights["gate"] == ("B int4 block 32, 1 x 64",)
    assert report.unmatched_rules == ("Wu=mxfp4", "nothing=int4")
    assert "rules that counted for no weight:\n  Wu=mxfp4\n  nothing=int4" in str(report)


def test_rules_match_names_of_weights():
    report = qmoe_plugin.quantize(routed_model(), rules=[("^Wu$", "nvfp4")], format="keep")
    assert [n.weights for n in report.quantized] == [("B nvfp4 block 16, 64 x 64",)]


def test_the_report():
    model = routed_model()
    report = qmoe_plugin.quantize(model, format="int4:16:asymmetric", search="mse")
    text = str(report)
    assert text.startswith("quantised 2 of 4 nodes with searched scales\n")
    assert "fc1 int4 asymmetric block 16, 4 x 192 x 64; fc2 int4" in text
    again = qmoe_plugin.quantize(model)
    assert (again.quantized, again.already) == ((), 2)
    assert report.to_dict()["quantized"][0]["weights"]


def test_dry_run_changes_nothing():
    model = routed_model()
    before = model.SerializeToString()
    report = qmoe_plugin.quantize(model, dry_run=True)
    assert str(report).startswith("would quantise 2 of 4 nodes")
    assert model.SerializeToString() == before
    assert report.quantized == qmoe_plugin.quantize(model).quantized


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"format": "int5"}, "format 'int5' is not known; known formats: .*nf4"),
        ({"format": "int4:7"}, "blocks of 7; they must be 0 or a power of two"),
        ({"format": "int4:32:odd"}, "'int4:32:odd' is no spec: a spec is FORMAT"),
        ({"format": "nvfp4:32"}, "nvfp4 has blocks of 16"),
        ({"format": "mxfp4:asymmetric"}, "mxfp4 has no zero points"),
        ({"format": "codebook4"}, "codebook4 has no values of its own; write nf4, af4, iq4_nl"),
        ({"rules": [("(", "int4")]}, r"'\(' is no regular expression"),
        ({"rules": [("a", "int3")]}, "format 'int3' is not known"),
        ({"search": "gptq"}, "search is 'gptq'; allowed are nearest, mse"),
    ],
)
def test_wrong_options(options, text):
    with pytest.raises(ValueError, match=text) as raised:
        qmoe_plugin.quantize(routed_model(), **options)
    assert "\n" not in str(raised.value)


def test_every_kind_of_model_gets_the_same_weights(tmp_path):
    in_place = routed_model()
    qmoe_plugin.quantize(in_place)
    decoded = ir.from_proto(routed_model())
    qmoe_plugin.quantize(decoded)
    output = tmp_path / "new" / "out.onnx"
    qmoe_plugin.quantize(routed_model().SerializeToString(), output)
    expected = initializers(in_place)
    for other in (ir.to_proto(decoded), onnx.load(output)):
        found = initializers(other)
        assert found.keys() == expected.keys()
        for name in found:
            assert found[name].dtype == expected[name].dtype
            np.testing.assert_array_equal(found[name], expected[name])
