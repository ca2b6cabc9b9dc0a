"""What only ops/ort/ does: inferred shapes, weights from anywhere, mapped files, two runtimes, log.

That sessions stand threads, each other and bad input is tested in tests/ops.
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from helpers.blank import Blank
from helpers.cases import Case, MatMulNBitsCase, QMoECase, feeds_of
from helpers.models import one_node_model, save_external
from helpers.ort_c_api import Runtime, library_path
from helpers.run import open_session, run, session_options
from helpers.tolerance import check
from onnx import TensorProto, helper, numpy_helper

CASES: list[Case] = [QMoECase(tokens=5), MatMulNBitsCase(m=5)]
ORT_MINOR = int(ort.__version__.split(".")[1])
DTYPES = ("float32", "float16", "bfloat16")
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.op_type)


# --- types and shapes -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case", [QMoECase(rank=3), MatMulNBitsCase(rank=3)], ids=lambda c: c.op_type
)
def test_inferred_shape(case: Case) -> None:
    model = case.model(case.tensors())
    name = model.graph.input[0].name
    features = 64 if case.op_type == "QMoE" else 48
    assert open_session(model).get_outputs()[0].shape == [f"{name}_0", f"{name}_1", features]


@pytest.mark.parametrize("dims", ["unnamed", "unknown_rank", "fixed"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op_type", ["QMoE", "MatMulNBits"])
def test_incomplete_shapes(
    op_type: str, dtype: str, dims: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two nodes in a row, so that the type of one output is the type of the next input."""
    case = (
        QMoECase(dtype=dtype, tokens=4)
        if op_type == "QMoE"
        else MatMulNBitsCase(dtype=dtype, m=4, n=96)
    )
    tensors = case.tensors()
    model = case.model(tensors)
    first = model.graph.node[0]
    first.output[0] = "between"
    second = model.graph.node.add()
    second.CopyFrom(first)
    second.name, second.input[0], second.output[0] = "second", "between", "output"
    feeds = feeds_of(tensors)
    for graph_input in model.graph.input:
        tensor_type = graph_input.type.tensor_type
        tensor_type.ClearField("shape")
        if dims != "unknown_rank":
            for size in feeds[graph_input.name].shape:
                dim = tensor_type.shape.dim.add()
                if dims == "fixed":
                    dim.dim_value = size
    options = session_options()
    options.log_severity_level = 2
    session = open_session(model, options=options)
    result = run(session, feeds)
    once = run(open_session(case.model(tensors)), feeds)
    twice = run(open_session(case.model(tensors)), feeds | {first.input[0]: once})
    assert result.tobytes() == twice.tobytes()
    assert "does not match" not in capfd.readouterr().err


def test_output_may_overwrite_the_input() -> None:
    """Behind another node, ONNX Runtime lets QMoE write over its input."""
    case = QMoECase(tokens=3000)  # more than the CPU computes at a time
    tensors = case.tensors()
    model = case.model(tensors)
    model.graph.node[0].input[0] = "scaled"
    double = helper.make_node("Mul", ["input", "two"], ["scaled"])
    model.graph.node.insert(0, double)
    model.graph.initializer.append(numpy_helper.from_array(np.float32(2), "two"))
    feeds = feeds_of(tensors)
    expected = run(open_session(case.model(tensors)), feeds | {"input": 2 * tensors["input"]})
    assert run(open_session(model), feeds).tobytes() == expected.tobytes()


# --- constant weights, wherever they come from ----------------------------------------------------


@each_case
def test_weights_in_constant_nodes(case: Case) -> None:
    tensors = case.tensors()
    model = case.model(tensors)
    for initializer in model.graph.initializer:
        node = helper.make_node("Constant", [], [initializer.name], value=initializer)
        model.graph.node.insert(0, node)
    del model.graph.initializer[:]
    check(case, tensors, run(open_session(model), feeds_of(tensors)))


@each_case
def test_node_in_a_subgraph(case: Case) -> None:
    """The node lies in both branches of an If, its weights outside."""
    if ORT_MINOR < 29:
        pytest.skip("before 1.29, initializers outside of a subgraph are not constant to it")
    tensors = case.tensors()
    model = case.model(tensors)
    branches = []
    for branch in ("then", "else"):
        node = onnx.NodeProto()
        node.CopyFrom(model.graph.node[0])
        node.output[0] = f"{branch}_output"
        output = helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, None)
        branches.append(helper.make_graph([node], branch, [], [output]))
    del model.graph.node[:]
    model.graph.node.append(
        helper.make_node(
            "If", ["flag"], ["output"], then_branch=branches[0], else_branch=branches[1]
        )
    )
    model.graph.input.append(helper.make_tensor_value_info("flag", TensorProto.BOOL, []))
    session = open_session(model)
    for flag in (True, False):
        feeds = {**feeds_of(tensors), "flag": np.array(flag)}
        check(case, tensors, session.run(None, feeds)[0])


