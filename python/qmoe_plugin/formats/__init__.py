"""The quantised weight formats, one module each: a module with a ``FORMAT`` is registered here.

Other packages add formats by an entry point of group ``qmoe_plugin.formats`` that is called like
the format and leads to its `Format` (docs/adding-a-format.md).
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
import warnings
from collections.abc import Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points

from qmoe_plugin.formats.base import Format
from qmoe_plugin.formats.packing import pack, unpack
from qmoe_plugin.formats.rounding import Quantized
from qmoe_plugin.formats.search import quantize_mse

__all__ = [
    "ENTRY_POINTS",
    "FORMATS",
    "PLAIN_FORMATS",
    "Format",
    "Quantized",
    "for_attributes",
    "get",
    "pack",
    "quantize_mse",
    "unpack",
]

ENTRY_POINTS = "qmoe_plugin.formats"
"""The group of entry points by which other packages add formats."""

_SHARED = ("base", "packing", "rounding", "scales", "search")  # what the formats are made of


class _Registry(Mapping[str, Format]):
    """All formats by name. They are looked for at the first use, not when this is imported."""

    @functools.cached_property
    def _found(self) -> dict[str, Format]:
        found = _own_formats()
        for entry in sorted(entry_points(group=ENTRY_POINTS), key=lambda entry: entry.name):
            try:
                found[entry.name] = _load(entry, found)
            except Exception as error:  # whatever the other package does
                self.broken[entry.name] = f"{type(error).__name__}: {error}"
                package = f" of {entry.dist.name}" if entry.dist is not None else ""
                warnings.warn(
                    f"the weight format '{entry.name}'{package} cannot be loaded and is left out: "
                    f"{self.broken[entry.name]} (entry point {entry.value})",
                    RuntimeWarning,
                    stacklevel=2,
                )
        return dict(sorted(found.items()))

    @functools.cached_property
    def broken(self) -> dict[str, str]:
        """Formats of other packages that could not be loaded, each with the reason."""
        return {}

    def __getitem__(self, name: str) -> Format:
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


def _own_formats() -> dict[str, Format]:
    formats: dict[str, Format] = {}
    for module in pkgutil.iter_modules(__path__):
        if module.name in _SHARED:
            continue
        found: Format = importlib.import_module(f"{__name__}.{module.name}").FORMAT
        if found.name != module.name:
            raise ImportError(f"formats/{module.name}.py defines the format '{found.name}'")
        formats[found.name] = found
    return formats


def _load(entry: EntryPoint, others: Mapping[str, Format]) -> Format:
    loaded = entry.load()
    if not isinstance(loaded, Format):
        raise TypeError(f"it must be a qmoe_plugin.formats.Format, and is {loaded!r}")
    if loaded.name != entry.name:
        raise ValueError(f"it is the format '{loaded.name}', as which it must be registered")
    if loaded.name in others:
        raise ValueError("there is a format of this name already")
    return loaded


_registry = _Registry()
FORMATS: Mapping[str, Format] = _registry
"""All formats by name, those of other packages too."""

PLAIN_FORMATS = {"bfloat16": 16, "float16": 16, "float32": 32}
"""Weights that are not quantised are formats of the library, too, called like their type: name and
bits. There is nothing to say of them here."""


def get(name: str) -> Format:
    """The format of that name; ValueError lists the known ones."""
    if name not in FORMATS:
        broken = f" ({_registry.broken[name]})" if name in _registry.broken else ""
        known = ", ".join(FORMATS)
        raise ValueError(f"format '{name}' is not known{broken}; known formats: {known}")
    return FORMATS[name]


def for_attributes(quant_type: str, bits: int | None = None) -> Format:
    """The format of a QMoE projection with attribute `quant_type` and this many bits a weight.

    Args:
        quant_type: One of com.microsoft's, or the name of a format. "int" for MatMulNBits.
        bits: None means the node does not say: 4 for "int", else what the format has.
    """
    if bits is None and quant_type == "int":
        bits = 4
    for candidate in FORMATS.values():
        named = quant_type in (candidate.name, *candidate.quant_types)
        if named and bits in (None, candidate.bits):
            return candidate
    known = ", ".join(f"{t} {f.bits} bit" for f in FORMATS.values() for t in f.quant_types)
    raise ValueError(f"no format has quant_type '{quant_type}' and {bits} bits; known: {known}")
