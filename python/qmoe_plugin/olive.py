"""A pass for Olive that quantises with `qmoe_plugin.quantize`: `QMoEQuantization`.

Olive finds passes by a package configuration, which replaces its own one::

    python -m qmoe_plugin.olive > passes.json
    olive run --config workflow.json --package-config passes.json

In `workflow.json`: ``"passes": {"quantize": {"type": "QMoEQuantization", "format": "int4"}}``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from olive.hardware.accelerator import AcceleratorSpec
from olive.model import ONNXModelHandler
from olive.model.utils import resolve_onnx_path
from olive.package_config import OlivePackageConfig
from olive.passes import Pass
from olive.passes.pass_config import BasePassConfig, PassConfigParam

import qmoe_plugin
from qmoe_plugin.graph.quantize_rules import parse_rule


class QMoEQuantization(Pass):
    """Quantises MatMul, Gemm and MoE nodes in any format of qmoe_plugin, by rules."""

    @classmethod
    def _default_config(cls, accelerator_spec: AcceleratorSpec) -> dict[str, PassConfigParam]:
        """The arguments of `qmoe_plugin.quantize`."""
        return {
            "format": PassConfigParam(
                type_=str, default_value="int4", description="FORMAT[:BLOCK][:asymmetric]"
            ),
            "rules": PassConfigParam(
                type_=list,
                default_value=[],
                description="REGEX=FORMAT of what is called so, or REGEX=keep; the first counts",
            ),
            "search": PassConfigParam(
                type_=str, default_value="nearest", description="How scales are set: nearest, mse"
            ),
        }

    def _run_for_config(
        self, model: ONNXModelHandler, config: type[BasePassConfig], output_model_path: str
    ) -> ONNXModelHandler:
        """Quantises a model.

        Raises:
            ValueError: If nothing was quantised, or the configuration is wrong.
        """
        source = Path(model.model_path)
        output = Path(resolve_onnx_path(output_model_path, source.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        settings: Any = config
        report = qmoe_plugin.quantize(
            source,
            output,
            format=settings.format,
            rules=[parse_rule(rule) for rule in settings.rules],
            search=settings.search,
        )
        if not report.quantized:
            raise ValueError(f"no node was quantised. {report}")
        return ONNXModelHandler(model_path=str(output.parent), onnx_file_name=output.name)


def package_config() -> dict[str, Any]:
    """Olive's package configuration with our pass in it."""
    path = OlivePackageConfig.get_default_config_path()
    config: dict[str, Any] = json.loads(Path(path).read_text())
    config["passes"][QMoEQuantization.__name__] = {
        "module_path": f"qmoe_plugin.olive.{QMoEQuantization.__name__}",
        "supported_providers": ["CPUExecutionProvider", "CUDAExecutionProvider"],
        "supported_accelerators": ["cpu", "gpu"],
        "supported_precisions": ["int4", "int8"],
        "supported_algorithms": ["rtn"],
        "supported_quantization_encodings": [],
    }
    return config


if __name__ == "__main__":
    json.dump(package_config(), sys.stdout, indent=4)
