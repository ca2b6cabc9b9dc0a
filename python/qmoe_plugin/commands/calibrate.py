"""``calibrate``: what a float model multiplies its weights with."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import qmoe_plugin
from qmoe_plugin.commands.output import add_output, check_output, show
from qmoe_plugin.progress import Bar

if TYPE_CHECKING:
    from qmoe_plugin.commands import Commands


def add(commands: Commands) -> None:
    """Adds it to the parser."""
    command = commands.add_parser("calibrate", help="run a float model to see what its weights see")
    command.add_argument("input", type=Path, metavar="MODEL", help="float ONNX model")
    add_output(
        command,
        help="file for quantize --calibration",
        dry_run="run the model and say what was seen, but write nothing; needs no OUT",
    )
    command.add_argument(
        "--data",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help=".npz files with inputs by name, a run each; .npy files with tokens, a run a row",
    )
    command.add_argument(
        "--random", type=int, default=0, metavar="N", help="runs of random tokens (0)"
    )
    command.add_argument("--length", type=int, default=128, help="tokens in a random run (128)")
    command.add_argument("--vocabulary", type=int, help="how many tokens there are")
    command.add_argument("--seed", type=int, default=0, help="of random tokens (0)")
    command.add_argument("--json", action="store_true", help="print the report as JSON")
    command.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    check_output(options)
    with Bar("runs") as bar:
        report = qmoe_plugin.calibrate(
            options.input,
            options.output,
            data=options.data,
            random=options.random,
            length=options.length,
            vocabulary=options.vocabulary,
            seed=options.seed,
            dry_run=options.dry_run,
            progress=bar,
        )
    done = bool(report.collected)
    return show(report, as_json=options.json, done=done, nothing="there is nothing to calibrate")
