"""The CUDA kernels against the stock ops of onnxruntime-gpu and Humming, on layers of real models.

    python ci/bench/bench_gpu.py [--quick] [--only REGEX] [--formats int4 ...] [--tokens 1 8 ...]

A model is a row of nodes of one op, at least 4, each with weights of its own. It runs with inputs
and outputs bound on the device, by our op, by the stock one (same weights, inputs and session
settings), and with --humming by the kernels of that package (same codes and routing; router, top-k,
sorting and biases are left out of its times, they are in ours). A time is that of one whole node,
router logits in, output out:

    in a CUDA graph   from device events around each replay, after the cache was flushed by reading
    without one       from events around each run, the host launching run after run

Each run has another routing. The floor is the larger of bytes / copy bandwidth and operations /
dense matrix rate, both measured in the same process; bytes are those of the experts that these
routings choose. Results are merged by cell into ci/bench/results/gpu-<device>.json, written after
each cell, so that several short runs fill it: --resume skips what this commit has, --budget stops
before the time is up. `python ci/pages.py` makes tables and a picture of it.

Needs PyTorch. --device cpu tries the program with small layers on a CPU.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Sequence
from datetime import UTC, datetime
from pathlib import Path

import onnxruntime as ort
from gpu_bench.cases import CASES, EAGER_TOKENS, FORMATS, Case, select, tokens_of
from gpu_bench.device import Device, open_device
from gpu_bench.humming_setup import Compiling, compile_ahead, find
from gpu_bench.measure import FULL, QUICK, CaseBench
from gpu_bench.results import Cell, Results, of_floor, time_of
from gpu_bench.targets import DEVICE, verdicts
from gpu_bench.weights import RandomFiles

import qmoe_plugin

RESULTS = Path(__file__).resolve().parent / "results"
MEMORY_FOLDER = Path("/dev/shm")  # files there are memory at once
FILES_BYTES = 4 << 30  # that the random files of the largest cases take, roughly


class Budget:
    """The time that the program may take."""

    def __init__(self, seconds: float | None) -> None:
        """Starts now.

        Args:
            seconds: How much there is; None for no end.
        """
        self._started, self._seconds = time.monotonic(), seconds
        self.spent = False

    def elapsed(self) -> float:
        return time.monotonic() - self._started

    def allows(self, seconds: float) -> bool:
        """Whether so much is left. Once it is not, nothing is allowed any more."""
        if self._seconds is not None and self.elapsed() + seconds > self._seconds:
            self.spent = True
        return not self.spent


class Bench:
    """Measures cases and puts their cells into a file."""

    def __init__(self, arguments: argparse.Namespace, device: Device, budget: Budget) -> None:
        """Measures the limits and reads the file of results."""
        self._arguments, self._device, self._budget = arguments, device, budget
        self._limits = device.limits()
        self._about = {
            **device.about(),
            "onnxruntime": ort.__version__,
            "qmoe_plugin": qmoe_plugin.__version__,
            "commit": arguments.commit,
            "date": _now(),
            "limits": self._limits,
        }
        slug = re.sub(r"[^a-z0-9]+", "-", device.name.lower()).strip("-")
        path = arguments.output or RESULTS / f"gpu-{slug}.json"
        self.results = Results(path, self._about)
        self._effort = QUICK if arguments.quick else FULL
        self._slowest_start = 3.0  # seconds, of a case
        print({name: f"{value:.3e}" for name, value in self._limits.items()}, flush=True)

    def modes(self, tokens: int) -> tuple[bool, ...]:
        """Whether to measure in a CUDA graph (True), and whether also without (False)."""
        options = self._arguments
        graph_only = options.quick or options.graph_only
        return (True, False) if tokens in EAGER_TOKENS and not graph_only else (True,)

    def missing(self, case: Case, contestants: Sequence[str], graph_only: bool) -> list[int]:
        """The numbers of tokens that are to be measured."""
        wanted = tokens_of(case, self._arguments.tokens, self._arguments.quick)
        if not self._arguments.resume:
            return list(wanted)
        commit = self._about["commit"]
        return [
            tokens
            for tokens in wanted
            if not all(
                self.results.has((case.name, tokens, graph), commit, contestants)
                for graph in ((True,) if graph_only else self.modes(tokens))
            )
        ]

    def run(self, case: Case, files: RandomFiles) -> None:
        """Measures the cells of a case that are missing, as far as time allows."""
        contestants = ("ours",) if self._arguments.no_stock else ("ours", "stock")
        todo = self.missing(case, contestants, graph_only=False)
        if not todo or not self._budget.allows(1.5 * self._slowest_start):
            return
        started = time.monotonic()
        small = case.shrunk() if self._device.kind == "cpu" else case
        bench = CaseBench(self._device, small, files, self._limits, self._effort, contestants)
        for name, reason in bench.refusals().items():
            print(f"{case.name}: {name} refuses: {reason}", flush=True)
        start = time.monotonic() - started
        self._slowest_start = max(self._slowest_start, start)
        print(f"{case.name}: ready after {start:.1f} s (files {bench.build_s:.1f} s)", flush=True)
        last = 1.0
        for tokens in todo:
            if not self._budget.allows(2 * last):
                break
            began = time.monotonic()
            for cell in bench.cells(tokens, self.modes(tokens)):
                stamp = {key: self._about[key] for key in ("onnxruntime", "commit", "limits")}
                self.results.add({**cell, **stamp, "date": _now()})
                print(line_of(cell), flush=True)
            self.results.write()
            last = time.monotonic() - began
        bench.close()

    def run_humming(self, cases: Sequence[Case], files: RandomFiles) -> None:
        """Adds the peer's times to cells that are there."""
        from gpu_bench.humming_peer import Peer, takes

        peer = Peer(self._device, files, self._effort)
        for case in cases:
            if not takes(case):
                continue
            for tokens in self.missing(case, ("humming",), graph_only=True):
                key = (case.name, tokens, True)
                if not self._budget.allows(10.0):
                    return
                numbers = peer.measure(case, tokens)
                stamp = {"commit": self._about["commit"], "date": _now()}
                if self.results.add_contestant(key, "humming", {**numbers, **stamp}):
                    self.results.write()
                print(f"{case.name} {tokens} tokens, Humming: {numbers}", flush=True)


