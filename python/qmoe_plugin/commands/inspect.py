"""``inspect``: what a model holds, which kernels run it, and how fast that could be."""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from qmoe_plugin.inspection import Inspection, NodeView, inspect
from qmoe_plugin.tables import text_table
from qmoe_plugin.units import format_bytes, percent

if TYPE_CHECKING:
    from qmoe_plugin.commands import Commands


def add(commands: Commands) -> None:
    """Adds the verb to the parser."""
    command = commands.add_parser(
        "inspect", help="formats, layouts, bytes, kernels and least times of a model"
    )
    command.add_argument("model", type=Path, metavar="MODEL", help="ONNX model")
    command.add_argument(
        "--sm", type=int, help="compute capability, as in 90; 0 for the CPU (default: this machine)"
    )
    command.add_argument("--tokens", type=int, default=1, metavar="T", help="tokens in a run (1)")
    command.add_argument(
        "--bandwidth",
        type=float,
        metavar="GB/S",
        help="of the device's memory (default: that of a common GPU of this compute capability)",
    )
    command.add_argument(
        "--strict", action="store_true", help="fail if an expert is in float, or not run by us"
    )
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    found = inspect(options.model, sm=options.sm, tokens=options.tokens, gb_per_s=options.bandwidth)
    print(json.dumps(found.to_dict(), indent=2) if options.json else _text(found, options.verbose))
    if not options.strict:
        return 0
    problem = _problem(found)
    if problem:
        print(f"qmoe_plugin: {problem}", file=sys.stderr)
    return int(bool(problem))


def _problem(found: Inspection) -> str:
    """What --strict does not let pass; "" for nothing."""
    experts = found.experts
    if not found.nodes:
        return "the model has no node of our ops"
    if any(node.reason for node in found.nodes):
        return "there are nodes that our kernels do not run"
    if min(experts.quantized, experts.ours) < experts.total:
        return (
            f"of the experts' bytes {percent(experts.quantized, experts.total)} are quantised, "
            f"and {percent(experts.ours, experts.total)} are run by our kernels"
        )
    return ""


def _text(found: Inspection, verbose: bool) -> str:
    tokens = f"{found.tokens} token{'s' * (found.tokens != 1)}"
    rate = found.bandwidth or "no bandwidth is known, give --bandwidth for floors"
    lines = [found.model, f"on {found.target}, {tokens}; {rate}"]
    groups = _groups(found.nodes, verbose)
    if groups:
        rows = [_row(nodes) for nodes in groups]
        header = ("nodes", "op", "first", "weights", "layout", "bytes", "kernels", "floor us")
        lines += ["", *text_table(header, rows)]
    else:
        lines.append("no node of our ops")
    if found.nodes and found.floor_us is not None:
        lines.append(f"all these nodes: {found.floor_us:.1f} us at least, to read their weights")
    for nodes in groups:
        for text in (nodes[0].reason, nodes[0].warning):
            if text:
                others = f" and {len(nodes) - 1} more" if len(nodes) > 1 else ""
                lines.append(f"{nodes[0].op_type} '{nodes[0].name}'{others}: {text}")
    total = sum(found.bytes_by_format.values())
    rows = [
        (name, format_bytes(size), percent(size, total))
        for name, size in found.bytes_by_format.items()
    ]
    lines += ["", *text_table(("constants", "bytes", "share"), rows)]
    experts = found.experts
    if experts.total:
        lines.append(
            f"experts: {format_bytes(experts.total)}, "
            f"{percent(experts.quantized, experts.total)} quantised, "
            f"{percent(experts.ours, experts.total)} run by our kernels"
        )
    return "\n".join(lines)


def _groups(nodes: tuple[NodeView, ...], verbose: bool) -> list[list[NodeView]]:
    """Nodes that differ in nothing but their names."""
    groups = defaultdict(list)
    for index, node in enumerate(nodes):
        same = (node.op_type, node.domain, node.weights, node.layout, node.bytes, node.kernels)
        groups[(*same, node.reason, node.warning, index if verbose else 0)].append(node)
    return list(groups.values())


def _row(nodes: list[NodeView]) -> tuple[str, ...]:
    node = nodes[0]
    kernels = ", ".join(f"{choice.stage} {choice.kernel}" for choice in node.kernels)
    floor = "" if node.floor_us is None or node.reason else f"{node.floor_us:.2f}"
    return (
        str(len(nodes)),
        f"{node.domain}.{node.op_type}",
        node.name,
        "; ".join(node.weights),
        node.layout,
        format_bytes(node.bytes),
        kernels or "none, see below",
        floor,
    )
