"""Compares two models node by node and end to end: float with quantised, stock with ours."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from qmoe_plugin.devices import CPU, Target, best_target
from qmoe_plugin.errors import Error, compare
from qmoe_plugin.graph.describe import is_ours
from qmoe_plugin.graph.retarget import Retarget
from qmoe_plugin.graph.walk import bodies, label
from qmoe_plugin.ort_values import Array
from qmoe_plugin.report import logger
from qmoe_plugin.sample_inputs import Wanted, known_dims, sample_inputs
from qmoe_plugin.taps import (
    Source,
    activation_names,
    default_providers,
    run_nodes,
    run_with_taps,
)

PathLike = str | os.PathLike[str]

_LOGITS = "logits"
_EXPERTS = ("MoE", "QMoE")
_FLOAT_PRODUCTS = ("MatMul", "Gemm")


@dataclass(frozen=True)
class NodeError:
    """The error of one node's output.

    Attributes:
        name: Name of the node in the second model.
        ops: What it is in both, as in "MoE -> qmoe_plugin.QMoE".
        total: With the errors of all nodes before it.
        own: Of the node fed with what the first model has there; None if that is not known, as the
            first model has no such values.
    """

    name: str
    ops: str
    total: Error
    own: Error | None


@dataclass(frozen=True)
class OutputError:
    """The error of one output of the model.

    Attributes:
        name: Its name.
        error: The error.
        agreement: Of logits, the share of positions whose largest value is at the same index.
    """

    name: str
    error: Error
    agreement: float | None


@dataclass(frozen=True)
class VerifyReport:
    """How far the second model is from the first.

    Attributes:
        first: The first model.
        second: The second.
        target: What they ran on.
        nodes: The nodes of our ops, or what was MatMul or MoE, in the order of the second model.
        outputs: The float outputs that both have.
        unmatched: Nodes of the second model that the first has no value for.
    """

    first: str
    second: str
    target: str
    nodes: tuple[NodeError, ...]
    outputs: tuple[OutputError, ...]
    unmatched: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain dicts and lists, for JSON."""
        nodes = [
            {
                **vars(node),
                "total": node.total.to_dict(),
                "own": None if node.own is None else node.own.to_dict(),
            }
            for node in self.nodes
        ]
        outputs = [{**vars(output), "error": output.error.to_dict()} for output in self.outputs]
        return {**vars(self), "nodes": nodes, "outputs": outputs}

    @property
    def broken(self) -> bool:
        """Whether anything is NaN or infinite in one of the models only."""
        errors = [node.total for node in self.nodes] + [output.error for output in self.outputs]
        errors += [node.own for node in self.nodes if node.own is not None]
        return any(error.broken for error in errors)


def verify(
    first: PathLike,
    second: PathLike | None = None,
    *,
    inputs: Wanted | None = None,
    cpu: bool = False,
) -> VerifyReport:
    """Runs two models on the same inputs and compares what their nodes and they themselves give.

    Nodes match if their first outputs are called the same: quantize, retarget and prepack keep
    these names. Exporters call MoE and QMoE differently; if there are as many in both models, they
    match in order. Nodes in subgraphs and functions are part of the end-to-end error only.

    Args:
        first: Path of the model that is right.
        second: Path of the other one; None for the first with its nodes run by our kernels.
        inputs: What to feed; None for random tokens, see `sample_inputs`.
        cpu: Run on the CPU even where there is a GPU.

    Raises:
        RuntimeError: If one of them does not run.
        ValueError: If inputs cannot be made, or the models have nothing in common.
    """
    target = CPU if cpu else best_target()
    providers = default_providers(target)
    a = Source.read(Path(first))
    b = Source.read(Path(first if second is None else second), _retarget(second, target))
    graphs = a.graph(), b.graph()
    feeds = sample_inputs(graphs[0], known_dims(inputs or Wanted(), Path(first)))
    pairs = _pairs(*graphs)
    logger.info("%d nodes are compared", len(pairs))

    # What single nodes of the second are fed with, where the first has values of that name.
    known = set(_produced(graphs[0])) | set(feeds)
    alone = {
        name: nodes[1]
        for name, nodes in pairs.items()
        if _is_product(nodes[1]) and known.issuperset(activation_names(nodes[1]))
    }
    read = {name for node in alone.values() for name in activation_names(node)}
    firsts = {name: nodes[0].outputs[0].name or "" for name, nodes in pairs.items()}
    expected = run_with_taps(a, providers, feeds, {*firsts.values(), *read})
    logger.info("%s has run", a.name)
    found = run_with_taps(b, providers, feeds, {*pairs, *(read & set(_produced(graphs[1])))})
    logger.info("%s has run", b.name)
    wanted = {value.name: value.dtype for value in graphs[1].graph.inputs if value.dtype}
    types = {
        name: wanted.get(name) or ir.DataType.from_numpy(found[name].dtype)
        for name in read
        if name in found
    }
    alone = {name: n for name, n in alone.items() if set(types).issuperset(activation_names(n))}
    own = run_nodes(b, providers, alone, expected, types)
    outputs = _outputs(graphs, expected, found)
    if not outputs and not pairs:
        raise ValueError(f"{a.name} and {b.name} have no output and no node in common")
    return VerifyReport(
        a.name,
        b.name,
        str(target),
        tuple(
            NodeError(
                label(nodes[1]),
                _ops(*nodes),
                _compare(name, expected[firsts[name]], found[name]),
                _compare(name, expected[firsts[name]], own[name]) if name in own else None,
            )
            for name, nodes in pairs.items()
        ),
        outputs,
        tuple(label(node) for name, node in _ours(graphs[1]).items() if name not in pairs),
    )


