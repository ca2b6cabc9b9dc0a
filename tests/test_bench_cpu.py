"""The CPU benchmark runs, says what it should, and refuses what makes no sense."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = [
    pytest.mark.usefixtures("library"),
    pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="no C++ compiler"),
]


def bench(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "ci" / "bench" / "bench_cpu.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def small(output: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return bench(
        "--cases", "router", "--tokens", 1, "--budget", 0.1, "--cpu-time", "--output", output,
        *arguments,
    )  # fmt: skip


def test_results_and_picture(tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    done = small(output, "--levels", 0)
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    assert result["rates"]["read_gb_per_s"] > 0
    (case,) = result["cases"]
    (cell,) = case["cells"]
    assert case["load"]["ours"]["cpu_s"] >= 0
    assert cell["ours_error"] < 1e-5
    assert cell["speedup"] == pytest.approx(
        cell["stock"]["median_ms"] / cell["ours"]["median_ms"], abs=1e-3
    )
    assert cell["of_floor"] == pytest.approx(cell["floor_ms"] / cell["ours"]["median_ms"], abs=0.01)
    assert output.with_suffix(".svg").read_text().startswith("<svg")

    done = small(output, "--levels", 4, "--update")
    assert done.returncode == 0, done.stderr
    levels = [case["accuracy_level"] for case in json.loads(output.read_text())["cases"]]
    assert levels == [0, 4]

    output.write_text(json.dumps(result | {"machine": "another"}))
    done = small(output, "--levels", 4, "--update")
    assert done.returncode != 0
    assert "its machine is 'another'" in done.stderr
    assert json.loads(output.read_text())["machine"] == "another"


def test_no_such_case() -> None:
    done = bench("--cases", "no such layer")
    assert done.returncode == 1
    assert "no case matches 'no such layer'" in done.stderr
