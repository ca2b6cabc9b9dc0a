"""Runs a session in memory that was bound before: states of a model, or all on the device.

onnxruntime's GroupQueryAttention keeps the keys and values of a sliding window in a buffer of fixed
size: its `present` is to be its `past`, written in place. On CUDA it refuses anything else; on the
CPU it takes other memory, and leaves what it does not write as it was: undefined. That is `bind`.

`bind_on_device` is for measuring: its runs copy nothing between host and device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_ir as ir

from qmoe_plugin.devices import CUDA_PROVIDER
from qmoe_plugin.graph.describe import STOCK_DOMAIN
from qmoe_plugin.library import runtime
from qmoe_plugin.ort_values import Array, to_array, to_value, type_named

if TYPE_CHECKING:
    import onnxruntime

_ATTENTION, _PAST, _PRESENT = "GroupQueryAttention", (3, 4), (1, 2)
_SLIDING = "sliding_window_cache"


def shared_states(graph: onnx.GraphProto) -> dict[str, str]:
    """The outputs of a model that must lie in the memory of an input, with that input."""
    inputs = {value.name for value in graph.input}
    outputs = {value.name for value in graph.output}
    shared = {}
    for node in graph.node:
        if node.domain != STOCK_DOMAIN or node.op_type != _ATTENTION:
            continue
        if not any(attribute.name == _SLIDING and attribute.i for attribute in node.attribute):
            continue
        for past, present in zip(_PAST, _PRESENT, strict=True):
            if len(node.input) <= past or len(node.output) <= present:
                continue
            if node.input[past] in inputs and node.output[present] in outputs:
                shared[node.output[present]] = node.input[past]
    return shared


def bind(
    session: onnxruntime.InferenceSession,
    graph: onnx.GraphProto,
    feeds: Mapping[str, Array],
    wanted: Sequence[str] | None = None,
) -> Callable[[], dict[str, onnxruntime.OrtValue]]:
    """Gives a session its inputs.

    Args:
        session: The session.
        graph: What it runs.
        feeds: The inputs, by name; floats are cast to the type that the model wants.
        wanted: Names of outputs; None for all.

    Returns:
        Runs the session; gives the outputs, on the CPU, without those in the memory of an input:
        what of these was not written yet means nothing.

    Raises:
        ValueError: If an input is missing or of the wrong type.
    """
    values = values_for(session, feeds)
    names = [output.name for output in session.get_outputs()] if wanted is None else list(wanted)
    present = {output.name for output in session.get_outputs()}
    shared = {name: past for name, past in shared_states(graph).items() if name in present}
    if not shared:
        return lambda: dict(zip(names, session.run_with_ort_values(names, values), strict=True))
    device = _device(session)
    for past in shared.values():
        values[past] = _buffer(values[past], device)
    names = [name for name in names if name not in shared]

    def run() -> dict[str, onnxruntime.OrtValue]:
        binding = session.io_binding()
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        for name in names:
            binding.bind_output(name)
        for name, past in shared.items():
            binding.bind_ortvalue_output(name, values[past])
        session.run_with_iobinding(binding)
        return dict(zip(names, binding.get_outputs(), strict=False))  # the shared ones are last

    return run


def bind_on_device(
    session: onnxruntime.InferenceSession,
    feeds: Mapping[str, Array],
    results: Mapping[str, Array],
) -> onnxruntime.IOBinding:
    """Binds all inputs and outputs of a session to memory of the device that it runs on.

    Args:
        session: The session.
        feeds: The inputs, as for `bind`; they are copied.
        results: Arrays of the shapes and types of the outputs, by name.

    Returns:
        What `run_with_iobinding` takes, as often as wanted.

    Raises:
        ValueError: If an input is missing or of the wrong type.
    """
    device, binding = _device(session), session.io_binding()
    for name, value in values_for(session, feeds).items():
        binding.bind_ortvalue_input(name, _buffer(value, device))
    for output in session.get_outputs():
        array = results[output.name]
        made = runtime().OrtValue.ortvalue_from_shape_and_type(
            list(array.shape), ir.DataType.from_numpy(array.dtype).value, device, 0
        )
        binding.bind_ortvalue_output(output.name, made)
    return binding


def _device(session: onnxruntime.InferenceSession) -> str:
    """The device that a session runs on, as onnxruntime calls it where memory is made."""
    return "cuda" if session.get_providers()[0] == CUDA_PROVIDER else "cpu"


def _buffer(value: onnxruntime.OrtValue, device: str) -> onnxruntime.OrtValue:
    """A copy of a value that lies on a device, in memory of its own."""
    made = runtime().OrtValue.ortvalue_from_shape_and_type(
        value.shape(), value.element_type(), device, 0
    )
    array = to_array(value)
    # numpy knows no bfloat16 that onnxruntime takes; the bytes are what counts.
    made.update_inplace(array.view(np.uint16) if array.dtype.itemsize == 2 else array)
    return made


def values_for(
    session: onnxruntime.InferenceSession, feeds: Mapping[str, Array]
) -> dict[str, onnxruntime.OrtValue]:
    """The inputs that a session wants, in its types."""
    made = {}
    for value in session.get_inputs():
        if value.name not in feeds:
            raise ValueError(f"there is no value for input '{value.name}'")
        array, dtype = feeds[value.name], type_named(value.type)
        if dtype is not None and dtype.numpy() != array.dtype:
            if not dtype.is_floating_point():
                raise ValueError(
                    f"input '{value.name}' is {array.dtype}, but the model wants {dtype.numpy()}"
                )
            array = array.astype(dtype.numpy())
        made[value.name] = to_value(array)
    return made
