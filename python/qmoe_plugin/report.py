"""What a pass did to a model, and why it left the rest."""

from __future__ import annotations

import abc
import dataclasses
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger("qmoe_plugin")


@dataclass(frozen=True)
class KernelChoice:
    """The kernel that runs one matrix product of a node for a number of tokens."""

    stage: str
    tokens: int
    kernel: str


@dataclass(frozen=True)
class NodeReport:
    """What happened to one node.

    Attributes:
        name: Name of the node, or of its first output.
        op_type: As in "QMoE", one of our ops; of `quantize` what it was before, as in "MatMul".
        function: Name of the model's function that holds the node; "" for its graph.
        reason: Why the node was left alone; "" if it was moved.
        kernels: What will run it, for few and for many tokens. Empty for a node that was left, or
            was moved back.
        warning: Something that was decided by custom, as the node does not say it; "" for nothing.
        weights: What was packed or quantised, as in "fc1 int4 block 32, 4 x 192 x 64"; only of
            `prepack` and `quantize`.
        change: What was done to it, of `fuse`; what was seen, of `calibrate`.
    """

    name: str
    op_type: str
    function: str = ""
    reason: str = ""
    kernels: tuple[KernelChoice, ...] = ()
    warning: str = ""
    weights: tuple[str, ...] = ()
    change: str = ""

    @property
    def kernel_text(self) -> str:
        """The kernels in one line; token counts only where they make a difference."""
        parts = []
        for stage in dict.fromkeys(choice.stage for choice in self.kernels):
            choices = [choice for choice in self.kernels if choice.stage == stage]
            names = list(dict.fromkeys(choice.kernel for choice in choices))
            if len(names) == 1:
                parts.append(f"{stage} {names[0]}")
            else:
                texts = (f"{choice.kernel} ({choice.tokens} tokens)" for choice in choices)
                parts.append(f"{stage} {' / '.join(texts)}")
        return ", ".join(parts)


