"""What a model holds: formats, layouts and bytes, kernels, and how fast they could be."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qmoe_plugin.bandwidth import Bandwidth, bandwidth
from qmoe_plugin.devices import Target, target
from qmoe_plugin.graph.apply import load
from qmoe_plugin.graph.describe import Description, UnsupportedError, describe, is_ours
from qmoe_plugin.graph.inputs import integer
from qmoe_plugin.graph.layouts import NAMES
from qmoe_plugin.graph.packed import LAYOUT_ATTRIBUTE
from qmoe_plugin.graph.schema import OPS
from qmoe_plugin.graph.walk import Body, bodies, external_tensors, label
from qmoe_plugin.kernels import ask
from qmoe_plugin.report import KernelChoice

_EXPERT_OPS = ("QMoE", "MoE")
_FLOAT_FORMATS = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class NodeView:
    """A node of one of our ops.

    Attributes:
        name: Name of the node.
        op_type: As in "QMoE".
        domain: Where it is: com.microsoft's or ours.
        function: The model's function that holds it; "" for the graph.
        weights: The matrices, as in "fc1 int4 block 32, 32 x 5760 x 2880" (experts, rows, columns).
        layout: How weights are stored, as in "raw"; "" if our op cannot run the node.
        bytes: Of all its constants.
        touched: Of those that a run reads: of experts those that are expected to be chosen if all
            are equally likely.
        kernels: What runs it; empty if nothing does.
        floor_us: Microseconds that reading `touched` takes at least; None without a bandwidth.
        reason: Why our op or no kernel of ours can run it; "" if one does.
        warning: What was decided about its layout by custom; "" for nothing.
    """

    name: str
    op_type: str
    domain: str
    function: str
    weights: tuple[str, ...]
    layout: str
    bytes: int
    touched: float
    kernels: tuple[KernelChoice, ...] = ()
    floor_us: float | None = None
    reason: str = ""
    warning: str = ""


@dataclass
class Experts:
    """Bytes of experts' weights: of QMoE and MoE nodes, and matrices called so elsewhere.

    Attributes:
        total: All.
        quantized: Those that are not in a float type; scales and biases of quantised nodes, too.
        ours: Those of nodes that our kernels run.
    """

    total: int = 0
    quantized: int = 0
    ours: int = 0


@dataclass(frozen=True)
class Inspection:
    """What a model holds.

    Attributes:
        model: The model.
        target: What kernels were asked for.
        tokens: In a run.
        bandwidth: What floors are computed with; None if there is no figure.
        nodes: The nodes of our ops.
        bytes_by_format: Of all constants of the model: of our nodes by weight format (with scales,
            zero points and biases), of others by type. Tensors that several nodes share count once.
        experts: Of these, the experts.
    """

    model: str
    target: str
    tokens: int
    bandwidth: Bandwidth | None
    nodes: tuple[NodeView, ...]
    bytes_by_format: dict[str, int]
    experts: Experts = field(default_factory=Experts)

    @property
    def floor_us(self) -> float | None:
        """Of all nodes together; None without a bandwidth."""
        floors = [node.floor_us for node in self.nodes]
        return sum(floor for floor in floors if floor is not None) if self.bandwidth else None

    def to_dict(self) -> dict[str, Any]:
        """As plain dicts and lists, for JSON."""
        nodes = [
            {**vars(node), "kernels": [vars(choice) for choice in node.kernels]}
            for node in self.nodes
        ]
        return {
            **vars(self),
            "bandwidth": None if self.bandwidth is None else vars(self.bandwidth),
            "nodes": nodes,
            "experts": vars(self.experts),
            "floor_us": self.floor_us,
        }


def inspect(
    model: str | os.PathLike[str] | ir.Model,
    *,
    sm: int | None = None,
    tokens: int = 1,
    gb_per_s: float | None = None,
) -> Inspection:
    """Looks at a model without reading its weights (but for headers of packed ones).

    Args:
        model: The model, or its path. Files with external data need not be there.
        sm: As for `qmoe_plugin.explain`.
        tokens: Tokens in a run.
        gb_per_s: Bandwidth of the device's memory; None for that of a common GPU of this `sm`.

    Raises:
        ValueError: If tokens or the bandwidth are not positive.
    """
    if tokens < 1:
        raise ValueError(f"tokens is {tokens}; at least 1 is needed")
    if gb_per_s is not None and not 0 < gb_per_s < math.inf:
        raise ValueError(f"the bandwidth is {gb_per_s} GB/s; it must be positive")
    name = "(in memory)"
    if not isinstance(model, ir.Model):
        name, folder = str(model), Path(model).parent
        model = ir.from_proto(load(Path(model)))
        for tensor in external_tensors(model):
            tensor.base_dir = folder  # of packed weights, the header is read
    where = target(sm)
    rate = bandwidth(where) if gb_per_s is None else Bandwidth(gb_per_s, "as given")
    return _Inspector(where, tokens, rate).run(model, name)


class _Inspector:
    """Collects what there is to say of a model."""

    def __init__(self, where: Target, tokens: int, rate: Bandwidth | None) -> None:
        """Starts with nothing."""
        self._target, self._tokens, self._rate = where, tokens, rate
        self._counted: set[int] = set()
        self._formats: Counter[str] = Counter()
        self._experts = Experts()

    def run(self, model: ir.Model, name: str) -> Inspection:
        """Looks at everything."""
        views = [
            self._node(node, body)
            for body in bodies(model)
            for node in body.nodes()
            if is_ours(node)
        ]
        for body in bodies(model):
            for tensor, name_of in _constants(body):
                kind = _type_name(tensor)
                # The gate of a shared expert, which is better left in float, has one row.
                is_matrix = len(tensor.shape) > 1 and 1 not in tensor.shape.numpy()
                called = name_of if is_matrix else ""
                quantized = kind not in _FLOAT_FORMATS
                self._count(tensor, kind, called, quantized=quantized, runs=False)
        return Inspection(
            name,
            str(self._target),
            self._tokens,
            self._rate,
            tuple(views),
            dict(self._formats.most_common()),
            self._experts,
        )

    def _node(self, node: ir.Node, body: Body) -> NodeView:
        description, reason = None, ""
        kernels: tuple[KernelChoice, ...] = ()
        try:
            description = describe(node)
            kernels = self._choose(description)
        except UnsupportedError as error:
            reason = str(error)
        size = 0
        for index, value in enumerate(node.inputs):
            tensor = _tensor(value)
            if value is None or tensor is None:
                continue
            size += tensor.nbytes
            kind = _format(node, description, index) or _type_name(tensor)
            called = "expert" if node.op_type in _EXPERT_OPS else value.name or ""
            quantized = node.op_type != "MoE"
            self._count(tensor, kind, called, quantized=quantized, runs=not reason)
        share = 1.0 if description is None else _share(node, description, self._tokens)
        floor = None if self._rate is None else self._rate.microseconds(size * share)
        return NodeView(
            label(node),
            node.op_type,
            node.domain,
            body.function,
            () if description is None else _weights(description),
            "" if description is None else _layout(node, description),
            size,
            size * share,
            kernels,
            floor,
            reason,
            "" if description is None else description.warning,
        )

    def _choose(self, description: Description) -> tuple[KernelChoice, ...]:
        answers = [ask(problem) for problem in description.problems(self._target, self._tokens)]
        for answer in answers:
            if answer.kernel is None:
                raise UnsupportedError(f"no kernel runs {answer.problem}: {answer.refusals}")
        return tuple(
            KernelChoice(answer.problem.stage, self._tokens, answer.kernel or "")
            for answer in answers
        )

    def _count(
        self, tensor: ir.TensorProtocol, kind: str, called: str, *, quantized: bool, runs: bool
    ) -> None:
        """Notes the bytes of a tensor, once."""
        if id(tensor) in self._counted:
            return
        self._counted.add(id(tensor))
        self._formats[kind] += tensor.nbytes
        if "expert" in called.lower():
            self._experts.total += tensor.nbytes
            self._experts.quantized += tensor.nbytes * quantized
            self._experts.ours += tensor.nbytes * runs


def _constants(body: Body) -> Iterator[tuple[ir.TensorProtocol, str]]:
    """All constants of a body, with their names."""
    for graph in body.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value.const_value, value.name or ""
    for node in body.nodes():
        for output in node.outputs[:1]:
            tensor = _tensor(output)
            if tensor is not None:
                yield tensor, output.name or ""


def _tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The constant that a value is; None if it is none."""
    if value is None:
        return None
    producer = value.producer()
    if producer is None:
        return value.const_value if value.is_initializer() else None
    attribute = producer.attributes.get("value")
    if producer.op_type != "Constant" or attribute is None or attribute.is_ref():
        return None
    return attribute.as_tensor() if attribute.type is ir.AttributeType.TENSOR else None


