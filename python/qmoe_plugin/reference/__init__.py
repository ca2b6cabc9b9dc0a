"""What our ops compute, in float64 numpy, from the tensors of the ONNX node.

This is the oracle of the tests and the specification of the kernels: written to be read, not to be
fast. Nothing is rounded between the inputs and the result, unless the op says so (wfp4afp8). The
formulas are those of the com.microsoft ops in onnxruntime 1.32.0; where its CPU and
CUDA kernels disagree, those of CUDA, except that `router_weights` and `use_sparse_mixer` are
honoured, which CUDA's QMoE ignores. docs/semantics.md lists every such difference.

Shapes: T tokens, H hidden_size, I inter_size, E experts, k experts a token, F = 2 where fc1 holds
gates and ups together, else 1; M, N, K as in matrix products; G = ceil(K / block_size) blocks, 1
when block_size is 0 (per channel).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from qmoe_plugin import formats
from qmoe_plugin.reference.activations import (
    GATED_ACTIVATIONS,
    activate,
    quantize_fp8,
    quantize_mxfp8,
    split_gate_up,
)
from qmoe_plugin.reference.routing import route, route_sparse_mixer
from qmoe_plugin.reference.weights import (
    Projection,
    dequantize_projection,
    expand_zero_points,
    fp4_weights,
    fp8_weights,
    matmul_nbits_weights,
)

__all__ = [
    "GATED_ACTIVATIONS",
    "QMOE_DEFAULTS",
    "Projection",
    "activate",
    "dequantize_projection",
    "expand_zero_points",
    "fp4_weights",
    "fp8_weights",
    "matmul_fp4_weight",
    "matmul_fp8_weight",
    "matmul_nbits",
    "matmul_nbits_format",
    "matmul_nbits_weights",
    "moe",
    "projection_format",
    "projection_weights",
    "qmoe",
    "quantize_activations",
    "quantize_fp8",
    "quantize_mxfp8",
    "route",
    "route_sparse_mixer",
    "split_gate_up",
]

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]

QMOE_DEFAULTS: Mapping[str, Any] = {
    "k": 1,
    "activation_type": "relu",
    "activation_alpha": 1.0,
    "activation_beta": 0.0,
    "swiglu_fusion": 0,
    "swiglu_limit": math.inf,
    "swiglu_limit_after_activation": 0,
    "normalize_routing_weights": 0,
    "use_sparse_mixer": 0,
    "num_shared_experts": 0,
    "expert_weight_bits": None,  # 4 with quant_type "int", else what the format has
    "quant_type": "int",
    "block_size": 0,
}


def projection_format(attributes: Mapping[str, Any], name: str) -> formats.Format:
    """The weight format of a QMoE node's projection "fc1", "fc2" or "fc3"."""
    attrs = {**QMOE_DEFAULTS, **attributes}
    own = attrs.get("fc2_format" if name == "fc2" else "fc1_format")
    if own:
        return formats.get(own)
    bits = attrs["expert_weight_bits"]
    for projection in ("fc1", "fc3") if name == "fc3" else (name,):  # fc3 is like fc1
        bits = attrs.get(f"{projection}_expert_weight_bits", bits)
    return formats.for_attributes(attrs["quant_type"], bits)


def projection_weights(
    attributes: Mapping[str, Any], name: str, projection: Projection, k: int
) -> Float64:
    """The weights of a QMoE node's projection "fc1", "fc2" or "fc3", float64 [E, N, K]."""
    if projection.is_plain:
        return projection.codes.astype(np.float64)
    fmt = projection_format(attributes, name)
    block_size = fmt.only_block_size or attributes.get("block_size", QMOE_DEFAULTS["block_size"])
    return dequantize_projection(projection, fmt, k, block_size)


def matmul_nbits_format(attributes: Mapping[str, Any]) -> formats.Format:
    """The weight format of a MatMulNBits node."""
    named = attributes.get("weight_format")
    return formats.get(named) if named else formats.for_attributes("int", attributes.get("bits"))


