"""Sessions: memory, threads, several at once, CUDA graphs and streams of the user's."""

from __future__ import annotations

import dataclasses
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from helpers.cases import Case, MatMulNBitsCase, QMoECase, feeds_of
from helpers.dtypes import FLOAT_DTYPES
from helpers.gpu import Driver
from helpers.memory import MEGABYTE, big_model, session_cost
from helpers.models import save_external
from helpers.run import bits_of, open_session, run, session_options
from helpers.tolerance import check
from onnx import TensorProto, helper

pytestmark = pytest.mark.usefixtures("library")

# Size of the weights of the memory test. 1024 takes some seconds and 1 GB of disk.
WEIGHTS_MB = int(os.environ.get("QMOE_PLUGIN_TEST_WEIGHTS_MB", "256"))

CONCURRENT = [
    QMoECase(dtype="float16", tokens=3, experts=8, k=3),
    QMoECase("int8", 0, tokens=40, experts=8, k=3, hidden=128, inter=64),
    QMoECase("mxfp4", dtype="bfloat16", tokens=20, quant_type="wfp4afp8", act_scales="experts"),
    MatMulNBitsCase(dtype="bfloat16", m=5, n=200, k=480),
    MatMulNBitsCase("int8", m=70, n=64, k=160, zero_points="packed"),
]


def variants(case: Case, count: int) -> list[dict[str, np.ndarray]]:
    """Different activations for the same weights."""
    rng = np.random.default_rng(1)
    feeds = feeds_of(case.tensors())
    return [
        {
            name: rng.standard_normal(array.shape).astype(array.dtype)
            for name, array in feeds.items()
        }
        for _ in range(count)
    ]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("case", CONCURRENT, ids=str)
def test_many_threads_run_one_session(case: Case, threads: int, device: str) -> None:
    """The same bits as one run after another."""
    session = open_session(case.model(case.tensors()), device, threads=threads)
    inputs = variants(case, 24)
    expected = [bits_of(run(session, feeds)) for feeds in inputs]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            results = list(pool.map(lambda feeds: bits_of(run(session, feeds)), inputs))
            assert results == expected


def test_sessions_beside_each_other(device: str) -> None:
    """Made, run and dropped at the same time in several threads, each with weights of its own."""

    def work(seed: int) -> None:
        for case in CONCURRENT:
            mine = dataclasses.replace(case, seed=seed)
            tensors = mine.tensors()
            session = open_session(mine.model(tensors), device)
            check(mine, tensors, run(session, feeds_of(tensors)))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(8)))


def test_sessions_one_after_the_other(device: str) -> None:
    """onnxruntime unloads the library with the last session; the next one must find it whole."""
    case = CONCURRENT[0]
    tensors = case.tensors()
    for _ in range(5):
        check(case, tensors, run(open_session(case.model(tensors), device), feeds_of(tensors)))


def test_two_sessions_share_options(device: str) -> None:
    case = CONCURRENT[0]
    tensors = case.tensors()
    options = session_options()
    sessions = [open_session(case.model(tensors), device, options=options) for _ in range(2)]
    for session in sessions:
        check(case, tensors, run(session, feeds_of(tensors)))


def test_several_nodes_share_initializers(device: str) -> None:
    """Two nodes of one graph with the same weights, one after the other."""
    case = QMoECase(tokens=4)
    tensors = case.tensors()
    model = case.model(tensors)
    second = onnx.NodeProto()
    second.CopyFrom(model.graph.node[0])
    second.name, second.input[0], second.output[0] = "second", "output", "twice"
    model.graph.node.append(second)
    model.graph.output[0].name = "twice"
    result = run(open_session(model, device), feeds_of(tensors))
    once = case.expected(tensors).astype(np.float32)
    expected = case.expected({**tensors, "input": once})
    np.testing.assert_allclose(result, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("level", ["ORT_DISABLE_ALL", "ORT_ENABLE_ALL"])
def test_graph_optimisation_levels(level: str, device: str) -> None:
    for case in CONCURRENT:
        tensors = case.tensors()
        options = session_options()
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
        session = open_session(case.model(tensors), device, options=options)
        check(case, tensors, run(session, feeds_of(tensors)))


def test_memory_pattern_and_arena_off(device: str) -> None:
    for case in CONCURRENT:
        tensors = case.tensors()
        options = session_options()
        options.enable_mem_pattern = False
        options.enable_cpu_mem_arena = False
        session = open_session(case.model(tensors), device, options=options)
        check(case, tensors, run(session, feeds_of(tensors)))


# --- memory -----------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.skipif(
    "libasan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer takes memory of its own"
)
def test_memory_of_a_session_with_external_data(tmp_path: Path, device: str) -> None:
    """Raw weights are never held beside the packed ones: not on the host, not on the GPU.

    And closed sessions give all of it back.
    """
    path, packed = big_model(tmp_path, WEIGHTS_MB)
    cost = session_cost(path, device)
    host_packed = packed if device == "cpu" else 0
    limit = host_packed + 64 * MEGABYTE
    assert cost["host_anonymous"] <= limit, (cost, packed)
    assert cost["host_anonymous_peak"] <= limit, (cost, packed)
    raw = (tmp_path / "big.data").stat().st_size
    assert cost["host_peak"] <= raw + limit, (cost, raw, packed)
    assert cost["host_file"] <= 64 * MEGABYTE, (cost, packed)
    assert cost["host_left"] <= 64 * MEGABYTE, (cost, packed)
    assert cost["device"] <= 1.05 * packed, (cost, packed)
    held = cost["host_anonymous"] if device == "cpu" else cost["device"]
    assert held >= 0.9 * packed, f"the weights must be somewhere: {cost}, packed {packed}"


