"""Describes a MoE node: QMoE with float weights, which are a format like any other."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import onnx_ir as ir

from qmoe_plugin.graph.attributes import FLOAT, STRING, default
from qmoe_plugin.graph.describe import Description, UnsupportedError
from qmoe_plugin.graph.inputs import (
    FLOATS,
    Constant,
    activation_dtype,
    constant,
    float_name,
    given,
    known_attributes,
    known_inputs,
    required,
    string,
)
from qmoe_plugin.graph.packed import (
    LAYOUT_ATTRIBUTE,
    is_packed,
    read_packed,
    refuse_other_inputs,
    refuse_other_layouts,
)
from qmoe_plugin.graph.qmoe import GATED, fc1_activation, routed_experts
from qmoe_plugin.kernels import Problem

STOCK_ATTRIBUTES = {
    "activation_alpha": default(1.0),
    "activation_beta": default(0.0),
    "activation_type": default("relu"),
    "k": default(1),
    "normalize_routing_weights": default(0),
    "num_shared_experts": default(0),
    "swiglu_fusion": default(0),
    "swiglu_limit": FLOAT,
    "swiglu_limit_after_activation": default(0),
    "use_sparse_mixer": default(0),
}
"""The attributes of com.microsoft MoE in onnxruntime 1.32.0, and num_shared_experts of its
development branches. Older releases have not all of them."""

ATTRIBUTES = {**STOCK_ATTRIBUTES, LAYOUT_ATTRIBUTE: STRING}
"""With that of ours."""

STOCK_INPUTS = (
    "input",
    "router_probs",
    "fc1_experts_weights",
    "fc1_experts_bias",
    "fc2_experts_weights",
    "fc2_experts_bias",
    "fc3_experts_weights",
    "fc3_experts_bias",
)
"""Its inputs there."""

WEIGHTS = {"fc1": 2, "fc2": 4, "fc3": 6}
"""Input numbers of weights; the bias comes next."""

FUSED = 1
"""The swiglu_fusion of gates and ups that are merged here: their rows alternate, which every kernel
of com.microsoft takes."""

_BESIDE_PACKED = (0, 1, WEIGHTS["fc1"], WEIGHTS["fc2"])


def describe_moe(node: ir.Node) -> Description:
    """Describes a MoE node.

    Raises:
        UnsupportedError: If our op cannot run it.
    """
    if is_packed(node):
        return _describe_packed(node, _activation(node, given(node, WEIGHTS["fc3"])))
    roles = [role for role, index in WEIGHTS.items() if role != "fc3" or given(node, index)]
    return describe_experts(
        node, {role: required(node, WEIGHTS[role], f"{role} weights") for role in roles}
    )


def merged_gates(node: ir.Node) -> dict[str, int | float | str | None]:
    """The attributes of a node with fc3 once its rows alternate with those of fc1; None = no such.

    silu(fc1) * fc3 is swiglu then, without what silu beside fc3 does not look at.
    """
    attributes: dict[str, int | float | str | None] = {"swiglu_fusion": FUSED}
    if string(node, "activation_type", "relu") == "silu":
        attributes |= {"activation_type": "swiglu", "activation_alpha": 1.0}
        attributes |= {"activation_beta": 0.0, "swiglu_limit": None}
    return attributes


def describe_experts(node: ir.Node, weights: Mapping[str, Constant]) -> Description:
    """Describes a MoE node whose weights, as [E, N, K], are these; "fc1", "fc2", perhaps "fc3".

    Raises:
        UnsupportedError: If our op cannot run it.
    """
    has_fc3 = "fc3" in weights
    activation = _activation(node, has_fc3)
    fc1 = _checked(weights["fc1"])
    experts, fc1_rows, hidden_size = fc1.shape
    gated_in_one = activation in GATED and not has_fc3
    if gated_in_one and fc1_rows % 2:
        raise UnsupportedError(f"{fc1} has {fc1_rows} rows; gates and ups must be even in number")
    inter_size = fc1_rows // 2 if gated_in_one else fc1_rows
    fc2 = _checked(weights["fc2"], (experts, hidden_size, inter_size))
    if has_fc3 and _checked(weights["fc3"], fc1.shape).dtype is not fc1.dtype:
        raise UnsupportedError("fc1 and fc3, gates and ups, must have the same type")
    biases = [_bias(node, WEIGHTS["fc1"] + 1, fc1), _bias(node, WEIGHTS["fc2"] + 1, fc2)]
    if has_fc3:
        biases.append(_bias(node, WEIGHTS["fc3"] + 1, fc1))

    problem = _problem(node, experts, activation_dtype(node, *biases, fc1))
    rows = 2 * fc1_rows if has_fc3 else fc1_rows
    fc1_format, fc2_format = float_name(fc1.dtype), float_name(fc2.dtype)
    return Description(
        (
            problem(stage="fc1", format=fc1_format, n=rows, k=hidden_size, activation=activation),
            problem(stage="fc2", format=fc2_format, n=hidden_size, k=inter_size),
        )
    )


def _describe_packed(node: ir.Node, activation: str) -> Description:
    """Describes a node that `qmoe_plugin.prepack` packed."""
    refuse_other_inputs(node, _BESIDE_PACKED)
    fc1 = read_packed(node, WEIGHTS["fc1"], "fc1", None, 0)
    fc2 = read_packed(node, WEIGHTS["fc2"], "fc2", None, 0)
    gated = activation in GATED
    fc1.check_matrix(fc1.experts, fc2.k * (2 if gated else 1), fc1.k, gated=gated, scaled=False)
    fc2.check_matrix(fc1.experts, fc1.k, fc2.k, gated=False, scaled=False)
    problem = _problem(node, fc1.experts, activation_dtype(node))
    gemms = (
        problem(stage="fc1", format=fc1.format, n=fc1.rows, k=fc1.k, activation=activation),
        problem(stage="fc2", format=fc2.format, n=fc2.rows, k=fc2.k),
    )
    return Description(gemms, packed=(fc1, fc2))


def _problem(node: ir.Node, experts: int, dtype: str) -> Callable[..., Problem]:
    """Makes a problem of stage, format and sizes."""
    topk = routed_experts(node, experts)
    return functools.partial(Problem, rows=topk, topk=topk, dtype=dtype, experts=experts)


def _activation(node: ir.Node, has_fc3: bool) -> str:
    """What the epilogue of fc1 applies, after attributes and inputs were checked."""
    known_attributes(node, ATTRIBUTES)
    known_inputs(node, len(STOCK_INPUTS))
    if not has_fc3 and given(node, WEIGHTS["fc3"] + 1):
        raise UnsupportedError("fc3 has a bias, but no weights")
    activation = fc1_activation(node, has_fc3)
    refuse_other_layouts(node)
    return activation


def _checked(weights: Constant, shape: tuple[int, ...] | None = None) -> Constant:
    """Weights of a float type, [E, N, K]."""
    if weights.dtype not in FLOATS:
        raise UnsupportedError(f"{weights} must be float32, float16 or bfloat16")
    if len(weights.shape) != 3 or 0 in weights.shape:
        raise UnsupportedError(f"{weights} must have three dimensions, none of them 0")
    if shape is not None and weights.shape != shape:
        raise UnsupportedError(f"{weights} must have shape {list(shape)}")
    return weights


def _bias(node: ir.Node, index: int, weights: Constant) -> Constant | None:
    """A bias of any float type, [E, N]; None if it was left out."""
    bias = constant(node, index, "bias")
    if bias is not None and (bias.dtype not in FLOATS or bias.shape != weights.shape[:2]):
        raise UnsupportedError(f"{bias} must be a float tensor of shape {list(weights.shape[:2])}")
    return bias
