"""Moving nodes between the domains."""

import copy
import errno
import json
import logging
import os

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from helpers.blank import Blank
from helpers.cases import MatMulNBitsCase, QMoECase
from helpers.models import save_external
from onnx import TensorProto, helper

import qmoe_plugin
from qmoe_plugin.devices import CPU
from qmoe_plugin.graph import external_data
from qmoe_plugin.graph.retarget import RESTORE_KEY, Retarget
from qmoe_plugin.library import runtime_minor

pytestmark = pytest.mark.usefixtures("library")

STOCK, OURS = "com.microsoft", "qmoe_plugin"


def stock_model(case=None, *, stated=None):
    """A model as exporters write it; weights_prepacked as given, None = absent."""
    case = case or QMoECase()
    model = case.model(case.tensors(), STOCK)
    (node,) = model.graph.node
    kept = [attribute for attribute in node.attribute if attribute.name != "weights_prepacked"]
    del node.attribute[:]
    node.attribute.extend(kept)
    if stated is not None:
        node.attribute.insert(0, helper.make_attribute("weights_prepacked", stated))
    return model


def attributes_of(node):
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def domains(model):
    return {entry.domain: entry.version for entry in model.opset_import}


@pytest.mark.parametrize("stated", [None, -1, 0])
def test_moves_a_node_writes_down_what_it_decided_and_back(stated):
    model = stock_model(stated=stated)
    before = copy.deepcopy(model)
    report = qmoe_plugin.retarget(model, sm=0)

    (node,) = model.graph.node
    assert node.domain == OURS
    assert attributes_of(node)["weights_prepacked"] == 0
    restore = {entry.key: entry.value for entry in node.metadata_props}
    expected = {} if stated == 0 else {RESTORE_KEY: json.dumps({"weights_prepacked": stated})}
    assert restore == expected
    assert domains(model) == {"": 21, STOCK: 1, OURS: 1}
    (moved,) = report.moved
    assert (moved.name, moved.op_type, report.kept, report.target) == ("node", "QMoE", (), "CPU")
    assert {choice.stage for choice in moved.kernels} == {"fc1", "fc2"}

    back = qmoe_plugin.unretarget(model)
    assert model == before
    assert len(back.moved) == 1


@pytest.mark.parametrize(
    ("blank", "attribute", "value"),
    [
        (Blank(hidden=128, inter=64, layout="transposed"), "weights_prepacked", 1),
        (Blank("fp4", scales="uint8"), "weights_layout", b"raw"),
        (Blank("nvfp4", layout="transposed"), "weights_layout", b"k_major"),
        (Blank("wfp4afp8", scales="uint8", layout="transposed"), "weights_layout", b"k_major"),
        (Blank("fp8"), None, None),
        (Blank("fp8", block_size=0), None, None),
    ],
    ids=str,
)
def test_every_layout_is_written_down_and_taken_back(blank, attribute, value):
    model = blank.model(STOCK)
    before = copy.deepcopy(model)
    assert len(qmoe_plugin.retarget(model, sm=0).moved) == 1
    (node,) = model.graph.node
    written = attributes_of(node)
    assert written.get(attribute) == value
    assert written.keys() - {attribute} == attributes_of(before.graph.node[0]).keys()
    decoded = ir.from_proto(copy.deepcopy(model))
    qmoe_plugin.unretarget(model)
    assert model == before
    qmoe_plugin.unretarget(decoded)
    assert ir.to_proto(decoded) == ir.to_proto(ir.from_proto(before))


def test_a_layout_that_the_user_wrote_keeps_the_node_from_com_microsoft():
    model = Blank("nvfp4").model(STOCK, {"weights_layout": ""})
    qmoe_plugin.retarget(model, sm=0)
    assert attributes_of(model.graph.node[0])["weights_layout"] == b"raw"
    report = qmoe_plugin.unretarget(model)
    assert report.kept[0].reason == "com.microsoft has no attribute weights_layout for QMoE"
    assert attributes_of(model.graph.node[0])["weights_layout"] == b"raw"


def test_a_guess_is_reported(caplog):
    with caplog.at_level(logging.WARNING, "qmoe_plugin"):
        report = qmoe_plugin.retarget(Blank(inter=64, gate="none").model(STOCK), sm=0)
    assert "they are read as raw" in report.moved[0].warning
    assert [record.getMessage() for record in caplog.records] == [
        f"QMoE 'node': {report.moved[0].warning}"
    ]
    assert "in doubt:\n  QMoE 'node': the node does not say" in str(report)


