"""ONNX Runtime's C interface, as we declare it and as it is.

What ops/ort/abi.h declares must be what the real header says, and the library must work with the
oldest and the newest ONNX Runtime that it claims.

The header is looked for in QMOE_PLUGIN_ORT_HEADER (the file, or its folder) and in the usual
include folders; Debian has it in libonnxruntime-dev. The oldest onnxruntime is looked for in folder
QMOE_PLUGIN_ORT124, by default .cache/onnxruntime-1.24.4; `python tests/test_abi.py --install` puts
it there.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.cases import Case, MatMulNBitsCase, QMoECase, feeds_of
from helpers.tolerance import check

ROOT = Path(__file__).resolve().parents[1]
ABI_HEADER = ROOT / "ops" / "ort" / "abi.h"
INCLUDE_FOLDERS = ("/usr/include", "/usr/local/include", "/opt/onnxruntime/include")
OLDEST_RELEASE = "1.24.4"
OLDEST_FOLDER = Path(
    os.environ.get("QMOE_PLUGIN_ORT124") or ROOT / ".cache" / f"onnxruntime-{OLDEST_RELEASE}"
)


# --- the declarations -----------------------------------------------------------------------------


def find_header() -> Path | None:
    """The real header, or None."""
    name = "onnxruntime_c_api.h"
    named = os.environ.get("QMOE_PLUGIN_ORT_HEADER")
    folders = [Path(named)] if named else [Path(folder) for folder in INCLUDE_FOLDERS]
    for folder in folders:
        candidates = [folder, folder / name, folder / "onnxruntime" / name]
        candidates.append(folder / "onnxruntime" / "core" / "session" / name)
        for candidate in candidates:
            if candidate.is_file():
                return candidate
    assert not named, f"QMOE_PLUGIN_ORT_HEADER is {named}, but there is no {name}"
    return None


def declarations() -> dict[str, list[str]]:
    """What abi.h declares, as macro calls by kind."""
    text = re.sub(r"//.*", "", ABI_HEADER.read_text())
    opaque = re.findall(r"^struct (\w+);", text, re.M)
    enums = re.findall(r"^enum (\w+)(?: : int)? \{(.*?)\};", text, re.M | re.S)
    structs = re.findall(r"^struct (Ort\w+) \{(.*?)^\};", text, re.M | re.S)
    types = opaque + [name for name, _ in enums] + [name for name, _ in structs]
    constant = re.compile(r"(\w+)(?: = -?\d+)?(?:,|$)")
    constants = [name for _, body in enums for name in constant.findall(body.strip())]
    members = [
        f"{struct}, {match[1] or match[2]}"
        for struct, body in structs
        for match in re.finditer(r"\(\*(\w+)\)|uint32_t (\w+);", body)
    ]
    slots = re.findall(r"using (\w+) =\s*Slot<", text)
    return {"TYPE": types, "CONSTANT": constants, "MEMBER": members, "SLOT": slots}


def test_parser_sees_every_declaration() -> None:
    """The comparison is only worth something if nothing of abi.h slips through."""
    found = declarations()
    text = ABI_HEADER.read_text()
    assert len(found["SLOT"]) == text.count("Slot<") - text.count("struct Slot<") > 40
    assert len(set(found["SLOT"])) == len(found["SLOT"])
    custom_op = [member for member in found["MEMBER"] if member.startswith("OrtCustomOp,")]
    assert len(custom_op) == 26
    assert "ORT_NOT_IMPLEMENTED" in found["CONSTANT"]
    assert "OrtMemTypeCPUInput" in found["CONSTANT"]
    assert {"OrtStatus", "OrtErrorCode", "OrtAllocator"} <= set(found["TYPE"])


def test_declarations_match_the_real_header(tmp_path: Path) -> None:
    header = find_header()
    if header is None:
        pytest.skip(
            f"no onnxruntime_c_api.h in {', '.join(INCLUDE_FOLDERS)}: install libonnxruntime-dev, "
            "or set QMOE_PLUGIN_ORT_HEADER"
        )
    version = re.search(r"#define ORT_API_VERSION (\d+)", header.read_text())
    assert version, f"{header} has no ORT_API_VERSION"
    if int(version[1]) < 24:
        pytest.skip(f"{header} is of API version {version[1]}; version 24 or newer is needed")
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler: install g++, or set CXX")
    lines = [f"{kind}({name})" for kind, names in declarations().items() for name in names]
    (tmp_path / "abi_lists.inc").write_text("\n".join(lines) + "\n")
    command = [compiler, "-std=c++20", "-fsyntax-only", "-Wno-invalid-offsetof"]
    command += [f"-I{folder}" for folder in (header.parent, ROOT, tmp_path)]
    command.append(str(ROOT / "tests" / "abi" / "check_abi.cc"))
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


# --- the library ----------------------------------------------------------------------------------


CASES: dict[str, Case] = {
    "qmoe": QMoECase(),
    "two_types_of_scales": QMoECase("codebook4", fc2_format="nvfp4").fitted(),
    "matmul_nbits": MatMulNBitsCase(dtype="float16", zero_points="packed"),
    "matmul_nvfp4": MatMulNBitsCase("nvfp4", dtype="float16").fitted(),
}

# Runs each folder's model and prints ONNX Runtime's version.
RUN_MODELS = """
import json, sys
import numpy as np
import onnxruntime as ort

