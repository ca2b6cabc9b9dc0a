"""What humming-kernels leaves to others: sorting rows by expert, adding up a token's experts."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _combine(rows, factors, order, out, columns, chosen: tl.constexpr, ordered: tl.constexpr,
             block: tl.constexpr):  # fmt: skip
    """out[t] = the sum over a token's experts j of factors[t, j] * rows[order[t, j]]."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = column < columns
    total = tl.zeros((block,), dtype=tl.float32)
    for j in tl.static_range(chosen):
        row = token * chosen + j
        factor = tl.load(factors + row)
        if ordered:
            row = tl.load(order + row).to(tl.int64)
        value = tl.load(rows + row * columns + column, mask=inside, other=0.0)
        total += factor * value.to(tl.float32)
    tl.store(out + token * columns + column, total.to(out.dtype.element_ty), mask=inside)


def combine(
    rows: torch.Tensor, factors: torch.Tensor, order: torch.Tensor | None, out: torch.Tensor
) -> None:
    """The weighted sum of each token's experts.

    Args:
        rows: [T * k, H].
        factors: float32 [T, k].
        order: int32 [T, k] row of each; None if they lie in that order.
        out: [T, H], written.
    """
    tokens, columns = out.shape
    block = 256 if tokens < 64 else 1024
    grid = (tokens, triton.cdiv(columns, block))
    given = factors if order is None else order
    _combine[grid](
        rows, factors, given, out, columns,
        chosen=factors.shape[1], ordered=order is not None, block=block,
    )  # fmt: skip


def sorted_by_expert(chosen: torch.Tensor, experts: int, block: int) -> tuple[torch.Tensor, ...]:
    """Rows by expert, each expert's filled up to blocks.

    Args:
        chosen: int64 [T, k] expert of each row.
        experts: How many there are.
        block: Rows of a block.

    Returns:
        int32 [blocks * block] rows, T * k for none; int32 [blocks] expert of each block; int32 []
        how many rows that are.
    """
    flat = chosen.flatten()
    counts = torch.bincount(flat, minlength=experts)
    blocks = (counts + block - 1) // block
    starts = (blocks.cumsum(0) - blocks) * block
    order = flat.argsort(stable=True)
    of_order = flat[order]
    place = torch.arange(len(flat), device=flat.device) - (counts.cumsum(0) - counts)[of_order]
    rows = torch.full(
        (int(blocks.sum()) * block,), len(flat), dtype=torch.int32, device=flat.device
    )
    rows[starts[of_order] + place] = order.to(torch.int32)
    ids = torch.arange(experts, dtype=torch.int32, device=flat.device)
    total = torch.tensor(len(rows), dtype=torch.int32, device=flat.device)
    return rows, ids.repeat_interleave(blocks), total


def offsets_and_places(chosen: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 [E + 1] where each expert's rows begin, and int32 [T, k] where each row lies then."""
    flat = chosen.flatten()
    order = flat.argsort(stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(flat), device=flat.device)
    ends = torch.bincount(flat, minlength=experts).cumsum(0)
    return torch.cat([ends.new_zeros(1), ends]), places.view(chosen.shape).to(torch.int32)
