"""Nodes with weights that `qmoe_plugin.prepack` packed: the bits of the node as it was, and refusals.

What `prepack` does to models is in tests/python/test_prepack.py.
"""

# ruff: noqa: E501  (one line a case reads as a table)
from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from helpers.block_quantized_cases import Fp4WeightCase, Fp8WeightCase
from helpers.cases import Case, MatMulNBitsCase, QMoECase, feeds_of
from helpers.dtypes import FLOAT_DTYPES
from helpers.memory import MEGABYTE, big_model, session_cost
from helpers.models import one_node_model, save_external
from helpers.moe_cases import MoECase
from helpers.packed import (
    LAYOUTS,
    SCALE_DTYPES,
    Header,
    packed_tensors,
    resealed,
    with_input,
    with_packed,
)
from helpers.quick import plain_cases, quick_cases
from helpers.run import bits_of, open_session, run
from helpers.tolerance import check
from onnx import helper

import qmoe_plugin
from qmoe_plugin import formats
from qmoe_plugin.devices import best_target
from qmoe_plugin.graph.inspect import explain_model

pytestmark = pytest.mark.usefixtures("library")

M, Q, X, F8, F4 = MatMulNBitsCase, QMoECase, MoECase, Fp8WeightCase, Fp4WeightCase


def sm_of(device: str) -> int | None:
    """What to give to prepack for a device of this machine."""
    return best_target().sm if device == "cuda" else None


def prepacked(case: Case, sm: int | None = None, domain: str = "qmoe_plugin") -> onnx.ModelProto:
    """The case's model with packed weights."""
    model = case.model(case.tensors(), domain)
    report = qmoe_plugin.prepack(model, sm=sm)
    assert len(report.packed) == 1, str(report)
    return model


# --- the same bits --------------------------------------------------------------------------------

INTEGERS = ("int2", "int4", "int8")
CASES: list[Case] = [
    *(case for name in formats.FORMATS for case in quick_cases(name) if getattr(case, "g_idx", "none") == "none"),
    *(case for name in formats.PLAIN_FORMATS for case in plain_cases(name)),
    *(X(dtype=dtype, fusion=0, fc3=True, activation=activation, alpha=1.3, beta=0.5) for dtype in FLOAT_DTYPES for activation in ("silu", "swiglu", "geglu")),
    *(made(dtype=dtype, n=17, k=94, bias=bias, a_scale=True, block_size=16) for made in (F8, F4) for dtype in FLOAT_DTYPES for bias in (True, False)),
    # ups of their own, and activations that say so in another way than packed nodes do
    *(Q(name, fusion=0, fc3=True, activation=activation, alpha=1.3, beta=0.5, limit=limit) for name in INTEGERS for activation, limit in (("silu", 2.0), ("swiglu", 2.0), ("geglu", None))),
    Q("fp8_e4m3", block_size=64, fusion=0, fc3=True, activation="silu", hidden=80, inter=112),
    # gates, then ups; no gates; no bias
    *(Q(name, fusion=2, bias=False).fitted() for name in formats.FORMATS),
    *(Q(name, activation=activation, bias=False).fitted() for name in formats.FORMATS for activation in ("relu", "gelu", "identity")),
    # zero points at every block size and per channel, and two widths
    *(Q(name, zero_points=True, block_size=block, hidden=128, inter=192) for name in INTEGERS for block in (0, 16, 32, 64)),
    Q("int4", fc2_format="int8", zero_points=True),
    Q("int8", fc2_format="int2", block_size=0),
    # scales that float16 does not hold
    *(Q(name, scale_dtype="float32", dtype="float16") for name in INTEGERS),
    # as models for other kernels store them
    *(Q(name, layout="fpa_intb", hidden=128, inter=64) for name in ("int4", "int8")),
    *(Q(name, layout="k_major") for name in ("mxfp4", "nvfp4")),
    Q("fp8_e4m3", block_size=0, as_bytes=True),
    Q("mxfp4", as_bytes=True),
    Q("mxfp4", quant_type="wfp4afp8", act_scales="one"),
    Q("mxfp4", quant_type="wfp4afp8", act_scales="experts", dtype="bfloat16"),
    *(M(name, zero_points=kind, dtype=dtype) for name in INTEGERS for kind in ("packed", "bytes", "typed") for dtype in FLOAT_DTYPES),
    *(M(name, n=17, k=93, flat=True, zero_points="packed", bias=False) for name in INTEGERS),
    *(M("int4", layout=layout, n=64, k=128) for layout in ("fpa_intb", "fpa_intb90")),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op_type}-{case}")
