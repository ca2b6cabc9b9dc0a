"""``tune``: the fastest kernels on this GPU, measured."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from qmoe_plugin.commands.output import add_output, check_output, show
from qmoe_plugin.tuning import TOKENS, tune

if TYPE_CHECKING:
    from qmoe_plugin.commands import Commands


def add(commands: Commands) -> None:
    """Adds the verb to the parser."""
    command = commands.add_parser(
        "tune", help="measure which kernels are fastest for a model on this GPU"
    )
    command.add_argument("model", type=Path, metavar="MODEL", help="ONNX model")
    add_output(
        command,
        metavar="FILE",
        help="tuning file to write",
        dry_run="measure and say what was found, but write nothing; needs no FILE",
    )
    command.add_argument(
        "--tokens", type=int, nargs="+", default=list(TOKENS), metavar="N",
        help=f"numbers of tokens, increasing ({' '.join(map(str, TOKENS))})",
    )  # fmt: skip
    command.add_argument("--repeat", type=int, default=30, metavar="N", help="runs to time (30)")
    command.add_argument("--json", action="store_true", help="print the report as JSON")
    command.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    check_output(options)
    report = tune(
        options.model,
        options.output,
        tokens=options.tokens,
        repeat=options.repeat,
        dry_run=options.dry_run,
    )
    return show(report, as_json=options.json, done=True, nothing="")
