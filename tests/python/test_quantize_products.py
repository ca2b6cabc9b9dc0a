"""`quantize` on MatMul and Gemm: against the oracle, the float model and a session."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from helpers.dtypes import numpy_dtype, onnx_type
from helpers.quantized import ERRORS, attributes_of, initializers, inputs_of, node_of, rms
from helpers.run import open_session, run
from helpers.tolerance import TOLERANCE
from onnx import helper, numpy_helper

import qmoe_plugin
from qmoe_plugin import reference
from qmoe_plugin.graph import quantize_weights
from qmoe_plugin.graph.describe import describe

pytestmark = pytest.mark.usefixtures("library")


def product_model(
    op="MatMul", n=48, k=72, dtype="float32", transpose=None, bias=None, **attributes
):
    """Y = A W, with weights as the op has them; "W" is [N, K] if Gemm's transB says so."""
    rng = np.random.default_rng(n + k)
    weights = rng.standard_normal((n, k)).astype(numpy_dtype(dtype))
    nodes, transposed = [], not attributes.get("transB", 0)
    if transpose:
        nodes.append(helper.make_node("Transpose", ["W"], ["Wt"], **transpose))
        transposed = not transposed
    stored = np.ascontiguousarray(weights.T if transposed else weights)
    constants = [numpy_helper.from_array(stored, "W")]
    names = ["A", "Wt" if transpose else "W"]
    if bias is not None:
        constants.append(numpy_helper.from_array(bias.astype(numpy_dtype(dtype)), "C"))
        names.append("C")
    nodes.append(helper.make_node(op, names, ["Y"], name="product", **attributes))
    kind = onnx_type(numpy_dtype(dtype))
    values = [helper.make_tensor_value_info("A", kind, ["tokens", k])]
    outputs = [helper.make_tensor_value_info("Y", kind, ["tokens", n])]
    graph = helper.make_graph(nodes, "g", values, outputs, constants)
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 21)])
    return model, weights


def check_product(model, weights, spec_error, bias=None):
    """The quantised model against the oracle, in a session, and against the float weights."""
    node = node_of(model, "MatMulNBits")
    describe(next(n for n in ir.from_proto(model).graph if n.op_type == "MatMulNBits"))
    tensors, attributes = inputs_of(model, node), attributes_of(node)
    sizes = {"k": attributes["K"], "n": attributes["N"], "block_size": attributes["block_size"]}
    fmt = reference.matmul_nbits_format(attributes)
    names = ("B", "scales", "zero_points", "g_idx", "codebook", "global_scale")
    decoded = reference.matmul_nbits_weights(*map(tensors.get, names), **sizes, fmt=fmt)
    error = rms(decoded - weights.astype(np.float64)) / rms(weights)
    assert 0 < error < spec_error
    x = np.random.default_rng(5).standard_normal((5, weights.shape[1])).astype(weights.dtype)
    result = run(open_session(model), {"A": x}).astype(np.float64)
    expected = x.astype(np.float64) @ decoded.T + (0 if bias is None else bias)
    walk = np.abs(expected) + np.sqrt(x.astype(np.float64) ** 2 @ (decoded**2).T)
    assert (np.abs(result - expected) <= TOLERANCE[str(weights.dtype)] * walk).all()
    plain = x.astype(np.float64) @ weights.astype(np.float64).T + (0 if bias is None else bias)
    assert rms(result - plain) < 1.3 * spec_error * rms(plain)


# --- MatMul and Gemm ------------------------------------------------------------------------------


@pytest.mark.parametrize("search", ["nearest", "mse"])
@pytest.mark.parametrize("spec", ERRORS)
def test_matmul_in_every_format(spec, search):
    model, weights = product_model()  # K = 72: the last block is partial
    report = qmoe_plugin.quantize(model, format=spec, search=search)
    assert [(n.name, n.op_type) for n in report.quantized] == [("product", "MatMul")]
    check_product(model, weights, ERRORS[spec])
    assert not {"W"} & initializers(model).keys()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    "spec", ["int4", "int8:32:asymmetric", "mxfp4", "nvfp4", "fp8_e4m3:32", "fp8_e4m3:0"]
)
def test_matmul_of_16_bits(spec, dtype):
    model, weights = product_model(dtype=dtype)
    qmoe_plugin.quantize(model, format=spec)
    check_product(model, weights, ERRORS[spec] + 0.004)


