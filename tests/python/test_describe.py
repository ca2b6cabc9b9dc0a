"""What a node is taken for, and why it is refused: the rules of `retarget`, one by one."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from helpers.blank import Blank
from helpers.cases import MatMulNBitsCase, QMoECase
from onnx import helper

from qmoe_plugin.graph.describe import UnsupportedError, describe


@pytest.fixture(autouse=True)
def newest_onnxruntime(monkeypatch):
    """Nothing is run here; an old onnxruntime would only lack types."""
    monkeypatch.setattr("onnxruntime.__version__", "1.31.1")


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


# --- QMoE: layouts -------------------------------------------------------------------------------

# Not square in fc2 / in fc1 / in both, and square in all, with sizes that prepacking takes.
TALL = {"hidden": 128, "inter": 64}
SQUARE = {"hidden": 64, "inter": 64, "gate": "none"}


def layout_of(blank, **attributes):
    """The attributes that say the layout, and the warning."""
    description = describe_model(blank.model(attributes=attributes))
    return dict(description.decided), description.warning


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("stated", [None, -1, 0, 1])
@pytest.mark.parametrize("layout", ["raw", "transposed"])
def test_shapes_tell_raw_from_prepacked(layout, stated, bits):
    right = int(layout == "transposed")
    blank = Blank(layout=layout, bits=bits, **TALL)
    if stated in (None, -1, right):
        assert layout_of(blank, weights_prepacked=stated) == ({"weights_prepacked": right}, "")
    else:
        text = refusal(blank.model(attributes={"weights_prepacked": stated}))
        assert "must have shape" in text
        assert text.endswith("as the node's attributes say")


@pytest.mark.parametrize(
    "sizes",
    [{"hidden": 128, "inter": 64}, {"hidden": 64, "inter": 64}],  # fc1 is square, or fc2 is
    ids=str,
)
@pytest.mark.parametrize("quant_type", ["int", "fp4", "nvfp4", "wfp4afp8"])
def test_one_projection_that_is_not_square_is_enough(quant_type, sizes):
    for layout, prepacked, name in (("raw", 0, "raw"), ("transposed", 1, "k_major")):
        blank = Blank(quant_type, layout=layout, **sizes)
        integer = quant_type == "int"
        expected = {"weights_prepacked": prepacked} if integer else {"weights_layout": name}
        assert layout_of(blank) == (expected, "")


def test_square_integers_are_raw_with_a_warning_unless_the_node_says_otherwise():
    decided, warning = layout_of(Blank(**SQUARE))
    assert decided == {"weights_prepacked": 0}
    assert "they are read as raw. Write weights_prepacked=0 if that is right" in warning
    for stated in (0, 1):
        expected = ({"weights_prepacked": stated}, "")
        assert layout_of(Blank(**SQUARE), weights_prepacked=stated) == expected
        name = ("raw", "fpa_intb")[stated]
        assert layout_of(Blank(**SQUARE), weights_layout=name) == expected


def test_square_4_bit_floats_are_k_major_with_a_warning_unless_the_node_says_otherwise():
    decided, warning = layout_of(Blank("fp4", **SQUARE))
    assert decided == {"weights_layout": "k_major"}
    assert "they are read as K-major. Write weights_layout=k_major if that is right" in warning
    for name in ("raw", "k_major"):
        expected = ({"weights_layout": name}, "")
        assert layout_of(Blank("nvfp4", **SQUARE), weights_layout=name) == expected


def test_square_weights_that_cannot_be_prepacked_are_raw():
    """Per-channel K of 96 is no multiple of 64; 2-bit codes are never prepacked."""
    for blank in (Blank(hidden=96, inter=96, gate="none"), Blank(bits=2, **SQUARE)):
        assert layout_of(blank) == ({"weights_prepacked": 0}, "")


def test_prepacked_shapes_that_no_exporter_writes_are_refused():
    assert "it needs a multiple of 64 columns and of 32 rows" in refusal(
        Blank(hidden=96, inter=64, layout="transposed").model()
    )
    assert "it holds 4-bit and 8-bit codes, not 2-bit ones" in refusal(
        Blank(bits=2, layout="transposed", **TALL).model()
    )


@pytest.mark.parametrize(
    ("blank", "attributes", "reason"),
    [
        (Blank(), {"weights_layout": "k_major"}, "allowed with quant_type 'int' are raw, fpa_intb"),
        (Blank("fp8"), {"weights_layout": "k_major"}, "allowed with quant_type 'fp8' are raw"),
        (Blank("fp4"), {"weights_layout": "fpa_intb"}, "'fp4' are k_major, raw"),
        (Blank("fp4"), {"weights_layout": "k_major"}, "must have shape [4, 64, 96] if K-major"),
        (
            Blank("fp4"),
            {"weights_prepacked": 1},
            "belongs to quant_type 'int', not quant_type 'fp4'",
        ),
        (
            Blank(),
            {"weights_layout": "raw", "weights_prepacked": 1},
            "weights_layout is 'raw', but weights_prepacked=1 says 'fpa_intb'",
        ),
    ],
    ids=str,
)
def test_refuses_layouts(blank, attributes, reason):
    assert reason in refusal(blank.model(attributes=attributes))


def test_shapes_of_neither_layout_are_refused():
    text = refusal(Blank().model(tensors={"fc1_experts_weights": u8(4, 192, 31)}))
    assert "fc1 weights uint8[4, 192, 31] must have shape [4, 192, 32] if raw. Or: " in text
    assert "must have shape [4, 64, 96] if SM80 prepacked" in text


def test_projections_of_different_layout_are_refused():
    mixed = {"fc2_experts_weights": u8(4, 96, 32)}
    text = refusal(qmoe_model(None, {"weights_prepacked": None}, **mixed))
    assert (
        "fc2 weights uint8[4, 96, 32] must have shape [4, 64, 48] if raw. Or: fc1 weights" in text
    )


# --- QMoE: quant types ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("blank", "formats", "block_size"),
    [
        (Blank(bits=2), ("int2", "int2"), 32),
        (Blank(bits=2, fc2_bits=4), ("int2", "int4"), 32),
        (Blank("fp4"), ("mxfp4", "mxfp4"), 32),
        (Blank("fp4", scales="uint8"), ("mxfp4", "mxfp4"), 32),
        (Blank("nvfp4", dtype="float16"), ("nvfp4", "nvfp4"), 16),
        (Blank("wfp4afp8", act_scales=1), ("mxfp4", "mxfp4"), 32),
        (Blank("wfp4afp8", act_scales=4), ("mxfp4", "mxfp4"), 32),
        (Blank("fp8", block_size=0), ("fp8_e4m3", "fp8_e4m3"), 0),
        (Blank("fp8", block_size=0, float8_weights=False, bits=8), ("fp8_e4m3", "fp8_e4m3"), 0),
        (Blank("fp8", block_size=128, hidden=160, inter=80, gate="fc3"), ("fp8_e4m3",) * 2, 128),
        (Blank("fp8", block_size=64, scales="bfloat16"), ("fp8_e4m3", "fp8_e4m3"), 64),
        (Blank("codebook4", block_size=64, inter=64), ("codebook4", "codebook4"), 64),
        (Blank("codebook4", scales="float8e8m0", gate="fc3"), ("codebook4", "codebook4"), 32),
        (Blank("int8", block_size=16), ("int8", "int8"), 16),  # a format's own name
        (Blank("int8", bits=8, fc2_format="int2"), ("int8", "int2"), 32),
        (Blank("fp4", fc2_format="codebook4"), ("mxfp4", "codebook4"), 32),
        (Blank("wfp4afp8", fc1_format="nvfp4", fc2_format="nvfp4"), ("nvfp4", "nvfp4"), 16),
    ],
    ids=str,
)
def test_quant_types(blank, formats, block_size):
    gemms = describe_model(blank.model()).gemms
    assert tuple(gemm.format for gemm in gemms) == formats
    assert {gemm.block_size for gemm in gemms} == {block_size}
    assert [gemm.k for gemm in gemms] == [blank.hidden, blank.inter]


def test_each_projection_may_have_a_format_of_its_own():
    """block_size is that of the formats which leave it open."""
    blank = Blank("fp4", fc2_format="int8", block_size=64, inter=64)
    assert [(g.format, g.block_size) for g in describe_model(blank.model()).gemms] == [
        ("mxfp4", 32),
        ("int8", 64),
    ]
    blank = Blank(fc1_format="codebook4", fc2_format="nvfp4", block_size=0, gate="fc3", bits=2)
    assert [(g.format, g.block_size) for g in describe_model(blank.model()).gemms] == [
        ("codebook4", 0),
        ("nvfp4", 16),
    ]
    blank = Blank("fp4", fc2_format="nvfp4")
    assert [g.block_size for g in describe_model(blank.model()).gemms] == [32, 16]


def test_only_formats_of_com_microsoft_have_other_layouts():
    for blank in (Blank("codebook4", **SQUARE), Blank("fp4", fc2_format="mxfp4", **SQUARE)):
        assert layout_of(blank) == ({}, "")
        assert layout_of(blank, weights_layout="raw") == ({}, "")
    assert "allowed with fc1_format or fc2_format are raw" in refusal(
        Blank("fp4", fc2_format="mxfp4").model(attributes={"weights_layout": "k_major"})
    )


@pytest.mark.parametrize(
    ("blank", "attributes", "tensors", "reason"),
    [
        (Blank(), {"quant_type": "int3"}, {}, "quant_type is 'int3'; allowed are int, fp4, nvfp4"),
        (
            Blank(),
            {"quant_type": "mxfp4"},
            {},
            "the weights are mxfp4, but fc1 scales float[4, 192",
        ),
        (Blank("fp4"), {"block_size": 16}, {}, "mxfp4 has blocks of 32"),
        (Blank("nvfp4"), {"block_size": 32}, {}, "nvfp4 has blocks of 16"),
        (Blank("fp4", bits=8), {}, {}, "no format has quant_type 'fp4' and 8 bits"),
        (Blank("fp8", bits=4), {}, {}, "no format has quant_type 'fp8' and 4 bits"),
        (Blank("fp8", block_size=48), {}, {}, "block_size is 48; it must be a power of two"),
        (Blank("fp4"), {}, {"fc2_global_scale": None}, "input 16, a global scale, is missing"),
        (Blank("fp8", block_size=0), {}, {"fc1_global_scale": None}, "input 15, a global scale"),
        (Blank("fp8"), {}, {"fc1_global_scale": f32(4)}, "is not supported for fp8_e4m3"),
        (Blank(), {}, {"fc1_global_scale": f32(4)}, "is not supported for int4 weights"),
        (Blank("fp4"), {}, {"fc1_global_scale": f32(1)}, "must be float32 of shape [4]"),
        (Blank("fp4", gate="fc3"), {}, {}, "there is no input for that of fc3"),
        (Blank("fp8", gate="fc3", block_size=0), {}, {}, "there is no input for that of fc3"),
        (
            Blank("fp4", scales="float16"),
            {},
            {"fc1_global_scale": None, "fc2_global_scale": None},
            "moe_quant_type=mxfp4 for every model but gpt-oss",
        ),
        (Blank("fp4", scales="float8e4m3fn"), {}, {}, "must be one of float8e8m0, uint8"),
        (Blank("nvfp4", scales="uint8"), {}, {}, "must be one of float8e4m3fn for"),
        (Blank("fp8", scales="float8e8m0"), {}, {}, "must be one of float, float16, bfloat16"),
        (Blank("fp8"), {"block_size": None}, {}, "has a factor an expert and no other scales"),
        (
            Blank("fp8", block_size=0),
            {},
            {"fc1_scales": f32(4, 192)},
            "has a factor an expert and no other scales",
        ),
        (Blank("fp8"), {}, {"fc1_scales": None}, "fc1 scales are missing"),
        (Blank("fp8"), {}, {"fc1_scales": f32(4, 192, 2)}, "must have shape [4, 6, 2]"),
        (Blank("fp8", layout="transposed"), {}, {}, "must have shape"),
        (Blank("fp8", inter=92), {}, {}, "fc2 has 92 columns; they must be a multiple of 8"),
        (
            Blank("fp4", hidden=80),
            {},
            {},
            "80 columns; they must be a multiple of 32, the block size",
        ),
        (Blank("fp4", zero_points=True), {}, {}, "format mxfp4 has no zero points"),
        (Blank("fp4", act_scales=1), {}, {}, "belongs to quant_type 'wfp4afp8'"),
        (Blank("wfp4afp8", act_scales=2), {}, {}, "must be float32 of shape [4] or [1]"),
        (Blank("wfp4afp8"), {}, {"fc1_act_scale": f32(1)}, "one of inputs 17 and 18"),
        (Blank("wfp4afp8"), {}, {"fc2_act_block_scale": f32(1)}, "they are found at run time"),
        (
            Blank(gate="fc3"),
            {},
            {"fc3_scales": np.ones((4, 96, 2), np.float16)},
            "fc1 scales float[4, 96, 2] and fc3 scales float16[4, 96, 2] must have the same type",
        ),
        (Blank("codebook4"), {}, {"fc2_codebook": None}, "input 22, a codebook, is missing"),
        (Blank("codebook4"), {}, {"fc1_codebook": f32(15)}, "must be a float tensor of shape [16]"),
        (Blank("codebook4"), {}, {"fc1_codebook": u8(16)}, "must be a float tensor of shape [16]"),
        (Blank(), {}, {"fc1_codebook": f32(16)}, "int4 has values of its own"),
        (Blank("codebook4", scales="uint8"), {}, {}, "must be one of float, float16, bfloat16, "),
        (Blank("codebook4", zero_points=True), {}, {}, "format codebook4 has no zero points"),
        (Blank("codebook4", layout="transposed"), {}, {}, "must have shape"),
        (
            Blank("codebook4", gate="fc3"),
            {},
            {"fc1_global_scale": f32(4)},
            "fc3 and a global scale of fc1 are given",
        ),
        (Blank(fc1_format="int8"), {"fc1_format": "int3"}, {}, "fc1_format: format 'int3' is not"),
        (
            Blank(fc1_format="int8"),
            {"fc1_expert_weight_bits": 4},
            {},
            "fc1_format 'int8' has 8 bits a weight, not 4",
        ),
        (Blank("fp4", fc2_format="nvfp4"), {"block_size": 32}, {}, "nvfp4 has blocks of 16"),
        (Blank("fp4", fc2_format="int4"), {"weights_prepacked": 1}, {}, "not fc1_format or fc2"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refuses_quant_types(blank, attributes, tensors, reason):
    assert reason in refusal(blank.model(attributes=attributes, tensors=tensors))


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
        QMoECase(limit=7.0, limit_after=True),
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
        ({"quant_type": "other"}, "quant_type is 'other'; allowed are"),
        ({"expert_weight_bits": 3}, "no format has quant_type 'int' and 3 bits"),
        ({"fc2_expert_weight_bits": 8}, "must have shape [4, 64, 96] if raw"),
        ({"fc3_expert_weight_bits": 8}, "fc3 has 8 bits and fc1 4"),
        ({"num_local_experts": 1}, "attribute num_local_experts is not known to QMoE"),
        ({"num_shared_experts": 4}, "num_shared_experts is 4; it must be from 0 to 3"),
        ({"num_shared_experts": 3}, "k is 2; it must be from 1 to the number of routed experts, 1"),
        ({"activation_type": "tanh"}, "activation_type is 'tanh'; allowed are identity, relu"),
        ({"activation_type": "gelu"}, "swiglu_fusion=1 says that fc1 holds gates and ups"),
        ({"activation_type": 1}, "attribute activation_type is INT; it must be STRING"),
        ({"swiglu_fusion": 3}, "swiglu_fusion is 3"),
        ({"swiglu_limit": -1.0}, "swiglu_limit is -1.0, which must be positive"),
        ({"swiglu_limit_after_activation": 2}, "swiglu_limit_after_activation is 2; it must be 0"),
        (
            {"activation_type": "geglu", "swiglu_limit_after_activation": 1},
            "swiglu_limit_after_activation is 1, but activation_type is 'geglu'",
        ),
        ({"activation_alpha": float("nan")}, "activation_alpha is nan"),
        ({"k": 0}, "k is 0; it must be from 1 to the number of experts, 4"),
        ({"k": 5}, "k is 5"),
        ({"k": 3, "use_sparse_mixer": 1}, "use_sparse_mixer=1 needs k=2"),
        ({"normalize_routing_weights": 2}, "normalize_routing_weights is 2"),
        ({"weights_prepacked": 2}, "weights_prepacked is 2"),
        ({"block_size": 24}, "block_size is 24; it must be a power of two"),
        ({"block_size": -1}, "block_size is -1"),
        ({"block_size": 64}, "fc1 scales float[4, 192, 2] must have shape [4, 192] or"),
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
        ({"fc1_scales": f32(5, 192, 2)}, "must have shape [5, 192, 32] if raw"),
        ({"fc2_scales": f32(4, 0, 3)}, "must have shape [experts, rows]"),
        ({"fc1_scales": u8(4, 192, 2)}, "must be one of float, float16, bfloat16 for"),
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


def test_refuses_fc3_of_another_shape():
    case = QMoECase(fusion=0, fc3=True, bias=False)
    other = {"fc3_scales": f32(4, 64, 2), "fc3_experts_weights": u8(4, 64, 32)}
    text = refusal(qmoe_model(case, **other))
    assert "fc3 weights uint8[4, 64, 32] must have shape [4, 96, 32] if raw" in text


def test_refuses_a_node_without_its_weights():
    model = qmoe_model()
    model.graph.node[0].input[2] = ""
    assert "fc1 weights (input 2) is missing" in refusal(model)


def test_float8e8m0_needs_an_onnxruntime_that_has_it(monkeypatch):
    monkeypatch.setattr("onnxruntime.__version__", "1.26.0")
    assert "onnxruntime has this type since 1.27, this is 1.26.0" in refusal(Blank("fp4").model())
    assert describe_model(Blank("fp4", scales="uint8").model())


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
        MatMulNBitsCase(format="int2"),
    ],
    ids=str,
)
def test_accepts_matmul_nbits(case):
    (gemm,) = describe_model(model_of(case)).gemms
    assert (gemm.stage, gemm.n, gemm.k, gemm.rows) == ("dense", case.n, case.k, 1)
    assert (gemm.format, gemm.block_size, gemm.dtype) == (case.format, case.block_size, case.dtype)
    assert gemm.zero_points == (case.zero_points != "none")


@pytest.mark.parametrize("prepacked", [0, 1, 2])
@pytest.mark.parametrize("fmt", ["int4", "int8"])
def test_accepts_prepacked_matmul_nbits(fmt, prepacked):
    model = model_of(MatMulNBitsCase(fmt, n=64, k=128), {"weight_prepacked": prepacked})
    assert describe_model(model).gemms[0].format == fmt


@pytest.mark.parametrize(
    ("attributes", "tensors", "reason"),
    [
        ({"weight_prepacked": 1}, {}, "B cannot be SM80 prepacked (fpA_intB): it needs"),
        ({"weight_prepacked": 2}, {}, "B cannot be SM90 prepacked (fpA_intB): it needs"),
        ({"weight_prepacked": 3}, {}, "weight_prepacked is 3; allowed are 0, 1 and 2"),
        ({"weight_prepacked": 1, "bits": 2}, {}, "4-bit and 8-bit codes, not 2-bit ones"),
        ({"weight_prepacked": 1, "K": 112}, {}, "it has no partial blocks, and K is 112"),
        ({"bits": 3}, {}, "no format has quant_type 'int' and 3 bits"),
        ({"N": None}, {}, "N is 0 and K is 96; both must be given"),
        ({"block_size": 8}, {}, "block_size is 8"),
        ({"K": 128}, {}, "B uint8[48, 3, 16] must be uint8[48, 4, 16]"),
        ({"accuracy_level": -1}, {}, "accuracy_level is -1"),
        ({"transB": 1}, {}, "attribute transB is not known to MatMulNBits"),
        ({}, {"scales": f32(48, 4)}, "scales float[48, 4] must have shape [48, 3]"),
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
