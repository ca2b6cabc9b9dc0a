"""Models as onnxruntime-genai's builder writes them, in a session and in genai's own loop."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import onnx
import pytest

import qmoe_plugin
from models import check, export
from models.runner import Decoder
from qmoe_plugin.report import RetargetReport

pytestmark = pytest.mark.models

GENAI = [item for item in export.EXPORTS if item.exporter == "genai"]
# Rounding may change a token in float16, and at accuracy_level 4, which allows int8 activations.
EXACT = [item for item in GENAI if item.activations == "float32" and item.name != "int4_default"]


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


@pytest.mark.parametrize("item", GENAI, ids=lambda item: item.id)
def test_genai_generates_the_same_tokens_with_our_library(
    item: export.Export, exports: export.Exports, tmp_path: Path
) -> None:
    genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    folder = install_into(exports.model(item), tmp_path)
    model = genai.Model(str(folder))
    parameters = genai.GeneratorParams(model)
    # Sliding-window models need room for their buffers from the start.
    parameters.set_search_options(max_length=64, do_sample=False)
    generator = genai.Generator(model, parameters)
    expected = exports.expected(item)
    generator.append_tokens(expected.prompt)
    tokens = []
    while len(tokens) < len(expected.tokens) and not generator.is_done():
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
    if item in EXACT:
        assert tokens == expected.tokens
    decoder = Decoder(check.open_session(exports.model(item), "cpu", tmp_path))
    assert tokens == decoder.generate(expected.prompt, len(expected.tokens))[0]


def test_prepacked_weights_are_left_to_the_stock_ops(exports: export.Exports) -> None:
    """Small matrices cannot be prepacked: one file holds both layouts, told apart node by node."""
    report = retarget_foreign("prepacked", exports)
    assert {node.op_type for node in report.kept} == {"QMoE", "MatMulNBits"}
    assert all("prepacked" in node.reason for node in report.kept)
    assert {node.op_type for node in report.moved} == {"MatMulNBits"}
    assert any("router" in node.name for node in report.moved)


def test_broken_mxfp4_export_is_refused_by_name(exports: export.Exports) -> None:
    report = retarget_foreign("mxfp4", exports)
    reasons = [node.reason for node in report.kept if node.op_type == "QMoE"]
    assert len(reasons) == 2
    assert all("Qwen3.5-MoE with moe_quant_type=mxfp4" in reason for reason in reasons)


def retarget_foreign(name: str, exports: export.Exports) -> RetargetReport:
    item = next(item for item in export.FOREIGN_EXPORTS if item.name == name)
    model = onnx.load(exports.model(item) / "model.onnx", load_external_data=False)
    return qmoe_plugin.retarget(model, sm=0)


def install_into(exported: Path, scratch: Path) -> Path:
    """A copy of the model's folder, retargeted, with our library in it, for the CPU."""
    folder = scratch / "genai"
    shutil.copytree(exported, folder)
    report = qmoe_plugin.retarget(folder / "model.onnx", folder / "model.onnx", sm=0)
    assert report.moved
    assert not report.kept
    library = Path(qmoe_plugin.get_library_path())
    shutil.copy(library, folder)
    path = folder / "genai_config.json"
    config = json.loads(path.read_text())
    # The float16 exports ask for CUDA, which the CPU's genai wheel does not have.
    options = {"custom_ops_library": library.name, "provider_options": []}
    config["model"]["decoder"]["session_options"] |= options
    path.write_text(json.dumps(config))
    return folder
