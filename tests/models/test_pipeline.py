"""From a float model to onnxruntime-genai with our kernels, by the commands.

The checkpoints' weights are such that int4 in blocks of 32 holds them exactly, and mxfp4 the
experts of gpt-oss; `test_quantize_models.py` has every format.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers.command import run

import qmoe_plugin
from models import export, genai, noisy
from models.runner import Decoder

pytestmark = pytest.mark.models


@pytest.mark.parametrize(
    ("recipe", "spec"), [*((recipe, "int4") for recipe in noisy.RECIPES), ("gpt_oss", "mxfp4")]
)
def test_float_to_genai(recipe: str, spec: str, exports: export.Exports, tmp_path: Path) -> None:
    item = export.by_id(f"{recipe}-float32")
    source = exports.model(item) / "model.onnx"
    folder = tmp_path / "genai"
    ignored = shutil.ignore_patterns("model.onnx*")
    shutil.copytree(exports.model(item), folder, ignore=ignored)
    model = folder / "model.onnx"
    done = run("quantize", source, model, "--format", spec)
    assert done.returncode == 0, done.stderr
    done = run("inspect", model, "--sm", 0, "--strict")
    assert done.returncode == 0, done.stdout + done.stderr
    if item.exporter == "handmade":
        done = run("verify", source, model, "--cpu")
        assert "FC3 is not implemented" in done.stderr
        assert "retarget the model first" in done.stderr
        exported, source = source, tmp_path / "ours.onnx"
        assert run("retarget", exported, source, "--sm", 0, "--strict").returncode == 0
    done = run("verify", source, model, "--cpu", "--json", "--tokens", 24)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    experts = [node for node in report["nodes"] if "QMoE" in node["ops"]]
    assert len(experts) == noisy.MOES
    (logits,) = (o["error"]["sqnr"] for o in report["outputs"] if o["name"] == "logits")
    lowest = min(node["own"]["sqnr"] for node in experts)
    assert lowest > 100
    assert logits > (100 if spec == "int4" else 8)
    done = run("install", folder, "--cpu", "--strict")
    assert done.returncode == 0, done.stderr
    expected = exports.expected(item)
    tokens = genai.generate_plainly(folder, expected.prompt, len(expected.tokens))
    decoder = Decoder(qmoe_plugin.session(model, ["CPUExecutionProvider"]))
    assert tokens == decoder.generate(expected.prompt, len(expected.tokens))[0]
    if spec == "int4":
        assert tokens == expected.tokens
