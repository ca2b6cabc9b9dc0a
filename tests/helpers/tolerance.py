"""How far a result may be from the float64 oracle.

A kernel may round wherever its activation type rounds: weights dequantised to that type, the hidden
activations between fc1 and fc2, the result. Each such rounding errs by at most u (the type's unit
roundoff) of a term, errors of different terms are independent, and K of them add up like a random
walk. So the yardstick of an element is not its own size, which may be small by cancellation, but
the root of the sum of its squared terms:

    scale(y) = |y| + sqrt(sum_k (x_k w_k)^2 + bias^2)

and through fc1, activation and fc2 alike, with the activation's slope in between
(`qmoe_error_scale`). On N(0, 1) data this is about 2 to 3 times the rms of the result. Allowed is
TOLERANCE[dtype] of it for every single element; the values are what the roundings above add up to
at about five sigma, over some 10^7 elements:

    float32   5e-6     nothing but float32 accumulation of up to some thousand terms; u = 6e-8
    float16   1.25e-3  u = 4.9e-4: weights, scales, hidden activations and result each rounded once
    bfloat16  1e-2     u = 3.9e-3, likewise

The CPU kernels, which round the result only, stay below 0.4 of this. onnxruntime's own tests allow
0.1 on results of about unit size in all three types: at least four times as much.

accuracy_level 3 allows activations and weights in bfloat16: each rounding errs by 1.6e-3 of a term
on average (a step of 2^-7 over sqrt 12, of numbers from 1 to 2), and there are up to three (of
activations, of a codebook's values, and of weights times their scales), which make 2.8e-3; the
largest of some thousand results is off by four to five times as much. 4 allows int8 activations
with a scale for 32 of them: half a step of 1/127 of the largest one, which is 2 to 3 sigma, so at
most 1 % of a term and 0.5 % on average. Both add up like a random walk, and fc2 adds its own to
fc1's. But all hidden values err by the same errors of x, which weights with a common sign or mean
add up: so what int8 does to a QMoE node is simulated, too, and where that is more, it is allowed.
Outlier channels make int8's steps larger for their neighbours: see
`tests/ops/test_accuracy_levels.py`.

wfp4afp8 quantises what goes into fc2, to steps of up to 1/8: where two right results of fc1, which
differ by rounding, lie on both sides of the middle between two e4m3 numbers, or of a power of two
that decides a block's scale, they become one step different. Such elements are found one by one
(`_flips`), and twice the random walk of their steps through fc2 is allowed. Cases of this kind have
global scales that are powers of two: weights are exact then in any type, fc1 errs by float32
accumulation only, and flips are rare.
"""

from __future__ import annotations

import functools

import numpy as np

from helpers.cases import Case, Tensors, projections
from qmoe_plugin import reference

TOLERANCE = {"float32": 5e-6, "float16": 1.25e-3, "bfloat16": 1e-2}
# Near zero a type's steps no longer shrink: some of its smallest numbers are always allowed.
FLOOR = {"float32": 2.0**-126, "float16": 4 * 2.0**-24, "bfloat16": 2.0**-126}
# accuracy_level 3 allows bfloat16 arithmetic, 4 int8 activations.
TOLERANCE_OF_LEVEL = {3: 1.6e-2, 4: 2e-2}
FLIPPED_STEPS = 2.0
# int8 rounding moves an element by half a step at most, evenly spread. Of MatMulNBits the standard
# deviation is known; of QMoE it is estimated from simulations, hence more of them.
INT8_SIGMAS = 6.0
SIMULATIONS, SIMULATED_SIGMAS = 12, 16.0


def tolerance(case: Case) -> float:
    """The allowed error of a case, in units of its error scale."""
    return max(TOLERANCE[case.dtype], TOLERANCE_OF_LEVEL.get(_level(case), 0.0))


def _level(case: Case) -> int:
    """The accuracy_level that counts: wfp4afp8 says itself how activations are rounded."""
    return 0 if dict(case.attributes()).get("quant_type") == "wfp4afp8" else case.accuracy_level


def allowed_error(case: Case, tensors: Tensors, expected: np.ndarray | None = None) -> np.ndarray:
    """How far each element of the result may be from the oracle (`expected`), float64."""
    flips: np.ndarray | float = 0.0
    if case.op_type in ("QMoE", "MoE"):
        scale, flips, rounding = qmoe_error_scale(tensors, dict(case.attributes()))
    else:
        scale = error_scale(case, tensors, expected)
    allowed = tolerance(case) * scale
    if _level(case) == 4:  # few terms err more than the average says
        if case.op_type not in ("QMoE", "MoE"):
            inputs, weights = case.operands(tensors)
            rounding = INT8_SIGMAS * _walk(_int8_step(inputs) / np.sqrt(12), weights, None)
        allowed = np.maximum(allowed, TOLERANCE[case.dtype] * scale + rounding)
    return allowed + FLIPPED_STEPS * flips + FLOOR[case.dtype]


