"""Nodes that cannot run: each gets an error that names it and says what is wrong, never a crash."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from helpers.cases import Case, MatMulNBitsCase, QMoECase, Tensors, feeds_of
from helpers.models import ACTIVATION_INPUTS, one_node_model, save_external
from helpers.run import open_session, run
from onnx import helper, numpy_helper

MOE = QMoECase()
MOE_FC3 = QMoECase(fc3=True, fusion=0)
MATMUL = MatMulNBitsCase(zero_points="packed", g_idx="shuffled")

Change = Callable[[Tensors, dict[str, Any]], None]


def model_of(case: Case, change: Change | None = None, **options: Any) -> onnx.ModelProto:
    tensors, attributes = case.tensors(), dict(case.attributes())
    if change is not None:
        change(tensors, attributes)
    return one_node_model(case.op_type, tensors, attributes, **options)


def error_of(model: onnx.ModelProto | Path) -> str:
    """The message with which ONNX Runtime refuses a model."""
    with pytest.raises(Exception) as caught:  # noqa: PT011 - ONNX Runtime has one type an error code
        open_session(model)
    assert type(caught.value).__module__.startswith("onnxruntime"), caught.value
    return str(caught.value)


def attribute(name: str, value: Any) -> Change:
    def change(tensors: Tensors, attributes: dict[str, Any]) -> None:
        attributes[name] = value
        if value is None:
            del attributes[name]

    return change


def tensor(name: str, edit: Callable[[np.ndarray], np.ndarray]) -> Change:
    def change(tensors: Tensors, attributes: dict[str, Any]) -> None:
        tensors[name] = edit(tensors[name])

    return change


def without(*names: str) -> Change:
    def change(tensors: Tensors, attributes: dict[str, Any]) -> None:
        for name in names:
            del tensors[name]

    return change


def both(*changes: Change) -> Change:
    def change(tensors: Tensors, attributes: dict[str, Any]) -> None:
        for one in changes:
            one(tensors, attributes)

    return change


def poisoned(value: float) -> Callable[[np.ndarray], np.ndarray]:
    """The array with one element, neither first nor last, replaced."""

    def edit(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array.reshape(-1)[array.size // 2] = value
        return array

    return edit


def transposed(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.swapaxes(array, -1, -2))


HUGE = (1 << 63) - 1

# What is wrong, what is done to a good node, what the message must say.
BAD_QMOE: list[tuple[str, QMoECase, Change, str]] = [
    ("k_zero", MOE, attribute("k", 0), "k is 0; it must be from 1 to"),
    ("k_many", MOE, attribute("k", 5), "k is 5; it must be from 1 to the number of experts, 4"),
    ("k_huge", MOE, attribute("k", HUGE), "k is 9223372036854775807"),
    ("k_float", MOE, attribute("k", 2.0), "attribute k is a float, but must be an integer"),
    ("k_list", MOE, attribute("k", [2, 2]), "attribute k is a list of integers"),
    ("k_string", MOE, attribute("k", "2"), "attribute k is a string, but must be an integer"),
    ("alpha_int", MOE, attribute("activation_alpha", 1), "activation_alpha is an integer"),
    ("alpha_nan", MOE, attribute("activation_alpha", float("nan")), "must be finite"),
    ("limit_negative", MOE, attribute("swiglu_limit", -7.0), "swiglu_limit is -7"),
    ("limit_nan", MOE, attribute("swiglu_limit", float("nan")), "swiglu_limit is nan"),
    ("activation", MOE, attribute("activation_type", "tanh"), 'activation_type is "tanh"'),
    ("activation_int", MOE, attribute("activation_type", 1), "activation_type is an integer"),
    ("fusion", MOE, attribute("swiglu_fusion", 3), "swiglu_fusion is 3; allowed are 0"),
    (
        "fusion_silu",
        MOE,
        attribute("activation_type", "silu"),
        "only swiglu and geglu can be fused",
    ),
    ("fusion_fc3", MOE_FC3, attribute("swiglu_fusion", 1), "leave fc3 out or set swiglu_fusion=0"),
    ("gelu_fc3", MOE_FC3, attribute("activation_type", "gelu"), 'write activation_type="geglu"'),
    ("relu_fc3", MOE_FC3, attribute("activation_type", "relu"), "fc3 goes with silu, swiglu"),
    ("fc3_no_weights", MOE_FC3, without("fc3_experts_weights"), "without fc3_experts_weights"),
    ("fc3_no_scales", MOE_FC3, without("fc3_scales"), "input 9 (scales) is missing"),
    (
        "fc3_bits",
        MOE_FC3,
        attribute("fc3_expert_weight_bits", 8),
        "gates and ups must have the same",
    ),
    ("bits", MOE, attribute("expert_weight_bits", 3), "expert_weight_bits is 3; allowed are 2, 4"),
    (
        "bits_huge",
        MOE,
        attribute("fc2_expert_weight_bits", HUGE),
        "fc2_expert_weight_bits is 92233",
    ),
    (
        "wrong_bits",
        MOE,
        attribute("expert_weight_bits", 8),
        "raw 8-bit weights of this node must be",
    ),
    ("block_size", MOE, attribute("block_size", 24), "block_size is 24; it must be a power of two"),
    ("block_negative", MOE, attribute("block_size", -1), "block_size is -1"),
    ("block_huge", MOE, attribute("block_size", 1 << 62), "block_size is 4611686018427387904"),
    (
        "block_missing",
        MOE,
        attribute("block_size", None),
        "several scales a row, but the node has no",
    ),
    ("block_other", MOE, attribute("block_size", 16), "fc1 scales have shape [4, 192, 2]"),
    ("block_too_big", MOE, attribute("block_size", 64), "multiples of block_size 64"),
    ("quant_type", MOE, attribute("quant_type", "fp4"), 'quant_type is "fp4"; this release runs'),
    ("quant_type_odd", MOE, attribute("quant_type", "int3"), 'quant_type is "int3"; allowed are'),
    ("normalize", MOE, attribute("normalize_routing_weights", 2), "it must be 0 or 1"),
    ("sparse_mixer", MOE, attribute("use_sparse_mixer", -1), "use_sparse_mixer is -1"),
    ("sparse_mixer_k", MOE, both(attribute("use_sparse_mixer", 1), attribute("k", 1)), "needs k=2"),
    ("accuracy", MOE, attribute("accuracy_level", 5), "accuracy_level is 5; allowed are 0 to 4"),
    ("prepacked", MOE, attribute("weights_prepacked", 1), "Export with qmoe_weights_prepacked=0"),
    (
        "prepacked_odd",
        MOE,
        attribute("weights_prepacked", 2),
        "weights_prepacked is 2; allowed are",
    ),
    (
        "prepacked_shape",
        MOE,
        both(
            tensor("fc1_experts_weights", lambda a: np.zeros((4, 64, 96), np.uint8)),
            tensor("fc2_experts_weights", lambda a: np.zeros((4, 96, 32), np.uint8)),
            attribute("weights_prepacked", -1),
        ),
        "prepacked for SM80 (fpA_intB, fc1 is uint8[4, 64, 96])",
    ),
    ("fc1_rank", MOE, tensor("fc1_experts_weights", np.ravel), "input 2 (weights) is uint8[24576]"),
    (
        "fc1_turned",
        MOE,
        tensor("fc1_experts_weights", transposed),
        "input 2 (weights) is uint8[4, 32,",
    ),
    ("fc1_signed", MOE, tensor("fc1_experts_weights", lambda a: a.view(np.int8)), "type int8"),
    (
        "fc1_float",
        MOE,
        tensor("fc1_experts_weights", lambda a: a.astype("f4")),
        "fc1 weights are float32",
    ),
    (
        "fc1_string",
        MOE,
        tensor("fc1_experts_weights", lambda a: a.astype("U")),
        "element type string",
    ),
    ("fc1_empty", MOE, tensor("fc1_experts_weights", lambda a: a[:0]), "is uint8[0, 192, 32]"),
    ("fc1_experts", MOE, tensor("fc1_experts_weights", lambda a: a[:3]), "is uint8[3, 192, 32]"),
    (
        "fc2_rows",
        MOE,
        tensor("fc2_experts_weights", lambda a: a[:, 1:]),
        "input 5 (weights) is uint8[4, 63,",
    ),
    ("fc1_no_scales", MOE, without("fc1_scales"), "input 3 (scales) is missing"),
    ("fc2_no_scales", MOE, without("fc2_scales"), "input 6 (scales) is missing"),
    (
        "scales_scalar",
        MOE,
        tensor("fc1_scales", lambda a: a[0, 0, 0]),
        "input 3 (scales) is float32[]",
    ),
    ("scales_int", MOE, tensor("fc1_scales", lambda a: a.astype("i4")), "fc1 scales are int32"),
    ("scales_double", MOE, tensor("fc1_scales", lambda a: a.astype("f8")), "element type float64"),
    ("scales_empty", MOE, tensor("fc2_scales", lambda a: a[:, :0]), "no dimension may be 0"),
    (
        "scales_groups",
        MOE,
        tensor("fc2_scales", lambda a: a[..., 1:]),
        "fc2 scales have shape [4, 64, 2]",
    ),
    ("scales_odd", MOE, tensor("fc1_scales", lambda a: a[:, 1:]), "must be an even number of rows"),
    (
        "scales_nan",
        MOE,
        tensor("fc1_scales", poisoned(np.nan)),
        "fc1 scale of expert 2, row 0, block 0 is nan",
    ),
    ("scales_inf", MOE, tensor("fc2_scales", poisoned(-np.inf)), "scales must be finite"),
    ("bias_rank", MOE, tensor("fc1_experts_bias", np.ravel), "fc1 bias is float32[768]"),
    (
        "bias_size",
        MOE,
        tensor("fc2_experts_bias", lambda a: a[:, :-1]),
        "fc2 bias is float32[4, 63]",
    ),
    (
        "bias_int",
        MOE,
        tensor("fc2_experts_bias", lambda a: a.astype("i4")),
        "fc2 bias is int32[4, 64]",
    ),
    (
        "zero_points",
        QMoECase(zero_points=True),
        tensor("fc1_zero_points", lambda a: np.repeat(a, 3, axis=-1)),
        "fc1 zero points are uint8[4, 192, 3]",
    ),
]

BAD_MATMUL: list[tuple[str, MatMulNBitsCase, Change, str]] = [
    ("k_none", MATMUL, attribute("K", None), "attribute K is missing"),
    ("n_none", MATMUL, attribute("N", None), "attribute N is missing"),
    ("block_none", MATMUL, attribute("block_size", None), "attribute block_size is missing"),
    ("k_zero", MATMUL, attribute("K", 0), "attribute K is 0; it must be from 1"),
    ("n_negative", MATMUL, attribute("N", -1), "attribute N is -1"),
    ("n_huge", MATMUL, attribute("N", HUGE), "attribute N is 9223372036854775807"),
    (
        "k_large",
        MATMUL,
        attribute("K", (1 << 31) - 1),
        "B is uint8[48, 3, 16]; with N=48, K=2147483647",
    ),
    (
        "block_size",
        MATMUL,
        attribute("block_size", 33),
        "block_size is 33; it must be a power of two",
    ),
    ("block_small", MATMUL, attribute("block_size", 8), "block_size is 8"),
    ("block_huge", MATMUL, attribute("block_size", 1 << 40), "block_size is 1099511627776"),
    ("bits", MATMUL, attribute("bits", 5), "bits is 5; allowed are 2, 4 and 8"),
    ("accuracy", MATMUL, attribute("accuracy_level", -1), "accuracy_level is -1"),
    ("prepacked", MATMUL, attribute("weight_prepacked", 1), "weight_prepacked is 1; this release"),
    (
        "prepacked_odd",
        MATMUL,
        attribute("weight_prepacked", 9),
        "weight_prepacked is 9; allowed are",
    ),
    ("b_rank", MATMUL, tensor("B", np.ravel), "B is uint8[2304]; with N=48, K=96"),
    ("b_float", MATMUL, tensor("B", lambda a: a.astype("f4")), "B weights are float32"),
    ("b_short", MATMUL, tensor("B", lambda a: a[1:]), "B is uint8[47, 3, 16]"),
    (
        "scales_short",
        MATMUL,
        tensor("scales", lambda a: a[:, 1:]),
        "B scales have shape [1, 48, 2]",
    ),
    ("scales_rank", MATMUL, tensor("scales", lambda a: a[None]), "scales is float32[1, 48, 3]"),
    ("scales_flat", MATMUL, tensor("scales", lambda a: a.ravel()[1:]), "scales is float32[143]"),
    (
        "scales_nan",
        MATMUL,
        tensor("scales", poisoned(np.nan)),
        "B scale of expert 0, row 24, block 0 is nan",
    ),
    (
        "zero_points",
        MATMUL,
        tensor("zero_points", lambda a: a[:, :1]),
        "B zero points are uint8[1, 48, 1]",
    ),
    (
        "zero_points_int",
        MATMUL,
        tensor("zero_points", lambda a: a.astype("i4")),
        "B zero points are int32",
    ),
    (
        "zero_points_inf",
        MatMulNBitsCase(zero_points="typed"),
        tensor("zero_points", poisoned(np.inf)),
        "zero points must be finite",
    ),
    ("g_idx_size", MATMUL, tensor("g_idx", lambda a: a[1:]), "B g_idx is int32[95]"),
    ("g_idx_type", MATMUL, tensor("g_idx", lambda a: a.astype("f4")), "B g_idx is float32[96]"),
    (
        "g_idx_large",
        MATMUL,
        tensor("g_idx", poisoned(3)),
        "B g_idx[48] is 3; it must be from 0 to 2",
    ),
    ("g_idx_negative", MATMUL, tensor("g_idx", poisoned(-1)), "B g_idx[48] is -1"),
    ("bias_size", MATMUL, tensor("bias", lambda a: a[1:]), "bias is float32[47]; it must be [48]"),
    ("bias_rank", MATMUL, tensor("bias", lambda a: a[None]), "bias is float32[1, 48]"),
    ("bias_type", MATMUL, tensor("bias", lambda a: a.astype("i4")), "B bias is int32"),
]


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [pytest.param(*rest, id=f"{rest[0].op_type}-{name}") for name, *rest in BAD_QMOE + BAD_MATMUL],
)
def test_bad_node(case: Case, change: Change, message: str) -> None:
    error = error_of(model_of(case, change))
    assert message in error
    assert "node 'node'" in error


@pytest.mark.parametrize("name", sorted(MOE_FC3.tensors().keys() - ACTIVATION_INPUTS))
def test_weight_that_is_not_constant(name: str) -> None:
    error = error_of(model_of(MOE_FC3, feed=ACTIVATION_INPUTS | {name}))
    assert re.search(rf"node 'node': input \d+ \({name}\) is not constant\. .* initializer", error)


def test_initializer_that_is_a_graph_input_too() -> None:
    """Such an initializer may be overridden at run time."""
    model = model_of(MATMUL)
    model.graph.input.append(
        helper.make_tensor_value_info("B", onnx.TensorProto.UINT8, [48, 3, 16])
    )
    assert "input 1 (B) is not constant" in error_of(model)


def test_global_scale_belongs_to_other_formats() -> None:
    model = model_of(MOE)
    node = model.graph.node[0]
    node.input.extend([""] * (15 - len(node.input)) + ["fc1_global_scale"])
    scale = numpy_helper.from_array(np.ones(4, np.float32), "fc1_global_scale")
    model.graph.initializer.append(scale)
    assert "input 15 is given (float32[4])" in error_of(model)


def test_unnamed_node_is_called_by_its_output() -> None:
    model = model_of(MATMUL, attribute("bits", 5))
    model.graph.node[0].name = ""
    assert "qmoe_plugin.MatMulNBits node '(unnamed, output output)': bits is 5" in error_of(model)


def test_required_input_left_out() -> None:
    """ONNX Runtime itself refuses this one."""
    assert "input 2 is marked single" in error_of(model_of(MOE, without("fc1_experts_weights")))


def test_activations_of_another_type() -> None:
    """So this one."""
    model = model_of(MATMUL, tensor("A", lambda a: a.astype(np.float64)))
    assert "Type 'tensor(double)' of input parameter" in error_of(model)


# --- damaged files --------------------------------------------------------------------------------


def test_truncated_external_data(tmp_path: Path) -> None:
    path = save_external(model_of(MOE), tmp_path)
    data = path.with_name(path.name + ".data")
    data.write_bytes(data.read_bytes()[:-100])
    error_of(path)


def test_missing_external_data(tmp_path: Path) -> None:
    path = save_external(model_of(MOE), tmp_path)
    path.with_name(path.name + ".data").unlink()
    error_of(path)


@pytest.mark.parametrize("name", ["B", "scales", "zero_points", "g_idx", "bias"])
@pytest.mark.parametrize(
    "dims",
    [[1 << 62, 1 << 62], [0, 1 << 62, 1 << 62], [48, 3, 17], [-1, 3, 16], [1 << 32, 1 << 32]],
    ids=str,
)
def test_absurd_dimensions(name: str, dims: list[int]) -> None:
    model = model_of(MATMUL)
    for initializer in model.graph.initializer:
        if initializer.name == name:
            del initializer.dims[:]
            initializer.dims.extend(dims)
    error_of(model)


# --- inputs of a run ------------------------------------------------------------------------------

BAD_RUNS: list[tuple[str, Case, Tensors, str]] = [
    ("hidden", MOE, {"input": np.zeros((3, 65), "f4")}, "input 0 (input) has shape [3, 65]"),
    ("tokens", MOE, {"router_probs": np.zeros((2, 4), "f4")}, "router_probs) has shape [2, 4]; it"),
    (
        "experts",
        MOE,
        {"router_probs": np.zeros((3, 5), "f4")},
        "router_probs) has shape [3, 5]; it",
    ),
    ("rank_1", MOE, {"input": np.zeros(64, "f4")}, "input 0 (input) has shape [64]"),
    ("rank_4", MOE, {"input": np.zeros((1, 1, 3, 64), "f4")}, "has shape [1, 1, 3, 64]"),
    ("scalar", MOE, {"input": np.zeros((), "f4")}, "input 0 (input) has shape []"),
    ("router_scalar", MOE, {"router_probs": np.zeros((), "f4")}, "router_probs) has shape []"),
    ("router_empty", MOE, {"router_probs": np.zeros((0, 4), "f4")}, "has shape [0, 4]"),
    (
        "router_weights",
        QMoECase(router_weights=True),
        {"router_weights": np.zeros((3, 3), "f4")},
        "input 14 (router_weights) has shape [3, 3]",
    ),
    ("k", MATMUL, {"A": np.zeros((3, 95), "f4")}, "input 0 (A) has shape [3, 95]; its last"),
    ("a_scalar", MATMUL, {"A": np.zeros((), "f4")}, "input 0 (A) has shape []"),
    ("a_empty", MATMUL, {"A": np.zeros((3, 0), "f4")}, "input 0 (A) has shape [3, 0]"),
]


@pytest.mark.parametrize(
    ("case", "feeds", "message"),
    [pytest.param(*rest, id=f"{rest[0].op_type}-{name}") for name, *rest in BAD_RUNS],
)
def test_bad_run(case: Case, feeds: Tensors, message: str) -> None:
    tensors = case.tensors()
    model = case.model(tensors)
    for graph_input in model.graph.input:
        graph_input.type.tensor_type.ClearField("shape")
    session = open_session(model)
    good = run(session, feeds_of(tensors))
    with pytest.raises(ort.capi.onnxruntime_pybind11_state.InvalidArgument) as caught:
        session.run(None, {**feeds_of(tensors), **feeds})
    assert message in str(caught.value)
    assert "node 'node'" in str(caught.value)
    assert run(session, feeds_of(tensors)).tobytes() == good.tobytes()  # the session lives on


def test_router_type_is_checked() -> None:
    def doubles(tensors: Tensors, attributes: dict[str, Any]) -> None:
        tensors["router_probs"] = tensors["router_probs"].astype(np.float64)

    tensors = MOE.tensors()
    session = open_session(model_of(MOE, doubles))
    feeds = feeds_of(tensors) | {"router_probs": tensors["router_probs"].astype(np.float64)}
    with pytest.raises(ort.capi.onnxruntime_pybind11_state.InvalidArgument) as caught:
        run(session, feeds)
    assert "input 1 (router_probs) is" in str(caught.value)
