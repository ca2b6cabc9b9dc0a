"""What the experts of a MoE node get to see."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qmoe_plugin.graph.expert_weights import ExpertWeights, expert_weights
from qmoe_plugin.graph.inputs import constant_tensor, given, integer, real, string
from qmoe_plugin.graph.moe import WEIGHTS, describe_experts
from qmoe_plugin.graph.walk import label
from qmoe_plugin.reference import activate, route
from qmoe_plugin.report import NodeReport

Array = npt.NDArray[Any]

_AT_ONCE = 2048  # tokens; the weights of an expert are read once for so many

_PRIOR = 4.0
"""Tokens that the mean of a layer counts for in each expert, so that few tokens do not say that a
column does not matter at all."""


class MoEStatistics:
    """Sums of squares of what each expert's two layers are given."""

    def __init__(self, node: ir.Node) -> None:
        """Reads a node.

        Raises:
            UnsupportedError: If our op cannot run it.
        """
        self._node, self._weights = node, expert_weights(node)
        describe_experts(node, {role: w.constant for role, w in self._weights.items()})
        self._experts, _, hidden = self._weights["fc1"].constant.shape
        inter = self._weights["fc2"].constant.shape[2]
        self._tokens = np.zeros(self._experts, np.int64)
        self._sums = {
            "fc1": np.zeros((self._experts, hidden)),
            "fc2": np.zeros((self._experts, inter)),
        }
        self._waiting: list[tuple[Array, Array]] = []

    @property
    def inputs(self) -> tuple[str, str]:
        """Names of the activations and of the logits."""
        x, logits = self._node.inputs[:2]
        return (x.name or "" if x else "", logits.name or "" if logits else "")

    def take(self, x: Array, logits: Array) -> None:
        """Takes the activations [..., H] and logits [..., E] of a run."""
        self._waiting.append((x.reshape(-1, x.shape[-1]), logits.reshape(-1, self._experts)))
        if sum(len(rows) for rows, _ in self._waiting) >= _AT_ONCE:
            self._count()

    def finish(self) -> tuple[dict[str, Array], NodeReport]:
        """The importance of columns by the name of the weight, [E, K], and what to say of it."""
        if self._waiting:
            self._count()
        found = {}
        for role, sums in self._sums.items():
            total = max(int(self._tokens.sum()), 1)
            # What all experts of a layer see is alike before fc1; after it, columns have nothing
            # in common.
            prior = sums.sum(axis=0) / total
            if role == "fc2":
                prior = np.full_like(prior, prior.mean())
            means = (sums + _PRIOR * prior) / (self._tokens + _PRIOR)[:, None]
            found[self._weights[role].name] = means.astype(np.float32)
        missed = np.flatnonzero(self._tokens == 0).tolist()
        text = f"{self._experts - len(missed)} of {self._experts} experts, "
        text += f"{self._tokens.min()} to {self._tokens.max()} tokens each"
        warning = ""
        if missed:
            warning = f"no token came to experts {_short(missed)}; they get the mean of the others"
        return found, NodeReport(label(self._node), "MoE", change=text, warning=warning)

    def _count(self) -> None:
        x = np.concatenate([rows for rows, _ in self._waiting])
        logits = np.concatenate([rows for _, rows in self._waiting])
        self._waiting = []
        node = self._node
        chosen, _ = route(
            logits,
            integer(node, "k", 1),
            normalize=bool(integer(node, "normalize_routing_weights", 0)),
            use_sparse_mixer=bool(integer(node, "use_sparse_mixer", 0)),
            num_shared_experts=integer(node, "num_shared_experts", 0),
        )
        for expert in np.unique(chosen):
            rows = x[(chosen == expert).any(axis=1)]
            self._tokens[expert] += len(rows)
            self._sums["fc1"][expert] += np.square(rows, dtype=np.float64).sum(axis=0)
            self._sums["fc2"][expert] += np.square(self._hidden(rows, int(expert))).sum(axis=0)

    def _hidden(self, rows: Array, expert: int) -> Array:
        """What fc2 of an expert gets for these rows."""
        node = self._node
        ups = self._weights.get("fc3")
        return activate(
            self._layer("fc1", self._weights["fc1"], rows, expert),
            string(node, "activation_type", "relu"),
            fc3=None if ups is None else self._layer("fc3", ups, rows, expert),
            swiglu_fusion=integer(node, "swiglu_fusion", 0),
            alpha=real(node, "activation_alpha", 1.0),
            beta=real(node, "activation_beta", 0.0),
            limit=real(node, "swiglu_limit", math.inf),
            limit_after_activation=bool(integer(node, "swiglu_limit_after_activation", 0)),
        )

    def _layer(self, role: str, weights: ExpertWeights, rows: Array, expert: int) -> Array:
        result = (rows @ weights.matrix(expert).T).astype(np.float64)
        if given(self._node, WEIGHTS[role] + 1):
            bias = constant_tensor(self._node, WEIGHTS[role] + 1, f"{role} bias")
            assert bias is not None
            result += bias.numpy()[expert].astype(np.float64)
        return result


def _short(numbers: list[int], most: int = 8) -> str:
    text = ", ".join(map(str, numbers[:most]))
    return text + (f" and {len(numbers) - most} more" if len(numbers) > most else "")
