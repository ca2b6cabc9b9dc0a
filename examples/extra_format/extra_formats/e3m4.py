"""e3m4: 8-bit floats of 3 exponent and 4 mantissa bits, all of them numbers, with float scales."""

import numpy as np

from qmoe_plugin.formats import Format

_EXPONENT, _MANTISSA = np.divmod(np.arange(128), 16)
_MAGNITUDES = np.where(
    _EXPONENT == 0, _MANTISSA / 16 * 2.0**-2, (1 + _MANTISSA / 16) * 2.0 ** (_EXPONENT - 3)
)

FORMAT = Format(
    name="e3m4",
    bits=8,
    values=np.concatenate([_MAGNITUDES, -_MAGNITUDES]),
    default_zero_point=0,
    zero_points=False,
)
