"""The float weights of a MoE node, in the layouts that exporters leave them in.

The op wants [E, N, K]. onnxruntime's own wanted [E, K, N] until 1.22, and some exporters put a
Transpose between the initializer and the node.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qmoe_plugin.graph.describe import UnsupportedError
from qmoe_plugin.graph.external_data import raw_bytes
from qmoe_plugin.graph.inputs import Constant, constant_tensor, given, string
from qmoe_plugin.graph.moe import WEIGHTS
from qmoe_plugin.graph.packed import is_packed
from qmoe_plugin.graph.qmoe import GATED
from qmoe_plugin.graph.routing import routed_size

_SWAPPED = [0, 2, 1]


@dataclass(frozen=True)
class ExpertWeights:
    """The weights of one projection of all experts.

    Attributes:
        name: Of the initializer.
        tensor: It.
        transposed: Whether it is [E, K, N], not [E, N, K].
    """

    name: str
    tensor: ir.TensorProtocol
    transposed: bool

    @property
    def constant(self) -> Constant:
        """Type and shape, as [E, N, K] whatever the tensor is."""
        shape = tuple(self.tensor.shape.numpy())
        if self.transposed and len(shape) == 3:
            shape = (shape[0], shape[2], shape[1])
        return Constant(self.name, self.tensor.dtype, shape)

    def matrix(self, expert: int) -> npt.NDArray[np.float32]:
        """The weights of an expert, [N, K]."""
        experts, *shape = self.tensor.shape.numpy()
        size = self.tensor.nbytes // experts
        raw = raw_bytes(self.tensor, expert * size, size)
        matrix = raw.view(self.tensor.dtype.numpy()).reshape(shape).astype(np.float32)
        return matrix.T if self.transposed else matrix


def expert_weights(node: ir.Node) -> dict[str, ExpertWeights]:
    """The weights of a MoE node by role, "fc1", "fc2" and perhaps "fc3", in whichever layout.

    Sizes tell the layout, with those of activations, biases and routers where weights alone do not
    (a fc1 that is not [gates and ups]). Where nothing does, it is the one of the op.

    Raises:
        UnsupportedError: If weights are missing, or not constant.
    """
    if is_packed(node):
        raise UnsupportedError("its weights are packed, which cannot be undone; take the original")
    found = {role: _stored(node, role) for role in WEIGHTS if given(node, WEIGHTS[role])}
    if _is_swapped(node, found):
        return {
            role: ExpertWeights(weights.name, weights.tensor, not weights.transposed)
            for role, weights in found.items()
        }
    return found


def _stored(node: ir.Node, role: str) -> ExpertWeights:
    """What the node gets, seen through a Transpose."""
    index, transposed = WEIGHTS[role], False
    value = node.inputs[index]
    producer = None if value is None else value.producer()
    if producer is not None and producer.domain == "" and producer.op_type == "Transpose":
        perm = producer.attributes.get("perm")
        if perm is not None and list(perm.as_ints()) == _SWAPPED:
            node, index, transposed = producer, 0, True
            value = node.inputs[0]
    tensor = constant_tensor(node, index, f"{role} weights")
    if tensor is None or value is None:
        raise UnsupportedError(f"{role} weights (input {index}) are missing")
    return ExpertWeights(value.name or role, tensor, transposed)


def _is_swapped(node: ir.Node, found: dict[str, ExpertWeights]) -> bool:
    """Whether the node gets [E, K, N]."""
    if not {"fc1", "fc2"} <= found.keys():
        return False
    fc1, fc2 = found["fc1"].constant.shape, found["fc2"].constant.shape
    if len(fc1) != 3 or len(fc2) != 3:
        return False
    gated = string(node, "activation_type", "relu") in GATED and "fc3" not in found
    parts = 2 if gated else 1
    as_is = fc1[2] == fc2[1] and fc1[1] == parts * fc2[2]
    swapped = fc1[1] == fc2[2] and fc1[2] == parts * fc2[1]
    if as_is and swapped:
        hidden = _hidden_size(node)
        return hidden == fc1[1] and hidden != fc1[2]
    return swapped


def _hidden_size(node: ir.Node) -> int | None:
    """Length of the activations; None if the model does not say."""
    values = [node.inputs[0], node.outputs[0]]
    if given(node, WEIGHTS["fc2"] + 1):
        values.append(node.inputs[WEIGHTS["fc2"] + 1])
    for value in values:
        if value is not None and value.shape is not None and len(value.shape):
            size = value.shape[-1]
            if isinstance(size, int):
                return size
    return routed_size(node)
