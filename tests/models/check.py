"""Opens an exported model through `qmoe_plugin.session` and compares its logits with PyTorch's."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

import qmoe_plugin
from models.export import PREQUANTIZED_EXPORTS, Export, Exports
from models.runner import Decoder
from models.widen import OPS, widen

# Largest allowed difference of a logit; their standard deviation is 1.0 to 1.2.
TOLERANCE = {"float32": 1e-5, "float16": 2e-2, "bfloat16": 0.16}
# What the exports lose beside our ops, measured with the stock ones in float32:
# bfloat16 rounds so coarsely that a token here and there gets another expert (in PyTorch as well):
# this share of positions may be off by more, but not by more than so many tolerances.
COARSE, COARSE_FACTOR = 0.1, 4
EXTRA_TOLERANCE = {
    # Gated DeltaNet: ONNX Runtime's LinearAttention and PyTorch's chunks round differently, and the
    # norm that follows amplifies it.
    "qwen35_moe": {"float32": 5e-5},
    # Float32 sums in another order alone: 8.5e-6 to 1.2e-5, by the kernel, of logits up to 5.6 (so
    # at most 2.2e-6 of the largest).
    "gemma4": {"float32": 2e-5},
}
# accuracy_level 4: int8 activations are allowed; stock differs by 0.06.
LEVEL_4_TOLERANCE = 0.15

PROVIDERS = {
    "cpu": ["CPUExecutionProvider"],
    # The stock ops around ours must not round float32 to TF32.
    "cuda": [("CUDAExecutionProvider", {"use_tf32": "0"}), "CPUExecutionProvider"],
}


def tolerance(export: Export) -> float:
    if export.name == "int4_default":
        return LEVEL_4_TOLERANCE
    return EXTRA_TOLERANCE.get(export.recipe, {}).get(
        export.activations, TOLERANCE[export.activations]
    )


def model_path(export: Export, exports: Exports, device: str, scratch: Path) -> Path:
    """The exported model, or a copy in `scratch` where the device's stock ops cannot run it."""
    path = exports.model(export) / "model.onnx"
    if device == "cuda" or export.activations != "bfloat16":
        return path
    model = onnx.load(path)
    widen(model)
    path = scratch / "widened.onnx"
    onnx.save(model, path)
    return path


def node_counts(path: Path) -> Counter[tuple[str, str]]:
    """How many nodes of our ops a model has, by (domain, op)."""
    graph = onnx.load(path, load_external_data=False).graph
    return Counter((node.domain, node.op_type) for node in graph.node if node.op_type in OPS)


def open_session(
    model: Path, device: str, scratch: Path, *, override: bool = False
) -> ort.InferenceSession:
    """A session in which every node of our ops of the file is run by our library.

    Asserted on the graph that the session really runs, which ONNX Runtime writes to `scratch`: they
    are in our domain or, with `override`, as they were exported.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 2
    options.optimized_model_filepath = str(scratch / "optimized.onnx")
    session = qmoe_plugin.session(model, PROVIDERS[device], options, override=override)
    exported = node_counts(model)
    assert exported, "the model has no node of our ops"
    running = node_counts(scratch / "optimized.onnx")
    domain = "com.microsoft" if override else qmoe_plugin.DOMAIN
    wanted = {(domain, op): count for (_, op), count in exported.items()}
    assert running == wanted, f"runs {dict(running)}; the log says why nodes were left alone"
    if device == "cuda":
        assert session.get_providers()[0] == "CUDAExecutionProvider"
    return session


def check_logits(
    export: Export, exports: Exports, device: str, scratch: Path, *, override: bool = False
) -> None:
    """Prompt and decode steps with the key-value cache, fed PyTorch's greedy tokens."""
    expected = exports.expected(export)
    model = model_path(export, exports, device, scratch)
    if export not in PREQUANTIZED_EXPORTS:
        nodes = node_counts(model)
        assert nodes["com.microsoft", "QMoE"] + nodes["com.microsoft", "MoE"] > 0
    decoder = Decoder(open_session(model, device, scratch, override=override))
    steps = [decoder.step(expected.prompt)]
    steps += [decoder.step([token]) for token in expected.tokens[:-1]]
    logits = np.concatenate(steps)
    assert logits.shape == expected.logits.shape
    check_errors(export, np.abs(logits - expected.logits).max(-1), f"on {device}")


def check_errors(export: Export, errors: NDArray[np.float32], where: str) -> None:
    """Asserts that the logits are PyTorch's.

    Args:
        export: What was run.
        errors: The largest difference at each position, the prompt's positions first.
        where: For the message.
    """
    errors = np.where(np.isnan(errors), np.inf, errors)
    allowed = tolerance(export)
    coarse = export.activations == "bfloat16"
    wrong = np.mean(errors > allowed)
    assert wrong <= (COARSE if coarse else 0), (
        f"{export.id} {where}: {wrong:.0%} of {len(errors)} positions are more than {allowed:.0e} "
        f"from PyTorch's logits; the worst, {errors.argmax()}, is {errors.max():.2e} from them"
    )
    assert errors.max() <= (COARSE_FACTOR if coarse else 1) * allowed
