"""The quantised weight formats, one module each: a module with a ``FORMAT`` is registered here."""

from __future__ import annotations

import importlib
import pkgutil

from qmoe_plugin.formats.base import Format, Quantized
from qmoe_plugin.formats.packing import pack, unpack

__all__ = ["FORMATS", "Format", "Quantized", "for_attributes", "get", "pack", "unpack"]

_SHARED = ("base", "packing", "scales")  # what the formats are made of


def _load() -> dict[str, Format]:
    formats: dict[str, Format] = {}
    for module in pkgutil.iter_modules(__path__):
        if module.name in _SHARED:
            continue
        found: Format = importlib.import_module(f"{__name__}.{module.name}").FORMAT
        if found.name != module.name:
            raise ImportError(f"formats/{module.name}.py defines the format '{found.name}'")
        formats[found.name] = found
    return dict(sorted(formats.items()))


FORMATS: dict[str, Format] = _load()


def get(name: str) -> Format:
    """The format of that name; ValueError lists the known ones."""
    if name not in FORMATS:
        raise ValueError(f"format '{name}' is not known; known formats: {', '.join(FORMATS)}")
    return FORMATS[name]


def for_attributes(quant_type: str, bits: int | None = None) -> Format:
    """The format of a QMoE projection with attribute `quant_type` and this many bits a weight.

    MatMulNBits is quant_type "int". `bits` None means the node does not say: 4 for "int", else what
    the format has.
    """
    if bits is None and quant_type == "int":
        bits = 4
    for candidate in FORMATS.values():
        if quant_type in candidate.quant_types and bits in (None, candidate.bits):
            return candidate
    known = ", ".join(f"{t} {f.bits} bit" for f in FORMATS.values() for t in f.quant_types)
    raise ValueError(f"no format has quant_type '{quant_type}' and {bits} bits; known: {known}")
