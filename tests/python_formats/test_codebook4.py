"""Codebooks: the well-known ones by their definitions, learned ones, and quantising with any."""

from __future__ import annotations

from statistics import NormalDist

import ml_dtypes
import numpy as np
import pytest

from qmoe_plugin import formats
from qmoe_plugin.formats.codebook4 import AF4, CODEBOOKS, FORMAT, IQ4_NL, NF4, learn_codebook

E8M0, E4M3 = ml_dtypes.float8_e8m0fnu, ml_dtypes.float8_e4m3fn

each_codebook = pytest.mark.parametrize("codebook", CODEBOOKS.values(), ids=CODEBOOKS.keys())


def decoded(quantized: formats.Quantized, k: int, block_size: int) -> np.ndarray:
    return FORMAT.with_codebook(quantized.codebook).dequantize(
        quantized.codes,
        quantized.scales,
        k=k,
        block_size=block_size,
        global_scale=quantized.global_scale,
    )


def root_mean_square(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(values**2)))


class TestNamedCodebooks:
    @each_codebook
    def test_ascending_values_of_both_signs(self, codebook: np.ndarray) -> None:
        assert codebook.shape == (16,)
        assert codebook.dtype == np.float32
        assert (np.diff(codebook) > 0).all()
        assert codebook[0] < 0 < codebook[-1]
        with pytest.raises(ValueError, match="read-only"):
            codebook[0] = 0

    def test_nf4_holds_quantiles_of_the_normal_distribution(self) -> None:
        quantile, end = np.vectorize(NormalDist().inv_cdf), 0.9677083
        positive = quantile(np.linspace(end, 0.5, 9)[:-1])
        negative = -quantile(np.linspace(end, 0.5, 8)[:-1])
        expected = np.sort(np.concatenate([negative, [0], positive])) / quantile(end)
        np.testing.assert_allclose(NF4, expected, atol=2e-7)

    def test_af4_holds_medians_of_normal_weights_over_their_largest(self) -> None:
        """Each value but -1, 0 and 1 is the median of what is nearest to it on its side of 0."""
        weights = np.random.default_rng(0).standard_normal((60_000, 64))
        normalised = np.sort((weights / np.abs(weights).max(axis=1, keepdims=True)).reshape(-1))
        middles = (AF4[1:] + AF4[:-1]) / 2
        middles[6:8] = 0
        cuts = np.searchsorted(normalised, middles)
        for i in (*range(1, 7), *range(8, 15)):
            assert abs(np.median(normalised[cuts[i - 1] : cuts[i]]) - AF4[i]) < 1e-3

    def test_iq4_nl_is_of_integers_without_zero(self) -> None:
        assert np.array_equal(IQ4_NL, np.rint(IQ4_NL))
        assert (IQ4_NL[0], IQ4_NL[8], IQ4_NL[-1]) == (-127, 1, 113)


class TestWithCodebook:
    def test_only_formats_that_take_one(self) -> None:
        with pytest.raises(ValueError, match="int4 has values of its own and takes no codebook"):
            formats.get("int4").with_codebook(NF4)

    def test_values_must_be_a_codebook(self) -> None:
        with pytest.raises(ValueError, match=r"a codebook of codebook4 is \[16\], given \[15\]"):
            FORMAT.with_codebook(NF4[:15])
        with pytest.raises(ValueError, match="must be finite, and its values not all equal"):
            FORMAT.with_codebook(np.full(16, 2.0))
        with pytest.raises(ValueError, match="must be finite"):
            FORMAT.with_codebook(np.where(np.arange(16) == 3, np.nan, NF4))

    def test_without_a_codebook_nothing_is_quantised_or_decoded(self) -> None:
        with pytest.raises(ValueError, match=r"take with_codebook\(values\) first"):
            FORMAT.quantize(np.ones((1, 4)), 0)
        with pytest.raises(ValueError, match="no values of its own"):
            FORMAT.dequantize(np.zeros((1, 2), np.uint8), np.ones(1), k=4, block_size=0)

    def test_float64_is_rounded_as_a_node_will_hold_it(self) -> None:
        values = np.linspace(-1, 1, 16)
        assert np.array_equal(FORMAT.with_codebook(values).values, values.astype(np.float32))
        half = values.astype(np.float16)
        assert np.array_equal(FORMAT.with_codebook(half).values, half)


