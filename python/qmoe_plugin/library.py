"""Where the compiled parts are: the library that ONNX Runtime loads, and the `_native` module."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

from qmoe_plugin import env

DOMAIN = "qmoe_plugin"
"""The ONNX domain of our ops."""

OPS = (
    "QMoE",
    "MoE",
    "MatMulNBits",
    "MatMulBlockQuantizedFp8Weight",
    "MatMulBlockQuantizedFp4Weight",
)
"""The ops of the domain. They are called the same in com.microsoft."""

LIBRARY_NAME = "libqmoe_plugin.so"

_HOW_TO_BUILD = "Install the package again (from a source tree: pip install .)."


def get_library_path() -> str:
    """The path of the library that ONNX Runtime loads, as SessionOptions wants it.

    It is one self-contained file: it may be copied, for instance into the folder of a model that
    onnxruntime-genai opens.

    Raises:
        FileNotFoundError: If it is not there.
    """
    override = env.library_override()
    if override is not None:
        if not override.is_file():
            raise FileNotFoundError(
                f"{env.LIBRARY.name} is set to {override}, but there is no such file. Point it to "
                f"{LIBRARY_NAME}, or unset it to use the library of the package."
            )
        return str(override.resolve())
    folders = _folders()
    for folder in folders:
        if (folder / LIBRARY_NAME).is_file():
            return str((folder / LIBRARY_NAME).resolve())
    raise FileNotFoundError(
        f"{LIBRARY_NAME} is not in {' or '.join(str(folder) for folder in folders)}. "
        f"{_HOW_TO_BUILD} Or point {env.LIBRARY.name} to it."
    )


def native() -> ModuleType:
    """The compiled module `qmoe_plugin._native` (its functions: `_native.pyi`).

    Raises:
        ImportError: If it was never built, or cannot be loaded.
    """
    try:
        return importlib.import_module("qmoe_plugin._native")
    except ImportError as error:
        raise ImportError(
            f"The compiled module qmoe_plugin._native cannot be loaded: {error}. {_HOW_TO_BUILD}"
        ) from error


def runtime() -> ModuleType:
    """The module `onnxruntime`.

    It is no dependency of ours, because it comes in several packages, of which one must be chosen.

    Raises:
        ImportError: If there is none.
    """
    try:
        return importlib.import_module("onnxruntime")
    except ModuleNotFoundError as error:
        raise ImportError(
            "onnxruntime is not installed. Install one of its packages: onnxruntime for the CPU, "
            "onnxruntime-gpu for CUDA."
        ) from error


def runtime_minor() -> int:
    """The 31 of onnxruntime 1.31.1; it is the version of its API too.

    Raises:
        ImportError: If there is no onnxruntime.
    """
    return int(runtime().__version__.split(".")[1])


def _folders() -> list[Path]:
    """Where the library may lie.

    An editable install has the sources and the compiled parts in different folders.
    """
    package = importlib.import_module("qmoe_plugin")
    folders = [Path(folder) for folder in package.__path__]
    compiled = importlib.util.find_spec("qmoe_plugin._native")
    if compiled is not None and compiled.origin is not None:
        folders.append(Path(compiled.origin).parent)
    return list(dict.fromkeys(folders))
