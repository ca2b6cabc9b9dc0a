"""The oracle against cases worked out by hand: expected numbers are written, not computed."""

import math

import ml_dtypes
import numpy as np
import pytest
from helpers.cases import QMoECase, qmoe_oracle

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


class TestDequantize:
    def test_int4_blocks_low_nibble_first(self) -> None:
        # One row of 16 + 16 codes; the first block has scale 0.5, the second -2. Zero point 8.
        codes = np.array([[[0x08, 0xF1, *[0x88] * 6, 0x79, *[0x88] * 7]]], dtype=np.uint8)
        scales = np.array([[[0.5, -2.0]]], dtype=np.float32)
        weights = reference.dequantize_projection(
            Projection(codes, scales), formats.get("int4"), k=32, block_size=16
        )
        first = [0.0, -4.0, -3.5, 3.5] + [0.0] * 12  # nibbles 8 0 1 15: (q - 8) / 2
        second = [-2.0, 2.0] + [0.0] * 14  # nibbles 9 7: (q - 8) * -2
        close(weights, [[first + second]])

    def test_int8_per_channel(self) -> None:
        codes = np.array([[[0, 128, 255], [127, 129, 130]]], dtype=np.uint8)
        for scales in (np.array([[0.25, 2.0]]), np.array([[[0.25], [2.0]]])):
            weights = reference.dequantize_projection(
                Projection(codes, scales), formats.get("int8"), k=3, block_size=0
            )
            close(weights, [[[-32.0, 0.0, 31.75], [-2.0, 2.0, 4.0]]])

    def test_packed_zero_points_along_the_blocks(self) -> None:
        # Two rows of three blocks of 16, zero points 1 2 3 and 15 0 8: two bytes a row, the last
        # nibble is padding.
        codes = np.full((1, 2, 24), 0x44, dtype=np.uint8)
        scales = np.ones((1, 2, 3), dtype=np.float32)
        zero_points = np.array([[[0x21, 0xF3], [0x0F, 0x08]]], dtype=np.uint8)
        weights = reference.dequantize_projection(
            Projection(codes, scales, zero_points), formats.get("int4"), k=48, block_size=16
        )
        close(weights[0, 0, [0, 16, 32]], [3.0, 2.0, 1.0])
        close(weights[0, 1, [0, 16, 32]], [-11.0, 4.0, -4.0])

    def test_packed_zero_points_across_the_rows(self) -> None:
        # Per channel: rows 0, 1, 2 have zero points 5, 6, 7.
        codes = np.full((1, 3, 1), 0x75, dtype=np.uint8)
        zero_points = np.array([[0x65, 0x07]], dtype=np.uint8)
        weights = reference.dequantize_projection(
            Projection(codes, np.ones((1, 3)), zero_points), formats.get("int4"), k=2, block_size=0
        )
        close(weights, [[[0.0, 2.0], [-1.0, 1.0], [-2.0, 0.0]]])

    def test_float_zero_points_keep_their_fraction(self) -> None:
        codes = np.full((1, 1, 8), 0x99, dtype=np.uint8)
        zero_points = np.array([[[8.5]]], dtype=ml_dtypes.bfloat16)
        weights = reference.dequantize_projection(
            Projection(codes, np.full((1, 1, 1), 4.0), zero_points),
            formats.get("int4"),
            k=16,
            block_size=16,
        )
        close(weights, np.full((1, 1, 16), 2.0))

    def test_zero_points_of_another_shape_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"zero points have shape \[1, 1, 5\]; allowed are"):
            reference.expand_zero_points(
                np.zeros((1, 1, 5), np.uint8), formats.get("int4"), (1, 1, 2), 16
            )


