"""Reads quantised models back, and what errors formats may cause."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from helpers.models import INPUT_NAMES

# Relative rms error of N(0, 1) weights that a format may cause, by the spec.
ERRORS = {
    "int2:16": 0.55,
    "int2:16:asymmetric": 0.55,
    "int4": 0.12,
    "int4:16:asymmetric": 0.12,
    "int8": 0.008,
    "int8:32:asymmetric": 0.008,
    "mxfp4": 0.15,
    "nvfp4": 0.11,
    "fp8_e4m3": 0.035,
    "fp8_e4m3:32": 0.035,
    "fp8_e4m3:0": 0.035,
    "nf4": 0.11,
    "af4:16": 0.11,
    "iq4_nl": 0.11,
}


def rms(values) -> float:
    return float(np.sqrt(np.mean(np.square(np.asarray(values, np.float64)))))


def initializers(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def node_of(model: onnx.ModelProto, op_type: str) -> onnx.NodeProto:
    (node,) = (node for node in model.graph.node if node.op_type == op_type)
    return node


def inputs_of(model: onnx.ModelProto, node: onnx.NodeProto) -> dict[str, np.ndarray]:
    """The constant inputs of one of our nodes, by the names of the schema."""
    found = initializers(model)
    names = zip(INPUT_NAMES[node.op_type], node.input, strict=False)
    return {place: found[name] for place, name in names if name in found}


def attributes_of(node: onnx.NodeProto) -> dict:
    values = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    return {k: v.decode() if isinstance(v, bytes) else v for k, v in values.items()}
