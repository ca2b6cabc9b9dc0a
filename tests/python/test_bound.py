"""States of sliding windows, which onnxruntime wants in the memory of their inputs."""

import json

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from helpers.command import error_line, run
from onnx import TensorProto, helper, numpy_helper

import qmoe_plugin
from qmoe_plugin.bound import bind, shared_states

pytestmark = pytest.mark.usefixtures("library")

HEADS, KV_HEADS, SIZE, WINDOW, VOCAB = 2, 1, 32, 16, 48
HIDDEN = HEADS * SIZE
STATES = ("key", "value")


def model(sliding=True, dtype=np.float32):
    """Tokens, attention with a window, and a product with weights."""
    rng = np.random.default_rng(0)
    wide = HIDDEN + 2 * KV_HEADS * SIZE
    shapes = {"table": (VOCAB, HIDDEN), "qkv": (HIDDEN, wide), "head": (HIDDEN, VOCAB)}
    constants = {
        name: (rng.standard_normal(shape) / 8).astype(dtype) for name, shape in shapes.items()
    }
    element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    integers = {"one": np.array([1]), "second": np.array(1)}
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["x"]),
        helper.make_node("MatMul", ["x", "qkv"], ["projected"]),
        helper.make_node("ReduceSum", ["attention_mask", "one"], ["count"], keepdims=0),
        helper.make_node("Sub", ["count", "one"], ["last"]),
        helper.make_node("Cast", ["last"], ["last32"], to=TensorProto.INT32),
        # From a shape, as exporters have it: onnxruntime computes it on the host, where attention
        # on CUDA reads it. What a GPU kernel computed was refused there ("must be positive").
        helper.make_node("Shape", ["attention_mask"], ["mask_shape"]),
        helper.make_node("Gather", ["mask_shape", "second"], ["total"]),
        helper.make_node("Cast", ["total"], ["total32"], to=TensorProto.INT32),
        helper.make_node(
            "GroupQueryAttention",
            ["projected", "", "", "past.key", "past.value", "last32", "total32"],
            ["attended", "present.key", "present.value"],
            domain="com.microsoft",
            num_heads=HEADS,
            kv_num_heads=KV_HEADS,
            local_window_size=WINDOW if sliding else -1,
            **({"sliding_window_cache": 1} if sliding else {}),
        ),
        helper.make_node("MatMul", ["attended", "head"], ["logits"], "head"),
    ]
    cache = [1, KV_HEADS, WINDOW if sliding else "past_length", SIZE]
    inputs = [
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, [1, "sequence"]),
        helper.make_tensor_value_info("attention_mask", TensorProto.INT64, [1, "total_length"]),
    ]
    outputs = [helper.make_tensor_value_info("logits", element, [1, "sequence", VOCAB])]
    for name in STATES:
        inputs.append(helper.make_tensor_value_info(f"past.{name}", element, cache))
        outputs.append(helper.make_tensor_value_info(f"present.{name}", element, None))
    tensors = [numpy_helper.from_array(a, n) for n, a in {**constants, **integers}.items()]
    graph = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, ir_version=10, opset_imports=opsets)


def feeds(length, tokens=5):
    states = {f"past.{n}": np.zeros((1, KV_HEADS, length, SIZE), np.float32) for n in STATES}
    mask = np.ones((1, tokens), np.int64)
    return {"input_ids": np.arange(tokens)[None], "attention_mask": mask, **states}


@pytest.mark.parametrize("sliding", [True, False])
def test_bind(sliding):
    """The same results as without, as often as it is run; what is fed stays as it was."""
    proto, given = model(sliding), feeds(WINDOW if sliding else 0)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    wanted = ["logits"] if sliding else ["logits", "present.key", "present.value"]
    expected = session.run(wanted, given)
    bound = bind(session, proto.graph, given)
    for _ in range(2):
        found = bound()
        assert list(found) == wanted
        for array, value in zip(expected, found.values(), strict=True):
            np.testing.assert_array_equal(value.numpy(), array)
    assert not given["past.key"].any()
    assert list(bind(session, proto.graph, given, ["logits"])()) == ["logits"]


def test_which_states_share_memory():
    pairs = {f"present.{name}": f"past.{name}" for name in STATES}
    assert shared_states(model().graph) == pairs
    assert shared_states(model(sliding=False).graph) == {}
    inner = model()
    del inner.graph.output[1:]
    assert shared_states(inner.graph) == {}


def test_commands_on_a_sliding_window(device, tmp_path):
    """On CUDA, where attention is in 16 bits, onnxruntime runs no other memory."""
    path, small = tmp_path / "float.onnx", tmp_path / "int8.onnx"
    onnx.save(model(dtype=np.float16), path)
    qmoe_plugin.quantize(path, small, format="int8")
    flags = ["--cpu"] if device == "cpu" else []
    done = run("verify", path, small, *flags, "--json", "--min-agreement", 0.5, "--tokens", 20)
    assert done.returncode == 0, done.stderr
    assert [output["name"] for output in json.loads(done.stdout)["outputs"]] == ["logits"]
    done = run("bench", small, *flags, "--repeat", 2, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["stock"] is not None


def test_an_error_in_bound_memory_names_the_model(tmp_path):
    path = tmp_path / "float.onnx"
    onnx.save(model(), path)
    np.savez(tmp_path / "far.npz", **{**feeds(WINDOW), "input_ids": np.full((1, 5), VOCAB)})
    done = run("verify", path, path, "--cpu", "--inputs", tmp_path / "far.npz")
    assert "float.onnx does not run: Error in execution: " in error_line(done)


def test_calibrate_on_a_sliding_window(tmp_path):
    path, seen = tmp_path / "float.onnx", tmp_path / "seen.npz"
    onnx.save(model(), path)
    report = qmoe_plugin.calibrate(path, seen, data=[feeds(WINDOW)])
    assert len(report.collected) == 2
