"""The file of results: a cell for each case, number of tokens and mode, merged from many runs.

A cell says when and of which commit it is, so that several short runs fill one file:

    {"case": "gpt-oss-20b int4", "tokens": 8, "graph": true, "floor_us": 68.2, ...,
     "ours": {"p50_us": 94.3, "p95_us": 94.5, "min_us": ..., "max_us": ..., "runs": 24},
     "stock": {...}, "humming": {...}, "commit": "...", "date": "..."}
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

VERSION = 2
CONTESTANTS = ("ours", "stock", "humming")

Cell = dict[str, Any]
Key = tuple[str, int, bool]


def summarize(times_us: Sequence[float]) -> dict[str, float | int]:
    """Median, 95th percentile, least, most and number of some times.

    Args:
        times_us: At least one.
    """
    ordered = sorted(times_us)
    return {
        "p50_us": round(percentile(ordered, 0.5), 2),
        "p95_us": round(percentile(ordered, 0.95), 2),
        "min_us": round(ordered[0], 2),
        "max_us": round(ordered[-1], 2),
        "runs": len(ordered),
    }


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value below which a share of ordered values lies; between two of them, in proportion."""
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def key_of(cell: Cell) -> Key:
    return cell["case"], cell["tokens"], cell["graph"]


def time_of(cell: Cell, contestant: str) -> float | None:
    """Median microseconds of a contestant; None if it was not measured or did not run."""
    found = cell.get(contestant, {}).get("p50_us")
    return None if found is None else float(found)


def of_floor(cell: Cell, contestant: str) -> float | None:
    """The floor over a contestant's median."""
    time = time_of(cell, contestant)
    return None if time is None else cell["floor_us"] / time


class Results:
    """A file of results."""

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        """Reads what the file holds.

        Args:
            path: The file; it need not be there.
            about: What to write of the device, the versions and the limits of this run.

        Raises:
            ValueError: If the file is of another device, or no file of results.
        """
        self._path, self._about = path, dict(about)
        self._cells: dict[Key, Cell] = {}
        if path.exists():
            content = json.loads(path.read_text())
            if content.get("device") != about["device"]:
                raise ValueError(
                    f"{path} has results of {content.get('device')!r}, and this is "
                    f"{about['device']!r}: give another file with --output"
                )
            self._cells = {key_of(cell): cell for cell in cells_of(content)}

    @property
    def device(self) -> str:
        return str(self._about["device"])

    def cells(self) -> list[Cell]:
        return list(self._cells.values())

    def add(self, cell: Cell) -> None:
        """Takes a cell in place of an older one, whose contestants that it lacks it keeps."""
        old = self._cells.get(key_of(cell), {})
        kept = {
            name: {"date": old.get("date"), "commit": old.get("commit"), **old[name]}
            for name in CONTESTANTS
            if name in old and name not in cell
        }
        self._cells[key_of(cell)] = {**cell, **kept}

    def add_contestant(self, key: Key, name: str, numbers: Mapping[str, Any]) -> bool:
        """Adds to a cell. Returns whether that is there."""
        if key not in self._cells:
            return False
        self._cells[key][name] = dict(numbers)
        return True

    def has(self, key: Key, commit: str, contestants: Iterable[str]) -> bool:
        """Whether a cell holds all of these as measured at a commit, or refused there."""
        cell = self._cells.get(key)
        return cell is not None and all(
            name in cell and cell[name].get("commit", cell["commit"]) == commit
            for name in contestants
        )

    def write(self) -> None:
        """Writes the file, in one step: who stops the program finds the old one or the new one."""
        content = {"version": VERSION, **self._about, "cells": self.cells()}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        temporary.replace(self._path)


def read_cells(path: Path) -> list[Cell]:
    """The cells of a file of results, of older ones too."""
    return cells_of(json.loads(path.read_text()))


def cells_of(content: Mapping[str, Any]) -> list[Cell]:
    """The cells of what a file holds.

    Raises:
        ValueError: If it is no file of results.
    """
    if content.get("version") == VERSION:
        return list(content["cells"])
    if "version" in content or "cases" not in content:
        raise ValueError(f"a file of results of version {VERSION} or older is needed")
    return [
        _from_first_version(content, case, cell)
        for case in content["cases"]
        for cell in case["cells"]
    ]


def _from_first_version(content: Mapping[str, Any], case: Cell, cell: Cell) -> Cell:
    found: Cell = {
        "case": case["name"],
        "tokens": cell["tokens"],
        "graph": True,
        "nodes": case["nodes"],
        "floor_us": cell["floor_us"],
        "limits": content["limits"],
        "onnxruntime": content["onnxruntime"],
        "commit": content["commit"],
        "date": content["date"],
    }
    for name in ("ours", "stock"):
        if f"{name}_us" in cell:
            least, most = cell[f"{name}_spread_us"]
            found[name] = {"p50_us": cell[f"{name}_us"], "min_us": least, "max_us": most}
    if "stock" not in found and "stock_refuses" in case:
        found["stock"] = {"refusal": case["stock_refuses"]}
    if "difference_rms" in cell:
        found["difference_rms"] = cell["difference_rms"]
    return found


def newest(files: Iterable[Sequence[Cell]]) -> list[Cell]:
    """Of several files' cells the newest of each, in the order in which they first come."""
    found: dict[Key, Cell] = {}
    for cells in files:
        for cell in cells:
            key = key_of(cell)
            if key not in found or cell["date"] > found[key]["date"]:
                found[key] = cell
    return list(found.values())
