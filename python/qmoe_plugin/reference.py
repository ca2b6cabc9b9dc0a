"""What QMoE and MatMulNBits compute, in float64 numpy, from the tensors of the ONNX node.

This is the oracle of the tests and the specification of the kernels: written to be read, not to be
fast. Nothing is rounded between the inputs and the result. The formulas are those of com.microsoft
QMoE and MatMulNBits in onnxruntime 1.31.1; where its CPU and CUDA kernels disagree, those of CUDA,
except that `router_weights` and `use_sparse_mixer` are honoured, which CUDA's QMoE ignores.
docs/semantics.md lists every such difference.

Shapes: T tokens, H hidden_size, I inter_size, E experts, k experts a token, F = 2 where fc1 holds
gates and ups together, else 1; M, N, K as in matrix products; G = ceil(K / block_size) blocks, 1
when block_size is 0 (per channel).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qmoe_plugin import formats

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]

SPARSE_MIXER_JITTER = 0.01
GATED_ACTIVATIONS = ("swiglu", "geglu")

QMOE_DEFAULTS: Mapping[str, Any] = {
    "k": 1,
    "activation_type": "relu",
    "activation_alpha": 1.0,
    "activation_beta": 0.0,
    "swiglu_fusion": 0,
    "swiglu_limit": math.inf,
    "normalize_routing_weights": 0,
    "use_sparse_mixer": 0,
    "expert_weight_bits": 4,
    "quant_type": "int",
    "block_size": 0,
}


@dataclass(frozen=True)
class Projection:
    """The inputs of one projection of a QMoE node, as stored.

    Attributes:
        codes: uint8 [E, N, K * bits / 8], packed, lowest bits first.
        scales: [E, N, G]; per channel [E, N] or [E, N, 1].
        zero_points: None, or as `expand_zero_points` takes them.
        bias: None or [E, N].
    """

    codes: Array
    scales: Array
    zero_points: Array | None = None
    bias: Array | None = None

    def expert(self, index: int) -> Projection:
        """The same with one expert only."""
        one = slice(index, index + 1)
        return Projection(
            self.codes[one],
            self.scales[one],
            None if self.zero_points is None else self.zero_points[one],
            None if self.bias is None else self.bias[one],
        )


def expand_zero_points(
    zero_points: Array, fmt: formats.Format, scales_shape: tuple[int, ...], block_size: int
) -> Float64:
    """One zero point a block, float64 [..., N, G].

    Args:
        zero_points: One of
            uint8 [..., N, ceil(G * bits / 8)], packed along the blocks of a row;
            uint8 [..., ceil(N * bits / 8)], packed along the rows, per channel only;
            uint8 or any float type [..., N, G], one value a block. Float zero points may have a
            fraction.
        fmt: The weight format.
        scales_shape: (..., N, G).
        block_size: 0 = per channel.
    """
    *lead, n, groups = scales_shape
    packed = (*lead, n, -(-groups * fmt.bits // 8))
    across_rows = (*lead, -(-n * fmt.bits // 8))
    if zero_points.dtype == np.uint8 and zero_points.shape == packed:
        return formats.unpack(zero_points, fmt.bits, groups).astype(np.float64)
    if zero_points.dtype == np.uint8 and block_size == 0 and zero_points.shape == across_rows:
        return formats.unpack(zero_points, fmt.bits, n).astype(np.float64).reshape(scales_shape)
    if zero_points.size == math.prod(scales_shape):
        return zero_points.astype(np.float64).reshape(scales_shape)
    raise ValueError(
        f"zero points have shape {list(zero_points.shape)}; allowed are {list(packed)} (packed), "
        f"{list(scales_shape)} (one a block) and, per channel, {list(across_rows)} (packed)"
    )


def dequantize_projection(
    projection: Projection, fmt: formats.Format, k: int, block_size: int
) -> Float64:
    """The weights of a projection, w = (value(code) - zero_point) * scale: float64 [E, N, K].

    Args:
        projection: The stored tensors.
        fmt: Their format.
        k: Columns, K.
        block_size: Codes that share a scale; 0 = one scale a row.
    """
    experts, n = projection.codes.shape[:2]
    shape = (experts, n, fmt.groups(k, block_size))
    scales = projection.scales.reshape(shape).astype(np.float64)
    zero_points = None
    if projection.zero_points is not None:
        zero_points = expand_zero_points(projection.zero_points, fmt, shape, block_size)
    # Per channel, the one block is as long as the row.
    return fmt.dequantize(projection.codes, scales, zero_points, k=k, block_size=block_size or k)


def softmax(logits: Float64) -> Float64:
    """Softmax over the last axis. -inf logits get probability 0."""
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=-1, keepdims=True))


def route(
    router_probs: Array,
    k: int,
    *,
    normalize: bool,
    router_weights: Array | None = None,
    use_sparse_mixer: bool = False,
) -> tuple[npt.NDArray[np.int64], Float64]:
    """Chooses k experts a token and the factor of each.

    The k largest logits win; of equal ones, the lower expert index. The factor is the expert's
    softmax probability over all E experts or, when `router_weights` is given, its router weight.
    Normalising divides the k factors by their sum, if that is above 1e-6. (onnxruntime's
    softmax_topk kernels; router_weights as in its CPU QMoE.)

    Args:
        router_probs: [T, E] logits, despite the name.
        k: Experts a token.
        normalize: Attribute normalize_routing_weights.
        router_weights: None or [T, E].
        use_sparse_mixer: The factors are those of `route_sparse_mixer`, never normalised, unless
            there are router_weights. k must be 2.

    Returns:
        expert_ids int64 [T, k] in order of falling logits, factors float64 [T, k].
    """
    logits = router_probs.astype(np.float64)
    if use_sparse_mixer and router_weights is None:
        return route_sparse_mixer(logits)
    expert_ids = np.argsort(-logits, axis=-1, kind="stable")[:, :k]
    source = softmax(logits) if router_weights is None else router_weights.astype(np.float64)
    factors = np.take_along_axis(source, expert_ids, axis=-1)
    if normalize:
        total = factors.sum(axis=-1, keepdims=True)
        factors = np.where(total > 1e-6, factors / np.where(total > 1e-6, total, 1.0), factors)
    return expert_ids, factors


def route_sparse_mixer(logits: Float64) -> tuple[npt.NDArray[np.int64], Float64]:
    """The top-2 router of Phi-3.5-MoE, as onnxruntime's float MoE op implements it on CUDA.

    Twice: take the expert with the largest remaining logit, `top`; its factor is its softmax
    probability among those remaining logits x with (top - x) / max(|x|, |top|) <= 2 * jitter. The
    first choice does not remain for the second. The two factors are independent and do not sum
    to 1.

    Args:
        logits: [T, E], E >= 2.

    Returns:
        expert_ids int64 [T, 2], factors float64 [T, 2].
    """
    remaining = logits.copy()
    rows = np.arange(len(logits))
    expert_ids = np.zeros((len(logits), 2), dtype=np.int64)
    factors = np.zeros((len(logits), 2))
    for choice in range(2):
        best = np.argmax(remaining, axis=-1)  # the first of equal ones
        top = remaining[rows, best][:, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            distance = (top - logits) / np.maximum(np.abs(logits), np.abs(top))
        masked = np.where(distance > 2 * SPARSE_MIXER_JITTER, -np.inf, remaining)
        expert_ids[:, choice] = best
        factors[:, choice] = softmax(masked)[rows, best]
        remaining[rows, best] = -np.inf
    return expert_ids, factors


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
) -> Float64:
    """The activation between fc1 and fc2, biases already added.

    ========  =====================================================================================
    identity  x
    relu      max(x, 0)
    gelu      x Phi(x) by the error function
    silu      x sigmoid(x)
    swiglu    g sigmoid(alpha g) (u + beta) with g = min(gate, limit), u = clamp(up, -limit, limit)
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

    Returns:
        float64 [..., I].
    """
    if activation == "silu" and fc3 is not None:  # the classic gated form
        activation, alpha, beta, limit = "swiglu", 1.0, 0.0, math.inf
    if activation in GATED_ACTIVATIONS:
        gate, up = split_gate_up(fc1, fc3, swiglu_fusion)
        if activation == "geglu":
            return gelu_tanh(gate) * up
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
        return np.asarray(gate * sigmoid(alpha * gate) * (up + beta))
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


def projection_format(attributes: Mapping[str, Any], name: str) -> formats.Format:
    """The weight format of a QMoE node's projection "fc1", "fc2" or "fc3"."""
    attrs = {**QMOE_DEFAULTS, **attributes}
    bits = attrs.get(f"{name}_expert_weight_bits", attrs["expert_weight_bits"])
    return formats.for_attributes(attrs["quant_type"], bits)


