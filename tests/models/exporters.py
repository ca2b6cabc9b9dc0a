"""Makes the checkpoints, asks PyTorch for the expected logits and runs the exporters.

Run as `python -m models.exporters FOLDER` by `export.py`; needs the extra `models`.
"""

from __future__ import annotations

import json
import re
import runpy
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import mobius
import numpy as np
import onnx_ir as ir
import torch
from mobius._weight_utils import pack_qmoe_expert_weights, preprocess_gptq_weights
from safetensors.torch import load_file
from transformers import PreTrainedModel

from models import handmade, prequantized
from models.architectures import VOCAB
from models.checkpoints import RECIPES, SEED, make_checkpoint
from models.export import (
    EXPORTS,
    FOREIGN_EXPORTS,
    NEW_TOKENS,
    PREQUANTIZED_EXPORTS,
    PROMPT_LENGTH,
    REFUSED_EXPORTS,
    Export,
)


def main(folder: Path) -> None:
    """Fills a cache folder."""
    torch.set_num_threads(1)  # the models are too small for more
    refusals: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, recipe in RECIPES.items():
            checkpoint = Path(scratch) / name
            model = make_checkpoint(recipe, checkpoint)
            (folder / name).mkdir(exist_ok=True)
            _save_expected(model, folder / name / "expected.npz")
            if recipe.prequantized is not None:
                shutil.copy(checkpoint / prequantized.TRUTH, folder / name)
            for export in EXPORTS + PREQUANTIZED_EXPORTS + FOREIGN_EXPORTS:
                if export.recipe != name:
                    continue
                start = time.monotonic()
                target = folder / name / export.name
                shutil.rmtree(target, ignore_errors=True)
                if export.exporter == "handmade":
                    handmade.build(model, checkpoint, target)
                else:
                    run = _run_genai_builder if export.exporter == "genai" else _run_mobius
                    run(export, checkpoint, target)
                if export in FOREIGN_EXPORTS:
                    (target / "model.onnx.data").unlink()
                print(f"exported {export.id} in {time.monotonic() - start:.1f} s", flush=True)
            for export in REFUSED_EXPORTS:
                if export.recipe == name:
                    refusals[export.id] = _refusal(export, checkpoint)
    (folder / "refused.json").write_text(json.dumps(refusals, indent=2))


def _refusal(export: Export, checkpoint: Path) -> str:
    """What the builder says to an export that it does not make."""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            _run_genai_builder(export, checkpoint, Path(scratch))
        except (RuntimeError, ValueError) as error:
            return str(error)
    return ""


@torch.no_grad()
def _save_expected(model: PreTrainedModel, path: Path) -> None:
    """Saves a prompt, its greedy tokens and logits; none that float16 would lead astray."""
    for seed in range(SEED, SEED + 100):
        rng = np.random.default_rng(seed)
        # Above the special tokens, below what multimodal configurations reserve.
        prompt = rng.integers(3, VOCAB - 8, PROMPT_LENGTH).tolist()
        if _noise_changes(model, prompt) > 0.1:
            continue
        tokens, logits = _generate(model, prompt)
        if _noise_changes(model, prompt + tokens[:-1]) < 0.1:
            np.savez(path, prompt=prompt, tokens=tokens, logits=logits.numpy())
            return
    raise ValueError("every prompt has a token whose experts are too close to call in float16")


def _generate(model: PreTrainedModel, prompt: list[int]) -> tuple[list[int], torch.Tensor]:
    """Greedy decoding without a cache, so that the oracle shares no code with what it judges."""
    tokens: list[int] = []
    for _ in range(NEW_TOKENS):
        logits = model(input_ids=torch.tensor([prompt + tokens]), use_cache=False).logits[0]
        tokens.append(int(logits[-1].argmax()))
    return tokens, logits


