"""The CUDA kernels against the stock ops of onnxruntime-gpu, on layers of real models.

    python ci/bench/bench_gpu.py [--quick] [--cases REGEX] [--tokens 1 8 64] [--output FILE]

A model is a row of nodes of one op, each with weights and routing of its own, so that weights come
from memory and not from L2: at least 4 nodes, and enough of them to touch 320 MB at one token. It
runs under CUDA graph, inputs and outputs bound on the device, once with our op and once with the
stock one (same weights, same inputs, same session settings). A time is that of one whole node,
router logits in, output out: the median of rounds of 20 replays. The floor is the larger of bytes /
copy bandwidth and operations / matrix rate, both measured in the same process.

Writes JSON (ci/bench/results/gpu-<device>.json) and prints a table. Needs PyTorch for the limits.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper

import qmoe_plugin

RESULTS = Path(__file__).resolve().parent / "results"
DOMAINS = {"ours": qmoe_plugin.DOMAIN, "stock": "com.microsoft"}
TOUCHED_BYTES = 320e6
MAX_NODES = 16
REPLAYS = 20
TOKENS = [1, 2, 4, 8, 16, 32, 64, 512, 2048]


@dataclass(frozen=True)
class Case:
    """One op of one shape; `experts` 0 means MatMulNBits with K = hidden and N = inter."""

    name: str
    hidden: int
    inter: int
    experts: int = 0
    topk: int = 0
    bits: int = 4
    block_size: int = 32  # 0 = a scale an expert
    bias: bool = False
    quant: str = "int"  # or "fp4", "nvfp4", "fp8": quant_type of QMoE

    @property
    def k_major(self) -> bool:
        return self.quant in ("fp4", "nvfp4")

    @property
    def op(self) -> str:
        return "QMoE" if self.experts else "MatMulNBits"

    @property
    def expert_weights(self) -> int:
        return self.hidden * self.inter * (3 if self.experts else 1)

    def bytes_of(self, weights: float) -> float:
        """Codes and block scales of so many weights: float16, or a byte each for 4-bit floats."""
        scale = 2 if self.quant == "int" else 1
        return weights * (self.bits / 8 + (scale / self.block_size if self.block_size else 0))

    def floor_us(self, tokens: int, bandwidth: float, rate: float) -> float:
        """Least time of a node under uniform routing, at so many bytes and operations a second."""
        distinct, rows = 1.0, float(tokens)
        if self.experts:
            distinct = self.experts * (1 - (1 - self.topk / self.experts) ** tokens)
            rows = float(tokens * self.topk)
        read = self.bytes_of(self.expert_weights * distinct)
        return 1e6 * max(read / bandwidth, 2 * rows * self.expert_weights / rate)

    def nodes(self) -> int:
        touched = self.bytes_of(self.expert_weights * max(self.topk, 1))
        return int(min(MAX_NODES, max(4, -(-TOUCHED_BYTES // touched))))


CASES = [
    Case("gpt-oss-20b int4", 2880, 2880, 32, 4, bias=True),
    Case("qwen3-30b-a3b int4", 2048, 768, 128, 8),
    Case("MatMulNBits int4 4096x14336", 4096, 14336),
    Case("gpt-oss-20b int8", 2880, 2880, 32, 4, bits=8, bias=True),
    Case("qwen3.6-35b-a3b int4", 2048, 512, 256, 8),
    Case("gemma4-26b-a4b int4", 2816, 704, 128, 8),
    Case("mixtral-8x7b int4", 4096, 14336, 8, 2),
    Case("MatMulNBits int4 2880x5120", 2880, 5120),
    Case("MatMulNBits int4 2880x32", 2880, 32),
    Case("MatMulNBits int4 2880x32 with bias", 2880, 32, bias=True),
    Case("MatMulNBits int4 8192x8192", 8192, 8192),
    Case("MatMulNBits int8 4096x14336", 4096, 14336, bits=8),
    Case("gpt-oss-20b mxfp4", 2880, 2880, 32, 4, bias=True, quant="fp4"),
    Case("gpt-oss-20b nvfp4", 2880, 2880, 32, 4, block_size=16, bias=True, quant="nvfp4"),
    Case("gpt-oss-20b fp8", 2880, 2880, 32, 4, bits=8, block_size=0, bias=True, quant="fp8"),
]
QUICK_CASES = 3


class Weights:
    """Random weights of all nodes of a case in one external data file; both models refer to it."""

    def __init__(self, folder: Path, case: Case) -> None:
        self.folder, self.case = folder, case
        self.path = folder / "weights.bin"
        self._file = self.path.open("wb")
        self._rng = np.random.default_rng(0)
        self._pool = self._rng.bytes(1 << 24)
        if case.quant == "fp8":  # no NaN
            self._pool = (np.frombuffer(self._pool, np.uint8) & 0xB7).tobytes()
        self.tensors: list[onnx.TensorProto] = []

    def _add(self, name: str, data_type: int, shape: tuple[int, ...], pieces: list[bytes]) -> str:
        offset = self._file.tell() + -self._file.tell() % 4096
        self._file.seek(offset)
        for piece in pieces:
            self._file.write(piece)
        tensor = TensorProto(name=name, data_type=data_type, dims=shape)
        tensor.data_location = TensorProto.EXTERNAL
        length = self._file.tell() - offset
        for key, value in (("location", self.path.name), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        self.tensors.append(tensor)
        return name

    def codes(self, name: str, shape: tuple[int, ...]) -> str:
        left = int(np.prod(shape))
        if self.case.quant == "fp8":
            return self._add(name, TensorProto.FLOAT8E4M3FN, shape, self._pieces(left))
        return self._add(name, TensorProto.UINT8, shape, self._pieces(left))

    def _pieces(self, left: int) -> list[bytes]:
        pieces: list[bytes] = []
        while left:
            start = int(self._rng.integers(len(self._pool)))
            pieces.append(self._pool[start : start + left])
            left -= len(pieces[-1])
        return pieces

    def block_scales(self, name: str, shape: tuple[int, ...]) -> str:
        """Of 4-bit floats: e8m0 2^-7 to 2^-5, or e4m3 1/2 to 2."""
        e8m0 = self.case.quant == "fp4"
        values = self._rng.integers(*((120, 123) if e8m0 else (48, 64)), 1 << 16, dtype=np.uint8)
        data_type = TensorProto.FLOAT8E8M0 if e8m0 else TensorProto.FLOAT8E4M3FN
        return self._add(name, data_type, shape, [np.resize(values, int(np.prod(shape))).tobytes()])

    def global_scales(self, name: str) -> str:
        scale = {"fp4": 1.0, "nvfp4": 1 / 64, "fp8": 1 / 64}[self.case.quant]
        data = np.full(self.case.experts, scale, np.float32).tobytes()
        return self._add(name, TensorProto.FLOAT, (self.case.experts,), [data])

    def floats(self, name: str, shape: tuple[int, ...], low: float, high: float) -> str:
        values = self._rng.uniform(low, high, 1 << 16).astype(np.float16)
        data = np.resize(values, int(np.prod(shape))).tobytes()
        return self._add(name, TensorProto.FLOAT16, shape, [data])

    def close(self) -> None:
        self._file.close()


def moe_inputs(weights: Weights, i: int) -> list[str]:
    case = weights.case
    e, h, n, bits, block = case.experts, case.hidden, case.inter, case.bits, case.block_size
    spread = 1.0 / (2 ** (bits - 1) * np.sqrt(h))
    names = [f"x{i}", f"router{i}"]
    globals_ = []
    for stage, rows, columns in (("fc1", 2 * n, h), ("fc2", h, n)):
        name = f"{stage}_{i}"
        # 4-bit floats lie with K first, as the stock op wants them.
        shape = (e, rows, columns) if case.quant in ("int", "fp8") else (e, columns, rows)
        names.append(weights.codes(f"{name}_codes", (*shape[:2], shape[2] * bits // 8)))
        scale_shape = (e, rows, columns // block if block else 1)
        if case.quant == "int":
            names.append(weights.floats(f"{name}_scales", scale_shape, 0.5 * spread, 2 * spread))
        else:
            blocks = case.quant != "fp8"
            names.append(weights.block_scales(f"{name}_scales", scale_shape) if blocks else "")
            globals_.append(weights.global_scales(f"{name}_global"))
        bias = case.bias and weights.floats(f"{name}_bias", (e, rows), -0.1, 0.1)
        names.append(bias or "")
    if globals_:
        names += [""] * (15 - len(names)) + globals_
    return names


def matmul_inputs(weights: Weights, i: int) -> list[str]:
    case = weights.case
    blocks = case.hidden // case.block_size
    codes = (case.inter, blocks, case.block_size * case.bits // 8)
    names = [
        f"x{i}",
        weights.codes(f"b{i}", codes),
        weights.floats(f"scales{i}", (case.inter, blocks), 1e-3, 2e-3),
    ]
    if case.bias:  # the stock op runs without: on CUDA it has none
        names += ["", "", weights.floats(f"bias{i}", (case.inter,), -0.1, 0.1)]
    return names


def attributes(case: Case) -> dict[str, Any]:
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
    if case.quant != "int":
        return {**common, "quant_type": case.quant}
    return {**common, "block_size": case.block_size, "weights_prepacked": 0}


def build(case: Case, folder: Path) -> dict[str, Path]:
    """A model file for each domain."""
    weights = Weights(folder, case)
    make = moe_inputs if case.experts else matmul_inputs
    inputs = [make(weights, i) for i in range(case.nodes())]
    weights.close()
    value = helper.make_tensor_value_info
    output_size = case.hidden if case.experts else case.inter
    graph_inputs, graph_outputs = [], []
    for i in range(case.nodes()):
        graph_inputs.append(value(f"x{i}", TensorProto.FLOAT16, ["T", case.hidden]))
        if case.experts:
            graph_inputs.append(value(f"router{i}", TensorProto.FLOAT16, ["T", case.experts]))
        graph_outputs.append(value(f"y{i}", TensorProto.FLOAT16, ["T", output_size]))
    paths = {}
    for name, domain in DOMAINS.items():
        nodes = [
            helper.make_node(
                case.op,
                names[:3] if name == "stock" and not case.experts else names,
                [f"y{i}"],
                domain=domain,
                **attributes(case),
                **({"weights_layout": "k_major"} if name == "ours" and case.k_major else {}),
            )
            for i, names in enumerate(inputs)
        ]
        graph = helper.make_graph(nodes, "bench", graph_inputs, graph_outputs, weights.tensors)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid(domain, 1)]
        model = helper.make_model(graph, ir_version=10, opset_imports=opsets)
        paths[name] = folder / f"{name}.onnx"
        paths[name].write_bytes(model.SerializeToString())
    return paths


def open_session(path: Path) -> tuple[ort.InferenceSession, float]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if path.stem == "ours":
        qmoe_plugin.register(options)
    provider = ("CUDAExecutionProvider", {"enable_cuda_graph": "1"})
    started = time.perf_counter()
    session = ort.InferenceSession(str(path), options, providers=[provider])
    return session, time.perf_counter() - started


class Replayer:
    """One session, captured for one number of tokens."""

    def __init__(self, session: ort.InferenceSession, case: Case, tokens: int, graph: int) -> None:
        rng = np.random.default_rng(tokens)
        self._session = session
        self._binding = session.io_binding()
        self._values = []
        for value in session.get_inputs():
            scale = 2.0 if value.name.startswith("router") else 1.0
            data = (scale * rng.standard_normal((tokens, value.shape[1]))).astype(np.float16)
            self._values.append(ort.OrtValue.ortvalue_from_numpy(data, "cuda", 0))
            self._binding.bind_ortvalue_input(value.name, self._values[-1])
        self.outputs = []
        for value in session.get_outputs():
            shape = [tokens, value.shape[1]]
            out = ort.OrtValue.ortvalue_from_shape_and_type(shape, np.float16, "cuda", 0)
            self.outputs.append(out)
            self._binding.bind_ortvalue_output(value.name, out)
        self._options = ort.RunOptions()
        self._options.add_run_config_entry("gpu_graph_id", str(graph))
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self._nodes = case.nodes()
        self.round()

    def round(self) -> float:
        """Microseconds a node, over REPLAYS replays."""
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(REPLAYS):
            self._session.run_with_iobinding(self._binding, self._options)
        torch.cuda.synchronize()
        return 1e6 * (time.perf_counter() - started) / REPLAYS / self._nodes


def event_seconds(run: Callable[[], object], times: int) -> float:
    run()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(times):
        run()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) * 1e-3 / times


def measure_limits() -> dict[str, float]:
    """Copy bandwidth (bytes read and written, per second) and dense float16 rate (operations)."""
    source = torch.randint(0, 255, (4 << 30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = 2 * source.numel() / event_seconds(lambda: target.copy_(source), 10)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.float16) for _ in range(2))
    rate = 2 * 8192**3 / event_seconds(lambda: a @ b, 20)
    return {"copy_bytes_per_s": copy, "float16_flop_per_s": rate}


def measure(case: Case, tokens: list[int], rounds: int, limits: dict[str, float]) -> dict[str, Any]:
    cells = []
    with tempfile.TemporaryDirectory() as folder:
        paths = build(case, Path(folder))
        opened = {"ours": open_session(paths["ours"])}
        refusal = None
        try:
            opened["stock"] = open_session(paths["stock"])
        except Exception as error:  # of whatever type the binding makes
            refusal = str(error)[:300]
            print(f"{case.name}: the stock op refuses: {refusal}", flush=True)
        for graph, count in enumerate(tokens, start=1):
            players = {
                name: Replayer(session, case, count, graph) for name, (session, _) in opened.items()
            }
            times: dict[str, list[float]] = {name: [] for name in players}
            for _ in range(rounds):
                for name, player in players.items():
                    times[name].append(player.round())
            outputs = [
                np.concatenate([out.numpy() for out in player.outputs]).astype(np.float64)
                for player in players.values()
            ]
            floor = case.floor_us(count, limits["copy_bytes_per_s"], limits["float16_flop_per_s"])
            cell: dict[str, Any] = {"tokens": count, "floor_us": round(floor, 2)}
            for name, values in times.items():
                cell[f"{name}_us"] = round(statistics.median(values), 2)
                cell[f"{name}_spread_us"] = [round(min(values), 2), round(max(values), 2)]
            cell["of_floor"] = round(floor / cell["ours_us"], 3)
            line = (
                f"{case.name:34} {count:5} tokens  ours {cell['ours_us']:9.1f} us"
                f" ({100 * cell['of_floor']:3.0f} % of floor)"
            )
            if "stock" in players:
                cell["speedup"] = round(cell["stock_us"] / cell["ours_us"], 2)
                line += f"  stock {cell['stock_us']:9.1f} us  {cell['speedup']:5.2f}x"
            if "stock" in players and (case.experts or not case.bias):
                a, b = outputs
                cell["difference_rms"] = float(np.sqrt(((a - b) ** 2).mean() / (b**2).mean()))
                line += f"  difference {cell['difference_rms']:.1e}"
            cells.append(cell)
            print(line, flush=True)
    loads = {f"{name}_load_s": round(seconds, 2) for name, (_, seconds) in opened.items()}
    result = {**asdict(case), "nodes": case.nodes(), **loads, "cells": cells}
    return result if refusal is None else {**result, "stock_refuses": refusal}


def describe_machine() -> dict[str, Any]:
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    driver = ctypes.c_int()
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(driver))
    return {
        "device": torch.cuda.get_device_name(0),
        "cuda_driver_api": driver.value,
        "onnxruntime": ort.__version__,
        "qmoe_plugin": qmoe_plugin.__version__,
        "commit": commit,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the first cases only, few rounds")
    parser.add_argument("--cases", default="", help="regular expression of case names")
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 512, 2048]
    )
    parser.add_argument("--output", type=Path)
    parser.add_argument("--commit", help="of the tree, where there is no git")
    arguments = parser.parse_args()
    tokens = [1, 8, 64, 512] if arguments.quick else arguments.tokens
    limits = measure_limits()
    torch.cuda.empty_cache()
    print({name: f"{value:.3e}" for name, value in limits.items()}, flush=True)
    cases = [c for c in CASES if re.search(arguments.cases, c.name)]
    result: dict[str, Any] = {**describe_machine(), "limits": limits, "cases": []}
    result["commit"] = arguments.commit or result["commit"]
    device = re.sub(r"[^a-z0-9]+", "-", result["device"].lower())
    output = arguments.output or RESULTS / f"gpu-{device}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    for case in cases[: QUICK_CASES if arguments.quick else None]:
        result["cases"].append(measure(case, tokens, 3 if arguments.quick else 7, limits))
        output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