@each_case
def test_saved_optimized_model(case: Case, tmp_path: Path) -> None:
    tensors = case.tensors()
    options = session_options()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    first = run(open_session(case.model(tensors), options=options), feeds_of(tensors))
    again = run(open_session(tmp_path / "optimized.onnx"), feeds_of(tensors))
    assert again.tobytes() == first.tobytes()


# --- quant types and layouts ----------------------------------------------------------------------

HAS_E8M0 = ORT_MINOR >= 27
needs_e8m0 = pytest.mark.skipif(not HAS_E8M0, reason="this onnxruntime has no float8e8m0")


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "blank",
    [
        Blank(bits=2),
        Blank(bits=8, fc2_bits=2),
        *(Blank(scales=scales) for scales in DTYPES),
        pytest.param(Blank("fp4"), marks=needs_e8m0),
        Blank("fp4", scales="uint8", layout="transposed"),
        Blank("nvfp4"),
        Blank("nvfp4", layout="transposed"),
        pytest.param(Blank("wfp4afp8"), marks=needs_e8m0),
        Blank("wfp4afp8", scales="uint8", act_scales=1),
        Blank("wfp4afp8", scales="uint8", act_scales=4),
        Blank("fp8", block_size=0),
        Blank("fp8", block_size=0, float8_weights=False),
        Blank("fp8", block_size=128, hidden=160, inter=80, gate="fc3"),
        Blank(hidden=128, inter=64, layout="transposed"),
        Blank(bits=8, block_size=0, hidden=128, inter=64, layout="transposed"),
    ],
    ids=str,
)
def test_every_quant_type_opens_and_runs(blank: Blank, dtype: str) -> None:
    """Numbers are tested elsewhere; blank weights give finite ones."""
    blank = dataclasses.replace(blank, dtype=dtype)
    tensors = blank.tensors()
    feeds = {name: tensors[name] for name in ("input", "router_probs")}
    result = run(open_session(blank.model("qmoe_plugin")), feeds)
    assert result.shape == tensors["input"].shape
    assert result.dtype == tensors["input"].dtype
    assert np.isfinite(result.astype(np.float32)).all()


@pytest.mark.skipif(HAS_E8M0, reason="this onnxruntime has float8e8m0")
def test_bytes_stand_in_for_float8e8m0() -> None:
    with pytest.raises(Exception, match="float8e8m0"):
        open_session(Blank("fp4").model("qmoe_plugin"))
    open_session(Blank("fp4", scales="uint8").model("qmoe_plugin"))


