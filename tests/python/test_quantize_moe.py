"""`quantize` on MoE: against the oracle, the float model and a session."""

from __future__ import annotations

import copy

import numpy as np
import onnx_ir as ir
import pytest
from helpers.cases import feeds_of, qmoe_oracle
from helpers.moe_cases import MoECase
from helpers.quantized import ERRORS, attributes_of, inputs_of, node_of, rms
from helpers.run import open_session, run
from helpers.tolerance import TOLERANCE, qmoe_error_scale
from onnx import helper, numpy_helper

import qmoe_plugin
from qmoe_plugin import reference
from qmoe_plugin.formats import codebook4
from qmoe_plugin.graph.describe import describe

pytestmark = pytest.mark.usefixtures("library")


PER_CHANNEL = {"int4:0": 0.16, "int8:0:asymmetric": 0.012, "nf4:0": 0.15}


def check_moe(model, case, tensors, bounds):
    """The quantised model against the oracle, in a session, and against the float model."""
    node = node_of(model, "QMoE")
    assert node.domain == "qmoe_plugin"
    describe(ir.from_proto(model).graph[0])
    made = feeds_of(tensors) | inputs_of(model, node)
    attributes = attributes_of(node)
    expected = qmoe_oracle(made, attributes)
    result = run(open_session(model), feeds_of(tensors)).astype(np.float64)
    allowed = TOLERANCE[case.dtype] * qmoe_error_scale(made, attributes)[0]
    assert (np.abs(result - expected) <= allowed).all()
    plain = case.expected(tensors)
    assert 0 < rms(result - plain) < 2.5 * bounds * rms(plain)
    return attributes


@pytest.mark.parametrize("domain", ["com.microsoft", "qmoe_plugin"])
@pytest.mark.parametrize("spec", ERRORS | PER_CHANNEL)
def test_moe_in_every_format(spec, domain):
    case = MoECase()
    tensors = case.tensors()
    model = case.model(tensors, domain)
    report = qmoe_plugin.quantize(model, format=spec)
    assert len(report.quantized[0].weights) == 2
    attributes = check_moe(model, case, tensors, (ERRORS | PER_CHANNEL)[spec])
    assert "fc1_format" not in attributes


