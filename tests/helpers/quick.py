"""A few cases that reach every kernel: for slow instruments, and for each new kernel.

They are made for every registered format. `pytest -m quick` runs them all.
"""

from __future__ import annotations

from helpers.block_quantized_cases import Fp4WeightCase, Fp8WeightCase
from helpers.cases import Case, MatMulNBitsCase, QMoECase
from helpers.dtypes import FLOAT_DTYPES
from helpers.moe_cases import MoECase
from qmoe_plugin import formats

BLOCK_QUANTIZED = {made.format: made for made in (Fp8WeightCase, Fp4WeightCase)}


def quick_cases(format_name: str) -> list[Case]:
    """Cases of one format: every dtype, few and many rows, and most options of the ops."""
    if format_name in formats.PLAIN_FORMATS:
        return plain_cases(format_name)
    fmt = formats.get(format_name)
    cases: list[Case] = []
    for dtype in FLOAT_DTYPES:
        common = {"format": format_name, "dtype": dtype}
        cases += [
            QMoECase(**common, tokens=1, hidden=96, inter=160, experts=8, k=4, activation="swiglu"),
            QMoECase(
                **common,
                tokens=33,
                block_size=0,
                zero_points=fmt.zero_points,
                activation="silu",
                scale_dtype="float32",
            ),
            QMoECase(**common, tokens=9, experts=5, shared=2),
            QMoECase(**common, tokens=70, block_size=64, hidden=128, inter=192, activation="geglu"),
            QMoECase(
                **common,
                tokens=5,
                block_size=16,
                fusion=0,
                fc3=True,
                zero_points=fmt.zero_points,
                router_weights=True,
                router_dtype="float32",
                rank=3,
                router_rank=3,
            ),
        ]
        if "wfp4afp8" in fmt.quant_types:
            quantized = {**common, "quant_type": "wfp4afp8", "hidden": 96, "inter": 160}
            cases += [
                QMoECase(**quantized, tokens=2),
                QMoECase(**quantized, tokens=40, experts=8, k=3),
                QMoECase(**quantized, tokens=9, act_scales="experts"),
            ]
        if fmt.scale_type == "any":
            cases += [
                QMoECase(**common, tokens=3, scale_dtype="float8e8m0"),
                QMoECase(**common, tokens=7, scale_dtype="float8e4m3fn", global_scales=True),
                MatMulNBitsCase(**common, m=3, scale_dtype="float8e8m0", global_scales=True),
                MatMulNBitsCase(**common, m=9, scale_dtype="float8e4m3fn"),
            ]
        if format_name in BLOCK_QUANTIZED:
            made = BLOCK_QUANTIZED[format_name]
            cases += [
                made(dtype=dtype, m=1, n=40, k=288),
                made(dtype=dtype, m=2, n=17, k=94, block_size=32, a_scale=True),
                made(dtype=dtype, m=70, n=130, k=320, bias=False, a_scale=True),
            ]
        if fmt.square_blocks:
            cases += [
                MatMulNBitsCase(**common, block_size=0, m=1, n=40, k=288),
                MatMulNBitsCase(**common, block_size=0, m=40, n=17, k=93, bias=False),
            ]
        zero_points = "packed" if fmt.zero_points else "none"
        for level in (3, 4):
            rounding = {**common, "accuracy_level": level}
            cases += [
                QMoECase(
                    **rounding,
                    tokens=70,
                    hidden=96,
                    inter=160,
                    experts=4,
                    k=2,
                    zero_points=fmt.zero_points,
                ),
                QMoECase(**rounding, tokens=1, hidden=64, inter=48, block_size=16),
                MatMulNBitsCase(**rounding, m=18, n=72, k=200, zero_points=zero_points),
                MatMulNBitsCase(**rounding, m=3, n=80, k=256, block_size=128, bias=False),
            ]
        cases += [
            MatMulNBitsCase(**common, m=1, n=40, k=288),
            MatMulNBitsCase(**common, m=2, n=17, k=93, zero_points=zero_points),
            MatMulNBitsCase(**common, m=19, n=130, k=320, block_size=128, bias=False),
            MatMulNBitsCase(**common, m=130, n=72, k=160, g_idx="shuffled"),
        ]
    return list(dict.fromkeys(case.fitted() for case in cases))


def plain_cases(weights: str) -> list[Case]:
    """Cases of a MoE with weights of this type."""
    cases: list[Case] = []
    for dtype in FLOAT_DTYPES:
        common = {"dtype": dtype, "weights": None if dtype == weights else weights}
        cases += [
            MoECase(**common, tokens=1, hidden=96, inter=160, experts=8, k=4),
            MoECase(**common, tokens=33, activation="silu"),
            MoECase(**common, tokens=9, experts=5, shared=1),
            MoECase(**common, tokens=70, hidden=200, inter=72, activation="geglu", fusion=2),
            MoECase(**common, tokens=5, hidden=37, inter=21, fusion=0, fc3=True, rank=3),
        ]
    return cases
