"""The parts of generated pages that come from results of bench_cpu.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gpu_pages import between
from gpu_pages import table as _table

README_CPU = (
    "cpu-amd-epyc-family-25-model-17-2t.json",
    "cpu-intel-r-xeon-r-processor-family-6-model-207-2t.json",  # has AMX
)
README_CASES = (
    "gpt-oss-20b int4 b32",
    "gpt-oss-20b mxfp4",
    "gpt-oss-20b int8 b32",
    "Qwen3-30B-A3B int4 b32",
    "MatMulNBits int4 b32 4096x14336",
)
README_MARKS = ("<!-- CPU numbers, written by ci/pages.py -->\n", "<!-- end of CPU numbers -->\n")


def sections(results: Path) -> list[str]:
    """A table for each file of results."""
    return [
        line
        for path in sorted(results.glob("cpu-*.json"))
        for line in _section(json.loads(path.read_text()))
    ]


def readme(results: Path, text: str) -> str:
    """The README with the CPU numbers of some files of results."""
    tables = "\n".join(_readme_table(results / name) for name in README_CPU)
    return between(README_MARKS, text, tables.splitlines())


def _readme_table(path: Path) -> str:
    """What a file of results says, and its table: tokens across, ours / stock."""
    content = json.loads(path.read_text())
    tokens = sorted({cell["tokens"] for case in content["cases"] for cell in case["cells"]})
    rows = []
    for case in content["cases"]:
        if case["name"] not in README_CASES or case["accuracy_level"] not in (0, 4):
            continue
        if case["stock_exact"]:
            continue
        times = {}
        for cell in case["cells"]:
            stock = _short(cell["stock"]["median_ms"]) if "stock" in cell else "none"
            times[cell["tokens"]] = f"{_short(cell['ours']['median_ms'])} / {stock}"
        rows.append((case["name"], case["accuracy_level"], *(times.get(t, "") for t in tokens)))
    header = ("layer", "level", *(f"{t} token{'s' * (t > 1)}" for t in tokens))
    intro = [
        f"On an {content['machine']}, milliseconds of one layer, ours / stock at the same",
        f"accuracy_level (0 is exact); onnxruntime {content['onnxruntime']}, threads: "
        f"{content['threads']}, clock: {content['clock']};",
        f"`ci/bench/results/{path.name}`, written by `ci/bench/bench_cpu.py`:",
        "",
    ]
    return "\n".join([*intro, *_table(header, rows)]) + "\n"


def _short(milliseconds: float) -> str:
    return f"{milliseconds:.3g}" if milliseconds < 100 else f"{milliseconds:.0f}"


def _section(content: dict[str, Any]) -> list[str]:
    rows = []
    for case in content["cases"]:
        for cell in case["cells"]:
            stock, floor = cell.get("stock"), cell.get("floor_ms")
            rows.append((
                case["name"], case.get("accuracy_level", content.get("accuracy_level")),
                cell["tokens"], f"{cell['ours']['median_ms']:.2f}",
                f"{stock['median_ms']:.2f}" if stock else "-",
                f"{cell['speedup']:.2f}" if stock else "-",
                f"{floor:.2f}" if floor else "-",
                f"{cell['of_floor']:.0%}" if floor else "-",
            ))  # fmt: skip
    return [
        f"## {_cpu_title(content)}",
        "",
        f"Milliseconds of one layer (clock: {content['clock']}), float32, both ops at the same "
        f"accuracy_level, onnxruntime {content['onnxruntime']}, {content['date'][:10]}.",
        *_rates(content),
        "",
        *_table(
            ("layer", "level", "tokens", "ours", "stock", "speedup", "floor", "ours of floor"), rows
        ),
        "",
        *_loads(content),
    ]


def _cpu_title(content: dict[str, Any]) -> str:
    isa = content["environment"].get("QMOE_PLUGIN_CPU_ISA")
    forced = f", our kernels forced to {isa}" if isa else ""
    return (
        f"{content['machine']}, {content['threads']} thread{'s' * (content['threads'] > 1)}{forced}"
    )


def _rates(content: dict[str, Any]) -> list[str]:
    """What the floors come from."""
    if "rates" not in content:
        return []
    others = {name: rate for name, rate in content["rates"].items() if name != "read_gb_per_s"}
    return [
        "The floor is the least time that memory or arithmetic takes, by rates of the same run: "
        f"{content['rates']['read_gb_per_s']:.1f} GB/s read, and, in 10^9 operations a second, "
        + ", ".join(f"{name} {rate:.0f}" for name, rate in others.items())
        + ".",
    ]


def _loads(content: dict[str, Any]) -> list[str]:
    """Times of making a session, the least of all levels of a case."""
    loads: dict[str, list[dict[str, Any]]] = {}
    for case in content["cases"]:
        if "load" in case:
            loads.setdefault(case["name"], []).append(case["load"])
    rows = []
    for name, found in loads.items():
        ours = min(load["ours"]["cpu_s"] for load in found)
        stock = min((load["stock"]["cpu_s"] for load in found if "stock" in load), default=None)
        rows.append((name, f"{ours:.2f}", "-" if stock is None else f"{stock:.2f}"))
    if not rows:
        return []
    text = "Making a session, which packs the weights: CPU seconds, of all cores together."
    return [text, "", *_table(("layer", "ours", "stock"), rows), ""]
