"""Which models are exported, and the cache they lie in. Light: exporting itself is `exporters.py`.

The cache is `QMOE_PLUGIN_MODELS`, or `.models` in the repository. It has one folder per state of
the recipes; in it, per architecture, `expected.npz` (prompt, greedy tokens and logits of PyTorch in
float32) and a folder for each export. A machine that cannot export (no PyTorch, no network) can use
a cache that was filled elsewhere.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

FOLDER = Path(__file__).resolve().parent
SKIP = "QMOE_PLUGIN_SKIP_MODELS"
CACHE = "QMOE_PLUGIN_MODELS"
# What the exports' bytes depend on.
_SOURCES = (
    "grid.py",
    "architectures.py",
    "checkpoints.py",
    "export.py",
    "exporters.py",
    "handmade.py",
    "prequantized.py",
)
_PACKAGES = (
    "torch",
    "transformers",
    "onnxruntime-genai",
    "mobius-onnx",
    "onnxruntime",
    "onnxscript",
)

PROMPT_LENGTH = 24
# Prompt and new tokens together exceed the sliding windows (32).
NEW_TOKENS = 16


@dataclass(frozen=True)
class Export:
    """One exported model."""

    recipe: str
    name: str
    exporter: Literal["genai", "mobius", "handmade"]
    # genai: precision, execution provider, extra options; mobius: keyword arguments.
    arguments: tuple[str, ...]
    activations: Literal["float32", "float16", "bfloat16"] = "float32"

    @property
    def id(self) -> str:
        return f"{self.recipe}-{self.name}"


# The builder's default on the CPU is 4, which allows int8 activations; 1 asks for float32.
_INT4 = ("int4", "cpu", "accuracy_level=1")
_INT8 = ("int8", "cpu", "accuracy_level=1", "moe_quant_type=int8")
# The builder writes float16 graphs for CUDA only; separate Q/K norms, for the CPU's attention, make
# them run anywhere.
_CUDA = ("cuda", "fuse_qk_norm_gqa=false")
_RAW_CUDA = (*_CUDA, "qmoe_weights_prepacked=0")
_PREPACKED_1 = "matmulnbits_weights_prepacked=1"
_PREPACKED_INT8 = ("int8", *_CUDA, "moe_quant_type=int8")
_INT4_FP16 = ("int4", *_RAW_CUDA)
_INT8_FP16 = ("int8", *_RAW_CUDA, "moe_quant_type=int8")
_BF16 = "use_cuda_bf16=true"
_MXFP4 = "moe_quant_type=mxfp4"
_INT2 = ("int4", *_CUDA, "moe_quant_type=int2", "qmoe_block_size=64")
# Only the builder's second kind of configuration has widths for fc1 and fc2.
_INT2_INT4 = (
    *("int4", *_CUDA, "--builder_config_version", "2", "--target_options"),
    '{"quant_config": {"moe": {"type": "int4", "fc1_type": "int2", "block_size": 64}}}',
)


def _genai(recipe: str) -> list[Export]:
    return [
        Export(recipe, "int4", "genai", _INT4),
        Export(recipe, "int8", "genai", _INT8),
        Export(recipe, "int4_fp16", "genai", _INT4_FP16, "float16"),
        Export(recipe, "int8_fp16", "genai", _INT8_FP16, "float16"),
    ]


def _float(recipe: str) -> list[Export]:
    """Experts that are not quantised: op MoE."""
    return [
        Export(recipe, "float32", "genai", ("fp32", "cpu")),
        Export(recipe, "float16", "genai", ("fp16", *_CUDA), "float16"),
    ]


def _mobius(recipe: str) -> list[Export]:
    return [
        Export(recipe, "int4", "mobius", ("dtype=f32", "execution_provider=cuda")),
        Export(recipe, "int4_fp16", "mobius", ("dtype=f16", "execution_provider=cuda"), "float16"),
    ]


EXPORTS = [
    *_genai("gpt_oss"),
    *_genai("qwen35_moe"),
    *_genai("lfm2_moe"),
    *_genai("gemma4"),
    *_float("gpt_oss"),
    *_float("qwen35_moe"),
    *_float("lfm2_moe"),
    # Qwen3.5's weights have one scale a row: these grids lose nothing either.
    Export("qwen35_moe", "int4_channel", "genai", (*_INT4, "qmoe_block_size=0")),
    Export("qwen35_moe", "int8_channel", "genai", (*_INT8, "qmoe_block_size=0")),
    Export("qwen35_moe", "int4_b128", "genai", (*_INT4, "qmoe_block_size=64", "block_size=128")),
    Export("gpt_oss", "int4_default", "genai", ("int4", "cpu")),
    Export("gpt_oss", "int4_zero_points", "genai", (*_INT4, "is_symmetric=false")),
    # As the builder writes for CUDA by default: weights in the order of stock CUDA kernels.
    Export("qwen35_moe", "prepacked_int4", "genai", ("int4", *_CUDA, _PREPACKED_1), "float16"),
    Export("qwen35_moe", "prepacked_int8", "genai", (*_PREPACKED_INT8, _PREPACKED_1), "float16"),
    Export(
        "qwen35_moe",
        "prepacked_sm90",
        "genai",
        ("int4", *_CUDA, "matmulnbits_weights_prepacked=2", "block_size=64"),
        "float16",
    ),
    Export(
        "qwen35_moe",
        "prepacked_channel",
        "genai",
        (*_PREPACKED_INT8, "qmoe_block_size=0"),
        "float16",
    ),
    Export(
        "qwen35_moe",
        "prepacked_int8_sm90",
        "genai",
        (*_PREPACKED_INT8, "matmulnbits_weights_prepacked=2", "block_size=64"),
        "float16",
    ),
    Export(
        "qwen35_moe",
        "prepacked_int4_channel",
        "genai",
        ("int4", *_CUDA, "qmoe_block_size=0"),
        "float16",
    ),
    Export("lfm2_moe", "prepacked_int4", "genai", ("int4", *_CUDA), "float16"),
    Export("lfm2_moe", "prepacked_int8", "genai", _PREPACKED_INT8, "float16"),
    Export("gemma4", "prepacked_int4", "genai", ("int4", *_CUDA), "float16"),
    Export("gpt_oss_64", "prepacked_int4", "genai", ("int4", *_CUDA), "float16"),
    # With precision int8, the builder ignores use_cuda_bf16 and writes float16.
    Export(
        "gpt_oss_64",
        "prepacked_int8_bf16",
        "genai",
        ("int4", *_CUDA, "moe_quant_type=int8", _BF16),
        "bfloat16",
    ),
    Export("gpt_oss", "mxfp4", "genai", ("int4", *_CUDA, _MXFP4), "float16"),
    Export("gpt_oss", "mxfp4_bf16", "genai", ("int4", *_CUDA, _MXFP4, _BF16), "bfloat16"),
    Export("gpt_oss", "int4_bf16", "genai", (*_INT4_FP16, _BF16), "bfloat16"),
    Export("gpt_oss", "bfloat16", "genai", ("bf16", *_CUDA), "bfloat16"),
    Export("qwen35_moe_int2", "int2", "genai", _INT2, "float16"),
    Export("qwen35_moe_int2", "int2_int4", "genai", _INT2_INT4, "float16"),
    Export("qwen35_moe_int2", "int2_bf16", "genai", (*_INT2, _BF16), "bfloat16"),
    # By hand, as no exporter writes MoE nodes for these; with fc3.
    Export("mixtral", "float32", "handmade", ()),
    Export("qwen3_moe", "float32", "handmade", ()),
    *_mobius("qwen3_moe"),
    *_mobius("glm4_moe"),
    *_mobius("deepseek_v3"),
]

# Checkpoints that are quantised already, of a model without experts: the builder reads none of MoE.
_FLOAT_HEAD = "nodes_to_exclude=/lm_head/MatMul"  # which these methods leave alone
PREQUANTIZED_EXPORTS = [
    Export(f"llama_{method}", name, "genai", arguments, activations)
    for method in ("gptq", "gptq_act_order", "awq")
    for name, arguments, activations in (
        ("int4", (*_INT4, _FLOAT_HEAD), "float32"),
        ("int4_fp16", ("int4", *_CUDA, _FLOAT_HEAD), "float16"),
    )
]

# The builder's broken MXFP4: of every architecture but gpt-oss. No weights are kept of these.
FOREIGN_EXPORTS = [
    Export(recipe, "mxfp4", "genai", ("int4", "cuda", _MXFP4), "float16")
    for recipe in ("qwen35_moe", "lfm2_moe", "gemma4")
]

# What the builder does not write, and what it says. Should a later one write it, test it above.
REFUSED_EXPORTS = {
    Export("gpt_oss", "prepacked_int4", "genai", ("int4", *_CUDA)): (
        "num_rows (96) is incompatible with column-interleave tiling"
    ),
    Export("gpt_oss", "nvfp4", "genai", ("int4", *_CUDA, "moe_quant_type=nvfp4")): (
        "moe_quant_type=nvfp4 is not supported for GPT-OSS"
    ),
    Export("lfm2_moe", "nvfp4", "genai", ("int4", *_CUDA, "moe_quant_type=nvfp4")): (
        "Block-wise QMoE only supports block_size 32, 64, or 128, got 16"
    ),
    Export("lfm2_moe", "int2_cpu", "genai", ("int4", "cpu", *_INT2[-2:])): (
        "INT2 QMoE is only supported on the CUDA EP"
    ),
    Export("lfm2_moe", "int2_channel", "genai", (*_INT2[:-1], "qmoe_block_size=0")): (
        "INT2 CUDA QMoE requires qmoe_block_size=64 or 128"
    ),
}


@dataclass(frozen=True)
class Expected:
    """PyTorch's answer in float32."""

    prompt: list[int]
    tokens: list[int]
    # Of every position but the last token's: [len(prompt) + len(tokens) - 1, vocabulary].
    logits: NDArray[np.float32]


