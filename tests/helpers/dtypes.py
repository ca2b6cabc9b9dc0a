"""The float types of the ops under their names: "float32", "float16", "bfloat16"."""

from __future__ import annotations

import ml_dtypes
import numpy as np
from onnx import TensorProto

FLOAT_DTYPES = ("float32", "float16", "bfloat16")

_NUMPY = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    # of scales only
    "float8e8m0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "float8e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
}

_ONNX = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.float64): TensorProto.DOUBLE,
    np.dtype(np.float16): TensorProto.FLOAT16,
    np.dtype(ml_dtypes.bfloat16): TensorProto.BFLOAT16,
    np.dtype(ml_dtypes.float8_e4m3fn): TensorProto.FLOAT8E4M3FN,
    np.dtype(ml_dtypes.float8_e8m0fnu): TensorProto.FLOAT8E8M0,
    np.dtype(np.uint8): TensorProto.UINT8,
    np.dtype(np.int8): TensorProto.INT8,
    np.dtype(np.int32): TensorProto.INT32,
    np.dtype(np.int64): TensorProto.INT64,
}

# Half the distance between neighbours, relative: the largest error of one rounding.
UNIT_ROUNDOFF = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


def numpy_dtype(name: str) -> np.dtype:
    return _NUMPY[name]


def onnx_type(dtype: np.dtype | str) -> int:
    """TensorProto.DataType of a numpy dtype or of one of our names."""
    return _ONNX[_NUMPY[dtype] if isinstance(dtype, str) else np.dtype(dtype)]


def from_onnx_type(element_type: int) -> np.dtype:
    return next(dtype for dtype, code in _ONNX.items() if code == element_type)
