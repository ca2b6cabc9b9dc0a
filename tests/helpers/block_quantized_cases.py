"""MatMulBlockQuantizedFp8Weight and ...Fp4Weight nodes as data, like those of cases.py."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx

from helpers.cases import describe, split_tokens
from helpers.dtypes import numpy_dtype
from helpers.models import DOMAIN, one_node_model
from helpers.weights import Tensors
from qmoe_plugin import reference
from qmoe_plugin.formats.scales import E4M3, E4M3_VALUES, round_to_e4m3

NUMBERS = np.flatnonzero(np.isfinite(E4M3_VALUES)).astype(np.uint8)


@dataclass(frozen=True)
class _BlockQuantizedCase:
    dtype: str = "float16"
    block_size: int | None = None  # the default of the op
    m: int = 3
    n: int = 48
    k: int = 96
    a_scale: bool = False  # of Fp8Weight; input_scale of Fp4Weight
    bias: bool = True
    rank: int = 2
    seed: int = 0

    # What kernel selection asks of all kinds of cases.
    zero_points = "none"
    accuracy_level = 0

    def __str__(self) -> str:
        return describe(self)

    def fitted(self) -> _BlockQuantizedCase:
        return self

    @property
    def output_dtype(self) -> np.dtype:
        return numpy_dtype(self.dtype)

    def attributes(self) -> dict[str, int]:
        return {} if self.block_size is None else {"block_size": self.block_size}

    def activations_and_bias(self, rng: np.random.Generator) -> tuple[Tensors, Tensors]:
        dtype = numpy_dtype(self.dtype)
        a = rng.standard_normal((self.m, self.k)).astype(dtype)
        bias = (0.5 * rng.standard_normal(self.n)).astype(dtype)
        a = split_tokens(a) if self.rank == 3 else a
        return {"A": a}, {"bias": bias} if self.bias else {}

    def model(self, tensors: Tensors, domain: str = DOMAIN) -> onnx.ModelProto:
        return one_node_model(self.op_type, tensors, self.attributes(), domain=domain)


@dataclass(frozen=True)
class Fp8WeightCase(_BlockQuantizedCase):
    """A MatMulBlockQuantizedFp8Weight node and its inputs."""

    op_type = "MatMulBlockQuantizedFp8Weight"
    format = "fp8_e4m3"

    @property
    def block(self) -> int:
        return self.block_size or 128

    def tensors(self) -> Tensors:
        """All inputs of the node by name."""
        rng = np.random.default_rng([self.seed, self.n, self.k])
        a, bias = self.activations_and_bias(rng)
        codes = rng.choice(NUMBERS, (self.n, self.k))
        scales = rng.uniform(0.5, 1.5, (self.n, -(-self.k // self.block)))
        scales /= np.std(E4M3_VALUES[NUMBERS]) * np.sqrt(self.k)
        tensors = {**a, "B": codes.view(E4M3), "b_scale": scales.astype(np.float32)}
        if self.a_scale:  # N(0, 1) inputs are some dozen steps of it
            tensors["a_scale"] = np.array(rng.uniform(0.5, 1.5) / 64, np.float32)
        return {**tensors, **bias}

    def operands(self, tensors: Tensors) -> tuple[np.ndarray, np.ndarray]:
        """A as it is multiplied, and the weights, float64."""
        a = tensors["A"].astype(np.float64)
        if self.a_scale:
            a = reference.quantize_fp8(tensors["A"], float(tensors["a_scale"].reshape(())))
        return a, reference.fp8_weights(tensors["B"], tensors["b_scale"], self.block)

    def expected(self, tensors: Tensors) -> np.ndarray:
        """What the oracle says, float64."""
        inputs = {name: tensors.get(name) for name in ("a_scale", "bias")}
        return reference.matmul_fp8_weight(
            tensors["A"], tensors["B"], tensors["b_scale"], **inputs, **self.attributes()
        )


@dataclass(frozen=True)
class Fp4WeightCase(_BlockQuantizedCase):
    """A MatMulBlockQuantizedFp4Weight node and its inputs. K is even."""

    op_type = "MatMulBlockQuantizedFp4Weight"
    format = "nvfp4"

    @property
    def block(self) -> int:
        return self.block_size or 16

    def tensors(self) -> Tensors:
        """All inputs of the node by name."""
        rng = np.random.default_rng([self.seed, self.n, self.k])
        a, bias = self.activations_and_bias(rng)
        scales = 64 * rng.uniform(0.5, 1.5, (self.n, -(-self.k // self.block)))
        tensors = {
            **a,
            "B": rng.integers(0, 256, (self.n, self.k // 2), dtype=np.uint8),
            "weight_scale": round_to_e4m3(scales.astype(np.float32)).view(np.uint8),
            "weight_scale_2": np.array(1 / (64 * 2.6 * np.sqrt(self.k)), np.float32),
        }
        if self.a_scale:
            tensors["input_scale"] = np.array(7.0, np.float32)
        return {**tensors, **bias}

    def operands(self, tensors: Tensors) -> tuple[np.ndarray, np.ndarray]:
        """A, and the weights, float64."""
        weights = reference.fp4_weights(
            tensors["B"], tensors["weight_scale"], tensors["weight_scale_2"], self.block
        )
        return tensors["A"].astype(np.float64), weights

    def expected(self, tensors: Tensors) -> np.ndarray:
        """What the oracle says, float64."""
        names = ("B", "weight_scale", "weight_scale_2", "input_scale", "bias")
        inputs = [tensors.get(name) for name in names]
        return reference.matmul_fp4_weight(tensors["A"], *inputs, **self.attributes())
