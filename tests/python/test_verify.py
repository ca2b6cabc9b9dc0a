"""`verify`: nodes by themselves and with what came before, outputs, bounds, wrong use."""

import json
import math

import ml_dtypes
import numpy as np
import onnx
import pytest
from helpers.cases import MatMulNBitsCase, QMoECase, feeds_of
from helpers.command import error_line, run
from helpers.models import save_external
from helpers.moe_cases import MoECase
from helpers.quantized import attributes_of, initializers
from onnx import TensorProto, helper, numpy_helper

import qmoe_plugin
from qmoe_plugin import formats, reference
from qmoe_plugin.errors import compare
from qmoe_plugin.sample_inputs import Wanted
from qmoe_plugin.verify import verify

pytestmark = pytest.mark.usefixtures("library")

K, HIDDEN, N = 64, 96, 32


def chain(dtype=np.float32):
    """y = relu(x W1) W2, whose result is called logits."""
    rng = np.random.default_rng(1)
    weights = [rng.standard_normal(shape).astype(dtype) for shape in ((K, HIDDEN), (HIDDEN, N))]
    element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w1"], ["h"], "first"),
            helper.make_node("Relu", ["h"], ["r"]),
            helper.make_node("MatMul", ["r", "w2"], ["logits"], "second"),
        ],
        "chain",
        [helper.make_tensor_value_info("x", element, ["batch", "seq", K])],
        [helper.make_tensor_value_info("logits", element, ["batch", "seq", N])],
        [numpy_helper.from_array(w, f"w{i}") for i, w in enumerate(weights, 1)],
    )
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 21)])


def quantized_weights(model, name):
    (node,) = (node for node in model.graph.node if node.name == name)
    tensors, attributes = initializers(model), attributes_of(node)
    fmt = formats.for_attributes("int", attributes["bits"])
    return reference.matmul_nbits_weights(
        tensors[node.input[1]],
        tensors[node.input[2]],
        k=attributes["K"],
        n=attributes["N"],
        block_size=attributes["block_size"],
        fmt=fmt,
    )


@pytest.fixture
def models(tmp_path):
    """The chain in float and in int4, the last product too."""
    path, other = tmp_path / "float.onnx", tmp_path / "int4.onnx"
    onnx.save(chain(), path)
    qmoe_plugin.quantize(path, other, rules=[("second", "int4")])
    return path, other