def test_same_bits(case: Case, device: str) -> None:
    tensors = case.tensors()
    feeds = feeds_of(tensors)
    expected = run(open_session(case.model(tensors), device), feeds)
    result = run(open_session(prepacked(case, sm_of(device)), device), feeds)
    assert bits_of(result) == bits_of(expected)
    check(case, tensors, result)


@pytest.mark.parametrize(
    "case",
    [
        Q("int4", zero_points=True),
        Q("mxfp4"),
        M("int8"),
        X(dtype="float16"),
        F8(a_scale=True),
        F4(),
    ],
    ids=str,
)
def test_same_bits_from_files(case: Case, device: str, tmp_path: Path) -> None:
    """External data in, external data out: it is mapped, and used where it lies."""
    tensors = case.tensors()
    path = save_external(case.model(tensors, "com.microsoft"), tmp_path)
    output = tmp_path / "out" / "packed.onnx"
    qmoe_plugin.prepack(path, output, sm=sm_of(device))
    expected = run(open_session(case.model(tensors), device), feeds_of(tensors))
    session = open_session(output, device)
    for _ in range(2):
        assert bits_of(run(session, feeds_of(tensors))) == bits_of(expected)
    opened = qmoe_plugin.session(output, providers=session.get_providers()[:1])
    assert bits_of(run(opened, feeds_of(tensors))) == bits_of(expected)


@pytest.mark.quick
@pytest.mark.parametrize("offset", [4, 64, 100])
def test_bytes_that_are_not_aligned_are_copied(offset: int, device: str, tmp_path: Path) -> None:
    case = Q("int8", block_size=16)
    tensors = case.tensors()
    model = prepacked(case, sm_of(device))
    (tmp_path / "data").write_bytes(b"")
    with (tmp_path / "data").open("r+b") as file:
        for tensor in model.graph.initializer:
            at = file.seek(0, 2) // 4096 * 4096 + 4096 + offset
            file.seek(at)
            file.write(tensor.raw_data)
            size = len(tensor.raw_data)
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
            for key, value in (("location", "data"), ("offset", at), ("length", size)):
                tensor.external_data.add(key=key, value=str(value))
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    expected = run(open_session(case.model(tensors), device), feeds_of(tensors))
    assert bits_of(run(open_session(path, device), feeds_of(tensors))) == bits_of(expected)


@pytest.mark.parametrize("case", [Q("int4", zero_points=True, seed=3), M("int8", n=17)], ids=str)
@pytest.mark.parametrize("sm", [None, 90])
def test_bytes_are_a_function_of_the_weights(case: Case, sm: int | None) -> None:
    first, second = (packed_tensors(prepacked(case, sm)) for _ in range(2))
    assert {name: bits_of(array) for name, array in first.items()} == {
        name: bits_of(array) for name, array in second.items()
    }


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.parametrize("op_type", ["QMoE", "MoE"])
def test_memory_of_a_session(op_type: str, device: str, tmp_path: Path) -> None:
    """The CPU uses the mapped file as it is; a GPU gets its copy, and the host keeps none."""
    path, packed = big_model(tmp_path, 256, op_type)
    output = tmp_path / "packed.onnx"
    qmoe_plugin.prepack(path, output, sm=sm_of(device))
    cost = session_cost(output, device)
    assert cost["host_anonymous_peak"] <= 64 * MEGABYTE, (cost, packed)
    assert cost["host_left"] <= 64 * MEGABYTE, (cost, packed)
    assert cost["host_file"] <= 64 * MEGABYTE, (cost, packed)  # pages that nobody has read yet
    if device == "cuda":
        assert 0.9 * packed <= cost["device"] <= 1.05 * packed, (cost, packed)


