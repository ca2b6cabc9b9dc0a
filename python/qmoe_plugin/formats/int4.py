"""int4: unsigned 4-bit codes, ``w = (q - zero_point) * scale``, the zero point 8 by default."""

import numpy as np

from qmoe_plugin.formats.base import Format

FORMAT = Format(
    name="int4",
    bits=4,
    values=np.arange(16, dtype=np.float64),
    default_zero_point=8,
    zero_points=True,
    qmoe_attributes={"quant_type": "int", "expert_weight_bits": 4},
    matmul_nbits_attributes={"bits": 4},
)
