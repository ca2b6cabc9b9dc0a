"""`tune`: what it measures, what it chooses, and what the library makes of its file."""

import json
from pathlib import Path

import onnx
import pytest
from helpers.cases import MatMulNBitsCase, QMoECase, feeds_of
from helpers.command import error_line, run
from helpers.models import save_external

import qmoe_plugin
from qmoe_plugin import tuning
from qmoe_plugin.devices import CPU, Target
from qmoe_plugin.graph.retarget import Retarget
from qmoe_plugin.kernels import Explanation, Problem, Verdict
from qmoe_plugin.taps import Source

pytestmark = pytest.mark.usefixtures("library")

H200 = Target("CUDA", 90)


def answer(rows, *kernels, refusing=()):
    problem = Problem(stage="fc1", format="int4", n=64, k=32, rows=rows, topk=2, experts=8,
                      dtype="float16", block_size=32, target=H200)  # fmt: skip
    verdicts = [Verdict(f"{k}.int4", "no" if k in refusing else "") for k in kernels]
    return Explanation(problem, tuple(verdicts))


ANSWERS = (
    answer(2, "few", "any"),
    answer(8, "few", "any"),
    answer(32, "few", "any", refusing=("few",)),
)
TEXT = "fc1 int4 float16 experts 8 topk 2 n 64 k 32 block_size 32 zero_points 0"


def test_candidates():
    assert tuning.candidates(ANSWERS) == ["any"]
    assert tuning.candidates(ANSWERS[2:]) == []


def test_choose():
    defaults, times = (10.0, 20.0, 30.0), {"any": (9.9, 15.0, 25.0)}
    (found,) = tuning.choose(ANSWERS, defaults, times)
    assert found == tuning.Choice(TEXT, 3, 8, "any", 15.0, "few", 20.0)
    assert found.line == f"{TEXT} rows 3 8 kernel any"
    assert tuning.prefer(ANSWERS[0].problem, "any").startswith(f"{TEXT} rows 1 ")


def test_a_kernel_that_refuses_is_not_chosen():
    times = {"few": (1.0, 1.0, 1.0), "any": (10.0, 10.0, 10.0)}
    assert tuning.choose(ANSWERS[2:], (10.0,), times) == []


@pytest.mark.parametrize(
    "case",
    [
        QMoECase(inter=64, dtype="float16"),
        QMoECase(inter=64, dtype="bfloat16"),
        QMoECase(inter=64, dtype="float32"),
        MatMulNBitsCase(),
    ],
    ids=repr,
)
def test_models_of_one_node_run(case, tmp_path):
    path = save_external(case.model(case.tensors(), "com.microsoft"), tmp_path)
    source = Source.read(path, Retarget(CPU))
    ((node, description),) = tuning.distinct_nodes(source)
    proto = tuning.node_model(source, node, description)
    assert len(proto.graph.output) == 4
    timer = tuning.NodeTimer(proto, source.folder, ["CPUExecutionProvider"], "cpu")
    assert timer.us(1, 2) > 0
    assert timer.us(5, 2) > 0


def test_nodes_alike_are_measured_once(tmp_path):
    case = QMoECase(inter=64)
    model = case.model(case.tensors(), "qmoe_plugin")
    for i in range(2):
        copy = model.graph.node.add()
        copy.CopyFrom(model.graph.node[0])
        copy.output[0] = f"other{i}"
    onnx.save(model, tmp_path / "m.onnx")
    assert len(tuning.distinct_nodes(Source.read(tmp_path / "m.onnx"))) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((), "GPU"), (("--tokens", 0), "at least 1"), (("--tokens", 8, 4), "must increase"),
     (("--repeat", 0), "repeat is 0")],
)  # fmt: skip
def test_wrong_arguments(arguments, message, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = run("tune", tmp_path / "m.onnx", tmp_path / "out.txt", *arguments)
    assert message in error_line(done)
    assert not (tmp_path / "out.txt").exists()


def test_a_report_as_text_and_json():
    problem, default = "dense int4 float16", "gemv_sm80"
    choice = tuning.Choice(problem, 9, 16, "grouped_gemm_sm90", 5.0, default, 7.25)
    report = tuning.TuneReport("m.onnx", "CUDA (sm_90)", 1, (choice,), "tuning.txt")
    assert "9 to 16" in str(report)
    assert "7.2" in str(report)
    assert f"export QMOE_PLUGIN_TUNING={Path('tuning.txt').resolve()}" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["choices"][0]["kernel"] == "grouped_gemm_sm90"


def test_it_asks_where_to_write(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "say where to write" in error_line(run("tune", tmp_path / "m.onnx"))
    assert "GPU" in error_line(run("tune", tmp_path / "m.onnx", "--dry-run"))


@pytest.mark.gpu
def test_tune_on_a_gpu(cuda, tmp_path, monkeypatch):
    case = QMoECase(hidden=256, inter=256, experts=8, k=2, dtype="float16")
    tensors = case.tensors()
    path = save_external(case.model(tensors, "com.microsoft"), tmp_path)
    file = tmp_path / "tuning.txt"
    dry = run("tune", path, "--tokens", 1, "--repeat", 3, "--dry-run", "--json")
    assert dry.returncode == 0, dry.stderr
    assert json.loads(dry.stdout)["nodes"] == 1
    done = run("tune", path, file, "--tokens", 1, 8, 64, "--repeat", 3)
    assert done.returncode == 0, done.stderr
    assert "1 kinds of nodes measured" in done.stdout
    assert file.read_text().startswith("qmoe_plugin tuning 1\ndevice sm_")

    monkeypatch.setenv("QMOE_PLUGIN_TUNING", str(file))
    qmoe_plugin.session(path, providers=["CUDAExecutionProvider"]).run(None, feeds_of(tensors))
    file.write_text(file.read_text().replace("device sm_", "device sm_1"))
    with pytest.raises(
        Exception, match=r"line 2: it is 'device sm_1\d+ .*python -m qmoe_plugin tune"
    ):
        qmoe_plugin.session(path, providers=["CUDAExecutionProvider"])
