"""Weights, scales and activations of small float types: what random cases do not show."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from helpers.cases import QMoECase, feeds_of
from helpers.dtypes import FLOAT_DTYPES, numpy_dtype
from helpers.run import bits_of, open_session, run, run_case
from helpers.tolerance import check
from onnx import helper

from qmoe_plugin import formats
from qmoe_plugin.formats.scales import E4M3, E8M0

pytestmark = pytest.mark.usefixtures("library")

Case = QMoECase


def verify(case: QMoECase, tensors: dict[str, np.ndarray], device: str) -> np.ndarray:
    result = run(open_session(case.model(tensors), device), feeds_of(tensors))
    check(case, tensors, result)
    return result


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("format_name", ["mxfp4", "nvfp4", "fp8_e4m3"])
def test_every_code_is_read_back(format_name: str, dtype: str, device: str) -> None:
    """x = identity, W2 = identity: y is W1, each code in each place of a block, exactly."""
    fmt = formats.get(format_name)
    case = Case(
        format_name,
        0,
        dtype,
        hidden=256,
        inter=256,
        experts=1,
        k=1,
        tokens=256,
        activation="identity",
        fusion=0,
        bias=False,
    )
    tensors = case.tensors()
    numbers = np.flatnonzero(np.isfinite(fmt.values))
    codes = numbers[np.add.outer(np.arange(256), np.arange(256)) % len(numbers)][None]
    one = int(np.flatnonzero(fmt.values == 1)[0])
    for name, matrix in (("fc1", codes), ("fc2", one * np.eye(256, dtype=int)[None])):
        packed = fmt.pack(matrix.astype(np.uint8))
        weights = f"{name}_experts_weights"
        tensors[weights] = packed.view(tensors[weights].dtype)
        tensors[f"{name}_global_scale"] = np.ones(1, np.float32)
        if fmt.scale_type != "float":
            code = {"float8e8m0": 127, "float8e4m3fn": 0x38}[fmt.scale_type]  # 1
            tensors[f"{name}_scales"].view(np.uint8)[:] = code
    tensors["input"] = np.eye(256, dtype=numpy_dtype(dtype))
    result = run(open_session(case.model(tensors), device), feeds_of(tensors))
    np.testing.assert_array_equal(result.astype(np.float64), fmt.values[codes[0]].T)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_scales_of_zero(dtype: str, device: str) -> None:
    """e8m0 code 0 is zero, not 2^-127, as are e4m3 zeros, of either sign, and global zeros."""
    case = Case("mxfp4", dtype=dtype, tokens=6)
    tensors = case.tensors()
    tensors["fc1_scales"].view(np.uint8)[:, ::3] = 0
    tensors["fc2_scales"].view(np.uint8)[..., 1] = 0
    tensors["fc1_global_scale"][1] = 0
    verify(case, tensors, device)
    # A global factor of 2^130 that zero blocks must not turn into anything.
    tensors["fc2_scales"].view(np.uint8)[:] = 0
    tensors["fc2_experts_bias"][:] = 0
    tensors["fc2_global_scale"][:] = 2.0**127
    assert not verify(case, tensors, device).any()

    case = Case("nvfp4", dtype=dtype, tokens=6)
    tensors = case.tensors()
    tensors["fc1_scales"].view(np.uint8)[:, ::3] = 0
    tensors["fc2_scales"].view(np.uint8)[..., 1] = 0x80
    tensors["fc2_global_scale"][2] = 0
    verify(case, tensors, device)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("exponent", [-100, -30, 30, 100])
def test_scales_and_global_scales_that_cancel(exponent: int, dtype: str, device: str) -> None:
    """The product counts, even where each factor is far outside of float16."""
    case = Case("mxfp4", dtype=dtype, tokens=5)
    tensors = case.tensors()
    for name in ("fc1", "fc2"):
        codes = tensors[f"{name}_scales"].view(np.uint8)
        codes += np.uint8(exponent % 256)
        tensors[f"{name}_global_scale"] *= np.float32(2.0**-exponent)
    assert np.array_equal(verify(case, tensors, device), run_case(case, device)[1], equal_nan=False)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_e4m3_scales_of_every_magnitude(dtype: str, device: str) -> None:
    """Subnormals, both signs, and 448, in every row."""
    case = Case("nvfp4", dtype=dtype, hidden=128, inter=128, activation="identity", fusion=0)
    tensors = case.tensors()
    codes = np.array([0x01, 0x81, 0x08, 0x38, 0xB8, 0x70, 0x7E, 0xFE], np.uint8)
    for name in ("fc1", "fc2"):
        scales = tensors[f"{name}_scales"]
        scales.view(np.uint8)[:] = np.random.default_rng(1).permuted(
            np.broadcast_to(codes, scales.shape), axis=-1
        )
        tensors[f"{name}_global_scale"] *= np.float32(0.25)
    verify(case, tensors, device)


@pytest.mark.parametrize("option", ["bytes", "block_size", "no bits"])
def test_other_ways_to_write_the_same(option: str, device: str) -> None:
    """Small floats as bytes, block_size said, expert_weight_bits left out: the same bits."""
    for name in ("mxfp4", "nvfp4", "fp8_e4m3"):
        case = Case(name, dtype="float16", tokens=5)
        tensors, expected = run_case(case, device)
        model = case.model(tensors)
        node = model.graph.node[0]
        if option == "bytes":
            changed = dataclasses.replace(case, as_bytes=True)
            model = changed.model(changed.tensors())
        elif option == "no bits":
            kept = [a for a in node.attribute if a.name != "expert_weight_bits"]
            del node.attribute[:]
            node.attribute.extend(kept)
        elif case.fmt.only_block_size:
            node.attribute.append(helper.make_attribute("block_size", case.block))
        assert bits_of(run(open_session(model, device), feeds_of(tensors))) == bits_of(expected)


@pytest.mark.parametrize("scale_dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
def test_squares_with_partial_edges(block_size: int, scale_dtype: str, device: str) -> None:
    for hidden, inter in ((block_size + 8, 3 * block_size - 8), (8, 24)):
        for activation, fusion, fc3 in (
            ("swiglu", 1, False),
            ("swiglu", 2, False),
            ("silu", 0, True),
        ):
            case = Case(
                "fp8_e4m3",
                block_size,
                "float16",
                scale_dtype,
                hidden=hidden,
                inter=inter,
                activation=activation,
                fusion=fusion,
                fc3=fc3,
                tokens=4,
            )
            tensors, result = run_case(case, device)
            check(case, tensors, result)


@pytest.mark.parametrize("format_name", ["int2", "int4", "int8"])
def test_fractional_zero_points(format_name: str, device: str) -> None:
    """One float a block, in any float type, with any fraction."""
    for block_size, zero_dtype in ((32, "float32"), (32, "bfloat16"), (0, "float16")):
        case = Case(format_name, block_size, "float16", zero_points=True, tokens=4)
        tensors = case.tensors()
        rng = np.random.default_rng(2)
        for name in ("fc1", "fc2"):
            middle = case.fmt.default_zero_point
            values = rng.uniform(0.5, 1.5, tensors[f"{name}_scales"].shape) * middle
            tensors[f"{name}_zero_points"] = values.astype(numpy_dtype(zero_dtype))
        verify(case, tensors, device)


class TestQuantizedActivations:
    """wfp4afp8, beyond what the formats' random cases cover."""

    CASE = Case(
        "mxfp4",
        quant_type="wfp4afp8",
        activation="identity",
        fusion=0,
        bias=False,
        hidden=64,
        inter=96,
        tokens=12,
    )

    def exact_tensors(self, case: QMoECase) -> dict[str, np.ndarray]:
        """Weights and inputs whose every sum is exact in float32: no room for another rounding.

        fc1 holds one code a row, so that the values which are quantised before fc2 are copies of x.
        """
        tensors = case.tensors()
        rng = np.random.default_rng(3)
        codes = np.zeros((case.experts, case.inter, case.hidden), np.uint8)
        columns = rng.integers(0, case.hidden, codes.shape[:2])
        signs = rng.choice([2, 10], columns.shape)  # 1 and -1
        np.put_along_axis(codes, columns[..., None], signs[..., None].astype(np.uint8), axis=-1)
        tensors["fc1_experts_weights"] = formats.pack(codes, 4)
        for name in ("fc1", "fc2"):
            tensors[f"{name}_scales"].view(np.uint8)[:] = 127
            tensors[f"{name}_global_scale"][:] = 1
        x = rng.integers(-2048, 2049, tensors["input"].shape) / 1024.0
        tensors["input"] = x.astype(tensors["input"].dtype)
        tensors["router_probs"][:] = 0  # equal: the factors of two experts are 1/2
        return tensors

    @pytest.mark.parametrize("act_scales", ["none", "one", "experts"])
    @pytest.mark.parametrize("dtype", FLOAT_DTYPES)
    def test_exact(self, dtype: str, act_scales: str, device: str) -> None:
        case = dataclasses.replace(self.CASE, dtype=dtype, act_scales=act_scales)
        tensors = self.exact_tensors(case)
        for name in tensors.keys() & {"fc1_act_scale", "fc2_act_scale"}:
            scales = tensors[name]
            scales[:] = np.exp2(-6.0 - np.arange(len(scales)) % 3)
        result = run(open_session(case.model(tensors), device), feeds_of(tensors))
        np.testing.assert_array_equal(result, case.expected(tensors).astype(result.dtype))

    @pytest.mark.parametrize("dtype", FLOAT_DTYPES)
    def test_quantising_shows(self, dtype: str, device: str) -> None:
        """The tolerance is too small for activations that are not quantised, or only once."""
        case = dataclasses.replace(self.CASE, dtype=dtype, bias=True, tokens=40)
        tensors, result = run_case(dataclasses.replace(case, quant_type="fp4"), device)
        with pytest.raises(AssertionError, match="times what is allowed"):
            check(case, tensors, result)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("exponent", [-130, -110, -40, 40, 100])
    def test_inputs_of_any_magnitude(self, exponent: int, dtype: str, device: str) -> None:
        case = dataclasses.replace(self.CASE, dtype=dtype)
        tensors = case.tensors()
        scaled = tensors["input"].astype(np.float64) * 2.0**exponent
        tensors["input"] = scaled.astype(tensors["input"].dtype)
        verify(case, tensors, device)

    @pytest.mark.parametrize("dtype", FLOAT_DTYPES)
    def test_zeros_and_outliers(self, dtype: str, device: str) -> None:
        """A token of zeros, blocks of zeros, and blocks with one large value."""
        case = dataclasses.replace(self.CASE, dtype=dtype, activation="relu")
        tensors = case.tensors()
        x = tensors["input"]
        x[0] = 0
        x[1, 32:] = 0
        x[2, ::32] *= 1000
        x[3, 5] = -0.0
        verify(case, tensors, device)

    @pytest.mark.parametrize("dtype", FLOAT_DTYPES)
    @pytest.mark.parametrize("act_scales", ["none", "experts"])
    def test_special_values_stay_in_their_token(
        self, act_scales: str, dtype: str, device: str
    ) -> None:
        case = dataclasses.replace(self.CASE, dtype=dtype, act_scales=act_scales)
        tensors = case.tensors()
        clean = case.expected(tensors)
        feeds = feeds_of(tensors)
        feeds["input"] = feeds["input"].copy()
        feeds["input"][1, 3], feeds["input"][5, 40] = np.nan, np.inf
        result = run(open_session(case.model(tensors), device), feeds).astype(np.float64)
        assert np.isnan(result[1]).all()
        # An infinity is 448 scales where a scale is given, and else makes its block NaN.
        assert np.isnan(result[5]).all() if act_scales == "none" else np.isfinite(result[5]).all()
        others = [t for t in range(case.tokens) if t not in (1, 5)]
        np.testing.assert_allclose(result[others], clean[others], rtol=0.05, atol=0.05)

    def test_one_scale_for_all_is_that_of_each(self, device: str) -> None:
        one = dataclasses.replace(self.CASE, act_scales="one")
        tensors, result = run_case(one, device)
        each = {name: tensors[name].repeat(one.experts) for name in tensors if "act_scale" in name}
        model = one.model(tensors | each)
        again = run(open_session(model, device), feeds_of(tensors))
        assert bits_of(again) == bits_of(result)


def test_types_of_small_floats() -> None:
    """What the cases store is what exporters store."""
    assert Case("mxfp4").tensors()["fc1_scales"].dtype == E8M0
    assert Case("mxfp4", as_bytes=True).tensors()["fc1_scales"].dtype == np.uint8
    assert Case("nvfp4").tensors()["fc1_scales"].dtype == E4M3
    assert Case("fp8_e4m3").tensors()["fc1_experts_weights"].dtype == E4M3
