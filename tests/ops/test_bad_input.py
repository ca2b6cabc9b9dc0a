"""Bad models and bad inputs: each a clear error that names the node and says what is wrong, never a crash.

What must not happen is tried in this process: a crash would end the whole test run. Only models
whose data is damaged on disk run in a process of their own.
"""

# ruff: noqa: E501  (one line a case reads as a table)
from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import onnx
import pytest
from helpers.bad import REMOVE, Bad, add, drop, id_of, put, to
from helpers.cases import MatMulNBitsCase, QMoECase, feeds_of
from helpers.models import save_external
from helpers.run import open_session, run
from onnx import helper

pytestmark = pytest.mark.usefixtures("library")

M, Q = MatMulNBitsCase, QMoECase
NAN, INF = float("nan"), float("inf")


FC3 = Q(fusion=0, fc3=True)
ZEROS = Q(zero_points=True)
W1, W2, W3 = (f"fc{i}_experts_weights" for i in (1, 2, 3))
# The case's shapes: E 4, H 64, I 96, block 32: W1 [4, 192, 32], fc1_scales [4, 192, 2], W2 [4, 64,
# 48].

QMOE = [
    # --- weights
    Bad("weights of rank 2", r"\[768, 32\].*must be uint8\[4, 192, 32\]", change=to(W1, lambda w: w.reshape(768, 32))),
    Bad("weights too short", r"\[4, 192, 31\].*must be uint8\[4, 192, 32\]", change=to(W1, lambda w: w[:, :, :-1])),
    Bad("weights too few rows", r"\[4, 190, 32\].*\[4, 192, 32\]", change=to(W1, lambda w: w[:, :-2])),
    Bad("fc2 of other experts", r"\[3, 64, 48\].*\[4, 64, 48\]", change=to(W2, lambda w: w[:3])),
    Bad("int8 tensor as weights", r"int8", change=to(W1, lambda w: w.view(np.int8))),
    Bad("float weights", r"float32.*uint8", change=to(W1, lambda w: w.astype(np.float32))),
    Bad("weights for the wrong bits", r"\[4, 192, 32\].*\[4, 192, 64\]", attributes={"expert_weight_bits": 8}),
    Bad("empty weights", r"\[0, 192, 32\]", change=to(W1, lambda w: w[:0])),
    Bad(
        "prepacked weights of a size that is not prepacked",
        r"input 5 .*cannot be SM80 prepacked.* multiple of 64 columns and of 32 rows, not 64 x 96",
        attributes={"weights_prepacked": REMOVE},
        change=lambda t: t.update({W1: np.zeros((4, 64, 96), np.uint8), W2: np.zeros((4, 96, 32), np.uint8)}),
    ),
    Bad("weights_prepacked=1 for raw weights", r"\[4, 192, 32\].*SM80 prepacked.*\[4, 64, 96\].*as weights_prepacked=1 says", attributes={"weights_prepacked": 1}),
    Bad("weights_layout unknown", r'weights_layout is "tiled"; allowed .*"raw", "fpa_intb"', attributes={"weights_layout": "tiled"}),
    Bad("weights_layout of a 4-bit float", r'weights_layout is "k_major"; allowed', attributes={"weights_layout": "k_major"}),
    Bad("weights_layout against weights_prepacked", r'weights_layout is "fpa_intb", but weights_prepacked=0', attributes={"weights_layout": "fpa_intb"}),
    Bad("int2 prepacked", r"cannot be SM80 prepacked.*4-bit and 8-bit codes, not 2-bit", case=Q("int2", inter=64, hidden=64), attributes={"weights_prepacked": 1}, change=to(W1, lambda w: w.reshape(4, 64, 32))),
    Bad("weights_prepacked=7", r"weights_prepacked is 7; allowed are", attributes={"weights_prepacked": 7}),
    # --- scales
    Bad("no scales", r"input 3 \(scales\) is missing", change=drop("fc1_scales")),
    Bad("scales of rank 1", r"scales.*\[1536\]; it must be", change=to("fc1_scales", lambda s: s.reshape(-1))),
    Bad("scales of rank 4", r"scales.*\[4, 192, 2, 1\]", change=to("fc1_scales", lambda s: s[..., None])),
    Bad("one block too few", r"\[4, 192, 1\].*\[4, 192, 2\]", change=to("fc1_scales", lambda s: s[..., :1])),
    Bad("fc2 scales of another size", r"\[4, 64, 4\].*\[4, 64, 3\]", change=to("fc2_scales", lambda s: np.concatenate([s, s[..., :1]], axis=-1))),
    Bad("uint8 scales", r"scales.*uint8.*float32, float16 and bfloat16", change=lambda t: t.update({n: t[n].astype(np.uint8) for n in ("fc1_scales", "fc2_scales")})),
    Bad("int32 scales", r"int32.*fc1_scales", change=to("fc1_scales", lambda s: s.astype(np.int32)), by_onnxruntime=True),
    Bad("float64 scales", r"double.*fc1_scales", change=to("fc1_scales", lambda s: s.astype(np.float64)), by_onnxruntime=True),
    Bad("scale NaN", r"fc1 scale.*nan; scales must be finite", change=put("fc1_scales", NAN)),
    Bad("scale infinite", r"fc2 scale.*-inf; scales must be finite", change=put("fc2_scales", -INF)),
    Bad("half scale infinite", r"fc1 scale.*inf; scales must be finite", case=Q(dtype="float16"), change=put("fc1_scales", INF)),
    Bad("scale NaN, per channel", r"fc1 scale.*nan; scales must be finite", case=Q(block_size=0), change=put("fc1_scales", NAN)),
    # --- block_size
    Bad("block_size 24", r"block_size is 24; it must be a power of two from 16 to 65536", attributes={"block_size": 24}),
    Bad("block_size 8", r"block_size is 8; it must be a power of two", attributes={"block_size": 8}),
    Bad("block_size -1", r"block_size is -1; it must be", attributes={"block_size": -1}),
    Bad("block_size 2^40", r"block_size is 1099511627776; it must be", attributes={"block_size": 1 << 40}),
    Bad("block_size that does not divide", r"a multiple of block_size 64|scales", attributes={"block_size": 64}),
    Bad("block_size missing", r"several scales a row, but the node has no block_size", attributes={"block_size": REMOVE}),
    Bad("sizes no multiple of 8", r"hidden_size 12 must be a multiple of 8", case=Q("int8", 0, hidden=12, inter=8)),
    # --- biases and zero points
    Bad("bias of another size", r"fc1 bias.*\[4, 191\].*\[4, 192\]", change=to("fc1_experts_bias", lambda b: b[:, :-1])),
    Bad("bias of rank 3", r"fc2 bias.*\[4, 64, 1\].*\[4, 64\]", change=to("fc2_experts_bias", lambda b: b[..., None])),
    Bad("uint8 bias", r"fc1 bias.*uint8", change=to("fc1_experts_bias", lambda b: b.astype(np.uint8))),
    Bad("zero points of another size", r"fc1 zero points.*\[4, 192, 3\]; allowed are", case=ZEROS, change=add("fc1_zero_points", np.zeros((4, 192, 3), np.uint8))),
    Bad("zero points across rows in blocks", r"zero points.*\[4, 96\]; allowed are", case=ZEROS, change=add("fc1_zero_points", np.zeros((4, 96), np.uint8))),
    Bad("int8 zero points", r"int8", case=ZEROS, change=to("fc1_zero_points", lambda z: z.view(np.int8))),
    Bad("int32 zero points", r"zero points.*int32.*allowed are", case=ZEROS, change=add("fc1_zero_points", np.zeros((4, 192, 2), np.int32))),
    Bad("zero point NaN", r"fc2 zero point.*nan; zero points must be finite", case=ZEROS, change=add("fc2_zero_points", np.full((4, 64, 3), NAN, np.float32))),
    # --- fc3
    Bad("fc3 with fusion 1", r"swiglu_fusion is 1.*fc3", case=FC3, attributes={"swiglu_fusion": 1}),
    Bad("fc3 with relu", r"relu.*fc3", case=FC3, attributes={"activation_type": "relu"}),
    Bad("fc3 with gelu", r"gelu.*fc3", case=FC3, attributes={"activation_type": "gelu"}),
    Bad("fc3 of another size", r"\[4, 95, 32\].*\[4, 96, 32\]", case=FC3, change=to(W3, lambda w: w[:, :-1])),
    Bad("fc3 scales alone", r"without fc3_experts_weights", case=FC3, change=drop(W3)),
    Bad("fc3 without scales", r"input 9 \(scales\) is missing", case=FC3, change=drop("fc3_scales")),
    Bad("fc3 of another width", r"fc3_expert_weight_bits is 8", case=FC3, attributes={"fc3_expert_weight_bits": 8}),
    # --- routing attributes
    Bad("k=0", r"k is 0; it must be from 1 to the number of experts, 4", attributes={"k": 0}),
    Bad("k=-3", r"k is -3; it must be", attributes={"k": -3}),
    Bad("k above E", r"k is 5; it must be from 1 to the number of experts, 4", attributes={"k": 5}),
    Bad("k=2^40", r"k is 1099511627776; it must be", attributes={"k": 1 << 40}),
    Bad("1025 experts", r"1025 experts; allowed are 1 to 1024", case=Q("int8", 0, hidden=8, inter=8, experts=1025)),
    Bad("sparse mixer with k=3", r"use_sparse_mixer=1 needs k=2, not k=3", attributes={"use_sparse_mixer": 1, "k": 3}),
    Bad("all experts shared", r"num_shared_experts is 4; it must be from 0 to 3, as one of the 4 experts", attributes={"num_shared_experts": 4}),
    Bad("num_shared_experts -1", r"num_shared_experts is -1; it must be from 0 to 3", attributes={"num_shared_experts": -1}),
    Bad("k of shared experts", r"k is 4; it must be from 1 to the number of routed experts, 2", attributes={"num_shared_experts": 2, "k": 4}),
    Bad("k that would overflow", r"k is 9223372036854775807; it must be from 1 to the number of routed experts, 3", attributes={"num_shared_experts": 1, "k": 2**63 - 1}),
    Bad("use_sparse_mixer=2", r"use_sparse_mixer is 2; it must be 0 or 1", attributes={"use_sparse_mixer": 2}),
    Bad("normalize=-1", r"normalize_routing_weights is -1; it must be 0 or 1", attributes={"normalize_routing_weights": -1}),
    # --- other attributes
    Bad("unknown activation", r'activation_type is "softplus"; allowed are relu, gelu, silu', case=Q(fusion=0), attributes={"activation_type": "softplus"}),
    Bad("swiglu_fusion=3", r"swiglu_fusion is 3; allowed are", attributes={"swiglu_fusion": 3}),
    Bad("fusion without swiglu", r'swiglu_fusion is 1 with activation_type "relu"', attributes={"activation_type": "relu"}),
    Bad("swiglu_limit=0", r"swiglu_limit is 0; it must be positive", attributes={"swiglu_limit": 0.0}),
    Bad("swiglu_limit=NaN", r"swiglu_limit is -?nan; it must be positive", attributes={"swiglu_limit": NAN}),
    Bad("alpha infinite", r"activation_alpha is inf .* must be finite", attributes={"activation_alpha": INF}),
    Bad("swiglu_limit_after_activation=2", r"swiglu_limit_after_activation is 2; it must be 0 or 1", attributes={"swiglu_limit_after_activation": 2}),
    Bad("swiglu_limit_after_activation=-1 with relu", r"swiglu_limit_after_activation is -1; it must be 0 or 1", case=Q(activation="relu"), attributes={"swiglu_limit_after_activation": -1}),
    Bad("limit after geglu", r"swiglu_limit_after_activation is 1 with activation_type \"geglu\"; only swiglu has a limit", case=Q(activation="geglu"), attributes={"swiglu_limit_after_activation": 1}),
    Bad("limit after silu with fc3", r"swiglu_limit_after_activation is 1 with activation_type \"silu\"", case=Q(activation="silu", fusion=0, fc3=True), attributes={"swiglu_limit_after_activation": 1}),
    Bad("geglu with a limit", r"swiglu_limit is 7 with activation_type \"geglu\"", attributes={"activation_type": "geglu", "swiglu_limit": 7.0}),
    Bad("odd rows of gates and ups", r"even", case=Q("int8", 0), change=lambda t: t.update({W1: t[W1][:, :-1], "fc1_scales": t["fc1_scales"][:, :-1]})),
    Bad("3 bits", r"expert_weight_bits is 3; allowed are", attributes={"expert_weight_bits": 3}),
    Bad("2^32 + 4 bits", r"expert_weight_bits is 4294967300; allowed are", attributes={"expert_weight_bits": (1 << 32) + 4}),
    Bad("unknown quant_type", r'quant_type is "int3"; allowed are int, fp4', attributes={"quant_type": "int3"}),
    Bad("accuracy_level=5", r"accuracy_level is 5; allowed are 0 to 4", attributes={"accuracy_level": 5}),
    Bad("k as a float", r"attribute k is a float, but must be an integer", attributes={"k": 2.0}),
    Bad("k as a string", r"attribute k is a string, but must be an integer", attributes={"k": "2"}),
    Bad("k as a list", r"attribute k is a list of integers, but must be an integer", attributes={"k": [2]}),
    Bad("alpha as an integer", r"attribute activation_alpha is an integer, but must be a float", attributes={"activation_alpha": 1}),
    Bad("activation_type as an integer", r"attribute activation_type is an integer, but must be a string", attributes={"activation_type": 3}),
    # --- weights that are not constant
    *[
        Bad(f"{name} fed at run time", rf"\({name}\) is not constant", feed=(name,))
        for name in (W1, "fc1_scales", "fc1_experts_bias", W2)
    ],
    Bad("zero points fed at run time", r"\(fc2_zero_points\) is not constant", case=ZEROS, feed=("fc2_zero_points",)),
    # --- activations
    Bad("input of another hidden_size", r"\(input\) has shape \[3, 63\]; it must be \[tokens, 64\]", change=to("input", lambda x: x[:, :-1]), at_run=True),
    Bad("input of rank 1", r"\(input\) has shape \[64\]; it must be", change=to("input", lambda x: x[0]), at_run=True),
    Bad("input of rank 4", r"\(input\) has shape \[3, 1, 1, 64\]; it must be", change=to("input", lambda x: x[:, None, None]), at_run=True),
    Bad("router_probs of other experts", r"\(router_probs\) has shape \[3, 5\].*\[3, 4\]", change=add("router_probs", np.zeros((3, 5), np.float32)), at_run=True),
    Bad("router_probs of other tokens", r"\(router_probs\) has shape \[2, 4\].*\[3, 4\]", change=to("router_probs", lambda r: r[:2]), at_run=True),
    Bad("router_probs of rank 1", r"\(router_probs\) has shape \[12\]", change=to("router_probs", lambda r: r.reshape(-1)), at_run=True),
    Bad("router_weights of other tokens", r"\(router_weights\) has shape \[1, 4\].*\[3, 4\]", case=Q(router_weights=True), change=to("router_weights", lambda r: r[:1]), at_run=True),
    Bad("integer router_probs", r"\(router_probs\) is .*allowed are float32", change=to("router_probs", lambda r: r.astype(np.int32)), at_run=True),
    Bad("integer router_weights", r"\(router_weights\) is .*allowed are float32", case=Q(router_weights=True), change=to("router_weights", lambda r: r.astype(np.int32)), at_run=True),
    Bad("float64 input", r"float64|double|tensor\(double\)", change=to("input", lambda x: x.astype(np.float64)), by_onnxruntime=True),
    Bad("no tokens but another hidden_size", r"\(input\) has shape \[0, 7\]", change=add("input", np.zeros((0, 7), np.float32)), at_run=True),
]  # fmt: skip

