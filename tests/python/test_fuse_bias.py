"""The passes `bias` and `zero-bias` of `fuse`: same results, and what they refuse."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
from helpers.cases import MatMulNBitsCase, QMoECase, feeds_of
from helpers.command import run as run_command
from helpers.models import save_external
from helpers.moe_cases import MoECase
from helpers.quantized import initializers, node_of
from helpers.run import open_session, run
from onnx import helper, numpy_helper

import qmoe_plugin

pytestmark = pytest.mark.usefixtures("library")

N = 48


def biased_model(shape=(N,), domain="com.microsoft", swap=False, dtype="float32", **options):
    """MatMulNBits and an Add of a constant of this shape; and its feeds."""
    case = MatMulNBitsCase(**{"bias": False, "n": N, "dtype": dtype} | options)
    tensors = case.tensors()
    model = case.model(tensors, domain)
    node = node_of(model, "MatMulNBits")
    output = node.output[0]
    node.output[0] = "product"
    bias = np.random.default_rng(3).standard_normal(shape).astype(case.output_dtype)
    model.graph.initializer.append(numpy_helper.from_array(bias, "added"))
    names = ["added", "product"] if swap else ["product", "added"]
    model.graph.node.append(helper.make_node("Add", names, [output], name="add"))
    return model, feeds_of(tensors)


def op_types(model):
    return [node.op_type for node in model.graph.node]


def check_fused(model, feeds, bits=1e-6):
    before = run(open_session(copy.deepcopy(model)), feeds)
    (_, report, _) = qmoe_plugin.fuse(model)
    assert [node.op_type for node in report.fused] == ["MatMulNBits"]
    assert report.fused[0].change == "has the bias that add added"
    assert op_types(model) == ["MatMulNBits"]
    after = run(open_session(model), feeds)
    assert (after.shape, after.dtype) == (before.shape, before.dtype)
    scale = np.abs(before.astype(np.float64)).max()
    np.testing.assert_allclose(after.astype(float), before.astype(float), rtol=0, atol=bits * scale)
    assert np.abs(before.astype(float)).max() > 0
    return report


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("domain", ["com.microsoft", "qmoe_plugin"])
@pytest.mark.parametrize("shape", [(N,), (1, N), (), (1,), (1, 1)])
def test_a_constant_row_becomes_the_bias(shape, domain, swap):
    check_fused(*biased_model(shape, domain, swap))


@pytest.mark.parametrize("options", [{"n": 1}, {"rank": 3}, {"zero_points": "packed"}, {"k": 40}])
def test_any_shape(options):
    shape = (1, 1, N) if "rank" in options else (options.get("n", N),)
    check_fused(*biased_model(shape, **options))


def test_the_stock_op_takes_what_comes_out():
    model, feeds = biased_model()
    before = run(open_session(copy.deepcopy(model)), feeds)
    qmoe_plugin.fuse(model)
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString())
    np.testing.assert_allclose(run(session, feeds), before, rtol=1e-4, atol=1e-4)


def test_float16():
    check_fused(*biased_model(dtype="float16"), bits=0.002)


def test_bfloat16():
    """onnxruntime's CPU has no Add of bfloat16, so that only the sum is run."""
    model, feeds = biased_model(dtype="bfloat16", domain="qmoe_plugin")
    plain = copy.deepcopy(model)
    plain.graph.node.pop()
    plain.graph.node[0].output[0] = model.graph.output[0].name
    bias = initializers(model)["added"].astype(np.float64)
    expected = run(open_session(plain), feeds) + bias
    qmoe_plugin.fuse(model)
    after = run(open_session(model), feeds).astype(np.float64)
    assert (np.abs(after - expected) <= 2.0**-7 * (np.abs(expected) + np.abs(bias))).all()


def test_a_bias_that_was_there_is_added():
    model, feeds = biased_model(bias=True)
    check_fused(model, feeds)
    assert "added" not in initializers(model)


