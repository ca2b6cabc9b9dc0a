"""Opening models."""

import logging
import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from helpers.cases import MatMulNBitsCase, QMoECase, feeds_of
from helpers.models import one_node_model, save_external

import qmoe_plugin
from qmoe_plugin import wheels
from qmoe_plugin.devices import CPU, Target

pytestmark = pytest.mark.usefixtures("library")

session_module = import_module("qmoe_plugin.session")

CPU_ONLY = ["CPUExecutionProvider"]
CASE = QMoECase(fusion=2, dtype="float32")  # the stock CPU op refuses fusion 2, so ours must run it
FOLDER_KEY = "session.model_external_initializers_file_folder_path"


@pytest.fixture
def tensors():
    return CASE.tensors()


@pytest.fixture
def model(tensors):
    return CASE.model(tensors, "com.microsoft")


@pytest.fixture
def path(model, tmp_path):
    return save_external(onnx.ModelProto.FromString(model.SerializeToString()), tmp_path)


def check(session, tensors, case=CASE):
    (output,) = session.run(None, feeds_of(tensors))
    np.testing.assert_allclose(output, case.expected(tensors), atol=1e-4)


def without_data(path):
    return onnx.load(path, load_external_data=False)


# --- kinds of models -----------------------------------------------------------------------------


def test_path(path, tensors):
    for kind in (str, os.fspath, lambda x: x):
        session = qmoe_plugin.session(kind(path), CPU_ONLY)
        assert type(session) is onnxruntime.InferenceSession
        check(session, tensors)


def test_relative_path(path, tensors, monkeypatch):
    monkeypatch.chdir(path.parent)
    check(qmoe_plugin.session(path.name, CPU_ONLY), tensors)


def test_path_of_a_model_with_its_weights_inside(model, tensors, tmp_path):
    path = tmp_path / "inline.onnx"
    onnx.save(model, path)
    check(qmoe_plugin.session(path, CPU_ONLY), tensors)


def test_bytes(model, tensors):
    check(qmoe_plugin.session(model.SerializeToString(), CPU_ONLY), tensors)


def test_proto_is_not_changed(model, tensors):
    before = model.SerializeToString(deterministic=True)
    check(qmoe_plugin.session(model, CPU_ONLY), tensors)
    assert model.SerializeToString(deterministic=True) == before


def test_onnx_ir_model_is_not_changed(model, tensors):
    decoded = ir.from_proto(model)
    before = ir.to_proto(decoded)
    check(qmoe_plugin.session(decoded, CPU_ONLY), tensors)
    assert ir.to_proto(decoded) == before


def test_onnx_ir_model_knows_the_folder_of_its_data(path, tensors):
    check(qmoe_plugin.session(ir.load(path), CPU_ONLY), tensors)


@pytest.mark.parametrize("form", [lambda proto: proto, lambda proto: proto.SerializeToString()])
def test_external_data_of_a_proto_needs_the_folder(path, tensors, form):
    proto = form(without_data(path))
    with pytest.raises(ValueError, match=r"in the file 'model\.onnx\.data'.*external_data_dir"):
        qmoe_plugin.session(proto, CPU_ONLY)
    check(qmoe_plugin.session(proto, CPU_ONLY, external_data_dir=path.parent), tensors)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(FOLDER_KEY, str(path.parent))
    check(qmoe_plugin.session(proto, CPU_ONLY, options), tensors)
    assert options.get_session_config_entry(FOLDER_KEY) == str(path.parent)


def test_external_data_of_an_onnx_ir_model_in_two_folders(path):
    model = ir.load(path)
    next(iter(model.graph.initializers.values())).const_value.base_dir = "elsewhere"
    with pytest.raises(ValueError, match="weights in several folders"):
        qmoe_plugin.session(model, CPU_ONLY)


def test_a_model_that_is_in_our_domain_already(tensors, tmp_path, caplog):
    model = CASE.model(tensors)
    with caplog.at_level(logging.INFO, "qmoe_plugin"):
        check(qmoe_plugin.session(model, CPU_ONLY), tensors)
        check(qmoe_plugin.session(save_external(model, tmp_path), CPU_ONLY), tensors)
    assert "moved 0 of 0 nodes to qmoe_plugin, for CPU; 1 were there before" in caplog.text


def test_a_retargeted_file(path, tensors, tmp_path):
    output = tmp_path / "out" / "ours.onnx"
    qmoe_plugin.retarget(path, output, sm=0)
    check(qmoe_plugin.session(output, CPU_ONLY), tensors)
    options = onnxruntime.SessionOptions()
    qmoe_plugin.register(options)
    check(onnxruntime.InferenceSession(str(output), options, CPU_ONLY), tensors)


