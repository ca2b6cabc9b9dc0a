"""The pass `moe` of `fuse` on experts in a Loop, and in an If: what it takes, what it refuses."""

import copy

import numpy as np
import onnx
import pytest
from helpers.command import run
from helpers.quantized import initializers
from helpers.run import open_session
from onnx import TensorProto, helper, numpy_helper

import qmoe_plugin

pytestmark = pytest.mark.usefixtures("library")

H, INTER, E, K = 64, 32, 4, 2
FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL


def value(name, kind=FLOAT, shape=None):
    return helper.make_tensor_value_info(name, kind, shape)


def expert(index, before, after, activation="Sigmoid"):
    """Adds what an expert makes of all tokens, with 0 for those that did not choose it."""
    return [
        helper.make_node("Gather", ["gates", index], ["w1"]),
        helper.make_node("Gather", ["ups", index], ["w3"]),
        helper.make_node("Gather", ["downs", index], ["w2"]),
        helper.make_node("MatMul", ["x", "w1"], ["gate"]),
        helper.make_node("MatMul", ["x", "w3"], ["up"]),
        helper.make_node(activation, ["gate"], ["active"]),
        helper.make_node("Mul", ["gate", "active"], ["silu"]),
        helper.make_node("Mul", ["silu", "up"], ["hidden"]),
        helper.make_node("MatMul", ["hidden", "w2"], ["y"]),
        helper.make_node("Unsqueeze", ["mine", "last"], ["factor"]),
        helper.make_node("Mul", ["y", "factor"], ["part"]),
        helper.make_node("Add", [before, "part"], [after]),
    ]


def branch(nodes, output, constants=()):
    return helper.make_graph(nodes, "branch", [], [value(output)], constants)


def skipping(index, before, after, condition="used", inside=False, **options):
    """The same in an If, for experts that some token chose."""
    constants = []
    if inside:  # weights that only the branch has
        rng = np.random.default_rng(1)
        constants = [numpy_helper.from_array(weights(rng, (E, INTER, H)), "downs")]
    then = branch(expert(index, before, "added", **options), "added", constants)
    other = branch([helper.make_node("Identity", [before], ["same"])], "same")
    odd = [
        helper.make_node("Mod", [index, "two"], ["odd"]),
        helper.make_node("Cast", ["odd"], ["is_odd"], to=BOOL),
    ]
    return [
        helper.make_node("ReduceMax", ["mine"], ["most"], keepdims=0),
        helper.make_node("Greater", ["most", "zero"], ["used"]),
        *(odd if condition == "is_odd" else []),
        helper.make_node("If", [condition], [after], "if", then_branch=then, else_branch=other),
    ]


def weights(rng, shape):
    return (rng.standard_normal(shape) / np.sqrt(shape[-2])).astype(np.float32)


def model(content=expert, runs="runs", again="true", collects=False, **options):
    """A router, and a Loop over the experts."""
    rng = np.random.default_rng(0)
    body_nodes = [
        helper.make_node("Gather", ["factors", "index"], ["mine"], axis=1),
        *content("index", "before", "after", **options),
        helper.make_node("Identity", [again], ["go_on"]),
    ]
    outputs = [value("go_on", BOOL), value("after", FLOAT, ["tokens", H])]
    outputs += [value("mine", FLOAT, ["tokens"])] if collects else []
    given = [value("index", INT64, []), value("going", BOOL, [])]
    given.append(value("before", FLOAT, ["tokens", H]))
    body = helper.make_graph(body_nodes, "body", given, outputs)
    nodes = [
        helper.make_node("MatMul", ["x", "router"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["scores"], axis=-1),
        helper.make_node("TopK", ["scores", "k"], ["best", "chosen"], "topk"),
        helper.make_node("ReduceSum", ["best", "last"], ["total"]),
        helper.make_node("Div", ["best", "total"], ["normal"]),
        helper.make_node("Mul", ["scores", "zero"], ["none"]),
        helper.make_node("ScatterElements", ["none", "chosen", "normal"], ["factors"], axis=1),
        helper.make_node("Mul", ["x", "zero"], ["start"]),
        helper.make_node(
            "Loop",
            [runs, "true", "start"],
            ["result", "all"] if collects else ["result"],
            "loop",
            body=body,
        ),
        helper.make_node("Add", ["result", "x"], ["out"]),
    ]
    constants = {
        "router": weights(rng, (H, E)) * 3,
        "gates": weights(rng, (E, H, INTER)),
        "ups": weights(rng, (E, H, INTER)),
        "downs": weights(rng, (E, INTER, H)),
        "k": np.array([K]),
        "last": np.array([-1]),
        "two": np.array(2),
        "runs": np.array(E),
        "zero": np.array(0, np.float32),
        "true": np.array(True),
    }
    if options.get("inside"):
        del constants["downs"]
    tensors = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    inputs = [value("x", FLOAT, ["tokens", H])]
    inputs += [value(runs, INT64, [])] if runs not in constants else []
    graph = helper.make_graph(nodes, "g", inputs, [value("out", FLOAT, ["tokens", H])], tensors)
    made = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 21)])
    onnx.checker.check_model(made)
    return made