class TestRoute:
    # exp(ln 2) = 2: the probabilities of these four experts are 1/8, 2/8, 4/8, 1/8.
    LOGITS = np.array([[0.0, math.log(2), math.log(4), 0.0]])

    def test_factors_are_probabilities_over_all_experts(self) -> None:
        ids, factors = reference.route(self.LOGITS, 2, normalize=False)
        assert ids.tolist() == [[2, 1]]
        close(factors, [[0.5, 0.25]])

    def test_normalised(self) -> None:
        _, factors = reference.route(self.LOGITS, 2, normalize=True)
        close(factors, [[2 / 3, 1 / 3]])

    def test_lower_index_wins_ties(self) -> None:
        ids, factors = reference.route(self.LOGITS, 3, normalize=False)
        assert ids.tolist() == [[2, 1, 0]]
        close(factors, [[0.5, 0.25, 0.125]])
        assert reference.route(np.ones((1, 5)), 4, normalize=True)[0].tolist() == [[0, 1, 2, 3]]

    def test_minus_infinity_has_probability_zero(self) -> None:
        ids, factors = reference.route(np.array([[-INF, 1.0, -INF]]), 3, normalize=True)
        assert ids.tolist() == [[1, 0, 2]]
        close(factors, [[1.0, 0.0, 0.0]])

    def test_selection_is_by_logit_even_when_probabilities_underflow(self) -> None:
        ids, factors = reference.route(
            np.array([[-2000.0, 0.0, -1000.0]]),
            2,
            normalize=False,
            router_weights=np.array([[3.0, 5.0, 7.0]]),
        )
        assert ids.tolist() == [[1, 2]]
        close(factors, [[5.0, 7.0]])

    def test_router_weights(self) -> None:
        weights = np.array([[9.0, 0.5, 1.5, 9.0]])
        ids, factors = reference.route(self.LOGITS, 2, normalize=False, router_weights=weights)
        assert ids.tolist() == [[2, 1]]
        close(factors, [[1.5, 0.5]])
        _, factors = reference.route(self.LOGITS, 2, normalize=True, router_weights=weights)
        close(factors, [[0.75, 0.25]])

    @pytest.mark.parametrize(("weight", "factor"), [(1e-7, 1e-7), (2e-6, 0.5), (0.0, 0.0)])
    def test_a_tiny_sum_is_not_divided_by(self, weight: float, factor: float) -> None:
        weights = np.full((1, 4), weight)
        _, factors = reference.route(self.LOGITS, 2, normalize=True, router_weights=weights)
        close(factors, [[factor, factor]], tolerance=1e-12)


class TestSparseMixer:
    def test_two_experts_close_together(self) -> None:
        # First: top 10, and 9.9 is (10 - 9.9) / 10 = 0.01 <= 0.02 away, 9 is 0.1 away:
        # factor exp(10) / (exp(10) + exp(9.9)) = 1 / (1 + exp(-0.1)).
        # Second: top 9.9; 9 is 0.0909 away, 10 no longer takes part: factor 1.
        ids, factors = reference.route(
            np.array([[9.0, 10.0, 9.9, -5.0]]), 2, normalize=True, use_sparse_mixer=True
        )
        assert ids.tolist() == [[1, 2]]
        close(factors, [[1 / (1 + math.exp(-0.1)), 1.0]])

    def test_far_apart(self) -> None:
        # Each is alone within its mask; the two factors sum to 2.
        ids, factors = reference.route_sparse_mixer(np.array([[4.0, 1.0, 2.0]]))
        assert ids.tolist() == [[0, 2]]
        close(factors, [[1.0, 1.0]])

    def test_distance_is_relative_to_the_larger_magnitude(self) -> None:
        # Top -1: x = -1.02 has (0.02) / 1.02 = 0.0196 <= 0.02 and stays, -1.03 has 0.0291 and goes.
        ids, factors = reference.route_sparse_mixer(np.array([[-1.0, -1.02, -1.03]]))
        assert ids.tolist() == [[0, 1]]
        # Second: top -1.02, and -1.03 has 0.01 / 1.03 = 0.0097.
        close(factors, [[1 / (1 + math.exp(-0.02)), 1 / (1 + math.exp(-0.01))]])

    def test_router_weights_win(self) -> None:
        # The choice is the same with and without the mixer; the factors are the router weights.
        ids, factors = reference.route(
            np.array([[4.0, 1.0, 2.0]]),
            2,
            normalize=True,
            router_weights=np.array([[3.0, 9.0, 1.0]]),
            use_sparse_mixer=True,
        )
        assert ids.tolist() == [[0, 2]]
        close(factors, [[0.75, 0.25]])

    def test_all_equal(self) -> None:
        ids, factors = reference.route_sparse_mixer(np.zeros((1, 4)))
        assert ids.tolist() == [[0, 1]]
        close(factors, [[1 / 4, 1 / 3]])


