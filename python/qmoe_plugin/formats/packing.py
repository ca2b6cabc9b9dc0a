"""Codes in bytes: packed along the last axis, lowest bits first."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@functools.cache
def native() -> ModuleType | None:
    """The compiled module, or None in a tree that was never built; a broken build raises."""
    try:
        return importlib.import_module("qmoe_plugin._native")
    except ModuleNotFoundError:
        return None


def pack(codes: Array, bits: int) -> Array:
    """Packs codes along the last axis, lowest bits first; the last byte is padded with zero codes.

    Args:
        codes: uint8 [..., K], each below 2^bits.
        bits: 1, 2, 4 or 8 bits a code.

    Returns:
        uint8 [..., ceil(K * bits / 8)].
    """
    codes = np.asarray(codes)
    if bits not in (1, 2, 4, 8):
        raise ValueError(f"bits is {bits}; a byte holds whole codes of 1, 2, 4 or 8 bits")
    if codes.size and (codes.min() < 0 or codes.max() >= 1 << bits):
        raise ValueError(
            f"codes lie in [{codes.min()}, {codes.max()}]; "
            f"{bits}-bit codes lie in [0, {(1 << bits) - 1}]"
        )
    codes = codes.astype(np.uint8)
    per_byte = 8 // bits
    padding = -codes.shape[-1] % per_byte
    if padding:
        codes = np.concatenate(
            [codes, np.zeros((*codes.shape[:-1], padding), dtype=np.uint8)], axis=-1
        )
    parts = codes.reshape(*codes.shape[:-1], codes.shape[-1] // per_byte, per_byte)
    packed = np.zeros(parts.shape[:-1], dtype=np.uint8)
    for i in range(per_byte):
        packed |= parts[..., i] << np.uint8(i * bits)
    return packed


def unpack(packed: Array, bits: int, k: int) -> Array:
    """Undoes `pack`.

    Args:
        packed: uint8 [..., at least ceil(k * bits / 8)].
        bits: 1, 2, 4 or 8 bits a code.
        k: How many codes to return.

    Returns:
        uint8 [..., k].
    """
    packed = np.ascontiguousarray(packed)
    per_byte = 8 // bits
    if packed.dtype != np.uint8 or packed.shape[-1] * per_byte < k:
        raise ValueError(
            f"{k} codes of {bits} bits need {-(-k // per_byte)} bytes of uint8, "
            f"given {packed.dtype}{list(packed.shape)}"
        )
    codes = packed.copy() if bits == 8 else _codes_of_bytes(bits)[packed].view(np.uint8)
    return codes[..., :k]


@functools.cache
def _codes_of_bytes(bits: int) -> Array:
    """The codes of each byte, side by side in a wider number: [256]."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes = (np.arange(256, dtype=np.uint8)[:, None] >> shifts) & np.uint8((1 << bits) - 1)
    return codes.view(f"u{8 // bits}")[:, 0]
