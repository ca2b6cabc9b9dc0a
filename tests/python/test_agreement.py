"""`retarget` (Python) and the ops (C++) must agree on which nodes can run.

A node that is moved and then refused by our op would break a model that worked; one that is left
although our op takes it would cost speed. So random nodes, most with something wrong, are put to
both.
"""

import ml_dtypes
import numpy as np
import onnxruntime
import pytest
from helpers.blank import SCALE_TYPES, Blank
from helpers.block_quantized_cases import Fp4WeightCase, Fp8WeightCase
from helpers.cases import MatMulNBitsCase, QMoECase
from helpers.models import one_node_model
from helpers.moe_cases import MoECase
from helpers.packed import packed_tensors, resealed, with_input, with_packed
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

import qmoe_plugin

pytestmark = pytest.mark.usefixtures("library")

FLAGS = st.sampled_from([0, 1, 2])
FORMATS = st.sampled_from(["", "int4", "int8", "mxfp4", "nvfp4", "fp8_e4m3", "codebook4", "int3"])
KNOWN_FORMATS = st.sampled_from(["int4", "int8", "mxfp4", "nvfp4", "fp8_e4m3", "codebook4"])
QMOE_ATTRIBUTES = {
    "accuracy_level": st.sampled_from([-1, 0, 1, 4, 5]),
    "activation_alpha": st.sampled_from([1.702, float("inf"), float("nan")]),
    "activation_type": st.sampled_from(["relu", "gelu", "silu", "swiglu", "geglu", "tanh"]),
    "block_size": st.sampled_from([-1, 0, 16, 24, 32, 64]),
    "expert_weight_bits": st.sampled_from([2, 3, 4, 8]),
    "fc1_expert_weight_bits": st.sampled_from([4, 8]),
    "fc3_expert_weight_bits": st.sampled_from([4, 8]),
    "fc1_format": FORMATS,
    "fc2_format": FORMATS,
    "k": st.sampled_from([-1, 0, 1, 2, 4, 5]),
    "normalize_routing_weights": FLAGS,
    "num_shared_experts": st.sampled_from([-1, 0, 1, 2, 3, 4, 2**63 - 1]),
    "quant_type": st.sampled_from(
        ["int", "fp4", "nvfp4", "fp8", "wfp4afp8", "codebook4", "int8", "float16"]
    ),
    "swiglu_fusion": st.sampled_from([-1, 0, 1, 2, 3]),
    "swiglu_limit": st.sampled_from([7.0, 0.0, -1.0, float("inf")]),
    "swiglu_limit_after_activation": FLAGS,
    "use_sparse_mixer": FLAGS,
    "weights_layout": st.sampled_from(["", "raw", "k_major", "fpa_intb", "other"]),
    "weights_prepacked": st.sampled_from([-1, 0, 1, 2]),
}
MOE_ATTRIBUTES = {
    name: QMOE_ATTRIBUTES[name]
    for name in (
        "activation_alpha",
        "activation_type",
        "k",
        "normalize_routing_weights",
        "num_shared_experts",
        "swiglu_fusion",
        "swiglu_limit",
        "swiglu_limit_after_activation",
        "use_sparse_mixer",
    )
}
MATMUL_ATTRIBUTES = {
    "K": st.sampled_from([0, 95, 96, 128]),
    "N": st.sampled_from([-1, 47, 48]),
    "accuracy_level": st.sampled_from([-1, 0, 4, 5]),
    "bits": st.sampled_from([2, 4, 8]),
    "block_size": st.sampled_from([0, 8, 16, 24, 32, 64]),
    "weight_format": FORMATS,
    "weight_prepacked": FLAGS,
}
QMOE_CASES = st.builds(
    QMoECase,
    format=st.sampled_from(["int4", "int8"]),
    block_size=st.sampled_from([0, 16, 32]),
    zero_points=st.booleans(),
    hidden=st.sampled_from([32, 64, 96]),
    inter=st.sampled_from([32, 64, 96]),
    activation=st.sampled_from(["relu", "silu", "swiglu", "geglu"]),
    fusion=FLAGS,
    fc3=st.booleans(),
    bias=st.booleans(),
    trailing_group_axis=st.booleans(),
)
MOE_CASES = st.builds(
    MoECase,
    dtype=st.sampled_from(["float32", "float16"]),
    weights=st.sampled_from([None, "float32", "float16", "bfloat16"]),
    hidden=st.sampled_from([16, 33]),
    inter=st.sampled_from([16, 33]),
    activation=st.sampled_from(["relu", "silu", "swiglu", "geglu"]),
    fusion=FLAGS,
    fc3=st.booleans(),
    bias=st.booleans(),
)
SIZES = {
    "hidden": st.sampled_from([64, 96, 128]),
    "inter": st.sampled_from([64, 96, 128]),
    "layout": st.sampled_from(["raw", "transposed"]),
    "gate": st.sampled_from(["fused", "none"]),
    "bias": st.booleans(),
}
INT_BLANKS = st.builds(
    Blank,
    bits=st.sampled_from([2, 4, 8]),
    fc2_bits=st.sampled_from([None, None, 2, 4, 8]),
    block_size=st.sampled_from([0, 16, 32]),
    zero_points=st.booleans(),
    **{**SIZES, "gate": st.sampled_from(["fused", "fc3", "none"])},
)
FP4_BLANKS = st.builds(
    Blank,
    quant_type=st.sampled_from(["fp4", "nvfp4", "wfp4afp8"]),
    bits=st.sampled_from([None, 4]),
    **SIZES,
)
ACT_BLANKS = st.builds(
    Blank,
    quant_type=st.just("wfp4afp8"),
    scales=st.sampled_from(["uint8", "float8e8m0"]),
    act_scales=st.sampled_from([1, 2, 4]),
    **SIZES,
)
FP8_BLANKS = st.builds(
    Blank,
    quant_type=st.just("fp8"),
    bits=st.sampled_from([None, 8]),
    block_size=st.sampled_from([0, 16, 64, 128]),
    float8_weights=st.booleans(),
    scales=st.sampled_from([None, "float16"]),
    **{
        **SIZES,
        "inter": st.sampled_from([64, 72, 100]),
        "layout": st.sampled_from(["raw", "raw", "transposed"]),
        "gate": st.sampled_from(["fused", "fc3", "none"]),
    },
)
WILD_BLANKS = st.builds(
    Blank,
    quant_type=st.sampled_from(["int", "fp4", "nvfp4", "fp8", "wfp4afp8"]),
    bits=st.sampled_from([None, 2, 4, 8]),
    fc2_bits=st.sampled_from([None, None, 2, 4, 8]),
    block_size=st.sampled_from([0, 16, 32, 64]),
    scales=st.sampled_from([None, *SCALE_TYPES]),
    zero_points=st.booleans(),
    act_scales=st.sampled_from([0, 1]),
    **{**SIZES, "inter": st.sampled_from([64, 72]), "gate": st.sampled_from(["fc3", "none"])},
)
NAMED_BLANKS = st.builds(
    Blank,
    quant_type=st.sampled_from(["int", "fp4", "wfp4afp8", "codebook4", "int8"]),
    block_size=st.sampled_from([0, 16, 32, 64]),
    scales=st.sampled_from([None, None, None, "float16", "uint8", "float8e8m0", "float8e4m3fn"]),
    zero_points=st.sampled_from([False, False, True]),
    fc1_format=st.just("") | KNOWN_FORMATS,
    fc2_format=st.just("") | KNOWN_FORMATS,
    **{
        **SIZES,
        "inter": st.sampled_from([64, 128, 72]),
        "layout": st.sampled_from(["raw", "raw", "raw", "transposed"]),
        "gate": st.sampled_from(["fused", "fused", "fc3"]),
    },
)
BLANKS = st.one_of(
    INT_BLANKS, FP4_BLANKS, FP4_BLANKS, ACT_BLANKS, FP8_BLANKS, WILD_BLANKS, NAMED_BLANKS
)
CODEBOOKS = st.sampled_from(
    [np.ones(16, np.float16), np.ones((1, 16), np.float32), np.ones(16, np.uint8), None]
)
EXTRA_TENSORS = {
    "fc1_global_scale": st.sampled_from([None, np.ones(4, np.float32), np.ones(1, np.float32)]),
    "fc2_global_scale": st.sampled_from([None, np.ones(4, np.float16)]),
    "fc1_act_scale": st.sampled_from([None, np.ones((4, 1), np.float32)]),
    "fc2_act_block_scale": st.just(np.ones((4, 3, 2), ml_dtypes.float8_e8m0fnu)),
    "fc2_scales": st.sampled_from([np.ones((4, 64, 2), dtype) for dtype in SCALE_TYPES.values()]),
    "fc1_codebook": CODEBOOKS,
    "fc2_codebook": CODEBOOKS,
}
MATMUL_CASES = st.builds(
    MatMulNBitsCase,
    format=st.sampled_from(["int2", "int4", "int8"]) | KNOWN_FORMATS,
    block_size=st.sampled_from([16, 32, 64]),
    scale_dtype=st.sampled_from([None, "float16", "float8e8m0"]),
    global_scales=st.booleans(),
    n=st.sampled_from([48, 64]),
    k=st.sampled_from([96, 128]),
    zero_points=st.sampled_from(["none", "packed", "bytes", "typed"]),
    g_idx=st.sampled_from(["none", "shuffled"]),
    bias=st.booleans(),
    flat=st.booleans(),
) | st.builds(
    MatMulNBitsCase,
    format=st.just("fp8_e4m3"),
    block_size=st.just(0),
    n=st.sampled_from([48, 64]),
    k=st.sampled_from([96, 128]),
    bias=st.booleans(),
)


