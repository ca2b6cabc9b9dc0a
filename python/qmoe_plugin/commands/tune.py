"""``tune``: the fastest kernels on this GPU, measured."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from qmoe_plugin import env
from qmoe_plugin.tables import text_table
from qmoe_plugin.tuning import TOKENS, as_rows, tune

if TYPE_CHECKING:
    from qmoe_plugin.commands import Commands


def add(commands: Commands) -> None:
    """Adds the verb to the parser."""
    command = commands.add_parser(
        "tune", help="measure which kernels are fastest for a model on this GPU"
    )
    command.add_argument("model", type=Path, metavar="MODEL", help="ONNX model")
    command.add_argument("output", type=Path, metavar="FILE", help="tuning file to write")
    command.add_argument(
        "--tokens", type=int, nargs="+", default=list(TOKENS), metavar="N",
        help=f"numbers of tokens, increasing ({' '.join(map(str, TOKENS))})",
    )  # fmt: skip
    command.add_argument("--repeat", type=int, default=30, metavar="N", help="runs to time (30)")
    command.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    report = tune(options.model, options.output, tokens=options.tokens, repeat=options.repeat)
    print(f"{report.model} on {report.target}: {report.nodes} kinds of nodes measured")
    if report.choices:
        header = ("product", "rows", "kernel", "us", "instead of", "us")
        print("\n".join(text_table(header, as_rows(report))))
    else:
        print("the kernels that run anyway are the fastest")
    print(f"use it: export {env.TUNING.name}={options.output.resolve()}")
    return 0