def quantize_activations(
    x: Array, attributes: Mapping[str, Any], act_scale: Array | None, expert: int
) -> Float64:
    """What a matrix product of a QMoE node's expert reads, given x in the activation type.

    That is x, but for quant_type "wfp4afp8": there it is quantised to e4m3, by the expert's scale
    if there is one, else by blocks of 32.

    Args:
        x: [R, K], float32, float16 or bfloat16.
        attributes: Of the node.
        act_scale: None, or [1] or [E].
        expert: Whose rows these are.
    """
    if attributes.get("quant_type") != "wfp4afp8":
        return x.astype(np.float64)
    if act_scale is None:
        return quantize_mxfp8(x)
    return quantize_fp8(x, act_scale.reshape(-1)[expert if act_scale.size > 1 else 0])


def qmoe(
    x: Array,
    router_probs: Array,
    fc1: Projection,
    fc2: Projection,
    fc3: Projection | None = None,
    *,
    router_weights: Array | None = None,
    fc1_act_scale: Array | None = None,
    fc2_act_scale: Array | None = None,
    **attributes: int | float | str,
) -> Float64:
    """The QMoE op.

    y = sum_j factor_j * (activation(x W1_j^T + b1_j) W2_j^T + b2_j) over the k chosen experts j and
    the shared ones.
    With quant_type "wfp4afp8", x and the activation's result, rounded to the type of x, are
    quantised first (`quantize_activations`): the one rounding between the inputs and the result.

    Args:
        x: [T, H] or [B, S, H], any float type.
        router_probs: [T, E] or [B, S, E] logits, any float type.
        fc1: [E, F * I, H].
        fc2: [E, H, I].
        fc3: None or [E, I, H]: the ups, for swiglu_fusion 0.
        router_weights: None or like router_probs.
        fc1_act_scale: None, or float32 [1] or [E].
        fc2_act_scale: Likewise.
        **attributes: Of the node, by their ONNX names; defaults as in QMOE_DEFAULTS. Attributes
            that change speed or storage only (accuracy_level, weights_prepacked) are ignored.

    Returns:
        float64, the shape of x.
    """
    attrs: dict[str, Any] = {**QMOE_DEFAULTS, **attributes}
    hidden = x.shape[-1]
    tokens = x.reshape(-1, hidden)
    experts = fc1.codes.shape[0]
    quantizes = attrs["quant_type"] == "wfp4afp8"

    def linear(name: str, projection: Projection, inputs: Float64, expert: int) -> Float64:
        part = projection.expert(expert)
        product = inputs @ projection_weights(attrs, name, part, inputs.shape[-1])[0].T
        return np.asarray(product if part.bias is None else product + part.bias.astype(np.float64))

    expert_ids, factors = route(
        router_probs.reshape(-1, experts),
        attrs["k"],
        normalize=bool(attrs["normalize_routing_weights"]),
        router_weights=None if router_weights is None else router_weights.reshape(-1, experts),
        use_sparse_mixer=bool(attrs["use_sparse_mixer"]),
        num_shared_experts=attrs["num_shared_experts"],
    )
    result = np.zeros((len(tokens), hidden))
    for expert in np.unique(expert_ids):
        rows, slots = np.nonzero(expert_ids == expert)
        inputs = quantize_activations(tokens[rows], attrs, fc1_act_scale, expert)
        activated = activate(
            linear("fc1", fc1, inputs, expert),
            attrs["activation_type"],
            fc3=None if fc3 is None else linear("fc3", fc3, inputs, expert),
            swiglu_fusion=attrs["swiglu_fusion"],
            alpha=attrs["activation_alpha"],
            beta=attrs["activation_beta"],
            limit=attrs["swiglu_limit"],
            limit_after_activation=bool(attrs["swiglu_limit_after_activation"]),
        )
        if quantizes:
            activated = quantize_activations(
                activated.astype(x.dtype), attrs, fc2_act_scale, expert
            )
        result[rows] += factors[rows, slots, None] * linear("fc2", fc2, activated, expert)
    return result.reshape(x.shape)


