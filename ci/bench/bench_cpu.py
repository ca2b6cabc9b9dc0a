"""The CPU kernels against the stock ops of onnxruntime, on layers of real models.

    python ci/bench/bench_cpu.py [--quick] [--cases REGEX] [--levels 0 4] [--tokens 1 8]

Each case is one op with random weights in an external data file, as a model has them, once in
com.microsoft and once in our domain. Both sessions live in one process, with the same options, on
one thread pool, and take turns with the same inputs; the routing changes every call, so that decode
reads other experts each time. Reported are medians, and the error of one token against the float64
oracle (qmoe_plugin.reference), relative to the root mean square of its output.

Each case runs at several accuracy_levels, the same ones for both ops: 0 is exact, 3 allows bfloat16
(stock ops have no such kernels and stay exact), 4 int8 activations. Stock 8-bit QMoE with blocks
rounds activations to int8 at every level, as its error column shows; the cases called "stock exact"
make it keep them (ORT_QMOE_CPU_QNBIT_GEMM=fp32), to compare like with like at level 0.

Writes ci/bench/results/cpu-<machine>.json and prints a table. `--quick` takes about a minute.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

import qmoe_plugin
from qmoe_plugin import reference
from qmoe_plugin.kernels import Problem, ask

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).resolve().parent / "results"
STOCK_DOMAIN = "com.microsoft"
STOCK_SWITCH = "ORT_QMOE_CPU_QNBIT_GEMM"
POOL_SIZE = 1 << 24  # random codes that all weights are cut from, at random offsets


@dataclass(frozen=True)
class Case:
    """One op of one shape; `experts` 0 means MatMulNBits, K = hidden, N = inter."""

    name: str
    hidden: int
    inter: int
    experts: int = 0
    topk: int = 0
    bits: int = 4
    block_size: int = 32  # 0 = per channel
    bias: bool = False
    gpt_oss: bool = False  # alpha 1.702, beta 1, limit 7
    stock_exact: bool = False  # make the stock QMoE keep float32 activations

    @property
    def op(self) -> str:
        return "QMoE" if self.experts else "MatMulNBits"

    def flops(self, tokens: int) -> float:
        matrices = 3 * self.topk if self.experts else 1
        return 2.0 * tokens * matrices * self.hidden * self.inter


def moe(name: str, bits: int, block_size: int, stock_exact: bool = False) -> Case:
    label = f"{name} int{bits} {f'b{block_size}' if block_size else 'per channel'}"
    label += " (stock exact)" * stock_exact
    exact = {"stock_exact": stock_exact}
    if name == "gpt-oss-20b":
        return Case(label, 2880, 2880, 32, 4, bits, block_size, bias=True, gpt_oss=True, **exact)
    return Case(label, 2048, 768, 128, 8, bits, block_size, **exact)


CASES = [
    moe("gpt-oss-20b", 4, 32),
    moe("Qwen3-30B-A3B", 4, 32),
    Case("MatMulNBits int4 b32 4096x14336", 4096, 14336),
    moe("gpt-oss-20b", 8, 32),
    moe("Qwen3-30B-A3B", 8, 32),
    moe("gpt-oss-20b", 8, 32, stock_exact=True),
    moe("Qwen3-30B-A3B", 8, 32, stock_exact=True),
    moe("gpt-oss-20b", 4, 0),
    moe("Qwen3-30B-A3B", 4, 0),
    Case("MatMulNBits int8 b32 4096x14336", 4096, 14336, bits=8),
    Case("MatMulNBits int4 b32 2880x32 (router)", 2880, 32, bias=True),
]
QUICK_CASES = 3


class Weights:
    """Random tensors of one case, written to an external data file and mapped back."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case = case
        self.path = folder / "weights.bin"
        self.tensors: dict[str, np.ndarray[Any, Any]] = {}
        self.initializers: list[onnx.TensorProto] = []
        rng = np.random.default_rng(0)
        spread = 2.7 if case.bits == 4 else 40.0
        middle = 1 << (case.bits - 1)
        numbers = rng.normal(middle, spread, POOL_SIZE * 8 // case.bits)
        codes = np.clip(np.rint(numbers), 0, 2 * middle - 1).astype(np.uint8)
        self._pool: np.ndarray[Any, np.dtype[np.uint8]] = codes
        if case.bits == 4:
            self._pool = codes[0::2] | (codes[1::2] << np.uint8(4))
        self._rng = rng
        with self.path.open("wb") as file:
            self._file = file
            if case.experts:
                self._projection("fc1", 2 * case.inter, case.hidden)
                self._projection("fc2", case.hidden, case.inter)
            else:
                self._projection("b", case.inter, case.hidden)

    def _projection(self, name: str, n: int, k: int) -> None:
        case = self.case
        lead = (case.experts,) if case.experts else ()
        groups = k // case.block_size if case.block_size else 0
        if case.experts:
            shape = (*lead, n, k * case.bits // 8)
        else:
            shape = (n, groups, case.block_size * case.bits // 8)
        self._codes(f"{name}_codes", shape)
        # Scales as exporters make them: float16 numbers, stored in the activations' type.
        scale = np.float32(0.02 if case.bits == 4 else 0.0013)
        scales_shape = (*lead, n, groups) if groups else (*lead, n)
        scales = scale * (0.5 + self._rng.random(scales_shape, dtype=np.float32))
        self._add(f"{name}_scales", scales.astype(np.float16).astype(np.float32))
        if case.bias:
            self._add(f"{name}_bias", 0.1 * self._rng.standard_normal((*lead, n), dtype=np.float32))

    def _codes(self, name: str, shape: tuple[int, ...]) -> None:
        offset, total = self._align(), int(np.prod(shape))
        for start in range(0, total, POOL_SIZE // 2):
            first = int(self._rng.integers(POOL_SIZE // 2))
            self._file.write(self._pool[first : first + min(POOL_SIZE // 2, total - start)].data)
        self._file.flush()
        self._register(name, shape, np.dtype(np.uint8), TensorProto.UINT8, offset)

    def _add(self, name: str, array: np.ndarray[Any, Any]) -> None:
        offset = self._align()
        self._file.write(array.tobytes())
        self._file.flush()
        self._register(name, array.shape, array.dtype, TensorProto.FLOAT, offset)

    def _align(self) -> int:
        self._file.write(b"\0" * (-self._file.tell() % 4096))
        return self._file.tell()

    def _register(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        onnx_type: int,
        offset: int,
    ) -> None:
        self.tensors[name] = np.memmap(self.path, dtype, "r", offset, shape)
        tensor = TensorProto(name=name, data_type=onnx_type, dims=shape)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in {
            "location": self.path.name,
            "offset": offset,
            "length": self.tensors[name].nbytes,
        }.items():
            tensor.external_data.add(key=key, value=str(value))
        self.initializers.append(tensor)

    def projection(self, name: str, experts: np.ndarray[Any, Any]) -> reference.Projection:
        """A few experts' weights, as the oracle takes them."""
        bias = self.tensors.get(f"{name}_bias")
        return reference.Projection(
            self.tensors[f"{name}_codes"][experts],
            self.tensors[f"{name}_scales"][experts],
            bias=None if bias is None else bias[experts],
        )


def attributes(case: Case) -> dict[str, Any]:
    if not case.experts:
        return {"K": case.hidden, "N": case.inter, "bits": case.bits, "block_size": case.block_size}
    found: dict[str, Any] = {
        "k": case.topk,
        "activation_type": "swiglu",
        "swiglu_fusion": 1,
        "normalize_routing_weights": 1,
        "expert_weight_bits": case.bits,
    }
    if case.block_size:
        found["block_size"] = case.block_size
    if case.gpt_oss:
        found |= {"activation_alpha": 1.702, "activation_beta": 1.0, "swiglu_limit": 7.0}
    return found


def make_model(case: Case, weights: Weights, domain: str, accuracy_level: int, path: Path) -> None:
    def given(name: str) -> str:
        return name if name in weights.tensors else ""

    float_type = TensorProto.FLOAT
    inputs = [helper.make_tensor_value_info("x", float_type, ["T", case.hidden])]
    if case.experts:
        inputs.append(
            helper.make_tensor_value_info("router_probs", float_type, ["T", case.experts])
        )
        names = ["x", "router_probs"]
        for stage in ("fc1", "fc2"):
            names += [f"{stage}_codes", f"{stage}_scales", given(f"{stage}_bias")]
    else:
        names = ["x", "b_codes", "b_scales", "", "", given("b_bias")]
    while not names[-1]:
        names.pop()
    node = helper.make_node(
        case.op, names, ["y"], "node", domain=domain, accuracy_level=accuracy_level,
        **attributes(case),
    )  # fmt: skip
    columns = case.hidden if case.experts else case.inter
    output = helper.make_tensor_value_info("y", float_type, ["T", columns])
    graph = helper.make_graph([node], "bench", inputs, [output], weights.initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(domain, 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)


def open_session(path: Path, ours: bool) -> tuple[ort.InferenceSession, float]:
    options = ort.SessionOptions()
    options.use_per_session_threads = False  # one pool for both; two would fight for the cores
    if ours:
        options.register_custom_ops_library(qmoe_plugin.get_library_path())
    start = time.perf_counter()
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session, time.perf_counter() - start


def make_feeds(case: Case, tokens: int, count: int) -> list[dict[str, np.ndarray[Any, Any]]]:
    """Inputs of `count` calls, each with its own routing."""
    rng = np.random.default_rng(tokens)
    feeds = []
    for _ in range(count):
        feed = {"x": rng.standard_normal((tokens, case.hidden), dtype=np.float32)}
        if case.experts:
            feed["router_probs"] = rng.standard_normal((tokens, case.experts), dtype=np.float32)
        feeds.append(feed)
    return feeds


def exact(case: Case, weights: Weights, feed: dict[str, np.ndarray[Any, Any]]) -> Any:
    """The last token's output in float64. Only its own experts are dequantised."""
    x = feed["x"][-1:]
    if not case.experts:
        t = weights.tensors
        return reference.matmul_nbits(
            x, t["b_codes"], t["b_scales"], bias=t.get("b_bias"), **attributes(case)
        )
    logits = feed["router_probs"][-1:]
    chosen = np.sort(np.argsort(-logits[0], kind="stable")[: case.topk])
    # Factors are normalised over the chosen experts, so the others' logits play no role.
    return reference.qmoe(
        x,
        logits[:, chosen],
        weights.projection("fc1", chosen),
        weights.projection("fc2", chosen),
        **attributes(case),
    )


def error(output: np.ndarray[Any, Any], expected: Any) -> float:
    """Largest error of the last token, relative to the root mean square of its output."""
    return float(np.abs(output[-1:] - expected).max() / np.sqrt(np.mean(expected**2)))


def time_in_turns(
    sessions: list[ort.InferenceSession],
    feeds: list[dict[str, Any]],
    budget_s: float,
    clock: Callable[[], float],
) -> list[list[float]]:
    """Milliseconds of each session's calls; they take turns, who starts alternates."""
    times: list[list[float]] = [[] for _ in sessions]
    for session in sessions:
        session.run(None, feeds[0])
    start, call = time.perf_counter(), 0
    while call < 3 or (time.perf_counter() - start < budget_s and call < 200):
        order = range(len(sessions)) if call % 2 else range(len(sessions) - 1, -1, -1)
        for i in order:
            begin = clock()
            sessions[i].run(None, feeds[call % len(feeds)])
            times[i].append(1e3 * (clock() - begin))
        call += 1
    return times


def summary(times: list[float]) -> dict[str, float]:
    return {
        "median_ms": round(statistics.median(times), 4),
        "min_ms": round(min(times), 4),
        "calls": len(times),
    }


def run_case(
    case: Case, args: argparse.Namespace, report: Callable[[str], None]
) -> list[dict[str, Any]]:
    """The case at each level."""
    with tempfile.TemporaryDirectory(prefix="bench_cpu_", dir=args.scratch) as name:
        weights = Weights(case, Path(name))
        levels = [level for level in args.levels if not (case.stock_exact and level)]
        return [run_level(case, weights, level, args, report) for level in levels]


def run_level(
    case: Case,
    weights: Weights,
    level: int,
    args: argparse.Namespace,
    report: Callable[[str], None],
) -> dict[str, Any]:
    folder = weights.path.parent
    for domain in (STOCK_DOMAIN, qmoe_plugin.DOMAIN):
        make_model(case, weights, domain, level, folder / f"{domain}.onnx")
    if case.stock_exact:
        os.environ[STOCK_SWITCH] = "fp32"
    stock, stock_load = open_session(folder / f"{STOCK_DOMAIN}.onnx", ours=False)
    if case.stock_exact:
        del os.environ[STOCK_SWITCH]
    ours, ours_load = open_session(folder / f"{qmoe_plugin.DOMAIN}.onnx", ours=True)
    kernel = our_kernel(case, level)
    cells = []
    for tokens in args.tokens:
        feeds = make_feeds(case, tokens, 8 if tokens > 64 else 32)
        ours_ms, stock_ms = time_in_turns([ours, stock], feeds, args.budget, args.clock)
        expected = exact(case, weights, feeds[0])
        cell = {
            "tokens": tokens,
            "ours": summary(ours_ms),
            "stock": summary(stock_ms),
            "ours_error": error(ours.run(None, feeds[0])[0], expected),
            "stock_error": error(stock.run(None, feeds[0])[0], expected),
        }
        a, b = cell["ours"]["median_ms"], cell["stock"]["median_ms"]
        cell["speedup"] = round(b / a, 3)
        cell["ours_gflops"] = round(case.flops(tokens) / a / 1e6, 1)
        cells.append(cell)
        report(
            f"{case.name:38} {level:5} {tokens:6} {a:10.3f} {b:10.3f} {b / a:8.2f} "
            f"{cell['ours_gflops']:8.1f} {cell['ours_error']:10.1e} {cell['stock_error']:10.1e}  "
            f"{kernel}"
        )
    return {
        **asdict(case),
        "accuracy_level": level,
        "kernel": kernel,
        "load_s": {"ours": round(ours_load, 3), "stock": round(stock_load, 3)},
        "cells": cells,
    }


def cpu_name() -> str:
    info = Path("/proc/cpuinfo").read_text()
    found = dict(re.findall(r"^(model name|cpu family|model)\s*: (.*)$", info, re.MULTILINE))
    name = found.get("model name", platform.processor() or platform.machine())
    return f"{name} (family {found.get('cpu family')}, model {found.get('model')})"


def git_commit() -> str:
    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = git("rev-parse", "HEAD") or "unknown"
    return commit + ("-dirty" if git("status", "--porcelain", "--", "ops") else "")


def our_kernel(case: Case, level: int) -> str:
    """The kernel that runs a case's matrix products."""
    problem = Problem(
        stage="fc2" if case.experts else "dense",
        format=f"int{case.bits}",
        n=case.hidden if case.experts else case.inter,
        k=case.inter if case.experts else case.hidden,
        block_size=case.block_size,
        accuracy_level=level,
    )
    return str(ask(problem).kernel)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="three cases, less repetition")
    parser.add_argument("--cases", default="", help="only cases whose name matches this expression")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64, 512])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--levels", type=int, nargs="+", help="accuracy levels of both ops")
    parser.add_argument("--budget", type=float, help="seconds of measuring a case and token count")
    parser.add_argument(
        "--cpu-time", action="store_true", help="one thread, by its CPU time: for busy machines"
    )
    parser.add_argument("--scratch", type=Path, help="folder for the models (about 1 GB)")
    parser.add_argument("--output", type=Path, help="result file; - for none")
    args = parser.parse_args()
    args.clock = time.thread_time if args.cpu_time else time.perf_counter
    if args.cpu_time:
        args.threads = 1
    if args.levels is None:
        args.levels = [0, 4] if args.quick else [0, 3, 4]
    if args.budget is None:
        args.budget = 1.0 if args.quick else 6.0

    ort.set_global_thread_pool_sizes(args.threads, 1)
    cases = [
        c for c in CASES[: QUICK_CASES if args.quick else None] if re.search(args.cases, c.name)
    ]
    cpu = cpu_name()
    result = {
        "machine": cpu,
        "threads": args.threads,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "onnxruntime": ort.__version__,
        "qmoe_plugin": qmoe_plugin.__version__,
        "commit": git_commit(),
        "clock": "CPU time of one thread" if args.cpu_time else "wall",
        "environment": {k: v for k, v in os.environ.items() if k.startswith(("ORT_", "QMOE_"))},
        "load_average_before": os.getloadavg()[0],
    }
    print(f"{cpu}, {args.threads} threads, onnxruntime {ort.__version__}")
    print(
        f"{'case':38} {'level':>5} {'tokens':>6} {'ours ms':>10} {'stock ms':>10} {'speedup':>8} "
        f"{'GFLOP/s':>8} {'our error':>10} {'stock err':>10}  kernel"
    )
    result["cases"] = [
        found for case in cases for found in run_case(case, args, lambda s: print(s, flush=True))
    ]
    result["load_average_after"] = os.getloadavg()[0]
    slug = re.sub(r"[^a-z0-9]+", "-", f"{cpu} {args.threads}t".lower()).strip("-")
    suffix = "-quick" * args.quick + "-cpu-time" * args.cpu_time
    output = args.output or RESULTS / f"cpu-{slug}{suffix}.json"
    if str(output) != "-":
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=1) + "\n")
        print(f"wrote {output}")


if __name__ == "__main__":
    main()
