"""The kernels of the library: which there are, and which one runs a given problem.

Nothing here is a table of its own: every answer comes from the registry of the compiled library.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from qmoe_plugin import formats
from qmoe_plugin.devices import CPU, Target, target
from qmoe_plugin.library import native

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class Kernel:
    """A row of the support table.

    Attributes:
        name: "<file>.<format>", as in "grouped_gemm_sm80.int4".
        format: Weight format it reads.
        device: "CPU" or "CUDA".
        min_sm: Lowest compute capability it runs on, 0 for the CPU.
        max_sm: Highest compute capability it runs on, 0 for the CPU.
        dtypes: Activation types it takes.
        limits: What it does not take, in one line.
        priority: The highest of the kernels that can run a problem is taken.
        available: Whether this processor can run it; true for CUDA kernels.
    """

    name: str
    format: str
    device: Literal["CPU", "CUDA"]
    min_sm: int
    max_sm: int
    dtypes: tuple[str, ...]
    limits: str
    priority: int
    available: bool


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One (grouped) matrix product y = x W^T, as kernel selection sees it.

    Attributes:
        stage: "fc1" or "fc2" of a QMoE or MoE, or "dense" for a MatMulNBits.
        format: Weight format, as in "int4"; "float16" and the like for a MoE.
        n: Output features; gates and ups together for a gated fc1.
        k: Input features.
        rows: Rows of x over all experts: tokens * topk, or M.
        topk: Rows of a token, each of another expert; 1 for "dense".
        target: The device it runs on.
        dtype: Activation type: "float32", "float16" or "bfloat16".
        activation: What the epilogue of fc1 applies.
        experts: Number of experts.
        block_size: Codes along K that share a scale; 0 for one scale a row.
        zero_points: Whether the model gives zero points.
        accuracy_level: 0 to 2 for exact activations, 3 allows bfloat16, 4 int8.
    """

    stage: Literal["fc1", "fc2", "dense"]
    format: str
    n: int
    k: int
    rows: int = 1
    topk: int = 1
    target: Target = CPU
    dtype: str = "float32"
    activation: str = "identity"
    experts: int = 1
    block_size: int = 0
    zero_points: bool = False
    accuracy_level: int = 0

    def __str__(self) -> str:
        """As in "fc1 int4 block 32, 4 of 8 experts, 256 x 128, 4 rows, float32, CPU"."""
        block = f" block {self.block_size}" if self.block_size else " per channel"
        if self.format in formats.PLAIN_FORMATS:
            block = ""
        zero_points = " with zero points" if self.zero_points else ""
        experts = f"{self.topk} of {self.experts} experts, " if self.experts > 1 else ""
        return (
            f"{self.stage} {self.format}{block}{zero_points}, {experts}{self.n} x {self.k}, "
            f"{self.rows} row{'s' * (self.rows != 1)}, {self.dtype}, {self.target}"
        )


@dataclass(frozen=True)
class Verdict:
    """What one kernel says to a problem: an empty refusal means that it can run it."""

    kernel: str
    refusal: str


@dataclass(frozen=True)
class Explanation:
    """What each kernel of the problem's device and format says, in the order they are asked."""

    problem: Problem
    verdicts: tuple[Verdict, ...]

    @property
    def kernel(self) -> str | None:
        """The kernel that runs the problem: the first that does not refuse. None if all do."""
        return next((v.kernel for v in self.verdicts if not v.refusal), None)

    @property
    def refusals(self) -> str:
        """Why there is no kernel, each reason after the kernel's name."""
        if not self.verdicts:
            return f"none is compiled in for {self.problem.format} on {self.problem.target}"
        return "; ".join(f"{v.kernel}: {v.refusal}" for v in self.verdicts if v.refusal)

    def __str__(self) -> str:
        """The problem and its kernel, then a line for each verdict."""
        lines = [f"{self.problem}: {self.kernel or 'no kernel'}"]
        for verdict in self.verdicts:
            runs = "runs it" if verdict.kernel == self.kernel else "can run it"
            lines.append(f"  {verdict.kernel}: {verdict.refusal or runs}")
        if not self.verdicts:
            lines.append(f"  {self.refusals}")
        return "\n".join(lines)


def kernels() -> tuple[Kernel, ...]:
    """The support table: every kernel that is compiled in."""
    return tuple(
        Kernel(
            name=row["name"],
            format=row["format"],
            device=row["device"],
            min_sm=row["min_sm"],
            max_sm=row["max_sm"],
            dtypes=tuple(row["dtypes"].split()),
            limits=row["limits"],
            priority=row["priority"],
            available=bool(row["available"]),
        )
        for row in native().kernels()
    )


def explain(
    node: ir.Node | Problem, sm: int | None = None, tokens: int = 1
) -> tuple[Explanation, ...]:
    """Says which kernel runs a node, and why each of the others does not.

    Args:
        node: A node of one of our ops of an `onnx_ir` model, in either domain; or a `Problem`,
            which says its own device and rows, so that the other arguments are not looked at.
        sm: Compute capability to choose for (90 = Hopper), 0 for the CPU; None for this machine.
        tokens: Tokens in a run (rows of A for MatMulNBits).

    Returns:
        One explanation a matrix product: fc1 and fc2 of a QMoE or MoE, or the one of the others.

    Raises:
        ValueError: If the node is none of ours, or one that our ops cannot run whatever the kernel;
            the message says why.
    """
    if isinstance(node, Problem):
        return (ask(node),)
    from qmoe_plugin.graph.describe import UnsupportedError, describe

    try:
        return tuple(ask(p) for p in describe(node).problems(target(sm), tokens))
    except UnsupportedError as error:
        raise ValueError(f"node '{node.name}' ({node.op_type}): {error}") from None


def ask(problem: Problem) -> Explanation:
    """Asks the registry about one problem."""
    fields = {field.name: getattr(problem, field.name) for field in dataclasses.fields(problem)}
    where: Target = fields.pop("target")
    answers: Sequence[tuple[str, str]] = native().explain(
        device=where.device, sm=where.sm, **fields
    )
    return Explanation(problem, tuple(Verdict(kernel, refusal) for kernel, refusal in answers))
