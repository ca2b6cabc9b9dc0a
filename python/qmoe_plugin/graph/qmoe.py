"""Describes a QMoE node."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import onnx_ir as ir

from qmoe_plugin.graph.attributes import FLOAT, INT, STRING, default
from qmoe_plugin.graph.describe import Description, UnsupportedError
from qmoe_plugin.graph.formats import FORMAT_ATTRIBUTES, find_formats
from qmoe_plugin.graph.inputs import (
    accuracy_level,
    activation_dtype,
    given,
    integer,
    known_attributes,
    known_inputs,
    real,
    string,
)
from qmoe_plugin.graph.layouts import decide_layout
from qmoe_plugin.graph.packed import (
    LAYOUT_ATTRIBUTE,
    is_packed,
    read_packed,
    refuse_other_inputs,
    refuse_stock_layout,
)
from qmoe_plugin.graph.projections import Projection, Tensors, check_columns, read_tensors
from qmoe_plugin.graph.scales import (
    CODEBOOKS,
    ScalePlan,
    check_act_scales,
    check_global_scales,
    plan_scales,
)
from qmoe_plugin.kernels import Problem

STOCK_ATTRIBUTES = {
    "accuracy_level": default(0),
    "activation_alpha": default(1.0),
    "activation_beta": default(0.0),
    "activation_type": default("relu"),
    "block_size": INT,
    "expert_weight_bits": INT,
    "fc1_expert_weight_bits": INT,
    "fc2_expert_weight_bits": INT,
    "fc3_expert_weight_bits": INT,
    "k": default(1),
    "normalize_routing_weights": default(0),
    "num_shared_experts": default(0),
    "quant_type": default("int"),
    "swiglu_fusion": default(0),
    "swiglu_limit": FLOAT,
    "swiglu_limit_after_activation": default(0),
    "use_sparse_mixer": default(0),
    "weights_prepacked": default(-1),
}
"""The attributes of com.microsoft QMoE in onnxruntime 1.32.0, and num_shared_experts of its
development branches. Older releases have not all of them."""

ATTRIBUTES = {
    **STOCK_ATTRIBUTES,
    LAYOUT_ATTRIBUTE: STRING,
    **dict.fromkeys(FORMAT_ATTRIBUTES, default("")),
}
"""The attributes of ours."""

STOCK_INPUTS = (
    "input",
    "router_probs",
    "fc1_experts_weights",
    "fc1_scales",
    "fc1_experts_bias",
    "fc2_experts_weights",
    "fc2_scales",
    "fc2_experts_bias",
    "fc3_experts_weights",
    "fc3_scales",
    "fc3_experts_bias",
    "fc1_zero_points",
    "fc2_zero_points",
    "fc3_zero_points",
    "router_weights",
    "fc1_global_scale",
    "fc2_global_scale",
    "fc1_act_scale",
    "fc2_act_scale",
    "fc1_act_block_scale",
    "fc2_act_block_scale",
)
"""Its inputs there."""

INPUTS = (*STOCK_INPUTS, *(f"{name}_codebook" for name in CODEBOOKS))
"""The inputs of ours."""

_ACTIVATIONS = ("identity", "relu", "gelu", "silu", "swiglu", "geglu")
GATED = ("swiglu", "geglu")

# Input numbers of weights, scales, bias and zero points.
_INPUTS = {"fc1": (2, 3, 4, 11), "fc2": (5, 6, 7, 12), "fc3": (8, 9, 10, 13)}
_FC1_ACT_SCALE = 17
# Activations, weights, and scales of activations.
_BESIDE_PACKED = (0, 1, 2, 5, 14, 17, 18, 19, 20)
_MAX_EXPERTS = 1024


def describe_qmoe(node: ir.Node) -> Description:
    """Describes a QMoE node.

    Raises:
        UnsupportedError: If our op cannot run it.
    """
    known_attributes(node, ATTRIBUTES)
    known_inputs(node, len(INPUTS))
    has_fc3 = _has_fc3(node)
    activation = fc1_activation(node, has_fc3)
    node_formats = find_formats(node)
    plans = plan_scales(node, node_formats, has_fc3=has_fc3)
    if is_packed(node):
        return _describe_packed(node, plans, activation)
    projections = _projections(node, plans, fused=activation in GATED and not has_fc3)
    fc1, fc2 = projections[:2]
    check_global_scales(node, plans, fc1.experts)
    check_act_scales(node, fc1.experts)
    layout = decide_layout(node, node_formats, projections)
    for p in projections:
        p.check()

    dtype = activation_dtype(node, fc1.tensors.bias, fc2.tensors.bias, fc1.tensors.scales)
    problem = _problem(node, fc1.experts, dtype)
    gemms = (
        problem(
            stage="fc1",
            format=fc1.tensors.plan.format.name,
            block_size=fc1.tensors.plan.block_size,
            n=2 * fc1.n if has_fc3 else fc1.n,
            k=fc1.k,
            activation=activation,
            zero_points=fc1.tensors.zero_points is not None,
        ),
        problem(
            stage="fc2",
            format=fc2.tensors.plan.format.name,
            block_size=fc2.tensors.plan.block_size,
            n=fc2.n,
            k=fc2.k,
            zero_points=fc2.tensors.zero_points is not None,
        ),
    )
    return Description(gemms, layout.attributes, layout.warning)


def _describe_packed(node: ir.Node, plans: dict[str, ScalePlan], activation: str) -> Description:
    """Describes a node that `qmoe_plugin.prepack` packed."""
    refuse_other_inputs(node, _BESIDE_PACKED)
    refuse_stock_layout(node, "weights_prepacked", -1)
    fc1, fc2 = (
        read_packed(node, _INPUTS[name][0], name, plans[name].format, plans[name].block_size)
        for name in ("fc1", "fc2")
    )
    gated, scaled = activation in GATED, given(node, _FC1_ACT_SCALE)
    fc1.check_matrix(fc1.experts, fc2.k * (2 if gated else 1), fc1.k, gated=gated, scaled=scaled)
    fc2.check_matrix(fc1.experts, fc1.k, fc2.k, gated=False, scaled=scaled)
    check_act_scales(node, fc1.experts)
    for p in (fc1, fc2):
        check_columns(p.name, p.k, plans[p.name])
    problem = _problem(node, fc1.experts, activation_dtype(node))
    gemms = tuple(
        problem(
            stage=p.name,
            format=p.format,
            block_size=p.block_size,
            n=p.rows,
            k=p.k,
            activation=activation if p is fc1 else "identity",
            zero_points=p.zero_points,
        )
        for p in (fc1, fc2)
    )
    return Description(gemms, packed=(fc1, fc2))


def _problem(node: ir.Node, experts: int, dtype: str) -> Callable[..., Problem]:
    """Makes a problem of what its matrix is and of what all matrices of the node share."""
    topk = routed_experts(node, experts)
    # A format that defines the rounding of its activations leaves none to accuracy_level.
    defined = string(node, "quant_type", "int") == "wfp4afp8"
    level = accuracy_level(node)
    return functools.partial(
        Problem,
        rows=topk,
        topk=topk,
        dtype=dtype,
        experts=experts,
        accuracy_level=0 if defined else level,
    )


def _has_fc3(node: ir.Node) -> bool:
    has_fc3 = given(node, _INPUTS["fc3"][0])
    if not has_fc3 and any(given(node, index) for index in _INPUTS["fc3"]):
        raise UnsupportedError("fc3 has scales, a bias or zero points, but no weights")
    return has_fc3


def _projections(node: ir.Node, plans: dict[str, ScalePlan], *, fused: bool) -> list[Projection]:
    """fc1, fc2 and perhaps fc3, with the sizes that fc1 and fc2 imply.

    Args:
        node: The node.
        plans: Its scales.
        fused: Whether fc1 holds gates and ups.
    """
    tensors = _tensors(node, plans)
    # Scales of rows say E and N whatever the layout of the weights; without them weights are raw.
    leading = {
        name: t.codes if t.plan.format.square_blocks or t.scales is None else t.scales
        for name, t in tensors.items()
    }
    experts, fc1_rows = leading["fc1"].shape[:2]
    hidden_size = leading["fc2"].shape[1]
    if fused and fc1_rows % 2:
        raise UnsupportedError(f"fc1 has {fc1_rows} rows; gates and ups must be even in number")
    inter_size = fc1_rows // 2 if fused else fc1_rows
    sizes = {
        "fc1": (fc1_rows, hidden_size),
        "fc2": (hidden_size, inter_size),
        "fc3": (inter_size, hidden_size),
    }
    return [Projection(t, experts, *sizes[name]) for name, t in tensors.items()]


def _tensors(node: ir.Node, plans: dict[str, ScalePlan]) -> dict[str, Tensors]:
    names = [name for name, indices in _INPUTS.items() if name != "fc3" or given(node, indices[0])]
    tensors = {name: read_tensors(node, name, plans[name], _INPUTS[name]) for name in names}
    if "fc3" in tensors:
        fc1, fc3 = tensors["fc1"].scales, tensors["fc3"].scales
        if fc1 is not None and fc3 is not None and fc1.dtype is not fc3.dtype:
            raise UnsupportedError(f"{fc1} and {fc3} must have the same type")
    return tensors


def fc1_activation(node: ir.Node, has_fc3: bool) -> str:
    """What the epilogue of fc1 applies: activation_type, with silu beside fc3 read as swiglu."""
    activation = string(node, "activation_type", "relu")
    fusion = integer(node, "swiglu_fusion", 0)
    if activation not in _ACTIVATIONS:
        raise UnsupportedError(
            f"activation_type is '{activation}'; allowed are {', '.join(_ACTIVATIONS)}"
        )
    if fusion not in (0, 1, 2):
        raise UnsupportedError(f"swiglu_fusion is {fusion}; allowed are 0, 1 and 2")
    if fusion and (has_fc3 or activation not in GATED):
        raise UnsupportedError(
            f"swiglu_fusion={fusion} says that fc1 holds gates and ups, but "
            + ("fc3 is given too" if has_fc3 else f"activation_type is '{activation}'")
        )
    after = integer(node, "swiglu_limit_after_activation", 0)
    if after not in (0, 1):
        raise UnsupportedError(f"swiglu_limit_after_activation is {after}; it must be 0 or 1")
    if after and activation != "swiglu":
        raise UnsupportedError(
            f"swiglu_limit_after_activation is 1, but activation_type is '{activation}'"
        )
    if has_fc3 and activation == "silu":
        return "swiglu"  # with alpha 1, beta 0 and no limit
    if has_fc3 and activation not in GATED:
        raise UnsupportedError(f"fc3 is given, but activation_type '{activation}' is not gated")
    alpha, beta = real(node, "activation_alpha", 1.0), real(node, "activation_beta", 0.0)
    limit = real(node, "swiglu_limit", math.inf)
    if activation == "geglu" and limit != math.inf:
        raise UnsupportedError(f"swiglu_limit is {limit}, but geglu has no limit")
    if activation == "swiglu" and not (math.isfinite(alpha) and math.isfinite(beta) and limit > 0):
        raise UnsupportedError(
            f"activation_alpha is {alpha} and activation_beta {beta}, which must be finite; "
            f"swiglu_limit is {limit}, which must be positive"
        )
    return activation


def routed_experts(node: ir.Node, experts: int) -> int:
    """Experts that a token goes to, shared ones too, after the routing attributes were checked."""
    topk, shared = integer(node, "k", 1), integer(node, "num_shared_experts", 0)
    if experts > _MAX_EXPERTS:
        raise UnsupportedError(
            f"the node has {experts} experts; at most {_MAX_EXPERTS} are allowed"
        )
    if not 0 <= shared < experts:
        raise UnsupportedError(
            f"num_shared_experts is {shared}; it must be from 0 to {experts - 1}, as one of the "
            f"{experts} experts at least must be routed"
        )
    if not 1 <= topk <= experts - shared:
        raise UnsupportedError(
            f"k is {topk}; it must be from 1 to the number of {'routed ' * bool(shared)}experts, "
            f"{experts - shared}"
        )
    for flag in ("normalize_routing_weights", "use_sparse_mixer"):
        if integer(node, flag, 0) not in (0, 1):
            raise UnsupportedError(f"{flag} is {integer(node, flag, 0)}; it must be 0 or 1")
    if integer(node, "use_sparse_mixer", 0) and topk != 2:
        raise UnsupportedError(f"use_sparse_mixer=1 needs k=2, not k={topk}")
    return topk + shared
