"""Runs the real command line, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def run(*arguments: str | Path | int) -> subprocess.CompletedProcess[str]:
    """`python -m qmoe_plugin ARGUMENTS`, with what it printed."""
    return subprocess.run(
        [sys.executable, "-m", "qmoe_plugin", *map(str, arguments)],
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
