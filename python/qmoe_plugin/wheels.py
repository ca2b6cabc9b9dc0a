"""Which onnxruntime packages are installed, and which of them is imported."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

RUNTIME_WHEELS = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-directml",
    "onnxruntime-migraphx",
    "onnxruntime-openvino",
    "onnxruntime-qnn",
    "onnxruntime-rocm",
    "onnxruntime-training",
)
"""The packages that all install the same Python module, ``onnxruntime``."""


@dataclass(frozen=True)
class Wheel:
    """An installed package.

    Attributes:
        name: As in "onnxruntime-gpu".
        version: As in "1.31.1".
        folder: Where it was installed; its modules are folders in there.
    """

    name: str
    version: str
    folder: Path

    def __str__(self) -> str:
        """As in "onnxruntime-gpu 1.31.1"."""
        return f"{self.name} {self.version}"


def installed(names: tuple[str, ...]) -> dict[str, str]:
    """Version of each of these packages that is installed."""
    versions: dict[str, str] = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def runtime_wheels() -> tuple[list[Wheel], list[Wheel]]:
    """The packages of onnxruntime in the folder that it is imported from, and those elsewhere."""
    folder = _runtime_folder()
    imported: list[Wheel] = []
    hidden: list[Wheel] = []
    for wheel in _all_runtime_wheels():
        (imported if wheel.folder == folder else hidden).append(wheel)
    return imported, hidden


def conflict() -> str:
    """What is wrong with the onnxruntime packages that are installed; empty if nothing is.

    Packages in different folders overwrite nothing: the first folder of sys.path wins.
    """
    imported, _ = runtime_wheels()
    if len(imported) < 2:
        return ""
    names = [wheel.name for wheel in imported]
    keep = "onnxruntime-gpu" if "onnxruntime-gpu" in names else names[0]
    return (
        f"{' and '.join(map(str, imported))} are installed together. They write the same files, "
        "so the last one has overwritten parts of the others; typically CUDAExecutionProvider is "
        f"gone. Repair it with: pip uninstall -y {' '.join(names)} && pip install {keep}"
    )


def _all_runtime_wheels() -> list[Wheel]:
    """Those in all folders of sys.path, each once for a folder."""
    found: dict[tuple[str, Path], Wheel] = {}
    for name in RUNTIME_WHEELS:
        for distribution in metadata.distributions(name=name):
            folder = Path(str(distribution.locate_file(""))).resolve()
            found.setdefault((name, folder), Wheel(name, distribution.version, folder))
    return list(found.values())


def _runtime_folder() -> Path | None:
    """The folder in which the module onnxruntime lies; None if there is none."""
    spec = importlib.util.find_spec("onnxruntime")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations))).parent.resolve()
