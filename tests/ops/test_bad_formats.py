"""Bad nodes of the formats with small-float scales, global scales and square blocks."""

# ruff: noqa: E501  (one line a case reads as a table)
from __future__ import annotations

import numpy as np
import pytest
from helpers.bad import Bad, add, bytes_of, drop, id_of, put, to
from helpers.cases import MatMulNBitsCase, QMoECase, Tensors

pytestmark = pytest.mark.usefixtures("library")

Q, M = QMoECase, MatMulNBitsCase
NAN, INF = float("nan"), float("inf")
W1, W2, W3 = (f"fc{i}_experts_weights" for i in (1, 2, 3))
# The cases: E 4, H 64, I 96: W1 [4, 192, 32], scales [4, 192, 2] (mxfp4), [4, 192, 4]
# (nvfp4) and, of squares of 32, [4, 6, 2].
MX, NV, FP8, SQUARE = Q("mxfp4"), Q("nvfp4"), Q("fp8_e4m3", 0), Q("fp8_e4m3", as_bytes=True)
ACT8 = Q("mxfp4", quant_type="wfp4afp8", act_scales="experts")
BOOK = Q("codebook4")
C1, C2 = "fc1_codebook", "fc2_codebook"
ONES = np.ones(4, np.float32)
G1, G2, A1, A2 = "fc1_global_scale", "fc2_global_scale", "fc1_act_scale", "fc2_act_scale"


def builder_bug(tensors: Tensors) -> None:
    """What the builder of onnxruntime-genai 0.18 writes as mxfp4 for Qwen3.5-MoE."""
    for name in ("fc1_scales", "fc2_scales"):
        tensors[name] = np.ones(tensors[name].shape, np.float16)
    drop(G1, G2)(tensors)


