"""Our ops in the place of com.microsoft's."""

from importlib import import_module

import onnx
import onnxruntime
import pytest
from helpers.blank import Blank
from helpers.block_quantized_cases import Fp4WeightCase, Fp8WeightCase
from helpers.cases import MatMulNBitsCase, QMoECase, feeds_of
from helpers.models import save_external
from helpers.moe_cases import MoECase
from helpers.run import open_session, run
from helpers.tolerance import check
from onnx import TensorProto, helper

import qmoe_plugin
from qmoe_plugin import override
from qmoe_plugin.devices import Target
from qmoe_plugin.library import OPS

pytestmark = pytest.mark.usefixtures("library")

CPU_ONLY = ["CPUExecutionProvider"]
STOCK = "com.microsoft"
# The stock CPU ops refuse, or get wrong, all of these.
CASES = [
    QMoECase(fusion=2),
    QMoECase(dtype="bfloat16"),
    QMoECase("int8", layout="fpa_intb", hidden=128, inter=64),
    QMoECase("nvfp4", block_size=16),
    QMoECase(activation="geglu"),
    QMoECase(limit=0.5, limit_after=True),
    MatMulNBitsCase(dtype="bfloat16"),
    MatMulNBitsCase(layout="fpa_intb", n=64, k=128),
    MoECase(dtype="bfloat16"),
    MoECase(fusion=0, fc3=True),
    MoECase(limit=0.5, limit_after=True),
    Fp8WeightCase(a_scale=True),
    Fp4WeightCase(),
]


def overriding_options():
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    qmoe_plugin.register(options, override=True)
    return options


def test_the_installed_onnxruntime_has_nothing_that_we_do_not_know():
    """A new attribute, input or type of one of these ops of com.microsoft fails here."""
    assert override.schema_gaps() == []
    override.check_override()


def test_all_our_ops_are_com_microsofts():
    module = import_module("onnxruntime.capi.onnxruntime_pybind11_state")
    theirs = {s.name for s in module.get_all_operator_schema() if s.domain == STOCK}
    assert set(OPS) <= theirs
    assert set(OPS) == override.STOCK_ATTRIBUTES.keys() == override.STOCK_INPUTS.keys()


def test_both_ops_are_looked_at(monkeypatch):
    """The test above would see what is new."""
    monkeypatch.setitem(override.STOCK_ATTRIBUTES, "QMoE", frozenset())
    monkeypatch.setitem(override.STOCK_INPUTS, "MatMulNBits", ("A", "B", "scales", "zeros"))
    monkeypatch.setattr(override, "_TYPES", override._TYPES - {"tensor(bfloat16)"})
    gaps = override.schema_gaps()
    assert "QMoE has attribute activation_type" in gaps
    assert "QMoE has type tensor(bfloat16)" in gaps
    assert "MatMulNBits has input 3 (zero_points)" in gaps
    assert "MatMulNBits has input 5 (bias)" in gaps
    with pytest.raises(RuntimeError, match=r"newer than qmoe_plugin knows: .*Upgrade qmoe_plugin"):
        qmoe_plugin.session(Blank().model(), CPU_ONLY, override=True)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op_type}-{case}")
def test_unmodified_models_run(case):
    tensors = case.tensors()
    model = case.model(tensors, STOCK)
    session = open_session(model, options=overriding_options())
    check(case, tensors, run(session, feeds_of(tensors)))


@pytest.mark.parametrize("form", ["path", "bytes", "proto"])
def test_session_leaves_the_model_as_it_is(form, tmp_path):
    case = QMoECase(fusion=2)
    tensors = case.tensors()
    path = save_external(case.model(tensors, STOCK), tmp_path)
    proto = onnx.load(path, load_external_data=False)
    model, folder = {
        "path": (path, None),
        "bytes": (proto.SerializeToString(), tmp_path),
        "proto": (proto, tmp_path),
    }[form]
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    session = qmoe_plugin.session(model, CPU_ONLY, options, external_data_dir=folder, override=True)
    check(case, tensors, session.run(None, feeds_of(tensors))[0])
    ran = onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node
    assert [node.domain for node in ran] == [STOCK]


def test_other_ops_of_com_microsoft_and_our_own_domain_keep_working():
    case = MatMulNBitsCase(dtype="float32")
    tensors = case.tensors()
    model = case.model(tensors, STOCK)
    ours = onnx.NodeProto()
    ours.CopyFrom(model.graph.node[0])
    ours.domain, ours.name = "qmoe_plugin", "ours"
    ours.output[0] = "second"
    model.graph.node.extend(
        [ours, helper.make_node("Gelu", ["second"], ["gelu"], domain=STOCK, name="gelu")]
    )
    model.opset_import.append(helper.make_opsetid("qmoe_plugin", 1))
    model.graph.output.append(helper.make_tensor_value_info("gelu", TensorProto.FLOAT, None))
    model.graph.output.append(helper.make_tensor_value_info("second", TensorProto.FLOAT, None))
    session = open_session(model, options=overriding_options())
    first, _, second = session.run(None, feeds_of(tensors))
    assert first.tobytes() == second.tobytes()


def test_a_node_that_we_refuse_fails_the_session_by_name():
    model = Blank().model(STOCK, {"block_size": 24})
    with pytest.raises(Exception, match=r"com\.microsoft\.QMoE node 'node' \(run by qmoe_plugin\)"):
        open_session(model, options=overriding_options())


def test_without_override_com_microsoft_is_left_alone():
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    qmoe_plugin.register(options)
    case = QMoECase(dtype="bfloat16")
    with pytest.raises(Exception, match=r"QMoE(?!.*qmoe_plugin)"):
        open_session(case.model(case.tensors(), STOCK), options=options)


def test_options_are_registered_one_way_only():
    options = overriding_options()
    qmoe_plugin.register(options, override=True)
    with pytest.raises(RuntimeError, match="registered with these SessionOptions before, with"):
        qmoe_plugin.register(options)


def test_the_config_entry_has_two_values(library):
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(override.CONFIG_KEY, "yes")
    with pytest.raises(Exception, match=r'is "yes"; it must be "0" or "1"'):
        options.register_custom_ops_library(library)


def test_nodes_are_not_moved_from_the_gpu_to_the_cpu(monkeypatch):
    module = import_module("qmoe_plugin.session")  # the package has a function of this name
    monkeypatch.setattr(module, "_target", lambda *_: Target("CUDA"))
    with pytest.raises(RuntimeError, match="override would move nodes"):
        qmoe_plugin.session(Blank().model(), CPU_ONLY, override=True)
