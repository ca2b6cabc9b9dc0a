"""The files that hold the weights of a model, beside it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import onnx_ir as ir

from qmoe_plugin.graph.walk import external_tensors


def provide_external_data(model: ir.Model, source: Path, destination: Path) -> None:
    """Makes the external data of a model in folder `source` available to its copy in `destination`.

    In the same folder there is nothing to do. In another, files are hard-linked, which costs no
    space, or copied where the file system cannot link. A linked file is one file with two names:
    writing to it in place changes it for both models.

    Args:
        model: The model; its tensors' base folder is not looked at.
        source: Folder of the model that was read.
        destination: Folder of the one that will be written; made if it is not there.
    """
    destination.mkdir(parents=True, exist_ok=True)
    if destination.resolve() == source.resolve():
        return
    for location in sorted({os.fspath(tensor.location) for tensor in external_tensors(model)}):
        relative = Path(location)
        if relative.is_absolute() or ".." in relative.parts:
            raise ValueError(
                f"the model keeps weights in '{location}', outside its own folder; write the new "
                f"model to {source}, or save the model with its data beside it first"
            )
        _provide(source / relative, destination / relative)


def _provide(source: Path, destination: Path) -> None:
    if not source.is_file():
        raise FileNotFoundError(f"the model keeps weights in {source}, but there is no such file")
    source = source.resolve()  # a link to a symbolic link would dangle elsewhere
    if destination.exists():
        if destination.samefile(source) or _same_copy(source, destination):
            return
        raise FileExistsError(
            f"{destination} is there already and is not the model's {source}; remove it, or write "
            "to another folder"
        )
    destination.parent.mkdir(parents=True, exist_ok=True)
    try:
        destination.hardlink_to(source)
    except OSError:
        shutil.copy2(source, destination)


def _same_copy(a: Path, b: Path) -> bool:
    """Whether one file is a copy of the other that `_provide` made before."""
    left, right = a.stat(), b.stat()
    return (left.st_size, left.st_mtime_ns) == (right.st_size, right.st_mtime_ns)
