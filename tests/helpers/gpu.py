"""What GPU tests need of the CUDA driver, by ctypes: no CUDA package for Python is required."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager


class Driver:
    """The CUDA driver, with device 0's primary context current in the calling thread."""

    def __init__(self) -> None:
        self._cuda = ctypes.CDLL("libcuda.so.1")
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self._call("cuInit", 0)
        self._call("cuDeviceGet", ctypes.byref(device), 0)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._call("cuCtxSetCurrent", context)

    def _call(self, name: str, *arguments: object) -> None:
        result = getattr(self._cuda, name)(*arguments)
        if result:
            raise RuntimeError(f"{name} failed with CUresult {result}")

    def used_bytes(self) -> int:
        """Memory in use on the device, by anybody."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return total.value - free.value

    def synchronize(self) -> None:
        self._call("cuCtxSynchronize")

    @contextmanager
    def stream(self) -> Iterator[int]:
        """A stream of our own, as an address."""
        stream = ctypes.c_void_p()
        self._call("cuStreamCreate", ctypes.byref(stream), 1)  # non-blocking
        try:
            yield stream.value or 0
        finally:
            self._call("cuStreamDestroy_v2", stream)
