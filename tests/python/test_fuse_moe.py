"""The pass `moe` of `fuse` on hand-made graphs: what it takes, and what it refuses."""

from __future__ import annotations

import copy
import functools
import json

import numpy as np
import onnx
import pytest
from helpers.command import run
from helpers.quantized import attributes_of, initializers, node_of
from helpers.run import open_session
from onnx import TensorProto, helper, numpy_helper

import qmoe_plugin

pytestmark = pytest.mark.usefixtures("library")

H, INTER, E, K = 64, 32, 4, 2


class Builder:
    """A graph, node by node."""

    def __init__(self, dtype=np.float32):
        self.dtype, self.rng = np.dtype(dtype), np.random.default_rng(0)
        self.nodes, self.constants = [], []

    def constant(self, values, dtype=None) -> str:
        name = f"c{len(self.constants)}"
        array = np.asarray(values, dtype or self.dtype)
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def weight(self, *shape) -> str:
        return self.constant(self.rng.standard_normal(shape) / np.sqrt(shape[0]))

    def op(self, op_type, *inputs, outputs=1, **attributes):
        names = [f"v{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op_type, inputs, names, **attributes))
        return names[0] if outputs == 1 else names

    def model(self, output, hidden=H) -> onnx.ModelProto:
        kind = helper.np_dtype_to_tensor_dtype(self.dtype)
        self.nodes[-1].output[0] = "y" if self.nodes[-1].output[0] == output else output
        inputs = [helper.make_tensor_value_info("x", kind, ["batch", "tokens", hidden])]
        outputs = [helper.make_tensor_value_info("y", kind, ["batch", "tokens", hidden])]
        graph = helper.make_graph(self.nodes, "g", inputs, outputs, self.constants)
        opsets = [helper.make_opsetid("", 21)]
        model = helper.make_model(graph, ir_version=10, opset_imports=opsets)
        onnx.checker.check_model(model)
        return model


def swiglu(b, x, bias=False, linear="MatMul"):
    def product(value, n):
        if linear == "Gemm":
            extra = [b.weight(n)] if bias else []
            return b.op("Gemm", value, b.weight(n, value_size[value]), *extra, transB=1)
        out = b.op("MatMul", value, b.weight(value_size[value], n))
        return b.op("Add", out, b.weight(n)) if bias else out

    value_size = {x: H}
    gate, up = product(x, INTER), product(x, INTER)
    hidden = b.op("Mul", b.op("Mul", gate, b.op("Sigmoid", gate)), up)
    value_size[hidden] = INTER
    return product(hidden, H)


def gpt_oss(b, x, *, after=False):
    """One matrix, gates and ups alternating, with limits and biases.

    Args:
        b: Makes the nodes.
        x: The tokens.
        after: Whether gates are cut once they were activated.
    """
    both = b.op("Add", b.op("MatMul", x, b.weight(H, 2 * INTER)), b.weight(2 * INTER))
    axis, step = b.constant([1], np.int64), b.constant([2], np.int64)
    end = b.constant([2 * INTER], np.int64)
    parts = [b.op("Slice", both, b.constant([s], np.int64), end, axis, step) for s in (0, 1)]
    gate = parts[0] if after else b.op("Min", parts[0], b.constant(2.5))
    up = b.op("Clip", parts[1], b.constant(-2.5), b.constant(2.5))
    glu = b.op("Mul", gate, b.op("Sigmoid", b.op("Mul", gate, b.constant(1.702))))
    glu = b.op("Min", glu, b.constant(2.5)) if after else glu
    hidden = b.op("Mul", b.op("Add", up, b.constant(1.0)), glu)
    return b.op("Add", b.op("MatMul", hidden, b.weight(INTER, H)), b.weight(H))


def geglu(b, x):
    up, gate = b.op("MatMul", x, b.weight(H, INTER)), b.op("MatMul", x, b.weight(H, INTER))
    hidden = b.op("Mul", b.op("Gelu", gate, approximate="tanh"), up)
    return b.op("MatMul", hidden, b.weight(INTER, H))


def plain(op):
    def expert(b, x):
        return b.op("MatMul", b.op(op, b.op("MatMul", x, b.weight(H, INTER))), b.weight(INTER, H))

    return expert


def biased(b, x):
    return swiglu(b, x, bias=True)


def with_gemm(b, x):
    return swiglu(b, x, bias=True, linear="Gemm")


def dense_model(
    expert=swiglu, factors="scatter", normalize=True, dtype=np.float32, change=None, count=E
):
    """All experts for all tokens, added up with factors of 0 for those that were not chosen."""
    b = Builder(dtype)
    x = b.op("Reshape", "x", b.constant([-1, H], np.int64))
    probabilities = b.op("Softmax", b.op("MatMul", x, b.weight(H, E)), axis=-1)
    if change == "sigmoid":
        probabilities = b.op("Sigmoid", b.nodes[-1].input[0])
    values, indices = b.op("TopK", probabilities, b.constant([K], np.int64), outputs=2)
    if normalize:
        values = b.op("Div", values, b.op("ReduceSum", values, b.constant([-1], np.int64)))
    if factors == "scatter":
        zeros = b.op("Mul", probabilities, b.constant(0))
        full = b.op("ScatterElements", zeros, indices, values, axis=1)
    elif factors == "onehot":
        ends = b.constant([0, 1])
        hot = b.op("OneHot", indices, b.constant(E, np.int64), ends)  # [T, K, E]
        column = b.op("Unsqueeze", values, b.constant([-1], np.int64))
        full = b.op("ReduceSum", b.op("Mul", hot, column), b.constant([1], np.int64), keepdims=0)
    result = None
    for e in range(count):
        number = b.constant(e, np.int64)
        if factors == "where":
            chosen = b.op("Where", b.op("Equal", indices, number), values, b.constant(0))
            factor = b.op("ReduceSum", chosen, b.constant([-1], np.int64))
        else:
            column = b.op("Gather", full, number, axis=1)
            factor = b.op("Unsqueeze", column, b.constant([1], np.int64))
        kind = plain("Relu") if change == "odd expert" and e == 2 else expert
        part = b.op("Mul", kind(b, x), factor)
        if change == "loud expert" and e == 1:
            part = b.op("Mul", part, b.constant(3))
        result = part if result is None else b.op("Add", result, part)
    if change == "scaled":
        result = b.op("Mul", result, b.constant(2.5))
    shape = b.op("Shape", "x")
    return b.model(b.op("Reshape", result, shape))


def runs(model, tokens=(2, 9)):
    dtype = helper.tensor_dtype_to_np_dtype(model.graph.input[0].type.tensor_type.elem_type)
    x = np.random.default_rng(5).standard_normal((*tokens, H)).astype(dtype)
    return open_session(copy.deepcopy(model)).run(None, {"x": x})[0].astype(np.float64)


def check_fused(model, allowed=1e-5):
    before = runs(model)
    (report, *_) = qmoe_plugin.fuse(model)
    assert report.kept == ()
    assert len(report.fused) == 1
    onnx.checker.check_model(model)
    op_types = [node.op_type for node in model.graph.node]
    assert op_types.count("MoE") == 1
    assert op_types.count("MatMul") + op_types.count("Gemm") == 1  # the router
    after = runs(model)
    assert np.abs(after - before).max() <= allowed * np.abs(before).max()
    assert runs(model, (1, 1)).shape == (1, 1, H)
    return attributes_of(node_of(model, "MoE"))


EXPERTS = {
    "swiglu": swiglu,
    "biased": biased,
    "gemm": with_gemm,
    "gpt_oss": gpt_oss,
    "limit_after": functools.partial(gpt_oss, after=True),
    "geglu": geglu,
    "relu": plain("Relu"),
    "gelu": plain("Gelu"),
    "identity": plain("Identity"),
}


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("kind", EXPERTS)
def test_experts(kind, normalize):
    attributes = check_fused(dense_model(EXPERTS[kind], normalize=normalize))
    assert attributes["k"] == K
    assert attributes["normalize_routing_weights"] == int(normalize)
    names = {"biased": "swiglu", "gemm": "swiglu", "gpt_oss": "swiglu", "limit_after": "swiglu"}
    assert attributes["activation_type"] == names.get(kind, kind)
    assert ("swiglu_limit_after_activation" in attributes) == (kind == "limit_after")
    if kind in ("gpt_oss", "limit_after"):
        said = [attributes[f"activation_{name}"] for name in ("alpha", "beta")]
        np.testing.assert_allclose([*said, attributes["swiglu_limit"]], [1.702, 1.0, 2.5])


@pytest.mark.parametrize("factors", ["scatter", "onehot", "where"])
def test_ways_to_mask(factors):
    check_fused(dense_model(factors=factors))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("factors", ["scatter", "onehot"])
def test_other_routing_stays_and_gives_the_factors(factors, normalize):
    model = dense_model(biased, factors, normalize, change="sigmoid")
    attributes = check_fused(model)
    assert attributes["normalize_routing_weights"] == 0
    model = quantized_experts(expert=biased, factors=factors, normalize=normalize, change="sigmoid")
    before = runs(model)
    (report, *_) = qmoe_plugin.fuse(model)
    assert report.fused[0].change.endswith("swiglu, factors of its own")
    assert len(node_of(model, "QMoE").input) == 15
    assert np.abs(runs(model) - before).max() <= 1e-4 * np.abs(before).max()


def test_float16():
    check_fused(dense_model(biased, dtype=np.float16), allowed=0.02)


def test_then_quantize():
    model = dense_model(gpt_oss)
    before = runs(model)
    qmoe_plugin.fuse(model)
    qmoe_plugin.quantize(model, format="int8")
    assert attributes_of(node_of(model, "QMoE"))["swiglu_fusion"] == 1
    assert np.abs(runs(model) - before).max() < 0.05 * np.abs(before).max()


def quantized_experts(spec="int4", domain="com.microsoft", **options):
    """Experts that were quantised before they are fused, as MatMulNBits of this domain."""
    model = dense_model(**options)
    qmoe_plugin.quantize(model, format=spec)
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            node.domain = domain
    if domain == "com.microsoft":
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return model


@pytest.mark.parametrize("domain", ["com.microsoft", "qmoe_plugin"])
@pytest.mark.parametrize("spec", ["int4", "int4:16:asymmetric", "int8:32:asymmetric"])
@pytest.mark.parametrize("kind", ["biased", "gemm", "gpt_oss", "relu"])
def test_quantised_experts_become_qmoe(kind, spec, domain):
    model = quantized_experts(spec, domain, expert=EXPERTS[kind])
    before, constants = runs(model), initializers(model)
    (report, *_) = qmoe_plugin.fuse(model)
    assert "selects in a QMoE of 4 experts" in report.fused[0].change
    op_types = [node.op_type for node in model.graph.node]
    assert (op_types.count("QMoE"), op_types.count("MatMulNBits")) == (1, 0)
    after = runs(model)
    assert np.abs(after - before).max() <= 1e-4 * np.abs(before).max()
    attributes = attributes_of(node_of(model, "QMoE"))
    assert attributes["expert_weight_bits"] == int(spec[3])
    made = initializers(model)
    assert ("asymmetric" in spec) == any(name.endswith("fc1_zero_points") for name in made)
    codes = sum(v.size for v in constants.values() if v.dtype == np.uint8 and v.ndim == 3)
    assert sum(v.size for v in made.values() if v.dtype == np.uint8 and v.ndim == 3) >= codes


def test_rounded_activations_are_allowed_again():
    """At accuracy_level 4, stock kernels round activations; the QMoE says that it may."""
    model = quantized_experts()
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            node.attribute.append(helper.make_attribute("accuracy_level", 4))
    before = runs(model)
    (report, *_) = qmoe_plugin.fuse(model)
    assert len(report.fused) == 1
    assert attributes_of(node_of(model, "QMoE"))["accuracy_level"] == 4
    errors = np.abs(runs(model) - before).max(axis=-1) / np.abs(before).max()
    assert np.median(errors) < 0.05


def test_quantised_experts_that_differ_stay():
    b = dense_model(biased)
    qmoe_plugin.quantize(b, format="int4", rules=[("c9|c10", "int8")])
    assert {a.i for n in b.graph.node for a in n.attribute if a.name == "bits"} == {4, 8}
    (report, *_) = qmoe_plugin.fuse(b)
    assert "the weights of experts differ in their types" in report.kept[0].reason


def test_experts_in_a_format_that_fuse_does_not_take_stay():
    (report, *_) = qmoe_plugin.fuse(quantized_experts("mxfp4", "qmoe_plugin"))
    assert "is no MatMulNBits of integers in whole blocks" in report.kept[0].reason


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"change": "loud expert"}, "a MoE of its experts computes something else"),
        (
            {"change": "odd expert"},
            "first layers of [(32,), (32, 32)] rows come before",
        ),
        ({"expert": plain("Tanh")}, "is no activation of the op MoE"),
        ({"count": 3}, "3 experts follow, but the router has 4 logits"),
    ],
)
def test_what_stays(options, text):
    model = dense_model(**options)
    before = copy.deepcopy(model)
    (report, *_) = qmoe_plugin.fuse(model)
    assert report.fused == ()
    assert text in report.kept[0].reason
    assert [n.op_type for n in model.graph.node] == [n.op_type for n in before.graph.node]
    assert initializers(model).keys() == initializers(before).keys()


