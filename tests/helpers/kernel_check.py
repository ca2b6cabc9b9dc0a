"""Runs a CPU kernel on the cases that reach it: `python -m helpers.kernel_check NAME`.

A process of its own, because the CPU's instruction set is chosen once, from the environment.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import qmoe_plugin
from helpers.cases import GATED, Case
from helpers.quick import quick_cases
from helpers.run import run_case
from helpers.tolerance import check
from qmoe_plugin.devices import CPU, Target
from qmoe_plugin.kernels import Kernel, Problem, explain


def problems(case: Case, target: Target) -> Iterator[Problem]:
    """The matrix products of a case, as kernel selection sees them."""
    common = {"target": target, "dtype": case.dtype, "accuracy_level": case.accuracy_level}
    if case.op_type not in ("QMoE", "MoE"):
        yield Problem(
            stage="dense",
            format=case.format,
            n=case.n,
            k=case.k,
            rows=case.m,
            block_size=case.block,
            zero_points=case.zero_points != "none",
            **common,
        )
        return
    gated = case.activation in GATED or case.fc3
    topk = case.k + case.shared
    common |= {
        "rows": case.tokens * topk,
        "topk": topk,
        "experts": case.experts,
    }
    activation = "swiglu" if case.activation == "silu" and case.fc3 else case.activation
    fc1_rows = case.inter * (2 if gated else 1)
    yield Problem(
        stage="fc1",
        format=case.format,
        n=fc1_rows,
        k=case.hidden,
        activation=activation,
        block_size=case.block_of("fc1"),
        zero_points=case.zero_points and case.format_of("fc1").zero_points,
        **common,
    )
    yield Problem(
        stage="fc2",
        format=case.format_of("fc2").name,
        n=case.hidden,
        k=case.inter,
        block_size=case.block_of("fc2"),
        zero_points=case.zero_points and case.format_of("fc2").zero_points,
        **common,
    )


def cases_that_reach(kernel: Kernel, target: Target) -> list[Case]:
    """The quick cases of its format that run this kernel on that device."""
    return [
        case
        for case in quick_cases(kernel.format)
        if any(explain(problem)[0].kernel == kernel.name for problem in problems(case, target))
    ]


def main(name: str) -> None:
    kernel = next(k for k in qmoe_plugin.kernels() if k.name == name)
    cases = cases_that_reach(kernel, CPU)
    worst = 0.0
    for case in cases:
        tensors, result = run_case(case, "cpu")
        worst = max(worst, check(case, tensors, result))
    print(f"{len(cases)} cases of {name} are right; worst error {worst:.3f} of what is allowed")
    if not cases:
        raise SystemExit(f"none of the quick cases runs {name}")


if __name__ == "__main__":
    main(sys.argv[1])
