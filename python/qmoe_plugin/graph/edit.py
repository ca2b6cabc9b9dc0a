"""Small changes of graphs that passes share."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from qmoe_plugin.graph.walk import bodies


class Names:
    """The names of a model's values."""

    def __init__(self, model: ir.Model) -> None:
        """Collects them."""
        self._taken = {
            value.name
            for body in bodies(model)
            for graph in body.graphs()
            for value in (*graph.inputs, *graph.initializers.values())
        }
        self._taken |= {
            value.name for body in bodies(model) for node in body.nodes() for value in node.outputs
        }

    def new(self, wanted: str) -> str:
        """This name, or one like it that no value has."""
        name, count = wanted, 1
        while name in self._taken:
            count += 1
            name = f"{wanted}{count}"
        self._taken.add(name)
        return name


def add_initializer(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    """A new initializer of this graph, called like the tensor."""
    made = ir.Value(
        name=tensor.name,
        type=ir.TensorType(tensor.dtype),
        shape=ir.Shape(tensor.shape.numpy()),
        const_value=tensor,
    )
    graph.register_initializer(made)
    return made


def drop_if_unused(value: ir.Value | None) -> None:
    """Removes a constant that nobody reads any more."""
    if value is None or value.uses() or value.is_graph_output() or value.graph is None:
        return
    producer = value.producer()
    if producer is not None:
        if producer.op_type == "Constant":
            value.graph.remove(producer)
    elif value.is_initializer() and not value.is_graph_input():
        assert isinstance(value.graph, ir.Graph)
        value.graph.initializers.pop(value.name or "")


def set_attributes(node: ir.Node, said: Mapping[str, int | float | str | None]) -> None:
    """Sets attributes of a node, and takes off those that are None."""
    for name, value in said.items():
        if value is None:
            node.attributes.pop(name, None)
        else:
            node.attributes[name] = ir.convenience.convert_attribute(name, value)


def drop_weight(value: ir.Value | None) -> None:
    """Removes a constant that nobody reads any more, and a Transpose of one."""
    producer = None if value is None else value.producer()
    if value is None or producer is None or producer.op_type != "Transpose":
        drop_if_unused(value)
    elif not value.uses() and not value.is_graph_output() and value.graph is not None:
        source = producer.inputs[0]
        value.graph.remove(producer, safe=True)
        drop_weight(source)


def remove_unread(graph: ir.Graph, start: ir.Node) -> None:
    """Removes a node that nobody reads, and what was computed for it alone."""
    waiting = [start]
    while waiting:
        node = waiting.pop()
        if node.graph is not graph:
            continue  # removed before
        if any(output.uses() or output.is_graph_output() for output in node.outputs):
            continue
        inputs = [value for value in node.inputs if value is not None]
        graph.remove(node, safe=True)
        for value in inputs:
            producer = value.producer()
            if producer is None:
                drop_if_unused(value)
            elif producer.graph is graph:
                waiting.append(producer)
