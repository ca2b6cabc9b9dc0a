"""The environment variables that the package and its library read. There are no others.

Apart from `LIBRARY`, which is for development, they change speed only: never a layout, never what
is computed.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple


class Variable(NamedTuple):
    """An environment variable."""

    name: str
    doc: str

    def read(self) -> str | None:
        """Its value; None if it is not set or empty."""
        return os.environ.get(self.name) or None


LIBRARY = Variable(
    "QMOE_PLUGIN_LIBRARY",
    "Path of the library to register instead of the one in the package.",
)
CPU_ISA = Variable(
    "QMOE_PLUGIN_CPU_ISA",
    "Highest CPU instruction set to use: reference, avx2, avxvnni, avx512 or amx; on AArch64 "
    "reference, neon, neon_dotprod or neon_i8mm. Read by the library when a session is made.",
)

NVTX = Variable(
    "QMOE_PLUGIN_NVTX",
    "Set to 1, profilers show a range for each matrix product on the GPU, named after its kernel.",
)

TUNING = Variable(
    "QMOE_PLUGIN_TUNING",
    "File that `python -m qmoe_plugin tune` wrote: which kernels are fastest on this GPU. Read by "
    "the library when a session is made.",
)

VARIABLES = (LIBRARY, CPU_ISA, NVTX, TUNING)
"""All of them; at most six, by our own rule."""


def library_override() -> Path | None:
    """The library that the user wants instead of the package's own."""
    value = LIBRARY.read()
    return None if value is None else Path(value).expanduser()
