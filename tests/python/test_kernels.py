"""The support table and explanations."""

import dataclasses

import onnx_ir as ir
import pytest
from helpers.cases import MatMulNBitsCase, QMoECase

import qmoe_plugin
from qmoe_plugin import formats
from qmoe_plugin.devices import CPU, Target
from qmoe_plugin.kernels import Explanation, Problem, Verdict, ask

pytestmark = pytest.mark.usefixtures("library")


def node_of(case, domain="com.microsoft"):
    return ir.from_proto(case.model(case.tensors(), domain)).graph[0]


def test_every_format_has_a_kernel_on_the_cpu():
    covered = {kernel.format for kernel in qmoe_plugin.kernels() if kernel.device == "CPU"}
    assert covered == {*formats.FORMATS, *formats.PLAIN_FORMATS}


def test_rows_are_complete():
    for kernel in qmoe_plugin.kernels():
        assert kernel.name.endswith(f".{kernel.format}")
        assert kernel.limits
        assert set(kernel.dtypes) <= {"float32", "float16", "bfloat16"}
        assert (kernel.min_sm > 0) == (kernel.device == "CUDA")
        assert kernel.min_sm <= kernel.max_sm


def test_names_are_unique():
    names = [kernel.name for kernel in qmoe_plugin.kernels()]
    assert len(set(names)) == len(names)


def test_explain_a_qmoe_node():
    case = QMoECase(hidden=64, inter=96, experts=4, k=2, zero_points=True, dtype="float16")
    fc1, fc2 = qmoe_plugin.explain(node_of(case), sm=0, tokens=5)
    assert fc1.problem == Problem(
        stage="fc1",
        format="int4",
        n=192,
        k=64,
        rows=10,
        topk=2,
        dtype="float16",
        activation="swiglu",
        experts=4,
        block_size=32,
        zero_points=True,
    )
    assert fc2.problem == dataclasses.replace(
        fc1.problem, stage="fc2", n=64, k=96, activation="identity"
    )
    assert fc1.kernel in {kernel.name for kernel in qmoe_plugin.kernels()}


def test_explain_a_matmul_nbits_node():
    case = MatMulNBitsCase(format="int8", block_size=16, n=48, k=96)
    (answer,) = qmoe_plugin.explain(node_of(case, "qmoe_plugin"), sm=0, tokens=7)
    assert answer.problem == Problem(
        stage="dense", format="int8", n=48, k=96, rows=7, block_size=16
    )
    assert answer.kernel is not None


def test_explain_a_node_that_is_not_ours():
    node = ir.Node("", "Relu", [ir.Value(name="x")], name="r")
    with pytest.raises(ValueError, match=r"node 'r' \(Relu\): ai.onnx.Relu is not one of our ops"):
        qmoe_plugin.explain(node)


def test_explain_a_node_that_cannot_run():
    node = node_of(QMoECase())
    node.attributes["activation_type"] = ir.AttrString("activation_type", "tanh")
    with pytest.raises(ValueError, match="activation_type is 'tanh'; allowed are identity, relu"):
        qmoe_plugin.explain(node)


def test_shared_experts_count_as_experts_of_a_token():
    case = QMoECase(experts=6, k=2, shared=1)
    fc1, fc2 = qmoe_plugin.explain(node_of(case, "qmoe_plugin"), sm=0, tokens=5)
    for problem in (fc1.problem, fc2.problem):
        assert (problem.topk, problem.rows) == (3, 15)
        assert "3 of 6 experts" in str(problem)


@pytest.mark.parametrize(("topk", "rows"), [(0, 8), (5, 10), (3, 8)])
def test_a_problem_with_an_impossible_topk_is_an_error(topk, rows):
    problem = Problem(stage="fc1", format="int4", n=8, k=32, experts=4, topk=topk, rows=rows)
    message = f"topk is {topk}; it must be from 1 to the number of experts, 4, and a divisor"
    with pytest.raises(ValueError, match=message):
        ask(problem)


def test_a_problem_is_asked_as_it_is():
    problem = Problem(stage="dense", format="int4", n=8, k=32, block_size=32, target=CPU)
    (answer,) = qmoe_plugin.explain(problem)
    assert answer == ask(problem)
    assert answer.problem is problem


def test_the_first_kernel_that_does_not_refuse_is_the_one():
    answer = Explanation(
        Problem(stage="dense", format="int4", n=8, k=32),
        (Verdict("a", "too small"), Verdict("b", ""), Verdict("c", "")),
    )
    assert answer.kernel == "b"
    assert answer.refusals == "a: too small"
    assert str(answer).splitlines() == [
        "dense int4 per channel, 8 x 32, 1 row, float32, CPU: b",
        "  a: too small",
        "  b: runs it",
        "  c: can run it",
    ]


def test_cuda_without_a_suitable_device_says_why():
    problem = Problem(stage="dense", format="int4", n=8, k=32, target=Target("CUDA", 50))
    answer = ask(problem)
    assert answer.kernel is None
    for text in (answer.refusals, str(answer)):
        assert "sm_50" in text


def test_a_processor_that_may_not_use_its_vectors(monkeypatch):
    problem = Problem(stage="dense", format="int4", n=64, k=64, block_size=32)
    monkeypatch.setenv("QMOE_PLUGIN_CPU_ISA", "reference")
    answer = ask(problem)
    assert answer.kernel == "gemm_reference.int4"
    assert all(verdict.refusal for verdict in answer.verdicts[:-1])


@pytest.mark.parametrize(
    "wrong", [{"format": "int3"}, {"dtype": "float64"}, {"activation": "tanh"}, {"stage": "fc4"}]
)
def test_a_problem_with_an_unknown_name_is_an_error(wrong):
    problem = dataclasses.replace(Problem(stage="dense", format="int4", n=8, k=32), **wrong)
    with pytest.raises(ValueError, match=next(iter(wrong.values()))):
        ask(problem)
