"""Fuses what exporters leave in pieces into the ops that run it in one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import overload

import onnx_ir as ir

from qmoe_plugin.graph.external_data import Store
from qmoe_plugin.graph.fuse_bias import DropZeroBias, FuseBias
from qmoe_plugin.graph.fuse_nested import fuse_moe
from qmoe_plugin.graph.rewrite import Model, PathLike, rewrite
from qmoe_plugin.progress import Progress
from qmoe_plugin.report import FuseReport

PASSES = ("moe", "bias", "zero-bias")
"""In the order in which they run."""


@overload
def fuse(
    model: Model,
    *,
    passes: Sequence[str] = ...,
    dry_run: bool = ...,
    progress: Progress | None = ...,
) -> tuple[FuseReport, ...]: ...
@overload
def fuse(
    model: PathLike | bytes,
    output: PathLike | None = None,
    *,
    passes: Sequence[str] = ...,
    dry_run: bool = ...,
    progress: Progress | None = ...,
) -> tuple[FuseReport, ...]: ...
def fuse(
    model: Model | PathLike | bytes,
    output: PathLike | None = None,
    *,
    passes: Sequence[str] = PASSES,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> tuple[FuseReport, ...]:
    """Fuses nodes of a model into our ops. What it computes stays the same.

    "moe": experts that an exporter wrote in single nodes (all for all tokens, or in a loop, or with
    weights gathered for each token), selected by a TopK, become MoE, or QMoE where they are
    MatMulNBits. That both compute the same is tried with random activations in onnxruntime, which
    takes the memory of one layer's experts a few times.

    "bias": MatMulNBits and the Add of a constant bias become MatMulNBits with a bias.

    "zero-bias": biases of MatMulNBits, QMoE and MoE that are all zeros are left out.

    Args:
        model: An onnx_ir.Model or onnx.ModelProto, which is changed in place; or, with `output`,
            the path or the bytes of a model.
        output: Path of the new model. All its external data is in one new file, `<output>.data`.
        passes: Which of `PASSES`; they run in that order.
        dry_run: Only say what would be done, of a path, bytes or an onnx.ModelProto. `output` is
            then not needed.
        progress: Called with the name of each router's TopK, those done and all.

    Returns:
        What each pass did, and why it left the rest. Also logged by the logger "qmoe_plugin".

    Raises:
        ValueError: For unknown passes and bad models, and if a file of the model would be replaced.
    """
    unknown = sorted(set(passes) - set(PASSES))
    if unknown:
        raise ValueError(f"no such pass: {', '.join(unknown)}; there are {', '.join(PASSES)}")
    reports = rewrite(
        model,
        output,
        lambda decoded, store: _fuse(decoded, passes, store, progress),
        dry_run=dry_run,
    )
    reports = tuple(dataclasses.replace(report, dry_run=dry_run) for report in reports)
    for report in reports:
        report.log()
    return reports


def _fuse(
    model: ir.Model, passes: Sequence[str], store: Store, progress: Progress | None
) -> tuple[FuseReport, ...]:
    reports = []
    if "moe" in passes:
        reports.append(fuse_moe(model, store, progress))
    for name, make in (("bias", FuseBias), ("zero-bias", DropZeroBias)):
        if name in passes:
            change = make(store)
            change(model)
            reports.append(change.report)
    return tuple(reports)
