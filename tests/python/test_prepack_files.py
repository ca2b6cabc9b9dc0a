"""How `prepack` reads and writes models, and what it says to wrong arguments."""

import copy
import sys

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from helpers.cases import MatMulNBitsCase, QMoECase, feeds_of
from helpers.memory import big_model
from helpers.memory_child import Peak, host_memory
from helpers.models import save_external
from helpers.packed import (
    initializers,
    packed_tensors,
    result_of,
    stock_model,
)
from helpers.run import bits_of, open_session
from onnx import TensorProto, helper, numpy_helper

import qmoe_plugin
from qmoe_plugin.graph import prepack, rewrite
from qmoe_plugin.graph.external_data import DataFile
from qmoe_plugin.library import native

pytestmark = pytest.mark.usefixtures("library")

STOCK, OURS = "com.microsoft", "qmoe_plugin"


# --- kinds of models ------------------------------------------------------------------------------


def test_every_kind_of_model_gets_the_same_weights(tmp_path):
    case = QMoECase("int8", 16)
    in_place = stock_model(case)
    qmoe_plugin.prepack(in_place)
    expected = {name: bits_of(array) for name, array in packed_tensors(in_place).items()}
    decoded = ir.from_proto(stock_model(case))
    qmoe_plugin.prepack(decoded)
    path = save_external(stock_model(case), tmp_path)
    outputs = [tmp_path / "a.onnx", tmp_path / "b.onnx"]
    qmoe_plugin.prepack(path, outputs[0])
    qmoe_plugin.prepack(stock_model(case).SerializeToString(), str(outputs[1]))
    external = ir.load(path)
    qmoe_plugin.prepack(external)
    models = [ir.to_proto(decoded), ir.to_proto(external), *map(onnx.load, outputs)]
    for model in models:
        given = packed_tensors(model)
        assert {name: bits_of(array) for name, array in given.items()} == expected


def test_a_file(tmp_path):
    """All external data goes to one new file, where large tensors can be mapped."""
    model = stock_model()
    table = np.arange(3000, dtype=np.float32)
    model.graph.initializer.append(numpy_helper.from_array(table, "table"))
    model.graph.node.append(helper.make_node("Identity", ["table"], ["copy"]))
    model.graph.output.append(helper.make_tensor_value_info("copy", TensorProto.FLOAT, [3000]))
    path = save_external(model, tmp_path)
    small = numpy_helper.from_array(np.ones(3, np.float32), "small")
    model = onnx.load(path, load_external_data=False)
    model.graph.initializer.append(small)
    path.write_bytes(model.SerializeToString())
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}

    output = tmp_path / "new" / "packed.onnx"
    qmoe_plugin.prepack(path, output)
    assert {file: file.read_bytes() for file in before} == before
    assert sorted(file.name for file in output.parent.iterdir()) == [
        "packed.onnx",
        "packed.onnx.data",
    ]
    made = initializers(onnx.load(output, load_external_data=False))
    assert made["small"] == small
    for name, tensor in made.items():
        if name == "small":
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        assert entries["location"] == "packed.onnx.data"
        assert int(entries["offset"]) % 4096 == 0
    loaded = initializers(onnx.load(output))
    assert bits_of(numpy_helper.to_array(loaded["table"])) == bits_of(table)
    result = open_session(output).run(["output"], feeds_of(QMoECase().tensors()))[0]
    assert bits_of(result) == result_of(stock_model(), QMoECase())


def test_external_tensors_that_share_their_bytes_still_do(tmp_path):
    path = save_external(stock_model(), tmp_path)
    model = onnx.load(path, load_external_data=False)
    table = TensorProto(name="a", data_type=TensorProto.UINT8, dims=[64])
    table.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "model.onnx.data"), ("offset", "0"), ("length", "64")):
        table.external_data.add(key=key, value=value)
    model.graph.initializer.append(table)
    model.graph.initializer.append(table)
    model.graph.initializer[-1].name = "b"
    path.write_bytes(model.SerializeToString())
    qmoe_plugin.prepack(path, tmp_path / "out.onnx")
    made = initializers(onnx.load(tmp_path / "out.onnx", load_external_data=False))
    assert made["a"].external_data == made["b"].external_data


