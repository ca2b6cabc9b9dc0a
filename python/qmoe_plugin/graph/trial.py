"""Runs a part of a model by itself, to see what it computes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx import helper

from qmoe_plugin.graph.describe import UnsupportedError
from qmoe_plugin.graph.external_data import raw_bytes
from qmoe_plugin.graph.flatten import reads
from qmoe_plugin.library import DOMAIN, runtime

Array = npt.NDArray[Any]

_LARGE = 1 << 16
"""Constants of more bytes are handed to the session beside the model."""

_ERRORS = 3  # severity from which onnxruntime prints, and it raises these


class Part:
    """The nodes that compute some values from others.

    What is neither computed from these nor constant is shapes: a Shape of something else, or an
    input of the model. Both are made up, from the sizes that dimensions of one name have.
    """

    def __init__(
        self,
        inputs: Sequence[ir.Value],
        outputs: Sequence[ir.Value],
        order: dict[ir.Node, int],
        opsets: Mapping[str, int],
    ) -> None:
        """Collects them.

        Args:
            inputs: What is given.
            outputs: What is wanted.
            order: The place of each node of the graph.
            opsets: Of the model.

        Raises:
            UnsupportedError: If something else is needed.
        """
        self._inputs, self._outputs = list(inputs), list(outputs)
        self._opsets = opsets
        self.nodes: list[ir.Node] = []
        self._constants: dict[str, ir.TensorProtocol] = {}
        self._shapes: dict[ir.Value, ir.Value] = {}  # result of Shape: of what
        self._model_inputs: list[ir.Value] = []
        dependent = self._dependent(order)
        self._collect(order, dependent)

    def run(self, feeds: Sequence[Array], sizes: Mapping[str, int]) -> list[Array]:
        """Runs them in onnxruntime on the CPU.

        Args:
            feeds: Of the inputs.
            sizes: Of dimensions with a name.

        Raises:
            UnsupportedError: If onnxruntime cannot.
        """
        given: dict[str, Array] = {}
        for value, array in zip(self._inputs, feeds, strict=True):
            given[_name(value)] = array
        for made, of in self._shapes.items():
            given[_name(made)] = self._shape_of(made, of, feeds[0].shape, sizes)
        for value in self._model_inputs:
            dtype = (value.dtype or ir.DataType.INT64).numpy()
            given[_name(value)] = np.zeros(_sizes(value, sizes), dtype)
        protos = [ir.to_proto(node) for node in self.nodes]
        names = [_name(value) for value in self._outputs]
        return run_nodes(protos, given, self._constants, names, self._opsets)

    def _dependent(self, order: dict[ir.Node, int]) -> set[ir.Value]:
        """What is computed from the inputs."""
        known = set(self._inputs)
        for node in order:
            if not known.isdisjoint(reads(node)):
                known.update(node.outputs)
        return known

    def _collect(self, order: dict[ir.Node, int], dependent: set[ir.Value]) -> None:
        found: set[ir.Node] = set()
        seen: set[ir.Value] = set(self._inputs)
        waiting = [value for value in self._outputs if value not in seen]
        while waiting:
            value = waiting.pop()
            if value in seen:
                continue
            seen.add(value)
            node = value.producer()
            if node is None:
                if value.is_initializer() and value.const_value is not None:
                    self._constants[_name(value)] = value.const_value
                elif value.is_graph_input():
                    self._model_inputs.append(value)
                else:
                    raise UnsupportedError(f"'{value.name}' belongs to a graph around it")
                continue
            source = node.inputs[0] if node.inputs else None
            if node.op_type == "Shape" and source is not None and source not in dependent:
                self._shapes[value] = source
                continue
            if node not in order:
                raise UnsupportedError(f"'{value.name}' is computed in another graph")
            found.add(node)
            waiting += reads(node)
        self.nodes = sorted(found, key=order.__getitem__)

    def _shape_of(
        self, made: ir.Value, of: ir.Value, fallback: tuple[int, ...], sizes: Mapping[str, int]
    ) -> Array:
        shape = fallback if of.shape is None else _sizes(of, sizes)
        node = made.producer()
        start = end = None
        if node is not None:
            start, end = (
                node.attributes[name].as_int() if name in node.attributes else None
                for name in ("start", "end")
            )
        return np.array(shape[start:end], np.int64)


def run_nodes(
    nodes: Sequence[onnx.NodeProto],
    feeds: Mapping[str, Array],
    constants: Mapping[str, ir.TensorProtocol],
    outputs: Sequence[str],
    opsets: Mapping[str, int],
) -> list[Array]:
    """Runs nodes in onnxruntime on the CPU, our ops among them.

    Raises:
        UnsupportedError: If onnxruntime cannot.
    """
    ort = runtime()
    from qmoe_plugin.session import register

    options = ort.SessionOptions()
    options.log_severity_level = _ERRORS + 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    register(options)
    tensors, beside = [], {}
    for name, tensor in constants.items():
        content = raw_bytes(tensor)
        proto = onnx.TensorProto(name=name, data_type=tensor.dtype, dims=tensor.shape.numpy())
        if content.size > _LARGE:
            proto.data_location = onnx.TensorProto.EXTERNAL
            proto.external_data.add(key="location", value="beside")
            beside[name] = _value(content.view(tensor.dtype.numpy()), tensor)
        else:
            proto.raw_data = content.tobytes()
        tensors.append(proto)
    if beside:
        options.add_external_initializers(list(beside), list(beside.values()))
    values = [
        helper.make_tensor_value_info(name, ir.DataType.from_numpy(array.dtype), array.shape)
        for name, array in feeds.items()
    ]
    wanted = [onnx.ValueInfoProto(name=name) for name in outputs]
    graph = helper.make_graph(nodes, "part", values, wanted, tensors)
    imports = [helper.make_opsetid(*item) for item in (dict(opsets) | {DOMAIN: 1}).items()]
    model = helper.make_model(graph, ir_version=10, opset_imports=imports)
    try:
        session = ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        results: list[Array] = session.run(None, dict(feeds))
    except Exception as error:
        first = str(error).strip().splitlines()[0]
        raise UnsupportedError(f"onnxruntime cannot run it by itself: {first}") from None
    return results


def _value(array: Array, tensor: ir.TensorProtocol) -> object:
    shaped = array.reshape(tensor.shape.numpy())
    return runtime().OrtValue.ortvalue_from_numpy_with_onnx_type(
        np.ascontiguousarray(shaped), int(tensor.dtype)
    )


def _sizes(value: ir.Value, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of a value, with sizes for the dimensions that have a name."""
    if value.shape is None:
        return ()
    found = []
    for dimension in value.shape:
        if isinstance(dimension, int):
            found.append(dimension)
        else:
            found.append(_size(str(dimension.value), sizes))
    return tuple(found)


def _size(name: str, sizes: Mapping[str, int]) -> int:
    """The size of a dimension: by its name, or as the product that its name is, as in b*s."""
    if name in sizes:
        return sizes[name]
    factors = name.split("*")
    return math.prod(
        int(factor) if factor.isdecimal() else sizes.get(factor, 1) for factor in factors
    )


def _name(value: ir.Value) -> str:
    assert value.name is not None
    return value.name
