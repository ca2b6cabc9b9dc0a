"""What all verbs have in common: JSON, -v, dry runs, exit codes, one line for wrong use."""

import json

import numpy as np
import onnx
import pytest
from helpers.cases import MatMulNBitsCase, QMoECase, feeds_of
from helpers.command import error_line, run
from helpers.models import save_external
from helpers.moe_cases import MoECase
from onnx import TensorProto, helper, numpy_helper

import qmoe_plugin
from qmoe_plugin.cli import main, parser

pytestmark = pytest.mark.usefixtures("library")

# Of each verb, what it is given in the folder below, and what it says as JSON.
MEASURED = ("--inputs", "qmoe.npz", "--cpu")
VERBS = {
    "doctor": ((), list),
    "kernels": ((), list),
    "retarget": (("qmoe.onnx", "new.onnx", "--sm", "0"), dict),
    "quantize": (("moe.onnx", "new.onnx"), dict),
    "prepack": (("qmoe.onnx", "new.onnx"), dict),
    "explain": (("qmoe.onnx", "--sm", "0"), list),
    "fuse": (("biased.onnx", "new.onnx"), list),
    "calibrate": (("moe.onnx", "seen.npz", "--data", "moe.npz"), dict),
    "inspect": (("qmoe.onnx", "--sm", "0"), dict),
    "verify": (("qmoe.onnx", *MEASURED), dict),
    "bench": (("qmoe.onnx", *MEASURED, "--repeat", "1"), dict),
    "report": (("qmoe.onnx", "page.html", *MEASURED, "--repeat", "1"), dict),
    "install": (("genai", "--cpu"), dict),
}
# Tested in test_tuning.py, as it needs a GPU.
ON_A_GPU = {"tune"}
# What verbs write, and the same where there is nothing to do.
WRITES = {
    verb: (VERBS[verb][0], idle)
    for verb, idle in {
        "retarget": ("idle.onnx", "new.onnx"),
        "quantize": ("idle.onnx", "new.onnx"),
        "prepack": ("idle.onnx", "new.onnx"),
        "fuse": ("idle.onnx", "new.onnx"),
        "calibrate": ("qmoe.onnx", "seen.npz", "--data", "qmoe.npz"),
        "report": ("qmoe.onnx", "page.html", *MEASURED, "--repeat", "0"),
        "install": ("idle", "--cpu"),
    }.items()
}
WRITES["retarget --back"] = (
    ("ours.onnx", "new.onnx", "--back"),
    ("idle.onnx", "new.onnx", "--back"),
)
WRITES["install --undo"] = (("installed", "--undo"), ("genai", "--undo"))


def genai_folder(folder, case):
    folder.mkdir()
    model = case.model(case.tensors(), "com.microsoft") if case else idle()
    save_external(model, folder, "model.onnx")
    options = {"filename": "model.onnx", "session_options": {"provider_options": []}}
    (folder / "genai_config.json").write_text(json.dumps({"model": {"decoder": options}}))


def idle():
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    node = helper.make_node("Identity", ["x"], ["y"])
    graph = helper.make_graph([node], "idle", value[:1], value[1:])
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 21)])


