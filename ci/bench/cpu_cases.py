"""The layers that bench_cpu.py measures: what they compute, and what they cost at least."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from qmoe_plugin import formats

STOCK_FORMATS = ("int4", "int8")  # those that onnxruntime's CPU ops have


@dataclass(frozen=True)
class Case:
    """One op of one shape; `experts` 0 means MatMulNBits, K = hidden, N = inter."""

    name: str
    hidden: int
    inter: int
    experts: int = 0
    topk: int = 0
    format: str = "int4"
    block_size: int = 32  # 0 = per channel, or one scale an expert
    bias: bool = False
    gpt_oss: bool = False  # alpha 1.702, beta 1, limit 7
    stock_exact: bool = False  # make the stock QMoE keep float32 activations
    cold: bool = False  # weights out of the caches before every call with one token

    @property
    def op(self) -> str:
        return "QMoE" if self.experts else "MatMulNBits"

    @property
    def fmt(self) -> formats.Format:
        return formats.get(self.format)

    @property
    def bits(self) -> int:
        return self.fmt.bits

    @property
    def has_stock(self) -> bool:
        return self.format in STOCK_FORMATS

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """[N, K] of each matrix, an expert's where there are experts."""
        if not self.experts:
            return {"b": (self.inter, self.hidden)}
        return {"fc1": (2 * self.inter, self.hidden), "fc2": (self.hidden, self.inter)}

    def flops(self, tokens: int) -> float:
        return 2.0 * tokens * max(self.topk, 1) * sum(n * k for n, k in self.projections.values())

    def packed_bytes(self, experts: float = 1) -> float:
        """What a kernel reads of so many experts: codes, float16 block scales, a float a row."""
        total = 0.0
        for n, k in self.projections.values():
            scales = 2 * k / self.block_size if self.block_size else 0
            total += n * (k * self.bits / 8 + scales + 4 + 4 * self.bias)
        return experts * total

    def attributes(self) -> dict[str, Any]:
        if not self.experts:
            sizes = {"K": self.hidden, "N": self.inter}
            return {**sizes, "bits": self.bits, "block_size": self.block_size}
        found: dict[str, Any] = {
            "k": self.topk,
            "activation_type": "swiglu",
            "swiglu_fusion": 1,
            "normalize_routing_weights": 1,
            **self.fmt.qmoe_attributes,
        }
        if self.has_stock:
            del found["quant_type"]  # which older stock ops do not know
        if self.block_size and not self.fmt.only_block_size:
            found["block_size"] = self.block_size
        if self.fmt.scale_type != "float" and not self.has_stock:
            found["weights_layout"] = "raw"
        if self.gpt_oss:
            found |= {"activation_alpha": 1.702, "activation_beta": 1.0, "swiglu_limit": 7.0}
        return found

    def described(self) -> dict[str, Any]:
        return {**asdict(self), "bits": self.bits}


def _moe(model: str, fmt: str, block_size: int | None = None, *, stock_exact: bool = False) -> Case:
    block = formats.get(fmt).only_block_size or block_size or 0
    label = f"{model} {fmt}"
    if block_size is not None:
        label += f" b{block_size}" if block_size else " per channel"
    label += " (stock exact)" * stock_exact
    if model == "gpt-oss-20b":
        sizes, experts, topk = (2880, 2880), 32, 4
    else:
        sizes, experts, topk = (2048, 768), 128, 8
    gpt_oss = model == "gpt-oss-20b"
    return Case(
        label, *sizes, experts, topk, fmt, block,
        bias=gpt_oss, gpt_oss=gpt_oss, stock_exact=stock_exact,
    )  # fmt: skip


CASES = [
    _moe("gpt-oss-20b", "int4", 32),
    _moe("gpt-oss-20b", "mxfp4"),
    Case("MatMulNBits int4 b32 4096x14336", 4096, 14336, cold=True),
    _moe("Qwen3-30B-A3B", "int4", 32),
    _moe("gpt-oss-20b", "int4", 0),
    _moe("gpt-oss-20b", "int8", 32),
    _moe("gpt-oss-20b", "int8", 32, stock_exact=True),
    _moe("gpt-oss-20b", "int8", 0),
    _moe("gpt-oss-20b", "nvfp4"),
    _moe("gpt-oss-20b", "fp8_e4m3"),
    _moe("Qwen3-30B-A3B", "int4", 0),
    _moe("Qwen3-30B-A3B", "int8", 32),
    _moe("Qwen3-30B-A3B", "int8", 32, stock_exact=True),
    Case("MatMulNBits int8 b32 4096x14336", 4096, 14336, format="int8", cold=True),
    Case("MatMulNBits int4 b32 2880x32 (router)", 2880, 32, bias=True),
]
QUICK_CASES = 3
