"""The CPU kernels against the stock ops of onnxruntime, on layers of real models.

    python ci/bench/bench_cpu.py [--quick] [--cases REGEX] [--levels 0 4] [--isa avx2]

Each case is one op with random weights in an external data file, as a model has them, once in
com.microsoft (formats that onnxruntime's CPU ops have: int4, int8) and once in our domain. Both
sessions live in one process, with the same options, on one thread pool, and take turns with the
same inputs; the routing changes every call, so that decode reads other experts each time, and a
MatMulNBits is taken out of the caches before each call of one token. Reported are medians, and the
error of one token against the float64 oracle (qmoe_plugin.reference), relative to the root mean
square of its output.

The floor of a cell is the larger of bytes / read bandwidth and operations / rate of the kernel's
instructions, both measured in the same run (cpu_rates.cc).

Each case runs at several accuracy_levels, the same ones for both ops: 0 is exact, 3 allows bfloat16
(stock ops have no such kernels and stay exact), 4 int8 activations. Stock 8-bit QMoE with blocks
rounds activations to int8 at every level, as its error column shows; the cases called "stock exact"
make it keep them (ORT_QMOE_CPU_QNBIT_GEMM=fp32), to compare like with like at level 0.

`--isa avx2` forbids our kernels everything above (QMOE_PLUGIN_CPU_ISA). The stock ops have no such
switch: they go on with all that the processor has.

Writes ci/bench/results/cpu-<machine>.json with a picture (.svg), and prints a table. `--quick`
takes about a minute; a run of everything can be cut into several by `--cases` and `--update`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import onnxruntime as ort
from cpu_cases import CASES, QUICK_CASES, Case
from cpu_machine import description, floor_ms, measure_rates, our_kernel
from cpu_models import Weights, error, exact, experts_read, make_feeds, save_model
from cpu_picture import picture
from cpu_timing import best_load, environment, time_in_turns

import qmoe_plugin

RESULTS = Path(__file__).resolve().parent / "results"
STOCK_DOMAIN = "com.microsoft"
STOCK_SWITCH = "ORT_QMOE_CPU_QNBIT_GEMM"
ISAS = (
    "reference", "avx2", "avxvnni", "avx512", "amx", "neon", "neon_dotprod", "neon_i8mm"
)  # fmt: skip
HEADER = (
    f"{'case':38} {'level':>5} {'tokens':>6} {'ours ms':>10} {'stock ms':>10} {'speedup':>8} "
    f"{'of floor':>8} {'our error':>10} {'stock err':>10}  kernel"
)


class Bench:
    """One run of the program."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.clock = time.thread_time if args.cpu_time else time.perf_counter
        self.rates = measure_rates(args.threads, args.cpu_time)

    def run_case(self, case: Case) -> list[dict[str, Any]]:
        """The case at each level."""
        with tempfile.TemporaryDirectory(prefix="bench_cpu_", dir=self.args.scratch) as name:
            weights = Weights(case, Path(name))
            levels = [level for level in self.args.levels if not (case.stock_exact and level)]
            return [self.run_level(case, weights, level) for level in levels]

    def run_level(self, case: Case, weights: Weights, level: int) -> dict[str, Any]:
        folder = weights.path.parent
        domains = (qmoe_plugin.DOMAIN, STOCK_DOMAIN) if case.has_stock else (qmoe_plugin.DOMAIN,)
        sessions, loads = {}, {}
        for domain in domains:
            path = folder / f"{domain}.onnx"
            save_model(case, weights, domain, level, path)
            name = "ours" if domain == qmoe_plugin.DOMAIN else "stock"
            with environment(STOCK_SWITCH, "fp32" if case.stock_exact else None):
                sessions[name], loads[name] = best_load(path, name == "ours")
        cells = []
        for tokens in self.args.tokens:
            kernel = our_kernel(case, level, tokens)
            cell = self.measure(case, weights, sessions, tokens, kernel)
            print(self.line(case, level, cell), flush=True)
            cells.append(cell)
        return {
            **case.described(),
            "accuracy_level": level,
            "load": loads,
            "cells": cells,
        }

    def measure(
        self,
        case: Case,
        weights: Weights,
        sessions: dict[str, ort.InferenceSession],
        tokens: int,
        kernel: str,
    ) -> dict[str, Any]:
        feeds = make_feeds(case, tokens, 8 if tokens > 64 else 32)
        cold = case.cold and tokens == 1
        found = time_in_turns(
            list(sessions.values()), feeds, self.args.budget, self.clock, cold=cold
        )
        expected = exact(case, weights, feeds[0])
        experts = experts_read(case, feeds)
        floor, bound = floor_ms(case, tokens, experts, kernel, self.rates)
        cell: dict[str, Any] = {
            "tokens": tokens,
            "kernel": kernel,
            **dict(zip(sessions, found, strict=True)),
        }
        ours = cell["ours"]["median_ms"]
        for name, session in sessions.items():
            cell[f"{name}_error"] = error(session.run(None, feeds[0])[0], expected)
        if "stock" in cell:
            cell["speedup"] = round(cell["stock"]["median_ms"] / ours, 3)
        return cell | {
            "cold": cold,
            "experts_read": round(experts, 2),
            "gb_per_s": round(case.packed_bytes(experts) / ours / 1e6, 2),
            "gflops": round(case.flops(tokens) / ours / 1e6, 1),
            "floor_ms": round(floor, 4),
            "bound": bound,
            "of_floor": round(floor / ours, 3),
        }

    def line(self, case: Case, level: int, cell: dict[str, Any]) -> str:
        stock = cell.get("stock", {}).get("median_ms", float("nan"))
        return (
            f"{case.name:38} {level:5} {cell['tokens']:6} {cell['ours']['median_ms']:10.3f} "
            f"{stock:10.3f} {cell.get('speedup', float('nan')):8.2f} {cell['of_floor']:8.0%} "
            f"{cell['ours_error']:10.1e} {cell.get('stock_error', float('nan')):10.1e}  "
            f"{cell['kernel']}"
        )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="three cases, less repetition")
    parser.add_argument("--cases", default="", help="only cases whose name matches this expression")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64, 512])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--levels", type=int, nargs="+", help="accuracy levels of both ops")
    parser.add_argument("--isa", choices=ISAS, help="our kernels' best")
    parser.add_argument("--budget", type=float, help="seconds of measuring a case and token count")
    parser.add_argument(
        "--cpu-time", action="store_true", help="one thread, by its CPU time: for busy machines"
    )
    parser.add_argument("--scratch", type=Path, help="folder for the models (about 1 GB)")
    parser.add_argument(
        "--update", action="store_true", help="keep the other cases that the result file has"
    )
    parser.add_argument("--output", type=Path, help="result file; - for none")
    args = parser.parse_args()
    if args.cpu_time:
        args.threads = 1
    if args.levels is None:
        args.levels = [0, 4] if args.quick else [0, 3, 4]
    if args.budget is None:
        args.budget = 1.0 if args.quick else 2.0
    return args


