"""Quantises the float weights of a model: MatMul and Gemm, and the experts of MoE."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import onnx_ir as ir

from qmoe_plugin.graph.calibration import Calibration
from qmoe_plugin.graph.describe import STOCK_DOMAIN, UnsupportedError
from qmoe_plugin.graph.edit import Names
from qmoe_plugin.graph.external_data import Memory, Store
from qmoe_plugin.graph.quantize_nodes import (
    Plan,
    is_product_with_weight,
    plan_moe,
    plan_product,
    product_weight_name,
)
from qmoe_plugin.graph.quantize_rules import Rules, Spec
from qmoe_plugin.graph.quantize_weights import SEARCHES, quantize_weight
from qmoe_plugin.graph.retarget import DOMAIN_VERSION
from qmoe_plugin.graph.rewrite import Model, PathLike, rewrite
from qmoe_plugin.graph.routing import routing_products
from qmoe_plugin.graph.walk import Body, bodies, label
from qmoe_plugin.library import DOMAIN
from qmoe_plugin.progress import Progress
from qmoe_plugin.report import NodeReport, QuantizeReport

_QUANTIZED = (
    "QMoE",
    "MatMulNBits",
    "MatMulBlockQuantizedFp8Weight",
    "MatMulBlockQuantizedFp4Weight",
)


@overload
def quantize(
    model: Model,
    *,
    format: str = ...,
    rules: Sequence[tuple[str, str]] = ...,
    search: str | None = ...,
    calibration: PathLike | None = ...,
    dry_run: bool = ...,
    progress: Progress | None = ...,
) -> QuantizeReport: ...
@overload
def quantize(
    model: PathLike | bytes,
    output: PathLike | None = None,
    *,
    format: str = ...,
    rules: Sequence[tuple[str, str]] = ...,
    search: str | None = ...,
    calibration: PathLike | None = ...,
    dry_run: bool = ...,
    progress: Progress | None = ...,
) -> QuantizeReport: ...
def quantize(
    model: Model | PathLike | bytes,
    output: PathLike | None = None,
    *,
    format: str = "int4",
    rules: Sequence[tuple[str, str]] = (),
    search: str | None = None,
    calibration: PathLike | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> QuantizeReport:
    """Quantises MatMul and Gemm nodes to MatMulNBits, and MoE nodes to QMoE, of our domain.

    A format is said by a spec, `FORMAT[:BLOCK][:asymmetric]`: "int4", "int8:128:asymmetric",
    "nvfp4", or "nf4", "af4", "iq4_nl" (codebook4 with these values); "keep" leaves weights in
    float. The first rule that matches a weight counts, then two defaults that are kept in float:
    what computes router logits, and gates of shared experts; then `format`.

    Args:
        model: An onnx_ir.Model or onnx.ModelProto, which is changed in place and holds the new
            weights in memory; or, with `output`, the path or the bytes of a model.
        output: Path of the new model. All its external data is in one new file, `<output>.data`.
            Both get their names when they are whole.
        format: The spec of weights that nothing else says anything of.
        rules: Pairs of a regular expression and a spec. It is searched in the name of the node
            and of the weight; of experts also in `<node>/fc1` and `<node>/fc2`, each of which has
            a format of its own, fc3 that of fc1.
        search: "nearest" for scales that reach each block's largest weight, "mse" for scales
            searched for the least squared error, see `qmoe_plugin.formats.quantize_mse`: better,
            and several times slower. None for "mse" if there is a calibration file, else "nearest".
        calibration: A file of `qmoe_plugin.calibrate`, for a search that counts the error of each
            column as much as that matters. Of the same float model: weights are known by name.
        dry_run: Only say what would be done. `output` is then not needed.
        progress: Called time and again with the name of a node, the weights done and all weights.

    Returns:
        Which nodes were quantised, to what; which were not, and why; and the rules that never
        counted. Also logged by the logger "qmoe_plugin".

    Raises:
        ValueError: For bad specs, rules and models, and if a file of the model would be replaced.
    """
    if search is None:
        search = "nearest" if calibration is None else "mse"
    if search not in SEARCHES:
        raise ValueError(f"search is '{search}'; allowed are {', '.join(SEARCHES)}")
    if calibration is not None and search != "mse":
        raise ValueError(f"calibration is for search='mse', which it is by default, not '{search}'")
    parsed = Rules(rules, format)
    seen = None if calibration is None else Calibration.load(calibration)
    if dry_run:
        planned = Quantize(parsed, search, Memory(), calibration=seen, dry_run=True)
        if isinstance(model, ir.Model):
            planned(model)  # which plans, and changes nothing
        else:
            rewrite(model, output, lambda decoded, _: planned(decoded), dry_run=True)
        report = planned.report
    else:

        def change(decoded: ir.Model, store: Store) -> QuantizeReport:
            made = Quantize(parsed, search, store, calibration=seen, progress=progress)
            made(decoded)
            return made.report

        report = rewrite(model, output, change)
    report.log()
    return report


class Quantize(ir.passes.InPlacePass):
    """The pass behind `quantize`. `report` says what it did."""

    def __init__(
        self,
        rules: Rules,
        search: str,
        store: Store,
        *,
        calibration: Calibration | None = None,
        dry_run: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """Makes a pass.

        Args:
            rules: Say the format of each weight.
            search: One of `SEARCHES`.
            store: Takes the quantised weights.
            calibration: What columns matter how much.
            dry_run: Only report.
            progress: Called with what is done.
        """
        super().__init__()
        self.report = QuantizeReport(search)
        self._rules, self._search, self._store, self._dry_run = rules, search, store, dry_run
        self._calibration, self._progress = calibration, progress
        self._uncalibrated: list[str] = []

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Changes the model, and sets `report`."""
        planned: list[_Planned] = []
        quantized: list[NodeReport] = []
        kept: list[NodeReport] = []
        already = 0
        for body in bodies(model):
            routing = routing_products(body)
            for node in body.nodes():
                already += node.domain in (STOCK_DOMAIN, DOMAIN) and node.op_type in _QUANTIZED
                if not (_is_moe(node) or is_product_with_weight(node)):
                    continue
                try:
                    plan, warning = self._plan(node, body, routing.get(node, ""))
                except UnsupportedError as error:
                    kept.append(NodeReport(label(node), node.op_type, body.function, str(error)))
                    continue
                planned.append(_Planned(node, body, plan, warning))
        names, counter = Names(model), _Counter(planned, self._progress)
        for each in planned:
            node, name, op_type = each.node, label(each.node), each.node.op_type
            try:
                self._apply(each, names, counter)
            except UnsupportedError as error:
                kept.append(NodeReport(name, op_type, each.body.function, str(error)))
                continue
            weights = tuple(map(str, each.plan.weights))
            report = NodeReport(
                name, op_type, each.body.function, warning=each.warning, weights=weights
            )
            quantized.append(report)
        self.report = QuantizeReport(
            self._search,
            tuple(quantized),
            tuple(kept),
            already,
            self._rules.unmatched,
            self._dry_run,
            tuple(dict.fromkeys(self._uncalibrated)),
        )
        return ir.passes.PassResult(model, bool(quantized) and not self._dry_run)

    def _plan(self, node: ir.Node, body: Body, routes: str) -> tuple[Plan, str]:
        """What a node becomes, and a warning.

        Args:
            node: A MoE, or a product with a weight.
            body: Where it is.
            routes: Why it had better stay in float; "" if it need not.

        Raises:
            UnsupportedError: If it stays as it is.
        """
        warning = ""

        def spec_of(role: str, weight: str) -> Spec:
            nonlocal warning
            name = label(node)
            found = self._rules.find((name, f"{name}/{role}" if role else None, weight))
            if found is None and routes:
                raise UnsupportedError(f"{routes}; it stays in float unless a rule names it")
            text, spec = found or ("the default", self._rules.default)
            if spec is None:
                raise UnsupportedError(f"{text} keeps {role or 'it'} in float")
            warning = f"{text} quantises it, though {routes}" if routes else ""
            return spec

        moe = _is_moe(node)
        spec = None if moe else spec_of("", product_weight_name(node))
        if body.function:
            raise UnsupportedError(
                "a function of the model holds it, which has no initializers; inline the function "
                "first"
            )
        plan = plan_moe(node, spec_of) if spec is None else plan_product(node, spec)
        return self._calibrated(plan), warning

    def _calibrated(self, plan: Plan) -> Plan:
        """The plan with the importance of columns, where it is known."""
        if self._calibration is None:
            return plan
        weights = []
        for weight in plan.weights:
            experts, _, k = weight.shape
            importance = self._calibration.of(weight.name, experts, k)
            if importance is None:
                self._uncalibrated.append(weight.name)
            weights.append(dataclasses.replace(weight, importance=importance))
        return dataclasses.replace(plan, weights=tuple(weights))

    def _apply(self, planned: _Planned, names: Names, counter: _Counter) -> None:
        if self._dry_run:
            return
        node, plan = planned.node, planned.plan
        counter.begin(label(node))
        tensors = {
            weight.role: quantize_weight(weight, self._search, self._store, names, counter.advance)
            for weight in plan.weights
        }
        assert isinstance(node.graph, ir.Graph)  # as no function holds it
        plan.apply(node, node.graph, tensors, names.new(f"{plan.weights[0].name}.bias"))
        planned.body.opset_imports.setdefault(DOMAIN, DOMAIN_VERSION)


@dataclass(frozen=True)
class _Planned:
    """A node, and what it becomes."""

    node: ir.Node
    body: Body
    plan: Plan
    warning: str


class _Counter:
    """Counts the weights that are done."""

    def __init__(self, planned: Sequence[_Planned], progress: Progress | None) -> None:
        self._progress, self._done, self._name = progress, 0, ""
        self._total = sum(math.prod(w.shape) for each in planned for w in each.plan.weights)

    def begin(self, name: str) -> None:
        """What comes is of this node."""
        self._name = name
        self.advance(0)

    def advance(self, count: int) -> None:
        """So many more are done."""
        self._done += count
        if self._progress is not None:
            self._progress(self._name, self._done, self._total)


def _is_moe(node: ir.Node) -> bool:
    return node.domain in (STOCK_DOMAIN, DOMAIN) and node.op_type == "MoE"
