"""The formats in Python: packing, quantising, dequantising, and the compiled twin of it."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmoe_plugin import formats
from qmoe_plugin.formats import Format, base

FORMATS = list(formats.FORMATS.values())
INTEGERS = [f for f in FORMATS if np.array_equal(f.values, np.arange(1 << f.bits))]

every_format = pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
every_integer = pytest.mark.parametrize("fmt", INTEGERS, ids=lambda fmt: fmt.name)


def numpy_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes the compiled module away."""
    monkeypatch.setattr(base, "native", lambda: None)


class TestRegistry:
    def test_known_formats(self) -> None:
        assert {"int4", "int8"} <= formats.FORMATS.keys()
        assert all(name == fmt.name for name, fmt in formats.FORMATS.items())
        assert formats.get("int4").bits == 4

    def test_unknown_format(self) -> None:
        with pytest.raises(ValueError, match=r"format 'int5' is not known; known formats: .*int4"):
            formats.get("int5")

    def test_by_attributes(self) -> None:
        assert formats.for_attributes("int", 4).name == "int4"
        assert formats.for_attributes("int", 8).name == "int8"
        with pytest.raises(ValueError, match="quant_type 'int' and 5 bits; known: "):
            formats.for_attributes("int", 5)

    def test_a_format_needs_a_value_for_each_code(self) -> None:
        with pytest.raises(ValueError, match="values"):
            Format("short", 4, np.zeros(8), 0, False, {"quant_type": "x", "expert_weight_bits": 4})