class Report(abc.ABC):
    """What the reports of passes have in common."""

    kept: tuple[NodeReport, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain dicts and lists, for JSON."""
        assert dataclasses.is_dataclass(self)
        return dataclasses.asdict(self)

    def log(self) -> None:
        """Writes the report to the logger "qmoe_plugin": nodes that were left as warnings."""
        logger.info("%s", self.headline())
        for text in _grouped(self.changed(), self.detail):
            logger.info("%s", text)
        for text in _grouped(self._doubtful(), lambda node: node.warning):
            logger.warning("%s", text)
        for text in _grouped(self.kept, lambda node: node.reason):
            logger.warning("left alone: %s", text)

    @abc.abstractmethod
    def headline(self) -> str:
        """One line that sums it up."""

    @abc.abstractmethod
    def changed(self) -> tuple[NodeReport, ...]:
        """The nodes that were changed."""

    @abc.abstractmethod
    def detail(self, node: NodeReport) -> str:
        """What happened to one of them."""

    def _doubtful(self) -> list[NodeReport]:
        return [node for node in self.changed() if node.warning]

    def __str__(self) -> str:
        """A few lines for people: nodes with the same fate share one."""
        lines = [self.headline()]
        lines += [f"  {text}" for text in _grouped(self.changed(), self.detail)]
        if self._doubtful():
            lines.append("in doubt:")
            lines += [f"  {text}" for text in _grouped(self._doubtful(), lambda n: n.warning)]
        if self.kept:
            lines.append("left alone:")
            lines += [f"  {text}" for text in _grouped(self.kept, lambda node: node.reason)]
        return "\n".join(lines)


@dataclass(frozen=True)
class RetargetReport(Report):
    """What `retarget` or `unretarget` did.

    Attributes:
        domain: Where nodes were moved to.
        target: What kernels were chosen for, as in "CUDA (sm_90)"; "" for `unretarget`.
        moved: Nodes that are now in `domain`.
        kept: Nodes that were left where they were, each with a reason.
        already: How many nodes were in `domain` before.
        dry_run: Whether nothing was changed.
    """

    domain: str
    target: str
    moved: tuple[NodeReport, ...] = ()
    kept: tuple[NodeReport, ...] = ()
    already: int = 0
    dry_run: bool = False

    def headline(self) -> str:
        """One line that sums it up."""
        total = len(self.moved) + len(self.kept)
        did = "would move" if self.dry_run else "moved"
        text = f"{did} {len(self.moved)} of {total} nodes to {self.domain}"
        text += f", for {self.target}" if self.target else ""
        return text + (f"; {self.already} were there before" if self.already else "")

    def changed(self) -> tuple[NodeReport, ...]:
        """The nodes that were moved."""
        return self.moved

    def detail(self, node: NodeReport) -> str:
        """The kernels of a node."""
        return node.kernel_text


@dataclass(frozen=True)
class PrepackReport(Report):
    """What `prepack` did.

    Attributes:
        target: What weights were packed for, as in "CUDA (sm_90)".
        packed: Nodes whose weights were packed.
        kept: Nodes whose weights were not, each with a reason.
        already: How many nodes were packed for this target before.
        dry_run: Whether nothing was changed.
    """

    target: str
    packed: tuple[NodeReport, ...] = ()
    kept: tuple[NodeReport, ...] = ()
    already: int = 0
    dry_run: bool = False

    def after(self, retarget: RetargetReport) -> PrepackReport:
        """The report of both passes together."""
        moved = {(node.function, node.name): node for node in retarget.moved}
        packed = (
            dataclasses.replace(node, kernels=before.kernels, warning=before.warning)
            if (before := moved.get((node.function, node.name)))
            else node
            for node in self.packed
        )
        return dataclasses.replace(self, packed=tuple(packed), kept=retarget.kept + self.kept)

    def headline(self) -> str:
        """One line that sums it up."""
        total = len(self.packed) + len(self.kept)
        did = "would pack" if self.dry_run else "packed"
        text = f"{did} {len(self.packed)} of {total} nodes for {self.target}"
        return text + (f"; {self.already} were packed before" if self.already else "")

    def changed(self) -> tuple[NodeReport, ...]:
        """The nodes that were packed."""
        return self.packed

    def detail(self, node: NodeReport) -> str:
        """The weights of a node."""
        return "; ".join(node.weights)


@dataclass(frozen=True)
class QuantizeReport(Report):
    """What `quantize` did.

    Attributes:
        search: How scales were found: "nearest" or "mse".
        quantized: Nodes that were quantised, under their former op.
        kept: Products with a weight, and MoE nodes, that were not, each with a reason.
        already: How many nodes were quantised before.
        unmatched_rules: Rules that counted for no weight, as "REGEX=FORMAT": they match nothing,
            or only what a rule before them matches.
        dry_run: Whether nothing was changed.
        uncalibrated: Weights that the calibration file, if there is one, says nothing of.
    """

    search: str
    quantized: tuple[NodeReport, ...] = ()
    kept: tuple[NodeReport, ...] = ()
    already: int = 0
    unmatched_rules: tuple[str, ...] = ()
    dry_run: bool = False
    uncalibrated: tuple[str, ...] = ()

    def log(self) -> None:
        """As of all reports, and a warning for each rule that counted for nothing."""
        super().log()
        for rule in self.unmatched_rules:
            logger.warning("the rule %s counted for no weight", rule)
        for name in self.uncalibrated:
            logger.warning("the calibration file says nothing of %s", name)

    def headline(self) -> str:
        """One line that sums it up."""
        total = len(self.quantized) + len(self.kept)
        did = "would quantise" if self.dry_run else "quantised"
        text = f"{did} {len(self.quantized)} of {total} nodes"
        text += " with searched scales" if self.search == "mse" else ""
        return text + (f"; {self.already} were quantised before" if self.already else "")

    def changed(self) -> tuple[NodeReport, ...]:
        """The nodes that were quantised."""
        return self.quantized

    def detail(self, node: NodeReport) -> str:
        """The weights of a node."""
        return "; ".join(node.weights)

    def __str__(self) -> str:
        """A few lines for people."""
        lines = [super().__str__()]
        if self.unmatched_rules:
            lines.append("rules that counted for no weight:")
            lines += [f"  {rule}" for rule in self.unmatched_rules]
        if self.uncalibrated:
            lines.append("weights that the calibration file says nothing of:")
            lines += [f"  {name}" for name in self.uncalibrated]
        return "\n".join(lines)


@dataclass(frozen=True)
class FuseReport(Report):
    """What one of the passes of `fuse` did.

    Attributes:
        name: Name of the pass, as in "bias".
        fused: Nodes that it changed.
        kept: Nodes that it looked at and left, each with a reason.
        dry_run: Whether nothing was changed.
    """

    name: str
    fused: tuple[NodeReport, ...] = ()
    kept: tuple[NodeReport, ...] = ()
    dry_run: bool = False

    def headline(self) -> str:
        """One line that sums it up."""
        did = "would change" if self.dry_run else "changed"
        return f"{self.name}: {did} {len(self.fused)} of {len(self.fused) + len(self.kept)} nodes"

    def changed(self) -> tuple[NodeReport, ...]:
        """The nodes that were changed."""
        return self.fused

    def detail(self, node: NodeReport) -> str:
        """What became of a node."""
        return node.change


@dataclass(frozen=True)
class CalibrateReport(Report):
    """What `calibrate` saw.

    Attributes:
        runs: How often the model was run.
        tokens: Of how many tokens; 0 if it has no input of that name.
        collected: Nodes whose inputs were seen; a warning where no token came to an expert.
        kept: Nodes with weights whose inputs were not, each with a reason.
        dry_run: Whether nothing was written.
    """

    runs: int
    tokens: int
    collected: tuple[NodeReport, ...] = ()
    kept: tuple[NodeReport, ...] = ()
    dry_run: bool = False

    def headline(self) -> str:
        """One line that sums it up."""
        total = len(self.collected) + len(self.kept)
        text = f"saw the inputs of {len(self.collected)} of {total} nodes in {self.runs} runs"
        return text + (f" of {self.tokens} tokens" if self.tokens else "")

    def changed(self) -> tuple[NodeReport, ...]:
        """The nodes whose inputs were seen."""
        return self.collected

    def detail(self, node: NodeReport) -> str:
        """How much was seen."""
        return node.change


def _grouped(nodes: Iterable[NodeReport], text_of: Callable[[NodeReport], str]) -> list[str]:
    """One line for all nodes of an op with the same text, naming the first of them."""
    groups: dict[tuple[str, str], list[NodeReport]] = {}
    for node in nodes:
        groups.setdefault((node.op_type, text_of(node)), []).append(node)
    lines = []
    for (op_type, text), members in groups.items():
        where = f" of function {members[0].function}" if members[0].function else ""
        others = f" and {len(members) - 1} more" if len(members) > 1 else ""
        lines.append(
            f"{op_type} '{members[0].name}'{where}{others}" + (f": {text}" if text else "")
        )
    return lines
