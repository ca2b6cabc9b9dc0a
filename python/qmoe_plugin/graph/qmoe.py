"""Describes a QMoE node."""

from __future__ import annotations

import math
from typing import Literal

import onnx_ir as ir

from qmoe_plugin.graph.describe import Description, UnsupportedError
from qmoe_plugin.graph.inputs import (
    FLOATS,
    accuracy_level,
    activation_dtype,
    constant,
    given,
    integer,
    known_attributes,
    real,
    string,
)
from qmoe_plugin.graph.projections import (
    Projection,
    check_block_size,
    find_format,
    read_projection,
)
from qmoe_plugin.kernels import Problem

STOCK_ATTRIBUTES = (
    "accuracy_level",
    "activation_alpha",
    "activation_beta",
    "activation_type",
    "block_size",
    "expert_weight_bits",
    "fc1_expert_weight_bits",
    "fc2_expert_weight_bits",
    "fc3_expert_weight_bits",
    "k",
    "normalize_routing_weights",
    "quant_type",
    "swiglu_fusion",
    "swiglu_limit",
    "use_sparse_mixer",
    "weights_prepacked",
)
"""The attributes of com.microsoft QMoE in onnxruntime 1.31.1."""

_ACTIVATIONS = ("identity", "relu", "gelu", "silu", "swiglu", "geglu")
_GATED = ("swiglu", "geglu")

# Input numbers of weights, scales, bias and zero points.
_INPUTS = {"fc1": (2, 3, 4, 11), "fc2": (5, 6, 7, 12), "fc3": (8, 9, 10, 13)}
_FIRST_OTHER_SCALE = 15  # 15 to 20 are global and activation scales
_MAX_EXPERTS = 1024


def describe_qmoe(node: ir.Node) -> Description:
    """Describes a QMoE node.

    Raises:
        UnsupportedError: If our op cannot run it.
    """
    known_attributes(node, STOCK_ATTRIBUTES)
    for index in range(_FIRST_OTHER_SCALE, len(node.inputs)):
        if given(node, index):
            raise UnsupportedError(f"input {index}, a global or activation scale, is not supported")
    fc1, fc2, fc3 = _projections(node)
    activation = _activation(node, fc3 is not None)
    block_size = integer(node, "block_size", 0)
    if block_size:
        check_block_size(block_size)

    fused = activation in _GATED and fc3 is None
    if fused and fc1.n % 2:
        raise UnsupportedError(f"fc1 has {fc1.n} rows; gates and ups must be even in number")
    hidden_size, inter_size = fc2.n, fc1.n // (2 if fused else 1)
    unit = block_size or 8
    if hidden_size % unit or inter_size % unit:
        raise UnsupportedError(
            f"hidden_size {hidden_size} and inter_size {inter_size} must be multiples of {unit}"
            + (", the block size" if block_size else "")
        )
    columns = {"fc1": hidden_size, "fc2": inter_size, "fc3": hidden_size}
    projections = [p for p in (fc1, fc2, fc3) if p is not None]
    _check_order(node, projections, columns)
    _check_projections(projections, columns, block_size)

    topk = _topk(node, fc1.experts)
    dtype = activation_dtype(node, fc1.bias, fc2.bias, fc1.scales)
    accuracy = accuracy_level(node)

    def problem(p: Projection, stage: Literal["fc1", "fc2"], n: int, epilogue: str) -> Problem:
        return Problem(
            stage=stage,
            format=p.format.name,
            n=n,
            k=columns[stage],
            rows=topk,
            dtype=dtype,
            activation=epilogue,
            experts=p.experts,
            block_size=block_size,
            zero_points=p.zero_points is not None,
            accuracy_level=accuracy,
        )

    fc1_rows = fc1.n if fc3 is None else 2 * fc1.n
    gemms = (problem(fc1, "fc1", fc1_rows, activation), problem(fc2, "fc2", fc2.n, "identity"))
    return Description(gemms, {"weights_prepacked": 0})


def _projections(node: ir.Node) -> tuple[Projection, Projection, Projection | None]:
    quant_type = string(node, "quant_type", "int")
    _refuse_mislabelled(node, quant_type)
    bits = integer(node, "expert_weight_bits", 4)
    fc1_bits = integer(node, "fc1_expert_weight_bits", bits)
    bits_of = {
        "fc1": fc1_bits,
        "fc2": integer(node, "fc2_expert_weight_bits", bits),
        "fc3": integer(node, "fc3_expert_weight_bits", fc1_bits),
    }

    def read(name: str) -> Projection:
        return read_projection(node, name, find_format(quant_type, bits_of[name]), _INPUTS[name])

    if bits_of["fc3"] != fc1_bits:
        raise UnsupportedError(
            f"fc3 has {bits_of['fc3']} bits and fc1 {fc1_bits}; gates and ups must have the same"
        )
    has_fc3 = given(node, _INPUTS["fc3"][0])
    if not has_fc3 and any(given(node, index) for index in _INPUTS["fc3"]):
        raise UnsupportedError("fc3 has scales, a bias or zero points, but no weights")
    return read("fc1"), read("fc2"), read("fc3") if has_fc3 else None


