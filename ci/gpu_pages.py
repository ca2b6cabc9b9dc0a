"""What the pages say of GPU results: tables in Markdown, and a picture."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu_picture import Chart, picture

sys.path.insert(0, str(Path(__file__).resolve().parent / "bench"))

from gpu_bench.results import CONTESTANTS, Cell, cells_of, newest, of_floor, time_of
from gpu_bench.targets import DEVICE, Verdict, unmeasured, verdicts

NAMES = {"ours": "ours", "stock": "stock", "humming": "Humming"}
PEER_NOTE = (
    "Humming is the package humming-kernels; its times leave out the router, top-k, the sorting "
    "by expert and biases, which are in ours and the stock op's; its int8 and fp8 have one scale a "
    "row."
)
README_FILE = "gpu-nvidia-h200.json"
README_TOKENS = (1, 8, 64, 512, 2048)
README_CASES = (
    *(f"gpt-oss-20b {name}" for name in ("int4", "mxfp4", "nvfp4", "int8", "fp8", "wfp4afp8")),
    "qwen3-30b-a3b int4",
    "qwen3.6-35b-a3b int4",
    "gemma4-26b-a4b int4",
    "mixtral-8x7b int4",
    "MatMulNBits int4 4096x14336",
)
README_MARKS = ("<!-- GPU numbers, written by ci/pages.py -->\n", "<!-- end of GPU numbers -->\n")


def by_device(folder: Path) -> dict[str, list[Cell]]:
    """The newest cells of each device, by its name, of all files of results."""
    files: dict[str, list[list[Cell]]] = {}
    for path in sorted(folder.glob("gpu-[!t]*.json")):
        content = json.loads(path.read_text())
        files.setdefault(content["device"], []).append(cells_of(content))
    return {device: newest(cells) for device, cells in files.items()}


def sections(folder: Path) -> list[str]:
    """Lines for each device: every cell."""
    lines = []
    for device, cells in by_device(folder).items():
        lines += [f"## {device}", ""]
        for graph, words in ((True, "in a CUDA graph"), (False, "without a CUDA graph")):
            chosen = _in_order(cell for cell in cells if cell["graph"] == graph)
            if chosen:
                lines += [*_sentences(chosen, words), "", *_cells_table(chosen), ""]
        if device == DEVICE:
            lines += _targets(verdicts(_in_order(cells)), unmeasured(cells))
    return lines


def _targets(found: Sequence[Verdict], left: Mapping[str, Sequence[int]]) -> list[str]:
    """How much of each rule is met, each time that is not, and what was not measured."""
    rules: dict[str, list[Verdict]] = {}
    for verdict in found:
        rules.setdefault(verdict.rule, []).append(verdict)
    counts = [
        (rule, f"{sum(v.met for v in of_rule)} of {len(of_rule)}")
        for rule, of_rule in rules.items()
    ]
    missed = [
        (v.rule, v.case, v.tokens, _time(v.limit_us), _time(v.ours_us),
         f"{v.ours_us / v.limit_us:.2f}")
        for v in found if not v.met
    ]  # fmt: skip
    return [
        f"### Targets, {DEVICE}",
        "",
        "What `ci/bench/gpu_bench/targets.py` asks of our times, and where they exceed it.",
        "",
        *table(("ours at most", "met"), counts),
        "",
        *table(("ours at most", "layer", "tokens", "limit", "ours", "ours / limit"), missed),
        "",
        *([f"Without a cell: {_left(left)}.", ""] if left else []),
    ]


def _left(left: Mapping[str, Sequence[int]]) -> str:
    """Cases, and the numbers of tokens of those that have other cells."""
    return "; ".join(
        f"{case} with {', '.join(map(str, tokens))} tokens" if tokens else case
        for case, tokens in left.items()
    )


def overview(folder: Path) -> list[str]:
    """Lines for each device: the picture, and the share of the floor of each case."""
    lines = []
    for device, cells in by_device(folder).items():
        chosen = _in_order(cell for cell in cells if cell["graph"])
        if not chosen:
            continue
        names = _measured(chosen)
        lines += [
            f"**{device}**, in a CUDA graph: {' / '.join(NAMES[name] for name in names)}, in per "
            "cent of the floor; - is refused or not measured.",
            *([PEER_NOTE] if "humming" in names else []),
            "",
            f"![Share of the floor over tokens, {device}]({picture_name(device)})",
            "",
            *_shares_table(chosen, names),
            "",
        ]
    return lines


def readme(results: Path, text: str) -> str:
    """The README with the GPU numbers of some cells of README_FILE: tokens across, ours / stock."""
    content = json.loads((results / README_FILE).read_text())
    cells = {(cell["case"], cell["tokens"]): cell for cell in cells_of(content) if cell["graph"]}
    rows = [
        (case, *(_ours_and_stock(cells[case, tokens]) for tokens in README_TOKENS))
        for case in README_CASES
    ]
    chosen = [cells[case, tokens] for case in README_CASES for tokens in README_TOKENS]
    ours = _dates(cell["date"] for cell in chosen)
    stock = _dates(cell["stock"]["date"] for cell in chosen)
    lines = [
        f"On an {content['device']}, one layer in a CUDA graph, microseconds, ours ({ours}) /",
        f"stock ({stock}): medians, cold caches, float16, onnxruntime-gpu {_versions(chosen)};",
        f"`ci/bench/results/{README_FILE}`, written by `ci/bench/bench_gpu.py`.",
        "",
        *table(("layer", *(f"{t} token{'s' * (t > 1)}" for t in README_TOKENS)), rows),
    ]
    return between(README_MARKS, text, lines)


def _ours_and_stock(cell: Cell) -> str:
    stock = time_of(cell, "stock")
    other = "refused" if "refusal" in cell.get("stock", {}) else _time(stock)
    return f"{_time(time_of(cell, 'ours'))} / {other}"


def pictures(folder: Path) -> dict[str, str]:
    """The picture of each device, by the name of its file."""
    found = {}
    for device, cells in by_device(folder).items():
        chosen = _in_order(cell for cell in cells if cell["graph"])
        if not chosen:
            continue
        names = _measured(chosen)
        charts = [
            Chart(case, tuple(_points(of_case, name) for name in names))
            for case, of_case in _by_case(chosen).items()
        ]
        title = f"{device}: time of the floor over measured time, by tokens"
        labels = [NAMES[name] for name in names]
        found[picture_name(device)] = picture(title, labels, charts)
    return found


def picture_name(device: str) -> str:
    return f"gpu-{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.svg"


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(map(str, line))} |" for line in lines]


def between(marks: tuple[str, str], text: str, lines: Iterable[str]) -> str:
    """The text with new lines between two marks, which are lines of their own and come once."""
    first, last = marks
    before, rest = text.split(first)
    _, after = rest.split(last)
    return "".join([before, first, *(f"{line}\n" for line in lines), last, after])


def _versions(cells: Iterable[Cell]) -> str:
    return " and ".join(sorted({cell["onnxruntime"] for cell in cells}))


def _dates(dates: Iterable[str]) -> str:
    """As in "2026-11-21 to 2026-11-23"."""
    days = sorted(date[:10] for date in dates)
    return days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"


def _sentences(cells: Sequence[Cell], words: str) -> list[str]:
    when = _dates(cell["date"] for cell in cells)
    lines = [
        f"Microseconds of one layer {words}, median, onnxruntime-gpu {_versions(cells)}, {when}. "
        "The floor",
        "is the least time that memory or arithmetic takes.",
    ]
    return [*lines, PEER_NOTE] if "humming" in _measured(cells) else lines


def _in_order(cells: Iterable[Cell]) -> list[Cell]:
    """By case, in the order in which they first come, and tokens."""
    return [
        cell
        for of_case in _by_case(list(cells)).values()
        for cell in sorted(of_case, key=lambda cell: int(cell["tokens"]))
    ]


def _by_case(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        found.setdefault(cell["case"], []).append(cell)
    return found


def _measured(cells: Sequence[Cell]) -> list[str]:
    return [name for name in CONTESTANTS if any(time_of(cell, name) for cell in cells)]


def _points(cells: Sequence[Cell], name: str) -> tuple[tuple[int, float], ...]:
    shares = [(cell["tokens"], of_floor(cell, name)) for cell in cells]
    return tuple((tokens, share) for tokens, share in shares if share is not None)


def _cells_table(cells: Sequence[Cell]) -> list[str]:
    others = [name for name in _measured(cells) if name != "ours"]
    header = ["layer", "tokens", "floor", "ours", "p95", "ours of floor"]
    for name in others:
        header += [NAMES[name], f"{NAMES[name]} / ours"]
    rows = []
    for cell in cells:
        ours, share = time_of(cell, "ours"), of_floor(cell, "ours")
        row = [cell["case"], cell["tokens"], _time(cell["floor_us"]), _time(ours)]
        row += [_time(cell["ours"].get("p95_us")), "-" if share is None else f"{share:.0%}"]
        for name in others:
            time = time_of(cell, name)
            row.append(_time(time))
            row.append("-" if time is None or ours is None else f"{time / ours:.2f}")
        rows.append(row)
    return table(header, rows)


def _shares_table(cells: Sequence[Cell], names: Sequence[str]) -> list[str]:
    tokens = sorted({cell["tokens"] for cell in cells})
    rows = []
    for case, of_case in _by_case(cells).items():
        found = {cell["tokens"]: cell for cell in of_case}
        row = [case]
        for count in tokens:
            shares = [of_floor(found[count], name) if count in found else None for name in names]
            texts = ["-" if share is None else f"{100 * share:.0f}" for share in shares]
            row.append(" / ".join(texts) if any(shares) else "")
        rows.append(row)
    return table(["layer", *map(str, tokens)], rows)


def _time(microseconds: float | None) -> str:
    """With three digits or so."""
    if microseconds is None:
        return "-"
    digits = 0 if microseconds >= 100 else 1 if microseconds >= 10 else 2
    return f"{microseconds:.{digits}f}"
