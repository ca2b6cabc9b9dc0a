"""The cases of onnxruntime's own tests, a quarter of its tolerances, against the float64 oracle.

The shapes, widths, block sizes and options are those of its test_qmoe_*.py, test_moe_cuda.py and
matmul_{2,4,8}bits_test.cc, those for which another build is needed included. Its tolerances are
absolute, for results of about unit size: they are applied to the error over the rms of the result,
beside the one rounding of the result to its type. Where ours (helpers/tolerance.py) are tighter
still, they decide; they are checked first.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
from helpers.cases import Case, MatMulNBitsCase, QMoECase
from helpers.dtypes import UNIT_ROUNDOFF
from helpers.run import run_case
from helpers.tolerance import check

pytestmark = pytest.mark.usefixtures("library")

Q, M = QMoECase, MatMulNBitsCase
HALF_TYPES = ("float16", "bfloat16")
TIGHTER = 4


@dataclass(frozen=True)
class Group:
    """Cases of one of its test files, and its absolute tolerance for each type."""

    name: str
    atol: dict[str, float]
    cases: list[Case]


def phi3(bits: int, block_size: int, tokens: int, **options: object) -> QMoECase:
    """The layer of test_qmoe_cuda.py and test_qmoe_cpu.py."""
    common = {"hidden": 128, "inter": 256, "experts": 4, "k": 2, "bias": False}
    return Q(f"int{bits}", block_size, tokens=tokens, **common, **options)  # type: ignore[arg-type]


def small(name: str, tokens: int = 32, **options: object) -> QMoECase:
    """The layer of the tests of FP4 and FP8."""
    common = {"hidden": 256, "inter": 256, "experts": 4, "k": 2, "bias": False, "tokens": tokens}
    if options.get("activation") == "silu":
        common["fusion"] = 0
    return Q(name, 0 if name == "fp8_e4m3" else 32, **{**common, **options})  # type: ignore[arg-type]


def qmoe_cuda() -> Group:
    cases: list[Case] = []
    for dtype, bits in itertools.product(HALF_TYPES, (4, 8)):
        common = {"bits": bits, "dtype": dtype}
        cases += [
            phi3(block_size=0, tokens=t, activation="silu", fusion=0, **common) for t in (1, 32)
        ]
        cases += [phi3(block_size=b, tokens=t, **common) for b, t in ((32, 1), (64, 32), (128, 32))]
        asymmetric = ((32, 1), (64, 32), (128, 32))
        cases += [phi3(block_size=b, tokens=t, zero_points=True, **common) for b, t in asymmetric]
        cases.append(phi3(block_size=32, tokens=3, rank=3, normalize=False, **common))
        # A second row of scales that was read from the first one's place, once.
        second_row = {"block_size": 32, "hidden": 128, "inter": 128, "experts": 1, "k": 1}
        for zero_points in (False, True):
            options = {**second_row, "zero_points": zero_points, "activation": "silu", "fusion": 0}
            cases.append(Q(f"int{bits}", dtype=dtype, tokens=8, **options))  # type: ignore[arg-type]
    cases.append(phi3(4, 32, 32, dtype="float16", fusion=0))
    cases.append(Q("int4", 32, "float16", hidden=128, inter=544, tokens=5))  # which it refuses
    return Group("qmoe_cuda", {"float16": 0.1, "bfloat16": 0.1}, cases)


def qmoe_cpu() -> list[Group]:
    groups = []
    for bits, half, single in ((2, 0.12, 0.20), (4, 0.05, 0.11), (8, 0.02, 0.11)):
        cases: list[Case] = [
            phi3(bits, 64 if bits == 8 else 32, tokens, dtype=dtype, zero_points=zero_points)
            for dtype in ("float16", "float32")
            for zero_points in (False, True)
            for tokens in (1, 7)
        ]
        groups.append(Group(f"qmoe_cpu_int{bits}", {"float16": half, "float32": single}, cases))
    return groups


def int2() -> Group:
    """moe_gemm_int2_test.cc, and what the int2 kernels were written for."""
    cases: list[Case] = []
    for dtype, block_size in itertools.product(HALF_TYPES, (32, 64, 128)):
        for fc1, fc2 in ((2, 4), (2, 2), (4, 2)):
            case = phi3(fc1, block_size, 9, dtype=dtype, fc2_format=f"int{fc2}")
            cases.append(case)
    return Group("int2", {"float16": 0.12, "bfloat16": 0.12}, cases)


def fp4(name: str, **options: object) -> Group:
    cases: list[Case] = []
    for dtype in HALF_TYPES:
        common = {"dtype": dtype, **options}
        cases += [small(name, activation=a, **common) for a in ("silu", "swiglu")]
        cases += [small(name, tokens, **common) for tokens in (8, 64, 128)]
        cases += [small(name, experts=8, k=k, **common) for k in (2, 4)]
        large = {"hidden": 512, "inter": 512, **common}
        cases.append(small(name, 16, **large))
        cases += [small(name, tokens, experts=8, k=4, **large) for tokens in (1, 2)]
        cases += [small(name, tokens, experts=8, k=2, **common) for tokens in (1, 4)]
    cases.append(small(name, 256, experts=8, k=2, dtype="float16", **options))
    large = {"hidden": 2048, "inter": 1024, "experts": 2, "dtype": "bfloat16"}
    cases.append(small(name, 3, **large, **options))
    title = str(options.get("quant_type", name))
    return Group(title, {"float16": 0.12, "bfloat16": 0.15}, cases)


def wfp4afp8_by_scale() -> Group:
    cases: list[Case] = [
        small("mxfp4", quant_type="wfp4afp8", act_scales=scales, activation=activation, dtype=dtype)
        for dtype in HALF_TYPES
        for scales in ("one", "experts")
        for activation in ("silu", "swiglu")
    ]
    return Group("wfp4afp8_by_scale", {"float16": 0.12, "bfloat16": 0.15}, cases)


def fp8_by_expert() -> Group:
    cases: list[Case] = []
    for dtype in HALF_TYPES:
        cases += [small("fp8_e4m3", activation=a, dtype=dtype) for a in ("silu", "swiglu")]
        cases.append(small("fp8_e4m3", experts=8, k=4, dtype=dtype))
    return Group("fp8_by_expert", {"float16": 0.05, "bfloat16": 0.08}, cases)


def fp8_by_square() -> Group:
    """Its tolerance is relative, 0.04, but for the smallest: here, of the rms."""
    layer = {"hidden": 160, "inter": 80, "experts": 16, "k": 10, "tokens": 3, "bias": False}
    cases: list[Case] = []
    for dtype, scale_dtype in itertools.product(HALF_TYPES, ("float32", "float16", "bfloat16")):
        for options in (
            {"activation": "silu", "fusion": 0, "fc3": True},
            {"fusion": 1},
            {"fusion": 2},
        ):
            cases.append(Q("fp8_e4m3", 128, dtype, scale_dtype, **layer, **options))  # type: ignore[arg-type]
    for dtype in HALF_TYPES:
        one = {**layer, "dtype": dtype}
        cases.append(Q("fp8_e4m3", 64, **one | {"normalize": False}))
        cases.append(Q("fp8_e4m3", 128, **one | {"activation": "silu", "fusion": 0}))  # no fc3
        cases.append(Q("fp8_e4m3", 128, **one | {"experts": 512, "hidden": 64, "inter": 32}))
        cases.append(
            Q("fp8_e4m3", 128, **one | {"hidden": 2560, "inter": 640, "experts": 3, "k": 2})
        )
    return Group("fp8_by_square", dict.fromkeys(HALF_TYPES, 0.04), cases)


def matmul_nbits() -> list[Group]:
    groups = []
    for bits in (2, 4, 8):
        shapes = [
            *itertools.product((1, 2, 100), (1, 32), (16, 93, 1024)),
            *itertools.product((1, 100), (2, 288), (32, 1234)),
        ]
        cases: list[Case] = []
        for index, (m, n, k) in enumerate(shapes):
            dtype = ("float32", "float16", "bfloat16")[index % 3]
            block_size = (16, 32, 64, 128)[index % 4]
            zero_points = ("none", "packed", "typed")[index // 3 % 3]
            cases.append(M(f"int{bits}", block_size, dtype, zero_points=zero_points, m=m, n=n, k=k))
        if bits == 4:
            cases.append(M(m=1, n=4096, k=4096, zero_points="packed"))
            for dtype, kind in itertools.product(HALF_TYPES, ("packed", "typed")):
                cases.append(M("int4", 64, dtype, zero_points=kind, m=1, n=256, k=1024))
                cases.append(M("int4", 128, dtype, zero_points=kind, m=32, n=1024, k=2048))
            cases += [M(dtype=dtype, m=1, n=32, k=2880) for dtype in HALF_TYPES]  # gpt-oss' router
        atol = dict.fromkeys(("float32", *HALF_TYPES), 0.1)
        groups.append(Group(f"matmul_{bits}bits", atol, cases))
    return groups


def gaps() -> Group:
    """What its matrix leaves out: few tokens, odd numbers of experts and choices, H == I."""
    layers = [
        {"experts": 60, "k": 6},
        {"experts": 160, "k": 10, "router_weights": True},
        {"experts": 384, "k": 1, "normalize": False},
    ]
    names = ("int2", "int4", "int8", "mxfp4", "nvfp4", "fp8_e4m3")
    cases: list[Case] = []
    for index, name in enumerate(names):
        for layer, tokens in zip(layers, (2, 7, 16), strict=True):
            options = {"dtype": HALF_TYPES[index % 2], "hidden": 64, "inter": 64, **layer}
            cases.append(Q(name, tokens=tokens, **options).fitted())  # type: ignore[arg-type]
        cases.append(Q(name, dtype="float16", tokens=30, experts=8, k=2, router="one_expert"))
        cases.append(Q(name, dtype="bfloat16", tokens=30, experts=8, k=3, router="ties"))
        cases.append(Q(name, dtype="float16", tokens=0))
    return Group("gaps", dict.fromkeys(HALF_TYPES, 0.1), cases)


GROUPS = [
    qmoe_cuda(),
    *qmoe_cpu(),
    int2(),
    fp4("mxfp4"),
    fp4("nvfp4"),
    fp4("mxfp4", quant_type="wfp4afp8"),
    wfp4afp8_by_scale(),
    fp8_by_expert(),
    fp8_by_square(),
    *matmul_nbits(),
    gaps(),
]


@pytest.mark.parametrize(
    ("group", "case"),
    [(group, case) for group in GROUPS for case in group.cases],
    ids=lambda value: value.name if isinstance(value, Group) else str(value),
)
def test_case(group: Group, case: Case, device: str) -> None:
    tensors, result = run_case(case, device)
    check(case, tensors, result)
    if result.size:
        expected = case.expected(tensors)
        error = np.abs(result.astype(np.float64) - expected)
        error -= UNIT_ROUNDOFF[case.dtype] * np.abs(expected)
        rms = np.sqrt((expected**2).mean())
        assert error.max() <= group.atol[case.dtype] / TIGHTER * rms
