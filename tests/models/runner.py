"""Runs decoder models exported by onnxruntime-genai's builder or mobius through a plain session.

What the states are called and how large they are is read from the session's inputs.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto

_INTEGERS = {"tensor(int64)": np.dtype(np.int64), "tensor(int32)": np.dtype(np.int32)}
# Of states: the ONNX type, and one of numpy with the same number of bytes.
_FLOATS = {
    "tensor(float)": (TensorProto.FLOAT, np.dtype(np.float32)),
    "tensor(float16)": (TensorProto.FLOAT16, np.dtype(np.float16)),
    "tensor(bfloat16)": (TensorProto.BFLOAT16, np.dtype(np.uint16)),
}


# What the recipes in checkpoints.py say, and the exported inputs leave symbolic.
HEAD_SIZE = 32
SLIDING_WINDOW = 32
_SLIDING_LENGTH = "past_sliding_length"


class Decoder:
    """A decoder with its key-value cache and recurrent states; one sequence."""

    def __init__(self, session: Any) -> None:
        """Prepares empty states for an onnxruntime.InferenceSession.

        Sliding-window layers of the genai builder have buffers of fixed size, the window's.
        """
        self._session = session
        self._sizes = {
            "batch": 1,
            "batch_size": 1,
            "kv_cache_dim": HEAD_SIZE,
            _SLIDING_LENGTH: SLIDING_WINDOW,
        }
        self._inputs = {value.name: value for value in session.get_inputs()}
        self._outputs = [value.name for value in session.get_outputs()]
        # On the GPU, ONNX Runtime wants a sliding window's past and present in one buffer.
        shared = "CUDAExecutionProvider" in session.get_providers()
        self._states: dict[str, ort.OrtValue] = {}
        self._buffers: dict[str, ort.OrtValue] = {}
        for name, value in self._inputs.items():
            if name.startswith("past"):
                if shared and _SLIDING_LENGTH in value.shape:
                    self._buffers[name] = self._zeros(value, "cuda")
                else:
                    self._states[name] = self._zeros(value, "cpu")
        self.length = 0

    def _zeros(self, state: Any, device: str) -> ort.OrtValue:
        """Empty sequence axes; buffers and recurrent states at their full size."""
        sizes = self._sizes
        shape = [size if isinstance(size, int) else sizes.get(size, 0) for size in state.shape]
        element_type, dtype = _FLOATS[state.type]
        value = ort.OrtValue.ortvalue_from_shape_and_type(shape, element_type, device, 0)
        value.update_inplace(np.zeros(shape, dtype))
        return value

    def step(self, tokens: list[int]) -> NDArray[np.float32]:
        """Appends tokens and returns their logits `[len(tokens), vocabulary]`."""
        total = self.length + len(tokens)
        positions = np.arange(self.length, total, dtype=np.int64)[None]
        feeds: dict[str, NDArray[Any]] = {}
        for name, value in self._inputs.items():
            if name == "input_ids":
                feeds[name] = np.array([tokens], _INTEGERS[value.type])
            elif name == "attention_mask":
                feeds[name] = np.ones((1, total), _INTEGERS[value.type])
            elif name == "position_ids":
                three = len(value.shape) == 3  # multimodal rotary positions: [3, batch, sequence]
                feeds[name] = np.tile(positions, (3, 1, 1)) if three else positions
            elif name not in self._states and name not in self._buffers:
                raise ValueError(f"the model has an input {name!r} that this runner does not know")
        results = self._run(feeds)
        logits: NDArray[np.float32] = results.pop("logits").numpy()[0].astype(np.float32)
        self._states = {_past_name(name, self._states): value for name, value in results.items()}
        self.length = total
        return logits

    def _run(self, feeds: dict[str, NDArray[Any]]) -> dict[str, ort.OrtValue]:
        """All outputs but those that are in a shared buffer."""
        binding = self._session.io_binding()
        for name, array in feeds.items():
            binding.bind_cpu_input(name, array)
        for name, value in (self._states | self._buffers).items():
            binding.bind_ortvalue_input(name, value)
        names = []
        for name in self._outputs:
            past = name if name == "logits" else _past_name(name, self._states | self._buffers)
            if past in self._buffers:
                binding.bind_ortvalue_output(name, self._buffers[past])
            else:
                binding.bind_output(name)
                names.append(name)
        self._session.run_with_iobinding(binding)
        outputs = dict(zip(self._outputs, binding.get_outputs(), strict=True))
        return {name: outputs[name] for name in names}

    def generate(self, prompt: list[int], count: int) -> tuple[list[int], NDArray[np.float32]]:
        """Greedy decoding.

        Returns:
            The new tokens, and the logits of all positions but the last token's:
            `[len(prompt) + count - 1, vocabulary]`.
        """
        logits = [self.step(prompt)]
        tokens = [int(logits[-1][-1].argmax())]
        while len(tokens) < count:
            logits.append(self.step(tokens[-1:]))
            tokens.append(int(logits[-1][-1].argmax()))
        return tokens, np.concatenate(logits)


def _past_name(present: str, states: dict[str, Any]) -> str:
    """The state input that an output feeds: present.3.key -> past_key_values.3.key."""
    suffix = re.sub(r"^present(_key_values)?", "", present)
    for prefix in ("past_key_values", "past"):
        if prefix + suffix in states:
            return prefix + suffix
    raise ValueError(f"output {present!r} feeds none of the states {sorted(states)}")
