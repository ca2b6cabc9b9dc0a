"""MoE, which has float weights: against the oracle, beside the stock op, and in both domains."""

# ruff: noqa: E501  (one line a case reads as a table)
from __future__ import annotations

import copy
import dataclasses
import functools

import numpy as np
import pytest
from helpers.bad import REMOVE, Bad, add, drop, id_of, put, to
from helpers.cases import ACTIVATIONS, GATED, feeds_of
from helpers.dtypes import FLOAT_DTYPES
from helpers.models import STOCK_DOMAIN, save_external
from helpers.moe_cases import MoECase
from helpers.run import bits_of, open_session, run, run_case
from helpers.tolerance import check, error_scale, tolerance

import qmoe_plugin

pytestmark = pytest.mark.usefixtures("library")

Case = MoECase


def verify(*cases: MoECase, device: str) -> None:
    for case in cases:
        tensors, result = run_case(case, device)
        check(case, tensors, result)


@pytest.mark.parametrize("weights", FLOAT_DTYPES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_types(dtype: str, weights: str, device: str) -> None:
    """com.microsoft wants one type for all; ours take any weights beside any activations."""
    common = {"dtype": dtype, "weights": weights}
    verify(
        Case(**common),
        Case(**common, tokens=40, hidden=200, inter=136, bias=False),
        Case(**common, tokens=19, fusion=0, fc3=True, router_dtype="float32"),
        device=device,
    )


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str, dtype: str, device: str) -> None:
    common = {"dtype": dtype, "activation": activation, "tokens": 6}
    cases = [
        Case(**common, fusion=fusion) for fusion in ((0, 1, 2) if activation in GATED else (0,))
    ]
    if activation in (*GATED, "silu"):
        cases.append(Case(**common, fusion=0, fc3=True))
    if activation == "swiglu":
        limited = Case(**common, alpha=1.702, beta=1.0, limit=0.7)
        after = dataclasses.replace(limited, limit_after=True)
        cases += [limited, after, dataclasses.replace(after, tokens=70, fusion=2)]
    verify(*cases, device=device)


@pytest.mark.parametrize(
    ("hidden", "inter"), [(1, 1), (3, 130), (37, 21), (63, 65), (130, 3), (256, 512), (720, 360)]
)
def test_any_size(hidden: int, inter: int, device: str) -> None:
    """Float weights have no blocks, so no size is odd."""
    for dtype in FLOAT_DTYPES:
        common = {"dtype": dtype, "hidden": hidden, "inter": inter}
        verify(Case(**common, tokens=1), Case(**common, tokens=50), device=device)


@pytest.mark.parametrize("tokens", [0, 1, 2, 7, 33, 300])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_tokens(dtype: str, tokens: int, device: str) -> None:
    verify(Case(dtype=dtype, tokens=tokens, experts=8, k=3), device=device)


@pytest.mark.parametrize(
    "case",
    [
        Case(experts=1, k=1),
        Case(experts=60, k=6, tokens=9),
        Case(k=4, normalize=False),
        Case(router="ties", experts=8, tokens=30),
        Case(router="equal", experts=8),
        Case(router="one_expert", experts=8, tokens=70),
        Case(router="masked", experts=16, k=3),
        Case(sparse_mixer=True, experts=8, tokens=9),
        Case(rank=3, router_rank=3, tokens=4),
        Case(experts=5, shared=2, tokens=9),
        Case(experts=5, shared=1, tokens=2, normalize=False),
        Case(seed=1),
    ],
    ids=str,
)
def test_routing(case: MoECase, device: str) -> None:
    verify(case, device=device)


AGREEMENTS = [
    Case(),
    Case(tokens=40, experts=8),
    Case(activation="relu", fusion=0),
    Case(activation="silu", fusion=0),
    Case(activation="identity", fusion=0),
    Case(alpha=1.702, beta=1.0, limit=0.7),
    Case(normalize=False),
    Case(router="masked", experts=8, k=3),
    Case(rank=3, tokens=4),
    Case(hidden=37, inter=21, bias=False),
    Case(tokens=0),
]


@pytest.mark.parametrize("case", AGREEMENTS, ids=str)
def test_beside_the_stock_op(case: MoECase) -> None:
    """Where the CPU op of onnxruntime runs the node, the two agree."""
    tensors, ours = run_case(case, "cpu")
    session = open_session(case.model(tensors, STOCK_DOMAIN), register=False)
    stock = run(session, feeds_of(tensors))
    assert stock.shape == ours.shape
    allowed = 2 * tolerance(case) * error_scale(case, tensors) if ours.size else 0.0
    assert (np.abs(stock.astype(np.float64) - ours) <= allowed).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("activation", ["swiglu", "silu", "relu"])
