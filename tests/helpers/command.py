"""Runs the real command line, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_QUIET = ("-W", "ignore:onnxruntime:RuntimeWarning")
"""Hides what `qmoe_plugin.wheels` says of packages that do not belong together, and no more."""

COMMAND = (sys.executable, *_QUIET, "-m", "qmoe_plugin")
"""What starts the command line, whatever packages of onnxruntime are installed."""


def run(*arguments: str | Path | int, warnings: bool = False) -> subprocess.CompletedProcess[str]:
    """`python -m qmoe_plugin ARGUMENTS`, with what it printed.

    Args:
        arguments: Of the command line.
        warnings: Whether a conflict of onnxruntime packages may be warned about.
    """
    start = (sys.executable, "-m", "qmoe_plugin") if warnings else COMMAND
    return subprocess.run(
        [*start, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


def error_line(done: subprocess.CompletedProcess[str]) -> str:
    """What a command that failed printed on standard error: one line, for people."""
    assert done.returncode == 1, f"exit code {done.returncode}: {done.stdout}{done.stderr}"
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("qmoe_plugin: ")
    return lines[0]
