"""A second ONNX Runtime in this process: the C library of the wheel, called through ctypes.

The Python module onnxruntime holds a copy of its own; onnxruntime-genai, for one, loads this one
beside it.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

FLOAT = 1

# Positions in the OrtApi table, and argument types.
GET_ERROR_MESSAGE = 2
SLOTS: dict[str, tuple[int, list[Any]]] = {
    "CreateEnv": (3, [c_int, c_char_p, c_void_p]),
    "CreateSessionFromArray": (8, [c_void_p, c_char_p, c_size_t, c_void_p, c_void_p]),
    "Run": (9, [c_void_p, c_void_p, c_void_p, c_void_p, c_size_t, c_void_p, c_size_t, c_void_p]),
    "CreateSessionOptions": (10, [c_void_p]),
    "CreateTensorWithDataAsOrtValue": (
        49,
        [c_void_p, c_void_p, c_size_t, c_void_p, c_size_t, c_int, c_void_p],
    ),
    "GetTensorMutableData": (51, [c_void_p, c_void_p]),
    "CreateCpuMemoryInfo": (69, [c_int, c_int, c_void_p]),
    "RegisterCustomOpsLibrary_V2": (228, [c_void_p, c_char_p]),
}


def library_path() -> Path | None:
    """The C library inside the onnxruntime wheel, if there is one."""
    found = sorted((Path(ort.__file__).parent / "capi").glob("libonnxruntime.so*"))
    return found[0] if found else None


class Runtime:
    """An ONNX Runtime behind its C interface. What it makes is never released: for tests only."""

    def __init__(self, library: Path) -> None:
        get_base = ctypes.CDLL(str(library)).OrtGetApiBase
        get_base.restype = POINTER(c_void_p)
        get_api = ctypes.CFUNCTYPE(c_void_p, ctypes.c_uint32)(get_base()[0])
        self._table = ctypes.cast(get_api(24), POINTER(c_void_p))
        self.env = self._make("CreateEnv", 4, b"c_api")

    def _call(self, name: str, *args: Any) -> None:
        slot, types = SLOTS[name]
        status = ctypes.CFUNCTYPE(c_void_p, *types)(self._table[slot])(*args)
        if status:
            message = ctypes.CFUNCTYPE(c_char_p, c_void_p)(self._table[GET_ERROR_MESSAGE])
            raise RuntimeError(message(status).decode())

    def _make(self, name: str, *args: Any) -> c_void_p:
        made = c_void_p()
        self._call(name, *args, byref(made))
        return made

    def session(self, model: bytes, custom_ops: str) -> c_void_p:
        """A session of a model with a library of custom ops."""
        options = self._make("CreateSessionOptions")
        self._call("RegisterCustomOpsLibrary_V2", options, custom_ops.encode())
        return self._make("CreateSessionFromArray", self.env, model, len(model), options)

    def run(
        self, session: c_void_p, feeds: dict[str, np.ndarray], shape: tuple[int, ...]
    ) -> np.ndarray:
        """Output "output" (float32, of this shape) for these float32 inputs."""
        memory = self._make("CreateCpuMemoryInfo", 1, 0)
        values = (c_void_p * len(feeds))()
        for i, array in enumerate(feeds.values()):
            dims = (c_int64 * array.ndim)(*array.shape)
            data = (array.ctypes.data, array.nbytes)
            args = (memory, *data, dims, array.ndim, FLOAT)
            values[i] = self._make("CreateTensorWithDataAsOrtValue", *args)
        names = (c_char_p * len(feeds))(*(name.encode() for name in feeds))
        outputs = (c_char_p * 1)(b"output")
        result = c_void_p()
        self._call("Run", session, None, names, values, len(feeds), outputs, 1, byref(result))
        data = self._make("GetTensorMutableData", result)
        buffer = (ctypes.c_float * int(np.prod(shape))).from_address(data.value or 0)
        return np.frombuffer(buffer, np.float32).reshape(shape).copy()
