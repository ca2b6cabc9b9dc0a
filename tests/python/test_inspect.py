"""`inspect`: formats, layouts, bytes, kernels, floors; without reading weights."""

import json

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from helpers.block_quantized_cases import Fp4WeightCase, Fp8WeightCase
from helpers.cases import MatMulNBitsCase, QMoECase, feeds_of
from helpers.command import error_line, run
from helpers.models import save_external
from helpers.moe_cases import MoECase
from onnx import TensorProto, helper, numpy_helper

import qmoe_plugin
from qmoe_plugin.bandwidth import bandwidth
from qmoe_plugin.devices import CPU, Target
from qmoe_plugin.inspection import inspect

pytestmark = pytest.mark.usefixtures("library")

CASES = {
    "int4": (QMoECase(), ["fc1 int4 block 32, 4 x 192 x 64", "fc2 int4 block 32, 4 x 64 x 96"]),
    "channel": (
        QMoECase(format="int8", block_size=0, zero_points=True),
        ["fc1 int8 per channel with zero points, 4 x 192 x 64",
         "fc2 int8 per channel with zero points, 4 x 64 x 96"],
    ),
    "mixed": (
        QMoECase(fc2_format="mxfp4"),
        ["fc1 int4 block 32, 4 x 192 x 64", "fc2 mxfp4 block 32, 4 x 64 x 96"],
    ),
    "moe": (MoECase(dtype="float16"), ["fc1 float16, 4 x 192 x 64", "fc2 float16, 4 x 64 x 96"]),
    "dense": (MatMulNBitsCase(format="int2"), ["dense int2 block 32, 48 x 96"]),
    "fp8": (Fp8WeightCase(), ["dense fp8_e4m3 block 128, 48 x 96"]),
    "fp4": (Fp4WeightCase(), ["dense nvfp4 block 16, 48 x 96"]),
}  # fmt: skip


def sizes(case):
    """Bytes of the constants of a case, by name."""
    tensors = case.tensors()
    return {name: tensors[name].nbytes for name in tensors.keys() - feeds_of(tensors).keys()}


def look(path, *arguments):
    done = run("inspect", path, "--sm", 0, "--json", *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", CASES)
def test_one_node(name, tmp_path):
    case, weights = CASES[name]
    path = save_external(case.model(case.tensors()), tmp_path)
    path.with_name("model.onnx.data").unlink()  # nothing reads it
    found = look(path, "--tokens", 5)
    (node,) = found["nodes"]
    assert node["weights"] == weights
    assert node["layout"] == "raw"
    assert node["bytes"] == sum(sizes(case).values()) == sum(found["bytes_by_format"].values())
    proto = onnx.load(path, load_external_data=False)
    answers = qmoe_plugin.explain(ir.from_proto(proto).graph[0], sm=0, tokens=5)
    assert [choice["kernel"] for choice in node["kernels"]] == [a.kernel for a in answers]
    assert (found["floor_us"], node["floor_us"]) == (None, None)


def test_formats_of_projections(tmp_path):
    case, _ = CASES["mixed"]
    found = look(save_external(case.model(case.tensors()), tmp_path))
    second = sum(size for name, size in sizes(case).items() if name.startswith("fc2"))
    assert found["bytes_by_format"] == {
        "int4": sum(sizes(case).values()) - second,
        "mxfp4": second,
    }
    assert found["experts"] == dict.fromkeys(
        ("total", "quantized", "ours"), sum(sizes(case).values())
    )


@pytest.mark.parametrize(
    ("case", "layout"),
    [
        (QMoECase(layout="fpa_intb", inter=64), "SM80 prepacked (fpA_intB)"),
        (QMoECase(format="mxfp4", layout="k_major"), "K-major"),
        (MatMulNBitsCase(layout="fpa_intb90", n=64, k=128, block_size=64),
         "SM90 prepacked (fpA_intB)"),
    ],
)  # fmt: skip
def test_layouts(case, layout, tmp_path):
    found = look(save_external(case.model(case.tensors()), tmp_path))
    assert found["nodes"][0]["layout"] == layout


def test_packed(tmp_path):
    case = QMoECase()
    path = tmp_path / "packed.onnx"
    qmoe_plugin.prepack(case.model(case.tensors()).SerializeToString(), path)
    found = look(path)
    assert found["nodes"][0]["layout"] == "packed (cpu_panel16)"
    assert list(found["bytes_by_format"]) == ["int4"]


@pytest.mark.parametrize(
    ("case", "tokens", "share"),
    [
        (QMoECase(), 1, 1 / 2),
        (QMoECase(), 3, 1 - (1 / 2) ** 3),
        (QMoECase(shared=1, k=1), 1, (1 + 3 * (1 / 3)) / 4),
        (QMoECase(shared=1, k=1), 2, (1 + 3 * (1 - (2 / 3) ** 2)) / 4),
        (MatMulNBitsCase(), 64, 1),
    ],
)
def test_floor(case, tokens, share, tmp_path):
    path = save_external(case.model(case.tensors()), tmp_path)
    found = look(path, "--tokens", tokens, "--bandwidth", 40)
    touched = sum(sizes(case).values()) * share
    assert found["nodes"][0]["touched"] == pytest.approx(touched)
    assert found["floor_us"] == pytest.approx(touched / 40e9 * 1e6)


def test_share_is_that_of_random_routing():
    case = QMoECase(experts=8, k=2)
    found = inspect(ir.from_proto(case.model(case.tensors())), sm=0, tokens=6)
    rng = np.random.default_rng(0)
    chosen = [
        len({expert for _ in range(6) for expert in rng.permutation(8)[:2]}) for _ in range(4000)
    ]
    assert found.nodes[0].touched / found.nodes[0].bytes == pytest.approx(
        np.mean(chosen) / 8, rel=0.01
    )


def both(tmp_path, *, name="mlp.experts.0.up.weight", shared=False):
    """A MatMulNBits and a float MatMul, whose weight is called `name`."""
    case = MatMulNBitsCase()
    model = case.model(case.tensors())
    weights = np.zeros((48, 96), np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weights, name))
    model.graph.node.append(helper.make_node("MatMul", ["output", name], ["y"]))
    model.graph.output[0].name = "y"
    if shared:
        again = onnx.NodeProto()
        again.CopyFrom(model.graph.node[0])
        again.name, again.input[0], again.output[0] = "again", "y", "z"
        model.graph.node.append(again)
        model.graph.output[0].name = "z"
    return save_external(model, tmp_path), sum(sizes(case).values()), weights.nbytes