def _retarget(second: PathLike | None, target: Target) -> Retarget | None:
    return Retarget(target) if second is None else None


def _produced(model: ir.Model) -> dict[str, ir.Node]:
    """The nodes of the graph itself, by the name of their first output."""
    return {node.outputs[0].name or "": node for node in model.graph if node.outputs}


def _ours(model: ir.Model) -> dict[str, ir.Node]:
    """All nodes of our ops, by the name of their first output."""
    return {
        node.outputs[0].name or "": node
        for body in bodies(model)
        for node in body.nodes()
        if is_ours(node)
    }


def _pairs(first: ir.Model, second: ir.Model) -> dict[str, tuple[ir.Node, ir.Node]]:
    """The nodes to compare, by the name of the second one's output, in its order."""
    produced = _produced(first)
    wanted = set(_ours(first)) | set(_ours(second))
    experts = [
        [node for node in model.graph if node.op_type in _EXPERTS] for model in (first, second)
    ]
    in_order = {}
    if len(experts[0]) == len(experts[1]):
        in_order = dict(zip(experts[1], experts[0], strict=True))
    pairs = {}
    for name, node in _produced(second).items():
        other = produced.get(name) if name in wanted else None
        other = in_order.get(node) if other is None else other
        if other is not None:
            pairs[name] = (other, node)
    return pairs


def _is_product(node: ir.Node) -> bool:
    ours = is_ours(node)
    return ours or (node.domain == "" and node.op_type in _FLOAT_PRODUCTS)


def _ops(first: ir.Node, second: ir.Node) -> str:
    names = [f"{n.domain}.{n.op_type}" if n.domain else n.op_type for n in (first, second)]
    return names[0] if names[0] == names[1] else " -> ".join(names)


def _outputs(
    graphs: tuple[ir.Model, ir.Model], expected: Mapping[str, Array], found: Mapping[str, Array]
) -> tuple[OutputError, ...]:
    """The errors of the float outputs that both models have."""
    names = [value.name or "" for value in graphs[0].graph.outputs]
    common = [
        name
        for name in names
        if name in {value.name for value in graphs[1].graph.outputs}
        and name in expected  # no state of a sliding window
        and ir.DataType.from_numpy(expected[name].dtype).is_floating_point()
    ]
    return tuple(
        OutputError(
            name,
            _compare(name, expected[name], found[name]),
            _agreement(expected[name], found[name]) if name == _LOGITS else None,
        )
        for name in common
    )


def _agreement(expected: Array, found: Array) -> float:
    """The share of rows whose largest value is at the same index."""
    best = [array.astype(np.float32).argmax(-1) for array in (expected, found)]
    return float((best[0] == best[1]).mean())


def _compare(name: str, expected: Array, found: Array) -> Error:
    try:
        return compare(expected, found)
    except ValueError as error:
        raise ValueError(f"'{name}': {error}") from None
