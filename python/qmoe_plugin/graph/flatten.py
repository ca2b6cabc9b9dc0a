"""Writes a Loop over experts, or an If around one, out in the graph that holds it.

torch.onnx makes them of scripted functions: a Loop that runs once for each expert, with an If that
skips those that no token chose.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from qmoe_plugin.graph.describe import UnsupportedError
from qmoe_plugin.graph.edit import Names, remove_unread
from qmoe_plugin.graph.walk import label

_PRODUCTS = ("MatMul", "Gemm", "MatMulNBits")
_MOST_RUNS = 1024


def _graphs(node: ir.Node) -> Iterator[ir.Graph]:
    for attribute in node.attributes.values():
        if attribute.is_ref():
            continue
        if attribute.type is ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type is ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def holds_products(node: ir.Node) -> bool:
    """Whether there are matrix products in graphs that are attributes of a node."""
    return any(inner.op_type in _PRODUCTS for graph in _graphs(node) for inner in graph.all_nodes())


def reads(node: ir.Node) -> Iterator[ir.Value]:
    """What a node reads, its graphs included: of these the values from outside them."""
    made: set[ir.Value] = set()
    for graph in _graphs(node):
        for inner in graph.all_nodes():
            made.update(inner.outputs)
            made.update(*(nested.inputs for nested in _graphs(inner)))
        made.update(graph.inputs)
    for one in (node, *(inner for graph in _graphs(node) for inner in graph.all_nodes())):
        yield from (value for value in one.inputs if value is not None and value not in made)
    for graph in _graphs(node):
        yield from (value for value in graph.outputs if value not in made)


def check(node: ir.Node) -> bool:
    """Looks whether `flatten` can do a node.

    Returns:
        Whether that leaves a condition out, so that the results have to be compared.

    Raises:
        UnsupportedError: If it cannot; the message says why.
    """
    if node.op_type not in ("Loop", "If") or node.domain != "":
        raise UnsupportedError("only Loop and If can be written out")
    body = _taken(node)
    if node.op_type == "Loop":
        _check_loop(node, body)
    nested = [inner for inner in body if next(_graphs(inner), None) is not None]
    for inner in nested:
        if not holds_products(inner):
            raise UnsupportedError(f"the {inner.op_type} '{label(inner)}' in it is no expert")
    conditions = [check(inner) for inner in nested]  # all of them, as each may refuse
    return node.op_type == "If" or any(conditions)


def _taken(node: ir.Node) -> ir.Graph:
    """The graph of a Loop; of an If the one with products."""
    graphs = [g for g in _graphs(node) if any(n.op_type in _PRODUCTS for n in g.all_nodes())]
    if len(graphs) != 1:
        raise UnsupportedError("both branches of it have matrix products")
    return graphs[0]


def _check_loop(node: ir.Node, body: ir.Graph) -> None:
    runs = _number(node.inputs[0])
    if runs is None or not 0 < runs <= _MOST_RUNS:
        raise UnsupportedError("how often it runs is not constant")
    carried = len(node.inputs) - 2
    if len(node.outputs) != carried:
        raise UnsupportedError("it collects the results of its runs")
    start = node.inputs[1]
    if start is not None and not _number(start):
        raise UnsupportedError("it may stop early")
    again: ir.Value | None = body.outputs[0]
    while again is not None and again is not body.inputs[1]:
        producer = again.producer()
        if producer is None or producer.op_type != "Identity":
            if not _number(again):
                raise UnsupportedError("it may stop early")
            return
        again = producer.inputs[0]


def _number(value: ir.Value | None) -> int | None:
    """The number that a constant is, 1 for true; None if it is computed."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None or tensor.size != 1 else int(tensor.numpy().reshape(-1)[0])


def flatten(node: ir.Node, names: Names) -> list[ir.Node]:
    """Replaces a node that passed `check` by what it runs; its outputs keep their names.

    Args:
        node: A Loop or If of a graph.
        names: Those of the model.

    Returns:
        The new nodes.
    """
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    made: list[ir.Node] = []
    results = _Writer(graph, names, made).results(node, {})
    for place, value in enumerate(results):
        if value.producer() not in made or value in results[:place]:  # it keeps its name
            name = names.new(f"{label(node)}.result")
            made.append(ir.Node("", "Identity", [value], name=name))
            results[place] = made[-1].outputs[0]
            results[place].name = name
    graph.insert_before(node, made)
    for old, new in zip(node.outputs, results, strict=True):
        new.type, new.shape = old.type, old.shape
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        new.name, old.name = old.name, names.new(f"{old.name}.replaced")
    conditions = [value.producer() for value in node.inputs if value is not None]
    for inner in [n for body in _graphs(node) for n in body.all_nodes()]:
        for index in range(len(inner.inputs)):
            inner.replace_input_with(index, None)
    graph.remove(node, safe=True)
    for start in (*reversed(made), *conditions):
        if start is not None and start.graph is graph:
            remove_unread(graph, start)
    return [new for new in made if new.graph is graph]


class _Writer:
    """Writes nodes of nested graphs anew, for the graph around them."""

    def __init__(self, graph: ir.Graph, names: Names, made: list[ir.Node]) -> None:
        self._graph, self._names, self._made = graph, names, made

    def results(self, node: ir.Node, known: dict[ir.Value, ir.Value]) -> list[ir.Value]:
        """What a Loop or If gives; `known` are values that were written anew."""
        body = _taken(node)
        if node.op_type == "If":
            return self._body(body, dict(known))
        carried = [self._value(value, known) for value in node.inputs[2:]]
        for run in range(_number(node.inputs[0]) or 0):
            inner = dict(known)
            inner[body.inputs[0]] = self._constant(np.array(run))
            inner[body.inputs[1]] = self._constant(np.array(True))
            inner.update(zip(body.inputs[2:], carried, strict=True))
            carried = self._body(body, inner)[1:]
        return carried

    def _body(self, graph: ir.Graph, known: dict[ir.Value, ir.Value]) -> list[ir.Value]:
        for value in graph.initializers.values():
            if value not in known and value.const_value is not None:
                known[value] = self._initializer(value)
        for node in graph:
            if holds_products(node):
                known.update(zip(node.outputs, self.results(node, known), strict=True))
                continue
            copy = ir.Node(
                node.domain,
                node.op_type,
                [None if value is None else self._value(value, known) for value in node.inputs],
                node.attributes.values(),
                num_outputs=len(node.outputs),
                name=self._names.new(f"{label(node)}.flat"),
            )
            for old, new in zip(node.outputs, copy.outputs, strict=True):
                new.name = self._names.new(f"{old.name}.flat")
                new.type, new.shape = old.type, old.shape
                known[old] = new
            self._made.append(copy)
        return [self._value(value, known) for value in graph.outputs]

    def _value(self, value: ir.Value | None, known: dict[ir.Value, ir.Value]) -> ir.Value:
        assert value is not None
        return known.get(value, value)

    def _constant(self, values: np.ndarray) -> ir.Value:
        name = self._names.new("loop_constant")
        node = ir.Node("", "Constant", [], [ir.AttrTensor("value", ir.Tensor(values))], name=name)
        node.outputs[0].name = name
        self._made.append(node)
        return node.outputs[0]

    def _initializer(self, value: ir.Value) -> ir.Value:
        made = ir.Value(
            name=self._names.new(f"{value.name}.flat"),
            type=value.type,
            shape=value.shape,
            const_value=value.const_value,
        )
        self._graph.register_initializer(made)
        return made