def test_experts_left_in_float(tmp_path):
    path, ours, dense = both(tmp_path)
    found = look(path)
    assert found["bytes_by_format"] == {"float32": dense, "int4": ours}
    assert found["experts"] == {"total": dense, "quantized": 0, "ours": 0}
    done = run("inspect", path, "--sm", 0, "--strict")
    assert "0.0% are quantised, and 0.0% are run by our kernels" in error_line(done)
    assert "experts: 18.4 kB, 0.0% quantised" in done.stdout


def test_shared_weights_count_once(tmp_path):
    path, ours, dense = both(tmp_path, name="w", shared=True)
    found = look(path)
    assert found["bytes_by_format"] == {"float32": dense, "int4": ours}
    assert [node["bytes"] for node in found["nodes"]] == [ours, ours]
    assert found["experts"]["total"] == 0
    text = run("inspect", path, "--sm", 0).stdout
    assert "\n2      qmoe_plugin.MatMulNBits  node" in text
    assert len(run("inspect", path, "--sm", 0, "-v").stdout.splitlines()) == 1 + len(
        text.splitlines()
    )


def test_node_that_nobody_runs(tmp_path):
    case = QMoECase()
    model = case.model(case.tensors(), "com.microsoft")
    model.graph.node[0].attribute.append(helper.make_attribute("novel", 1))
    path = save_external(model, tmp_path)
    found = look(path)
    (node,) = found["nodes"]
    assert "novel" in node["reason"]
    assert (node["kernels"], node["weights"]) == ([], [])
    total = sum(sizes(case).values())
    assert found["experts"] == {"total": total, "quantized": total, "ours": 0}
    done = run("inspect", path, "--sm", 0, "--strict")
    assert "nodes that our kernels do not run" in error_line(done)
    assert "QMoE 'node': attribute novel" in done.stdout


def test_strict_passes(tmp_path):
    case = QMoECase()
    path = save_external(case.model(case.tensors(), "com.microsoft"), tmp_path)
    done = run("inspect", path, "--sm", 0, "--strict")
    assert done.returncode == 0, done.stderr
    assert "100.0% quantised, 100.0% run by our kernels" in done.stdout


def test_model_without_our_ops(tmp_path):
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "plain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
    )
    onnx.save(helper.make_model(graph), tmp_path / "plain.onnx")
    done = run("inspect", tmp_path / "plain.onnx")
    assert done.returncode == 0
    assert "no node of our ops" in done.stdout
    assert "no node of our ops" in error_line(run("inspect", tmp_path / "plain.onnx", "--strict"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["gone.onnx"], "gone.onnx"),
        (["data"], "is not an ONNX model"),
        (["model.onnx", "--tokens", "0"], "tokens is 0"),
        (["model.onnx", "--bandwidth", "-1"], "the bandwidth is -1.0 GB/s"),
        (["model.onnx", "--sm", "-1"], "sm is -1"),
    ],
)
def test_wrong_use(arguments, says, tmp_path):
    case = MatMulNBitsCase()
    save_external(case.model(case.tensors()), tmp_path)
    (tmp_path / "data").write_bytes(b"no model")
    name, *flags = arguments
    assert says in error_line(run("inspect", tmp_path / name, *flags))


def test_bandwidths():
    assert bandwidth(CPU) is None
    for sm in (80, 86, 89, 90, 100, 120):
        found = bandwidth(Target("CUDA", sm))
        assert found.source
        assert found.microseconds(1e9) == pytest.approx(1e6 / found.gb_per_s)