def test_nothing_else_changes():
    """But for the domain, the attribute and the import, the proto is the same."""
    model = stock_model()
    model.graph.sparse_initializer.append(  # onnx_ir would drop this
        helper.make_sparse_tensor(
            helper.make_tensor("s", TensorProto.FLOAT, [1], [3.0]),
            helper.make_tensor("i", TensorProto.INT64, [1], [1]),
            [4],
        )
    )
    before = copy.deepcopy(model)
    qmoe_plugin.retarget(model, sm=0)
    node = model.graph.node[0]
    node.domain = STOCK
    del node.metadata_props[:]
    node.attribute.pop()
    model.opset_import.pop()
    assert model == before


def test_onnx_ir_model_is_changed_in_place():
    model = ir.from_proto(stock_model())
    before = ir.to_proto(model)
    report = qmoe_plugin.retarget(model, sm=0)
    assert model.graph[0].domain == OURS
    assert model.graph[0].attributes["weights_prepacked"].as_int() == 0
    assert model.opset_imports[OURS] == 1
    assert len(report.moved) == 1
    qmoe_plugin.unretarget(model)
    assert ir.to_proto(model) == before


def test_a_second_time_does_nothing():
    model = stock_model()
    qmoe_plugin.retarget(model, sm=0)
    once = copy.deepcopy(model)
    report = qmoe_plugin.retarget(model, sm=0)
    assert model == once
    assert (report.moved, report.kept, report.already) == ((), (), 1)


def test_matmul_nbits_needs_no_decision():
    model = stock_model(MatMulNBitsCase())
    before = copy.deepcopy(model)
    qmoe_plugin.retarget(model, sm=0)
    assert not model.graph.node[0].metadata_props
    assert model.graph.node[0].domain == OURS
    qmoe_plugin.unretarget(model)
    assert model == before


def test_a_node_that_is_refused_stays_with_its_reason(caplog):
    model = stock_model(stated=1)
    before = copy.deepcopy(model)
    with caplog.at_level(logging.INFO, "qmoe_plugin"):
        report = qmoe_plugin.retarget(model, sm=0)
    assert model == before
    (kept,) = report.kept
    assert kept.reason.endswith(", as the node's attributes say")
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == [f"left alone: QMoE 'node': {kept.reason}"]


def test_a_device_without_kernels_leaves_the_node_with_the_refusals():
    report = qmoe_plugin.retarget(stock_model(), sm=50)
    assert report.kept[0].reason.startswith(
        "no kernel runs fc1 int4 block 32, 2 of 4 experts, 192 x 64"
    )
    assert report.target == "CUDA (sm_50)"


def test_other_nodes_stay_out_of_it():
    model = stock_model()
    gelu = helper.make_node("Gelu", ["output"], ["gelu"], domain=STOCK)
    model.graph.node.append(gelu)
    report = qmoe_plugin.retarget(model, sm=0)
    assert model.graph.node[1] == gelu
    assert len(report.moved) == 1


def test_a_function_called_like_the_op_is_a_fallback_for_other_runtimes():
    """As Mobius writes for DeepSeek; onnxruntime prefers its own op too."""
    case = MatMulNBitsCase(bias=False)
    tensors = case.tensors()
    model = case.model(tensors, STOCK)
    body = [helper.make_node("Neg", ["A"], ["y"])]
    opsets = [helper.make_opsetid("", 21)]
    attributes = ["K", "N", "block_size", "bits"]
    function = helper.make_function(
        STOCK, "MatMulNBits", ["A", "B", "scales"], ["y"], body, opsets, attributes
    )
    model.functions.append(function)
    stock = onnxruntime.InferenceSession(model.SerializeToString())
    ours = qmoe_plugin.session(model, ["CPUExecutionProvider"])
    for session in (stock, ours):
        (output,) = session.run(None, {"A": tensors["A"]})
        np.testing.assert_allclose(output, case.expected(tensors), atol=1e-3)
    assert len(qmoe_plugin.retarget(model, sm=0).moved) == 1
    assert model.functions[0] == function


# --- subgraphs and functions ---------------------------------------------------------------------


