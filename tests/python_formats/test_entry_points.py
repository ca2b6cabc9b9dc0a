"""Formats of other packages: found by their entry points, and left out with a warning if broken."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

GOOD = """
import numpy as np
from qmoe_plugin.formats import Format
FORMAT = Format("steps3", 2, np.array([0.0, 1.0, 2.0, 4.0]), 0, False)
"""


def install(folder: Path, name: str, source: str, entry: str) -> None:
    """A package as pip would leave it: a module, and what entry points it has."""
    (folder / f"{name}_package.py").write_text(source)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[qmoe_plugin.formats]\n{entry}\n")


def python(folder: Path, code: str) -> subprocess.CompletedProcess:
    """Runs code in a Python that has the folder on its path."""
    setup = f"import sys; sys.path.insert(0, {str(folder)!r})\n"
    command = [sys.executable, "-W", "always", "-c", setup + code]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_format_of_another_package_is_there(tmp_path: Path) -> None:
    install(tmp_path, "good", GOOD, "steps3 = good_package:FORMAT")
    result = python(
        tmp_path,
        "from qmoe_plugin import formats\n"
        "assert 'good_package' not in sys.modules, 'loaded by the import'\n"
        "fmt = formats.get('steps3')\n"
        "assert 'steps3' in formats.FORMATS and formats.for_attributes('steps3') is fmt\n"
        "assert fmt.qmoe_attributes == {'quant_type': 'steps3', 'expert_weight_bits': 2}\n"
        "assert fmt.matmul_nbits_attributes == {'weight_format': 'steps3', 'bits': 2}\n"
        "print(list(formats.FORMATS) == sorted(formats.FORMATS), len(formats.FORMATS))\n",
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("True")
    assert "Warning" not in result.stderr


@pytest.mark.parametrize(
    ("source", "entry", "reason"),
    [
        ("1 / 0", "steps3 = bad_package:FORMAT", "ZeroDivisionError: division by zero"),
        (GOOD, "steps3 = bad_package:OTHER", "AttributeError"),
        (GOOD, "steps3 = no_such_package:FORMAT", "ModuleNotFoundError"),
        ("FORMAT = 4", "steps3 = bad_package:FORMAT", "must be a qmoe_plugin.formats.Format"),
        (GOOD, "other = bad_package:FORMAT", "it is the format 'steps3'"),
        (GOOD.replace("steps3", "int4"), "int4 = bad_package:FORMAT", "of this name already"),
        (GOOD.replace("4.0]", "4.0, 8.0]"), "steps3 = bad_package:FORMAT", "values(5,) for 2 bits"),
    ],
)
def test_a_broken_one_is_left_out_with_a_warning(
    source: str, entry: str, reason: str, tmp_path: Path
) -> None:
    install(tmp_path, "bad", source, entry)
    name = entry.split()[0]
    result = python(
        tmp_path,
        "from qmoe_plugin import formats\n"
        "assert formats.get('int4').values.tolist() == list(range(16))\n"
        "assert 'steps3' not in formats.FORMATS\n"
        f"formats.get({name!r})\n",
    )
    warning = f"RuntimeWarning: the weight format '{name}' of bad cannot be loaded and is left out"
    assert result.stderr.count(warning) == 1
    assert reason in result.stderr.split(warning)[1].splitlines()[0]
    if name != "int4":  # asking for it says so again
        assert result.returncode == 1
        assert f"format '{name}' is not known (" in result.stderr
