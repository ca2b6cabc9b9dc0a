"""log4: a sign and a power of two from 2^-6 to 1, or zero, in blocks of 32 with an e8m0 scale."""

import numpy as np

from qmoe_plugin.formats import Format

_MAGNITUDES = np.array([0.0, *(2.0 ** np.arange(-6, 1))])

FORMAT = Format(
    name="log4",
    bits=4,
    values=np.concatenate([_MAGNITUDES, -_MAGNITUDES]),
    default_zero_point=0,
    zero_points=False,
    scale_type="float8e8m0",
    only_block_size=32,
)
