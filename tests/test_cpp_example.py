"""examples/cpp: a CMake project that takes ours by FetchContent and runs models without Python."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from helpers import outside
from helpers.cases import Case, MatMulNBitsCase, QMoECase, feeds_of
from helpers.ort_c_api import library_path
from helpers.tolerance import check


@pytest.fixture(scope="module")
def program() -> Path:
    """The built example."""
    problem = outside.missing()
    if problem is not None:
        pytest.skip(problem)
    return outside.build() / "run_model"


@pytest.fixture(scope="module")
def onnxruntime_library() -> Path:
    """The C library inside the onnxruntime wheel."""
    path = library_path()
    if path is None:
        pytest.skip("this onnxruntime package has no libonnxruntime.so")
    return path


def numbers(shape: tuple[int, ...]) -> np.ndarray:
    """What main.cc fills an input with."""
    index = np.arange(np.prod(shape, dtype=int))
    values = (index * 37 % 100).astype(np.float32) / np.float32(100) - np.float32(0.5)
    return values.reshape(shape)


@pytest.mark.parametrize(
    "case",
    [QMoECase(router="equal"), MatMulNBitsCase(zero_points="packed")],
    ids=lambda c: c.op_type,
)
def test_example_runs_a_model(
    case: Case, program: Path, onnxruntime_library: Path, tmp_path: Path
) -> None:
    tensors = case.tensors()
    feeds = {name: numbers(tensor.shape) for name, tensor in feeds_of(tensors).items()}
    tensors |= feeds
    model = case.model(tensors)
    for graph_input in model.graph.input:
        for axis, dim in enumerate(graph_input.type.tensor_type.shape.dim):
            dim.dim_value = feeds[graph_input.name].shape[axis]
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())

    result = subprocess.run(
        [str(program), str(onnxruntime_library), str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert re.match(r"qmoe_plugin \d+\.\d+\.\d+ with \d+ kernels\n", result.stderr)
    printed = np.array(result.stdout.split(), dtype=np.float32)
    check(case, tensors, printed.reshape(case.expected(tensors).shape))


def test_example_reports_errors(program: Path, onnxruntime_library: Path, tmp_path: Path) -> None:
    case = MatMulNBitsCase()
    tensors = case.tensors()
    tensors["B"] = tensors["B"][:, :-1]
    path = tmp_path / "model.onnx"
    path.write_bytes(case.model(tensors).SerializeToString())
    result = subprocess.run(
        [str(program), str(onnxruntime_library), str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert "qmoe_plugin.MatMulNBits node 'node': B is uint8[48, 2, 16]" in result.stderr