class TestActivate:
    def test_plain(self) -> None:
        x = np.array([-1.0, 0.0, 2.0])
        close(reference.activate(x, "identity"), [-1, 0, 2])
        close(reference.activate(x, "relu"), [0, 0, 2])
        # sigmoid(-1) = 0.268941421370, sigmoid(2) = 0.880797077978
        close(reference.activate(x, "silu"), [-0.268941421370, 0, 1.761594155956], 1e-11)
        # Phi(-1) = 0.158655253931, Phi(2) = 0.977249868052
        close(reference.activate(x, "gelu"), [-0.158655253931, 0, 1.954499736104], 1e-11)

    def test_silu_of_large_numbers(self) -> None:
        close(reference.activate(np.array([-1e4, 1e4]), "silu"), [0.0, 1e4])

    def test_swiglu_fusion(self) -> None:
        # Gates 0 and 2, ups 3 and 5: 0 sigmoid(0) 3 = 0 and 2 * 0.880797077978 * 5.
        expected = [0.0, 8.80797077978]
        interleaved, halves = np.array([0.0, 3.0, 2.0, 5.0]), np.array([0.0, 2.0, 3.0, 5.0])
        gates, ups = halves[:2], halves[2:]
        close(reference.activate(interleaved, "swiglu", swiglu_fusion=1), expected, 1e-10)
        close(reference.activate(halves, "swiglu", swiglu_fusion=2), expected, 1e-10)
        close(reference.activate(gates, "swiglu", fc3=ups, swiglu_fusion=0), expected, 1e-10)
        # The legacy meaning of 0 without fc3 is 1.
        close(reference.activate(interleaved, "swiglu", swiglu_fusion=0), expected, 1e-10)

    def test_swiglu_of_gpt_oss(self) -> None:
        options = {"swiglu_fusion": 1, "alpha": 2.0, "beta": 1.0, "limit": 7.0}
        # Gate 1, up -2: 1 * sigmoid(2) * (-2 + 1).
        close(
            reference.activate(np.array([1.0, -2.0]), "swiglu", **options), [-0.880797077978], 1e-11
        )
        # Gate 9 is cut to 7, up -9 to -7: 7 * sigmoid(14) * -6.
        sigmoid_14 = 1 / (1 + math.exp(-14))
        close(reference.activate(np.array([9.0, -9.0]), "swiglu", **options), [-42 * sigmoid_14])
        # A low gate is not cut: -9 * sigmoid(-18) * (7 + 1), up 9 cut to 7.
        sigmoid_minus_18 = 1 / (1 + math.exp(18))
        close(
            reference.activate(np.array([-9.0, 9.0]), "swiglu", **options), [-72 * sigmoid_minus_18]
        )

    def test_limit_after_activation(self) -> None:
        options = {"swiglu_fusion": 1, "alpha": 2.0, "beta": 1.0, "limit": 1.5}
        after = {**options, "limit_after_activation": True}
        # Gate 1.6, which is not cut, gives 1.6 * sigmoid(3.2) = 1.537334843525; that is cut to 1.5.
        x = np.array([1.6, -9.0])
        close(reference.activate(x, "swiglu", **after), [1.5 * -0.5])
        # 1.5 * sigmoid(3) = 1.428861190234.
        close(reference.activate(x, "swiglu", **options), [-0.714430595117], 1e-11)
        # Gate 1.55 gives 1.55 * sigmoid(3.1) = 1.483183754842, which is not cut.
        actual = reference.activate(np.array([1.55, 9.0]), "swiglu", **after)
        close(actual, [1.483183754842 * 2.5], 1e-10)
        # Low ones never are; without a limit, nothing is.
        low = np.array([-9.0, 0.0])
        close(reference.activate(low, "swiglu", **after), [-9 / (1 + math.exp(18))])
        after["limit"] = math.inf
        close(reference.activate(x, "swiglu", **after), [1.537334843525 * -8], 1e-9)

    def test_silu_with_fc3(self) -> None:
        # 2 * 0.880797077978 * 5; alpha, beta and limit belong to swiglu.
        y = reference.activate(
            np.array([2.0]), "silu", fc3=np.array([5.0]), alpha=3.0, beta=2.0, limit=1.0
        )
        close(y, [8.80797077978], 1e-10)

    def test_geglu_is_the_tanh_gelu(self) -> None:
        # 0.5 (1 + tanh(0.797884560803 * 1.044715)) = 0.841191990608; the error function gives
        # 0.841344746069.
        actual = reference.activate(np.array([1.0, 10.0]), "geglu", swiglu_fusion=1)
        close(actual, [8.41191990608], 1e-9)
        # Alpha, beta and limit play no role.
        close(
            reference.activate(
                np.array([1.0, 10.0]), "geglu", swiglu_fusion=1, alpha=3.0, beta=2.0, limit=0.5
            ),
            actual,
        )

    def test_refusals(self) -> None:
        with pytest.raises(ValueError, match="'softplus' is not known"):
            reference.activate(np.zeros(2), "softplus")
        with pytest.raises(ValueError, match="goes with silu, swiglu and geglu, not with 'relu'"):
            reference.activate(np.zeros(2), "relu", fc3=np.zeros(2))
        with pytest.raises(ValueError, match="needs swiglu_fusion 0"):
            reference.activate(np.zeros(2), "swiglu", fc3=np.zeros(2), swiglu_fusion=2)


