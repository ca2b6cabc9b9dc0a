"""Checkpoints of GPTQ and AWQ, in the packings in which these tools publish them.

In both, a matrix with N rows is `qweight`, `scales` [K/32, N] and `qzeros` [K/32, N/8], eight codes
in an int32. GPTQ packs weights along K and stores zero points less one; with act-order, `g_idx` [K]
says which scale a column of the matrix has. AWQ packs weights along N, and everything in an order
of its own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from transformers import PreTrainedModel

from models.grid import BLOCK, split_int4

Method = Literal["gptq", "gptq_act_order", "awq"]

TRUTH = "truth.npz"
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def save(model: PreTrainedModel, method: Method, folder: Path) -> None:
    """Replaces a plain checkpoint, whose matrices are on the grid int4_asymmetric.

    Args:
        model: Gives the weights; with act-order its matrices get another order of columns.
        method: Which packing.
        folder: The checkpoint. `truth.npz` in it gets the codes [N, K], scales and zero points
            [N, K/32] of each matrix.
    """
    truth: dict[str, NDArray[Any]] = {}
    tensors: dict[str, torch.Tensor] = {}
    rng = np.random.default_rng(0)
    for name, parameter in model.state_dict().items():
        if not name.endswith("_proj.weight"):
            tensors[name] = parameter.clone()
            continue
        codes, scales, zeros = split_int4(parameter.numpy(), asymmetric=True)
        groups = np.arange(codes.shape[1]) // BLOCK
        if method == "gptq_act_order":
            order = rng.permutation(codes.shape[1])
            codes, groups = codes[:, order], groups[order]
            parameter.copy_(parameter[:, order].clone())
        stem = name.removesuffix(".weight")
        packed = _awq(codes, zeros) if method == "awq" else _gptq(codes, zeros, groups)
        for kind, values in (("codes", codes), ("scales", scales), ("zeros", zeros)):
            truth[f"{stem}.{kind}"] = values
        packed["scales"] = scales.T.astype(np.float16)
        tensors |= {
            f"{stem}.{kind}": torch.from_numpy(np.ascontiguousarray(values))
            for kind, values in packed.items()
        }
    np.savez(folder / TRUTH, **truth)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = {"bits": 4, "group_size": BLOCK} | (
        {"quant_method": "awq", "zero_point": True, "version": "gemm"}
        if method == "awq"
        else {"quant_method": "gptq", "sym": False, "desc_act": method == "gptq_act_order"}
    )
    path.write_text(json.dumps(config, indent=2))


def _gptq(
    codes: NDArray[Any], zeros: NDArray[Any], groups: NDArray[Any]
) -> dict[str, NDArray[Any]]:
    return {
        "qweight": _pack(codes).T,
        "qzeros": _pack((zeros.T - 1) % 16),
        "g_idx": groups.astype(np.int32),
    }


def _awq(codes: NDArray[Any], zeros: NDArray[Any]) -> dict[str, NDArray[Any]]:
    return {"qweight": _pack(_reordered(codes.T)), "qzeros": _pack(_reordered(zeros.T))}


def _reordered(codes: NDArray[Any]) -> NDArray[Any]:
    return codes.reshape(len(codes), -1, 8)[..., _AWQ_ORDER].reshape(codes.shape)


def _pack(codes: NDArray[Any]) -> NDArray[np.int32]:
    """Eight 4-bit codes of the last axis in an int32, the first lowest."""
    grouped = codes.astype(np.uint32).reshape(len(codes), -1, 8)
    shifts = 4 * np.arange(8, dtype=np.uint32)
    return np.bitwise_or.reduce(grouped << shifts, axis=-1).view(np.int32)
