"""Fuses dense fallbacks of a Mixture of Experts into nodes MoE, or QMoE where they are quantised.

What a TopK selects is found by `moe_region.py`, in whatever nodes it is written; that the op
computes the same is shown by running both on random activations.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qmoe_plugin.graph.describe import UnsupportedError
from qmoe_plugin.graph.edit import Names, add_initializer, remove_unread
from qmoe_plugin.graph.external_data import Store
from qmoe_plugin.graph.moe_activation import Activation, find_activation
from qmoe_plugin.graph.moe_products import Product
from qmoe_plugin.graph.moe_region import (
    Region,
    check_shapes,
    is_anchor,
    regions,
    router_of,
)
from qmoe_plugin.graph.moe_routing import FACTORS_SINCE, find_factors, make_nodes, name_outputs
from qmoe_plugin.graph.retarget import DOMAIN_VERSION
from qmoe_plugin.graph.trial import Part, run_nodes
from qmoe_plugin.graph.walk import Body, bodies, label
from qmoe_plugin.library import DOMAIN
from qmoe_plugin.progress import Progress
from qmoe_plugin.report import FuseReport, NodeReport

Array = npt.NDArray[Any]

_NAMES = {
    "weights": "{}_experts_weights",
    "bias": "{}_experts_bias",
    "scales": "{}_scales",
    "zero_points": "{}_zero_points",
}
_TOLERANCE = {np.dtype(np.float32): 1e-4, np.dtype(np.float16): 2e-2}
_ROUNDED_ACTIVATIONS = 4  # accuracy_level that lets kernels round them to int8
_ROUNDED_TOLERANCE = 0.05
_ALIKE = 0.9
"""Of the tokens, where some may go to other experts."""

_FEWEST_TOKENS, _TOKENS_AN_EXPERT = 16, 8


@dataclass(frozen=True)
class _Match:
    """A region, and what it becomes."""

    region: Region
    activation: Activation
    source: ir.Value  # the form of the activations that the node gets
    normalize: int
    factors: ir.Value | None = None  # of the chosen experts; None for a softmax

    @property
    def attributes(self) -> dict[str, Any]:
        """Of the node."""
        routing = {"k": self.region.k, "normalize_routing_weights": self.normalize}
        weights = self.region.experts[0].second.attributes
        return {**self.activation.attributes, **routing, **weights}

    @property
    def op_type(self) -> str:
        """MoE, or QMoE of quantised weights."""
        return "QMoE" if self.region.experts[0].second.attributes else "MoE"


class FuseMoE(ir.passes.InPlacePass):
    """Makes a MoE of the nodes between a TopK over experts and the sum. `report` says of which."""

    def __init__(self, store: Store, progress: Progress | None = None) -> None:
        """Makes a pass.

        Args:
            store: Takes weights that have to be put together.
            progress: Called with the name of each TopK, those done and all.
        """
        super().__init__()
        self.report = FuseReport("moe")
        self._store = store
        self._progress = progress or (lambda what, done, total: None)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Changes the model, and sets `report`."""
        names = Names(model)
        fused: list[NodeReport] = []
        done: set[ir.Node] = set()
        left: list[tuple[ir.Node, NodeReport]] = []
        anchors = [(n, body) for body in bodies(model) for n in body.nodes() if is_anchor(n)]
        for place, (topk, body) in enumerate(anchors):
            name = label(topk)
            self._progress(name, place, len(anchors))
            router = router_of(topk)
            if router in done:
                continue
            try:
                change = self._fuse(topk, body, names)
            except UnsupportedError as error:
                left.append((router, NodeReport(name, "TopK", body.function, str(error))))
                continue
            done.add(router)
            fused.append(NodeReport(name, "TopK", body.function, change=change))
        # One router may have several TopK, of groups of experts too.
        kept = [report for router, report in left if router not in done]
        self.report = FuseReport("moe", tuple(fused), tuple(kept))
        return ir.passes.PassResult(model, bool(fused))

    def _fuse(self, topk: ir.Node, body: Body, names: Names) -> str:
        """Fuses what a TopK selects; says what it has become.

        Raises:
            UnsupportedError: If it stays.
        """
        graph = topk.graph
        if body.function or graph is not body.content or not isinstance(graph, ir.Graph):
            raise UnsupportedError(
                "a function or a nested graph of the model holds it; inline functions first"
            )
        order = {node: place for place, node in enumerate(graph)}
        match = _find(topk, order, body.opset_imports)
        _replace(match, graph, names, self._store)
        body.opset_imports.setdefault(DOMAIN, DOMAIN_VERSION)
        region = match.region
        hidden, inter, _ = check_shapes(region)
        kind = match.activation.attributes["activation_type"]
        weights = "normalised" if match.normalize else "plain"
        weights = f"{weights} probabilities" if match.factors is None else "factors of its own"
        return (
            f"selects in a {match.op_type} of {region.count} experts, {region.k} a token, "
            f"{hidden} x {inter}, {kind}, {weights}"
        )