class TestQuantize:
    @each_codebook
    @pytest.mark.parametrize("block_size", [0, 16, 64])
    def test_takes_the_nearest_value(self, codebook: np.ndarray, block_size: int) -> None:
        weights = np.random.default_rng(1).standard_normal((2, 3, 150)).astype(np.float32)
        quantized = FORMAT.with_codebook(codebook).quantize(weights, block_size)
        assert np.array_equal(quantized.codebook, codebook)
        scales = np.repeat(np.atleast_3d(quantized.scales), block_size or 150, axis=-1)[..., :150]
        every = codebook.astype(np.float64) * scales[..., None]
        best = np.abs(every - weights[..., None]).min(axis=-1)
        error = np.abs(decoded(quantized, 150, block_size) - weights)
        np.testing.assert_allclose(error, best, rtol=1e-5, atol=1e-7)

    def test_by_hand(self) -> None:
        # IQ4_NL reaches farther below zero, so the largest magnitude, 2.54, takes code 0.
        weights = np.array([[2.54, -0.26, 0.0, -2.26]])
        quantized = FORMAT.with_codebook(IQ4_NL).quantize(weights, 0)
        np.testing.assert_allclose(quantized.scales, [-0.02], rtol=1e-6)
        assert formats.unpack(quantized.codes, 4, 4).tolist() == [[0, 9, 8, 15]]
        quantized = FORMAT.with_codebook(NF4).quantize(weights, 0)
        np.testing.assert_allclose(quantized.scales, [2.54])
        assert formats.unpack(quantized.codes, 4, 4).tolist() == [[15, 6, 7, 0]]

    def test_values_in_any_order(self) -> None:
        order = np.random.default_rng(2).permutation(16)
        weights = np.random.default_rng(3).standard_normal((4, 64))
        plain = FORMAT.with_codebook(NF4).quantize(weights, 32)
        shuffled = FORMAT.with_codebook(NF4[order]).quantize(weights, 32)
        np.testing.assert_array_equal(decoded(shuffled, 64, 32), decoded(plain, 64, 32))

    @each_codebook
    @pytest.mark.parametrize("block_size", [0, 32])
    @pytest.mark.parametrize("scale_dtype", [E8M0, E4M3, np.float16])
    def test_scales_of_every_type(
        self, codebook: np.ndarray, block_size: int, scale_dtype: type
    ) -> None:
        weights = np.random.default_rng(4).standard_normal((2, 4, 96)).astype(np.float32)
        quantized = FORMAT.with_codebook(codebook).quantize(
            weights, block_size, scale_dtype=scale_dtype
        )
        assert quantized.scales.dtype == scale_dtype
        assert quantized.scales.shape == ((2, 4, 3) if block_size else (2, 4))
        assert (quantized.global_scale is not None) == (scale_dtype == E4M3)
        error = decoded(quantized, 96, block_size) - weights
        assert root_mean_square(error) < (0.16 if scale_dtype == E8M0 else 0.12)

    def test_values_of_one_sign(self) -> None:
        fmt = FORMAT.with_codebook(np.arange(16.0) + 1)
        with pytest.raises(ValueError, match="values of both signs"):
            fmt.quantize(np.ones((1, 4)), 0, scale_dtype=E8M0)
        negative = FORMAT.with_codebook(-np.arange(16.0) - 1)
        with pytest.raises(ValueError, match="needs signed_scales=True"):
            negative.quantize(np.ones((1, 4)), 0, signed_scales=False)
        assert decoded(negative.quantize(np.ones((1, 4)), 0), 4, 0).tolist() == [[1.0] * 4]


class TestLearnCodebook:
    @staticmethod
    def weights(seed: int = 5) -> np.ndarray:
        return np.random.default_rng(seed).laplace(size=(3, 40, 256)).astype(np.float32)

    @pytest.mark.parametrize("block_size", [0, 32])
    def test_is_better_than_every_named_one(self, block_size: int) -> None:
        weights = self.weights()
        learned = learn_codebook(weights, block_size)
        errors = {
            name: root_mean_square(
                decoded(FORMAT.with_codebook(values).quantize(weights, block_size), 256, block_size)
                - weights
            )
            for name, values in {**CODEBOOKS, "learned": learned}.items()
        }
        assert min(errors, key=errors.get) == "learned"

    def test_finds_the_values_that_weights_have(self) -> None:
        rng = np.random.default_rng(6)
        values = NF4 + rng.uniform(-0.02, 0.02, 16)
        values[[0, -1]] = -1, 1
        weights = rng.choice(values, (64, 64)) * rng.uniform(0.5, 2, (64, 1))
        weights[:, 0] = np.abs(weights).max(axis=1)  # so that each row's largest is a 1
        np.testing.assert_allclose(learn_codebook(weights, 0), values, atol=0.01)

    def test_same_weights_same_codebook(self) -> None:
        weights = self.weights()
        learned = learn_codebook(weights, 64)
        assert np.array_equal(learned, learn_codebook(weights.copy(), 64))
        assert (learned[0], learned[-1]) == (-1, 1)
        assert (np.diff(learned) > 0).all()

    def test_partial_blocks_and_many_weights(self) -> None:
        learn_codebook(np.random.default_rng(8).standard_normal((3, 50)), 32)
        many = np.random.default_rng(9).standard_normal((1200, 1024)).astype(np.float16)
        np.testing.assert_allclose(
            learn_codebook(many, 64), learn_codebook(many[::2], 64), atol=0.02
        )

    def test_refusals(self) -> None:
        with pytest.raises(ValueError, match="must not all be zero"):
            learn_codebook(np.zeros((2, 8)), 0)
        with pytest.raises(ValueError, match="finite"):
            learn_codebook(np.array([[1.0, np.inf]]), 0)
        with pytest.raises(ValueError, match=r"weights must be \[\.\.\., N, K\]"):
            learn_codebook(np.ones(8), 0)
