"""Codebooks, formats of the projections' own, scales far apart: what no case of a format shows."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from helpers.cases import MatMulNBitsCase, QMoECase, feeds_of
from helpers.dtypes import FLOAT_DTYPES, numpy_dtype
from helpers.kernel_check import problems
from helpers.run import bits_of, open_session, run, run_case
from helpers.tolerance import check

from qmoe_plugin import formats
from qmoe_plugin.devices import CPU
from qmoe_plugin.formats.codebook4 import CODEBOOKS, learn_codebook
from qmoe_plugin.kernels import explain

pytestmark = pytest.mark.usefixtures("library")

FORMATS = list(formats.FORMATS)
SCALE_DTYPES = (*FLOAT_DTYPES, "float8e8m0", "float8e4m3fn")


def result_of(case: QMoECase | MatMulNBitsCase, tensors: dict, device: str) -> np.ndarray:
    result = run(open_session(case.model(tensors), device), feeds_of(tensors))
    check(case, tensors, result)
    return result


@pytest.mark.quick
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("tokens", [2, 40])
def test_int4_scales_far_apart(tokens: int, dtype: str, device: str) -> None:
    """Weights keep their bits beside a block of the same row that is 2^13 times as large."""
    case = QMoECase(tokens=tokens, dtype=dtype, hidden=128, bias=False)
    tensors = case.tensors()
    tensors["fc1_scales"][..., 0] *= 2.0**13
    tensors["input"][:, : case.block_size] = 0  # only the others are seen in the result
    result_of(case, tensors, device)


@pytest.mark.parametrize("fc2_format", FORMATS)
@pytest.mark.parametrize("format_name", FORMATS)
def test_each_projection_in_a_format_of_its_own(
    format_name: str, fc2_format: str, device: str
) -> None:
    """By fc2_format beside quant_type, and by both attributes; each with scales of its own kind."""
    for dtype, tokens, block_size in (("float16", 1, 32), ("bfloat16", 20, 64), ("float32", 3, 0)):
        for own_formats in (False, True):
            case = QMoECase(
                format_name,
                block_size,
                dtype,
                fc2_format=fc2_format,
                own_formats=own_formats,
                zero_points=True,
                tokens=tokens,
            ).fitted()
            tensors, result = run_case(case, device)
            check(case, tensors, result)


@pytest.mark.parametrize("format_name", ["int4", "fp8_e4m3", "codebook4"])
def test_fc3_has_the_format_of_fc1(format_name: str, device: str) -> None:
    for fc2_format in ("mxfp4", "nvfp4", "int8"):
        case = QMoECase(
            format_name, fc2_format=fc2_format, own_formats=True, fusion=0, fc3=True, tokens=5
        ).fitted()
        assert case.fc3
        tensors, result = run_case(case, device)
        check(case, tensors, result)


def test_names_say_the_same_as_quant_types(device: str) -> None:
    """quant_type "mxfp4" is "fp4" in the raw layout, weight_format "int4" is bits=4, and so on."""
    for name in ("int2", "int4", "int8", "mxfp4", "nvfp4", "fp8_e4m3"):
        case = QMoECase(name, tokens=4).fitted()
        tensors, expected = run_case(case, device)
        by_name = dataclasses.replace(case, quant_type=name)
        model = by_name.model(tensors)
        (node,) = model.graph.node
        kept = [a for a in node.attribute if a.name != "weights_prepacked"]
        del node.attribute[:]
        node.attribute.extend(kept)
        assert bits_of(run(open_session(model, device), feeds_of(tensors))) == bits_of(expected)
        own = dataclasses.replace(case, own_formats=True)
        assert bits_of(result_of(own, tensors, device)) == bits_of(expected)


def test_activations_are_quantised_whatever_the_format_of_fc2(device: str) -> None:
    for fc2_format in ("int8", "nvfp4"):
        case = QMoECase("mxfp4", quant_type="wfp4afp8", fc2_format=fc2_format, tokens=9).fitted()
        tensors, result = run_case(case, device)
        check(case, tensors, result)
        plain = dataclasses.replace(case, quant_type="fp4")
        with pytest.raises(AssertionError, match="times what is allowed"):
            check(plain, tensors, result)


@pytest.mark.parametrize("global_scales", [False, True])
@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_codebook_with_scales_of_every_type(
    dtype: str, scale_dtype: str, global_scales: bool, device: str
) -> None:
    for block_size, tokens, fc3 in ((0, 1, False), (64, 3, True), (32, 40, False)):
        case = QMoECase(
            "codebook4",
            block_size,
            dtype,
            scale_dtype=scale_dtype,
            global_scales=global_scales,
            tokens=tokens,
            fusion=0,
            fc3=fc3,
        ).fitted()
        tensors, result = run_case(case, device)
        check(case, tensors, result)
    matmul = MatMulNBitsCase(
        "codebook4", 16, dtype, scale_dtype=scale_dtype, global_scales=global_scales, m=7, k=93
    )
    tensors, result = run_case(matmul, device)
    check(matmul, tensors, result)


@pytest.mark.parametrize("codebook_dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_codebooks_of_every_float_type(dtype: str, codebook_dtype: str, device: str) -> None:
    case = QMoECase("codebook4", dtype=dtype, tokens=5)
    tensors = case.tensors()
    for name in ("fc1_codebook", "fc2_codebook"):
        tensors[name] = tensors[name].astype(numpy_dtype(codebook_dtype))
    result_of(case, tensors, device)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_a_codebook_of_integers_is_int4(dtype: str, device: str) -> None:
    """The same bits, where the same kernel runs; MatMulNBits with many rows on CUDA too."""
    case = QMoECase("codebook4", dtype=dtype, tokens=9, signs=False)
    tensors = case.tensors()
    tensors["fc1_codebook"] = tensors["fc2_codebook"] = np.arange(16, dtype=np.float32) - 8
    result = result_of(case, tensors, device)
    integers = dataclasses.replace(case, format="int4")
    same = {name: tensor for name, tensor in tensors.items() if "codebook" not in name}
    expected = result_of(integers, same, device)
    np.testing.assert_allclose(
        result.astype(np.float64), expected.astype(np.float64), rtol=0.02, atol=0.02
    )
    stems = [
        [explain(problem)[0].kernel.split(".")[0] for problem in problems(c, CPU)]
        for c in (case, integers)
    ]
    if device == "cpu" and stems[0] == stems[1]:
        assert bits_of(result) == bits_of(expected)


@pytest.mark.parametrize("name", [*CODEBOOKS, "learned"])
def test_quantised_weights_run(name: str, device: str) -> None:
    """From float weights to a node: the whole way of a codebook."""
    case = QMoECase("codebook4", 64, "float16", hidden=128, inter=192, tokens=6)
    tensors = case.tensors()
    rng = np.random.default_rng(7)
    for projection, shape in (("fc1", (4, 384, 128)), ("fc2", (4, 128, 192))):
        weights = rng.standard_t(5, shape).astype(np.float32) / np.sqrt(shape[-1])
        codebook = learn_codebook(weights, 64) if name == "learned" else CODEBOOKS[name]
        fmt = formats.get("codebook4").with_codebook(codebook)
        quantized = fmt.quantize(weights, 64, scale_dtype=np.float16)
        tensors[f"{projection}_experts_weights"] = quantized.codes
        tensors[f"{projection}_scales"] = quantized.scales
        tensors[f"{projection}_codebook"] = quantized.codebook
        decoded = fmt.dequantize(quantized.codes, quantized.scales, k=shape[-1], block_size=64)
        assert np.sqrt(np.mean((decoded - weights) ** 2)) < 0.12 * weights.std()
    result_of(case, tensors, device)


def test_one_session_for_each_pair_of_scale_types(device: str) -> None:
    """fc1 and fc2 may have scales of different types; onnxruntime has to find the kernel."""
    for fc1, fc2 in itertools.product(SCALE_DTYPES, SCALE_DTYPES):
        case = QMoECase("codebook4", 32, "float16", scale_dtype=fc1, tokens=2, experts=2, k=1)
        tensors = case.tensors()
        other = dataclasses.replace(case, scale_dtype=fc2).tensors()
        tensors |= {name: other[name] for name in other if name.startswith("fc2_")}
        result_of(case, tensors, device)
