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
from onnx import helper

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


@pytest.mark.parametrize("activation", ["silu", "geglu"])
@pytest.mark.parametrize("spec", ["int4", "int8:32:asymmetric", "fp8_e4m3:32", "nf4"])
def test_moe_with_fc3(spec, activation):
    case = MoECase(activation=activation, fc3=True, fusion=0)
    tensors = case.tensors()
    model = case.model(tensors)
    report = qmoe_plugin.quantize(model, format=spec)
    assert len(report.quantized[0].weights) == 3
    check_moe(model, case, tensors, ERRORS[spec])


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
        (
            MoECase(activation="silu", fc3=True, fusion=0),
            {"format": "nvfp4"},
            "fc3 is given, but nvfp4 needs a global scale for each projection",
        ),
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