class UnavailableError(Exception):
    """The models are neither in the cache nor can they be exported here; the text says why."""


class Exports:
    """A filled cache."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def model(self, export: Export) -> Path:
        """The folder with model.onnx, and for genai genai_config.json."""
        return self.folder / export.recipe / export.name

    def expected(self, export: Export) -> Expected:
        with np.load(self.folder / export.recipe / "expected.npz") as data:
            return Expected(data["prompt"].tolist(), data["tokens"].tolist(), data["logits"])

    def refusals(self) -> dict[str, str]:
        """What the builder said to each of REFUSED_EXPORTS."""
        said: dict[str, str] = json.loads((self.folder / "refused.json").read_text())
        return said


def by_id(identifier: str) -> Export:
    return next(export for export in EXPORTS + PREQUANTIZED_EXPORTS if export.id == identifier)


def ensure() -> Exports:
    """Exports all models, or finds them in the cache. One process at a time; the others wait.

    Raises:
        UnavailableError: If the models cannot be had here.
    """
    if os.environ.get(SKIP, "0") not in ("", "0"):
        raise UnavailableError(f"{SKIP} is set")
    root = Path(os.environ.get(CACHE) or FOLDER.parents[1] / ".models")
    folder = root / _recipes_key()
    installed = _installed()
    if _is_complete(folder, installed):
        return Exports(folder)
    missing = [package for package, version in installed.items() if version is None]
    if missing:
        raise UnavailableError(
            f"exporting models needs {', '.join(missing)} (pip install '.[models]'), "
            f"and there is no cache of the present recipes in {root}"
        )
    root.mkdir(parents=True, exist_ok=True)
    with (root / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _is_complete(folder, installed):
            _run_exporters(folder)
            (folder / "versions.json").write_text(json.dumps(installed, indent=2))
    return Exports(folder)


def _recipes_key() -> str:
    digest = hashlib.sha256()
    for name in _SOURCES:
        digest.update((FOLDER / name).read_bytes())
    return digest.hexdigest()[:12]


def _installed() -> dict[str, str | None]:
    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def _is_complete(folder: Path, installed: dict[str, str | None]) -> bool:
    """Whether the cache was made by the installed versions (or any, if they are not installed)."""
    try:
        made_by = json.loads((folder / "versions.json").read_text())
    except FileNotFoundError:
        return False
    return None in installed.values() or made_by == installed


def _run_exporters(folder: Path) -> None:
    """In a process of its own: the exporters bring PyTorch and much logging with them."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(FOLDER.parent), os.environ.get("PYTHONPATH", "")]),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    folder.mkdir(parents=True, exist_ok=True)
    log_path = folder / "export.log"
    with log_path.open("w") as log:
        done = subprocess.run(
            [sys.executable, "-m", "models.exporters", str(folder)],
            env=environment, stdout=log, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
    if done.returncode:
        tail = "\n".join(log_path.read_text(errors="replace").splitlines()[-30:])
        raise RuntimeError(f"exporting failed; the log is {log_path}, its end:\n{tail}")
