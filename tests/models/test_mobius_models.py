"""Models as mobius-onnx writes them: fusion 2, float32 scales and routers, packed zero points."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from models import check, export

pytestmark = pytest.mark.models

MOBIUS = [item for item in export.EXPORTS if item.exporter == "mobius"]


@pytest.mark.parametrize("item", MOBIUS, ids=lambda item: item.id)
def test_logits_equal_pytorchs(
    item: export.Export, exports: export.Exports, device: str, tmp_path: Path
) -> None:
    check.check_logits(item, exports, device, tmp_path)


def test_exports_have_the_traits_that_they_are_here_for(exports: export.Exports) -> None:
    """What no stock kernel takes; should mobius stop writing it, these tests would test less."""
    for item in MOBIUS:
        graph = onnx.load(exports.model(item) / "model.onnx", load_external_data=False).graph
        types = {tensor.name: tensor.data_type for tensor in graph.initializer}
        nodes = [node for node in graph.node if node.op_type == "QMoE"]
        assert nodes, item.id
        for node in nodes:
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            assert attributes["swiglu_fusion"] == 2, item.id
            assert types[node.input[3]] == onnx.TensorProto.FLOAT, item.id
            assert len(node.input) > 14, item.id  # router_weights
            assert bool(node.input[11]) == (item.recipe != "qwen3_moe"), item.id  # zero points