# --- what the bytes say ---------------------------------------------------------------------------


@pytest.mark.parametrize("sm", [None, 80, 90, 120])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("name", formats.FORMATS)
def test_header(name: str, dtype: str, sm: int | None) -> None:
    """Weights for a GPU can be packed anywhere, and say what they are for."""
    case = Q(name, dtype=dtype, zero_points=True).fitted()
    packed = packed_tensors(prepacked(case, sm))
    for projection, content in packed.items():
        header = Header.read(content)
        f = header.fields
        assert f["magic"] == b"QMOEPACK"
        assert f["format"].rstrip(b"\0").decode() == name
        assert LAYOUTS[f["layout"]] == ("cuda_tile16x64" if sm else "cpu_panel16")
        rows, k = (192, 64) if projection == "fc1" else (64, 96)
        assert (f["experts"], f["rows"], f["k"], f["block_size"]) == (4, rows, k, case.block)
        assert f["bytes"] == content.size
        assert header.flag("gated") == (projection == "fc1")
        assert header.flag("zero_offsets") == case.zero_points
        assert header.flag("bias")
        if sm:
            assert SCALE_DTYPES[f["scale_dtype"]] == (
                "float32" if dtype == "float32" else "float16"
            )
        assert content[:64].tobytes() == header.sealed()


# --- refusals -------------------------------------------------------------------------------------


def refusal(model: onnx.ModelProto, device: str = "cpu") -> str:
    """What a session says to the model, which must name the node; `explain` refuses it too."""
    (answer,) = explain_model(ir.from_proto(model), sm=sm_of(device) or 0)
    assert answer.reason
    with pytest.raises(Exception) as caught:  # noqa: PT011, the message is looked at by the caller
        open_session(model, device)
    message = str(caught.value)
    op_type = model.graph.node[0].op_type
    assert f"qmoe_plugin.{op_type} node 'node': " in message, message
    return message


def flipped(index: int) -> Callable[[np.ndarray], np.ndarray]:
    def flip(content: np.ndarray) -> np.ndarray:
        content[index] ^= 1
        return content

    return flip


def sealed(**fields: int | bytes) -> Callable[[np.ndarray], np.ndarray]:
    return lambda content: resealed(content, **fields)


DAMAGED = {
    "magic": (flipped(0), "are not packed weights"),
    "version": (sealed(version=7), "of version 7; this build reads version 1"),
    "bit of the header": (flipped(30), "header of packed weights is damaged"),
    "checksum": (flipped(63), "header of packed weights is damaged"),
    "truncated": (lambda c: c[:-256], "bytes, but their header stands for"),
    "longer": (lambda c: np.append(c, np.zeros(256, np.uint8)), "bytes, but their header stands for"),
    "shorter than a header": (lambda c: c[:40], "40 bytes, less than their header"),
    "empty": (lambda c: c[:0], "0 bytes, less than their header"),
    "another encoding": (lambda c: resealed(c, encoding=Header.read(c).fields["encoding"] ^ 1), "made by another qmoe_plugin, which lays out int4 as cpu_panel16 in another way"),
    "unknown layout": (sealed(layout=9), r"unknown layout \(9\)"),
    "unknown format": (sealed(format=b"int5"), "unknown weight format 'int5'; this build knows"),
    "format of junk": (sealed(format=b"\xff\xfe"), "makes no sense"),
    "no format": (sealed(format=b""), "makes no sense"),
    "huge": (sealed(experts=2**32 - 1, rows=2**32 - 1, k=2**32 - 1), "makes no sense"),
    "many experts": (sealed(experts=2**20), "bytes, but their header stands for"),
    "no rows": (sealed(rows=0), "makes no sense"),
    "odd blocks": (sealed(block_size=24), "makes no sense"),
    "large blocks": (sealed(block_size=2**31), "makes no sense"),
    "type of scales": (sealed(scale_dtype=2), "makes no sense"),
    "other flags": (sealed(flags=0), "bytes, but their header stands for"),
    "g_idx": (lambda c: resealed(c, flags=Header.read(c).fields["flags"] | 16), "packed with a g_idx"),
}  # fmt: skip


