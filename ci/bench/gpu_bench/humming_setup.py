"""Finds the peer, humming-kernels, and compiles its kernels ahead, while others are measured.

It compiles each kernel when it is first used, which takes seconds. A process of its own does that
(threads would break captures of CUDA graphs here) into a cache of files, in which the measuring
process then finds them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import stat
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from .cases import Case

ROOT = Path(__file__).resolve().parents[3]
_CACHE = Path(tempfile.gettempdir()) / "humming"


def find(wheel: Path | None = None) -> None:
    """Makes `import humming` work, and what it starts to compile.

    Args:
        wheel: A wheel of humming-kernels; None for an installed package, or a wheel in .gpu/.

    Raises:
        ImportError: If there is none.
        RuntimeError: If it does not find what it compiles with.
    """
    for name, folder in (("HUMMING_CACHE_DIR", "cache"), ("HUMMING_TMP_DIR", "tmp")):
        os.environ.setdefault(name, str(_CACHE / folder))
        Path(os.environ[name]).mkdir(parents=True, exist_ok=True)
    if wheel is not None or importlib.util.find_spec("humming") is None:
        found = [wheel] if wheel else sorted((ROOT / ".gpu").glob("humming_kernels-*.whl"))
        if not found or not found[-1].is_file():
            raise ImportError("humming is not installed, and there is no wheel of it in .gpu/")
        site = _CACHE / "site" / found[-1].stem
        with zipfile.ZipFile(found[-1]) as archive:
            archive.extractall(site)
        sys.path.insert(0, str(site))
    os.environ["HUMMING_DISABLE_PARALLEL_BUILD"] = "1"  # importing it would start processes
    import humming
    from humming.utils.nvrtc import get_nvrtc_library_path

    del os.environ["HUMMING_DISABLE_PARALLEL_BUILD"]
    for program in Path(humming.__file__).parent.glob("_native/*/nvrtc_compile"):
        program.chmod(program.stat().st_mode | stat.S_IXUSR)  # a wheel that is unpacked has lost it
    # Its compiler loads libnvrtc by its path, and that one libnvrtc-builtins by the loader's.
    library = Path(get_nvrtc_library_path())
    folders = dict.fromkeys([str(library.parent), str(library.resolve().parent)])
    before = os.environ.get("LD_LIBRARY_PATH", "")
    os.environ["LD_LIBRARY_PATH"] = ":".join([*folders, *([before] if before else [])])


class Compiling:
    """The process that compiles."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        """Takes it over."""
        self._process = process

    def stop(self) -> None:
        """Ends it, if it still runs."""
        if self._process.poll() is None:
            self._process.terminate()
            self._process.wait()


def compile_ahead(jobs: Sequence[tuple[Case, Sequence[int]]]) -> Compiling:
    """Starts to compile what cases need at these numbers of tokens, in this order."""
    paths = [str(ROOT / "ci" / "bench"), *sys.path]
    environment = {**os.environ, "PYTHONPATH": ":".join(path for path in paths if path)}
    text = json.dumps([(case.name, list(tokens)) for case, tokens in jobs])
    command = [sys.executable, "-m", "gpu_bench.humming_compile", text]
    return Compiling(subprocess.Popen(command, env=environment))
