"""`verify` and `inspect` on models as exporters write them; verify makes its inputs itself."""

from __future__ import annotations

import json

import pytest
from helpers.command import run

from models import export

pytestmark = pytest.mark.models


@pytest.mark.parametrize("name", ["gpt_oss-int4", "lfm2_moe-int4", "lfm2_moe-int4_fp16"])
def test_stock_against_ours(name: str, exports: export.Exports) -> None:
    model = exports.model(export.by_id(name)) / "model.onnx"
    done = run("verify", model, "--cpu", "--json", "--tokens", 20, "--min-agreement", 1)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert not report["unmatched"]
    lowest = 60 if name.endswith("fp16") else 110
    assert all(node["own"]["sqnr"] > lowest for node in report["nodes"])


@pytest.mark.parametrize("recipe", ["gpt_oss", "qwen35_moe"])
def test_float_against_int4(recipe: str, exports: export.Exports) -> None:
    """Of weights that int4 holds exactly, so that only the order of sums differs."""
    models = (export.by_id(f"{recipe}-{name}") for name in ("float32", "int4"))
    paths = [exports.model(model) / "model.onnx" for model in models]
    done = run("verify", *paths, "--cpu", "--json", "--min-sqnr", 100, "--min-agreement", 1)
    assert done.returncode == 0, done.stderr
    ops = {node["ops"] for node in json.loads(done.stdout)["nodes"]}
    assert ops == {"MatMul -> com.microsoft.MatMulNBits", "com.microsoft.MoE -> com.microsoft.QMoE"}


@pytest.mark.parametrize("name", ["gpt_oss-int4", "qwen35_moe-prepacked_int8", "gemma4-int4_fp16"])
def test_inspect(name: str, exports: export.Exports) -> None:
    """Every expert of an exported model is quantised and run."""
    model = exports.model(export.by_id(name)) / "model.onnx"
    done = run("inspect", model, "--sm", 0, "--strict", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["experts"]["total"] > 0
    files = model.stat().st_size + model.with_name("model.onnx.data").stat().st_size
    assert 0.5 * files < sum(found["bytes_by_format"].values()) < files
