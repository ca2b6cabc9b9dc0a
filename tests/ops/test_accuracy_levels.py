"""accuracy_level on the CPU: which kernels it allows, and what their rounding does.

docs/semantics.md says what is rounded. That every kernel is right at every level, within the
tolerance of tests/helpers/tolerance.py, is tested where all levels are: test_qmoe.py,
test_matmul_nbits.py, test_kernels.py.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
import pytest
from helpers.cases import Case, MatMulNBitsCase, QMoECase, feeds_of
from helpers.run import bits_of, open_session, run
from helpers.tolerance import TOLERANCE_OF_LEVEL, error_scale

import qmoe_plugin
from qmoe_plugin import formats
from qmoe_plugin.kernels import Problem, ask

CASES: list[Case] = [
    QMoECase("int4", tokens=40, hidden=256, inter=192, experts=6, k=3),
    QMoECase("int8", tokens=40, hidden=256, inter=192, experts=6, k=3, zero_points=True),
    QMoECase("mxfp4", tokens=40, hidden=256, inter=192, experts=6, k=3),
    MatMulNBitsCase("int4", m=33, n=96, k=320, zero_points="packed"),
    MatMulNBitsCase("int8", m=9, n=96, k=320),
    MatMulNBitsCase("codebook4", m=33, n=96, k=320),
]
OUTLIERS = 30.0  # times larger than the rest: one channel in 64
# An outlier's block has steps as large as a neighbour, but the yardstick holds the outliers, too.
OUTLIER_TOLERANCE = {0: 5e-6, 3: TOLERANCE_OF_LEVEL[3], 4: 4 * TOLERANCE_OF_LEVEL[4]}

on_each_case = pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.op_type}-{c.format}")


def with_outliers(case: Case) -> tuple[Case, dict[str, np.ndarray]]:
    tensors = case.tensors()
    name = "A" if case.op_type == "MatMulNBits" else "input"
    tensors[name][..., 7::64] *= OUTLIERS
    return case, tensors


def at(case: Case, level: int, **changes: Any) -> Case:
    return dataclasses.replace(case, accuracy_level=level, **changes)


def relative_error(case: Case, tensors: dict[str, np.ndarray]) -> float:
    """The largest error of a result, in units of its yardstick."""
    result = run(open_session(case.model(tensors)), feeds_of(tensors))
    error = np.abs(result.astype(np.float64) - case.expected(tensors))
    return float((error / error_scale(case, tensors)).max())


def allow(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes it the highest instruction set, if there are kernels for it here."""
    kernels = [k for k in qmoe_plugin.kernels() if re.match(rf"gemm_{isa}[._]", k.name)]
    if not any(kernel.available for kernel in kernels):
        pytest.skip(f"no kernel for {isa} runs here")
    monkeypatch.setenv("QMOE_PLUGIN_CPU_ISA", isa)


