"""How the modules that describe ops declare their attributes."""

from __future__ import annotations

from dataclasses import dataclass

Value = int | float | str


@dataclass(frozen=True)
class Attribute:
    """An attribute of an op.

    Attributes:
        kind: int, float or str.
        default: What leaving it out means; None if no value means the same.
        required: Whether a node must have it.
    """

    kind: type[int] | type[float] | type[str]
    default: Value | None = None
    required: bool = False


INT, FLOAT, STRING = Attribute(int), Attribute(float), Attribute(str)
"""Optional ones, for which no value means the same as leaving them out."""

REQUIRED_INT = Attribute(int, required=True)


def default(value: Value) -> Attribute:
    """An attribute that has this value if it is left out."""
    return Attribute(type(value), value)