def test_matmul_behind_a_transpose():
    for transpose in ({}, {"perm": [1, 0]}):
        model, weights = product_model(transpose=transpose or {"perm": [1, 0]})
        if not transpose:
            del model.graph.node[0].attribute[:]
        qmoe_plugin.quantize(model)
        check_product(model, weights, ERRORS["int4"])
        assert [node.op_type for node in model.graph.node] == ["MatMulNBits"]


@pytest.mark.parametrize("trans", [0, 1])
@pytest.mark.parametrize("shape", [None, (48,), (1, 48), (1,), ()])
def test_gemm(trans, shape):
    bias = None if shape is None else np.random.default_rng(1).standard_normal(shape)
    model, weights = product_model("Gemm", bias=bias, transB=trans)
    qmoe_plugin.quantize(model)
    given = None if bias is None else np.broadcast_to(bias.reshape(-1), 48)
    check_product(model, weights, ERRORS["int4"], given)
    assert ("bias" in inputs_of(model, node_of(model, "MatMulNBits"))) == (bias is not None)


@pytest.mark.parametrize("search", ["nearest", "mse"])
def test_many_rows_are_quantised_in_pieces(monkeypatch, search):
    for spec in ("int4:16:asymmetric", "fp8_e4m3:32", "fp8_e4m3:0", "mxfp4", "nvfp4"):
        whole, _ = product_model(n=300)
        qmoe_plugin.quantize(whole, format=spec, search=search)
        with monkeypatch.context() as patch:
            patch.setattr(quantize_weights, "_WEIGHTS_AT_ONCE", 1)
            pieces, weights = product_model(n=300)
            qmoe_plugin.quantize(pieces, format=spec, search=search)
        assert pieces == whole
        check_product(pieces, weights, ERRORS[spec])


@pytest.mark.parametrize(
    ("model", "options", "text"),
    [
        (lambda: product_model("Gemm", alpha=0.5), {}, "alpha is 0.5; MatMulNBits has no"),
        (
            lambda: product_model("Gemm", beta=2.0, bias=np.ones(48)),
            {},
            "beta is 2; MatMulNBits has no",
        ),
        (
            lambda: product_model("Gemm", bias=np.ones((5, 48))),
            {},
            r"C has shape \[5, 48\]; a bias is \[48\]",
        ),
        (lambda: product_model("Gemm", transA=1), {}, "transA is 1"),
        (lambda: product_model(), {"format": "int4:0"}, "MatMulNBits has no scales of rows"),
        (lambda: product_model(), {"format": "keep"}, "the default keeps it in float"),
        (
            lambda: product_model(),
            {"rules": [("^product$", "keep")]},
            r"\^product\$=keep keeps it in float",
        ),
    ],
)
def test_products_that_stay(model, options, text):
    proto, _ = model()
    before = copy.deepcopy(proto)
    report = qmoe_plugin.quantize(proto, **options)
    assert report.quantized == ()
    with pytest.raises(AssertionError, match=text):
        raise AssertionError(report.kept[0].reason)
    assert [n.op_type for n in proto.graph.node] == [n.op_type for n in before.graph.node]
    assert initializers(proto).keys() == initializers(before).keys()


def test_weights_that_are_not_finite_stay():
    model, _ = product_model()
    model.graph.initializer[0].raw_data = np.full((72, 48), np.nan, np.float32).tobytes()
    report = qmoe_plugin.quantize(model)
    assert report.kept[0].reason == "'W' holds NaN or infinity, which no format has"


def other_model(nodes, constants, outputs, functions=()):
    """Nodes that read "x", float [tokens, 64]."""
    kind = onnx.TensorProto.FLOAT
    values = [helper.make_tensor_value_info("x", kind, ["tokens", 64])]
    made = [helper.make_tensor_value_info(name, kind, None) for name in outputs]
    tensors = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "g", values, made, tensors)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("local", 1)]
    return helper.make_model(graph, ir_version=10, opset_imports=opsets, functions=functions)


W = np.random.default_rng(3).standard_normal((64, 64)).astype(np.float32)


def result_of(model):
    x = np.random.default_rng(4).standard_normal((3, 64)).astype(np.float32)
    return x, run(open_session(model), {"x": x})


