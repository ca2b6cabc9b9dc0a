"""Finds by measuring which kernels are fastest on this GPU, where more than one can run a product.

Without it the library goes by the kernels' priorities and by what they refuse, which was measured
on the GPUs that we have. The file that `tune` writes puts another one first for some numbers of
rows; the library reads it where `QMOE_PLUGIN_TUNING` names it (`ops/tuning.h`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from qmoe_plugin import env
from qmoe_plugin.devices import CUDA_PROVIDER, Target, best_target, cuda_problem
from qmoe_plugin.graph.describe import Description, describe
from qmoe_plugin.graph.retarget import Retarget
from qmoe_plugin.kernels import Explanation, Problem, ask
from qmoe_plugin.library import OPS, native, runtime
from qmoe_plugin.report import logger
from qmoe_plugin.tables import text_table
from qmoe_plugin.taps import Providers, Source, activation_names, open_as_is, ort_errors
from qmoe_plugin.whole_file import whole_file

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048)
"""Numbers of tokens that are measured if none are given."""

_COPIES = 4
"""Nodes of a measured model, each with weights of its own on the GPU, so that memory counts."""

_GAIN = 1.03
"""How much faster another kernel must be; less may be noise."""

_HEADER = ("product", "rows", "kernel", "us", "instead of", "us")
_WARM_UP = 3
_MOST_ROWS = 2**31 - 1
_GRAPH: Providers = [(CUDA_PROVIDER, {"enable_cuda_graph": "1"})]


@dataclass(frozen=True)
class Choice:
    """A kernel that is faster than the one that runs otherwise.

    Attributes:
        problem: As in "fc1 int4 float16 experts 32 topk 4 n 5760 k 2880 block_size 32
            zero_points 0".
        first_rows: Fewest rows of x that it is for.
        last_rows: Most of them, which are those that were measured.
        kernel: As in "grouped_gemm_sm80".
        us: Microseconds of the whole node with it.
        default: The kernel that runs otherwise.
        default_us: Microseconds of the whole node with that.
    """

    problem: str
    first_rows: int
    last_rows: int
    kernel: str
    us: float
    default: str
    default_us: float

    @property
    def line(self) -> str:
        """As the file has it."""
        return f"{self.problem} rows {self.first_rows} {self.last_rows} kernel {self.kernel}"

    @property
    def row(self) -> tuple[str, ...]:
        """For a table with _HEADER."""
        rows = f"{self.first_rows} to {self.last_rows}"
        us, default_us = f"{self.us:.1f}", f"{self.default_us:.1f}"
        return (self.problem, rows, self.kernel, us, self.default, default_us)


@dataclass(frozen=True)
class TuneReport:
    """What `tune` found.

    Attributes:
        model: Path of the model.
        target: What it measured on.
        nodes: Nodes with products of their own kind, which it measured.
        choices: Where another kernel is faster.
        output: The tuning file; None if none was written.
    """

    model: str
    target: str
    nodes: int
    choices: tuple[Choice, ...]
    output: str | None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        """What was measured, a table of the choices, and how to use them."""
        lines = [f"{self.model} on {self.target}: {self.nodes} kinds of nodes measured"]
        if self.choices:
            lines += text_table(_HEADER, [choice.row for choice in self.choices])
        else:
            lines.append("the kernels that run anyway are the fastest")
        if self.output:
            lines.append(f"use it: export {env.TUNING.name}={Path(self.output).resolve()}")
        return "\n".join(lines)


def tune(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    tokens: Sequence[int] = TOKENS,
    repeat: int = 30,
    dry_run: bool = False,
) -> TuneReport:
    """Measures the kernels that can run a model's nodes, and writes a file of what it found.

    Nodes alike are measured once, in a session of their own for each kernel, in a CUDA graph.

    Args:
        model: Path of a model; nodes of either domain count.
        output: The file to write; may be None in a dry run.
        tokens: Numbers of tokens, increasing; what is chosen for one holds down to the one before.
        repeat: Runs to time, of each kernel and number of tokens.
        dry_run: Measures, but writes nothing.

    Raises:
        RuntimeError: If there is no GPU that sessions can use, or a session fails.
        ValueError: If the arguments are wrong, or the model has no node for our kernels.
    """
    if output is None and not dry_run:
        raise ValueError("say where to write, or ask for a dry run")
    if repeat < 1 or not tokens or min(tokens) < 1 or list(tokens) != sorted(set(tokens)):
        raise ValueError(
            f"repeat is {repeat} and tokens are {list(tokens)}; at least 1 is needed, and tokens "
            "must increase"
        )
    if problem := cuda_problem():
        raise RuntimeError(f"kernels are measured on a GPU, and {problem}")
    path, where = Path(model), best_target()
    choices: list[Choice] = []
    with _variable(None):
        source = Source.read(path, Retarget(where))
        found = distinct_nodes(source)
        for node, description in found:
            logger.info("measuring %s", node.name)
            choices += _Tuner(source, where, node, description, tokens, repeat).choices()
    written = None if dry_run or output is None else Path(output)
    if written is not None:
        text = native().tuning_header(0) + "".join(f"{choice.line}\n" for choice in choices)
        with whole_file(written) as partial:
            partial.write_text(text)
    return TuneReport(
        str(path), str(where), len(found), tuple(choices), None if written is None else str(written)
    )


def distinct_nodes(source: Source) -> list[tuple[ir.Node, Description]]:
    """Of the nodes of our ops that have the same products, one each."""
    found: dict[tuple[Problem, ...], tuple[ir.Node, Description]] = {}
    for node in source.graph().graph:
        if node.domain == "qmoe_plugin" and node.op_type in OPS:
            description = describe(node)
            found.setdefault(description.gemms, (node, description))
    return list(found.values())


def node_model(source: Source, node: ir.Node, description: Description) -> onnx.ModelProto:
    """A model of some nodes like this one, which read the same activations.

    Activations are float32 where the node wants bfloat16, which numpy and onnxruntime do not
    exchange on a GPU; a Cast follows.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(source.proto)
    graph = proto.graph
    name = node.outputs[0].name
    original = next(n for n in graph.node if n.output and n.output[0] == name)
    wanted = set(original.input)
    constants = [n for n in graph.node if n.op_type == "Constant" and n.output[0] in wanted]
    used = [tensor for tensor in graph.initializer if tensor.name in wanted]
    gemm = description.gemms[0]
    dtype = {"float32": 1, "float16": 10, "bfloat16": 16}[gemm.dtype]
    given = 1 if gemm.dtype == "bfloat16" else dtype
    nodes, inputs = list(constants), []
    for position, value in enumerate(activation_names(node)):
        width = gemm.k if position == 0 else gemm.experts
        feed = f"{value}/float32" if given != dtype else value
        inputs.append(onnx.helper.make_tensor_value_info(feed, given, ["T", width]))
        if given != dtype:
            nodes.append(onnx.helper.make_node("Cast", [feed], [value], to=dtype))
    outputs = []
    for i in range(_COPIES):
        copy = onnx.NodeProto.FromString(original.SerializeToString())
        copy.name = f"copy{i}"
        del copy.output[:]
        copy.output.append(f"copy{i}/output")
        nodes.append(copy)
        columns = description.gemms[-1].n
        outputs.append(onnx.helper.make_tensor_value_info(copy.output[0], dtype, ["T", columns]))
    made = onnx.helper.make_graph(
        [onnx.NodeProto.FromString(n.SerializeToString()) for n in nodes], "tune", inputs, outputs,
        [onnx.TensorProto.FromString(t.SerializeToString()) for t in used],
    )  # fmt: skip
    graph.CopyFrom(made)
    return proto


