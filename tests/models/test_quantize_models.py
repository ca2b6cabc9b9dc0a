"""`quantize` on float models: every expert, in every format, to the end in onnxruntime-genai."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import qmoe_plugin
from models import export, genai
from models.export import NEW_TOKENS
from models.noisy import MOES, Noisy, logits_of
from models.runner import Decoder
from qmoe_plugin import formats
from qmoe_plugin.graph.quantize_rules import parse_spec
from qmoe_plugin.sample_inputs import Wanted

pytestmark = pytest.mark.models

FOUR_BITS = ("int4", "int4:32:asymmetric", "mxfp4", "nvfp4", "nf4", "af4", "iq4_nl")
# Allowed error of logits, whose standard deviation is 1.0 to 1.2: the rms of each position, and of
# these the median, as a few tokens choose other experts. With 4 bits, most do in so small a model;
# with 2, what is left says little.
BOUNDS = {
    **dict.fromkeys(FOUR_BITS, 0.5),
    "int2:16": 2.0,
    "int2:16:asymmetric": 2.0,
    "int8": 0.03,
    "int8:32:asymmetric": 0.03,
    "fp8_e4m3": 0.15,
}
# Lowest SQNR of a layer's experts by themselves, in dB.
LOWEST = {
    **dict.fromkeys(FOUR_BITS, 12.0),
    "int2:16": 4.0,
    "int2:16:asymmetric": 4.0,
    "int8": 38.0,
    "int8:32:asymmetric": 38.0,
    "fp8_e4m3": 22.0,
}


def median_rms(error: np.ndarray) -> float:
    """Of logits [positions, vocabulary]."""
    return float(np.median(np.sqrt(np.mean(np.square(error), axis=-1))))


def sure_tokens(logits: np.ndarray) -> int:
    """How many tokens come before two logits that are too close to call; genai sums elsewise."""
    best = np.sort(logits, axis=-1)
    close = best[:, -1] - best[:, -2] < 1e-3
    return int(close.argmax()) if close.any() else len(close)


@pytest.mark.parametrize("spec", BOUNDS)
def test_float_to_genai(float_model: Noisy, spec: str, tmp_path: Path) -> None:
    """Quantised, inspected, verified, in a session, and in genai's loop."""
    folder = tmp_path / "genai"
    ignored = shutil.ignore_patterns("*.onnx", "*.data")
    shutil.copytree(float_model.folder, folder, ignore=ignored)
    model = folder / "model.onnx"
    errors = {}
    for search in ("nearest", "mse"):
        report = qmoe_plugin.quantize(float_model.path, model, format=spec, search=search)
        assert [node.op_type for node in report.quantized].count("MoE") == MOES
        assert not any(node.op_type == "MoE" for node in report.kept)
        errors[search] = median_rms(logits_of(model, float_model.prompt) - float_model.logits)
        assert errors[search] < BOUNDS[spec]
    experts = qmoe_plugin.inspect(model, sm=0).experts
    assert experts.total == experts.quantized == experts.ours > 0
    verified = qmoe_plugin.verify(float_model.oracle, model, inputs=Wanted(tokens=24), cpu=True)
    assert not verified.broken
    ratios = [node.own.sqnr for node in verified.nodes if "QMoE" in node.ops and node.own]
    assert len(ratios) == MOES
    assert min(ratios) > LOWEST[spec]
    print(
        f"{float_model.recipe:11} {spec:19} experts {min(ratios):5.1f} dB; logits"
        + "".join(f" {error:.4f} ({search})" for search, error in errors.items())
    )
    assert qmoe_plugin.install(folder, cpu=True, strict=True).changed
    decoder = Decoder(qmoe_plugin.session(model, ["CPUExecutionProvider"]))
    tokens, steps = decoder.generate(float_model.prompt, NEW_TOKENS)
    count = sure_tokens(steps[len(float_model.prompt) - 1 :])
    assert genai.generate_plainly(folder, float_model.prompt, count) == tokens[:count]


@pytest.mark.parametrize("recipe", ["mixtral", "qwen3_moe"])
def test_weights_as_onnxruntime_had_them_until_1_22(
    recipe: str, exports: export.Exports, tmp_path: Path
) -> None:
    """[E, K, N]: the router's size tells, as nothing says how long activations are."""
    path = exports.model(export.by_id(f"{recipe}-float32")) / "model.onnx"
    model = onnx.load(path)
    names = {name for node in model.graph.node if node.op_type == "MoE" for name in node.input[2:]}
    for tensor in model.graph.initializer:
        if tensor.name in names:
            values = np.ascontiguousarray(numpy_helper.to_array(tensor).swapaxes(1, 2))
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    old, quantized = tmp_path / "old.onnx", [tmp_path / name for name in ("a.onnx", "b.onnx")]
    onnx.save(model, old)
    for source, output in zip((path, old), quantized, strict=True):
        qmoe_plugin.quantize(source, output)
    for output in quantized:
        onnx.checker.check_model(output, full_check=True)
    first, second = (onnx.load(output) for output in quantized)
    assert first == second


@pytest.mark.parametrize("text", FOUR_BITS)
def test_the_search_beats_rounding_on_each_weight(float_model: Noisy, text: str) -> None:
    spec = parse_spec(text)
    assert spec is not None
    block = spec.block_size or 32
    totals = np.zeros(2)
    for weights in float_model.weights:
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


def test_calibrated(float_model: Noisy, tmp_path: Path) -> None:
    """On the user's own data: here the prompt. What experts see is then rounded best."""
    seen, output, tokens = (tmp_path / name for name in ("seen.npz", "small.onnx", "tokens.npy"))
    np.save(tokens, float_model.prompt)
    report = qmoe_plugin.calibrate(float_model.path, seen, data=[tokens])
    assert report.tokens == len(float_model.prompt)
    assert [node.op_type for node in report.collected].count("MoE") == MOES
    quantized = qmoe_plugin.quantize(float_model.path, output, calibration=seen)
    assert quantized.uncalibrated == ()
    error = logits_of(output, float_model.prompt) - float_model.logits
    assert median_rms(error) < BOUNDS["int4"]