def biased():
    case = MatMulNBitsCase()
    model = case.model(case.tensors(), "com.microsoft")
    (product,) = model.graph.node
    output = product.output[0]
    product.output[0] = "product"
    bias = numpy_helper.from_array(np.ones(case.n, np.float32), "b")
    model.graph.initializer.append(bias)
    model.graph.node.append(helper.make_node("Add", ["product", "b"], [output], "add"))
    return model


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The files that verbs are given; it is also the working folder."""
    for name, case in (("qmoe", QMoECase(inter=64)), ("moe", MoECase())):
        tensors = case.tensors()
        domain = ("com.microsoft",) if name == "qmoe" else ()
        save_external(case.model(tensors, *domain), tmp_path, f"{name}.onnx")
        np.savez(tmp_path / f"{name}.npz", **feeds_of(tensors))
    qmoe_plugin.retarget(tmp_path / "qmoe.onnx", tmp_path / "ours.onnx", sm=0)
    onnx.save(biased(), tmp_path / "biased.onnx")
    onnx.save(idle(), tmp_path / "idle.onnx")
    genai_folder(tmp_path / "genai", QMoECase())
    genai_folder(tmp_path / "installed", QMoECase())
    genai_folder(tmp_path / "idle", None)
    qmoe_plugin.install(tmp_path / "installed", cpu=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder): (path.stat().st_mtime_ns, path.read_bytes()) for path in files
    }


def test_no_verb_is_forgotten():
    (verbs,) = (
        action for action in parser()._actions if hasattr(action, "choices") and action.choices
    )
    assert set(verbs.choices) == {*VERBS, *ON_A_GPU}
    writing = {verb for verb, made in verbs.choices.items() if "--dry-run" in made.format_help()}
    assert writing == {verb.split()[0] for verb in WRITES} | ON_A_GPU


@pytest.mark.parametrize("verb", VERBS)
def test_json(verb, folder):
    """The real command, also with -v: what it logs is no part of what it prints."""
    arguments, kind = VERBS[verb]
    done = run(verb, *arguments, "--json", "-v")
    assert done.returncode == 0, done.stderr
    assert isinstance(json.loads(done.stdout), kind)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("verb", WRITES)
def test_a_dry_run_writes_nothing_and_says_the_same(verb, folder, capsys):
    name, (arguments, _) = verb.split()[0], WRITES[verb]
    before = contents(folder)
    code = main([name, *arguments, "--json", "--dry-run"])
    planned = capsys.readouterr()
    assert contents(folder) == before
    assert (code, planned.err) == (0, "")
    assert main([name, *arguments, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "would" in text or verb == "calibrate"
    assert contents(folder) == before
    assert main([name, *arguments, "--json"]) == 0
    assert contents(folder) != before
    done = json.loads(capsys.readouterr().out)
    assert without_flags(json.loads(planned.out)) == without_flags(done)


def without_flags(report):
    """A report but for what tells a dry run."""
    if isinstance(report, list):
        return [without_flags(part) for part in report]
    return {key: value for key, value in report.items() if key not in ("dry_run", "changed")}


@pytest.mark.parametrize("verb", WRITES)
def test_a_dry_run_of_nothing_fails_as_the_real_one(verb, folder, capsys):
    name, (_, arguments) = verb.split()[0], WRITES[verb]
    before, said = contents(folder), []
    for flags in (["--dry-run"], []):
        assert main([name, *arguments, *flags]) == 1
        said.append(capsys.readouterr().err)
        assert len(said[-1].splitlines()) == 1
    assert said[0] == said[1]
    if name == "install":
        assert contents(folder) == before


@pytest.mark.parametrize("verb", ["retarget", "quantize", "prepack", "fuse", "calibrate", "report"])
def test_a_dry_run_needs_no_output(verb, folder, capsys):
    first, _, *flags = VERBS[verb][0]
    before = contents(folder)
    assert main([verb, first, *flags, "--dry-run"]) == 0
    assert contents(folder) == before
    assert main([verb, first, *flags]) == 1
    assert capsys.readouterr().err == "qmoe_plugin: say where to write, or give --dry-run\n"


@pytest.mark.parametrize("verb", ["quantize", "prepack", "fuse"])
def test_a_dry_run_refuses_to_replace_the_model(verb, folder, capsys):
    model = VERBS[verb][0][0]
    assert main([verb, model, model, "--dry-run"]) == 1
    assert "would replace a file of the original model" in capsys.readouterr().err


def test_a_dry_run_refuses_to_replace_other_weights(folder, capsys):
    other = folder / "other"
    other.mkdir()
    proto = onnx.load("qmoe.onnx", load_external_data=False)
    (data,) = {
        e.value for t in proto.graph.initializer for e in t.external_data if e.key == "location"
    }
    (other / data).write_bytes(b"of another model")
    assert main(["retarget", "qmoe.onnx", str(other / "new.onnx"), "--dry-run"]) == 1
    assert "is there already and is not the model's" in capsys.readouterr().err


@pytest.mark.parametrize("verb", [verb for verb in VERBS if VERBS[verb][0]])
def test_a_model_that_is_missing(verb, folder, capsys):
    _, *others = VERBS[verb][0]
    assert main([verb, "gone.onnx", *others]) == 1
    error = capsys.readouterr().err
    assert error.startswith("qmoe_plugin: ")
    assert "gone.onnx" in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("verb", [v for v in VERBS if VERBS[v][0] and v != "install"])
def test_a_file_that_is_no_model(verb, folder, capsys):
    (folder / "broken.onnx").write_bytes(b"words")
    _, *others = VERBS[verb][0]
    assert main([verb, "broken.onnx", *others]) == 1
    error = capsys.readouterr().err
    assert "broken.onnx is not an ONNX model" in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("verb", VERBS)
def test_arguments_that_it_does_not_take(verb, folder, capsys):
    with pytest.raises(SystemExit) as exited:
        main([verb, *VERBS[verb][0], "--dance"])
    assert exited.value.code == 2
    assert "unrecognized arguments: --dance" in capsys.readouterr().err


def test_a_trace_only_with_v(folder):
    error_line(run("inspect", "gone.onnx"))
    assert "Traceback" in run("inspect", "gone.onnx", "-v").stderr
