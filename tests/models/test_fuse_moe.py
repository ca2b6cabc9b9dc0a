"""`fuse` on dense fallbacks that torch.onnx exports: MoE, with the same logits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

import qmoe_plugin
from models.export import FOLDER, SKIP

pytestmark = [pytest.mark.models, pytest.mark.usefixtures("library")]

# As dense_experts.EXPORTS, which needs PyTorch to be read.
EXPORTS = [
    "mixtral-eager-trace",
    "mixtral-batched_mm-trace",
    "mixtral-batched_mm-dynamo",
    "mixtral-loop-trace",
    "mixtral-scripted-trace",
    "mixtral-skipping-trace",
    "mixtral-dense-trace",
    "mixtral-stacked-trace",
    "mixtral-stacked-dynamo",
    "qwen3_moe-loop-trace",
    "qwen3_moe-skipping-trace",
    "qwen3_moe-batched_mm-dynamo",
    "olmoe-loop-dynamo",
    "olmoe-dense-trace",
    "olmoe-batched_mm-trace",
    "gpt_oss-eager-trace",
    "gpt_oss-batched_mm-trace",
    "glm4_moe-batched_mm-trace",
    "glm4_moe-loop-trace",
]


@pytest.fixture(scope="module")
def dense_exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all of them, made in a process of its own, which keeps PyTorch out of this."""
    if os.environ.get(SKIP, "0") not in ("", "0"):
        pytest.skip(f"{SKIP} is set")
    for name in ("torch", "transformers", "onnxscript"):
        pytest.importorskip(name)
    folder = tmp_path_factory.mktemp("dense")
    paths = [str(FOLDER.parent), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-m", "models.dense_experts", str(folder)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(path.stem for path in folder.glob("*.onnx")) == sorted(EXPORTS)
    return folder


@pytest.mark.parametrize("name", EXPORTS)
def test_the_fused_model_has_the_same_logits(
    name: str, dense_exports: Path, tmp_path: Path
) -> None:
    path, fused, small = dense_exports / f"{name}.onnx", tmp_path / "a.onnx", tmp_path / "b.onnx"
    moe, *_ = qmoe_plugin.fuse(path, fused)
    layers = 2 if name.endswith("trace") else 1
    assert len(moe.fused) == layers
    assert moe.kept == ()
    model = onnx.load(fused)
    onnx.checker.check_model(model)
    nodes = [node.op_type for node in model.graph.node]
    assert "Loop" not in nodes
    assert nodes.count("MoE") == layers
    assert ("TopK" in nodes) == name.startswith("glm4")  # whose routing is no softmax
    stacks = [t for t in model.graph.initializer if len(t.dims) == 3 and np.prod(t.dims) > 4096]
    assert len(stacks) == 2 * layers, "the former weights are left beside the new ones"
    report = qmoe_plugin.quantize(fused, small, format="int8")
    assert [node.op_type for node in report.quantized].count("MoE") == layers

    with np.load(path.with_suffix(".npz")) as data:
        for i in range(3):
            expected = data[f"logits{i}"]
            for model_path in (fused, small):
                session = qmoe_plugin.session(model_path, ["CPUExecutionProvider"])
                (logits,) = session.run(None, {session.get_inputs()[0].name: data[f"ids{i}"]})
                errors = np.abs(logits - expected).max(axis=-1) / np.abs(expected).max()
                if model_path == fused:
                    assert errors.max() <= 1e-5
                else:  # rounding makes a few tokens choose other experts
                    assert np.median(errors) <= 0.05
