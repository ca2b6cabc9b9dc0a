"""The formats in Python: packing, quantising, dequantising, and the compiled twin of it."""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmoe_plugin import formats
from qmoe_plugin.formats import Format, packing
from qmoe_plugin.formats.codebook4 import NF4
from qmoe_plugin.formats.scales import decode_scales, round_to_e4m3

# A format with a codebook is tested with one.
FORMATS = [f.with_codebook(NF4) if f.codebook else f for f in formats.FORMATS.values()]
FREE = [f for f in FORMATS if f.scale_type == "float" and not f.square_blocks]
E8M0, E4M3 = ml_dtypes.float8_e8m0fnu, ml_dtypes.float8_e4m3fn

every_format = pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
every_free_format = pytest.mark.parametrize("fmt", FREE, ids=lambda fmt: fmt.name)


def block_sizes(fmt: Format) -> list[int]:
    return [fmt.only_block_size] if fmt.only_block_size else [0, 16, 64]


def decoded(fmt: Format, quantized: formats.Quantized, k: int, block_size: int) -> np.ndarray:
    zero_points = quantized.zero_points
    if zero_points is not None:
        zero_points = fmt.unpack_zero_points(zero_points, quantized.scales.shape)
    return fmt.dequantize(
        quantized.codes,
        quantized.scales,
        zero_points,
        k=k,
        block_size=block_size,
        global_scale=quantized.global_scale,
    )


