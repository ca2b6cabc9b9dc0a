"""Packs the weights of QMoE and MatMulNBits nodes ahead of time."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import overload

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from qmoe_plugin.devices import CPU, Target, target
from qmoe_plugin.graph.apply import load, parse, serialize, write
from qmoe_plugin.graph.describe import Description, UnsupportedError, describe
from qmoe_plugin.graph.external_data import DataFile, data_files, raw_bytes
from qmoe_plugin.graph.inputs import constant_tensor, given, string
from qmoe_plugin.graph.packed import LAYOUT_ATTRIBUTE, PACKED, PackedWeights, is_packed, read_header
from qmoe_plugin.graph.retarget import RESTORE_KEY, Retarget
from qmoe_plugin.graph.walk import Body, bodies, external_tensors, label, replace_tensors
from qmoe_plugin.library import DOMAIN, OPS, native
from qmoe_plugin.report import KernelChoice, NodeReport, PrepackReport

Model = ir.Model | onnx.ModelProto
PathLike = str | os.PathLike[str]
Store = Callable[[str, npt.NDArray[np.uint8]], ir.TensorProtocol]
"""Takes the name and the bytes of a tensor."""

_WEIGHTS = {"QMoE": {"fc1": 2, "fc2": 5}, "MatMulNBits": {"B": 1}}
"""Input numbers of packed weights."""

_VARYING = {"QMoE": (0, 1, 14), "MatMulNBits": (0,)}
"""Those of activations and routing."""

_FC3 = 8
_ACT_SCALES = (17, 18)

_FIRST_SM = 80
"""Even a build without CUDA kernels, which packs for all of them, knows this much."""

_STOCK_LAYOUTS = {"QMoE": "weights_prepacked", "MatMulNBits": "weight_prepacked"}

_TYPE_NAMES = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT8E4M3FN: "float8e4m3fn",
    ir.DataType.FLOAT8E8M0: "float8e8m0",
}
"""Those that are not called as in onnx_ir."""


@overload
def prepack(model: Model, *, sm: int | None = None) -> PrepackReport: ...
@overload
def prepack(
    model: PathLike | bytes, output: PathLike, *, sm: int | None = None
) -> PrepackReport: ...
def prepack(
    model: Model | PathLike | bytes, output: PathLike | None = None, *, sm: int | None = None
) -> PrepackReport:
    """Packs the weights of a model's QMoE and MatMulNBits nodes, so that sessions need not.

    Nodes of com.microsoft are retargeted first, see `qmoe_plugin.retarget`. Then the weights of
    each node of ours, with their scales, zero points, biases and global scales, become tensors
    uint8[bytes] that say themselves what they are. A session takes them as they are: on the CPU it
    maps the file, on a GPU it makes one copy. Results are the same bits as without. A node that
    cannot be packed (g_idx, or a function of the model holds it) keeps its weights; the reason is
    in the report, and logged as a warning of the logger "qmoe_plugin".

    There is no way back, so keep the original: other devices, other activation types and later
    versions of qmoe_plugin may need to pack it again, and refuse the model by name.

    Args:
        model: An onnx_ir.Model or onnx.ModelProto, which is changed in place and holds the packed
            weights in memory; or, with `output`, the path or the bytes of a model.
        output: Path of the new model. All its external data, packed or not, is in one new file,
            `<output>.data`; the memory taken is that of the largest node.
        sm: Compute capability of the GPU that the model will run on, from 80 on (90 = Hopper),
            which need not be here; None or 0 for the CPU. Unlike elsewhere, None is never what this
            machine has: a file should not depend on where it was made.

    Returns:
        Which nodes were packed, and which were not, with the reason.
    """
    where = target(sm or 0)
    if 0 < where.sm < _FIRST_SM:
        raise ValueError(f"sm is {sm}; our CUDA kernels run from sm_{_FIRST_SM} on")
    if isinstance(model, (str, os.PathLike, bytes)):
        if output is None:
            raise TypeError("a path or bytes need `output`, the path to write to")
        report = _prepack_to_file(model, Path(output), where)
    elif output is not None:
        raise TypeError("`output` is for a path or bytes; other models are changed in place")
    elif isinstance(model, ir.Model):
        report = _prepack_in_place(model, where, _in_memory)
    elif isinstance(model, onnx.ModelProto):
        decoded = _decode(model, None)
        report = _prepack_in_place(decoded, where, _in_memory)
        model.CopyFrom(ir.to_proto(decoded))
    else:
        raise TypeError(
            f"model is a {type(model).__name__}; give a path, bytes, onnx.ModelProto or "
            "onnx_ir.Model"
        )
    report.log()
    return report


class Prepack(ir.passes.InPlacePass):
    """The pass behind `prepack`, for nodes that are in our domain. `report` says what it did."""

    def __init__(self, where: Target, store: Store) -> None:
        """Makes a pass.

        Args:
            where: The device to pack for.
            store: Makes tensors of packed bytes.
        """
        super().__init__()
        self.target = where
        self.report = PrepackReport(str(where))
        self._store = store

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Changes the model, and sets `report`."""
        names = _Names(model)
        packed: list[NodeReport] = []
        kept: list[NodeReport] = []
        already = 0
        for body in bodies(model):
            for node in list(body.nodes()):
                if node.domain != DOMAIN or node.op_type not in OPS:
                    continue
                try:
                    if is_packed(node):
                        describe(node).problems(self.target, 1)  # packed for the same device?
                        already += 1
                        continue
                    weights = self._pack(node, body, names)
                    packed.append(_report(node, body, weights=tuple(map(str, weights))))
                except UnsupportedError as error:
                    kept.append(_report(node, body, reason=str(error)))
        self.report = PrepackReport(str(self.target), tuple(packed), tuple(kept), already)
        return ir.passes.PassResult(model, bool(packed))

    def _pack(self, node: ir.Node, body: Body, names: _Names) -> list[PackedWeights]:
        """Packs the weights of a node.

        Raises:
            UnsupportedError: If they cannot be packed; the node is then as it was.
        """
        if node.op_type not in _WEIGHTS:
            raise UnsupportedError(f"prepack does not pack the weights of {node.op_type}")
        if body.function:
            raise UnsupportedError(
                "a function of the model holds it, which has no initializers; inline the function "
                "first"
            )
        dtype = describe(node).gemms[0].dtype
        inputs = [_constant(node, index) for index in range(len(node.inputs))]
        try:
            packed = native().prepack(
                op=node.op_type,
                dtype=dtype,
                sm=self.target.sm,
                attributes={name: attribute.value for name, attribute in node.attributes.items()},
                inputs=inputs,
            )
        except ValueError as error:
            raise UnsupportedError(str(error)) from None
        _mark(node, dtype)
        _replace_weights(node, {p: self._tensor(node, p, packed[p], names) for p in packed})
        return [read_header(name, content) for name, content in packed.items()]

    def _tensor(
        self, node: ir.Node, projection: str, content: npt.NDArray[np.uint8], names: _Names
    ) -> ir.TensorProtocol:
        old = node.inputs[_WEIGHTS[node.op_type][projection]]
        return self._store(names.new(f"{old.name if old else projection}.packed"), content)


