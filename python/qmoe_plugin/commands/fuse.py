"""``fuse``: nodes that our ops can do at once become one."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import qmoe_plugin
from qmoe_plugin.commands.output import add_output, check_output
from qmoe_plugin.graph.fuse import PASSES
from qmoe_plugin.progress import Bar

if TYPE_CHECKING:
    from qmoe_plugin.commands import Commands


def add(commands: Commands) -> None:
    """Adds it to the parser."""
    command = commands.add_parser("fuse", help="fuse nodes into our ops")
    command.add_argument("input", type=Path, metavar="IN", help="ONNX model")
    add_output(command)
    command.add_argument(
        "--only",
        action="append",
        choices=PASSES,
        help="run this pass only; may be given again (default: all)",
    )
    command.add_argument("--json", action="store_true", help="print the reports as JSON")
    command.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    check_output(options)
    passes = options.only or PASSES
    with Bar("routers") as bar:
        reports = qmoe_plugin.fuse(
            options.input, options.output, passes=passes, dry_run=options.dry_run, progress=bar
        )
    if options.json:
        print(json.dumps([report.to_dict() for report in reports], indent=2))
    else:
        print("\n".join(map(str, reports)))
    if not any(report.fused for report in reports):
        print("qmoe_plugin: no node was fused", file=sys.stderr)
        return 1
    return 0
