"""docs/support.md is what the registry says."""

import platform
from pathlib import Path

import pytest

import qmoe_plugin
from qmoe_plugin import formats
from qmoe_plugin.library import native
from qmoe_plugin.tables import kernel_table, support_page

pytestmark = pytest.mark.usefixtures("library")

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "support.md"
CUDA_HEADING = "## CUDA kernels"


def page(kernels, names):
    """The page of these kernels and formats."""
    return support_page(kernels, [fmt for name, fmt in formats.FORMATS.items() if name in names])


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the page lists the kernels for x86-64")
def test_page_is_current():
    """With a CUDA build: python -m qmoe_plugin kernels --markdown > docs/support.md."""
    ours = {header.stem for header in (ROOT / "ops" / "formats").glob("*.h")}
    kernels = [kernel for kernel in qmoe_plugin.kernels() if kernel.format in ours]
    committed, generated = PAGE.read_text(), page(kernels, ours) + "\n"
    if not native().has_cuda():  # then only the part before the CUDA kernels can be compared
        committed, generated = (text.split(CUDA_HEADING)[0] for text in (committed, generated))
    assert generated == committed


def test_page_has_a_row_for_each_kernel():
    text = page(qmoe_plugin.kernels(), formats.FORMATS)
    for kernel in qmoe_plugin.kernels():
        assert f"| {kernel.name} | {kernel.format} |" in text


def test_page_has_a_row_for_each_format():
    text = page(qmoe_plugin.kernels(), formats.FORMATS)
    for row in native().formats():
        assert f"| {row['name']} | {row['bits']} |" in text


def test_table_marks_kernels_that_do_not_run_here(monkeypatch):
    monkeypatch.setenv("QMOE_PLUGIN_CPU_ISA", "reference")
    table = kernel_table(qmoe_plugin.kernels())
    marked = [line for line in table.splitlines() if line.endswith("(not on this CPU)")]
    unavailable = [kernel.name for kernel in qmoe_plugin.kernels() if not kernel.available]
    assert [line.split()[0] for line in marked] == unavailable
    assert all(" CPU " in line for line in marked)
