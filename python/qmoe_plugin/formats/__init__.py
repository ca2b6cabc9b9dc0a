"""The quantised weight formats, one module each: a module with a ``FORMAT`` is registered here."""

from __future__ import annotations

import importlib
import pkgutil

from qmoe_plugin.formats.base import Format, Quantized, pack, unpack

__all__ = ["FORMATS", "Format", "Quantized", "for_attributes", "get", "pack", "unpack"]


def _load() -> dict[str, Format]:
    formats: dict[str, Format] = {}
    for module in pkgutil.iter_modules(__path__):
        if module.name == "base":
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


def for_attributes(quant_type: str, bits: int) -> Format:
    """The format of a QMoE projection with attribute `quant_type` and this many bits a weight.

    MatMulNBits is quant_type "int".
    """
    for candidate in FORMATS.values():
        attributes = candidate.qmoe_attributes
        if attributes["quant_type"] == quant_type and candidate.bits == bits:
            return candidate
    known = ", ".join(f"{f.qmoe_attributes['quant_type']} {f.bits} bit" for f in FORMATS.values())
    raise ValueError(f"no format has quant_type '{quant_type}' and {bits} bits; known: {known}")
