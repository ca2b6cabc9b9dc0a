"""Models that are large enough to see where their weights are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper

from helpers.models import DOMAIN

MEGABYTE = 1 << 20
_TESTS = Path(__file__).parents[1]


def big_model(folder: Path, megabytes: int, op_type: str = "QMoE") -> tuple[Path, int]:
    """A model with so many MB of weights in an external file, and its packed bytes.

    The weights of a QMoE are int4, those of a MoE float16.

    The file is written piece by piece, so that the parent process does not hold it either.
    """
    hidden, inter, block = 2048, 1024, 32
    shapes = {"fc1": (2 * inter, hidden), "fc2": (hidden, inter)}
    bits = 4 if op_type == "QMoE" else 16
    experts = max(1, megabytes * MEGABYTE * 8 // bits // sum(n * k for n, k in shapes.values()))
    rng = np.random.default_rng(0)
    initializers, offset, packed = [], 0, 0
    with (folder / "big.data").open("wb") as file:

        def store(name: str, data_type: int, shape: tuple[int, ...], expert: bytes) -> None:
            nonlocal offset
            offset += -offset % 4096
            file.seek(offset)
            for _ in range(experts):
                file.write(expert)
            tensor = TensorProto(name=name, data_type=data_type, dims=(experts, *shape))
            tensor.data_location = TensorProto.EXTERNAL
            length = experts * len(expert)
            for key, value in (("location", "big.data"), ("offset", offset), ("length", length)):
                tensor.external_data.add(key=key, value=str(value))
            initializers.append(tensor)
            offset += length

        for name, (n, k) in shapes.items():
            if op_type == "MoE":
                weights = rng.uniform(-0.02, 0.02, (n, k)).astype(np.float16)
                store(f"{name}_experts_weights", TensorProto.FLOAT16, (n, k), weights.tobytes())
                packed += experts * (n * k * 2 + n * 4)
                continue
            store(f"{name}_experts_weights", TensorProto.UINT8, (n, k // 2), rng.bytes(n * k // 2))
            scales = rng.uniform(0.01, 0.02, (n, k // block)).astype(np.float16)
            store(f"{name}_scales", TensorProto.FLOAT16, (n, k // block), scales.tobytes())
            # Codes, a float16 scale a block, a float32 factor a row.
            packed += experts * (n * k // 2 + n * (k // block) * 2 + n * 4)
    half = len(initializers) // 2
    names = [tensor.name for tensor in initializers]
    node = helper.make_node(
        op_type,
        ["input", "router_probs", *names[:half], "", *names[half:]],  # no bias
        ["output"],
        name="node",
        domain=DOMAIN,
        k=min(8, experts),
        activation_type="swiglu",
        swiglu_fusion=1,
        **({"block_size": block, "weights_prepacked": 0} if op_type == "QMoE" else {}),
    )
    values = [
        helper.make_tensor_value_info("input", TensorProto.FLOAT16, ["tokens", hidden]),
        helper.make_tensor_value_info("router_probs", TensorProto.FLOAT16, ["tokens", experts]),
        helper.make_tensor_value_info("output", TensorProto.FLOAT16, ["tokens", hidden]),
    ]
    graph = helper.make_graph([node], "big", values[:2], values[2:], initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)]
    path = folder / "big.onnx"
    path.write_bytes(
        helper.make_model(graph, ir_version=10, opset_imports=opsets).SerializeToString()
    )
    return path, packed


def session_cost(path: Path, device: str) -> dict[str, int]:
    """The memory that a session takes, measured in a process of its own (`memory_child`)."""
    child = subprocess.run(
        [sys.executable, "-m", "helpers.memory_child", path, device],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(_TESTS), os.environ.get("PYTHONPATH", "")]),
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    if child.returncode:
        raise RuntimeError(child.stderr)
    cost: dict[str, int] = json.loads(child.stdout)
    return cost