def _refuse_mislabelled(node: ir.Node, quant_type: str) -> None:
    """Names a fault of an exporter, rather than the format that it claims to have written."""
    scales = constant(node, _INPUTS["fc1"][1], "fc1 scales")
    if quant_type == "fp4" and scales is not None and scales.dtype in FLOATS:
        raise UnsupportedError(
            f"quant_type is 'fp4', but {scales} is not float8e8m0. The model builder of "
            "onnxruntime-genai 0.18 writes such nodes for Qwen3.5-MoE with moe_quant_type=mxfp4: "
            "they hold prepacked int4 weights. Export the model again with moe_quant_type=int4"
        )


def _activation(node: ir.Node, has_fc3: bool) -> str:
    """What the epilogue of fc1 applies: activation_type, with silu beside fc3 read as swiglu."""
    activation = string(node, "activation_type", "relu")
    fusion = integer(node, "swiglu_fusion", 0)
    if activation not in _ACTIVATIONS:
        raise UnsupportedError(
            f"activation_type is '{activation}'; allowed are {', '.join(_ACTIVATIONS)}"
        )
    if fusion not in (0, 1, 2):
        raise UnsupportedError(f"swiglu_fusion is {fusion}; allowed are 0, 1 and 2")
    if fusion and (has_fc3 or activation not in _GATED):
        raise UnsupportedError(
            f"swiglu_fusion={fusion} says that fc1 holds gates and ups, but "
            + ("fc3 is given too" if has_fc3 else f"activation_type is '{activation}'")
        )
    if has_fc3 and activation == "silu":
        return "swiglu"  # with alpha 1, beta 0 and no limit
    if has_fc3 and activation not in _GATED:
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


def _topk(node: ir.Node, experts: int) -> int:
    """Experts a token, after the routing attributes were checked."""
    topk = integer(node, "k", 1)
    if experts > _MAX_EXPERTS:
        raise UnsupportedError(
            f"the node has {experts} experts; at most {_MAX_EXPERTS} are allowed"
        )
    if not 1 <= topk <= experts:
        raise UnsupportedError(
            f"k is {topk}; it must be from 1 to the number of experts, {experts}"
        )
    for flag in ("normalize_routing_weights", "use_sparse_mixer"):
        if integer(node, flag, 0) not in (0, 1):
            raise UnsupportedError(f"{flag} is {integer(node, flag, 0)}; it must be 0 or 1")
    if integer(node, "use_sparse_mixer", 0) and topk != 2:
        raise UnsupportedError(f"use_sparse_mixer=1 needs k=2, not k={topk}")
    return topk


def _check_projections(
    projections: list[Projection], columns: dict[str, int], block_size: int
) -> None:
    for p in projections:
        p.check(columns[p.name], block_size)
        if p.experts != projections[0].experts:
            raise UnsupportedError(
                f"{p.scales} and {projections[0].scales} differ in the number of experts"
            )
    fc1, fc3 = projections[0], projections[-1]
    if fc3.name == "fc3" and fc3.n != fc1.n:
        raise UnsupportedError(
            f"fc1 has {fc1.n} rows (gates) and fc3 {fc3.n} (ups); they must have the same"
        )


def _check_order(node: ir.Node, projections: list[Projection], columns: dict[str, int]) -> None:
    """Refuses weights in the order that stock CUDA kernels read.

    Without the attribute, CUDA exports mean prepacked and all others mean raw, so the shapes
    decide: of a projection with N != K only one order fits. If each projection fits both, the
    attribute counts, and its default says prepacked.
    """
    stated = integer(node, "weights_prepacked", -1)
    if stated not in (-1, 0, 1):
        raise UnsupportedError(f"weights_prepacked is {stated}; allowed are -1, 0 and 1")
    raw = all(p.codes.shape == p.raw_shape(columns[p.name]) for p in projections)
    prepacked = all(p.codes.shape == p.prepacked_shape(columns[p.name]) for p in projections)
    shapes = ", ".join(str(p.codes) for p in projections)
    if not raw and not prepacked:
        expected = ", ".join(f"{p.name} {list(p.raw_shape(columns[p.name]))}" for p in projections)
        raise UnsupportedError(
            f"the weights ({shapes}) are neither raw nor prepacked: as the scales have it, raw "
            f"ones must be {expected}"
        )
    if not raw:
        raise UnsupportedError(
            f"the weights ({shapes}) are prepacked for stock CUDA kernels, as their shapes show"
            + (", although weights_prepacked=0 says raw" if stated == 0 else "")
            + "; export them with qmoe_weights_prepacked=0"
        )
    if stated == 1 or (stated == -1 and prepacked):
        why = "weights_prepacked=1" if stated == 1 else "the default of weights_prepacked, -1"
        raise UnsupportedError(
            f"{why} says that the weights ({shapes}) are prepacked for stock CUDA kernels; set "
            "weights_prepacked=0 if they are raw, or export them with qmoe_weights_prepacked=0"
        )
