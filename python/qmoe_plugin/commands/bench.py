"""``bench``: times of a model with our kernels and with the stock ones."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from qmoe_plugin.bench import BenchReport, Times, bench
from qmoe_plugin.commands.inputs import add_inputs, wanted
from qmoe_plugin.tables import text_table

if TYPE_CHECKING:
    from qmoe_plugin.commands import Commands

_LONGEST = 10
"""Nodes that are printed without -v."""


def add(commands: Commands) -> None:
    """Adds the verb to the parser."""
    command = commands.add_parser(
        "bench", help="time a model and its nodes, with our kernels and with the stock ones"
    )
    command.add_argument("model", type=Path, metavar="MODEL", help="ONNX model")
    add_inputs(command)
    command.add_argument("--repeat", type=int, default=20, metavar="N", help="runs to time (20)")
    command.add_argument(
        "--threads", type=int, default=0, metavar="N", help="of a session (onnxruntime's default)"
    )
    command.add_argument("--cpu", action="store_true", help="run on the CPU even if there is a GPU")
    command.add_argument("--json", action="store_true", help="print the report as JSON")
    command.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    report = bench(
        options.model,
        inputs=wanted(options),
        repeat=options.repeat,
        threads=options.threads,
        cpu=options.cpu,
    )
    if options.json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        print(_text(report, len(report.nodes) if options.verbose else _LONGEST))
    return 0


def _text(report: BenchReport, count: int) -> str:
    """The report for people: of the nodes, those that take longest."""
    shapes = ", ".join(f"{name} {list(shape)}" for name, shape in report.shapes.items())
    lines = [f"{report.model} on {report.target}, median of {report.repeat} runs", shapes]
    if report.nodes:
        longest = sorted(report.nodes, key=lambda n: -max(n.ours_us or 0, n.stock_us or 0))[:count]
        rows = [
            (n.name, n.op_type, _us(n.ours_us), _us(n.stock_us), _ratio(n.ours_us, n.stock_us))
            for n in report.nodes
            if n in longest
        ]
        lines += ["", *text_table(("node", "op", "ours us", "stock us", "speedup"), rows)]
        if len(longest) < len(report.nodes):
            lines.append(f"... and {len(report.nodes) - len(longest)} shorter ones (-v)")
        lines.append(f"times of nodes: {report.nodes_timed}")
        if report.gaps:
            lines.append(report.gaps)
    totals = [
        _row("run, ms", report, lambda times: times.median_ms),
        _row("making the session, ms", report, lambda times: 1e3 * times.load_s),
    ]
    if report.ours.others_us is not None:
        totals.insert(0, _row("other nodes, us", report, lambda times: times.others_us))
    if report.nodes and not report.gaps:
        total = _row("nodes of our ops, us", report, lambda times: sum(times.nodes_us.values()))
        totals.insert(0, total)
    lines += ["", *text_table(("whole model", "ours", "stock", "speedup"), totals)]
    if report.stock_reason:
        lines.append(f"stock: {report.stock_reason}")
    return "\n".join(lines)


def _row(
    name: str, report: BenchReport, figure: Callable[[Times], float | None]
) -> tuple[str, str, str, str]:
    ours = figure(report.ours)
    stock = None if report.stock is None else figure(report.stock)
    return name, _figure(ours), _figure(stock), _ratio(ours, stock)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _us(time: float | None) -> str:
    return "-" if time is None else f"{time:.0f}"


def _ratio(ours: float | None, stock: float | None) -> str:
    return f"{stock / ours:.2f}" if ours and stock else ""
