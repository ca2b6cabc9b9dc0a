"""The functions between fc1 and fc2, and activations as 8-bit floats."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from qmoe_plugin.formats.scales import round_to_e4m3

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]

GATED_ACTIVATIONS = ("swiglu", "geglu")
MX_BLOCK = 32  # values that share a scale


def sigmoid(x: Float64) -> Float64:
    """1 / (1 + exp(-x))."""
    with np.errstate(over="ignore"):  # exp(-x) = inf gives 0, as it should
        return np.asarray(1.0 / (1.0 + np.exp(-x)))


def gelu_erf(x: Float64) -> Float64:
    """GELU, x Phi(x), by the error function."""
    erf = np.vectorize(math.erf, otypes=[np.float64])
    return np.asarray(0.5 * x * (1.0 + erf(x / math.sqrt(2.0))))


def gelu_tanh(x: Float64) -> Float64:
    """The tanh approximation of GELU."""
    return np.asarray(0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3))))


def split_gate_up(fc1: Float64, fc3: Float64 | None, swiglu_fusion: int) -> tuple[Float64, Float64]:
    """Gates and ups, [..., I] each.

    Fusion 0 has them apart, gates in fc1 and ups in fc3; without fc3 it means 1, for the sake of
    old gpt-oss exports. Fusion 1 interleaves them (gate_0, up_0, gate_1, ...), fusion 2 stores all
    gates, then all ups.

    Args:
        fc1: [..., F * I].
        fc3: None or [..., I].
        swiglu_fusion: 0, 1 or 2.
    """
    if swiglu_fusion == 0 and fc3 is not None:
        return fc1, fc3
    if fc3 is not None:
        raise ValueError(f"fc3 needs swiglu_fusion 0, given {swiglu_fusion}")
    if swiglu_fusion == 2:
        half = fc1.shape[-1] // 2
        return fc1[..., :half], fc1[..., half:]
    return fc1[..., 0::2], fc1[..., 1::2]


def activate(
    fc1: Float64,
    activation: str,
    *,
    fc3: Float64 | None = None,
    swiglu_fusion: int = 0,
    alpha: float = 1.0,
    beta: float = 0.0,
    limit: float = math.inf,
    limit_after_activation: bool = False,
) -> Float64:
    """The activation between fc1 and fc2, biases already added.

    ========  =====================================================================================
    identity  x
    relu      max(x, 0)
    gelu      x Phi(x) by the error function
    silu      x sigmoid(x)
    swiglu    g sigmoid(alpha g) (u + beta) with g = min(gate, limit), u = clamp(up, -limit, limit);
              limit_after_activation: min(gate sigmoid(alpha gate), limit) (u + beta)
    geglu     tanh-GELU(gate) * up (Gemma 4); alpha, beta and limit play no role
    ========  =====================================================================================

    Args:
        fc1: [..., F * I], F = 2 for swiglu and geglu without fc3.
        activation: Attribute activation_type.
        fc3: None or [..., I]: the ups of swiglu, of geglu, or of silu, which then means
            silu(fc1) * fc3.
        swiglu_fusion: How gates and ups are stored, see `split_gate_up`.
        alpha: Attribute activation_alpha.
        beta: Attribute activation_beta.
        limit: Attribute swiglu_limit; infinite when a node has none.
        limit_after_activation: Attribute swiglu_limit_after_activation: what is cut of gates.

    Returns:
        float64 [..., I].
    """
    if activation == "silu" and fc3 is not None:  # the classic gated form
        activation, alpha, beta, limit = "swiglu", 1.0, 0.0, math.inf
    if activation in GATED_ACTIVATIONS:
        gate, up = split_gate_up(fc1, fc3, swiglu_fusion)
        if activation == "geglu":
            return gelu_tanh(gate) * up
        if not limit_after_activation:
            gate = np.minimum(gate, limit)
        activated = gate * sigmoid(alpha * gate)
        if limit_after_activation:
            activated = np.minimum(activated, limit)
        return np.asarray(activated * (np.clip(up, -limit, limit) + beta))
    if fc3 is not None:
        raise ValueError(f"fc3 goes with silu, swiglu and geglu, not with '{activation}'")
    match activation:
        case "identity":
            return fc1
        case "relu":
            return np.maximum(fc1, 0.0)
        case "gelu":
            return gelu_erf(fc1)
        case "silu":
            return fc1 * sigmoid(fc1)
    raise ValueError(f"activation_type '{activation}' is not known")


def quantize_mxfp8(x: Array) -> Float64:
    """What blocks of 32 values along the last axis become as e4m3 with an e8m0 scale (OCP MX).

    With amax the largest |x| of a block, the last of which may be shorter,

        s = 2^max(floor(log2(amax)) - 8, -126)     2^-126 if amax is 0
        x becomes e4m3(x / s) * s

    where e4m3 rounds to the nearest e4m3fn number, ties to the even mantissa, and saturates at
    +-448. All of this is exact but for that rounding. A block that holds a NaN or an infinity
    becomes NaN throughout.

    Args:
        x: [..., K], float32, float16 or bfloat16.

    Returns:
        float64 [..., K].
    """
    *lead, k = x.shape
    padded = np.zeros((*lead, -(-k // MX_BLOCK) * MX_BLOCK))
    padded[..., :k] = x
    blocks = padded.reshape(*lead, -1, MX_BLOCK)
    amax = np.abs(blocks).max(axis=-1, keepdims=True)  # NaN wins
    finite = np.isfinite(amax)
    exponent = np.frexp(np.where(finite, amax, 1.0))[1] - 1  # floor(log2(amax))
    exponent = np.where(amax == 0, -126, np.maximum(exponent - 8, -126))
    scale = np.where(finite, np.exp2(exponent.astype(np.float64)), np.nan)
    # The division by a power of two is exact in float64, and e4m3 far coarser than float32.
    values = round_to_e4m3(blocks / scale).astype(np.float64) * scale
    return np.asarray(values.reshape(*lead, -1)[..., :k])


def quantize_fp8(x: Array, scale: float) -> Float64:
    """What values become as e4m3 with a given scale: e4m3(x / scale) * scale.

    x / scale is rounded to float32, then to e4m3 as in `quantize_mxfp8`; an infinity saturates, NaN
    stays NaN.

    Args:
        x: Any shape, float32, float16 or bfloat16.
        scale: Positive.

    Returns:
        float64, the shape of x.
    """
    quotients = x.astype(np.float32) / np.float32(scale)
    return np.asarray(round_to_e4m3(quotients).astype(np.float64) * float(np.float32(scale)))
