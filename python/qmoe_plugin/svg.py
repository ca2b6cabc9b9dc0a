"""Pictures as SVG text: bars and heat maps. They need nothing else to be shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_LABEL, _BAR, _VALUE, _HEIGHT = 330, 360, 150, 18
_COLOURS = ("#2a6fbb", "#b5542a")


@dataclass(frozen=True)
class Bar:
    """A row of a bar chart.

    Attributes:
        label: Its name.
        values: One number for each series; None for nothing.
        texts: What to write beside them.
    """

    label: str
    values: tuple[float | None, ...]
    texts: tuple[str, ...]


def bars(title: str, series: Sequence[str], rows: Sequence[Bar]) -> str:
    """Horizontal bars, those of several series under each other.

    Args:
        title: What it shows, for those who cannot see it.
        series: A name for each of the values of a row.
        rows: From top to bottom.
    """
    largest = max((v for row in rows for v in row.values if v is not None), default=0) or 1
    parts, y = [], 0
    if len(series) > 1:
        for index, name in enumerate(series):
            parts.append(_rect(_LABEL + index * 120, y + 4, 10, 10, _COLOURS[index]))
            parts.append(_text(_LABEL + index * 120 + 15, y + 13, name))
        y += _HEIGHT
    for row in rows:
        parts.append(_text(_LABEL - 8, y + 13, _short(row.label), anchor="end", full=row.label))
        for index, (value, text) in enumerate(zip(row.values, row.texts, strict=True)):
            width = 0 if value is None else max(1.0, _BAR * value / largest)
            if value is not None:
                parts.append(_rect(_LABEL, y + 3, width, _HEIGHT - 6, _COLOURS[index]))
            parts.append(_text(_LABEL + width + 6, y + 13, text))
            y += _HEIGHT
    return _svg(title, _LABEL + _BAR + _VALUE, y, parts)


def heat_map(title: str, rows: Sequence[tuple[str, Sequence[float]]]) -> str:
    """A line of squares for each row, the darker the larger.

    Args:
        title: What it shows.
        rows: A name and its values, all as many.
    """
    columns = max((len(values) for _, values in rows), default=1)
    size = max(2.0, min(_HEIGHT, (_BAR + _VALUE) / columns))
    largest = max((v for _, values in rows for v in values), default=0) or 1
    parts = []
    for line, (name, values) in enumerate(rows):
        y = line * _HEIGHT
        parts.append(_text(_LABEL - 8, y + 13, _short(name), anchor="end", full=name))
        for column, value in enumerate(values):
            cell = _rect(
                _LABEL + column * size, y + 1, size, _HEIGHT - 2, _COLOURS[0], value / largest
            )
            parts.append(f"<g><title>{column}: {value:g}</title>{cell}</g>")
    return _svg(title, _LABEL + columns * size + 10, len(rows) * _HEIGHT, parts)


def _svg(title: str, width: float, height: float, parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" width="{width:.0f}" '
        f'height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'font-family="sans-serif" font-size="12">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )


def _rect(
    x: float, y: float, width: float, height: float, colour: str, opacity: float = 1.0
) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" '
        f'fill="{colour}" fill-opacity="{opacity:.2f}"/>'
    )


def _text(x: float, y: float, text: str, *, anchor: str = "start", full: str = "") -> str:
    title = f"<title>{escape(full)}</title>" if full else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{title}{escape(text)}</text>'


def _short(name: str) -> str:
    """A name that fits, its end rather than its start."""
    return name if len(name) <= 48 else "..." + name[-45:]
