"""What an H200 is to reach, and what of it a file of results shows to be met.

Times are of one node in a CUDA graph. The rules compare cells with each other, so that a kernel
which is fast at the sizes of the table, and not between them, shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .cases import select
from .results import Cell, of_floor, time_of

DEVICE = "NVIDIA H200"

TARGETS_US: dict[str, dict[int, float]] = {
    "gpt-oss-20b int4": {1: 19, 8: 84, 64: 127, 512: 230, 2048: 700, 8192: 2700},
    "gpt-oss-20b mxfp4": {1: 18, 8: 80, 64: 120, 512: 230, 2048: 700},
    "gpt-oss-20b int8": {1: 31, 8: 145, 64: 220, 2048: 750},
    "gpt-oss-20b fp8": {1: 31, 8: 145, 64: 220, 2048: 750},
    "gpt-oss-20b nvfp4": {1: 20, 8: 88, 64: 132, 2048: 750},
    "gpt-oss-20b wfp4afp8": {512: 170, 2048: 450},
    "qwen3-30b-a3b int4": {1: 10, 8: 42, 64: 95, 512: 130, 2048: 300},
    "qwen3.6-35b-a3b int4": {1: 8, 8: 33, 64: 112, 512: 140, 2048: 240},
    "gemma4-26b-a4b int4": {1: 11, 8: 52, 64: 118, 2048: 360},
    "mixtral-8x7b int4": {1: 58, 8: 195, 64: 220, 2048: 2300},
    "gpt-oss-120b int4": {512: 500, 2048: 750},
    "MatMulNBits int4 4096x14336": {1: 10, 8: 11, 64: 17, 512: 100, 2048: 360},
    "MatMulNBits int4 2880x5120": {1: 5, 8: 5.5, 64: 8},
    "MatMulNBits int4 2880x32 with bias": {1: 2.5, 8: 3, 64: 4},
    "MatMulNBits int4 8192x8192": {1: 12, 8192: 1571},  # 700 TFLOP/s
}

CLIFF = 1.1  # times what the next power of two of tokens takes
VARIANT = 1.1  # times what float16 takes, or weights without zero points
BIAS = 1.03  # times what the product without takes: the noise of such measurements
SKEWED_DECODE, SKEWED_PREFILL = 1.03, 1.15  # times the uniform time, per byte and per operation
STOCK_4_BIT = 2.0  # times as fast as the stock op
PREFILL_TOKENS = 512


@dataclass(frozen=True)
class Verdict:
    """What one target or rule says of one cell.

    Attributes:
        rule: In a few words.
        case: Name of the case.
        tokens: Of the cell.
        limit_us: What our time must not exceed.
        ours_us: Our time.
    """

    rule: str
    case: str
    tokens: int
    limit_us: float
    ours_us: float

    @property
    def met(self) -> bool:
        return self.ours_us <= self.limit_us


def verdicts(cells: Iterable[Cell]) -> list[Verdict]:
    """What all targets and rules say of the cells that they are about."""
    graph = _in_graph(cells)
    return [verdict for rule in _RULES for verdict in rule(graph)]


def unmeasured(cells: Iterable[Cell]) -> dict[str, list[int]]:
    """By case, the tokens of targets without a cell; [] for listed cases that have no cell."""
    measured = {at for at, cell in _in_graph(cells).items() if time_of(cell, "ours") is not None}
    names = {name for name, _ in measured}
    left = {
        case.name: [
            tokens
            for tokens in TARGETS_US.get(case.name, {})
            if case.name in names and (case.name, tokens) not in measured
        ]
        for case in select()
    }
    return {name: tokens for name, tokens in left.items() if tokens or name not in names}


Cells = dict[tuple[str, int], Cell]


def _in_graph(cells: Iterable[Cell]) -> Cells:
    return {(cell["case"], cell["tokens"]): cell for cell in cells if cell["graph"]}


def _against(cells: Cells, rule: str, limit: Callable[[Cell], float | None]) -> list[Verdict]:
    """A verdict for each cell that has a limit."""
    found = []
    for (case, tokens), cell in cells.items():
        ours, most = time_of(cell, "ours"), limit(cell)
        if ours is not None and most is not None:
            found.append(Verdict(rule, case, tokens, most, ours))
    return found


def _targets(cells: Cells) -> list[Verdict]:
    return _against(
        cells, "target", lambda cell: TARGETS_US.get(cell["case"], {}).get(cell["tokens"])
    )


def _no_cliffs(cells: Cells) -> list[Verdict]:
    def limit(cell: Cell) -> float | None:
        return _times(CLIFF, _ours(cells, cell["case"], 2 * cell["tokens"]))

    return _against(cells, "1.1 times the next power of two", limit)


def _variants(cells: Cells) -> list[Verdict]:
    """bfloat16 both ways, zero points and biases."""
    found = []
    for suffix, factor, rule in (
        (" bfloat16", VARIANT, "1.1 times float16"),
        (" with zero points", VARIANT, "1.1 times without zero points"),
        (" with bias", BIAS, "bias is free"),
    ):
        found += _against(cells, rule, _limit_of_plain(cells, suffix, factor))
    found += _against(
        cells,
        "1.1 times bfloat16",
        lambda cell: _times(VARIANT, _ours(cells, f"{cell['case']} bfloat16", cell["tokens"])),
    )
    return found


def _limit_of_plain(cells: Cells, suffix: str, factor: float) -> Callable[[Cell], float | None]:
    def limit(cell: Cell) -> float | None:
        plain = cell["case"].removesuffix(suffix)
        return (
            None if plain == cell["case"] else _times(factor, _ours(cells, plain, cell["tokens"]))
        )

    return limit


def _skewed(cells: Cells) -> list[Verdict]:
    """Where memory bounds, the same share of the floor; else the same time, as operations are."""

    def limit(cell: Cell) -> float | None:
        plain = cells.get((cell["case"].removesuffix(" skewed"), cell["tokens"]))
        if plain is None or plain is cell:
            return None
        if cell["tokens"] >= PREFILL_TOKENS:
            return _times(SKEWED_PREFILL, time_of(plain, "ours"))
        share = of_floor(plain, "ours")
        return None if share is None else SKEWED_DECODE * cell["floor_us"] / share

    return _against(cells, "as uniform routing", limit)


def _stock(cells: Cells) -> list[Verdict]:
    def limit(cell: Cell) -> float | None:
        four_bits = any(f" {name}" in cell["case"] for name in ("int4", "mxfp4", "nvfp4"))
        dense = cell["case"].startswith("MatMulNBits")
        return _times(1 / (STOCK_4_BIT if four_bits and not dense else 1), time_of(cell, "stock"))

    return _against(cells, "stock, half of it for QMoE in 4 bits", limit)


def _peer(cells: Cells) -> list[Verdict]:
    return _against(cells, "Humming", lambda cell: time_of(cell, "humming"))


_RULES = (_targets, _no_cliffs, _variants, _skewed, _stock, _peer)


def _ours(cells: Cells, case: str, tokens: int) -> float | None:
    cell = cells.get((case, tokens))
    return None if cell is None else time_of(cell, "ours")


def _times(factor: float, time: float | None) -> float | None:
    return None if time is None else factor * time
