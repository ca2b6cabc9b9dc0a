"""Applies a pass that changes domains to any kind of model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError, EncodeError

from qmoe_plugin.graph.external_data import DataFile, provide_external_data
from qmoe_plugin.graph.walk import copy_domains
from qmoe_plugin.report import RetargetReport
from qmoe_plugin.whole_file import whole_file

if TYPE_CHECKING:
    from qmoe_plugin.graph.retarget import ChangeDomain

NO_DRY_RUN = (
    "dry_run is for a path, bytes or onnx.ModelProto; an onnx_ir.Model would be changed: give a "
    "copy of it, without dry_run"
)


def apply(
    change: ChangeDomain,
    model: ir.Model | onnx.ModelProto | str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    dry_run: bool = False,
) -> RetargetReport:
    """Applies the pass, in place or from file to file, and logs its report.

    Args:
        change: The pass.
        model: A model, changed in place, or the path of one.
        output: Where to write the changed model, if `model` is a path.
        dry_run: Change a copy and write nothing; the path needs no `output` then.
    """
    change.dry_run = dry_run
    if isinstance(model, (str, os.PathLike)):
        if output is None and not dry_run:
            raise TypeError("a model given by its path needs `output`, the path to write to")
        return _apply_to_file(change, Path(model), None if output is None else Path(output))
    if output is not None:
        raise TypeError("`output` is for models given by their path; others are changed in place")
    if isinstance(model, ir.Model):
        if dry_run:
            raise TypeError(NO_DRY_RUN)
        change(model)
    elif isinstance(model, onnx.ModelProto):
        decoded = ir.from_proto(model)
        if change(decoded).modified and not dry_run:
            copy_domains(decoded, model)
    else:
        raise TypeError(
            f"model is a {type(model).__name__}; give a path, onnx.ModelProto or onnx_ir.Model"
        )
    change.report.log()
    return change.report


def load(path: Path) -> onnx.ModelProto:
    """Reads a model without its external data."""
    if path.suffix == ".ort":
        raise ValueError(
            f"{path} is in ORT format, whose nodes cannot be changed; give the ONNX model that it "
            "was made from"
        )
    try:
        return onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise ValueError(f"{path} is not an ONNX model: {error}") from error


def parse(content: bytes) -> onnx.ModelProto:
    """The model of these bytes."""
    try:
        proto: onnx.ModelProto = onnx.ModelProto.FromString(content)
    except DecodeError as error:
        raise ValueError(f"these bytes are not an ONNX model: {error}") from error
    return proto


def serialize(proto: onnx.ModelProto) -> bytes:
    """The bytes of a model; a clear error if they are too many."""
    try:
        content: bytes = proto.SerializeToString()
    except (EncodeError, ValueError) as error:
        raise ValueError(
            "the model is larger than the 2 GiB that a protobuf message can hold; save it with its "
            f"weights as external data, and give the path ({error})"
        ) from error
    return content


def _apply_to_file(change: ChangeDomain, source: Path, output: Path | None) -> RetargetReport:
    proto = load(source)
    decoded = ir.from_proto(proto)
    if change(decoded).modified:
        copy_domains(decoded, proto)
    if output is not None:
        provide_external_data(decoded, source.parent, output.parent, dry_run=change.dry_run)
        content = serialize(proto)
        if not change.dry_run:
            write(content, output)
    change.report.log()
    return change.report


def write(content: bytes, path: Path, data: DataFile | None = None) -> None:
    """Writes a model in one step, so that a failure leaves an older one intact.

    Args:
        content: The model.
        path: Where to write it.
        data: A new file with its external data. An older model is never seen together with it.
    """
    with whole_file(path) as partial:
        partial.write_bytes(content)
        if data is not None:
            path.unlink(missing_ok=True)
            data.commit()
