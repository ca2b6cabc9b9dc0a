"""Models as onnxruntime-genai's builder writes them, in a session and in genai's own loop."""

from __future__ import annotations

import filecmp
import json
import shutil
from pathlib import Path

import onnx
import pytest
from helpers.command import run

import qmoe_plugin
from models import check, export
from models.runner import Decoder
from qmoe_plugin.install import install
from qmoe_plugin.override import CONFIG_KEY
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
    folder = install_into(exports.model(item), tmp_path)
    expected = exports.expected(item)
    tokens = generate(folder, expected)
    if item in EXACT:
        assert tokens == expected.tokens
    decoder = Decoder(check.open_session(exports.model(item), "cpu", tmp_path))
    assert tokens == decoder.generate(expected.prompt, len(expected.tokens))[0]


@pytest.mark.parametrize("item", GENAI, ids=lambda item: item.id)
def test_genai_runs_the_unmodified_model_with_our_ops(
    item: export.Export, exports: export.Exports, tmp_path: Path
) -> None:
    """By the session option that puts our ops in the place of com.microsoft's."""
    folder = tmp_path / "genai"
    shutil.copytree(exports.model(item), folder)
    configure(folder, {CONFIG_KEY: "1"})
    tokens = generate(folder, exports.expected(item))
    if item in EXACT:
        assert tokens == exports.expected(item).tokens
    session = qmoe_plugin.session(folder / "model.onnx", ["CPUExecutionProvider"], override=True)
    expected = exports.expected(item)
    assert tokens == Decoder(session).generate(expected.prompt, len(expected.tokens))[0]


@pytest.mark.parametrize("name", ["gpt_oss-int4", "lfm2_moe-int8", "qwen35_moe-int4_fp16"])
def test_install_and_undo(name: str, exports: export.Exports, tmp_path: Path) -> None:
    """The real command; float16 models ask for CUDA, until --cpu says that there is none."""
    item, folder = export.by_id(name), tmp_path / "genai"
    exported, expected = exports.model(item), exports.expected(item)
    shutil.copytree(exported, folder)
    done = run("install", folder, "--cpu", "--strict")
    assert done.returncode == 0, done.stderr
    assert generate(folder, expected) == expected.tokens
    done = run("install", folder, "--undo")
    assert done.returncode == 0, done.stderr
    difference = filecmp.dircmp(exported, folder)
    assert not difference.left_only
    assert not difference.right_only
    for path in exported.iterdir():
        assert filecmp.cmp(path, folder / path.name, shallow=False)
    if item in EXACT:
        assert generate(folder, expected) == expected.tokens  # with stock onnxruntime's ops


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


def install_into(exported: Path, scratch: Path) -> Path:
    """A copy of the model's folder that uses our library, on the CPU."""
    folder = scratch / "genai"
    shutil.copytree(exported, folder)
    report = install(folder, cpu=True)
    assert report.changed
    assert report.complete
    return folder


def configure(folder: Path, options: dict[str, str]) -> None:
    """Puts our library into a model's folder, and session options into its configuration."""
    library = Path(qmoe_plugin.get_library_path())
    shutil.copy(library, folder)
    path = folder / "genai_config.json"
    config = json.loads(path.read_text())
    config["model"]["decoder"]["session_options"] |= {
        "custom_ops_library": library.name,
        # The float16 exports ask for CUDA, which the CPU's genai wheel does not have.
        "provider_options": [],
        **options,
    }
    path.write_text(json.dumps(config))


def generate(folder: Path, expected: export.Expected) -> list[int]:
    """What genai's own loop makes of the prompt, greedily."""
    genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    model = genai.Model(str(folder))
    parameters = genai.GeneratorParams(model)
    # Sliding-window models need room for their buffers from the start.
    parameters.set_search_options(max_length=64, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(expected.prompt)
    tokens: list[int] = []
    while len(tokens) < len(expected.tokens) and not generator.is_done():
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
    return tokens
