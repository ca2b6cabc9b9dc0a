"""QMoE nodes of every quant_type and layout: right types and shapes, with next to nothing in them.

For tests of what a node is taken for; those of numbers use `helpers.cases`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx
from onnx import helper, numpy_helper

from helpers.models import node_inputs
from qmoe_plugin import formats

Tensors = dict[str, np.ndarray]

SCALE_TYPES = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "uint8": np.uint8,
    "float8e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8e8m0": ml_dtypes.float8_e8m0fnu,
}
FIXED_BLOCKS = {"fp4": 32, "nvfp4": 16, "wfp4afp8": 32}
_DEFAULT_SCALES = {"fp4": "float8e8m0", "nvfp4": "float8e4m3fn", "wfp4afp8": "float8e8m0"}


@dataclass(frozen=True)
class Blank:
    """A QMoE node.

    Attributes:
        layout: "raw", or "transposed" for the shape that prepacked and K-major weights share.
        scales: Type of the scales; None = what the quant_type has.
        float8_weights: fp8 weights as float8e4m3fn rather than uint8.
        gate: "fused" (swiglu, fusion 1), "fc3" (silu) or "none" (relu).
        fc1_format: That of fc3, too; "" = as quant_type and the bits say.
        fc2_format: Likewise.
    """

    quant_type: str = "int"
    bits: int | None = None
    fc2_bits: int | None = None
    block_size: int = 32
    hidden: int = 64
    inter: int = 96
    experts: int = 4
    gate: str = "fused"
    layout: str = "raw"
    scales: str | None = None
    float8_weights: bool = True
    bias: bool = False
    zero_points: bool = False
    act_scales: int = 0
    dtype: str = "float32"
    fc1_format: str = ""
    fc2_format: str = ""

    def __str__(self) -> str:
        """The options that differ from their defaults."""
        given = (
            (field.name, getattr(self, field.name))
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        )
        return "-".join(f"{name}={value}" for name, value in given) or "default"

    @property
    def attributes(self) -> dict[str, int | str | float]:
        """What the node says, as exporters write it: nothing of its layout."""
        made: dict[str, int | str | float] = {
            "k": 2,
            "activation_type": {"fused": "swiglu", "fc3": "silu", "none": "relu"}[self.gate],
            "swiglu_fusion": int(self.gate == "fused"),
        }
        if self.quant_type != "int":
            made["quant_type"] = self.quant_type
        if self.bits:
            made["expert_weight_bits"] = self.bits
        if self.fc2_bits:
            made["fc2_expert_weight_bits"] = self.fc2_bits
        for name in ("fc1_format", "fc2_format"):
            if getattr(self, name):
                made[name] = getattr(self, name)
        if self.block_size and None in (self._only_block("fc1"), self._only_block("fc2")):
            made["block_size"] = self.block_size
        return made

    def _named(self, name: str) -> formats.Format | None:
        """The format of a projection that is called by its name; None if quant_type says it."""
        own = self.fc2_format if name == "fc2" else self.fc1_format
        stock = self.quant_type in ("int", "fp4", "nvfp4", "fp8", "wfp4afp8")
        return formats.get(own or self.quant_type) if own or not stock else None

    def _only_block(self, name: str) -> int | None:
        named = self._named(name)
        return FIXED_BLOCKS.get(self.quant_type) if named is None else named.only_block_size

    def _is_square(self, name: str) -> bool:
        named = self._named(name)
        return self.quant_type == "fp8" if named is None else named.square_blocks

    def tensors(self) -> Tensors:
        """The node's inputs."""
        dtype = SCALE_TYPES[self.dtype]
        rows = self.inter * (2 if self.gate == "fused" else 1)
        tensors: Tensors = {
            "input": np.ones((3, self.hidden), dtype),
            "router_probs": np.ones((3, self.experts), dtype),
            **self._projection("fc1", rows, self.hidden),
            **self._projection("fc2", self.hidden, self.inter),
        }
        if self.gate == "fc3":
            tensors |= self._projection("fc3", self.inter, self.hidden)
        for name in ("fc1", "fc2"):
            if self._only_block(name) or (self._is_square(name) and not self.block_size):
                tensors[f"{name}_global_scale"] = np.ones(self.experts, np.float32)
            named = self._named(name)
            if named is not None and named.codebook:
                tensors[f"{name}_codebook"] = np.arange(16, dtype=np.float32)
        if self.act_scales:
            for name in ("fc1_act_scale", "fc2_act_scale"):
                tensors[name] = np.ones(self.act_scales, np.float32)
        return tensors

    def model(
        self,
        domain: str = "com.microsoft",
        attributes: Mapping[str, int | str | float | None] | None = None,
        tensors: Mapping[str, np.ndarray | None] | None = None,
    ) -> onnx.ModelProto:
        """A model of this node; attributes and tensors replace the node's, None removes one."""
        given = {**self.attributes, **(attributes or {})}
        arrays = {**self.tensors(), **(tensors or {})}
        return blank_model(
            {name: array for name, array in arrays.items() if array is not None},
            {name: value for name, value in given.items() if value is not None},
            domain,
        )

    def _projection(self, name: str, n: int, k: int) -> Tensors:
        e = self.experts
        named = self._named(name)
        if named is not None:
            bits = named.bits
        elif name == "fc2" and self.fc2_bits:
            bits = self.fc2_bits
        else:
            bits = 8 if self.quant_type == "fp8" else self.bits or 4
        rows, columns = (n, k) if self.layout == "raw" else (k, n)
        codes = np.zeros((e, rows, columns * bits // 8), np.uint8)
        is_fp8 = self.quant_type == "fp8" if named is None else named.name == "fp8_e4m3"
        if is_fp8 and self.float8_weights:
            codes = codes.view(ml_dtypes.float8_e4m3fn)
        tensors = {f"{name}_experts_weights": codes}
        block = self._only_block(name) or self.block_size
        height = block if self._is_square(name) else 1
        if height:
            scales = SCALE_TYPES[self.scales or self._scales(name)]
            shape = (e, -(-n // height), -(-k // block)) if block else (e, n)
            tensors[f"{name}_scales"] = np.ones(shape, scales)
        if self.zero_points:
            shape = (e, n, -(-(k // block) * bits // 8)) if block else (e, n * bits // 8)
            tensors[f"{name}_zero_points"] = np.zeros(shape, np.uint8)
        if self.bias:
            tensors[f"{name}_experts_bias"] = np.zeros((e, n), SCALE_TYPES[self.dtype])
        return tensors

    def _scales(self, name: str) -> str:
        """The type of scales that the projection's format has."""
        named = self._named(name)
        if named is None:
            return _DEFAULT_SCALES.get(self.quant_type, self.dtype)
        return self.dtype if named.scale_type in ("float", "any") else named.scale_type


def blank_model(
    tensors: Mapping[str, np.ndarray],
    attributes: Mapping[str, int | str | float],
    domain: str = "com.microsoft",
) -> onnx.ModelProto:
    """A model of one QMoE node."""
    names = node_inputs("QMoE", tensors)
    fed = ("input", "router_probs", "router_weights")
    element = helper.np_dtype_to_tensor_dtype(tensors["input"].dtype)
    node = helper.make_node("QMoE", names, ["output"], name="node", domain=domain, **attributes)
    graph = helper.make_graph(
        [node],
        "blank",
        [
            helper.make_tensor_value_info(
                name,
                helper.np_dtype_to_tensor_dtype(tensors[name].dtype),
                ["tokens", *tensors[name].shape[1:]],
            )
            for name in fed
            if name in tensors
        ],
        [helper.make_tensor_value_info("output", element, None)],
        [
            numpy_helper.from_array(array, name)
            for name, array in tensors.items()
            if name not in fed
        ],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(domain, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)
