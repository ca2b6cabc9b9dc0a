"""Measures what a session costs: `python -m helpers.memory_child MODEL DEVICE`, prints JSON.

A process of its own, so that nothing else is measured. All numbers are bytes above those before the
first session. The session is made and dropped several times.

host_anonymous       memory that is no file's, with the first session open
host_anonymous_peak  the most of it at any time while the first session was made
host_peak            the most of all its memory meanwhile, pages of files included
host_file            pages of files, the model's data among them
host_left            anonymous memory after the last session was dropped
device               GPU memory (cuda only); the median, as other processes may use the GPU too
"""

from __future__ import annotations

import json
import statistics
import sys
import threading
from pathlib import Path

import onnx

from helpers.cases import QMoECase, feeds_of
from helpers.gpu import Driver
from helpers.run import open_session, run


def host_memory() -> dict[str, int]:
    """Bytes of this process in memory: {"Rss": ..., "Anonymous": ...}."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    fields = dict(line.split(":") for line in lines)
    return {name: int(fields[name].split()[0]) * 1024 for name in ("Rss", "Anonymous")}


class Peak:
    """The most anonymous memory (`value`), and of all, while the `with` block runs."""

    def __enter__(self) -> Peak:
        self.value = self.all = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            now = host_memory()
            self.value = max(self.value, now["Anonymous"])
            self.all = max(self.all, now["Rss"])

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def device_bytes(driver: Driver, model: onnx.ModelProto | str) -> int:
    """GPU memory of a session; the median of five, as other processes may use the GPU too."""
    costs = []
    for _ in range(5):
        before = driver.used_bytes()
        session = open_session(model, "cuda")
        costs.append(driver.used_bytes() - before)
        del session
    return statistics.median_low(costs)


def main(path: str, device: str) -> None:
    # A small session first: libraries, CUDA's context, thread pools and arenas are not what is
    # measured.
    small = QMoECase(dtype="float16")
    tensors = small.tensors()
    first = open_session(small.model(tensors), device)
    run(first, feeds_of(tensors))

    driver = Driver() if device == "cuda" else None
    before = host_memory()
    cost = {}
    with Peak() as peak:
        session = open_session(path, device)
    after = host_memory()
    cost["host_anonymous"] = after["Anonymous"] - before["Anonymous"]
    cost["host_anonymous_peak"] = max(peak.value, after["Anonymous"]) - before["Anonymous"]
    cost["host_peak"] = max(peak.all, after["Rss"]) - before["Rss"]
    cost["host_file"] = (after["Rss"] - after["Anonymous"]) - (before["Rss"] - before["Anonymous"])
    del session
    cost["host_left"] = host_memory()["Anonymous"] - before["Anonymous"]
    cost["device"] = 0
    if driver:
        empty = device_bytes(driver, small.model(tensors))
        cost["device"] = device_bytes(driver, path) - empty
    print(json.dumps(cost))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
