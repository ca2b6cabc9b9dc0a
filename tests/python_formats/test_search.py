"""The search for better scales: never worse than round-to-nearest, and better on 4-bit formats."""

import ml_dtypes
import numpy as np
import pytest

from qmoe_plugin import formats
from qmoe_plugin.formats import codebook4
from qmoe_plugin.formats.scales import E4M3, E8M0

# Format, block size, symmetric, type of the scales.
FOUR_BITS = [
    ("int4", 32, True, np.float32),
    ("int4", 32, True, np.float16),
    ("int4", 32, False, np.float32),
    ("int4", 0, True, np.float32),
    ("mxfp4", 32, True, None),
    ("nvfp4", 16, True, None),
    ("nf4", 64, True, np.float32),
    ("nf4", 64, True, E8M0),
    ("nf4", 16, True, E4M3),
]
OTHERS = [
    ("int2", 16, True, np.float32),
    ("int2", 16, False, ml_dtypes.bfloat16),
    ("int8", 32, True, np.float32),
    ("int8", 0, False, np.float32),
    ("fp8_e4m3", 0, True, np.float32),
    ("fp8_e4m3", 32, True, np.float32),
]


def named(name: str) -> formats.Format:
    return codebook4.FORMAT.with_codebook(codebook4.NF4) if name == "nf4" else formats.get(name)


def weights_of(kind: str, shape=(48, 200), seed=0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    drawn = rng.standard_normal(shape) if kind == "normal" else rng.standard_t(3, shape)
    return (0.02 * drawn).astype(np.float32)


def errors(fmt, weights, quantized, block_size) -> np.ndarray:
    zeros = quantized.zero_points
    if zeros is not None:
        zeros = fmt.unpack_zero_points(zeros, quantized.scales.shape)
    decoded = fmt.dequantize(
        quantized.codes,
        quantized.scales,
        zeros,
        k=weights.shape[-1],
        block_size=block_size,
        global_scale=quantized.global_scale,
    )
    return (decoded - weights) ** 2


def both(name, block_size, symmetric, scale_dtype, weights):
    fmt = named(name)
    options = {"symmetric": symmetric}
    if scale_dtype is not None:
        options["scale_dtype"] = scale_dtype
    plain = fmt.quantize(weights, block_size, **options)
    searched = formats.quantize_mse(fmt, weights, block_size, **options)
    for field in ("codes", "scales", "zero_points", "global_scale", "codebook"):
        a, b = getattr(plain, field), getattr(searched, field)
        assert (a is None) == (b is None)
        if a is not None:
            assert (np.shape(a), np.asarray(a).dtype) == (np.shape(b), np.asarray(b).dtype)
    return [errors(fmt, weights, q, block_size) for q in (plain, searched)]


@pytest.mark.parametrize("kind", ["normal", "heavy"])
@pytest.mark.parametrize("options", FOUR_BITS, ids=str)
def test_beats_plain_rounding_on_four_bits(options, kind):
    powers_of_two = options[0] == "mxfp4" or options[3] is E8M0  # little to choose from
    for seed in range(3):
        plain, searched = both(*options, weights_of(kind, seed=seed))
        assert searched.mean() < (0.998 if powers_of_two else 0.99) * plain.mean()


@pytest.mark.parametrize("kind", ["normal", "heavy"])
@pytest.mark.parametrize("options", FOUR_BITS + OTHERS, ids=str)
def test_no_block_gets_worse(options, kind):
    """But for a rounding of float32 sums."""
    plain, searched = both(*options, weights_of(kind))
    block, (n, k) = options[1] or plain.shape[1], plain.shape
    height = 1
    if options[0] == "fp8_e4m3":
        height = options[1] or n
    for row in range(0, n, height):
        for column in range(0, k, block):
            part = np.s_[row : row + height, column : column + block]
            assert searched[part].sum() <= plain[part].sum() * (1 + 1e-4)


@pytest.mark.parametrize("options", FOUR_BITS + OTHERS, ids=str)
def test_zeros_and_tiny_weights(options):
    weights = np.zeros((16, 64), np.float32)
    plain, searched = both(*options, weights)
    assert not searched.any()
    weights[3, 5] = 1e-30
    plain, searched = both(*options, weights)
    assert searched.sum() <= plain.sum()


def test_exact_weights_stay_exact():
    rng = np.random.default_rng(0)
    codes = rng.integers(-8, 8, (4, 64))
    codes[:, ::32] = -8
    _, searched = both("int4", 32, True, np.float32, (0.25 * codes).astype(np.float32))
    assert not searched.any()


def test_wants_one_matrix():
    with pytest.raises(ValueError, match="one matrix"):
        formats.quantize_mse(formats.get("int4"), np.zeros((2, 3, 32), np.float32), 32)
