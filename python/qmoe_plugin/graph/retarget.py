"""Moves the nodes of our ops to our domain, and back."""

from __future__ import annotations

import abc
import json
import os
from typing import overload

import onnx
import onnx_ir as ir

from qmoe_plugin.devices import Target, target
from qmoe_plugin.graph.apply import apply
from qmoe_plugin.graph.describe import STOCK_DOMAIN, Description, UnsupportedError, describe
from qmoe_plugin.graph.formats import STOCK_QUANT_TYPES
from qmoe_plugin.graph.inputs import given, string
from qmoe_plugin.graph.packed import LAYOUT_ATTRIBUTE, PACKED
from qmoe_plugin.graph.stock import STOCK_ATTRIBUTES, STOCK_INPUTS
from qmoe_plugin.graph.walk import bodies, label
from qmoe_plugin.kernels import ask
from qmoe_plugin.library import DOMAIN, OPS
from qmoe_plugin.report import KernelChoice, NodeReport, RetargetReport

DOMAIN_VERSION = 1
"""The opset version of our domain."""

RESTORE_KEY = "qmoe_plugin.restore"
"""Metadata of a moved node: JSON of the attributes that were written, each with its former value
(null if there was none)."""

TYPICAL_TOKENS = (1, 512)
"""A node is only moved if there is a kernel for few tokens and one for many."""

Model = ir.Model | onnx.ModelProto
Path = str | os.PathLike[str]


@overload
def retarget(model: Model, *, sm: int | None = None, dry_run: bool = False) -> RetargetReport: ...
@overload
def retarget(
    model: Path, output: Path | None = None, *, sm: int | None = None, dry_run: bool = False
) -> RetargetReport: ...
def retarget(
    model: Model | Path,
    output: Path | None = None,
    *,
    sm: int | None = None,
    dry_run: bool = False,
) -> RetargetReport:
    """Moves the nodes of our ops (`OPS`) of a model from com.microsoft to our domain.

    Weights are neither read nor changed. Nodes that no kernel of ours takes stay where they are;
    the reasons are in the report, and logged as warnings of the logger "qmoe_plugin". What moves
    and what stays: `Retarget`.

    Args:
        model: An onnx_ir.Model or onnx.ModelProto, which is changed in place; or the path of a
            model, with `output` saying where to write the new one.
        output: Path of the new model; may be the path of the old one. Files with external data are
            not rewritten: in the same folder both models share them, to another folder they are
            copied.
        sm: Compute capability that the model will run on (90 = Hopper), 0 for the CPU; None for
            what this machine has.
        dry_run: Only say what would be done, of a path or an onnx.ModelProto. `output` is then not
            needed.

    Returns:
        Which nodes moved, with the kernels that will run them, and which stayed, with the reason.
    """
    return apply(Retarget(target(sm)), model, output, dry_run=dry_run)


@overload
def unretarget(model: Model, *, dry_run: bool = False) -> RetargetReport: ...
@overload
def unretarget(
    model: Path, output: Path | None = None, *, dry_run: bool = False
) -> RetargetReport: ...
def unretarget(
    model: Model | Path, output: Path | None = None, *, dry_run: bool = False
) -> RetargetReport:
    """Undoes `retarget`: moves our nodes back to com.microsoft.

    A model that `retarget` changed is afterwards as it was before.

    Args:
        model: As for `retarget`.
        output: As for `retarget`.
        dry_run: As for `retarget`.

    Returns:
        Which nodes moved, and which stayed, with the reason.
    """
    return apply(Unretarget(), model, output, dry_run=dry_run)


class ChangeDomain(ir.passes.InPlacePass):
    """Moves nodes of our ops from one domain to another, unless `check` finds a reason not to.

    `report` says what the last call did; with `dry_run`, that it was to a copy.
    """

    source: str
    destination: str
    version: int

    def __init__(self) -> None:
        """Makes a pass; call it with a model."""
        super().__init__()
        self.dry_run = False
        self.report = RetargetReport(self.destination, "")

    @abc.abstractmethod
    def check(self, node: ir.Node) -> str:
        """Why a node stays where it is; "" if it can be moved."""

    @abc.abstractmethod
    def move(self, node: ir.Node) -> tuple[tuple[KernelChoice, ...], str]:
        """Changes a node that passed `check`; returns what will run it, and a warning."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Changes the model, and sets `report`."""
        moved: list[NodeReport] = []
        kept: list[NodeReport] = []
        already = 0
        for body in bodies(model):
            before = len(moved)
            for node in body.nodes():
                if node.op_type not in OPS:
                    continue
                already += node.domain == self.destination
                if node.domain != self.source:
                    continue
                reason = self.check(node)
                kernels, warning = ((), "") if reason else self.move(node)
                entry = NodeReport(
                    label(node), node.op_type, body.function, reason, kernels, warning
                )
                (kept if reason else moved).append(entry)
            if len(moved) > before:
                body.opset_imports.setdefault(self.destination, self.version)
                self.drop_import(body.opset_imports, any(n.domain == DOMAIN for n in body.nodes()))
        self.report = RetargetReport(
            self.destination, self.target_text(), tuple(moved), tuple(kept), already, self.dry_run
        )
        return ir.passes.PassResult(model, bool(moved))

    def drop_import(self, opset_imports: dict[str, int], ours_left: bool) -> None:
        """Takes away an opset import that is needed no more."""

    def target_text(self) -> str:
        """For `RetargetReport.target`."""
        return ""


