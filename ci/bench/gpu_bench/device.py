"""The device that is measured: its limits, and how time is taken on it."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch

Provider = str | tuple[str, dict[str, str]]

FLUSHED_BYTES = 1 << 30  # read between runs; many times what a second-level cache holds
COPIED_BYTES = 4 << 30
MATRIX = 8192  # rows and columns of the products whose rate is the limit


class Device(Protocol):
    """What the program asks of a device."""

    kind: str  # of torch and of onnxruntime's bindings
    name: str
    sm: int  # compute capability, 0 for the CPU
    provider: Provider

    def about(self) -> dict[str, Any]:
        """What the results say of it."""
        ...

    def limits(self) -> dict[str, float]:
        """Bandwidths in bytes a second, matrix rates in operations a second, and the like."""
        ...

    def time_replays(
        self, prepare: Callable[[int], object], run: Callable[[], object], count: int
    ) -> list[float]:
        """Microseconds of runs that the device finds waiting for it, its cache being cold.

        Args:
            prepare: Called before each run with its number, not timed.
            run: What is timed; it need not wait for the device.
            count: How many runs.
        """
        ...

    def time_launches(
        self, prepare: Callable[[int], object], run: Callable[[], object], count: int
    ) -> list[float]:
        """Microseconds of runs one after the other, as the host launches them."""
        ...

    def synchronize(self) -> None:
        """Waits for all work; raises RuntimeError if the device is in no state to do any."""
        ...


class Cuda:
    """The first CUDA device. All work is in one stream of ours, which events can be put into."""

    def __init__(self) -> None:
        """Takes memory to flush the cache with.

        Raises:
            SystemExit: If there is no CUDA device.
        """
        if not torch.cuda.is_available():
            raise SystemExit("no CUDA device; --device cpu tries the program without one")
        self.kind, self.name = "cuda", torch.cuda.get_device_name(0)
        major, minor = torch.cuda.get_device_capability(0)
        self.sm = 10 * major + minor
        self._stream = torch.cuda.Stream()
        torch.cuda.set_stream(self._stream)
        self.provider: Provider = (
            "CUDAExecutionProvider",
            {
                "device_id": "0",
                "enable_cuda_graph": "1",
                "user_compute_stream": str(self._stream.cuda_stream),
            },
        )
        self._flushed = torch.zeros(FLUSHED_BYTES // 4, device="cuda")

    def about(self) -> dict[str, Any]:
        driver = ctypes.c_int()
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(driver))
        return {"device": self.name, "cuda_driver_api": driver.value, "torch": torch.__version__}

    def limits(self) -> dict[str, float]:
        found = self._bandwidths()
        for dtype in (torch.float16, torch.bfloat16):
            a, b = (torch.randn(MATRIX, MATRIX, device="cuda", dtype=dtype) for _ in range(2))
            name = str(dtype).removeprefix("torch.")
            found[f"{name}_flop_per_s"] = self._rate(partial(torch.matmul, a, b))
        if self.sm >= 89:
            one = torch.ones((), device="cuda")
            options = {"scale_a": one, "scale_b": one, "out_dtype": torch.bfloat16}
            a, b = (t.to(torch.float8_e4m3fn) for t in (a, b))
            found["float8_flop_per_s"] = self._rate(partial(torch._scaled_mm, a, b.t(), **options))
        del a, b
        torch.cuda.empty_cache()
        return {**found, "small_graph_us": self._small_graph_us()}

    def _small_graph_us(self) -> float:
        """What a replay of a graph takes beside its kernels, and one kernel that does nothing."""
        value, graph = torch.zeros(1, device="cuda"), torch.cuda.CUDAGraph()
        value.add_(1)
        with torch.cuda.graph(graph):
            value.add_(1)
        return statistics.median(self.time_replays(lambda _: None, graph.replay, 15))

    def _bandwidths(self) -> dict[str, float]:
        source = torch.randint(0, 255, (COPIED_BYTES,), dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        copy = self._seconds(partial(target.copy_, source))
        values = source.view(torch.int32).to(torch.float32)
        read = self._seconds(values.sum)
        return {
            "copy_bytes_per_s": 2 * COPIED_BYTES / copy,
            "read_bytes_per_s": COPIED_BYTES / read,
        }

    def _rate(self, product: Callable[[], object]) -> float:
        return 2 * MATRIX**3 / self._seconds(product)

    def _seconds(self, run: Callable[[], object]) -> float:
        run()
        return statistics.median(self.time_launches(lambda _: None, run, 15)) * 1e-6

    def time_replays(
        self, prepare: Callable[[int], object], run: Callable[[], object], count: int
    ) -> list[float]:
        # Reading (not writing, which would leave lines to write back) evicts the weights of the run
        # before, and takes the device longer than the host needs to launch what follows.
        def flush_and_prepare(i: int) -> None:
            prepare(i)
            self._flushed.sum()

        return self._time(flush_and_prepare, run, count)

    def time_launches(
        self, prepare: Callable[[int], object], run: Callable[[], object], count: int
    ) -> list[float]:
        return self._time(prepare, run, count)

    def _time(
        self, prepare: Callable[[int], object], run: Callable[[], object], count: int
    ) -> list[float]:
        events = []
        for i in range(count):
            prepare(i)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            events.append((begin, end))
        self.synchronize()
        return [1e3 * begin.elapsed_time(end) for begin, end in events]

    def synchronize(self) -> None:
        torch.cuda.synchronize()


class Cpu:
    """The host in place of a GPU, to try the program; its times say nothing of a GPU."""

    def __init__(self) -> None:
        """Takes nothing."""
        self.kind, self.name, self.sm = "cpu", "CPU (trial)", 0
        self.provider: Provider = "CPUExecutionProvider"

    def about(self) -> dict[str, Any]:
        return {"device": self.name, "torch": torch.__version__}

    def limits(self) -> dict[str, float]:
        source = torch.ones(1 << 22, dtype=torch.uint8)
        a = torch.randn(256, 256)
        copy = statistics.median(self._time(lambda _: None, source.clone, 5)) * 1e-6
        read = statistics.median(self._time(lambda _: None, source.sum, 5)) * 1e-6
        product = statistics.median(self._time(lambda _: None, lambda: a @ a, 5)) * 1e-6
        rates = {f"{t}_flop_per_s": 2 * 256**3 / product for t in ("float16", "bfloat16", "float8")}
        return {
            "copy_bytes_per_s": 2 * source.numel() / copy,
            "read_bytes_per_s": source.numel() / read,
            **rates,
        }

    def time_replays(
        self, prepare: Callable[[int], object], run: Callable[[], object], count: int
    ) -> list[float]:
        return self._time(prepare, run, count)

    def time_launches(
        self, prepare: Callable[[int], object], run: Callable[[], object], count: int
    ) -> list[float]:
        return self._time(prepare, run, count)

    @staticmethod
    def _time(
        prepare: Callable[[int], object], run: Callable[[], object], count: int
    ) -> list[float]:
        times = []
        for i in range(count):
            prepare(i)
            begin = time.perf_counter()
            run()
            times.append(1e6 * (time.perf_counter() - begin))
        return times

    def synchronize(self) -> None:
        pass


def open_device(kind: str) -> Device:
    return Cuda() if kind == "cuda" else Cpu()