def model_with_branches():
    """An If whose branches hold the node: weights of the outer graph, and of the branch itself."""
    case = MatMulNBitsCase(rank=2)
    tensors = case.tensors()
    inner = case.model(tensors, STOCK)
    outer_weights = list(inner.graph.initializer)

    def branch(name, initializers):
        node = copy.deepcopy(inner.graph.node[0])
        node.name, node.output[0] = name, f"{name}_output"
        output = helper.make_tensor_value_info(f"{name}_output", TensorProto.FLOAT, None)
        return helper.make_graph([node], name, [], [output], initializers)

    then, otherwise = branch("then", []), branch("otherwise", outer_weights)
    for tensor in otherwise.initializer:  # names of its own
        tensor.name = f"own_{tensor.name}"
    own = {tensor.name for tensor in otherwise.initializer}
    inputs = [f"own_{x}" if f"own_{x}" in own else x for x in otherwise.node[0].input]
    del otherwise.node[0].input[:]
    otherwise.node[0].input.extend(inputs)
    condition = helper.make_tensor_value_info("condition", TensorProto.BOOL, [])
    node = helper.make_node(
        "If", ["condition"], ["output"], then_branch=then, else_branch=otherwise
    )
    graph = helper.make_graph(
        [node], "g", [condition, *inner.graph.input], inner.graph.output, outer_weights
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(STOCK, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10), case, tensors


@pytest.mark.skipif(runtime_minor() < 29, reason="needs onnxruntime 1.29")
def test_nodes_in_subgraphs_move_too():
    model, case, tensors = model_with_branches()
    before = copy.deepcopy(model)
    report = qmoe_plugin.retarget(model, sm=0)
    assert [node.name for node in report.moved] == ["otherwise", "then"]
    assert domains(model)[OURS] == 1
    session = qmoe_plugin.session(model, ["CPUExecutionProvider"])
    for condition in (True, False):
        (output,) = session.run(None, {"condition": np.array(condition), "A": tensors["A"]})
        np.testing.assert_allclose(output, case.expected(tensors), atol=1e-4)
    qmoe_plugin.unretarget(model)
    assert model == before


def test_weights_around_a_subgraph_need_a_new_onnxruntime(monkeypatch):
    monkeypatch.setattr(onnxruntime, "__version__", "1.28.0")
    model, case, tensors = model_with_branches()
    report = qmoe_plugin.retarget(model, sm=0)
    assert [node.name for node in report.moved] == ["otherwise"]
    assert [node.name for node in report.kept] == ["then"]
    assert "since 1.29, this is 1.28.0" in report.kept[0].reason
    session = qmoe_plugin.session(model, ["CPUExecutionProvider"])
    for condition in (True, False):
        (output,) = session.run(None, {"condition": np.array(condition), "A": tensors["A"]})
        np.testing.assert_allclose(output, case.expected(tensors), atol=1e-3)


def model_with_function():
    """A function that holds a node with constants of its own, and one with weights passed to it."""
    case = MatMulNBitsCase(bias=False)
    tensors = case.tensors()
    inner = case.model(tensors, STOCK)
    constants = [
        helper.make_node("Constant", [], [tensor.name], value=tensor)
        for tensor in inner.graph.initializer
    ]
    own = copy.deepcopy(inner.graph.node[0])
    own.name = "own"
    passed = copy.deepcopy(own)
    passed.name, passed.output[0], passed.input[1] = "passed", "second", "weights"
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(STOCK, 1)]
    function = helper.make_function(
        "local", "Block", ["A", "weights"], ["output", "second"], [*constants, own, passed], opsets
    )
    weights = next(t for t in inner.graph.initializer if t.name == "B")
    call = helper.make_node("Block", ["A", "B"], ["output", "second"], domain="local")
    graph = helper.make_graph([call], "g", inner.graph.input, inner.graph.output, [weights])
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("local", 1)],
        functions=[function],
        ir_version=10,
    )
    return model, case, tensors


def test_nodes_in_functions_move_too():
    model, _, _ = model_with_function()
    before = copy.deepcopy(model)
    report = qmoe_plugin.retarget(model, sm=0)
    assert [(node.name, node.function) for node in report.moved] == [("own", "local.Block")]
    assert [node.name for node in report.kept] == ["passed"]
    assert "is an input of the graph or function" in report.kept[0].reason
    assert "of function local.Block" in str(report)
    assert {entry.domain for entry in model.functions[0].opset_import} == {"", STOCK, OURS}
    assert OURS not in domains(model)
    qmoe_plugin.unretarget(model)
    assert model == before