def line_of(cell: Cell) -> str:
    """A cell in a line."""
    mode = "graph" if cell["graph"] else "eager"
    text = f"{cell['case']:40} {cell['tokens']:5} {mode}  floor {cell['floor_us']:8.1f}"
    ours, share = time_of(cell, "ours"), of_floor(cell, "ours")
    if ours is None or share is None:
        return f"{text}  ours: {cell['ours'].get('refusal')}"
    text += f"  ours {ours:8.1f} ({100 * share:3.0f} %, p95 {cell['ours']['p95_us']:.1f})"
    if not cell["ours"]["same_bits"]:
        text += " OTHER BITS IN ANOTHER RUN"
    stock = time_of(cell, "stock")
    if stock is not None:
        text += f"  stock {stock:8.1f} ({stock / ours:.2f}x)"
    if "difference_rms" in cell:
        text += f"  difference {cell['difference_rms']:.1e}"
    return f"{text}  {' '.join(cell['kernels'])}"


def print_misses(cells: Sequence[Cell], names: Collection[str]) -> None:
    """A line for each target or rule that one of these cases misses."""
    found = [verdict for verdict in verdicts(cells) if verdict.case in names]
    print(f"{sum(v.met for v in found)} of {len(found)} targets and rules are met; missed are")
    for v in found:
        if not v.met:
            print(f"  {v.case} {v.tokens} tokens: {v.ours_us:.1f} > {v.limit_us:.1f}, {v.rule}")


