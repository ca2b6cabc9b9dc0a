"""Which experts a token goes to, and their factors."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from qmoe_plugin.reference.activations import sigmoid

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]

SPARSE_MIXER_JITTER = 0.01


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
    num_shared_experts: int = 0,
) -> tuple[npt.NDArray[np.int64], Float64]:
    """Chooses k experts a token and the factor of each; shared experts come in addition.

    The last S = num_shared_experts experts are shared: all tokens go to them, with the sigmoid of
    their logit as factor. What follows is of the others, as if the shared ones were not there.

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
        num_shared_experts: S.

    Returns:
        expert_ids int64 [T, k + S] in order of falling logits, then shared ones, factors float64
        [T, k + S].
    """
    if num_shared_experts:
        routed = router_probs.shape[-1] - num_shared_experts
        expert_ids, factors = route(
            router_probs[:, :routed],
            k,
            normalize=normalize,
            router_weights=None if router_weights is None else router_weights[:, :routed],
            use_sparse_mixer=use_sparse_mixer,
        )
        gates = router_probs[:, routed:].astype(np.float64)
        shared = np.broadcast_to(np.arange(num_shared_experts) + routed, gates.shape)
        return np.hstack([expert_ids, shared]), np.hstack([factors, sigmoid(gates)])
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