class NodeTimer:
    """A session of a model of `node_model`, timed."""

    def __init__(
        self, proto: onnx.ModelProto, folder: Path, providers: Providers, device: str
    ) -> None:
        """Makes the session, as the environment says.

        Args:
            proto: The model.
            folder: Where its external data is.
            providers: As for onnxruntime.InferenceSession.
            device: Where inputs and outputs are: "cuda" or "cpu".
        """
        self._session = open_as_is(proto, folder, providers)
        self._proto, self._device, self._graphs = proto, device, 0

    def us(self, tokens: int, repeat: int) -> float:
        """Median microseconds of one node."""
        binding = self._session.io_binding()
        rng = np.random.default_rng(tokens)
        values = []
        for value in self._proto.graph.input:
            dtype, width = _type_and_width(value)
            data = rng.standard_normal((tokens, width)).astype(
                np.float16 if dtype == onnx.TensorProto.FLOAT16 else np.float32
            )
            values.append(runtime().OrtValue.ortvalue_from_numpy(data, self._device, 0))
            binding.bind_ortvalue_input(value.name, values[-1])
        for value in self._proto.graph.output:
            dtype, width = _type_and_width(value)
            made = runtime().OrtValue.ortvalue_from_shape_and_type(
                [tokens, width], dtype, self._device, 0
            )
            values.append(made)
            binding.bind_ortvalue_output(value.name, made)
        self._graphs += 1
        options = runtime().RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(self._graphs))
        times = []
        for _ in range(_WARM_UP + repeat):
            start = time.perf_counter()
            self._session.run_with_iobinding(binding, options)  # waits for the GPU
            times.append(1e6 * (time.perf_counter() - start))
        return statistics.median(times[_WARM_UP:]) / _COPIES


