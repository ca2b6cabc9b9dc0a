"""GPTQ and AWQ checkpoints through genai's builder: every code, scale and zero point stays."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from helpers.quantized import initializers

import qmoe_plugin
from models import check, export, genai

pytestmark = pytest.mark.models

ITEMS = export.PREQUANTIZED_EXPORTS
MATRICES = 14  # in two layers
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}


def nibbles(packed: np.ndarray) -> np.ndarray:
    return np.stack([packed & 15, packed >> 4], axis=-1)


def check_exact(path: Path, truth: dict[str, np.ndarray]) -> None:
    """Every code, scale and zero point of the checkpoint is in the model."""
    model, seen = onnx.load(path), 0
    tensors = initializers(model)
    for node in model.graph.node:
        if node.op_type != "MatMulNBits" or "layers." not in node.name:
            continue
        layer, name = node.name.split("/")[2], node.name.split("/")[4]
        stems = [
            key.removesuffix(".codes")
            for part in FUSED.get(name, (name,))
            for key in truth
            if f".{layer}." in key and key.endswith(f".{part}.codes")
        ]
        codes, scales, zeros = (tensors[name] for name in node.input[1:4])
        for kind, found in (
            ("codes", nibbles(codes)),
            ("scales", scales),
            ("zeros", nibbles(zeros)),
        ):
            wanted = np.concatenate([truth[f"{stem}.{kind}"] for stem in stems])
            np.testing.assert_array_equal(
                found.reshape(wanted.shape), wanted, f"{node.name} {kind}"
            )
        seen += len(stems)
    assert seen == MATRICES


@pytest.mark.parametrize("item", ITEMS, ids=lambda item: item.id)
def test_numbers_of_the_checkpoint_stay(
    item: export.Export, exports: export.Exports, tmp_path: Path
) -> None:
    """Through retarget and back, and through quantize, which has the head left to do."""
    path = exports.model(item) / "model.onnx"
    with np.load(exports.folder / item.recipe / "truth.npz") as data:
        truth = dict(data)
    check_exact(path, truth)
    ours, back, small = (tmp_path / f"{name}.onnx" for name in ("ours", "back", "small"))
    assert not qmoe_plugin.retarget(path, ours, sm=0).kept
    assert not qmoe_plugin.unretarget(ours, back).kept
    assert back.read_bytes() == path.read_bytes()
    report = qmoe_plugin.quantize(path, small, rules=[("lm_head", "int8")])
    assert ["lm_head" in node.name for node in report.quantized] == [True]
    for model in (ours, back, small):
        check_exact(model, truth)


@pytest.mark.parametrize("item", ITEMS, ids=lambda item: item.id)
def test_logits_equal_pytorchs(
    item: export.Export, exports: export.Exports, device: str, tmp_path: Path
) -> None:
    check.check_logits(item, exports, device, tmp_path)


@pytest.mark.parametrize("method", ["gptq", "gptq_act_order", "awq"])
def test_genai_generates_pytorchs_tokens(
    method: str, exports: export.Exports, tmp_path: Path
) -> None:
    """Of act-order ours alone: stock kernels get g_idx with packed zero points wrong."""
    item, folder = export.by_id(f"llama_{method}-int4"), tmp_path / "genai"
    shutil.copytree(exports.model(item), folder)
    assert qmoe_plugin.install(folder, cpu=True, strict=True).changed
    expected = exports.expected(item)
    assert genai.generate_plainly(folder, expected.prompt, len(expected.tokens)) == expected.tokens
