"""How a verb ends that changes a model: its report, and one line if nothing came of it."""

from __future__ import annotations

import json
import sys
from typing import Any, Protocol


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
