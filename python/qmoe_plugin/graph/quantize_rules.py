"""Which format a weight gets: format specs such as "int4:64:asymmetric", and ordered rules."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qmoe_plugin import formats
from qmoe_plugin.formats import codebook4

KEEP = "keep"
"""The spec of weights that stay in float."""

_CODEBOOKS = {"nf4": codebook4.NF4, "af4": codebook4.AF4, "iq4_nl": codebook4.IQ4_NL}
_ASYMMETRIC = "asymmetric"
_HOW = "a spec is FORMAT[:BLOCK][:asymmetric], as in int4, int4:64, int8:128:asymmetric, or keep"


@dataclass(frozen=True)
class Spec:
    """A format with its options.

    Attributes:
        format: With its values, if it takes a codebook.
        block_size: Weights along K that share a scale; 0 = one scale a row, or an expert. None for
            what suits the node.
        symmetric: Without zero points.
        text: As it was written.
    """

    format: formats.Format
    block_size: int | None
    symmetric: bool
    text: str

    def __str__(self) -> str:
        """As it was written."""
        return self.text


def parse_spec(text: str) -> Spec | None:
    """What a spec says; None for "keep".

    Raises:
        ValueError: If it is none, or its format does not have what it asks for.
    """
    if text == KEEP:
        return None
    name, *options = text.split(":")
    fmt = _format(name)
    symmetric, block_size = True, None
    if options and options[-1] == _ASYMMETRIC:
        symmetric = False
        options.pop()
    if options and options[0].isdecimal():
        block_size = int(options.pop(0))
    if options:
        raise ValueError(f"'{text}' is no spec: {_HOW}")
    if not symmetric and not fmt.zero_points:
        raise ValueError(f"'{text}': {name} has no zero points; leave :{_ASYMMETRIC} out")
    if fmt.only_block_size is not None and block_size not in (None, fmt.only_block_size):
        raise ValueError(f"'{text}': {name} has blocks of {fmt.only_block_size}")
    if block_size and (not 16 <= block_size <= 65536 or block_size & (block_size - 1)):
        raise ValueError(
            f"'{text}': blocks of {block_size}; they must be 0 or a power of two from 16 to 65536"
        )
    return Spec(fmt, fmt.only_block_size or block_size, symmetric, text)


def parse_rule(text: str) -> tuple[str, str]:
    """The regular expression and the spec of REGEX=FORMAT."""
    pattern, equals, spec = text.rpartition("=")
    if not equals:
        raise ValueError(f"'{text}' is no rule: write REGEX=FORMAT, as in experts.*down=int8")
    return pattern, spec


class Rules:
    """Ordered rules, of which the first that matches a name counts."""

    def __init__(self, rules: Sequence[tuple[str, str]], default: str) -> None:
        """Parses them.

        Args:
            rules: Regular expressions that are searched in names, each with a spec.
            default: The spec of what no rule matches.

        Raises:
            ValueError: For bad expressions and specs.
        """
        self.default = parse_spec(default)
        self._rules = [(_compiled(pattern), parse_spec(spec)) for pattern, spec in rules]
        self._texts = tuple(f"{pattern}={spec}" for pattern, spec in rules)
        self._matched: set[int] = set()

    def find(self, names: Iterable[str | None]) -> tuple[str, Spec | None] | None:
        """The text and the spec of the first rule that matches one of the names; None if none."""
        known = [name for name in names if name]
        for index, (pattern, spec) in enumerate(self._rules):
            if any(pattern.search(name) for name in known):
                self._matched.add(index)
                return self._texts[index], spec
        return None

    @property
    def unmatched(self) -> tuple[str, ...]:
        """The rules that counted for no weight so far."""
        return tuple(t for index, t in enumerate(self._texts) if index not in self._matched)


def _format(name: str) -> formats.Format:
    if name in _CODEBOOKS:
        return codebook4.FORMAT.with_codebook(_CODEBOOKS[name])
    try:
        fmt = formats.get(name)
    except ValueError as error:
        raise ValueError(f"{error}, {', '.join(_CODEBOOKS)}; {_HOW}") from None
    if fmt.codebook:
        raise ValueError(
            f"{name} has no values of its own; write {', '.join(_CODEBOOKS)} for its known ones"
        )
    return fmt


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"'{pattern}' is no regular expression: {error}") from None
