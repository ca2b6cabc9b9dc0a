"""The files that hold the weights of a model, beside it."""

from __future__ import annotations

import errno
import math
import shutil
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qmoe_plugin.graph.walk import external_tensors
from qmoe_plugin.whole_file import whole_file

_PAGE = 4096
_FICLONE = 0x40049409
"""Linux: the number of the ioctl that clones a file."""

_PIECE = 1 << 26
"""Bytes of a tensor that are copied at a time."""

_SMALL = 1 << 20
"""Bytes of a tensor that a dry run keeps: biases are looked at again."""


def raw_bytes(
    tensor: ir.TensorProtocol, start: int = 0, count: int | None = None
) -> npt.NDArray[np.uint8]:
    """The bytes of a tensor, [bytes]: a view of the model's memory, or of a mapping of its file.

    The file is mapped for as long as the result lives.

    Args:
        tensor: The tensor.
        start: The first byte wanted, and how many; no more is mapped.
        count: None for all from there on.

    Raises:
        ValueError: If the file is too short.
    """
    stop = tensor.nbytes if count is None else start + count
    if not isinstance(tensor, ir.ExternalTensor):
        return np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8)[start:stop]
    size, offset = tensor.nbytes, tensor.offset or 0
    if start == stop:
        return np.empty(0, np.uint8)
    end = Path(tensor.path).stat().st_size
    if tensor.length not in (None, size) or offset + size > end:
        raise ValueError(
            f"tensor '{tensor.name}' has {size} bytes from {offset} on, but the model says "
            f"{tensor.length}, and {tensor.path} ends at {end}; the model is damaged"
        )
    return np.memmap(tensor.path, np.uint8, "r", offset + start, (stop - start,))


class Store(Protocol):
    """Where a pass puts the tensors that it makes."""

    def add(self, name: str, content: npt.NDArray[np.uint8]) -> ir.TensorProtocol:
        """Takes a uint8 tensor [bytes]."""

    def stream(
        self,
        name: str,
        dtype: ir.DataType,
        shape: tuple[int, ...],
        parts: Iterable[npt.NDArray[np.uint8]],
    ) -> ir.TensorProtocol:
        """Takes a tensor whose bytes come in parts, one after the other."""


class Memory:
    """A `Store` in memory."""

    def add(self, name: str, content: npt.NDArray[np.uint8]) -> ir.TensorProtocol:
        """Keeps a uint8 tensor [bytes]."""
        return ir.Tensor(content, name=name)

    def stream(
        self,
        name: str,
        dtype: ir.DataType,
        shape: tuple[int, ...],
        parts: Iterable[npt.NDArray[np.uint8]],
    ) -> ir.TensorProtocol:
        """Keeps a tensor whose bytes come in parts."""
        content = np.concatenate([part.reshape(-1) for part in parts])
        return ir.Tensor(content.view(dtype.numpy()).reshape(shape), dtype=dtype, name=name)


class Discard:
    """A `Store` for dry runs: of what a later pass does not look at, type and shape are left."""

    def add(self, name: str, content: npt.NDArray[np.uint8]) -> ir.TensorProtocol:
        """Takes a uint8 tensor [bytes]."""
        return self.stream(name, ir.DataType.UINT8, content.shape, [content])

    def stream(
        self,
        name: str,
        dtype: ir.DataType,
        shape: tuple[int, ...],
        parts: Iterable[npt.NDArray[np.uint8]],
    ) -> ir.TensorProtocol:
        """Takes a tensor whose bytes come in parts, all of which are made: that may fail."""
        if math.prod(shape) * dtype.bitwidth // 8 <= _SMALL:
            return Memory().stream(name, dtype, shape, parts)
        for _ in parts:
            pass

        def content() -> ir.TensorProtocol:
            raise AssertionError(f"the bytes of '{name}' were not kept")

        return ir.LazyTensor(content, dtype, ir.Shape(shape), name=name)


