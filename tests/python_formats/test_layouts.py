"""Our encoders of stored layouts against onnxruntime's packers, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import layouts

from qmoe_plugin import formats

SHAPES = [(32, 64), (64, 64), (96, 192), (128, 320)]


def random_codes(n: int, k: int, bits: int) -> np.ndarray:
    rng = np.random.default_rng([n, k, bits])
    return formats.pack(rng.integers(0, 1 << bits, (n, k), dtype=np.uint8), bits)


@pytest.mark.parametrize("sm", [80, 90])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_fpa_intb(n: int, k: int, bits: int, sm: int) -> None:
    pytest.importorskip("torch")
    quantizer = pytest.importorskip("onnxruntime.quantization.cuda_quantizer")
    raw = random_codes(n, k, bits)
    theirs = quantizer._pack_weights_for_cuda_mixed_gemm(raw, n, k, bits, force_arch=sm)
    ours = layouts.fpa_intb(raw, bits, interleaved=sm == 80)
    np.testing.assert_array_equal(ours.reshape(-1), theirs.view(np.uint8))
    assert ours.shape == (k, n * bits // 8)


@pytest.mark.parametrize(("n", "k"), [*SHAPES, (48, 96), (2, 32)])
def test_k_major(n: int, k: int) -> None:
    state = pytest.importorskip("onnxruntime.capi.onnxruntime_pybind11_state")
    raw = random_codes(n, k, 4)
    theirs = state.pack_fp4_weights_for_cuda_moe_gemm(raw, n, k)
    np.testing.assert_array_equal(layouts.k_major(raw, 4), np.asarray(theirs).reshape(k, n // 2))


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
@pytest.mark.parametrize("bits", [4, 8])
def test_every_layout_is_a_permutation(bits: int, layout: str) -> None:
    raw = np.stack([random_codes(64, 128, bits), random_codes(64, 128, bits)[::-1]])
    stored = layouts.in_layout(raw, bits, layout)
    assert stored.shape == ((2, 64, 16 * bits) if layout == "raw" else (2, 128, 8 * bits))
    for before, after in zip(raw, stored, strict=True):
        codes, moved = (formats.unpack(a.reshape(-1), bits, 64 * 128) for a in (before, after))
        assert np.bincount(codes).tolist() == np.bincount(moved).tolist()
    with pytest.raises(ValueError, match="unknown layout: tiled"):
        layouts.in_layout(raw, bits, "tiled")
