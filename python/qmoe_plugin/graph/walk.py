"""Walks over all nodes of a model: those of subgraphs and of the model's functions too."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import onnx
import onnx_ir as ir


@dataclass(frozen=True)
class Body:
    """The graph of a model with everything nested in it, or the same of one of its functions."""

    function: str  # "" for the model's graph
    content: ir.Graph | ir.Function

    @property
    def opset_imports(self) -> dict[str, int]:
        """Version of each domain that the nodes may be of."""
        return self.content.opset_imports

    def nodes(self) -> Iterator[ir.Node]:
        """All nodes; each before those of its own subgraphs."""
        yield from ir.traversal.RecursiveGraphIterator(self.content)

    def graphs(self) -> Iterator[ir.Graph]:
        """The graph and its subgraphs."""
        graph = self.content if isinstance(self.content, ir.Graph) else self.content.graph
        yield graph
        yield from graph.subgraphs()


def bodies(model: ir.Model) -> Iterator[Body]:
    """The bodies of a model: its graph, then its functions."""
    yield Body("", model.graph)
    for function in model.functions.values():
        yield Body(f"{function.domain}.{function.name}", function)


def external_tensors(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    """The tensors whose bytes are in other files."""
    for tensor in _tensors(model):
        if isinstance(tensor, ir.ExternalTensor):
            yield tensor


def replace_tensors(
    model: ir.Model, replace: Callable[[ir.TensorProtocol], ir.TensorProtocol]
) -> None:
    """Puts `replace(tensor)` in the place of each tensor of a model."""
    for body in bodies(model):
        for graph in body.graphs():
            for value in graph.initializers.values():
                if value.const_value is not None:
                    value.const_value = replace(value.const_value)
        for node in body.nodes():
            for name, attribute in node.attributes.items():
                if attribute.is_ref():
                    continue
                if attribute.type is ir.AttributeType.TENSOR:
                    node.attributes[name] = ir.AttrTensor(name, replace(attribute.as_tensor()))
                elif attribute.type is ir.AttributeType.TENSORS:
                    replaced = [replace(tensor) for tensor in attribute.as_tensors()]
                    node.attributes[name] = ir.AttrTensors(name, replaced)


def _tensors(model: ir.Model) -> Iterator[ir.TensorProtocol | None]:
    for body in bodies(model):
        for graph in body.graphs():
            yield from (value.const_value for value in graph.initializers.values())
        for node in body.nodes():
            for attribute in node.attributes.values():
                if attribute.is_ref():
                    continue
                if attribute.type is ir.AttributeType.TENSOR:
                    yield attribute.as_tensor()
                elif attribute.type is ir.AttributeType.TENSORS:
                    yield from attribute.as_tensors()


def label(node: ir.Node) -> str:
    """What to call a node in messages."""
    if node.name:
        return node.name
    return next((output.name for output in node.outputs if output.name), "(unnamed)")


def copy_domains(model: ir.Model, proto: onnx.ModelProto) -> None:
    """Brings into `proto` what a pass that changes domains did to `model`.

    Everything else of the proto stays as it is, to the byte, so that a model makes no detour
    through onnx_ir, which for instance drops sparse initializers.

    Args:
        model: Made of `proto` by `onnx_ir.from_proto`, then changed: domains, attributes and
            metadata of nodes, and opset imports.
        proto: Changed in place.
    """
    functions = {(f.domain, f.name, f.overload): f for f in proto.functions}
    for body in bodies(model):
        target: onnx.ModelProto | onnx.FunctionProto = proto
        nodes = _proto_nodes(proto.graph.node)
        if isinstance(body.content, ir.Function):
            target = functions[body.content.identifier()]
            nodes = _proto_nodes(target.node)
        for node, node_proto in zip(body.nodes(), nodes, strict=True):
            if node.op_type != node_proto.op_type:
                raise AssertionError(f"{node.op_type} is not {node_proto.op_type}")
            if node.domain != node_proto.domain:
                _copy_node(node, node_proto)
        _copy_opset_imports(body.opset_imports, target)


def _proto_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """In the order of `Body.nodes`."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _proto_nodes(attribute.g.node)
            elif attribute.type == onnx.AttributeProto.GRAPHS:
                for graph in attribute.graphs:
                    yield from _proto_nodes(graph.node)


def _copy_node(node: ir.Node, proto: onnx.NodeProto) -> None:
    proto.domain = node.domain
    for index in reversed(range(len(proto.attribute))):
        if proto.attribute[index].name not in node.attributes:
            del proto.attribute[index]
    present = {attribute.name: attribute for attribute in proto.attribute}
    for name, attribute in node.attributes.items():
        if name not in present:
            proto.attribute.append(ir.to_proto(attribute))
        elif attribute.type is ir.AttributeType.INT and not attribute.is_ref():
            present[name].i = attribute.as_int()
        elif attribute.type is ir.AttributeType.STRING and not attribute.is_ref():
            present[name].s = attribute.as_string().encode()
    if {entry.key: entry.value for entry in proto.metadata_props} != node.metadata_props:
        del proto.metadata_props[:]
        for key, value in node.metadata_props.items():
            proto.metadata_props.add(key=key, value=value)


def _copy_opset_imports(
    imports: dict[str, int], proto: onnx.ModelProto | onnx.FunctionProto
) -> None:
    for index in reversed(range(len(proto.opset_import))):
        if proto.opset_import[index].domain not in imports:
            del proto.opset_import[index]
    present = {entry.domain for entry in proto.opset_import}
    for domain, version in imports.items():
        if domain not in present:
            proto.opset_import.add(domain=domain, version=version)
