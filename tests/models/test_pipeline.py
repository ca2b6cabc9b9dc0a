"""From a float model of a real exporter to onnxruntime-genai with our kernels, by the commands."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers.command import run

import qmoe_plugin
from models import export, genai
from models.runner import Decoder

pytestmark = pytest.mark.models

# Lowest SQNR of a layer's experts, in dB, and of the logits. Weights are such that int4 and int8 in
# blocks of 32 hold them exactly, and mxfp4 the experts of gpt-oss.
LOWEST = {
    "int4": (100, 100),
    "int8": (100, 100),
    "fp8_e4m3": (20, 18),
    "nf4": (12, 8),
    "nvfp4": (12, 8),
    "mxfp4": (13, 8),
}


@pytest.mark.parametrize("spec", LOWEST)
@pytest.mark.parametrize("recipe", ["gpt_oss", "qwen35_moe"])
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
    done = run("verify", source, model, "--cpu", "--json", "--tokens", 24)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    experts = [node for node in report["nodes"] if "QMoE" in node["ops"]]
    assert len(experts) == 2
    (logits,) = (o["error"]["sqnr"] for o in report["outputs"] if o["name"] == "logits")
    lowest = min(node["own"]["sqnr"] for node in experts)
    assert lowest > LOWEST[spec][0]
    assert logits > LOWEST[spec][1]
    done = run("install", folder, "--cpu", "--strict")
    assert done.returncode == 0, done.stderr
    expected = exports.expected(item)
    tokens = genai.generate_plainly(folder, expected)
    decoder = Decoder(qmoe_plugin.session(model, ["CPUExecutionProvider"]))
    assert tokens == decoder.generate(expected.prompt, len(expected.tokens))[0]
    if spec in ("int4", "int8"):
        assert tokens == expected.tokens
