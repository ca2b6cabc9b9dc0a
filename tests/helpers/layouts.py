"""The layouts in which models for onnxruntime's CUDA op store weights, written from raw ones.

Each is the inverse of what ops/stored_layout.h reads, but made from another description: the packer
writes each 32-bit word of the result, which tells where its codes come from. The tests compare it
with onnxruntime's own packer.
"""

from __future__ import annotations

import numpy as np

from qmoe_plugin import formats

LAYOUTS = ("raw", "k_major", "fpa_intb", "fpa_intb90")


def k_major(packed: np.ndarray, bits: int) -> np.ndarray:
    """Raw codes [..., N, K * bits / 8] as [..., K, N * bits / 8], packed along N."""
    codes = formats.unpack(packed, bits, packed.shape[-1] * 8 // bits)
    return formats.pack(np.swapaxes(codes, -1, -2), bits)


def fpa_intb(packed: np.ndarray, bits: int, *, interleaved: bool = True) -> np.ndarray:
    """Raw 4-bit or 8-bit codes [..., N, K * bits / 8] as onnxruntime's CUDA kernels want them.

    Args:
        packed: uint8; K a multiple of 64, N of 32 (4 bits) or 16.
        bits: 4 or 8.
        interleaved: Columns are interleaved: SM80's layout. Otherwise SM90's.

    Returns:
        uint8 [..., K, N * bits / 8].
    """
    *lead, n, row_bytes = packed.shape
    k = row_bytes * 8 // bits
    codes = formats.unpack(packed, bits, k)
    rows, columns = _sources(n, k, bits, interleaved)
    return formats.pack(codes[..., rows, columns], bits).reshape(*lead, k, n * bits // 8)


def _sources(n: int, k: int, bits: int, interleaved: bool) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of [N, K] of each code of the result, in order: two of int64 [N * K]."""
    per_word = 32 // bits
    word = np.arange(n * k // per_word)[:, None]
    columns = (4 if bits == 4 else 2) if interleaved else 1
    run = 64 // per_word  # words of one column that lie together
    band, in_band = np.divmod(word, columns * k // per_word)
    tile, in_tile = np.divmod(in_band, columns * run)
    row = columns * band + in_tile // run
    element = np.array([0, 2, 4, 6, 1, 3, 5, 7] if bits == 4 else [0, 2, 1, 3])
    place = per_word * (run * tile + in_tile % run) + element
    rows_of_tile = 4 * per_word
    quarter, rest = np.divmod(np.arange(rows_of_tile), per_word)
    permutation = 2 * quarter + 8 * (rest // 2) + rest % 2
    column = place // rows_of_tile * rows_of_tile + permutation[place % rows_of_tile]
    return np.broadcast_to(row, column.shape).reshape(-1), column.reshape(-1)


def in_layout(packed: np.ndarray, bits: int, layout: str) -> np.ndarray:
    """Raw weights in a layout."""
    match layout:
        case "raw":
            return packed
        case "k_major":
            return k_major(packed, bits)
        case "fpa_intb":
            return fpa_intb(packed, bits)
        case "fpa_intb90":
            return fpa_intb(packed, bits, interleaved=False)
    raise ValueError(f"unknown layout: {layout}; known are {', '.join(LAYOUTS)}")