def scratch_folder() -> Path | None:
    """Where the random files go: into memory, if there is room; None for the usual place."""
    if MEMORY_FOLDER.is_dir() and shutil.disk_usage(MEMORY_FOLDER).free > 2 * FILES_BYTES:
        return MEMORY_FOLDER
    return None


def _commit() -> str:
    """That of the tree: as the environment says, or git; "" if nobody does."""
    if given := os.environ.get("QMOE_PLUGIN_COMMIT"):
        return given
    if shutil.which("git") is None:
        return ""
    command = ["git", "-C", str(RESULTS.parent), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _start_humming(arguments: argparse.Namespace, cases: Sequence[Case]) -> Compiling | None:
    """Starts to compile the peer's kernels; None if it is not wanted, or not there, with a line."""
    if not arguments.humming and not arguments.humming_only:
        return None
    try:
        find(arguments.humming_wheel)
    except (ImportError, OSError, RuntimeError) as error:
        print(f"Humming is left out: {error}", file=sys.stderr, flush=True)
        return None
    jobs = [(case, tokens_of(case, arguments.tokens, arguments.quick)) for case in cases]
    return compile_ahead(jobs)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="Cases: " + "; ".join(case.name for case in CASES if case.listed),
    )
    made.add_argument("--quick", action="store_true", help="few cases, graph only, few runs")
    made.add_argument("--only", default="", metavar="REGEX", help="cases whose name it is found in")
    made.add_argument("--formats", nargs="+", default=[], choices=list(FORMATS))
    made.add_argument("--tokens", type=int, nargs="+", default=[])
    made.add_argument("--graph-only", action="store_true", help="no runs without a CUDA graph")
    made.add_argument("--no-stock", action="store_true", help="only ours; cells keep the other's")
    made.add_argument("--humming", action="store_true", help="measure the peer, too")
    made.add_argument(
        "--humming-only", action="store_true", help="nothing but the peer, for cells that are there"
    )
    made.add_argument("--humming-wheel", type=Path, help="its wheel; by default one in .gpu/")
    made.add_argument("--resume", action="store_true", help="skip what was measured at this commit")
    made.add_argument("--budget", type=float, metavar="SECONDS", help="stop before they are over")
    made.add_argument("--output", type=Path, help="file of results")
    made.add_argument("--commit", help="of the tree; by default QMOE_PLUGIN_COMMIT, or git's")
    made.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Measures what the arguments name. Returns the exit code."""
    arguments = parser().parse_args(argv)
    budget = Budget(arguments.budget)
    try:
        cases = select(arguments.only, arguments.formats, arguments.quick)
    except (ValueError, re.error) as error:
        print(f"--only, --formats: {error}", file=sys.stderr)
        return 2
    if any(tokens < 1 for tokens in arguments.tokens):
        print("--tokens: at least 1 is needed", file=sys.stderr)
        return 2
    if arguments.device == "cpu" and arguments.output is None:
        print("--device cpu only tries the program: name a file with --output", file=sys.stderr)
        return 2
    arguments.commit = arguments.commit or _commit()
    if arguments.resume and not arguments.commit:
        print("--resume: name the commit of the tree with --commit", file=sys.stderr)
        return 2
    compiling = _start_humming(arguments, cases)
    if arguments.humming_only and compiling is None:
        return 1
    try:
        bench = Bench(arguments, open_device(arguments.device), budget)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="bench_gpu_", dir=scratch_folder()) as folder:
        files = RandomFiles(Path(folder))
        for case in () if arguments.humming_only else cases:
            bench.run(case, files)
        if compiling is not None:
            bench.run_humming(cases, files)
            compiling.stop()
    if bench.results.device == DEVICE:
        print_misses(bench.results.cells(), {case.name for case in cases})
    if budget.spent:
        print(f"stopped after {budget.elapsed():.0f} s: --resume goes on", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
