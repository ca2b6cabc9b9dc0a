"""MoE nodes as data, like those of cases.py."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import onnx

from helpers.cases import GATED, describe, in_ranks, projection_shapes, router_logits
from helpers.dtypes import numpy_dtype
from helpers.models import DOMAIN, one_node_model
from helpers.weights import Tensors
from qmoe_plugin import reference


@dataclass(frozen=True)
class MoECase:
    """A MoE node and its inputs."""

    dtype: str = "float32"
    weights: str | None = None  # type of the weights, that of the activations by default
    hidden: int = 64
    inter: int = 96
    experts: int = 4
    k: int = 2
    tokens: int = 3
    activation: str = "swiglu"
    fusion: int = 1
    fc3: bool = False
    alpha: float | None = None
    beta: float | None = None
    limit: float | None = None
    limit_after: bool = False  # the limit is of activated gates
    bias: bool = True
    normalize: bool = True
    router: str = "random"
    router_dtype: str | None = None
    sparse_mixer: bool = False
    shared: int = 0  # experts at the end that all tokens go to
    rank: int = 2
    router_rank: int = 2
    seed: int = 0

    op_type = "MoE"
    # What kernel selection asks of all kinds of cases.
    zero_points = False
    accuracy_level = 0

    def __str__(self) -> str:
        return describe(self)

    @property
    def output_dtype(self) -> np.dtype:
        return numpy_dtype(self.dtype)

    @property
    def format(self) -> str:
        return self.weights or self.dtype

    def format_of(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(name=self.format, zero_points=False)

    def block_of(self, name: str) -> int:
        return 0

    def attributes(self) -> dict[str, int | float | str]:
        attributes = {
            "k": self.k,
            "activation_type": self.activation,
            "normalize_routing_weights": int(self.normalize),
            "swiglu_fusion": self.fusion if self.activation in GATED else None,
            "activation_alpha": self.alpha,
            "activation_beta": self.beta,
            "swiglu_limit": self.limit,
            "swiglu_limit_after_activation": int(self.limit_after) or None,
            "use_sparse_mixer": int(self.sparse_mixer) or None,
            "num_shared_experts": self.shared or None,
        }
        return {name: value for name, value in attributes.items() if value is not None}

    def tensors(self) -> Tensors:
        """All inputs of the node by name, activations and weights."""
        rng = np.random.default_rng([self.seed, self.hidden, self.inter, self.experts])
        dtype, weight_dtype = numpy_dtype(self.dtype), numpy_dtype(self.format)
        shapes = projection_shapes(self)
        tensors: Tensors = {"input": rng.standard_normal((self.tokens, self.hidden)).astype(dtype)}
        logits = router_logits(rng, self.router, self.tokens, self.experts, self.k)
        tensors["router_probs"] = logits.astype(numpy_dtype(self.router_dtype or self.dtype))
        for name, shape in shapes.items():
            weights = rng.standard_normal(shape) / math.sqrt(shape[-1])
            tensors[f"{name}_experts_weights"] = weights.astype(weight_dtype)
            if self.bias:
                bias = 0.5 * rng.standard_normal(shape[:2])
                tensors[f"{name}_experts_bias"] = bias.astype(dtype)
        return in_ranks(self, tensors)

    def model(self, tensors: Tensors, domain: str = DOMAIN) -> onnx.ModelProto:
        return one_node_model("MoE", tensors, self.attributes(), domain=domain)

    def expected(self, tensors: Tensors) -> np.ndarray:
        """What the oracle says, float64."""
        names = ("fc1", "fc2", "fc3")
        parts = {n: tensors.get(f"{n}_experts_weights") for n in names}
        biases = {f"{n}_bias": tensors.get(f"{n}_experts_bias") for n in names}
        return reference.moe(
            tensors["input"], tensors["router_probs"], **parts, **biases, **self.attributes()
        )
