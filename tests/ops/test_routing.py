"""QMoE's routing against the oracle: experts, ties, masks, router weights, the sparse mixer."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from helpers.cases import QMoECase, feeds_of
from helpers.dtypes import FLOAT_DTYPES
from helpers.run import bits_of, open_session, run, run_case
from helpers.tolerance import check

pytestmark = pytest.mark.usefixtures("library")

Case = QMoECase


def verify(case: QMoECase, *, device: str) -> None:
    tensors, result = run_case(case, device)
    check(case, tensors, result)


@pytest.mark.parametrize(
    ("experts", "k"),
    [(1, 1), (3, 1), (3, 3), (8, 8), (60, 4), (60, 60), (160, 6), (384, 8), (384, 10), (1024, 70)],
)
@pytest.mark.parametrize("normalize", [False, True])
def test_experts(experts: int, k: int, normalize: bool, device: str) -> None:
    for tokens, dtype in ((1, "float16"), (5, "float32"), (40, "bfloat16")):
        verify(
            Case(
                dtype=dtype,
                hidden=32,
                inter=32,
                experts=experts,
                k=k,
                tokens=tokens,
                normalize=normalize,
            ),
            device=device,
        )


ROUTERS = ["random", "ties", "equal", "one_expert", "masked", "few", "log_sigmoid", "far"]


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("router_weights", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_routing(router: str, router_weights: bool, normalize: bool, device: str) -> None:
    for experts, k, tokens in ((8, 3, 30), (60, 4, 1), (160, 6, 12)):
        verify(
            Case(
                hidden=32,
                inter=32,
                experts=experts,
                k=k,
                tokens=tokens,
                router=router,
                router_weights=router_weights,
                normalize=normalize,
            ),
            device=device,
        )


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_one_token(dtype: str, router: str, device: str) -> None:
    """The GPU routes a single token by itself, and adds up its experts in fc2."""
    mixer = router != "few"  # the sparse mixer makes NaN of a single finite logit
    for options in (
        {"experts": 1, "k": 1, "hidden": 48, "inter": 32},
        {"experts": 8, "k": 2, "hidden": 208, "inter": 336, "sparse_mixer": mixer},
        {"experts": 33, "k": 5, "hidden": 1008, "inter": 80, "shared": 1},
        {"experts": 64, "k": 64, "hidden": 32, "inter": 16},
        {"experts": 256, "k": 8, "hidden": 96, "inter": 64, "router_dtype": "float32"},
    ):
        verify(Case(dtype=dtype, router=router, tokens=1, block_size=16, **options), device=device)


def test_one_token_after_another(device: str) -> None:
    """What one run leaves behind does not show in the next."""
    case = Case(dtype="float16", experts=32, k=4, hidden=736, inter=352, tokens=1)
    session = open_session(case.model(case.tensors()), device)
    rng = np.random.default_rng(case.seed)
    inputs = []
    for _ in range(3):
        tensors = case.tensors()
        for name in ("input", "router_probs"):
            tensors[name] = rng.standard_normal(tensors[name].shape).astype(np.float16)
        inputs.append(tensors)
    results = [run(session, feeds_of(tensors)) for tensors in inputs * 5]
    for index, result in enumerate(results):
        check(case, inputs[index % 3], result)
        assert bits_of(result) == bits_of(results[index % 3])


@pytest.mark.parametrize("router", ["ties", "one_expert"])
@pytest.mark.parametrize(
    ("experts", "k", "tokens"), [(40, 4, 129), (60, 6, 700), (300, 3, 2100), (5, 2, 4500)]
)
def test_many_tokens(experts: int, k: int, tokens: int, router: str, device: str) -> None:
    """Blocks of the GPU's kernels have several tokens, in several rounds."""
    sizes = {"hidden": 32, "inter": 16, "block_size": 16}
    case = Case(**sizes, dtype="float16", experts=experts, k=k, tokens=tokens, router=router)
    verify(case, device=device)