class TestQMoE:
    """Two experts, H = I = 2, int4 per channel, all scales 1 unless said."""

    # W1 = [[1, 0], [0, 1]] and [[2, 0], [0, -1]]; W2 = [[1, 1], [0, 1]] and [[0, 0], [3, 0]], as
    # codes + 8.
    FC1 = np.array([[nibbles(9, 8), nibbles(8, 9)], [nibbles(10, 8), nibbles(8, 7)]], np.uint8)
    FC2 = np.array([[nibbles(9, 9), nibbles(8, 9)], [nibbles(8, 8), nibbles(11, 8)]], np.uint8)
    ONES = np.ones((2, 2), np.float32)
    X = np.array([[1.0, -2.0], [3.0, 4.0]], np.float32)
    # Probabilities 3/4, 1/4 and 1/5, 4/5.
    LOGITS = np.log(np.array([[3.0, 1.0], [1.0, 4.0]]))

    def run(self, **options: object) -> np.ndarray:
        fc1 = Projection(self.FC1, self.ONES, bias=options.pop("fc1_bias", None))  # type: ignore[arg-type]
        fc2 = Projection(self.FC2, self.ONES, bias=options.pop("fc2_bias", None))  # type: ignore[arg-type]
        return reference.qmoe(self.X, self.LOGITS, fc1, fc2, **options)  # type: ignore[arg-type]

    def test_top_one(self) -> None:
        # Token 0, expert 0: h = relu([1, -2]) = [1, 0], y = [1, 0]; times 3/4.
        # Token 1, expert 1: h = relu([6, -4]) = [6, 0], y = [0, 18]; times 4/5.
        close(self.run(k=1, activation_type="relu"), [[0.75, 0.0], [0.0, 14.4]])

    def test_normalised_top_one_has_factor_one(self) -> None:
        close(self.run(k=1, normalize_routing_weights=1), [[1.0, 0.0], [0.0, 18.0]])

    def test_top_two_identity(self) -> None:
        # Token 0: expert 0: h = [1, -2], y = [-1, -2]; expert 1: h = [2, 2], y = [0, 6].
        #   3/4 [-1, -2] + 1/4 [0, 6] = [-0.75, 0]
        # Token 1: expert 0: h = [3, 4], y = [7, 4]; expert 1: h = [6, -4], y = [0, 18].
        #   1/5 [7, 4] + 4/5 [0, 18] = [1.4, 15.2]
        close(self.run(k=2, activation_type="identity"), [[-0.75, 0.0], [1.4, 15.2]])

    def test_biases(self) -> None:
        # fc1's bias comes before the activation, fc2's before the routing factor.
        # Token 0, expert 0: h = relu([1 + 1, -2 + 5]) = [2, 3], y = [5 + 10, 3 + 20]; times 3/4.
        # Token 1, expert 1: h = relu([6 - 2, -4 + 5]) = [4, 1], y = [0 + 30, 12 + 40]; times 4/5.
        fc1_bias = np.array([[1.0, 5.0], [-2.0, 5.0]])
        fc2_bias = np.array([[10.0, 20.0], [30.0, 40.0]])
        close(self.run(k=1, fc1_bias=fc1_bias, fc2_bias=fc2_bias), [[11.25, 17.25], [24.0, 41.6]])

    def test_router_weights(self) -> None:
        weights = np.array([[0.5, 9.0], [9.0, 2.0]])
        close(self.run(k=1, router_weights=weights), [[0.5, 0.0], [0.0, 36.0]])

    def test_rank_three(self) -> None:
        fc1, fc2 = Projection(self.FC1, self.ONES), Projection(self.FC2, self.ONES)
        y = reference.qmoe(self.X[None], self.LOGITS, fc1, fc2, k=1)
        assert y.shape == (1, 2, 2)
        close(y, [[[0.75, 0.0], [0.0, 14.4]]])

    def test_swiglu_with_fc3(self) -> None:
        # One expert, H = 2, I = 1: gate = 2 x0, up = 3 x1, y = swiglu * [1, -1].
        fc1 = Projection(np.array([[nibbles(10, 8)]], np.uint8), np.ones((1, 1)))
        fc3 = Projection(np.array([[nibbles(8, 11)]], np.uint8), np.ones((1, 1)))
        fc2 = Projection(np.array([[[0x09], [0x07]]], np.uint8), np.ones((1, 2)))
        y = reference.qmoe(
            np.array([[1.0, 2.0]]), np.zeros((1, 1)), fc1, fc2, fc3, k=1, activation_type="swiglu"
        )
        # gate 2, up 6: 2 * 0.880797077978 * 6
        close(y, [[10.569564935736, -10.569564935736]], 1e-10)

    def test_no_tokens(self) -> None:
        fc1, fc2 = Projection(self.FC1, self.ONES), Projection(self.FC2, self.ONES)
        assert reference.qmoe(np.zeros((0, 2)), np.zeros((0, 2)), fc1, fc2).shape == (0, 2)


