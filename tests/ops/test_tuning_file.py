"""The file that QMOE_PLUGIN_TUNING names: sessions run what it prefers, or refuse it."""

from __future__ import annotations

import ctypes
import re

import pytest
from helpers.cases import QMoECase
from helpers.run import run_case
from helpers.tolerance import check

import qmoe_plugin

# None of them refuses few rows on any GPU.
KERNELS = ("gemv_sm80", "gemv_simt", "grouped_gemm_sm80", "grouped_gemm_dequant")
FORMATS = [pytest.param("int4", marks=pytest.mark.quick)]


@pytest.fixture
def header(device):
    """What a file for the GPU begins with; the ops of the CPU run on the emulated one, if any."""
    run_case(QMoECase("int4", dtype="float16"), device)  # which is there with the first session
    library = ctypes.CDLL(qmoe_plugin.get_library_path())
    library.qmoe_plugin_tuning_header.restype = ctypes.c_char_p
    found = library.qmoe_plugin_tuning_header(0).decode()
    if not found or (device == "cpu") != ("emulated" in found):
        pytest.skip("these ops run on no GPU")
    return found


def case_and_lines(fmt, kernel):
    case = QMoECase(fmt, hidden=64, inter=96, dtype="float16")
    lines = [
        f"{stage} {fmt} float16 experts {case.experts} topk {case.k} n {n} k {k} "
        f"block_size {case.block_size} zero_points 0 rows 1 99 kernel {kernel}\n"
        for stage, n, k in (("fc1", 2 * case.inter, case.hidden), ("fc2", case.hidden, case.inter))
    ]
    return case, "".join(lines)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_preferred(device, fmt, kernel, header, tmp_path, monkeypatch):
    case, lines = case_and_lines(fmt, kernel)
    path = tmp_path / "tuning.txt"
    path.write_text(header + lines)
    monkeypatch.setenv("QMOE_PLUGIN_TUNING", str(path))
    tensors, result = run_case(case, device)
    check(case, tensors, result)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("gemv_simt", "gemv_none"), "there is no CUDA kernel gemv_none"),
        (("device sm_", "device sm_1"), "line 2"),
        (("kernels ", "kernels 0"), "another build"),
        (("tuning 1", "tuning 9"), "line 1"),
        (("rows 1 99", "rows 99 1"), "line 4"),
    ],
)
def test_refused(device, fmt, change, message, header, tmp_path, monkeypatch):
    case, lines = case_and_lines(fmt, "gemv_simt")
    path = tmp_path / "tuning.txt"
    path.write_text((header + lines).replace(*change))
    monkeypatch.setenv("QMOE_PLUGIN_TUNING", str(path))
    with pytest.raises(Exception, match=f"{re.escape(str(path))}.*{message}.*qmoe_plugin tune"):
        run_case(case, device)