@pytest.mark.parametrize("router_dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_router_type_and_rank(dtype: str, router_dtype: str, device: str) -> None:
    """The router's inputs may have a type and a rank of their own."""
    for rank, router_rank, weights in itertools.product((2, 3), (2, 3), (False, True)):
        verify(
            Case(
                dtype=dtype,
                router_dtype=router_dtype,
                rank=rank,
                router_rank=router_rank,
                router_weights=weights,
                tokens=6,
            ),
            device=device,
        )


def test_router_weights_may_have_another_type_than_router_probs(device: str) -> None:
    case = Case(dtype="float16", router_weights=True, tokens=5)
    tensors = case.tensors()
    tensors["router_weights"] = tensors["router_weights"].astype(np.float32)
    check(case, tensors, run(open_session(case.model(tensors), device), feeds_of(tensors)))


def test_nan_logits_come_last(device: str) -> None:
    for experts, k, tokens in ((8, 3, 30), (8, 8, 5), (60, 10, 4), (160, 6, 3)):
        verify(
            Case(
                hidden=32,
                inter=32,
                experts=experts,
                k=k,
                tokens=tokens,
                router="nan",
                router_weights=True,
            ),
            device=device,
        )


@pytest.mark.parametrize("weight", [0.0, 3e-8, 1e-3, -0.5])
def test_normalising_tiny_and_negative_sums(weight: float, device: str) -> None:
    """A sum of at most 1e-6 is not divided by."""
    case = Case(router_weights=True, normalize=True, tokens=4)
    tensors = case.tensors()
    tensors["router_weights"] = np.full_like(tensors["router_weights"], weight)
    check(case, tensors, run(open_session(case.model(tensors), device), feeds_of(tensors)))


@pytest.mark.parametrize("router_dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("experts", [2, 3, 8, 16, 60])
def test_sparse_mixer(experts: int, router_dtype: str, device: str) -> None:
    for router, tokens in (("random", 50), ("ties", 20), ("equal", 3)):
        case = Case(
            sparse_mixer=True,
            experts=experts,
            router_dtype=router_dtype,
            router=router,
            tokens=tokens,
            hidden=32,
            inter=32,
        )
        tensors = case.tensors()
        if router == "random":
            # Some logits within 2 % of the largest, none near the 2 % itself, where float32 may
            # decide otherwise.
            logits = tensors["router_probs"].astype(np.float64)
            top = np.abs(logits).max(axis=-1, keepdims=True)
            near = np.random.default_rng(experts).choice([1.0, 0.99, 0.97, 0.5, -1.0], logits.shape)
            tensors["router_probs"] = (top * near).astype(tensors["router_probs"].dtype)
        check(case, tensors, run(open_session(case.model(tensors), device), feeds_of(tensors)))


@pytest.mark.parametrize("normalize", [False, True])
def test_sparse_mixer_with_router_weights(normalize: bool, device: str) -> None:
    """The router weights are the factors, as without the mixer."""
    verify(
        Case(sparse_mixer=True, router_weights=True, normalize=normalize, experts=8, tokens=20),
        device=device,
    )


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize(("experts", "k", "shared"), [(2, 1, 1), (5, 2, 2), (5, 4, 1), (60, 6, 3)])
def test_shared_experts(experts: int, k: int, shared: int, dtype: str, device: str) -> None:
    common = {"experts": experts, "k": k, "shared": shared, "dtype": dtype, "hidden": 32}
    for options in (
        {"tokens": 1},
        {"tokens": 40, "normalize": False},
        {"tokens": 7, "router_weights": True, "router_dtype": "float32", "inter": 32},
        {"tokens": 12, "router": "ties"},
        {"tokens": 0},
    ):
        verify(Case(**common, **options), device=device)


def test_shared_experts_beside_the_sparse_mixer(device: str) -> None:
    verify(Case(sparse_mixer=True, experts=9, shared=1, router="ties", tokens=20), device=device)


def test_shared_experts_with_formats_and_layouts(device: str) -> None:
    common = {"experts": 6, "shared": 2, "tokens": 9}
    verify(Case("int8", layout="fpa_intb", hidden=128, inter=64, **common), device=device)
    verify(Case("nvfp4", fusion=2, **common).fitted(), device=device)
    verify(Case("mxfp4", quant_type="wfp4afp8", act_scales="experts", **common), device=device)


@pytest.mark.parametrize("gate", [-np.inf, -30.0, 0.0, 30.0, np.inf])
def test_gates_of_shared_experts(gate: float, device: str) -> None:
    """A gate neither takes part in the choice of routed experts nor in their softmax."""
    case = Case(experts=5, shared=1, tokens=6)
    tensors = case.tensors()
    tensors["router_probs"][:, -1] = gate
    check(case, tensors, run(open_session(case.model(tensors), device), feeds_of(tensors)))
