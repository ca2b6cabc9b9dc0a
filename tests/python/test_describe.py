"""What a node is taken for, and why it is refused: the rules of `retarget`, one by one."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from helpers.cases import MatMulNBitsCase, QMoECase
from onnx import helper, numpy_helper

from qmoe_plugin.graph.describe import UnsupportedError, describe


def model_of(case, attributes=(), tensors=()):
    """The case's model in com.microsoft, with attributes (None = removed) and tensors replaced."""
    model = case.model({**case.tensors(), **dict(tensors)}, "com.microsoft")
    (node,) = model.graph.node
    for name, value in dict(attributes).items():
        kept = [attribute for attribute in node.attribute if attribute.name != name]
        del node.attribute[:]
        node.attribute.extend(kept)
        if value is not None:
            node.attribute.append(helper.make_attribute(name, value))
    return model


def describe_model(model):
    return describe(ir.from_proto(model).graph[0])


def refusal(model):
    with pytest.raises(UnsupportedError) as raised:
        describe_model(model)
    return str(raised.value)


def qmoe_model(case=None, attributes=(), **tensors):
    return model_of(case or QMoECase(), attributes, tensors)


def u8(*shape):
    return np.zeros(shape, dtype=np.uint8)


def f32(*shape):
    return np.ones(shape, dtype=np.float32)


# --- QMoE: prepacked weights (QMoECase: E 4, H 64, I 96, swiglu, int4) ---------------------------

RAW = {"fc1_experts_weights": u8(4, 192, 32), "fc2_experts_weights": u8(4, 64, 48)}
PREPACKED = {"fc1_experts_weights": u8(4, 64, 96), "fc2_experts_weights": u8(4, 96, 32)}
# H == I, not gated: both orders have the same shapes.
SQUARE = QMoECase(hidden=64, inter=64, activation="relu")


@pytest.mark.parametrize("stated", [None, -1, 0])
def test_raw_shapes_are_raw_unless_the_node_says_otherwise(stated):
    description = describe_model(qmoe_model(None, {"weights_prepacked": stated}, **RAW))
    assert description.decided == {"weights_prepacked": 0}


@pytest.mark.parametrize("stated", [None, -1, 0, 1])
def test_prepacked_shapes_are_refused(stated):
    text = refusal(qmoe_model(None, {"weights_prepacked": stated}, **PREPACKED))
    assert "prepacked for stock CUDA kernels, as their shapes show" in text
    assert "qmoe_weights_prepacked=0" in text
    assert ("although weights_prepacked=0" in text) == (stated == 0)


def test_raw_shapes_that_are_said_to_be_prepacked_are_refused():
    assert "weights_prepacked=1 says" in refusal(qmoe_model(None, {"weights_prepacked": 1}, **RAW))


