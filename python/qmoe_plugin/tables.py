"""The support table as text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from qmoe_plugin.formats import PLAIN_FORMATS, Format
from qmoe_plugin.kernels import Kernel

_FORMAT_HEADER = ("format", "bits", "zero points", "default zero point", "scales", "blocks")
_SCALES = {
    "float": "float32, float16, bfloat16",
    "float8e8m0": "float8e8m0 and a global scale",
    "float8e4m3fn": "float8e4m3fn and a global scale",
    "any": "float types, float8e8m0 or float8e4m3fn; a global scale or none",
}
_HEADER = ("kernel", "format", "device", "activations", "priority", "limits")


def kernel_table(kernels: Sequence[Kernel]) -> str:
    """The kernels, for a terminal; those that this processor cannot run are marked."""
    rows = [
        (*_cells(kernel)[:-1], kernel.limits + ("" if kernel.available else " (not on this CPU)"))
        for kernel in kernels
    ]
    return "\n".join(text_table(_HEADER, rows))


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table for a terminal."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [header, *rows]
    ]


_AARCH64 = (
    "Built for AArch64, these are `gemm_reference` and `gemm_neon` in every format, and for",
    "accuracy_level 4 `gemm_neon_dotprod` and `gemm_neon_i8mm` in int2, int4, int8, mxfp4 and",
    "nvfp4. They are tested under qemu-user only, and have never run on real hardware.",
)


def support_page(kernels: Sequence[Kernel], formats: Iterable[Format]) -> str:
    """The page docs/support.md: formats and kernels. The same on every machine."""
    lines = [
        "# Support table",
        "",
        "Generated from the registry by `python -m qmoe_plugin kernels --markdown`; do not edit.",
        "",
        "Each kernel computes the matrix products of all ops: fc1 and fc2 of QMoE, and of MoE in",
        "float32, float16 and bfloat16, which are not quantised; MatMulNBits in int2, int4, int8;",
        "MatMulBlockQuantizedFp8Weight in fp8_e4m3; MatMulBlockQuantizedFp4Weight in nvfp4.",
        "Of the kernels that can run a problem, the one with the highest priority is taken;",
        "`qmoe_plugin.explain(node)` shows which, and why each of the others does not run it.",
        "",
        "## Formats",
        "",
        *_markdown(_FORMAT_HEADER, _format_rows(formats)),
        "",
    ]
    for device in ("CPU", "CUDA"):
        rows = [_cells(kernel) for kernel in kernels if kernel.device == device]
        lines += [f"## {device} kernels", ""]
        if rows and device == "CUDA":
            lines += [*_CUDA_HARDWARE, ""]
        if rows:
            lines += [*_markdown(_HEADER, rows), ""]
        else:
            lines += [f"This build has no {device} kernels.", ""]
        if device == "CPU" and not any(row[0].startswith("gemm_neon") for row in rows):
            lines += [*_AARCH64, ""]
    return "\n".join(lines).rstrip()


_CUDA_HARDWARE = (
    "Of these GPU generations, only sm_90 (H200) has run them. For sm_80, sm_86, sm_89, sm_100 and",
    "sm_120 they are compiled, and run on an emulated GPU, which says nothing of their speed.",
)


def _cells(kernel: Kernel) -> tuple[str, ...]:
    where: str = kernel.device
    if kernel.device == "CUDA":
        where = f"sm_{kernel.min_sm}"
        if kernel.max_sm != kernel.min_sm:
            where += f" to sm_{kernel.max_sm}"
    dtypes = ", ".join(kernel.dtypes)
    return (kernel.name, kernel.format, where, dtypes, str(kernel.priority), kernel.limits)


def _format_rows(formats: Iterable[Format]) -> list[tuple[str, ...]]:
    quantized = [
        (
            f.name,
            str(f.bits),
            "yes" if f.zero_points else "no",
            f"{f.default_zero_point:g}",
            _SCALES[f.scale_type],
            _blocks(f),
        )
        for f in formats
    ]
    plain = [(name, str(bits), "no", "0", "none", "none") for name, bits in PLAIN_FORMATS.items()]
    return sorted([*quantized, *plain])


def _blocks(fmt: Format) -> str:
    if fmt.square_blocks:
        return "square, any size, or one an expert"
    return str(fmt.only_block_size) if fmt.only_block_size else "any size, or one a row"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]
