"""``verify``: compares two models, or one with itself run by our kernels."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from qmoe_plugin.commands.inputs import add_inputs, wanted
from qmoe_plugin.errors import Error
from qmoe_plugin.tables import text_table
from qmoe_plugin.verify import NodeError, VerifyReport, verify

if TYPE_CHECKING:
    from qmoe_plugin.commands import Commands

_WORST = 10
"""Nodes that are printed without -v."""


_NODE_HEADER = ("node", "op", "cosine", "SQNR dB", "max", "SQNR dB so far", "max so far")
_OUTPUT_HEADER = ("output", "cosine", "SQNR dB", "max", "same top token")


def add(commands: Commands) -> None:
    """Adds the verb to the parser."""
    command = commands.add_parser(
        "verify", help="compare two models node by node and end to end, on the same inputs"
    )
    command.add_argument("first", type=Path, metavar="A", help="the model that is right")
    command.add_argument(
        "second", type=Path, nargs="?", metavar="B", help="the other; left out: A, by our kernels"
    )
    add_inputs(command)
    command.add_argument("--cpu", action="store_true", help="run on the CPU even if there is a GPU")
    bounds = command.add_argument_group("bounds (exit code 1 if one is missed)")
    bounds.add_argument("--min-sqnr", type=float, metavar="DB", help="of each node by itself")
    bounds.add_argument("--max-error", type=float, metavar="X", help="of any element of an output")
    bounds.add_argument(
        "--min-agreement", type=float, metavar="SHARE", help="of positions with the same top token"
    )
    command.add_argument("--json", action="store_true", help="print the report as JSON")
    command.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    report = verify(options.first, options.second, inputs=wanted(options), cpu=options.cpu)
    if options.json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        print(_text(report, len(report.nodes) if options.verbose else _WORST))
    missed = _missed(report, options)
    for text in missed:
        print(f"qmoe_plugin: {text}", file=sys.stderr)
    return int(bool(missed))


def _missed(report: VerifyReport, options: argparse.Namespace) -> list[str]:
    """The bounds that were missed."""
    missed = []
    if report.broken:
        missed.append("one of the models has NaN or infinity where the other has numbers")
    if options.min_sqnr is not None:
        if all(node.own is None for node in report.nodes):
            raise ValueError("--min-sqnr: no node could be compared by itself")
        low = [node for node in report.nodes if _own_sqnr(node) < options.min_sqnr]
        if low:
            worst = min(low, key=_own_sqnr)
            missed.append(
                f"{len(low)} nodes have an SQNR below {options.min_sqnr:g} dB; the lowest is "
                f"{_own_sqnr(worst):.1f} of '{worst.name}'"
            )
    if options.max_error is not None:
        if not report.outputs:
            raise ValueError("--max-error: the models have no float output in common")
        output = max(report.outputs, key=lambda output: output.error.max)
        if not output.error.max <= options.max_error:
            missed.append(
                f"output '{output.name}' is off by {output.error.max:.3g}; allowed are "
                f"{options.max_error:g}"
            )
    if options.min_agreement is not None:
        shares = [o.agreement for o in report.outputs if o.agreement is not None]
        if not shares:
            raise ValueError("--min-agreement: the models have no output 'logits' in common")
        if min(shares) < options.min_agreement:
            missed.append(
                f"{min(shares):.1%} of positions have the same top token; "
                f"{options.min_agreement:.1%} are wanted"
            )
    return missed


def _own_sqnr(node: NodeError) -> float:
    return math.inf if node.own is None else node.own.sqnr


def _text(report: VerifyReport, count: int) -> str:
    """The report for people: of the nodes, the worst so many."""
    lines = [f"{report.first}", f"against {report.second}", f"on {report.target}"]
    nodes = sorted(report.nodes, key=lambda node: min(_own_sqnr(node), node.total.sqnr))[:count]
    shown = [node for node in report.nodes if node in nodes]
    if shown:
        rows = [(node.name, node.ops, *_cells(node.own), *_cells(node.total)[1:]) for node in shown]
        lines += ["", *text_table(_NODE_HEADER, rows)]
    if len(shown) < len(report.nodes):
        lines.append(f"... and {len(report.nodes) - len(shown)} better ones (-v prints them)")
    if report.unmatched:
        lines.append(f"not compared by themselves: {', '.join(report.unmatched)}")
    outputs = [(o.name, *_cells(o.error), _share(o.agreement)) for o in report.outputs]
    return "\n".join([*lines, "", *text_table(_OUTPUT_HEADER, outputs)])


def _cells(error: Error | None) -> tuple[str, str, str]:
    if error is None:
        return "-", "-", "-"
    if error.broken:
        return "-", "-", f"{error.broken} NaN or infinite"
    sqnr = "equal" if error.sqnr == math.inf else f"{error.sqnr:.1f}"
    return f"{error.cosine:.6f}", sqnr, f"{error.max:.3g}"


def _share(agreement: float | None) -> str:
    return "" if agreement is None else f"{agreement:.1%}"
