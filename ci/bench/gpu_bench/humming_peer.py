"""The strongest open peer, humming-kernels: layers of experts and dense products by its kernels.

What a call covers: for wfp4afp8 the rounding of x; the product with gates and ups, which gathers;
SiLU of gates times ups; the product with downs; the weighted sum of a token's experts, by a kernel
of ours, as it has none. Not covered: router, top-k, sorting by expert (made before the graph) and
biases. Its int8 and fp8 have a scale a row. With many tokens its other kind of product, whose rows
are sorted before (timed), is tried too, and the faster one counts.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from typing import Any

import humming.transform
import numpy as np
import torch
from humming import dtypes
from humming import ops as humming_ops
from humming.forward import may_process_input
from humming.kernel.humming import HummingKernel
from humming.schema import HummingInputSchema, HummingWeightSchema
from humming.transform import prepare_fp16_e8m0_scale, prepare_layer_config
from humming.tune import get_heuristics_config

from .cases import Case
from .device import Device
from .humming_route import combine, offsets_and_places, sorted_by_expert
from .measure import Effort, take_times
from .player import DRAWS, Inputs
from .results import summarize
from .weights import RandomFiles

Tensors = dict[str, dict[str, torch.Tensor]]  # of each product, by name

# Our format: codes, scales ("" = of the activation type), codes that share one, activations
# ("" = as the case says).
FORMATS = {
    "int4": ("int4", "", 32, ""),
    "mxfp4": ("float4e2m1", "float8e8m0", 32, "bfloat16"),
    "wfp4afp8": ("float4e2m1", "float8e8m0", 32, "float8e4m3"),
    "int8": ("int8", "", 0, "bfloat16"),
    "fp8": ("float8e4m3", "", 0, "bfloat16"),
}
INDEXED, SORTED, DENSE = "indexed", "grouped_contiguous", "dense"
SORTED_TOKENS = 512  # from which on SORTED is tried
PADDING = {"pad_n_to_multiple": 256, "pad_k_to_multiple": 128}
SILU = {"activation_type": "binary_split", "activation_impl": "(a / (1.f + expf(-a))) * b"}
MOST_SETS = 8  # of weights; nodes beyond use them again, with another routing
GRAPHS = 4  # of nodes, each with routings of its own
LOCKS = 16384
_SPREAD = {"int4": 4.6, "int8": 74.0, "float8e4m3": 1.0}  # of random codes' values


def takes(case: Case) -> bool:
    """Whether it has kernels for the case."""
    if case.zero_points or case.format not in FORMATS:
        return False
    return bool(case.experts) or case.format in ("int4", "int8")


def variants(case: Case, tokens: int) -> tuple[str, ...]:
    """Its kinds of product to try."""
    if not case.experts:
        return (DENSE,)
    return (INDEXED, SORTED) if tokens >= SORTED_TOKENS else (INDEXED,)


def _torch_type(case: Case) -> torch.dtype:
    """That of what goes in and out; float8 only lies between."""
    activations = FORMATS[case.format][3] or case.dtype
    return torch.float16 if activations == "float16" else torch.bfloat16


def _schemas(case: Case) -> tuple[HummingWeightSchema, HummingInputSchema]:
    codes, scales, group, activations = FORMATS[case.format]
    weight = HummingWeightSchema(
        b_dtype=dtypes.DataType.from_str(codes),
        bs_dtype=scales or None,
        weight_scale_group_size=group,
    )
    return weight, HummingInputSchema(a_dtype=activations or case.dtype, input_scale_group_size=0)


def _products(case: Case) -> dict[str, tuple[int, int]]:
    """N and K of each product of a layer."""
    if not case.experts:
        return {"dense": (case.inter, case.hidden)}
    return {"up": (2 * case.inter, case.hidden), "down": (case.hidden, case.inter)}


@functools.cache
def _configs(case: Case) -> dict[str, Any]:
    """Its description of each product."""
    weight, activations = _schemas(case)
    return {
        name: prepare_layer_config(
            shape_n=n,
            shape_k=k,
            weight_schema=weight,
            input_schema=activations,
            num_experts=case.experts or None,
            has_bias=False,
            torch_dtype=_torch_type(case),
            device=0,
            **PADDING,
        )
        for name, (n, k) in _products(case).items()
    }


class Schedule:
    """Its own choice of kernels for a case at a number of tokens."""

    def __init__(self, case: Case, tokens: int, gemm_type: str) -> None:
        """Asks its heuristics; compiles nothing."""
        self.case, self.tokens, self.gemm_type = case, tokens, gemm_type
        rows = tokens * max(case.topk, 1)
        self.tuning = {
            name: dict(get_heuristics_config(config, shape_m=rows, gemm_type=gemm_type))
            for name, config in _configs(case).items()
        }

    def block_rows(self, product: str) -> int:
        """Rows of x that one of its blocks works on."""
        return int(self.tuning[product]["block_shape"][0])

    def kernels(self, product: str) -> torch.Tensor:
        """The compiled kernels of a product, as its launcher wants them."""
        return HummingKernel.prepare_kernels(
            _configs(self.case)[product].to_str(),
            json.dumps({"use_f16_accum": False, "gemm_type": self.gemm_type}),
            json.dumps(self.tuning[product]),
            0,
        )

    def compile_tasks(self) -> list[Callable[[], object]]:
        """What compiles all that a layer needs."""
        tasks: list[Callable[[], object]] = [
            functools.partial(self.kernels, product) for product in self.tuning
        ]
        if self.case.experts:
            tasks.append(self._other_kernels)
        return tasks

    def _other_kernels(self) -> None:
        case, dtype, configs = self.case, _torch_type(self.case), _configs(self.case)
        rows = self.tokens * case.topk
        with torch.cuda.device(0):
            x = torch.zeros(self.tokens, case.hidden, device="cuda", dtype=dtype)
            up = torch.zeros(rows, 2 * case.inter, device="cuda", dtype=dtype)
            places = torch.arange(rows, device="cuda", dtype=torch.int32).view(self.tokens, -1)
            may_process_input(configs["down"], up, **SILU)
            if self.gemm_type == SORTED:
                may_process_input(configs["up"], x, layout="scatter", scatter_idx=places)
            else:
                may_process_input(configs["up"], x)
            down = torch.zeros(rows, case.hidden, device="cuda", dtype=dtype)
            combine(down, places.float(), places if self.gemm_type == SORTED else None, x)


def _scale_bytes(weight_scale: torch.Tensor, *args: Any, original: Any, **options: Any) -> Any:
    """Reorders 8-bit scales as bytes: not all of PyTorch takes their type."""
    if weight_scale.element_size() != 1:
        return original(weight_scale, *args, **options)
    found = original(weight_scale.view(torch.uint8), *args, **options)
    return found.view(weight_scale.dtype) if found.element_size() == 1 else found


humming.transform.transform_humming_weight_scale = functools.partial(
    _scale_bytes, original=humming.transform.transform_humming_weight_scale
)


class Weights:
    """Sets of weights of a case: the codes that our op has, in its layout."""

    def __init__(self, case: Case, files: RandomFiles) -> None:
        """Takes the codes from the random files and lets it reorder them."""
        self.sets: list[Tensors] = [{} for _ in range(min(case.nodes(), MOST_SETS))]
        for name, config in _configs(case).items():
            changed, raw = prepare_fp16_e8m0_scale(config, self._raw(case, files, name))
            if changed.to_str() != config.to_str():
                raise ValueError(f"{case.name}: its description of the layer depends on the scales")
            tensors = humming.transform.transform_humming_tensors(config, raw)
            for weights in self.sets:
                weights[name] = {key: value.clone() for key, value in tensors.items()}
                weights[name]["locks"] = torch.zeros(LOCKS, dtype=torch.int32, device="cuda")

    @staticmethod
    def _raw(case: Case, files: RandomFiles, product: str) -> dict[str, torch.Tensor]:
        schema, (n, k) = _schemas(case)[0], _products(case)[product]
        wanted = schema.get_tensors_attrs(
            shape_n=n, shape_k=k, param_dtype=_torch_type(case), num_experts=case.experts or None
        )
        found = {}
        for name, about in wanted.items():
            shape, dtype = about["shape"], about["dtype"]
            size = math.prod(shape) * dtype.itemsize
            if name == "weight":
                kind = "fp8" if case.format == "fp8" else "codes"
            elif dtype == torch.float8_e8m0fnu:
                kind = "e8m0"
            else:
                unit = 1 / (_SPREAD[FORMATS[case.format][0]] * math.sqrt(k))
                values = unit * (0.75 + 0.5 * torch.rand(shape, device="cuda"))
                found[name] = values.to(dtype)
                continue
            path = files.folder / files.name(kind, size)
            data = torch.from_numpy(np.fromfile(path, np.uint8, size)).cuda()
            found[name] = data.view(dtype).view(shape)
        return found


class _Layer:
    """The nodes of a case at a number of tokens, in CUDA graphs."""

    def __init__(self, weights: Weights, schedule: Schedule, inputs: Inputs) -> None:
        """Captures the graphs."""
        case = schedule.case
        self._case, self._schedule, self._weights = case, schedule, weights
        dtype, tokens = _torch_type(case), inputs.x.shape[0]
        float8 = torch.float8_e4m3fn if case.format == "wfp4afp8" else dtype
        rows = tokens * max(case.topk, 1)

        def empty(height: int, width: int, kind: torch.dtype) -> torch.Tensor:
            return torch.empty(height, width, device="cuda", dtype=kind)

        self._x = inputs.x.to(dtype)
        if schedule.gemm_type == SORTED:
            self._sorted_x = empty(rows, case.hidden, float8)
        self._up = empty(rows, 2 * case.inter, dtype)
        self._hidden = empty(rows, case.inter, float8)
        self._down = empty(rows, case.hidden, dtype)
        self.output = empty(tokens, case.hidden if case.experts else case.inter, dtype)
        self._kernels = {name: schedule.kernels(name) for name in schedule.tuning}
        self._routes: dict[tuple[int, int], dict[str, Any]] = {}
        if case.experts:
            for draw in range(GRAPHS):
                for node in range(case.nodes()):
                    self._routes[draw, node] = self._route(inputs.logits[draw % DRAWS, node])
        self._run_nodes(0)  # loads all kernels
        torch.cuda.synchronize()
        self._graphs = [self._capture(draw) for draw in range(GRAPHS)]
        self._next = self._graphs[0]

    def _route(self, logits: torch.Tensor) -> dict[str, Any]:
        case, schedule = self._case, self._schedule
        best, chosen = logits.float().topk(case.topk)
        found: dict[str, Any] = {"factors": best.softmax(-1)}
        if schedule.gemm_type == SORTED:
            found["offsets"], found["places"] = offsets_and_places(chosen, case.experts)
            return found
        for name in schedule.tuning:
            found[name] = sorted_by_expert(chosen, case.experts, schedule.block_rows(name))
        return found

    def _capture(self, draw: int) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._run_nodes(draw)
        return graph

    def _run_nodes(self, draw: int) -> None:
        for node in range(self._case.nodes()):
            weights = self._weights.sets[node % len(self._weights.sets)]
            if self._case.experts:
                self._run_layer(weights, self._routes[draw, node])
            else:
                self._product("dense", weights, {}, self._x, None, self.output, 1)

    def _run_layer(
        self, weights: dict[str, dict[str, torch.Tensor]], route: dict[str, Any]
    ) -> None:
        configs = _configs(self._case)
        if self._schedule.gemm_type == SORTED:
            options = {"layout": "scatter", "scatter_idx": route["places"]}
            x, *scales = may_process_input(
                configs["up"], self._x, outputs=self._sorted_x, **options
            )
        else:
            x, *scales = may_process_input(configs["up"], self._x)
        self._product("up", weights, route, x, _one_of(scales), self._up, self._case.topk)
        hidden, *scales = may_process_input(configs["down"], self._up, outputs=self._hidden, **SILU)
        self._product("down", weights, route, hidden, _one_of(scales), self._down, 1)
        combine(self._down, route["factors"], route.get("places"), self.output)

    def _product(
        self,
        name: str,
        weights: Tensors,
        route: dict[str, Any],
        x: torch.Tensor,
        scale: torch.Tensor | None,
        out: torch.Tensor,
        topk: int,
    ) -> None:
        options: dict[str, Any] = {}
        if self._schedule.gemm_type == INDEXED:
            rows, experts, total = route[name]
            options = {"sorted_ids": rows, "expert_ids": experts, "num_tokens_padded": total}
            options["top_k"] = topk
        elif self._schedule.gemm_type == SORTED:
            options = {"expert_layout": route["offsets"]}
        tensors = weights[name]
        humming_ops.launch_kernel(
            configs=self._kernels[name],
            inputs=x,
            weight=tensors["weight"],
            weight_scale=tensors["weight_scale"],
            weight_scale_2=tensors.get("weight_scale_2"),
            input_scale=scale,
            outputs=out,
            locks=tensors["locks"],
            **options,
        )

    def draw(self, number: int) -> None:
        """Chooses the routing of the next run."""
        self._next = self._graphs[number % GRAPHS]

    def run(self) -> None:
        """Starts a run."""
        self._next.replay()


def _one_of(scales: list[torch.Tensor | None]) -> torch.Tensor | None:
    """Scales of groups if there are any, else those of rows."""
    return next((scale for scale in scales if scale is not None), None)


class Peer:
    """Measures it."""

    def __init__(self, device: Device, files: RandomFiles, effort: Effort) -> None:
        """Prepares nothing.

        Args:
            device: Where it runs.
            files: Those that our models have their weights in.
            effort: How long to measure.
        """
        self._device, self._files, self._effort = device, files, effort
        self._weights: tuple[Case, Weights] | None = None

    def measure(self, case: Case, tokens: int) -> dict[str, Any]:
        """Times of its fastest variant, or why there are none."""
        try:
            found = [self._measure(case, tokens, kind) for kind in variants(case, tokens)]
        except Exception as error:  # of whatever type its layers raise
            self._device.synchronize()
            return {"refusal": f"{type(error).__name__}: {error}"[:300]}
        return min(found, key=lambda numbers: float(numbers["p50_us"]))

    def _measure(self, case: Case, tokens: int, gemm_type: str) -> dict[str, Any]:
        if self._weights is None or self._weights[0] != case:
            self._weights = None
            torch.cuda.empty_cache()
            self._weights = (case, Weights(case, self._files))
        schedule = Schedule(case, tokens, gemm_type)
        layer = _Layer(self._weights[1], schedule, Inputs(self._device, case, tokens))
        layer.run()
        self._device.synchronize()
        if not bool(layer.output.isfinite().all()) or not bool(layer.output.any()):
            raise ValueError("its result is not finite, or zero")
        times = take_times(self._device, {"humming": layer}, layer.draw, True, self._effort)
        numbers = summarize([value / case.nodes() for value in times["humming"]])
        tiles = {name: tuning["block_shape"] for name, tuning in schedule.tuning.items()}
        return {**numbers, "variant": gemm_type, "tiles": tiles}
