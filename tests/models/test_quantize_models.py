"""`quantize` on float models of onnxruntime-genai's builder: every expert, in every format.

The checkpoints' weights lie on quantisation grids, so that some formats would lose nothing; here
they get noise. What the float model says with it is then the oracle.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from helpers.quantized import rms
from onnx import TensorProto, numpy_helper

import qmoe_plugin
from models import export, genai
from models.runner import Decoder
from qmoe_plugin import formats
from qmoe_plugin.graph.quantize_rules import parse_spec

pytestmark = pytest.mark.models

FOUR_BITS = ("int4", "int4:32:asymmetric", "mxfp4", "nvfp4", "nf4")
# Allowed error of logits, whose standard deviation is 1.0 to 1.2: the rms of each position, and of
# these the median, as a few tokens choose other experts. With 4 bits, most do in so small a model.
BOUNDS = dict.fromkeys(FOUR_BITS, 0.5) | {"int8": 0.03, "fp8_e4m3": 0.15}
RECIPES = ("gpt_oss", "qwen35_moe", "lfm2_moe")
MOES = 2  # in each


@dataclass(frozen=True)
class Noisy:
    """A float model with noise on its weights."""

    path: Path
    prompt: list[int]
    logits: np.ndarray
    weights: list[np.ndarray]


def logits_of(path: Path, prompt: list[int]) -> np.ndarray:
    return Decoder(qmoe_plugin.session(path, ["CPUExecutionProvider"])).step(prompt)


def median_rms(error: np.ndarray) -> float:
    """Of logits [positions, vocabulary]."""
    return float(np.median(np.sqrt(np.mean(np.square(error), axis=-1))))


@pytest.fixture(scope="module", params=RECIPES)
def noisy(
    request: pytest.FixtureRequest,
    exports: export.Exports,
    tmp_path_factory: pytest.TempPathFactory,
) -> Noisy:
    item = export.by_id(f"{request.param}-float32")
    model = onnx.load(exports.model(item) / "model.onnx")
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
    path = tmp_path_factory.mktemp(request.param) / "float.onnx"
    onnx.save(model, path, save_as_external_data=True, location="float.data")
    prompt = exports.expected(item).prompt
    return Noisy(path, prompt, logits_of(path, prompt), weights)


def test_every_format(noisy: Noisy, tmp_path: Path) -> None:
    totals = {"nearest": 0.0, "mse": 0.0}
    lines = []
    for spec, bound in BOUNDS.items():
        errors = {}
        for search in totals:
            output = tmp_path / "small.onnx"
            report = qmoe_plugin.quantize(noisy.path, output, format=spec, search=search)
            moes = [node for node in report.quantized if node.op_type == "MoE"]
            assert len(moes) == MOES, "an expert is left in float"
            assert not any(node.op_type == "MoE" for node in report.kept)
            error = logits_of(output, noisy.prompt) - noisy.logits
            errors[search] = median_rms(error)
            assert errors[search] < bound
            if spec in FOUR_BITS:
                totals[search] += rms(error)
        lines.append(f"{spec:20}" + "".join(f"{name} {e:.4f}  " for name, e in errors.items()))
    print("\n".join(["", noisy.path.parent.name, *lines]))
    assert totals["mse"] < totals["nearest"]


@pytest.mark.parametrize("text", FOUR_BITS)
def test_the_search_beats_rounding_on_each_weight(noisy: Noisy, text: str) -> None:
    spec = parse_spec(text)
    assert spec is not None
    block = spec.block_size or 32
    totals = np.zeros(2)
    for weights in noisy.weights:
        squares = []
        for quantize in (formats.Format.quantize, formats.quantize_mse):
            quantized = quantize(spec.format, weights, block, symmetric=spec.symmetric)
            zeros = quantized.zero_points
            if zeros is not None:
                zeros = spec.format.unpack_zero_points(zeros, quantized.scales.shape)
            decoded = spec.format.dequantize(
                quantized.codes,
                quantized.scales,
                zeros,
                k=weights.shape[1],
                block_size=block,
                global_scale=quantized.global_scale,
            )
            squares.append(np.square(decoded - weights).sum())
        assert squares[1] <= squares[0]
        totals += squares
    # Powers of two leave little to choose from.
    assert totals[1] < (0.9999 if text == "mxfp4" else 0.98) * totals[0]


def test_calibrated(noisy: Noisy, tmp_path: Path) -> None:
    """On the user's own data: here the prompt. What experts see is then rounded best."""
    session = qmoe_plugin.session(noisy.path, ["CPUExecutionProvider"])
    # Caches, of which some have a fixed size that the model leaves open.
    run = {name: state.numpy() for name, state in Decoder(session)._states.items()}
    run["input_ids"] = np.array([noisy.prompt])
    seen, output = tmp_path / "seen.npz", tmp_path / "small.onnx"
    report = qmoe_plugin.calibrate(noisy.path, seen, data=[run])
    assert report.tokens == len(noisy.prompt)
    assert [node.op_type for node in report.collected].count("MoE") == MOES
    quantized = qmoe_plugin.quantize(noisy.path, output, calibration=seen)
    assert quantized.uncalibrated == ()
    error = logits_of(output, noisy.prompt) - noisy.logits
    assert median_rms(error) < BOUNDS["int4"]


@pytest.mark.parametrize("spec", ["int4", "mxfp4", "nvfp4", "nf4", "int8", "fp8_e4m3"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_genai_generates_as_a_session_does(
    recipe: str, spec: str, exports: export.Exports, tmp_path: Path
) -> None:
    item = export.by_id(f"{recipe}-float32")
    folder = tmp_path / "genai"
    folder.mkdir()
    for file in exports.model(item).iterdir():
        if file.suffix == ".json":
            shutil.copy(file, folder)
    model = folder / "model.onnx"
    report = qmoe_plugin.quantize(exports.model(item) / "model.onnx", model, format=spec)
    assert not any(node.op_type == "MoE" for node in report.kept)
    genai.configure(folder, "cpu")
    expected = exports.expected(item)
    decoder = Decoder(qmoe_plugin.session(model, ["CPUExecutionProvider"]))
    tokens, _ = decoder.generate(expected.prompt, len(expected.tokens))
    assert genai.generate(folder, expected, "cpu").tokens == tokens
