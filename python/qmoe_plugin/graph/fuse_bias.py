"""Moves biases into the nodes that compute what they are added to, and takes off those of zeros."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qmoe_plugin.graph.describe import STOCK_DOMAIN, UnsupportedError
from qmoe_plugin.graph.edit import Names, add_initializer, drop_if_unused
from qmoe_plugin.graph.external_data import Store, raw_bytes
from qmoe_plugin.graph.inputs import constant_tensor, integer
from qmoe_plugin.graph.packed import is_packed
from qmoe_plugin.graph.walk import Body, bodies, label
from qmoe_plugin.library import DOMAIN
from qmoe_plugin.report import FuseReport, NodeReport

_OUR_DOMAINS = (STOCK_DOMAIN, DOMAIN)
_MATMUL_NBITS_BIAS = 5
_BIASES = {"MatMulNBits": (_MATMUL_NBITS_BIAS,), "QMoE": (4, 7, 10), "MoE": (3, 5, 7)}
"""Input numbers of biases, each of which may be left out."""


class FuseBias(ir.passes.InPlacePass):
    """MatMulNBits + Add becomes MatMulNBits with a bias. `report` says what was done."""

    def __init__(self, store: Store) -> None:
        """Makes a pass; biases that have to be made go to the store."""
        super().__init__()
        self.report = FuseReport("bias")
        self._store = store

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Changes the model, and sets `report`."""
        names = Names(model)
        fused: list[NodeReport] = []
        kept: list[NodeReport] = []
        for body in bodies(model):
            for node in list(body.nodes()):
                add = _added_to(node)
                if add is None:
                    continue
                name = label(node)
                try:
                    self._fuse(node, add, body, names)
                except UnsupportedError as error:
                    kept.append(NodeReport(name, node.op_type, body.function, str(error)))
                    continue
                what = f"has the bias that {label(add)} added"
                fused.append(NodeReport(name, node.op_type, body.function, change=what))
        self.report = FuseReport("bias", tuple(fused), tuple(kept))
        return ir.passes.PassResult(model, bool(fused))

    def _fuse(self, node: ir.Node, add: ir.Node, body: Body, names: Names) -> None:
        """Gives the node the bias of the Add, and the place of it."""
        output, former = node.outputs[0], list(add.inputs)
        bias = former[1] if former[0] is output else former[0]
        if bias is None:
            raise UnsupportedError(f"Add '{label(add)}' adds nothing")
        values = _row(node, add, former.index(bias))
        if len(output.uses()) > 1 or output.is_graph_output():
            raise UnsupportedError(
                f"{len(output.uses()) - 1 + output.is_graph_output()} others read '{output.name}', "
                "which would be gone"
            )
        if node.graph is not add.graph:
            raise UnsupportedError(f"Add '{label(add)}' is in another graph than the node")
        if is_packed(node):
            raise UnsupportedError(
                "its weights are packed, and a bias would be among them; fuse before prepack"
            )
        own = constant_tensor(node, _MATMUL_NBITS_BIAS, "bias")
        if own is not None:
            values = (own.numpy() + values).astype(values.dtype)
        if body.function:
            raise UnsupportedError(
                "a function of the model holds it, which has no initializers; inline the function "
                "first"
            )
        graph = node.graph
        assert isinstance(graph, ir.Graph)
        earlier = node.inputs[_MATMUL_NBITS_BIAS] if own is not None else None
        shape = (values.size,)
        if own is None and bias.shape is not None and bias.shape.numpy() == shape:
            made = bias
        else:
            content = np.ascontiguousarray(values).view(np.uint8)
            name = names.new(f"{label(node)}.bias")
            made = add_initializer(
                graph,
                self._store.stream(name, ir.DataType.from_numpy(values.dtype), shape, [content]),
            )
        inputs = [*node.inputs, *[None] * _MATMUL_NBITS_BIAS][:_MATMUL_NBITS_BIAS]
        inputs += [made, *node.inputs[_MATMUL_NBITS_BIAS + 1 :]]
        biased = ir.Node(
            node.domain,
            node.op_type,
            inputs,
            node.attributes.values(),
            name=node.name,
            metadata_props=node.metadata_props,
            doc_string=node.doc_string,
        )
        ir.convenience.replace_nodes_and_values(
            graph, add, [node, add], [biased], [add.outputs[0]], [biased.outputs[0]]
        )
        for value in (bias, earlier):
            drop_if_unused(value)