SMALL = [
    # --- scales
    Bad("e8m0 code 255", r"fc1 scale of expert 0, row 2, block 1 is -?nan.*must be finite", MX, change=bytes_of("fc1_scales", 255)),
    Bad("e8m0 code 255 as a byte", r"fc2 scale.*nan.*must be finite", Q("mxfp4", as_bytes=True), change=bytes_of("fc2_scales", 255)),
    Bad("e4m3 scale NaN", r"fc1 scale.*nan.*must be finite", NV, change=bytes_of("fc1_scales", 0x7F)),
    Bad("e4m3 scale minus NaN", r"fc1 scale.*nan.*must be finite", NV, change=bytes_of("fc1_scales", 0xFF)),
    Bad("mxfp4 with float scales", r"moe_quant_type=mxfp4 for every model but gpt-oss: they hold prepacked int4", Q("mxfp4", dtype="float16"), change=builder_bug),
    Bad("mxfp4 with e4m3 scales", r"scales.*float8e4m3fn.*must be float8e8m0, or uint8", MX, change=lambda t: t.update({n: NV.tensors()[n][..., ::2] for n in ("fc1_scales", "fc2_scales")})),
    Bad("nvfp4 with byte scales", r"scales.*uint8.*must be float8e4m3fn, not bytes", NV, change=lambda t: t.update({n: t[n].view(np.uint8) for n in ("fc1_scales", "fc2_scales")})),
    Bad("mxfp4 without scales", r"input 3 \(scales\) is missing", MX, change=drop("fc1_scales")),
    Bad("mxfp4 with one block too few", r"\[4, 192, 1\].*\[4, 192, 2\]", MX, change=to("fc1_scales", lambda s: s[..., :1])),
    Bad("mxfp4 in blocks of 16", r'block_size is 16; quant_type "fp4" has blocks of 32', MX, {"block_size": 16}),
    Bad("nvfp4 in blocks of 32", r'block_size is 32; quant_type "nvfp4" has blocks of 16', NV, {"block_size": 32}),
    Bad("mxfp4 of 8 bits", r'expert_weight_bits is 8; quant_type "fp4" has 4 bits', MX, {"expert_weight_bits": 8}),
    Bad("fp8 of 4 bits", r'expert_weight_bits is 4; quant_type "fp8" has 8 bits', FP8, {"expert_weight_bits": 4}),
    Bad("fc2 of other bits", r'fc2_expert_weight_bits is 8; quant_type "nvfp4" has 4 bits', NV, {"fc2_expert_weight_bits": 8}),
    # --- global scales
    Bad("mxfp4 without a global scale", r"input 15 \(global scale\) is missing.*give ones", MX, change=drop(G1)),
    Bad("nvfp4 without a global scale", r"input 16 \(global scale\) is missing.*give ones", NV, change=drop(G2)),
    Bad("fp8 without any scale", r"input 15 \(global scale\) is missing", FP8, change=drop(G1)),
    Bad("int with a global scale", r'input 15 \(global scale\).*quant_type "int" has no global scales', change=add(G1, ONES)),
    Bad("squares with a global scale", r"input 15 \(global scale\).*a scale a square block", SQUARE, change=lambda t: t.update({G1: ONES, G2: ONES})),
    Bad("fp8 with scales but no block_size", r"input 3 \(scales\).*or set block_size", FP8, change=lambda t: t.update({n: np.ones((4, 192 if "1" in n else 64), np.float32) for n in ("fc1_scales", "fc2_scales")})),
    Bad("global scale of other experts", r"global scale is float32\[3\]; it must be float32\[4\]", MX, change=to(G1, lambda g: g[:3])),
    Bad("global scale of rank 2", r"global scale is float32\[4, 1\]; it must be float32\[4\]", NV, change=to(G2, lambda g: g[:, None])),
    Bad("half global scale", r"global scale is float16|float16.*fc1_global_scale", MX, change=to(G1, lambda g: g.astype(np.float16))),
    Bad("global scale NaN", r"scale of expert 1.* times global scale -?nan; scales must be finite", MX, change=put(G1, NAN, 1)),
    Bad("global scale infinite", r"scale of expert 2.* is .*inf; scales must be finite", FP8, change=put(G2, INF, 2)),
    Bad("scale times global scale infinite", r"times global scale .*; scales must be finite", MX, change=lambda t: (bytes_of("fc1_scales", 254)(t), put(G1, 3e38, 0)(t))),
    Bad("global scale fed at run time", r"\(fc1_global_scale\) is not constant", MX, feed=(G1,)),
    # --- weights
    Bad("fp8 weight NaN", r"fc1 weight of expert 0, row 0, column 5 is NaN \(code 127\)", FP8, change=bytes_of(W1, 0x7F)),
    Bad("fp8 weight minus NaN", r"fc2 weight of expert 0, row 0, column 5 is NaN \(code 255\)", SQUARE, change=bytes_of(W2, 0xFF)),
    Bad("mxfp4 weights too short", r"\[4, 192, 31\].*\[4, 192, 32\]", MX, change=to(W1, lambda w: w[..., :-1])),
    Bad("mxfp4 weights as e4m3", r"weights.*float8e4m3fn.*uint8", MX, change=lambda t: t.update({n: t[n].view(FP8.tensors()[W1].dtype) for n in (W1, W2)})),
    Bad("fp8 weights transposed", r"\[4, 64, 192\]", SQUARE, change=to(W1, lambda w: np.ascontiguousarray(np.swapaxes(w, 1, 2)))),
    Bad("mxfp4 with weights_prepacked", r'weights_prepacked is 1, which belongs to quant_type "int"', MX, {"weights_prepacked": 1}),
    Bad("fp8 in another layout", r'weights_layout is "k_major"; allowed with quant_type "fp8"', FP8, {"weights_layout": "k_major"}),
    Bad("hidden_size 258", r"hidden_size.* a multiple of block_size 32|\[4, 96, 129\]", Q("mxfp4", hidden=256, inter=96, activation="silu", fusion=0), change=lambda t: t.update({"input": np.zeros((3, 258), np.float32), W1: np.zeros((4, 96, 129), np.uint8)})),
    Bad("zero points with mxfp4", r"zero points.*mxfp4 takes none", MX, change=add("fc1_zero_points", np.zeros((4, 192, 1), np.uint8))),
    Bad("zero points with fp8", r"zero points.*fp8_e4m3 takes none", SQUARE, change=add("fc1_zero_points", np.zeros((4, 192, 2), np.uint8))),
    Bad("squares with scales of rows", r"fc1 scales have shape \[4, 192, 2\]; .*\[4, 6, 2\] = \[experts, row blocks, blocks\]", SQUARE, change=add("fc1_scales", np.ones((4, 192, 2), np.float32))),
    Bad("squares with transposed scales", r"fc1 scales have shape \[4, 2, 6\]", SQUARE, change=to("fc1_scales", lambda s: np.ascontiguousarray(np.swapaxes(s, 1, 2)))),
    Bad("square scale NaN", r"fc2 scale.*nan; scales must be finite", SQUARE, change=put("fc2_scales", NAN)),
    Bad("fc3 without an input for its global scale", r'fc3_experts_weights is given, but quant_type "fp4"', MX, {"swiglu_fusion": 0}, change=lambda t: t.update({W3: t[W1][:, :96], W1: t[W1][:, :96]})),
    # --- codebooks
    Bad("codebook missing", r'input 22 \(fc2_codebook\) is missing; quant_type "codebook4" needs the value of each code, a float tensor of shape \[16\]', BOOK, change=drop(C2)),
    Bad("codebook with int4", r'input 21 \(fc1_codebook\) is float32\[16\], but quant_type "int" has values of its own', change=add(C1, np.ones(16, np.float32))),
    Bad("codebook of 15 values", r"fc1 codebook is float32\[15\]; it must be a float tensor of shape \[16\]", BOOK, change=to(C1, lambda c: c[:15])),
    Bad("codebook for each expert", r"fc1 codebook is float32\[4, 16\]; it must be a float tensor of shape \[16\]", BOOK, change=to(C1, lambda c: np.tile(c, (4, 1)))),
    Bad("codebook of bytes", r"fc2 codebook is uint8\[16\]; it must be a float tensor", BOOK, change=to(C2, lambda c: c.astype(np.uint8))),
    Bad("codebook with NaN", r"fc1 codebook gives code 5 the value -?nan; values must be finite", BOOK, change=put(C1, NAN)),
    Bad("codebook with infinity", r"fc2 codebook gives code 5 the value inf; values must be finite", BOOK, change=put(C2, INF)),
    Bad("codebook fed at run time", r"\(fc1_codebook\) is not constant", BOOK, feed=(C1,)),
    Bad("codebook4 with byte scales", r'scales.*uint8.*quant_type "codebook4" are float32.*not bytes', BOOK, change=lambda t: t.update({n: t[n].astype(np.uint8) for n in ("fc1_scales", "fc2_scales")})),
    Bad("codebook4 of 8 bits", r'expert_weight_bits is 8; quant_type "codebook4" has 4 bits', BOOK, {"expert_weight_bits": 8}),
    Bad("codebook4 K-major", r'weights_layout is "k_major"; allowed with quant_type "codebook4"', BOOK, {"weights_layout": "k_major"}),
    Bad("codebook4 with zero points", r"zero points.*codebook4 takes none", BOOK, change=add("fc1_zero_points", np.zeros((4, 192, 1), np.uint8))),
    Bad("fc3 beside a global scale", r"input 15 \(global scale\) are given, but there is no input for the global scale of fc3", Q("codebook4", fusion=0, fc3=True), change=add(G1, ONES)),
    # --- formats of the projections
    Bad("unknown fc1_format", r'fc1_format is "int3"; the formats of this build are codebook4, ', Q(own_formats=True), {"fc1_format": "int3"}),
    Bad("unknown fc2_format", r'fc2_format is "e5m2"; the formats of this build are', Q("mxfp4", fc2_format="int8"), {"fc2_format": "e5m2"}),
    Bad("unknown quant_type", r'quant_type is "e5m2"; allowed are int, fp4, .* and the formats of this build, codebook4, ', Q(), {"quant_type": "e5m2"}),
    Bad("fc1_format of other bits", r'fc1_expert_weight_bits is 8; fc1_format "int4" has 4 bits a weight', Q(own_formats=True), {"fc1_expert_weight_bits": 8}),
    Bad("fc3 of other bits than fc1_format", r'fc3_expert_weight_bits is 8; fc1_format "int4" has 4 bits', Q(own_formats=True, fusion=0, fc3=True), {"fc3_expert_weight_bits": 8}),
    Bad("prepacked with fc2_format", r'weights_prepacked is 1, which belongs to quant_type "int"; with fc1_format or fc2_format', Q(own_formats=True), {"weights_prepacked": 1}),
    Bad("K-major with fc2_format", r'weights_layout is "k_major"; allowed with fc1_format or fc2_format', Q("mxfp4", fc2_format="int8"), {"weights_layout": "k_major"}),
    Bad("block_size of neither format", r'block_size is 64; quant_type "fp4" has blocks of 32', Q("mxfp4", fc2_format="nvfp4"), {"block_size": 64}),
    Bad("no global scale for fc2", r'input 16 \(global scale\) is missing; fc2_format "nvfp4"', Q("int4", fc2_format="nvfp4"), change=drop(G2)),
    Bad("global scale for the other projection", r'input 15 \(global scale\).*quant_type "int" has no global scales', Q("int4", fc2_format="nvfp4"), change=add(G1, ONES)),
    Bad("inter_size of no whole blocks", r"inter_size 72 must be a multiple of block_size 32|fc2 scales", Q("int4", 0, fc2_format="mxfp4", inter=72)),
    # --- MatMulNBits
    Bad("unknown weight_format", r'weight_format is "int3"; the formats of this build are', M("int8"), {"weight_format": "int3"}),
    Bad("bits of another weight_format", r'bits is 8; weight_format "mxfp4" has 4 bits', M("mxfp4"), {"bits": 8}),
    Bad("block_size of another weight_format", r'block_size is 64; weight_format "mxfp4" has blocks of 32', M("mxfp4"), {"block_size": 64}),
    Bad("prepacked with weight_format", r'weight_prepacked is 1, which belongs to the integers', M("codebook4"), {"weight_prepacked": 1}),
    Bad("no codebook", r'input 6 \(codebook\) is missing; weight_format "codebook4" needs', M("codebook4"), change=drop("codebook")),
    Bad("codebook of integers", r'input 6 \(codebook\) is float32\[16\], but bits 4 has values of its own', M("int4"), change=add("codebook", np.ones(16, np.float32))),
    Bad("no factor", r"input 7 \(global_scale\) is missing", M("nvfp4", 16), change=drop("global_scale")),
    Bad("factor of integers", r"input 7 \(global_scale\) is float32\[1\], but bits 4 has no global scale", M("int4"), change=add("global_scale", np.ones(1, np.float32))),
    Bad("two factors", r"B global scale is float32\[2\]; it must be float32\[1\]", M("mxfp4"), change=add("global_scale", np.ones(2, np.float32))),
    Bad("float scales of mxfp4", r'weight_format "mxfp4" is given, but scales is float32.*not float8e8m0', M("mxfp4"), change=to("scales", lambda s: np.ones(s.shape, np.float32))),
    Bad("scales of rows for squares", r"scales is float32\[48, 3\]; it must be \[N, x\]", M("fp8_e4m3"), change=to("scales", lambda s: np.ones((48, 3), np.float32))),
    Bad("blocks of 0 for int4", r"block_size is 0; it must be a power of two from 16 to 65536", M("int4"), {"block_size": 0}),
    Bad("blocks of 8 for fp8", r"block_size is 8; .* to 65536, or 0 for one factor on all weights", M("fp8_e4m3"), {"block_size": 8}),
    Bad("one factor for fp8, and it is missing", r'input 7 \(global_scale\) is missing; weight_format "fp8_e4m3" needs', M("fp8_e4m3", 0), change=drop("global_scale")),
    Bad("a factor beside squares", r'input 7 \(global_scale\) is float32\[1\], but weight_format "fp8_e4m3" has no global scale', M("fp8_e4m3"), change=add("global_scale", np.ones(1, np.float32))),
    Bad("scales, but no blocks", r'input 2 \(scales\) is float32\[48, 1\], but .* with block_size 0 has one factor on all weights', M("fp8_e4m3", 0), change=add("scales", np.ones((48, 1), np.float32))),
    Bad("g_idx, but no blocks", r"input 4 \(g_idx\) is int32\[96\], but with block_size 0 there are no blocks", M("fp8_e4m3", 0), change=add("g_idx", np.zeros(96, np.int32))),
    Bad("B in blocks, but there are none", r"with N=48, K=96, bits=8 and block_size=0 it must be uint8\[48, 1, 96\]", M("fp8_e4m3", 0), change=to("B", lambda b: b.reshape(48, 3, 32))),
    Bad("factor NaN", r"B global scale.*nan|nan; scales must be finite", M("fp8_e4m3", 0), change=put("global_scale", NAN, 0)),
    # --- scales of activations
    Bad("one act scale only", r"input 17 \(activation scale\) is given without input 18", ACT8, change=drop(A2)),
    Bad("act scales with fp4", r'input 17 is given .* belong to quant_type "wfp4afp8"', MX, change=lambda t: t.update({A1: ONES, A2: ONES})),
    Bad("act scale of other experts", r"float32\[3\]\); it must be float32\[1\] or float32\[4\]|is float32\[3\]; it must be", ACT8, change=to(A1, lambda a: a[:3])),
    *[
        Bad(f"act scale {value}", rf"fc2_act_scale holds {text}; .*positive and finite", ACT8, change=put(A2, value, 2))
        for value, text in ((0.0, "0"), (-1.0, "-1"), (NAN, "-?nan"), (INF, "inf"))
    ],
    Bad("act block scales", r"input 19 \(block scales of activations\) is given", ACT8, change=add("fc1_act_block_scale", np.full((4, 3, 2), 127, np.uint8).view(MX.tensors()["fc1_scales"].dtype))),
    Bad("act scale fed at run time", r"\(fc1_act_scale\) is not constant", ACT8, feed=(A1,)),
]  # fmt: skip


@pytest.mark.parametrize("bad", SMALL, ids=id_of)
def test_bad_node(bad: Bad, device: str) -> None:
    bad.check(device)
