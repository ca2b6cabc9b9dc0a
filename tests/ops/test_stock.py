"""Our ops beside the stock ops of com.microsoft: equal where those are right, else listed.

Every entry of DISAGREEMENTS was executed on the releases that it says it holds on: of 1.31.1 and
1.32.0 on the CPU, 1.31.1 on CUDA. One that no longer holds fails its test: then stock has changed,
and the entry, and perhaps docs/semantics.md, must change too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import onnxruntime as ort
import pytest
from helpers.cases import Case, MatMulNBitsCase, QMoECase, Tensors, feeds_of
from helpers.models import DOMAIN, STOCK_DOMAIN, one_node_model
from helpers.run import open_session, run
from helpers.tolerance import check, error_scale, tolerance

pytestmark = pytest.mark.usefixtures("library")

M, Q = MatMulNBitsCase, QMoECase
RELEASE = tuple(int(part) for part in ort.__version__.split(".")[:2])
# Int4 as com.microsoft's CUDA kernels want it, which the CPU op of 1.32 takes too.
PREPACKED = {"layout": "fpa_intb", "hidden": 128, "inter": 256}


def stock_result(case: Case, tensors: Tensors, device: str, **attributes: object) -> np.ndarray:
    """What the stock op makes of a case; `attributes` replace some of the node's."""
    merged = {**case.attributes(), **attributes}
    merged.pop("weights_layout", None)  # ours
    model = one_node_model(case.op_type, case.stored(tensors), merged, domain=STOCK_DOMAIN)
    return run(open_session(model, device, register=False), feeds_of(tensors))


AGREEMENTS = [
    Q(),
    Q(zero_points=True),
    Q(block_size=16, hidden=48, inter=80),
    Q(block_size=64, hidden=128, inter=192, zero_points=True),
    Q(block_size=128, hidden=128, inter=128),
    Q(block_size=256, hidden=256, inter=256),
    Q(block_size=0),
    Q(block_size=0, zero_points=True),
    Q(block_size=0, trailing_group_axis=True),
    Q("int8", 0),
    Q("int8", 0, zero_points=True),
    Q(dtype="float16"),
    Q(dtype="float16", block_size=0),
    Q(scale_dtype="float16"),
    Q(dtype="float16", scale_dtype="float32"),
    Q(normalize=False, k=4),  # all experts: softmax over the selected is softmax over all
    Q(router_weights=True),
    Q(router_weights=True, normalize=False),
    Q(router="masked", experts=8, k=3),
    Q(router="one_expert"),
    Q(router="far", router_weights=True, experts=8),
    Q(experts=60, k=4),
    Q(experts=384, k=8, hidden=32, inter=32),
    Q(alpha=1.702, beta=1.0, limit=0.5),
    Q(activation="silu", fusion=0),
    Q(activation="relu", fusion=0),
    Q(activation="identity", fusion=0),
    Q(rank=3, tokens=4),
    Q(tokens=0),
    Q(tokens=40, experts=8),
    Q(accuracy_level=4, hidden=256, inter=256),
    M(),
    M("int8"),
    M(dtype="float16"),
    M(zero_points="packed"),
    M(zero_points="typed"),
    M(dtype="float16", zero_points="typed"),
    M(zero_points="packed", flat=True),
    M(k=93),
    M(block_size=256, k=300),
    M(g_idx="shuffled"),
    M(g_idx="uneven"),
    M(g_idx="shuffled", zero_points="typed"),
    M(rank=1, m=1),
    M(rank=3, m=4),
    M(m=0),
    M(accuracy_level=4, k=256),
    M(n=32, k=2880),
]
AGREEMENTS_OF_1_32 = [
    *[Q(dtype=dtype, **PREPACKED) for dtype in ("float32", "float16", "bfloat16")],
    *[Q(block_size=block_size, **PREPACKED) for block_size in (64, 128)],
    Q(tokens=40, experts=8, k=3, bias=False, **PREPACKED),
    Q(alpha=1.702, beta=1.0, limit=0.5, **PREPACKED),
    Q(normalize=False, **PREPACKED),
    Q(normalize=False, router_weights=True, **PREPACKED),
    Q(router="ties", experts=8, k=3, tokens=30, **PREPACKED),
    M(block_size=1024, n=24, k=3000),
    M("int8", block_size=512, n=24, k=3000),
    M(block_size=1024, n=24, k=3000, zero_points="packed"),
]


def id_of(case: Case) -> str:
    return f"{case.op_type}-{case}"