# The case's shapes: K 96, N 48, block 32: B [48, 3, 16], scales [48, 3].
PACKED, TYPED, G_IDX = M(zero_points="packed"), M(zero_points="typed"), M(g_idx="shuffled")
MATMUL = [
    *[Bad(f"no {name}", rf"attribute {name} is missing; it is required", M(), {name: REMOVE}) for name in ("K", "N", "block_size")],
    Bad("K=0", r"attribute K is 0; it must be from 1", M(), {"K": 0}),
    Bad("N=-5", r"attribute N is -5; it must be from 1", M(), {"N": -5}),
    Bad("K=2^40", r"attribute K is 1099511627776; it must be", M(), {"K": 1 << 40}),
    Bad("K=2^31-1", r"B is uint8\[48, 3, 16\].*K=2147483647", M(), {"K": (1 << 31) - 1}),
    Bad("N=2^31-1", r"B is uint8\[48, 3, 16\].*N=2147483647", M(), {"N": (1 << 31) - 1}),
    Bad("K as a string", r"attribute K is a string, but must be an integer", M(), {"K": "96"}),
    Bad("block_size 24", r"block_size is 24; it must be a power of two", M(), {"block_size": 24}),
    Bad("block_size 2^31", r"block_size is 2147483648; it must be", M(), {"block_size": 1 << 31}),
    Bad("bits 3", r"bits is 3; allowed are", M(), {"bits": 3}),
    Bad("bits 8 for 4-bit weights", r"B is uint8\[48, 3, 16\].*uint8\[48, 3, 32\]", M(), {"bits": 8}),
    Bad("accuracy_level -1", r"accuracy_level is -1; allowed are 0 to 4", M(), {"accuracy_level": -1}),
    Bad("weight_prepacked=1 with N 48", r"weight_prepacked is 1, .* multiple of 64 columns and of 32 rows, not 48 x 96", M(), {"weight_prepacked": 1}),
    Bad("weight_prepacked=2 with a partial block", r"weight_prepacked is 2, .*no partial blocks", M(n=64, k=64, block_size=128), {"weight_prepacked": 2}),
    Bad("weight_prepacked=3", r"weight_prepacked is 3; allowed are", M(), {"weight_prepacked": 3}),
    Bad("B of rank 2", r"B is uint8\[48, 48\].*uint8\[48, 3, 16\]", M(), change=to("B", lambda b: b.reshape(48, 48))),
    Bad("B too short", r"B is uint8\[48, 2, 16\].*uint8\[48, 3, 16\]", M(), change=to("B", lambda b: b[:, :2])),
    Bad("float B", r"B.*float32.*uint8", M(), change=to("B", lambda b: b.astype(np.float32))),
    Bad("scales too short", r"scales.*\[48, 2\]|scales.*\[1, 48, 2\].*\[1, 48, 3\]", M(), change=to("scales", lambda s: s[:, :2])),
    Bad("flat scales of another size", r"scales is float32\[143\]; it must be", M(), change=to("scales", lambda s: s.reshape(-1)[:-1])),
    Bad("scale NaN", r"scale.*nan; scales must be finite", M(), change=put("scales", NAN)),
    Bad("scale infinite", r"scale.*inf; scales must be finite", M(k=93), change=put("scales", INF, 143)),
    Bad("integer scales", r"int32.*\(scales\)", M(), change=to("scales", lambda s: s.astype(np.int32)), by_onnxruntime=True),
    Bad("zero points too short", r"zero points.*allowed are", PACKED, change=to("zero_points", lambda z: z[:, :1])),
    Bad("zero points of other rows", r"zero_points is uint8\[47, 2\]; it must be", PACKED, change=to("zero_points", lambda z: z[:-1])),
    Bad("zero point infinite", r"zero point.*inf; zero points must be finite", TYPED, change=put("zero_points", INF)),
    Bad("g_idx too short", r"g_idx is int32\[95\]; it must be int32\[96\]", G_IDX, change=to("g_idx", lambda g: g[:-1])),
    Bad("g_idx of rank 2", r"g_idx is int32\[1, 96\]; it must be", G_IDX, change=to("g_idx", lambda g: g[None])),
    Bad("g_idx too large", r"g_idx\[5\] is 3; it must be from 0 to 2", G_IDX, change=put("g_idx", 3)),
    Bad("g_idx negative", r"g_idx\[5\] is -2147483648; it must be from 0 to 2", G_IDX, change=put("g_idx", -(1 << 31))),
    Bad("g_idx int64", r"g_idx.*int64", G_IDX, change=to("g_idx", lambda g: g.astype(np.int64))),
    Bad("float g_idx", r"g_idx.*float32", G_IDX, change=to("g_idx", lambda g: g.astype(np.float32))),
    Bad("bias of another size", r"bias is float32\[49\]; it must be \[48\]", M(), change=add("bias", np.zeros(49, np.float32))),
    Bad("bias of rank 2", r"bias is float32\[1, 48\]; it must be \[48\]", M(), change=to("bias", lambda b: b[None])),
    Bad("integer bias", r"bias.*int32", M(), change=to("bias", lambda b: b.astype(np.int32))),
    *[Bad(f"{name} fed at run time", rf"\({name}\) is not constant", G_IDX, feed=(name,)) for name in ("B", "scales", "g_idx", "bias")],
    Bad("A of another K", r"\(A\) has shape \[3, 95\]; its last dimension must be K = 96", M(), change=to("A", lambda a: a[:, :-1]), at_run=True),
    Bad("scalar A", r"\(A\) has shape \[\]; its last dimension must be K = 96", M(), change=add("A", np.float32(1).reshape(())), at_run=True),
    Bad("integer A", r"int32|Type", M(), change=to("A", lambda a: a.astype(np.int32)), by_onnxruntime=True),
]  # fmt: skip


