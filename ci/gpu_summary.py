"""Sums up the logs of ci/gpu_test as JSON: device, versions, commit, and what passed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def counts(report: Path) -> dict[str, Any]:
    """Counts of one junit report, with the skip reasons; pytest writes none if it is cut off."""
    if not report.exists():
        return {"unfinished": True}
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    numbers = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    reasons: dict[str, int] = {}
    for skipped in suite.iter("skipped"):
        reason = skipped.get("message", "")
        reasons[reason] = reasons.get(reason, 0) + 1
    gpu = sum("cuda" in (case.get("name") or "") for case in suite.iter("testcase"))
    seconds = round(float(suite.get("time", 0)), 1)
    return {**numbers, "named_cuda": gpu, "seconds": seconds, "skip_reasons": reasons}


def main() -> None:
    folder = Path(sys.argv[1])
    import onnxruntime

    import qmoe_plugin

    summary: dict[str, Any] = {
        "device": output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"),
        "nvcc": output("nvcc", "--version").splitlines()[-1],
        "onnxruntime": onnxruntime.__version__,
        "providers": onnxruntime.get_available_providers(),
        "qmoe_plugin": qmoe_plugin.__version__,
        "commit": os.environ.get("QMOE_PLUGIN_COMMIT") or output("git", "rev-parse", "HEAD"),
        "tests": counts(folder / "tests.xml"),
        "memory": counts(folder / "memory.xml"),
    }
    for log in sorted([*folder.glob("memcheck-*.log"), *folder.glob("racecheck-*.log")]):
        found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", log.read_text(errors="replace"))
        summary[log.stem] = {
            "summary": found[-1] if found else "missing",
            **counts(log.with_suffix(".xml")),
        }
    text = json.dumps(summary, indent=2)
    (folder / "gpu-tests.json").write_text(text + "\n")
    print(text)
    if '"unfinished"' in text:
        sys.exit("some tests did not finish")


if __name__ == "__main__":
    main()
