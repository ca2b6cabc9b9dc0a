"""Packed weights: their header, as ops/packed_weights.h describes it, and models with them."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

import qmoe_plugin
from helpers.cases import Case, QMoECase, feeds_of
from helpers.models import STOCK_DOMAIN
from helpers.run import bits_of, run

_LAYOUT = struct.Struct("<8sHH12sIIIIIHHQQ")
_FIELDS = (
    "magic",
    "version",
    "layout",
    "format",
    "experts",
    "rows",
    "k",
    "block_size",
    "flags",
    "scale_dtype",
    "encoding",
    "bytes",
    "checksum",
)
LAYOUTS = {1: "cuda_tile16x64", 2: "cpu_panel16"}
SCALE_DTYPES = {1: "float32", 10: "float16"}
FLAGS = {"gated": 1, "zero_offsets": 2, "bias": 4, "sum_scale": 8, "permuted_k": 16}

WEIGHTS = {
    "QMoE": {"fc1": 2, "fc2": 5},
    "MoE": {"fc1": 2, "fc2": 4},
    "MatMulNBits": {"B": 1},
    "MatMulBlockQuantizedFp8Weight": {"B": 1},
    "MatMulBlockQuantizedFp4Weight": {"B": 1},
}


@dataclass
class Header:
    """The 64 bytes, field by field."""

    fields: dict[str, int | bytes]

    @classmethod
    def read(cls, content: np.ndarray) -> Header:
        values = _LAYOUT.unpack(content[: _LAYOUT.size].tobytes())
        return cls(dict(zip(_FIELDS, values, strict=True)))

    def flag(self, name: str) -> bool:
        return bool(self.fields["flags"] & FLAGS[name])

    def sealed(self) -> bytes:
        """The header with the checksum that belongs to its other fields: FNV-1a."""
        unsealed = _LAYOUT.pack(*({**self.fields, "checksum": 0}[name] for name in _FIELDS))
        checksum = 0xCBF29CE484222325
        for byte in unsealed:
            checksum = (checksum ^ byte) * 0x100000001B3 % 2**64
        self.fields["checksum"] = checksum
        return _LAYOUT.pack(*(self.fields[name] for name in _FIELDS))


def packed_tensors(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """The packed weights of a model of one node: fc1 and fc2, or B, uint8[bytes] each."""
    (node,) = model.graph.node
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    return {
        name: numpy_helper.to_array(initializers[node.input[index]]).copy()
        for name, index in WEIGHTS[node.op_type].items()
    }


def with_packed(model: onnx.ModelProto, changed: Mapping[str, np.ndarray]) -> onnx.ModelProto:
    """The model with other packed weights, of any type and shape."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    (node,) = copy.graph.node
    for name, array in changed.items():
        index = WEIGHTS[node.op_type][name]
        for tensor in copy.graph.initializer:
            if tensor.name == node.input[index]:
                tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return copy


def with_input(model: onnx.ModelProto, index: int, array: np.ndarray) -> onnx.ModelProto:
    """The model with one more constant input."""
    (node,) = model.graph.node
    while len(node.input) <= index:
        node.input.append("")
    node.input[index] = "extra"
    model.graph.initializer.append(numpy_helper.from_array(array, "extra"))
    return model


def resealed(content: np.ndarray, **fields: int | bytes) -> np.ndarray:
    """Packed weights whose header says something else, with a right checksum."""
    header = Header.read(content)
    header.fields |= fields
    changed = content.copy()
    changed[: _LAYOUT.size] = np.frombuffer(header.sealed(), np.uint8)
    return changed


def stock_model(case: Case | None = None) -> onnx.ModelProto:
    """The case's model as exporters write it, in com.microsoft."""
    case = case or QMoECase()
    return case.model(case.tensors(), STOCK_DOMAIN)


def initializers(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """By name."""
    return {tensor.name: tensor for tensor in model.graph.initializer}


def result_of(model: onnx.ModelProto | Path, case: Case) -> bytes:
    """The bits of the model's first output, its nodes of ours run by us, for the case's inputs."""
    session = qmoe_plugin.session(model, ["CPUExecutionProvider"])
    return bits_of(run(session, feeds_of(case.tensors())))