def since(release: tuple[int, int]) -> pytest.MarkDecorator:
    reason = f"onnxruntime {ort.__version__} has it not yet"
    return pytest.mark.skipif(release > RELEASE, reason=reason)


@pytest.mark.parametrize(
    "case",
    AGREEMENTS + [pytest.param(case, marks=since((1, 32))) for case in AGREEMENTS_OF_1_32],
    ids=id_of,
)
def test_equal_on_the_cpu(case: Case) -> None:
    """Both within the oracle's tolerance."""
    tensors = case.tensors()
    check(case, tensors, stock_result(case, tensors, "cpu"))
    check(case, tensors, run(open_session(case.model(tensors)), feeds_of(tensors)))


CUDA_AGREEMENTS = (
    [  # the stock CUDA op takes float16 and bfloat16 only, and sizes that are multiples of 64
        Q(dtype=dtype, tokens=tokens, experts=8, k=3, **{"hidden": 128, "inter": 192, **options})
        for dtype in ("float16", "bfloat16")
        for tokens in (1, 5, 40)
        for options in (
            {},
            {"block_size": 64, "zero_points": True, "inter": 256},
            {"format": "int8"},
            {"normalize": False},
            {"router": "ties"},
            {"fusion": 2},
            {"fusion": 0},
            {"activation": "silu", "fusion": 0},
        )
    ]
    + [
        M(dtype=dtype, m=m, n=128, k=256, **options)
        for dtype in ("float16", "bfloat16")
        for m in (1, 7, 64)
        for options in ({}, {"format": "int8"}, {"zero_points": "packed"}, {"zero_points": "typed"})
    ]
    + [
        Q(name, dtype=dtype, layout=layout, hidden=128, inter=192, experts=8, k=3, **options)
        for name, layout in (
            ("int4", "fpa_intb"),
            ("int8", "fpa_intb"),
            ("mxfp4", "k_major"),
            ("nvfp4", "k_major"),
        )
        for dtype in ("float16", "bfloat16")
        for options in (
            {"tokens": 1},
            {"tokens": 40},
            {"tokens": 5, "activation": "silu", "fusion": 0},
            {"tokens": 5, "bias": False, "signs": False, "alpha": 1.702, "beta": 1.0, "limit": 7.0},
        )
    ]
    + [
        Q(one, dtype="float16", hidden=128, inter=192, experts=8, k=3, tokens=t, fc2_format=other)
        for one, other in (("int2", "int2"), ("int2", "int4"), ("int4", "int2"))
        for t in (1, 20)
    ]
    + [
        M(name, dtype=dtype, layout="fpa_intb", m=m, n=128, k=256, bias=False)
        for name in ("int4", "int8")
        for dtype in ("float16", "bfloat16")
        for m in (1, 40)
    ]
)


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("case", CUDA_AGREEMENTS, ids=id_of)
def test_equal_on_the_gpu(case: Case) -> None:
    """Ours within tolerance; stock within a larger one, as its GEMV accumulates in float16."""
    tensors = case.tensors()
    check(case, tensors, run(open_session(case.model(tensors), "cuda"), feeds_of(tensors)))
    stock = stock_result(case, tensors, "cuda").astype(np.float64)
    allowed = max(2e-2, tolerance(case)) * error_scale(case, tensors)
    assert (np.abs(stock - case.expected(tensors)) <= allowed).all()


def _tiny_router_weights(tensors: Tensors) -> None:
    tensors["router_weights"][:] = 3e-8


@dataclass(frozen=True)
class Disagreement:
    """A case in which the stock op is not what our op and the oracle are.

    Attributes:
        name: What it is about.
        reason: Why we do not follow.
        case: The node.
        refuses: Part of the stock op's error message; empty if it runs and gives another result.
        least: How wrong it must be at least, in units of the result's rms.
        device: Where stock was seen to do so.
        attributes: Attributes of the stock node that differ from the case's.
        we_refuse: Part of our error message with the same attributes; empty if we run it.
        change: Changes the tensors before both run.
        since: The release of onnxruntime that brought it.
        before: The release that no longer has it.
    """

    name: str
    reason: str
    case: Case
    refuses: str = ""
    least: float = 0.05
    device: str = "cpu"
    attributes: dict[str, object] = field(default_factory=dict)
    we_refuse: str = ""
    change: Callable[[Tensors], None] = lambda tensors: None
    since: tuple[int, int] = (1, 24)
    before: tuple[int, int] = (2, 0)


