"""MatMulNBits against the oracle: every format, block size, type, shape and option."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from helpers.cases import MatMulNBitsCase, feeds_of
from helpers.dtypes import FLOAT_DTYPES, UNIT_ROUNDOFF, numpy_dtype
from helpers.run import bits_of, open_session, run, run_case
from helpers.tolerance import FLOOR, check

from qmoe_plugin import formats

pytestmark = pytest.mark.usefixtures("library")

FORMATS = list(formats.FORMATS)
WITH_ZERO_POINTS = [name for name in FORMATS if formats.get(name).zero_points]
BLOCKS = [  # (format, block size) of all that there are
    (name, block_size)
    for name in FORMATS
    for block_size in (16, 32, 64, 128, 256)
    if formats.get(name).only_block_size in (None, block_size)
]
Case = MatMulNBitsCase


def verify(case: MatMulNBitsCase, device: str) -> None:
    """Within tolerance, without what the format does not have."""
    case = case.fitted()
    tensors, result = run_case(case, device)
    check(case, tensors, result)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize(("format_name", "block_size"), BLOCKS)
def test_block_sizes(format_name: str, block_size: int, dtype: str, device: str) -> None:
    for k in (2 * block_size, 5 * block_size // 2):  # whole blocks, and half a block at the end
        verify(Case(format_name, block_size, dtype, k=k), device)


@pytest.mark.parametrize("m", [1, 2, 3, 8, 17, 64, 130, 1000])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("format_name", FORMATS)
def test_rows(format_name: str, dtype: str, m: int, device: str) -> None:
    verify(Case(format_name, dtype=dtype, m=m, n=72, k=160), device)


@pytest.mark.parametrize("m", [33, 65, 96, 97, 128, 129, 2050])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("format_name", FORMATS)
def test_row_tiles(format_name: str, dtype: str, m: int, device: str) -> None:
    """Around the sizes of a tile; with the most rows a GPU has more tiles than multiprocessors."""
    verify(Case(format_name, dtype=dtype, m=m, n=1100, k=160), device)


SHAPES = [(1, 1), (1, 16), (2, 3), (7, 33), (17, 93), (31, 129), (33, 1000), (65, 255), (130, 300)]


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("format_name", FORMATS)
def test_any_shape(format_name: str, dtype: str, n: int, k: int, device: str) -> None:
    for m, block_size in itertools.product((1, 5), (16, 64)):
        verify(Case(format_name, block_size, dtype, m=m, n=n, k=k), device)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("block_size", [16, 32, 128])
@pytest.mark.parametrize("zero_points", ["packed", "bytes", "typed"])
@pytest.mark.parametrize("format_name", WITH_ZERO_POINTS)
def test_zero_points(
    format_name: str, zero_points: str, block_size: int, dtype: str, device: str
) -> None:
    k = 3 * block_size - 8  # an odd number of blocks: packed rows end in half a byte
    for m, flat in ((1, False), (9, True)):
        verify(
            Case(format_name, block_size, dtype, zero_points=zero_points, m=m, k=k, flat=flat),
            device,
        )


@pytest.mark.parametrize("scale_dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("format_name", FORMATS)
def test_scale_types(format_name: str, dtype: str, scale_dtype: str, device: str) -> None:
    for m in (1, 6):
        verify(Case(format_name, dtype=dtype, scale_dtype=scale_dtype, m=m), device)


@pytest.mark.parametrize("g_idx", ["shuffled", "uneven"])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("format_name", FORMATS)
def test_g_idx(format_name: str, dtype: str, g_idx: str, device: str) -> None:
    kinds = ["none", "packed", "typed"] if formats.get(format_name).zero_points else ["none"]
    for k, zero_points in itertools.product((96, 93), kinds):
        verify(Case(format_name, 16, dtype, g_idx=g_idx, k=k, zero_points=zero_points), device)


@pytest.mark.parametrize("m", [1, 2, 9, 40, 130])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_one_scale_for_all_weights(dtype: str, m: int, device: str) -> None:
    """block_size 0 of a format with square blocks: there is a global scale and no other."""
    for n, k, bias in ((48, 96, True), (7, 33, False), (300, 1000, True)):
        case = Case("fp8_e4m3", 0, dtype, m=m, n=n, k=k, bias=bias)
        assert "scales" not in case.tensors()
        verify(case, device)


OPTIONS = [
    Case(bias=False),
    Case(bias=False, m=130, n=130, k=256),
    Case(signs=False),
    Case(rank=1, m=1),
    Case(rank=3, m=6),
    Case(rank=3, m=1),
    Case(flat=True),
    Case(m=0),
    Case(m=0, rank=3),
    Case(format="int8", block_size=256, k=1000, n=9, zero_points="packed", flat=True),
    Case(block_size=1024, k=3000, n=24),  # blocks longer than any tile
    Case(block_size=4096, k=96),  # a block longer than the row
]


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("case", OPTIONS, ids=str)
def test_options(case: MatMulNBitsCase, dtype: str, device: str) -> None:
    verify(dataclasses.replace(case, dtype=dtype), device)


REAL_SHAPES = [
    Case(n=32, k=2880, m=1),  # router of gpt-oss-20b
    Case(n=128, k=2048, m=7),  # router of Qwen3-30B-A3B
    Case(n=5120, k=2880, m=1),  # its attention's q, k and v
    Case(n=2880, k=4096, m=40, block_size=64),
    Case(format="int8", n=4096, k=1024, m=3),
]


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("case", REAL_SHAPES, ids=str)
def test_real_shapes(case: MatMulNBitsCase, dtype: str, device: str) -> None:
    verify(dataclasses.replace(case, dtype=dtype), device)


@pytest.mark.parametrize("accuracy_level", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("format_name", FORMATS)
def test_accuracy_levels(format_name: str, dtype: str, accuracy_level: int, device: str) -> None:
    for m in (1, 20):
        verify(
            Case(format_name, dtype=dtype, accuracy_level=accuracy_level, m=m, n=64, k=256), device
        )


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("format_name", FORMATS)
def test_every_weight_is_where_it_belongs(format_name: str, dtype: str, device: str) -> None:
    """A = identity reads the weights back: a misplaced code cannot hide in a sum."""
    case = Case(format_name, 32, dtype, scale_dtype="float16", n=50, k=272, m=272, bias=False)
    case = case.fitted()
    tensors = case.tensors()
    if "global_scale" in tensors:
        tensors["global_scale"][:] = 0.125  # so that scales stay exact in 16 bits
    tensors["A"] = np.eye(272, dtype=numpy_dtype(dtype))
    result = run(open_session(case.model(tensors), device), feeds_of(tensors))
    weights = case.expected(tensors)
    allowed = 2 * UNIT_ROUNDOFF[dtype] * np.abs(weights) + FLOOR[dtype]
    wrong = np.abs(result.astype(np.float64) - weights) > allowed
    assert not wrong.any(), f"wrong at (k, n) = {np.argwhere(wrong)[:8].tolist()} ..."


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("format_name", FORMATS)
def test_same_bits_every_time(format_name: str, dtype: str, device: str) -> None:
    """Run to run, session to session, and whatever the number of threads."""
    case = Case(format_name, dtype=dtype, m=37, n=200, k=480).fitted()
    tensors = case.tensors()
    feeds = feeds_of(tensors)
    sessions = [open_session(case.model(tensors), device, threads=n) for n in (1, 2, 1)]
    results = {bits_of(run(session, feeds)) for session in sessions for _ in range(3)}
    assert len(results) == 1


def test_sizes_may_change_from_run_to_run(device: str) -> None:
    case = Case(n=40, k=96, dtype="float16")
    session = open_session(case.model(case.tensors()), device)
    for m in (3, 130, 1, 0, 17, 64, 2):
        resized = dataclasses.replace(case, m=m)
        tensors = resized.tensors()
        tensors = {**case.tensors(), "A": tensors["A"]}
        check(resized, tensors, run(session, feeds_of(tensors)))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_special_values_stay_in_their_row(dtype: str, device: str) -> None:
    """NaN and infinity in one row of A leave the other rows alone."""
    case = Case(dtype=dtype, m=9, n=40, k=96)
    tensors = case.tensors()
    clean = case.expected(tensors)
    a = tensors["A"].copy()
    a[2, 5], a[7, 90] = np.nan, np.inf
    result = run(open_session(case.model(tensors), device), {"A": a}).astype(np.float64)
    assert np.isnan(result[2]).all()
    assert not np.isfinite(result[7]).all()
    others = [0, 1, 3, 4, 5, 6, 8]
    np.testing.assert_allclose(result[others], clean[others], rtol=0.05, atol=0.05)
