"""Nodes timed alone, as `bench` does on CUDA: here on the CPU, which has no CUDA graph."""

import dataclasses
import json

import numpy as np
import onnx
import pytest
from helpers.cases import QMoECase, feeds_of
from helpers.models import save_external
from onnx import helper

import qmoe_plugin.bench as benching
from qmoe_plugin.bound import bind_on_device
from qmoe_plugin.commands import bench as command
from qmoe_plugin.devices import CPU
from qmoe_plugin.html_report import make_page
from qmoe_plugin.node_times import nodes_of_our_ops, time_nodes, values_around
from qmoe_plugin.ort_values import to_array
from qmoe_plugin.sample_inputs import Wanted
from qmoe_plugin.taps import Source, cut_out, default_providers, open_as_is, run_nodes
from qmoe_plugin.verify import verify

pytestmark = pytest.mark.usefixtures("library")

SECOND = "output2"


def two_nodes(folder, domain="com.microsoft", dtype="float32"):
    """A model of two QMoE nodes, the second one behind the first, unnamed and with a Constant."""
    case = QMoECase(inter=64, dtype=dtype)
    tensors = case.tensors()
    model = case.model(tensors, domain)
    second = onnx.NodeProto.FromString(model.graph.node[0].SerializeToString())
    second.name, second.output[0], second.input[0] = "", SECOND, "output"
    scales = next(t for t in model.graph.initializer if t.name == "fc2_scales")
    second.input[list(second.input).index("fc2_scales")] = "constant_scales"
    model.graph.node.extend([
        helper.make_node("Constant", [], ["constant_scales"], value=scales),
        second,
    ])  # fmt: skip
    element = model.graph.output[0].type.tensor_type.elem_type
    model.graph.output.append(helper.make_tensor_value_info(SECOND, element, None))
    return save_external(model, folder), feeds_of(tensors)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_node_alone_does_what_it_does_in_the_model(dtype, tmp_path):
    path, feeds = two_nodes(tmp_path, "qmoe_plugin", dtype)
    source = Source.read(path)
    values = values_around(source, CPU, feeds)
    for output, node in nodes_of_our_ops(source).items():
        proto, read = cut_out(source, {output: node}, values, {})
        assert list(read) == sorted(["output" if output == SECOND else "input", "router_probs"])
        session = open_as_is(proto, source.folder, default_providers(CPU))
        binding = bind_on_device(session, read, {output: values[output]})
        session.run_with_iobinding(binding)
        (found,) = binding.get_outputs()
        np.testing.assert_array_equal(to_array(found), values[output])


def test_nodes_cut_out_together_do_not_read_each_other(tmp_path):
    """What one gives and the other one reads is both given and fed."""
    path, feeds = two_nodes(tmp_path, "qmoe_plugin")
    source = Source.read(path)
    nodes, values = nodes_of_our_ops(source), values_around(source, CPU, feeds)
    found = run_nodes(
        source, default_providers(CPU), nodes, {**values, "output": feeds["input"]}, {}
    )
    (alone,) = run_nodes(
        source, default_providers(CPU), {"output": nodes["output"]}, feeds, {}
    ).values()
    np.testing.assert_array_equal(found["output"], alone)
    np.testing.assert_array_equal(found[SECOND], alone)  # the same weights, the same input
    report = verify(path, path, inputs=Wanted(feeds), cpu=True)
    assert [node.own.max for node in report.nodes] == [0, 0]


@pytest.mark.parametrize("domain", ["com.microsoft", "qmoe_plugin"])
def test_times(domain, tmp_path):
    path, feeds = two_nodes(tmp_path, domain)
    source = Source.read(path)
    times, refused = time_nodes(source, CPU, values_around(source, CPU, feeds), repeat=2)
    assert list(times) == ["node", SECOND]
    assert all(us > 0 for us in times.values())
    assert not refused


def test_a_node_that_does_not_run_alone(tmp_path):
    path, feeds = two_nodes(tmp_path)
    source = Source.read(path)
    values = values_around(source, CPU, feeds)
    values[SECOND] = values[SECOND][:, 1:]
    with pytest.raises(KeyError):
        time_nodes(source, CPU, {}, repeat=1)
    times, refused = time_nodes(source, CPU, values, repeat=1)
    assert list(times) == ["node"]
    assert list(refused) == [SECOND]
    assert refused[SECOND].startswith(f"{SECOND} alone does not run: ")


@pytest.fixture
def alone(monkeypatch):
    """Has nodes timed as on a device whose profiles see launches only."""
    monkeypatch.setattr(benching, "_profiles", lambda where: False)


@pytest.mark.usefixtures("alone")
def test_bench(tmp_path):
    path, feeds = two_nodes(tmp_path)
    report = benching.bench(path, inputs=Wanted(feeds), repeat=2, cpu=True)
    assert [node.name for node in report.nodes] == ["node", SECOND]
    assert all(node.ours_us > 0 and node.stock_us > 0 for node in report.nodes)
    made = json.loads(json.dumps(report.to_dict()))
    assert made["nodes_timed"] == benching.ALONE
    assert made["ours"]["others_us"] is None
    assert made["ours"]["nodes_us"].keys() == {"node", SECOND}
    text = command._text(report, 10)
    assert "each node alone" in text
    assert "nodes of our ops, us" in text
    assert "other nodes" not in text


@pytest.mark.usefixtures("alone")
def test_what_is_missing_is_said(tmp_path, monkeypatch):
    def only_first(source, where, values, **options):
        times, _ = time_nodes(source, where, values, **options)
        return {"node": times["node"]}, {SECOND: "<no> kernel"}

    monkeypatch.setattr(benching, "time_nodes", only_first)
    path, feeds = two_nodes(tmp_path)
    report = benching.bench(path, inputs=Wanted(feeds), repeat=1, cpu=True)
    assert [node.missing for node in report.nodes] == ["", "<no> kernel"]
    text = command._text(report, 10)
    assert "1 of 2 nodes lack a time; the first: <no> kernel" in text
    assert "nodes of our ops, us" not in text  # a sum of some would look like that of all
    page, sections = make_page(path, inputs=Wanted(feeds), repeat=1, cpu=True)
    assert not any(section.missing for section in sections)
    assert "1 of 2 nodes lack a time; the first: &lt;no&gt; kernel" in page
    assert "each node alone" in page
    assert "nodes of other ops" not in page


def test_no_node_has_a_time(tmp_path):
    path, feeds = two_nodes(tmp_path)
    report = benching.bench(path, inputs=Wanted(feeds), repeat=1, cpu=True)
    empty = dataclasses.replace(report, nodes=())
    assert "times of nodes" not in command._text(empty, 10)
