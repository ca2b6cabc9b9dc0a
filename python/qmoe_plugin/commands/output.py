"""What verbs that write have in common: where to, dry runs, and how they end."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, Protocol


def add_output(
    command: argparse.ArgumentParser,
    metavar: str = "OUT",
    help: str = "where to write the new model",
    dry_run: str = "only say what would be done; needs no OUT",
) -> None:
    """Adds the argument of what a verb writes, and --dry-run, with which it may be left out."""
    command.add_argument("output", type=Path, metavar=metavar, nargs="?", help=help)
    command.add_argument("--dry-run", action="store_true", help=dry_run)


def check_output(options: argparse.Namespace) -> None:
    """Refuses to go on without either of them."""
    if options.output is None and not options.dry_run:
        raise ValueError("say where to write, or give --dry-run")


class Report(Protocol):
    """What a verb says of its work; `str` makes text of it."""

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON."""


def show(report: Report, *, as_json: bool, done: bool, nothing: str) -> int:
    """Prints a report, and `nothing` if nothing was done; returns the exit code."""
    print(json.dumps(report.to_dict(), indent=2) if as_json else report)
    if not done:
        print(f"qmoe_plugin: {nothing}", file=sys.stderr)
    return int(not done)
