"""nvfp4: e2m1 codes in blocks of 16 with an e4m3 scale each, and a factor an expert."""

from qmoe_plugin.formats.base import Format
from qmoe_plugin.formats.scales import E2M1_VALUES

FORMAT = Format(
    name="nvfp4",
    bits=4,
    values=E2M1_VALUES,
    default_zero_point=0,
    zero_points=False,
    scale_type="float8e4m3fn",
    only_block_size=16,
    qmoe_attributes={"quant_type": "nvfp4", "expert_weight_bits": 4},
)
