"""Float models with noise on their weights, so that no format holds them exactly.

The checkpoints' weights lie on quantisation grids. What the float model says with noise on them is
then the oracle.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

import qmoe_plugin
from models import export
from models.runner import Decoder

# The builder's, and those by hand with a separate fc3.
RECIPES = ("gpt_oss", "qwen35_moe", "lfm2_moe", "mixtral", "qwen3_moe")
MOES = 2  # in each


@dataclass(frozen=True)
class Noisy:
    """A folder of onnxruntime-genai with a float model, `model.onnx`."""

    recipe: str
    folder: Path
    prompt: list[int]
    logits: np.ndarray
    weights: list[np.ndarray]

    @property
    def path(self) -> Path:
        return self.folder / "model.onnx"

    @property
    def oracle(self) -> Path:
        """The same with stock kernels, or with ours where the stock ones do not run it (fc3)."""
        ours = self.folder / "ours.onnx"
        return ours if ours.exists() else self.path


def logits_of(path: Path, prompt: list[int]) -> np.ndarray:
    return Decoder(qmoe_plugin.session(path, ["CPUExecutionProvider"])).step(prompt)


def make(recipe: str, exports: export.Exports, folder: Path) -> Noisy:
    item = export.by_id(f"{recipe}-float32")
    exported = exports.model(item)
    shutil.copytree(exported, folder, ignore=shutil.ignore_patterns("model.onnx*"))
    model = onnx.load(exported / "model.onnx")
    read = {
        name
        for node in model.graph.node
        if node.op_type in ("MoE", "MatMul")
        for name in node.input
    }
    rng, weights = np.random.default_rng(0), []
    for tensor in model.graph.initializer:
        if tensor.name in read and tensor.data_type == TensorProto.FLOAT and len(tensor.dims) > 1:
            values = numpy_helper.to_array(tensor)
            noise = 0.3 * values.std() * rng.standard_normal(values.shape)
            values = (values + noise).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
            matrix = values if values.ndim == 3 else values.T
            if len(tensor.dims) == 3 or values.shape[0] % 32 == 0:
                weights.append(np.ascontiguousarray(matrix.reshape(-1, matrix.shape[-1])))
    path = folder / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="model.onnx.data")
    if item.exporter == "handmade":
        assert not qmoe_plugin.retarget(path, folder / "ours.onnx", sm=0).kept
    prompt = exports.expected(item).prompt
    return Noisy(recipe, folder, prompt, logits_of(path, prompt), weights)
