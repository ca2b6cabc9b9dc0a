"""The ops of com.microsoft that ours are called after, as far as we know them."""

from __future__ import annotations

from qmoe_plugin.graph import matmul_nbits, moe, qmoe

STOCK_ATTRIBUTES = {
    "QMoE": frozenset(qmoe.STOCK_ATTRIBUTES),
    "MoE": frozenset(moe.STOCK_ATTRIBUTES),
    "MatMulNBits": frozenset(matmul_nbits.STOCK_ATTRIBUTES),
}

STOCK_INPUTS = {
    "QMoE": qmoe.STOCK_INPUTS,
    "MoE": moe.STOCK_INPUTS,
    "MatMulNBits": matmul_nbits.STOCK_INPUTS,
}