def _find(topk: ir.Node, order: dict[ir.Node, int], opsets: Mapping[str, int]) -> _Match:
    """The Mixture of Experts of a TopK, tried out.

    Raises:
        UnsupportedError: If there is none that MoE computes.
    """
    problems: list[str] = []
    known: dict[ir.Node, Activation] = {}
    for region in regions(topk, order):
        try:
            check_shapes(region)
            second = region.experts[0].second.node
            if second not in known:
                known[second] = find_activation(region, order, opsets)
            return _prove(region, known[second], order, opsets)
        except UnsupportedError as error:
            problems.append(str(error))
    raise UnsupportedError(problems[0] if len(set(problems)) == 1 else problems[-1])


def _prove(
    region: Region, activation: Activation, order: dict[ir.Node, int], opsets: Mapping[str, int]
) -> _Match:
    """Runs both on random activations.

    Raises:
        UnsupportedError: If they do not give the same.
    """
    second = region.experts[0].second
    hidden, dtype = second.n, second.dtype
    start = region.inputs[-1]
    part = Part([start], [region.output, region.logits, *region.inputs[:-1]], order, opsets)
    tokens = max(_FEWEST_TOKENS, _TOKENS_AN_EXPERT * region.count // region.k)
    shape, sizes = shape_of_tokens(start, tokens, hidden)
    x = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    output, logits, *forms = part.run([x], sizes)
    alike = [
        (source, form)
        for source, form in zip(region.inputs, (*forms, x), strict=True)
        if (form.shape, form.dtype) == (output.shape, output.dtype)
    ]
    if not alike:
        raise UnsupportedError(
            f"'{region.output.name}' is {list(output.shape)}, and no form of the activations "
            "before the experts is"
        )
    source, form = alike[0]
    weights = {name: _tensor(name, parts) for name, parts in _stacked(region, activation).items()}
    trial = _Trial({"input": form, "router_probs": logits}, weights, output, opsets)
    matches: list[tuple[_Match, dict[str, Array]]] = [
        (_Match(region, activation, source, normalize), {}) for normalize in (1, 0)
    ]
    if opsets.get("", 0) >= FACTORS_SINCE:
        matches += [
            (_Match(region, activation, source, 0, factors), {"factors": array, "indices": chosen})
            for factors, array, chosen in find_factors(region, order, opsets, x, sizes)
        ]
    errors, problems = [math.inf], []
    for match, more in matches:
        try:
            errors.append(trial.error(match, more))
        except UnsupportedError as problem:
            problems.append(problem)
            continue
        if errors[-1] <= trial.allowed(second):
            return match
    if len(problems) == len(matches):
        raise problems[0]
    raise UnsupportedError(
        f"a MoE of its experts computes something else (off by {min(errors):.1e} of the largest "
        "value), whether by a softmax of the logits or by the factors that the model computes"
    )


@dataclass(frozen=True)
class _Trial:
    """A run of the region, and runs of what may stand for it."""

    feeds: Mapping[str, Array]
    weights: Mapping[str, ir.TensorProtocol]
    expected: Array
    opsets: Mapping[str, int]

    def allowed(self, product: Product) -> float:
        """The largest error that is rounding."""
        if product.attributes.get("accuracy_level") == _ROUNDED_ACTIVATIONS:
            return _ROUNDED_TOLERANCE
        return _TOLERANCE.get(product.dtype, 2e-2)

    def error(self, match: _Match, more: Mapping[str, Array]) -> float:
        """The largest error of a token, over the largest value."""
        feeds = {**self.feeds, **more}
        second = match.region.experts[0].second
        values = {name: _value(name, array) for name, array in feeds.items()}
        values |= {name: ir.Value(name=name) for name in self.weights}
        dtype = ir.DataType.from_numpy(second.dtype)
        nodes = make_nodes(match.op_type, match.attributes, values, dtype)
        name_outputs(nodes, [f"made{i}" for i in range(len(nodes))])
        protos = [ir.to_proto(node) for node in nodes]
        last = protos[-1].output[0]
        (result,) = run_nodes(protos, feeds, self.weights, [last], self.opsets)
        if result.shape != self.expected.shape:
            return math.inf
        wide = self.expected.astype(np.float64).reshape(-1, second.n)
        by_token = np.abs(result.reshape(-1, second.n).astype(np.float64) - wide).max(axis=-1)
        # In 16 bits, and with rounded activations, experts may tie that do not elsewhere.
        exact = self.allowed(second) == _TOLERANCE[np.dtype(np.float32)]
        error = float(np.quantile(by_token, 1.0 if exact else _ALIKE) / np.abs(wide).max())
        return error if math.isfinite(error) else math.inf


def _value(name: str, array: Array) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(ir.DataType.from_numpy(array.dtype)))


