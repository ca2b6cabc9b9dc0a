"""Which device is chosen, and why not another."""

import types

import pytest

from qmoe_plugin import devices
from qmoe_plugin.devices import CPU, Target


@pytest.mark.parametrize(
    ("archs", "sm", "expected"),
    [
        ("80", 80, True),
        ("80", 86, True),
        ("80", 90, False),  # machine code of another major version
        ("86", 80, False),
        ("90a", 90, True),
        ("90a", 100, False),
        ("80 86 89 90a 100a 120a 120+PTX", 90, True),
        ("80 86 89 90a 100a 120a 120+PTX", 103, False),
        ("80 86 89 90a 100a 120a 120+PTX", 121, True),
        ("120+PTX", 130, True),
        ("", 90, False),
    ],
)
def test_runs_on(archs, sm, expected):
    assert devices.runs_on(archs, sm) is expected


def test_runs_on_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="sm_90"):
        devices.runs_on("sm_90", 90)


@pytest.fixture
def machine(monkeypatch):
    """A machine made up by a test."""

    def make(*, cuda=True, sms=(90,), archs="90a", providers=("CUDAExecutionProvider",)):
        native = types.SimpleNamespace(
            has_cuda=lambda: cuda, cuda_devices=lambda: list(sms), cuda_archs=lambda: archs
        )
        runtime = types.SimpleNamespace(
            get_available_providers=lambda: list(providers), __version__="1.31.1"
        )
        monkeypatch.setattr(devices, "native", lambda: native)
        monkeypatch.setattr(devices, "runtime", lambda: runtime)

    return make


def test_cuda_is_taken_when_all_is_there(machine):
    machine(sms=(80, 90), archs="80 90a")
    assert devices.cuda_problem() == ""
    assert devices.best_target() == Target("CUDA", 80)
    assert devices.best_target(1) == Target("CUDA", 90)
    assert devices.target(None) == Target("CUDA", 80)


@pytest.mark.parametrize(
    ("lacking", "reason"),
    [
        ({"cuda": False}, "no CUDA kernels"),
        ({"sms": ()}, "no CUDA device, or no driver"),
        ({"sms": (75,)}, "device 0 is sm_75, and this build is for 90a"),
        ({"providers": ("CPUExecutionProvider",)}, "install onnxruntime-gpu"),
    ],
)
def test_cuda_is_not_taken_when_something_is_missing(machine, lacking, reason):
    machine(**lacking)
    assert reason in devices.cuda_problem()
    assert devices.best_target() == CPU


def test_a_device_that_is_not_there(machine):
    machine()
    assert "no CUDA device 3; this machine has 1" in devices.cuda_problem(3)


def test_target_of_a_compute_capability():
    assert devices.target(0) == CPU
    assert devices.target(90) == Target("CUDA", 90)
    assert str(devices.target(90)) == "CUDA (sm_90)"
    with pytest.raises(ValueError, match="compute capability"):
        devices.target(-1)
