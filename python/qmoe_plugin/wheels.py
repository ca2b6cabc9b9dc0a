"""Which onnxruntime packages are installed."""

from __future__ import annotations

from importlib import metadata

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


def installed(names: tuple[str, ...] = RUNTIME_WHEELS) -> dict[str, str]:
    """Version of each of these packages that is installed."""
    versions: dict[str, str] = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def conflict() -> str:
    """What is wrong with the onnxruntime packages that are installed; empty if nothing is."""
    found = installed()
    if len(found) < 2:
        return ""
    listed = " and ".join(f"{name} {version}" for name, version in found.items())
    keep = "onnxruntime-gpu" if "onnxruntime-gpu" in found else next(iter(found))
    return (
        f"{listed} are installed together. They write the same files, so the last one has "
        "overwritten parts of the others; typically CUDAExecutionProvider is gone. Repair it with: "
        f"pip uninstall -y {' '.join(found)} && pip install {keep}"
    )