def qmoe(
    x: Array,
    router_probs: Array,
    fc1: Projection,
    fc2: Projection,
    fc3: Projection | None = None,
    *,
    router_weights: Array | None = None,
    **attributes: int | float | str,
) -> Float64:
    """The QMoE op.

    y = sum_j factor_j * (activation(x W1_j^T + b1_j) W2_j^T + b2_j) over the k chosen experts j.

    Args:
        x: [T, H] or [B, S, H], any float type.
        router_probs: [T, E] or [B, S, E] logits, any float type.
        fc1: [E, F * I, H].
        fc2: [E, H, I].
        fc3: None or [E, I, H]: the ups, for swiglu_fusion 0.
        router_weights: None or like router_probs.
        **attributes: Of the node, by their ONNX names; defaults as in QMOE_DEFAULTS. Attributes
            that change speed or storage only (accuracy_level, weights_prepacked) are ignored.

    Returns:
        float64, the shape of x.
    """
    attrs: dict[str, Any] = {**QMOE_DEFAULTS, **attributes}
    hidden = x.shape[-1]
    tokens = x.reshape(-1, hidden).astype(np.float64)
    experts = fc1.codes.shape[0]

    def linear(name: str, projection: Projection, inputs: Float64, expert: int) -> Float64:
        part = projection.expert(expert)
        fmt = projection_format(attrs, name)
        weights = dequantize_projection(part, fmt, inputs.shape[-1], attrs["block_size"])
        product = inputs @ weights[0].T
        return np.asarray(product if part.bias is None else product + part.bias.astype(np.float64))

    expert_ids, factors = route(
        router_probs.reshape(-1, experts),
        attrs["k"],
        normalize=bool(attrs["normalize_routing_weights"]),
        router_weights=None if router_weights is None else router_weights.reshape(-1, experts),
        use_sparse_mixer=bool(attrs["use_sparse_mixer"]),
    )
    result = np.zeros((len(tokens), hidden))
    for expert in np.unique(expert_ids):
        rows, slots = np.nonzero(expert_ids == expert)
        activated = activate(
            linear("fc1", fc1, tokens[rows], expert),
            attrs["activation_type"],
            fc3=None if fc3 is None else linear("fc3", fc3, tokens[rows], expert),
            swiglu_fusion=attrs["swiglu_fusion"],
            alpha=attrs["activation_alpha"],
            beta=attrs["activation_beta"],
            limit=attrs["swiglu_limit"],
        )
        result[rows] += factors[rows, slots, None] * linear("fc2", fc2, activated, expert)
    return result.reshape(x.shape)


