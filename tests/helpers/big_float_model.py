"""Quantises a float model of many GB, and says what memory that took, in JSON.

    python -m helpers.big_float_model FOLDER [--gigabytes 12] [--format int4] [--search mse]

The model has MoE nodes, a head [K, N] that has to be turned, and a table that stays as it is. Its
data file is mostly a hole, so that only the result takes disk space.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper

GIGABYTE = 1 << 30
_HIDDEN, _INTER, _EXPERTS = 2048, 1024, 32
_VOCABULARY = 32768  # 1/4 GB, in the head and in the table


def make(folder: Path, gigabytes: float) -> Path:
    """A model with so many GB of float32 weights."""
    file = folder / "big.data"
    rng = np.random.default_rng(0)
    tensors, offset = [], 0

    def tensor(name: str, *shape: int) -> str:
        nonlocal offset
        made = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape)
        made.data_location = TensorProto.EXTERNAL
        length = 4 * int(np.prod(shape))
        for key, value in (("location", file.name), ("offset", offset), ("length", length)):
            made.external_data.add(key=key, value=str(value))
        tensors.append(made)
        with file.open("r+b") as stream:  # the first numbers; the rest is a hole
            stream.seek(offset)
            stream.write(rng.standard_normal(1 << 16).astype(np.float32).tobytes())
        offset += length
        return name

    file.touch()
    layer = 4 * _EXPERTS * 3 * _INTER * _HIDDEN
    ends = 2 * 4 * _VOCABULARY * _HIDDEN
    layers = max(1, round((gigabytes * GIGABYTE - ends) / layer))
    nodes = [helper.make_node("Gather", [tensor("table", _VOCABULARY, _HIDDEN), "ids"], ["x0"])]
    for i in range(layers):
        weights = [
            tensor(f"fc1_{i}", _EXPERTS, 2 * _INTER, _HIDDEN),
            "",
            tensor(f"fc2_{i}", _EXPERTS, _HIDDEN, _INTER),
        ]
        node = helper.make_node(
            "MoE",
            [f"x{i}", "logits", *weights],
            [f"x{i + 1}"],
            domain="com.microsoft",
            k=2,
            activation_type="swiglu",
            swiglu_fusion=1,
        )
        nodes.append(node)
    nodes.append(
        helper.make_node("MatMul", [f"x{layers}", tensor("head", _HIDDEN, _VOCABULARY)], ["y"])
    )
    with file.open("r+b") as stream:
        stream.truncate(offset)
    values = [
        helper.make_tensor_value_info("ids", TensorProto.INT64, ["tokens"]),
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["tokens", _EXPERTS]),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, ["tokens", _VOCABULARY]),
    ]
    graph = helper.make_graph(nodes, "big", values[:2], values[2:], tensors)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    path = folder / "big.onnx"
    model = helper.make_model(graph, ir_version=10, opset_imports=opsets)
    path.write_bytes(model.SerializeToString())
    return path


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes; pages of mapped files count."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(dict(line.split(":", 1) for line in lines)[field].split()[0]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=12)
    parser.add_argument("--format", default="int4")
    parser.add_argument("--search", default="nearest")
    options = parser.parse_args()

    import qmoe_plugin

    needed = int(options.gigabytes * GIGABYTE / 3)
    if shutil.disk_usage(options.folder).free < 2 * needed:
        sys.exit(f"{options.folder} has less than {2 * needed >> 30} GB free")
    path = make(options.folder, options.gigabytes)
    size = (options.folder / "big.data").stat().st_size
    before, start = resident("VmRSS"), time.monotonic()
    report = qmoe_plugin.quantize(
        path, options.folder / "small.onnx", format=options.format, search=options.search
    )
    result = {
        "gigabytes": size / GIGABYTE,
        "quantized": len(report.quantized),
        "seconds": time.monotonic() - start,
        "peak_above": resident("VmHWM") - before,
        "written": (options.folder / "small.onnx.data").stat().st_size,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
