"""The search for better scales: never worse than round-to-nearest, and better on 4-bit formats."""

import ml_dtypes
import numpy as np
import pytest

from qmoe_plugin import formats
from qmoe_plugin.formats import codebook4, packing, rounding
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


# --- the compiled twin ----------------------------------------------------------------------------

FIELDS = ("codes", "scales", "zero_points", "global_scale")


def both_ways(monkeypatch, quantize):
    """What the compiled module makes, and numpy."""
    compiled = quantize()
    monkeypatch.setattr(packing, "native", lambda: None)
    return compiled, quantize()


def check_same(compiled, plain):
    for field in FIELDS:
        a, b = getattr(compiled, field), getattr(plain, field)
        assert (a is None) == (b is None)
        if a is not None:
            a, b = np.asarray(a), np.asarray(b)
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("important", [False, True])
@pytest.mark.parametrize("shape", [(48, 200), (1, 1), (33, 17), (5, 64)])
@pytest.mark.parametrize("options", FOUR_BITS + OTHERS, ids=str)
def test_compiled_and_numpy_are_the_same_bits(library, monkeypatch, options, shape, important):
    name, block, symmetric, scale_dtype = options
    rng = np.random.default_rng(1)
    weights = weights_of("heavy", shape)
    weights[0, 0] = 0
    importance = rng.exponential(size=shape[1]).astype(np.float32) if important else None
    given = {"symmetric": symmetric, "importance": importance}
    if scale_dtype is not None:
        given["scale_dtype"] = scale_dtype
    check_same(
        *both_ways(monkeypatch, lambda: formats.quantize_mse(named(name), weights, block, **given))
    )


@pytest.mark.parametrize("options", FOUR_BITS + OTHERS, ids=str)
def test_plain_rounding_too(library, monkeypatch, options):
    name, block, symmetric, scale_dtype = options
    weights = np.stack([weights_of("normal", (40, 72), seed) for seed in range(3)])
    weights[1] = 0
    given = {"symmetric": symmetric} | ({"scale_dtype": scale_dtype} if scale_dtype else {})
    check_same(*both_ways(monkeypatch, lambda: named(name).quantize(weights, block, **given)))


def hard_numbers(fmt) -> np.ndarray:
    """Each value, each middle between two, their neighbours, and extremes, as one row."""
    values = np.unique(fmt.values[np.isfinite(fmt.values)])
    exact = np.concatenate([values, (values[1:] + values[:-1]) / 2]).astype(np.float32)
    near = [np.nextafter(exact, np.float32(end)) for end in (-np.inf, np.inf)]
    extremes = np.float32([0, -0.0, 1e-45, -1e-45, 1e-20, -1e-20, 3e38, -3e38])
    return np.concatenate([exact, *near, extremes])[None]


@pytest.mark.parametrize("name", ["int2", "int4", "int8", "mxfp4", "fp8_e4m3", "nf4", "odd"])
def test_ties_and_extremes(library, monkeypatch, name):
    if name == "odd":  # no zero, values of equal magnitude, unsorted, one twice
        odd = np.float32([3, -3, 0.1, -0.1, 7, -7, 1e-3, -1e-3, 5, -5, 2, -2, 1e5, -1e5, 7, 6])
        fmt = codebook4.FORMAT.with_codebook(odd)
    else:
        fmt = named(name)
    numbers = hard_numbers(fmt)
    for scale in (1.0, -0.5, 3.0, 1e-30, 0.0):
        blocks = rounding.Blocks(numbers, 1, numbers.shape[1])
        scales = np.float32([[scale]])
        with np.errstate(over="ignore", invalid="ignore"):
            results = both_ways(
                monkeypatch,
                lambda b=blocks, s=scales: (b.codes(fmt, s, None), b.errors(fmt, s, None)),
            )
        monkeypatch.undo()
        for compiled, plain in zip(*results, strict=True):
            np.testing.assert_array_equal(compiled, plain)


def test_importance_moves_errors_to_where_they_matter_less():
    rng = np.random.default_rng(2)
    weights, importance = weights_of("normal", (64, 256)), rng.exponential(size=256) ** 4
    weighted = []
    for factors in (None, importance.astype(np.float32)):
        fmt = formats.get("int4")
        quantized = formats.quantize_mse(fmt, weights, 32, importance=factors)
        weighted.append((errors(fmt, weights, quantized, 32) * importance).sum())
    assert weighted[1] < 0.9 * weighted[0]


@pytest.mark.parametrize("wrong", [np.ones(31), -np.ones(32), np.full(32, np.nan)])
def test_wrong_importance(wrong):
    with pytest.raises(ValueError, match=r"importance must be \[32\], finite and not negative"):
        formats.quantize_mse(formats.get("int4"), np.ones((2, 32)), 32, importance=wrong)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"values": [0.0, 1.0, 2.0]}, "a value for each of"),
        ({"values": [0.0, float("nan")]}, "two finite values"),
        ({"width": 0}, "blocks are 1 x 0"),
        ({"scales": np.ones((2, 2), np.float32)}, r"scales must be \[2, 1\]"),
        ({"zeros": np.ones((1, 1), np.float32)}, r"zeros must be \[2, 1\]"),
        ({"importance": np.ones(3, np.float32)}, r"importance must be \[4\]"),
    ],
)
def test_wrong_arguments_of_the_compiled_functions(library, change, text):
    given = {
        "weights": np.ones((2, 4), np.float32),
        "values": [0.0, 1.0],
        "scales": np.ones((2, 1), np.float32),
        "zeros": None,
        "default_zero": 0.0,
        "height": 1,
        "width": 4,
        "importance": None,
    }
    with pytest.raises(ValueError, match=text):
        packing.native().rounding_errors(**given | change)