def test_beside_the_stock_op_on_the_gpu(activation: str, dtype: str, cuda: None) -> None:
    fusion = 1 if activation == "swiglu" else 0
    case = Case(dtype=dtype, hidden=128, inter=256, tokens=9, activation=activation, fusion=fusion)
    tensors, ours = run_case(case, "cuda")
    session = open_session(case.model(tensors, STOCK_DOMAIN), "cuda", register=False)
    stock = run(session, feeds_of(tensors)).astype(np.float64)
    allowed = 2 * tolerance(case) * error_scale(case, tensors)
    assert (np.abs(stock - ours.astype(np.float64)) <= allowed).all()


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_retarget_and_back(dtype: str) -> None:
    case = Case(dtype=dtype, experts=5, shared=1)
    tensors = case.tensors()
    model = case.model(tensors, STOCK_DOMAIN)
    before = copy.deepcopy(model)
    (moved,) = qmoe_plugin.retarget(model, sm=0).moved
    assert {choice.kernel.split(".")[1] for choice in moved.kernels} == {dtype}
    assert model.graph.node[0].domain == "qmoe_plugin"
    check(case, tensors, run(open_session(model), feeds_of(tensors)))
    qmoe_plugin.unretarget(model)
    assert model == before


def test_weights_in_a_file(tmp_path, device: str) -> None:
    case = Case(dtype="float16", hidden=128, inter=256)
    tensors = case.tensors()
    path = save_external(case.model(tensors), tmp_path)
    check(case, tensors, run(open_session(path, device), feeds_of(tensors)))


def test_same_bits_every_time(device: str) -> None:
    case = Case(dtype="float16", tokens=50, experts=8, k=4)
    tensors, first = run_case(case, device)
    for threads in (1, 2):
        session = open_session(case.model(tensors), device, threads=threads)
        for _ in range(2):
            assert bits_of(run(session, feeds_of(tensors))) == bits_of(first)


W1, W2, W3 = (f"fc{i}_experts_weights" for i in (1, 2, 3))
FC3 = Case(fusion=0, fc3=True)
# E 4, H 64, I 96: W1 [4, 192, 64], W2 [4, 64, 96], W3 [4, 96, 64].
B = functools.partial(Bad, case=Case())
BAD = [
    B("bytes as weights", r"uint8.*float32, float16 or bfloat16.*for QMoE", change=to(W1, lambda w: w.astype(np.uint8))),
    B("weights of rank 2", r"input 2 .*\[768, 64\]; it must be", change=to(W1, lambda w: w.reshape(768, 64))),
    B("fc2 transposed", r"fc2 holds 4 x 96 x 64 weights; this node needs 4 x 64 x 96", change=to(W2, lambda w: np.swapaxes(w, 1, 2).copy())),
    B("fc2 of other experts", r"fc2 holds 3 x", change=to(W2, lambda w: w[:3])),
    B("odd rows", r"\[4, 191, 64\]; gates and ups together must be an even number", change=to(W1, lambda w: w[:, :-1])),
    B("empty weights", r"\[0, 192, 64\]; no dimension may be 0", change=to(W1, lambda w: w[:0])),
    B("weight NaN", r"fc1 weight of expert 0, row 0, column 5 is nan; weights must be finite", change=put(W1, float("nan"))),
    B("weight infinite", r"fc2 weight .* is -inf", case=Case(dtype="float16"), change=put(W2, -float("inf"))),
    B("weight infinite, bfloat16", r"fc2 weight .* is inf", case=Case(dtype="bfloat16"), change=put(W2, float("inf"))),
    B("bias of another size", r"fc2 bias is float32\[4, 63\]", change=to("fc2_experts_bias", lambda b: b[:, :-1])),
    B("fc3 bias alone", r"bias of fc3 is given without fc3_experts_weights", case=FC3, change=drop(W3)),
    B("fc3 of another type", r"must have the same format", case=FC3, change=to(W3, lambda w: w.astype(np.float16))),
    B("fc3 of another size", r"fc3 holds 4 x 95 x 64", case=FC3, change=to(W3, lambda w: w[:, :-1])),
    B("fc3 and fusion", r"swiglu_fusion is 1, which says", change=add(W3, np.zeros((4, 96, 64), np.float32))),
    B("gelu with fc3", r"no gated form", case=FC3, attributes={"activation_type": "gelu", "swiglu_fusion": REMOVE}),
    B("weights fed", r"input 4 \(fc2_experts_weights\) is not constant", feed=(W2,)),
    B("k too large", r"k is 5; it must be from 1 to the number of experts, 4", attributes={"k": 5}),
    B("flag", r"normalize_routing_weights is 2; it must be 0 or 1", attributes={"normalize_routing_weights": 2}),
    B("sparse mixer", r"use_sparse_mixer=1 needs k=2, not k=1", attributes={"use_sparse_mixer": 1, "k": 1}),
    B("router of other experts", r"router_probs\) has shape \[3, 5\]; it must be \[tokens, experts\] = \[3, 4\]", change=add("router_probs", np.zeros((3, 5), np.float32)), at_run=True),
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD, ids=id_of)
def test_bad_nodes(bad: Bad, device: str) -> None:
    bad.check(device)
