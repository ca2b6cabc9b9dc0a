"""fp8_e4m3: 8-bit floats with one factor an expert, or a float scale a square block."""

from qmoe_plugin.formats.base import Format
from qmoe_plugin.formats.scales import E4M3_VALUES

FORMAT = Format(
    name="fp8_e4m3",
    bits=8,
    values=E4M3_VALUES,
    default_zero_point=0,
    zero_points=False,
    square_blocks=True,
    qmoe_attributes={"quant_type": "fp8", "expert_weight_bits": 8},
)
