"""One HTML page on a model, with pictures, that needs no other file."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from qmoe_plugin.bench import BenchReport, bench
from qmoe_plugin.expert_load import ExpertLoad, expert_load
from qmoe_plugin.inspection import Inspection, inspect
from qmoe_plugin.report import logger
from qmoe_plugin.sample_inputs import Wanted, known_dims, sample_inputs
from qmoe_plugin.svg import Bar, bars, heat_map
from qmoe_plugin.taps import Source
from qmoe_plugin.units import format_bytes, percent
from qmoe_plugin.verify import VerifyReport, verify

_STYLE = """body { font-family: sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; } td, th { text-align: left; padding: 0.2em 1em 0.2em 0; }
.missing { color: #a33; } svg { max-width: 100%; height: auto; }"""


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        title: Its heading.
        body: HTML.
        missing: Why there is nothing to show; "" if there is.
    """

    title: str
    body: str
    missing: str = ""


def make_page(
    model: Path,
    reference: Path | None = None,
    *,
    inputs: Wanted | None = None,
    repeat: int = 20,
    cpu: bool = False,
) -> tuple[str, tuple[Section, ...]]:
    """Makes the page of a model.

    What cannot be measured (a model that stock kernels do not run has no error against them) is
    said in its place.

    Args:
        model: Path of the model.
        reference: Path of the model to compare with, for instance in float; None for the stock
            kernels on the same model.
        inputs: What to feed.
        repeat: Runs to time.
        cpu: Run on the CPU even where there is a GPU.

    Returns:
        The page, and its sections.

    Raises:
        ValueError: If it is no model, inputs cannot be made, or repeat is not positive.
    """
    if repeat < 1:
        raise ValueError(f"repeat is {repeat}; at least 1 is needed")
    wanted = inputs or Wanted()
    sample_inputs(Source.read(model).graph(), known_dims(wanted, model))  # wrong ones fail it all
    pair = (model, None) if reference is None else (reference, model)
    found = inspect(model, sm=0 if cpu else None, tokens=wanted.tokens)
    sections = (
        _bytes_section(found),
        _try(
            "Error of each layer",
            lambda: _error_body(verify(*pair, inputs=wanted, cpu=cpu)),
        ),
        _try(
            "Time of each kernel",
            lambda: _time_body(bench(model, inputs=wanted, repeat=repeat, cpu=cpu), found),
        ),
        _try("Load of experts", lambda: _load_body(expert_load(model, wanted, cpu=cpu))),
    )
    return _page(model.name, sections), sections


def _try(title: str, make: Callable[[], str]) -> Section:
    try:
        body = make()
    except (RuntimeError, ValueError) as error:
        return Section(title, "", str(error))
    logger.info("%s: done", title)
    return Section(title, body)


def _page(name: str, sections: Sequence[Section]) -> str:
    parts = []
    for section in sections:
        body = section.body
        if section.missing:
            body = f'<p class="missing">Not available: {escape(section.missing)}</p>'
        parts.append(f"<h2>{escape(section.title)}</h2>\n{body}")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(name)}</title><style>{_STYLE}</style></head>\n"
        f"<body><h1>{escape(name)}</h1>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _bytes_section(found: Inspection) -> Section:
    total = sum(found.bytes_by_format.values())
    rows = [
        Bar(name, (size,), (f"{format_bytes(size)}, {percent(size, total)}",))
        for name, size in found.bytes_by_format.items()
    ]
    tokens = f"{found.tokens} token{'s' * (found.tokens != 1)}"
    facts = [("device", found.target), ("nodes of our ops", str(len(found.nodes)))]
    if found.experts.total:
        facts += [
            ("experts", format_bytes(found.experts.total)),
            ("experts, quantised", percent(found.experts.quantized, found.experts.total)),
            ("experts, run by our kernels", percent(found.experts.ours, found.experts.total)),
        ]
    if found.floor_us is not None:
        facts.append((f"least time to read the weights for {tokens}", f"{found.floor_us:.1f} us"))
    return Section(
        "Bytes by format", bars("Bytes of constants by format", ("bytes",), rows) + _table(facts)
    )


def _error_body(report: VerifyReport) -> str:
    title = "Signal to noise ratio of each node's output in dB; higher is better"
    rows = []
    for node in report.nodes:
        both = (None if node.own is None else node.own.sqnr, node.total.sqnr)
        texts = (_decibel_text(both[0]), _decibel_text(both[1]))
        rows.append(Bar(node.name, (_decibels(both[0]), _decibels(both[1])), texts))
    facts = []
    for output in report.outputs:
        agreement = "" if output.agreement is None else f", same top token {output.agreement:.1%}"
        sqnr = _decibel_text(output.error.sqnr)
        facts.append((output.name, f"SQNR {sqnr}, largest {output.error.max:.3g}{agreement}"))
    return (
        f"<p>{escape(report.second)} against {escape(report.first)}, on {escape(report.target)}. "
        f"{title}.</p>" + bars(title, ("by itself", "so far"), rows) + _table(facts)
    )


def _decibels(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) and value > 0 else None


def _decibel_text(value: float | None) -> str:
    if value is None:
        return "-"
    return "equal" if value == math.inf else f"{value:.1f} dB"


def _time_body(report: BenchReport, found: Inspection) -> str:
    facts = [("run, our kernels", f"{report.ours.median_ms:.3f} ms")]
    if report.stock is not None:
        facts.append(("run, stock kernels", f"{report.stock.median_ms:.3f} ms"))
    if report.ours.others_us is not None:
        facts.append(("nodes of other ops", f"{report.ours.others_us:.0f} us"))
    notes = [report.stock_reason and f"Stock: {report.stock_reason}"]
    if report.nodes:
        notes.append(f"Times of nodes: {report.nodes_timed}.")
    else:
        notes.append("No node has a time: those in subgraphs and functions have none.")
    notes.append(report.gaps)
    note = "".join(f"<p>{escape(text)}</p>" for text in notes if text)
    if not report.nodes:
        return note + _table(facts)
    series = ("ours", "stock") if report.stock is not None else ("ours",)
    rows = []
    for node in report.nodes:
        times = (node.ours_us, node.stock_us)[: len(series)]
        texts = tuple("-" if time is None else f"{time:.0f} us" for time in times)
        rows.append(Bar(node.name, times, texts))
    return (
        note
        + bars("Microseconds of each kernel", ("ours",), _kernel_times(report, found))
        + bars("Median microseconds of each node", series, rows)
        + _table(facts)
    )


def _kernel_times(report: BenchReport, found: Inspection) -> list[Bar]:
    """The time of all nodes that a kernel, or several together, run."""
    kernels = {
        node.name: ", ".join(dict.fromkeys(choice.kernel for choice in node.kernels))
        for node in found.nodes
    }
    times: defaultdict[str, float] = defaultdict(float)
    for node in report.nodes:
        times[kernels.get(node.name) or "none of ours"] += node.ours_us or 0
    return [Bar(name, (time,), (f"{time:.0f} us",)) for name, time in times.items()]


def _load_body(loads: Sequence[ExpertLoad]) -> str:
    if not loads:
        raise ValueError("the model has no QMoE or MoE node")
    title = "Tokens of each expert: a row for each node, a square for each expert"
    picture = heat_map(title, [(load.name, load.tokens) for load in loads])
    facts = []
    for load in loads:
        idle = sum(count == 0 for count in load.tokens)
        mean = sum(load.tokens) / len(load.tokens)
        facts.append((
            load.name,
            f"{idle} of {len(load.tokens)} experts idle, busiest {max(load.tokens) / mean:.1f} "
            "times the mean",
        ))  # fmt: skip
    return f"<p>{title}.</p>{picture}{_table(facts)}"


def _table(rows: Sequence[tuple[str, str]]) -> str:
    lines = (f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in rows)
    return f"<table>{''.join(lines)}</table>"