@pytest.mark.quick
@pytest.mark.parametrize("what", DAMAGED)
@pytest.mark.parametrize("case", [Q(), M(), X(), F8(), F4()], ids=lambda case: case.op_type)
def test_damage(case: Case, what: str) -> None:
    change, text = DAMAGED[what]
    text = text.replace("int4", case.format)
    model = prepacked(case)
    for name, content in packed_tensors(model).items():
        message = refusal(with_packed(model, {name: change(content.copy())}))
        assert re.search(rf"{name}: .*{text}", message), message
        if "unknown" not in what:  # of another build, which we cannot know
            assert "original model" in message


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("case_type", [Q, M, X, F8, F4], ids=lambda case_type: case_type.op_type)
def test_weights_for_a_gpu_on_the_cpu(case_type: type[Case], dtype: str) -> None:
    message = refusal(prepacked(case_type(dtype=dtype), 90))
    assert "weights were packed for CUDA GPUs from sm_80 (layout cuda_tile16x64)" in message
    assert "this session runs on the CPU (layout cpu_panel16)" in message
    assert "qmoe_plugin.prepack(model, output, sm=None)" in message


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("case_type", [Q, M, X, F8, F4], ids=lambda case_type: case_type.op_type)
def test_weights_for_the_cpu_on_a_gpu(case_type: type[Case]) -> None:
    sm = sm_of("cuda")
    message = refusal(prepacked(case_type(dtype="float16")), "cuda")
    assert "weights were packed for CPUs (layout cpu_panel16)" in message
    assert f"this session runs on a GPU of sm_{sm} (layout cuda_tile16x64)" in message
    assert f"qmoe_plugin.prepack(model, output, sm={sm})" in message


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize(("dtype", "other"), [("float16", "float32"), ("float32", "bfloat16")])
def test_weights_for_other_activations_on_a_gpu(dtype: str, other: str) -> None:
    packed = packed_tensors(prepacked(Q(dtype=dtype), sm_of("cuda")))
    message = refusal(with_packed(prepacked(Q(dtype=other), sm_of("cuda")), packed), "cuda")
    assert re.search(r"packed for (16-bit|float32) activations; this node has", message)


def with_attributes(model: onnx.ModelProto, **changes: int | float | str | None) -> onnx.ModelProto:
    """The model's node with other attributes; None removes one."""
    (node,) = model.graph.node
    kept = [attribute for attribute in node.attribute if attribute.name not in changes]
    del node.attribute[:]
    node.attribute.extend(kept)
    node.attribute.extend(
        helper.make_attribute(name, value) for name, value in changes.items() if value is not None
    )
    return model