def test_external_data_gives_the_same_bits(tmp_path: Path, device: str) -> None:
    case = QMoECase(dtype="float16", tokens=5, zero_points=True)
    tensors = case.tensors()
    model = case.model(tensors)
    inside = run(open_session(model, device), feeds_of(tensors))
    session = open_session(save_external(model, tmp_path), device)
    for _ in range(2):
        assert bits_of(run(session, feeds_of(tensors))) == bits_of(inside)


# --- CUDA graphs and streams ------------------------------------------------------------------


def with_float32_io(case: Case) -> onnx.ModelProto:
    """The case's model behind Casts, so that all inputs and the output are float32."""
    model = case.model(case.tensors())
    graph = model.graph
    if case.dtype == "float32":
        return model
    node = graph.node[0]
    casts = []
    for value in graph.input:
        renamed = f"{value.name}_cast"
        casts.append(
            helper.make_node("Cast", [value.name], [renamed], to=value.type.tensor_type.elem_type)
        )
        node.input[list(node.input).index(value.name)] = renamed
        value.type.tensor_type.elem_type = TensorProto.FLOAT
    node.output[0] = "output_cast"
    last = helper.make_node("Cast", ["output_cast"], ["output"], to=TensorProto.FLOAT)
    nodes = [*casts, node, last]
    copies = [onnx.NodeProto.FromString(n.SerializeToString()) for n in nodes]
    del graph.node[:]
    graph.node.extend(copies)
    graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT
    return model


GPU_CASES = [
    case
    for dtype in FLOAT_DTYPES
    for case in (
        QMoECase(dtype=dtype, tokens=1, experts=8, k=4, hidden=128, inter=192),
        QMoECase(dtype=dtype, tokens=24, experts=8, k=3, zero_points=True),
        QMoECase(dtype=dtype, tokens=200, experts=8, k=2, hidden=128, inter=128),
        QMoECase("mxfp4", dtype=dtype, tokens=9, quant_type="wfp4afp8"),
        QMoECase("mxfp4", dtype=dtype, tokens=9, quant_type="wfp4afp8", act_scales="experts"),
        MatMulNBitsCase(dtype=dtype, m=1, n=200, k=480),
        MatMulNBitsCase(dtype=dtype, m=40, n=72, k=160),
    )
]


def check_on_device_buffers(case: Case, session: ort.InferenceSession, rounds: int) -> None:
    """Runs with inputs and output bound to GPU buffers, whose content changes every round."""
    dtype = case.output_dtype
    tensors = case.tensors()
    binding = session.io_binding()
    values = {}
    for name, array in feeds_of(tensors).items():
        values[name] = ort.OrtValue.ortvalue_from_numpy(array.astype(np.float32), "cuda", 0)
        binding.bind_ortvalue_input(name, values[name])
    shape = case.expected(tensors).shape
    output = ort.OrtValue.ortvalue_from_shape_and_type(shape, np.float32, "cuda", 0)
    binding.bind_ortvalue_output("output", output)
    for feeds in variants(case, rounds):
        for name, array in feeds.items():
            values[name].update_inplace(array.astype(np.float32))
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        check(case, {**tensors, **feeds}, output.numpy().astype(dtype))


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("graph", [False, True], ids=["no_graph", "graph"])
@pytest.mark.parametrize("case", GPU_CASES, ids=lambda case: f"{case.op_type}-{case}")
def test_cuda_graph(case: Case, graph: bool) -> None:
    """Captured once, replayed with other inputs, routing included."""
    options = {"enable_cuda_graph": "1" if graph else "0"}
    session = open_session(with_float32_io(case), "cuda", provider_options=options)
    check_on_device_buffers(case, session, rounds=6)


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("case", GPU_CASES[:5], ids=lambda case: f"{case.op_type}-{case}")
def test_user_compute_stream(case: Case) -> None:
    driver = Driver()
    with driver.stream() as stream:
        options = {"user_compute_stream": str(stream)}
        session = open_session(with_float32_io(case), "cuda", provider_options=options)
        check_on_device_buffers(case, session, rounds=4)
        driver.synchronize()
        del session
