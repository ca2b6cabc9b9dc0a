"""A picture of GPU results: a small chart for each case, the share of the floor over tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

COLUMNS = 4
WIDTH, HEIGHT = 264, 168  # of a chart with its texts
LEFT, RIGHT, TOP, BOTTOM = 38, 18, 28, 26
LEGEND = 24
COLOURS = ("#2a6fbb", "#b5542a", "#5f8f3e")
GRID, INK = "#d9d9d9", "#333333"
TICKS = (0.0, 0.5, 1.0)


@dataclass(frozen=True)
class Chart:
    """One case.

    Attributes:
        title: Its name.
        points: Of each series the tokens and the share of the floor, in the order of tokens.
    """

    title: str
    points: tuple[tuple[tuple[int, float], ...], ...]


def picture(title: str, series: Sequence[str], charts: Sequence[Chart]) -> str:
    """The charts in rows, as SVG text. All have the same axes.

    Args:
        title: What it shows, for those who cannot see it.
        series: Names of the series, at most as many as COLOURS.
        charts: At least one, with at least one point.
    """
    tokens = sorted({x for chart in charts for line in chart.points for x, _ in line})
    rows = math.ceil(len(charts) / COLUMNS)
    width, height = COLUMNS * WIDTH, LEGEND + rows * HEIGHT
    parts = [f'<rect width="{width}" height="{height}" fill="#ffffff"/>']
    for number, name in enumerate(series):
        x = LEFT + number * 150
        parts.append(_mark(number, x, LEGEND / 2))
        parts.append(_text(x + 10, LEGEND / 2 + 4, name))
    for number, chart in enumerate(charts):
        x, y = number % COLUMNS * WIDTH, LEGEND + number // COLUMNS * HEIGHT
        parts.append(f'<g transform="translate({x} {y})">{_chart(chart, tokens)}</g>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="11">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>\n"
    )


def _chart(chart: Chart, tokens: Sequence[int]) -> str:
    low, high = math.log2(tokens[0]), math.log2(max(tokens[-1], 2 * tokens[0]))

    def place(x: float, share: float) -> tuple[float, float]:
        right = (math.log2(x) - low) / (high - low)
        up = min(max(share, TICKS[0]), TICKS[-1])
        return (
            LEFT + right * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM),
        )

    parts = [_text(LEFT, TOP - 10, chart.title)]
    for tick in TICKS:
        y = place(tokens[0], tick)[1]
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="{GRID}"/>')
        parts.append(_text(LEFT - 4, y + 4, f"{tick:.0%}", anchor="end"))
    last = -math.inf
    for x in tokens:
        at = place(x, 0)[0]
        if at - last >= 24:  # room for its number
            parts.append(_text(at, HEIGHT - BOTTOM + 14, str(x), anchor="middle"))
            last = at
    for number, line in enumerate(chart.points):
        places = [place(x, share) for x, share in line]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{COLOURS[number]}"/>')
        for (x, y), (count, share) in zip(places, line, strict=True):
            label = f"<title>{count} tokens: {share:.0%}</title>"
            parts.append(f"<g>{label}{_mark(number, x, y)}</g>")
    return "".join(parts)


def _mark(number: int, x: float, y: float) -> str:
    """A circle, a square or a triangle."""
    colour = COLOURS[number]
    if number == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>'
    if number == 1:
        return f'<rect x="{x - 3:.1f}" y="{y - 3:.1f}" width="6" height="6" fill="{colour}"/>'
    return f'<path d="M{x - 4:.1f} {y + 3:.1f}h8l-4 -7z" fill="{colour}"/>'


def _text(x: float, y: float, text: str, *, anchor: str = "start") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{INK}">{escape(text)}</text>'
    )
