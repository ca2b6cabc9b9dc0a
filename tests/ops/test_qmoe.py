"""QMoE against the oracle: every format, block size, type, shape, routing and activation."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from helpers.cases import ACTIVATIONS, QMoECase, feeds_of
from helpers.dtypes import FLOAT_DTYPES, onnx_type
from helpers.models import one_node_model
from helpers.run import bits_of, open_session, ort_value, run, run_case, to_numpy
from helpers.tolerance import check
from onnx import helper

from qmoe_plugin import formats

pytestmark = pytest.mark.usefixtures("library")

FORMATS = list(formats.FORMATS)
WITH_ZERO_POINTS = [name for name in FORMATS if formats.get(name).zero_points]
INTEGER_FORMATS = [
    name for name in FORMATS if formats.get(name).qmoe_attributes["quant_type"] == "int"
]
BLOCK_SIZES = (0, 16, 32, 64, 128, 256)
BLOCKS = [  # (format, block size) of all that there are
    (name, block_size)
    for name in FORMATS
    for block_size in BLOCK_SIZES
    if formats.get(name).only_block_size in (None, block_size)
]
Case = QMoECase


def verify(*cases: QMoECase, device: str) -> None:
    """Each case within tolerance, without what its format does not have."""
    for case in dict.fromkeys(case.fitted() for case in cases):
        tensors, result = run_case(case, device)
        check(case, tensors, result)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize(("format_name", "block_size"), BLOCKS)
def test_block_sizes(format_name: str, block_size: int, dtype: str, device: str) -> None:
    unit = block_size or 8
    zero_points = {False, formats.get(format_name).zero_points}
    verify(
        *[
            Case(
                format_name,
                block_size,
                dtype,
                zero_points=with_zero_points,
                hidden=hidden * unit,
                inter=inter * unit,
            )
            for hidden, inter in ((1, 2), (3, 1))
            for with_zero_points in sorted(zero_points)
        ],
        device=device,
    )


SIZES = [  # hidden, inter, block_size: any multiple of the block, or of 8 per channel
    (96, 160, 32),
    (160, 96, 16),
    (720, 720, 16),  # 45 * 16, a quarter of gpt-oss
    (48, 208, 16),
    (64, 64, 64),
    (320, 192, 64),
    (128, 384, 128),
    (8, 8, 0),
    (8, 104, 0),
    (200, 72, 0),
    (544, 136, 0),
]


@pytest.mark.parametrize("size", range(len(SIZES)))
@pytest.mark.parametrize("format_name", FORMATS)
def test_sizes(format_name: str, size: int, device: str) -> None:
    """Formats take turns with types, so that each meets each over all sizes."""
    hidden, inter, block_size = SIZES[size]
    dtype = FLOAT_DTYPES[(size + FORMATS.index(format_name)) % 3]
    verify(
        *[
            Case(
                format_name,
                block_size,
                dtype,
                hidden=hidden,
                inter=inter,
                tokens=tokens,
                activation=activation,
                fusion=fusion,
            )
            for tokens, activation, fusion in ((1, "swiglu", 1), (9, "relu", 0))
        ],
        device=device,
    )


@pytest.mark.parametrize("tokens", [0, 1, 2, 7, 33, 200, 1000])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("format_name", FORMATS)
def test_tokens(format_name: str, dtype: str, tokens: int, device: str) -> None:
    verify(Case(format_name, dtype=dtype, tokens=tokens, experts=8, k=3), device=device)


@pytest.mark.parametrize("tokens", [42, 70, 100, 130, 140, 180, 220, 300])
@pytest.mark.parametrize("experts", [1, 4])
def test_rows_of_an_expert(experts: int, tokens: int, device: str) -> None:
    """Tiles of all sizes, full ones and others."""
    sizes = {"hidden": 160, "inter": 144, "block_size": 16, "experts": experts}
    for dtype, zero_points in (("float16", False), ("bfloat16", True)):
        case = Case(dtype=dtype, zero_points=zero_points, tokens=tokens, **sizes)
        verify(dataclasses.replace(case, k=min(2, experts)), device=device)


@pytest.mark.quick
@pytest.mark.parametrize("format_name", ["int4"])
def test_rows_of_two_experts_that_do_not_fit(format_name: str, device: str) -> None:
    """Into a block's shared memory on a GPU: a block with weights of both begins again."""
    sizes = {"hidden": 3584, "inter": 256, "experts": 8, "tokens": 38}
    verify(Case(format_name, dtype="float16", **sizes), device=device)


