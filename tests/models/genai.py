"""Folders of onnxruntime-genai with our library in them, run by its own loop."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

import qmoe_plugin
from models.check import check_errors
from models.export import Expected, Export
from models.widen import OPS
from qmoe_plugin.devices import best_target

_CHILD = Path(__file__).with_name("genai_child.py")
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


@dataclass(frozen=True)
class Generated:
    """What genai made of a prompt."""

    tokens: list[int]
    # What each was chosen from: [tokens, vocabulary].
    logits: NDArray[np.float32]


def require(device: str) -> None:
    """Skips, naming what is missing, where genai cannot run on this device."""
    problem = _problem(device)
    if problem:
        pytest.skip(f"no onnxruntime-genai on {device}: {problem}")


@functools.cache
def _problem(device: str) -> str:
    return _run("probe", device).strip().rpartition("\n")[2]


def _run(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(_CHILD), *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"onnxruntime-genai failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def sm_of(device: str) -> int:
    """As `qmoe_plugin.retarget` takes it."""
    return best_target().sm if device == "cuda" else 0


def copy_retargeted(exported: Path, folder: Path, device: str) -> None:
    """A copy of the model's folder, all nodes of our ops moved to our domain."""
    shutil.copytree(exported, folder)
    model = folder / "model.onnx"
    report = qmoe_plugin.retarget(model, model, sm=sm_of(device))
    assert report.moved
    assert not report.kept


def configure(folder: Path, device: str, options: dict[str, str] | None = None) -> None:
    """Puts our library into a model's folder, and session options into its configuration."""
    library = Path(qmoe_plugin.get_library_path())
    shutil.copy(library, folder)
    given: dict[str, object] = {"custom_ops_library": library.name, **(options or {})}
    if device == "cpu":  # the exports for CUDA ask for it
        given["provider_options"] = []
    set_options(folder, given)


def set_options(folder: Path, options: dict[str, object]) -> None:
    """Session options in a model's configuration, and a profile of who ran its nodes."""
    path = folder / "genai_config.json"
    config = json.loads(path.read_text())
    config["model"]["decoder"]["session_options"] |= {
        "enable_profiling": str(folder / "profile"),
        **options,
    }
    path.write_text(json.dumps(config))


def _decoder(folder: Path) -> Any:
    return json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]


def generate(folder: Path, expected: Expected, device: str) -> Generated:
    """Greedy decoding; asserts that every node of our ops ran on the device."""
    require(device)
    asked = str(_decoder(folder)["session_options"].get("provider_options"))
    assert ("cuda" in asked) == (device == "cuda")
    given, output = folder / "given.npz", folder / "generated.npz"
    np.savez(given, prompt=expected.prompt, count=len(expected.tokens))
    _run("run", device, str(folder), str(given), str(output))
    _check_providers(folder, device)
    with np.load(output) as data:
        return Generated(data["tokens"].tolist(), data["logits"])


def _check_providers(folder: Path, device: str) -> None:
    """Looks up in ONNX Runtime's profile where the nodes of our ops ran."""
    (profile,) = folder.glob("profile*.json")
    events = [event.get("args", {}) for event in json.loads(profile.read_text())]
    ran = [event for event in events if event.get("op_name") in OPS]
    graph = onnx.load(folder / _decoder(folder)["filename"], load_external_data=False).graph
    moe = {event["node_index"] for event in ran if event["op_name"] != "MatMulNBits"}
    assert len(moe) == sum(node.op_type in ("QMoE", "MoE") for node in graph.node) > 0
    assert {event["provider"] for event in ran} == {_PROVIDERS[device]}


def check(generated: Generated, export: Export, expected: Expected) -> None:
    """PyTorch's logits, and its tokens unless two logits are too close to call.

    From a token on that differs there is nothing to compare.
    """
    assert len(generated.tokens) == len(expected.tokens)
    chosen = np.take_along_axis(generated.logits, np.array(generated.tokens)[:, None], axis=-1)
    assert np.array_equal(chosen[:, 0], generated.logits.max(-1))
    same = np.array(generated.tokens) == expected.tokens
    steps = len(same) if same.all() else int(same.argmin()) + 1
    wanted = expected.logits[len(expected.prompt) - 1 :]
    check_errors(export, np.abs(generated.logits - wanted)[:steps].max(-1), "in genai")
    assert same.all() or export.activations != "float32" or export.name == "int4_default"


def generate_plainly(folder: Path, prompt: list[int], count: int) -> list[int]:
    """The tokens alone, greedily on the CPU; says nothing about who ran the nodes."""
    genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    model = genai.Model(str(folder))
    parameters = genai.GeneratorParams(model)
    # Sliding-window models need room for their buffers from the start.
    parameters.set_search_options(max_length=64, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(prompt)
    tokens: list[int] = []
    while len(tokens) < count and not generator.is_done():
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
    return tokens
