"""Sessions with our ops, and runs that take and give numpy arrays, bfloat16 included."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from helpers.dtypes import from_onnx_type, onnx_type

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def session_options(*, threads: int = 1, register: bool = True) -> ort.SessionOptions:
    """Options with our ops registered; errors are raised, not also printed."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    if register:
        import qmoe_plugin

        qmoe_plugin.register(options)
    return options


def open_session(
    model: onnx.ModelProto | bytes | Path | str,
    device: str = "cpu",
    *,
    threads: int = 1,
    register: bool = True,
    options: ort.SessionOptions | None = None,
    provider_options: Mapping[str, str] | None = None,
) -> ort.InferenceSession:
    """Opens a model on one device, "cpu" or "cuda". CUDA gets no silent fallback to the CPU."""
    if isinstance(model, onnx.ModelProto):
        model = model.SerializeToString()
    if options is None:
        options = session_options(threads=threads, register=register)
    if device == "cuda":
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    provider: Any = PROVIDERS[device]
    if provider_options:
        provider = (provider, dict(provider_options))
    source = model if isinstance(model, bytes) else str(model)
    session = ort.InferenceSession(source, options, providers=[provider])
    if session.get_providers()[0] != PROVIDERS[device]:
        raise RuntimeError(f"asked for {PROVIDERS[device]}, got {session.get_providers()}")
    return session


def ort_value(array: np.ndarray) -> ort.OrtValue:
    """An OrtValue on the CPU that holds the array's values."""
    array = np.asarray(array, order="C")  # unlike ascontiguousarray, it leaves scalars alone
    if array.dtype.itemsize == 2 and array.dtype != np.float16:
        bits = array.view(np.uint16)
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, onnx_type(array.dtype))
    return ort.OrtValue.ortvalue_from_numpy(array)


def to_numpy(value: ort.OrtValue) -> np.ndarray:
    """A copy of an OrtValue that lies on the CPU."""
    dtype, shape = from_onnx_type(value.element_type()), value.shape()
    count = int(np.prod(shape))
    if count == 0:
        return np.zeros(shape, dtype=dtype)
    if value.device_name() != "cpu":
        raise ValueError(f"the value is on {value.device_name()}, not on the CPU")
    buffer = (ctypes.c_char * (count * dtype.itemsize)).from_address(value.data_ptr())
    return np.frombuffer(buffer, dtype=dtype).reshape(shape).copy()


def run(
    session: ort.InferenceSession,
    feeds: Mapping[str, np.ndarray],
    run_options: ort.RunOptions | None = None,
) -> np.ndarray:
    """The first output for these inputs."""
    values = {name: ort_value(array) for name, array in feeds.items()}
    return to_numpy(session.run_with_ort_values(None, values, run_options)[0])


def bits_of(array: np.ndarray) -> bytes:
    """The bytes of an array, to compare two results bit by bit."""
    return np.ascontiguousarray(array).tobytes()


def run_case(
    case: Any, device: str, *, threads: int = 1
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Makes a case's tensors, runs its node with our ops, and returns both."""
    from helpers.cases import feeds_of

    tensors = case.tensors()
    session = open_session(case.model(tensors), device, threads=threads)
    return tensors, run(session, feeds_of(tensors))
