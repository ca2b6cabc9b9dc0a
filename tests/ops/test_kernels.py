"""Every kernel of the registry, and a quick subset of everything (`pytest -m quick`).

Both enumerate the registries: a new format or kernel is tested without a change here.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import devices
from helpers.cases import Case, feeds_of
from helpers.kernel_check import cases_that_reach
from helpers.quick import quick_cases
from helpers.run import bits_of, open_session, run, run_case
from helpers.tolerance import allowed_error, check

import qmoe_plugin
from qmoe_plugin import formats
from qmoe_plugin.devices import Target, best_target
from qmoe_plugin.kernels import Kernel

TESTS = Path(__file__).parents[1]

ALL_FORMATS = [*formats.FORMATS, *formats.PLAIN_FORMATS]
QUICK_CASES = [case for name in ALL_FORMATS for case in quick_cases(name)]


def every_kernel() -> list[Kernel | None]:
    """The registry; [None] where there is no library, so that the test can say so."""
    return [None] if devices.library_problem() else list(qmoe_plugin.kernels())


@pytest.mark.quick
@pytest.mark.parametrize("case", QUICK_CASES, ids=lambda case: f"{case.op_type}-{case}")
def test_quick(case: Case, device: str) -> None:
    tensors, result = run_case(case, device)
    check(case, tensors, result)


def test_the_library_and_python_know_the_same_formats(library: str) -> None:
    compiled = {row["name"]: row for row in qmoe_plugin.library.native().formats()}
    assert compiled.keys() == formats.FORMATS.keys() | formats.PLAIN_FORMATS.keys()
    for name, bits in formats.PLAIN_FORMATS.items():
        assert (compiled[name]["bits"], compiled[name]["values"]) == (bits, [])
    for name, fmt in formats.FORMATS.items():
        row = compiled[name]
        assert (row["bits"], row["zero_points"]) == (fmt.bits, fmt.zero_points)
        assert row["default_zero_point"] == fmt.default_zero_point
        assert (row["scales"], row["square_blocks"]) == (fmt.scale_type, fmt.square_blocks)
        assert (row["block_size"] or None, row["codebook"]) == (fmt.only_block_size, fmt.codebook)
        np.testing.assert_array_equal(row["values"], fmt.values)  # NaN is equal to NaN here


def test_every_format_has_a_kernel_on_the_cpu(library: str) -> None:
    available = {k.format for k in qmoe_plugin.kernels() if k.device == "CPU" and k.available}
    assert available == set(ALL_FORMATS)


on_every_kernel = pytest.mark.parametrize(
    "kernel", every_kernel(), ids=lambda kernel: kernel.name if kernel else "no-library"
)


@on_every_kernel
def test_some_quick_case_reaches_every_kernel(kernel: Kernel | None, library: str) -> None:
    """On some GPU that it runs on; those of the CPU are run below."""
    assert kernel is not None
    if kernel.device == "CUDA":
        sms = [sm for sm in (80, 86, 89, 90, 100, 120) if kernel.min_sm <= sm <= kernel.max_sm]
        assert sms, "it runs on no GPU that we know"
        reached = [sm for sm in sms if cases_that_reach(kernel, Target("CUDA", sm))]
        assert reached, "no quick case runs this kernel: add one to helpers/quick.py"


@on_every_kernel
def test_every_kernel(kernel: Kernel | None, library: str, request: pytest.FixtureRequest) -> None:
    """Every quick case that runs it is right. CPU kernels run in a process of their own."""
    assert kernel is not None
    if kernel.device == "CPU":
        if not kernel.available:
            pytest.skip("this processor cannot run it")
        run_in_child(kernel.name, isa_of(kernel))
        return
    request.getfixturevalue("cuda")
    cases = cases_that_reach(kernel, best_target())
    if not cases:
        pytest.skip(f"{best_target()} runs other kernels for all quick cases")
    for case in cases:
        tensors, result = run_case(case, "cuda")
        check(case, tensors, result)


def isa_of(kernel: Kernel) -> str:
    """The instruction set in the kernel's name: avx2 of gemm_avx2.int4 and gemm_avx2_int8.int4."""
    found = re.fullmatch(r"[a-z]+_([a-z0-9]+)(_\w+)?\.\w+", kernel.name)
    assert found, f"{kernel.name} does not end in an instruction set"
    return found[1]


def run_in_child(kernel: str, isa: str) -> None:
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    child = subprocess.run(
        [sys.executable, "-m", "helpers.kernel_check", kernel],
        env={**os.environ, "PYTHONPATH": path, "QMOE_PLUGIN_CPU_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert child.returncode == 0, f"{child.stdout}\n{child.stderr}"


@pytest.mark.parametrize("format_name", ALL_FORMATS)
def test_a_token_does_not_depend_on_its_neighbours(format_name: str) -> None:
    """On the CPU, the result of a token is the same bits whatever else is in the batch.

    But on AMX, where few rows are not worth tiles and another kernel rounds otherwise.
    """
    tiles = any(k.name.startswith("gemm_amx.") and k.available for k in qmoe_plugin.kernels())
    for case in quick_cases(format_name):
        if case.op_type not in ("QMoE", "MoE") or case.tokens < 5 or case.rank != 2:
            continue
        tensors, together = run_case(case, "cpu")
        session = open_session(case.model(tensors))
        for token in (0, case.tokens - 1):
            alone = run(session, {k: v[token : token + 1] for k, v in feeds_of(tensors).items()})
            if tiles:
                scale = allowed_error(case, tensors)[token] * 2
                assert (np.abs(alone[0] - together[token].astype(np.float64)) <= scale).all()
            else:
                assert bits_of(alone[0]) == bits_of(together[token])
