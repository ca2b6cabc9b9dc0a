"""What kernel selection needs to know of a node, read off the model without reading any weights.

Of weights that were packed before, the header is read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import onnx_ir as ir

from qmoe_plugin.devices import Target
from qmoe_plugin.kernels import Problem
from qmoe_plugin.library import DOMAIN, OPS

if TYPE_CHECKING:
    from qmoe_plugin.graph.packed import PackedWeights

STOCK_DOMAIN = "com.microsoft"


class UnsupportedError(Exception):
    """Our ops cannot run this node; the message says why."""


@dataclass(frozen=True)
class Description:
    """A node, as kernel selection sees it.

    Attributes:
        gemms: Its matrix products, for one token.
        decided: Attributes whose value was found out from the shapes, and should be written down.
        warning: Something decided by custom rather than by what the node says; "" for nothing.
        packed: The weights of a node that `qmoe_plugin.prepack` packed; else empty.
    """

    gemms: tuple[Problem, ...]
    decided: Mapping[str, int | str] = field(default_factory=dict)
    warning: str = ""
    packed: tuple[PackedWeights, ...] = ()

    def problems(self, target: Target, tokens: int) -> tuple[Problem, ...]:
        """The matrix products of a run with this many tokens on a device.

        Raises:
            UnsupportedError: If the weights were packed for another one.
        """
        for weights in self.packed:
            weights.check_target(target, self.gemms[0].dtype)
        return tuple(
            dataclasses.replace(gemm, target=target, rows=gemm.rows * tokens) for gemm in self.gemms
        )


def is_ours(node: ir.Node) -> bool:
    """Whether it is of one of our ops, in our domain or in com.microsoft."""
    return node.domain in (DOMAIN, STOCK_DOMAIN) and node.op_type in OPS


def describe(node: ir.Node) -> Description:
    """Describes a node of one of our ops.

    Raises:
        UnsupportedError: If our ops cannot run it.
    """
    from qmoe_plugin.graph.matmul_block_quantized import describe_fp4_weight, describe_fp8_weight
    from qmoe_plugin.graph.matmul_nbits import describe_matmul_nbits
    from qmoe_plugin.graph.moe import describe_moe
    from qmoe_plugin.graph.qmoe import describe_qmoe

    if node.domain not in (STOCK_DOMAIN, DOMAIN) or node.op_type not in OPS:
        raise UnsupportedError(
            f"{node.domain or 'ai.onnx'}.{node.op_type} is not one of our ops; they are "
            f"{', '.join(OPS)} of {STOCK_DOMAIN} or {DOMAIN}"
        )
    by_op = {
        "QMoE": describe_qmoe,
        "MoE": describe_moe,
        "MatMulNBits": describe_matmul_nbits,
        "MatMulBlockQuantizedFp8Weight": describe_fp8_weight,
        "MatMulBlockQuantizedFp4Weight": describe_fp4_weight,
    }
    return by_op[node.op_type](node)
