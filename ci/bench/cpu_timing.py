"""Sessions of the two ops, and the times of their calls."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

import qmoe_plugin

MOST_CALLS = 200
LONG_LOAD_S = 8.0
EVICTED_BYTES = 256 << 20  # more than any last-level cache has
Clock = Callable[[], float]


@contextmanager
def environment(name: str, value: str | None) -> Iterator[None]:
    """An environment variable while the block runs; None leaves it as it is."""
    before = os.environ.get(name)
    if value is not None:
        os.environ[name] = value
    try:
        yield
    finally:
        if value is not None:
            os.environ.pop(name)
            if before is not None:
                os.environ[name] = before


def open_session(path: Path, ours: bool) -> tuple[ort.InferenceSession, dict[str, float]]:
    """A session on the global threads, and the seconds that making it took, of all cores too."""
    options = ort.SessionOptions()
    options.use_per_session_threads = False  # one pool for both; two would fight for the cores
    if ours:
        options.register_custom_ops_library(qmoe_plugin.get_library_path())
    wall, cpu = time.perf_counter(), time.process_time()
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return session, {"wall_s": round(wall, 3), "cpu_s": round(cpu, 3)}


def best_load(path: Path, ours: bool) -> tuple[ort.InferenceSession, dict[str, float]]:
    """A session, and the least times of three tries; of one, where that takes very long."""
    session, best = open_session(path, ours)
    for _ in range(2 if best["wall_s"] < LONG_LOAD_S else 0):
        del session
        session, times = open_session(path, ours)
        best = {key: min(best[key], times[key]) for key in best}
    return session, best


def time_in_turns(
    sessions: Sequence[ort.InferenceSession],
    feeds: Sequence[dict[str, Any]],
    budget_s: float,
    clock: Clock,
    cold: bool = False,
) -> list[dict[str, float]]:
    """Times of each session's calls; they take turns, and who starts alternates.

    Args:
        sessions: To be timed.
        feeds: Inputs of the calls, one after the other.
        budget_s: Seconds after which to stop, if there were three calls of each.
        clock: Seconds.
        cold: Reads other memory before each call, so that weights are in no cache.
    """
    other = np.ones(EVICTED_BYTES // 8 if cold else 0)
    times: list[list[float]] = [[] for _ in sessions]
    for session in sessions:
        session.run(None, feeds[0])
    start, call = time.perf_counter(), 0
    while call < 3 or (time.perf_counter() - start < budget_s and call < MOST_CALLS):
        order = range(len(sessions)) if call % 2 else range(len(sessions) - 1, -1, -1)
        for i in order:
            other.sum()
            begin = clock()
            sessions[i].run(None, feeds[call % len(feeds)])
            times[i].append(1e3 * (clock() - begin))
        call += 1
    return [_summary(found) for found in times]


def _summary(times: list[float]) -> dict[str, float]:
    return {
        "median_ms": round(statistics.median(times), 4),
        "min_ms": round(min(times), 4),
        "calls": len(times),
    }
