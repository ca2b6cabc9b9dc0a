"""`quantize` on a model of some GB: its memory, its progress bar, and Ctrl-C."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import big_float_model
from helpers.big_float_model import GIGABYTE
from helpers.command import COMMAND

import qmoe_plugin

pytestmark = [
    pytest.mark.usefixtures("library"),
    pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc"),
]

GIGABYTES = float(os.environ.get("QMOE_PLUGIN_BIG_GB", "2"))


@pytest.fixture
def folder(tmp_path):
    """A folder that is empty again at once, as pytest keeps the last ones."""
    if shutil.disk_usage(tmp_path).free < GIGABYTES * GIGABYTE:
        pytest.skip(f"{tmp_path} has less than {GIGABYTES:g} GB free")
    yield tmp_path
    for file in tmp_path.iterdir():
        file.unlink()


@pytest.mark.parametrize(("spec", "search"), [("int4", "mse"), ("nvfp4", "nearest")])
def test_memory_stays_below_a_gigabyte(folder, spec, search):
    tests = Path(big_float_model.__file__).parents[1]
    paths = os.pathsep.join([str(tests), os.environ.get("PYTHONPATH", "")])
    line = [sys.executable, "-m", "helpers.big_float_model", str(folder)]
    line += ["--gigabytes", str(GIGABYTES), "--format", spec, "--search", search]
    done = subprocess.run(
        line, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": paths}
    )
    result = json.loads(done.stdout)
    assert result["gigabytes"] > 0.9 * GIGABYTES
    assert result["quantized"] >= 3
    assert result["written"] > 0.1 * GIGABYTES * GIGABYTE
    assert 0 < result["peak_above"] < 0.6 * GIGABYTE


def wait_for(condition):
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    pytest.fail("nothing happened for 30 seconds")


def test_ctrl_c_leaves_nothing_that_looks_whole(folder):
    path = big_float_model.make(folder, 1)
    before = sorted(file.name for file in folder.iterdir())
    output = folder / "small.onnx"
    partial = folder / "small.onnx.data.partial"
    line = [*COMMAND, "quantize", str(path), str(output)]
    # Tests that a shell runs in the background ignore the signal, and so would the command.
    with subprocess.Popen(
        [*line, "--search", "mse"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        wait_for(lambda: partial.exists() and partial.stat().st_size > 1 << 20)
        assert not output.exists()
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error == "qmoe_plugin: interrupted\n"
    assert sorted(file.name for file in folder.iterdir()) == before


def test_a_kill_leaves_no_model(folder):
    path = big_float_model.make(folder, 1)
    output = folder / "small.onnx"
    line = [*COMMAND, "quantize", str(path), str(output)]
    with subprocess.Popen([*line, "--search", "mse"]) as process:
        wait_for((folder / "small.onnx.data.partial").exists)
        process.kill()
    assert not output.exists()
    assert not (folder / "small.onnx.data").exists()


def test_the_bar_is_drawn_on_a_terminal_only(folder):
    path = big_float_model.make(folder, 1)
    line = [*COMMAND, "quantize", str(path), str(folder / "small.onnx")]
    plain = subprocess.run(line, capture_output=True, text=True, check=True)
    assert plain.stderr == ""
    ours, theirs = pty.openpty()
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=theirs) as process:
        os.close(theirs)
        drawn = b""
        while True:
            try:
                drawn += os.read(ours, 4096)
            except OSError:  # the other end is closed
                break
    os.close(ours)
    assert process.returncode == 0
    last = drawn.decode().split("\r\033[K")
    assert last[-1] == ""
    assert "[" in last[1]
    assert " % of " in last[1] or "% of " in last[1]
    assert "M weights" in last[1]
    assert "100%" in last[-2]


def test_progress_counts_all_weights(tmp_path):
    path = big_float_model.make(tmp_path, 0.5)
    seen = []
    report = qmoe_plugin.quantize(
        path,
        tmp_path / "small.onnx",
        rules=[("head", "int8"), ("fc1_0", "keep")],
        progress=lambda *given: seen.append(given),
    )
    assert len(report.quantized) == 1
    total = big_float_model._HIDDEN * big_float_model._VOCABULARY
    assert {t for _, _, t in seen} == {total}
    done = [d for _, d, _ in seen]
    assert done[0] == 0
    assert done[-1] == total
    assert (np.diff(done) > 0).all()
    for file in tmp_path.iterdir():
        file.unlink()
