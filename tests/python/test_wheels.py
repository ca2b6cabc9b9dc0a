"""The packages of onnxruntime."""

import os
import sys
from importlib import metadata
from pathlib import Path

import onnxruntime
import pytest
from helpers.command import run

from qmoe_plugin import wheels


@pytest.fixture
def folders(monkeypatch, tmp_path):
    """Makes folders of sys.path, of which nothing is imported: packages by folder, then module."""
    monkeypatch.delitem(sys.modules, "onnxruntime")
    monkeypatch.setattr(sys, "path", [])

    def make(name, packages, module=True):
        folder = tmp_path / name
        folder.mkdir()
        sys.path.append(str(folder))
        for package, version in packages.items():
            install(folder, package, version)
        if module:
            (folder / "onnxruntime").mkdir()
            (folder / "onnxruntime" / "__init__.py").touch()
        return folder

    return make


def install(folder, name, version):
    """Writes what a wheel says of itself."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.mark.parametrize("packages", [{}, {"onnxruntime": "1.31.1"}, {"onnxruntime-gpu": "1.31.1"}])
def test_at_most_one_is_fine(folders, packages):
    folders("site", packages)
    assert wheels.conflict() == ""


def test_two_are_a_conflict_with_the_way_out(folders):
    folders("site", {"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.30.0"})
    problem = wheels.conflict()
    assert "onnxruntime 1.31.1 and onnxruntime-gpu 1.30.0 are installed together" in problem
    assert "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu" in problem


def test_two_in_different_folders_are_none(folders):
    """The first folder wins, whichever package it has."""
    first = folders("first", {"onnxruntime-gpu": "1.31.1"})
    second = folders("second", {"onnxruntime": "1.30.0"})
    assert wheels.conflict() == ""
    imported, hidden = wheels.runtime_wheels()
    assert imported == [wheels.Wheel("onnxruntime-gpu", "1.31.1", first)]
    assert hidden == [wheels.Wheel("onnxruntime", "1.30.0", second)]
    sys.path.reverse()
    assert [wheel.folder for wheel in wheels.runtime_wheels()[0]] == [second]


def test_only_the_folder_that_is_imported_counts(folders):
    both = {"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.31.1"}
    folders("first", {"onnxruntime": "1.30.0"})
    folders("second", both)
    assert wheels.conflict() == ""
    sys.path.reverse()
    assert "installed together" in wheels.conflict()


def test_the_same_folder_under_two_names(folders, tmp_path):
    """As lib64 of a virtual environment is its lib."""
    folder = folders("lib", {"onnxruntime": "1.31.1"})
    (tmp_path / "lib64").symlink_to(folder)
    sys.path.insert(0, str(tmp_path / "lib64"))
    assert wheels.runtime_wheels() == ([wheels.Wheel("onnxruntime", "1.31.1", folder)], [])


def test_no_onnxruntime_at_all(folders):
    folders("site", {"onnxruntime": "1.31.1"}, module=False)
    assert wheels.conflict() == ""
    assert wheels.runtime_wheels()[0] == []


def test_what_is_installed_here():
    imported, _ = wheels.runtime_wheels()
    assert imported
    for wheel in imported:
        assert wheel.version == metadata.version(wheel.name)


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder that processes import the real onnxruntime from, on the CPU."""
    first = tmp_path / "first"
    first.mkdir()
    (first / "onnxruntime").symlink_to(Path(onnxruntime.__file__).parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(first), *filter(None, sys.path)]))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return first


def test_doctor_says_what_is_imported_from_where(site, tmp_path, monkeypatch):
    second = tmp_path / "second"
    second.mkdir()
    install(site, "onnxruntime-gpu", "1.31.1")
    install(second, "onnxruntime", "1.30.0")
    path = os.environ["PYTHONPATH"].split(os.pathsep)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([path[0], str(second), *path[1:]]))
    done = run("doctor", warnings=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert (
        f"note     onnxruntime packages: onnxruntime-gpu 1.31.1 in {site}; installed elsewhere and "
        f"not imported: onnxruntime 1.30.0 in {second}"
    ) in done.stdout


def test_a_process_warns_of_a_conflict(site):
    for name in ("onnxruntime", "onnxruntime-gpu"):
        install(site, name, "1.31.1")
    done = run("doctor", warnings=True)
    assert "RuntimeWarning: onnxruntime 1.31.1 and onnxruntime-gpu 1.31.1 are" in done.stderr
    assert "warning  onnxruntime packages: onnxruntime 1.31.1 and" in done.stdout
    assert run("doctor").stderr == ""
