"""Packs the weights of nodes ahead of time."""

from __future__ import annotations

import dataclasses
from typing import overload

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qmoe_plugin.devices import CPU, Target, target
from qmoe_plugin.graph.describe import Description, UnsupportedError, describe
from qmoe_plugin.graph.edit import Names, add_initializer, drop_if_unused, set_attributes
from qmoe_plugin.graph.external_data import Store, raw_bytes
from qmoe_plugin.graph.inputs import constant_tensor, float_type, given
from qmoe_plugin.graph.moe import merged_gates
from qmoe_plugin.graph.packed import LAYOUT_ATTRIBUTE, PACKED, PackedWeights, is_packed, read_header
from qmoe_plugin.graph.retarget import RESTORE_KEY, Retarget
from qmoe_plugin.graph.rewrite import Model, PathLike, rewrite
from qmoe_plugin.graph.walk import Body, bodies, label
from qmoe_plugin.kernels import Problem
from qmoe_plugin.library import DOMAIN, OPS, native
from qmoe_plugin.progress import Progress
from qmoe_plugin.report import KernelChoice, NodeReport, PrepackReport

_FP8, _FP4 = "MatMulBlockQuantizedFp8Weight", "MatMulBlockQuantizedFp4Weight"

_WEIGHTS = {
    "QMoE": {"fc1": 2, "fc2": 5},
    "MoE": {"fc1": 2, "fc2": 4},
    "MatMulNBits": {"B": 1},
    _FP8: {"B": 1},
    _FP4: {"B": 1},
}
"""Input numbers of packed weights."""

_VARYING = {"QMoE": (0, 1, 14), "MoE": (0, 1), "MatMulNBits": (0,), _FP8: (0,), _FP4: (0,)}
"""Those of activations and routing."""

_ACT_SCALES = {"QMoE": (17, 18), _FP8: (3,)}
"""Those of scales of activations, which packed weights have beside them."""

