"""Property tests: any node that the schema allows is within tolerance of the oracle.

On failure hypothesis shrinks the case to the simplest one that still fails, and prints it.
QMOE_PLUGIN_TEST_EXAMPLES sets how many cases each test draws (a long hunt: some thousand).
"""

from __future__ import annotations

import dataclasses
import os

import numpy as np
import pytest
from helpers.block_quantized_cases import Fp4WeightCase, Fp8WeightCase
from helpers.cases import ACTIVATIONS, GATED, MatMulNBitsCase, QMoECase, feeds_of
from helpers.dtypes import FLOAT_DTYPES
from helpers.moe_cases import MoECase
from helpers.run import bits_of, open_session, run, run_case
from helpers.tolerance import check
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qmoe_plugin import formats

pytestmark = pytest.mark.usefixtures("library")

EXAMPLES = int(os.environ.get("QMOE_PLUGIN_TEST_EXAMPLES", "120"))
# No deadline, and no complaint about slow data: machines are shared.
relaxed = settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)

dtypes = st.sampled_from(FLOAT_DTYPES)
optional_dtypes = st.none() | dtypes
small_dtypes = st.sampled_from(["float8e8m0", "float8e4m3fn"])
seeds = st.integers(0, 2**16)
LAYOUTS = {
    "int4": ["raw", "raw", "fpa_intb"],
    "int8": ["raw", "raw", "fpa_intb"],
    "mxfp4": ["raw", "k_major"],
    "nvfp4": ["raw", "k_major"],
}


def scale_dtypes(fmt: formats.Format) -> st.SearchStrategy[str | None]:
    """The types that scales of a case may have, None for that of its activations."""
    return optional_dtypes | small_dtypes if fmt.scale_type == "any" else optional_dtypes