BLOCK_QUANTIZED_CASES = st.sampled_from([Fp8WeightCase, Fp4WeightCase]).flatmap(
    lambda made: st.builds(
        made,
        dtype=st.sampled_from(["float32", "float16"]),
        block_size=st.sampled_from([None, 16, 32, 1024]),
        n=st.sampled_from([16, 33]),
        k=st.sampled_from([16, 34]),
        a_scale=st.booleans(),
        bias=st.booleans(),
    )
)


BLOCK_QUANTIZED_ATTRIBUTES = {
    "block_size": st.sampled_from([0, 8, 16, 24, 128]),
    "N": st.sampled_from([16, 33]),
    "K": st.sampled_from([16, 34]),
    "weights_layout": st.sampled_from(["", "raw", "packed"]),
}


def subsets(attributes):
    """A few of the attributes, each with one of its values."""
    return st.lists(st.sampled_from(sorted(attributes)), max_size=1, unique=True).flatmap(
        lambda names: st.fixed_dictionaries({name: attributes[name] for name in names})
    )


@st.composite
def reshaped(draw, tensors):
    """The tensors; perhaps one of the weights has another shape or type."""
    weights = [name for name in tensors if name not in ("input", "router_probs", "A")]
    if draw(st.booleans()):
        return tensors
    name = draw(st.sampled_from(weights))
    tensor = tensors[name]
    change = draw(st.sampled_from(["transpose", "shorten", "flatten", "wider", "retype", "drop"]))
    if change == "drop":
        return {key: value for key, value in tensors.items() if key != name}
    if change == "transpose":
        changed = np.ascontiguousarray(np.swapaxes(tensor, -1, -2)) if tensor.ndim > 1 else tensor
    elif change == "shorten":
        changed = tensor[..., :-1] if tensor.ndim else tensor
    elif change == "flatten":
        changed = tensor.reshape(-1)
    elif change == "wider":
        changed = tensor[None]
    else:
        changed = np.zeros(tensor.shape, np.int64 if tensor.dtype == np.uint8 else np.uint8)
    return {**tensors, name: changed}


