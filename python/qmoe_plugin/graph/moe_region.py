"""Finds what a router's TopK selects: a dense fallback of a Mixture of Experts, in single nodes.

Exporters write the experts in many ways: all of them for all tokens, the chosen rows of each by
NonZero and scattered back, or weights gathered for each token. Common to all is what is found
here, by where values go and not by what lies between: the TopK, the product that makes its logits,
a value in which all ways from the TopK meet again, and products with constant weights before it,
two in a row for each expert. Whether the op computes the same is for a trial run to say
(`fuse_moe.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from qmoe_plugin.graph.describe import UnsupportedError
from qmoe_plugin.graph.inputs import constant_tensor, integer
from qmoe_plugin.graph.moe_products import FloatProduct, Product, product_of
from qmoe_plugin.graph.routing import products_before_scores
from qmoe_plugin.graph.walk import label

_VIEWS = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Cast")
_MOST_CANDIDATES = 12


@dataclass(frozen=True)
class Expert:
    """One expert, or all of them where each product is of all.

    Attributes:
        first: One product, of gates and ups or of an activation without gates; or two, one each.
        second: The product that follows.
    """

    first: tuple[Product, ...]
    second: Product


@dataclass(frozen=True)
class Region:
    """A dense Mixture of Experts.

    Attributes:
        topk: The node that selects.
        k: How many experts a token has.
        count: Experts.
        experts: In their order; one where all are stacked.
        logits: What the router says.
        inputs: Forms of the activations that the experts get, nearest to the router first.
        output: What it computes.
    """

    topk: ir.Node
    k: int
    count: int
    experts: tuple[Expert, ...]
    logits: ir.Value
    inputs: tuple[ir.Value, ...]
    output: ir.Value


def regions(topk: ir.Node, order: dict[ir.Node, int]) -> Iterator[Region]:
    """What may be the Mixture of Experts of a TopK: the smallest first.

    Args:
        topk: A TopK in the graph of the model.
        order: The place of each node of that graph.

    Raises:
        UnsupportedError: If none is found.
    """
    router = product_of(router_of(topk))
    assert router is not None  # as `is_anchor` said
    inputs = views_of(router.activations)
    k_tensor = constant_tensor(topk, 1, "k")
    assert k_tensor is not None
    problem, found = "nothing brings what follows together again", 0
    for output in _meeting_points(topk, order):
        nodes = between(inputs[-1], output, order)
        try:
            experts = _group(nodes, router)
        except UnsupportedError as error:
            problem = str(error)
            continue
        if not found and not experts:
            continue
        found += 1
        yield Region(
            topk=topk,
            k=int(k_tensor.numpy().reshape(-1)[0]),
            count=router.n,
            experts=experts,
            logits=_logits(topk),
            inputs=inputs,
            output=output,
        )
        if found == _MOST_CANDIDATES:
            return
    if not found:
        raise UnsupportedError(f"no experts were found that it selects: {problem}")


def router_of(topk: ir.Node) -> ir.Node:
    """The product that a TopK's scores come from."""
    return products_before_scores(topk)[0]


def is_anchor(node: ir.Node) -> bool:
    """Whether a node is a TopK over what one product with weights computes."""
    if node.domain != "" or node.op_type != "TopK" or not integer(node, "largest", 1):
        return False
    products = products_before_scores(node)
    return len(products) == 1 and product_of(products[0]) is not None


def views_of(value: ir.Value) -> tuple[ir.Value, ...]:
    """A value, and what it is a view of."""
    forms = [value]
    while (producer := forms[-1].producer()) is not None:
        source = producer.inputs[0] if producer.inputs else None
        if producer.domain != "" or producer.op_type not in _VIEWS or source is None:
            break
        forms.append(source)
    return tuple(forms)


def _logits(topk: ir.Node) -> ir.Value:
    """What Softmax gets on the way to TopK; what TopK gets if there is none."""
    scores = topk.inputs[0]
    assert scores is not None
    value: ir.Value | None = scores
    while value is not None and (producer := value.producer()) is not None:
        if producer.op_type in ("Softmax", "LogSoftmax") and producer.inputs[0] is not None:
            return producer.inputs[0]
        if producer.op_type not in _VIEWS:
            break
        value = producer.inputs[0]
    return scores


def _meeting_points(topk: ir.Node, order: dict[ir.Node, int]) -> Iterator[ir.Value]:
    """The values that everything passes which depends on a node, the nearest first."""
    waiting = {
        output: len(output.uses()) + output.is_graph_output()
        for output in topk.outputs
        if output.uses() or output.is_graph_output()
    }
    known = set(waiting)
    later = (node for node, place in order.items() if place > order[topk])
    for node in later:
        dependent = [value for value in node.inputs if value is not None and value in known]
        if not dependent:
            continue
        for value in dependent:
            waiting[value] -= 1
            if not waiting[value]:
                del waiting[value]
        for output in node.outputs:
            uses = len(output.uses()) + output.is_graph_output()
            known.add(output)
            if uses:
                waiting[output] = uses
        if len(waiting) == 1 and next(iter(waiting)) in node.outputs:
            yield next(iter(waiting))
        if not waiting:
            return


