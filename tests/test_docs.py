"""The documentation: generated pages are current, messages exist, the site builds."""

from __future__ import annotations

import ast
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.usefixtures("library")
def test_generated_pages_are_current() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "ci" / "pages.py", "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def messages() -> list[str]:
    """All string literals of the sources; adjacent ones are one."""
    found = []
    for path in (ROOT / "python").rglob("*.py"):
        tree = ast.parse(path.read_text())
        found += [
            node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
    for path in [*(ROOT / "ops").rglob("*.h"), *(ROOT / "ops").rglob("*.cc")]:
        joined = re.sub(r'"\s*\n\s*"', "", path.read_text())
        found += re.findall(r'"([^"\n]*)"', joined)
    return found


HEADINGS = re.findall(
    r"^### (.*)$", (ROOT / "docs" / "troubleshooting.md").read_text(), flags=re.MULTILINE
)


@pytest.mark.parametrize("heading", HEADINGS)
def test_messages_exist(heading: str) -> None:
    """Every message of ours that troubleshooting explains can really appear."""
    says, quoted = re.fullmatch(r"(?:(\w+) says )?`([^`]+)`", heading).groups()
    if says is not None:
        assert says in ("onnx", "onnxruntime")
        return
    known = messages()
    for part in (part.strip() for part in quoted.split("…")):
        assert not part or any(part in text for text in known), part


@pytest.mark.parametrize("broken", [False, True])
def test_site_builds(tmp_path: Path, broken: bool) -> None:
    """With warnings as errors: a link that leads nowhere, a page that is in no menu."""
    if importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("material") is None:
        pytest.skip("mkdocs-material is not installed (pip install '.[docs]')")
    for name in ("docs", "mkdocs.yml"):
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, tmp_path / name)
    if broken:
        with (tmp_path / "docs" / "index.md").open("a") as page:
            page.write("[a link](nowhere.md)")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode != 0) == broken, done.stderr
    assert broken == ("nowhere.md" in done.stderr)
