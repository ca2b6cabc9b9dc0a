"""Tiny random checkpoints, their weights on a quantization grid.

Each recipe takes an architecture of `architectures.py`, draws every matrix on a grid of `grid.py`
and saves it as checkpoints are saved, so that exporters read it like a downloaded one. Since the
weights are on the grid, exports to it lose nothing: PyTorch's float32 logits are their oracle.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from models import architectures, prequantized
from models.architectures import VOCAB
from models.grid import BLOCK, Grid, draw, encode_mxfp4, split_int4

SEED = 20261121


@dataclass(frozen=True)
class Recipe:
    """How to make one checkpoint."""

    name: str
    make: Callable[[], PreTrainedModel]
    grid: Grid = "int4"
    experts_grid: Grid = "int4"
    # Expert weights stored [E, K, N] (gpt-oss) instead of [E, N, K].
    experts_transposed: bool = False
    # The whole model as GPTQ or AWQ publish it.
    prequantized: prequantized.Method | None = None
    # What is stored as 4-bit GPTQ as mobius reads it: a part of the matrices' names; None for none.
    gptq: str | None = None
    # GPTQ with zero points.
    asymmetric: bool = False
    # Whether the router's selection bias is drawn (else zero: mobius drops GLM4's).
    selection_bias: bool = True


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("gpt_oss", architectures.gpt_oss, experts_grid="mxfp4", experts_transposed=True),
        # What stock CUDA kernels' layouts and int2 need: sizes in multiples of 64.
        Recipe(
            "gpt_oss_64",
            functools.partial(architectures.gpt_oss, intermediate_size=64),
            experts_grid="mxfp4",
            experts_transposed=True,
        ),
        Recipe(
            "qwen35_moe", architectures.qwen35_moe, grid="int4_channel", experts_grid="int4_channel"
        ),
        Recipe("qwen35_moe_int2", architectures.qwen35_moe, experts_grid="int2"),
        Recipe("lfm2_moe", architectures.lfm2_moe),
        Recipe("gemma4", architectures.gemma4),
        *(
            Recipe(
                f"llama_{method}",
                architectures.llama,
                grid="int4_asymmetric",
                prequantized=method,
            )
            for method in get_args(prequantized.Method)
        ),
        Recipe("mixtral", architectures.mixtral),
        Recipe("qwen3_moe", architectures.qwen3_moe, gptq=".experts."),
        Recipe(
            "glm4_moe",
            architectures.glm4_moe,
            experts_grid="int4_asymmetric",
            gptq=".experts.",
            asymmetric=True,
            selection_bias=False,
        ),
        Recipe(
            "deepseek_v3",
            architectures.deepseek_v3,
            grid="int4_asymmetric",
            experts_grid="int4_asymmetric",
            gptq="layers.",
            asymmetric=True,
        ),
    )
}


def make_checkpoint(recipe: Recipe, folder: Path) -> PreTrainedModel:
    """Builds the model, draws its weights and saves it.

    Returns:
        The model in float32 and evaluation mode: the oracle.
    """
    torch.manual_seed(SEED)
    model = recipe.make().to(torch.float32).eval()
    _draw_weights(model, recipe)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    _save_tokenizer(folder)
    if recipe.experts_grid == "mxfp4":
        _add_mxfp4_experts(model, folder)
    if recipe.prequantized is not None:
        prequantized.save(model, recipe.prequantized, folder)
    if recipe.gptq is not None:
        _save_gptq(model, recipe, folder)
    return model


@torch.no_grad()
def _draw_weights(model: PreTrainedModel, recipe: Recipe) -> None:
    rng = np.random.default_rng(SEED)
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        if "visual" in name or "vision" in name:
            continue  # exported by nobody here
        if parameter.ndim == 3 and "experts" in name:
            stored = (shape[0], shape[2], shape[1]) if recipe.experts_transposed else shape
            values = draw(rng, stored, recipe.experts_grid)
            parameter.copy_(_tensor(values.swapaxes(1, 2) if recipe.experts_transposed else values))
        elif parameter.ndim == 2 and "embed" in name:
            # A tied table is lm_head too (and such models scale what they look up).
            gain = 1.0 if model.config.tie_word_embeddings else np.sqrt(shape[1])
            parameter.copy_(_tensor(draw(rng, shape, recipe.grid, gain=gain)))
        elif parameter.ndim == 2 and shape[1] % 32 == 0:
            # Routers get larger weights: thin margins between experts would amplify any rounding.
            router = "router" in name or (name.endswith("gate.weight") and "expert" not in name)
            parameter.copy_(_tensor(draw(rng, shape, recipe.grid, gain=2.0 if router else 1.0)))
        elif name.endswith("per_expert_scale"):
            # The builder folds it into the experts' weights: powers of two leave them on the grid.
            parameter.copy_(torch.from_numpy(np.exp2(rng.integers(-1, 2, shape))))
        elif parameter.ndim == 1 and not name.endswith("weight"):
            parameter.copy_(_half_exact(0.2 * rng.standard_normal(shape)))
        else:
            parameter.copy_(_half_exact(parameter.numpy() + 0.1 * rng.standard_normal(shape)))
    for name, buffer in model.named_buffers():  # routers' selection biases
        if "bias" in name and recipe.selection_bias:
            buffer.copy_(_half_exact(0.1 * rng.standard_normal(tuple(buffer.shape))))


def _tensor(values: np.ndarray[Any, Any]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values))


def _half_exact(values: np.ndarray[Any, Any]) -> torch.Tensor:
    """Rounds to what float16 and bfloat16 hold, so that no export rounds these."""
    return (
        torch.from_numpy(np.asarray(values)).to(torch.bfloat16).to(torch.float16).to(torch.float32)
    )


def _save_tokenizer(folder: Path) -> None:
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"t{i}": i for i in range(3, VOCAB)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)


def _add_mxfp4_experts(model: PreTrainedModel, folder: Path) -> None:
    """Adds the experts as MXFP4 blocks and scales, the form that the builder reads for gpt-oss."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, parameter in model.named_parameters():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            blocks, scales = encode_mxfp4(parameter.detach().numpy().swapaxes(1, 2))
            tensors[name + "_blocks"] = _tensor(blocks)
            tensors[name + "_scales"] = _tensor(scales)
    save_file(tensors, path, metadata={"format": "pt"})