class DataFile:
    """A new file of external data.

    It gets its name when it is whole: until `commit`, an older file of this name stays as it is.
    Without `commit`, nothing is left of it when the `with` block ends. The tensors that it hands
    out can be read at once; `move` makes them those of the whole file.
    """

    def __init__(self, path: Path) -> None:
        """Makes a file.

        Args:
            path: Its path, in the folder of the model.
        """
        self.path = path
        self._partial = path.with_name(f"{path.name}.partial")
        self._moved: dict[tuple[str, int, int], int] = {}  # offsets by path, offset and size

    def __enter__(self) -> DataFile:
        """Opens the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._partial.open("wb")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes the file, and removes what was not committed."""
        self._file.close()
        self._partial.unlink(missing_ok=True)

    def add(self, name: str, content: npt.NDArray[np.uint8]) -> ir.ExternalTensor:
        """Appends a uint8 tensor [bytes]."""
        return self._tensor(name, self._write(content), ir.DataType.UINT8, ir.Shape(content.shape))

    def stream(
        self,
        name: str,
        dtype: ir.DataType,
        shape: tuple[int, ...],
        parts: Iterable[npt.NDArray[np.uint8]],
    ) -> ir.ExternalTensor:
        """Appends a tensor whose bytes come in parts; nothing else may be appended meanwhile."""
        start = self._file.tell()
        size = -(-math.prod(shape) * dtype.bitwidth // 8)
        made = self._tensor(
            name, self._align(_PAGE if size >= _PAGE else 64), dtype, ir.Shape(shape)
        )
        try:
            written = sum(self._file.write(part.data) for part in parts)
        except BaseException:  # whoever makes the parts may give up on this tensor only
            self._file.seek(start)
            self._file.truncate()
            raise
        self._file.flush()
        if written != made.nbytes:
            raise AssertionError(f"'{name}' has {made.nbytes} bytes, but {written} came")
        return made

    def move(self, tensor: ir.TensorProtocol) -> ir.TensorProtocol:
        """A tensor as the model is to have it.

        Appends the bytes of one that are in another file; one of ours gets the name of the whole
        file; one in memory stays.
        """
        if not isinstance(tensor, ir.ExternalTensor):
            return tensor
        if Path(tensor.path) == self._partial:
            return self._tensor(
                tensor.name, tensor.offset or 0, tensor.dtype, tensor.shape, self.path
            )
        source = (tensor.path, tensor.offset or 0, tensor.nbytes)
        if source not in self._moved:
            self._moved[source] = self._copy(tensor)
        offset = self._moved[source]
        return self._tensor(tensor.name, offset, tensor.dtype, tensor.shape, self.path)

    def commit(self) -> None:
        """Gives the file its name, unless it is empty."""
        self._file.close()
        if self._partial.stat().st_size:
            self._partial.replace(self.path)

    def _write(self, content: npt.NDArray[np.uint8]) -> int:
        """Appends bytes; those of a page or more start a page, so that they can be mapped."""
        offset = self._align(_PAGE if content.size >= _PAGE else 64)
        self._file.write(content.data)
        self._file.flush()
        return offset

    def _copy(self, tensor: ir.ExternalTensor) -> int:
        """Appends the bytes of a tensor, a piece of it mapped at a time."""
        offset = self._align(_PAGE if tensor.nbytes >= _PAGE else 64)
        for start in range(0, tensor.nbytes, _PIECE):
            self._file.write(raw_bytes(tensor, start, min(_PIECE, tensor.nbytes - start)).data)
        return offset

    def _align(self, alignment: int) -> int:
        """Goes to the next multiple of so many bytes."""
        offset = -(-self._file.tell() // alignment) * alignment
        self._file.seek(offset)
        return offset

    def _tensor(
        self,
        name: str | None,
        offset: int,
        dtype: ir.DataType,
        shape: ir.Shape,
        path: Path | None = None,
    ) -> ir.ExternalTensor:
        path = path or self._partial
        size = -(-math.prod(shape.numpy()) * dtype.bitwidth // 8)
        return ir.ExternalTensor(
            path.name,
            offset,
            size,
            dtype,
            shape=shape,
            name=name or "",
            base_dir=path.parent,
        )


def provide_external_data(
    model: ir.Model, source: Path, destination: Path, *, dry_run: bool = False
) -> None:
    """Makes the external data of a model in folder `source` available to its copy in `destination`.

    In the same folder there is nothing to do. In another, files are copied; where the file system
    can, copies share their blocks until one is changed, which costs no space. (onnx refuses data
    with more than one hard link.)

    Args:
        model: The model; its tensors' base folder is not looked at.
        source: Folder of the model that was read.
        destination: Folder of the one that will be written; made if it is not there.
        dry_run: Only look whether it can be done.
    """
    if not dry_run:
        destination.mkdir(parents=True, exist_ok=True)
    if destination.resolve() == source.resolve():
        return
    for relative in data_files(model):
        _provide(source / relative, destination / relative, dry_run)


def data_files(model: ir.Model) -> list[Path]:
    """The files with the external data of a model, relative to its folder.

    Raises:
        ValueError: If one is not in the folder.
    """
    files = sorted({Path(tensor.location) for tensor in external_tensors(model)})
    for file in files:
        if file.is_absolute() or ".." in file.parts:
            raise ValueError(
                f"the model keeps weights in '{file}', outside its own folder; save it with its "
                "data beside it first"
            )
    return files


def _provide(source: Path, destination: Path, dry_run: bool) -> None:
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
    if dry_run:
        return
    destination.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(destination) as partial:
        _copy(source, partial)


def _copy(source: Path, destination: Path) -> None:
    """Copies content and times, sharing blocks where the file system can."""
    try:
        with source.open("rb") as old, destination.open("wb") as new:
            _share_blocks(old.fileno(), new.fileno())
    except OSError:
        shutil.copyfile(source, destination)
    shutil.copystat(source, destination)


def _share_blocks(source: int, destination: int) -> None:
    """Makes one file a clone of the other; OSError where that is impossible."""
    try:
        import fcntl
    except ImportError:
        raise OSError(errno.ENOTSUP, "this system cannot clone files") from None
    fcntl.ioctl(destination, _FICLONE, source)


def _same_copy(a: Path, b: Path) -> bool:
    """Whether one file is a copy of the other that `_provide` made before."""
    left, right = a.stat(), b.stat()
    return (left.st_size, left.st_mtime_ns) == (right.st_size, right.st_mtime_ns)