DISAGREEMENTS = [
    Disagreement(
        "normalize=0",
        "the CPU op still takes softmax over the selected experts; CUDA and the MoE op over all",
        Q(normalize=False),
    ),
    Disagreement(
        "ties",
        "on the CPU op the higher index wins; on CUDA, as its contract, the lower",
        Q(router="ties", experts=8, k=3, tokens=30),
    ),
    Disagreement(
        "use_sparse_mixer",
        "the QMoE ops ignore it; CUDA's MoE op implements it",
        Q(sparse_mixer=True),
    ),
    Disagreement(
        "gelu",
        "the CPU op takes the tanh approximation; CUDA the error function",
        Q(activation="gelu", fusion=0, tokens=20),
        least=2e-4,
    ),
    Disagreement(
        "int8 in blocks",
        "the CPU op quantises activations to int8 whatever accuracy_level says",
        Q("int8"),
        least=5e-3,
    ),
    Disagreement(
        "tiny router_weights",
        "the CPU op divides by any sum; we by sums above 1e-6, as CUDA does with probabilities",
        Q(router_weights=True),
        change=_tiny_router_weights,
    ),
    Disagreement(
        "g_idx with packed zero points",
        "the CPU op ignores the zero points then; with typed ones it does not",
        M(g_idx="shuffled", zero_points="packed"),
    ),
    Disagreement(
        "weights_prepacked=1",
        "the CPU op ignores it and reads prepacked bytes as raw ones",
        Q(),
        least=-1.0,  # it runs; the weights of the case are raw, so the result is even right
        attributes={"weights_prepacked": 1},
        we_refuse="prepacked",
        before=(1, 32),
    ),
    Disagreement(
        "quant_type",
        "the CPU op ignores it and runs FP4 codes as integers",
        Q(),
        least=-1.0,
        attributes={"quant_type": "fp4"},
        we_refuse="quant_type",
    ),
    Disagreement("swiglu_fusion=0", "not in the CPU op", Q(fusion=0), refuses="interleaved"),
    Disagreement("swiglu_fusion=2", "not in the CPU op", Q(fusion=2), refuses="interleaved"),
    Disagreement(
        "swiglu with fc3", "not in the CPU op", Q(fusion=0, fc3=True), refuses="interleaved"
    ),
    Disagreement(
        "silu with fc3",
        "not in the CPU op",
        Q(activation="silu", fusion=0, fc3=True),
        refuses="FC3 gating is not yet implemented",
    ),
    Disagreement(
        "geglu", "in no stock op", Q(activation="geglu"), refuses="Unsupported MoE activation type"
    ),
    Disagreement(
        "bfloat16",
        "not in the CPU op; since 1.32, in prepacked int4 only",
        Q(dtype="bfloat16"),
        refuses="Could not find an implementation|bfloat16 QMoE requires a shared layout",
    ),
    Disagreement(
        "bfloat16 MatMulNBits",
        "not in the CPU op",
        M(dtype="bfloat16"),
        refuses="Could not find an implementation",
    ),
    Disagreement(
        "router of another type",
        "the schema ties the router's type to the activations'",
        Q(dtype="float16", router_dtype="float32"),
        refuses="bound to different types",
    ),
    Disagreement(
        "router of rank 3",
        "the CPU op wants two dimensions",
        Q(rank=3, router_rank=3, tokens=4),
        refuses="expected to have 2 dimensions",
    ),
    Disagreement(
        "fc1 and fc2 of different width",
        "not in the CPU op",
        Q(fc2_format="int8"),
        refuses="Mixed-width",
    ),
    Disagreement(
        "scales of another type",
        "the schema of MatMulNBits ties them to the activations'",
        M(dtype="float16", scale_dtype="float32"),
        refuses="bound to different types",
    ),
    Disagreement(
        "zero points one byte a block",
        "stock takes packed bytes or the activations' type",
        M(zero_points="bytes"),
        refuses="zero_points",
    ),
    Disagreement(
        "blocks longer than 256",
        "not in stock",
        M(block_size=1024, n=24, k=3000),
        refuses="block_size",
        before=(1, 32),
    ),
    Disagreement(
        "router_weights on CUDA",
        "the CUDA op never reads the input",
        Q(dtype="float16", hidden=128, inter=128, router_weights=True),
        device="cuda",
    ),
    Disagreement(
        "use_sparse_mixer on CUDA",
        "CUDA's QMoE never calls the sparse mixer",
        Q(dtype="float16", hidden=128, inter=128, experts=8, sparse_mixer=True),
        device="cuda",
    ),
    Disagreement(
        "odd number of zero points a row on CUDA",
        "the CUDA op reads them as if no row ended with half a byte",
        Q(dtype="float16", hidden=128, inter=192, block_size=64, zero_points=True),
        device="cuda",
    ),
    Disagreement(
        "float32 on CUDA",
        "there is no such kernel",
        Q(hidden=128, inter=128),
        refuses=".",
        device="cuda",
    ),
    *[
        Disagreement(
            f"{name} on CUDA",
            "the released wheel is built without it",
            Q(fmt, dtype="float16", hidden=128, inter=128, quant_type=quant_type),
            refuses="USE_FP8_QMOE",
            device="cuda",
        )
        for name, fmt, quant_type in (("fp8", "fp8_e4m3", None), ("wfp4afp8", "mxfp4", "wfp4afp8"))
    ],
    Disagreement(
        "prepacked weights on the CPU",
        "the CPU op reads them as raw ones",
        Q(activation="silu", fusion=0, **PREPACKED),
        before=(1, 32),
    ),
    Disagreement(
        "prepacked int8 on the CPU",
        "the CPU op still reads them as raw ones",
        Q("int8", **PREPACKED),
    ),
    *[
        Disagreement(
            f"prepacked int4 with {name} on the CPU",
            "the CPU op has it for raw weights only",
            Q(**{**PREPACKED, **options}),
            refuses=f"Shared CPU QMoE {refuses}",
            since=(1, 32),
        )
        for name, options, refuses in (
            ("silu", {"activation": "silu", "fusion": 0}, "requires interleaved SwiGLU"),
            ("zero points", {"zero_points": True}, "does not support .* zero points"),
            ("blocks of 16", {"block_size": 16}, "requires block_size 32, 64, or 128"),
            ("a scale a row", {"block_size": 0}, "requires block_size 32, 64, or 128"),
        )
    ],
    Disagreement(
        "prepacked int4 with router_weights on the CPU",
        "the CPU op does not divide them by their sum",
        Q(router_weights=True, **PREPACKED),
        since=(1, 32),
    ),
    Disagreement(
        "swiglu_limit_after_activation",
        "not in the CPU op; on CUDA with int4, int8 and fp8 in blocks only",
        Q(limit=0.5, limit_after=True),
        refuses="swiglu_limit_after_activation",
    ),
    Disagreement(
        "int2",
        "the CPU op quantises activations to int8",
        Q("int2", block_size=32, hidden=128, inter=128),
        least=5e-4,
    ),
    Disagreement(
        "hidden_size 96 on CUDA",
        "the CUDA op wants multiples of 64",
        Q(dtype="float16", hidden=96, inter=128),
        refuses="multiple",
        device="cuda",
    ),
    Disagreement(
        "swiglu with fc3 on CUDA",
        "the CUDA op takes fc3 with FP8 only",
        Q(dtype="float16", hidden=128, inter=128, fusion=0, fc3=True),
        refuses=".",
        device="cuda",
    ),
]


