"""How `quantize` reads and writes models, and its command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from helpers.cases import feeds_of, qmoe_oracle
from helpers.command import run as run_command
from helpers.memory_child import Peak, host_memory
from helpers.models import save_external
from helpers.moe_cases import MoECase
from helpers.quantized import attributes_of, initializers, inputs_of
from helpers.run import open_session, run
from helpers.tolerance import TOLERANCE, qmoe_error_scale
from onnx import TensorProto, helper, numpy_helper

import qmoe_plugin
from qmoe_plugin.graph import quantize_weights

pytestmark = pytest.mark.usefixtures("library")

CASE = MoECase(experts=8)


@pytest.fixture
def path(tmp_path):
    return save_external(CASE.model(CASE.tensors(), "com.microsoft"), tmp_path)


def names_in(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


@pytest.mark.parametrize("spec", ["int4", "int8:32:asymmetric", "mxfp4", "nvfp4", "fp8_e4m3"])
def test_a_file(path, tmp_path, spec):
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    output = tmp_path / "new" / "small.onnx"
    qmoe_plugin.quantize(path, output, format=spec)
    assert {file: file.read_bytes() for file in before} == before
    assert names_in(output.parent) == ["small.onnx", "small.onnx.data"]
    for tensor in onnx.load(output, load_external_data=False).graph.initializer:
        assert tensor.data_location == TensorProto.EXTERNAL
        entries = {entry.key: entry.value for entry in tensor.external_data}
        assert entries["location"] == "small.onnx.data"
        assert int(entries["offset"]) % (4096 if int(entries["length"]) >= 4096 else 64) == 0
    model = onnx.load(output)
    in_memory = CASE.model(CASE.tensors(), "com.microsoft")
    qmoe_plugin.quantize(in_memory, format=spec)
    made, expected = (
        inputs_of(model, model.graph.node[0]),
        inputs_of(in_memory, in_memory.graph.node[0]),
    )
    for name in expected:
        np.testing.assert_array_equal(made[name], expected[name])
    attributes = attributes_of(model.graph.node[0])
    tensors = feeds_of(CASE.tensors()) | made
    session = qmoe_plugin.session(output, providers=["CPUExecutionProvider"])
    for result in (run(session, feeds_of(tensors)), run(open_session(output), feeds_of(tensors))):
        error = np.abs(result - qmoe_oracle(tensors, attributes))
        assert (error <= TOLERANCE["float32"] * qmoe_error_scale(tensors, attributes)[0]).all()


def test_then_prepack(path, tmp_path):
    small, packed = tmp_path / "small.onnx", tmp_path / "packed.onnx"
    qmoe_plugin.quantize(path, small)
    assert len(qmoe_plugin.prepack(small, packed).packed) == 1
    feeds = feeds_of(CASE.tensors())
    results = [run(open_session(file), feeds) for file in (small, packed)]
    np.testing.assert_array_equal(*results)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_memory_is_that_of_one_expert(tmp_path):
    """200 MB of weights, 25 MB of codes; all but two experts are a hole in the file."""
    experts, n, k = 64, 512, 512
    rng = np.random.default_rng(0)
    with (tmp_path / "big.data").open("wb") as file:
        file.write(rng.standard_normal((2, 2 * n, k)).astype(np.float32).tobytes())
        file.truncate(experts * 3 * n * k * 4)
    tensors, offset = [], 0
    for name, shape in (("fc1", (experts, 2 * n, k)), ("fc2", (experts, k, n))):
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape)
        tensor.data_location = TensorProto.EXTERNAL
        length = 4 * int(np.prod(shape))
        for key, value in (("location", "big.data"), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        tensors.append(tensor)
        offset += length
    values = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["tokens", k]),
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["tokens", experts]),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, ["tokens", k]),
    ]
    node = helper.make_node(
        "MoE",
        ["x", "logits", "fc1", "", "fc2"],
        ["y"],
        domain="com.microsoft",
        k=2,
        activation_type="swiglu",
        swiglu_fusion=1,
    )
    graph = helper.make_graph([node], "big", values[:2], values[2:], tensors)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    path = tmp_path / "big.onnx"
    path.write_bytes(
        helper.make_model(graph, ir_version=10, opset_imports=opsets).SerializeToString()
    )
    before = host_memory()
    with Peak() as peak:
        report = qmoe_plugin.quantize(path, tmp_path / "out.onnx")
    assert len(report.quantized) == 1
    codes = experts * 3 * n * k // 2
    assert (tmp_path / "out.onnx.data").stat().st_size > codes
    assert peak.value - before["Anonymous"] < codes / 2


@pytest.mark.parametrize("older", [False, True])
def test_an_interrupted_write_leaves_nothing_that_looks_whole(path, tmp_path, monkeypatch, older):
    folder = tmp_path / "new"
    output = folder / "out.onnx"
    if older:
        qmoe_plugin.quantize(path, output)
    before = {file: file.read_bytes() for file in folder.iterdir()} if older else {}
    calls = []
    original = quantize_weights._quantize

    def interrupted(*arguments):
        calls.append(1)
        seen = [file for file in folder.iterdir() if file not in before]
        assert [file.suffix for file in seen] == [".partial"]  # what a kill would leave
        if len(calls) == 11:  # in the midst of fc2
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(quantize_weights, "_quantize", interrupted)
    with pytest.raises(KeyboardInterrupt):
        qmoe_plugin.quantize(path, output, format="int8")
    assert len(calls) == 11
    assert {file: file.read_bytes() for file in folder.iterdir()} == before


def test_a_weight_that_cannot_be_quantised_leaves_no_bytes(tmp_path):
    model = CASE.model(CASE.tensors())
    (fc1,) = (t for t in model.graph.initializer if t.name == "fc1_experts_weights")
    values = numpy_helper.to_array(fc1).copy()
    values[-1, 0, 0] = np.inf
    fc1.CopyFrom(numpy_helper.from_array(values, fc1.name))
    path = save_external(model, tmp_path)
    report = qmoe_plugin.quantize(path, tmp_path / "out.onnx")
    assert "'fc1_experts_weights' holds NaN or infinity" in report.kept[0].reason
    size = sum(array.nbytes for array in initializers(onnx.load(tmp_path / "out.onnx")).values())
    assert (tmp_path / "out.onnx.data").stat().st_size <= size + 8 * 4096


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (["model.onnx"], TypeError, "need `output`"),
        ([onnx.ModelProto(), "out.onnx"], TypeError, "`output` is for a path or bytes"),
        ([3], TypeError, "model is a int; give a path, bytes"),
        ([b"bytes", "out.onnx"], ValueError, "not an ONNX model"),
        (["none.onnx", "out.onnx"], FileNotFoundError, "none.onnx"),
    ],
)
def test_wrong_arguments(arguments, error, text):
    with pytest.raises(error, match=text):
        qmoe_plugin.quantize(*arguments)


def test_the_original_is_not_replaced(path):
    before = path.read_bytes()
    with pytest.raises(ValueError, match="would replace a file of the original model"):
        qmoe_plugin.quantize(path, path)
    assert path.read_bytes() == before


# --- the command ----------------------------------------------------------------------------------


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run_command("quantize", *arguments)


def test_the_command(path, tmp_path):
    output = tmp_path / "out" / "small.onnx"
    rules = ["--rule", "fc2_experts=int8", "--rule", "lm_head=keep"]
    done = command(path, output, *rules, "--format", "int4:32", "--search", "mse")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "quantised 1 of 1 nodes with searched scales",
        "  MoE 'node': fc1 int4 block 32, 8 x 192 x 64; fc2 int8 block 32, 8 x 64 x 96",
        "rules that counted for no weight:",
        "  lm_head=keep",
    ]
    open_session(output)
    again = command(output, tmp_path / "twice.onnx", "--json")
    assert again.returncode == 1
    assert json.loads(again.stdout)["already"] == 1
    assert again.stderr == "qmoe_plugin: no node was quantised\n"


def test_the_dry_run_of_the_command(path, tmp_path):
    before = names_in(tmp_path)
    for arguments in ([path], [path, tmp_path / "out.onnx"]):
        done = command(*arguments, "--dry-run", "--json")
        assert done.returncode == 0
        report = json.loads(done.stdout)
        assert (report["dry_run"], len(report["quantized"])) == (True, 1)
        assert names_in(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        ([], 1, "say where to write, or give --dry-run"),
        (["out.onnx", "--format", "int5"], 1, "format 'int5' is not known"),
        (["out.onnx", "--rule", "a=int4:7"], 1, "'int4:7': blocks of 7"),
        (["out.onnx", "--rule", "int4"], 2, "'int4' is no rule: write REGEX=FORMAT"),
        (["out.onnx", "--search", "best"], 2, "invalid choice: 'best'"),
    ],
)
def test_wrong_use_gives_one_clear_line(path, tmp_path, arguments, code, text):
    given = [tmp_path / a if a == "out.onnx" else a for a in arguments]
    done = command(path, *given)
    assert done.returncode == code
    last = done.stderr.splitlines()[-1]
    assert text in last
    assert "Traceback" not in done.stderr
    if code == 1:
        assert done.stderr.count("\n") == 1
