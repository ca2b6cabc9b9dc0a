"""Times of single nodes, each alone in a session of its own.

That is for GPUs: there onnxruntime's profiles see launches, not kernels.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import onnx_ir as ir

from qmoe_plugin.bound import bind_on_device
from qmoe_plugin.devices import Target
from qmoe_plugin.graph.describe import is_ours
from qmoe_plugin.graph.walk import label
from qmoe_plugin.library import runtime
from qmoe_plugin.ort_values import Array
from qmoe_plugin.report import logger
from qmoe_plugin.taps import (
    Source,
    activation_names,
    cut_out,
    default_providers,
    open_as_is,
    ort_errors,
    run_with_taps,
)

if TYPE_CHECKING:
    import onnxruntime

_NO_WAIT = "disable_synchronize_execution_providers"
"""The run option with which a run returns before the device is done."""

_FIRST_RUNS = 5
"""Runs by which the size of a batch is chosen."""

_BATCH_S = 2e-3
"""How long a batch of runs takes: much longer than waiting for the device once."""


def nodes_of_our_ops(source: Source) -> dict[str, ir.Node]:
    """Those of a model's graph, in either domain, by the name of their first output."""
    return {node.outputs[0].name or "": node for node in source.graph().graph if is_ours(node)}


def values_around(source: Source, where: Target, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """What a model gives the nodes of our ops to read when it runs, and what they make of it.

    Args:
        source: The model.
        where: What to run it on.
        feeds: Its inputs, by name.

    Raises:
        RuntimeError: If it does not run.
    """
    nodes = nodes_of_our_ops(source)
    read = {name for node in nodes.values() for name in activation_names(node)}
    return run_with_taps(source, default_providers(where), feeds, {*nodes, *read})


def time_nodes(
    source: Source,
    where: Target,
    values: Mapping[str, Array],
    *,
    repeat: int,
    threads: int = 0,
) -> tuple[dict[str, float], dict[str, str]]:
    """Times each node of our ops alone, with the inputs that the model gives it.

    A session has one node, whose inputs and outputs lie on the device; there is one session at a
    time, so that memory is needed for the weights of one node only. On CUDA a run is the replay of
    a CUDA graph, and the host enqueues run after run without waiting, so that launches do not
    count, unless a node takes less than one (a few microseconds). All runs read the same weights,
    which may come from the second-level cache if they fit.

    Args:
        source: The model; nodes run where their domain says.
        where: What to run on.
        values: What the nodes read, and arrays of the shapes and types of their outputs, as of
            `values_around`.
        repeat: Batches of runs of each node. A batch takes about 2 ms, or one run if that takes
            longer; a time is the median of the batches' means.
        threads: Threads of a session; 0 for onnxruntime's default.

    Returns:
        Microseconds of each node of the graph itself, by its name (those in subgraphs and functions
        have no time); and of the nodes that do not run alone, why not.
    """
    inputs = source.graph().graph.inputs
    types = {value.name or "": value.dtype for value in inputs if value.dtype is not None}
    providers = default_providers(where, cuda_graph=True)
    us: dict[str, float] = {}
    refused: dict[str, str] = {}
    for output, node in nodes_of_our_ops(source).items():
        name = label(node)
        proto, feeds = cut_out(source, {output: node}, values, types)
        try:
            with ort_errors(f"{name} alone"):
                us[name] = _time(
                    open_as_is(proto, source.folder, providers, _options(threads)),
                    feeds, {output: values[output]}, repeat,
                )  # fmt: skip
        except RuntimeError as error:
            refused[name] = str(error)
            logger.warning("%s", error)
        else:
            logger.info("%s alone: %.1f us", name, us[name])
        gc.collect()  # the weights of this one, before those of the next
    return us, refused


def _options(threads: int) -> onnxruntime.SessionOptions:
    options = runtime().SessionOptions()
    options.intra_op_num_threads = threads
    return options


def _time(
    session: onnxruntime.InferenceSession,
    feeds: Mapping[str, Array],
    results: Mapping[str, Array],
    repeat: int,
) -> float:
    """Microseconds of a run: the median of batches' means."""
    binding = bind_on_device(session, feeds, results)
    wait, no_wait = (runtime().RunOptions() for _ in range(2))
    no_wait.add_run_config_entry(_NO_WAIT, "1")
    for options in (wait, no_wait):
        # Options that do not name their graph cost an exception in onnxruntime, 30 us a run.
        options.add_run_config_entry("gpu_graph_id", "1")

    def batch(runs: int) -> float:
        """Seconds of so many runs. Only the last one waits, for all that were before it."""
        start = time.perf_counter()
        for _ in range(runs - 1):
            session.run_with_iobinding(binding, no_wait)
        session.run_with_iobinding(binding, wait)
        return time.perf_counter() - start

    batch(1)  # makes the graph
    runs = max(1, round(_BATCH_S / (batch(_FIRST_RUNS) / _FIRST_RUNS)))
    return 1e6 * statistics.median(batch(runs) / runs for _ in range(repeat))
