"""QMoE and MatMulNBits nodes as data: options in, tensors, model and expected result out.

The tensors of a case are those of a node in the raw layout, which the oracle takes; `model` stores
its weights in the case's layout.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from helpers.dtypes import FLOAT_DTYPES, numpy_dtype
from helpers.layouts import in_layout
from helpers.models import ACTIVATION_INPUTS, DOMAIN, one_node_model
from helpers.weights import Tensors, random_weights, typed
from qmoe_plugin import formats, reference

GATED = reference.GATED_ACTIVATIONS
ACTIVATIONS = ("identity", "relu", "gelu", "silu", *GATED)


def describe(case: Any) -> str:
    """The options of a case that differ from their defaults, short enough for a test id."""
    parts = []
    for field in dataclasses.fields(case):
        value = getattr(case, field.name)
        if value != field.default:
            parts.append(f"{field.name}={value}")
    return "-".join(parts) or "default"


def router_logits(
    rng: np.random.Generator, kind: str, tokens: int, experts: int, k: int
) -> np.ndarray:
    """Router logits [T, E], of a kind.

    random       N(0, 2)
    ties         small integers, so that many are equal
    equal        all the same
    one_expert   one expert gets every token, however many k is
    masked       -inf for all but max(k, E / 4) experts, as group-limited routers write (DeepSeek)
    few          -inf for all but one expert, so that others are chosen with probability 0
    log_sigmoid  log(sigmoid) for k experts and -10000 for the others (LFM2-MoE)
    far          so far apart that all probabilities but one underflow in float32
    nan          NaN for a third of the experts; they come last (only with router_weights)
    """
    logits = rng.normal(0, 2, (tokens, experts))
    if kind == "ties":
        logits = rng.integers(0, 3, (tokens, experts)).astype(np.float64)
    elif kind == "equal":
        logits[:] = 0.5
    elif kind == "one_expert":
        logits[:, experts // 2] = 30.0
    elif kind in ("masked", "few", "log_sigmoid"):
        keep = {"masked": max(k, experts // 4), "few": 1, "log_sigmoid": k}[kind]
        rank = np.argsort(np.argsort(-logits, axis=-1), axis=-1)
        rest = -10000.0 if kind == "log_sigmoid" else -np.inf
        kept = np.log(1 / (1 + np.exp(-logits))) if kind == "log_sigmoid" else logits
        logits = np.where(rank < keep, kept, rest)
    elif kind == "far":
        logits = rng.permuted(np.tile(-128.0 * np.arange(experts), (tokens, 1)), axis=-1)
    elif kind == "nan":
        logits[rng.random(logits.shape) < 1 / 3] = np.nan
    elif kind != "random":
        raise ValueError(f"unknown kind of router logits: {kind}")
    return logits


@dataclass(frozen=True)
class QMoECase:
    """A QMoE node and its inputs.

    block_size is that of formats which leave it open; the others have their own (`block_of`).
    """

    format: str = "int4"
    block_size: int = 32
    dtype: str = "float32"
    scale_dtype: str | None = None  # that of the activations by default
    global_scales: bool = False  # of formats that leave it open
    zero_points: bool = False
    signs: bool = True  # negative scales too
    hidden: int = 64
    inter: int = 96
    experts: int = 4
    k: int = 2
    tokens: int = 3
    activation: str = "swiglu"
    fusion: int = 1
    fc3: bool = False
    fc2_format: str | None = None  # that of fc1 by default
    own_formats: bool = False  # said by fc1_format and fc2_format, not by quant_type and the bits
    quant_type: str | None = None  # that of the format by default; or wfp4afp8
    act_scales: str = "none"  # wfp4afp8: none (found at run time), one (for all) or experts
    layout: str = "raw"  # raw, fpa_intb (int4 and int8) or k_major (4-bit floats)
    as_bytes: bool = False  # fp8 weights and e8m0 scales in uint8 tensors
    alpha: float | None = None
    beta: float | None = None
    limit: float | None = None
    limit_after: bool = False  # the limit is of activated gates
    bias: bool = True
    normalize: bool = True
    router: str = "random"
    router_dtype: str | None = None
    router_weights: bool = False
    sparse_mixer: bool = False
    shared: int = 0  # experts at the end that all tokens go to
    rank: int = 2
    router_rank: int = 2
    trailing_group_axis: bool = False  # per channel: scales [E, N, 1] instead of [E, N]
    accuracy_level: int = 0
    seed: int = 0

    op_type = "QMoE"

    def __str__(self) -> str:
        return describe(self)

    @property
    def output_dtype(self) -> np.dtype:
        return numpy_dtype(self.dtype)

    @property
    def fmt(self) -> formats.Format:
        return formats.get(self.format)

    def format_of(self, name: str) -> formats.Format:
        """The format of a projection."""
        return formats.get(self.fc2_format or self.format if name == "fc2" else self.format)

    def block_of(self, name: str) -> int:
        """The block size of a projection's weights; 0 = a scale a row, or an expert."""
        return self.format_of(name).only_block_size or self.block_size

    def scale_dtype_of(self, name: str) -> str:
        """The type of a projection's scales, unless its format has one of its own."""
        wanted = self.scale_dtype or self.dtype
        any_type = self.format_of(name).scale_type == "any"
        return wanted if any_type or wanted in FLOAT_DTYPES else self.dtype

    @property
    def block(self) -> int:
        """The block size of fc1."""
        return self.block_of("fc1")

    def fitted(self) -> QMoECase:
        """The same node without what its formats do not have."""
        changes: dict[str, Any] = {}
        both = [self.format_of("fc1"), self.format_of("fc2")]
        for name, size in (("fc1", "hidden"), ("fc2", "inter")):
            unit = 8 if self.format_of(name).square_blocks else self.block_of(name) or 8
            changes[size] = -(-getattr(self, size) // unit) * unit
        if all(fmt.only_block_size is not None for fmt in both):
            changes["block_size"] = 32
        changes["zero_points"] = self.zero_points and any(fmt.zero_points for fmt in both)
        if not any(fmt.scale_type in ("float", "any") for fmt in both):
            changes["scale_dtype"] = None
        changes["global_scales"] = self.global_scales and any(
            fmt.may_have_global_scale for fmt in both
        )
        if self.fmt.has_global_scale(self.block) or self.global_scales:
            changes["fc3"] = False
        if any(f.has_global_scale(self.block_size) or f.square_blocks for f in both):
            changes["trailing_group_axis"] = False
        return dataclasses.replace(self, **changes)

    def attributes(self) -> dict[str, int | float | str]:
        both = [self.format_of("fc1"), self.format_of("fc2")]
        integers = all(fmt.qmoe_attributes["quant_type"] == "int" for fmt in both)
        own_formats = self.own_formats or (self.fc2_format is not None and not integers)
        attributes: dict[str, Any] = {
            **self.fmt.qmoe_attributes,
            "k": self.k,
            "activation_type": self.activation,
            "normalize_routing_weights": int(self.normalize),
            "swiglu_fusion": self.fusion if self.activation in GATED else None,
            "block_size": self.block_size if any(not f.only_block_size for f in both) else None,
            "activation_alpha": self.alpha,
            "activation_beta": self.beta,
            "swiglu_limit": self.limit,
            "swiglu_limit_after_activation": int(self.limit_after) or None,
            "use_sparse_mixer": int(self.sparse_mixer) or None,
            "num_shared_experts": self.shared or None,
            "accuracy_level": self.accuracy_level or None,
        }
        if own_formats:
            attributes["fc2_format"] = self.format_of("fc2").name
        elif integers:
            attributes["weights_prepacked"] = int(self.layout == "fpa_intb")
        elif self.fmt.scale_type != "float":
            attributes["weights_layout"] = self.layout
        if self.own_formats:
            attributes["fc1_format"] = self.format
            del attributes["quant_type"], attributes["expert_weight_bits"]
        if self.quant_type:
            attributes["quant_type"] = self.quant_type
        if not own_formats and self.fc2_format:
            attributes["fc2_expert_weight_bits"] = formats.get(self.fc2_format).bits
        return {name: value for name, value in attributes.items() if value is not None}

    def tensors(self) -> Tensors:
        """All inputs of the node by name, activations and weights."""
        rng = np.random.default_rng([self.seed, self.hidden, self.inter, self.experts])
        dtype = numpy_dtype(self.dtype)
        router_dtype = numpy_dtype(self.router_dtype or self.dtype)
        shapes = projection_shapes(self)
        tensors: Tensors = {"input": rng.standard_normal((self.tokens, self.hidden)).astype(dtype)}
        logits = router_logits(rng, self.router, self.tokens, self.experts, self.k)
        tensors["router_probs"] = logits.astype(router_dtype)
        for name, shape in shapes.items():
            fmt = self.format_of(name)
            weights = random_weights(
                rng,
                fmt,
                shape,
                self.block_of(name),
                numpy_dtype(self.scale_dtype_of(name)),
                signs=self.signs,
                zero_points=self.zero_points and fmt.zero_points,
                powers_of_two=self.quant_type == "wfp4afp8" and self.dtype != "float32",
                global_scale=self.global_scales,
                codebook=tensors.get("fc1_codebook") if name == "fc3" else None,
            )
            if name == "fc3":
                weights.pop("codebook", None)  # that of fc1
            if self.trailing_group_axis:
                weights["scales"] = weights["scales"][..., None]
            if self.as_bytes and fmt.scale_type == "float8e8m0":
                weights["scales"] = weights["scales"].view(np.uint8)
            codes = weights.pop("codes")
            tensors[f"{name}_experts_weights"] = codes if self.as_bytes else typed(codes, fmt)
            tensors |= {f"{name}_{part}": tensor for part, tensor in weights.items()}
            if self.bias:
                bias = 0.5 * rng.standard_normal(shape[:2])
                tensors[f"{name}_experts_bias"] = bias.astype(dtype)
            if self.act_scales != "none":
                count = self.experts if self.act_scales == "experts" else 1
                scales = rng.uniform(0.5, 1.5, count) / 64  # N(0, 1) inputs are 64 steps of it
                tensors[f"{name}_act_scale"] = scales.astype(np.float32)
        if self.router_weights:
            weights = rng.uniform(0.05, 1.0, (self.tokens, self.experts))
            tensors["router_weights"] = weights.astype(router_dtype)
        return in_ranks(self, tensors)

    def model(self, tensors: Tensors, domain: str = DOMAIN) -> onnx.ModelProto:
        return one_node_model("QMoE", self.stored(tensors), self.attributes(), domain=domain)

    def stored(self, tensors: Tensors) -> Tensors:
        """The tensors with the weights in the case's layout."""
        moved = {}
        for name in tensors:
            if name.endswith("experts_weights") and self.layout != "raw":
                fmt = reference.projection_format(self.attributes(), name[:3])
                moved[name] = in_layout(tensors[name], fmt.bits, self.layout)
        return tensors | moved

    def expected(self, tensors: Tensors) -> np.ndarray:
        """What the oracle says, float64."""
        return qmoe_oracle(tensors, self.attributes())


def projection_shapes(case: Any) -> dict[str, tuple[int, int, int]]:
    """[E, N, K] of fc1, fc2 and perhaps fc3, of a case of QMoE or MoE."""
    gated_in_one = case.activation in GATED and not case.fc3
    shapes = {
        "fc1": (case.experts, case.inter * (2 if gated_in_one else 1), case.hidden),
        "fc2": (case.experts, case.hidden, case.inter),
    }
    if case.fc3:
        shapes["fc3"] = shapes["fc1"]
    return shapes


def in_ranks(case: Any, tensors: Tensors) -> Tensors:
    """The tensors with input and router inputs in the ranks of a case of QMoE or MoE."""
    if case.rank == 3:
        tensors["input"] = split_tokens(tensors["input"])
    if case.router_rank == 3:
        for name in tensors.keys() & {"router_probs", "router_weights"}:
            tensors[name] = split_tokens(tensors[name])
    return tensors


def split_tokens(array: np.ndarray) -> np.ndarray:
    """[T, D] as [B, S, D], B = 2 where T is even."""
    batch = 2 if array.shape[0] % 2 == 0 else 1
    return array.reshape(batch, array.shape[0] // batch, array.shape[1])


def projections(tensors: Tensors) -> dict[str, reference.Projection]:
    """The projections of a QMoE node: fc1, fc2 and perhaps fc3."""
    return {
        name: reference.Projection(
            tensors[f"{name}_experts_weights"],
            tensors.get(f"{name}_scales"),
            tensors.get(f"{name}_zero_points"),
            tensors.get(f"{name}_experts_bias"),
            tensors.get(f"{name}_global_scale"),
            tensors.get("fc2_codebook" if name == "fc2" else "fc1_codebook"),
        )
        for name in ("fc1", "fc2", "fc3")
        if f"{name}_experts_weights" in tensors
    }


def qmoe_oracle(tensors: Tensors, attributes: dict[str, int | float | str]) -> np.ndarray:
    return reference.qmoe(
        tensors["input"],
        tensors["router_probs"],
        **projections(tensors),
        router_weights=tensors.get("router_weights"),
        fc1_act_scale=tensors.get("fc1_act_scale"),
        fc2_act_scale=tensors.get("fc2_act_scale"),
        **attributes,
    )


@dataclass(frozen=True)
class MatMulNBitsCase:
    """A MatMulNBits node and its inputs."""

    format: str = "int4"
    block_size: int = 32
    dtype: str = "float32"
    scale_dtype: str | None = None  # that of A by default
    global_scales: bool = False  # of formats that leave it open
    zero_points: str = "none"  # none, packed, bytes (one a block) or typed (floats, one a block)
    signs: bool = True
    m: int = 3
    n: int = 48
    k: int = 96
    g_idx: str = "none"  # none, shuffled (a permutation of the natural one) or uneven
    bias: bool = True
    rank: int = 2
    flat: bool = False  # scales and zero points of rank 1, as older exporters write
    layout: str = "raw"  # raw, fpa_intb or fpa_intb90
    accuracy_level: int = 0
    seed: int = 0

    op_type = "MatMulNBits"

    def __str__(self) -> str:
        return describe(self)

    @property
    def output_dtype(self) -> np.dtype:
        return numpy_dtype(self.dtype)

    @property
    def fmt(self) -> formats.Format:
        return formats.get(self.format)

    @property
    def block(self) -> int:
        return self.block_size

    @property
    def groups(self) -> int:
        return self.fmt.groups(self.k, self.block_size)

    def fitted(self) -> MatMulNBitsCase:
        """The same node without what its format does not have."""
        fmt, changes = self.fmt, {}
        changes["block_size"] = fmt.only_block_size or self.block_size
        if not fmt.zero_points:
            changes["zero_points"] = "none"
        if fmt.scale_type not in ("float", "any"):
            changes["scale_dtype"] = None
        if not fmt.may_have_global_scale:
            changes["global_scales"] = False
        return dataclasses.replace(self, **changes)

    def attributes(self) -> dict[str, int | float | str]:
        attributes = {
            **self.fmt.matmul_nbits_attributes,
            "K": self.k,
            "N": self.n,
            "block_size": self.block_size,
        }
        if self.accuracy_level:
            attributes["accuracy_level"] = self.accuracy_level
        if self.layout != "raw":
            attributes["weight_prepacked"] = {"fpa_intb": 1, "fpa_intb90": 2}[self.layout]
        return dict(attributes)

    def tensors(self) -> Tensors:
        """All inputs of the node by name."""
        rng = np.random.default_rng([self.seed, self.n, self.k])
        fmt, dtype = formats.get(self.format), numpy_dtype(self.dtype)
        block = self.block_size or self.k
        padded_k = self.groups * block
        weights = random_weights(
            rng,
            fmt,
            (self.n, padded_k),
            self.block_size,
            numpy_dtype(self.scale_dtype or self.dtype),
            signs=self.signs,
            zero_points=self.zero_points != "none" and fmt.zero_points,
            global_scale=self.global_scales,
        )
        codes = typed(weights["codes"], fmt)
        a = rng.standard_normal((self.m, self.k)).astype(dtype)
        if self.rank == 3:
            a = split_tokens(a)
        elif self.rank == 1:
            a = a.reshape(-1)
        tensors: Tensors = {
            "A": a,
            "B": codes.reshape(self.n, self.groups, block * fmt.bits // 8),
        }
        if "scales" in weights:
            tensors["scales"] = weights["scales"]
        if "codebook" in weights:
            tensors["codebook"] = weights["codebook"]
        if "global_scale" in weights:
            tensors["global_scale"] = weights["global_scale"].reshape(1)
        if "zero_points" in weights:
            zero_points = weights["zero_points"]
            values = formats.unpack(zero_points, fmt.bits, self.groups)
            if self.zero_points == "bytes":
                zero_points = values
            elif self.zero_points == "typed":
                zero_points = (values + rng.uniform(-0.5, 0.5, values.shape)).astype(dtype)
            tensors["zero_points"] = zero_points
        if self.g_idx != "none":
            natural = np.arange(self.k, dtype=np.int32) // self.block_size
            uneven = rng.integers(0, self.groups, self.k, dtype=np.int32)
            tensors["g_idx"] = rng.permutation(natural) if self.g_idx == "shuffled" else uneven
        if self.bias:
            tensors["bias"] = (0.5 * rng.standard_normal(self.n)).astype(dtype)
        if self.flat:
            for name in tensors.keys() & {"scales", "zero_points"}:
                tensors[name] = tensors[name].reshape(-1)
        return tensors

    def model(self, tensors: Tensors, domain: str = DOMAIN) -> onnx.ModelProto:
        stored = self.stored(tensors)
        return one_node_model("MatMulNBits", stored, self.attributes(), domain=domain)

    def stored(self, tensors: Tensors) -> Tensors:
        """The tensors with B in the case's layout; its shape stays that of the raw one."""
        b = tensors["B"]
        if self.layout == "raw":
            return tensors
        rows = b.reshape(self.n, -1)
        return tensors | {
            "B": in_layout(rows, formats.get(self.format).bits, self.layout).reshape(b.shape)
        }

    def expected(self, tensors: Tensors) -> np.ndarray:
        """What the oracle says, float64."""
        return matmul_nbits_oracle(tensors, self.attributes())

    def operands(self, tensors: Tensors) -> tuple[np.ndarray, np.ndarray]:
        """A, and the weights, float64."""
        names = ("B", "scales", "zero_points", "g_idx", "codebook", "global_scale")
        sizes = {"k": self.k, "n": self.n, "block_size": self.block_size}
        weights = reference.matmul_nbits_weights(*map(tensors.get, names), **sizes, fmt=self.fmt)
        return tensors["A"].astype(np.float64), weights


def matmul_nbits_oracle(tensors: Tensors, attributes: dict[str, int | float | str]) -> np.ndarray:
    optional = ("zero_points", "g_idx", "bias", "codebook", "global_scale")
    inputs = {name: tensors.get(name) for name in optional}
    return reference.matmul_nbits(
        tensors["A"], tensors["B"], tensors.get("scales"), **inputs, **attributes
    )


Case = QMoECase | MatMulNBitsCase


def feeds_of(tensors: Tensors) -> Tensors:
    """The inputs that are fed at run time."""
    return {name: tensor for name, tensor in tensors.items() if name in ACTIVATION_INPUTS}