def test_errors_of_nodes(models, tmp_path):
    """By hand, in float64: of a node by itself, and with what came before."""
    x = np.random.default_rng(2).standard_normal((2, 5, K)).astype(np.float32)
    np.savez(tmp_path / "x.npz", x=x)
    done = run("verify", *models, "--inputs", tmp_path / "x.npz", "--cpu", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    model = onnx.load(models[1])
    plain = initializers(onnx.load(models[0]))
    w1, w2 = quantized_weights(model, "first"), quantized_weights(model, "second")
    right = np.maximum(x @ plain["w1"].astype(np.float64), 0)
    wrong = np.maximum(x @ w1.T, 0)
    second = report["nodes"][1]
    assert [node["ops"] for node in report["nodes"]] == ["MatMul -> qmoe_plugin.MatMulNBits"] * 2
    for key, result in (("own", right @ w2.T), ("total", wrong @ w2.T)):
        expected = compare(right @ plain["w2"].astype(np.float64), result)
        for field in ("cosine", "sqnr", "max", "rms"):
            assert second[key][field] == pytest.approx(getattr(expected, field), rel=1e-3)
    assert report["outputs"][0]["error"] == second["total"]
    picks = [(right @ plain["w2"]).argmax(-1), (wrong @ w2.T).argmax(-1)]
    assert report["outputs"][0]["agreement"] == pytest.approx((picks[0] == picks[1]).mean())


def test_text_and_bounds(models):
    done = run("verify", *models, "--cpu", "--min-sqnr", "10", "--max-error", "100")
    assert done.returncode == 0, done.stderr
    assert "MatMul -> qmoe_plugin.MatMulNBits" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("logits ")
    bounds = ("--min-sqnr", "60", "--max-error", "1e-6", "--min-agreement", "1.01")
    done = run("verify", *models, "--cpu", *bounds)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 3
    assert "2 nodes have an SQNR below 60 dB" in done.stderr
    assert "output 'logits' is off by" in done.stderr
    assert "101.0% are wanted" in done.stderr


def test_a_model_with_itself(models):
    report = verify(models[0], models[0], cpu=True)
    assert report.outputs[0].error.sqnr == math.inf
    assert report.outputs[0].agreement == 1
    assert not report.nodes
    done = run("verify", models[1], models[1], "--cpu", "--json")
    assert json.loads(done.stdout)["nodes"][0]["own"] == {
        "cosine": 1.0, "sqnr": None, "max": 0.0, "rms": 0.0, "broken": 0,
    }  # fmt: skip


def test_stock_against_ours(tmp_path):
    case = QMoECase(inter=64)
    path = save_external(case.model(case.tensors(), "com.microsoft"), tmp_path)
    np.savez(tmp_path / "feeds.npz", **feeds_of(case.tensors()))
    done = run("verify", path, "--inputs", tmp_path / "feeds.npz", "--cpu", "--min-sqnr", "100")
    assert done.returncode == 0, done.stderr
    assert "com.microsoft.QMoE -> qmoe_plugin.QMoE" in done.stdout


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_float_and_quantized_experts(tmp_path, dtype):
    case = MoECase(dtype=dtype)
    path, other = tmp_path / "moe.onnx", tmp_path / "qmoe.onnx"
    onnx.save(case.model(case.tensors()), path)
    sqnr = {}
    for name in ("int4", "int8"):
        qmoe_plugin.quantize(path, other, format=name)
        report = verify(path, other, inputs=Wanted(feeds_of(case.tensors())), cpu=True)
        (node,) = report.nodes
        assert node.ops == "qmoe_plugin.MoE -> qmoe_plugin.QMoE"
        assert node.own == node.total
        sqnr[name] = node.own.sqnr
    assert 10 < sqnr["int4"] < 25
    assert 35 < sqnr["int8"] < 50


def test_other_activation_type(tmp_path):
    """A float32 model against one in float16: inputs are cast."""
    onnx.save(chain(), tmp_path / "a.onnx")
    onnx.save(chain(np.float16), tmp_path / "b.onnx")
    qmoe_plugin.quantize(tmp_path / "b.onnx", tmp_path / "c.onnx", rules=[(".", "int8")])
    report = verify(tmp_path / "a.onnx", tmp_path / "c.onnx", cpu=True)
    assert all(35 < node.own.sqnr < 50 for node in report.nodes)


def test_experts_that_are_called_differently(tmp_path):
    case = MoECase()
    first, second = tmp_path / "a.onnx", tmp_path / "b.onnx"
    model = case.model(case.tensors())
    onnx.save(model, first)
    model.graph.node[0].output[0] = model.graph.output[0].name = "another"
    onnx.save(model, second)
    report = verify(first, second, inputs=Wanted(feeds_of(case.tensors())), cpu=True)
    assert not report.outputs
    assert report.nodes[0].own.sqnr == math.inf


def test_nan_fails(models, tmp_path):
    model = onnx.load(models[0])
    weights = numpy_helper.to_array(model.graph.initializer[1]).copy()
    weights[0, 0] = np.nan
    model.graph.initializer[1].CopyFrom(numpy_helper.from_array(weights, "w2"))
    onnx.save(model, tmp_path / "nan.onnx")
    done = run("verify", models[0], tmp_path / "nan.onnx", "--cpu")
    assert "NaN or infinity where the other has numbers" in error_line(done)


def test_nodes_that_cannot_be_fed(models, tmp_path):
    """The second model computes what the node reads under another name."""
    model = onnx.load(models[1])
    for node in model.graph.node:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                if name == "r":
                    names[index] = "r2"
    onnx.save(model, tmp_path / "renamed.onnx")
    report = verify(models[0], tmp_path / "renamed.onnx", cpu=True)
    assert [node.own is None for node in report.nodes] == [False, True]
    assert report.nodes[1].total.sqnr > 5


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["gone.onnx"], "gone.onnx"),
        (["float.onnx"], "has no node that our kernels run"),
        (["float.onnx", "other.onnx"], "have no output and no node in common"),
        (["float.onnx", "int4.onnx", "--tokens", "0"], "--tokens is 0"),
        (["float.onnx", "int4.onnx", "--inputs", "gone.npz"], "gone.npz"),
        (["float.onnx", "int4.onnx", "--inputs", "float.onnx"], "is not a file of arrays"),
        (["float.onnx", "int4.onnx", "--inputs", "y.npz"], "the model has no input y; it has x"),
        (["float.onnx", "int4.onnx", "--inputs", "double.npz"], "is given as float64"),
        (["float.onnx", "int4.onnx", "--inputs", "flat.npz"], "is given with shape [64]"),
        (["float.onnx", "int4.onnx", "--inputs", "x.npz", "--dim", "seq=3"], "with {'seq': 3"),
        (["integer.onnx", "integer.onnx"], "nothing tells what it may hold; give it (--inputs"),
        (["open.onnx", "open.onnx"], "'anything', may have any size; say which (--dim anything="),
        (["float.onnx", "narrow.onnx"], "'logits': shapes differ: [1, 8, 32] is expected"),
        (["float.onnx", "float.onnx", "--min-sqnr", "3"], "no node could be compared by itself"),
        (["broken.onnx", "float.onnx"], "broken.onnx does not run: "),
    ],
)
def test_wrong_use(models, tmp_path, arguments, says):
    x = np.zeros((1, 2, K), np.float32)
    np.savez(tmp_path / "x.npz", x=x)
    np.savez(tmp_path / "y.npz", y=x)
    np.savez(tmp_path / "double.npz", x=x.astype(np.float64))
    np.savez(tmp_path / "flat.npz", x=x[0, 0])
    for name in ("integer", "open", "other", "broken", "narrow"):
        model = chain()
        if name == "integer":
            model.graph.input.append(helper.make_tensor_value_info("i", TensorProto.INT64, [2]))
        elif name == "open":
            model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "anything"
        elif name == "other":
            model.graph.node[2].output[0] = model.graph.output[0].name = "another"
        elif name == "broken":
            model.graph.node[2].op_type = "NoSuchOp"
        else:
            weights = np.zeros((HIDDEN, 3), np.float32)
            model.graph.initializer[1].CopyFrom(numpy_helper.from_array(weights, "w2"))
            model.graph.output[0].type.tensor_type.shape.dim[2].dim_value = 3
        onnx.save(model, tmp_path / f"{name}.onnx")
    paths = [tmp_path / a if "." in a and not a.startswith("-") else a for a in arguments]
    assert says in error_line(run("verify", *paths, "--cpu"))


