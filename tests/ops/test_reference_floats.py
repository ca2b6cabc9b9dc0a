"""The oracle of small floats against cases worked out by hand: weights, scales, activations."""

import math

import ml_dtypes
import numpy as np
import pytest

from qmoe_plugin import formats, reference
from qmoe_plugin.reference import Projection

INF = math.inf


def close(actual: np.ndarray, expected: object, tolerance: float = 1e-9) -> None:
    np.testing.assert_allclose(
        actual, np.asarray(expected, dtype=np.float64), atol=tolerance, rtol=0
    )


def nibbles(*codes: int) -> list[int]:
    """Bytes of 4-bit codes, low nibble first."""
    return [low | high << 4 for low, high in zip(codes[::2], codes[1::2], strict=True)]


class TestSmallFloats:
    """Weights of e2m1 and e4m3 with their scales, by hand."""

    E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

    def test_mxfp4(self) -> None:
        # Two experts of one row: 32 codes 0..15 twice, then 0..15 reversed twice.
        up = nibbles(*range(16))
        down = nibbles(*reversed(range(16)))
        codes = np.array([[up + up + down + down]] * 2, dtype=np.uint8)
        scales = np.array([[[128, 0]], [[126, 127]]], np.uint8)  # 2, 0 and 1/2, 1
        for stored in (scales, scales.view(ml_dtypes.float8_e8m0fnu)):
            projection = Projection(codes, stored, global_scale=np.array([1.0, -3.0], np.float32))
            weights = reference.dequantize_projection(projection, formats.get("mxfp4"), 64, 32)
            close(weights[0, 0, :8], [2 * v for v in self.E2M1])
            close(weights[0, 0, 8:16], [-2 * v for v in self.E2M1])
            close(weights[0, 0, 32:], np.zeros(32))
            close(weights[1, 0, :8], [-1.5 * v for v in self.E2M1])
            close(weights[1, 0, 32:40], [3 * v for v in reversed(self.E2M1)])

    def test_nvfp4(self) -> None:
        codes = np.array([[nibbles(*range(16)) * 2]], np.uint8)
        scales = np.array([[[0x7E, 0xB8]]], np.uint8).view(ml_dtypes.float8_e4m3fn)  # 448, -1
        projection = Projection(codes, scales, global_scale=np.array([0.5], np.float32))
        weights = reference.dequantize_projection(projection, formats.get("nvfp4"), 32, 16)
        close(weights[0, 0, :8], [224 * v for v in self.E2M1])
        close(weights[0, 0, 24:], [0.5 * v for v in self.E2M1])

    def test_fp8_by_expert(self) -> None:
        # 0x38 is 1, 0x7e 448, 0x01 2^-9, 0xc0 -2.
        codes = np.array([[[0x38, 0x7E, 0x01, 0xC0]]] * 2, np.uint8)
        for stored in (codes, codes.view(ml_dtypes.float8_e4m3fn)):
            projection = Projection(stored, None, global_scale=np.array([2.0, 0.25], np.float32))
            weights = reference.dequantize_projection(projection, formats.get("fp8_e4m3"), 4, 0)
            close(weights[0], [[2.0, 896.0, 2.0**-8, -4.0]])
            close(weights[1], [[0.25, 112.0, 2.0**-11, -0.5]])

    def test_fp8_by_square(self) -> None:
        # 18 x 20 in squares of 16: the last ones are 2 rows high and 4 columns wide.
        codes = np.full((1, 18, 20), 0x38, np.uint8)
        scales = np.array([[[1.0, 2.0], [3.0, -4.0]]], np.float16)
        weights = reference.dequantize_projection(
            Projection(codes, scales), formats.get("fp8_e4m3"), 20, 16
        )
        close(weights[0, 15, [0, 15, 16, 19]], [1.0, 1.0, 2.0, 2.0])
        close(weights[0, 17, [0, 15, 16, 19]], [3.0, 3.0, -4.0, -4.0])

    def test_missing_scales_are_refused(self) -> None:
        codes = np.zeros((1, 2, 16), np.uint8)
        e8m0 = np.full((1, 2, 1), 127, np.uint8)
        with pytest.raises(ValueError, match="need a global scale"):
            reference.dequantize_projection(
                Projection(codes, e8m0), formats.get("mxfp4"), k=32, block_size=32
            )
        with pytest.raises(ValueError, match="need scales"):
            reference.dequantize_projection(
                Projection(codes, None), formats.get("fp8_e4m3"), k=16, block_size=16
            )


