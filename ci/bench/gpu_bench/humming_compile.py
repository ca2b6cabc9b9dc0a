"""The process that humming_setup starts: python -m gpu_bench.humming_compile JOBS"""

from __future__ import annotations

import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import torch

from .cases import CASES
from .humming_peer import Schedule, takes, variants

_SPARE_CORES = 4  # left to the process that measures


def main() -> None:
    """Compiles; says what cannot be, and how long it took."""
    cases = {case.name: case for case in CASES}
    started, failed = time.monotonic(), 0
    torch.cuda.set_device(0)
    with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)) - _SPARE_CORES)) as pool:
        waiting = []
        for name, numbers in json.loads(sys.argv[1]):
            if not takes(cases[name]):
                continue
            for tokens in numbers:
                for gemm_type in variants(cases[name], tokens):
                    try:
                        tasks = Schedule(cases[name], tokens, gemm_type).compile_tasks()
                    except Exception as error:  # of whatever type it raises
                        print(f"Humming, {name} {tokens} tokens: {str(error)[-300:]}", flush=True)
                        continue
                    waiting += [(name, tokens, pool.submit(task)) for task in tasks]
        for name, tokens, future in waiting:
            try:
                future.result()
            except Exception as error:  # as above
                failed += 1
                print(f"Humming, {name} {tokens} tokens: {str(error)[-300:]}", flush=True)
    seconds = time.monotonic() - started
    print(f"Humming: {len(waiting)} kernels in {seconds:.0f} s, {failed} failed", flush=True)


if __name__ == "__main__":
    main()
