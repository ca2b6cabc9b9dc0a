"""Models of a case: a row of nodes of one op, in files whose weights are random bytes made once.

Kernels do not look at values, so all nodes and all cases share files of random bytes, one for each
kind of tensor; only where a tensor begins differs. A session has copies of its own on the device,
one for each node. No scale is infinite or NaN, and no product overflows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

import qmoe_plugin

from .cases import Case

DOMAINS = {"ours": qmoe_plugin.DOMAIN, "stock": "com.microsoft"}
TYPES = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
_PATTERN = 1 << 22  # bytes after which values repeat, but for the cut below
_STEP = 4096  # tensors begin at multiples; onnxruntime wants that of those that it maps
_STAGGER = 4096 * 37  # how much later the next node's tensors begin


def _bfloat16(values: np.ndarray[Any, Any]) -> bytes:
    """Of values whose lower half may be cut off."""
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()


class RandomFiles:
    """Files of random bytes, one a kind, as long as was asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lengths: dict[str, int] = {}
        self._rng = np.random.default_rng(0)

    def name(self, kind: str, size: int) -> str:
        """The file of a kind, made or made longer so that it has `size` bytes.

        Args:
            kind: "codes"; "fp8", codes without NaN; "e8m0" and "e4m3", block scales of 4-bit
                floats; "scales<bits>.<type>" and "biases.<type>", of float16 or bfloat16.
            size: Bytes.
        """
        path = self.folder / f"{kind}.bin"
        length = self._lengths.get(kind, 0)
        if length < size:
            pattern = self._pattern(kind)
            with path.open("ab") as file:
                while length < size:
                    length += file.write(pattern)
            self._lengths[kind] = length
        return path.name

    def _pattern(self, kind: str) -> bytes:
        # An odd number of pages, so that copies of it are not aligned with rows of weights.
        size = _PATTERN + _STEP
        name, _, dtype = kind.partition(".")
        if name == "codes":
            return self._rng.bytes(size)
        if name == "fp8":
            return (np.frombuffer(self._rng.bytes(size), np.uint8) & 0xB7).tobytes()
        if name == "e8m0":  # 2^-7 to 2^-5
            return self._rng.integers(120, 123, size, dtype=np.uint8).tobytes()
        if name == "e4m3":  # 1/2 to 2
            return self._rng.integers(48, 64, size, dtype=np.uint8).tobytes()
        low, high = -0.1, 0.1
        if name.startswith("scales"):  # so that a sum over K of random weights is about 1
            unit = 1.0 / (2.0 ** (int(name.removeprefix("scales")) - 1) * 50)
            low, high = 0.5 * unit, 2 * unit
        values = self._rng.uniform(low, high, size // 2)
        return values.astype(np.float16).tobytes() if dtype == "float16" else _bfloat16(values)


class _Tensors:
    """The initializers of a model."""

    def __init__(self, files: RandomFiles, case: Case) -> None:
        self._files, self._case = files, case
        self.protos: list[onnx.TensorProto] = []

    def add(self, name: str, kind: str, data_type: int, shape: tuple[int, ...], node: int) -> str:
        """An initializer in the file of a kind; data_type is of TensorProto."""
        offset = node * _STAGGER
        bits = {TensorProto.FLOAT16: 16, TensorProto.BFLOAT16: 16}.get(data_type, 8)
        length = int(np.prod(shape)) * bits // 8
        tensor = TensorProto(name=name, data_type=data_type, dims=shape)
        tensor.data_location = TensorProto.EXTERNAL
        location = self._files.name(kind, offset + length)
        for key, value in (("location", location), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        self.protos.append(tensor)
        return name

    def floats(self, name: str, kind: str, shape: tuple[int, ...], node: int) -> str:
        dtype = self._case.dtype
        return self.add(name, f"{kind}.{dtype}", TYPES[dtype], shape, node)

    def codes(self, name: str, shape: tuple[int, ...], node: int) -> str:
        if self._case.quant_type == "fp8":
            return self.add(name, "fp8", TensorProto.FLOAT8E4M3FN, shape, node)
        return self.add(name, "codes", TensorProto.UINT8, shape, node)

    def global_scales(self, name: str) -> str:
        scale = 1 / 64 if self._case.quant_type in ("nvfp4", "fp8") else 1.0
        values = np.full(self._case.experts, scale, np.float32)
        self.protos.append(onnx.numpy_helper.from_array(values, name))
        return name


def _moe_inputs(tensors: _Tensors, case: Case, i: int) -> list[str]:
    e, h, n, bits, block = case.experts, case.hidden, case.inter, case.bits, case.block_size
    names = ["x", f"router{i}"]
    zero_points: list[str] = []
    globals_: list[str] = []
    for stage, rows, columns in (("fc1", 2 * n, h), ("fc2", h, n)):
        name = f"{stage}_{i}"
        shape = (e, columns, rows) if case.k_major else (e, rows, columns)
        names.append(tensors.codes(f"{name}_codes", (*shape[:2], shape[2] * bits // 8), i))
        groups = columns // block if block else 1
        if case.quant_type == "int":
            names.append(tensors.floats(f"{name}_scales", f"scales{bits}", (e, rows, groups), i))
        elif case.quant_type == "fp8":
            names.append("")
        else:
            kind, data_type = (
                ("e4m3", TensorProto.FLOAT8E4M3FN)
                if case.quant_type == "nvfp4"
                else ("e8m0", TensorProto.FLOAT8E8M0)
            )
            names.append(tensors.add(f"{name}_scales", kind, data_type, (e, rows, groups), i))
        if case.quant_type != "int":
            globals_.append(tensors.global_scales(f"{name}_global"))
        names.append(tensors.floats(f"{name}_bias", "biases", (e, rows), i) if case.bias else "")
        if case.zero_points:
            shape = (e, rows, -(-groups * bits // 8))
            zero_points.append(
                tensors.add(f"{name}_zero_points", "codes", TensorProto.UINT8, shape, i)
            )
    # Inputs 8 to 10 are a third projection's, 11 to 13 zero points, 14 given weights of experts.
    return _trimmed([*names, "", "", "", *(zero_points or ["", ""]), "", "", *globals_])


def _matmul_inputs(tensors: _Tensors, case: Case, i: int) -> list[str]:
    groups = case.hidden // case.block_size
    codes = (case.inter, groups, case.block_size * case.bits // 8)
    names = [
        "x",
        tensors.codes(f"codes{i}", codes, i),
        tensors.floats(f"scales{i}", f"scales{case.bits}", (case.inter, groups), i),
        "",
        "",
        tensors.floats(f"bias{i}", "biases", (case.inter,), i) if case.bias else "",
    ]
    if case.zero_points:
        shape = (case.inter, -(-groups * case.bits // 8))
        names[3] = tensors.add(f"zero_points{i}", "codes", TensorProto.UINT8, shape, i)
    return _trimmed(names)


def _trimmed(names: list[str]) -> list[str]:
    while names and not names[-1]:
        names.pop()
    return names


def attributes(case: Case) -> dict[str, Any]:
    """Those of the case's op, in either domain."""
    if not case.experts:
        bits = {"bits": case.bits, "block_size": case.block_size}
        return {"K": case.hidden, "N": case.inter, **bits}
    common = {
        "k": case.topk,
        "activation_type": "swiglu",
        "swiglu_fusion": 1,
        "activation_alpha": 1.702,
        "activation_beta": 1.0,
        "swiglu_limit": 7.0,
        "normalize_routing_weights": 1,
        "expert_weight_bits": case.bits,
    }
    if case.quant_type != "int":
        return {**common, "quant_type": case.quant_type}
    return {**common, "block_size": case.block_size, "weights_prepacked": 0}


def build(case: Case, files: RandomFiles) -> dict[str, Path]:
    """A model for each domain, beside the random files."""
    tensors = _Tensors(files, case)
    make = _moe_inputs if case.experts else _matmul_inputs
    inputs = [make(tensors, case, i) for i in range(case.nodes())]
    value, dtype = helper.make_tensor_value_info, TYPES[case.dtype]
    columns = case.hidden if case.experts else case.inter
    graph_inputs = [value("x", dtype, ["T", case.hidden])]
    if case.experts:
        graph_inputs += [
            value(f"router{i}", dtype, ["T", case.experts]) for i in range(case.nodes())
        ]
    graph_outputs = [value(f"y{i}", dtype, ["T", columns]) for i in range(case.nodes())]
    paths = {}
    for name, domain in DOMAINS.items():
        extra = {"weights_layout": "k_major"} if name == "ours" and case.k_major else {}
        nodes = [
            helper.make_node(
                case.op,
                _stock_inputs(case, names) if name == "stock" else names,
                [f"y{i}"],
                f"node{i}",
                domain=domain,
                **attributes(case),
                **extra,
            )
            for i, names in enumerate(inputs)
        ]
        used = {name for node in nodes for name in node.input}
        protos = [proto for proto in tensors.protos if proto.name in used]
        graph = helper.make_graph(nodes, "bench", graph_inputs, graph_outputs, protos)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid(domain, 1)]
        model = helper.make_model(graph, ir_version=10, opset_imports=opsets)
        paths[name] = files.folder / f"{name}.onnx"
        paths[name].write_bytes(model.SerializeToString())
    return paths


def _stock_inputs(case: Case, names: list[str]) -> list[str]:
    """On CUDA the stock MatMulNBits has no bias: it runs without."""
    return names if case.experts else _trimmed(names[:5])