def _noise_changes(model: PreTrainedModel, tokens: list[int]) -> float:
    """How far noise of four float16 roundings in every matrix product can move a logit.

    Continuous noise moves it by some hundredths; a token that changes its experts moves it by more.
    """
    generator = torch.Generator().manual_seed(SEED)

    def add_noise(_module: torch.nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output * (1 + 2**-9 * torch.randn(output.shape, generator=generator))

    exact = model(input_ids=torch.tensor([tokens])).logits
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    hooks = [module.register_forward_hook(add_noise) for module in linear]
    try:
        noisy = model(input_ids=torch.tensor([tokens] * 8)).logits
    finally:
        for hook in hooks:
            hook.remove()
    return float((noisy - exact).abs().max())


def _run_genai_builder(export: Export, checkpoint: Path, target: Path) -> None:
    """`python -m onnxruntime_genai.models.builder`, in this process, as its imports take long."""
    precision, provider, *options = export.arguments
    arguments = [
        "builder", "-i", str(checkpoint), "-o", str(target), "-c", str(checkpoint / "cache"),
        "-p", precision, "-e", provider, "--extra_options", "hf_token=false", *options,
    ]  # fmt: skip
    with mock.patch.object(sys, "argv", arguments):
        runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__")


def _run_mobius(export: Export, checkpoint: Path, target: Path) -> None:
    """Builds mobius' graph and gives it the checkpoint's weights.

    mobius 0.1.0 loads quantized experts for DeepSeek only, and leaves the routers' parameters
    without values; so the graph is built without weights, and its own helpers convert them here.
    """
    keywords = dict(argument.split("=") for argument in export.arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        package: Any = mobius.build(str(checkpoint), load_weights=False, **keywords)
    weights = preprocess_gptq_weights(load_file(checkpoint / "model.safetensors"), group_size=32)
    graph = package["model"].graph
    moe_path = ".mlp.moe" if any(".mlp.moe." in name for name in graph.initializers) else ".mlp"
    weights = pack_qmoe_expert_weights(weights, target_moe_path=moe_path)
    if moe_path == ".mlp":  # GLM4: the module is called so there
        names = {name: name.replace(".shared_experts.", ".shared_expert.") for name in weights}
        weights = {names[name]: weight for name, weight in weights.items()}
    _attach_router_parameters(graph, weights)
    package.apply_weights(weights)
    package.save(str(target), progress_bar=False)


def _attach_router_parameters(graph: ir.Graph, weights: dict[str, torch.Tensor]) -> None:
    """Makes initializers of the router parameters that mobius 0.1.0 leaves dangling.

    Such a value has no producer and is no input; it is called `weight`, `weight_1` and so on, and
    the name of its consumer tells the layer.
    """
    inputs = set(graph.inputs)
    for node in list(graph):
        for value in node.inputs:
            if value is None or value.producer() is not None or value in inputs:
                continue
            if value.name in graph.initializers:
                continue
            layer = re.search(r"layers\.(\d+)", node.name or "")
            kind = re.sub(r"_\d+$", "", value.name or "")
            if layer is None:
                raise ValueError(f"value {value.name!r} of node {node.name!r} has no producer")
            value.name = f"model.layers.{layer[1]}.mlp.gate.{kind}"
            if value.name not in weights:
                raise ValueError(f"the checkpoint has no {value.name!r}")
            if kind == "e_score_correction_bias":
                # Added to float32 scores; in a float16 graph mobius would make it float16.
                value.type = ir.TensorType(ir.DataType.FLOAT)
            graph.register_initializer(_with_placeholder(value))


def _with_placeholder(value: ir.Value) -> ir.Value:
    """An initializer must have a value when it is registered; apply_weights puts the real one."""
    assert value.dtype is not None
    assert value.shape is not None
    value.const_value = ir.tensor(np.zeros(value.shape.numpy(), value.dtype.numpy()))
    return value


if __name__ == "__main__":
    main(Path(sys.argv[1]))
