"""How long a model takes, as a whole and node by node, with our kernels and with the stock ones."""

from __future__ import annotations

import gc
import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx

from qmoe_plugin.bound import bind
from qmoe_plugin.devices import CPU, Target, best_target
from qmoe_plugin.graph.apply import apply
from qmoe_plugin.graph.retarget import Retarget, Unretarget
from qmoe_plugin.library import OPS, runtime
from qmoe_plugin.node_times import time_nodes, values_around
from qmoe_plugin.ort_values import Array
from qmoe_plugin.report import logger
from qmoe_plugin.sample_inputs import Wanted, known_dims, sample_inputs
from qmoe_plugin.taps import Source, default_providers, open_as_is, ort_errors

_KERNEL_TIME = "_kernel_time"
"""How onnxruntime's profiles end the names of what they say of a node."""

_WARM_UP = 2

IN_RUNS = "within runs of the model, as onnxruntime's profile has them"
ALONE = (
    "each node alone in a CUDA graph, with the inputs that the model gives it; run after run, so "
    "weights may come from L2 when they fit"
)


@dataclass(frozen=True)
class NodeTime:
    """The time of a node.

    Attributes:
        name: Its name.
        op_type: Its op, one of ours.
        ours_us: Median microseconds with our kernels; None if it is not ours there.
        stock_us: Likewise with the stock ones.
        missing: Why a time is missing, of a node that runs in the model and not alone; else "".
    """

    name: str
    op_type: str
    ours_us: float | None
    stock_us: float | None
    missing: str = ""


@dataclass(frozen=True)
class Times:
    """The times of one session.

    Attributes:
        load_s: Seconds that making the session took.
        median_ms: Of a run.
        min_ms: Of a run.
        nodes_us: Median microseconds of each node of our ops, by name.
        others_us: Of all other nodes together; None on CUDA, where they are not timed.
        refused: Why nodes that run in the model do not run alone, by name; empty on the CPU.
    """

    load_s: float
    median_ms: float
    min_ms: float
    nodes_us: Mapping[str, float]
    others_us: float | None
    refused: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class BenchReport:
    """The times of a model.

    Attributes:
        model: Its path.
        target: What it ran on.
        shapes: Those of the inputs.
        repeat: Runs that were timed.
        ours: With our kernels.
        stock: With the stock ones; None if they do not run it.
        stock_reason: Why they do not; "" if they do.
        nodes: The nodes of our ops, in the order of the model, but for those in subgraphs and
            functions.
        nodes_timed: How times of nodes were taken: `IN_RUNS`, or `ALONE` on CUDA, where
            onnxruntime's profiles see launches, not kernels.
    """

    model: str
    target: str
    shapes: Mapping[str, tuple[int, ...]]
    repeat: int
    ours: Times
    stock: Times | None
    stock_reason: str
    nodes: tuple[NodeTime, ...]
    nodes_timed: str

    @property
    def gaps(self) -> str:
        """Which times of nodes are missing, and why; "" if none is."""
        reasons = [node.missing for node in self.nodes if node.missing]
        if not reasons:
            return ""
        return f"{len(reasons)} of {len(self.nodes)} nodes lack a time; the first: {reasons[0]}"

    def to_dict(self) -> dict[str, Any]:
        """As plain dicts and lists, for JSON."""
        return {
            **vars(self),
            "ours": vars(self.ours),
            "stock": None if self.stock is None else vars(self.stock),
            "nodes": [vars(node) for node in self.nodes],
        }


