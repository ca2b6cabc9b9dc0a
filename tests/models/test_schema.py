"""ONNX's own tools on exported models whose nodes are ours."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
from onnx_ir.passes import common

import qmoe_plugin
from models import export

pytestmark = pytest.mark.models


@pytest.mark.parametrize("name", ["qwen3_moe-int4", "deepseek_v3-int4_fp16"])
def test_checker(name: str, exports: export.Exports, tmp_path: Path) -> None:
    """Of mobius; genai's builder writes ops into ai.onnx that ONNX does not know."""
    path = tmp_path / "model.onnx"
    qmoe_plugin.retarget(exports.model(export.by_id(name)) / "model.onnx", path, sm=0)
    onnx.checker.check_model(path, full_check=True)


@pytest.mark.parametrize("name", ["gpt_oss-int4", "gpt_oss-mxfp4", "qwen3_moe-int4_fp16"])
def test_inference(name: str, exports: export.Exports, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    qmoe_plugin.retarget(exports.model(export.by_id(name)) / "model.onnx", path, sm=0)
    exported = onnx.load(path, load_external_data=False)
    said = {value.name: value.type.tensor_type for value in exported.graph.value_info}
    ours = [node for node in exported.graph.node if node.domain == qmoe_plugin.DOMAIN]
    # Keeps what is said of other values: the ops of com.microsoft have no schema here.
    outputs = {node.output[0] for node in ours}
    kept = [value for value in exported.graph.value_info if value.name not in outputs]
    del exported.graph.value_info[:]
    exported.graph.value_info.extend(kept)
    model = ir.from_proto(exported)
    common.ShapeInferencePass(check_type=True, strict_mode=False)(model)
    found = {value.name: value for node in model.graph for value in node.outputs}
    checked = 0
    for name in outputs & said.keys():
        if not said[name].HasField("shape"):
            continue
        assert found[name].dtype.value == said[name].elem_type
        assert found[name].shape.rank() == len(said[name].shape.dim)
        last = said[name].shape.dim[-1]
        assert not last.HasField("dim_value") or found[name].shape[-1] == last.dim_value
        checked += 1
    assert checked >= len(ours) - 1
