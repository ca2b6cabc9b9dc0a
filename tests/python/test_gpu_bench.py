"""The GPU benchmark's parts that need no GPU: cases, files of results, tables, a run on the CPU."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "ci"), str(ROOT / "ci" / "bench")]

import gpu_pages  # noqa: E402
import profile_gpu  # noqa: E402
from gpu_bench import cases, results, targets, weights  # noqa: E402


def cell(case="a", tokens=1, graph=True, date="2026-11-21", **changes):
    ours = {"p50_us": 20.0, "p95_us": 21.0, "min_us": 19.0, "max_us": 22.0, "runs": 9}
    return {
        "case": case, "tokens": tokens, "graph": graph, "floor_us": 10.0, "ours": ours,
        "stock": {"p50_us": 40.0}, "commit": "c1", "date": date, "onnxruntime": "1.31.1", **changes,
    }  # fmt: skip


def save(path, *cells, device="GPU"):
    path.write_text(json.dumps({"version": 2, "device": device, "cells": cells}))


# ---------------------------------------------------------------------------------------- cases


def test_names_are_unique_and_every_layer_has_every_format():
    names = [case.name for case in cases.CASES]
    assert len(set(names)) == len(names)
    assert {f"{layer} {fmt}" for layer in cases.LAYERS for fmt in cases.FORMATS} <= set(names)


def test_select():
    listed = cases.select()
    assert all(case.listed for case in listed)
    assert {case.name for case in cases.select(quick=True)} < {case.name for case in listed}
    assert [c.name for c in cases.select("^mixtral.* nvfp4$")] == ["mixtral-8x7b nvfp4"]
    assert {c.format for c in cases.select(formats=["int8", "fp8"])} == {"int8", "fp8"}
    with pytest.raises(ValueError, match="no case matches"):
        cases.select("no such layer")


@pytest.mark.parametrize("case", cases.select(), ids=lambda case: case.name)
def test_nodes_and_floors(case):
    assert case.nodes() >= cases.WEIGHT_SETS
    one, bound = case.floor_us(1, case.expected_experts(1), 4e12, 8e14)
    assert bound == "memory"
    assert one == pytest.approx(case.expected_experts(1) * case.expert_bytes / 4e6)
    many, bound = case.floor_us(8192, case.expected_experts(8192), 4e12, 8e14)
    assert bound == "arithmetic"
    rows = 8192 * max(case.topk, 1)
    assert many == pytest.approx(2 * rows * case.expert_weights / 8e8)


def test_bytes():
    by_name = {case.name: case for case in cases.CASES}
    expert = 3 * 2880 * 2880
    assert by_name["gpt-oss-20b int4"].expert_bytes == expert * (4 + 16 / 32) / 8
    assert by_name["gpt-oss-20b int4 with zero points"].expert_bytes == expert * (4 + 20 / 32) / 8
    assert by_name["gpt-oss-20b mxfp4"].expert_bytes == expert * (4 + 8 / 32) / 8
    assert by_name["gpt-oss-20b nvfp4"].expert_bytes == expert * (4 + 8 / 16) / 8
    assert by_name["gpt-oss-20b fp8"].expert_bytes == expert


def test_random_files(tmp_path):
    files = weights.RandomFiles(tmp_path)
    assert files.name("codes", 100) == files.name("codes", 50) == "codes.bin"
    before = (tmp_path / "codes.bin").read_bytes()
    files.name("codes", len(before) + 1)
    after = (tmp_path / "codes.bin").read_bytes()
    assert len(after) > len(before)
    assert after.startswith(before)
    for kind in ("scales4.float16", "scales8.float16"):
        values = np.fromfile(tmp_path / files.name(kind, 100), np.float16)
        assert 0 < values.min() < values.max() < 1
    bits = np.fromfile(tmp_path / files.name("scales4.bfloat16", 100), np.uint16)
    values = (bits.astype(np.uint32) << 16).view(np.float32)
    assert 0 < values.min() < values.max() < 1
    codes = np.fromfile(tmp_path / files.name("fp8", 100), np.uint8)
    assert not np.isin(codes, [0x7F, 0xFF]).any()  # NaN


# -------------------------------------------------------------------------------------- results


def test_statistics():
    found = results.summarize([float(value) for value in range(100, -1, -1)])
    assert found == {"p50_us": 50, "p95_us": 95, "min_us": 0, "max_us": 100, "runs": 101}
    assert results.summarize([3.0])["p95_us"] == 3.0
    assert results.percentile([1.0, 2.0], 0.25) == 1.25


def test_merge_and_resume(tmp_path):
    path = tmp_path / "gpu-x.json"
    humming = {"p50_us": 30.0, "commit": "c0", "date": "2026-11-01"}
    save(path, cell(tokens=1, humming=humming), cell(tokens=8))
    merged = results.Results(path, {"device": "GPU"})
    assert merged.has(("a", 1, True), "c1", ("ours", "stock"))
    assert not merged.has(("a", 1, True), "c1", ("ours", "humming"))  # of another commit
    assert not merged.has(("a", 1, True), "c2", ("ours",))
    assert not merged.has(("a", 1, False), "c1", ("ours",))

    merged.add(cell(tokens=1, commit="c2", date="2026-11-22", ours={"p50_us": 15.0}))
    merged.add(cell(tokens=1, graph=False))
    assert merged.add_contestant(("a", 8, True), "humming", {"p50_us": 9.0, "commit": "c2"})
    assert not merged.add_contestant(("b", 8, True), "humming", {"p50_us": 9.0})
    merged.write()
    found = {results.key_of(c): c for c in results.read_cells(path)}
    assert list(found) == [("a", 1, True), ("a", 8, True), ("a", 1, False)]
    assert found["a", 1, True]["ours"] == {"p50_us": 15.0}
    assert found["a", 1, True]["humming"] == humming  # kept, with its own date
    assert found["a", 8, True]["humming"]["p50_us"] == 9.0
    assert [p.name for p in tmp_path.iterdir()] == ["gpu-x.json"]


def test_a_kept_contestant_says_when_it_is_of(tmp_path):
    path = tmp_path / "gpu-x.json"
    save(path, cell(humming={"p50_us": 30.0}))
    merged = results.Results(path, {"device": "GPU"})
    merged.add(cell(commit="c2", date="2026-11-22"))
    assert merged.cells()[0]["humming"] == {"date": "2026-11-21", "commit": "c1", "p50_us": 30.0}


def test_files_of_others_are_refused(tmp_path):
    path = tmp_path / "gpu-x.json"
    save(path, cell(), device="another GPU")
    with pytest.raises(ValueError, match="--output"):
        results.Results(path, {"device": "GPU"})
    with pytest.raises(ValueError, match="version 2"):
        results.cells_of({"version": 3, "cells": []})


def test_files_of_the_first_version():
    content = {
        "device": "GPU", "onnxruntime": "1.31.1", "commit": "c0", "date": "2026-11-20",
        "limits": {"copy_bytes_per_s": 4e12},
        "cases": [
            {"name": "a", "nodes": 4, "stock_refuses": "no", "cells": [
                {"tokens": 8, "floor_us": 5.0, "ours_us": 10.0, "ours_spread_us": [9.0, 11.0]},
            ]},
        ],
    }  # fmt: skip
    (found,) = results.cells_of(content)
    assert results.key_of(found) == ("a", 8, True)
    assert found["ours"] == {"p50_us": 10.0, "min_us": 9.0, "max_us": 11.0}
    assert found["stock"] == {"refusal": "no"}
    assert results.of_floor(found, "ours") == 0.5
    assert results.time_of(found, "stock") is None


def test_the_newest_cell_counts():
    old, new = cell(date="2026-11-20"), cell(date="2026-11-21", floor_us=11.0)
    other = cell("b")
    assert results.newest([[old, other], [new]]) == [new, other]
    assert results.newest([[new], [old]]) == [new]


# -------------------------------------------------------------------------------------- targets


def timed(case, tokens, ours, floor=1.0, **others):
    contestants = {name: {"p50_us": time} for name, time in {"ours": ours, **others}.items()}
    return {"case": case, "tokens": tokens, "graph": True, "floor_us": floor, **contestants}


def judged(*cells):
    """(rule, case, tokens) to whether it is met."""
    return {(v.rule, v.case, v.tokens): v.met for v in targets.verdicts(cells)}


def test_targets_are_of_cases_that_are_measured():
    listed = {case.name: case for case in cases.select()}
    for name, times in targets.TARGETS_US.items():
        assert set(times) <= set(cases.tokens_of(listed[name], (), quick=False))


def test_times():
    found = judged(timed("gpt-oss-20b int4", 1, 18.0), timed("gpt-oss-20b int4", 8, 85.0))
    assert found["target", "gpt-oss-20b int4", 1]
    assert not found["target", "gpt-oss-20b int4", 8]


def test_what_was_not_measured():
    cells = [timed("gpt-oss-20b int4", tokens, 1.0) for tokens in (1, 8, 64, 512, 2048)]
    refused = timed("MatMulNBits int4 2880x5120", 1, None)
    cells += [{**timed("gpt-oss-20b mxfp4", 1, 1.0), "graph": False}, refused]
    left = targets.unmeasured(cells)
    assert left["gpt-oss-20b int4"] == [8192]
    assert left["gpt-oss-20b mxfp4"] == left["MatMulNBits int4 2880x5120"] == []
    every = [timed(c.name, t, 1.0) for c in cases.CASES for t in (1, *cases.TOKENS, cases.LONGEST)]
    assert targets.unmeasured(every) == {}


def test_no_cliffs():
    rule = "1.1 times the next power of two"
    found = judged(timed("a", 16, 20.0), timed("a", 32, 10.0), timed("a", 64, 9.5))
    assert found == {(rule, "a", 16): False, (rule, "a", 32): True}


def test_variants():
    found = judged(
        timed("a", 1, 10.0), timed("a bfloat16", 1, 10.5), timed("a with bias", 1, 10.5),
        timed("a with zero points", 1, 11.5),
    )  # fmt: skip
    assert found == {
        ("1.1 times float16", "a bfloat16", 1): True,
        ("1.1 times bfloat16", "a", 1): True,
        ("1.1 times without zero points", "a with zero points", 1): False,
        ("bias is free", "a with bias", 1): False,
    }


@pytest.mark.parametrize(
    ("tokens", "ours", "met"),
    [(8, 6.0, True), (8, 7.0, False), (512, 11.0, True), (512, 12.0, False)],
)
def test_skewed(tokens, ours, met):
    found = judged(timed("a", tokens, 10.0, 5.0), timed("a skewed", tokens, ours, 3.0))
    assert found == {("as uniform routing", "a skewed", tokens): met}


def test_others():
    rule = "stock, half of it for QMoE in 4 bits"
    for case, stock, met in (
        ("x int4", 19.0, False),
        ("x int4", 20.0, True),
        ("x int8", 10.0, True),
        ("x fp8", 9.0, False),
        ("MatMulNBits int4 1x1", 10.0, True),
    ):
        assert judged(timed(case, 3, 10.0, stock=stock)) == {(rule, case, 3): met}
    assert judged(timed("x", 3, 10.0, humming=9.0)) == {("Humming", "x", 3): False}


# ---------------------------------------------------------------------------------------- pages


def test_tables_and_picture(tmp_path):
    refused = {"refusal": "not built"}
    save(
        tmp_path / "gpu-x.json",
        cell(tokens=8, humming={"p50_us": 30.0}),
        cell(tokens=1, stock=refused),
        cell("b < c", ours=refused),
        cell(graph=False),
    )
    save(tmp_path / "gpu-y.json", cell(), device="another GPU")
    (tmp_path / "gpu-tests-x.json").write_text("{}")  # of the tests, not of the benchmark

    lines = gpu_pages.sections(tmp_path)
    assert [line for line in lines if line.startswith("#")] == ["## GPU", "## another GPU"]
    assert "| a | 1 | 10.0 | 20.0 | 21.0 | 50% | - | - | - | - |" in lines
    assert "| a | 8 | 10.0 | 20.0 | 21.0 | 50% | 40.0 | 2.00 | 30.0 | 1.50 |" in lines
    assert "| b < c | 1 | 10.0 | - | - | - | 40.0 | - | - | - |" in lines
    assert any("without a CUDA graph" in line for line in lines)

    overview = gpu_pages.overview(tmp_path)
    assert "| a | 50 / - / - | 50 / 25 / 33 |" in overview
    assert any("gpu-another-gpu.svg" in line for line in overview)

    pictures = gpu_pages.pictures(tmp_path)
    assert sorted(pictures) == ["gpu-another-gpu.svg", "gpu-gpu.svg"]
    svg = ElementTree.fromstring(pictures["gpu-gpu.svg"])
    texts = [element.text for element in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert {"ours", "stock", "Humming", "a", "b < c", "1", "8", "50%"} <= set(texts)


def test_numbers_in_the_readme(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_pages, "README_CASES", ("a", "b"))
    monkeypatch.setattr(gpu_pages, "README_TOKENS", (1, 8))
    times, refusal = {"p50_us": 40.0, "date": "2026-11-19"}, {"refusal": "no", "date": "2026-11-20"}
    made = [
        cell(case, tokens, stock=stock)
        for case, stock in (("a", times), ("b", refusal))
        for tokens in (1, 8)
    ]
    save(tmp_path / gpu_pages.README_FILE, *made)
    first, last = gpu_pages.README_MARKS
    text = gpu_pages.readme(tmp_path, f"before\n{first}stale\n{last}after\n")
    assert text.startswith(f"before\n{first}On an GPU")
    assert text.endswith(f"{last}after\n")
    assert "stale" not in text
    assert "ours (2026-11-21) /\nstock (2026-11-19 to 2026-11-20)" in text
    assert "| a | 20.0 / 40.0 | 20.0 / 40.0 |\n| b | 20.0 / refused | 20.0 / refused |\n" in text


def test_no_results(tmp_path):
    assert gpu_pages.sections(tmp_path) == gpu_pages.overview(tmp_path) == []
    assert gpu_pages.pictures(tmp_path) == {}


# -------------------------------------------------------------------------------------- profile


def test_what_ncu_says():
    lines = [
        "==PROF== Connected to process 1",
        '"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value","Rule Name",'
        '"Rule Description"',
        '"0","gemv_sm80","GPU Speed Of Light Throughput","Duration","us","17.50","",""',
        '"0","gemv_sm80","GPU Speed Of Light Throughput","DRAM Throughput","%","71.2","",""',
        '"0","gemv_sm80","Warp State Statistics","","","","CPIStall","waits, for L1TEX"',
        '"1","unpermute","GPU Speed Of Light Throughput","Duration","us","2.10","",""',
    ]
    kernels = profile_gpu.read(lines)
    assert kernels == [
        {"kernel": "gemv_sm80", "time": "17.50 us", "DRAM %": "71.2", "stalls": "waits, for L1TEX"},
        {"kernel": "unpermute", "time": "2.10 us"},
    ]
    table = profile_gpu.lines_of(kernels)
    assert [line.split()[0] for line in table] == ["kernel", "gemv_sm80", "waits,", "unpermute"]
    assert profile_gpu.read(["==ERROR== no kernels"]) == []


# -------------------------------------------------------------------------------------- program


@pytest.fixture
def bench(library, capsys):
    """Runs the program. Returns its exit code, output and errors."""
    pytest.importorskip("torch")
    import bench_gpu

    def run(*arguments):
        code = bench_gpu.main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


def test_budget(bench):
    import bench_gpu

    endless = bench_gpu.Budget(None)
    assert endless.allows(1e9)
    assert not endless.spent
    short = bench_gpu.Budget(60.0)
    assert short.allows(1.0)
    assert not short.allows(61.0)
    assert short.spent
    assert not short.allows(0.0)  # what comes first is not skipped for what is shorter


def test_a_run_on_the_cpu(bench, tmp_path):
    path = tmp_path / "results.json"
    common = ("--device", "cpu", "--output", path, "--commit", "c1", "--only")
    code, output, errors = bench(
        *common, "gpt-oss-20b (int4|fp8)$|2880x32 with bias", "--tokens", 1, 2
    )
    assert code == 0, errors
    assert "ready after" in output
    found = {results.key_of(c): c for c in results.read_cells(path)}
    names = ["gpt-oss-20b int4", "gpt-oss-20b fp8", "MatMulNBits int4 2880x32 with bias"]
    modes = ((1, True), (1, False), (2, True))
    assert set(found) == {(name, tokens, graph) for name in names for tokens, graph in modes}
    for one in found.values():
        assert one["ours"]["same_bits"]
        assert 0 < one["ours"]["min_us"] <= one["ours"]["p50_us"] <= one["ours"]["max_us"]
        assert one["floor_us"] > 0
        assert one["kernels"]
        assert one["commit"] == "c1"
    assert "p50_us" in found["gpt-oss-20b int4", 1, True]["stock"]
    assert "refusal" in found["gpt-oss-20b fp8", 1, True]["stock"]
    assert "difference_rms" not in found["MatMulNBits int4 2880x32 with bias", 1, True]

    code, output, errors = bench(*common, "gpt-oss-20b (int4|fp8)$", "--tokens", 1, 2, "--resume")
    assert code == 0, errors
    assert "ready after" not in output

    stock = found["gpt-oss-20b int4", 1, True]["stock"]
    code, output, errors = bench(*common, "20b int4$", "--tokens", 1, "--no-stock", "--graph-only")
    assert code == 0, errors
    found = {results.key_of(c): c for c in results.read_cells(path)}
    assert found["gpt-oss-20b int4", 1, True]["stock"].items() >= stock.items()

    before = path.read_text()
    code, output, errors = bench(*common, "gpt-oss-20b int4$", "--budget", 0.1)
    assert code == 0, errors
    assert "--resume goes on" in output
    assert path.read_text() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--only", "no such layer"), "no case matches"),
        (("--only", "("), "--only"),
        (("--tokens", "0"), "at least 1"),
        (("--device", "cpu"), "--output"),
        (
            ("--device", "cpu", "--output", "x", "--humming-wheel", "none.whl", "--humming-only"),
            "Humming is left out",
        ),
    ],
)
def test_wrong_arguments(bench, arguments, message):
    code, _, errors = bench(*arguments)
    assert code in (1, 2)
    assert message in errors