def between(start: ir.Value, end: ir.Value, order: dict[ir.Node, int]) -> list[ir.Node]:
    """The nodes that compute one value from another, in their order."""
    producer = start.producer()
    first = -1 if producer is None else order.get(producer, -1)
    before: set[ir.Node] = set()
    waiting = [end]
    while waiting:
        node = waiting.pop().producer()
        if node is None or node in before or order.get(node, -1) <= first:
            continue
        before.add(node)
        waiting += [value for value in node.inputs if value is not None]
    reached: list[ir.Node] = []
    known = {start}
    for node in sorted(before, key=order.__getitem__):
        if not known.isdisjoint(value for value in node.inputs if value is not None):
            reached.append(node)
            known.update(node.outputs)
    return reached


def _group(nodes: list[ir.Node], router: Product) -> tuple[Expert, ...]:
    """The experts among some nodes; none if there is no product but the router.

    Raises:
        UnsupportedError: If the products are not those of experts.
    """
    nearest: dict[ir.Value, frozenset[Product]] = {}
    before: dict[Product, frozenset[Product]] = {}
    for node in nodes:
        if node is router.node:
            continue
        found = frozenset[Product]().union(
            *(nearest.get(value, frozenset()) for value in node.inputs if value is not None)
        )
        product = product_of(node)
        if product is not None:
            before[product] = nearest.get(product.activations, frozenset())
            found = frozenset([product])
        elif node.op_type in ("MatMul", "Gemm"):
            raise UnsupportedError(f"the weights of {label(node)} are not constant")
        elif node.op_type == "MatMulNBits":
            raise UnsupportedError(
                f"{label(node)} is no MatMulNBits of integers in whole blocks, as the model has "
                "them before they are packed or reordered"
            )
        nearest.update(dict.fromkeys(node.outputs, found))
    seconds = [product for product, earlier in before.items() if earlier]
    if any(before[first] for second in seconds for first in before[second]):
        raise UnsupportedError("some products follow two others; an expert has two layers")
    firsts = [first for second in seconds for first in before[second]]
    lonely = set(before) - set(firsts) - set(seconds)
    if lonely or len(firsts) != len(set(firsts)):
        raise UnsupportedError("some products are not part of one expert of two layers")
    places = {product: place for place, product in enumerate(before)}
    experts = [
        Expert(tuple(sorted(before[second], key=places.__getitem__)), second) for second in seconds
    ]
    return _in_order(experts, router.n)


def _in_order(experts: list[Expert], count: int) -> tuple[Expert, ...]:
    """The experts as the router counts them."""
    if not experts:
        return ()
    if all(product.stack == count for e in experts for product in (*e.first, e.second)):
        weights = {tuple(_address(p) for p in (*e.first, e.second)) for e in experts}
        if len(weights) != 1:
            raise UnsupportedError("products with the weights of all experts differ in these")
        return (experts[0],)
    if len(experts) != count:
        raise UnsupportedError(f"{len(experts)} experts follow, but the router has {count} logits")
    places = [expert.second.place for expert in experts]
    if None not in places:
        if sorted(place for place in places if place is not None) != list(range(count)):
            raise UnsupportedError(f"the experts that follow are {places}")
        experts = sorted(experts, key=lambda expert: expert.second.place or 0)
    return tuple(experts)


def _address(product: Product) -> int:
    """Tells stacks of weights apart."""
    return id(product.source.tensor) if isinstance(product, FloatProduct) else id(product)


def check_shapes(region: Region) -> tuple[int, int, bool]:
    """Hidden size, inter size, and whether first layers have gates.

    Raises:
        UnsupportedError: If the experts are not of one kind.
    """
    hidden, inter = region.experts[0].second.n, region.experts[0].second.k
    rows = {tuple(first.n for first in expert.first) for expert in region.experts}
    if len(rows) != 1 or not rows <= {(inter,), (2 * inter,), (inter, inter)}:
        raise UnsupportedError(
            f"first layers of {sorted(rows)} rows come before second layers of {inter} columns"
        )
    for expert in region.experts:
        wrong = [f for f in expert.first if f.k != hidden]
        if wrong or (expert.second.n, expert.second.k) != (hidden, inter):
            raise UnsupportedError("the experts differ in their sizes")
        if any(p.kind != region.experts[0].second.kind for p in (*expert.first, expert.second)):
            raise UnsupportedError("the weights of experts differ in their types")
    return hidden, inter, next(iter(rows)) != (inter,)