@pytest.mark.parametrize(
    ("hidden", "inter"),
    [(192, 96), (64, 64)],  # fc1 is square, or fc2 is: the other one tells
)
def test_one_projection_that_is_not_square_is_enough(hidden, inter):
    case = QMoECase(hidden=hidden, inter=inter)
    assert describe_model(qmoe_model(case, {"weights_prepacked": None}))
    prepacked = {
        "fc1_experts_weights": u8(4, hidden, inter),
        "fc2_experts_weights": u8(4, inter, hidden // 2),
    }
    assert "as their shapes show" in refusal(
        qmoe_model(case, {"weights_prepacked": None}, **prepacked)
    )


@pytest.mark.parametrize("stated", [None, -1, 1])
def test_shapes_that_fit_both_orders_count_as_prepacked(stated):
    text = refusal(qmoe_model(SQUARE, {"weights_prepacked": stated}))
    assert "set weights_prepacked=0 if they are raw" in text


def test_shapes_that_fit_both_orders_are_raw_if_the_node_says_so():
    assert describe_model(qmoe_model(SQUARE, {"weights_prepacked": 0}))


def test_shapes_of_neither_order_are_refused():
    text = refusal(qmoe_model(fc1_experts_weights=u8(4, 192, 31)))
    assert "neither raw nor prepacked" in text
    assert "fc1 [4, 192, 32], fc2 [4, 64, 48]" in text


def test_projections_of_different_order_are_refused():
    mixed = {**RAW, "fc2_experts_weights": PREPACKED["fc2_experts_weights"]}
    assert "neither raw nor prepacked" in refusal(qmoe_model(None, **mixed))


# --- QMoE: what exporters write ------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [
        QMoECase(block_size=0),  # per channel: no block_size attribute, scales of rank 2
        QMoECase(block_size=0, trailing_group_axis=True),
        QMoECase(block_size=0, zero_points=True),
        QMoECase(fusion=2, zero_points=True, scale_dtype="float32", dtype="float16"),  # Mobius
        QMoECase(activation="geglu"),  # Gemma 4
        QMoECase(fusion=0),  # old gpt-oss
        QMoECase(fusion=0, fc3=True),
        QMoECase(activation="silu", fc3=True, fusion=0),
        QMoECase(format="int8", fc2_format="int4"),
        QMoECase(sparse_mixer=True, experts=16),
        QMoECase(bias=False, dtype="bfloat16"),
    ],
    ids=str,
)
def test_accepts(case):
    fc1, fc2 = describe_model(qmoe_model(case)).gemms
    assert (fc1.k, fc1.n) == (64, 192 if fc1.activation in ("swiglu", "geglu") else 96)
    assert (fc2.k, fc2.n) == (96, 64)
    assert fc1.dtype == case.dtype
    assert (fc1.format, fc2.format) == (case.format, case.fc2_format or case.format)


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ({"quant_type": "fp4"}, "Qwen3.5-MoE with moe_quant_type=mxfp4"),
        ({"quant_type": "nvfp4"}, "no format has quant_type 'nvfp4' and 4 bits"),
        ({"expert_weight_bits": 3}, "no format has quant_type 'int' and 3 bits"),
        ({"fc2_expert_weight_bits": 8}, "neither raw nor prepacked"),
        ({"fc3_expert_weight_bits": 8}, "fc3 has 8 bits and fc1 4"),
        ({"num_shared_experts": 1}, "attribute num_shared_experts is not known to QMoE"),
        ({"activation_type": "tanh"}, "activation_type is 'tanh'; allowed are identity, relu"),
        ({"activation_type": "gelu"}, "swiglu_fusion=1 says that fc1 holds gates and ups"),
        ({"activation_type": 1}, "attribute activation_type is INT; it must be STRING"),
        ({"swiglu_fusion": 3}, "swiglu_fusion is 3"),
        ({"swiglu_limit": -1.0}, "swiglu_limit is -1.0, which must be positive"),
        ({"activation_alpha": float("nan")}, "activation_alpha is nan"),
        ({"k": 0}, "k is 0; it must be from 1 to the number of experts, 4"),
        ({"k": 5}, "k is 5"),
        ({"k": 3, "use_sparse_mixer": 1}, "use_sparse_mixer=1 needs k=2"),
        ({"normalize_routing_weights": 2}, "normalize_routing_weights is 2"),
        ({"weights_prepacked": 2}, "weights_prepacked is 2"),
        ({"block_size": 24}, "block_size is 24; it must be a power of two"),
        ({"block_size": -1}, "block_size is -1"),
        ({"block_size": 64}, "hidden_size 64 and inter_size 96 must be multiples of 64"),
        ({"block_size": 16}, "fc1 scales float[4, 192, 2] must have shape [4, 192, 4]"),
        ({"block_size": None}, "fc1 scales float[4, 192, 2] must have shape [4, 192]"),
        ({"accuracy_level": 5}, "accuracy_level is 5; allowed are 0 to 4"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refuses_attributes(attributes, reason):
    assert reason in refusal(qmoe_model(None, attributes))


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"fc1_scales": f32(4)}, "fc1 scales float[4] must have shape [experts, rows]"),
        ({"fc1_scales": f32(5, 192, 2)}, "neither raw nor prepacked"),
        ({"fc2_scales": f32(4, 0, 3)}, "must have shape [experts, rows]"),
        ({"fc1_scales": u8(4, 192, 2)}, "must be float32, float16 or bfloat16"),
        ({"fc1_experts_weights": f32(4, 192, 32)}, "must be uint8 for format int4"),
        ({"fc1_experts_bias": f32(4, 96)}, "fc1 bias float[4, 96] must have shape [4, 192]"),
        ({"fc1_zero_points": u8(4, 192, 3)}, "fc1 zero points uint8[4, 192, 3] must have shape"),
        ({"fc1_scales": f32(4, 191, 2)}, "fc1 has 191 rows; gates and ups must be even"),
        ({"fc3_scales": f32(4, 96, 2)}, "fc3 has scales, a bias or zero points, but no weights"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) else next(iter(value)),
)
def test_refuses_tensors(tensors, reason):
    assert reason in refusal(qmoe_model(**tensors))


def test_refuses_global_scales():
    model = qmoe_model()
    node = model.graph.node[0]
    node.input.extend([""] * (15 - len(node.input)) + ["fc1_global_scale"])
    model.graph.initializer.append(numpy_helper.from_array(f32(4), "fc1_global_scale"))
    assert "input 15, a global or activation scale" in refusal(model)


def test_refuses_fc3_of_another_shape():
    case = QMoECase(fusion=0, fc3=True, bias=False)
    other = {"fc3_scales": f32(4, 64, 2), "fc3_experts_weights": u8(4, 64, 32)}
    text = refusal(qmoe_model(case, {"weights_prepacked": 0}, **other))
    assert "fc1 has 96 rows (gates) and fc3 64 (ups)" in text


