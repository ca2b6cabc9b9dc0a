"""MatMulBlockQuantizedFp8Weight and ...Fp4Weight against the oracle, and in both domains."""

# ruff: noqa: E501  (one line a case reads as a table)
from __future__ import annotations

import copy
import functools

import ml_dtypes
import numpy as np
import onnxruntime
import pytest
from helpers.bad import Bad, drop, id_of, put, to
from helpers.block_quantized_cases import Fp4WeightCase, Fp8WeightCase
from helpers.cases import feeds_of
from helpers.dtypes import FLOAT_DTYPES
from helpers.models import STOCK_DOMAIN
from helpers.run import bits_of, open_session, run, run_case
from helpers.tolerance import check

import qmoe_plugin

pytestmark = pytest.mark.usefixtures("library")

Case = Fp8WeightCase | Fp4WeightCase
both = pytest.mark.parametrize("made", [Fp8WeightCase, Fp4WeightCase], ids=["fp8", "fp4"])


def verify(*cases: Case, device: str) -> None:
    for case in cases:
        tensors, result = run_case(case, device)
        check(case, tensors, result)


@both
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("block_size", [None, 16, 32, 128, 1024])
def test_block_sizes(made: type[Case], block_size: int | None, dtype: str, device: str) -> None:
    common = {"dtype": dtype, "block_size": block_size}
    verify(made(**common), made(**common, m=20, n=130, k=400, bias=False), device=device)


@both
@pytest.mark.parametrize(("n", "k"), [(1, 2), (5, 30), (17, 94), (48, 130), (130, 258), (720, 512)])
def test_sizes(made: type[Case], n: int, k: int, device: str) -> None:
    """Partial blocks at the end of rows, too."""
    for dtype in FLOAT_DTYPES:
        verify(made(dtype=dtype, n=n, k=k, m=1), made(dtype=dtype, n=n, k=k, m=33), device=device)


def test_an_odd_number_of_columns(device: str) -> None:
    verify(Fp8WeightCase(k=33), Fp8WeightCase(k=129, a_scale=True, m=20), device=device)


@both
@pytest.mark.parametrize("m", [0, 1, 2, 5, 16, 17, 200])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_rows(made: type[Case], dtype: str, m: int, device: str) -> None:
    verify(made(dtype=dtype, m=m), made(dtype=dtype, m=m, a_scale=True), device=device)


@both
def test_options(made: type[Case], device: str) -> None:
    verify(made(rank=3, m=4), made(bias=False), made(seed=1, a_scale=True, k=256), device=device)


@pytest.mark.parametrize("a_scale", [1e-4, 1.0, 100.0])
def test_scales_of_activations(a_scale: float, device: str) -> None:
    """A saturates at 448 steps, or comes out as zeros and subnormals."""
    case = Fp8WeightCase(dtype="float32", a_scale=True, m=5)
    tensors = case.tensors()
    tensors["a_scale"] = np.array(a_scale, np.float32)
    check(case, tensors, run(open_session(case.model(tensors), device), feeds_of(tensors)))


def test_other_types_and_shapes_of_scales(device: str) -> None:
    fp8, fp4 = Fp8WeightCase(a_scale=True), Fp4WeightCase()
    for case, changes in (
        (fp8, {"a_scale": lambda s: s.reshape(1), "B": lambda b: b.view(np.uint8)}),
        (fp8, {"b_scale": lambda s: s.astype(np.float16)}),
        (Fp8WeightCase(k=64), {"b_scale": lambda s: s.reshape(-1)}),
        (fp4, {"weight_scale": lambda s: s.view(ml_dtypes.float8_e4m3fn)}),
        (fp4, {"weight_scale_2": lambda s: s.reshape(1)}),
    ):
        tensors = case.tensors()
        tensors |= {name: change(tensors[name]) for name, change in changes.items()}
        result = run(open_session(case.model(tensors), device), feeds_of(tensors))
        if tensors.get("b_scale", np.zeros((1, 1))).ndim == 1:  # the oracle wants a matrix
            tensors["b_scale"] = tensors["b_scale"][:, None]
        check(case, tensors, result)


def test_negative_scales(device: str) -> None:
    fp8, fp4 = Fp8WeightCase(), Fp4WeightCase()
    for case, name in ((fp8, "b_scale"), (fp4, "weight_scale_2")):
        tensors = case.tensors()
        tensors[name] = -tensors[name]
        check(case, tensors, run(open_session(case.model(tensors), device), feeds_of(tensors)))


@both
def test_the_output_has_a_known_shape(made: type[Case]) -> None:
    case = made(m=4)
    (output,) = open_session(case.model(case.tensors())).get_outputs()
    assert output.shape[-1] == case.n


