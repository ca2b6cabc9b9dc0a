"""Quantising with scales that are searched for the least squared error.

Round-to-nearest takes scales that reach the largest weight of a block. A smaller scale clips that
one, and rounds all the others finer: on 4-bit weights the error usually falls. Tried are the scales
of round-to-nearest times a few factors, each block by itself; so no block gets worse.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from qmoe_plugin.formats import rounding
from qmoe_plugin.formats import scales as small_floats
from qmoe_plugin.formats.base import Format
from qmoe_plugin.formats.packing import Array
from qmoe_plugin.formats.rounding import Quantized

FACTORS = (1.08, 1.04, 0.96, 0.92, 0.88, 0.84, 0.8, 0.76, 0.72, 0.68, 0.64, 0.6)
"""What scales are multiplied with; 1, where the search starts, is not among them."""

POWERS_OF_TWO = (2.0, 0.5)
"""The same of scales that are powers of two."""


def quantize_mse(
    fmt: Format,
    weights: Array,
    block_size: int | None = None,
    *,
    symmetric: bool = True,
    scale_dtype: npt.DTypeLike = np.float32,
    largest: float | None = None,
    importance: Array | None = None,
) -> Quantized:
    """Quantises like `Format.quantize`, then searches better scales.

    Zero points stay, and so does the global scale beside block scales. Symmetric integers get
    either sign of a scale, as the lowest code has no positive counterpart.

    Args:
        fmt: The format.
        weights: One matrix [N, K], any float type.
        block_size: As for `Format.quantize`, and so the next two.
        symmetric: Without zero points.
        scale_dtype: Type of scales that may have several.
        largest: As for `Format.quantize`.
        importance: Factors on the squared errors of each column, [K], not negative: how much what
            the weights are multiplied with varies, its second moment. None for 1.
    """
    weights = np.asarray(weights)
    if weights.ndim != 2:
        raise ValueError(f"weights must be one matrix [N, K], given {list(weights.shape)}")
    start = fmt.quantize(
        weights, block_size, symmetric=symmetric, scale_dtype=scale_dtype, largest=largest
    )
    if block_size is None:
        block_size = fmt.only_block_size or 0
    values = np.ascontiguousarray(weights, dtype=np.float32)
    if importance is not None:
        importance = _checked(importance, values.shape[1])
    search = _Search(fmt, values, block_size, start, importance)
    e8m0 = start.scales is not None and start.scales.dtype == small_floats.E8M0
    factors = POWERS_OF_TWO if e8m0 else FACTORS
    if symmetric and fmt.zero_points:
        factors = (*factors, *(-factor for factor in (1.0, *factors)))
    for factor in factors:
        search.try_factor(factor)
    return search.result()


class _Search:
    """The best scales so far, of one matrix."""

    def __init__(
        self,
        fmt: Format,
        weights: Array,
        block_size: int,
        start: Quantized,
        importance: Array | None,
    ) -> None:
        n, k = weights.shape
        self._fmt, self._start, self._importance = fmt, start, importance
        found = start.scales if start.scales is not None else start.global_scale
        assert found is not None
        self._scales = found
        whole = start.scales is None  # the global scale is all there is
        height = n if whole else (block_size if fmt.square_blocks else 1)
        self._blocks = rounding.Blocks(weights, height, block_size or k)
        self._global = 1.0
        if start.scales is not None and start.global_scale is not None:
            self._global = float(start.global_scale)
        self._zeros = None
        if start.zero_points is not None:
            zeros = fmt.unpack_zero_points(start.zero_points, self._scales.shape)
            self._zeros = _matrix(zeros.astype(np.float32))
        self._first = self._scales
        self._errors = self._errors_of(self._scales)

    def try_factor(self, factor: float) -> None:
        """Takes the first scales times this factor for the blocks where that is better."""
        scales = self._times(factor)
        errors = self._errors_of(scales)
        better = errors < self._errors
        self._errors = np.where(better, errors, self._errors)
        chosen = np.where(better.reshape(scales.shape), _bits(scales), _bits(self._scales))
        self._scales = chosen.view(scales.dtype).reshape(scales.shape)

    def result(self) -> Quantized:
        """The weights with the best scales."""
        codes = self._blocks.codes(self._fmt, self._decoded(self._scales), self._zeros)
        if self._start.scales is None:
            return dataclasses.replace(self._start, codes=codes, global_scale=self._scales)
        return dataclasses.replace(self._start, codes=codes, scales=self._scales)

    def _times(self, factor: float) -> Array:
        """The first scales times a factor, in their type; a scale that gets lost stays."""
        first = self._first
        if first.dtype == small_floats.E8M0:
            exponents = first.view(np.uint8).astype(np.int32) + int(np.log2(factor))
            return np.clip(exponents, 1, 254).astype(np.uint8).view(small_floats.E8M0)
        scaled = first.astype(np.float32) * np.float32(factor)
        if first.dtype == small_floats.E4M3:
            return small_floats.round_to_e4m3(scaled)
        with np.errstate(over="ignore"):
            rounded = scaled.astype(first.dtype)
        kept = np.where(np.isfinite(rounded.astype(np.float32)), _bits(rounded), _bits(first))
        return kept.view(first.dtype).reshape(first.shape)

    def _decoded(self, scales: Array) -> Array:
        """Scales as numbers, float32 [N / height, K / width]."""
        decoded = small_floats.decode_scales(scales, small_floats.scale_type_of(scales.dtype))
        return _matrix((decoded * self._global).astype(np.float32))

    def _errors_of(self, scales: Array) -> Array:
        """The squared error of each block."""
        return self._blocks.errors(self._fmt, self._decoded(scales), self._zeros, self._importance)


def _checked(importance: Array, k: int) -> Array:
    factors = np.ascontiguousarray(importance, dtype=np.float32)
    if factors.shape != (k,) or not np.isfinite(factors).all() or (factors < 0).any():
        raise ValueError(f"importance must be [{k}], finite and not negative")
    return factors


def _matrix(per_block: Array) -> Array:
    """One value a block in two dimensions, whatever the format keeps."""
    return per_block.reshape(per_block.shape[0] if per_block.ndim else 1, -1)


def _bits(values: Array) -> Array:
    """The same memory as integers, which numpy can choose among whatever the type is."""
    return np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}")
