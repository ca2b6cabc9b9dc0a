"""Collects how large what weights are multiplied with is, by running a model."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper

from qmoe_plugin.bound import bind
from qmoe_plugin.graph.apply import load
from qmoe_plugin.graph.calibrate_feeds import (
    complete,
    count_tokens,
    from_files,
    random_tokens,
    vocabulary_of,
)
from qmoe_plugin.graph.calibrate_moe import MoEStatistics
from qmoe_plugin.graph.calibration import Calibration
from qmoe_plugin.graph.describe import STOCK_DOMAIN, UnsupportedError
from qmoe_plugin.graph.quantize_nodes import is_product_with_weight, product_weight_name
from qmoe_plugin.graph.rewrite import read
from qmoe_plugin.graph.walk import bodies, label
from qmoe_plugin.library import DOMAIN
from qmoe_plugin.ort_values import to_array
from qmoe_plugin.progress import Progress
from qmoe_plugin.report import CalibrateReport, NodeReport
from qmoe_plugin.sample_inputs import Wanted, known_dims

Array = npt.NDArray[Any]
PathLike = str | os.PathLike[str]

_SUMS_SINCE = 13  # opset in which ReduceSum gets its axes as an input
_PREFIX = "qmoe_plugin.calibrate."


def calibrate(
    model: PathLike,
    output: PathLike | None = None,
    *,
    data: Iterable[PathLike | Mapping[str, Array]] = (),
    random: int = 0,
    length: int = 128,
    vocabulary: int | None = None,
    seed: int = 0,
    providers: Sequence[str] | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> CalibrateReport:
    """Runs a float model and writes how much each column of its weights matters.

    That is the mean square of what a column is multiplied with, of MatMul and Gemm, and of each
    expert of MoE. `quantize(..., calibration=output)` then rounds so that the error of what a node
    computes gets small, rather than that of its weights. Fuse a model before (`qmoe_plugin.fuse`).

    Args:
        model: Path of the model, before it is quantised.
        output: The file to write, see `qmoe_plugin.graph.calibration`; None for a dry run only.
        data: Runs: arrays by the names of inputs; paths of .npz files with these, or of .npy files
            with tokens, [rows, length]. Missing masks, positions and caches are made up as for a
            prompt.
        random: So many runs of random tokens besides. Real text is better: random tokens are not
            what the model was made for.
        length: Tokens in such a run.
        vocabulary: How many tokens there are; by default what the model says of its logits.
        seed: Of the random tokens.
        providers: As for `qmoe_plugin.session`.
        dry_run: Run the model and say what was seen, but write nothing.
        progress: Called after each run, with the runs done, and all of them where it is known.

    Returns:
        Of which nodes it was collected; which experts got how many tokens, and which none.

    Raises:
        ValueError: If there is no data, or it does not fit the model.
    """
    from qmoe_plugin.session import session

    if output is None and not dry_run:
        raise TypeError("calibrate needs `output`, the path to write to")
    path = Path(model)
    decoded = read(path)
    collector = _Collector(decoded)
    proto = load(path)
    collector.add_outputs(proto)
    opened = session(proto, providers, external_data_dir=path.parent)
    shapes = {value.name: value.shape for value in opened.get_outputs()}
    runs: list[PathLike | Mapping[str, Array]] = list(data)
    if random:
        size = vocabulary_of(shapes) if vocabulary is None else vocabulary
        runs += random_tokens(random, length, size, seed)
    if not runs:
        raise ValueError("there is nothing to run the model on: give data, or random runs")
    inputs = [value for value in decoded.graph.inputs if not value.is_initializer()]
    dims, wanted = known_dims(Wanted(), path).dims, collector.outputs
    done = tokens = 0
    for run in runs:
        for given in [run] if isinstance(run, Mapping) else from_files([run]):
            feeds = complete(given, inputs, dims)
            try:
                results = bind(opened, proto.graph, feeds, wanted)()
            except Exception as error:
                first = str(error).strip().splitlines()[0]
                made = ", ".join(sorted(set(feeds) - set(given)))
                raise RuntimeError(
                    f"run {done + 1} failed: {first}"
                    + (f"; made up were {made}: give them in an .npz file" if made else "")
                ) from error
            collector.take({name: to_array(value) for name, value in results.items()})
            done, tokens = done + 1, tokens + count_tokens(feeds)
            if progress is not None:
                progress("runs", done, max(done, len(runs)))
    calibration, collected = collector.finish()
    if output is not None and not dry_run:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        calibration.save(output)
    report = CalibrateReport(done, tokens, tuple(collected), tuple(collector.kept), dry_run)
    report.log()
    return report


@dataclass
class _Sums:
    """The sum of squares of the columns of a value, and of how many rows."""

    names: list[tuple[NodeReport, str]] = field(default_factory=list)  # nodes, and their weights
    total: Array | None = None
    rows: int = 0


class _Collector:
    """What is collected of a model, and the outputs that it comes from."""

    def __init__(self, model: ir.Model) -> None:
        self.kept: list[NodeReport] = []
        self._sums: dict[str, _Sums] = {}  # by the value that is multiplied
        self._moes: list[MoEStatistics] = []
        for body in bodies(model):
            for node in body.nodes():
                is_moe = node.domain in (STOCK_DOMAIN, DOMAIN) and node.op_type == "MoE"
                if not is_moe and not is_product_with_weight(node):
                    continue
                report = NodeReport(label(node), node.op_type, body.function)
                if body.function or node.graph is not body.content:
                    reason = "a nested graph or a function holds it, whose values cannot be read"
                    self.kept.append(NodeReport(label(node), node.op_type, body.function, reason))
                elif is_moe:
                    try:
                        self._moes.append(MoEStatistics(node))
                    except UnsupportedError as error:
                        self.kept.append(NodeReport(label(node), node.op_type, "", str(error)))
                else:
                    value = node.inputs[0]
                    assert value is not None
                    if value.is_initializer():
                        reason = "the constant is on the left, which quantize does not take"
                        self.kept.append(NodeReport(label(node), node.op_type, "", reason))
                        continue
                    sums = self._sums.setdefault(value.name or "", _Sums())
                    sums.names.append((report, product_weight_name(node)))

    @property
    def outputs(self) -> list[str]:
        """Names of the outputs to ask for."""
        names = [f"{_PREFIX}{kind}.{value}" for value in self._sums for kind in ("sum", "shape")]
        for i in range(len(self._moes)):
            names += [f"{_PREFIX}x{i}", f"{_PREFIX}logits{i}"]
        return names

    def add_outputs(self, proto: onnx.ModelProto) -> None:
        """Adds them to the model.

        Raises:
            ValueError: If it is too old.
        """
        opset = max((item.version for item in proto.opset_import if item.domain == ""), default=0)
        if opset < _SUMS_SINCE:
            raise ValueError(f"the model is of opset {opset}; calibrate needs {_SUMS_SINCE}")
        graph = proto.graph
        first = helper.make_tensor(f"{_PREFIX}first", TensorProto.INT64, [1], [0])
        graph.initializer.append(first)
        for value in self._sums:
            graph.node.extend(_sum_nodes(value))
        for i, moe in enumerate(self._moes):
            for name, value in ((f"x{i}", moe.inputs[0]), (f"logits{i}", moe.inputs[1])):
                graph.node.append(
                    helper.make_node("Cast", [value], [_PREFIX + name], to=TensorProto.FLOAT)
                )
        for name in self.outputs:
            kind = TensorProto.INT64 if ".shape." in name else TensorProto.FLOAT
            graph.output.append(helper.make_tensor_value_info(name, kind, None))

    def take(self, results: Mapping[str, Array]) -> None:
        """Takes what a run gave."""
        for value, sums in self._sums.items():
            total = results[f"{_PREFIX}sum.{value}"].astype(np.float64)
            shape = results[f"{_PREFIX}shape.{value}"]
            sums.total = total if sums.total is None else sums.total + total
            sums.rows += int(np.prod(shape[:-1]))
        for i, moe in enumerate(self._moes):
            moe.take(results[f"{_PREFIX}x{i}"], results[f"{_PREFIX}logits{i}"])

    def finish(self) -> tuple[Calibration, list[NodeReport]]:
        """The importance of all columns, and what to say of it."""
        importance: dict[str, Array] = {}
        reports: list[NodeReport] = []
        totals: dict[str, tuple[Array, int]] = {}
        for sums in self._sums.values():
            if sums.total is None:
                continue
            for report, name in sums.names:
                before, rows = totals.get(name, (np.zeros_like(sums.total), 0))
                totals[name] = (before + sums.total, rows + sums.rows)
                reports.append(NodeReport(report.name, report.op_type, change=f"{sums.rows} rows"))
        for name, (total, rows) in totals.items():
            importance[name] = (total / max(rows, 1)).astype(np.float32)
        for moe in self._moes:
            found, report = moe.finish()
            importance |= found
            reports.append(report)
        return Calibration(importance), reports


def _sum_nodes(value: str) -> list[onnx.NodeProto]:
    """Nodes that compute the sum of squares of each column of a value, and its shape."""
    own = f"{_PREFIX}{value}"
    return [
        helper.make_node("Cast", [value], [f"{own}.wide"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", [f"{own}.wide"], [f"{own}.rows"], axis=-1),
        helper.make_node("Mul", [f"{own}.rows", f"{own}.rows"], [f"{own}.squares"]),
        helper.make_node(
            "ReduceSum",
            [f"{own}.squares", f"{_PREFIX}first"],
            [f"{_PREFIX}sum.{value}"],
            keepdims=0,
        ),
        helper.make_node("Shape", [value], [f"{_PREFIX}shape.{value}"]),
    ]
