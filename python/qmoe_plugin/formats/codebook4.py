"""codebook4: 4-bit codes, indices into 16 values that the model gives for each projection.

Any set of values will do; here are the well-known ones, and `learn_codebook` for one's own::

    quantized = codebook4.FORMAT.with_codebook(codebook4.NF4).quantize(weights, 64)
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from qmoe_plugin.formats.base import Format
from qmoe_plugin.formats.packing import Array

Codebook = npt.NDArray[np.float32]

FORMAT = Format(
    name="codebook4",
    bits=4,
    values=np.zeros(16),
    default_zero_point=0,
    zero_points=False,
    scale_type="any",
    codebook=True,
)


def _codebook(*values: float) -> Codebook:
    made = np.array(values, dtype=np.float32)
    made.flags.writeable = False
    return made


NF4 = _codebook(
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""NormalFloat: quantiles of the normal distribution, scaled to [-1, 1]; Dettmers et al., "QLoRA"
(arXiv 2305.14314), appendix E. Of the quantile function Q and d = 0.9677083: -Q at 7 steps from d
down to 1/2, 0, and Q at 8 such steps, all divided by Q(d)."""

AF4 = _codebook(
    -1.0,
    -0.69441008,
    -0.51243739,
    -0.3736951,
    -0.25607552,
    -0.14982478,
    -0.04934812,
    0.0,
    0.04273164,
    0.12934483,
    0.21961274,
    0.31675666,
    0.42563882,
    0.55496234,
    0.72424863,
    1.0,
)
"""AbnormalFloat for blocks of 64: made for normal weights divided by the largest magnitude of their
block; Yoshida, "NF4 Isn't Information Theoretically Optimal" (arXiv 2306.06965). -1, 0 and 1 are
given, and each other value is the median of those weights of its sign that are nearest to it, which
makes their absolute error least (0 takes its share afterwards)."""

IQ4_NL = _codebook(
    -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113
)  # fmt: skip
"""The values of llama.cpp's non-linear 4-bit type of that name, which has blocks of 32 with float16
scales. None of them is 0."""

CODEBOOKS = {"nf4": NF4, "af4": AF4, "iq4_nl": IQ4_NL}
"""The codebooks above by name."""

_ITERATIONS = 50
_MOST_SAMPLES = 1 << 20


def learn_codebook(weights: Array, block_size: int) -> Codebook:
    """A codebook with a small squared error for these weights, found by k-means (Lloyd).

    Each block is divided by its largest magnitude, as `Format.quantize` does, so the ends of the
    codebook stay -1 and 1; errors count as they are after multiplying by it again. The search
    starts from NF4 and ends in a local optimum. The same weights give the same codebook.

    Args:
        weights: [..., N, K], any float type; of more than 2^20 weights evenly spaced rows are
            taken.
        block_size: Weights along K that share a scale; 0 for one scale a row.

    Returns:
        float32 [16], ascending.

    Raises:
        ValueError: If the weights are not finite, or all zero.
    """
    weights = np.asarray(weights)
    if weights.ndim < 2 or weights.shape[-1] == 0:
        raise ValueError(f"weights must be [..., N, K] with K > 0, given {list(weights.shape)}")
    k = weights.shape[-1]
    rows = weights.reshape(-1, k)
    rows = rows[:: max(1, -(-rows.size // _MOST_SAMPLES))].astype(np.float64)
    if not np.isfinite(rows).all():
        raise ValueError("weights must be finite, given some NaN or infinity")
    width = block_size or k
    padded = np.zeros((len(rows), -(-k // width) * width))
    padded[:, :k] = rows
    blocks = padded.reshape(len(rows), -1, width)
    largest = np.abs(blocks).max(axis=-1, keepdims=True)
    real = np.broadcast_to(np.arange(padded.shape[1]).reshape(-1, width) < k, blocks.shape)
    used = real & (largest > 0)
    if not used.any():
        raise ValueError("weights must not all be zero")
    samples = (blocks / np.where(largest > 0, largest, 1))[used]
    importance = np.broadcast_to(largest**2, blocks.shape)[used]
    return _lloyd(samples, importance)


def _lloyd(samples: Array, importance: Array) -> Codebook:
    """Moves the values between the ends to the means of the samples nearest to them."""
    order = np.argsort(samples, kind="stable")
    samples, importance = samples[order], importance[order]
    mass = np.concatenate([[0.0], np.cumsum(importance)])
    moment = np.concatenate([[0.0], np.cumsum(importance * samples)])
    values = NF4.astype(np.float64)
    for _ in range(_ITERATIONS):
        middles = (values[1:] + values[:-1]) / 2
        cuts = np.searchsorted(samples, middles)  # value i has samples [cuts[i - 1], cuts[i])
        cell_mass, cell_moment = np.diff(mass[cuts]), np.diff(moment[cuts])
        moved = values.copy()
        has_samples = cell_mass > 0
        moved[1:-1][has_samples] = cell_moment[has_samples] / cell_mass[has_samples]
        if np.array_equal(moved, values):
            break
        values = moved
    return values.astype(np.float32)
