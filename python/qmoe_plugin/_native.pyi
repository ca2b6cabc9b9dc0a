"""The compiled module: the kernel registry, and the fast paths of `qmoe_plugin.formats`."""

from typing import Any

import numpy as np
import numpy.typing as npt

def version() -> str:
    """Version of the library, as in "0.1.0"."""

def ort_api_range() -> tuple[int, int]:
    """Lowest and highest ONNX Runtime API version that the library was written for."""

def has_cuda() -> bool:
    """Whether CUDA kernels were compiled in."""

def cuda_archs() -> str:
    """The CUDA architectures that were compiled in, as in "80;90a"; "" without CUDA."""

def cuda_devices() -> list[int]:
    """Compute capability of each CUDA device (90 = Hopper); empty without a driver."""

def tuning_header(device: int) -> str:
    """The lines that a tuning file for a CUDA device begins with; "" if there is none."""

def kernels() -> list[dict[str, Any]]:
    """The support table: dicts with the fields of `qmoe_plugin_kernel` (include/qmoe_plugin.h)."""

def explain(
    *,
    device: str,
    sm: int,
    stage: str,
    format: str,
    dtype: str,
    activation: str,
    experts: int,
    rows: int,
    topk: int,
    n: int,
    k: int,
    block_size: int,
    zero_points: bool,
    accuracy_level: int,
) -> list[tuple[str, str]]:
    """The kernels of this format and device, best first, each with its refusal ("" for none)."""

def prepack(
    *,
    op: str,
    dtype: str,
    sm: int,
    attributes: dict[str, int | float | str],
    inputs: list[tuple[str, list[int], npt.NDArray[np.uint8]] | None],
) -> dict[str, npt.NDArray[np.uint8]]:
    """Packs the weights of a node: {"fc1": [bytes], "fc2": [bytes]}, or {"B": [bytes]}.

    Inputs are given by number as (type, shape, bytes); None = left out, or not constant.
    """

def read_packed(*, header: bytes, size: int) -> dict[str, Any]:
    """What the first 64 bytes say of packed weights of so many bytes (`qmoe_plugin_packed`)."""

def formats() -> list[dict[str, Any]]:
    """The registered formats, with the fields of `qmoe_plugin.formats.Format`.

    Those are name, bits, default_zero_point, zero_points, values, codebook, square_blocks, scales
    (scale_type) and block_size (only_block_size, 0 for None).
    """

def pack(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Packs codes [R, K] into bytes [R, ceil(K * bits / 8)], lowest bits first."""

def unpack(packed: npt.NDArray[np.uint8], bits: int, k: int) -> npt.NDArray[np.uint8]:
    """Undoes `pack`."""

def quantize(
    weights: npt.NDArray[np.float32], format: str, block_size: int, symmetric: bool
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32], npt.NDArray[np.uint8]]:
    """Quantises rows [R, K]: packed codes, scales [R, G], zero points [R, G]."""

def dequantize(
    codes: npt.NDArray[np.uint8],
    scales: npt.NDArray[np.float32],
    zero_points: npt.NDArray[np.float32] | None,
    format: str,
    k: int,
    block_size: int,
) -> npt.NDArray[np.float32]:
    """Decodes packed rows to [R, K]."""

def round_to_codes(
    weights: npt.NDArray[np.float32],
    values: list[float],
    scales: npt.NDArray[np.float32],
    zeros: npt.NDArray[np.float32] | None,
    default_zero: float,
    height: int,
    width: int,
) -> npt.NDArray[np.uint8]:
    """The nearest codes of [N, K] for scales [N / height, K / width], packed."""

def rounding_errors(
    weights: npt.NDArray[np.float32],
    values: list[float],
    scales: npt.NDArray[np.float32],
    zeros: npt.NDArray[np.float32] | None,
    default_zero: float,
    height: int,
    width: int,
    importance: npt.NDArray[np.float32] | None,
) -> npt.NDArray[np.float32]:
    """The sum of squared errors of each block, [N / height, K / width]."""
