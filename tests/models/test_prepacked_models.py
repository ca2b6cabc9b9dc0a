"""Exported models whose weights were packed ahead of time give the bits of those as exported."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

import qmoe_plugin
from models import check, export, genai
from models.runner import Decoder
from models.test_genai_models import RUNS

pytestmark = pytest.mark.models


def prepack(model: Path, output: Path, sm: int) -> None:
    """Writes the packed model; nothing may be left unpacked."""
    report = qmoe_plugin.prepack(model, output, sm=sm)
    assert report.packed
    assert not report.kept, str(report)


@pytest.mark.parametrize("item", export.EXPORTS, ids=lambda item: item.id)
def test_logits(item: export.Export, exports: export.Exports, device: str, tmp_path: Path) -> None:
    model = check.model_path(item, exports, device, tmp_path)
    packed = tmp_path / "packed" / "model.onnx"
    prepack(model, packed, genai.sm_of(device))
    exported = check.open_session(model, device, tmp_path)
    prepacked = qmoe_plugin.session(packed, check.PROVIDERS[device])
    expected = exports.expected(item)
    first, second = Decoder(exported), Decoder(prepacked)
    for tokens in (expected.prompt, *([token] for token in expected.tokens[:3])):
        np.testing.assert_array_equal(first.step(tokens), second.step(tokens))


@pytest.mark.parametrize(("item", "device"), RUNS, indirect=["device"])
def test_genai_generates_the_same_tokens(
    item: export.Export, exports: export.Exports, device: str, tmp_path: Path
) -> None:
    folder = tmp_path / "genai"
    ignored = shutil.ignore_patterns("model.onnx*")
    shutil.copytree(exports.model(item), folder, ignore=ignored)
    prepack(exports.model(item) / "model.onnx", folder / "model.onnx", genai.sm_of(device))
    genai.configure(folder, device)
    expected = exports.expected(item)
    genai.check(genai.generate(folder, expected, device), item, expected)