@pytest.mark.parametrize("bad", QMOE + MATMUL, ids=id_of)
def test_bad_node(bad: Bad, device: str) -> None:
    bad.check(device)


def test_a_session_survives_a_bad_run(device: str) -> None:
    case = Q()
    tensors = case.tensors()
    session = open_session(case.model(tensors), device)
    feeds = feeds_of(tensors)
    before = run(session, feeds)
    with pytest.raises(Exception, match="router_probs"):
        run(session, {**feeds, "router_probs": feeds["router_probs"][:1]})
    assert np.array_equal(run(session, feeds), before)


def test_an_initializer_that_may_be_fed_is_not_constant(device: str) -> None:
    """An initializer that is also a graph input is a default that a run may replace."""
    case = Q()
    model = case.model(case.tensors())
    value = helper.make_tensor_value_info("fc1_scales", onnx.TensorProto.FLOAT, [4, 192, 2])
    model.graph.input.append(value)
    with pytest.raises(Exception, match=r"\(fc1_scales\) is not constant"):
        open_session(model, device)


def test_too_few_and_too_many_inputs(device: str) -> None:
    for count in (1, 5, 22):
        case = Q()
        model = case.model(case.tensors())
        node = model.graph.node[0]
        names = [*node.input, *["fc1_scales"] * 22][:count]
        del node.input[:]
        node.input.extend(names)
        with pytest.raises(Exception, match=r"input|weights"):
            open_session(model, device)