def _format(node: ir.Node, description: Description | None, index: int) -> str | None:
    """The weight format that an input of a node belongs to; None if it is not known."""
    if description is None:
        return None
    names = OPS[node.op_type][1]
    second = index < len(names) and names[index].startswith("fc2")
    return description.gemms[-1 if second else 0].format


def _type_name(tensor: ir.TensorProtocol) -> str:
    names = {ir.DataType.FLOAT: "float32", ir.DataType.DOUBLE: "float64"}
    return names.get(tensor.dtype, tensor.dtype.name.lower())


def _weights(description: Description) -> tuple[str, ...]:
    """The matrices in words."""
    texts = []
    for gemm in description.gemms:
        if gemm.format in _FLOAT_FORMATS:
            block = ""
        else:
            block = f" block {gemm.block_size}" if gemm.block_size else " per channel"
        block += " with zero points" if gemm.zero_points else ""
        experts = f"{gemm.experts} x " if gemm.stage != "dense" else ""
        texts.append(f"{gemm.stage} {gemm.format}{block}, {experts}{gemm.n} x {gemm.k}")
    return tuple(texts)


def _layout(node: ir.Node, description: Description) -> str:
    """How the weights are stored."""
    if description.packed:
        return f"packed ({description.packed[0].layout})"
    said = {name: value.value for name, value in node.attributes.items() if not value.is_ref()}
    said |= description.decided
    if said.get("weights_prepacked") == 1 or said.get("weight_prepacked") == 1:
        return NAMES["fpa_intb"]
    if said.get("weight_prepacked") == 2:
        return NAMES["fpa_intb90"]
    return NAMES[str(said.get(LAYOUT_ATTRIBUTE) or "raw")]


def _share(node: ir.Node, description: Description, tokens: int) -> float:
    """The share of a node's weights that a run reads, if all experts are equally likely."""
    if node.op_type not in _EXPERT_OPS:
        return 1.0
    gemm = description.gemms[0]
    shared = integer(node, "num_shared_experts", 0)
    routed, topk = gemm.experts - shared, gemm.rows - shared
    return (shared + routed * (1 - (1 - topk / routed) ** tokens)) / gemm.experts
