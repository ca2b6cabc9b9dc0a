"""Fuses dense experts that an exporter left in a Loop or If: written out, they are as others are.

What is written out is kept only if it becomes a MoE; it is tried on a copy of the graph first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qmoe_plugin.graph.describe import UnsupportedError
from qmoe_plugin.graph.edit import Names
from qmoe_plugin.graph.external_data import Discard, Store
from qmoe_plugin.graph.flatten import check, flatten, holds_products, reads
from qmoe_plugin.graph.fuse_moe import FuseMoE, shape_of_tokens
from qmoe_plugin.graph.moe_products import product_of
from qmoe_plugin.graph.moe_region import is_anchor, router_of, views_of
from qmoe_plugin.graph.trial import Part
from qmoe_plugin.graph.walk import label
from qmoe_plugin.progress import Progress
from qmoe_plugin.report import FuseReport

_TOKENS = (1, 24)
"""With one, most experts have none: what a condition is for."""

_TOLERANCE = {np.dtype(np.float32): 1e-5, np.dtype(np.float16): 1e-2}


@dataclass(frozen=True)
class _Nested:
    """A TopK over experts, and the nodes that hold these in their graphs, in order."""

    topk: ir.Node
    nodes: tuple[ir.Node, ...]


def fuse_moe(model: ir.Model, store: Store, progress: Progress | None = None) -> FuseReport:
    """Makes MoE of all dense experts of a model, see `FuseMoE`; changes the model.

    Args:
        model: The model.
        store: Takes weights that have to be put together.
        progress: Called with the name of each TopK, those done and all.
    """
    found = {label(nested.topk): nested for nested in _find(model.graph)}
    problems = _problems(model, found) if found else {}
    names = Names(model)
    for name, nested in found.items():
        if name not in problems:
            for node in nested.nodes:
                flatten(node, names)
    fuse = FuseMoE(store, progress)
    fuse(model)
    kept = (
        dataclasses.replace(node, reason=problems.get(node.name, node.reason))
        for node in fuse.report.kept
    )
    return dataclasses.replace(fuse.report, kept=tuple(kept))


def _find(graph: ir.Graph) -> Iterator[_Nested]:
    nodes = list(graph)
    taken: set[ir.Node] = set()
    if not any(map(holds_products, nodes)):
        return
    for place in reversed(range(len(nodes))):
        if not is_anchor(nodes[place]):
            continue
        known = set(nodes[place].outputs)
        found = []
        for node in nodes[place + 1 :]:
            if known.isdisjoint(reads(node)):
                continue
            known.update(node.outputs)
            if node not in taken and holds_products(node):
                found.append(node)
        if not found:
            continue
        # A Loop has all experts, an If one; what comes behind them is something else.
        count = _count(nodes[place]) if found[0].op_type == "If" else 1
        taken.update(found[:count])
        yield _Nested(nodes[place], tuple(found[:count]))


def _count(topk: ir.Node) -> int:
    """How many experts a TopK selects from."""
    router = product_of(router_of(topk))
    assert router is not None  # as `is_anchor` said
    return router.n


def _problems(model: ir.Model, found: Mapping[str, _Nested]) -> dict[str, str]:
    """Why what a TopK selects stays in its Loop or If, by the name of the TopK."""
    trial = model.clone()
    names = Names(trial)
    problems: dict[str, str] = {}
    made: dict[str, list[ir.Node]] = {}
    for nested in _find(trial.graph):
        name = label(nested.topk)
        try:
            conditions = [check(node) for node in nested.nodes]
            made[name] = [new for node in nested.nodes for new in flatten(node, names)]
            if any(conditions):
                _compare(model.graph, trial.graph, found[name])
        except UnsupportedError as error:
            problems[name] = str(error)
    probe = FuseMoE(Discard())
    probe(trial)
    fused = {node.name for node in probe.report.fused}
    reasons = {node.name: node.reason for node in probe.report.kept}
    for name in found:
        if name not in fused:
            problems.setdefault(name, reasons.get(name, "it is no Mixture of Experts"))
        elif any(node.graph is not None for node in made.get(name, ())):
            problems.setdefault(name, "it holds something else, too")
    return {
        name: f"its experts are in the {node.op_type} '{label(node)}': {problem}"
        for name, problem in problems.items()
        for node in found[name].nodes[:1]
    }


def _compare(original: ir.Graph, flat: ir.Graph, nested: _Nested) -> None:
    """Runs both, with many tokens and with one, on random activations.

    Raises:
        UnsupportedError: If they do not give the same.
    """
    router = product_of(router_of(nested.topk))
    assert router is not None  # as `is_anchor` said
    start = views_of(router.activations)[-1]
    dtype = (start.dtype or ir.DataType.FLOAT).numpy()
    wanted = [value.name for value in nested.nodes[-1].outputs]
    for tokens in _TOKENS:
        shape, sizes = shape_of_tokens(start, tokens, router.k)
        x = np.random.default_rng(0).standard_normal(shape).astype(dtype)
        both = []
        for graph in (original, flat):
            values = _values(graph)
            part = Part(
                [values[start.name]],
                [values[name] for name in wanted],
                {node: place for place, node in enumerate(graph)},
                graph.opset_imports,
            )
            both.append(part.run([x], sizes))
        for expected, result in zip(*both, strict=True):
            scale = max(float(np.abs(expected).max()), 1e-30) if expected.size else 1.0
            same = expected.shape == result.shape
            if not same or np.abs(result - expected).max() > _TOLERANCE.get(dtype, 1e-2) * scale:
                raise UnsupportedError("its conditions do more than skip experts without tokens")


def _values(graph: ir.Graph) -> dict[str | None, ir.Value]:
    values = (*graph.inputs, *(output for node in graph for output in node.outputs))
    return {value.name: value for value in values}
