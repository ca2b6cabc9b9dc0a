"""Which device a session would run on, and why not on a better one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from qmoe_plugin.library import native, runtime

CUDA_PROVIDER = "CUDAExecutionProvider"
CPU_PROVIDER = "CPUExecutionProvider"


@dataclass(frozen=True)
class Target:
    """What kernels are chosen for.

    Attributes:
        device: "CPU" or "CUDA".
        sm: Compute capability of the CUDA device, major * 10 + minor (90 = Hopper); 0 for the CPU.
    """

    device: Literal["CPU", "CUDA"]
    sm: int = 0

    def __str__(self) -> str:
        """As in "CPU" or "CUDA (sm_90)"."""
        return f"CUDA (sm_{self.sm})" if self.device == "CUDA" else "CPU"


CPU = Target("CPU")


def target(sm: int | None = None) -> Target:
    """The target of this compute capability.

    Args:
        sm: Compute capability, 90 for Hopper; 0 for the CPU; None for what this machine has.
    """
    if sm is None:
        return best_target()
    if sm < 0:
        raise ValueError(f"sm is {sm}; give a compute capability such as 90, or 0 for the CPU")
    return Target("CUDA", sm) if sm else CPU


def best_target(index: int = 0) -> Target:
    """CUDA device `index` if sessions can really use it, else the CPU."""
    return CPU if cuda_problem(index) else Target("CUDA", native().cuda_devices()[index])


def cuda_problem(index: int = 0) -> str:
    """Why sessions cannot use CUDA device `index` with our kernels; empty if they can."""
    if not native().has_cuda():
        return "this build of qmoe_plugin has no CUDA kernels"
    devices: list[int] = native().cuda_devices()
    if not devices:
        return "there is no CUDA device, or no driver"
    if index >= len(devices):
        return f"there is no CUDA device {index}; this machine has {len(devices)}"
    archs: str = native().cuda_archs()
    if not runs_on(archs, devices[index]):
        return f"CUDA device {index} is sm_{devices[index]}, and this build is for {archs}"
    if CUDA_PROVIDER not in runtime().get_available_providers():
        return (
            f"this onnxruntime ({runtime().__version__}) has no {CUDA_PROVIDER}; "
            "install onnxruntime-gpu instead of onnxruntime"
        )
    return ""


def runs_on(archs: str, sm: int) -> bool:
    """Whether code for these architectures runs on a device.

    Args:
        archs: As the build writes them: "80" is machine code, which runs on the same major version,
            "90a" is code for that very chip, "120+PTX" runs on anything newer too.
        sm: Compute capability of the device.
    """
    return any(_arch_runs_on(arch, sm) for arch in archs.split())


def _arch_runs_on(arch: str, sm: int) -> bool:
    match = re.fullmatch(r"(\d+)([af]?)(\+PTX)?", arch)
    if match is None:
        raise ValueError(f"'{arch}' is not a CUDA architecture such as 80, 90a or 120+PTX")
    built = int(match[1])
    if match[2] == "a":
        return sm == built
    return sm >= built and (match[3] is not None or sm // 10 == built // 10)