def test_a_shared_bias_stays():
    model, feeds = biased_model()
    twin = helper.make_node("Identity", ["added"], ["twin"])
    model.graph.node.append(twin)
    model.graph.output.append(helper.make_tensor_value_info("twin", 1, [N]))
    session = open_session(copy.deepcopy(model))
    before = session.run(None, feeds)
    qmoe_plugin.fuse(model)
    for a, b in zip(open_session(model).run(None, feeds), before, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def also_an_output(model):
    model.graph.output.append(helper.make_tensor_value_info("product", 1, None))


def also_read(model):
    model.graph.node.insert(1, helper.make_node("Relu", ["product"], ["relu"]))
    model.graph.output.append(helper.make_tensor_value_info("relu", 1, None))


def not_constant(model):
    del model.graph.initializer[-1]
    model.graph.input.append(helper.make_tensor_value_info("added", 1, [N]))


def doubled(model):
    model.graph.node[1].input[:] = ["product", "product"]


@pytest.mark.parametrize(
    ("shape", "change", "text"),
    [
        ((3, N), None, "what Add 'add' adds has shape [3, 48]; a bias is [48]"),
        ((N, 1), None, "has shape [48, 1]; a bias is [48]"),
        ((1, 1, N), None, "makes more dimensions of a product of rank 2"),
        ((N,), also_an_output, "1 others read 'product', which would be gone"),
        ((N,), also_read, "1 others read 'product', which would be gone"),
        ((N,), not_constant, "is an input of the graph"),
        ((N,), doubled, "is computed by MatMulNBits"),
    ],
)
def test_what_is_no_bias_stays(shape, change, text):
    model, _ = biased_model(shape)
    if change:
        change(model)
    before = copy.deepcopy(model)
    _, report, _ = qmoe_plugin.fuse(model)
    assert report.fused == ()
    assert text in report.kept[0].reason
    assert op_types(model) == op_types(before)


def test_packed_weights_stay(tmp_path):
    model, _ = biased_model(domain="qmoe_plugin")
    qmoe_plugin.prepack(model)
    _, report, _ = qmoe_plugin.fuse(model)
    assert "fuse before prepack" in report.kept[0].reason


# --- zeros ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [MatMulNBitsCase(), QMoECase(), MoECase()], ids=str)
def test_zeros_are_dropped(case):
    tensors = case.tensors()
    zeros = [name for name in tensors if "bias" in name]
    for name in zeros:
        tensors[name] = np.zeros_like(tensors[name])
    model = case.model(tensors)
    before = run(open_session(copy.deepcopy(model)), feeds_of(tensors))
    *_, report = qmoe_plugin.fuse(model)
    assert report.fused[0].change == f"no longer adds the zeros of {', '.join(zeros)}"
    assert not set(zeros) & initializers(model).keys()
    assert model.graph.node[0].input[-1]
    np.testing.assert_array_equal(run(open_session(model), feeds_of(tensors)), before)


def test_one_number_is_enough_to_stay():
    case = QMoECase()
    tensors = case.tensors()
    tensors["fc1_experts_bias"] = np.zeros_like(tensors["fc1_experts_bias"])
    tensors["fc1_experts_bias"][-1, -1] = 1e-30
    tensors["fc2_experts_bias"] = -np.zeros_like(tensors["fc2_experts_bias"])
    model = case.model(tensors)
    *_, report = qmoe_plugin.fuse(model)
    assert report.fused[0].change == "no longer adds the zeros of fc2_experts_bias"
    assert "fc1_experts_bias" in initializers(model)


# --- files and the command ------------------------------------------------------------------------


def command(*arguments):
    return run_command("fuse", *arguments)


def test_the_command(tmp_path):
    model, feeds = biased_model(domain="qmoe_plugin")
    path, output = save_external(model, tmp_path), tmp_path / "new" / "fused.onnx"
    done = command(path, output)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[:2] == ["moe: changed 0 of 0 nodes", "bias: changed 1 of 1 nodes"]
    assert lines[2].endswith("has the bias that add added")
    assert lines[3] == "zero-bias: changed 0 of 0 nodes"
    before, after = (run(open_session(p), feeds) for p in (path, output))
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)
    again = command(output, tmp_path / "again.onnx", "--only", "bias", "--json")
    assert again.returncode == 1
    assert [report["name"] for report in json.loads(again.stdout)] == ["bias"]
    assert again.stderr == "qmoe_plugin: no node was fused\n"


def test_wrong_use_gives_one_clear_line(tmp_path):
    path = save_external(biased_model()[0], tmp_path)
    for arguments, code, text in (
        ([path, path], 1, "would replace a file of the original model"),
        ([tmp_path / "none.onnx", tmp_path / "out.onnx"], 1, "none.onnx"),
        ([path, tmp_path / "out.onnx", "--only", "all"], 2, "invalid choice: 'all'"),
    ):
        done = command(*arguments)
        assert done.returncode == code
        assert text in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr
    with pytest.raises(ValueError, match="no such pass: biases; there are"):
        qmoe_plugin.fuse(path, tmp_path / "out.onnx", passes=["biases"])