class TestMatMulNBits:
    # N = 2, K = 20 in blocks of 16: the last block has 4 codes and 12 of padding.
    B = np.array(
        [[[0x98] * 8, [0xA9, 0x77, *[0xFF] * 6]], [[0x88] * 8, [0x08, 0x8F, *[0x00] * 6]]], np.uint8
    )
    SCALES = np.array([[0.5, 2.0], [1.0, -1.0]], np.float32)
    ATTRIBUTES = {"K": 20, "N": 2, "block_size": 16, "bits": 4}

    def test_partial_last_block(self) -> None:
        # Row 0: (0, 1) * 8 times 0.5, then (1, 2, -1, -1) * 2. Row 1: zeros, then (0, -8, 7, 0) *
        # -1.
        a = np.ones((1, 20), np.float32)
        a[0, 16:] = [1, 10, 100, 1000]
        # 8 * 0.5 + 2 * (1 + 20 - 100 - 1000) = -2154; -(-80 + 700) = -620.
        close(
            reference.matmul_nbits(a, self.B, self.SCALES, **self.ATTRIBUTES), [[-2154.0, -620.0]]
        )
        bias = np.array([4.0, 20.0])
        y = reference.matmul_nbits(a, self.B, self.SCALES, bias=bias, **self.ATTRIBUTES)
        close(y, [[-2150.0, -600.0]])

    def test_zero_points(self) -> None:
        # Packed: row 0 has 8 and 9, row 1 has 7 and 0. With a = 1 everywhere:
        # row 0: 8 * 0.5 + 2 * (0 + 1 - 2 - 2) = -2; row 1: 16 * 1 - (8 + 0 + 15 + 8) = -15.
        a = np.ones((20,), np.float32)
        packed = np.array([[0x98], [0x07]], np.uint8)
        close(
            reference.matmul_nbits(a, self.B, self.SCALES, packed, **self.ATTRIBUTES), [-2.0, -15.0]
        )
        for dtype in (np.uint8, np.float32, np.float16):
            one_each = np.array([[8, 9], [7, 0]], dtype)
            for zero_points in (one_each, one_each.reshape(-1)):
                y = reference.matmul_nbits(a, self.B, self.SCALES, zero_points, **self.ATTRIBUTES)
                close(y, [-2.0, -15.0])

    def test_g_idx(self) -> None:
        # All columns in block 1 but column 17, which takes the scale of block 0.
        g_idx = np.ones(20, np.int32)
        g_idx[17] = 0
        # Row 0: 8 * 2 + (1 - 1 - 1) * 2 + 2 * 0.5 = 15; row 1: -(0 + 7 + 0) + (-8) * 1 = -15.
        y = reference.matmul_nbits(
            np.ones((1, 20)), self.B, self.SCALES, g_idx=g_idx, **self.ATTRIBUTES
        )
        close(y, [[15.0, -15.0]])

    def test_int8(self) -> None:
        b = np.full((1, 1, 16), 128, np.uint8)
        b[0, 0, :3] = [0, 255, 130]
        y = reference.matmul_nbits(
            np.ones((1, 3)), b, np.array([[0.5]]), K=3, N=1, block_size=16, bits=8
        )
        close(y, [[0.5 * (-128 + 127 + 2)]])

    def test_no_rows(self) -> None:
        y = reference.matmul_nbits(np.zeros((0, 20)), self.B, self.SCALES, **self.ATTRIBUTES)
        assert y.shape == (0, 2)


def test_shared_experts_are_added_to_the_routed_ones() -> None:
    """With S shared experts the op is a routed one, plus each shared expert alone, gated."""
    case = QMoECase(experts=5, shared=2, tokens=4, router_weights=True)
    tensors, attributes = case.tensors(), case.attributes()
    gates = tensors["router_probs"].astype(np.float64)

    def of_experts(experts: slice, **changes: int) -> np.ndarray:
        router = ("router_probs", "router_weights")
        parts = {
            name: tensor[:, experts]
            if name in router
            else tensor[experts]
            if name.startswith("fc")
            else tensor
            for name, tensor in tensors.items()
        }
        return qmoe_oracle(parts, {**attributes, "num_shared_experts": 0, **changes})

    expected = of_experts(slice(0, 3))
    got = qmoe_oracle(tensors, attributes)
    del tensors["router_weights"]
    for shared in (3, 4):
        alone = of_experts(slice(shared, shared + 1), k=1)  # its softmax is 1
        expected += alone / (1 + np.exp(-gates[:, shared : shared + 1]))
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)
