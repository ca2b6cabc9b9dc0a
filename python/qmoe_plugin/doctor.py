"""Looks for what is wrong with an installation, and tries the ops out."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Literal

from qmoe_plugin import env, wheels
from qmoe_plugin.devices import CPU, Target, best_target, cuda_problem
from qmoe_plugin.library import get_library_path, native, runtime, runtime_minor

Status = Literal["ok", "note", "warning", "broken"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: What it is.
        status: "note" is good to know, "warning" costs speed or is fragile, "broken" does not work.
        detail: What was found.
    """

    name: str
    status: Status
    detail: str

    def __str__(self) -> str:
        """One line for people."""
        return f"{self.status:<8} {self.name}: {self.detail}"


def examine() -> Iterator[Check]:
    """Runs all checks, one after the other."""
    yield Check("python", "ok", f"{platform.python_version()}, {platform.platform()}")
    for name, look in _CHECKS:
        try:
            yield look(name)
        except Exception as error:  # whatever it is, the user wants to read it here
            yield Check(name, "broken", _message(error))
    try:
        targets = {CPU, best_target()}
    except Exception:  # reported above
        targets = {CPU}
    for target in sorted(targets, key=str):
        yield from _try_ops(target)


def _package(name: str) -> Check:
    compiled: str = native().version()
    try:
        version = metadata.version("qmoe-plugin")
    except metadata.PackageNotFoundError:
        return Check(name, "warning", f"{compiled}, run from a source tree without being installed")
    if version != compiled:
        return Check(
            name,
            "broken",
            f"the package is {version}, but its library {compiled}; install it again",
        )
    return Check(name, "ok", version)


def _library(name: str) -> Check:
    path = get_library_path()
    if env.library_override() is not None:
        return Check(name, "warning", f"{path}, because {env.LIBRARY.name} is set")
    return Check(name, "ok", path)


def _runtime(name: str) -> Check:
    from qmoe_plugin.session import runtime_problem

    problem = runtime_problem()
    if problem:
        return Check(name, "broken", problem)
    onnxruntime = runtime()
    lowest, highest = native().ort_api_range()
    providers = ", ".join(onnxruntime.get_available_providers())
    detail = f"{onnxruntime.__version__} with {providers}; needed is 1.{lowest} or newer"
    if runtime_minor() > highest:
        return Check(name, "note", f"{detail}, tried was up to 1.{highest}")
    return Check(name, "ok", detail)


def _wheels(name: str) -> Check:
    problem = wheels.conflict()
    if problem:
        return Check(name, "warning", problem)
    imported, hidden = wheels.runtime_wheels()
    detail = "onnxruntime was not installed by a known package"
    if imported:
        detail = f"{imported[0]} in {imported[0].folder}"
    if hidden:
        others = ", ".join(f"{wheel} in {wheel.folder}" for wheel in hidden)
        detail += f"; installed elsewhere and not imported: {others}"
    return Check(name, "ok" if imported and not hidden else "note", detail)


def _packages(name: str) -> Check:
    versions = wheels.installed(("numpy", "onnx", "onnx-ir", "ml-dtypes", "onnxruntime-genai"))
    return Check(name, "ok", ", ".join(f"{k} {v}" for k, v in versions.items()))


def _cuda(name: str) -> Check:
    problem = cuda_problem()
    devices: list[int] = native().cuda_devices()
    found = ", ".join(f"device {i} is sm_{sm}" for i, sm in enumerate(devices))
    if not problem:
        return Check(name, "ok", f"{found}; built for {native().cuda_archs()}")
    return Check(name, "warning" if devices else "note", f"not usable: {problem}")


def _variables(name: str) -> Check:
    values = [(variable.name, variable.read()) for variable in env.VARIABLES]
    present = ", ".join(f"{variable}={value}" for variable, value in values if value is not None)
    return Check(name, "note" if present else "ok", present or "none of ours is set")


_CHECKS: tuple[tuple[str, Callable[[str], Check]], ...] = (
    ("qmoe_plugin", _package),
    ("library", _library),
    ("onnxruntime", _runtime),
    ("onnxruntime packages", _wheels),
    ("other packages", _packages),
    ("CUDA", _cuda),
    ("environment", _variables),
)


def _try_ops(target: Target) -> Iterator[Check]:
    """A smoke test of each pipeline."""
    try:
        from qmoe_plugin import smoke

        dtype = "float16" if target.device == "CUDA" else "float32"
        cases = smoke.cases(dtype)
    except Exception as error:
        yield Check(f"ops on {target}", "broken", _message(error))
        return
    for case in cases:
        name = f"{case.name} on {target}"
        try:
            error_found = smoke.run(case, target)
        except Exception as error:
            yield Check(name, "broken", _message(error))
            continue
        good = error_found <= smoke.TOLERANCE[dtype]  # false for NaN
        yield Check(
            name,
            "ok" if good else "broken",
            f"largest error {error_found:.1e} of the largest output, {dtype}"
            + ("" if good else f"; {smoke.TOLERANCE[dtype]:.0e} is allowed"),
        )


def _message(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
