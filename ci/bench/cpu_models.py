"""Random weights of a case in an external data file, and the models that use them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from cpu_cases import Case
from onnx import TensorProto, helper

from qmoe_plugin import reference

Array = np.ndarray[Any, Any]
POOL_SIZE = 1 << 24  # bytes of random codes that all weights are cut from, at random offsets
# Code of 1, and type of the tensor.
SMALL_SCALES = {
    "float8e8m0": (127, TensorProto.UINT8),
    "float8e4m3fn": (0x38, TensorProto.FLOAT8E4M3FN),
}
# In the order of the schema.
QMOE_INPUTS = (
    "fc1_codes", "fc1_scales", "fc1_bias", "fc2_codes", "fc2_scales", "fc2_bias",
    "", "", "", "", "", "", "", "fc1_global_scale", "fc2_global_scale",
)  # fmt: skip


class Weights:
    """Random tensors of one case, written to an external data file and mapped back."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case = case
        self.path = folder / "weights.bin"
        self.tensors: dict[str, Array] = {}
        self.initializers: list[onnx.TensorProto] = []
        self._rng = np.random.default_rng(0)
        self._pool = self._random_codes()
        with self.path.open("wb") as file:
            self._file = file
            for name, (n, k) in case.projections.items():
                self._projection(name, n, k)

    def _random_codes(self) -> Array:
        """A pool of codes, near the middle as those of normal weights are, or of any finite one."""
        fmt, count = self.case.fmt, POOL_SIZE * 8 // self.case.bits
        if self.case.has_stock:
            middle = 1 << (fmt.bits - 1)
            numbers = self._rng.normal(middle, 0.3125 * middle, count)
            codes = np.clip(np.rint(numbers), 0, 2 * middle - 1).astype(np.uint8)
        else:
            finite = np.flatnonzero(np.isfinite(fmt.values)).astype(np.uint8)
            codes = finite[self._rng.integers(0, len(finite), count, dtype=np.uint8)]
        pool: Array = fmt.pack(codes)
        return pool

    def _projection(self, name: str, n: int, k: int) -> None:
        case, rng = self.case, self._rng
        lead = (case.experts,) if case.experts else ()
        row_bytes = k * case.bits // 8
        if case.experts:
            self._codes(f"{name}_codes", (*lead, n, row_bytes))
        else:
            blocks = k // case.block_size
            self._codes(f"{name}_codes", (n, blocks, row_bytes // blocks))
        # So that a product with N(0, 1) activations is about N(0, 1) again.
        finite = case.fmt.values[np.isfinite(case.fmt.values)]
        spread = 0.3125 * (1 << (case.bits - 1)) if case.has_stock else float(np.std(finite))
        scale = np.float32(1 / (spread * np.sqrt(k)))
        shape = case.fmt.scale_shape(n, k, case.block_size)
        if case.fmt.has_global_scale(case.block_size):
            self._add(f"{name}_global_scale", np.full(lead, scale, np.float32))
            if shape is not None:
                one, kind = SMALL_SCALES[case.fmt.scale_type]
                near = rng.integers(one - 1, one + 2, (*lead, *shape), dtype=np.uint8)
                self._add(f"{name}_scales", near, kind)
        else:
            # Scales as exporters make them: float16 numbers, stored in the activations' type.
            assert shape is not None
            scales = scale * (0.5 + rng.random((*lead, *shape), dtype=np.float32))
            self._add(f"{name}_scales", scales.astype(np.float16).astype(np.float32))
        if case.bias:
            self._add(f"{name}_bias", 0.1 * rng.standard_normal((*lead, n), dtype=np.float32))

    def _codes(self, name: str, shape: tuple[int, ...]) -> None:
        offset, total = self._align(), int(np.prod(shape))
        for start in range(0, total, POOL_SIZE // 2):
            first = int(self._rng.integers(POOL_SIZE // 2))
            self._file.write(self._pool[first : first + min(POOL_SIZE // 2, total - start)].data)
        self._register(name, shape, np.dtype(np.uint8), TensorProto.UINT8, offset)

    def _add(self, name: str, array: Array, onnx_type: int = TensorProto.FLOAT) -> None:
        offset = self._align()
        self._file.write(array.tobytes())
        self._register(name, array.shape, array.dtype, onnx_type, offset)

    def _align(self) -> int:
        self._file.write(b"\0" * (-self._file.tell() % 4096))
        return self._file.tell()

    def _register(
        self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], onnx_type: int, offset: int
    ) -> None:
        self._file.flush()
        self.tensors[name] = np.memmap(self.path, dtype, "r", offset, shape)
        tensor = TensorProto(name=name, data_type=onnx_type, dims=shape)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in {
            "location": self.path.name,
            "offset": offset,
            "length": self.tensors[name].nbytes,
        }.items():
            tensor.external_data.add(key=key, value=str(value))
        self.initializers.append(tensor)

    def projection(self, name: str, experts: Array) -> reference.Projection:
        """A few experts' weights, as the oracle takes them."""
        parts = {part: self.tensors.get(f"{name}_{part}") for part in ("bias", "global_scale")}
        scales = self.tensors.get(f"{name}_scales")
        if scales is not None and self.case.fmt.scale_type == "float8e4m3fn":
            scales = scales.view(ml_dtypes.float8_e4m3fn)
        return reference.Projection(
            self.tensors[f"{name}_codes"][experts],
            None if scales is None else scales[experts],
            **{part: None if array is None else array[experts] for part, array in parts.items()},
        )


def save_model(case: Case, weights: Weights, domain: str, level: int, path: Path) -> None:
    """Writes a model of the case's node in a domain, at an accuracy_level."""

    def given(name: str) -> str:
        return name if name in weights.tensors else ""

    def value(name: str, columns: int) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["T", columns])

    inputs = [value("x", case.hidden)]
    if case.experts:
        inputs.append(value("router_probs", case.experts))
        names = ["x", "router_probs", *(given(name) for name in QMOE_INPUTS)]
    else:
        names = ["x", "b_codes", "b_scales", "", "", given("b_bias")]
    while not names[-1]:
        names.pop()
    node = helper.make_node(
        case.op, names, ["y"], "node", domain=domain, accuracy_level=level, **case.attributes()
    )
    output = value("y", case.hidden if case.experts else case.inter)
    graph = helper.make_graph([node], "bench", inputs, [output], weights.initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(domain, 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)


def make_feeds(case: Case, tokens: int, count: int) -> list[dict[str, Array]]:
    """Inputs of `count` calls, each with its own routing."""
    rng = np.random.default_rng(tokens)
    feeds = []
    for _ in range(count):
        feed = {"x": rng.standard_normal((tokens, case.hidden), dtype=np.float32)}
        if case.experts:
            feed["router_probs"] = rng.standard_normal((tokens, case.experts), dtype=np.float32)
        feeds.append(feed)
    return feeds


def experts_read(case: Case, feeds: list[dict[str, Array]]) -> float:
    """How many experts a call reads, on average; 1 for MatMulNBits."""
    if not case.experts:
        return 1.0
    chosen = [np.argsort(-f["router_probs"], axis=-1)[:, : case.topk] for f in feeds]
    return float(np.mean([len(np.unique(ids)) for ids in chosen]))


def exact(case: Case, weights: Weights, feed: dict[str, Array]) -> Array:
    """The last token's output in float64. Only its own experts are dequantised."""
    x = feed["x"][-1:]
    if not case.experts:
        t = weights.tensors
        return reference.matmul_nbits(
            x, t["b_codes"], t["b_scales"], bias=t.get("b_bias"), **case.attributes()
        )
    logits = feed["router_probs"][-1:]
    chosen = np.sort(np.argsort(-logits[0], kind="stable")[: case.topk])
    # Factors are normalised over the chosen experts, so the others' logits play no role.
    return reference.qmoe(
        x,
        logits[:, chosen],
        weights.projection("fc1", chosen),
        weights.projection("fc2", chosen),
        **case.attributes(),
    )


def error(output: Array, expected: Array) -> float:
    """Largest error of the last token, relative to the root mean square of its output."""
    return float(np.abs(output[-1:] - expected).max() / np.sqrt(np.mean(expected**2)))
