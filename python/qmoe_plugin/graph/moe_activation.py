"""Finds out, by trying, what experts compute between their two layers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qmoe_plugin.graph.describe import UnsupportedError
from qmoe_plugin.graph.inputs import constant_tensor, given
from qmoe_plugin.graph.moe_region import Region
from qmoe_plugin.graph.trial import Part
from qmoe_plugin.reference import activate

Array = npt.NDArray[Any]

_ROWS = 64
_SPREAD = 6.0  # of the numbers tried: limits of SwiGLU are to show
_TOLERANCE = {np.dtype(np.float32): 1e-5, np.dtype(np.float16): 4e-3}
_MOST_NUMBERS = 6


@dataclass(frozen=True)
class Activation:
    """What lies between the layers.

    Attributes:
        attributes: Of a MoE node whose gates and ups alternate.
        gates: The rows of the gates, [I], in the first layers' outputs one after the other; all
            rows of an activation without gates.
        ups: Those of the ups; None without gates.
    """

    attributes: Mapping[str, int | float | str]
    gates: npt.NDArray[np.int64]
    ups: npt.NDArray[np.int64] | None


def find_activation(
    region: Region, order: dict[ir.Node, int], opsets: Mapping[str, int]
) -> Activation:
    """What the experts compute between their layers.

    Raises:
        UnsupportedError: If it is nothing that the op MoE has.
    """
    expert = region.experts[0]
    inter = expert.second.k
    results = [first.result for first in expert.first]
    part = Part(results, [expert.second.activations], order, opsets)
    dtype = expert.second.dtype
    rows, computed = _try(part, [first.n for first in expert.first], region.count, inter, dtype)
    tolerance = _TOLERANCE.get(np.dtype(dtype), 4e-3)
    for activation in _candidates(inter, rows.shape[-1], _numbers(part.nodes)):
        expected = _compute(activation, rows)
        error = np.abs(expected - computed).max()
        if error <= tolerance * max(1.0, float(np.abs(expected).max())):
            return activation
    raise UnsupportedError(
        "what its experts compute between their layers is no activation of the op MoE"
    )


def _try(
    part: Part, widths: Sequence[int], count: int, inter: int, dtype: npt.DTypeLike
) -> tuple[Array, Array]:
    """Random outputs of the first layers, [R, F * I], and what becomes of them, [R, I].

    In which shape they come is not known, as a model need not say it; so the usual ones are tried.
    """
    rng = np.random.default_rng(0)
    problem: UnsupportedError | None = None
    for lead, tail in (((_ROWS,), ()), ((_ROWS,), (1,)), ((count, _ROWS), ()), ((2, _ROWS), ())):
        feeds = [
            (_SPREAD * rng.standard_normal((*lead, width, *tail))).astype(dtype) for width in widths
        ]
        try:
            (result,) = part.run(feeds, {})
        except UnsupportedError as error:
            problem = problem or error
            continue
        flat = [feed.reshape(-1, feed.shape[len(lead)]) for feed in feeds]
        if result.size != flat[0].shape[0] * inter:
            continue
        rows = np.concatenate(flat, axis=1).astype(np.float64)
        return rows, result.reshape(-1, inter).astype(np.float64)
    raise problem or UnsupportedError("what its experts compute between their layers is not clear")


def _candidates(inter: int, width: int, numbers: Sequence[float]) -> Iterator[Activation]:
    """What the op has, the usual first."""
    first, second = np.arange(inter), np.arange(inter, 2 * inter)
    if width == inter:
        for name in ("relu", "gelu", "silu", "identity"):
            yield Activation({"activation_type": name}, first, None)
        return
    orders = [(first, second), (second, first)]
    orders += [(2 * first, 2 * first + 1), (2 * first + 1, 2 * first)]
    for gates, ups in orders:
        for attributes in _gated(numbers):
            yield Activation({**attributes, "swiglu_fusion": 1}, gates, ups)


def _gated(numbers: Sequence[float]) -> Iterator[dict[str, int | float | str]]:
    yield {"activation_type": "swiglu", "activation_alpha": 1.0, "activation_beta": 0.0}
    yield {"activation_type": "geglu"}
    limits = [math.inf, *(number for number in numbers if number > 0)]
    for alpha in dict.fromkeys((1.0, *numbers)):
        for beta in dict.fromkeys((0.0, 1.0, *numbers)):
            for limit in limits:
                attributes: dict[str, int | float | str] = {
                    "activation_type": "swiglu",
                    "activation_alpha": alpha,
                    "activation_beta": beta,
                }
                if limit == math.inf:
                    yield attributes
                    continue
                yield attributes | {"swiglu_limit": limit}
                yield attributes | {"swiglu_limit": limit, "swiglu_limit_after_activation": 1}


def _compute(activation: Activation, rows: Array) -> Array:
    """What an activation makes of the first layers' outputs."""
    said = activation.attributes
    gates, name = rows[:, activation.gates], str(said["activation_type"])
    return activate(
        gates,
        name,
        fc3=None if activation.ups is None else rows[:, activation.ups],
        alpha=float(said.get("activation_alpha", 1.0)),
        beta=float(said.get("activation_beta", 0.0)),
        limit=float(said.get("swiglu_limit", math.inf)),
        limit_after_activation=bool(said.get("swiglu_limit_after_activation", 0)),
    )


def _numbers(nodes: Sequence[ir.Node]) -> list[float]:
    """Single float constants of some nodes, which limits and factors are among."""
    found: set[float] = set()
    for node in nodes:
        for index in range(len(node.inputs)):
            if not given(node, index):
                continue
            try:
                tensor = constant_tensor(node, index, "")
            except UnsupportedError:  # computed
                continue
            if tensor is None or math.prod(tensor.shape.numpy()) != 1:
                continue
            number = float(tensor.numpy().astype(np.float64).reshape(-1)[0])
            if math.isfinite(number) and tensor.dtype.is_floating_point():
                found.add(number)
    return sorted(found)[:_MOST_NUMBERS]