@on_each_case
@pytest.mark.parametrize("isa", ["reference", "avx2", "avxvnni", "avx512", "amx"])
@pytest.mark.parametrize("level", [0, 3, 4])
def test_outlier_channels(
    case: Case, isa: str, level: int, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """int8 gets coarser where a channel is large; bfloat16 and the exact kernels do not."""
    allow(isa, monkeypatch)
    error = relative_error(*with_outliers(at(case, level)))
    assert error < OUTLIER_TOLERANCE[level]


@on_each_case
def test_levels_0_to_2_are_the_same_bits(case: Case, library: str) -> None:
    tensors = case.tensors()
    results = [
        bits_of(run(open_session(at(case, level).model(tensors)), feeds_of(tensors)))
        for level in (0, 1, 2)
    ]
    assert len(set(results)) == 1


@pytest.mark.parametrize("fc2_format", ["mxfp4", "codebook4"])
@pytest.mark.parametrize("level", [3, 4])
def test_wfp4afp8_says_itself_what_is_rounded(fc2_format: str, level: int, library: str) -> None:
    case = QMoECase("mxfp4", hidden=256, fc2_format=fc2_format, quant_type="wfp4afp8")
    tensors = case.tensors()
    exact, rounded = (
        bits_of(run(open_session(at(case, n).model(tensors)), feeds_of(tensors)))
        for n in (0, level)
    )
    assert exact == rounded


@on_each_case
@pytest.mark.parametrize("level", [3, 4])
def test_a_level_says_what_it_costs(case: Case, level: int, library: str) -> None:
    """Where another kernel runs than at level 0, it really rounds, and not more than it may."""
    tensors = case.tensors()
    exact, error = (relative_error(at(case, n), tensors) for n in (0, level))
    assert exact < 5e-6
    assert error < TOLERANCE_OF_LEVEL[level]
    if kernel_at(case.format, level) != kernel_at(case.format, 0):
        assert error > 10 * exact


@on_each_case
@pytest.mark.parametrize("isa", ["avx2", "avxvnni", "avx512", "amx"])
@pytest.mark.parametrize("level", [3, 4])
def test_same_bits_with_any_number_of_threads(
    case: Case, isa: str, level: int, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    allow(isa, monkeypatch)
    rows = {"tokens": 100} if case.op_type == "QMoE" else {"m": 100}
    case = at(case, level, **rows)
    tensors = case.tensors()
    feeds = feeds_of(tensors)
    sessions = [open_session(case.model(tensors), threads=n) for n in (1, 2, 3)]
    assert len({bits_of(run(s, feeds)) for s in sessions for _ in range(2)}) == 1


def test_int8_has_the_same_bits_on_all_instruction_sets(
    library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = MatMulNBitsCase("int4", m=9, n=96, k=320, zero_points="packed", accuracy_level=4)
    tensors = case.tensors()
    kernels, results = set(), set()
    for isa in ("avx2", "avxvnni", "avx512"):
        monkeypatch.setenv("QMOE_PLUGIN_CPU_ISA", isa)
        kernels.add(kernel_at("int4", 4))
        results.add(bits_of(run(open_session(case.model(tensors)), feeds_of(tensors))))
    if any("int8" not in kernel and "vnni" not in kernel for kernel in kernels):
        pytest.skip("this processor has no int8 kernel")
    assert len(results) == 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("level", [3, 4])
def test_what_is_not_finite_stays_in_its_row(value: float, level: int, library: str) -> None:
    case = MatMulNBitsCase("int4", m=3, n=80, k=96, accuracy_level=level)
    tensors = case.tensors()
    expected = case.expected(tensors)
    tensors["A"][1, 50] = value
    result = run(open_session(case.model(tensors)), feeds_of(tensors))
    assert not np.isfinite(result[1]).any()
    np.testing.assert_allclose(result[[0, 2]], expected[[0, 2]], rtol=0, atol=0.3)


def kernel_at(format_name: str, level: int, block_size: int = 32) -> str:
    fmt = formats.get(format_name)
    problem = Problem(
        stage="dense",
        format=format_name,
        n=64,
        k=256,
        block_size=fmt.only_block_size or block_size,
        accuracy_level=level,
    )
    answer = ask(problem)
    assert answer.kernel is not None
    return answer.kernel


def test_explain_names_the_level_that_a_kernel_needs(library: str) -> None:
    families = {k.name.split(".")[0] for k in qmoe_plugin.kernels() if k.device == "CPU"}
    if "gemm_avx512_vnni" not in families:
        pytest.skip("not an x86-64 build")
    problem = Problem(stage="dense", format="int4", n=64, k=64, block_size=32, accuracy_level=2)
    refusals = {v.kernel: v.refusal for v in ask(problem).verdicts}
    if not next(k.available for k in qmoe_plugin.kernels() if k.name == "gemm_avx2_int8.int4"):
        pytest.skip("this processor has no AVX2")
    assert "only accuracy_level 4 allows, not 2" in refusals["gemm_avx2_int8.int4"]