def with_attributes(model, attributes):
    (node,) = model.graph.node
    kept = [attribute for attribute in node.attribute if attribute.name not in attributes]
    del node.attribute[:]
    node.attribute.extend(kept)
    node.attribute.extend(helper.make_attribute(*item) for item in attributes.items())
    return model


def op_takes(model):
    """Whether our op opens the node as it is."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    qmoe_plugin.register(options)
    try:
        onnxruntime.InferenceSession(
            model.SerializeToString(), options, ["CPUExecutionProvider"], enable_fallback=0
        )
    except Exception as error:
        return str(error)
    return ""


def compare(model):
    (node,) = model.graph.node
    node.domain = "qmoe_plugin"
    if all(entry.domain != "qmoe_plugin" for entry in model.opset_import):
        model.opset_import.append(helper.make_opsetid("qmoe_plugin", 1))
    complaint = op_takes(model)
    node.domain = "com.microsoft"
    report = qmoe_plugin.retarget(model, sm=0)
    if report.moved:
        assert not complaint
    else:
        assert complaint, report.kept[0].reason


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_qmoe(data):
    case = data.draw(QMOE_CASES)
    tensors = data.draw(reshaped(case.tensors()))
    model = one_node_model("QMoE", tensors, case.attributes(), domain="com.microsoft")
    compare(with_attributes(model, data.draw(subsets(QMOE_ATTRIBUTES))))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_moe(data):
    case = data.draw(MOE_CASES)
    tensors = data.draw(reshaped(case.tensors()))
    model = one_node_model("MoE", tensors, case.attributes(), domain="com.microsoft")
    compare(with_attributes(model, data.draw(subsets(MOE_ATTRIBUTES))))


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_quant_types_and_layouts(data):
    blank = data.draw(BLANKS)
    attributes, extra, tensors = {}, {}, blank.tensors()
    change = data.draw(st.sampled_from(["none", "attribute", "tensor", "extra tensor"]))
    if change == "attribute":
        attributes = data.draw(subsets(QMOE_ATTRIBUTES))
    elif change == "tensor":
        tensors = data.draw(reshaped(tensors))
    elif change == "extra tensor":
        extra = data.draw(subsets(EXTRA_TENSORS))
    dropped = {name: None for name in blank.tensors() if name not in tensors}
    compare(blank.model("com.microsoft", attributes, {**tensors, **dropped, **extra}))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_matmul_nbits(data):
    case = data.draw(MATMUL_CASES)
    if data.draw(st.booleans()):
        case = case.fitted()
    tensors = data.draw(reshaped(case.tensors()))
    model = one_node_model("MatMulNBits", tensors, case.attributes(), domain="com.microsoft")
    compare(with_attributes(model, data.draw(subsets(MATMUL_ATTRIBUTES))))


def changed_header(draw, content):
    """Packed weights; perhaps with another header, or of another size."""
    change = draw(st.sampled_from(["flip", "field", "shorten", "wider", "retype"]))
    if change == "flip":
        content = content.copy()
        content[draw(st.integers(0, 63))] ^= 1 << draw(st.integers(0, 7))
        return content
    if change == "shorten":
        return content[: draw(st.sampled_from([0, 40, 64, content.size - 1, content.size - 256]))]
    if change == "wider":
        return content[None]
    if change == "retype":
        return content.view(draw(st.sampled_from([np.int8, np.float32])))
    fields = draw(st.lists(st.sampled_from(sorted(HEADER_FIELDS)), min_size=1, max_size=2))
    return resealed(content, **{name: draw(HEADER_FIELDS[name]) for name in fields})


HEADER_FIELDS = {
    "magic": st.just(b"QMOEPACX"),
    "version": st.sampled_from([0, 1, 2]),
    "layout": st.integers(0, 3),
    "format": st.sampled_from([b"int2", b"int4", b"int8", b"mxfp4", b"int5", b"", b"\xff" * 12]),
    "experts": st.sampled_from([0, 1, 4, 5, 2**32 - 1]),
    "rows": st.sampled_from([0, 47, 48, 64, 128, 192, 2**32 - 1]),
    "k": st.sampled_from([0, 64, 95, 96, 128, 2**32 - 1]),
    "block_size": st.sampled_from([0, 16, 24, 32, 64, 2**31]),
    "flags": st.integers(0, 127),
    "scale_dtype": st.sampled_from([0, 1, 10, 16]),
    "encoding": st.just(0),
    "bytes": st.sampled_from([0, 64, 2**64 - 1]),
}
PACKED_INPUTS = st.sampled_from(
    [
        np.ones((4, 192, 2), np.float32),
        np.ones(4, np.float32),
        np.ones(1, np.float32),
        np.ones(1, np.uint8),
    ]
)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_packed_weights(data):
    case = data.draw(st.one_of(QMOE_CASES, MATMUL_CASES, MOE_CASES, BLOCK_QUANTIZED_CASES, BLANKS))
    model = case.model() if isinstance(case, Blank) else case.model(case.tensors(), "com.microsoft")
    if not qmoe_plugin.prepack(model, sm=data.draw(st.sampled_from([None, None, None, 90]))).packed:
        return
    (node,) = model.graph.node
    known = {"QMoE": QMOE_ATTRIBUTES, "MoE": MOE_ATTRIBUTES, "MatMulNBits": MATMUL_ATTRIBUTES}.get(
        node.op_type, BLOCK_QUANTIZED_ATTRIBUTES
    )
    limit = {"QMoE": 20, "MoE": 7}.get(node.op_type, 5)
    change = data.draw(st.sampled_from(["none", "attribute", "bytes", "swap", "input"]))
    packed = packed_tensors(model)
    if change == "attribute":
        layouts = st.sampled_from(["", "raw", "packed", "other"])
        model = with_attributes(model, data.draw(subsets({**known, "weights_layout": layouts})))
    elif change == "bytes":
        name = data.draw(st.sampled_from(sorted(packed)))
        model = with_packed(model, {name: changed_header(data.draw, packed[name])})
    elif change == "swap":
        model = with_packed(model, dict(zip(packed, reversed(packed.values()), strict=True)))
    elif change == "input":
        index = data.draw(st.integers(3 if "MoE" in node.op_type else 2, limit))
        model = with_input(model, index, data.draw(PACKED_INPUTS))
    compare(model)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_block_quantized(data):
    case = data.draw(BLOCK_QUANTIZED_CASES)
    tensors = data.draw(reshaped(case.tensors()))
    model = one_node_model(case.op_type, tensors, case.attributes(), domain="com.microsoft")
    compare(with_attributes(model, data.draw(subsets(BLOCK_QUANTIZED_ATTRIBUTES))))
