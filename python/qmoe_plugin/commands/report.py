"""``report``: one HTML page on a model, with pictures."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from qmoe_plugin.commands.inputs import add_inputs, wanted
from qmoe_plugin.commands.output import add_output, check_output
from qmoe_plugin.graph.apply import write
from qmoe_plugin.html_report import make_page

if TYPE_CHECKING:
    from qmoe_plugin.commands import Commands


def add(commands: Commands) -> None:
    """Adds the verb to the parser."""
    command = commands.add_parser(
        "report", help="write a page with bytes, errors, times and load of experts, as pictures"
    )
    command.add_argument("model", type=Path, metavar="MODEL", help="ONNX model")
    add_output(
        command,
        "OUT.html",
        "where to write the page",
        dry_run="measure and say what is missing, but write nothing; needs no OUT.html",
    )
    command.add_argument(
        "--reference",
        type=Path,
        metavar="MODEL",
        help="errors are against this model, as in one in float (default: stock kernels)",
    )
    add_inputs(command)
    command.add_argument("--repeat", type=int, default=20, metavar="N", help="runs to time (20)")
    command.add_argument("--cpu", action="store_true", help="run on the CPU even if there is a GPU")
    command.add_argument("--strict", action="store_true", help="fail if any part is missing")
    command.add_argument("--json", action="store_true", help="print what is in the page as JSON")
    command.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    check_output(options)
    page, sections = make_page(
        options.model,
        options.reference,
        inputs=wanted(options),
        repeat=options.repeat,
        cpu=options.cpu,
    )
    if not options.dry_run:
        write(page.encode(), options.output)
    missing = {section.title: section.missing for section in sections if section.missing}
    if options.json:
        content = {
            "page": None if options.output is None else str(options.output),
            "present": [section.title for section in sections if not section.missing],
            "missing": missing,
            "dry_run": options.dry_run,
        }
        print(json.dumps(content))
    else:
        print(f"{'would write' if options.dry_run else 'wrote'} {options.output or 'a page'}")
        for title, reason in missing.items():
            print(f"not available: {title}: {reason}")
    if missing and options.strict:
        print(f"qmoe_plugin: {len(missing)} parts are missing", file=sys.stderr)
    return int(bool(missing) and options.strict)