def _type_and_width(value: onnx.ValueInfoProto) -> tuple[int, int]:
    tensor = value.type.tensor_type
    return tensor.elem_type, tensor.shape.dim[1].dim_value


class _Tuner:
    """Measures one node."""

    def __init__(
        self,
        source: Source,
        where: Target,
        node: ir.Node,
        description: Description,
        tokens: Sequence[int],
        repeat: int,
    ) -> None:
        """Makes its model."""
        self._source, self._tokens, self._repeat = source, tokens, repeat
        self._proto = node_model(source, node, description)
        problems = [description.problems(where, count) for count in tokens]
        self._answers = [[ask(problem) for problem in of_gemm] for of_gemm in zip(*problems)]  # noqa: B905

    def choices(self) -> list[Choice]:
        """Those of all products, one after the other: of the others the default kernels run."""
        if not any(candidates(answers) for answers in self._answers):
            return []
        defaults = self._times(None)
        found = []
        for answers in self._answers:
            times = {
                kernel: self._times(prefer(answers[0].problem, kernel))
                for kernel in candidates(answers)
            }
            found += choose(answers, defaults, times)
        return found

    def _times(self, line: str | None) -> list[float]:
        """Microseconds at each number of tokens, with a file of this line."""
        with tempfile.TemporaryDirectory() as folder, ort_errors(self._source.name):
            path = None
            if line is not None:
                path = Path(folder) / "tuning.txt"
                path.write_text(f"{native().tuning_header(0)}{line}\n")
            with _variable(path):
                timer = NodeTimer(self._proto, self._source.folder, _GRAPH, "cuda")
            return [timer.us(count, self._repeat) for count in self._tokens]


def candidates(answers: Sequence[Explanation]) -> list[str]:
    """The kernels that run a product where they are preferred, and not anyway."""
    found: dict[str, None] = {}
    for answer in answers:
        for verdict in answer.verdicts:
            if not verdict.refusal and verdict.kernel != answer.kernel:
                found[_stem(verdict.kernel)] = None
    return list(found)


def choose(
    answers: Sequence[Explanation],
    defaults: Sequence[float],
    times: Mapping[str, Sequence[float]],
) -> list[Choice]:
    """The kernels that are faster, one for each number of tokens.

    Args:
        answers: What the registry says of the product, at each number of tokens.
        defaults: Microseconds at each.
        times: The same with each kernel preferred.
    """
    found: list[Choice] = []
    before = 0
    for i, answer in enumerate(answers):
        rows, default = answer.problem.rows, _stem(answer.kernel or "")
        able = {_stem(verdict.kernel) for verdict in answer.verdicts if not verdict.refusal}
        able &= set(times)
        best = min(able - {default}, key=lambda kernel: times[kernel][i], default=None)
        if best is not None and times[best][i] * _GAIN < defaults[i]:
            made = Choice(
                _problem_text(answer.problem), before + 1, rows, best, times[best][i], default,
                defaults[i],
            )  # fmt: skip
            found.append(made)
        before = rows
    return found


def prefer(problem: Problem, kernel: str) -> str:
    """The line that prefers a kernel for a product, whatever its rows."""
    return f"{_problem_text(problem)} rows 1 {_MOST_ROWS} kernel {kernel}"


def _problem_text(p: Problem) -> str:
    return (
        f"{p.stage} {p.format} {p.dtype} experts {p.experts} topk {p.topk} n {p.n} k {p.k} "
        f"block_size {p.block_size} zero_points {int(p.zero_points)}"
    )


def _stem(kernel: str) -> str:
    """Of "grouped_gemm_sm80.int4" the part that a file names."""
    return kernel.rpartition(".")[0]


@contextlib.contextmanager
def _variable(path: Path | None) -> Iterator[None]:
    """Sets the variable that names the file, or unsets it, and puts back what it was."""
    before = os.environ.pop(env.TUNING.name, None)
    try:
        if path is not None:
            os.environ[env.TUNING.name] = str(path)
        yield
    finally:
        os.environ.pop(env.TUNING.name, None)
        if before is not None:
            os.environ[env.TUNING.name] = before
