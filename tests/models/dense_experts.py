"""Tiny MoE models of transformers as torch.onnx exports them, their experts in single nodes.

"batched_mm" and "eager" are transformers' own; "loop" is what optimum-onnx patches in, so that a
trace has all experts; "scripted" is that as a function of TorchScript, which becomes a Loop, and
"skipping" has an If in it; "dense" and "stacked" are the usual ways around NonZero, which not every
runtime has: each expert, or all in one product, gets all tokens.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

VOCAB = 320

LAYERS = {"trace": 2, "dynamo": 1}
"""By exporter, as the new one takes its time."""

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "attn_implementation": "eager",
}


def mixtral(layers: int) -> PreTrainedModel:
    """Weights of the chosen experts are normalised."""
    return MixtralForCausalLM(
        MixtralConfig(
            **_COMMON,
            num_hidden_layers=layers,
            intermediate_size=96,
            num_local_experts=4,
            num_experts_per_tok=2,
        )
    )


def qwen3_moe(layers: int) -> PreTrainedModel:
    """More experts."""
    config = Qwen3MoeConfig(
        **_COMMON,
        num_hidden_layers=layers,
        head_dim=16,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_experts=8,
        num_experts_per_tok=3,
        norm_topk_prob=True,
    )
    return Qwen3MoeForCausalLM(config)


def olmoe(layers: int) -> PreTrainedModel:
    """Weights of the chosen experts are not normalised."""
    config = OlmoeConfig(
        **_COMMON,
        num_hidden_layers=layers,
        intermediate_size=32,
        num_experts=8,
        num_experts_per_tok=3,
        norm_topk_prob=False,
    )
    return OlmoeForCausalLM(config)


def gpt_oss(layers: int) -> PreTrainedModel:
    """Biases, limits, gates and ups alternating, weights [E, K, N]."""
    config = GptOssConfig(
        **_COMMON,
        num_hidden_layers=layers,
        head_dim=16,
        intermediate_size=96,
        num_local_experts=8,
        num_experts_per_tok=4,
        sliding_window=32,
    )
    model = GptOssForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name or "router" in name:
                parameter.normal_(0, 0.3 if "bias" in name else 0.05)
    return model


def glm4_moe(layers: int) -> PreTrainedModel:
    """Sigmoid routing over groups of experts, and a shared expert."""
    config = Glm4MoeConfig(
        **_COMMON,
        num_hidden_layers=layers,
        head_dim=16,
        intermediate_size=64,
        moe_intermediate_size=32,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=2,
        first_k_dense_replace=0,
        n_group=2,
        topk_group=1,
        routed_scaling_factor=1.5,
    )
    return Glm4MoeForCausalLM(config)


MODELS: dict[str, Callable[[int], PreTrainedModel]] = {
    "mixtral": mixtral,
    "qwen3_moe": qwen3_moe,
    "olmoe": olmoe,
    "gpt_oss": gpt_oss,
    "glm4_moe": glm4_moe,
}


EXPORTS = [
    ("mixtral", "eager", "trace"),
    ("mixtral", "batched_mm", "trace"),
    ("mixtral", "batched_mm", "dynamo"),
    ("mixtral", "loop", "trace"),
    ("mixtral", "scripted", "trace"),
    ("mixtral", "skipping", "trace"),
    ("mixtral", "dense", "trace"),
    ("mixtral", "stacked", "trace"),
    ("mixtral", "stacked", "dynamo"),
    ("qwen3_moe", "loop", "trace"),
    ("qwen3_moe", "skipping", "trace"),
    ("qwen3_moe", "batched_mm", "dynamo"),
    ("olmoe", "loop", "dynamo"),
    ("olmoe", "dense", "trace"),
    ("olmoe", "batched_mm", "trace"),
    ("gpt_oss", "eager", "trace"),
    ("gpt_oss", "batched_mm", "trace"),
    ("glm4_moe", "batched_mm", "trace"),
    ("glm4_moe", "loop", "trace"),
]
"""Model, way of its experts, exporter of torch.onnx."""


def _expert(experts: Any, x: Tensor, index: int) -> Tensor:
    gate, up = functional.linear(x, experts.gate_up_proj[index]).chunk(2, dim=-1)
    hidden: Tensor = experts.act_fn(gate) * up
    return functional.linear(hidden, experts.down_proj[index])


def _loop(experts: Any, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    result = torch.zeros_like(x)
    mask = functional.one_hot(chosen, num_classes=experts.num_experts).permute(2, 1, 0)
    for index in range(experts.num_experts):
        place, token = torch.where(mask[index])
        part = _expert(experts, x[token], index) * weights[token, place, None]
        result.index_add_(0, token, part)
    return result


@torch.jit.script  # type: ignore[untyped-decorator]
def _one(
    x: Tensor, place: Tensor, token: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    gate, up = functional.linear(x[token], gate_up).chunk(2, dim=-1)
    part = functional.linear(functional.silu(gate) * up, down)
    return part * weights[token, place, None]


@torch.jit.script  # type: ignore[untyped-decorator]
def _in_loop(x: Tensor, chosen: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    result = torch.zeros_like(x)
    mask = functional.one_hot(chosen, num_classes=gate_up.size(0)).permute(2, 1, 0)
    for index in range(gate_up.size(0)):
        place, token = torch.where(mask[index])
        part = _one(x, place, token, weights, gate_up[index], down[index])
        result = result.index_add(0, token, part)
    return result


@torch.jit.script  # type: ignore[untyped-decorator]
def _in_loop_with_if(
    x: Tensor, chosen: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    result = torch.zeros_like(x)
    mask = functional.one_hot(chosen, num_classes=gate_up.size(0)).permute(2, 1, 0)
    for index in range(gate_up.size(0)):
        place, token = torch.where(mask[index])
        if token.numel() > 0:
            part = _one(x, place, token, weights, gate_up[index], down[index])
            result = result.index_add(0, token, part)
    return result


def _scripted(experts: Any, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    result: Tensor = _in_loop(x, chosen, weights, experts.gate_up_proj, experts.down_proj)
    return result


def _skipping(experts: Any, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    parts = experts.gate_up_proj, experts.down_proj
    result: Tensor = _in_loop_with_if(x, chosen, weights, *parts)
    return result


def _all_weights(experts: Any, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    zeros = torch.zeros(x.shape[0], experts.num_experts, dtype=weights.dtype)
    return zeros.scatter(1, chosen, weights)


def _dense(experts: Any, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    factors = _all_weights(experts, x, chosen, weights)
    result = torch.zeros_like(x)
    for index in range(experts.num_experts):
        result = result + _expert(experts, x, index) * factors[:, index, None]
    return result


def _stacked(experts: Any, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    factors = _all_weights(experts, x, chosen, weights)
    tokens = x.unsqueeze(0).expand(experts.num_experts, -1, -1)
    gate, up = torch.bmm(tokens, experts.gate_up_proj.transpose(1, 2)).chunk(2, dim=-1)
    parts = torch.bmm(experts.act_fn(gate) * up, experts.down_proj.transpose(1, 2))
    return (parts * factors.t().unsqueeze(-1)).sum(0)


_OURS = {
    "loop": _loop,
    "scripted": _scripted,
    "skipping": _skipping,
    "dense": _dense,
    "stacked": _stacked,
}


class _Logits(nn.Module):
    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Any:
        mask = torch.ones_like(input_ids)
        return self.model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits


def export(name: str, experts: str, exporter: str, path: Path) -> None:
    """Exports a model.

    Args:
        name: Of `MODELS`.
        experts: How experts are written, see above.
        exporter: "trace", torch.onnx's old one, or "dynamo".
        path: The new file.

    Beside it, `<path>.npz` gets some inputs and PyTorch's logits.
    """
    for key, function in _OURS.items():
        ALL_EXPERTS_FUNCTIONS.register(key, function)
    torch.manual_seed(0)
    model = MODELS[name](LAYERS[exporter]).eval()
    with torch.no_grad():  # sharper routing and larger experts than an untrained model has
        for key, parameter in model.named_parameters():
            if "experts" in key or key.endswith("gate.weight"):
                parameter.mul_(4)
    model.set_experts_implementation(experts)
    ids = torch.randint(3, VOCAB, (2, 32))
    arguments: dict[str, Any] = {"input_names": ["input_ids"], "output_names": ["logits"]}
    if exporter == "trace":
        axes = {0: "batch", 1: "sequence"}
        arguments |= {"dynamo": False, "dynamic_axes": {"input_ids": axes, "logits": axes}}
    else:
        dimensions = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
        arguments |= {"dynamo": True, "dynamic_shapes": {"input_ids": dimensions}}
        arguments |= {"external_data": False, "verbose": False}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(_Logits(model), (ids,), path, opset_version=18, **arguments)
        tokens = [torch.randint(3, VOCAB, shape) for shape in ((2, 40), (1, 1), (3, 5))]
        arrays = {f"ids{i}": ids.numpy() for i, ids in enumerate(tokens)}
        arrays |= {f"logits{i}": model(input_ids=ids).logits for i, ids in enumerate(tokens)}
        np.savez(path.with_suffix(".npz"), **arrays)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for arguments in EXPORTS:
        export(*arguments, Path(sys.argv[1]) / f"{'-'.join(arguments)}.onnx")
