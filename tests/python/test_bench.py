"""`bench` and `report`: times, loads of experts, and one page that needs nothing else."""

import json
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import onnx
import pytest
from helpers.cases import QMoECase, feeds_of
from helpers.command import error_line, run
from helpers.models import save_external
from helpers.moe_cases import MoECase
from onnx import helper

import qmoe_plugin
from qmoe_plugin.expert_load import expert_load
from qmoe_plugin.sample_inputs import Wanted
from qmoe_plugin.svg import Bar, bars, heat_map

pytestmark = pytest.mark.usefixtures("library")


def save(case, folder, domain="com.microsoft"):
    """A model of the case, and a file with its inputs."""
    tensors = case.tensors()
    np.savez(folder / "inputs.npz", **feeds_of(tensors))
    return save_external(case.model(tensors, domain), folder), folder / "inputs.npz"


def bench(path, inputs, *arguments):
    done = run("bench", path, "--inputs", inputs, "--repeat", 3, "--cpu", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("domain", ["com.microsoft", "qmoe_plugin"])
def test_bench(domain, tmp_path):
    path, inputs = save(QMoECase(inter=64), tmp_path, domain)
    report = json.loads(bench(path, inputs, "--json", "--threads", 1))
    assert report["repeat"] == 3
    assert report["shapes"] == {"input": [3, 64], "router_probs": [3, 4]}
    (node,) = report["nodes"]
    assert (node["name"], node["op_type"]) == ("node", "QMoE")
    for who in ("ours", "stock"):
        times = report[who]
        assert 0 < times["min_ms"] <= times["median_ms"]
        assert times["load_s"] > 0
        assert node[f"{who}_us"] == times["nodes_us"]["node"]
        # The node is most of the model, but no more than all of it (the profiler costs time too).
        assert 0 < node[f"{who}_us"] < 1e3 * times["median_ms"] * 5
    text = bench(path, inputs)
    assert re.search(r"^node  QMoE +\d+ +\d+ +\d", text, re.MULTILINE)
    assert "nodes of our ops, us" in text


def test_bench_leaves_no_files(tmp_path):
    path, inputs = save(QMoECase(inter=64), tmp_path)
    before = sorted(tmp_path.iterdir())
    bench(path, inputs)
    assert sorted(tmp_path.iterdir()) == before


def test_stock_that_does_not_run(tmp_path):
    path, inputs = save(QMoECase(activation="geglu"), tmp_path)
    report = json.loads(bench(path, inputs, "--json"))
    assert report["stock"] is None
    assert "does not run" in report["stock_reason"]
    assert report["nodes"][0]["stock_us"] is None
    assert "stock: " in bench(path, inputs)


def test_packed_has_no_stock(tmp_path):
    path, inputs = save(QMoECase(), tmp_path)
    packed = tmp_path / "packed.onnx"
    qmoe_plugin.prepack(path, packed)
    report = json.loads(bench(packed, inputs, "--json"))
    assert "QMoE 'node' cannot move back: its weights are packed" in report["stock_reason"]


@pytest.mark.parametrize("verb", ["bench", "report"])
@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--repeat", "0"], "repeat is 0"),
        (["--inputs", "gone.npz"], "gone.npz"),
        ([], "'input_0', may have any size"),
    ],
)
def test_wrong_use(verb, flags, says, tmp_path):
    path, inputs = save(QMoECase(), tmp_path)
    if flags[:1] == ["--repeat"]:
        flags = [*flags, "--inputs", inputs]
    output = [tmp_path / "out.html"] if verb == "report" else []
    done = run(verb, path, *output, *flags)
    assert says in error_line(done)
    assert not (tmp_path / "out.html").exists()


def test_load_of_experts(tmp_path):
    """Of a router whose choices are known."""
    case = QMoECase(tokens=5, experts=4, k=2)
    tensors = case.tensors()
    feeds = feeds_of(tensors)
    feeds["router_probs"] = np.array(
        [[9, 8, 0, 0], [9, 8, 0, 0], [9, 0, 8, 0], [0, 0, 8, 9], [9, 0, 0, 8]], np.float32
    )
    path = save_external(case.model(tensors, "com.microsoft"), tmp_path)
    (load,) = expert_load(path, Wanted(feeds), cpu=True)
    assert load.tokens == (4, 2, 2, 2)


