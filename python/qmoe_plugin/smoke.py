"""One small node of each pipeline, run by our kernels and by the oracle.

The other ops differ from QMoE and MatMulNBits in how a node is read only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from qmoe_plugin import formats, reference
from qmoe_plugin.devices import CPU_PROVIDER, CUDA_PROVIDER, Target
from qmoe_plugin.session import session

Array = npt.NDArray[Any]

TOLERANCE = {"float32": 1e-4, "float16": 1e-2}
"""Largest error that passes, as a fraction of the largest output."""

_TOKENS, _EXPERTS, _TOPK, _HIDDEN, _INTER, _BLOCK = 5, 4, 2, 64, 96, 32
_FORMAT = "int4"


@dataclass(frozen=True)
class Case:
    """A model of one node, inputs for it, and what the oracle makes of them."""

    name: str
    model: onnx.ModelProto
    inputs: Mapping[str, Array]
    expected: Array


def cases(dtype: str) -> list[Case]:
    """One case a pipeline.

    Args:
        dtype: Activation type, "float32" or "float16".
    """
    rng = np.random.default_rng(0)
    return [_qmoe(rng, dtype), _matmul_nbits(rng, dtype)]


def run(case: Case, where: Target, index: int = 0) -> float:
    """Runs a case on a device; returns the largest error as a fraction of the largest output.

    Raises:
        RuntimeError: If the node was not run there by our kernel.
    """
    provider: str | tuple[str, dict[str, Any]] = CPU_PROVIDER
    if where.device == "CUDA":
        provider = (CUDA_PROVIDER, {"device_id": index})
    made = session(case.model, [provider])
    if where.device == "CUDA" and CUDA_PROVIDER not in made.get_providers():
        raise RuntimeError(f"{CUDA_PROVIDER} could not be started")
    output = made.run(None, dict(case.inputs))[0].astype(np.float64)
    return float(np.abs(output - case.expected).max() / np.abs(case.expected).max())


def _qmoe(rng: np.random.Generator, dtype: str) -> Case:
    attributes: dict[str, Any] = {
        "k": _TOPK,
        "activation_type": "swiglu",
        "swiglu_fusion": 1,
        "normalize_routing_weights": 1,
        "block_size": _BLOCK,
        "weights_prepacked": 0,
        **formats.get(_FORMAT).qmoe_attributes,
    }
    fc1 = _projection(rng, 2 * _INTER, _HIDDEN, dtype)
    fc2 = _projection(rng, _HIDDEN, _INTER, dtype)
    inputs = {
        "input": rng.normal(size=(_TOKENS, _HIDDEN)).astype(dtype),
        "router_probs": rng.normal(size=(_TOKENS, _EXPERTS)).astype(dtype),
    }
    weights = {
        "fc1_experts_weights": fc1.codes,
        "fc1_scales": fc1.scales,
        "fc1_experts_bias": fc1.bias,
        "fc2_experts_weights": fc2.codes,
        "fc2_scales": fc2.scales,
        "fc2_experts_bias": fc2.bias,
    }
    expected = reference.qmoe(inputs["input"], inputs["router_probs"], fc1, fc2, **attributes)
    return Case("QMoE", _model("QMoE", inputs, weights, attributes, expected), inputs, expected)


def _projection(rng: np.random.Generator, n: int, k: int, dtype: str) -> reference.Projection:
    weights = rng.normal(scale=k**-0.5, size=(_EXPERTS, n, k))
    quantized = formats.get(_FORMAT).quantize(weights, _BLOCK, scale_dtype=dtype)
    bias = rng.normal(scale=0.1, size=(_EXPERTS, n)).astype(dtype)
    return reference.Projection(quantized.codes, quantized.scales, None, bias)


def _matmul_nbits(rng: np.random.Generator, dtype: str) -> Case:
    fmt = formats.get(_FORMAT)
    weights = rng.normal(scale=_HIDDEN**-0.5, size=(_INTER, _HIDDEN))
    quantized = fmt.quantize(weights, _BLOCK, scale_dtype=dtype)
    if quantized.scales is None:
        raise AssertionError(f"{_FORMAT} has no scales")
    b = quantized.codes.reshape(_INTER, fmt.groups(_HIDDEN, _BLOCK), -1)
    bias = rng.normal(scale=0.1, size=_INTER).astype(dtype)
    attributes: dict[str, Any] = {"K": _HIDDEN, "N": _INTER, "block_size": _BLOCK, "bits": fmt.bits}
    inputs = {"A": rng.normal(size=(_TOKENS, _HIDDEN)).astype(dtype)}
    expected = reference.matmul_nbits(
        inputs["A"], b, quantized.scales, None, None, bias, **attributes
    )
    tensors = {"B": b, "scales": quantized.scales, "zero_points": None, "g_idx": None, "bias": bias}
    model = _model("MatMulNBits", inputs, tensors, attributes, expected)
    return Case("MatMulNBits", model, inputs, expected)


def _model(
    op_type: str,
    inputs: Mapping[str, Array],
    weights: Mapping[str, Array | None],
    attributes: Mapping[str, Any],
    expected: Array,
) -> onnx.ModelProto:
    """A model of one node in our own domain, so that nothing but our kernels can run it."""
    element = helper.np_dtype_to_tensor_dtype(next(iter(inputs.values())).dtype)
    names = [
        name if name in inputs or weights[name] is not None else "" for name in (*inputs, *weights)
    ]
    node = helper.make_node(
        op_type, names, ["output"], name=f"smoke {op_type}", domain="qmoe_plugin", **attributes
    )
    graph = helper.make_graph(
        [node],
        "smoke",
        [helper.make_tensor_value_info(k, element, v.shape) for k, v in inputs.items()],
        [helper.make_tensor_value_info("output", element, expected.shape)],
        [numpy_helper.from_array(v, k) for k, v in weights.items() if v is not None],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("qmoe_plugin", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)