@pytest.mark.parametrize("k", [0, 1 << 31, -1])
def test_damaged_initializers_inside_the_model(k: int, device: str) -> None:
    """Dimensions that the data does not fill."""
    case = Q()
    model = case.model(case.tensors())
    weights = next(t for t in model.graph.initializer if t.name == W1)
    weights.dims[1] = k
    with pytest.raises(Exception, match=r"."):
        open_session(model, device)


DAMAGE = {
    "truncated": "data.write_bytes(data.read_bytes()[:1000])",
    "empty": "data.write_bytes(b'')",
    "missing": "data.unlink()",
    "a folder": "data.unlink(); data.mkdir()",
    "absurd offset": "edit('offset', str(1 << 62))",
    "negative offset": "edit('offset', '-4096')",
    "absurd length": "edit('length', str(1 << 62))",
    "no number": "edit('length', 'many')",
    "absurd dimensions": "weights.dims[:] = [4, 1 << 40, 1 << 20]; onnx.save(model, path)",
}
CHILD = """
import sys
from pathlib import Path
import onnx
from helpers.run import open_session
path = Path(sys.argv[1])
data = path.with_name(path.name + ".data")
model = onnx.load(path, load_external_data=False)
weights = next(t for t in model.graph.initializer if t.name == "fc1_experts_weights")
def edit(key, value):
    next(e for e in weights.external_data if e.key == key).value = value
    onnx.save(model, path)
{damage}
try:
    open_session(path, sys.argv[2])
except Exception as error:
    print("ERROR:", error)
else:
    print("the session opened")
"""


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda name: name.replace(" ", "_"))
def test_damaged_external_data(damage: str, tmp_path: Path, device: str) -> None:
    """A process of its own: reading past a mapped file would be a SIGBUS."""
    case = Q()
    path = save_external(case.model(case.tensors()), tmp_path)
    script = textwrap.dedent(CHILD).format(damage=DAMAGE[damage])
    tests = str(Path(__file__).parents[1])
    child = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; sys.path.insert(0, {tests!r})\n{script}",
            path,
            device,
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert child.returncode == 0, f"exit {child.returncode}: {child.stderr}"
    assert child.stdout.startswith("ERROR: "), child.stdout
