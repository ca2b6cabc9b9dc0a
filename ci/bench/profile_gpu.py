"""What holds the kernels of one case, by Nsight Compute: bandwidth, issue slots, stalls.

    python ci/bench/profile_gpu.py "gpt-oss-20b int4$" 8 [--stock] [--output FILE.csv]

Runs the case (one of bench_gpu.py's) under ncu, without a CUDA graph, and prints a line for each
kernel of one node, and what ncu says of its stalls. ncu runs kernels one by one and with cold
caches, so times add up to more than a node takes. --output keeps all that ncu says.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from gpu_bench.cases import Case, select

SECTIONS = (
    "SpeedOfLight",
    "ComputeWorkloadAnalysis",
    "MemoryWorkloadAnalysis",
    "SchedulerStats",
    "WarpStateStats",
    "LaunchStats",
    "Occupancy",
)
COLUMNS = {  # ours: ncu's
    "time": "Duration",
    "DRAM %": "DRAM Throughput",
    "SM %": "Compute (SM) Throughput",
    "issue slots %": "Issue Slots Busy",
    "warps eligible": "Eligible Warps Per Scheduler",
    "cycles an issue": "Warp Cycles Per Issued Instruction",
    "registers": "Registers Per Thread",
    "occupancy %": "Achieved Occupancy",
}
STALLS = "Warp State Statistics"


def main(argv: Sequence[str] | None = None) -> int:
    """Profiles what the arguments name. Returns the exit code."""
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    made.add_argument("case", help="regular expression; the first case that it is found in")
    made.add_argument("tokens", type=int)
    made.add_argument("--stock", action="store_true", help="the stock op instead of ours")
    made.add_argument("--output", type=Path, help="file for all that ncu says")
    made.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)  # run by ncu
    arguments = made.parse_args(argv)
    try:
        case = select(arguments.case)[0]
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if arguments.inside:
        run_once(case, arguments.tokens, "stock" if arguments.stock else "ours")
        return 0
    program = find_ncu()
    if program is None:
        print("ncu (Nsight Compute) is not on the PATH", file=sys.stderr)
        return 2
    command = [
        program, "--csv", "--page", "details", "--profile-from-start", "off",
        "--clock-control", "none", *(word for name in SECTIONS for word in ("--section", name)),
        sys.executable, __file__, *(sys.argv[1:] if argv is None else argv), "--inside",
    ]  # fmt: skip
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if arguments.output is not None:
        arguments.output.write_text(done.stdout)
    if done.returncode != 0:
        print(done.stdout[-2000:], file=sys.stderr)
        return 1
    print(f"{case.name}, {arguments.tokens} tokens; {case.nodes()} nodes were run, one is shown")
    kernels = read(done.stdout.splitlines())
    for line in lines_of(kernels[: max(1, len(kernels) // case.nodes())]):
        print(line)
    return 0


def find_ncu() -> str | None:
    """On the PATH, or where its packages put it."""
    found = sorted(Path("/opt/nvidia/nsight-compute").glob("*/ncu"))
    return shutil.which("ncu") or (str(found[-1]) if found else None)


def run_once(case: Case, tokens: int, name: str) -> None:
    """Runs the case twice, the second time for the profiler."""
    import torch
    from gpu_bench.device import Cuda
    from gpu_bench.player import Inputs, Player, open_session
    from gpu_bench.weights import RandomFiles, build

    device = Cuda()
    with tempfile.TemporaryDirectory() as folder:
        session, _ = open_session(build(case, RandomFiles(Path(folder)))[name], device)
        player = Player(session, device, case, Inputs(device, case, tokens), graph=-1)
        player.run()
        device.synchronize()
        torch.cuda.profiler.start()
        player.run()
        device.synchronize()
        torch.cuda.profiler.stop()


def read(lines: Iterable[str]) -> list[dict[str, str]]:
    """A dict for each kernel launch: its name, the columns, and the advice on stalls.

    Args:
        lines: What ncu prints with --csv --page details; lines before the header are left out.
    """
    rows = list(lines)
    start = next((i for i, line in enumerate(rows) if line.startswith('"ID"')), len(rows))
    found: dict[str, dict[str, str]] = {}
    for row in csv.DictReader(rows[start:]):
        kernel = found.setdefault(row["ID"], {"kernel": row["Kernel Name"]})
        for column, metric in COLUMNS.items():
            if row["Metric Name"] == metric:
                unit = row["Metric Unit"] if column == "time" else ""
                kernel.setdefault(column, f"{row['Metric Value']} {unit}".strip())
        if row["Section Name"] == STALLS and row.get("Rule Description"):
            kernel.setdefault("stalls", row["Rule Description"])
    return list(found.values())


def lines_of(kernels: Sequence[dict[str, str]]) -> list[str]:
    """A table, and below each kernel what stalls it."""
    head = f"{'kernel':44} " + " ".join(f"{name:>15}" for name in COLUMNS)
    lines = [head]
    for kernel in kernels:
        values = " ".join(f"{kernel.get(name, '-'):>15}" for name in COLUMNS)
        lines.append(f"{kernel['kernel'][:44]:44} {values}")
        if "stalls" in kernel:
            lines.append(f"    {kernel['stalls']}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
