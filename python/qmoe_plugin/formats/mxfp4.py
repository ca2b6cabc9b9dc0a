"""mxfp4: e2m1 codes in blocks of 32 with an e8m0 scale each (OCP MX), and a factor an expert."""

from qmoe_plugin.formats.base import Format
from qmoe_plugin.formats.scales import E2M1_VALUES

FORMAT = Format(
    name="mxfp4",
    bits=4,
    values=E2M1_VALUES,
    default_zero_point=0,
    zero_points=False,
    scale_type="float8e8m0",
    only_block_size=32,
    qmoe_attributes={"quant_type": "fp4", "expert_weight_bits": 4},
    other_quant_types=("wfp4afp8",),
)
