"""The command line."""

import json
import subprocess
import sys

import onnx
import pytest
from helpers.cases import MatMulNBitsCase, QMoECase
from helpers.models import save_external

import qmoe_plugin
from qmoe_plugin import doctor
from qmoe_plugin.cli import main

pytestmark = pytest.mark.usefixtures("library")


@pytest.fixture
def path(tmp_path):
    case = QMoECase()
    return save_external(case.model(case.tensors(), "com.microsoft"), tmp_path)


@pytest.fixture
def stubborn(tmp_path):
    """A model whose node nobody can move."""
    case = MatMulNBitsCase()
    model = case.model(case.tensors(), "com.microsoft")
    model.graph.node[0].attribute.append(onnx.helper.make_attribute("weight_prepacked", 1))
    return save_external(model, tmp_path, "stubborn.onnx")


def test_as_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "qmoe_plugin", "kernels"], capture_output=True, text=True, check=True
    )
    assert "gemm_reference.int4" in done.stdout


def test_version(capsys):
    with pytest.raises(SystemExit) as exited:
        main(["--version"])
    assert exited.value.code == 0
    assert capsys.readouterr().out.strip() == qmoe_plugin.__version__


@pytest.mark.parametrize(
    "arguments", [[], ["dance"], ["retarget"], ["kernels", "--json", "--markdown"]]
)
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as exited:
        main(arguments)
    assert exited.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_kernels_as_json(capsys):
    assert main(["kernels", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == [kernel.name for kernel in qmoe_plugin.kernels()]


def test_retarget_and_back(path, capsys):
    ours, back = path.with_name("ours.onnx"), path.with_name("back.onnx")
    assert main(["retarget", str(path), str(ours), "--sm", "0", "--strict"]) == 0
    assert capsys.readouterr().out.startswith("moved 1 of 1 nodes to qmoe_plugin, for CPU")
    assert main(["retarget", str(ours), str(back), "--back", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["domain"] == "com.microsoft"
    assert back.read_bytes() == path.read_bytes()


def test_retarget_that_moves_nothing_fails(stubborn, tmp_path, capsys):
    output = tmp_path / "out.onnx"
    assert main(["retarget", str(stubborn), str(output)]) == 1
    captured = capsys.readouterr()
    assert "weight_prepacked is 1" in captured.out
    assert "no node was moved" in captured.err


def test_strict_fails_if_any_node_is_left(path, stubborn, tmp_path):
    merged = onnx.load(path)
    other = onnx.compose.add_prefix(onnx.load(stubborn), "b_").graph
    for field in ("node", "initializer", "input", "output"):
        getattr(merged.graph, field).extend(getattr(other, field))
    both = tmp_path / "both.onnx"
    onnx.save(merged, both)
    assert main(["retarget", str(both), str(tmp_path / "a.onnx"), "--sm", "0"]) == 0
    assert main(["retarget", str(both), str(tmp_path / "b.onnx"), "--sm", "0", "--strict"]) == 1


@pytest.mark.parametrize(
    ("flags", "device"), [([], "CPU"), (["--cpu"], "CPU"), (["--sm", "90"], "CUDA (sm_90)")]
)
def test_prepack(path, tmp_path, flags, device):
    output = tmp_path / "out" / "packed.onnx"
    command = [sys.executable, "-m", "qmoe_plugin", "prepack"]
    done = subprocess.run(
        [*command, path, output, *flags, "--strict"], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
        f"packed 1 of 1 nodes for {device}",
        "  QMoE 'node': fc1 int4 block 32, 4 x 192 x 64; fc2 int4 block 32, 4 x 64 x 96",
    ]
    again = subprocess.run(
        [*command, output, tmp_path / "twice.onnx", *flags, "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert again.returncode == 1
    assert json.loads(again.stdout)["already"] == 1
    assert "no node was packed" in again.stderr


def test_prepack_for_two_devices(path, tmp_path):
    with pytest.raises(SystemExit):
        main(["prepack", str(path), str(tmp_path / "out.onnx"), "--sm", "90", "--cpu"])


def test_prepack_strict(path, tmp_path, capsys):
    case = MatMulNBitsCase(g_idx="shuffled")
    stuck = save_external(case.model(case.tensors(), "com.microsoft"), tmp_path, "stuck.onnx")
    assert main(["prepack", str(stuck), str(tmp_path / "out.onnx"), "--strict"]) == 1
    assert "B has a g_idx" in capsys.readouterr().out


def test_errors_are_one_line(capsys, tmp_path):
    assert main(["retarget", str(tmp_path / "none.onnx"), str(tmp_path / "out.onnx")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("qmoe_plugin: ")
    assert "none.onnx" in error
    assert "Traceback" not in error


def test_explain(path, capsys):
    assert main(["explain", str(path), "--sm", "0", "--tokens", "7"]) == 0
    output = capsys.readouterr().out
    assert output.startswith(
        "com.microsoft.QMoE 'node'\n  fc1 int4 block 32, 2 of 4 experts, 192 x 64, 14"
    )
    assert "  fc2 int4" in output


def test_explain_as_json(path, capsys):
    assert main(["explain", str(path), "--sm", "0", "--json"]) == 0
    (answer,) = json.loads(capsys.readouterr().out)
    assert [e["problem"]["stage"] for e in answer["explanations"]] == ["fc1", "fc2"]


def test_explain_a_node_that_cannot_run_fails(stubborn, capsys):
    assert main(["explain", str(stubborn)]) == 1
    assert "weight_prepacked is 1" in capsys.readouterr().out


def test_explain_for_a_device_without_kernels_fails(path, capsys):
    assert main(["explain", str(path), "--sm", "50"]) == 1
    assert "no kernel" in capsys.readouterr().out


def test_explain_a_node_that_is_not_there(path, capsys):
    assert main(["explain", str(path), "--node", "gone"]) == 1
    assert "MatMulBlockQuantizedFp4Weight node called 'gone'" in capsys.readouterr().err


def test_doctor(capsys):
    assert main(["doctor"]) == 0
    assert "MatMulNBits on CPU: largest error" in capsys.readouterr().out


def test_doctor_fails_if_anything_is_broken(monkeypatch, capsys):
    checks = [doctor.Check("a", "ok", "fine"), doctor.Check("b", "broken", "gone")]
    monkeypatch.setattr(doctor, "examine", lambda: iter(checks))
    assert main(["doctor", "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)
    assert rows[1] == {"name": "b", "status": "broken", "detail": "gone"}