def test_data_behind_links(tmp_path):
    """As in model caches (symbolic links), and hard links."""
    path = save_external(stock_model(), tmp_path)
    data = path.with_name("model.onnx.data")
    (tmp_path / "cache").mkdir()
    data.rename(tmp_path / "cache" / "blob")
    data.symlink_to("cache/blob")
    ours = tmp_path / "ours" / "model.onnx"
    qmoe_plugin.retarget(path, ours, sm=0)
    for source in (path, ours):
        report = qmoe_plugin.prepack(source, tmp_path / "out" / "packed.onnx")
        assert len(report.packed) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_memory_is_that_of_one_node(tmp_path):
    path, packed = big_model(tmp_path, 48)
    model = onnx.load(path, load_external_data=False)
    for index in range(1, 5):
        node = copy.deepcopy(model.graph.node[0])
        node.name, node.output[0] = f"node{index}", f"output{index}"
        model.graph.node.append(node)
    path.write_bytes(model.SerializeToString())
    del model
    before = host_memory()
    with Peak() as peak:
        report = qmoe_plugin.prepack(path, tmp_path / "out.onnx")
    assert len(report.packed) == 5
    assert (tmp_path / "out.onnx.data").stat().st_size > 5 * packed
    assert peak.value - before["Anonymous"] < 1.5 * packed
    assert host_memory()["Rss"] - before["Rss"] < packed  # nothing stays mapped


# --- files that must not be lost ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
def test_the_original_is_not_replaced(tmp_path, name):
    path = save_external(stock_model(), tmp_path)
    output = path if name == "model.onnx" else tmp_path / "link.onnx"
    if output != path:
        (tmp_path / "link.onnx.data").hardlink_to(tmp_path / name)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="would replace a file of the original model"):
        qmoe_plugin.prepack(path, output)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_an_older_model_is_never_seen_with_new_data(tmp_path, monkeypatch):
    path = save_external(stock_model(), tmp_path)
    output = tmp_path / "out" / "packed.onnx"
    qmoe_plugin.prepack(path, output)

    def fail(*_):
        assert not output.exists()
        raise OSError("no space left on device")

    monkeypatch.setattr(DataFile, "commit", fail)
    with pytest.raises(OSError, match="no space left"):
        qmoe_plugin.prepack(path, output, sm=90)
    assert [file.name for file in output.parent.iterdir()] == ["packed.onnx.data"]


@pytest.mark.parametrize(("module", "moment"), [(rewrite, "serialize"), (prepack, "describe")])
def test_a_failure_leaves_an_older_output_as_it_was(tmp_path, monkeypatch, module, moment):
    path = save_external(stock_model(), tmp_path)
    output = tmp_path / "out" / "packed.onnx"
    qmoe_plugin.prepack(path, output)
    before = {file: file.read_bytes() for file in output.parent.iterdir()}

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, moment, interrupt)
    with pytest.raises(KeyboardInterrupt):
        qmoe_plugin.prepack(path, output, sm=90)
    assert {file: file.read_bytes() for file in output.parent.iterdir()} == before


def test_a_model_without_our_nodes_is_copied(tmp_path):
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy"]
    table = numpy_helper.from_array(np.ones(2, np.float32), "table")
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "table"], ["y"])], "g", value[:1], value[1:], [table]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    report = qmoe_plugin.prepack(model.SerializeToString(), tmp_path / "out.onnx")
    assert (report.packed, report.kept) == ((), ())
    assert [file.name for file in tmp_path.iterdir()] == ["out.onnx"]
    assert open_session(tmp_path / "out.onnx").run(None, {"x": np.ones(2, np.float32)})[0][1] == 2


# --- wrong input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "options", "error", "text"),
    [
        (["model.onnx"], {}, TypeError, "need `output`"),
        ([b"bytes"], {}, TypeError, "need `output`"),
        ([onnx.ModelProto(), "out.onnx"], {}, TypeError, "`output` is for a path or bytes"),
        ([3], {}, TypeError, "model is a int; give a path, bytes"),
        ([b"bytes", "out.onnx"], {}, ValueError, "not an ONNX model"),
        (["model.ort", "out.onnx"], {}, ValueError, "ORT format"),
        (["none.onnx", "out.onnx"], {}, FileNotFoundError, "none.onnx"),
        ([onnx.ModelProto()], {"sm": -1}, ValueError, "sm is -1"),
        ([onnx.ModelProto()], {"sm": 75}, ValueError, "sm is 75; our CUDA kernels run from sm_80"),
    ],
)
def test_wrong_arguments(arguments, options, error, text):
    with pytest.raises(error, match=text):
        qmoe_plugin.prepack(*arguments, **options)


