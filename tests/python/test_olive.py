"""Our pass in a workflow of Olive, by name."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from helpers.cases import feeds_of
from helpers.moe_cases import MoECase

from qmoe_plugin.sample_inputs import Wanted
from qmoe_plugin.verify import verify

pytestmark = [
    pytest.mark.usefixtures("library"),
    pytest.mark.skipif(
        importlib.util.find_spec("olive") is None,
        reason="olive-ai is not installed (pip install '.[olive]')",
    ),
]


def workflow(tmp_path: Path, **settings: object) -> subprocess.CompletedProcess[str]:
    """Runs `olive run` on a MoE model, with our pass; the result is in tmp_path / out."""
    # Nothing is sent anywhere, and nothing written outside.
    environment = os.environ | {
        "OLIVE_DISABLE_TELEMETRY": "1",
        "OLIVE_TELEMETRY_CACHE_DIR": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
    }
    common = {"capture_output": True, "text": True, "env": environment, "cwd": tmp_path}
    passes = subprocess.run(
        [sys.executable, "-m", "qmoe_plugin.olive"], check=True, **common
    ).stdout
    (tmp_path / "passes.json").write_text(passes)
    case = MoECase()
    onnx.save(case.model(case.tensors(), "com.microsoft"), tmp_path / "moe.onnx")
    config = {
        "input_model": {"type": "ONNXModel", "model_path": str(tmp_path / "moe.onnx")},
        "systems": {
            "here": {
                "type": "LocalSystem",
                "accelerators": [
                    {"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}
                ],
            }
        },
        "target": "here",
        "passes": {"quantize": {"type": "QMoEQuantization", **settings}},
        "output_dir": str(tmp_path / "out"),
        "cache_dir": str(tmp_path / "cache"),
    }
    (tmp_path / "workflow.json").write_text(json.dumps(config))
    arguments = ["--config", "workflow.json", "--package-config", "passes.json"]
    code = "import sys; from olive.cli.launcher import main; sys.exit(main())"
    return subprocess.run([sys.executable, "-c", code, "run", *arguments], check=False, **common)


def test_workflow(tmp_path: Path) -> None:
    done = workflow(tmp_path, format="int8", rules=["fc2=nvfp4"])
    (made,) = (tmp_path / "out").rglob("*.onnx")
    (node,) = onnx.load(made, load_external_data=False).graph.node
    assert (node.domain, node.op_type) == ("qmoe_plugin", "QMoE"), done.stderr
    said = {attribute.name: attribute.s.decode() for attribute in node.attribute if attribute.s}
    assert (said["fc1_format"], said["fc2_format"]) == ("int8", "nvfp4")
    feeds = feeds_of(MoECase().tensors())
    report = verify(tmp_path / "moe.onnx", made, inputs=Wanted(feeds), cpu=True)
    assert 15 < report.nodes[0].own.sqnr < 30


def test_wrong_settings(tmp_path: Path) -> None:
    done = workflow(tmp_path, format="int5")
    assert "int5" in done.stdout + done.stderr
    assert not list((tmp_path / "out").rglob("*.onnx"))
