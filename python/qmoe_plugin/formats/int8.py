"""int8: unsigned 8-bit codes, ``w = (q - zero_point) * scale``, the zero point 128 by default."""

import numpy as np

from qmoe_plugin.formats.base import Format

FORMAT = Format(
    name="int8",
    bits=8,
    values=np.arange(256, dtype=np.float64),
    default_zero_point=128,
    zero_points=True,
    qmoe_attributes={"quant_type": "int", "expert_weight_bits": 8},
    matmul_nbits_attributes={"bits": 8},
)
