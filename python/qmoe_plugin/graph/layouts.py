"""Decides how the weights of a QMoE node are laid out, by the rules of ops/ort/qmoe_layout.h.

==========  ===========================  ========================================================
layout      shape                        of
==========  ===========================  ========================================================
raw         [E, N, K * bits / 8]         any format; the only one that com.microsoft lacks
fpa_intb    [E, K, N * bits / 8]         "int" of 4 and 8 bits, prepacked for stock CUDA kernels
k_major     [E, K, N * bits / 8]         the 4-bit floats, as stock CUDA kernels want them
==========  ===========================  ========================================================

Weights that were packed before say themselves what they are: `qmoe_plugin.graph.packed`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from qmoe_plugin.graph.describe import UnsupportedError
from qmoe_plugin.graph.formats import QMoEFormats
from qmoe_plugin.graph.inputs import integer, string
from qmoe_plugin.graph.packed import LAYOUT_ATTRIBUTE
from qmoe_plugin.graph.projections import Projection

NAMES = {
    "raw": "raw",
    "k_major": "K-major",
    "fpa_intb": "SM80 prepacked (fpA_intB)",
    "fpa_intb90": "SM90 prepacked (fpA_intB)",
}


@dataclass(frozen=True)
class LayoutDecision:
    """What was decided.

    Attributes:
        layout: "raw", "fpa_intb" or "k_major".
        attributes: What says so in the node.
        warning: That it was a guess; "" if the node or its shapes say so.
    """

    layout: str
    attributes: dict[str, int | str]
    warning: str = ""


def decide_layout(
    node: ir.Node, formats: QMoEFormats, projections: Sequence[Projection]
) -> LayoutDecision:
    """Decides by attributes, then by the shapes of all projections, then by custom.

    Raises:
        UnsupportedError: For attributes that contradict each other, and weights that no layout
            fits.
    """
    stated = _stated(node, formats)
    refusals = {layout: _refusal(layout, projections) for layout in stated}
    fitting = [layout for layout in stated if not refusals[layout]]
    if not fitting:
        said = "" if len(stated) == len(formats.layouts) else ", as the node's attributes say"
        raise UnsupportedError(". Or: ".join(refusals.values()) + said)
    layout = fitting[0]
    if len(fitting) == 1:
        return LayoutDecision(layout, _attributes(layout, formats))
    right, wrong = (
        f"{attribute}={value}"
        for name in fitting
        for attribute, value in _attributes(name, formats).items()
    )
    warning = (
        f"the node does not say whether its weights are {NAMES[layout]} or {NAMES[fitting[1]]}, "
        f"and both have the same shapes; they are read as {NAMES[layout]}. Write {right} if that "
        f"is right, and {wrong} if it is not"
    )
    return LayoutDecision(layout, _attributes(layout, formats), warning)


def refuse_layout(layout: str, n: int, k: int, bits: int) -> str:
    """Why the layout cannot hold a matrix of these codes; "" if it can."""
    if layout == "k_major" and n * bits % 8:
        return f"rows of {n} codes of {bits} bits do not fill bytes"
    if layout not in ("fpa_intb", "fpa_intb90"):
        return ""
    if bits not in (4, 8):
        return f"it holds 4-bit and 8-bit codes, not {bits}-bit ones"
    rows = 32 if bits == 4 else 16
    if k % 64 or n % rows:
        return f"it needs a multiple of 64 columns and of {rows} rows, not {n} x {k}"
    return ""


def _attributes(layout: str, formats: QMoEFormats) -> dict[str, int | str]:
    if formats.is_integer:
        return {"weights_prepacked": int(layout == "fpa_intb")}
    return {LAYOUT_ATTRIBUTE: layout} if len(formats.layouts) > 1 else {}


def _stated(node: ir.Node, formats: QMoEFormats) -> tuple[str, ...]:
    """What the attributes leave of the allowed layouts."""
    allowed = formats.layouts
    prepacked = integer(node, "weights_prepacked", -1)
    name = string(node, LAYOUT_ATTRIBUTE, "")
    if prepacked not in (-1, 0, 1):
        raise UnsupportedError(f"weights_prepacked is {prepacked}; allowed are -1, 0 and 1")
    if prepacked == 1 and not formats.is_integer:
        raise UnsupportedError(
            f"weights_prepacked is 1, which belongs to quant_type 'int', not {formats.says}"
        )
    says = prepacked >= 0 and formats.is_integer
    said = "fpa_intb" if prepacked == 1 else "raw"
    if not name:
        return (said,) if says else allowed
    if name not in allowed:
        raise UnsupportedError(
            f"{LAYOUT_ATTRIBUTE} is '{name}'; allowed with {formats.says} are " + ", ".join(allowed)
        )
    if says and said != name:
        raise UnsupportedError(
            f"{LAYOUT_ATTRIBUTE} is '{name}', but weights_prepacked={prepacked} says '{said}'"
        )
    return (name,)


def _refusal(layout: str, projections: Sequence[Projection]) -> str:
    """Why these weights cannot be laid out so; "" if they can."""
    for p in projections:
        rows, columns = (p.n, p.k) if layout == "raw" else (p.k, p.n)
        codes, bits = p.tensors.codes, p.tensors.plan.format.bits
        wanted = (p.experts, rows, columns * bits // 8)
        if codes.shape != wanted:
            return f"{codes} must have shape {list(wanted)} if {NAMES[layout]}"
        refusal = refuse_layout(layout, p.n, p.k, bits)
        if refusal:
            return f"{codes} cannot be {NAMES[layout]}: {refusal}"
    return ""
