"""Makes inputs to try a model out with: random tokens, no past."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qmoe_plugin import genai
from qmoe_plugin.ort_values import Array

_STATES = ("past",)
"""How the names of a decoder's states begin: they start with zeros."""


@dataclass(frozen=True)
class Wanted:
    """What inputs should be like.

    Attributes:
        given: Inputs that are not to be made, by name.
        dims: Sizes of symbolic dimensions, by name. Those of `given` count without being said.
        tokens: Tokens of a sequence.
        seed: Of the random numbers.
    """

    given: Mapping[str, Array] = field(default_factory=dict)
    dims: Mapping[str, int] = field(default_factory=dict)
    tokens: int = 8
    seed: int = 0


def sample_inputs(model: ir.Model, wanted: Wanted) -> dict[str, Array]:
    """Inputs for a model.

    Tokens are random, floats are drawn from N(0, 1), masks are ones, positions count from 0, and
    states ("past...") are empty, or zeros where their size is fixed.

    Args:
        model: The model.
        wanted: What is known.

    Returns:
        All inputs of its graph, by name.

    Raises:
        ValueError: If an input is given that the model does not have or of another type or rank, or
            if nothing tells what another one may be; the message says what to give.
    """
    inputs = {value.name or "": value for value in _graph_inputs(model)}
    unknown = sorted(set(wanted.given) - set(inputs))
    if unknown:
        raise ValueError(
            f"the model has no input {', '.join(unknown)}; it has {', '.join(inputs) or 'none'}"
        )
    dims = dict(wanted.dims)
    for name, array in wanted.given.items():
        _check(inputs[name], array, dims)
    rng = np.random.default_rng(wanted.seed)
    made = {}
    for name, value in inputs.items():
        if name in wanted.given:
            made[name] = wanted.given[name]
        else:
            shape = tuple(_size(value, axis, dims, wanted.tokens) for axis in range(_rank(value)))
            made[name] = _make(model, value, shape, rng)
    return made


def known_dims(inputs: Wanted, model: Path) -> Wanted:
    """What is wanted, with what a configuration of onnxruntime-genai beside the model says."""
    size = genai.head_size(model.parent)
    dims = {} if size is None else {"kv_cache_dim": size}
    return Wanted(inputs.given, {**dims, **inputs.dims}, inputs.tokens, inputs.seed)


def state_shape(value: ir.Value, batch: int, dims: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of a state before the first token: without a past, a window at its full size.

    Args:
        value: The input of the model.
        batch: How many sequences there are.
        dims: Sizes of symbolic dimensions that are known.
    """
    sizes = []
    for axis, dim in enumerate(value.shape or ()):
        name = "" if isinstance(dim, int) else str(dim.value or "")
        if isinstance(dim, int):
            sizes.append(dim)
        elif axis == 0:
            sizes.append(batch)
        elif "sliding" in name.lower():
            sizes.append(_window(value) or 0)
        else:
            sizes.append(dims.get(name, 0))
    return tuple(sizes)


def _graph_inputs(model: ir.Model) -> list[ir.Value]:
    """Those that must be fed."""
    return [value for value in model.graph.inputs if not value.is_initializer()]


def _rank(value: ir.Value) -> int:
    if value.shape is None or value.dtype is None:
        raise ValueError(
            f"the model does not say the type and shape of input '{value.name}'; give it (--inputs)"
        )
    return value.shape.rank()


def _check(value: ir.Value, array: Array, dims: dict[str, int]) -> None:
    """Refuses an input that the model does not take, and notes its symbolic dimensions."""
    if value.dtype is not None and array.dtype != value.dtype.numpy():
        raise ValueError(
            f"input '{value.name}' is given as {array.dtype}, but it is {value.dtype.numpy()}"
        )
    if value.shape is None:
        return
    fits = array.ndim == value.shape.rank()
    for dim, size in zip(value.shape, array.shape, strict=False):
        if isinstance(dim, int):
            fits = fits and dim == size
        elif dim.value is not None:
            fits = fits and dims.setdefault(dim.value, size) == size
    if not fits:
        raise ValueError(
            f"input '{value.name}' is given with shape {list(array.shape)}, but it is {value.shape}"
            + (f" with {dims}" if dims else "")
        )


def _size(value: ir.Value, axis: int, dims: dict[str, int], tokens: int) -> int:
    """The size of a dimension; what it says of others is noted."""
    assert value.shape is not None
    dim = value.shape[axis]
    if isinstance(dim, int):
        return dim
    name = dim.value or ""
    if name not in dims:
        guess = _guess(value, name.lower(), dims, tokens)
        if guess is None:
            raise ValueError(
                f"dimension {axis} of input '{value.name}', '{name}', may have any size; say which "
                f"(--dim {name or 'NAME'}=SIZE), or give the input (--inputs)"
            )
        dims[name] = guess
    return dims[name]


def _guess(value: ir.Value, name: str, dims: Mapping[str, int], tokens: int) -> int | None:
    """The size that a dimension of this name has by custom of exporters."""
    known = {dim.lower(): size for dim, size in dims.items()}
    if "batch" in name:
        return 1
    if "sliding" in name:
        return _window(value)
    if _is_total(name):
        past = next((known[dim] for dim in known if _is_past(dim)), 0)
        return past + next((known[dim] for dim in known if _is_new(dim)), tokens)
    if _is_past(name):
        return 0
    return tokens if _is_new(name) else None


def _is_total(name: str) -> bool:
    return "total" in name or "+" in name or "plus" in name


def _is_past(name: str) -> bool:
    return "past" in name and "sliding" not in name and not _is_total(name)


def _is_new(name: str) -> bool:
    return ("seq" in name or "token" in name) and "past" not in name and not _is_total(name)


def _window(value: ir.Value) -> int | None:
    """The window of the attention that reads a state; None if it has none."""
    for node in value.consumers():
        attribute = node.attributes.get("local_window_size")
        if attribute is not None and attribute.as_int() > 0:
            return attribute.as_int()
    return None


def _make(
    model: ir.Model, value: ir.Value, shape: tuple[int, ...], rng: np.random.Generator
) -> Array:
    """An input of this shape."""
    assert value.dtype is not None
    name, dtype = (value.name or "").lower(), value.dtype.numpy()
    if value.dtype.is_floating_point():
        return (np.zeros(shape) if name.startswith(_STATES) else rng.standard_normal(shape)).astype(
            dtype
        )
    if "mask" in name:
        return np.ones(shape, dtype)
    if "position" in name:
        return np.broadcast_to(np.arange(shape[-1]), shape).astype(dtype)
    count = _vocabulary(model, value)
    if count is None:
        raise ValueError(
            f"input '{value.name}' is {dtype}, and nothing tells what it may hold; give it "
            "(--inputs FILE.npz)"
        )
    tokens: npt.NDArray[np.int64] = rng.integers(0, count, shape)
    return tokens.astype(dtype)


def _vocabulary(model: ir.Model, value: ir.Value) -> int | None:
    """How many rows the table has that this value picks from; None if there is no such table."""
    for node in value.consumers():
        if node.op_type in ("Gather", "GatherBlockQuantized") and node.inputs[1] is value:
            table = node.inputs[0]
            if table is not None and table.shape is not None and isinstance(table.shape[0], int):
                return table.shape[0]
    for output in model.graph.outputs:
        if output.name == "logits" and output.shape is not None and "ids" in (value.name or ""):
            size = output.shape[-1]
            return size if isinstance(size, int) else None
    return None