@both
def test_same_bits_every_time(made: type[Case], device: str) -> None:
    case = made(m=50, n=200, k=480, a_scale=True)
    tensors, first = run_case(case, device)
    session = open_session(case.model(tensors), device, threads=2)
    assert bits_of(run(session, feeds_of(tensors))) == bits_of(first)


@both
def test_retarget_and_back(made: type[Case]) -> None:
    case = made(a_scale=True)
    tensors = case.tensors()
    model = case.model(tensors, STOCK_DOMAIN)
    before = copy.deepcopy(model)
    (moved,) = qmoe_plugin.retarget(model, sm=0).moved
    assert {choice.kernel.split(".")[1] for choice in moved.kernels} == {case.format}
    check(case, tensors, run(open_session(model), feeds_of(tensors)))
    qmoe_plugin.unretarget(model)
    assert model == before


@both
def test_unmodified_models_run_by_override(made: type[Case]) -> None:
    """onnxruntime's own kernels are for CUDA alone."""
    case = made()
    tensors = case.tensors()
    model = case.model(tensors, STOCK_DOMAIN)
    with pytest.raises(Exception, match=case.op_type):
        open_session(model, register=False)
    options = onnxruntime.SessionOptions()
    qmoe_plugin.register(options, override=True)
    check(case, tensors, run(open_session(model, options=options), feeds_of(tensors)))


B8 = functools.partial(Bad, case=Fp8WeightCase(a_scale=True))
B4 = functools.partial(Bad, case=Fp4WeightCase())
# N 48, K 96.
BAD = [
    B8("B of another type", r"B weights are float16.*uint8 or float8e4m3fn", change=to("B", lambda b: b.astype(np.float16))),
    B8("B of rank 3", r"input 1 \(B\) is .*two dimensions", change=to("B", lambda b: b[None])),
    B8("B empty", r"none of them 0", change=to("B", lambda b: b[:0])),
    B8("weight NaN", r"B weight of expert 0, row 0, column 5 is NaN", change=to("B", lambda b: np.where(np.arange(96) == 5, np.uint8(127), b.view(np.uint8)).view(b.dtype))),
    B8("too few scales", r"B scales have shape \[1, 47, 1\]", change=to("b_scale", lambda s: s[:-1])),
    B8("scales as bytes", r"b_scale\) is uint8.*allowed are float32", change=to("b_scale", lambda s: s.astype(np.uint8))),
    B8("scale NaN", r"scale.*nan; scales must be finite", change=put("b_scale", np.nan)),
    B8("a_scale a vector", r"a_scale\) is float32\[2\]; it must be a float32 scalar", change=to("a_scale", lambda s: np.ones(2, np.float32))),
    B8("a_scale half", r"a_scale\) is float16\[\]; it must be a float32 scalar", change=to("a_scale", lambda s: s.astype(np.float16))),
    B8("a_scale 0", r"scale of activations is 0; it must be positive", change=to("a_scale", lambda s: 0 * s)),
    B8("a_scale infinite", r"scale of activations is inf", change=to("a_scale", lambda s: np.array(np.inf, np.float32))),
    B8("block_size 24", r"block_size is 24; it must be a power of two from 16", attributes={"block_size": 24}),
    B8("bias of another size", r"bias is float16\[47\]; it must be \[48\]", change=to("bias", lambda b: b[:-1])),
    B8("A of another size", r"its last dimension must be K = 96", change=to("A", lambda a: a[:, :-1]), at_run=True),
    B8("B fed", r"input 1 \(B\) is not constant", feed=("B",)),
    B4("B of float8", r"B weights are float8e4m3fn.*must be uint8", change=to("B", lambda b: b.view(ml_dtypes.float8_e4m3fn))),
    B4("float scales", r"weight_scale\) is float32.*uint8, the bytes", change=to("weight_scale", lambda s: s.astype(np.float32))),
    B4("scale NaN", r"scale.*nan", change=put("weight_scale", 127)),
    B4("no weight_scale_2", r"input 3 \(weight_scale_2\) is missing; weights need a factor", change=drop("weight_scale_2")),
    B4("weight_scale_2 a vector", r"weight_scale_2\) is float32\[3\]", change=to("weight_scale_2", lambda s: np.ones(3, np.float32))),
    B4("input_scale a vector", r"input_scale\) is float32\[3\]", case=Fp4WeightCase(a_scale=True), change=to("input_scale", lambda s: np.ones(3, np.float32))),
    B4("weight_scale_2 infinite", r"scales must be finite", change=to("weight_scale_2", lambda s: np.array(np.inf, np.float32))),
    B4("block_size 8", r"block_size is 8; it must be a power of two from 16", attributes={"block_size": 8}),
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD, ids=id_of)
def test_bad_nodes(bad: Bad, device: str) -> None:
    bad.check(device)
