"""Numbers for people."""

from __future__ import annotations


def format_bytes(size: float) -> str:
    """As in "1.2 MB", a million bytes each."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} TB"


def percent(part: float, total: float) -> str:
    """As in "12.5%"; "-" of nothing."""
    return f"{part / total:.1%}" if total else "-"