class TestQuantizedActivations:
    def test_mxfp8_scales(self) -> None:
        # amax 1: s = 2^-8, 1 is 256 s. amax 1.9: s = 2^-8, 486.4 s saturates at 448 s = 1.75.
        # amax 448: s = 1. The last block is 3 long. amax 0: zeros.
        x = np.zeros((1, 131), np.float32)
        x[0, :2] = 1.0, -0.3  # 0.3 / s = 76.8, of 72 and 80 the nearer
        x[0, 32:34] = -1.9, 1.8125  # 464 s: saturates, too
        x[0, 64:66] = 448.0, 17.0  # of 16 and 18 the even mantissa
        x[0, 128:] = 3.0, 2.0**-13, 2.0**-16  # s = 2^-7: 2^-9 is the least above 0; 2^-9 of it
        y = reference.quantize_mxfp8(x)
        close(y[0, :2], [1.0, -0.3125])
        close(y[0, 32:34], [-1.75, 1.75])
        close(y[0, 64:66], [448.0, 16.0])
        close(y[0, 96:128], np.zeros(32))
        close(y[0, 128:], [3.0, 2.0**-13, 2.0**-16], 0)

    def test_mxfp8_of_tiny_numbers(self) -> None:
        # s = 2^-126 at the least: 2^-126 is s, 2^-135 its 2^-9, and half of that is a tie with 0.
        x = np.array([[2.0**-120, 2.0**-126, 2.0**-135, 2.0**-136, 1.5 * 2.0**-135]], np.float32)
        close(reference.quantize_mxfp8(x) * 2.0**135, [[2.0**15, 2.0**9, 1, 0, 2]])

    def test_mxfp8_takes_all_types(self) -> None:
        for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
            x = np.array([[1.0, 0.4375, 1 / 3]], dtype)
            close(reference.quantize_mxfp8(x), [[1.0, 0.4375, 0.34375]])

    def test_mxfp8_of_no_numbers(self) -> None:
        x = np.ones((1, 96), np.float32)
        x[0, 3], x[0, 40] = np.nan, -INF
        y = reference.quantize_mxfp8(x)
        assert np.isnan(y[0, :64]).all()
        close(y[0, 64:], np.ones(32))

    def test_given_scale(self) -> None:
        x = np.array([[1.0, 0.3, -500.0, -INF, 2.0**-11]], np.float32)
        # Times 2: 0.6 is nearest to 0.625 (0.5625 is below), -1000 saturates, 2^-10 is a tie.
        close(reference.quantize_fp8(x, 0.5), [[1.0, 0.3125, -224.0, -224.0, 0.0]])
        assert np.isnan(reference.quantize_fp8(np.array([np.nan], np.float16), 2.0)).all()


class TestQMoE:
    def test_wfp4afp8(self) -> None:
        # One expert, H = I = 32, W1 = 2 I, W2 = I: y = q(q(x) * 2) with q to e4m3 in blocks.
        eye = np.zeros((1, 32, 32), np.uint8)
        eye[0, range(32), range(32)] = 2  # 1.0
        projections = [
            Projection(
                formats.pack(eye, 4),
                np.full((1, 32, 1), exponent, np.uint8),
                global_scale=np.ones(1, np.float32),
            )
            for exponent in (128, 127)
        ]
        x = np.zeros((1, 32), np.float16)
        x[0, :3] = 1.0, 0.3, 1.0625
        options = {"quant_type": "wfp4afp8", "activation_type": "identity"}
        y = reference.qmoe(x, np.zeros((1, 1)), *projections, **options)  # type: ignore[arg-type]
        # s = 2^-8: 0.3 is 76.8 s, nearest to 80 s; 1.0625 is 272 s, a tie of 256 s and 288 s.
        close(y[0, :3], [2.0, 0.625, 2.0])
        # Biases come before the second quantising: 2 + 0.1 is 2.1, s = 2^-7: 268.8 s, so 256 s.
        biased = [Projection(**{**vars(projections[0]), "bias": np.full((1, 32), 0.1)})]
        y = reference.qmoe(x, np.zeros((1, 1)), *biased, projections[1], **options)  # type: ignore[arg-type]
        close(y[0, :2], [2.0, 0.75])
        close(y[0, 3:], np.full(29, 0.1015625))  # 12.8 s: 13 s
        # By given scales: x / 4 -> e4m3, and 2 x as it is.
        y = reference.qmoe(
            x,
            np.zeros((1, 1)),
            *projections,
            fc1_act_scale=np.array([4.0], np.float32),
            fc2_act_scale=np.array([1.0], np.float32),
            **options,  # type: ignore[arg-type]
        )
        close(y[0, :3], [2.0, 0.625, 2.0])