def test_data_in_an_unknown_folder(tmp_path):
    path = save_external(stock_model(), tmp_path)
    model = onnx.load(path, load_external_data=False)
    with pytest.raises(ValueError, match="does not say in which folder"):
        qmoe_plugin.prepack(model)
    with pytest.raises(ValueError, match="does not say in which folder"):
        qmoe_plugin.prepack(path.read_bytes(), tmp_path / "out.onnx")


@pytest.mark.parametrize("location", ["../weights.data", "/somewhere/weights.data"])
def test_data_outside_the_folder(tmp_path, location):
    path = save_external(stock_model(), tmp_path)
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match="outside its own folder"):
        qmoe_plugin.prepack(path, tmp_path / "out" / "packed.onnx")


def test_data_that_is_missing_or_too_short(tmp_path):
    path = save_external(stock_model(), tmp_path)
    data = path.with_name("model.onnx.data")
    data.write_bytes(data.read_bytes()[:-300])
    with pytest.raises(ValueError, match="the model is damaged"):
        qmoe_plugin.prepack(path, tmp_path / "out.onnx")
    data.unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.onnx\.data"):
        qmoe_plugin.prepack(path, tmp_path / "out.onnx")


def test_what_onnx_ir_would_drop_is_refused():
    model = stock_model()
    model.graph.sparse_initializer.append(
        helper.make_sparse_tensor(
            helper.make_tensor("sparse", TensorProto.FLOAT, [1], [1.0]),
            helper.make_tensor("indices", TensorProto.INT64, [1], [0]),
            [4],
        )
    )
    with pytest.raises(ValueError, match="sparse initializers"):
        qmoe_plugin.prepack(model)


# --- the compiled function ------------------------------------------------------------------------


def native_arguments(**changes):
    """What packs a small MatMulNBits node, with something else."""
    case = MatMulNBitsCase(bias=False)
    tensors = case.tensors()
    inputs = [None] + [
        (
            tensors[name].dtype.name,
            list(tensors[name].shape),
            tensors[name].reshape(-1).view(np.uint8),
        )
        for name in ("B", "scales")
    ]
    attributes = case.attributes()
    return {
        "op": "MatMulNBits",
        "dtype": "float32",
        "sm": 0,
        "attributes": attributes,
        "inputs": inputs,
        **changes,
    }


def test_packing_a_node():
    assert set(native().prepack(**native_arguments())) == {"B"}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"op": "Gemm"},
            'op is "Gemm"; allowed are QMoE, MoE, MatMulNBits, MatMulBlockQuantizedFp8Weight and ',
        ),
        ({"dtype": "float64"}, "a tensor is float64"),
        ({"dtype": "uint8"}, "A is uint8; allowed are float32"),
        ({"sm": 75}, "GPUs of sm_75 are not supported"),
        ({"sm": -1}, "GPUs of sm_-1 are not supported"),
        ({"attributes": {"N": 1.5}}, "attribute N is of type 'f', but must be of type 'i'"),
        ({"attributes": {}}, "attribute K is missing"),
        ({"inputs": [None] * 9}, "the node has 9 inputs; MatMulNBits has up to 8"),
        ({"inputs": []}, "input 2 .* is missing"),
        (
            {"inputs": [None, ("uint8", [48, 3, 16], np.zeros(2303, np.uint8))]},
            "input 1 has shape .*, which its 2303 bytes of uint8",
        ),
        (
            {"inputs": [None, ("uint8", [2**40, 2**40], np.zeros(1, np.uint8))]},
            "input 1 has shape .*, which its 1 bytes of uint8",
        ),
    ],
)
def test_wrong_arguments_of_the_compiled_function(changes, text):
    with pytest.raises(ValueError, match=text):
        native().prepack(**native_arguments(**changes))


def test_reading_a_header_needs_all_of_it():
    with pytest.raises(ValueError, match="give the first 64 bytes, not 5"):
        native().read_packed(header=b"QMOEP", size=1000)
    with pytest.raises(ValueError, match="5 bytes, less than their header"):
        native().read_packed(header=b"QMOEP", size=5)