class _RetargetForPacking(Retarget):
    """Chooses no kernels for a device that this build has none for: packing needs none."""

    def choose(self, description: Description) -> tuple[KernelChoice, ...]:
        if self.target == CPU or native().has_cuda():
            return super().choose(description)
        return ()


class _Names:
    """The names of a model's values."""

    def __init__(self, model: ir.Model) -> None:
        self._taken = {
            value.name
            for body in bodies(model)
            for graph in body.graphs()
            for value in (*graph.inputs, *graph.initializers.values())
        }
        self._taken |= {
            value.name for body in bodies(model) for node in body.nodes() for value in node.outputs
        }

    def new(self, wanted: str) -> str:
        """This name, or one like it that no value has."""
        name, count = wanted, 1
        while name in self._taken:
            count += 1
            name = f"{wanted}{count}"
        self._taken.add(name)
        return name


def _constant(node: ir.Node, index: int) -> tuple[str, list[int], npt.NDArray[np.uint8]] | None:
    """Type, shape and bytes of a constant input."""
    if index in _VARYING[node.op_type]:
        return None
    tensor = constant_tensor(node, index, f"input {index}")
    if tensor is None:
        return None
    name = _TYPE_NAMES.get(tensor.dtype, tensor.dtype.name.lower())
    return name, list(tensor.shape.numpy()), raw_bytes(tensor)