def test_a_factor_behind_stays_behind():
    check_fused(dense_model(change="scaled"))


def test_experts_in_another_order_stay():
    model = dense_model()
    gathers = [node for node in model.graph.node if node.op_type == "Gather"]
    first, last = gathers[0], gathers[-1]
    first.input[1], last.input[1] = last.input[1], first.input[1]
    (report, *_) = qmoe_plugin.fuse(model)
    assert "computes something else" in report.kept[0].reason


def test_a_value_that_others_read_stays():
    """What is inside of the experts may be an output of the model; then nothing is fused."""
    model = dense_model()
    inside = next(n.output[0] for n in model.graph.node if n.op_type == "ScatterElements")
    model.graph.output.append(helper.make_tensor_value_info(inside, TensorProto.FLOAT, None))
    (report, *_) = qmoe_plugin.fuse(model)
    assert "nothing brings what follows together again" in report.kept[0].reason


def test_a_topk_of_something_else_is_not_mentioned():
    b = Builder()
    values, _ = b.op("TopK", "x", b.constant([1], np.int64), outputs=2)
    model = b.model(b.op("Add", "x", values))
    (report, *_) = qmoe_plugin.fuse(model)
    assert report.fused == report.kept == ()


def test_files_and_the_command(tmp_path):
    path, output = tmp_path / "dense.onnx", tmp_path / "new" / "fused.onnx"
    onnx.save(dense_model(biased), path, save_as_external_data=True, location="dense.data")
    done = run("fuse", path, output, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)[0]
    text = "selects in a MoE of 4 experts, 2 a token, 64 x 32, swiglu, normalised probabilities"
    assert report["fused"][0]["change"] == text
    x = np.ones((1, 2, H), np.float32)
    results = [open_session(p).run(None, {"x": x})[0] for p in (path, output)]
    np.testing.assert_allclose(*results, rtol=1e-4, atol=1e-5)
    assert sorted(file.name for file in output.parent.iterdir()) == [
        "fused.onnx",
        "fused.onnx.data",
    ]
