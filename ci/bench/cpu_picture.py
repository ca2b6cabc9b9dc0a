"""The results of bench_cpu.py as a picture."""

from __future__ import annotations

from typing import Any

from qmoe_plugin.svg import Bar, bars

DRAWN_LEVELS = (0, 4)


def picture(result: dict[str, Any]) -> str:
    """Bars of how many times as long as its floor each cell takes, ours and stock."""
    rows = []
    for case in result["cases"]:
        if case["accuracy_level"] not in DRAWN_LEVELS:
            continue
        for cell in case["cells"]:
            times = [
                cell[name]["median_ms"] if name in cell else None for name in ("ours", "stock")
            ]
            rows.append(
                Bar(
                    f"{case['name']}, level {case['accuracy_level']}, {_tokens(cell['tokens'])}",
                    tuple(None if t is None else t / cell["floor_ms"] for t in times),
                    tuple("no such op" if t is None else f"{t:.4g} ms" for t in times),
                )
            )
    title = f"Times of a layer over the least possible, {result['machine']}"
    return bars(title, ("ours", "stock"), rows)


def _tokens(count: int) -> str:
    return f"{count} token{'s' * (count != 1)}"