def test_a_function_runs():
    model, case, tensors = model_with_function()
    session = qmoe_plugin.session(model, ["CPUExecutionProvider"])
    (output,) = session.run(None, {"A": tensors["A"]})
    np.testing.assert_allclose(output, case.expected(tensors), atol=1e-4)


def test_attributes_that_are_parameters_of_a_function_are_refused():
    model, _, _ = model_with_function()
    function = model.functions[0]
    function.attribute.append("bits")
    for node in function.node:
        for attribute in node.attribute:
            if attribute.name == "bits":
                attribute.ref_attr_name = "bits"
                attribute.ClearField("i")
    report = qmoe_plugin.retarget(model, sm=0)
    assert not report.moved
    assert "attribute bits is a parameter of the function" in report.kept[0].reason


# --- unretarget ----------------------------------------------------------------------------------


def test_unretarget_moves_a_node_that_was_made_in_our_domain():
    case = QMoECase()
    model = case.model(case.tensors(), OURS)
    qmoe_plugin.unretarget(model)
    assert model.graph.node[0].domain == STOCK
    assert domains(model) == {"": 21, STOCK: 1}


def test_unretarget_leaves_a_node_that_com_microsoft_cannot_express():
    case = QMoECase()
    model = case.model(case.tensors(), OURS)
    model.graph.node[0].attribute.append(helper.make_attribute("our_extension", 1))
    report = qmoe_plugin.unretarget(model)
    assert report.kept[0].reason == "com.microsoft has no attribute our_extension for QMoE"
    assert domains(model)[OURS] == 1


@pytest.mark.parametrize(
    ("blank", "reason"),
    [
        (Blank("codebook4"), "com.microsoft has no input 21, 22 for QMoE"),
        (Blank("int8"), "com.microsoft has no quant_type 'int8'"),
        (Blank("fp4", fc2_format="int8"), "com.microsoft has no attribute fc2_format for QMoE"),
    ],
    ids=str,
)
def test_formats_that_com_microsoft_does_not_have_stay_in_our_domain(blank, reason):
    model = blank.model(OURS)
    assert not qmoe_plugin.retarget(model, sm=0).moved
    assert qmoe_plugin.unretarget(model).kept[0].reason == reason
    moved = blank.model(STOCK)  # somebody's mistake, but it is clear what is meant
    assert qmoe_plugin.retarget(moved, sm=0).moved


def test_matmul_nbits_with_a_codebook_stays_in_our_domain():
    case = MatMulNBitsCase("codebook4", scale_dtype="float8e4m3fn", global_scales=True)
    model = case.model(case.tensors(), OURS)
    reason = qmoe_plugin.unretarget(model).kept[0].reason
    assert reason == "com.microsoft has no attribute weight_format for MatMulNBits"


# --- files ---------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """A model with external data in a folder of its own."""
    (tmp_path / "in").mkdir()
    return save_external(stock_model(), tmp_path / "in")


def never_read(monkeypatch):
    """External data that is read is an error."""

    def fail(self):
        raise AssertionError(f"{self.name} was read")

    monkeypatch.setattr(ir.ExternalTensor, "_load", fail)


def test_to_the_same_folder_shares_the_data(saved, monkeypatch):
    never_read(monkeypatch)
    output = saved.with_name("ours.onnx")
    report = qmoe_plugin.retarget(saved, output, sm=0)
    assert len(report.moved) == 1
    assert sorted(path.name for path in saved.parent.iterdir()) == [
        "model.onnx",
        "model.onnx.data",
        "ours.onnx",
    ]
    back = saved.with_name("back.onnx")
    qmoe_plugin.unretarget(output, back)
    assert back.read_bytes() == saved.read_bytes()


def test_over_itself(saved):
    qmoe_plugin.retarget(saved, saved, sm=0)
    assert onnx.load(saved).graph.node[0].domain == OURS


