"""Runs onnxruntime-genai's own loop; a script, without this repository's or other packages.

    genai_child.py probe DEVICE               says what is missing to run there, if anything is
    genai_child.py run DEVICE FOLDER IN OUT   IN: an .npz with `prompt` and `count`;
                                              OUT: an .npz with `tokens` and `logits`

A process of its own, because genai brings a second ONNX Runtime: both would load the same library
of the CUDA execution provider, which belongs to one runtime only.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

import numpy as np


def problem(device: str) -> str:
    """What is missing to run models on "cpu" or "cuda"; empty if nothing is."""
    try:
        import onnxruntime_genai as genai
    except ImportError as error:
        return f"onnxruntime-genai cannot be imported: {error}"
    if device == "cpu":
        return ""
    if not genai.is_cuda_available():
        return "onnxruntime-genai has no CUDA: install onnxruntime-genai-cuda in its place"
    try:
        ctypes.CDLL(str(Path(genai.__file__).parent / "libonnxruntime-genai-cuda.so"))
    except OSError as error:
        return f"the CUDA library of onnxruntime-genai-cuda does not load: {error}"
    return ""


def generate(
    folder: str, device: str, prompt: list[int], count: int
) -> tuple[list[int], np.ndarray[Any, Any]]:
    """Greedy decoding.

    Returns:
        The tokens, and the logits that each was chosen from: `[tokens, vocabulary]`.
    """
    import onnxruntime_genai as genai

    model = genai.Model(folder)
    if model.device_type.lower() != device:
        raise RuntimeError(f"the model runs on {model.device_type}, not on {device}")
    parameters = genai.GeneratorParams(model)
    # Sliding-window models need room for their buffers from the start.
    parameters.set_search_options(max_length=64, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(prompt)
    tokens: list[int] = []
    logits: list[np.ndarray[Any, Any]] = []
    while len(tokens) < count and not generator.is_done():
        logits.append(np.array(generator.get_logits(), np.float32)[0, -1])
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
    return tokens, np.stack(logits)


def main(task: str, device: str, *paths: str) -> None:
    if task == "probe":
        print(problem(device))
        return
    folder, given, output = paths
    with np.load(given) as data:
        tokens, logits = generate(folder, device, data["prompt"].tolist(), int(data["count"]))
    np.savez(output, tokens=tokens, logits=logits)


if __name__ == "__main__":
    main(*sys.argv[1:])
