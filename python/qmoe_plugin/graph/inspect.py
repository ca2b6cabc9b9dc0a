"""Says of each node of a model which kernels run it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from qmoe_plugin.graph.apply import load
from qmoe_plugin.graph.describe import is_ours
from qmoe_plugin.graph.walk import bodies, external_tensors, label
from qmoe_plugin.kernels import Explanation, explain
from qmoe_plugin.library import OPS


@dataclass(frozen=True)
class NodeAnswer:
    """What our kernels say to one node.

    Attributes:
        name: Name of the node.
        op_type: As in "QMoE", one of our ops.
        domain: Where it is now.
        explanations: One a matrix product.
        reason: Why our op cannot run it whatever the kernel; "" if it can.
    """

    name: str
    op_type: str
    domain: str
    explanations: tuple[Explanation, ...] = ()
    reason: str = ""

    @property
    def runs(self) -> bool:
        """Whether we can run the node."""
        return not self.reason and all(e.kernel is not None for e in self.explanations)

    def __str__(self) -> str:
        """A few lines for people."""
        head = f"{self.domain}.{self.op_type} '{self.name}'"
        if self.reason:
            return f"{head}: {self.reason}"
        body = "\n".join(str(e) for e in self.explanations)
        return f"{head}\n" + "\n".join(f"  {line}" for line in body.splitlines())


def explain_model(
    model: str | os.PathLike[str] | ir.Model,
    *,
    sm: int | None = None,
    tokens: int = 1,
    name: str | None = None,
) -> list[NodeAnswer]:
    """Explains each node of our ops in a model.

    Weights are not read, but for the headers of those that were packed before.

    Args:
        model: The model, or its path.
        sm: As for `qmoe_plugin.explain`.
        tokens: As for `qmoe_plugin.explain`.
        name: Only the node of this name.

    Raises:
        ValueError: If there is no such node.
    """
    if not isinstance(model, ir.Model):
        folder = Path(model).parent
        model = ir.from_proto(load(Path(model)))
        for tensor in external_tensors(model):
            tensor.base_dir = folder  # of packed weights, the header is read
    answers = [
        _answer(node, sm, tokens)
        for body in bodies(model)
        for node in body.nodes()
        if is_ours(node)
        if name is None or label(node) == name
    ]
    if not answers:
        called = "" if name is None else f" called '{name}'"
        raise ValueError(f"the model has no {', '.join(OPS[:-1])} or {OPS[-1]} node{called}")
    return answers


def _answer(node: ir.Node, sm: int | None, tokens: int) -> NodeAnswer:
    try:
        explanations, reason = explain(node, sm, tokens), ""
    except ValueError as error:
        explanations, reason = (), str(error)
    return NodeAnswer(label(node), node.op_type, node.domain, explanations, reason)