def shape_of_tokens(
    start: ir.Value, tokens: int, hidden: int
) -> tuple[tuple[int, ...], dict[str, int]]:
    """A shape of the activations with so many tokens, and the sizes of named dimensions."""
    if start.shape is None:
        return (2, -(-tokens // 2), hidden), {}
    lead = list(start.shape)[:-1]
    wanted = (2, -(-tokens // 2)) if len(lead) == 2 else (tokens, *[1] * (len(lead) - 1))
    sizes, shape = {}, []
    for dimension, size in zip(lead, wanted, strict=True):
        shape.append(dimension if isinstance(dimension, int) else size)
        if not isinstance(dimension, int) and dimension.value is not None:
            sizes[str(dimension.value)] = size
    return (*shape, hidden), sizes


def _stacked(region: Region, activation: Activation) -> dict[str, Iterator[Array]]:
    """The constant inputs of the node by name, an expert at a time, [N, ...] each."""

    def members(role: str, expert: int) -> tuple[Product, ...]:
        member = region.experts[expert if len(region.experts) > 1 else 0]
        return member.first if role == "fc1" else (member.second,)

    def part(product: Product, kind: str, expert: int) -> Array:
        return product.bias_row(expert) if kind == "bias" else product.rows(expert)[kind]

    def parts(role: str, kind: str) -> Iterator[Array]:
        for expert in range(region.count):
            rows = np.concatenate([part(p, kind, expert) for p in members(role, expert)])
            yield _in_order(rows, activation) if role == "fc1" else rows

    made: dict[str, Iterator[Array]] = {}
    for role in ("fc1", "fc2"):
        products = [p for expert in range(len(region.experts)) for p in members(role, expert)]
        kinds = [*products[0].rows(0), *(["bias"] if any(p.bias for p in products) else [])]
        made |= {_NAMES[kind].format(role): parts(role, kind) for kind in kinds}
    return made


def _in_order(rows: Array, activation: Activation) -> Array:
    """Rows of the first layers as the node has them: gates and ups alternate."""
    if activation.ups is None:
        return rows[activation.gates]
    both = np.stack([rows[activation.gates], rows[activation.ups]], axis=1)
    return both.reshape(-1, *rows.shape[1:])


def _tensor(name: str, parts: Iterator[Array]) -> ir.TensorProtocol:
    return ir.Tensor(np.stack(list(parts)), name=name)


def _replace(match: _Match, graph: ir.Graph, names: Names, store: Store) -> None:
    """Puts the node in the place of a region."""
    region = match.region
    values: dict[str, ir.Value] = {"input": match.source, "router_probs": region.logits}
    for place, parts in _stacked(region, match.activation).items():
        name = names.new(f"{label(region.topk)}/{match.op_type}.{place}")
        values[place] = add_initializer(graph, _stream(store, name, region.count, parts))
    if match.factors is not None:
        values |= {"factors": match.factors, "indices": region.topk.outputs[1]}
    dtype = ir.DataType.from_numpy(region.experts[0].second.dtype)
    nodes = make_nodes(match.op_type, match.attributes, values, dtype)
    name_outputs(nodes, [names.new(f"{label(region.topk)}/{node.op_type}") for node in nodes])
    for node in nodes:
        node.name = node.outputs[0].name
    old, made = region.output, nodes[-1].outputs[0]
    dead = old.producer()
    assert dead is not None
    made.type, made.shape = old.type, old.shape
    ir.convenience.replace_all_uses_with(old, made, replace_graph_outputs=True)
    made.name, old.name = old.name, names.new(f"{old.name}.replaced")
    graph.insert_before(dead, nodes)
    remove_unread(graph, dead)


def _stream(store: Store, name: str, count: int, parts: Iterator[Array]) -> ir.TensorProtocol:
    first = next(parts)

    def contents() -> Iterator[npt.NDArray[np.uint8]]:
        yield np.ascontiguousarray(first).reshape(-1).view(np.uint8)
        for part in parts:
            yield np.ascontiguousarray(part).reshape(-1).view(np.uint8)

    dtype = ir.DataType.from_numpy(first.dtype)
    return store.stream(name, dtype, (count, *first.shape), contents())
