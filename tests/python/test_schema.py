"""Our schemas in onnx.defs: checker, shape inference, onnx-ir; sessions and stock say the same."""

import re
import subprocess
import sys

import onnx
import onnx_ir as ir
import pytest
from helpers.block_quantized_cases import Fp4WeightCase, Fp8WeightCase
from helpers.cases import MatMulNBitsCase, QMoECase, feeds_of
from helpers.dtypes import onnx_type
from helpers.models import INPUT_NAMES, save_external
from helpers.moe_cases import MoECase
from helpers.run import open_session, run
from onnx import defs, helper
from onnx_ir.passes import common

import qmoe_plugin
from qmoe_plugin import formats
from qmoe_plugin.graph import schema
from qmoe_plugin.graph.describe import UnsupportedError, describe
from qmoe_plugin.library import OPS

pytestmark = pytest.mark.usefixtures("library")

CASES = [
    *(QMoECase(format=name).fitted() for name in formats.FORMATS),
    *(MatMulNBitsCase(format=name).fitted() for name in formats.FORMATS),
    *(QMoECase(dtype=dtype, rank=3) for dtype in ("float16", "bfloat16")),
    QMoECase(router_weights=True, zero_points=True, scale_dtype="float16"),
    QMoECase(fc3=True, activation="silu", shared=1),
    QMoECase(format="mxfp4", as_bytes=True, quant_type="wfp4afp8", act_scales="one"),
    QMoECase(fc2_format="int8", own_formats=True),
    MatMulNBitsCase(rank=3, zero_points="packed", g_idx="shuffled", dtype="float16"),
    MatMulNBitsCase(rank=1, m=1, zero_points="typed", accuracy_level=4),
    MatMulNBitsCase(layout="raw", flat=True),
    MoECase(),
    MoECase(dtype="bfloat16", fc3=True, activation="silu", rank=3),
    Fp8WeightCase(a_scale=True),
    Fp4WeightCase(a_scale=True, rank=3),
]


def name_of(case):
    return f"{case.op_type}-{case}"


