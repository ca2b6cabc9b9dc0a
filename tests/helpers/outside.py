"""Builds the library as another project does: examples/cpp, with the formats of
examples/extra_format.

One build serves the tests of both examples; it is kept, so that only a change of the sources is
built again. Also a program: `python -m helpers.outside FOLDER` puts the Python side of
examples/extra_format into a folder, as pip would.
"""

from __future__ import annotations

import fcntl
import importlib.util
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EXTRA_FORMATS = ROOT / "examples" / "extra_format"
BUILD = ROOT / "build" / "outside"


def missing() -> str | None:
    """What is missing to build, or None."""
    if tool("cmake") is None or not (shutil.which("c++") or shutil.which("g++")):
        return "cmake and a C++ compiler are needed: pip install cmake, apt install g++"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is needed: pip install pybind11"
    return None


def tool(name: str) -> str | None:
    """A program on the path, or beside this Python (cmake and ninja are packages too)."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.is_file() else shutil.which(name)


def build() -> Path:
    """Builds examples/cpp with the extra formats and the Python module; returns the folder."""
    import pybind11

    cmake, ninja = tool("cmake"), tool("ninja")
    assert cmake is not None, missing()
    configure = [
        *(cmake, "-S", str(ROOT / "examples" / "cpp"), "-B", str(BUILD)),
        "-DQMOE_PLUGIN_CUDA=OFF",
        "-DCMAKE_CXX_FLAGS_RELEASE=-O0 -DNDEBUG",  # what is tested is not how fast it is
        "-DQMOE_PLUGIN_PYTHON=ON",
        f"-DQMOE_PLUGIN_EXTRA_FORMATS={EXTRA_FORMATS / 'formats'}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]
    if ninja is not None:
        configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as lock:  # tests run in several processes
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (configure, [cmake, "--build", str(BUILD), "--parallel", "2"]):
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            assert result.returncode == 0, result.stdout + result.stderr
    return BUILD


def install_package(folder: Path) -> None:
    """Our Python package with the library of `build`, as links."""
    package = folder / "qmoe_plugin"
    package.mkdir(parents=True)
    compiled = (BUILD / "_deps" / "qmoe_plugin-build").glob("*.so")
    for path in (*(ROOT / "python" / "qmoe_plugin").iterdir(), *compiled):
        (package / path.name).symlink_to(path)


def install_extra_formats(folder: Path) -> None:
    """The Python side of examples/extra_format, with the metadata that pip would write."""
    project = tomllib.loads((EXTRA_FORMATS / "pyproject.toml").read_text())["project"]
    name, version = project["name"], project["version"]
    shutil.copytree(EXTRA_FORMATS / "extra_formats", folder / "extra_formats", dirs_exist_ok=True)
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    sections = [
        f"[{group}]\n" + "\n".join(f"{key} = {value}" for key, value in entries.items())
        for group, entries in project["entry-points"].items()
    ]
    (info / "entry_points.txt").write_text("\n".join(sections) + "\n")


if __name__ == "__main__":
    install_extra_formats(Path(sys.argv[1]))
