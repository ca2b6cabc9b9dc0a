"""The machine that bench_cpu.py runs on: its name, its rates, and what they allow a kernel."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import onnxruntime as ort
from cpu_cases import Case

from qmoe_plugin.kernels import Problem, ask

ROOT = Path(__file__).resolve().parents[2]
RATES_SOURCE = Path(__file__).with_name("cpu_rates.cc")
# The rate that bounds the arithmetic of a kernel: the first of these whose name is part of its own.
_ARITHMETIC = (
    ("amx_int8", "int8_amx"),
    ("amx", "bf16_amx"),
    ("avx512_bf16", "bf16_avx512"),
    ("avx512_vnni", "int8_avx512"),
    ("avxvnni", "int8_avxvnni"),
    ("avx512", "fma_avx512"),
    ("avx2_int8", "int8_avx2"),
    ("avx2", "fma_avx2"),
)


def cpu_name() -> str:
    info = Path("/proc/cpuinfo").read_text()
    found = dict(re.findall(r"^(model name|cpu family|model)\s*: (.*)$", info, re.MULTILINE))
    name = found.get("model name", platform.processor() or platform.machine())
    return f"{name} (family {found.get('cpu family')}, model {found.get('model')})"


def git_commit() -> str:
    """QMOE_PLUGIN_COMMIT if set (where there is no clone), or git's."""
    if given := os.environ.get("QMOE_PLUGIN_COMMIT"):
        return given

    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = git("rev-parse", "HEAD") or "unknown"
    return commit + ("-dirty" if git("status", "--porcelain", "--", "ops") else "")


def huge_pages() -> str:
    """Whether the system grants huge pages, as in "madvise"."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    found = re.search(r"\[(\w+)\]", setting.read_text()) if setting.exists() else None
    return found[1] if found else "unknown"


def measure_rates(threads: int, cpu_time: bool) -> dict[str, float]:
    """GB/s read from memory, and 10^9 operations a second of each instruction (cpu_rates.cc).

    Raises:
        SystemExit: If there is no C++ compiler, or the program fails.
    """
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        raise SystemExit("bench_cpu compiles a C++ program to measure the machine; install g++")
    with tempfile.TemporaryDirectory(prefix="cpu_rates_") as folder:
        program = Path(folder) / "cpu_rates"
        flags = ["-O2", "-std=c++20", "-pthread"]
        subprocess.run([compiler, *flags, RATES_SOURCE, "-o", program], check=True)
        clock = "cpu" if cpu_time else "wall"
        done = subprocess.run([program, str(threads), clock], capture_output=True, check=True)
    rates: dict[str, float] = json.loads(done.stdout)
    return rates


def our_kernel(case: Case, level: int, tokens: int) -> str:
    """The kernel that runs a case's matrix products for so many tokens."""
    name, (n, k) = list(case.projections.items())[-1]
    problem = Problem(
        stage="fc2" if name == "fc2" else "dense",
        format=case.format,
        n=n,
        k=k,
        rows=tokens * max(case.topk, 1),
        topk=max(case.topk, 1),
        experts=max(case.experts, 1),
        block_size=case.block_size,
        accuracy_level=level,
    )
    return str(ask(problem).kernel)


def floor_ms(
    case: Case, tokens: int, experts: float, kernel: str, rates: dict[str, float]
) -> tuple[float, str]:
    """The least time of a case by this machine's rates, and what bounds it: memory or arithmetic.

    Args:
        case: What is computed.
        tokens: Of a call.
        experts: That a call reads, on average.
        kernel: Its name says with which instructions it computes. One that rounds nothing may need
            several for each product, which the floor does not know.
        rates: As `measure_rates` returns them.
    """
    memory = case.packed_bytes(experts) / rates["read_gb_per_s"] / 1e6
    rate = next((rates[key] for part, key in _ARITHMETIC if part in kernel and key in rates), None)
    arithmetic = 0.0 if rate is None else case.flops(tokens) / rate / 1e6
    return (memory, "memory") if memory >= arithmetic else (arithmetic, "arithmetic")


def description() -> dict[str, str]:
    """What a file of results says about the machine and the software."""
    return {
        "machine": cpu_name(),
        "onnxruntime": ort.__version__,
        "commit": git_commit(),
        "huge_pages": huge_pages(),
    }
