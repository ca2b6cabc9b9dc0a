"""Weights that `qmoe_plugin.prepack` packed: nodes that say weights_layout="packed".

A weight input is then uint8[bytes], whose header says what they are. Scales, zero points, biases
and global scales are in them, and fc3 is in fc1, so all these inputs are left out. The rules are
those of ops/ort/packed_node.h and ops/pack_source.h.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qmoe_plugin import formats
from qmoe_plugin.devices import Target
from qmoe_plugin.graph.describe import UnsupportedError
from qmoe_plugin.graph.external_data import raw_bytes
from qmoe_plugin.graph.inputs import constant_tensor, given, has, integer, string
from qmoe_plugin.library import native

LAYOUT_ATTRIBUTE = "weights_layout"
"""An attribute of ours that com.microsoft does not have."""

PACKED = "packed"
"""Its value for packed weights, of all ops."""

_HEADER_BYTES = 64


@dataclass(frozen=True, kw_only=True)
class PackedWeights:
    """What the header of packed weights says.

    Attributes:
        name: "fc1", "fc2" or "B".
        format: Weight format.
        layout: "cpu_panel16" or "cuda_tile16x64".
        device: What kernels with this layout run on.
        scale_dtype: Type of block scales: "float32" or "float16".
        experts: E.
        rows: Output features, gates and ups together.
        k: Input features.
        block_size: 0 for one scale a row.
        gated: Whether gates and ups alternate.
        zero_points: Whether there are any.
        act_scales: Whether scales of the activations are in the weights.
    """

    name: str
    format: str
    layout: str
    device: Literal["CPU", "CUDA"]
    scale_dtype: str
    experts: int
    rows: int
    k: int
    block_size: int
    gated: bool
    zero_points: bool
    act_scales: bool

    def __str__(self) -> str:
        """As in "fc1 int4 block 32, 4 x 192 x 64"."""
        block = f"block {self.block_size}" if self.block_size else "per channel"
        return f"{self.name} {self.format} {block}, {self.experts} x {self.rows} x {self.k}"

    def check_matrix(self, experts: int, rows: int, k: int, *, gated: bool, scaled: bool) -> None:
        """Refuses weights of other sizes, activation or activation scales than the node's."""
        if (self.experts, self.rows, self.k) != (experts, rows, k):
            raise UnsupportedError(
                f"{self.name} packed weights are {self.experts} x {self.rows} x {self.k}; this "
                f"node needs {experts} x {rows} x {k}"
            )
        if self.gated != gated:
            kind = "a gated activation" if self.gated else "an activation without gates"
            raise UnsupportedError(f"{self.name} weights were packed for {kind}")
        if self.act_scales != scaled:
            have = "with" if self.act_scales else "without"
            raise UnsupportedError(f"{self.name} weights were packed {have} activation scales")

    def check_target(self, target: Target, dtype: str) -> None:
        """Refuses a device or activations that the weights were not packed for."""
        packed_for = "GPUs" if self.device == "CUDA" else "CPUs"
        if target.device == "CUDA":
            wide = self.scale_dtype == "float32"
            packed_for += f" and {'float32' if wide else '16-bit'} activations"
            fits = self.device == "CUDA" and wide == (dtype == "float32")
        else:
            fits = self.device == "CPU"
        if not fits:
            raise UnsupportedError(
                f"{self.name} weights were packed for {packed_for} (layout {self.layout}), and "
                f"this is {target} with {dtype} ones; prepack the original model for it: "
                f"qmoe_plugin.prepack(model, output, sm={target.sm or None})"
            )


def is_packed(node: ir.Node) -> bool:
    """Whether the node says that its weights are packed."""
    return string(node, LAYOUT_ATTRIBUTE, "") == PACKED


def refuse_other_layouts(node: ir.Node) -> None:
    """Refuses a weights_layout that is not "packed", of a node that has no others."""
    layout = string(node, LAYOUT_ATTRIBUTE, "")
    if layout not in ("", PACKED):
        raise UnsupportedError(f"{LAYOUT_ATTRIBUTE} is '{layout}'; only {PACKED} is allowed")


def read_packed(
    node: ir.Node, index: int, name: str, fmt: formats.Format | None, block_size: int
) -> PackedWeights:
    """Reads the header of packed weights.

    Args:
        node: The node.
        index: Input number of the weights.
        name: What to call them.
        fmt: The format that the node's attributes say; None where they say none, as the weights are
            of a float type.
        block_size: Likewise; 0 for None.

    Raises:
        UnsupportedError: If there are none, or they are damaged, of another version, or not what
            the attributes say.
    """
    tensor = constant_tensor(node, index, f"{name} weights")
    if tensor is None or tensor.dtype is not ir.DataType.UINT8 or len(tensor.shape) != 1:
        raise UnsupportedError(f"{name} weights must be uint8[bytes], as weights_layout is packed")
    try:
        weights = read_header(name, raw_bytes(tensor))
    except (OSError, ValueError) as error:
        raise UnsupportedError(f"{name}: {error}") from None
    if fmt is None:
        if weights.format not in formats.PLAIN_FORMATS:
            raise UnsupportedError(
                f"{name} weights were packed as {weights.format}, but those of a {node.op_type} "
                f"are of one of {', '.join(formats.PLAIN_FORMATS)}"
            )
    elif (weights.format, weights.block_size) != (fmt.name, block_size):
        raise UnsupportedError(
            f"{name} weights were packed as {weights.format} with block size {weights.block_size}, "
            f"but the node's attributes say {fmt.name} and {block_size}"
        )
    return weights


def read_header(name: str, content: npt.NDArray[np.uint8]) -> PackedWeights:
    """What packed weights, [bytes], say of themselves.

    Raises:
        ValueError: If no session would load them.
    """
    header = content[:_HEADER_BYTES].tobytes()
    return PackedWeights(name=name, **native().read_packed(header=header, size=content.size))


def refuse_other_inputs(node: ir.Node, allowed: Container[int]) -> None:
    """Refuses inputs that are in the packed weights."""
    for index in range(len(node.inputs)):
        if given(node, index) and index not in allowed:
            raise UnsupportedError(
                f"input {index} is given, but packed weights have everything in them; leave it out"
            )


def refuse_stock_layout(node: ir.Node, attribute: str, neutral: int) -> None:
    """Refuses another layout that an attribute of com.microsoft names."""
    if has(node, attribute) and integer(node, attribute, neutral) != neutral:
        raise UnsupportedError(
            f"{LAYOUT_ATTRIBUTE} is '{PACKED}', but {attribute}={integer(node, attribute, 0)} is "
            "given too; leave it out"
        )
