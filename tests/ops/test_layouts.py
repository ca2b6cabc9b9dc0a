"""Weights in the layouts of models made for onnxruntime's CUDA op: the same bits as from raw ones.

The encoders are compared with onnxruntime's own in tests/python_formats/test_layouts.py.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from helpers.cases import Case, MatMulNBitsCase, QMoECase, feeds_of
from helpers.dtypes import FLOAT_DTYPES
from helpers.models import one_node_model
from helpers.run import bits_of, open_session, run
from helpers.tolerance import check

pytestmark = pytest.mark.usefixtures("library")

PREPACKED = ("int4", "int8")
FP4 = ("mxfp4", "nvfp4")
LAYOUT_OF = dict.fromkeys(PREPACKED, "fpa_intb") | dict.fromkeys(FP4, "k_major")


def verify_as_raw(case: Case, device: str) -> None:
    """Within tolerance, and the bits of the same weights in the raw layout."""
    tensors = case.tensors()
    feeds = feeds_of(tensors)
    result = run(open_session(case.model(tensors), device), feeds)
    check(case, tensors, result)
    raw = dataclasses.replace(case, layout="raw")
    assert bits_of(run(open_session(raw.model(tensors), device), feeds)) == bits_of(result)


SIZES = [  # hidden, inter: fc1 is square, fc2 is, both are without gates, none is
    (128, 64),
    (64, 64),
    (192, 128),
    (64, 320),
]


@pytest.mark.parametrize(("hidden", "inter"), SIZES)
@pytest.mark.parametrize("format_name", LAYOUT_OF)
def test_qmoe(format_name: str, hidden: int, inter: int, device: str) -> None:
    for index, (activation, fusion, fc3) in enumerate(
        (("swiglu", 1, False), ("geglu", 2, False), ("silu", 0, False), ("silu", 0, True))
    ):
        case = QMoECase(
            format_name,
            layout=LAYOUT_OF[format_name],
            dtype=FLOAT_DTYPES[index % 3],
            hidden=hidden,
            inter=inter,
            tokens=1 + 8 * (index % 2),
            activation=activation,
            fusion=fusion,
            fc3=fc3,
        )
        verify_as_raw(case.fitted(), device)


@pytest.mark.parametrize("block_size", [0, 32, 64, 128])
@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("format_name", PREPACKED)
def test_prepacked_blocks(
    format_name: str, zero_points: bool, block_size: int, device: str
) -> None:
    case = QMoECase(
        format_name,
        block_size,
        "float16",
        layout="fpa_intb",
        zero_points=zero_points,
        hidden=128,
        inter=256,
        tokens=5,
    )
    verify_as_raw(case, device)


def test_prepacked_widths_may_be_mixed(device: str) -> None:
    for one, other in itertools.permutations(PREPACKED):
        case = QMoECase(one, fc2_format=other, layout="fpa_intb", hidden=64, inter=128)
        verify_as_raw(case, device)


def without(case: QMoECase, *names: str) -> dict[str, int | float | str]:
    return {name: value for name, value in case.attributes().items() if name not in names}


UNSAID = ("weights_prepacked", "weights_layout")


@pytest.mark.parametrize("layout_is_raw", [False, True])
@pytest.mark.parametrize("format_name", LAYOUT_OF)
def test_shapes_decide_what_attributes_leave_open(
    format_name: str, layout_is_raw: bool, device: str
) -> None:
    """fc1 is square in the first case and fc2 in the second: the other one tells."""
    layout = "raw" if layout_is_raw else LAYOUT_OF[format_name]
    for hidden, inter in ((128, 64), (128, 128), (64, 128)):
        case = QMoECase(format_name, layout=layout, hidden=hidden, inter=inter)
        tensors = case.tensors()
        for extra in ({}, {"weights_prepacked": -1}):
            model = one_node_model("QMoE", case.stored(tensors), without(case, *UNSAID) | extra)
            check(case, tensors, run(open_session(model, device), feeds_of(tensors)))


@pytest.mark.parametrize(
    ("format_name", "layout"),
    [("int4", "raw"), ("int8", "raw"), ("mxfp4", "k_major"), ("nvfp4", "k_major")],
)
def test_square_weights_without_a_word(format_name: str, layout: str, device: str) -> None:
    """Integers are raw then and 4-bit floats K-major; weights_layout says otherwise."""
    case = QMoECase(format_name, layout=layout, hidden=128, inter=128, activation="silu", fusion=0)
    tensors = case.tensors()
    model = one_node_model("QMoE", case.stored(tensors), without(case, *UNSAID))
    check(case, tensors, run(open_session(model, device), feeds_of(tensors)))
    other = dataclasses.replace(case, layout="raw" if layout != "raw" else "fpa_intb")
    attributes = without(case, *UNSAID) | {"weights_layout": other.layout}
    model = one_node_model("QMoE", other.stored(tensors), attributes)
    check(case, tensors, run(open_session(model, device), feeds_of(tensors)))


@pytest.mark.parametrize("layout", ["fpa_intb", "fpa_intb90"])
@pytest.mark.parametrize("format_name", PREPACKED)
def test_matmul_nbits(format_name: str, layout: str, device: str) -> None:
    shapes = ((32, 64, 32), (96, 192, 64), (64, 320, 16), (160, 128, 128))
    kinds = ("none", "packed", "typed", "none")
    for index, ((n, k, block_size), zero_points) in enumerate(zip(shapes, kinds, strict=True)):
        case = MatMulNBitsCase(
            format_name,
            block_size,
            FLOAT_DTYPES[index % 3],
            layout=layout,
            zero_points=zero_points,
            m=1 + 16 * (index % 2),
            n=n,
            k=k,
            g_idx="shuffled" if index == 3 else "none",
        )
        verify_as_raw(case, device)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("layout", ["fpa_intb", "fpa_intb90"])
@pytest.mark.parametrize("format_name", PREPACKED)
def test_every_weight_is_where_it_belongs(
    format_name: str, layout: str, dtype: str, device: str
) -> None:
    """A = identity and scale 1 read the codes back, exactly."""
    case = MatMulNBitsCase(
        format_name, 64, dtype, layout=layout, m=192, n=64, k=192, bias=False, signs=False
    )
    tensors = case.tensors()
    tensors["A"] = np.eye(192, dtype=tensors["A"].dtype)
    tensors["scales"] = np.ones_like(tensors["scales"])
    result = run(open_session(case.model(tensors), device), feeds_of(tensors))
    np.testing.assert_array_equal(result.astype(np.float64), case.expected(tensors))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_layer_packed_by_onnxruntime(bits: int, device: str) -> None:
    """Weights quantised and prepacked by onnxruntime, in a node as exporters write it for CUDA."""
    torch = pytest.importorskip("torch")
    quantizer = pytest.importorskip("onnxruntime.quantization.cuda_quantizer").CudaQuantizer
    case = QMoECase(f"int{bits}", dtype="float16", hidden=128, inter=64)
    raw = case.tensors()
    stored = dict(raw)
    rng = np.random.default_rng(bits)
    for name in ("fc1", "fc2"):
        codes, scales = f"{name}_experts_weights", f"{name}_scales"
        n, k = raw[codes].shape[1], raw[codes].shape[2] * 8 // bits
        weights = torch.tensor(rng.standard_normal((case.experts, n, k)) / np.sqrt(k)).float()
        plain = [
            quantizer.matmulnbits_blockwise_quantize(w, bits, 32, abs_scales=False) for w in weights
        ]
        packed = [quantizer.qmoe_prepacked_blockwise_quantize(w, bits, 32) for w in weights]
        raw[codes] = np.stack([w.numpy() for w, _ in plain]).reshape(case.experts, n, -1)
        stored[codes] = np.stack([w.numpy() for w, _ in packed])
        raw[scales] = np.stack([s.numpy() for _, s in plain]).reshape(case.experts, n, k // 32)
        raw[scales] = stored[scales] = raw[scales].astype(np.float16)
    model = one_node_model("QMoE", stored, without(case, *UNSAID))
    check(case, raw, run(open_session(model, device), feeds_of(raw)))
