"""`calibrate`: what it collects, and what `quantize` makes of it."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from helpers.cases import feeds_of
from helpers.command import run as run_command
from helpers.moe_cases import MoECase
from helpers.quantized import rms
from helpers.run import open_session, run
from onnx import TensorProto, helper, numpy_helper

import qmoe_plugin
from qmoe_plugin import reference
from qmoe_plugin.graph.calibrate_feeds import complete
from qmoe_plugin.graph.calibration import Calibration

pytestmark = pytest.mark.usefixtures("library")

VOCABULARY, H, N = 50, 64, 48
EXPERTS, K, INTER = 6, 2, 96


def saved(model, path):
    """With external data, but for small tensors, whose values ONNX Runtime wants at load."""
    onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data")
    return path


def decoder(path, *, activation="swiglu", fc3=False, after=False, dtype=np.float32, dead=()):
    """Embedding, a MoE with its router, a product; no token goes to the `dead` experts."""
    rng = np.random.default_rng(0)
    constants = {
        "table": rng.standard_normal((VOCABULARY, H)) * np.exp(rng.standard_normal(H)),
        "router": rng.standard_normal((H, EXPERTS)),
        "router_bias": np.isin(np.arange(EXPERTS), dead) * -1e4,
        "fc1": rng.standard_normal((EXPERTS, INTER if fc3 else 2 * INTER, H)) / 8,
        "fc1_bias": rng.standard_normal((EXPERTS, INTER if fc3 else 2 * INTER)),
        "fc2": rng.standard_normal((EXPERTS, H, INTER)) / 8,
        "head": rng.standard_normal((H, N)),
        "side": rng.standard_normal((N, H)),
    }
    names = ["x", "logits", "fc1", "fc1_bias", "fc2"]
    if fc3:
        constants["fc3"] = rng.standard_normal((EXPERTS, INTER, H)) / 8
        names += ["", "fc3"]
    moe = {"activation_type": activation, "k": K, "normalize_routing_weights": 1}
    if activation == "swiglu" and not fc3:
        moe |= {"swiglu_fusion": 1, "activation_alpha": 1.5, "swiglu_limit": 3.0}
    if after:
        moe["swiglu_limit_after_activation"] = 1
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["x"]),
        helper.make_node("MatMul", ["x", "router"], ["scores"], name="router"),
        helper.make_node("Add", ["scores", "router_bias"], ["logits"]),
        helper.make_node("MoE", names, ["y"], name="moe", domain="com.microsoft", **moe),
        helper.make_node("MatMul", ["y", "head"], ["out"], name="head"),
        helper.make_node("Flatten", ["y"], ["rows"], axis=2),
        helper.make_node("Gemm", ["rows", "side"], ["other"], name="side", transB=1),
    ]
    tensors = [numpy_helper.from_array(v.astype(dtype), name) for name, v in constants.items()]
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    inputs = [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["b", "s"])]
    outputs = [
        helper.make_tensor_value_info("out", kind, ["b", "s", N]),
        helper.make_tensor_value_info("other", kind, ["t", N]),
    ]
    graph = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, ir_version=10, opset_imports=opsets)
    return saved(model, path), constants


def tokens(rows=4, length=30, seed=1):
    return np.random.default_rng(seed).integers(0, VOCABULARY, (rows, length))


def expected_squares(constants, ids, *, activation="swiglu", fc3=False, after=False):
    """Mean squares before fc1 and fc2 of each expert, and tokens, in float64."""
    x = constants["table"][ids.reshape(-1)]
    logits = x @ constants["router"] + constants["router_bias"]
    chosen = np.argsort(-logits, axis=1)[:, :K]
    squares, counts = {"fc1": [], "fc2": []}, []
    options = {} if fc3 else {"swiglu_fusion": 1}
    if activation == "swiglu" and not fc3:
        options |= {"alpha": 1.5, "limit": 3.0, "limit_after_activation": after}
    for expert in range(EXPERTS):
        rows = x[(chosen == expert).any(axis=1)]
        hidden = reference.activate(
            rows @ constants["fc1"][expert].T + constants["fc1_bias"][expert],
            activation,
            fc3=rows @ constants["fc3"][expert].T if fc3 else None,
            **options,
        )
        squares["fc1"].append((rows**2).sum(axis=0))
        squares["fc2"].append((hidden**2).sum(axis=0))
        counts.append(len(rows))
    return {name: np.stack(values) for name, values in squares.items()}, np.array(counts), x


def with_prior(sums, counts, prior):
    return (sums + 4 * prior) / (counts + 4)[:, None]


@pytest.mark.parametrize(
    "options", [{}, {"after": True}, {"activation": "silu", "fc3": True}], ids=str
)
def test_squares_of_experts_and_products(tmp_path, options):
    path, constants = decoder(tmp_path / "m.onnx", **options)
    ids = tokens()
    np.save(tmp_path / "ids.npy", ids)
    report = qmoe_plugin.calibrate(path, tmp_path / "c.npz", data=[tmp_path / "ids.npy"])
    assert (report.runs, report.tokens, report.kept) == (4, 120, ())
    sums, counts, x = expected_squares(constants, ids, **options)
    found = Calibration.load(tmp_path / "c.npz")
    prior = sums["fc1"].sum(axis=0) / counts.sum()
    np.testing.assert_allclose(
        found.of("fc1", EXPERTS, H), with_prior(sums["fc1"], counts, prior), rtol=1e-4
    )
    prior = np.full(INTER, (sums["fc2"].sum(axis=0) / counts.sum()).mean())
    np.testing.assert_allclose(
        found.of("fc2", EXPERTS, INTER), with_prior(sums["fc2"], counts, prior), rtol=1e-4
    )
    np.testing.assert_allclose(found.of("router", 1, H)[0], (x**2).mean(axis=0), rtol=1e-4)
    np.testing.assert_array_equal(found.of("head", 1, H), found.of("side", 1, H))
    said = {node.name: node.change for node in report.collected}
    assert said["moe"] == f"6 of 6 experts, {counts.min()} to {counts.max()} tokens each"
    assert said["head"] == said["side"] == "120 rows"


def test_float16(tmp_path):
    path, constants = decoder(tmp_path / "m.onnx", dtype=np.float16)
    qmoe_plugin.calibrate(path, tmp_path / "c.npz", data=[{"input_ids": tokens()}])
    x = constants["table"][tokens().reshape(-1)]
    found = Calibration.load(tmp_path / "c.npz").of("router", 1, H)[0]
    np.testing.assert_allclose(found, (x**2).mean(axis=0), rtol=5e-3)


def test_experts_without_tokens_are_named(tmp_path):
    path, _ = decoder(tmp_path / "m.onnx", dead=(1, 4))
    report = qmoe_plugin.calibrate(path, tmp_path / "c.npz", random=3, length=40)
    (moe,) = (node for node in report.collected if node.name == "moe")
    assert moe.warning == "no token came to experts 1, 4; they get the mean of the others"
    assert "4 of 6 experts, 0 to" in moe.change
    assert "no token came to experts 1, 4" in str(report)
    found = Calibration.load(tmp_path / "c.npz")
    fc1, fc2 = found.of("fc1", EXPERTS, H), found.of("fc2", EXPERTS, INTER)
    np.testing.assert_array_equal(fc1[1], fc1[4])
    assert (fc1 > 0).all()
    assert np.ptp(fc2[1]) == 0 < np.ptp(fc2[0])


@pytest.mark.parametrize("spec", ["int4", "int4:32:asymmetric", "mxfp4", "nvfp4", "nf4", "int2:16"])
def test_what_the_model_computes_gets_better(tmp_path, spec):
    path, _ = decoder(tmp_path / "m.onnx")
    qmoe_plugin.calibrate(path, tmp_path / "c.npz", data=[{"input_ids": tokens(8, 60)}])
    feeds = {"input_ids": tokens(4, 50, seed=9)}
    plain = run(qmoe_plugin.session(path, ["CPUExecutionProvider"]), feeds)
    errors = []
    for name, options in (
        ("nearest", {"search": "nearest"}),
        ("mse", {"search": "mse"}),
        ("calibrated", {"calibration": tmp_path / "c.npz"}),
    ):
        output = tmp_path / f"{name}.onnx"
        report = qmoe_plugin.quantize(path, output, format=spec, **options)
        assert report.search == ("nearest" if name == "nearest" else "mse")
        assert report.uncalibrated == ()
        errors.append(rms(run(open_session(output), feeds) - plain))
    assert errors[2] < errors[1] * (1.0 if spec == "mxfp4" else 0.97)
    assert errors[2] < errors[0]


def test_inputs_are_completed():
    def value(name, dtype, shape):
        return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType[dtype]))

    past = ["batch_size", 2, "past_sequence_length", "kv_cache_dim"]
    inputs = [
        value("input_ids", "INT64", ["batch_size", "sequence_length"]),
        value("attention_mask", "INT64", ["batch_size", "total_sequence_length"]),
        value("position_ids", "INT32", [3, "batch_size", "sequence_length"]),
        value("past_key_values.0.key", "FLOAT16", past),
    ]
    given = {"input_ids": np.array([[5, 6, 7]], np.int32)}
    feeds = complete(given, inputs, {"kv_cache_dim": 32})
    assert feeds["input_ids"].dtype == np.int64
    np.testing.assert_array_equal(feeds["attention_mask"], [[1, 1, 1]])
    assert feeds["position_ids"].tolist() == [[[0, 1, 2]]] * 3
    assert (feeds["past_key_values.0.key"].shape, feeds["past_key_values.0.key"].dtype) == (
        (1, 2, 0, 32),
        np.float16,
    )
    with pytest.raises(ValueError, match="give input 'pixels': it cannot be made up"):
        complete({}, [value("pixels", "FLOAT", [1])])
    with pytest.raises(ValueError, match="the model has no input ids; it has input_ids"):
        complete({"ids": np.zeros((1, 1))}, inputs)
    with pytest.raises(ValueError, match="give input 'what': the model says neither"):
        complete({}, [ir.Value(name="what")])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "there is nothing to run the model on"),
        ({"data": ["words.txt"]}, "words.txt is no .npz file"),
        ({"data": ["floats.npy"]}, "tokens are integers"),
        ({"data": ["broken.npz"]}, "broken.npz cannot be read"),
        ({"data": [{"ids": np.zeros((1, 1))}]}, "the model has no input ids"),
    ],
)
def test_wrong_data(tmp_path, options, text):
    path, _ = decoder(tmp_path / "m.onnx")
    np.save(tmp_path / "floats.npy", np.zeros((2, 2)))
    (tmp_path / "broken.npz").write_bytes(b"nothing")
    options = {
        key: [tmp_path / v if isinstance(v, str) else v for v in values]
        for key, values in options.items()
    }
    with pytest.raises(ValueError, match=text):
        qmoe_plugin.calibrate(path, tmp_path / "c.npz", **options)
    assert not (tmp_path / "c.npz").exists()


def test_a_run_that_fails_says_so(tmp_path):
    path, _ = decoder(tmp_path / "m.onnx")
    with pytest.raises(RuntimeError, match=r"run 1 failed: .*indices element out of data bounds"):
        qmoe_plugin.calibrate(
            path,
            tmp_path / "c.npz",
            data=[{"input_ids": [[VOCABULARY]]}],
            providers=["CPUExecutionProvider"],  # a GPU's Gather checks nothing
        )
    assert not (tmp_path / "c.npz").exists()


def test_wrong_files(tmp_path):
    case = MoECase()
    model = case.model(case.tensors())
    for name, content in (("text", b"words"), ("empty", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="is no file of qmoe_plugin calibrate"):
            qmoe_plugin.quantize(model, calibration=tmp_path / name)
    np.savez(tmp_path / "other.npz", names=np.array(["a"]))
    with pytest.raises(ValueError, match="is no file of qmoe_plugin calibrate"):
        qmoe_plugin.quantize(model, calibration=tmp_path / "other.npz")
    Calibration({"fc1_experts_weights": np.ones((4, 7), np.float32)}).save(tmp_path / "c.npz")
    with pytest.raises(ValueError, match=r"has \[4, 7\] numbers for 'fc1_experts_weights'"):
        qmoe_plugin.quantize(model, calibration=tmp_path / "c.npz")
    with pytest.raises(ValueError, match="calibration is for search='mse'"):
        qmoe_plugin.quantize(model, calibration=tmp_path / "c.npz", search="nearest")


def test_weights_that_were_not_seen_are_named(tmp_path):
    case = MoECase()
    tensors = case.tensors()
    model = case.model(tensors)
    Calibration({"fc1_experts_weights": np.ones((4, 64), np.float32)}).save(tmp_path / "c.npz")
    report = qmoe_plugin.quantize(model, calibration=tmp_path / "c.npz")
    assert report.uncalibrated == ("fc2_experts_weights",)
    assert "weights that the calibration file says nothing of:\n  fc2_experts_weights" in str(
        report
    )
    run(open_session(model), feeds_of(tensors))


def test_the_commands(tmp_path):
    path, _ = decoder(tmp_path / "m.onnx")
    np.save(tmp_path / "ids.npy", tokens())
    np.savez(tmp_path / "run.npz", input_ids=tokens(2, 7))
    seen = tmp_path / "new" / "c.npz"
    data = ["--data", tmp_path / "ids.npy", tmp_path / "run.npz"]
    done = run_command(
        "calibrate", path, seen, *data, "--random", 2, "--length", 10, "--vocabulary", 50
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0] == "saw the inputs of 4 of 4 nodes in 7 runs of 154 tokens"
    done = run_command("quantize", path, tmp_path / "q.onnx", "--calibration", seen, "--json")
    report = json.loads(done.stdout)
    assert (report["search"], report["uncalibrated"]) == ("mse", [])
    open_session(tmp_path / "q.onnx")
    done = run_command("calibrate", path, seen)
    assert done.returncode == 1
    assert done.stderr == (
        "qmoe_plugin: there is nothing to run the model on: give data, or random runs\n"
    )
