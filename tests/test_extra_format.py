"""examples/extra_format: formats from outside the tree, one C++ header and one Python file each.

Nothing else is written for them, the tests neither: those of this folder are run, in a process that
has the formats, for all that they enumerate.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import outside

FORMATS = ("e3m4", "log4")
TESTS = (
    "tests/ops/test_kernels.py",  # the registries, every kernel, the quick cases
    "tests/ops/test_qmoe.py",
    "tests/ops/test_matmul_nbits.py",
    "tests/python_formats/test_formats.py",  # quantising, and its compiled twin
    "tests/python/test_support_table.py",
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with our package, built with the extra formats, and the package that brings them."""
    problem = outside.missing()
    if problem is not None:
        pytest.skip(problem)
    outside.build()
    folder = tmp_path_factory.mktemp("site")
    outside.install_package(folder)
    outside.install_extra_formats(folder)
    return folder


def python(site: Path, *arguments: str) -> str:
    """What a Python with that folder prints; it must succeed."""
    path = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "error::RuntimeWarning"}
    environment.pop("QMOE_PLUGIN_LIBRARY", None)
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=outside.ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    return result.stdout


def test_the_tests_of_every_format_are_those_of_the_new_ones(site: Path) -> None:
    chosen = " or ".join((*FORMATS, "same_formats", "support_table"))
    printed = python(
        site,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        *TESTS,
        "-k",
        f"({chosen}) and not cuda",
    )
    passed = int(printed.split(" passed")[0].split()[-1])
    assert passed > 150, printed


def test_the_tables_show_them(site: Path) -> None:
    page = python(site, "-m", "qmoe_plugin", "kernels", "--markdown")
    assert "| e3m4 | 8 | no | 0 | float32, float16, bfloat16 | any size, or one a row |" in page
    assert "| log4 | 4 | no | 0 | float8e8m0 and a global scale | 32 |" in page
    for name in FORMATS:
        assert f"| gemm_reference.{name} | {name} | CPU |" in page


def test_the_tutorial_shows_the_example() -> None:
    """docs/adding-a-format.md: code of the example is in it as it is."""
    text = (outside.ROOT / "docs" / "adding-a-format.md").read_text()
    files = sorted(outside.EXTRA_FORMATS.glob("*/*.*"))
    code = "".join(path.read_text() for path in (*files, outside.EXTRA_FORMATS / "pyproject.toml"))
    shown = re.findall(r"```(cpp|toml|python)\n(.*?)```", text, re.DOTALL)
    examples = [block for _, block in shown if "codebook4" not in block and "fmt =" not in block]
    assert len(examples) == 4
    for block in examples:
        assert block in code, block


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (None, "names .*/formats, in which there is no header"),
        ("int4.h", "int4.h: there is a format called int4 already"),
    ],
)
def test_cmake_refuses_folders_that_bring_nothing_new(
    header: str | None, message: str, tmp_path: Path
) -> None:
    problem = outside.missing()
    if problem is not None:
        pytest.skip(problem)
    folder = tmp_path / "formats"
    folder.mkdir()
    if header is not None:
        (folder / header).touch()
    command = [
        *(outside.tool("cmake"), "-S", str(outside.ROOT), "-B", str(tmp_path / "build")),
        "-DQMOE_PLUGIN_CUDA=OFF",
        f"-DQMOE_PLUGIN_EXTRA_FORMATS={folder}",
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert re.search(message, " ".join(result.stderr.split()))


def test_a_model_is_quantised_and_run(site: Path) -> None:
    """What a user of such a format writes."""
    code = """
import numpy as np
from onnx import TensorProto, helper, numpy_helper
import qmoe_plugin

fmt = qmoe_plugin.formats.get("e3m4")
weights = np.random.default_rng(0).standard_normal((24, 64)).astype(np.float32)
quantized = fmt.quantize(weights, 32)
attributes = {"K": 64, "N": 24, "block_size": 32, **fmt.matmul_nbits_attributes}
inputs = ["x", "B", "scales"]
node = helper.make_node("MatMulNBits", inputs, ["y"], domain="qmoe_plugin", **attributes)
value = lambda name, k: helper.make_tensor_value_info(name, TensorProto.FLOAT, ["m", k])
constants = {"B": quantized.codes.reshape(24, 2, 32), "scales": quantized.scales}
graph = helper.make_graph([node], "g", [value("x", 64)], [value("y", 24)],
    [numpy_helper.from_array(array, name) for name, array in constants.items()])
opsets = [helper.make_opsetid("", 21), helper.make_opsetid("qmoe_plugin", 1)]
model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
session = qmoe_plugin.session(model, ["CPUExecutionProvider"])
x = np.eye(64, dtype=np.float32)
decoded = fmt.dequantize(quantized.codes, quantized.scales, k=64, block_size=32)
(y,) = session.run(None, {"x": x})
np.testing.assert_allclose(y.T, decoded, rtol=1e-6)
print(np.abs(y.T - weights).max() / np.abs(weights).max())
"""
    assert float(python(site, "-c", code)) < 0.03
