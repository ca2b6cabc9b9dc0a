"""`install` and `install --undo`, on folders made by hand. With real models: tests/models."""

import json
import shutil
import sys
from pathlib import Path

import onnx
import pytest
from helpers.cases import MatMulNBitsCase, QMoECase
from helpers.command import error_line, run
from helpers.models import save_external

import qmoe_plugin
from qmoe_plugin import genai
from qmoe_plugin.cli import main
from qmoe_plugin.devices import CPU
from qmoe_plugin.install import MANIFEST, Manifest, install, uninstall
from qmoe_plugin.library import LIBRARY_NAME

pytestmark = pytest.mark.usefixtures("library")

CUDA = [{"cuda": {"enable_cuda_graph": "0"}}]


def model(folder, case, name="model.onnx"):
    folder.mkdir(exist_ok=True, parents=True)
    return save_external(case.model(case.tensors(), "com.microsoft"), folder, name)


def configure(folder, **model_parts):
    """A configuration, laid out unlike the builder's, so that it is told from a new one."""
    text = json.dumps({"search": {"max_length": 9}, "model": {"type": "ü", **model_parts}})
    (folder / genai.CONFIG).write_text(text, encoding="utf-8")


def config(folder):
    return json.loads((folder / genai.CONFIG).read_text(encoding="utf-8"))


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def domains(path):
    return {node.domain for node in onnx.load(path, load_external_data=False).graph.node}


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "folder"
    model(path, QMoECase())
    configure(path, decoder={"filename": "model.onnx", "session_options": {"provider_options": []}})
    return path


