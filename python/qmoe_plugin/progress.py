"""A progress bar on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType

Progress = Callable[[str, int, int], None]
"""Called with what is being done, and how much of how much is done."""

_INTERVAL = 0.1  # seconds between two drawings
_WIDTH = 30
_MANY = 10_000_000
_CLEAR = "\r\033[K"


class Bar:
    """Draws on standard error, if that is a terminal; what it drew goes when the block ends."""

    def __init__(self, unit: str) -> None:
        """Makes one; many of a unit are counted in millions."""
        self._unit = unit
        self._shown = sys.stderr.isatty()

    def __enter__(self) -> Bar:
        """Starts the clock."""
        self._start, self._drawn = time.monotonic(), 0.0
        return self

    def __call__(self, what: str, done: int, total: int) -> None:
        """Draws, unless it just did."""
        now = time.monotonic()
        if not self._shown or (now - self._drawn < _INTERVAL and done < total):
            return
        self._drawn = now
        share = done / total if total else 1.0
        left = (now - self._start) * (1 / share - 1) if share else 0.0
        bar = "#" * int(_WIDTH * share)
        amount = f"{total / 1e6:,.0f} M" if total >= _MANY else f"{total}"
        text = f"[{bar:<{_WIDTH}}] {share:4.0%} of {amount} {self._unit}"
        text += f", {_time(left)} left  {what}"
        sys.stderr.write(f"{_CLEAR}{text}")
        sys.stderr.flush()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Clears the line."""
        if self._shown:
            sys.stderr.write(_CLEAR)
            sys.stderr.flush()


def _time(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