def results(proto):
    rng = np.random.default_rng(2)
    session = open_session(proto)
    tokens = [rng.standard_normal((n, H)).astype(np.float32) for n in (1, 3, 40)]
    return [session.run(None, {"x": x})[0] for x in tokens]


def unrolled():
    """Ifs, one for each expert, and no Loop around them."""
    made = model(skipping)
    nodes = list(made.graph.node)
    (loop,) = (node for node in nodes if node.op_type == "Loop")
    body = loop.attribute[0].g
    place, before = nodes.index(loop), "start"
    written = []
    for index in range(E):
        name = f"index{index}"
        made.graph.initializer.append(numpy_helper.from_array(np.array(index), name))
        after = "result" if index == E - 1 else f"after{index}"
        known = {"index": name, "before": before, "after": after}
        for node in body.node[:-1]:
            copied = onnx.NodeProto.FromString(node.SerializeToString())
            rename(copied, known, f".{index}")
            written.append(copied)
        before = after
    del made.graph.node[:]
    made.graph.node.extend([*nodes[:place], *written, *nodes[place + 1 :]])
    onnx.checker.check_model(made)
    return made


def rename(node, known, suffix):
    """Values of the body as one copy of it calls them."""
    shared = {"factors", "x", "gates", "ups", "downs", "last", "zero", "two"}
    for names in (node.input, node.output):
        for place, name in enumerate(names):
            names[place] = known.get(name, name if name in shared else name + suffix)
    node.name = node.name + suffix if node.name else ""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            for inner in attribute.g.node:
                rename(inner, known, suffix)
            for output in attribute.g.output:
                output.name = known.get(output.name, output.name + suffix)


@pytest.mark.parametrize(
    "make",
    [
        model,
        lambda: model(skipping),
        lambda: model(skipping, inside=True),
        lambda: model(again="going"),
        unrolled,
    ],
    ids=["loop", "loop and if", "weights in the branch", "condition handed on", "ifs"],
)
def test_fused(make):
    proto = make()
    before = results(copy.deepcopy(proto))
    (report, *_) = qmoe_plugin.fuse(proto)
    assert report.kept == ()
    assert "selects in a MoE of 4 experts, 2 a token, 64 x 32, swiglu" in report.fused[0].change
    onnx.checker.check_model(proto)
    op_types = [node.op_type for node in proto.graph.node]
    assert op_types == ["MatMul", "MoE", "Add"]
    assert sum(array.ndim == 3 for array in initializers(proto).values()) == 2
    for expected, result in zip(before, results(proto), strict=True):
        np.testing.assert_allclose(result, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"runs": "n"}, "how often it runs is not constant"),
        ({"collects": True}, "it collects the results of its runs"),
        ({"content": skipping, "again": "used"}, "it may stop early"),
        ({"content": skipping, "condition": "is_odd"}, "its conditions do more than skip experts"),
        ({"activation": "Tanh"}, "is no activation of the op MoE"),
    ],
    ids=["count", "collects", "stops", "condition", "activation"],
)
def test_what_stays(options, why):
    proto = model(**options)
    before = copy.deepcopy(proto)
    (report, *_) = qmoe_plugin.fuse(proto)
    assert report.fused == ()
    (kept,) = report.kept
    assert kept.name == "topk"
    assert kept.reason.startswith("its experts are in the Loop 'loop': ")
    assert why in kept.reason
    assert [node.op_type for node in proto.graph.node] == [
        node.op_type for node in before.graph.node
    ]
    assert initializers(proto).keys() == initializers(before).keys()
    if len(proto.graph.input) == 1:
        for expected, result in zip(results(before), results(proto), strict=True):
            np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("make", [model, unrolled], ids=["loop", "ifs"])