def test_refuses_a_node_without_its_weights():
    model = qmoe_model()
    model.graph.node[0].input[2] = ""
    assert "fc1 weights (input 2) is missing" in refusal(model)


# --- constants -----------------------------------------------------------------------------------


def test_a_constant_node_is_as_good_as_an_initializer():
    model = qmoe_model()
    scales = next(t for t in model.graph.initializer if t.name == "fc1_scales")
    constant = helper.make_node("Constant", [], ["fc1_scales"], value=scales)
    model.graph.initializer.remove(scales)
    model.graph.node.insert(0, constant)
    assert describe(ir.from_proto(model).graph[1])


def test_refuses_a_weight_that_is_computed():
    model = qmoe_model()
    model.graph.node[0].input[3] = "doubled"
    add = helper.make_node("Add", ["fc1_scales", "fc1_scales"], ["doubled"], name="twice")
    model.graph.node.insert(0, add)
    with pytest.raises(UnsupportedError, match=r"fc1 scales \(input 3.*computed by Add 'twice'"):
        describe(ir.from_proto(model).graph[1])


def test_refuses_a_weight_that_is_a_graph_input():
    model = qmoe_model()
    value = helper.make_tensor_value_info("fc1_scales", onnx.TensorProto.FLOAT, [4, 192, 2])
    model.graph.input.append(value)
    assert "an initializer and a graph input" in refusal(model)
    kept = [tensor for tensor in model.graph.initializer if tensor.name != "fc1_scales"]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    assert "is an input of the graph or function" in refusal(model)


# --- MatMulNBits ---------------------------------------------------------------------------------

CASE = MatMulNBitsCase(n=48, k=96, block_size=32)


@pytest.mark.parametrize(
    "case",
    [
        CASE,
        MatMulNBitsCase(n=47, k=100, block_size=32, format="int8"),  # a partial last block
        MatMulNBitsCase(zero_points="packed", flat=True),
        MatMulNBitsCase(zero_points="bytes"),
        MatMulNBitsCase(zero_points="typed", dtype="float16"),
        MatMulNBitsCase(g_idx="shuffled", bias=False),
    ],
    ids=str,
)
def test_accepts_matmul_nbits(case):
    (gemm,) = describe_model(model_of(case)).gemms
    assert (gemm.stage, gemm.n, gemm.k, gemm.rows) == ("dense", case.n, case.k, 1)
    assert (gemm.format, gemm.block_size, gemm.dtype) == (case.format, case.block_size, case.dtype)
    assert gemm.zero_points == (case.zero_points != "none")


@pytest.mark.parametrize(
    ("attributes", "tensors", "reason"),
    [
        ({"weight_prepacked": 1}, {}, "weight_prepacked=1 says that B is prepacked"),
        ({"bits": 2}, {}, "no format has quant_type 'int' and 2 bits"),
        ({"N": None}, {}, "N is 0 and K is 96; both must be given"),
        ({"block_size": 8}, {}, "block_size is 8"),
        ({"K": 128}, {}, "B uint8[48, 3, 16] must be uint8[48, 4, 16]"),
        ({"accuracy_level": -1}, {}, "accuracy_level is -1"),
        ({"transB": 1}, {}, "attribute transB is not known to MatMulNBits"),
        ({}, {"scales": f32(48, 4)}, "scales float[48, 4] must be a float tensor of shape [48, 3]"),
        ({}, {"bias": f32(47)}, "bias float[47] must be a float tensor of shape [48]"),
        ({}, {"zero_points": u8(48, 1)}, "zero_points uint8[48, 1] must have shape"),
        ({}, {"g_idx": np.zeros(95, np.int32)}, "g_idx int32[95] must be int32[96]"),
        ({}, {"g_idx": np.zeros(96, np.int64)}, "g_idx int64[96] must be int32[96]"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refuses_matmul_nbits(attributes, tensors, reason):
    assert reason in refusal(model_of(CASE, attributes, tensors))


# --- the type of the activations -----------------------------------------------------------------


def test_activation_type_is_taken_from_what_the_model_says():
    model = model_of(MatMulNBitsCase(dtype="float16", scale_dtype="float32"))
    assert describe_model(model).gemms[0].dtype == "float16"


def test_activation_type_is_guessed_from_bias_and_scales_otherwise():
    model = model_of(MatMulNBitsCase(dtype="bfloat16"))
    graph = ir.from_proto(model).graph
    for value in (graph[0].inputs[0], graph[0].outputs[0]):
        value.type = None
    assert describe(graph[0]).gemms[0].dtype == "bfloat16"


def test_activations_of_another_type_are_refused():
    model = model_of(CASE)
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    assert "activations are double; allowed are float32" in refusal(model)
