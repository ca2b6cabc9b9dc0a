"""The cases of onnxruntime's own tests, a quarter of its tolerances, against the float64 oracle.

(Half of them at accuracy_level 4 on the CPU, which allows int8 activations; a quarter at level 0.)

The shapes, widths, block sizes and options are those of its test_qmoe_*.py, test_moe_cuda.py and
matmul_{2,4,8}bits_test.cc, those for which another build is needed included. Its tolerances are
absolute, for results of about unit size: they are applied to the error over the rms of the result,
beside the one rounding of the result to its type. Where ours (helpers/tolerance.py) are tighter
still, they decide; they are checked first. Where the stock CPU op runs the case and means the same
by it (tests/ops/test_stock.py says where it does not), it is within its own tolerance of ours.

Left out is what has no meaning for other kernels than its own: environment variables that choose
among these, weights that vary from run to run (we refuse them), row tiles, statistics of experts.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass

import numpy as np
import pytest
from helpers.cases import GATED, Case, MatMulNBitsCase, QMoECase, Tensors, feeds_of
from helpers.dtypes import UNIT_ROUNDOFF
from helpers.models import STOCK_DOMAIN
from helpers.moe_cases import MoECase
from helpers.run import open_session, run, run_case
from helpers.tolerance import check

pytestmark = pytest.mark.usefixtures("library")

Q, M, X = QMoECase, MatMulNBitsCase, MoECase
HALF_TYPES = ("float16", "bfloat16")
TIGHTER = 4
# Of level 4 on the CPU, where activations become int8 here and there: few terms err most.
TIGHTER_INT8 = 2


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


# Batch, sequence, bits, block size of test_qmoe_cuda.py: per channel, in blocks, with zero points.
CHANNELS = [(1, 1, 4, 0), (1, 32, 4, 0), (1, 32, 8, 0), (2, 16, 4, 0), (2, 16, 8, 0)]
BLOCKS = [
    *((1, 1, bits, 32) for bits in (4, 8)),
    *((1, 32, bits, block_size) for bits in (4, 8) for block_size in (32, 64, 128)),
    *((2, 16, bits, block_size) for bits in (4, 8) for block_size in (32, 64)),
]
ASYMMETRIC = [
    *((1, 1, bits, 32) for bits in (4, 8)),
    *((1, 32, bits, block_size) for bits in (4, 8) for block_size in (64, 128)),
    *((2, 16, bits, 64) for bits in (4, 8)),
]


def qmoe_cuda() -> Group:
    cases: list[Case] = []
    for dtype, gated in itertools.product(HALF_TYPES, (False, True)):
        kind = {} if gated else {"activation": "silu", "fusion": 0}
        for lists, zero_points in ((CHANNELS + BLOCKS, False), (ASYMMETRIC, True)):
            for batch, sequence, bits, block_size in lists:
                options = {"rank": 3 if batch > 1 else 2, "zero_points": zero_points, **kind}
                cases.append(phi3(bits, block_size, batch * sequence, dtype=dtype, **options))
    for dtype, bits in itertools.product(HALF_TYPES, (4, 8)):
        common = {"bits": bits, "dtype": dtype}
        # Its benchmark, with fewer experts.
        size = {"hidden": 1024, "inter": 4096, "experts": 3, "bias": False, "dtype": dtype}
        for block_size, tokens in ((64, 1), (128, 3)):
            cases.append(Q(f"int{bits}", block_size, tokens=tokens, **size))  # type: ignore[arg-type]
        cases.append(phi3(block_size=32, tokens=3, rank=3, normalize=False, **common))
        # A second row of scales that was read from the first one's place, once.
        second_row = {"block_size": 32, "hidden": 128, "inter": 128, "experts": 1, "k": 1}
        for zero_points in (False, True):
            options = {**second_row, "zero_points": zero_points, "activation": "silu", "fusion": 0}
            cases.append(Q(f"int{bits}", dtype=dtype, tokens=8, **options))  # type: ignore[arg-type]
    cases += [phi3(4, 32, 32, dtype=dtype, fusion=0) for dtype in HALF_TYPES]
    cases += [phi3(bits, 32, 32, dtype="float32") for bits in (4, 8)]
    cases.append(Q("int4", 32, "float16", hidden=128, inter=544, tokens=5))  # which it refuses
    return Group("qmoe_cuda", dict.fromkeys(("float32", *HALF_TYPES), 0.1), cases)


def moe_cuda() -> Group:
    cases: list[Case] = []
    gpt_oss = {"fusion": 1, "alpha": 1.702, "beta": 1.0, "limit": 7.0}
    for options in (gpt_oss, {"fusion": 2, "alpha": 1.0, "beta": 0.0}):
        layer = {"experts": 4, "k": 2, **options}
        for dtype, tokens in itertools.product(("float32", "float16"), (1, 2, 3, 6)):
            size = {"hidden": 64, "inter": 256, "rank": 3}
            cases.append(X(dtype, tokens=tokens, **size, **layer))  # type: ignore[arg-type]
        cases.append(X("bfloat16", hidden=64, inter=128, tokens=6, **layer))  # type: ignore[arg-type]
    mixer = {"activation": "relu", "fusion": 0, "sparse_mixer": True, "bias": False}
    size = {"hidden": 64, "inter": 32, "experts": 8, "k": 2, "tokens": 128}
    for dtype in ("float32", *HALF_TYPES):
        cases.append(X(dtype, **size, **mixer))  # type: ignore[arg-type]
    return Group("moe_cuda", dict.fromkeys(("float32", *HALF_TYPES), 0.1), cases)


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
        cases += [small(name, tokens, experts=8, k=2, **common) for tokens in (1, 4, 64)]
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
        shapes = itertools.product((1, 2, 100), (1, 2, 16, 32, 288), (16, 32, 93, 128, 1024, 1234))
        rng = np.random.default_rng(bits)  # draws from the other lists
        cases: list[Case] = [
            M(
                f"int{bits}",
                int(rng.choice((16, 32, 64, 128))),
                str(rng.choice(("float32", *HALF_TYPES))),
                zero_points=str(rng.choice(("none", "packed", "typed"))),
                accuracy_level=int(rng.choice((0, 2, 4))),
                bias=bool(rng.integers(2)),
                m=m,
                n=n,
                k=k,
            )
            for m, n, k in shapes
        ]
        if bits == 4:
            cases.append(M(m=1, n=4096, k=4096, zero_points="packed"))
            cases.append(M("int4", 128, m=1, n=1024, k=11008))  # it: n=4096
            cases.append(M("int4", 16, m=1, n=11008, k=1024))  # it: k=4096
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
    names = ("int2", "int4", "int8", "mxfp4", "nvfp4", "fp8_e4m3", "codebook4")
    cases: list[Case] = []
    for index, name in enumerate(names):
        for layer, tokens in zip(layers, ((2, 3), (7, 12), (5, 16)), strict=True):
            options = {"dtype": HALF_TYPES[index % 2], "hidden": 64, "inter": 64, **layer}
            cases += [Q(name, tokens=t, **options).fitted() for t in tokens]  # type: ignore[arg-type]
        cases.append(Q(name, dtype="float16", tokens=30, experts=8, k=2, router="one_expert"))
        cases.append(Q(name, dtype="bfloat16", tokens=30, experts=8, k=3, router="ties"))
        cases.append(Q(name, dtype="float16", tokens=0))
        # The other way round, with activations quantised to 8 bits where the format has that.
        if name == "mxfp4":
            quantised = {"quant_type": "wfp4afp8", "hidden": 64, "inter": 64}
            for layer, tokens in zip(layers, (2, 7, 16), strict=True):
                options = {"dtype": "float16", **quantised, **layer}
                cases.append(Q(name, tokens=tokens, **options))  # type: ignore[arg-type]
    for layer, dtype in zip(layers, ("float32", *HALF_TYPES), strict=True):
        sizes = {"hidden": 64, "inter": 64, "tokens": 7}
        moe = {name: value for name, value in layer.items() if name != "router_weights"}
        cases.append(X(dtype, **sizes, **moe))  # type: ignore[arg-type]
    return Group("gaps", dict.fromkeys(("float32", *HALF_TYPES), 0.1), cases)


GROUPS = [
    qmoe_cuda(),
    moe_cuda(),
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
    if not result.size:
        return
    allowed = group.atol[case.dtype] * np.sqrt((case.expected(tensors) ** 2).mean())
    tighter = TIGHTER_INT8 if rounds_to_int8(case, device) else TIGHTER
    assert error_of(case, tensors, result) <= allowed / tighter
    if tighter != TIGHTER:
        exact = dataclasses.replace(case, accuracy_level=0)
        assert error_of(exact, *run_case(exact, device)) <= allowed / TIGHTER
    if device == "cpu" and stock_means_the_same(case):
        model = case.model(tensors, STOCK_DOMAIN)
        stock = run(open_session(model, register=False), feeds_of(tensors))
        assert np.abs(stock.astype(np.float64) - result).max() <= allowed


def error_of(case: Case, tensors: Tensors, result: np.ndarray) -> float:
    """The largest error, beside the one rounding of the result to its type."""
    expected = case.expected(tensors)
    error = np.abs(result.astype(np.float64) - expected)
    return float((error - UNIT_ROUNDOFF[case.dtype] * np.abs(expected)).max())


def rounds_to_int8(case: Case, device: str) -> bool:
    """Whether activations may be rounded as onnxruntime rounds them, with errors like its own."""
    return device == "cpu" and case.accuracy_level == 4


def stock_means_the_same(case: Case) -> bool:
    """Whether the stock CPU op takes the case, and differs in rounding at most."""
    if isinstance(case, MatMulNBitsCase):
        typed = case.zero_points == "typed"  # which it has no kernel for beside 8 bits
        runs = case.dtype != "bfloat16" and not (typed and case.format == "int8")
        return runs and case.format.startswith("int")
    if case.activation in GATED and case.fusion != 1:
        return False
    if isinstance(case, MoECase):
        return case.dtype == "float32" and not case.sparse_mixer
    rounds = case.format == "int8" and case.block_size  # activations, to 8 bits
    return (
        case.format.startswith("int")
        and not rounds
        and case.fc2_format is None
        and case.dtype != "bfloat16"
        and case.normalize
        and case.router != "ties"
    )