@st.composite
def matmul_cases(draw: st.DrawFn) -> MatMulNBitsCase:
    """Any MatMulNBits node up to some hundred in each dimension."""
    fmt = formats.get(draw(st.sampled_from(list(formats.FORMATS))))
    kinds = ["none", "packed", "bytes", "typed"] if fmt.zero_points else ["none"]
    rank = draw(st.sampled_from([1, 2, 3]))
    block_size = draw(st.sampled_from([16, 32, 64, 128, 256]))
    prepacked = ["fpa_intb", "fpa_intb90"] if fmt.name in ("int4", "int8") else []
    layout = draw(st.sampled_from(["raw", "raw", *prepacked]))
    unit_n, unit_k = (1, 1) if layout == "raw" else (32, max(64, block_size))
    case = MatMulNBitsCase(
        format=fmt.name,
        layout=layout,
        block_size=block_size,
        dtype=draw(dtypes),
        scale_dtype=draw(scale_dtypes(fmt)),
        zero_points=draw(st.sampled_from(kinds)),
        signs=draw(st.booleans()),
        m=1 if rank == 1 else draw(st.integers(0, 20) | st.integers(21, 140)),
        n=unit_n * draw(st.integers(1, 150 // unit_n)),
        k=unit_k * draw(st.integers(1, 400 // unit_k)),
        g_idx=draw(st.sampled_from(["none", "none", "shuffled", "uneven"])),
        bias=draw(st.booleans()),
        rank=rank,
        flat=draw(st.booleans()),
        global_scales=draw(st.booleans()),
        accuracy_level=draw(st.sampled_from([0, 0, 0, 4])),
        seed=draw(seeds),
    )
    return case.fitted()


@st.composite
def qmoe_cases(draw: st.DrawFn) -> QMoECase:
    """Any QMoE node up to some hundred in each dimension."""
    fmt = formats.get(draw(st.sampled_from(list(formats.FORMATS))))
    block_size = draw(st.sampled_from([0, 16, 32, 64, 128]))
    unit, most = block_size or 8, 3 if block_size > 64 else 5
    router_weights = draw(st.booleans())
    quant_type = draw(st.sampled_from([None, *fmt.other_quant_types]))
    fc2 = draw(st.sampled_from([None, None, *formats.FORMATS]))
    own_formats = quant_type is None and draw(st.sampled_from([False, False, True]))
    layouts = ["raw"] if fc2 or own_formats else LAYOUTS.get(fmt.name, ["raw"])
    layout = draw(st.sampled_from(layouts))
    if layout == "fpa_intb":
        unit, most = max(unit, 64), 3
    case = QMoECase(
        format=fmt.name,
        fc2_format=fc2,
        own_formats=own_formats,
        global_scales=draw(st.booleans()),
        quant_type=quant_type,
        act_scales=draw(st.sampled_from(["none", "one", "experts"])) if quant_type else "none",
        layout=layout,
        as_bytes=draw(st.booleans()),
        block_size=block_size,
        dtype=draw(dtypes),
        scale_dtype=draw(scale_dtypes(fmt)),
        zero_points=fmt.zero_points and draw(st.booleans()),
        signs=draw(st.booleans()),
        hidden=unit * draw(st.integers(1, most)),
        inter=unit * draw(st.integers(1, most)),
        router_weights=router_weights,
        trailing_group_axis=block_size == 0 and draw(st.booleans()),
        accuracy_level=draw(st.sampled_from([0, 0, 0, 4])),
        **draw(moe_options()),
    )
    return case.fitted()


@st.composite
def moe_options(draw: st.DrawFn) -> dict[str, object]:
    """What QMoE and MoE nodes share: routing, activation, tokens."""
    experts = draw(st.integers(1, 12) | st.integers(13, 70))
    shared = draw(st.sampled_from([0, 0, min(1, experts - 1), min(3, experts - 1)]))
    activation = draw(st.sampled_from(ACTIVATIONS))
    gated = activation in GATED
    fusion = draw(st.sampled_from([0, 1, 2])) if gated else 0
    swiglu = activation == "swiglu"
    routers = ["random", "ties", "equal", "one_expert", "far"]
    if not shared:  # else all routed experts might be masked
        routers.append("masked")
    return {
        "experts": experts,
        "shared": shared,
        "k": draw(st.integers(1, min(experts - shared, 12))),
        "tokens": draw(st.integers(0, 12) | st.integers(13, 90)),
        "activation": activation,
        "fusion": fusion,
        "fc3": fusion == 0 and (gated or activation == "silu") and draw(st.booleans()),
        "alpha": draw(st.none() | st.floats(-2, 4, width=32)) if swiglu else None,
        "beta": draw(st.none() | st.floats(-2, 2, width=32)) if swiglu else None,
        "limit": draw(st.none() | st.floats(0.125, 10, width=32)) if swiglu else None,
        "bias": draw(st.booleans()),
        "normalize": draw(st.booleans()),
        "router": draw(st.sampled_from(routers)),
        "router_dtype": draw(optional_dtypes),
        "rank": draw(st.sampled_from([2, 3])),
        "router_rank": draw(st.sampled_from([2, 3])),
        "seed": draw(seeds),
    }


@st.composite
def moe_cases(draw: st.DrawFn) -> MoECase:
    """Any MoE node up to some hundred in each dimension."""
    return MoECase(
        dtype=draw(dtypes),
        weights=draw(optional_dtypes),
        hidden=draw(st.integers(1, 150)),
        inter=draw(st.integers(1, 150)),
        **draw(moe_options()),
    )


block_quantized_cases = st.sampled_from([Fp8WeightCase, Fp4WeightCase]).flatmap(
    lambda made: st.builds(
        made,
        dtype=dtypes,
        block_size=st.sampled_from([None, 16, 32, 64, 128, 256]),
        m=st.integers(0, 20) | st.integers(21, 140),
        n=st.integers(1, 150),
        k=st.integers(1, 200).map(lambda half: 2 * half),
        a_scale=st.booleans(),
        bias=st.booleans(),
        seed=seeds,
    )
)


@relaxed
@given(case=matmul_cases())
def test_any_matmul_nbits(device: str, case: MatMulNBitsCase) -> None:
    tensors, result = run_case(case, device)
    check(case, tensors, result)


@relaxed
@given(case=qmoe_cases())
def test_any_qmoe(device: str, case: QMoECase) -> None:
    tensors, result = run_case(case, device)
    check(case, tensors, result)


@relaxed
@given(case=moe_cases())
def test_any_moe(device: str, case: MoECase) -> None:
    tensors, result = run_case(case, device)
    check(case, tensors, result)


@relaxed
@given(case=block_quantized_cases)
def test_any_block_quantized(device: str, case: Fp8WeightCase | Fp4WeightCase) -> None:
    tensors, result = run_case(case, device)
    check(case, tensors, result)


fewer = settings(relaxed, max_examples=max(1, EXAMPLES // 4))


@fewer
@given(case=qmoe_cases(), threads=st.sampled_from([2, 3]))
def test_same_bits_with_any_number_of_threads(device: str, case: QMoECase, threads: int) -> None:
    _, one = run_case(case, device, threads=1)
    _, several = run_case(case, device, threads=threads)
    assert bits_of(one) == bits_of(several)


@fewer
@given(case=qmoe_cases())
def test_three_ways_to_store_gates_and_ups(device: str, case: QMoECase) -> None:
    """Interleaved, in halves, or apart in fc1 and fc3: the same weights give the same bits."""
    case = dataclasses.replace(
        case,
        activation="swiglu" if case.activation in ("swiglu", "identity", "relu") else "geglu",
        fusion=1,
        fc3=False,
        limit=None,
        zero_points=case.zero_points and case.block_size > 0,  # else they are packed across rows
        block_size=0 if case.fmt.square_blocks else case.block_size,  # squares hold several rows
    )
    interleaved = case.tensors()
    halves, apart = dict(interleaved), dict(interleaved)
    for name, tensor in interleaved.items():
        if not name.startswith("fc1_") or tensor.ndim < 2:  # one value an expert
            continue
        gates, ups = tensor[:, 0::2], tensor[:, 1::2]
        halves[name] = np.concatenate([gates, ups], axis=1)
        apart[name], apart[name.replace("fc1", "fc3")] = gates, ups
    ways = [(interleaved, 1, False), (interleaved, 0, False), (halves, 2, False)]
    if "fc1_global_scale" not in interleaved:  # of which fc3 has none
        ways.append((apart, 0, True))
    results = set()
    for tensors, fusion, fc3 in ways:
        model = dataclasses.replace(case, fusion=fusion, fc3=fc3).model(tensors)
        results.add(bits_of(run(open_session(model, device), feeds_of(tensors))))
    assert len(results) == 1