def test_a_weight_in_a_constant_node():
    constant = helper.make_node("Constant", [], ["W"], value=numpy_helper.from_array(W))
    product = helper.make_node("MatMul", ["x", "W"], ["y"])
    model = other_model([constant, product], {}, ["y"])
    assert len(qmoe_plugin.quantize(model, format="int8").quantized) == 1
    assert [node.op_type for node in model.graph.node] == ["MatMulNBits"]
    x, result = result_of(model)
    assert rms(result - x @ W) < 0.01 * rms(x @ W)


def test_a_weight_that_others_read_stays_beside_the_quantised_one():
    nodes = [
        helper.make_node("MatMul", ["x", "W"], ["a"], name="one"),
        helper.make_node("MatMul", ["x", "W"], ["b"], name="two"),
        helper.make_node("Add", ["W", "W"], ["c"]),
    ]
    model = other_model(nodes, {"W": W}, ["a", "b", "c"])
    qmoe_plugin.quantize(model, format="int8", rules=[("two", "int4")])
    np.testing.assert_array_equal(initializers(model)["W"], W)
    x, result = result_of(model)
    assert rms(result - x @ W) < 0.01 * rms(x @ W)


def test_a_product_in_a_subgraph():
    branches = {}
    for name, op_type in (("then_branch", "MatMul"), ("else_branch", "Identity")):
        names = ["x", "W"] if op_type == "MatMul" else ["x"]
        node = helper.make_node(op_type, names, [name], name=f"{name}_node")
        output = helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        branches[name] = helper.make_graph([node], name, [], [output])
    choice = helper.make_node("If", ["yes"], ["y"], **branches)
    model = other_model([choice], {"W": W, "yes": np.array(True)}, ["y"])
    report = qmoe_plugin.quantize(model, format="int8")
    if report.kept:  # onnxruntime before 1.29 does not give the weights to a kernel there
        assert "belongs to a graph around the node's own" in report.kept[0].reason
        return
    x, result = result_of(model)
    assert rms(result - x @ W) < 0.01 * rms(x @ W)


def test_what_is_no_product_with_a_weight_is_not_in_the_report():
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"]),
        helper.make_node("MatMul", ["t", "x"], ["y"]),
    ]
    report = qmoe_plugin.quantize(other_model(nodes, {}, ["y"]))
    assert (report.quantized, report.kept) == ((), ())


@pytest.mark.parametrize(
    ("nodes", "constants", "text"),
    [
        (
            [
                helper.make_node("Cast", ["W"], ["w"], to=onnx.TensorProto.FLOAT),
                helper.make_node("MatMul", ["x", "w"], ["y"]),
            ],
            {"W": W.astype(np.float16)},
            "is computed by Cast",
        ),
        (
            [
                helper.make_node("Transpose", ["x"], ["t"]),
                helper.make_node("MatMul", ["W", "t"], ["y"]),
            ],
            {"W": W},
            "the constant is on the left",
        ),
        (
            [helper.make_node("MatMul", ["x", "W"], ["y"])],
            {"W": np.stack([W, W])},
            r"shape [2, 64, 64]; MatMulNBits has one matrix",
        ),
        ([helper.make_node("MatMul", ["x", "W"], ["y"])], {"W": W[:, 0]}, "shape [64]"),
    ],
)
def test_other_constants_stay(nodes, constants, text):
    model = other_model(nodes, constants, ["y"])
    before = model.SerializeToString()
    assert text in qmoe_plugin.quantize(model).kept[0].reason
    assert onnx.ModelProto.FromString(before).graph.node == model.graph.node


def test_a_weight_in_a_function_stays():
    body = [
        helper.make_node("Constant", [], ["W"], value=numpy_helper.from_array(W)),
        helper.make_node("MatMul", ["x", "W"], ["y"]),
    ]
    opsets = [helper.make_opsetid("", 21)]
    function = helper.make_function("local", "Product", ["x"], ["y"], body, opsets)
    call = helper.make_node("Product", ["x"], ["y"], domain="local")
    report = qmoe_plugin.quantize(other_model([call], {}, ["y"], [function]))
    assert report.kept[0].function == "local.Product"
    assert "a function of the model holds it" in report.kept[0].reason