@pytest.mark.parametrize(
    "entry",
    [pytest.param(e, marks=[pytest.mark.gpu] if e.device == "cuda" else []) for e in DISAGREEMENTS],
    ids=lambda entry: entry.name.replace(" ", "_"),
)
def test_known_disagreements(entry: Disagreement, request: pytest.FixtureRequest) -> None:
    """Stock still does what the entry says, and ours is right, or refuses if it should."""
    if not entry.since <= RELEASE < entry.before:
        pytest.skip(f"not so in onnxruntime {ort.__version__}")
    if entry.device == "cuda":
        request.getfixturevalue("cuda")
    case = entry.case
    tensors = case.tensors()
    entry.change(tensors)

    if entry.refuses:
        with pytest.raises(Exception, match=entry.refuses):
            stock_result(case, tensors, entry.device, **entry.attributes)
    else:
        expected = case.expected(tensors)
        stock = stock_result(case, tensors, entry.device, **entry.attributes).astype(np.float64)
        error = np.abs(stock - expected).max() / np.sqrt((expected**2).mean())
        assert error > entry.least, (
            f"stock onnxruntime {ort.__version__} has become right: {error:.2g}"
        )

    merged = {**case.attributes(), **entry.attributes}
    model = one_node_model(case.op_type, case.stored(tensors), merged, domain=DOMAIN)
    if entry.we_refuse:
        with pytest.raises(Exception, match=entry.we_refuse):
            open_session(model, entry.device)
    else:
        check(case, tensors, run(open_session(model, entry.device), feeds_of(tensors)))