def bench(
    model: str | os.PathLike[str],
    *,
    inputs: Wanted | None = None,
    repeat: int = 20,
    threads: int = 0,
    cpu: bool = False,
) -> BenchReport:
    """Times a model with our kernels, then with the stock ones.

    One session at a time, so that both never need memory together. On the CPU, nodes are timed by
    onnxruntime's profiler, whole runs after it was switched off. On CUDA each node is timed alone,
    see `node_times.time_nodes`.

    Args:
        model: Path of the model. Nodes of either domain are moved for each session.
        inputs: What to feed; None for random tokens, see `sample_inputs`.
        repeat: How many runs to time; of a node alone, batches of runs.
        threads: Threads of a session; 0 for onnxruntime's default.
        cpu: Run on the CPU even where there is a GPU.

    Raises:
        RuntimeError: If our kernels do not run it.
        ValueError: If inputs cannot be made, or the model has no node for our kernels.
    """
    if repeat < 1 or threads < 0:
        raise ValueError(f"repeat is {repeat} and threads {threads}; at least 1 and 0 are needed")
    path, where = Path(model), CPU if cpu else best_target()
    ours = Source.read(path, Retarget(where))
    feeds = sample_inputs(ours.graph(), known_dims(inputs or Wanted(), path))
    values = None if _profiles(where) else values_around(ours, where, feeds)
    our_times = _time(ours, where, feeds, values, repeat, threads)
    stock, reason = _stock(path)
    stock_times = None
    if stock is not None:
        try:
            stock_times = _time(stock, where, feeds, values, repeat, threads)
        except RuntimeError as error:
            reason = str(error)
    shapes = {name: array.shape for name, array in feeds.items()}
    nodes = _nodes(ours, our_times, stock_times)
    return BenchReport(
        str(path), str(where), shapes, repeat, our_times, stock_times, reason, nodes,
        IN_RUNS if values is None else ALONE,
    )  # fmt: skip


def _profiles(where: Target) -> bool:
    """Whether onnxruntime's profiles say how long a node takes, not how long its launch takes."""
    return where == CPU


def _nodes(source: Source, ours: Times, stock: Times | None) -> tuple[NodeTime, ...]:
    """The nodes that have a time, or a reason why not."""
    nodes = []
    for node in source.proto.graph.node:
        name = node.name or next(iter(node.output), "")
        both = [times for times in (ours, stock) if times is not None]
        missing = next((times.refused[name] for times in both if name in times.refused), "")
        ours_us = ours.nodes_us.get(name)
        stock_us = None if stock is None else stock.nodes_us.get(name)
        if node.op_type in OPS and (missing or ours_us is not None or stock_us is not None):
            nodes.append(NodeTime(name, node.op_type, ours_us, stock_us, missing))
    return tuple(nodes)


def _stock(path: Path) -> tuple[Source | None, str]:
    """The model with all nodes in com.microsoft, or why that cannot be."""
    source = Source.read(path)
    kept = apply(Unretarget(), source.proto).kept
    if kept:
        return None, f"{kept[0].op_type} '{kept[0].name}' cannot move back: {kept[0].reason}"
    return source, ""


def _time(
    source: Source,
    where: Target,
    feeds: Mapping[str, Array],
    values: Mapping[str, Array] | None,
    repeat: int,
    threads: int,
) -> Times:
    """Times a session, then its nodes alone on these values; without them, by its profile."""
    nodes: Mapping[str, float] = {}
    refused: Mapping[str, str] = {}
    others = None
    with tempfile.TemporaryDirectory() as scratch, ort_errors(source.name):
        options = runtime().SessionOptions()
        options.intra_op_num_threads = threads
        options.enable_profiling = values is None
        options.profile_file_prefix = str(Path(scratch) / "profile")
        start = time.perf_counter()
        session = open_as_is(source.proto, source.folder, default_providers(where), options)
        load = time.perf_counter() - start
        run = bind(session, source.proto.graph, feeds)
        for _ in range(_WARM_UP + repeat):
            run()
        if values is None:
            profile = json.loads(Path(session.end_profiling()).read_text())
            nodes, others = _node_times(source.proto, profile)
        runs = [_seconds(run) for _ in range(repeat)]
    logger.info("%s: %.3f ms a run", source.name, 1e3 * statistics.median(runs))
    del run, session
    gc.collect()
    if values is not None:
        nodes, refused = time_nodes(source, where, values, repeat=repeat, threads=threads)
    return Times(load, 1e3 * statistics.median(runs), 1e3 * min(runs), nodes, others, refused)


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _node_times(
    model: onnx.ModelProto, profile: list[dict[str, Any]]
) -> tuple[dict[str, float], float]:
    """Median microseconds of the nodes of our ops, by name, and of all others together."""
    durations = defaultdict(list)
    for event in profile:
        if event.get("cat") == "Node" and event["name"].endswith(_KERNEL_TIME):
            durations[event["name"].removesuffix(_KERNEL_TIME)].append(event["dur"])
    medians = {
        name: statistics.median(times[_WARM_UP:] or times) for name, times in durations.items()
    }
    ours = {node.name for node in model.graph.node if node.op_type in OPS}
    others = sum(median for name, median in medians.items() if name not in ours)
    return {name: median for name, median in medians.items() if name in ours}, others