_FC3 = {"QMoE": 8, "MoE": 6}

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
def prepack(
    model: Model,
    *,
    sm: int | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> PrepackReport: ...
@overload
def prepack(
    model: PathLike | bytes,
    output: PathLike | None = None,
    *,
    sm: int | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> PrepackReport: ...
def prepack(
    model: Model | PathLike | bytes,
    output: PathLike | None = None,
    *,
    sm: int | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> PrepackReport:
    """Packs the weights of a model's nodes of our ops, so that sessions need not.

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
        dry_run: Only say what would be done, of a path, bytes or an onnx.ModelProto. It takes as
            long, as packing may fail. `output` is then not needed.
        progress: Called with the name of each node, the nodes done and all nodes.

    Returns:
        Which nodes were packed, and which were not, with the reason.
    """
    where = target(sm or 0)
    if 0 < where.sm < _FIRST_SM:
        raise ValueError(f"sm is {sm}; our CUDA kernels run from sm_{_FIRST_SM} on")
    report = rewrite(
        model,
        output,
        lambda decoded, store: _prepack(decoded, where, store, progress),
        dry_run=dry_run,
    )
    report = dataclasses.replace(report, dry_run=dry_run)
    report.log()
    return report


class Prepack(ir.passes.InPlacePass):
    """The pass behind `prepack`, for nodes that are in our domain. `report` says what it did."""

    def __init__(self, where: Target, store: Store, progress: Progress | None = None) -> None:
        """Makes a pass.

        Args:
            where: The device to pack for.
            store: Makes tensors of packed bytes.
            progress: Called with what is done.
        """
        super().__init__()
        self.target = where
        self.report = PrepackReport(str(where))
        self._store = store
        self._progress = progress or (lambda what, done, total: None)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Changes the model, and sets `report`."""
        names = Names(model)
        packed: list[NodeReport] = []
        kept: list[NodeReport] = []
        already = 0
        ours = [
            (node, body)
            for body in bodies(model)
            for node in body.nodes()
            if node.domain == DOMAIN and node.op_type in OPS
        ]
        for done, (node, body) in enumerate(ours, 1):
            try:
                if is_packed(node):
                    describe(node).problems(self.target, 1)  # packed for the same device?
                    already += 1
                else:
                    weights = self._pack(node, body, names)
                    packed.append(_report(node, body, weights=tuple(map(str, weights))))
            except UnsupportedError as error:
                kept.append(_report(node, body, reason=str(error)))
            self._progress(label(node), done, len(ours))
        self.report = PrepackReport(str(self.target), tuple(packed), tuple(kept), already)
        return ir.passes.PassResult(model, bool(packed))

    def _pack(self, node: ir.Node, body: Body, names: Names) -> list[PackedWeights]:
        """Packs the weights of a node.

        Raises:
            UnsupportedError: If they cannot be packed; the node is then as it was.
        """
        if body.function:
            raise UnsupportedError(
                "a function of the model holds it, which has no initializers; inline the function "
                "first"
            )
        gemm = describe(node).gemms[0]
        inputs = [_constant(node, index) for index in range(len(node.inputs))]
        try:
            packed = native().prepack(
                op=node.op_type,
                dtype=gemm.dtype,
                sm=self.target.sm,
                attributes={name: attribute.value for name, attribute in node.attributes.items()},
                inputs=inputs,
            )
        except ValueError as error:
            raise UnsupportedError(str(error)) from None
        _mark(node, gemm)
        _replace_weights(node, {p: self._tensor(node, p, packed[p], names) for p in packed})
        return [read_header(name, content) for name, content in packed.items()]

    def _tensor(
        self, node: ir.Node, projection: str, content: npt.NDArray[np.uint8], names: Names
    ) -> ir.TensorProtocol:
        old = node.inputs[_WEIGHTS[node.op_type][projection]]
        return self._store.add(names.new(f"{old.name if old else projection}.packed"), content)


class _RetargetForPacking(Retarget):
    """Chooses no kernels for a device that this build has none for: packing needs none."""

    def choose(self, description: Description) -> tuple[KernelChoice, ...]:
        if self.target == CPU or native().has_cuda():
            return super().choose(description)
        return ()


def _constant(node: ir.Node, index: int) -> tuple[str, list[int], npt.NDArray[np.uint8]] | None:
    """Type, shape and bytes of a constant input."""
    if index in _VARYING[node.op_type]:
        return None
    tensor = constant_tensor(node, index, f"input {index}")
    if tensor is None:
        return None
    name = _TYPE_NAMES.get(tensor.dtype, tensor.dtype.name.lower())
    return name, list(tensor.shape.numpy()), raw_bytes(tensor)


def _mark(node: ir.Node, gemm: Problem) -> None:
    """Sets the attributes that say what packed weights are; `gemm` is the node's first."""
    node.attributes[LAYOUT_ATTRIBUTE] = ir.AttrString(LAYOUT_ATTRIBUTE, PACKED)
    if node.op_type in _STOCK_LAYOUTS:
        node.attributes.pop(_STOCK_LAYOUTS[node.op_type], None)
    node.metadata_props.pop(RESTORE_KEY, None)
    if node.op_type in (_FP8, _FP4):  # which the shape of B said
        node.attributes["N"] = ir.AttrInt64("N", gemm.n)
        node.attributes["K"] = ir.AttrInt64("K", gemm.k)
    third = _FC3.get(node.op_type)
    if third is not None and given(node, third):  # its rows and those of fc1 alternate now
        set_attributes(node, merged_gates(node))
    # Scales and biases, which may have told it, are gone.
    if node.outputs[0].type is None:
        node.outputs[0].type = ir.TensorType(float_type(gemm.dtype))


def _replace_weights(node: ir.Node, packed: dict[str, ir.TensorProtocol]) -> None:
    """Puts packed weights in the place of all constant inputs but activation scales."""
    former = list(node.inputs)
    stay = (*_VARYING[node.op_type], *_ACT_SCALES.get(node.op_type, ()))
    weights = {_WEIGHTS[node.op_type][projection]: tensor for projection, tensor in packed.items()}
    for index, value in enumerate(former):
        if value is None or index in stay:
            continue
        made = None
        if index in weights:
            assert isinstance(value.graph, ir.Graph)  # as no function holds it
            made = add_initializer(value.graph, weights[index])
        node.replace_input_with(index, made)
    last = max(index for index, value in enumerate(node.inputs) if value is not None)
    node.resize_inputs(last + 1)
    for value in former:
        drop_if_unused(value)


def _report(
    node: ir.Node, body: Body, reason: str = "", weights: tuple[str, ...] = ()
) -> NodeReport:
    return NodeReport(label(node), node.op_type, body.function, reason, weights=weights)


def _prepack(
    model: ir.Model, where: Target, store: Store, progress: Progress | None
) -> PrepackReport:
    retarget, pack = _RetargetForPacking(where), Prepack(where, store, progress)
    retarget(model)
    pack(model)
    return pack.report.after(retarget.report)