ONES = np.ones((4, 192, 2), np.float32)
MISFITS: dict[str, tuple[Case, Callable[[onnx.ModelProto], onnx.ModelProto], str]] = {
    "other bits": (Q(), lambda m: with_attributes(m, expert_weight_bits=8), "fc1 weights were packed as int4 block 32, but the node's attributes say int8 block 32"),
    "other bits of fc2": (Q(), lambda m: with_attributes(m, fc2_expert_weight_bits=2), "fc2 weights were packed as int4 block 32, but .* say int2"),
    "other blocks": (Q(), lambda m: with_attributes(m, block_size=16), "packed as int4 block 32, but .* say int4 block 16"),
    "per channel": (Q(), lambda m: with_attributes(m, block_size=0), "packed as int4 block 32, but .* say int4 per channel"),
    "other type": (Q(), lambda m: with_attributes(m, quant_type="fp4", block_size=None, expert_weight_bits=None), "packed as int4 block 32, but .* say mxfp4 block 32"),
    "no gates": (Q(), lambda m: with_attributes(m, activation_type="relu", swiglu_fusion=None), "fc1 packed weights are 4 x 192 x 64; this node needs 4 x 96 x 64"),
    "gates": (Q(activation="relu"), lambda m: with_attributes(m, activation_type="swiglu"), "fc1 packed weights are 4 x 96 x 64; this node needs 4 x 192 x 64"),
    "too many experts chosen": (Q(), lambda m: with_attributes(m, k=5), "k is 5"),
    "scales beside": (Q(), lambda m: with_input(m, 3, ONES), r"fc1 is packed, which has everything in it, but float32\[4, 192, 2\] is given as well"),
    "bias beside": (Q(), lambda m: with_input(m, 7, ONES[:, :64, 0]), "fc2 is packed, which has everything in it"),
    "zero points beside": (Q(), lambda m: with_input(m, 11, np.zeros((4, 192, 1), np.uint8)), "fc1 is packed, which"),
    "global scale beside": (Q(), lambda m: with_input(m, 16, np.ones(4, np.float32)), "fc2 is packed, which"),
    "fc3 beside": (Q(fusion=0), lambda m: with_input(m, 8, np.zeros((4, 96, 32), np.uint8)), "fc1 has fc3 in it; leave fc3 out"),
    "weights_prepacked": (Q(), lambda m: with_attributes(m, weights_prepacked=0), 'weights_layout is "packed", but weights_prepacked=0 is given too'),
    "another layout": (Q(), lambda m: with_attributes(m, weights_layout="raw"), r"input 3 \(scales\) is missing"),
    "not bytes": (Q(), lambda m: with_packed(m, {"fc1": packed_tensors(m)["fc1"].view(np.float32)}), r"fc1 weights are float32\[\d+\]; packed ones, .* are uint8\[bytes\]"),
    "two dimensions": (Q(), lambda m: with_packed(m, {"fc1": packed_tensors(m)["fc1"][None]}), r"fc1 weights are uint8\[1, \d+\]; packed ones"),
    "projections swapped": (Q(), lambda m: with_packed(m, dict(zip(("fc2", "fc1"), packed_tensors(m).values(), strict=True))), "packed weights are 4 x"),
    "activation scales": (Q("mxfp4", quant_type="wfp4afp8"), lambda m: with_input(with_input(m, 17, np.ones(1, np.float32)), 18, np.ones(1, np.float32)), "packed without activation scales, which this node has"),
    "matmul: other bits": (M(), lambda m: with_attributes(m, bits=8), "B weights were packed as int4 block 32, but .* say int8 block 32"),
    "matmul: other N": (M(), lambda m: with_attributes(m, N=32), "B holds 1 x 48 x 96 weights; this node needs 1 x 32 x 96"),
    "matmul: other K": (M(), lambda m: with_attributes(m, K=95), "B holds 1 x 48 x 96 weights; this node needs 1 x 48 x 95"),
    "matmul: scales beside": (M(), lambda m: with_input(m, 2, np.ones((48, 3), np.float32)), "B is packed, which has everything in it"),
    "matmul: bias beside": (M(), lambda m: with_input(m, 5, np.ones(48, np.float32)), "B is packed, which"),
    "matmul: g_idx beside": (M(), lambda m: with_input(m, 4, np.zeros(96, np.int32)), "B is packed, which"),
    "matmul: weight_prepacked": (M(), lambda m: with_attributes(m, weight_prepacked=1), 'weights_layout is "packed", but weight_prepacked=1 is given too'),
    "matmul: another layout": (M(), lambda m: with_attributes(m, weights_layout="raw"), 'weights_layout is "raw"; allowed is "packed"'),
    "moe: quantised": (X(), lambda m: with_packed(m, packed_tensors(prepacked(Q()))), r"fc1 weights were packed as int4 block 32, but the weights of a MoE are float32, float16 or bfloat16; quantised ones are for QMoE"),
    "moe: bias beside": (X(), lambda m: with_input(m, 5, ONES[:, :64, 0]), r"fc2 is packed, which has everything in it, but float32\[4, 64\] is given as well"),
    "moe: fc3 beside": (X(fusion=0), lambda m: with_input(m, 6, np.zeros((4, 96, 64), np.float32)), "fc1 has fc3 in it; leave fc3 out"),
    "moe: no gates": (X(), lambda m: with_attributes(m, activation_type="relu", swiglu_fusion=None), "fc1 packed weights are 4 x 192 x 64; this node needs 4 x 96 x 64|fc2 packed weights are"),
    "moe: another layout": (X(), lambda m: with_attributes(m, weights_layout="raw"), 'weights_layout is "raw"; allowed is "packed"'),
    "moe: not packed": (X(), lambda m: with_attributes(m, weights_layout=None), r"input 2 \(fc1_experts_weights\) is uint8\[\d+\]; it must be float32"),
    "moe: weights of fc2 for fc1": (X(), lambda m: with_packed(m, dict(zip(("fc2", "fc1"), packed_tensors(m).values(), strict=True))), "packed weights are 4 x|even number|packed for"),
    **{
        f"{made.op_type}: {what}": (made(), change, text.replace("FORMAT", made().format).replace("BLOCK", block))
        for made, block in ((F8, "128"), (F4, "16"))
        for what, change, text in (
            ("other blocks", lambda m: with_attributes(m, block_size=64), "B weights were packed as FORMAT block BLOCK, but .* say FORMAT block 64"),
            ("other N", lambda m: with_attributes(m, N=32), "B holds 1 x 48 x 96 weights; this node needs 1 x 32 x 96"),
            ("other K", lambda m: with_attributes(m, K=95), "B holds 1 x 48 x 96 weights; this node needs 1 x 48 x 95"),
            ("no N", lambda m: with_attributes(m, N=None), "but attribute N is missing; packed weights need N and K"),
            ("no K", lambda m: with_attributes(m, K=None), "but attribute K is missing; packed weights need N and K"),
            ("scales beside", lambda m: with_input(m, 2, np.ones((48, 1), np.float32)), "B is packed, which has everything in it"),
            ("another layout", lambda m: with_attributes(m, weights_layout="raw"), 'weights_layout is "raw"; allowed is "packed"'),
            ("not packed", lambda m: with_attributes(m, weights_layout=None), "attributes N and K are for packed weights"),
        )
    },
    "fp8: a_scale beside": (F8(), lambda m: with_input(m, 3, np.ones((), np.float32)), "B was packed without a scale of activations, unlike what this node has"),
    "fp4: weight_scale_2 beside": (F4(), lambda m: with_input(m, 3, np.ones((), np.float32)), "B is packed, which"),
    "matmul: not packed": (M(), lambda m: with_attributes(m, weights_layout=None), r"input 2 \(scales\) is missing"),
}  # fmt: skip