def test_an_if_behind_the_experts_stays(make):
    """It depends on the TopK, too, and what it skips has nothing to do with experts."""
    proto = make()
    then = branch([helper.make_node("MatMul", ["out", "square"], ["turned"])], "turned")
    other = branch([helper.make_node("Identity", ["out"], ["as_is"])], "as_is")
    proto.graph.node.extend([
        helper.make_node("ReduceMax", ["out"], ["most"], keepdims=0),
        helper.make_node("Greater", ["most", "zero"], ["positive"]),
        helper.make_node("If", ["positive"], ["end"], "if", then_branch=then, else_branch=other),
    ])  # fmt: skip
    square = weights(np.random.default_rng(3), (H, H))
    proto.graph.initializer.append(numpy_helper.from_array(square, "square"))
    proto.graph.output[0].name = "end"
    before = results(copy.deepcopy(proto))
    (report, *_) = qmoe_plugin.fuse(proto)
    assert len(report.fused) == 1
    op_types = [node.op_type for node in proto.graph.node]
    assert [op_types.count(name) for name in ("MoE", "If", "Loop")] == [1, 1, 0]
    for expected, result in zip(before, results(proto), strict=True):
        np.testing.assert_allclose(result, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_experts_of_a_loop_that_is_not_all_stay():
    """A Loop behind which more depends on the choice alone: there, nothing is a whole MoE."""
    proto = model()
    (loop,) = (node for node in proto.graph.node if node.op_type == "Loop")
    body = loop.attribute[0].g
    body.node.insert(0, helper.make_node("Add", ["before", "extra"], ["more"]))
    for node in body.node[1:]:
        node.input[:] = ["more" if name == "before" else name for name in node.input]
    rng = np.random.default_rng(4)
    proto.graph.initializer.append(numpy_helper.from_array(weights(rng, (H, H))[0], "extra"))
    before = copy.deepcopy(proto)
    (report, *_) = qmoe_plugin.fuse(proto)
    assert report.fused == ()
    assert "a MoE of its experts computes something else" in report.kept[0].reason
    assert proto.graph.node == before.graph.node


def test_a_scan_stays():
    proto = model()
    (node,) = (node for node in proto.graph.node if node.op_type == "Loop")
    node.op_type = "Scan"
    (report, *_) = qmoe_plugin.fuse(proto)
    (kept,) = report.kept
    text = "its experts are in the Scan 'loop': only Loop and If can be written out"
    assert kept.reason == text


def test_one_of_two_layers():
    """What cannot be fused stays a Loop, beside a MoE."""
    first, second = model(), onnx.compose.add_prefix(model(activation="Tanh"), "b.")
    both = onnx.compose.merge_models(first, second, io_map=[("out", "b.x")])
    onnx.checker.check_model(both)
    before = results(copy.deepcopy(both))
    (report, *_) = qmoe_plugin.fuse(both)
    assert ([n.name for n in report.fused], [n.name for n in report.kept]) == (["topk"], ["b.topk"])
    assert [node.op_type for node in both.graph.node].count("Loop") == 1
    for expected, result in zip(before, results(both), strict=True):
        np.testing.assert_allclose(result, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_the_command_names_the_loop(tmp_path):
    path, output = tmp_path / "loop.onnx", tmp_path / "fused.onnx"
    onnx.save(model(collects=True), path)
    done = run("fuse", path, output, "--only", "moe")
    assert done.returncode == 1
    assert (
        "TopK 'topk': its experts are in the Loop 'loop': it collects the results of its runs"
        in done.stdout
    )
    onnx.save(model(skipping), path)
    done = run("fuse", path, output, "--dry-run")
    assert (done.returncode, output.exists()) == (0, True)
    assert "moe: would change 1 of 1 nodes" in done.stdout