@pytest.mark.parametrize("search", ["nearest", "mse"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("spec", ["int2:16", "int4", "mxfp4", "nvfp4", "fp8_e4m3"])
def test_moe_of_16_bits(spec, dtype, search):
    case = MoECase(dtype=dtype, bias=False)
    tensors = case.tensors()
    model = case.model(tensors, "com.microsoft")
    qmoe_plugin.quantize(model, format=spec, search=search)
    check_moe(model, case, tensors, ERRORS[spec] + 0.01)


@pytest.mark.parametrize("activation", ["silu", "geglu", "swiglu"])
@pytest.mark.parametrize("spec", ["int4", "int8:32:asymmetric", "nvfp4", "fp8_e4m3", "nf4"])
def test_moe_with_fc3_is_merged(spec, activation):
    limits = {"alpha": 1.7, "beta": 1.0, "limit": 1.5} if activation == "swiglu" else {}
    case = MoECase(activation=activation, fc3=True, fusion=0, **limits)
    tensors = case.tensors()
    model = case.model(tensors)
    report = qmoe_plugin.quantize(model, format=spec)
    assert report.quantized[0].weights[0].endswith("4 x 192 x 64")
    attributes = check_moe(model, case, tensors, ERRORS[spec])
    assert attributes["swiglu_fusion"] == 1
    assert attributes["activation_type"] == ("geglu" if activation == "geglu" else "swiglu")
    # Rows of gates and ups alternate, and so do their biases.
    made = inputs_of(model, node_of(model, "QMoE"))
    assert not any(name.startswith("fc3") for name in made)
    np.testing.assert_array_equal(made["fc1_experts_bias"][:, ::2], tensors["fc1_experts_bias"])
    np.testing.assert_array_equal(made["fc1_experts_bias"][:, 1::2], tensors["fc3_experts_bias"])


def test_silu_beside_fc3_has_no_limit():
    case = MoECase(activation="silu", fc3=True, fusion=0, alpha=1.7, beta=1.0, limit=0.1)
    tensors = case.tensors()
    model = case.model(tensors)
    qmoe_plugin.quantize(model, format="int8")
    assert "swiglu_limit" not in check_moe(model, case, tensors, ERRORS["int8"])


@pytest.mark.parametrize("fc3", [False, True])
def test_the_limit_stays_after_the_activation(fc3):
    case = MoECase(limit=0.5, limit_after=True, fc3=fc3, fusion=0 if fc3 else 1)
    tensors = case.tensors()
    model = case.model(tensors)
    qmoe_plugin.quantize(model, format="int8")
    attributes = check_moe(model, case, tensors, ERRORS["int8"])
    assert attributes["swiglu_limit_after_activation"] == 1


@pytest.mark.parametrize("missing", ["fc1", "fc3"])
def test_one_bias_of_two(missing):
    case = MoECase(activation="silu", fc3=True, fusion=0, dtype="float16")
    tensors = case.tensors()
    del tensors[f"{missing}_experts_bias"]
    model = case.model(tensors)
    qmoe_plugin.quantize(model, format="int8")
    check_moe(model, case, tensors, ERRORS["int8"])
    assert inputs_of(model, node_of(model, "QMoE"))["fc1_experts_bias"].dtype == np.float16


def swapped(model, tensors):
    """The model with its expert weights as [E, K, N]."""
    for tensor in model.graph.initializer:
        if tensor.name.endswith("weights"):
            values = np.ascontiguousarray(tensors[tensor.name].swapaxes(1, 2))
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


SWAPPED = [
    MoECase(),  # sizes of gates and ups tell the layout
    MoECase(activation="relu", bias=False),  # only those of activations do
    MoECase(activation="silu", fc3=True, fusion=0),
]


@pytest.mark.parametrize("search", ["nearest", "mse"])
@pytest.mark.parametrize("spec", ["int4", "int8:32:asymmetric", "nvfp4", "fp8_e4m3:32"])
@pytest.mark.parametrize("case", SWAPPED, ids=str)
def test_weights_with_n_and_k_swapped(case, spec, search):
    tensors = case.tensors()
    model, usual = case.model(tensors), case.model(tensors)
    swapped(model, tensors)
    for each in (model, usual):
        qmoe_plugin.quantize(each, format=spec, search=search)
    assert model == usual
    check_moe(model, case, tensors, ERRORS[spec])


def test_only_a_bias_tells_the_layout():
    case = MoECase(activation="relu")
    tensors = case.tensors()
    model = case.model(tensors)
    swapped(model, tensors)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.ClearField("shape")
    qmoe_plugin.quantize(model)
    assert inputs_of(model, node_of(model, "QMoE"))["fc1_scales"].shape == (4, 96, 2)


@pytest.mark.parametrize("op", ["MatMul", "Gemm"])
def test_only_the_router_tells_the_layout(op):
    case = MoECase(activation="silu", fc3=True, fusion=0, bias=False)
    tensors = case.tensors()
    model = case.model(tensors)
    swapped(model, tensors)
    x, logits = model.graph.node[0].input[:2]
    router = np.zeros((64, case.experts) if op == "MatMul" else (case.experts, 64), np.float32)
    model.graph.initializer.append(numpy_helper.from_array(router, "router"))
    flags = {"transB": 1} if op == "Gemm" else {}
    model.graph.node.insert(0, helper.make_node(op, [x, "router"], [logits], **flags))
    del model.graph.input[1]
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.ClearField("shape")
    qmoe_plugin.quantize(model)
    assert inputs_of(model, node_of(model, "QMoE"))["fc2_scales"].shape == (4, 64, 3)


def test_square_weights_are_taken_as_the_op_has_them():
    case = MoECase(activation="relu", inter=64)
    tensors = case.tensors()
    model = case.model(tensors)
    qmoe_plugin.quantize(model)
    check_moe(model, case, tensors, ERRORS["int4"])


@pytest.mark.parametrize("case", SWAPPED, ids=str)
def test_weights_behind_a_transpose(case):
    tensors = case.tensors()
    model, usual = case.model(tensors), case.model(tensors)
    swapped(model, tensors)
    node = model.graph.node[0]
    for index in (2, 4, 6):
        if index < len(node.input) and node.input[index]:
            name = f"{node.input[index]}.turned"
            turn = helper.make_node("Transpose", [node.input[index]], [name], perm=[0, 2, 1])
            node.input[index] = name
            model.graph.node.insert(0, turn)
    for each in (model, usual):
        qmoe_plugin.quantize(each)
    assert [node.op_type for node in model.graph.node] == ["QMoE"]
    assert model == usual


@pytest.mark.parametrize(
    ("fc1", "fc2"),
    [
        ("int4", "int8"),
        ("mxfp4", "nvfp4"),
        ("mxfp4", "int8:16"),
        ("fp8_e4m3", "mxfp4"),
        ("int4:16:asymmetric", "int4"),
        ("nf4", "iq4_nl"),
        ("int4", "fp8_e4m3"),
    ],
)
def test_a_format_for_each_projection(fc1, fc2):
    case = MoECase(shared=1)
    tensors = case.tensors()
    by_weight, by_node = case.model(tensors), case.model(tensors)
    rules = [("fc2_experts", fc2), ("fc1_experts", fc1)]
    report = qmoe_plugin.quantize(by_weight, rules=rules, format="keep")
    assert report.unmatched_rules == ()
    qmoe_plugin.quantize(by_node, rules=[("node/fc1", fc1)], format=fc2)
    assert by_node == by_weight
    check_moe(by_node, case, tensors, 0.15)


@pytest.mark.parametrize(
    ("case", "options", "text"),
    [
        (
            MoECase(),
            {"rules": [("fc1", "int4:32"), ("fc2", "int8:16")]},
            "fc1 is int4:32 and fc2 is int8:16, but a QMoE node has one block_size for both",
        ),
        (MoECase(), {"format": "int4:128"}, "fc1 has 64 columns; they must be a multiple of 128"),
        (MoECase(), {"rules": [("fc1", "keep")]}, "fc1=keep keeps fc1 in float"),
        (MoECase(k=9), {}, "k is 9; it must be from 1"),
    ],
)
def test_moe_that_stays(case, options, text):
    model = case.model(case.tensors())
    before = copy.deepcopy(model)
    report = qmoe_plugin.quantize(model, **options)
    assert report.quantized == ()
    assert text in report.kept[0].reason
    assert model.graph.node[0].op_type == before.graph.node[0].op_type == "MoE"


def test_searched_scales_make_the_model_better():
    case = MoECase(hidden=256, inter=128)
    tensors = case.tensors()
    for spec in ("int4", "int4:32:asymmetric", "mxfp4", "nvfp4", "nf4"):
        errors = []
        for search in ("nearest", "mse"):
            model = case.model(tensors)
            qmoe_plugin.quantize(model, format=spec, search=search)
            node = node_of(model, "QMoE")
            made, attributes = inputs_of(model, node), attributes_of(node)
            parts = [
                reference.Projection(
                    made[f"{p}_experts_weights"],
                    made.get(f"{p}_scales"),
                    made.get(f"{p}_zero_points"),
                    global_scale=made.get(f"{p}_global_scale"),
                    codebook=made.get(f"{p}_codebook"),
                )
                for p in ("fc1", "fc2")
            ]
            fc1, fc2 = (
                reference.projection_weights(
                    attributes, p, part, tensors[f"{p}_experts_weights"].shape[2]
                )
                for p, part in zip(("fc1", "fc2"), parts, strict=True)
            )
            errors.append(
                rms(fc1 - tensors["fc1_experts_weights"])
                + rms(fc2 - tensors["fc2_experts_weights"])
            )
        assert errors[1] < errors[0]


def test_a_codebook_is_in_the_model():
    case = MoECase()
    model = case.model(case.tensors())
    qmoe_plugin.quantize(model, format="af4")
    made = inputs_of(model, node_of(model, "QMoE"))
    np.testing.assert_array_equal(made["fc1_codebook"], codebook4.AF4)
    np.testing.assert_array_equal(made["fc2_codebook"], codebook4.AF4)


def test_the_result_can_go_to_com_microsoft():
    case = MoECase()
    for spec in ("int4", "int8:32:asymmetric"):
        model = case.model(case.tensors())
        qmoe_plugin.quantize(model, format=spec)
        assert len(qmoe_plugin.unretarget(model).moved) == 1


def test_the_type_of_activations_is_not_forgotten():
    """Inside a model that does not say types, scales of mxfp4 do not tell it either."""
    case = MoECase(dtype="float16", weights="float32")
    tensors = case.tensors()
    model = case.model(tensors)
    node = model.graph.node[0]
    before = helper.make_node("Identity", ["input"], ["inside"])
    after = helper.make_node("Identity", ["inside_output"], ["output"])
    node.input[0], node.output[0] = "inside", "inside_output"
    model.graph.node.insert(0, before)
    model.graph.node.append(after)
    qmoe_plugin.quantize(model, format="mxfp4")
    result = run(open_session(model), feeds_of(tensors))
    assert result.dtype == np.float16
    plain = case.expected(tensors)
    assert rms(result - plain) < 2.5 * ERRORS["mxfp4"] * rms(plain)