def result_path(machine: str, args: argparse.Namespace) -> Path:
    """Where results go: under the machine's name if no other is given."""
    kind = "-quick" * args.quick + (f"-{args.isa}" if args.isa else "")
    slug = re.sub(r"[^a-z0-9]+", "-", f"{machine} {args.threads}t".lower()).strip("-")
    return args.output or RESULTS / f"cpu-{slug}{kind}{'-cpu-time' * args.cpu_time}.json"


def earlier_cases(path: Path, result: dict[str, Any]) -> list[dict[str, Any]]:
    """The cases of an earlier file of results, none if there is no file.

    Raises:
        SystemExit: If it is of another machine, software or way of measuring than `result`.
    """
    if not path.exists():
        return []
    earlier = json.loads(path.read_text())
    for key in ("machine", "onnxruntime", "commit", "threads", "clock", "environment"):
        if earlier.get(key) != result[key]:
            raise SystemExit(
                f"bench_cpu: {path} cannot be updated: its {key} is {earlier.get(key)!r}, "
                f"now it is {result[key]!r}; leave out --update"
            )
    return list(earlier["cases"])


def merged(earlier: list[dict[str, Any]], measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All cases, as measured last, in the order of CASES."""
    order = [case.name for case in CASES]
    cases = {(case["name"], case["accuracy_level"]): case for case in [*earlier, *measured]}
    return [cases[key] for key in sorted(cases, key=lambda key: (order.index(key[0]), key[1]))]


def write(result: dict[str, Any], output: Path) -> None:
    """The results and their picture."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")
    output.with_suffix(".svg").write_text(picture(result))
    print(f"wrote {output} and its picture")


def main() -> int:
    args = arguments()
    if args.isa:
        os.environ["QMOE_PLUGIN_CPU_ISA"] = args.isa
    cases = [
        c for c in CASES[: QUICK_CASES if args.quick else None] if re.search(args.cases, c.name)
    ]
    if not cases:
        print(f"bench_cpu: no case matches '{args.cases}'", file=sys.stderr)
        return 1
    ort.set_global_thread_pool_sizes(args.threads, 1)
    result: dict[str, Any] = {
        **description(),
        "qmoe_plugin": qmoe_plugin.__version__,
        "threads": args.threads,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "clock": "CPU time of one thread" if args.cpu_time else "wall",
        "environment": {k: v for k, v in os.environ.items() if k.startswith(("ORT_", "QMOE_"))},
        "load_average_before": os.getloadavg()[0],
    }
    output = result_path(result["machine"], args)
    earlier = earlier_cases(output, result) if args.update else []
    bench = Bench(args)
    result["rates"] = bench.rates
    rates = ", ".join(f"{name} {rate:g}" for name, rate in bench.rates.items())
    print(f"{result['machine']}, {args.threads} threads, onnxruntime {ort.__version__}; {rates}")
    print(HEADER)
    result["cases"] = merged(earlier, [found for case in cases for found in bench.run_case(case)])
    result["load_average_after"] = os.getloadavg()[0]
    if str(output) != "-":
        write(result, output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
