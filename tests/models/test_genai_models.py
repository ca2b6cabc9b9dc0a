"""Models as onnxruntime-genai's builder writes them, in a session and in genai's own loop."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx
import pytest

import qmoe_plugin
from models import check, export, genai
from models.runner import Decoder
from qmoe_plugin.override import CONFIG_KEY
from qmoe_plugin.report import RetargetReport

pytestmark = pytest.mark.models

GENAI = [item for item in export.EXPORTS if item.exporter == "genai"]
# Rounding may change a token in float16, and at accuracy_level 4, which allows int8 activations.
EXACT = [item for item in GENAI if item.activations == "float32" and item.name != "int4_default"]
# genai's own loop: the CPU takes them all, CUDA what was exported for it (float32 has no attention
# there).
RUNS = [
    *(pytest.param(item, "cpu", id=f"{item.id}-cpu") for item in GENAI),
    *(
        pytest.param(item, "cuda", id=f"{item.id}-cuda", marks=pytest.mark.gpu)
        for item in GENAI
        if "cuda" in item.arguments
    ),
]


@pytest.mark.parametrize("item", GENAI, ids=lambda item: item.id)
def test_logits_equal_pytorchs(
    item: export.Export, exports: export.Exports, device: str, tmp_path: Path
) -> None:
    check.check_logits(item, exports, device, tmp_path)


@pytest.mark.parametrize("item", EXACT, ids=lambda item: item.id)
def test_session_generates_pytorchs_tokens(
    item: export.Export, exports: export.Exports, tmp_path: Path
) -> None:
    expected = exports.expected(item)
    decoder = Decoder(check.open_session(exports.model(item), "cpu", tmp_path))
    assert decoder.generate(expected.prompt, len(expected.tokens))[0] == expected.tokens


@pytest.mark.parametrize(("item", "device"), RUNS, indirect=["device"])
def test_genai_generates_the_same_tokens_with_our_library(
    item: export.Export, exports: export.Exports, device: str, tmp_path: Path
) -> None:
    folder = tmp_path / "genai"
    genai.copy_retargeted(exports.model(item), folder, device)
    genai.configure(folder, device)
    expected = exports.expected(item)
    genai.check(genai.generate(folder, expected, device), item, expected)


@pytest.mark.parametrize(("item", "device"), RUNS, indirect=["device"])
def test_genai_runs_the_unmodified_model_with_our_ops(
    item: export.Export, exports: export.Exports, device: str, tmp_path: Path
) -> None:
    """By the session option that puts our ops in the place of com.microsoft's."""
    folder = tmp_path / "genai"
    shutil.copytree(exports.model(item), folder)
    genai.configure(folder, device, {CONFIG_KEY: "1"})
    expected = exports.expected(item)
    genai.check(genai.generate(folder, expected, device), item, expected)


@pytest.mark.parametrize("item", GENAI, ids=lambda item: item.id)
def test_override_gives_the_unmodified_model_pytorchs_logits(
    item: export.Export, exports: export.Exports, device: str, tmp_path: Path
) -> None:
    check.check_logits(item, exports, device, tmp_path, override=True)


def test_prepacked_and_raw_weights_may_mix(exports: export.Exports) -> None:
    """Small matrices cannot be prepacked: one file holds both layouts, told apart node by node."""
    item = next(item for item in GENAI if item.name == "prepacked_int4")
    model = onnx.load(exports.model(item) / "model.onnx", load_external_data=False)
    report = qmoe_plugin.retarget(model, sm=0)
    assert not report.kept
    layouts = {
        (node.op_type, attribute.name, attribute.i)
        for node in model.graph.node
        for attribute in node.attribute
        if attribute.name in ("weight_prepacked", "weights_prepacked")
    }
    assert ("QMoE", "weights_prepacked", 1) in layouts
    assert ("MatMulNBits", "weight_prepacked", 1) in layouts
    assert len([node for node in report.moved if "router" in node.name]) == 2


def test_broken_mxfp4_export_is_refused_by_name(exports: export.Exports) -> None:
    report = retarget_foreign("mxfp4", exports)
    reasons = [node.reason for node in report.kept if node.op_type == "QMoE"]
    assert len(reasons) == 2
    assert all("Qwen3.5-MoE with moe_quant_type=mxfp4" in reason for reason in reasons)


def retarget_foreign(name: str, exports: export.Exports) -> RetargetReport:
    item = next(item for item in export.FOREIGN_EXPORTS if item.name == name)
    model = onnx.load(exports.model(item) / "model.onnx", load_external_data=False)
    return qmoe_plugin.retarget(model, sm=0)
