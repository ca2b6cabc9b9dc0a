"""How experts of a fused node are chosen and weighed: by a softmax, or as the model computes it.

MoE routes by a softmax of its logits. Where a model does otherwise (sigmoid, biased selection,
groups, factors), what it computes stays, up to the factors of the chosen experts, and the node
gets the logarithms of these: their softmax is the factors over their sum. QMoE takes factors as
they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qmoe_plugin.graph import moe, qmoe
from qmoe_plugin.graph.edit import set_attributes
from qmoe_plugin.graph.moe_region import Region, between
from qmoe_plugin.graph.trial import Part
from qmoe_plugin.library import DOMAIN

Array = npt.NDArray[Any]

INPUTS = {"MoE": moe.STOCK_INPUTS, "QMoE": qmoe.INPUTS}
FACTORS_SINCE = 13  # opset in which ReduceSum gets its axes as an input

_FACTOR_OPS = frozenset(
    ("Add", "Cast", "Div", "Gather", "GatherElements", "GatherND", "Mul", "Sigmoid", "Softmax")
)
_MOST = 40


def find_factors(
    region: Region,
    order: dict[ir.Node, int],
    opsets: Mapping[str, int],
    x: Array,
    sizes: Mapping[str, int],
) -> list[tuple[ir.Value, Array, Array]]:
    """What may be the factors of the chosen experts, the nearest to these first.

    Args:
        region: The experts.
        order: The place of each node.
        opsets: Of the model.
        x: Activations of a trial run.
        sizes: Of its dimensions.

    Returns:
        Each with its numbers in the trial run, [tokens, k], and the chosen experts there.
    """
    start, chosen = region.inputs[-1], region.topk.outputs[1]
    products = {p.node for expert in region.experts for p in (*expert.first, expert.second)}
    found: list[ir.Value] = []
    for node in between(start, region.output, order):
        if node in products:
            break  # before the experts, everything of the routing is known
        if node.op_type in _FACTOR_OPS or node is region.topk:
            found.append(node.outputs[0])
    found = found[-_MOST:][::-1]
    if not found:
        return []
    indices, *arrays = Part([start], [chosen, *found], order, opsets).run([x], sizes)
    return [
        (value, array, indices)
        for value, array in zip(found, arrays, strict=True)
        if array.shape == indices.shape and array.dtype.kind == "f"
    ]


def make_nodes(
    op_type: str,
    attributes: Mapping[str, int | float | str | None],
    values: Mapping[str, ir.Value],
    dtype: ir.DataType,
) -> list[ir.Node]:
    """The node, and those around it that its routing needs; the last one has the result.

    Args:
        op_type: MoE or QMoE.
        attributes: Its own.
        values: Its inputs by name. "factors" [tokens, k] of the experts "indices" are none of them:
            where they are given, "router_probs" only says the shape of the logits.
        dtype: Of the activations.
    """
    inputs = {name: value for name, value in values.items() if name not in ("factors", "indices")}
    nodes: list[ir.Node] = []

    def add(op: str, *operands: ir.Value, **said: Any) -> ir.Value:  # noqa: ANN401
        made = ir.Node("", op, operands, ir.convenience.convert_attributes(said))
        nodes.append(made)
        return made.outputs[0]

    factors = values.get("factors")
    if factors is not None:
        of_factors = factors.dtype or dtype
        zero = ir.Tensor(np.zeros(1, of_factors.numpy()))
        zeros = add("ConstantOfShape", add("Shape", values["router_probs"]), value=zero)
        full = add("ScatterElements", zeros, values["indices"], factors, axis=-1)
        inputs["router_probs"] = full if op_type == "QMoE" else add("Log", full)
        if op_type == "QMoE":
            inputs["router_weights"] = full
    places = INPUTS[op_type]
    last = max(map(places.index, inputs))
    node = ir.Node(DOMAIN, op_type, [inputs.get(place) for place in places[: last + 1]])
    set_attributes(node, attributes)
    nodes.append(node)
    if factors is not None and op_type == "MoE":
        axes = add("Constant", value=ir.Tensor(np.array([-1], np.int64)))
        total = add("ReduceSum", factors, axes, keepdims=1)
        if factors.dtype is not None and factors.dtype is not dtype:
            total = add("Cast", total, to=int(dtype))
        add("Mul", node.outputs[0], total)
    return nodes


def name_outputs(nodes: Sequence[ir.Node], names: Sequence[str]) -> None:
    """Gives the output of each node a name."""
    for node, name in zip(nodes, names, strict=True):
        node.outputs[0].name = name