@pytest.mark.parametrize("activation", ["swiglu", "geglu", "silu", "relu", "gelu", "identity"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_more_tiles_than_multiprocessors(dtype: str, activation: str, device: str) -> None:
    fusion = 2 if activation == "swiglu" else 0
    case = Case(dtype=dtype, tokens=900, inter=520, experts=8, k=3, activation=activation)
    verify(dataclasses.replace(case, fusion=fusion), device=device)


FUSIONS = [
    {"activation": activation, "fusion": fusion, "fc3": fc3}
    for activation in ("swiglu", "geglu")
    for fusion, fc3 in ((0, True), (0, False), (1, False), (2, False))
]
PLAIN = [
    {"activation": activation, "fusion": 0, "fc3": False}
    for activation in ACTIVATIONS
    if activation not in ("swiglu", "geglu")
]
SILU_FC3 = [{"activation": "silu", "fusion": 0, "fc3": True}]


@pytest.mark.parametrize(
    "options", PLAIN + FUSIONS + SILU_FC3, ids=lambda o: "-".join(str(v) for v in o.values())
)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("format_name", FORMATS)
def test_activations(format_name: str, dtype: str, options: dict, device: str) -> None:
    zero_points = formats.get(format_name).zero_points
    verify(
        Case(format_name, dtype=dtype, tokens=1, **options),
        Case(format_name, 0, dtype, tokens=20, bias=False, **options),
        Case(format_name, 16, dtype, tokens=4, zero_points=zero_points, **options),
        device=device,
    )


SWIGLU_PARAMETERS = [
    {"alpha": 1.702, "beta": 1.0, "limit": 7.0},  # gpt-oss
    {"alpha": 1.702, "beta": 1.0, "limit": 0.5},  # most values are cut
    {"alpha": 0.0},
    {"alpha": -1.0, "beta": -0.5},
    {"beta": 1.0},
    {"limit": 1e30},
    {"alpha": 1.702, "beta": 1.0, "limit": 0.5, "limit_after": True},
    {"limit": 2.0, "limit_after": True},
    {"limit_after": True},  # nothing is cut
]


@pytest.mark.parametrize("parameters", SWIGLU_PARAMETERS, ids=str)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_swiglu_parameters(dtype: str, parameters: dict, device: str) -> None:
    for tokens, fusion in itertools.product((2, 24), (1, 2)):
        verify(Case(dtype=dtype, tokens=tokens, fusion=fusion, **parameters), device=device)


@pytest.mark.parametrize("fusion", [0, 1, 2])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("format_name", FORMATS)
def test_limit_after_activation(format_name: str, dtype: str, fusion: int, device: str) -> None:
    """In every format, and with rows for each kernel; com.microsoft has it in few of them."""
    common = {"dtype": dtype, "alpha": 1.702, "limit": 0.5, "limit_after": True}
    verify(
        Case(format_name, tokens=1, fusion=fusion, fc3=fusion == 0, **common),
        Case(format_name, tokens=20, fusion=fusion, fc3=fusion == 0, **common),
        Case(format_name, tokens=150, experts=2, fusion=fusion, **common),
        device=device,
    )


@pytest.mark.parametrize("limit_after", [False, True])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_limits_keep_nan(dtype: str, limit_after: bool, device: str) -> None:
    """NaN in one gate or one up is NaN in the result, cut or not, few rows or many."""
    for tokens, row in itertools.product((1, 70), (0, 1)):
        case = Case(dtype=dtype, tokens=tokens, experts=2, limit=0.5, limit_after=limit_after)
        tensors = case.tensors()
        tensors["fc1_experts_bias"][:, row] = np.nan
        result = run(open_session(case.model(tensors), device), feeds_of(tensors))
        assert np.isnan(result.astype(np.float64)).all()


def test_geglu_takes_no_swiglu_parameters(device: str) -> None:
    """Exporters write them with every activation."""
    verify(Case(activation="geglu", alpha=1.702, beta=1.0), device=device)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_large_activations(activation: str, dtype: str, device: str) -> None:
    """Sigmoid, tanh and erf far from zero: neither NaN nor infinity where the result is finite."""
    case = Case(dtype=dtype, activation=activation, fusion=0, tokens=6)
    tensors = case.tensors()
    tensors["input"] *= 300.0
    check(case, tensors, run(open_session(case.model(tensors), device), feeds_of(tensors)))


@pytest.mark.parametrize("scale_dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("format_name", FORMATS)
def test_scale_types(format_name: str, dtype: str, scale_dtype: str, device: str) -> None:
    for block_size, tokens in ((0, 1), (32, 1), (32, 12)):
        verify(
            Case(format_name, block_size, dtype, scale_dtype=scale_dtype, tokens=tokens),
            device=device,
        )


def scaled(case: QMoECase, factor: float) -> dict[str, np.ndarray]:
    """The case's tensors with fc1's scales times factor, and fc2's divided by it."""
    tensors = case.tensors()
    for name, by in (("fc1_scales", factor), ("fc2_scales", 1 / factor)):
        tensors[name] = (tensors[name].astype(np.float64) * by).astype(tensors[name].dtype)
    tensors["fc1_experts_bias"] = tensors["fc1_experts_bias"] * tensors[
        "fc1_experts_bias"
    ].dtype.type(factor)
    return tensors


@pytest.mark.parametrize("factor", [1e-4, 1e-2, 1e2, 1e4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("block_size", [0, 32])
def test_scales_far_from_one(block_size: int, dtype: str, factor: float, device: str) -> None:
    """float32 scales outside of float16's comfortable range."""
    case = Case("int4", block_size, dtype, scale_dtype="float32", activation="relu", tokens=4)
    tensors = scaled(case, factor)
    check(case, tensors, run(open_session(case.model(tensors), device), feeds_of(tensors)))


def test_zero_scales(device: str) -> None:
    """Blocks, and whole rows, of weight zero."""
    case = Case("int4", 16, tokens=4)
    tensors = case.tensors()
    tensors["fc1_scales"][:, ::3] = 0
    tensors["fc2_scales"][:, :, ::2] = 0
    check(case, tensors, run(open_session(case.model(tensors), device), feeds_of(tensors)))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_scales_of_one_row_over_many_magnitudes(dtype: str, device: str) -> None:
    case = Case("int4", 16, dtype, scale_dtype="float32", activation="identity", tokens=5)
    tensors = case.tensors()
    groups = tensors["fc1_scales"].shape[-1]
    tensors["fc1_scales"] *= (4.0 ** -np.arange(groups)).astype(np.float32)
    check(case, tensors, run(open_session(case.model(tensors), device), feeds_of(tensors)))


@pytest.mark.parametrize("fc2_format", INTEGER_FORMATS)
@pytest.mark.parametrize("format_name", INTEGER_FORMATS)
def test_fc1_and_fc2_of_different_width(format_name: str, fc2_format: str, device: str) -> None:
    for block_size, tokens in ((0, 1), (32, 1), (32, 20)):
        verify(
            Case(format_name, block_size, "float16", fc2_format=fc2_format, tokens=tokens),
            device=device,
        )


@pytest.mark.parametrize("format_name", WITH_ZERO_POINTS)
def test_zero_points_of_one_projection_only(format_name: str, device: str) -> None:
    case = Case(format_name, zero_points=True, fusion=0, fc3=True, tokens=5)
    for present in ("fc1", "fc2", "fc3"):
        tensors = {
            name: tensor
            for name, tensor in case.tensors().items()
            if not name.endswith("zero_points") or name.startswith(present)
        }
        check(case, tensors, run(open_session(case.model(tensors), device), feeds_of(tensors)))


@pytest.mark.parametrize("missing", ["fc1_experts_bias", "fc2_experts_bias", "fc3_experts_bias"])
def test_any_bias_may_be_missing(missing: str, device: str) -> None:
    case = Case(fusion=0, fc3=True, tokens=5)
    tensors = case.tensors()
    del tensors[missing]
    check(case, tensors, run(open_session(case.model(tensors), device), feeds_of(tensors)))


OPTIONS = [
    Case(block_size=0, trailing_group_axis=True),
    Case(block_size=0, trailing_group_axis=True, zero_points=True),
    Case(signs=False),
    Case(hidden=64, inter=64),  # raw and prepacked weights have the same shapes
    Case(hidden=64, inter=32),  # fc1 is square
    Case(rank=3, tokens=1),
    Case(rank=3, tokens=0),
    Case(rank=3, tokens=12, router_rank=3),
    Case(normalize=False, k=4),
]


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("case", OPTIONS, ids=str)
def test_options(case: QMoECase, dtype: str, device: str) -> None:
    verify(dataclasses.replace(case, dtype=dtype), device=device)


REAL_LAYERS = [  # with fewer experts: what a token goes through is of full size
    Case(hidden=2880, inter=2880, experts=2, k=2, alpha=1.702, beta=1.0, limit=7.0),  # gpt-oss
    Case("mxfp4", hidden=2880, inter=2880, experts=2, k=1, alpha=1.702, beta=1.0, limit=7.0),
    Case("mxfp4", hidden=2880, inter=2880, experts=2, k=1, quant_type="wfp4afp8", limit=7.0),
    Case("nvfp4", hidden=2048, inter=512, experts=4, k=3, bias=False),  # Qwen3.6-35B-A3B
    Case(hidden=2048, inter=768, experts=6, k=5, bias=False),  # Qwen3-30B-A3B
    Case("int8", hidden=2048, inter=512, experts=6, k=5, bias=False),  # Qwen3.6-35B-A3B
    Case(hidden=2816, inter=704, experts=5, k=4, block_size=64, activation="geglu"),  # Gemma 4
]


@pytest.mark.parametrize(("dtype", "tokens"), [("float32", 1), ("float16", 3), ("bfloat16", 40)])
@pytest.mark.parametrize("case", REAL_LAYERS, ids=str)
def test_real_layers(case: QMoECase, dtype: str, tokens: int, device: str) -> None:
    verify(dataclasses.replace(case, dtype=dtype, tokens=tokens), device=device)


@pytest.mark.parametrize("accuracy_level", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("format_name", FORMATS)
def test_accuracy_levels(format_name: str, dtype: str, accuracy_level: int, device: str) -> None:
    for tokens in (1, 20):
        verify(
            Case(format_name, dtype=dtype, accuracy_level=accuracy_level, tokens=tokens),
            device=device,
        )


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("format_name", FORMATS)
def test_same_bits_every_time(format_name: str, dtype: str, device: str) -> None:
    """Run to run, session to session, and whatever the number of threads."""
    for tokens in (1, 40):
        case = Case(format_name, dtype=dtype, tokens=tokens, experts=8, k=4, hidden=160, inter=96)
        tensors = case.tensors()
        feeds = feeds_of(tensors)
        sessions = [open_session(case.model(tensors), device, threads=n) for n in (1, 2, 1)]
        assert len({bits_of(run(s, feeds)) for s in sessions for _ in range(3)}) == 1


def test_sizes_may_change_from_run_to_run(device: str) -> None:
    case = Case(dtype="float16", experts=8, k=3)
    session = open_session(case.model(case.tensors()), device)
    for tokens in (3, 130, 1, 0, 17, 64, 2):
        resized = dataclasses.replace(case, tokens=tokens)
        rng = np.random.default_rng(tokens)
        tensors = case.tensors()
        tensors["input"] = rng.standard_normal((tokens, case.hidden)).astype(np.float16)
        tensors["router_probs"] = rng.standard_normal((tokens, case.experts)).astype(np.float16)
        check(resized, tensors, run(session, feeds_of(tensors)))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_special_values_stay_in_their_token(dtype: str, device: str) -> None:
    """NaN in a token's input or logits leaves the other tokens alone, and never crashes."""
    case = Case(dtype=dtype, tokens=8, experts=8, k=3)
    tensors = case.tensors()
    clean = case.expected(tensors)
    feeds = {name: array.copy() for name, array in feeds_of(tensors).items()}
    feeds["input"][1, 3] = np.nan
    feeds["input"][2] = np.inf
    feeds["router_probs"][4, 2] = np.nan
    feeds["router_probs"][5] = np.nan
    feeds["router_probs"][6] = np.inf
    feeds["router_probs"][7] = -np.inf
    result = run(open_session(case.model(tensors), device), feeds).astype(np.float64)
    assert np.isnan(result[1]).all()
    np.testing.assert_allclose(result[[0, 3]], clean[[0, 3]], rtol=0.05, atol=0.05)


def test_one_tensor_as_input_and_router(device: str) -> None:
    """H == E, and the model feeds the same value to input, router_probs and router_weights."""
    case = Case("int4", 16, hidden=32, inter=32, experts=32, k=5, tokens=6, router_weights=True)
    tensors = case.tensors()
    x = tensors["input"]
    tensors["router_probs"] = tensors["router_weights"] = x
    model = case.model(tensors)
    node = model.graph.node[0]
    for i, name in enumerate(node.input):
        if name in ("router_probs", "router_weights"):
            node.input[i] = "input"
    kept = [value for value in model.graph.input if value.name == "input"]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    check(case, tensors, run(open_session(model, device), {"input": x}))


@pytest.mark.parametrize("input_is_used_again", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_output_in_the_buffer_of_the_input(
    dtype: str, input_is_used_again: bool, device: str
) -> None:
    """onnxruntime gives an input that dies here as the output's buffer, and only then."""
    case = Case(dtype=dtype, tokens=50, experts=8, k=3, rank=3)
    tensors = case.tensors()
    model = one_node_model("QMoE", tensors, case.attributes())
    node = model.graph.node[0]
    node.input[0], node.output[0] = "doubled", "moe"
    before = helper.make_node("Add", ["input", "input"], ["doubled"])
    after = helper.make_node(
        "Add", ["moe", "doubled" if input_is_used_again else "moe"], ["output"]
    )
    del model.graph.node[:]
    model.graph.node.extend([before, node, after])
    result = run(open_session(model, device), feeds_of(tensors)).astype(np.float64)
    doubled = {**tensors, "input": tensors["input"] * tensors["input"].dtype.type(2)}
    moe = case.expected(doubled)
    expected = moe + (doubled["input"].astype(np.float64) if input_is_used_again else moe)
    tolerance = 1e-4 if dtype == "float32" else 2e-2
    np.testing.assert_allclose(result, expected, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_the_user_binds_the_input_as_the_output(dtype: str, device: str) -> None:
    case = Case(dtype=dtype, tokens=50, experts=8, k=3)
    tensors = case.tensors()
    session = open_session(case.model(tensors), device)
    expected = run(session, feeds_of(tensors))
    values = {name: ort_value(array) for name, array in feeds_of(tensors).items()}
    binding = session.io_binding()
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    x = values["input"]
    binding.bind_output("output", "cpu", 0, onnx_type(dtype), tensors["input"].shape, x.data_ptr())
    session.run_with_iobinding(binding)
    assert bits_of(to_numpy(x)) == bits_of(expected)


def test_all_tokens_on_one_expert(device: str) -> None:
    for tokens, k in ((200, 1), (64, 3), (1, 1)):
        for dtype in FLOAT_DTYPES:
            verify(
                Case(dtype=dtype, tokens=tokens, k=k, experts=8, router="one_expert"), device=device
            )