class Retarget(ChangeDomain):
    """The pass behind `retarget`.

    A node of com.microsoft that is called like one of our ops is moved to our domain if

    1. we know all its attributes, and their values are allowed;
    2. its weights, scales, zero points and biases are constant: initializers, or Constant nodes;
    3. their types and shapes fit together;
    4. its weights have a layout that we read: raw, or as stock CUDA kernels want them. For QMoE it
       is found out from the shapes of all projections, see `qmoe_plugin.graph.layouts`;
    5. there are kernels on the target that run it, for few tokens and for many.

    What was decided in 4 is written to the moved node (weights_prepacked, or weights_layout for
    4-bit floats), and the former value to its metadata. Nothing else of the node changes but its
    domain. Nodes in subgraphs and in the model's functions are treated alike; each body gets the
    opset import it needs. A function of the model that is called like one of the ops (Mobius writes
    such) is a fallback for other runtimes: ONNX Runtime prefers its own op, and so do we.
    """

    source = STOCK_DOMAIN
    destination = DOMAIN
    version = DOMAIN_VERSION

    def __init__(self, where: Target) -> None:
        """Makes a pass that chooses kernels for `where`."""
        super().__init__()
        self.target = where

    def check(self, node: ir.Node) -> str:
        """Why a node stays in com.microsoft; "" if it can be moved."""
        try:
            self.choose(describe(node))
        except UnsupportedError as error:
            return str(error)
        return ""

    def move(self, node: ir.Node) -> tuple[tuple[KernelChoice, ...], str]:
        """Moves a node that passed `check`."""
        description = describe(node)
        former: dict[str, int | str | None] = {}
        for name, value in description.decided.items():
            attribute = node.attributes.get(name)
            old = None if attribute is None else attribute.value
            if old != value:
                former[name] = old
                _write(node, name, value)
        if former:
            node.metadata_props[RESTORE_KEY] = json.dumps(former)
        node.domain = DOMAIN
        return self.choose(description), description.warning

    def target_text(self) -> str:
        """What kernels are chosen for."""
        return str(self.target)

    def choose(self, description: Description) -> tuple[KernelChoice, ...]:
        """The kernels that will run a node, for few tokens and for many.

        Raises:
            UnsupportedError: If there is none.
        """
        choices: dict[tuple[str, int], str] = {}
        for tokens in TYPICAL_TOKENS:
            for problem in description.problems(self.target, tokens):
                answer = ask(problem)
                if answer.kernel is None:
                    raise UnsupportedError(f"no kernel runs {problem}: {answer.refusals}")
                choices[problem.stage, tokens] = answer.kernel
        return tuple(KernelChoice(*key, kernel) for key, kernel in choices.items())


class Unretarget(ChangeDomain):
    """The pass behind `unretarget`.

    A node of our domain is moved to com.microsoft if the op there has all its attributes and
    inputs, and its quant_type, and if its weights were not packed by `qmoe_plugin.prepack`.
    Attributes that `retarget` wrote get back their former value.
    """

    source = DOMAIN
    destination = STOCK_DOMAIN
    version = 1

    def check(self, node: ir.Node) -> str:
        """Why a node stays in our domain; "" if it can be moved."""
        layout = node.attributes.get(LAYOUT_ATTRIBUTE)
        if layout is not None and layout.value == PACKED:
            return (
                "its weights are packed, which the op of com.microsoft cannot read; take the model "
                "that was given to qmoe_plugin.prepack"
            )
        written = {name for name, value in _former(node).items() if value is None}
        unknown = sorted(set(node.attributes) - STOCK_ATTRIBUTES[node.op_type] - written)
        if unknown:
            return f"com.microsoft has no attribute {', '.join(unknown)} for {node.op_type}"
        known = len(STOCK_INPUTS[node.op_type])
        beyond = [str(i) for i in range(known, len(node.inputs)) if given(node, i)]
        if beyond:
            return f"com.microsoft has no input {', '.join(beyond)} for {node.op_type}"
        if node.op_type == "QMoE" and string(node, "quant_type", "int") not in STOCK_QUANT_TYPES:
            return f"com.microsoft has no quant_type '{string(node, 'quant_type', '')}'"
        return ""

    def move(self, node: ir.Node) -> tuple[tuple[KernelChoice, ...], str]:
        """Moves a node that passed `check`."""
        for name, value in _former(node).items():
            if value is None:
                node.attributes.pop(name, None)
            else:
                _write(node, name, value)
        node.metadata_props.pop(RESTORE_KEY, None)
        node.domain = STOCK_DOMAIN
        return (), ""

    def drop_import(self, opset_imports: dict[str, int], ours_left: bool) -> None:
        """Our domain is no longer imported where no node of it is left."""
        if not ours_left:
            opset_imports.pop(DOMAIN, None)


def _write(node: ir.Node, name: str, value: int | str) -> None:
    made = ir.AttrInt64(name, value) if isinstance(value, int) else ir.AttrString(name, value)
    node.attributes[name] = made


def _former(node: ir.Node) -> dict[str, int | str | None]:
    """What `retarget` overwrote in the node."""
    former: dict[str, int | str | None] = json.loads(node.metadata_props.get(RESTORE_KEY, "{}"))
    return former