def moe(
    x: Array,
    router_probs: Array,
    fc1: Array,
    fc2: Array,
    fc3: Array | None = None,
    *,
    fc1_bias: Array | None = None,
    fc2_bias: Array | None = None,
    fc3_bias: Array | None = None,
    **attributes: float | str,
) -> Float64:
    """The MoE op: QMoE with weights of float types.

    Args:
        x: [T, H] or [B, S, H], any float type.
        router_probs: [T, E] or [B, S, E] logits, any float type.
        fc1: [E, F * I, H], any float type.
        fc2: [E, H, I].
        fc3: None or [E, I, H].
        fc1_bias: None or [E, F * I].
        fc2_bias: None or [E, H].
        fc3_bias: None or [E, I].
        **attributes: Of the node, by their ONNX names; defaults as in QMOE_DEFAULTS.

    Returns:
        float64, the shape of x.
    """
    attrs: dict[str, Any] = dict(attributes)
    return qmoe(
        x,
        router_probs,
        Projection(fc1, None, bias=fc1_bias),
        Projection(fc2, None, bias=fc2_bias),
        None if fc3 is None else Projection(fc3, None, bias=fc3_bias),
        **attrs,
    )


def matmul_nbits(
    a: Array,
    b: Array,
    scales: Array | None,
    zero_points: Array | None = None,
    g_idx: Array | None = None,
    bias: Array | None = None,
    codebook: Array | None = None,
    global_scale: Array | None = None,
    **attributes: int | float | str,
) -> Float64:
    """The MatMulNBits op: Y[..., N] = A[..., K] W[N, K]^T + bias[N].

    Args:
        a: [..., K], any float type.
        b: As `matmul_nbits_weights` takes it, and so the next three.
        scales: One a block; None where there is a global scale only.
        zero_points: None, or one a block, packed or not.
        g_idx: None, or the block of each column.
        bias: None or [N].
        codebook: None, or [2^bits] for formats that take one.
        global_scale: None or [1].
        **attributes: Of the node, by their ONNX names: K, N, block_size, bits, weight_format.
            Others change no value.

    Returns:
        float64 [..., N].
    """
    attrs: dict[str, Any] = dict(attributes)
    weights = matmul_nbits_weights(
        b,
        scales,
        zero_points,
        g_idx,
        codebook,
        global_scale,
        k=attrs["K"],
        n=attrs["N"],
        block_size=attrs["block_size"],
        fmt=matmul_nbits_format(attrs),
    )
    product = a.astype(np.float64) @ weights.T
    return np.asarray(product if bias is None else product + bias.astype(np.float64))


def matmul_fp8_weight(
    a: Array,
    b: Array,
    b_scale: Array,
    a_scale: Array | None = None,
    bias: Array | None = None,
    *,
    block_size: int = 128,
) -> Float64:
    """The MatMulBlockQuantizedFp8Weight op: Y[..., N] = A[..., K] W[N, K]^T + bias[N].

    Args:
        a: [..., K], any float type.
        b: As `fp8_weights` takes it, and so the next.
        b_scale: One a block.
        a_scale: None, or a scalar s: A becomes e4m3(A / s) * s first (`quantize_fp8`).
        bias: None or [N].
        block_size: Codes that share a scale.

    Returns:
        float64 [..., N].
    """
    x = a.astype(np.float64) if a_scale is None else quantize_fp8(a, float(a_scale.reshape(())))
    product = x @ fp8_weights(b, b_scale, block_size).T
    return np.asarray(product if bias is None else product + bias.astype(np.float64))


def matmul_fp4_weight(
    a: Array,
    b: Array,
    weight_scale: Array,
    weight_scale_2: Array,
    input_scale: Array | None = None,
    bias: Array | None = None,
    *,
    block_size: int = 16,
) -> Float64:
    """The MatMulBlockQuantizedFp4Weight op: Y[..., N] = A[..., K] W[N, K]^T + bias[N].

    Args:
        a: [..., K], any float type.
        b: As `fp4_weights` takes it, and so the next two.
        weight_scale: One a block.
        weight_scale_2: A factor on all.
        input_scale: Of no effect.
        bias: None or [N].
        block_size: Codes that share a scale.

    Returns:
        float64 [..., N].
    """
    weights = fp4_weights(b, weight_scale, weight_scale_2, block_size)
    product = a.astype(np.float64) @ weights.T
    return np.asarray(product if bias is None else product + bias.astype(np.float64))