def _mark(node: ir.Node, dtype: str) -> None:
    """Sets the attributes that say what packed weights are."""
    node.attributes[LAYOUT_ATTRIBUTE] = ir.AttrString(LAYOUT_ATTRIBUTE, PACKED)
    node.attributes.pop(_STOCK_LAYOUTS[node.op_type], None)
    node.metadata_props.pop(RESTORE_KEY, None)
    if given(node, _FC3):  # its rows and those of fc1 alternate now
        node.attributes["swiglu_fusion"] = ir.AttrInt64("swiglu_fusion", 1)
        if string(node, "activation_type", "relu") == "silu":
            node.attributes["activation_type"] = ir.AttrString("activation_type", "swiglu")
            node.attributes["activation_alpha"] = ir.AttrFloat32("activation_alpha", 1.0)
            node.attributes["activation_beta"] = ir.AttrFloat32("activation_beta", 0.0)
            node.attributes.pop("swiglu_limit", None)
    # Scales and biases, which may have told it, are gone.
    if node.outputs[0].type is None:
        node.outputs[0].type = ir.TensorType(
            {"float32": ir.DataType.FLOAT}.get(dtype) or ir.DataType[dtype.upper()]
        )


def _replace_weights(node: ir.Node, packed: dict[str, ir.TensorProtocol]) -> None:
    """Puts packed weights in the place of all constant inputs but activation scales."""
    former = list(node.inputs)
    weights = {_WEIGHTS[node.op_type][projection]: tensor for projection, tensor in packed.items()}
    for index, value in enumerate(former):
        if value is None or index in (*_VARYING[node.op_type], *_ACT_SCALES):
            continue
        made = None
        if index in weights:
            tensor = weights[index]
            made = ir.Value(
                name=tensor.name,
                type=ir.TensorType(tensor.dtype),
                shape=ir.Shape(tensor.shape.numpy()),
                const_value=tensor,
            )
            assert isinstance(value.graph, ir.Graph)  # as no function holds it
            value.graph.register_initializer(made)
        node.replace_input_with(index, made)
    last = max(index for index, value in enumerate(node.inputs) if value is not None)
    node.resize_inputs(last + 1)
    for value in former:
        _drop_if_unused(value)


def _drop_if_unused(value: ir.Value | None) -> None:
    """Removes a constant that nobody reads any more."""
    if value is None or value.uses() or value.is_graph_output() or value.graph is None:
        return
    producer = value.producer()
    if producer is not None:
        if producer.op_type == "Constant":
            value.graph.remove(producer)
    elif value.is_initializer() and not value.is_graph_input():
        assert isinstance(value.graph, ir.Graph)
        value.graph.initializers.pop(value.name or "")


def _report(
    node: ir.Node, body: Body, reason: str = "", weights: tuple[str, ...] = ()
) -> NodeReport:
    return NodeReport(label(node), node.op_type, body.function, reason, weights=weights)


def _in_memory(name: str, content: npt.NDArray[np.uint8]) -> ir.TensorProtocol:
    return ir.Tensor(content, name=name)


def _prepack_in_place(model: ir.Model, where: Target, store: Store) -> PrepackReport:
    retarget, pack = _RetargetForPacking(where), Prepack(where, store)
    retarget(model)
    pack(model)
    return pack.report.after(retarget.report)


def _prepack_to_file(model: PathLike | bytes, output: Path, where: Target) -> PrepackReport:
    data = DataFile(output.with_name(f"{output.name}.data"))
    if isinstance(model, bytes):
        decoded = _decode(parse(model), None)
    else:
        decoded = _decode(load(Path(model)), Path(model).parent)
        sources = [Path(model), *(Path(model).parent / file for file in data_files(decoded))]
        for source in sources:
            for made in (output, data.path):
                if made.exists() and made.samefile(source):
                    raise ValueError(
                        f"{made} would replace a file of the original model, which is worth "
                        "keeping: packing cannot be undone. Write to another path"
                    )
    with data:
        report = _prepack_in_place(decoded, where, data.add)
        replace_tensors(decoded, data.move)
        write(serialize(ir.to_proto(decoded)), output, data)
    return report


def _decode(proto: onnx.ModelProto, folder: Path | None) -> ir.Model:
    """The model, with its external data in `folder`."""
    if proto.graph.sparse_initializer or proto.training_info:
        raise ValueError(
            "the model has sparse initializers or training information, which prepack cannot keep; "
            "retarget it instead"
        )
    model = ir.from_proto(proto)
    for tensor in external_tensors(model):
        if folder is None:
            raise ValueError(
                f"the model keeps '{tensor.name}' in the file '{tensor.location}', and does not "
                "say in which folder; give its path, or an onnx_ir.Model"
            )
        tensor.base_dir = folder
    return model