def test_install_and_undo(folder):
    before = contents(folder)
    done = run("install", folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("decoder (model.onnx): moved 1 of 1 nodes to qmoe_plugin")
    after = contents(folder)
    assert {path: after[path] for path in before if path.name != genai.CONFIG} == {
        path: content for path, content in before.items() if path.name != genai.CONFIG
    }
    decoder = config(folder)["model"]["decoder"]
    assert decoder["filename"] == "model.qmoe_plugin.onnx"
    assert decoder["session_options"]["custom_ops_library"] == LIBRARY_NAME
    assert domains(folder / decoder["filename"]) == {"qmoe_plugin"}
    assert (folder / LIBRARY_NAME).read_bytes() == Path(qmoe_plugin.get_library_path()).read_bytes()

    done = run("install", folder, "--undo")
    assert done.returncode == 0, done.stderr
    assert contents(folder) == before


def test_again_is_the_same(folder):
    before = contents(folder)
    install(folder)
    first = contents(folder)
    install(folder)
    assert contents(folder) == first
    uninstall(folder)
    assert contents(folder) == before


def test_undo_keeps_later_changes(folder):
    install(folder)
    changed = config(folder)
    changed["search"]["max_length"] = 10
    (folder / genai.CONFIG).write_text(json.dumps(changed))
    uninstall(folder)
    assert config(folder)["search"] == {"max_length": 10}
    assert config(folder)["model"]["decoder"] == {
        "filename": "model.onnx",
        "session_options": {"provider_options": []},
    }


def test_undo_refuses_to_remove_what_is_needed(folder):
    install(folder)
    changed = config(folder)
    changed["model"]["decoder"]["again"] = {"filename": "model.qmoe_plugin.onnx"}
    (folder / genai.CONFIG).write_text(json.dumps(changed))
    assert "still names model.qmoe_plugin.onnx" in error_line(run("install", folder, "--undo"))
    assert (folder / "model.qmoe_plugin.onnx").exists()


@pytest.mark.parametrize("written", [0, 1, 2])
def test_interrupted_is_undone_or_done_again(folder, written, monkeypatch):
    """Whatever was written when it stopped."""
    before = contents(folder)
    calls = []

    def stop(_content, path, data=None):
        calls.append(path)
        if len(calls) > written:
            raise KeyboardInterrupt
        write(_content, path, data)

    module = sys.modules["qmoe_plugin.install"]  # the package has a function of that name
    write = module.write
    monkeypatch.setattr(module, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        install(folder)
    monkeypatch.undo()
    assert (folder / genai.CONFIG).read_bytes() == before[Path(genai.CONFIG)]
    if written == 0:
        assert contents(folder) == before
    else:
        copy = folder.with_name("copy")
        shutil.copytree(folder, copy)
        uninstall(copy)
        assert contents(copy) == before
    install(folder)
    uninstall(folder)
    assert contents(folder) == before


def test_interrupted_change_of_device(folder, monkeypatch):
    """Installed for the CPU, then anew without --cpu, and stopped before the configuration."""

    def full(_source, _destination):
        raise OSError("full")

    decoder = {"filename": "model.onnx", "session_options": {"provider_options": CUDA}}
    configure(folder, decoder=decoder)
    before = contents(folder)
    install(folder, cpu=True)
    module = sys.modules["qmoe_plugin.install"]
    monkeypatch.setattr(module, "_target", lambda _part, _sm: CPU)
    monkeypatch.setattr(module, "_copy", full)
    with pytest.raises(OSError, match="full"):
        install(folder)
    monkeypatch.undo()
    uninstall(folder)
    assert contents(folder) == before


def test_library_that_is_missing(folder, monkeypatch):
    monkeypatch.setenv("QMOE_PLUGIN_LIBRARY", str(folder / "gone.so"))
    before = contents(folder)
    assert "there is no such file" in error_line(run("install", folder))
    assert contents(folder) == before


def test_several_models(tmp_path):
    """Those of a pipeline, in folders of their own; models without nodes of ours stay."""
    model(tmp_path / "deep", QMoECase(), "one.onnx")
    model(tmp_path, MatMulNBitsCase(), "two.onnx")
    plain = onnx.helper.make_model(
        onnx.helper.make_graph(
            [onnx.helper.make_node("Identity", ["x"], ["y"])],
            "plain",
            [onnx.helper.make_tensor_value_info("x", 1, [1])],
            [onnx.helper.make_tensor_value_info("y", 1, [1])],
        )
    )
    onnx.save(plain, tmp_path / "three.onnx")
    configure(
        tmp_path,
        decoder={
            "session_options": {"provider_options": []},
            "pipeline": [
                {"first": {"filename": "deep/one.onnx", "session_options": {}}},
                {"second": {"filename": "two.onnx"}},
            ],
        },
        embedding={"filename": "three.onnx"},
    )
    before = contents(tmp_path)
    report = install(tmp_path)
    assert [(part.name, part.filename) for part in report.parts] == [
        ("decoder.pipeline.0.first", "deep/one.qmoe_plugin.onnx"),
        ("decoder.pipeline.1.second", "two.qmoe_plugin.onnx"),
        ("embedding", "three.onnx"),
    ]
    decoder = config(tmp_path)["model"]["decoder"]
    assert decoder["pipeline"][0]["first"]["session_options"] == {
        "custom_ops_library": LIBRARY_NAME
    }
    assert decoder["session_options"]["custom_ops_library"] == LIBRARY_NAME
    assert "session_options" not in decoder["pipeline"][1]["second"]
    uninstall(tmp_path)
    assert contents(tmp_path) == before


def test_model_that_was_moved_before(folder):
    qmoe_plugin.retarget(folder / "model.onnx", folder / "model.onnx", sm=0)
    before = contents(folder)
    report = install(folder)
    assert report.possible
    assert config(folder)["model"]["decoder"]["filename"] == "model.onnx"
    uninstall(folder)
    assert contents(folder) == before


def test_same_library_of_somebody_else_stays(folder):
    shutil.copy(qmoe_plugin.get_library_path(), folder)
    install(folder)
    assert Manifest.read(folder).files == ("model.qmoe_plugin.onnx",)
    uninstall(folder)
    assert (folder / LIBRARY_NAME).exists()


def test_other_library_of_this_name(folder):
    (folder / LIBRARY_NAME).write_bytes(b"another")
    before = contents(folder)
    assert "is another build; remove it" in error_line(run("install", folder))
    assert contents(folder) == before


def test_for_the_cpu(folder):
    decoder = {"filename": "model.onnx", "session_options": {"provider_options": CUDA}}
    configure(folder, decoder=decoder)
    before = contents(folder)
    assert main(["install", str(folder), "--cpu"]) == 0
    assert config(folder)["model"]["decoder"]["session_options"]["provider_options"] == []
    uninstall(folder)
    assert contents(folder) == before


def test_dry_run_and_json(folder):
    before = contents(folder)
    done = run("install", folder, "--dry-run", "--json")
    assert done.returncode == 0
    report = json.loads(done.stdout)
    assert not report["changed"]
    assert report["files"] == ["model.qmoe_plugin.onnx", LIBRARY_NAME, MANIFEST]
    assert contents(folder) == before


@pytest.mark.parametrize("flags", [[], ["--strict"]])
def test_nodes_left_behind(folder, flags):
    stubborn = onnx.load(folder / "model.onnx", load_external_data=False)
    other = MatMulNBitsCase()
    other = onnx.compose.add_prefix(other.model(other.tensors(), "com.microsoft"), "b_").graph
    other.node[0].attribute.append(onnx.helper.make_attribute("weight_prepacked", 1))
    for field in ("node", "initializer", "input", "output"):
        getattr(stubborn.graph, field).extend(getattr(other, field))
    onnx.save(stubborn, folder / "model.onnx")
    before = contents(folder)
    done = run("install", folder, *flags)
    assert "weight_prepacked is 1" in done.stdout
    assert done.returncode == len(flags)
    assert (contents(folder) == before) == bool(flags)
    if flags:
        assert "nodes would be left behind" in error_line(done)


def test_nothing_to_move(folder):
    qmoe = onnx.load(folder / "model.onnx", load_external_data=False)
    qmoe.graph.node[0].attribute.append(onnx.helper.make_attribute("novel", 1))
    onnx.save(qmoe, folder / "model.onnx")
    before = contents(folder)
    done = run("install", folder)
    assert "no node was moved" in error_line(done)
    assert "is as it was" in done.stdout
    assert contents(folder) == before


def test_verbose_logs_and_traces(folder, tmp_path):
    assert "moved 1 of 1 nodes" in run("install", folder, "-v").stderr
    assert "Traceback" in run("install", tmp_path, "-v").stderr


@pytest.mark.parametrize(
    ("change", "flags", "says"),
    [
        ("no config", [], "has no genai_config.json"),
        ("no json", [], "is not JSON"),
        ("no model", [], "has no object 'model'"),
        ("no filename", [], "names no ONNX model"),
        ("no file", [], "gone.onnx, but there is no such file"),
        ("webgpu", [], "asks for the provider webgpu"),
        ("library", [], "names 'libortextensions.so' as custom_ops_library"),
        ("nothing", ["--sm", "90"], "does not ask for cuda"),
        ("nothing", ["--undo"], "qmoe_plugin is not installed there"),
        ("nothing", ["--undo", "--strict"], "--undo does not go with --strict"),
        ("manifest", [], "qmoe_plugin.install.json is damaged"),
        ("outside", ["--undo"], "it names a file outside the folder"),
    ],
)
def test_wrong_use(folder, change, flags, says):
    options = {"filename": "model.onnx", "session_options": {"provider_options": []}}
    if change == "no config":
        (folder / genai.CONFIG).unlink()
    elif change == "no json":
        (folder / genai.CONFIG).write_text("{")
    elif change == "no model":
        (folder / genai.CONFIG).write_text("{}")
    elif change == "no filename":
        configure(folder, decoder={})
    elif change == "no file":
        configure(folder, decoder={"filename": "gone.onnx"})
    elif change == "webgpu":
        options["session_options"]["provider_options"] = [{change: {}}]
        configure(folder, decoder=options)
    elif change == "library":
        options["session_options"]["custom_ops_library"] = "libortextensions.so"
        configure(folder, decoder=options)
    elif change == "manifest":
        (folder / MANIFEST).write_text("[]")
    elif change == "outside":
        text = (folder / genai.CONFIG).read_text()
        damaged = {"config": text, "edits": [], "files": ["../precious"]}
        (folder / MANIFEST).write_text(json.dumps(damaged))
    before = contents(folder)
    assert says in error_line(run("install", folder, *flags))
    assert contents(folder) == before


def test_cuda_without_a_gpu(folder, monkeypatch):
    decoder = {"filename": "model.onnx", "session_options": {"provider_options": CUDA}}
    configure(folder, decoder=decoder)
    module = sys.modules["qmoe_plugin.install"]
    monkeypatch.setattr(module, "cuda_problem", lambda: "there is no CUDA device")
    with pytest.raises(ValueError, match="asks for CUDA, and here there is no CUDA device; say"):
        install(folder)


def test_cuda_for_the_cpu(folder):
    decoder = {"filename": "model.onnx", "session_options": {"provider_options": CUDA}}
    configure(folder, decoder=decoder)
    assert "to run it on the CPU say cpu=True" in error_line(run("install", folder, "--sm", 0))


def test_sm_and_cpu(folder):
    with pytest.raises(ValueError, match="give one of them"):
        install(folder, sm=90, cpu=True)
    assert run("install", folder, "--sm", "90", "--cpu").returncode == 2