@pytest.mark.parametrize(
    "case",
    [
        QMoECase(shared=1, k=1, rank=3, router_rank=3, tokens=4),
        QMoECase(router_weights=True),
        QMoECase(sparse_mixer=True, normalize=False),
        MoECase(k=3),
    ],
    ids=str,
)
def test_loads_add_up(case, tmp_path):
    path, _ = save(case, tmp_path, "qmoe_plugin")
    (load,) = expert_load(path, Wanted(feeds_of(case.tensors())), cpu=True)
    assert len(load.tokens) == case.experts
    assert sum(load.tokens) == case.tokens * (case.k + case.shared)
    if case.shared:
        assert load.tokens[-1] == case.tokens


class Page:
    """A page that was written: it must be whole by itself."""

    def __init__(self, path):
        self.text = path.read_text()
        for found in re.findall(r"""(?:src|href|url)\s*[=(]""", self.text):
            raise AssertionError(f"the page refers to another file: {found}")
        self.pictures = [
            ElementTree.fromstring(svg) for svg in re.findall("<svg.*?</svg>", self.text, re.DOTALL)
        ]
        ElementTree.fromstring(self.text.split("\n", 1)[1].replace('<meta charset="utf-8">', ""))


def test_report(tmp_path):
    case = MoECase()
    path, inputs = save(case, tmp_path)
    quantized, output = tmp_path / "a<b.onnx", tmp_path / "report.html"
    qmoe_plugin.quantize(path, quantized)
    done = run("report", quantized, output, "--reference", path, "--inputs", inputs, "--cpu",
               "--repeat", 2, "--strict")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"wrote {output}\n"
    page = Page(output)
    assert len(page.pictures) == 5
    assert re.search(r"gemm_\w+\.int4</text>", page.text)
    assert "a&lt;b.onnx" in page.text
    assert re.search(r"int4</text>.*100\.0%", page.text)
    assert re.search(r"\d+\.\d dB", page.text)
    assert "busiest" in page.text


@pytest.mark.gpu
def test_bench_and_report_on_a_gpu(cuda, tmp_path):
    path, inputs = save(QMoECase(hidden=256, inter=256, experts=8, k=2, dtype="float16"), tmp_path)
    done = run("bench", path, "--inputs", inputs, "--repeat", 3, "--json")
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert "sm_" in measured["target"]
    assert all(measured[who]["median_ms"] > 0 for who in ("ours", "stock"))
    assert measured["nodes_timed"].startswith("each node alone")
    (node,) = measured["nodes"]
    assert (node["name"], node["missing"]) == ("node", "")
    # A run of the model is launches, copies and waiting besides; clocks vary, though.
    assert all(
        0 < node[f"{who}_us"] < 2e3 * measured[who]["median_ms"] for who in ("ours", "stock")
    )
    output = tmp_path / "report.html"
    done = run("report", path, output, "--inputs", inputs, "--repeat", 2, "--strict")
    assert done.returncode == 0, done.stderr
    page = Page(output)
    assert len(page.pictures) == 5
    assert re.search(r"(gemv|gemm)_sm\d+\w*\.int4</text>", page.text)
    assert "each node alone" in page.text


def test_report_says_what_is_missing(tmp_path):
    path, inputs = save(QMoECase(activation="geglu"), tmp_path)
    output = tmp_path / "report.html"
    arguments = ("report", path, output, "--inputs", inputs, "--cpu", "--repeat", 2)
    done = run(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert list(report["missing"]) == ["Error of each layer"]
    assert "Not available: " in Page(output).text
    assert "1 parts are missing" in error_line(run(*arguments, "--strict"))


def test_report_of_a_model_without_our_ops(tmp_path):
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "plain",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])],
    )
    onnx.save(helper.make_model(graph, ir_version=10), tmp_path / "plain.onnx")
    done = run("report", tmp_path / "plain.onnx", tmp_path / "r.html", "--json")
    assert len(json.loads(done.stdout)["missing"]) == 3


def test_pictures():
    rows = [Bar("a <b>", (1.0, None), ("one", "-")), Bar("c" * 99, (2.0, 4.0), ("two", "four"))]
    picture = ElementTree.fromstring(bars("t", ("x", "y"), rows))
    space = "{http://www.w3.org/2000/svg}"
    widths = [float(r.get("width")) for r in picture.iter(f"{space}rect")]
    assert widths == [10, 10, 90, 180, 360]
    squares = ElementTree.fromstring(heat_map("t", [("a", [0, 5, 10])]))
    shades = [float(r.get("fill-opacity")) for r in squares.iter(f"{space}rect")]
    assert shades == [0, 0.5, 1]
    assert ElementTree.fromstring(bars("none", ("x",), [])) is not None
