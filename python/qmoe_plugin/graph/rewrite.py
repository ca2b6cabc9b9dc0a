"""Rewrites the weights of any kind of model: in place, or from file to file, one at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import onnx
import onnx_ir as ir

from qmoe_plugin.graph.apply import NO_DRY_RUN, load, parse, serialize, write
from qmoe_plugin.graph.external_data import DataFile, Discard, Memory, Store, data_files
from qmoe_plugin.graph.walk import external_tensors, replace_tensors

Model = ir.Model | onnx.ModelProto
PathLike = str | os.PathLike[str]
Result = TypeVar("Result")


def rewrite(
    model: Model | PathLike | bytes,
    output: PathLike | None,
    change: Callable[[ir.Model, Store], Result],
    *,
    dry_run: bool = False,
) -> Result:
    """Applies a change that makes new weights.

    Args:
        model: A model, changed in place, with the new weights in memory; or the path or the bytes
            of one.
        output: Where to write the changed model, if `model` is a path or bytes. All its external
            data is in one new file, `<output>.data`. Both get their names when they are whole.
        change: Changes the model; what it makes goes to the store.
        dry_run: Change a copy and write nothing; a path or bytes need no `output` then.

    Returns:
        What `change` returns.

    Raises:
        ValueError: If the output would replace a file of the model, or the model holds something
            that would be lost.
    """
    if dry_run:
        return _try(model, output, change)
    if isinstance(model, (str, os.PathLike, bytes)):
        if output is None:
            raise TypeError("a path or bytes need `output`, the path to write to")
        return _rewrite_to_file(model, Path(output), change)
    if output is not None:
        raise TypeError("`output` is for a path or bytes; other models are changed in place")
    if isinstance(model, ir.Model):
        return change(model, Memory())
    if isinstance(model, onnx.ModelProto):
        decoded = _decode(model, None)
        result = change(decoded, Memory())
        model.CopyFrom(ir.to_proto(decoded))
        return result
    raise TypeError(
        f"model is a {type(model).__name__}; give a path, bytes, onnx.ModelProto or onnx_ir.Model"
    )


def read(model: Model | PathLike | bytes) -> ir.Model:
    """A copy of the model to look at; its weights are mapped where they are needed."""
    if isinstance(model, bytes):
        return _decode(parse(model), None)
    if isinstance(model, (str, os.PathLike)):
        return _decode(load(Path(model)), Path(model).parent)
    return model if isinstance(model, ir.Model) else _decode(model, None)


def _try(
    model: Model | PathLike | bytes,
    output: PathLike | None,
    change: Callable[[ir.Model, Store], Result],
) -> Result:
    if isinstance(model, ir.Model):
        raise TypeError(NO_DRY_RUN)
    decoded = read(model)
    if output is not None and isinstance(model, (str, os.PathLike)):
        _check_files(Path(model), decoded, (Path(output), _data_path(Path(output))))
    return change(decoded, Discard())


def _data_path(output: Path) -> Path:
    return output.with_name(f"{output.name}.data")


def _check_files(model: Path, decoded: ir.Model, outputs: Sequence[Path]) -> None:
    """Refuses to replace a file of the model."""
    sources = [model, *(model.parent / file for file in data_files(decoded))]
    for source in sources:
        for made in outputs:
            if made.exists() and made.samefile(source):
                raise ValueError(
                    f"{made} would replace a file of the original model, which is worth "
                    "keeping: this cannot be undone. Write to another path"
                )


def _rewrite_to_file(
    model: PathLike | bytes, output: Path, change: Callable[[ir.Model, Store], Result]
) -> Result:
    data = DataFile(_data_path(output))
    decoded = read(model)
    if not isinstance(model, bytes):
        _check_files(Path(model), decoded, (output, data.path))
    with data:
        result = change(decoded, data)
        replace_tensors(decoded, data.move)
        write(serialize(ir.to_proto(decoded)), output, data)
    return result


def _decode(proto: onnx.ModelProto, folder: Path | None) -> ir.Model:
    """The model, with its external data in `folder`."""
    if proto.graph.sparse_initializer or proto.training_info:
        raise ValueError(
            "the model has sparse initializers or training information, which cannot be kept when "
            "weights are rewritten; take them out first (retarget alone keeps them)"
        )
    model = ir.from_proto(proto)
    for tensor in external_tensors(model):
        if folder is None:
            raise ValueError(
                f"the model keeps '{tensor.name}' in the file '{tensor.location}', and does not "
                "say in which folder; give its path, or an onnx_ir.Model"
            )
        tensor.base_dir = folder
    return model
