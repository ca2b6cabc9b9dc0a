"""``install``: makes an onnxruntime-genai model folder use our kernels, and undoes it."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from qmoe_plugin.install import install, uninstall

if TYPE_CHECKING:
    from qmoe_plugin.commands import Commands


def add(commands: Commands) -> None:
    """Adds the verb to the parser."""
    command = commands.add_parser(
        "install", help="make an onnxruntime-genai model folder use the plugin, or undo it"
    )
    command.add_argument(
        "folder", type=Path, metavar="MODEL_DIR", help="the folder with genai_config.json"
    )
    what = command.add_mutually_exclusive_group()
    what.add_argument("--sm", type=int, help="the GPU it will run on, as in 90 (default: this one)")
    what.add_argument("--cpu", action="store_true", help="run on the CPU, whatever it asks for now")
    what.add_argument("--undo", action="store_true", help="make the folder as it was")
    command.add_argument("--strict", action="store_true", help="fail if any node is left behind")
    command.add_argument("--dry-run", action="store_true", help="only say what would be done")
    command.add_argument("--json", action="store_true", help="print the report as JSON")
    command.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    if options.undo:
        if options.strict:
            raise ValueError("--undo does not go with --strict")
        removed = uninstall(options.folder, dry_run=options.dry_run)
        undone = {"removed": removed, "dry_run": options.dry_run}
        print(json.dumps(undone) if options.json else _undone(options, removed))
        return 0
    report = install(
        options.folder,
        sm=options.sm,
        cpu=options.cpu,
        strict=options.strict,
        dry_run=options.dry_run,
    )
    print(json.dumps(report.to_dict(), indent=2) if options.json else report)
    if not report.possible:
        print("qmoe_plugin: no node was moved", file=sys.stderr)
    elif options.strict and not report.complete:
        print("qmoe_plugin: nodes would be left behind, so nothing was done", file=sys.stderr)
    return int(not report.possible or (options.strict and not report.complete))


def _undone(options: argparse.Namespace, removed: list[str]) -> str:
    if options.dry_run:
        return f"would remove {', '.join(removed)}"
    return f"{options.folder} is as it was; removed {', '.join(removed)}"
