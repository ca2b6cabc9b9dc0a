"""Values of ONNX Runtime as numpy arrays and back, bfloat16 included."""

from __future__ import annotations

import ctypes
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qmoe_plugin.library import runtime

if TYPE_CHECKING:
    import onnxruntime

Array = npt.NDArray[Any]

_TYPES = {
    "tensor(float)": ir.DataType.FLOAT,
    "tensor(float16)": ir.DataType.FLOAT16,
    "tensor(bfloat16)": ir.DataType.BFLOAT16,
    "tensor(double)": ir.DataType.DOUBLE,
    "tensor(int8)": ir.DataType.INT8,
    "tensor(int16)": ir.DataType.INT16,
    "tensor(int32)": ir.DataType.INT32,
    "tensor(int64)": ir.DataType.INT64,
    "tensor(uint8)": ir.DataType.UINT8,
    "tensor(uint16)": ir.DataType.UINT16,
    "tensor(uint32)": ir.DataType.UINT32,
    "tensor(uint64)": ir.DataType.UINT64,
    "tensor(bool)": ir.DataType.BOOL,
}


def type_named(name: str) -> ir.DataType | None:
    """The type that onnxruntime calls so, as in "tensor(float)"; None for others than tensors."""
    return _TYPES.get(name)


def to_value(array: Array) -> onnxruntime.OrtValue:
    """The array as a value on the CPU."""
    array = np.asarray(array, order="C")
    dtype = ir.DataType.from_numpy(array.dtype)
    if dtype is ir.DataType.BFLOAT16:
        return runtime().OrtValue.ortvalue_from_numpy_with_onnx_type(
            array.view(np.uint16), dtype.value
        )
    return runtime().OrtValue.ortvalue_from_numpy(array)


def to_array(value: onnxruntime.OrtValue) -> Array:
    """A copy of a value that lies on the CPU."""
    if value.device_name() != "cpu":
        raise ValueError(f"the value is on {value.device_name()}, not on the CPU")
    dtype = ir.DataType(value.element_type()).numpy()
    shape = value.shape()
    count = math.prod(shape)
    if count == 0:
        return np.zeros(shape, dtype)
    # OrtValue.numpy() does not know bfloat16.
    memory = (ctypes.c_char * (count * dtype.itemsize)).from_address(value.data_ptr())
    return np.frombuffer(memory, dtype).reshape(shape).copy()