def _int8_step(inputs: np.ndarray) -> np.ndarray:
    """The step of inputs [..., K] as int8, a scale a block of 32: 1/127 of its largest element."""
    *rows, k = inputs.shape
    blocks = np.zeros((*rows, -(-k // 32) * 32))
    blocks[..., :k] = np.abs(inputs)
    largest = blocks.reshape(*rows, -1, 32).max(-1)
    return np.repeat(largest, 32, axis=-1)[..., :k] / 127


def error_scale(case: Case, tensors: Tensors, expected: np.ndarray | None = None) -> np.ndarray:
    """The yardstick of each element of the result, float64; see the top of this file."""
    if case.op_type in ("QMoE", "MoE"):
        return qmoe_error_scale(tensors, dict(case.attributes()))[0]
    inputs, weights = case.operands(tensors)
    walk = _walk(inputs, weights, tensors.get("bias"))
    return np.abs(case.expected(tensors) if expected is None else expected) + walk


def _walk(errors: np.ndarray, weights: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    """Length of the random walk of inputs [..., K] with these errors through weights [N, K]."""
    squares = errors**2 @ (weights**2).T
    return np.sqrt(squares if bias is None else squares + bias.astype(np.float64) ** 2)


def qmoe_error_scale(
    tensors: Tensors, attributes: dict
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The yardstick of a QMoE node's result; what flips of quantised activations add, and int8.

    The last is 0 but at accuracy_level 4.
    """
    attrs = {**reference.QMOE_DEFAULTS, **attributes}
    int8 = attrs.get("accuracy_level", 0) == 4 and attrs["quant_type"] != "wfp4afp8"
    parts = projections(tensors)
    x = tensors["input"].reshape(-1, tensors["input"].shape[-1])
    experts = parts["fc1"].codes.shape[0]
    router_weights = tensors.get("router_weights")
    expert_ids, factors = reference.route(
        tensors["router_probs"].reshape(-1, experts),
        attrs["k"],
        normalize=bool(attrs["normalize_routing_weights"]),
        router_weights=None if router_weights is None else router_weights.reshape(-1, experts),
        use_sparse_mixer=bool(attrs["use_sparse_mixer"]),
        num_shared_experts=attrs["num_shared_experts"],
    )

    @functools.cache
    def weights(name: str, k: int, expert: int) -> tuple[np.ndarray, np.ndarray | None]:
        part = parts[name].expert(expert)
        matrix = reference.projection_weights(attrs, name, part, k)[0]
        return matrix, None if part.bias is None else part.bias.astype(np.float64)

    def linear(name: str, inputs: np.ndarray, errors: np.ndarray, expert: int) -> tuple:
        matrix, bias = weights(name, inputs.shape[-1], expert)
        return inputs @ matrix.T + (0.0 if bias is None else bias), _walk(errors, matrix, bias)

    result, squares, flips = (np.zeros(x.shape) for _ in range(3))
    rng = np.random.default_rng(0)
    noise = rng.random((SIMULATIONS if int8 else 0, *x.shape), np.float32) - 0.5
    noise *= _int8_step(x.astype(np.float32))
    deviations = np.zeros_like(noise)
    for expert in np.unique(expert_ids):
        rows, slots = np.nonzero(expert_ids == expert)
        inputs = reference.quantize_activations(
            x[rows], attrs, tensors.get("fc1_act_scale"), expert
        )
        fc1, fc1_error = linear("fc1", inputs, np.abs(inputs), expert)
        fc3, fc3_error = None, None
        if "fc3" in parts:
            fc3, fc3_error = linear("fc3", inputs, np.abs(inputs), expert)
        hidden, hidden_error = _through_activation(attrs, fc1, fc1_error, fc3, fc3_error)
        factor = factors[rows, slots, None]
        if int8:
            arguments = []
            for name, exact in (("fc1", fc1), ("fc3", fc3)):
                if exact is not None:
                    matrix = weights(name, x.shape[-1], expert)[0].astype(np.float32)
                    arguments.append(exact + noise[:, rows] @ matrix.T)
            off = _activated(attrs, *arguments) - hidden
            off += (rng.random(off.shape, np.float32) - 0.5) * _int8_step(hidden)
            fc2 = weights("fc2", hidden.shape[-1], expert)[0].astype(np.float32)
            deviations[:, rows] += factor * (off.astype(np.float32) @ fc2.T)
        if attrs["quant_type"] == "wfp4afp8":
            act_scale = tensors.get("fc2_act_scale")
            steps, hidden = _flips(attrs, hidden, hidden_error, act_scale, expert, x.dtype)
            flips[rows] += (
                factor * _walk(steps, weights("fc2", steps.shape[-1], expert)[0], None)
            ) ** 2
            hidden_error = np.zeros_like(hidden)
        y, y_error = linear("fc2", hidden, np.abs(hidden) + hidden_error, expert)
        result[rows] += factor * y
        squares[rows] += factor**2 * (y_error**2 + y**2)
    shape = tensors["input"].shape
    scale = np.abs(result) + np.sqrt(squares)
    rounding = np.sqrt((deviations**2).mean(0)) if int8 else np.zeros(x.shape)
    return tuple(
        part.reshape(shape) for part in (scale, np.sqrt(flips), SIMULATED_SIGMAS * rounding)
    )


def _flips(
    attrs: dict,
    hidden: np.ndarray,
    error: np.ndarray,
    act_scale: np.ndarray | None,
    expert: int,
    dtype: np.dtype,
) -> tuple[np.ndarray, np.ndarray]:
    """How far quantised activations may be apart for float32 errors, and the quantised ones."""
    off = TOLERANCE["float32"] * (error + np.abs(hidden)) * np.where(hidden < 0, -1.0, 1.0)
    quantized = [
        reference.quantize_activations(h.astype(dtype), attrs, act_scale, expert)
        for h in (hidden - off, hidden, hidden + off)
    ]
    return np.ptp(quantized, axis=0), quantized[1]


def _activated(attrs: dict, fc1: np.ndarray, fc3: np.ndarray | None = None) -> np.ndarray:
    return reference.activate(
        fc1,
        attrs["activation_type"],
        fc3=fc3,
        swiglu_fusion=attrs["swiglu_fusion"],
        alpha=attrs["activation_alpha"],
        beta=attrs["activation_beta"],
        limit=attrs["swiglu_limit"],
        limit_after_activation=bool(attrs["swiglu_limit_after_activation"]),
    )


def _through_activation(
    attrs: dict,
    fc1: np.ndarray,
    fc1_error: np.ndarray,
    fc3: np.ndarray | None,
    fc3_error: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
    """The activation, and errors times its slopes. None of our activations is steeper than 1.13."""
    slope = 1.13
    activation = attrs["activation_type"]
    value = _activated(attrs, fc1, fc3)
    if activation not in reference.GATED_ACTIVATIONS and fc3 is None:
        return value, slope * fc1_error
    gate, up = reference.split_gate_up(fc1, fc3, attrs["swiglu_fusion"])
    gate_error, up_error = reference.split_gate_up(fc1_error, fc3_error, attrs["swiglu_fusion"])
    if activation == "swiglu":  # an activated gate is never larger than min(gate, limit)
        gate = np.minimum(gate, attrs["swiglu_limit"])
        up = np.clip(up, -attrs["swiglu_limit"], attrs["swiglu_limit"]) + attrs["activation_beta"]
    return value, np.hypot(slope * gate_error * np.abs(up), np.abs(gate) * up_error)


def check(case: Case, tensors: Tensors, result: np.ndarray) -> float:
    """Asserts type, shape and values of a result; returns the largest error, 1 = all allowed."""
    expected = case.expected(tensors)
    assert result.dtype == case.output_dtype
    assert result.shape == expected.shape
    if result.size == 0:
        return 0.0
    allowed = allowed_error(case, tensors, expected)
    ratio = np.abs(result.astype(np.float64) - expected) / allowed
    ratio = np.where(np.isnan(ratio), np.inf, ratio)
    worst = np.unravel_index(np.argmax(ratio), ratio.shape)
    assert ratio[worst] <= 1, (
        f"{case}: the error is {ratio[worst]:.3g} times what is allowed at "
        f"{[int(i) for i in worst]}: got {result[worst]}, expected {expected[worst]:.9g} "
        f"+-{allowed[worst]:.3g}; {np.mean(ratio > 1):.1%} of {ratio.size} elements are wrong"
    )
    return float(ratio[worst])
