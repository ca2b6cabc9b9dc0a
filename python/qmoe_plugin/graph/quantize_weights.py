"""Quantises one weight tensor, a few rows at a time, into a store."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qmoe_plugin import formats
from qmoe_plugin.formats import Quantized
from qmoe_plugin.formats.scales import E8M0
from qmoe_plugin.graph.describe import UnsupportedError
from qmoe_plugin.graph.edit import Names
from qmoe_plugin.graph.external_data import Store, raw_bytes

Array = npt.NDArray[Any]

SEARCHES = ("nearest", "mse")
"""How scales are found: those of round-to-nearest, or searched for the least squared error."""

_WEIGHTS_AT_ONCE = 1 << 22
"""16 MB in float32, of which the search holds about ten copies."""

_ROWS_UNIT = 64  # so that packed zero points of rows fill bytes


@dataclass(frozen=True)
class Weight:
    """A float weight, and what it becomes.

    Attributes:
        role: "fc1", "fc2" or "B".
        name: Of the tensor.
        tensor: [E, N, K], or one matrix [N, K].
        transposed: Whether N and K change places in it.
        format: The format.
        block_size: Along K; 0 = one scale a row, or an expert.
        symmetric: Without zero points.
        whole_blocks: Whether rows are padded to whole blocks, as MatMulNBits has them.
        ups: Of the shape of `tensor`, whose rows are gates: rows of both will alternate, g0, u0, g1
            and so on. None if there is nothing to merge.
        importance: Of its columns, [E, K], for the search; None if all matter the same.
    """

    role: str
    name: str
    tensor: ir.TensorProtocol
    transposed: bool
    format: formats.Format
    block_size: int
    symmetric: bool
    whole_blocks: bool
    ups: ir.TensorProtocol | None = None
    importance: Array | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """E, N and K."""
        *lead, a, b = self.tensor.shape.numpy()
        n, k = (b, a) if self.transposed else (a, b)
        return lead[0] if lead else 1, n if self.ups is None else 2 * n, k

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of the bytes of a row of codes."""
        k, bits = self.shape[2], self.format.bits
        if self.whole_blocks:
            return (self.format.groups(k, self.block_size), (self.block_size or k) * bits // 8)
        return (-(-k * bits // 8),)

    def __str__(self) -> str:
        """As in "fc1 int4 block 32, 4 x 192 x 64"."""
        block = f"block {self.block_size}" if self.block_size else "per channel"
        if self.format.square_blocks and not self.block_size:
            block = "per expert"
        zeros = "" if self.symmetric else " asymmetric"
        experts, n, k = self.shape
        sizes = f"{n} x {k}" if self.role == "B" else f"{experts} x {n} x {k}"
        return f"{self.role} {self.format.name}{zeros} {block}, {sizes}"


class _Rows:
    """Reads some rows at a time. Of a file, no more is mapped than is asked for."""

    def __init__(self, weight: Weight) -> None:
        self._transposed = weight.transposed
        self._tensors = [weight.tensor] if weight.ups is None else [weight.tensor, weight.ups]
        self._held = {
            index: raw_bytes(tensor)  # decoded once
            for index, tensor in enumerate(self._tensors)
            if not isinstance(tensor, ir.ExternalTensor)
        }

    def __call__(self, expert: int, start: int, stop: int) -> Array:
        """Rows of an expert, float32 [stop - start, K]; even numbers if ups are merged."""
        parts = len(self._tensors)
        rows = [
            self._matrix(index, expert)[start // parts : stop // parts].astype(np.float32)
            for index in range(parts)
        ]
        merged = rows[0] if parts == 1 else np.stack(rows, axis=1).reshape(stop - start, -1)
        return np.ascontiguousarray(merged)

    def _matrix(self, index: int, expert: int) -> Array:
        """A view [N, K] of a matrix of an expert."""
        tensor = self._tensors[index]
        *lead, a, b = tensor.shape.numpy()
        size = tensor.nbytes // math.prod(lead)
        if index in self._held:
            raw = self._held[index][expert * size : (expert + 1) * size]
        else:
            raw = raw_bytes(tensor, expert * size, size)
        matrix: Array = raw.view(tensor.dtype.numpy()).reshape(a, b)
        return matrix.T if self._transposed else matrix


@dataclass
class _Pieces:
    """What comes with the codes, row by row: [rows, ...] each."""

    scales: list[Array] = field(default_factory=list)
    zero_points: list[Array] = field(default_factory=list)
    global_scale: list[Array] = field(default_factory=list)

    def take(self, quantized: Quantized, first: bool) -> None:
        """Keeps those of some rows; `first` says whether they are the first of an expert."""
        if quantized.scales is not None:
            self.scales.append(quantized.scales)
        if quantized.zero_points is not None:
            self.zero_points.append(quantized.zero_points)
        if quantized.global_scale is not None and first:
            self.global_scale.append(np.reshape(quantized.global_scale, 1))


def quantize_weight(
    weight: Weight,
    search: str,
    store: Store,
    names: Names,
    advance: Callable[[int], None] = lambda count: None,
) -> dict[str, ir.TensorProtocol]:
    """Quantises a weight.

    Args:
        weight: What becomes what.
        search: One of `SEARCHES`.
        store: Takes the tensors.
        names: Gives them names.
        advance: Called with how many weights were done, time and again.

    Returns:
        The tensors of the node that the format has: "codes", "scales", "zero_points",
        "global_scale", "codebook". Of one matrix (role "B") they have no dimension of experts.

    Raises:
        UnsupportedError: If the weights are not finite.
    """
    experts, n, k = weight.shape
    lead = () if weight.role == "B" else (experts,)
    pieces = _Pieces()

    def stored(kind: str, array: Array) -> ir.TensorProtocol:
        dtype = ir.DataType.from_numpy(array.dtype)
        content = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        return store.stream(names.new(f"{weight.name}.{kind}"), dtype, array.shape, [content])

    tensors = {
        "codes": store.stream(
            names.new(f"{weight.name}.{weight.format.name}"),
            ir.DataType.UINT8,
            (*lead, n, *weight.row_shape),
            _codes(weight, search, pieces, advance),
        )
    }
    if pieces.scales:
        scales = np.concatenate(pieces.scales)
        # As bytes, which onnxruntime takes that does not know the type yet.
        scales = scales.view(np.uint8) if scales.dtype == E8M0 else scales
        shape = weight.format.scale_shape(n, k, weight.block_size)
        assert shape is not None
        tensors["scales"] = stored("scales", scales.reshape(*lead, *shape))
    if pieces.zero_points:
        zeros = np.concatenate(pieces.zero_points)
        shape = (n, zeros.shape[-1]) if zeros.ndim == 2 else (len(zeros) // experts,)
        tensors["zero_points"] = stored("zero_points", zeros.reshape(*lead, *shape))
    if pieces.global_scale:
        tensors["global_scale"] = stored("global_scale", np.concatenate(pieces.global_scale))
    if weight.format.codebook:
        tensors["codebook"] = stored("codebook", weight.format.values.astype(np.float32))
    return tensors


def _codes(
    weight: Weight, search: str, pieces: _Pieces, advance: Callable[[int], None]
) -> Iterator[npt.NDArray[np.uint8]]:
    """The codes of some rows at a time, uint8 [rows, bytes]; the rest goes to `pieces`."""
    experts, n, _ = weight.shape
    read, rows_at_once = _Rows(weight), _rows_at_once(weight, search)
    pieces_of = [(start, min(start + rows_at_once, n)) for start in range(0, n, rows_at_once)]
    for expert in range(experts):
        largest = None
        if len(pieces_of) > 1 and weight.format.has_global_scale(weight.block_size):
            largest = max(float(np.abs(read(expert, *piece)).max()) for piece in pieces_of)
        for start, stop in pieces_of:
            rows = read(expert, start, stop)
            quantized = _quantize(weight, search, rows, largest, expert)
            pieces.take(quantized, first=start == 0)
            padding = math.prod(weight.row_shape) - quantized.codes.shape[-1]
            yield np.ascontiguousarray(np.pad(quantized.codes, ((0, 0), (0, padding))))
            advance(rows.size)


def _rows_at_once(weight: Weight, search: str) -> int:
    """Rows that are quantised together: all of them where a scale of all of them is searched."""
    fmt, (_, n, k) = weight.format, weight.shape
    if search == "mse" and fmt.square_blocks and not weight.block_size:
        return n
    unit = max(_ROWS_UNIT, weight.block_size if fmt.square_blocks else 1)
    return max(1, _WEIGHTS_AT_ONCE // k // unit) * unit


def _quantize(
    weight: Weight, search: str, values: Array, largest: float | None, expert: int
) -> Quantized:
    if not np.isfinite(values).all():
        raise UnsupportedError(f"'{weight.name}' holds NaN or infinity, which no format has")
    scale_dtype = weight.tensor.dtype.numpy()
    if search != "mse":
        return weight.format.quantize(
            values,
            weight.block_size,
            symmetric=weight.symmetric,
            scale_dtype=scale_dtype,
            largest=largest,
        )
    return formats.quantize_mse(
        weight.format,
        values,
        weight.block_size,
        symmetric=weight.symmetric,
        scale_dtype=scale_dtype,
        largest=largest,
        importance=None if weight.importance is None else weight.importance[expert],
    )