def numpy_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes the compiled module away."""
    monkeypatch.setattr(packing, "native", lambda: None)


class TestRegistry:
    def test_known_formats(self) -> None:
        names = {"int2", "int4", "int8", "mxfp4", "nvfp4", "fp8_e4m3"}
        assert names <= formats.FORMATS.keys()
        assert all(name == fmt.name for name, fmt in formats.FORMATS.items())
        assert formats.get("int4").bits == 4

    def test_unknown_format(self) -> None:
        with pytest.raises(ValueError, match=r"format 'int5' is not known; known formats: .*int4"):
            formats.get("int5")

    def test_by_attributes(self) -> None:
        assert formats.for_attributes("int", 4).name == "int4"
        assert formats.for_attributes("int", 8).name == "int8"
        assert formats.for_attributes("int").name == "int4"
        for quant_type, name in (
            ("fp4", "mxfp4"),
            ("wfp4afp8", "mxfp4"),
            ("nvfp4", "nvfp4"),
            ("fp8", "fp8_e4m3"),
        ):
            assert formats.for_attributes(quant_type).name == name
            assert formats.for_attributes(quant_type, formats.get(name).bits).name == name
        for quant_type, bits in (("int", 5), ("fp4", 8), ("fp8", 4), ("int3", None)):
            with pytest.raises(ValueError, match=f"quant_type '{quant_type}' and {bits} bits; "):
                formats.for_attributes(quant_type, bits)

    def test_a_format_needs_a_value_for_each_code(self) -> None:
        with pytest.raises(ValueError, match="values"):
            Format("short", 4, np.zeros(8), 0, False, {"quant_type": "x", "expert_weight_bits": 4})

    def test_names_are_short(self) -> None:
        with pytest.raises(ValueError, match="'thirteen_long' is no name: it has at most 12"):
            Format("thirteen_long", 4, np.zeros(16), 0, False)


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

    @pytest.mark.parametrize("bits", [1, 2, 4, 8])
    def test_bytes_that_lie_apart(self, bits: int) -> None:
        packed = np.random.default_rng(0).integers(0, 256, (3, 6, 10), dtype=np.uint8)
        k = 5 * 8 // bits
        for view in (packed[..., ::2], packed[:, ::2, :5], packed.T[:, :, :5], packed[::-1, :, 5:]):
            codes = formats.unpack(view, bits, view.shape[-1] * 8 // bits)
            assert np.array_equal(formats.pack(codes, bits), view)
        codes = formats.unpack(packed, bits, k)
        codes += 1  # they are the caller's own
        assert np.array_equal(formats.unpack(packed, bits, k) + np.uint8(1), codes)

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
        numbers = np.flatnonzero(np.isfinite(fmt.values) & ~np.signbit(fmt.values + 0.0))
        codes = rng.choice(numbers.astype(np.uint8), (3, 32, 64))
        extreme = np.argmin(fmt.values) if fmt.zero_points else np.nanargmax(fmt.values)
        codes[..., ::16] = extreme  # so that each block's scale is found again
        block_size = fmt.only_block_size or 32
        scale = {"float8e8m0": 2.0, "float8e4m3fn": 448.0}.get(fmt.scale_type, 0.5)
        shape = (3, *fmt.scale_shape(32, 64, block_size))
        scales = scale * rng.choice([1.0, 0.25], shape)
        scales[:, 0, 0] = scale
        weights = fmt.dequantize(fmt.pack(codes), scales, k=64, block_size=block_size)
        quantized = fmt.quantize(weights, block_size)
        np.testing.assert_array_equal(decoded(fmt, quantized, 64, block_size), weights)

    @every_format
    @pytest.mark.parametrize("scale_dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
    @pytest.mark.parametrize("symmetric", [True, False])
    def test_error_is_at_most_half_a_step(
        self, fmt: Format, scale_dtype: type, symmetric: bool
    ) -> None:
        if not symmetric and not fmt.zero_points:
            pytest.skip("the format has no zero points")
        weights = np.random.default_rng(1).standard_normal((2, 9, 150)).astype(np.float32)
        for block_size in block_sizes(fmt):
            quantized = fmt.quantize(
                weights, block_size, symmetric=symmetric, scale_dtype=scale_dtype
            )
            assert quantized.codes.shape == (2, 9, -(-150 * fmt.bits // 8))
            scales = np.ones((2, 9, 1))
            exact = np.dtype(scale_dtype) == np.float32 and fmt.scale_type in ("float", "any")
            shape = fmt.scale_shape(9, 150, block_size)
            assert (quantized.scales is None) == (shape is None)
            if quantized.scales is not None:
                assert quantized.scales.shape == (2, *shape)
                if fmt.scale_type in ("float", "any"):
                    assert quantized.scales.dtype == scale_dtype
                scales = np.abs(quantized.scales.astype(np.float64))
            if quantized.global_scale is not None:
                assert quantized.global_scale.dtype == np.float32
                scales = scales * quantized.global_scale[:, None, None]
            largest = scales[..., None] if not block_size and scales.ndim == 2 else scales
            largest = np.repeat(largest, block_size or 150, axis=-1)[..., :150]
            if largest.shape[-2] != 9:
                largest = np.repeat(largest, block_size, axis=-2)[:, :9]
            step = float(np.diff(np.sort(fmt.values[np.isfinite(fmt.values)])).max())
            # A scale rounded to a short type moves the ends of the range, and the code at the end
            # is cut off. The positive half of signed codes is one short: an element next to the
            # extreme's mirror is cut, too.
            slack = 0.5 if exact else 0.5 + float(np.nanmax(fmt.values)) / step * 2.0**-4
            error = np.abs(decoded(fmt, quantized, 150, block_size) - weights) / largest
            assert error.max() <= step * max(1.0, slack)
            assert (error > slack * step * (1 + 1e-6)).mean() < 0.05

    @every_format
    def test_all_zero_weights(self, fmt: Format) -> None:
        for block_size in block_sizes(fmt):
            for symmetric in {True, not fmt.zero_points}:
                quantized = fmt.quantize(np.zeros((2, 32)), block_size, symmetric=symmetric)
                assert not decoded(fmt, quantized, 32, block_size).any()

    @every_format
    def test_refusals(self, fmt: Format) -> None:
        with pytest.raises(ValueError, match="finite"):
            fmt.quantize(np.array([[1.0, np.nan]]), block_sizes(fmt)[0])
        with pytest.raises(ValueError, match=r"weights must be \[\.\.\., N, K\]"):
            fmt.quantize(np.zeros(4), block_sizes(fmt)[0])
        wrong = 48 if fmt.only_block_size else -1
        with pytest.raises(ValueError, match=f"block_size of {fmt.name} is {wrong}; it must be"):
            fmt.quantize(np.ones((1, 4)), wrong)
        if fmt.only_block_size is None:
            with pytest.raises(ValueError, match="blocks of any size; say which"):
                fmt.quantize(np.ones((1, 4)))
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


class TestSmallScales:
    """Scales of type e8m0 and e4m3, global scales and square blocks, by hand."""

    def test_e8m0(self) -> None:
        bytes_ = np.array([0, 1, 126, 127, 128, 254], np.uint8)
        expected = [0.0, 2.0**-126, 0.5, 1.0, 2.0, 2.0**127]
        for scales in (bytes_, bytes_.view(E8M0)):
            assert decode_scales(scales, "float8e8m0").tolist() == expected
        with pytest.raises(ValueError, match="code 255, which is NaN"):
            decode_scales(np.array([127, 255], np.uint8), "float8e8m0")

    def test_e4m3(self) -> None:
        codes = np.array([0x00, 0x01, 0x38, 0x7E, 0xB8], np.uint8).view(E4M3)
        assert decode_scales(codes, "float8e4m3fn").tolist() == [0.0, 2.0**-9, 1.0, 448.0, -1.0]
        # Halves go to the even mantissa, and everything beyond 448 is 448.
        values = np.array([1.0625, 1.1875, 2.0**-10, 3 * 2.0**-10, 464, 1e30, -np.inf], np.float32)
        rounded = round_to_e4m3(values).astype(np.float64)
        assert rounded.tolist() == [1.0, 1.25, 0.0, 2.0**-8, 448.0, 448.0, -448.0]
        assert np.isnan(round_to_e4m3(np.array([np.nan], np.float32)).astype(np.float32)).all()

    def test_mxfp4(self) -> None:
        # 7 is the last that rounds to 6 at scale 1: 6 or 8, a tie. 7.01 is nearer to 8 = 4 * 2.
        weights = np.zeros((1, 3, 32))
        weights[0, :, :4] = [[7.0, -3.0, 0.3, 0.2], [7.01, -3.0, 0.3, 0.6], [0.75, 0.1, 0.0, -0.0]]
        quantized = formats.get("mxfp4").quantize(weights)
        assert quantized.scales.view(np.uint8).tolist() == [[[127], [128], [124]]]
        assert quantized.global_scale.tolist() == [1.0]
        codes = formats.unpack(quantized.codes, 4, 4)
        # 6 -3 0.5 0; 4 -1.5 0 0.5 times 2 (0.15 is nearer to 0, 0.3 to 0.5); 6 1 0 0 times 1/8
        assert codes.tolist() == [[[7, 13, 1, 0], [6, 11, 0, 1], [7, 2, 0, 0]]]

    def test_nvfp4(self) -> None:
        # The largest, 2688 / 1000, gives the global scale 1 / 1000; blocks 448 and 44.8 -> 44.
        weights = np.zeros((1, 1, 32))
        weights[0, 0, [0, 16, 17]] = [2.688, -0.2688, 0.132]
        quantized = formats.get("nvfp4").quantize(weights)
        np.testing.assert_allclose(quantized.global_scale, [1e-3], rtol=1e-6)
        assert quantized.scales.astype(np.float64).tolist() == [[[448.0, 44.0]]]
        assert formats.unpack(quantized.codes, 4, 32)[0, 0, [0, 16, 17]].tolist() == [7, 15, 5]

    def test_fp8_by_expert_and_by_square(self) -> None:
        fmt = formats.get("fp8_e4m3")
        weights = np.zeros((2, 20, 17))
        weights[0, 0, 0], weights[0, 19, 16], weights[1, 0, 16] = 896.0, 224.0, -448.0
        quantized = fmt.quantize(weights, 0)
        assert quantized.scales is None
        assert quantized.global_scale.tolist() == [2.0, 1.0]
        assert decoded(fmt, quantized, 17, 0)[0, [0, 19], [0, 16]].tolist() == [896.0, 224.0]
        quantized = fmt.quantize(weights, 16)
        assert quantized.global_scale is None
        assert quantized.scales.tolist() == [[[2, 0], [0, 0.5]], [[0, 1], [0, 0]]]
        assert quantized.codes[0, 0, 0] == quantized.codes[0, 19, 16] == 0x7E
        np.testing.assert_array_equal(decoded(fmt, quantized, 17, 16), weights)


class TestCompiledTwin:
    """`_native` does bit by bit what numpy does."""

    @pytest.fixture(autouse=True)
    def _needs_native(self, library: str) -> None:
        if packing.native() is None:
            pytest.fail("qmoe_plugin._native is not built", pytrace=False)

    @settings(deadline=None, max_examples=150)
    @given(
        name=st.sampled_from([f.name for f in FREE]),
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
    def test_quantize_codes_that_are_floats(
        self, fmt: Format, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With float scales a row and a block, as a format with a codebook has them."""
        free = dataclasses.replace(
            fmt, scale_type="float", only_block_size=None, square_blocks=False
        )
        if fmt.codebook:
            pytest.skip("the compiled module does not know codebooks")
        weights = np.random.default_rng(5).integers(-12, 13, (7, 77)).astype(np.float32) / 2
        compiled = [free.quantize(weights, block_size) for block_size in (0, 16)]
        numpy_only(monkeypatch)
        for block_size, quantized in zip((0, 16), compiled, strict=True):
            plain = free.quantize(weights, block_size)
            np.testing.assert_array_equal(quantized.scales, plain.scales)
            np.testing.assert_array_equal(quantized.codes, plain.codes)

    @every_free_format
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
        compiled = packing.native().dequantize(codes, scales, zero_points, fmt.name, 50, block_size)
        plain = fmt.dequantize(codes, scales, zero_points, k=50, block_size=block_size or 50)
        np.testing.assert_allclose(compiled, plain, rtol=3e-7, atol=1e-6)

    def test_bad_arguments_are_exceptions(self) -> None:
        native = packing.native()
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
