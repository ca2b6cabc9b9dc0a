"""Bad nodes of the formats with small-float scales, global scales and square blocks."""

# ruff: noqa: E501  (one line a case reads as a table)
from __future__ import annotations

import numpy as np
import pytest
from helpers.bad import Bad, add, bytes_of, drop, id_of, put, to
from helpers.cases import QMoECase, Tensors

pytestmark = pytest.mark.usefixtures("library")

Q = QMoECase
NAN, INF = float("nan"), float("inf")
W1, W2, W3 = (f"fc{i}_experts_weights" for i in (1, 2, 3))
# The cases: E 4, H 64, I 96: W1 [4, 192, 32], scales [4, 192, 2] (mxfp4), [4, 192, 4]
# (nvfp4) and, of squares of 32, [4, 6, 2].
MX, NV, FP8, SQUARE = Q("mxfp4"), Q("nvfp4"), Q("fp8_e4m3", 0), Q("fp8_e4m3", as_bytes=True)
ACT8 = Q("mxfp4", quant_type="wfp4afp8", act_scales="experts")
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
    Bad("mxfp4 with float scales", r"moe_quant_type=mxfp4: they hold prepacked int4", Q("mxfp4", dtype="float16"), change=builder_bug),
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
    Bad("hidden_size 258", r"hidden_size.* multiples of block_size 32|\[4, 96, 129\]", Q("mxfp4", hidden=256, inter=96, activation="silu", fusion=0), change=lambda t: t.update({"input": np.zeros((3, 258), np.float32), W1: np.zeros((4, 96, 129), np.uint8)})),
    Bad("zero points with mxfp4", r"zero points.*mxfp4 takes none", MX, change=add("fc1_zero_points", np.zeros((4, 192, 1), np.uint8))),
    Bad("zero points with fp8", r"zero points.*fp8_e4m3 takes none", SQUARE, change=add("fc1_zero_points", np.zeros((4, 192, 2), np.uint8))),
    Bad("squares with scales of rows", r"fc1 scales have shape \[4, 192, 2\]; .*\[4, 6, 2\] = \[experts, row blocks, blocks\]", SQUARE, change=add("fc1_scales", np.ones((4, 192, 2), np.float32))),
    Bad("squares with transposed scales", r"fc1 scales have shape \[4, 2, 6\]", SQUARE, change=to("fc1_scales", lambda s: np.ascontiguousarray(np.swapaxes(s, 1, 2)))),
    Bad("square scale NaN", r"fc2 scale.*nan; scales must be finite", SQUARE, change=put("fc2_scales", NAN)),
    Bad("fc3 without an input for its global scale", r'fc3_experts_weights is given, but quant_type "fp4"', MX, {"swiglu_fusion": 0}, change=lambda t: t.update({W3: t[W1][:, :96], W1: t[W1][:, :96]})),
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
