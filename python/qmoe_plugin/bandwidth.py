"""How fast GPUs read their memory, for the least time that reading weights can take."""

from __future__ import annotations

from dataclasses import dataclass

from qmoe_plugin.devices import Target


@dataclass(frozen=True)
class Bandwidth:
    """A figure for the bandwidth of device memory.

    Attributes:
        gb_per_s: 10^9 bytes a second.
        source: Of what device, and who says so.
    """

    gb_per_s: float
    source: str

    def microseconds(self, size: float) -> float:
        """The time that reading so many bytes takes at least."""
        return size / self.gb_per_s / 1e3

    def __str__(self) -> str:
        """As in "4287 GB/s (H200, ...)"."""
        return f"{self.gb_per_s:g} GB/s ({self.source})"


_BY_SM = {
    80: Bandwidth(2039, "A100 80 GB SXM, NVIDIA's data sheet"),
    86: Bandwidth(936, "GeForce RTX 3090, NVIDIA's GA102 white paper"),
    87: Bandwidth(204.8, "Jetson AGX Orin, NVIDIA's data sheet"),
    89: Bandwidth(864, "L40S, NVIDIA's data sheet"),
    90: Bandwidth(4287, "H200, copies measured by ci/bench/bench_gpu.py; data sheet: 4800"),
    100: Bandwidth(8000, "B200, NVIDIA's data sheet"),
    103: Bandwidth(8000, "B300, NVIDIA's data sheet"),
    120: Bandwidth(1792, "GeForce RTX 5090, NVIDIA's data sheet"),
    121: Bandwidth(273, "DGX Spark (GB10), NVIDIA's data sheet"),
}


def bandwidth(target: Target) -> Bandwidth | None:
    """A figure for a device of this compute capability; None where there is none to be had.

    Devices of the same compute capability differ: say the figure of yours where it matters. For
    processors there is no common figure at all.
    """
    return _BY_SM.get(target.sm)
