"""Fixtures of all tests; options and markers are in pyproject.toml."""

from __future__ import annotations

import argparse
import os

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores; with a thread a core in each, their numpy takes twice the time. It
    # reads these when it is imported, hence before the imports below.
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")

from helpers import devices


def _part(text: str) -> slice:
    part, parts = map(int, text.split("/"))
    if not 1 <= part <= parts:
        raise argparse.ArgumentTypeError(f"{text}: I/N needs I from 1 to N")
    return slice(part - 1, None, parts)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--part", type=_part, default="1/1", help="I/N: every Nth test only, from the Ith on"
    )


FIRST = ("test_cpp_example", "test_extra_format", "test_quantize_big")
"""Modules with tests of half a minute: as the last ones, they would leave other workers idle."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in FIRST)
    items[:] = items[config.getoption("--part")]


@pytest.fixture(scope="session")
def library() -> str:
    """Path of the built library. Fails, rather than skips, where it is missing."""
    problem = devices.library_problem()
    if problem is not None:
        pytest.fail(problem, pytrace=False)
    import qmoe_plugin

    return qmoe_plugin.get_library_path()


@pytest.fixture(scope="session")
def cuda() -> None:
    """Skips unless tests can run on a GPU."""
    problem = devices.cuda_problem()
    if problem is not None:
        pytest.skip(f"no GPU: {problem}")


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, library: str) -> str:
    """First "cpu", then "cuda"; tests on a GPU that is not there skip and say what is missing."""
    if request.param == "cuda":
        request.getfixturevalue("cuda")
    return request.param