def test_wrong_dim():
    assert run("verify", "a.onnx", "--dim", "batch").returncode == 2


def test_compare():
    a = np.array([3.0, -4.0, 0.0, np.inf, np.nan])
    error = compare(a, np.array([3.0, -4.0, 1.0, np.inf, np.nan]))
    assert error.sqnr == pytest.approx(10 * math.log10(25))
    assert error.cosine == pytest.approx(25 / (5 * math.sqrt(26)))
    assert (error.max, error.broken) == (1.0, 0)
    assert error.rms == pytest.approx(math.sqrt(1 / 3))
    assert compare(a[:2], np.array([np.inf, 0.0])).broken == 1
    assert compare(np.zeros(2), np.ones(2)).sqnr == -math.inf
    assert compare(np.zeros(2), np.zeros(2)).sqnr == math.inf
    assert compare(np.zeros(0), np.zeros(0)).max == 0
    halves = np.array([1, 2], ml_dtypes.bfloat16)
    assert compare(halves, halves.astype(np.float32)).max == 0


def test_packed_weights(tmp_path):
    """prepack keeps names, so its result can be verified; on the CPU it is the same."""
    case = MatMulNBitsCase()
    path = save_external(case.model(case.tensors(), "com.microsoft"), tmp_path)
    ours, packed = tmp_path / "ours.onnx", tmp_path / "packed.onnx"
    qmoe_plugin.retarget(path, ours, sm=0)
    qmoe_plugin.prepack(path, packed)
    inputs = Wanted(feeds_of(case.tensors()))
    report = verify(ours, packed, inputs=inputs, cpu=True)
    assert report.nodes[0].own.sqnr == math.inf