def _save_gptq(model: PreTrainedModel, recipe: Recipe, folder: Path) -> None:
    """Replaces the matrices that the recipe names by GPTQ's tensors.

    GPTQ stores qweight `[K/8, N]` int32 (eight codes along K), scales `[K/32, N]` and g_idx `[K]`;
    fused experts have a leading axis E. Zero points are as mobius 0.1.0 reads them: `[K/256, N]`
    int32, eight blocks of K each (GPTQ itself packs them along N, less one). Norms, routers,
    embeddings and lm_head stay in full precision.
    """
    assert recipe.gptq is not None
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        stem = name.removesuffix(".weight")
        plain = tensor.ndim < 2 or recipe.gptq not in name or stem.endswith(".mlp.gate")
        if plain:
            tensors[name] = tensor.clone()
            continue
        codes, scales, zeros = split_int4(tensor.numpy(), recipe.asymmetric)
        k = codes.shape[-1]
        tensors[f"{stem}.qweight"] = _tensor(_pack_int32(codes.swapaxes(-1, -2)))
        tensors[f"{stem}.scales"] = _tensor(scales.swapaxes(-1, -2))
        if recipe.asymmetric:
            tensors[f"{stem}.qzeros"] = _tensor(_pack_int32(zeros.swapaxes(-1, -2)))
        tensors[f"{stem}.g_idx"] = torch.arange(k, dtype=torch.int32) // BLOCK
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config_path = folder / "config.json"
    config = json.loads(config_path.read_text())
    config["quantization_config"] = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": BLOCK,
        "sym": not recipe.asymmetric,
        "desc_act": False,
    }
    config_path.write_text(json.dumps(config, indent=2))


def _pack_int32(codes: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Packs eight 4-bit codes of the second last axis into an int32, the first lowest."""
    *lead, rows, columns = codes.shape
    codes = np.pad(codes, [(0, 0)] * len(lead) + [(0, -rows % 8), (0, 0)])
    grouped = codes.astype(np.uint32).reshape(*lead, -1, 8, columns)
    shifts = (4 * np.arange(8, dtype=np.uint32))[:, None]
    return np.bitwise_or.reduce(grouped << shifts, axis=-2).view(np.int32)