def bare(model):
    """The model with outputs that say neither type nor shape."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for output in copy.graph.output:
        output.ClearField("type")
    return copy


def inferred(model):
    """The model with the types and shapes of outputs, inferred strictly."""
    return onnx.shape_inference.infer_shapes(bare(model), check_type=True, strict_mode=True)


def infer(model):
    """Type and shape of the output."""
    return inferred(model).graph.output[0].type.tensor_type


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_inference_is_what_sessions_do(case):
    tensors = case.tensors()
    model = case.model(tensors)
    result = run(open_session(model), feeds_of(tensors))
    for value in model.graph.input:
        for axis, size in enumerate(tensors[value.name].shape):
            value.type.tensor_type.shape.dim[axis].dim_value = size
    found = infer(model)
    assert found.elem_type == onnx_type(result.dtype)
    assert tuple(dim.dim_value for dim in found.shape.dim) == result.shape


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_checker(case, tmp_path):
    model = inferred(case.model(case.tensors()))
    onnx.checker.check_model(model, full_check=True)
    onnx.checker.check_model(save_external(model, tmp_path), full_check=True)


@pytest.mark.parametrize("case", [QMoECase(), MatMulNBitsCase()], ids=name_of)
def test_packed_weights(case):
    model = case.model(case.tensors())
    qmoe_plugin.prepack(model)
    onnx.checker.check_model(inferred(model), full_check=True)
    assert infer(model).shape.dim[-1].dim_value == (case.n if hasattr(case, "n") else case.hidden)


def test_symbols_stay():
    found = infer(MatMulNBitsCase(rank=3).model(MatMulNBitsCase(rank=3).tensors()))
    assert [dim.dim_param or dim.dim_value for dim in found.shape.dim] == ["A_0", "A_1", 48]


def test_onnx_ir():
    """Its passes, and types and shapes for what comes after our nodes."""
    case = MatMulNBitsCase()
    model = bare(case.model(case.tensors()))
    model.graph.node.append(helper.make_node("Transpose", ["output"], ["last"]))
    model.graph.output[0].name = "last"
    decoded = ir.from_proto(model)
    common.ShapeInferencePass(check_type=True, strict_mode=True)(decoded)
    common.CheckerPass(full_check=True)(decoded)
    (last,) = decoded.graph.outputs
    assert last.dtype is ir.DataType.FLOAT
    assert [str(dim) for dim in last.shape] == ["48", "A_0"]


def with_attribute(model, name, value):
    (node,) = model.graph.node
    kept = [attribute for attribute in node.attribute if attribute.name != name]
    del node.attribute[:]
    node.attribute.extend(kept)
    if value is not None:
        node.attribute.append(helper.make_attribute(name, value))
    return model


@pytest.mark.parametrize(
    ("case", "name", "value", "says"),
    [
        (QMoECase(), "novel", 1, "Unrecognized attribute: novel"),
        (QMoECase(), "k", "two", "attribute"),
        (MatMulNBitsCase(), "K", None, "Required attribute 'K' is missing"),
        (MatMulNBitsCase(), "K", 95, "A has 96 columns, but K is 95"),
    ],
)
def test_wrong_attributes(case, name, value, says):
    model = with_attribute(inferred(case.model(case.tensors())), name, value)
    with pytest.raises(
        (onnx.checker.ValidationError, onnx.shape_inference.InferenceError), match=says
    ):
        onnx.checker.check_model(model, full_check=True)


@pytest.mark.parametrize("name", ["A", "B", "scales", "bias"])
def test_wrong_types(name):
    case = MatMulNBitsCase()
    tensors = case.tensors()
    tensors[name] = tensors[name].astype("int64")
    model = case.model(tensors)
    model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.INT64
    with pytest.raises(onnx.shape_inference.InferenceError, match="int64"):
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)


def test_missing_and_superfluous_inputs():
    case = MatMulNBitsCase()
    for count in (1, 9):
        model = inferred(case.model(case.tensors()))
        (node,) = model.graph.node
        names = [*node.input, *["A"] * 9][:count]
        del node.input[:]
        node.input.extend(names)
        with pytest.raises(onnx.checker.ValidationError, match="input"):
            onnx.checker.check_model(model)


@pytest.mark.parametrize("op", OPS)
def test_names(op):
    made = defs.get_schema(op, domain=qmoe_plugin.DOMAIN)
    assert tuple(value.name for value in made.inputs) == INPUT_NAMES[op]
    for name in INPUT_NAMES[op]:
        patterns = [pattern for pattern in schema._TYPES if re.fullmatch(pattern, name)]
        assert len(patterns) == 1, f"{name} matches {patterns}"


@pytest.mark.parametrize("op", OPS)
def test_stock_schemas_say_the_same(op):
    """Types, defaults and necessity, where this onnxruntime has the op; ours may allow more."""
    state = pytest.importorskip("onnxruntime.capi.onnxruntime_pybind11_state")
    found = [s for s in state.get_all_operator_schema()
             if (s.domain, s.name) == ("com.microsoft", op)]  # fmt: skip
    if not found:
        pytest.skip(f"this onnxruntime has no com.microsoft.{op}")
    ours = defs.get_schema(op, domain=qmoe_plugin.DOMAIN)
    for name, stock in found[0].attributes.items():
        mine = ours.attributes[name]
        assert mine.type.name == stock.type.name
        assert mine.required == stock.required
        if mine.default_value.name:
            default = onnx.AttributeProto.FromString(stock._default_value)
            assert helper.get_attribute_value(mine.default_value) == helper.get_attribute_value(
                default
            )
    for mine, stock in zip(ours.inputs, found[0].inputs, strict=False):
        assert mine.name == stock.name
        if stock.option.name == "Optional":
            assert mine.option.name == "Optional"
        missing = set(stock.types) - set(mine.types) - {"tensor(float8e4m3fn)"}
        assert not missing, f"{name} may be {missing}"


@pytest.mark.parametrize(
    "case",
    [QMoECase(), MoECase(), MatMulNBitsCase(), Fp8WeightCase(), Fp4WeightCase()],
    ids=name_of,
)
def test_defaults_are_what_leaving_out_means(case):
    model = case.model(case.tensors())
    attributes = defs.get_schema(case.op_type, domain=qmoe_plugin.DOMAIN).attributes
    tried = 0
    for name, attribute in attributes.items():
        if not attribute.default_value.name:
            continue
        value = helper.get_attribute_value(attribute.default_value)
        answers = []
        for given in (None, value):
            changed = with_attribute(case.model(case.tensors()), name, given)
            try:
                answers.append(describe(ir.from_proto(changed).graph[0]))
            except UnsupportedError as error:
                answers.append(str(error))
        assert answers[0] == answers[1], name
        tried += 1
    assert tried
    assert model.graph.node[0].op_type == case.op_type


def test_import_registers_once_and_leaves_quietly():
    code = (
        "import onnx, qmoe_plugin, importlib; from qmoe_plugin.graph import schema;"
        "schema.register_schemas(); importlib.reload(qmoe_plugin);"
        "print(onnx.defs.get_schema('QMoE', domain='qmoe_plugin').since_version)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("1\n", "")
