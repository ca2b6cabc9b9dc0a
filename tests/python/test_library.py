"""Where the compiled parts are found, and what is said when they are not."""

import importlib
from pathlib import Path

import pytest

import qmoe_plugin
from qmoe_plugin import env, library

pytestmark = pytest.mark.usefixtures("library")


def test_path_names_a_file():
    path = Path(qmoe_plugin.get_library_path())
    assert path.is_file()
    assert path.name == library.LIBRARY_NAME


def test_override_wins(monkeypatch, tmp_path):
    other = tmp_path / "copy.so"
    other.write_bytes(b"")
    monkeypatch.setenv("QMOE_PLUGIN_LIBRARY", str(other))
    assert qmoe_plugin.get_library_path() == str(other)


def test_override_that_is_missing_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv("QMOE_PLUGIN_LIBRARY", str(tmp_path / "none.so"))
    with pytest.raises(FileNotFoundError, match=r"QMOE_PLUGIN_LIBRARY is set to .*none\.so"):
        qmoe_plugin.get_library_path()


def test_empty_override_counts_as_unset(monkeypatch):
    monkeypatch.setenv("QMOE_PLUGIN_LIBRARY", "")
    assert Path(qmoe_plugin.get_library_path()).is_file()


def test_missing_library_says_where_it_looked(monkeypatch, tmp_path):
    monkeypatch.delenv("QMOE_PLUGIN_LIBRARY", raising=False)
    monkeypatch.setattr(library, "_folders", lambda: [tmp_path])
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}.*pip install"):
        qmoe_plugin.get_library_path()


def _without(monkeypatch, missing):
    real = importlib.import_module

    def import_module(name, *args):
        if name == missing:
            raise ModuleNotFoundError(f"No module named '{missing}'")
        return real(name, *args)

    monkeypatch.setattr(importlib, "import_module", import_module)


def test_missing_native_module_says_how_to_get_it(monkeypatch):
    _without(monkeypatch, "qmoe_plugin._native")
    with pytest.raises(ImportError, match=r"_native cannot be loaded: No module.*pip install"):
        library.native()


def test_missing_onnxruntime_says_which_packages_there_are(monkeypatch):
    _without(monkeypatch, "onnxruntime")
    with pytest.raises(ImportError, match="onnxruntime-gpu for CUDA"):
        library.runtime()


def test_versions_agree():
    assert qmoe_plugin.__version__ in (library.native().version(), "0+not.installed")


def test_variables_are_few_and_all_there_are():
    """All that C++ reads is listed, and nothing else."""
    root = Path(__file__).parents[2]
    read = set()
    for source in [*root.glob("ops/**/*.cc"), *root.glob("ops/**/*.cu*"), *root.glob("ops/**/*.h")]:
        for part in source.read_text().split("getenv(")[1:]:
            read.add(part.split('"')[1])
    listed = {variable.name for variable in env.VARIABLES}
    assert listed == read | {"QMOE_PLUGIN_LIBRARY"}
    assert len(listed) <= 6
