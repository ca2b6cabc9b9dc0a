"""Models as onnxruntime-genai's builder writes them, in a session and in genai's own loop."""

from __future__ import annotations

import filecmp
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from helpers.command import run

import qmoe_plugin
from models import check, export, genai, genai_child
from models.runner import Decoder
from qmoe_plugin.override import CONFIG_KEY

pytestmark = pytest.mark.models

GENAI = [item for item in export.EXPORTS if item.exporter == "genai"]
# Rounding may change a token in float16, and at accuracy_level 4, which allows int8 activations.
EXACT = [item for item in GENAI if item.activations == "float32" and item.name != "int4_default"]
# genai's own loop: ONNX Runtime's other ops have no bfloat16 on the CPU, and its attention has no
# float32 on CUDA.
RUNS = [
    *(
        pytest.param(item, "cpu", id=f"{item.id}-cpu")
        for item in GENAI
        if item.activations != "bfloat16"
    ),
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
    decoder = Decoder(check.open_session(exports.model(item) / "model.onnx", "cpu", tmp_path))
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


def test_genai_and_a_session_share_a_process(exports: export.Exports, tmp_path: Path) -> None:
    """Two ONNX Runtimes, one library of ours, on the CPU."""
    genai.require("cpu")
    item = export.by_id("gpt_oss-int4")
    folder = tmp_path / "genai"
    genai.copy_retargeted(exports.model(item), folder, "cpu")
    genai.configure(folder, "cpu")
    expected = exports.expected(item)
    decoder = Decoder(check.open_session(exports.model(item) / "model.onnx", "cpu", tmp_path))
    first = decoder.step(expected.prompt)
    count = len(expected.tokens)
    tokens, logits = genai_child.generate(str(folder), "cpu", expected.prompt, count)
    assert tokens == expected.tokens
    np.testing.assert_allclose(first[-1], logits[0], rtol=0, atol=2 * check.tolerance(item))
    assert int(decoder.step(tokens[:1])[0].argmax()) == tokens[1]


@pytest.mark.parametrize(
    ("recipe", "prepacked", "raw"),
    [
        ("qwen35_moe", "prepacked_int4", "int4_fp16"),
        ("qwen35_moe", "prepacked_int8", "int8_fp16"),
        ("lfm2_moe", "prepacked_int4", "int4_fp16"),
        ("lfm2_moe", "prepacked_int8", "int8_fp16"),
        ("gemma4", "prepacked_int4", "int4_fp16"),
    ],
)
def test_prepacked_weights_give_the_bits_of_the_raw_ones(
    recipe: str, prepacked: str, raw: str, exports: export.Exports, device: str, tmp_path: Path
) -> None:
    items = [export.by_id(f"{recipe}-{name}") for name in (prepacked, raw)]
    models = [exports.model(item) / "model.onnx" for item in items]
    first, second = (Decoder(check.open_session(model, device, tmp_path)) for model in models)
    expected = exports.expected(items[0])
    for tokens in (expected.prompt, *([token] for token in expected.tokens[:3])):
        np.testing.assert_array_equal(first.step(tokens), second.step(tokens))


@pytest.mark.parametrize("name", ["gpt_oss-int4", "lfm2_moe-int8", "qwen35_moe-int4_fp16"])
def test_install_and_undo(name: str, exports: export.Exports, tmp_path: Path) -> None:
    """The real command; float16 models ask for CUDA, until --cpu says that there is none."""
    item, folder = export.by_id(name), tmp_path / "genai"
    exported, expected = exports.model(item), exports.expected(item)
    shutil.copytree(exported, folder)
    done = run("install", folder, "--cpu", "--strict")
    assert done.returncode == 0, done.stderr
    assert genai.generate_plainly(folder, expected.prompt, len(expected.tokens)) == expected.tokens
    done = run("install", folder, "--undo")
    assert done.returncode == 0, done.stderr
    difference = filecmp.dircmp(exported, folder)
    assert not difference.left_only
    assert not difference.right_only
    for path in exported.iterdir():
        assert filecmp.cmp(path, folder / path.name, shallow=False)
    if item in EXACT:
        # With stock onnxruntime's ops.
        tokens = genai.generate_plainly(folder, expected.prompt, len(expected.tokens))
        assert tokens == expected.tokens


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
@pytest.mark.parametrize(
    "name", ["qwen35_moe-prepacked_int4", "lfm2_moe-prepacked_int8", "gpt_oss_64-prepacked_int4"]
)
def test_install_and_undo_on_a_gpu(
    name: str, device: str, exports: export.Exports, tmp_path: Path
) -> None:
    item, folder = export.by_id(name), tmp_path / "genai"
    exported, expected = exports.model(item), exports.expected(item)
    shutil.copytree(exported, folder)
    done = run("install", folder, "--strict")
    assert done.returncode == 0, done.stderr
    running = tmp_path / "running"  # a copy, as looking up who ran a node needs one more option
    shutil.copytree(folder, running)
    genai.set_options(running, {})
    genai.check(genai.generate(running, expected, device), item, expected)
    done = run("install", folder, "--undo")
    assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in exported.iterdir())
    assert sorted(path.name for path in folder.iterdir()) == names
    assert filecmp.cmpfiles(exported, folder, names, shallow=False) == (names, [], [])


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


@pytest.mark.parametrize("item", export.FOREIGN_EXPORTS, ids=lambda item: item.id)
def test_broken_mxfp4_export_is_refused_by_name(
    item: export.Export, exports: export.Exports
) -> None:
    model = onnx.load(exports.model(item) / "model.onnx", load_external_data=False)
    report = qmoe_plugin.retarget(model, sm=0)
    reasons = [node.reason for node in report.kept if node.op_type == "QMoE"]
    assert len(reasons) == 2
    assert all("with moe_quant_type=mxfp4 for every model but gpt-oss" in r for r in reasons)


@pytest.mark.parametrize("item", export.REFUSED_EXPORTS, ids=lambda item: item.id)
def test_the_builder_does_not_write(item: export.Export, exports: export.Exports) -> None:
    """Why these are not among those that we test."""
    assert export.REFUSED_EXPORTS[item] in exports.refusals()[item.id]
