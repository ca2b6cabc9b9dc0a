"""The packages of onnxruntime."""

from importlib import metadata

import pytest

from qmoe_plugin import wheels


@pytest.fixture
def installed(monkeypatch):
    def make(**versions):
        names = {name.replace("_", "-"): version for name, version in versions.items()}

        def version(name):
            if name not in names:
                raise metadata.PackageNotFoundError(name)
            return names[name]

        monkeypatch.setattr(metadata, "version", version)

    return make


@pytest.mark.parametrize("versions", [{}, {"onnxruntime": "1.31.1"}, {"onnxruntime_gpu": "1.31.1"}])
def test_at_most_one_is_fine(installed, versions):
    installed(**versions)
    assert wheels.conflict() == ""


def test_two_are_a_conflict_with_the_way_out(installed):
    installed(onnxruntime="1.31.1", onnxruntime_gpu="1.30.0")
    problem = wheels.conflict()
    assert "onnxruntime 1.31.1 and onnxruntime-gpu 1.30.0 are installed together" in problem
    assert "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu" in problem


def test_what_is_installed_here():
    assert set(wheels.installed()) & set(wheels.RUNTIME_WHEELS)