def test_a_node_that_is_left_runs_in_onnxruntime(caplog):
    case = MatMulNBitsCase(bias=False)
    tensors = case.tensors()
    feed = frozenset({"A", "B"})
    model = one_node_model(
        "MatMulNBits", tensors, case.attributes(), domain="com.microsoft", feed=feed
    )
    session = qmoe_plugin.session(model, CPU_ONLY)
    assert (
        "left alone: MatMulNBits 'node': B (input 1, 'B') is an input of the graph" in caplog.text
    )
    (output,) = session.run(None, {name: tensors[name] for name in feed})
    np.testing.assert_allclose(output, case.expected(tensors), atol=1e-3)


@pytest.mark.parametrize(
    ("wrong", "error", "text"),
    [
        (17, TypeError, "model is a int; give a path, bytes"),
        (b"no model", ValueError, "these bytes are not an ONNX model"),
        ("none.onnx", FileNotFoundError, "none.onnx"),
        ("model.ort", ValueError, "ORT format"),
    ],
)
def test_what_is_no_model(wrong, error, text):
    with pytest.raises(error, match=text):
        qmoe_plugin.session(wrong, CPU_ONLY)


def test_weights_are_neither_read_nor_copied_by_us(tmp_path):
    """A model with 1 GiB of (sparse) external data: our own memory stays small."""
    script = """
import resource, sys
import qmoe_plugin
from importlib import import_module
session = import_module("qmoe_plugin.session")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
content, folder = session._prepare(sys.argv[1], session.Retarget(session.CPU), None, None)
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
assert len(content) < 10_000, len(content)
print(grown)
"""
    experts, rows, columns = 16, 8192, 8192  # 512 MiB a projection
    case = QMoECase(bias=False, activation="relu", experts=16)
    model = case.model(case.tensors(), "com.microsoft")
    shapes = {
        "fc1_experts_weights": (onnx.TensorProto.UINT8, [experts, rows, columns // 2]),
        "fc2_experts_weights": (onnx.TensorProto.UINT8, [experts, columns, rows // 2]),
        "fc1_scales": (onnx.TensorProto.FLOAT, [experts, rows, columns // 32]),
        "fc2_scales": (onnx.TensorProto.FLOAT, [experts, columns, rows // 32]),
    }
    offset = 0
    for tensor in model.graph.initializer:
        tensor.data_type, dims = shapes[tensor.name]
        tensor.ClearField("raw_data")
        del tensor.dims[:]
        tensor.dims.extend(dims)
        size = int(np.prod(dims)) * (4 if tensor.data_type == onnx.TensorProto.FLOAT else 1)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in {"location": "data", "offset": offset, "length": size}.items():
            tensor.external_data.add(key=key, value=str(value))
        offset += size
    (tmp_path / "data").touch()
    os.truncate(tmp_path / "data", offset)
    onnx.save(model, tmp_path / "model.onnx")
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "model.onnx")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 32 * 1024  # KiB


# --- session options -----------------------------------------------------------------------------


def test_options_may_be_used_again_and_again(path, model, tensors):
    options = onnxruntime.SessionOptions()
    for source in (path, model, path):
        check(qmoe_plugin.session(source, CPU_ONLY, options), tensors)
    qmoe_plugin.register(options)
    check(qmoe_plugin.session(path, CPU_ONLY, options), tensors)


def test_options_do_not_remember_the_folder_of_a_model(tmp_path):
    """Or the next model that is opened with them by its path would get this one's weights."""
    options = onnxruntime.SessionOptions()
    cases = [MatMulNBitsCase(seed=seed) for seed in (1, 2)]
    for case in cases:
        folder = tmp_path / str(case.seed)
        folder.mkdir()
        tensors = case.tensors()
        stock = save_external(case.model(tensors, "com.microsoft"), folder)
        ours = save_external(case.model(tensors), folder, "ours.onnx")
        data = folder / "ours.onnx.data"
        assert data.read_bytes() == (folder / "model.onnx.data").read_bytes()
        check(qmoe_plugin.session(stock, CPU_ONLY, options), tensors, case)
        assert options.get_session_config_entry(FOLDER_KEY) == ""
        plain = onnxruntime.InferenceSession(str(ours), options, CPU_ONLY)
        check(plain, tensors, case)


def test_threads_may_share_options(tmp_path):
    options = onnxruntime.SessionOptions()
    cases = [MatMulNBitsCase(seed=seed) for seed in range(8)]
    for case in cases:
        (tmp_path / str(case.seed)).mkdir()
        save_external(case.model(case.tensors(), "com.microsoft"), tmp_path / str(case.seed))

    def open_model(case):
        return qmoe_plugin.session(tmp_path / str(case.seed) / "model.onnx", CPU_ONLY, options)

    with ThreadPoolExecutor(8) as pool:
        sessions = list(pool.map(open_model, cases))
    for case, session in zip(cases, sessions, strict=True):
        check(session, case.tensors(), case)


def test_folder_is_forgotten_after_a_failure_too(path):
    options = onnxruntime.SessionOptions()
    path.with_name("model.onnx.data").unlink()
    with pytest.raises(Exception, match=r"model\.onnx\.data"):
        qmoe_plugin.session(path, CPU_ONLY, options)
    assert options.get_session_config_entry(FOLDER_KEY) == ""


def test_registered_behind_our_back(model):
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(qmoe_plugin.get_library_path())
    with pytest.raises(RuntimeError, match="registered twice with these SessionOptions"):
        qmoe_plugin.session(model, CPU_ONLY, options)


@pytest.fixture
def looks_again():
    """The packages of onnxruntime are looked at anew, in the test and after it."""
    session_module._conflict.cache_clear()
    yield
    session_module._conflict.cache_clear()


def test_two_packages_of_onnxruntime_are_warned_about(monkeypatch, looks_again):
    found = iter(["two packages"])
    monkeypatch.setattr(wheels, "conflict", lambda: next(found))  # is asked once
    for _ in range(2):
        with pytest.warns(RuntimeWarning, match="two packages"):
            qmoe_plugin.register(onnxruntime.SessionOptions())


def test_no_warning_where_all_is_well(monkeypatch, looks_again):
    monkeypatch.setattr(wheels, "conflict", lambda: "")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qmoe_plugin.register(onnxruntime.SessionOptions())


def test_an_onnxruntime_that_is_too_old(monkeypatch):
    monkeypatch.setattr(onnxruntime, "__version__", "1.20.1")
    with pytest.raises(RuntimeError, match=r"onnxruntime 1\.20\.1 is too old .* needs 1\.\d+"):
        qmoe_plugin.register(onnxruntime.SessionOptions())


# --- devices -------------------------------------------------------------------------------------


def test_left_alone_the_session_runs_here(model, tensors):
    check(qmoe_plugin.session(model), tensors)


@pytest.mark.parametrize(
    ("providers", "provider_options", "index"),
    [
        (["CPUExecutionProvider"], None, None),
        (["CUDAExecutionProvider", "CPUExecutionProvider"], None, 0),
        ([("CUDAExecutionProvider", {"device_id": "2"})], None, 2),
        (["CPUExecutionProvider", "CUDAExecutionProvider"], [{}, {"device_id": 1}], 1),
        ([], None, None),
    ],
)
def test_cuda_index(providers, provider_options, index):
    assert session_module._cuda_index(providers, provider_options) == index


def test_cuda_that_onnxruntime_does_not_have_means_the_cpu(monkeypatch):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: CPU_ONLY)
    assert session_module._target(["CUDAExecutionProvider"], None) == CPU


def test_cuda_that_our_kernels_cannot_use_leaves_all_nodes_to_onnxruntime(monkeypatch, caplog):
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)
    monkeypatch.setattr(session_module, "cuda_problem", lambda index: "device is too old")
    target = session_module._target(providers, None)
    assert target == Target("CUDA", 0)
    assert "device is too old" in caplog.text
    model = CASE.model(CASE.tensors(), "com.microsoft")
    assert not qmoe_plugin.graph.apply.apply(
        qmoe_plugin.graph.retarget.Retarget(target), model
    ).moved


def test_providers_of_the_options_are_respected(model, tensors):
    options = onnxruntime.SessionOptions()
    options.add_provider("CPUExecutionProvider", {})
    check(qmoe_plugin.session(model, sess_options=options), tensors)


def test_a_failure_is_not_hidden_by_a_fallback(capsys):
    tensors = {**CASE.tensors(), "fc1_scales": np.full((4, 192, 2), np.nan, np.float32)}
    with pytest.raises(Exception, match="scales must be finite"):
        qmoe_plugin.session(CASE.model(tensors, "com.microsoft"), CPU_ONLY)
    assert "Falling back" not in capsys.readouterr().out


def test_providers_may_be_set_afterwards(path, tensors):
    """onnxruntime then makes the session anew, from the options and bytes that it keeps."""
    session = qmoe_plugin.session(path, CPU_ONLY)
    session.set_providers(CPU_ONLY)
    check(session, tensors)


def test_nothing_is_printed(path, capfd):
    qmoe_plugin.session(path, CPU_ONLY)
    assert capfd.readouterr() == ("", "")


@pytest.mark.gpu
def test_cuda_is_picked_where_it_can_be_used(cuda, caplog):
    case = QMoECase(dtype="float16", fusion=2)
    tensors = case.tensors()
    with caplog.at_level(logging.INFO, "qmoe_plugin"):
        session = qmoe_plugin.session(case.model(tensors, "com.microsoft"))
    assert session.get_providers()[0] == "CUDAExecutionProvider"
    assert "moved 1 of 1 nodes to qmoe_plugin, for CUDA (sm_" in caplog.text
    (output,) = session.run(None, feeds_of(tensors))
    np.testing.assert_allclose(output, case.expected(tensors), atol=2e-2)
