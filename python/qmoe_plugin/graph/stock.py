"""The ops of com.microsoft that ours are called after, as far as we know them."""

from __future__ import annotations

from qmoe_plugin.graph import matmul_block_quantized, matmul_nbits, moe, qmoe

STOCK_ATTRIBUTES = {
    "QMoE": frozenset(qmoe.STOCK_ATTRIBUTES),
    "MoE": frozenset(moe.STOCK_ATTRIBUTES),
    "MatMulNBits": frozenset(matmul_nbits.STOCK_ATTRIBUTES),
    "MatMulBlockQuantizedFp8Weight": frozenset(matmul_block_quantized.FP8_STOCK_ATTRIBUTES),
    "MatMulBlockQuantizedFp4Weight": frozenset(matmul_block_quantized.FP4_STOCK_ATTRIBUTES),
}

STOCK_INPUTS = {
    "QMoE": qmoe.STOCK_INPUTS,
    "MoE": moe.STOCK_INPUTS,
    "MatMulNBits": matmul_nbits.STOCK_INPUTS,
    "MatMulBlockQuantizedFp8Weight": matmul_block_quantized.FP8_STOCK_INPUTS,
    "MatMulBlockQuantizedFp4Weight": matmul_block_quantized.FP4_STOCK_INPUTS,
}
