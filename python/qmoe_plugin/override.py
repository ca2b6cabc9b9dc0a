"""Our kernels in the place of ONNX Runtime's own: for models that stay as they are."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from qmoe_plugin.graph.describe import STOCK_DOMAIN
from qmoe_plugin.graph.stock import STOCK_ATTRIBUTES, STOCK_INPUTS
from qmoe_plugin.library import runtime

CONFIG_KEY = "qmoe_plugin.override_com_microsoft"
"""Session config entry: "1" registers our ops in com.microsoft, too. It must be set before our
library is registered; onnxruntime-genai sets it from the session_options of genai_config.json."""

_TYPES = frozenset(
    f"tensor({name})"
    for name in ("float", "float16", "bfloat16", "uint8", "int32", "float8e4m3fn", "float8e8m0")
)


class _Input(Protocol):
    name: str


class _TypeConstraint(Protocol):
    allowed_type_strs: Iterable[str]


class Schema(Protocol):
    """What we read of ONNX Runtime's description of an op."""

    name: str
    domain: str
    since_version: int
    attributes: Mapping[str, object]
    inputs: Sequence[_Input]
    outputs: Sequence[object]
    type_constraints: Iterable[_TypeConstraint]


def schema_gaps() -> list[str]:
    """What the ops of this onnxruntime have that ours do not know; empty as it should be.

    ONNX Runtime replaces an op as a whole, so a node that uses anything of this would not mean to
    our op what it means to theirs.
    """
    module = importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state")
    schemas: list[Schema] = module.get_all_operator_schema()
    return [
        f"{schema.name} has {gap}"
        for schema in schemas
        if schema.domain == STOCK_DOMAIN and schema.name in STOCK_ATTRIBUTES
        for gap in _gaps(schema)
    ]


def check_override() -> None:
    """Refuses to override ops of which ours do not cover the whole schema.

    Raises:
        RuntimeError: If there is something that we do not know.
    """
    gaps = schema_gaps()
    if gaps:
        raise RuntimeError(
            f"onnxruntime {runtime().__version__} is newer than qmoe_plugin knows: "
            f"{'; '.join(gaps)}. Upgrade qmoe_plugin, or leave out override: then nodes that use "
            "none of this still run with our kernels"
        )


def _gaps(schema: Schema) -> list[str]:
    known = STOCK_INPUTS[schema.name]
    gaps = [
        f"attribute {name}"
        for name in sorted(set(schema.attributes) - STOCK_ATTRIBUTES[schema.name])
    ]
    for index, given in enumerate(schema.inputs):
        if index >= len(known) or given.name != known[index]:
            gaps.append(f"input {index} ({given.name})")
    types = {name for each in schema.type_constraints for name in each.allowed_type_strs}
    gaps += [f"type {name}" for name in sorted(types - _TYPES)]
    if len(schema.outputs) != 1:
        gaps.append(f"{len(schema.outputs)} outputs")
    if schema.since_version != 1:
        gaps.append(f"version {schema.since_version}")
    return gaps