@pytest.mark.parametrize("clones", [True, False])
def test_to_another_folder_the_data_is_copied(saved, tmp_path, monkeypatch, clones):
    """By its blocks where the file system can, else byte by byte."""

    def share_blocks(source, destination):
        if not clones:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        os.sendfile(destination, source, 0, os.fstat(source).st_size)

    monkeypatch.setattr(external_data, "_share_blocks", share_blocks)
    never_read(monkeypatch)
    output = tmp_path / "new" / "deep" / "ours.onnx"
    for _ in range(2):  # the second time finds everything there
        qmoe_plugin.retarget(str(saved), str(output), sm=0)
    data, original = output.with_name("model.onnx.data"), saved.with_name("model.onnx.data")
    assert not data.samefile(original)
    assert data.read_bytes() == original.read_bytes()
    assert [path.name for path in output.parent.iterdir()].count("model.onnx.data") == 1
    onnx.load(output)
    onnx.load(saved)


def test_data_behind_a_symbolic_link_is_copied_itself(saved, tmp_path):
    data = saved.with_name("model.onnx.data")
    blob = data.rename(tmp_path / "blob")
    data.symlink_to("../blob")
    output = tmp_path / "out" / "ours.onnx"
    qmoe_plugin.retarget(saved, output, sm=0)
    copied = output.with_name("model.onnx.data")
    assert not copied.is_symlink()
    assert copied.read_bytes() == blob.read_bytes()


def test_foreign_data_is_not_overwritten(saved, tmp_path):
    output = tmp_path / "out" / "ours.onnx"
    output.parent.mkdir()
    output.with_name("model.onnx.data").write_bytes(b"something else")
    with pytest.raises(FileExistsError, match="is there already and is not the model's"):
        qmoe_plugin.retarget(saved, output, sm=0)
    assert not output.exists()


def test_missing_data_is_an_error(saved, tmp_path):
    saved.with_name("model.onnx.data").unlink()
    with pytest.raises(FileNotFoundError, match=r"keeps weights in .*model\.onnx\.data"):
        qmoe_plugin.retarget(saved, tmp_path / "out" / "ours.onnx", sm=0)


@pytest.mark.parametrize("location", ["../weights.data", "/somewhere/weights.data"])
def test_data_outside_the_folder_is_not_carried_along(saved, tmp_path, location):
    model = onnx.load(saved, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    saved.write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match="outside its own folder"):
        qmoe_plugin.retarget(saved, tmp_path / "out" / "ours.onnx", sm=0)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (["model.onnx"], TypeError, "needs `output`"),
        ([onnx.ModelProto(), "out.onnx"], TypeError, "`output` is for models given by their path"),
        ([b"bytes"], TypeError, "model is a bytes; give a path, onnx.ModelProto or"),
        (["model.ort", "out.onnx"], ValueError, "ORT format"),
        (["none.onnx", "out.onnx"], FileNotFoundError, "none.onnx"),
    ],
)
def test_wrong_arguments(arguments, error, text):
    with pytest.raises(error, match=text):
        qmoe_plugin.retarget(*arguments, sm=0)


def test_a_file_that_is_no_model(tmp_path):
    path = tmp_path / "text.onnx"
    path.write_text("this is not a model")
    with pytest.raises(ValueError, match=r"text\.onnx is not an ONNX model"):
        qmoe_plugin.retarget(path, tmp_path / "out.onnx", sm=0)


# --- the report ----------------------------------------------------------------------------------


def test_report_groups_nodes_with_the_same_fate():
    model = stock_model(MatMulNBitsCase())
    nodes = [copy.deepcopy(model.graph.node[0]) for _ in range(4)]
    for i, node in enumerate(nodes):
        node.name, node.output[0] = f"n{i}", f"y{i}"
    nodes[3].attribute.append(helper.make_attribute("weight_prepacked", 2))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    report = qmoe_plugin.retarget(model, sm=0)
    lines = str(report).splitlines()
    assert lines[0] == "moved 3 of 4 nodes to qmoe_plugin, for CPU"
    assert lines[1].startswith("  MatMulNBits 'n0' and 2 more: dense gemm_")
    assert lines[2] == "left alone:"
    assert lines[3].startswith("  MatMulNBits 'n3': weight_prepacked is 2, but B cannot be")
    assert json.loads(json.dumps(report.to_dict()))["kept"][0]["name"] == "n3"


def test_the_pass_may_be_used_on_its_own():
    change = Retarget(CPU)
    result = change(ir.from_proto(stock_model()))
    assert result.modified
    assert len(change.report.moved) == 1
    assert change.check(result.model.graph[0]) == ""
