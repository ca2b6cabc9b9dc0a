"""Ranges for profilers, seen by a small one of our own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.cases import QMoECase, feeds_of
from helpers.models import save_external

# What a profiler gives NVTX: functions to call, here such that print what they are given.
PROFILER = r"""
#include <nvtx3/nvToolsExt.h>
#include <cstdio>
#include <cstring>
namespace {
char ours;  // others, such as cuBLAS, may have domains too

nvtxDomainHandle_t NVTX_API Create(const char* name) {
  if (std::strcmp(name, "qmoe_plugin") != 0) return nullptr;
  std::fprintf(stderr, "domain %s\n", name);
  return reinterpret_cast<nvtxDomainHandle_t>(&ours);
}

bool IsOurs(nvtxDomainHandle_t domain) { return reinterpret_cast<char*>(domain) == &ours; }

int NVTX_API Push(nvtxDomainHandle_t domain, const nvtxEventAttributes_t* range) {
  if (IsOurs(domain)) std::fprintf(stderr, "range %s\n", range->message.ascii);
  return 0;
}

int NVTX_API Pop(nvtxDomainHandle_t domain) {
  if (IsOurs(domain)) std::fprintf(stderr, "end\n");
  return 0;
}
}  // namespace

extern "C" __attribute__((visibility("default"))) int InitializeInjectionNvtx2(
    NvtxGetExportTableFunc_t find) {
  auto* callbacks = static_cast<const NvtxExportTableCallbacks*>(find(NVTX_ETID_CALLBACKS));
  NvtxFunctionTable table = nullptr;
  unsigned size = 0;
  callbacks->GetModuleFunctionTable(NVTX_CB_MODULE_CORE2, &table, &size);
  const auto set = [&](int id, auto* function) {
    *table[id] = reinterpret_cast<NvtxFunctionPointer>(function);
  };
  set(NVTX_CBID_CORE2_DomainCreateA, &Create);
  set(NVTX_CBID_CORE2_DomainRangePushEx, &Push);
  set(NVTX_CBID_CORE2_DomainRangePop, &Pop);
  return 1;
}
"""

HEADER = "nvtx3/nvToolsExt.h"

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("library", "cuda")]


@pytest.fixture
def profiler(tmp_path):
    """Path of the profiler's library."""
    compiler = shutil.which("g++")
    roots = [Path(nvcc).resolve().parents[1] for nvcc in [shutil.which("nvcc")] if nvcc]
    folders = [root / "include" for root in (*roots, Path("/usr/local/cuda"))]
    include = next((folder for folder in folders if (folder / HEADER).exists()), None)
    if compiler is None or include is None:
        pytest.skip(f"g++ and {HEADER} of a CUDA toolkit are needed")
    library = tmp_path / "libprofiler.so"
    command = [
        compiler,
        "-std=c++20",
        "-shared",
        "-fPIC",
        f"-I{include}",
        "-xc++",
        "-",
        "-o",
        library,
    ]
    subprocess.run(command, input=PROFILER, text=True, check=True)
    return library


def ranges_of(folder, profiler, **environment):
    """What the profiler sees of a run of a QMoE node."""
    tensors = QMoECase(inter=64).tensors()
    np.savez(folder / "inputs.npz", **feeds_of(tensors))
    model = save_external(QMoECase(inter=64).model(tensors, "qmoe_plugin"), folder)
    program = (
        "import sys, numpy, qmoe_plugin\n"
        "session = qmoe_plugin.session(sys.argv[1], providers=['CUDAExecutionProvider'])\n"
        "session.run(None, dict(numpy.load(sys.argv[2])))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, model, folder / "inputs.npz"],
        env={**os.environ, "NVTX_INJECTION64_PATH": str(profiler), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return re.findall(r"^(?:domain|range|end).*$", done.stderr, re.MULTILINE)


def test_kernels_are_named(profiler, tmp_path):
    domain, *ranges = ranges_of(tmp_path, profiler, QMOE_PLUGIN_NVTX="1")
    assert domain == "domain qmoe_plugin"
    assert len(ranges) == 4
    for stage, (name, end) in zip(("fc1", "fc2"), (ranges[:2], ranges[2:]), strict=True):
        assert re.fullmatch(rf"range {stage} g\w+\.int4", name)
        assert end == "end"


def test_off_by_default(profiler, tmp_path):
    assert ranges_of(tmp_path, profiler, QMOE_PLUGIN_NVTX="") == []
