"""What a quantised weight format is on the Python side, and the arithmetic all formats share.

A weight is ``w = (values[code] - zero_point) * scale``. Shapes, with G = ceil(K / block_size)
blocks along K:

==============  ==================================  =====================================
tensor          block_size > 0                      block_size = 0 (per channel)
==============  ==================================  =====================================
codes           uint8 [..., N, ceil(K*bits/8)]      the same
scales          [..., N, G]                         float [..., N]
zero_points     uint8 [..., N, ceil(G*bits/8)]      uint8 [..., ceil(N*bits/8)]
==============  ==================================  =====================================

Codes and zero points are packed along their last axis, lowest bits first. These are the shapes of
the QMoE inputs; MatMulNBits has the same bytes with K padded to whole blocks.

Formats with scales of a small float type have a global scale too, float32 [...]: one factor an
expert on all of its weights. Formats with square blocks have scales float [..., ceil(N / b),
ceil(K / b)] for block_size b, partial at the edges, and for block_size 0 a global scale only.
Formats with a codebook take the values of their codes from the model, float [2^bits]:
`Format.with_codebook` makes a format of such values.

The numpy code here and in `rounding` is the specification. Where ``qmoe_plugin._native`` is built,
it does the same work faster for formats with float scales, and the tests compare the two bit by
bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from qmoe_plugin.formats import packing, rounding
from qmoe_plugin.formats import scales as small_floats
from qmoe_plugin.formats.packing import Array, pack, unpack
from qmoe_plugin.formats.rounding import Quantized
from qmoe_plugin.formats.scales import ScaleType

_LONGEST_NAME = 12  # what the header of packed weights has room for


@dataclass(frozen=True)
class Format:
    """A quantised weight format. Make one in a module of its own in this folder to add it.

    It must say what its C++ header says (docs/adding-a-format.md).

    Attributes:
        name: Name of the format, and of its C++ header: "int4". At most 12 characters.
        bits: Bits a code: 2, 4 or 8.
        values: What each code decodes to, float64 [2^bits]; NaN for codes that are no number.
        default_zero_point: Subtracted from the decoded code when a model gives no zero points.
        zero_points: Whether a model may give zero points.
        qmoe_attributes: Attributes of a QMoE node in this format; by default it is called by name.
        matmul_nbits_attributes: Attributes of a MatMulNBits node in this format; likewise.
        other_quant_types: Further values of quant_type with these weights.
        scale_type: Type of the scales. float8e8m0 and float8e4m3fn bring a global scale along, with
            "any" there may be one.
        only_block_size: The one block size that the format has; None = any, and per channel.
        square_blocks: Blocks are block_size rows high, too.
        codebook: The model gives the values; `values` are zeros until `with_codebook`.
    """

    name: str
    bits: int
    values: Array = field(repr=False)
    default_zero_point: float
    zero_points: bool
    qmoe_attributes: Mapping[str, int | str] = field(default_factory=dict, repr=False)
    matmul_nbits_attributes: Mapping[str, int | str] = field(default_factory=dict, repr=False)
    other_quant_types: tuple[str, ...] = ()
    scale_type: ScaleType = "float"
    only_block_size: int | None = None
    square_blocks: bool = False
    codebook: bool = False

    def __post_init__(self) -> None:
        """Checks the name, and that each code has a value; fills in the default attributes."""
        if not 0 < len(self.name) <= _LONGEST_NAME:
            raise ValueError(f"'{self.name}' is no name: it has at most {_LONGEST_NAME} characters")
        if self.values.shape != (1 << self.bits,):
            raise ValueError(
                f"{self.name}: values{self.values.shape} for {self.bits} bits, not {1 << self.bits}"
            )
        if not self.qmoe_attributes:
            by_name = {"quant_type": self.name, "expert_weight_bits": self.bits}
            object.__setattr__(self, "qmoe_attributes", by_name)
        if not self.matmul_nbits_attributes:
            by_name = {"weight_format": self.name, "bits": self.bits}
            object.__setattr__(self, "matmul_nbits_attributes", by_name)

    def with_codebook(self, codebook: npt.ArrayLike) -> Format:
        """The same format with these values of its codes.

        Args:
            codebook: [2^bits], finite, not all of them equal. float64 is rounded to float32, as a
                node holds no float64.

        Raises:
            ValueError: If the format has values of its own, or these are no codebook.
        """
        if not self.codebook:
            raise ValueError(f"{self.name} has values of its own and takes no codebook")
        values = np.asarray(codebook)
        if values.dtype == np.float64 or values.dtype.kind in "iu":
            values = values.astype(np.float32)
        values = values.astype(np.float64)
        if values.shape != self.values.shape:
            raise ValueError(
                f"a codebook of {self.name} is [{len(self.values)}], given {list(values.shape)}"
            )
        if not np.isfinite(values).all() or np.ptp(values) == 0:
            raise ValueError("a codebook must be finite, and its values not all equal")
        return replace(self, values=values)

    @property
    def codes_per_byte(self) -> int:
        """How many codes share a byte."""
        return 8 // self.bits

    @property
    def quant_types(self) -> tuple[str, ...]:
        """All values of quant_type with these weights; what quantisers write comes first."""
        return (str(self.qmoe_attributes["quant_type"]), *self.other_quant_types)

    def groups(self, k: int, block_size: int) -> int:
        """How many blocks cover k codes; one for block_size 0 (per channel)."""
        return -(-k // block_size) if block_size else 1

    def scale_shape(self, n: int, k: int, block_size: int) -> tuple[int, ...] | None:
        """Shape of the scales of one matrix [n, k]; None if it has a global scale only."""
        if self.square_blocks:
            return (-(-n // block_size), -(-k // block_size)) if block_size else None
        return (n, self.groups(k, block_size)) if block_size else (n,)

    def has_global_scale(self, block_size: int) -> bool:
        """Whether there must be a factor for each expert."""
        small_floats = self.scale_type in ("float8e8m0", "float8e4m3fn")
        return small_floats or (self.square_blocks and not block_size)

    @property
    def may_have_global_scale(self) -> bool:
        """Whether there may be a factor for each expert that need not be there."""
        return self.scale_type == "any"

    def pack(self, codes: Array) -> Array:
        """Packs codes [..., K] along the last axis, lowest bits first."""
        compiled = packing.native()
        if compiled is None or codes.dtype != np.uint8 or codes.size == 0:
            return pack(codes, self.bits)
        rows = np.ascontiguousarray(codes).reshape(-1, codes.shape[-1])
        packed: Array = compiled.pack(rows, self.bits)
        return packed.reshape(*codes.shape[:-1], -1)

    def unpack(self, packed: Array, k: int) -> Array:
        """Undoes `pack`: uint8 [..., k]."""
        compiled = packing.native()
        if compiled is None or packed.dtype != np.uint8 or packed.size == 0:
            return unpack(packed, self.bits, k)
        rows = np.ascontiguousarray(packed).reshape(-1, packed.shape[-1])
        codes: Array = compiled.unpack(rows, self.bits, k)
        return codes.reshape(*packed.shape[:-1], k)

    def quantize(
        self,
        weights: Array,
        block_size: int | None = None,
        *,
        symmetric: bool = True,
        signed_scales: bool = True,
        scale_dtype: npt.DTypeLike = np.float32,
        largest: float | None = None,
    ) -> Quantized:
        """Quantises by round-to-nearest.

        All arithmetic is float32, divisions included; ties go to the even code. NaN codes and
        negative zeros are never chosen. Scales of type e8m0 are the smallest that no weight of the
        block exceeds by more than half a step, their global scale is 1; scales of type e4m3 are the
        block's largest magnitude over the largest code, rounded, the global scale such that the
        expert's largest is 448.

        Args:
            weights: [..., N, K], any float type.
            block_size: Codes along K that share a scale; 0 for one scale a row (or an expert, of
                formats with square blocks). A partial last block is fine. None for the only one
                that the format has.
            symmetric: Without zero points. Otherwise each block's range, widened to hold 0, is
                spread over all codes.
            signed_scales: Of a symmetric format with float scales: let the element of the largest
                magnitude take the lowest code, by a negative scale if it is positive, as
                onnxruntime's quantize_matmul_4bits does. Otherwise scales are positive and the
                lowest integer code stays unused.
            scale_dtype: Type of scales that may have several. Codes are chosen for the scales as
                rounded to it.
            largest: Where `weights` are some rows of a matrix: the largest magnitude of all of
                them, which makes the global scale of formats that have one.

        Returns:
            The packed codes, scales, zero points, global scale and codebook.
        """
        weights = np.asarray(weights)
        if weights.ndim < 2 or weights.shape[-1] == 0:
            raise ValueError(f"weights must be [..., N, K] with K > 0, given {list(weights.shape)}")
        if not symmetric and not self.zero_points:
            raise ValueError(f"{self.name} has no zero points; quantise it with symmetric=True")
        block_size = self._check_block_size(block_size)
        values = np.ascontiguousarray(weights, dtype=np.float32)
        if not np.isfinite(values).all():
            raise ValueError("weights must be finite, given some NaN or infinity")
        if self.codebook:
            self._require_values()
            return rounding.by_codebook(
                self, values, block_size, signed_scales, np.dtype(scale_dtype)
            )
        if self.scale_type != "float" or self.square_blocks:
            return rounding.by_magnitude(self, values, block_size, np.dtype(scale_dtype), largest)
        return rounding.by_range(
            self, values, block_size, symmetric, signed_scales, np.dtype(scale_dtype)
        )

    def dequantize(
        self,
        codes: Array,
        scales: Array | None,
        zero_points: Array | None = None,
        *,
        k: int,
        block_size: int,
        global_scale: Array | None = None,
    ) -> Array:
        """Decodes packed weights exactly.

        Args:
            codes: uint8 (or float8_e4m3fn) [..., N, ceil(k * bits / 8)] or longer.
            scales: [..., N, G], or [..., N] when block_size is 0; [..., ceil(N / block_size), G]
                for square blocks; None for 1. uint8 is e8m0 where the format has such scales.
            zero_points: None, or one value a block already unpacked, shaped like `scales`, any
                numeric type.
            k: Codes in a row.
            block_size: Codes that share a scale; 0 = per channel.
            global_scale: None, or [...], a factor on all weights of a matrix.

        Returns:
            float64 [..., N, k].
        """
        self._require_values()
        weights = self.values[unpack(codes.view(np.uint8), self.bits, k)]
        if zero_points is None:
            weights -= self.default_zero_point
        else:
            weights = _apply(np.subtract, weights, zero_points, block_size)
        if scales is not None:
            per_block = small_floats.decode_scales(scales, self.scale_type)
            if self.square_blocks and block_size:
                per_block = np.repeat(per_block, block_size, axis=-2)[..., : weights.shape[-2], :]
            weights = _apply(np.multiply, weights, per_block, block_size)
        if global_scale is not None:
            weights *= np.asarray(global_scale).astype(np.float64)[..., None, None]
        return weights

    def unpack_zero_points(self, zero_points: Array, scales_shape: tuple[int, ...]) -> Array:
        """One code a block, in the shape of the scales: [..., N, G], per channel [..., N]."""
        return unpack(zero_points, self.bits, scales_shape[-1]).reshape(scales_shape)

    def _check_block_size(self, block_size: int | None) -> int:
        if block_size is None and self.only_block_size is None:
            raise ValueError(f"{self.name} has blocks of any size; say which (0 = one scale a row)")
        if block_size is None:
            return self.only_block_size or 0
        if block_size < 0 or self.only_block_size not in (None, block_size):
            allowed = self.only_block_size or "0 or positive"
            raise ValueError(f"block_size of {self.name} is {block_size}; it must be {allowed}")
        return block_size

    def _require_values(self) -> None:
        if self.codebook and not self.values.any():
            raise ValueError(
                f"{self.name} has no values of its own, the model gives them: take "
                "with_codebook(values) first"
            )


def _apply(
    operation: Callable[..., Array], weights: Array, per_block: Array, block_size: int
) -> Array:
    """`operation` of weights [..., N, K] and their blocks' values, [..., N, G], or [..., N].

    Overwrites `weights`.
    """
    per_block = np.asarray(per_block).astype(np.float64)
    if block_size == 0:
        return operation(weights, per_block[..., None], out=weights)
    groups, k = per_block.shape[-1], weights.shape[-1]
    if groups * block_size != k:  # the last block is a part of one
        return operation(weights, np.repeat(per_block, block_size, axis=-1)[..., :k], out=weights)
    blocks = weights.reshape(*weights.shape[:-1], groups, block_size)
    return operation(blocks, per_block[..., None], out=blocks).reshape(weights.shape)
