"""Which experts the tokens of a run go to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from qmoe_plugin.devices import CPU, best_target
from qmoe_plugin.graph.describe import STOCK_DOMAIN
from qmoe_plugin.graph.inputs import given, integer
from qmoe_plugin.graph.retarget import Retarget
from qmoe_plugin.graph.walk import label
from qmoe_plugin.library import DOMAIN
from qmoe_plugin.ort_values import Array
from qmoe_plugin.reference.routing import route
from qmoe_plugin.sample_inputs import Wanted, known_dims, sample_inputs
from qmoe_plugin.taps import Source, default_providers, run_with_taps

_ROUTER_PROBS, _ROUTER_WEIGHTS = 1, 14


@dataclass(frozen=True)
class ExpertLoad:
    """The tokens of each expert of a node.

    Attributes:
        name: Name of the node.
        tokens: [E], how many tokens go to each expert; shared ones get all.
    """

    name: str
    tokens: tuple[int, ...]


def expert_load(
    model: Path, inputs: Wanted | None = None, *, cpu: bool = False
) -> tuple[ExpertLoad, ...]:
    """Runs a model with our kernels and counts the tokens of each expert.

    Args:
        model: Path of the model.
        inputs: What to feed; None for random tokens, whose load says little of real text.
        cpu: Run on the CPU even where there is a GPU.

    Returns:
        Of each QMoE and MoE node of the graph.

    Raises:
        RuntimeError: If the model does not run.
        ValueError: If inputs cannot be made, or the model has no node for our kernels.
    """
    where = CPU if cpu else best_target()
    source = Source.read(model, Retarget(where))
    graph = source.graph()
    feeds = sample_inputs(graph, known_dims(inputs or Wanted(), model))
    nodes = [
        node
        for node in graph.graph
        if node.domain in (DOMAIN, STOCK_DOMAIN) and node.op_type in ("QMoE", "MoE")
    ]
    logits = [value.name or "" for value in map(_router, nodes)]
    found = run_with_taps(source, default_providers(where), feeds, logits)
    return tuple(_load(node, found) for node in nodes)


def _router(node: ir.Node) -> ir.Value:
    value = node.inputs[_ROUTER_PROBS]
    assert value is not None
    return value


def _load(node: ir.Node, found: Mapping[str, Array]) -> ExpertLoad:
    logits = found[_router(node).name or ""]
    experts = logits.shape[-1]
    weighted = node.op_type == "QMoE" and given(node, _ROUTER_WEIGHTS)
    chosen, _ = route(
        logits.reshape(-1, experts),
        integer(node, "k", 1),
        normalize=False,
        # Its values do not matter to the choice, but that there are some does.
        router_weights=logits.reshape(-1, experts) if weighted else None,
        use_sparse_mixer=bool(integer(node, "use_sparse_mixer", 0)),
        num_shared_experts=integer(node, "num_shared_experts", 0),
    )
    counts = np.bincount(chosen.reshape(-1), minlength=experts)
    return ExpertLoad(label(node), tuple(int(count) for count in counts))
