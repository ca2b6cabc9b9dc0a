"""int2: unsigned 2-bit codes, ``w = (q - zero_point) * scale``, the zero point 2 by default."""

import numpy as np

from qmoe_plugin.formats.base import Format

FORMAT = Format(
    name="int2",
    bits=2,
    values=np.arange(4, dtype=np.float64),
    default_zero_point=2,
    zero_points=True,
    qmoe_attributes={"quant_type": "int", "expert_weight_bits": 2},
    matmul_nbits_attributes={"bits": 2},
)
