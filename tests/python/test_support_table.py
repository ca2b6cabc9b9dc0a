"""docs/support.md is what the registry says."""

import platform
from pathlib import Path

import pytest

import qmoe_plugin
from qmoe_plugin.library import native
from qmoe_plugin.tables import kernel_table, support_page

pytestmark = pytest.mark.usefixtures("library")

PAGE = Path(__file__).parents[2] / "docs" / "support.md"
CUDA_HEADING = "## CUDA kernels"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the page lists the kernels for x86-64")
def test_page_is_current():
    """With a CUDA build: python -m qmoe_plugin kernels --markdown > docs/support.md."""
    committed, generated = PAGE.read_text(), support_page(qmoe_plugin.kernels()) + "\n"
    if not native().has_cuda():  # then only the part before the CUDA kernels can be compared
        committed, generated = (text.split(CUDA_HEADING)[0] for text in (committed, generated))
    assert generated == committed


def test_page_has_a_row_for_each_kernel():
    page = support_page(qmoe_plugin.kernels())
    for kernel in qmoe_plugin.kernels():
        assert f"| {kernel.name} | {kernel.format} |" in page


def test_page_has_a_row_for_each_format():
    page = support_page(qmoe_plugin.kernels())
    for row in native().formats():
        assert f"| {row['name']} | {row['bits']} |" in page


def test_table_marks_kernels_that_do_not_run_here(monkeypatch):
    monkeypatch.setenv("QMOE_PLUGIN_CPU_ISA", "reference")
    table = kernel_table(qmoe_plugin.kernels())
    marked = [line for line in table.splitlines() if line.endswith("(not on this CPU)")]
    unavailable = [kernel.name for kernel in qmoe_plugin.kernels() if not kernel.available]
    assert [line.split()[0] for line in marked] == unavailable
    assert all(" CPU " in line for line in marked)