@pytest.mark.parametrize(
    ("blank", "attributes", "tensors", "message"),
    [
        (Blank(), {"quant_type": "int3"}, {}, "allowed are int, fp4, nvfp4, fp8 and wfp4afp8"),
        (Blank("fp4"), {"block_size": 16}, {}, 'quant_type "fp4" has blocks of 32, so leave it'),
        (Blank("fp4", bits=8), {}, {}, 'expert_weight_bits is 8; .* "fp4" has 4 bits a weight'),
        (Blank("fp8", fc2_bits=4), {}, {}, 'fc2_expert_weight_bits is 4; .* "fp8" has 8 bits'),
        (Blank("fp4"), {}, {"fc1_global_scale": None}, r"input 15 \(global scale\) is missing"),
        (Blank("fp4"), {}, {"fc2_global_scale": ones(1)}, r"must be float32\[4\]"),
        (
            Blank("fp8"),
            {},
            {"fc2_global_scale": ones(4)},
            r"input 16 .* with block_size has a scale",
        ),
        (Blank(), {}, {"fc1_global_scale": ones(4)}, r"input 15 .* has no global scales"),
        (
            Blank("fp4", gate="fc3"),
            {},
            {},
            "there is no input for that of fc3; store gates and ups",
        ),
        (
            Blank("fp4", scales="float32"),
            {},
            {},
            "moe_quant_type=mxfp4 for every model but gpt-oss: they hold",
        ),
        (Blank("nvfp4", scales="uint8"), {}, {}, "must be float8e4m3fn, not bytes"),
        (Blank("nvfp4", scales="float16"), {}, {}, "must be float8e4m3fn"),
        (Blank("fp8", scales="float8e4m3fn"), {}, {}, "are float32, float16 and bfloat16"),
        (Blank("fp8"), {"block_size": None}, {}, "without block_size has a factor an expert"),
        (Blank("fp8", layout="transposed"), {}, {}, "fp8_e4m3 weights of this node must be"),
        (Blank("fp8"), {}, {"fc1_scales": ones(4, 192, 2)}, r"must be \[4, 6, 2\]"),
        (Blank("fp8", inter=92), {}, {}, "inter_size 92 must be a multiple of 8"),
        (
            Blank("fp8"),
            {},
            {"fc1_experts_weights": np.full((4, 192, 64), 0x7F, np.uint8)},
            r"fc1 weight of expert 0, row 0, column 0 is NaN \(code 127\)",
        ),
        (
            Blank("fp4", scales="uint8"),
            {},
            {"fc2_scales": np.full((4, 64, 3), 255, np.uint8)},
            "fc2 scale of expert 0, row 0, block 0 is nan",
        ),
        (
            Blank("nvfp4"),
            {},
            {"fc2_scales": np.full((4, 64, 6), np.nan, ml_dtypes.float8_e4m3fn)},
            "scales must be finite",
        ),
        (Blank("fp8", zero_points=True, block_size=32), {}, {}, "fp8_e4m3 takes none"),
        (Blank("nvfp4", act_scales=1), {}, {}, 'belong to quant_type "wfp4afp8"'),
        (Blank("wfp4afp8", scales="uint8", act_scales=3), {}, {}, r"float32\[1\] or float32\[4\]"),
        (
            Blank("wfp4afp8", scales="uint8", act_scales=1),
            {},
            {"fc1_act_scale": -ones(1)},
            "act",
        ),
        (
            Blank("wfp4afp8", scales="uint8"),
            {},
            {"fc2_act_scale": ones(1)},
            "input 18 .* without input 17",
        ),
        (
            Blank("wfp4afp8", scales="uint8"),
            {},
            {"fc1_act_block_scale": np.ones((4, 3, 2), np.uint8)},
            "input 19 .* found at run time",
        ),
        (Blank(), {"weights_layout": "k_major"}, {}, '"" \\(not said\\), "raw", "fpa_intb"'),
        (
            Blank(),
            {"weights_layout": "raw", "weights_prepacked": 1},
            {},
            'weights_layout is "raw", but weights_prepacked=1 says "fpa_intb"',
        ),
        (Blank("nvfp4"), {"weights_prepacked": 1}, {}, 'belongs to quant_type "int"'),
        (Blank(), {"weights_prepacked": 1}, {}, "as weights_prepacked=1 says SM80 prepacked"),
        (Blank(layout="transposed"), {}, {}, "it needs a multiple of 64 columns and of 32 rows"),
        (
            Blank(bits=2, hidden=128, inter=64, layout="transposed"),
            {},
            {},
            "it holds 4-bit and 8-bit codes, not 2-bit ones",
        ),
    ],
    ids=lambda value: str(value)[:60],
)
def test_refused_quant_types_and_layouts(
    blank: Blank,
    attributes: dict[str, int | str | None],
    tensors: dict[str, np.ndarray | None],
    message: str,
) -> None:
    if blank.scales is None and blank.quant_type in ("fp4", "wfp4afp8") and not HAS_E8M0:
        pytest.skip("this onnxruntime has no float8e8m0")
    with pytest.raises(Exception, match=f"QMoE node 'node': .*{message}"):
        open_session(blank.model("qmoe_plugin", attributes, tensors))


def test_scales_of_different_types_are_refused() -> None:
    """Those of fc1 and fc3, by onnxruntime: in com.microsoft all scales have one type."""
    other = {"fc3_scales": np.ones((4, 96, 2), np.float16)}
    model = Blank(gate="fc3").model("qmoe_plugin", tensors=other)
    with pytest.raises(Exception, match="no kernel def matches node inputs for Op: QMoE"):
        open_session(model)


# --- two copies of ONNX Runtime in one process ----------------------------------------------------


@each_case
def test_two_runtimes_in_one_process(case: Case, library: str) -> None:
    c_library = library_path()
    if c_library is None:
        pytest.skip("this onnxruntime package has no libonnxruntime.so")
    tensors = case.tensors()
    model = case.model(tensors)
    feeds = feeds_of(tensors)
    python_session = open_session(model)
    runtime = Runtime(c_library)
    c_session = runtime.session(model.SerializeToString(), library)
    expected = run(python_session, feeds)
    for _ in range(3):
        assert runtime.run(c_session, feeds, expected.shape).tobytes() == expected.tobytes()
        assert run(python_session, feeds).tobytes() == expected.tobytes()
    bad = one_node_model(case.op_type, tensors, {**case.attributes(), "accuracy_level": 9})
    with pytest.raises(RuntimeError, match="accuracy_level is 9; allowed are 0 to 4"):
        runtime.session(bad.SerializeToString(), library)


