"""Runs a model as it is, and gives values from inside it; or single nodes of it, fed by hand."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import onnx_ir as ir

from qmoe_plugin.bound import bind
from qmoe_plugin.devices import CPU, CPU_PROVIDER, CUDA_PROVIDER, Target
from qmoe_plugin.graph.apply import apply, load, serialize
from qmoe_plugin.graph.describe import STOCK_DOMAIN
from qmoe_plugin.graph.retarget import Retarget
from qmoe_plugin.library import OPS, runtime
from qmoe_plugin.ort_values import Array, to_array
from qmoe_plugin.session import FOLDER_KEY, register

if TYPE_CHECKING:
    import onnxruntime

Providers = Sequence[str | tuple[str, dict[str, Any]]]

_BOUND_ERROR = "Error in execution: "
"""How the errors of run_with_iobinding begin, which are plain RuntimeErrors."""


@dataclass(frozen=True)
class Source:
    """A model to run.

    Attributes:
        name: What to call it in messages.
        proto: The model, without its external data.
        folder: Where its external data is.
    """

    name: str
    proto: onnx.ModelProto
    folder: Path

    @classmethod
    def read(cls, path: Path, retarget: Retarget | None = None) -> Source:
        """Reads a model, and moves its nodes to our domain if told so."""
        proto = load(path)
        if retarget is not None:
            report = apply(retarget, proto)
            if not report.moved and not report.already:
                raise ValueError(f"{path} has no node that our kernels run: {report}")
        return cls(str(path) + (", retargeted" if retarget else ""), proto, path.parent.resolve())

    def graph(self) -> ir.Model:
        """The model, to look at."""
        return ir.from_proto(self.proto)


def run_with_taps(
    source: Source, providers: Providers, feeds: Mapping[str, Array], taps: Iterable[str]
) -> dict[str, Array]:
    """All outputs of a model, and values inside it; no states of sliding windows, see `bind`.

    Nodes run where their domain says: those of com.microsoft are onnxruntime's.

    Args:
        source: The model.
        providers: As for onnxruntime.InferenceSession.
        feeds: Its inputs, by name; floats are cast to the type that the model wants.
        taps: Names of values of its graph.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(source.proto)
    present = {output.name for output in proto.graph.output} | set(feeds)
    for name in taps:
        if name not in present:
            proto.graph.output.add(name=name)
            present.add(name)
    return _run(source, proto, providers, feeds) | dict(feeds)


def run_nodes(
    source: Source,
    providers: Providers,
    nodes: Mapping[str, ir.Node],
    values: Mapping[str, Array],
    types: Mapping[str, ir.DataType],
) -> dict[str, Array]:
    """The outputs of single nodes of a graph, by name, each run on given values.

    Args:
        source: The model.
        providers: As for onnxruntime.InferenceSession.
        nodes: By the name of their first output.
        values: What they read, but for constants.
        types: The types that they want it in.
    """
    if not nodes:
        return {}
    proto, feeds = cut_out(source, nodes, values, types)
    return _run(source, proto, providers, feeds)


def cut_out(
    source: Source,
    nodes: Mapping[str, ir.Node],
    values: Mapping[str, Array],
    types: Mapping[str, ir.DataType],
) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """A model of single nodes of a graph, none of which reads what another one gives.

    Constants stay where they are, in the model or in its files. Of each node, the first output is
    an output of the model, under its name.

    Args:
        source: The model.
        nodes: By the name of their first output.
        values: What they read, but for constants.
        types: The types that they want it in; those of the values where it does not say.

    Returns:
        The model, whose inputs are of the values' shapes, and what to feed it.
    """
    graph = source.proto.graph
    wanted = {name for node in nodes.values() for name in _input_names(node)}
    kept = [
        node
        for node in graph.node
        if (node.output and node.output[0] in nodes)
        or (node.op_type == "Constant" and node.output[0] in wanted)
    ]
    constants = {output for node in kept if node.op_type == "Constant" for output in node.output}
    used = [tensor for tensor in graph.initializer if tensor.name in wanted]
    constants |= {tensor.name for tensor in used}
    made = onnx.ModelProto(ir_version=source.proto.ir_version)
    made.opset_import.extend(source.proto.opset_import)
    made.graph.name = "nodes"
    made.graph.node.extend(kept)
    made.graph.initializer.extend(used)
    # What one of the nodes gives and another one reads is an output and an input.
    inputs = {n: f"{n}/fed" if n in nodes else n for n in sorted(wanted - constants)}
    for node in made.graph.node:
        node.input[:] = [inputs.get(name, name) for name in node.input]
    for name, fed in inputs.items():
        dtype = types.get(name) or ir.DataType.from_numpy(values[name].dtype)
        made.graph.input.append(
            onnx.helper.make_tensor_value_info(fed, dtype.value, values[name].shape)
        )
    for name in nodes:
        made.graph.output.add(name=name)
    return made, {fed: values[name] for name, fed in inputs.items()}


def activation_names(node: ir.Node) -> list[str]:
    """Names of what a node reads and what is not constant."""
    names = []
    for value in node.inputs:
        if value is None or value.is_initializer():
            continue
        producer = value.producer()
        if producer is None or producer.op_type != "Constant":
            names.append(value.name or "")
    return names


def _input_names(node: ir.Node) -> list[str]:
    return [value.name or "" for value in node.inputs if value is not None]


def _run(
    source: Source, proto: onnx.ModelProto, providers: Providers, feeds: Mapping[str, Array]
) -> dict[str, Array]:
    hint = ""
    if any(node.domain == STOCK_DOMAIN and node.op_type in OPS for node in proto.graph.node):
        hint = (
            "; onnxruntime's own kernels ran its nodes of com.microsoft: compare with another "
            "model, or retarget the model first, to have ours run them"
        )
    with ort_errors(source.name, hint):
        session = open_as_is(proto, source.folder, providers)
        outputs = bind(session, proto.graph, feeds)()
    return {name: to_array(value) for name, value in outputs.items()}


@contextlib.contextmanager
def ort_errors(name: str, hint: str = "") -> Iterator[None]:
    """Turns the errors of onnxruntime, which have no base of their own, into a RuntimeError."""
    try:
        yield
    except Exception as error:
        bound = isinstance(error, RuntimeError) and str(error).startswith(_BOUND_ERROR)
        if bound or type(error).__module__.startswith("onnxruntime"):
            raise RuntimeError(f"{name} does not run: {str(error).strip()}{hint}") from error
        raise


def default_providers(where: Target, *, cuda_graph: bool = False) -> Providers:
    """Those of a session that runs there, with stock products as exact as their type says.

    Args:
        where: What it runs on.
        cuda_graph: On CUDA, make a graph of the first run, which the others replay. Inputs and
            outputs must then be bound to memory on the device, and stay there.
    """
    if where == CPU:
        return [CPU_PROVIDER]
    options = {"use_tf32": "0", "enable_cuda_graph": str(int(cuda_graph))}
    return [(CUDA_PROVIDER, options), CPU_PROVIDER]


def open_as_is(
    proto: onnx.ModelProto,
    folder: Path,
    providers: Providers,
    options: onnxruntime.SessionOptions | None = None,
) -> onnxruntime.InferenceSession:
    """A session in which every node is of the domain that the model says."""
    options = options or runtime().SessionOptions()
    options.log_severity_level = 4  # errors are raised
    register(options)
    options.add_session_config_entry(FOLDER_KEY, str(folder))
    return runtime().InferenceSession(
        serialize(proto), options, providers=list(providers), enable_fallback=0
    )
