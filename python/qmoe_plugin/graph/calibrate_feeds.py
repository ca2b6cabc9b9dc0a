"""What models are run on to calibrate them: the user's arrays, or random tokens."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qmoe_plugin.sample_inputs import state_shape

Array = npt.NDArray[Any]
Feeds = dict[str, Array]

_TOKENS = "input_ids"


def from_files(paths: Sequence[str | os.PathLike[str]]) -> Iterator[Mapping[str, Array]]:
    """The arrays of .npz files, one run each, and the rows of tokens in .npy files.

    Raises:
        ValueError: For other files.
    """
    for path in map(Path, paths):
        if path.suffix not in (".npy", ".npz"):
            raise ValueError(f"{path} is no .npz file with inputs and no .npy file with tokens")
        try:
            loaded = np.load(path, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        if isinstance(loaded, np.ndarray):
            if loaded.dtype.kind not in "iu" or loaded.ndim not in (1, 2) or not loaded.size:
                raise ValueError(
                    f"{path} holds {loaded.dtype}{list(loaded.shape)}; tokens are integers "
                    "[length] or [rows, length]"
                )
            for row in np.atleast_2d(loaded):
                yield {_TOKENS: row[None]}
        else:
            with loaded:
                yield {name: loaded[name] for name in loaded.files}


def random_tokens(
    runs: int, length: int, vocabulary: int, seed: int = 0
) -> Iterator[Mapping[str, Array]]:
    """Runs of random tokens, [1, length] each."""
    rng = np.random.default_rng(seed)
    for _ in range(runs):
        yield {_TOKENS: rng.integers(0, vocabulary, (1, length))}


def complete(
    given: Mapping[str, Array], inputs: Sequence[ir.Value], dims: Mapping[str, int] | None = None
) -> Feeds:
    """All inputs of a run: those that are missing are what a prompt without a past has.

    That is a mask of ones, positions from 0 on, and caches of length 0, or of zeros where their
    size is fixed.

    Args:
        given: Arrays by the names of inputs.
        inputs: Those of the model.
        dims: Sizes of dimensions that the model leaves open.

    Raises:
        ValueError: For unknown inputs, and missing ones that this does not know.
    """
    known = {value.name or "": value for value in inputs}
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(f"the model has no input {', '.join(unknown)}; it has {', '.join(known)}")
    arrays = {name: np.asarray(array) for name, array in given.items()}
    batch, length = _tokens_shape(arrays)
    feeds: Feeds = {}
    for name, value in known.items():
        dtype = None if value.dtype is None else value.dtype.numpy()
        if name in arrays:
            array = arrays[name]
            feeds[name] = array if dtype is None or array.dtype == dtype else array.astype(dtype)
        elif dtype is None or value.shape is None:
            raise ValueError(f"give input '{name}': the model says neither its type nor its shape")
        elif "mask" in name:
            feeds[name] = np.ones((batch, length), dtype)
        elif "position" in name:
            positions = np.broadcast_to(np.arange(length), (batch, length))
            lead = (3,) if value.shape.rank() == 3 else ()  # of multimodal models
            feeds[name] = np.ascontiguousarray(
                np.broadcast_to(positions, (*lead, batch, length)), dtype
            )
        elif name.startswith("past") or ".past" in name or "cache" in name:
            feeds[name] = np.zeros(state_shape(value, batch, dims or {}), dtype)
        else:
            raise ValueError(f"give input '{name}': it cannot be made up")
    return feeds


def vocabulary_of(shapes: Mapping[str, Sequence[int | str | None]]) -> int:
    """The number of tokens, by the last dimension of the logits among these outputs.

    Raises:
        ValueError: If the model does not say.
    """
    last = shapes.get("logits", next(iter(shapes.values()), ()))
    if last and isinstance(last[-1], int) and last[-1] > 0:
        return last[-1]
    raise ValueError("the model does not say how many tokens there are; give the vocabulary")


def count_tokens(feeds: Mapping[str, Array]) -> int:
    """Tokens of a run."""
    ids = feeds.get(_TOKENS)
    return 0 if ids is None else math.prod(ids.shape)


def _tokens_shape(arrays: Mapping[str, Array]) -> tuple[int, int]:
    """Batch and length, by the tokens or else by the first array that has both."""
    ordered = [arrays[_TOKENS]] if _TOKENS in arrays else list(arrays.values())
    for array in ordered:
        if array.ndim >= 2:
            return array.shape[0], array.shape[1]
    return 1, 1