# --- mapped files ---------------------------------------------------------------------------------

BIG = MatMulNBitsCase(n=4096, k=2048, bias=False, block_size=128)  # 4 MiB of codes


def resident_kib(path: Path) -> int:
    """Memory that this process holds of a mapped file."""
    resident, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            resident += int(line.split()[1])
    return resident


@pytest.mark.skipif(sys.platform != "linux", reason="pages are given back on Linux only")
def test_mapped_weights_are_given_back(tmp_path: Path) -> None:
    tensors = BIG.tensors()
    path = save_external(BIG.model(tensors), tmp_path)
    session = open_session(path)
    # Neighbours of a page are read with it, and a tensor's first and last page may be shared.
    assert resident_kib(path.with_name(path.name + ".data")) < 512
    result = run(session, feeds_of(tensors))
    check(BIG, tensors, result)
    again = open_session(path)  # the mapping can still be read
    assert run(again, feeds_of(tensors)).tobytes() == result.tobytes()


@pytest.mark.skipif(sys.platform != "linux", reason="pages are given back on Linux only")
@pytest.mark.parametrize("mode", ["c", "r"])
def test_written_pages_of_a_mapping_stay(tmp_path: Path, mode: str) -> None:
    """Weights in a user's own copy-on-write mapping: what was written there is nowhere else."""
    tensors = BIG.tensors()
    model = BIG.model(tensors)
    path = tmp_path / "codes"
    tensors["B"].tofile(path)
    mapped = np.memmap(path, mode=mode, shape=tensors["B"].shape, dtype=np.uint8)
    if mode == "c":
        mapped[1000:3000] ^= 0xFF
        tensors["B"] = np.array(mapped)
    options = session_options()
    value = ort.OrtValue.ortvalue_from_numpy(mapped)
    options.add_initializer("B", value)
    initializer = next(tensor for tensor in model.graph.initializer if tensor.name == "B")
    initializer.ClearField("raw_data")
    initializer.data_location = TensorProto.EXTERNAL
    initializer.external_data.add(key="location", value="codes")
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    session = open_session(tmp_path / "model.onnx", options=options)
    assert np.array_equal(np.asarray(mapped), tensors["B"])
    check(BIG, tensors, run(session, feeds_of(tensors)))


# --- the log --------------------------------------------------------------------------------------

LOG = """
import sys
import onnxruntime as ort
options = ort.SessionOptions()
options.log_severity_level = int(sys.argv[3])
options.register_custom_ops_library(sys.argv[1])
ort.InferenceSession(sys.argv[2], options, providers=["CPUExecutionProvider"])
"""


def log_of(library: str, model: onnx.ModelProto, folder: Path, severity: int) -> list[str]:
    """What a session writes to stderr about the node while it is made."""
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    command = [sys.executable, "-c", LOG, library, str(path), str(severity)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return [line for line in result.stderr.splitlines() if "qmoe_plugin" in line]


@each_case
def test_log_line(case: Case, library: str, tmp_path: Path) -> None:
    model = case.model(case.tensors())
    lines = log_of(library, model, tmp_path, severity=1)
    assert len([line for line in lines if f"{case.op_type} 'node': " in line]) == 1
    packed = r"float32 on the CPU, packed in .* ms(; int4 block 32 [0-9 x]+ as \w+, \d+ bytes)+"
    assert re.search(packed, "".join(lines))
    assert log_of(library, model, tmp_path, severity=2) == []


@pytest.mark.parametrize(
    ("quant_type", "advice"),
    [
        ("int", "raw. Write weights_prepacked=0"),
        ("nvfp4", 'K-major. Write weights_layout="k_major"'),
    ],
)
def test_ambiguous_layout_is_warned_about(
    quant_type: str, advice: str, library: str, tmp_path: Path
) -> None:
    """hidden_size = inter_size and nothing gated: all layouts look alike."""
    blank = Blank(quant_type, hidden=64, inter=64, gate="none")
    warnings = log_of(library, blank.model("qmoe_plugin"), tmp_path, severity=2)
    assert f"they are read as {advice} if that is right" in "".join(warnings)
    stated = blank.model("qmoe_plugin", {"weights_layout": "raw"})
    assert log_of(library, stated, tmp_path, severity=2) == []