@pytest.mark.quick
@pytest.mark.parametrize("what", MISFITS)
def test_bytes_that_are_not_those_of_the_node(what: str) -> None:
    case, change, text = MISFITS[what]
    message = refusal(change(prepacked(case)))
    assert re.search(text, message), message


def test_activation_scales_left_out() -> None:
    model = prepacked(Q("mxfp4", quant_type="wfp4afp8", act_scales="experts"))
    (node,) = model.graph.node
    del node.input[17:]
    assert "packed with activation scales, which this node does not have" in refusal(model)


@pytest.mark.parametrize(
    ("case", "name", "text"),
    [
        (M(), "scales", "input 2 (scales) is missing"),
        (F8(), "b_scale", "input 2 (b_scale) is missing"),
        (F4(), "weight_scale", "input 2 (weight_scale) is missing"),
        (F4(), "weight_scale_2", "input 3 (weight_scale_2) is missing"),
    ],
    ids=str,
)
def test_products_without_scales(case: Case, name: str, text: str) -> None:
    """Packed nodes have none, so the schema cannot ask for them."""
    tensors = case.tensors()
    del tensors[name], tensors["bias"]
    assert text in refusal(one_node_model(case.op_type, tensors, case.attributes()))


def test_a_scale_of_activations_left_out() -> None:
    model = prepacked(F8(a_scale=True))
    (node,) = model.graph.node
    assert list(node.input) == ["A", "B.packed", "", "a_scale"]
    del node.input[2:]
    assert "B was packed with a scale of activations, unlike what this node has" in refusal(model)