library, *folders = sys.argv[1:]
providers = ["CPUExecutionProvider"]
for folder in folders:
    options = ort.SessionOptions()
    options.register_custom_ops_library(library)
    session = ort.InferenceSession(folder + "/model.onnx", options, providers=providers)
    feeds = dict(np.load(folder + "/feeds.npz"))
    np.save(folder + "/result.npy", session.run(None, feeds)[0])
print(json.dumps({"version": ort.__version__}))
"""


def run_models(library: str, folder: Path, packages: Path | None) -> str:
    """Runs all cases in a new process, with the onnxruntime in `packages` or with this process's.

    Returns the version that ran.
    """
    folders = []
    for name, case in CASES.items():
        (folder / name).mkdir()
        tensors = case.tensors()
        (folder / name / "model.onnx").write_bytes(case.model(tensors).SerializeToString())
        np.savez(folder / name / "feeds.npz", **feeds_of(tensors))
        folders.append(str(folder / name))
    environment = dict(os.environ)
    if packages is not None:
        environment["PYTHONPATH"] = str(packages)
    command = [sys.executable, "-c", RUN_MODELS, library, *folders]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    # A runtime that is asked for an API version it does not have says so on stderr.
    assert "API version" not in result.stderr
    return json.loads(result.stdout)["version"]


def test_api_range(library: str) -> None:
    lowest, highest = ctypes.c_uint32(), ctypes.c_uint32()
    ctypes.CDLL(library).qmoe_plugin_ort_api_range(ctypes.byref(lowest), ctypes.byref(highest))
    assert (lowest.value, highest.value) == (24, 31)


def test_only_our_names_are_exported(library: str) -> None:
    if shutil.which("nm") is None:
        pytest.skip("no nm: install binutils")
    listing = subprocess.run(
        ["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True
    ).stdout
    names = {line.split()[-1] for line in listing.splitlines()}
    assert {name for name in names if not name.startswith("qmoe_plugin_")} == {"RegisterCustomOps"}


def test_oldest_and_newest_onnxruntime_agree(library: str, tmp_path: Path) -> None:
    if not (OLDEST_FOLDER / "onnxruntime").is_dir():
        pytest.skip(
            f"no onnxruntime {OLDEST_RELEASE} in {OLDEST_FOLDER}: run python tests/test_abi.py "
            "--install, or set QMOE_PLUGIN_ORT124 to a folder that has it"
        )
    results = {}
    for packages in (OLDEST_FOLDER, None):
        folder = tmp_path / ("oldest" if packages else "newest")
        folder.mkdir()
        version = run_models(library, folder, packages)
        assert version.startswith("1.24.") == (packages is not None)
        results[version] = {name: np.load(folder / name / "result.npy") for name in CASES}
    assert len(results) == 2
    for name, case in CASES.items():
        oldest, newest = (by_name[name] for by_name in results.values())
        assert oldest.tobytes() == newest.tobytes()
        check(case, case.tensors(), newest)


def test_too_old_runtime_gets_a_clear_error(library: str) -> None:
    """RegisterCustomOps with the function table of a made-up ONNX Runtime 1.16."""
    messages: list[str] = []
    create_status = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)
    get_api = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)
    get_version = ctypes.CFUNCTYPE(ctypes.c_void_p)
    version_text = ctypes.create_string_buffer(b"1.16.3")

    @create_status
    def on_create_status(code: int, message: bytes) -> int:
        messages.append(f"{code}: {message.decode()}")
        return 0xDEAD

    table = (ctypes.c_void_p * 300)(ctypes.cast(on_create_status, ctypes.c_void_p))
    asked: list[int] = []

    @get_api
    def on_get_api(version: int) -> int:
        asked.append(version)
        return ctypes.addressof(table)

    class ApiBase(ctypes.Structure):
        _fields_ = (("GetApi", get_api), ("GetVersionString", get_version))

    base = ApiBase(on_get_api, get_version(lambda: ctypes.addressof(version_text)))
    register = ctypes.CDLL(library).RegisterCustomOps
    register.restype = ctypes.c_void_p
    assert register(None, ctypes.byref(base)) == 0xDEAD
    assert asked == [1]
    assert messages == [
        "9: qmoe_plugin: this is ONNX Runtime 1.16.3, but 1.24 or newer is needed; upgrade "
        "onnxruntime or onnxruntime-gpu"
    ]


def install_oldest() -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    command += [str(OLDEST_FOLDER), f"onnxruntime=={OLDEST_RELEASE}"]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    if sys.argv[1:] != ["--install"]:
        sys.exit("usage: python tests/test_abi.py --install")
    install_oldest()