def matmul_nbits_weights(
    b: Array,
    scales: Array,
    zero_points: Array | None = None,
    g_idx: Array | None = None,
    *,
    k: int,
    n: int,
    block_size: int,
    bits: int = 4,
) -> Float64:
    """The weights of a MatMulNBits node, float64 [N, K].

    Args:
        b: uint8 [N, G, block_size * bits / 8]; the last block may be partial and is then padded.
        scales: [N, G], or flat.
        zero_points: None, uint8 packed [N, ceil(G * bits / 8)], or one value a block [N, G]; or
            flat.
        g_idx: None, or int32 [K]: the block whose scale and zero point each column takes; codes
            stay where they are.
        k: Attribute K, columns.
        n: Attribute N, rows.
        block_size: Codes that share a scale.
        bits: Bits a code.
    """
    fmt = formats.for_attributes("int", bits)
    groups = fmt.groups(k, block_size)
    codes = formats.unpack(b.reshape(n, -1), bits, k)
    scale = scales.reshape(n, groups).astype(np.float64)
    zero = np.full((n, groups), fmt.default_zero_point)
    if zero_points is not None:
        zero = expand_zero_points(zero_points.reshape(n, -1), fmt, (n, groups), block_size)
    block_of = np.arange(k) // block_size if g_idx is None else g_idx.reshape(-1)[:k]
    return np.asarray((fmt.values[codes] - zero[:, block_of]) * scale[:, block_of])


def matmul_nbits(
    a: Array,
    b: Array,
    scales: Array,
    zero_points: Array | None = None,
    g_idx: Array | None = None,
    bias: Array | None = None,
    **attributes: int | float | str,
) -> Float64:
    """The MatMulNBits op: Y[..., N] = A[..., K] W[N, K]^T + bias[N].

    Args:
        a: [..., K], any float type.
        b: As `matmul_nbits_weights` takes it, and so the next three.
        scales: One a block.
        zero_points: None, or one a block, packed or not.
        g_idx: None, or the block of each column.
        bias: None or [N].
        **attributes: Of the node, by their ONNX names: K, N, block_size, bits. Others change no
            value.

    Returns:
        float64 [..., N].
    """
    attrs: dict[str, Any] = dict(attributes)
    weights = matmul_nbits_weights(
        b,
        scales,
        zero_points,
        g_idx,
        k=attrs["K"],
        n=attrs["N"],
        block_size=attrs["block_size"],
        bits=attrs.get("bits", 4),
    )
    product = a.astype(np.float64) @ weights.T
    return np.asarray(product if bias is None else product + bias.astype(np.float64))