class DropZeroBias(ir.passes.InPlacePass):
    """Takes biases off that are all zeros. `report` says which."""

    def __init__(self, store: Store) -> None:
        """Makes a pass. It puts nothing into the store."""
        super().__init__()
        self.report = FuseReport("zero-bias")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Changes the model, and sets `report`."""
        changed: list[NodeReport] = []
        kept: list[NodeReport] = []
        for body in bodies(model):
            for node in body.nodes():
                if node.domain not in _OUR_DOMAINS or node.op_type not in _BIASES:
                    continue
                try:
                    dropped = _drop_zeros(node)
                except UnsupportedError as error:
                    kept.append(NodeReport(label(node), node.op_type, body.function, str(error)))
                    continue
                if dropped:
                    what = f"no longer adds the zeros of {', '.join(dropped)}"
                    done = NodeReport(label(node), node.op_type, body.function, change=what)
                    changed.append(done)
        self.report = FuseReport("zero-bias", tuple(changed), tuple(kept))
        return ir.passes.PassResult(model, bool(changed))


def _drop_zeros(node: ir.Node) -> list[str]:
    """Takes biases of zeros off a node; their names.

    Raises:
        UnsupportedError: If a bias is not constant.
    """
    zeros = [
        index
        for index in _BIASES[node.op_type]
        if (tensor := constant_tensor(node, index, "bias")) is not None and not _is_set(tensor)
    ]
    values = [node.inputs[index] for index in zeros]
    for index, value in zip(zeros, values, strict=True):
        node.replace_input_with(index, None)
        drop_if_unused(value)
    given_inputs = [index for index, value in enumerate(node.inputs) if value is not None]
    node.resize_inputs(max(given_inputs) + 1)
    return [value.name or "" for value in values if value is not None]


def _is_set(tensor: ir.TensorProtocol) -> bool:
    """Whether a float tensor holds anything but zeros."""
    values = raw_bytes(tensor).view(tensor.dtype.numpy())
    return bool((values != 0).any())


def _added_to(node: ir.Node) -> ir.Node | None:
    """The Add that reads what a MatMulNBits computes; None if there is none."""
    if node.domain not in _OUR_DOMAINS or node.op_type != "MatMulNBits":
        return None
    for user, _ in node.outputs[0].uses():
        if user.domain == "" and user.op_type == "Add":
            return user
    return None


def _row(node: ir.Node, add: ir.Node, index: int) -> npt.NDArray[Any]:
    """The constant that is added, as a bias [N].

    Raises:
        UnsupportedError: If it is none.
    """
    tensor, n = constant_tensor(add, index, "what is added"), integer(node, "N", 0)
    assert tensor is not None
    shape = tuple(tensor.shape.numpy())
    output = node.outputs[0].shape
    rank = None if output is None else len(output)
    if rank is None and node.inputs[0] is not None and node.inputs[0].shape is not None:
        rank = len(node.inputs[0].shape)
    if math.prod(shape[:-1]) != 1 or (shape and shape[-1] not in (1, n)):
        raise UnsupportedError(
            f"what Add '{label(add)}' adds has shape {list(shape)}; a bias is [{n}]"
        )
    if len(shape) > max(1, rank or 0):
        known = "of unknown rank" if rank is None else f"of rank {rank}"
        raise UnsupportedError(
            f"what Add '{label(add)}' adds has shape {list(shape)}, and makes more dimensions of a "
            f"product {known}"
        )
    return np.ascontiguousarray(np.broadcast_to(tensor.numpy().reshape(-1), n))
