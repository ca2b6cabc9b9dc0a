"""The doctor, healthy and sick."""

from importlib import metadata

import pytest

from qmoe_plugin import doctor, env, smoke, wheels
from qmoe_plugin.devices import CPU, best_target

pytestmark = pytest.mark.usefixtures("library")


def examine():
    return {check.name: check for check in doctor.examine()}


def test_a_healthy_installation():
    checks = examine()
    assert not [check for check in checks.values() if check.status == "broken"]
    for op in ("QMoE", "MatMulNBits"):
        assert checks[f"{op} on CPU"].status == "ok"
        assert "largest error" in checks[f"{op} on CPU"].detail


def test_a_missing_library_is_found(monkeypatch, tmp_path):
    monkeypatch.setenv(env.LIBRARY.name, str(tmp_path / "none.so"))
    checks = examine()
    assert checks["library"].status == "broken"
    assert checks["QMoE on CPU"].status == "broken"
    assert "none.so" in checks["QMoE on CPU"].detail
    assert checks["environment"].status == "note"


def test_wrong_numbers_are_found(monkeypatch):
    real = smoke.cases

    def wrong(dtype):
        qmoe, matmul_nbits = real(dtype)
        expected = qmoe.expected.copy()
        expected[0, 0] += 0.01 * abs(expected).max()
        return [smoke.Case(qmoe.name, qmoe.model, qmoe.inputs, expected), matmul_nbits]

    monkeypatch.setattr(smoke, "cases", wrong)
    checks = examine()
    assert checks["QMoE on CPU"].status == "broken"
    assert "1e-04 is allowed" in checks["QMoE on CPU"].detail
    assert checks["MatMulNBits on CPU"].status == "ok"


def test_not_a_number_is_found(monkeypatch):
    monkeypatch.setattr(smoke, "run", lambda case, target: float("nan"))
    assert examine()["QMoE on CPU"].status == "broken"


def test_another_version_of_the_library_is_found(monkeypatch):
    real = metadata.version
    monkeypatch.setattr(
        metadata, "version", lambda name: "9.9.9" if name == "qmoe-plugin" else real(name)
    )
    check = examine()["qmoe_plugin"]
    assert check.status == "broken"
    assert "package is 9.9.9, but its library" in check.detail


@pytest.mark.filterwarnings("ignore:two packages")
def test_two_packages_of_onnxruntime_are_found(monkeypatch):
    monkeypatch.setattr(wheels, "conflict", lambda: "two packages")
    check = examine()["onnxruntime packages"]
    assert (check.status, check.detail) == ("warning", "two packages")


@pytest.mark.parametrize("dtype", smoke.TOLERANCE)
def test_smoke_cases_pass(dtype):
    for case in smoke.cases(dtype):
        assert smoke.run(case, CPU) <= smoke.TOLERANCE[dtype]


@pytest.mark.gpu
def test_a_healthy_gpu(cuda):
    target = best_target()
    checks = examine()
    assert checks["CUDA"].status == "ok"
    for op in ("QMoE", "MatMulNBits"):
        assert checks[f"{op} on {target}"].status == "ok"