class TestPacking:
    def test_low_bits_first(self) -> None:
        assert formats.pack(np.array([1, 2, 3], np.uint8), 4).tolist() == [0x21, 0x03]
        assert formats.pack(np.array([1, 2, 3, 0, 3], np.uint8), 2).tolist() == [0b00111001, 0b11]
        assert formats.pack(np.array([1, 0, 1, 1], np.uint8), 1).tolist() == [0b1101]
        assert formats.pack(np.array([200, 7], np.uint8), 8).tolist() == [200, 7]
        assert formats.unpack(np.array([0x21, 0xF3], np.uint8), 4, 3).tolist() == [1, 2, 3]

    @given(
        bits=st.sampled_from([1, 2, 4, 8]),
        shape=st.tuples(st.integers(0, 3), st.integers(1, 3), st.integers(0, 20)),
        seed=st.integers(0, 1000),
    )
    def test_round_trip(self, bits: int, shape: tuple[int, ...], seed: int) -> None:
        codes = np.random.default_rng(seed).integers(0, 1 << bits, shape, dtype=np.uint8)
        packed = formats.pack(codes, bits)
        assert packed.shape == (*shape[:-1], -(-shape[-1] * bits // 8))
        assert np.array_equal(formats.unpack(packed, bits, shape[-1]), codes)

    def test_refusals(self) -> None:
        with pytest.raises(ValueError, match=r"codes lie in .* 4-bit codes lie in"):
            formats.pack(np.array([16]), 4)
        with pytest.raises(ValueError, match="codes lie in"):
            formats.pack(np.array([-1]), 4)
        with pytest.raises(ValueError, match="bits is 3"):
            formats.pack(np.array([1]), 3)
        with pytest.raises(ValueError, match="5 codes of 4 bits need 3 bytes"):
            formats.unpack(np.zeros(2, np.uint8), 4, 5)


class TestQuantize:
    def test_signed_scales_by_hand(self) -> None:
        # The extreme element takes code 0: 4 / -8 = -0.5, and -6 / -8 = 0.75.
        weights = np.array([[4.0, -1.0, 0.5, 0.0], [-6.0, 3.0, 0.8, -0.3]])
        quantized = formats.get("int4").quantize(weights, 4)
        assert quantized.scales.tolist() == [[-0.5], [0.75]]
        assert quantized.zero_points is None
        # Row 0: 8 - 8 = 0, 8 + 2 = 10, 8 - 1 = 7, 8. Row 1: 0, 12, 9, 8 (-0.4 rounds to 0).
        assert formats.unpack(quantized.codes, 4, 4).tolist() == [[0, 10, 7, 8], [0, 12, 9, 8]]

    def test_positive_scales_by_hand(self) -> None:
        quantized = formats.get("int4").quantize(np.array([[3.5, -1.0]]), 0, signed_scales=False)
        assert quantized.scales.tolist() == [0.5]
        assert formats.unpack(quantized.codes, 4, 2).tolist() == [[15, 6]]

    def test_asymmetric_by_hand(self) -> None:
        # The range -1 to 2 over 15 steps: scale 0.2, zero point 5. All-positive weights keep 0 in
        # range.
        weights = np.array([[-1.0, 2.0, 0.0, 0.5], [3.0, 1.5, 3.0, 3.0]])
        quantized = formats.get("int4").quantize(weights, 4, symmetric=False)
        np.testing.assert_allclose(quantized.scales, [[0.2], [0.2]], rtol=1e-6)
        assert quantized.zero_points is not None
        assert quantized.zero_points.tolist() == [[5], [0]]
        # 0.5 / 0.2 = 2.5: of 7 and 8 the even one; float32 puts 1.5 / 0.2 at 7.5, so 8.
        assert formats.unpack(quantized.codes, 4, 4)[0, :3].tolist() == [0, 15, 5]
        assert formats.unpack(quantized.codes, 4, 4)[1, [0, 2, 3]].tolist() == [15, 15, 15]

    def test_zero_points_across_the_rows(self) -> None:
        weights = np.array([[0.0, 15.0], [-15.0, 0.0], [-5.0, 10.0]])
        quantized = formats.get("int4").quantize(weights, 0, symmetric=False)
        assert quantized.zero_points is not None
        assert quantized.zero_points.tolist() == [0xF0, 0x05]
        assert quantized.scales.shape == (3,)

    @every_format
    def test_weights_on_the_grid_survive(self, fmt: Format) -> None:
        rng = np.random.default_rng(0)
        codes = rng.integers(0, 1 << fmt.bits, (3, 5, 64), dtype=np.uint8)
        codes[..., ::32] = np.argmin(fmt.values)  # so that each block's scale is found again
        weights = fmt.dequantize(
            formats.pack(codes, fmt.bits),
            rng.choice([-0.5, 0.25, 2.0], (3, 5, 2)),
            k=64,
            block_size=32,
        )
        quantized = fmt.quantize(weights, 32)
        again = fmt.dequantize(quantized.codes, quantized.scales, k=64, block_size=32)
        np.testing.assert_array_equal(again, weights)

    @every_format
    @pytest.mark.parametrize("scale_dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
    @pytest.mark.parametrize("block_size", [0, 16, 64])
    @pytest.mark.parametrize("symmetric", [True, False])
    def test_error_is_at_most_half_a_step(
        self, fmt: Format, scale_dtype: type, block_size: int, symmetric: bool
    ) -> None:
        if not symmetric and not fmt.zero_points:
            pytest.skip("the format has no zero points")
        weights = np.random.default_rng(1).standard_normal((2, 9, 150)).astype(np.float32)
        quantized = fmt.quantize(weights, block_size, symmetric=symmetric, scale_dtype=scale_dtype)
        assert quantized.scales.dtype == scale_dtype
        assert quantized.codes.shape == (2, 9, 150 * fmt.bits // 8)
        zero_points = quantized.zero_points
        if zero_points is not None:
            zero_points = fmt.unpack_zero_points(zero_points, quantized.scales.shape)
        decoded = fmt.dequantize(
            quantized.codes, quantized.scales, zero_points, k=150, block_size=block_size
        )
        step = float(np.diff(np.sort(fmt.values)).max())
        scales = np.abs(quantized.scales.astype(np.float64))
        largest = np.repeat(scales[..., None], block_size or 150, axis=-1)
        largest = largest.reshape(2, 9, -1)[..., :150]
        # A scale rounded to a short type moves the ends of the range, and the code at the end is
        # cut off.
        slack = 0.5 if scale_dtype == np.float32 else 0.5 + (1 << fmt.bits) * 2.0**-8
        error = np.abs(decoded - weights) / largest
        # The positive half of signed codes is one short: an element next to the extreme's mirror is
        # cut too.
        cut = error > slack * step
        assert error.max() <= step * max(1.0, slack)
        assert cut.mean() < 0.02

    @every_format
    def test_all_zero_weights(self, fmt: Format) -> None:
        for symmetric in {True, not fmt.zero_points}:
            quantized = fmt.quantize(np.zeros((2, 32)), 16, symmetric=symmetric)
            zero_points = quantized.zero_points
            if zero_points is not None:
                zero_points = fmt.unpack_zero_points(zero_points, quantized.scales.shape)
            decoded = fmt.dequantize(
                quantized.codes, quantized.scales, zero_points, k=32, block_size=16
            )
            assert not decoded.any()

    @every_format
    def test_refusals(self, fmt: Format) -> None:
        with pytest.raises(ValueError, match="finite"):
            fmt.quantize(np.array([[1.0, np.nan]]), 0)
        with pytest.raises(ValueError, match=r"weights must be \[\.\.\., N, K\]"):
            fmt.quantize(np.zeros(4), 0)
        if not fmt.zero_points:
            with pytest.raises(ValueError, match="no zero points"):
                fmt.quantize(np.ones((1, 4)), 0, symmetric=False)

    @pytest.mark.parametrize("symmetric", [True, False])
    def test_int4_equals_onnxruntime(self, symmetric: bool) -> None:
        state = pytest.importorskip("onnxruntime.capi.onnxruntime_pybind11_state")
        fmt = formats.get("int4")
        n, k, block_size = 40, 160, 32
        groups = k // block_size
        weights = np.random.default_rng(2).standard_normal((n, k)).astype(np.float32)
        codes = np.zeros((n, groups, block_size // 2), np.uint8)
        scales = np.zeros(n * groups, np.float32)
        zero_points = np.zeros(n * ((groups + 1) // 2), np.uint8)
        state.quantize_matmul_4bits(
            codes, np.ascontiguousarray(weights.T), scales, zero_points, block_size, n, k, symmetric
        )
        ours = fmt.quantize(weights, block_size, symmetric=symmetric)
        np.testing.assert_array_equal(ours.scales.reshape(-1), scales)
        theirs = formats.unpack(codes.reshape(n, -1), 4, k).astype(int)
        difference = formats.unpack(ours.codes, 4, k) - theirs
        # onnxruntime multiplies by the reciprocal and rounds halves away from zero.
        assert np.abs(difference).max() <= 1
        assert (difference != 0).mean() < 0.001
        if ours.zero_points is not None:
            expected = formats.unpack(zero_points.reshape(n, -1), 4, groups)
            np.testing.assert_array_equal(formats.unpack(ours.zero_points, 4, groups), expected)


def test_formats_of_floats_take_the_nearest_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes that are floats, as those of FP4: no zero points, symmetric about 0."""
    numpy_only(monkeypatch)
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    fmt = Format("e2m1", 4, values, 0, False, {"quant_type": "e2m1", "expert_weight_bits": 4})
    quantized = fmt.quantize(np.array([[12.0, 0.4, -7.9, 5.1, -1.2, 0.0]]), 0)
    assert quantized.scales.tolist() == [2.0]
    decoded = fmt.dequantize(quantized.codes, quantized.scales, k=6, block_size=0)
    # 0.2, -3.95, 2.55 and -0.6 lie nearest to 0, -4, 3 and -0.5 (times 2).
    assert np.abs(decoded).tolist() == [[12.0, 0.0, 8.0, 6.0, 1.0, 0.0]]
    assert decoded[0, 2] == -8.0


class TestCompiledTwin:
    """`_native` does bit by bit what numpy does."""

    @pytest.fixture(autouse=True)
    def _needs_native(self, library: str) -> None:
        if base.native() is None:
            pytest.fail("qmoe_plugin._native is not built", pytrace=False)

    @settings(deadline=None, max_examples=150)
    @given(
        name=st.sampled_from([f.name for f in FORMATS]),
        rows=st.integers(1, 5),
        k=st.integers(1, 130),
        block_size=st.sampled_from([0, 16, 32, 128]),
        symmetric=st.booleans(),
        kind=st.sampled_from(["normal", "halves", "constant", "tiny", "one_sided"]),
        seed=st.integers(0, 1000),
    )
    def test_quantize(
        self,
        name: str,
        rows: int,
        k: int,
        block_size: int,
        symmetric: bool,
        kind: str,
        seed: int,
    ) -> None:
        fmt = formats.get(name)
        symmetric = symmetric or not fmt.zero_points
        rng = np.random.default_rng(seed)
        weights = {
            "normal": rng.standard_normal((rows, k)),
            "halves": rng.integers(-8, 9, (rows, k)) / 2,  # many ties
            "constant": np.full((rows, k), -0.75),
            "tiny": rng.standard_normal((rows, k)) * 1e-38,  # scales are subnormal
            "one_sided": rng.uniform(1, 2, (rows, k)),
        }[kind].astype(np.float32)
        compiled = fmt.quantize(weights, block_size, symmetric=symmetric)
        with pytest.MonkeyPatch.context() as patch:
            numpy_only(patch)
            plain = fmt.quantize(weights, block_size, symmetric=symmetric)
        np.testing.assert_array_equal(compiled.scales, plain.scales)
        np.testing.assert_array_equal(compiled.codes, plain.codes)
        assert (compiled.zero_points is None) == (plain.zero_points is None)
        if plain.zero_points is not None:
            np.testing.assert_array_equal(compiled.zero_points, plain.zero_points)

    @every_format
    def test_pack_and_unpack(self, fmt: Format, monkeypatch: pytest.MonkeyPatch) -> None:
        codes = np.random.default_rng(3).integers(0, 1 << fmt.bits, (2, 3, 77), dtype=np.uint8)
        compiled = fmt.pack(codes)
        unpacked = fmt.unpack(compiled, 77)
        numpy_only(monkeypatch)
        np.testing.assert_array_equal(compiled, fmt.pack(codes))
        np.testing.assert_array_equal(unpacked, codes)

    @every_format
    @pytest.mark.parametrize("block_size", [0, 16])
    @pytest.mark.parametrize("with_zero_points", [False, True])
    def test_dequantize(self, fmt: Format, block_size: int, with_zero_points: bool) -> None:
        if with_zero_points and not fmt.zero_points:
            pytest.skip("the format has no zero points")
        rng = np.random.default_rng(4)
        groups = fmt.groups(50, block_size)
        codes = fmt.pack(rng.integers(0, 1 << fmt.bits, (6, 50), dtype=np.uint8))
        scales = rng.standard_normal((6, groups)).astype(np.float32)
        # Sixteenths, so that float32 subtracts them exactly.
        zeros = (rng.integers(0, 16 << fmt.bits, (6, groups)) / 16).astype(np.float32)
        zero_points = zeros if with_zero_points else None
        compiled = base.native().dequantize(codes, scales, zero_points, fmt.name, 50, block_size)
        plain = fmt.dequantize(codes, scales, zero_points, k=50, block_size=block_size or 50)
        np.testing.assert_allclose(compiled, plain, rtol=3e-7, atol=1e-6)

    def test_bad_arguments_are_exceptions(self) -> None:
        native = base.native()
        codes, scales = np.zeros((2, 8), np.uint8), np.ones((2, 1), np.float32)
        with pytest.raises(ValueError, match="int5"):
            native.quantize(np.ones((1, 4), np.float32), "int5", 0, True)
        with pytest.raises(ValueError, match="bits"):
            native.pack(codes, 3)
        with pytest.raises(ValueError, match="does not fit"):
            native.pack(np.full((1, 2), 16, np.uint8), 4)
        with pytest.raises(ValueError, match="bytes a row"):
            native.unpack(codes, 4, 17)
        with pytest.raises(ValueError, match="bytes a row"):
            native.dequantize(codes, scales, None, "int4", 1000, 0)
        with pytest.raises(ValueError, match=r"scales must be \[2, 2\]"):
            native.dequantize(codes, scales, None, "int4", 16, 8)
        with pytest.raises(ValueError, match="block_size is -1"):
            native.dequantize(codes, scales, None, "int4", 16, -1)
        with pytest.raises(ValueError, match="finite"):
            native.quantize(np.full((1, 4), np.inf, np.float32), "int4", 0, True)


def test_the_formats_work_without_the_compiled_module(monkeypatch: pytest.MonkeyPatch) -> None:
    numpy_only(monkeypatch)
    fmt = formats.get("int4")
    quantized = fmt.quantize(np.array([[4.0, -1.0]]), 0)
    assert fmt.dequantize(quantized.codes, quantized.scales, k=2, block_size=0).tolist() == [
        [4.0, -1.0]
    ]
