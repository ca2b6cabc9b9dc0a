"""What is measured: layers of real models in the formats of the registry, and dense products."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048)
QUICK_TOKENS = (1, 8, 64, 512)
EAGER_TOKENS = (1, 8, 64)  # that are measured without a CUDA graph, too
LONGEST = 8192  # tokens, of the cases that are measured with so many

WEIGHT_SETS = 4  # nodes of a model, at least
MOST_NODES, MOST_DENSE_NODES = 16, 64
NODES_US = 60.0  # least time of all nodes at one token, so that launching a graph does not count
ROUGH_BYTES_PER_S = 4e12  # to choose the number of nodes only, which must not vary

FORMATS = {  # name: bits, block size (0 = one scale an expert), quant_type of QMoE
    "int4": (4, 32, "int"),
    "mxfp4": (4, 32, "fp4"),
    "int8": (8, 32, "int"),
    "fp8": (8, 0, "fp8"),
    "nvfp4": (4, 16, "nvfp4"),
    "wfp4afp8": (4, 32, "wfp4afp8"),
}

LAYERS = {  # name: hidden size, inter size, experts, chosen experts
    "gpt-oss-20b": (2880, 2880, 32, 4),
    "qwen3-30b-a3b": (2048, 768, 128, 8),
    "qwen3.6-35b-a3b": (2048, 512, 256, 8),
    "gemma4-26b-a4b": (2816, 704, 128, 8),
    "mixtral-8x7b": (4096, 14336, 8, 2),
    "gpt-oss-120b": (2880, 2880, 128, 4),
}


@dataclass(frozen=True)
class Case:
    """One op of one shape.

    Attributes:
        name: What the results call it.
        format: A key of FORMATS.
        hidden: Features of an expert's input; K of MatMulNBits.
        inter: Features between an expert's two products; N of MatMulNBits.
        experts: Number of experts; 0 means MatMulNBits.
        topk: Experts that each token chooses.
        bias: Whether the products have biases.
        dtype: "float16" or "bfloat16", of activations and scales.
        zero_points: Whether the weights have zero points.
        skewed: Whether all tokens choose one expert beside others.
        longest: Whether it is measured with LONGEST tokens too.
        listed: Whether it is measured when no case is named.
    """

    name: str
    format: str
    hidden: int
    inter: int
    experts: int = 0
    topk: int = 0
    bias: bool = False
    dtype: str = "float16"
    zero_points: bool = False
    skewed: bool = False
    longest: bool = False
    listed: bool = True

    @property
    def bits(self) -> int:
        return FORMATS[self.format][0]

    @property
    def block_size(self) -> int:
        return FORMATS[self.format][1]

    @property
    def quant_type(self) -> str:
        return FORMATS[self.format][2]

    @property
    def k_major(self) -> bool:
        """Whether codes lie with K first, as the stock op wants 4-bit floats."""
        return self.quant_type in ("fp4", "nvfp4", "wfp4afp8")

    @property
    def op(self) -> str:
        return "QMoE" if self.experts else "MatMulNBits"

    @property
    def rate(self) -> str:
        """The type whose dense matrix rate is the limit."""
        return "float8" if self.format == "wfp4afp8" else self.dtype

    @property
    def expert_weights(self) -> int:
        return self.hidden * self.inter * (3 if self.experts else 1)

    @property
    def expert_bytes(self) -> float:
        """Codes, block scales and zero points of an expert, or of the matrix."""
        bits = float(self.bits)
        if self.block_size:
            scale = 16 if self.quant_type == "int" else 8
            bits += (scale + self.bits * self.zero_points) / self.block_size
        return self.expert_weights * bits / 8

    def expected_experts(self, tokens: int) -> float:
        """Experts that are read under uniform routing, on average."""
        if not self.experts:
            return 1.0
        return self.experts * (1 - (1 - self.topk / self.experts) ** tokens)

    def nodes(self) -> int:
        """Nodes of the model, each with weights of its own."""
        one = 1e6 * self.expected_experts(1) * self.expert_bytes / ROUGH_BYTES_PER_S
        most = MOST_NODES if self.experts else MOST_DENSE_NODES
        return int(min(most, max(WEIGHT_SETS, math.ceil(NODES_US / one))))

    def floor_us(
        self, tokens: int, experts: float, bytes_per_s: float, flop_per_s: float
    ) -> tuple[float, str]:
        """The least time of a node, and what holds it: "memory" or "arithmetic".

        Args:
            tokens: Rows of the input.
            experts: How many experts are read; 1 for MatMulNBits.
            bytes_per_s: Bandwidth of memory.
            flop_per_s: Rate of matrix products, a multiplication and an addition being two.
        """
        rows = tokens * max(self.topk, 1)
        memory = experts * self.expert_bytes / bytes_per_s
        arithmetic = 2 * rows * self.expert_weights / flop_per_s
        return 1e6 * max(memory, arithmetic), "memory" if memory > arithmetic else "arithmetic"

    def shrunk(self) -> Case:
        """A small one of the same kind, for trying the program on a CPU."""
        experts = min(self.experts, 8)
        return replace(
            self, hidden=128, inter=64, experts=experts, topk=min(self.topk, max(experts // 2, 1))
        )


def _layer(layer: str, fmt: str, suffix: str = "", **changes: bool | str) -> Case:
    hidden, inter, experts, topk = LAYERS[layer]
    bias = layer.startswith("gpt-oss")
    case = Case(f"{layer} {fmt}{suffix}", fmt, hidden, inter, experts, topk, bias)
    return replace(case, **changes)


def _dense(k: int, n: int, fmt: str = "int4", suffix: str = "", **changes: bool | str) -> Case:
    return replace(Case(f"MatMulNBits {fmt} {k}x{n}{suffix}", fmt, k, n), **changes)


QUICK = (
    _layer("gpt-oss-20b", "int4", longest=True),
    _layer("qwen3-30b-a3b", "int4"),
    _layer("gpt-oss-20b", "mxfp4"),
    _dense(4096, 14336),
)

_LISTED = (
    *QUICK,
    _layer("gpt-oss-20b", "int8"),
    _layer("gpt-oss-20b", "fp8"),
    _layer("gpt-oss-20b", "nvfp4"),
    _layer("gpt-oss-20b", "wfp4afp8"),
    _layer("qwen3.6-35b-a3b", "int4"),
    _layer("gemma4-26b-a4b", "int4"),
    _layer("mixtral-8x7b", "int4"),
    _layer("gpt-oss-120b", "int4"),
    _dense(4096, 14336, suffix=" with bias", bias=True),
    _dense(2880, 5120),
    _dense(2880, 5120, suffix=" with bias", bias=True),
    _dense(2880, 32),
    _dense(2880, 32, suffix=" with bias", bias=True),
    _dense(8192, 8192, longest=True),
    _dense(4096, 14336, "int8"),
    _dense(2880, 5120, "int8"),
    # What must cost little: the other type, zero points, a hot expert.
    _layer("gpt-oss-20b", "int4", " bfloat16", dtype="bfloat16"),
    _layer("gpt-oss-20b", "mxfp4", " bfloat16", dtype="bfloat16"),
    _layer("gpt-oss-20b", "int4", " skewed", skewed=True),
    _layer("qwen3-30b-a3b", "int4", " skewed", skewed=True),
    _dense(4096, 14336, suffix=" bfloat16", dtype="bfloat16"),
    _dense(4096, 14336, suffix=" with zero points", zero_points=True),
    _layer("gpt-oss-20b", "int4", " with zero points", zero_points=True),
)


def _all() -> tuple[Case, ...]:
    """The listed ones, then every other pair of layer and format."""
    names = {case.name for case in _LISTED}
    others = [_layer(layer, fmt, listed=False) for layer in LAYERS for fmt in FORMATS]
    return (*_LISTED, *(case for case in others if case.name not in names))


CASES = _all()


def select(only: str = "", formats: Iterable[str] = (), quick: bool = False) -> tuple[Case, ...]:
    """The cases to measure.

    Args:
        only: Regular expression, found in the name; "" for all that are listed. One that is given
            finds those that are not listed, too.
        formats: Keys of FORMATS; empty for all. Named ones bring all layers of that format.
        quick: Only the few first.

    Raises:
        ValueError: If there is none.
    """
    wanted = frozenset(formats)
    cases: Sequence[Case] = QUICK if quick else CASES
    found = tuple(
        case
        for case in cases
        if (case.listed or only or wanted)
        and re.search(only, case.name)
        and (not wanted or case.format in wanted)
    )
    if not found:
        names = "\n  ".join(case.name for case in cases)
        raise ValueError(f"no case matches; there are\n  {names}")
    return found


def tokens_of(case: Case, given: Sequence[int], quick: bool) -> tuple[int, ...]:
    """The numbers of tokens that a case is measured with."""
    if given:
        return tuple(given)
    if quick:
        return QUICK_TOKENS
    return (*TOKENS, LONGEST) if case.longest else TOKENS
