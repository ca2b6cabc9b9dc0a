"""Measures the cells of one case: our op and the stock one, in turns, in one process."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import onnxruntime as ort
import torch

from qmoe_plugin.inspection import inspect

from .cases import Case
from .device import Device
from .player import Inputs, Player, open_session
from .results import Cell, summarize
from .weights import RandomFiles, build

ROUNDS = 3  # in which contestants take turns
_MESSAGE = 300  # characters of a refusal


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        seconds: That the runs of a contestant may take in a cell.
        least: Runs, at least.
        most: Runs, at most.
    """

    seconds: float
    least: int
    most: int

    def runs(self, run_us: float) -> int:
        """Runs in a round, if one takes so long."""
        wanted = self.seconds * 1e6 / max(run_us, 1.0)
        return max(1, round(min(max(wanted, self.least), self.most) / ROUNDS))


QUICK = Effort(0.04, 6, 12)
FULL = Effort(0.2, 9, 45)


class Runner(Protocol):
    """Something that can be run again and again."""

    def run(self) -> object:
        """Starts a run."""
        ...


def take_times(
    device: Device,
    runners: dict[str, Runner],
    prepare: Callable[[int], object],
    graph: bool,
    effort: Effort,
) -> dict[str, list[float]]:
    """Microseconds of the runs of each, taking turns. All have run before."""
    timer = device.time_replays if graph else device.time_launches
    runs = {name: effort.runs(timer(prepare, r.run, 2)[-1]) for name, r in runners.items()}
    times: dict[str, list[float]] = {name: [] for name in runners}
    for turn in range(ROUNDS):
        for name, runner in runners.items():
            times[name] += timer(
                lambda i, first=turn * runs[name]: prepare(first + i), runner.run, runs[name]
            )
    return times


class CaseBench:
    """The sessions of a case."""

    def __init__(
        self,
        device: Device,
        case: Case,
        files: RandomFiles,
        limits: dict[str, float],
        effort: Effort,
        contestants: Sequence[str] = ("ours", "stock"),
    ) -> None:
        """Makes the models and the sessions. Who refuses the case is remembered with the reason."""
        self._device, self._case, self._limits, self._effort = device, case, limits, effort
        started = time.perf_counter()
        paths = build(case, files)
        self._paths = {name: paths[name] for name in contestants}
        self.build_s = time.perf_counter() - started
        self._sessions: dict[str, ort.InferenceSession] = {}
        self._facts: dict[str, dict[str, Any]] = {}
        self._graphs = 0
        for name, path in self._paths.items():
            try:
                self._sessions[name], seconds = open_session(path, device)
                self._facts[name] = {"load_s": round(seconds, 2)}
            except Exception as error:  # of whatever type the binding makes
                self._facts[name] = {"refusal": _message(error, path.parent)}

    def refusals(self) -> dict[str, str]:
        """Who does not run the case, and why."""
        return {n: facts["refusal"] for n, facts in self._facts.items() if "refusal" in facts}

    def cells(self, tokens: int, modes: tuple[bool, ...]) -> list[Cell]:
        """Measures one number of tokens.

        Args:
            tokens: How many.
            modes: True for runs in a CUDA graph, False for runs without.
        """
        inputs = Inputs(self._device, self._case, tokens)
        return [self._cell(inputs, tokens, graph) for graph in modes]

    def _cell(self, inputs: Inputs, tokens: int, graph: bool) -> Cell:
        device, case = self._device, self._case
        players: dict[str, Player] = {}
        first: dict[str, torch.Tensor] = {}
        contestants = {name: dict(facts) for name, facts in self._facts.items()}
        self._graphs += graph
        inputs.draw(0)
        for name, session in self._sessions.items():
            try:
                player = Player(session, device, case, inputs, self._graphs if graph else -1)
                player.run()
                device.synchronize()
                first[name] = player.outputs.clone()
                players[name] = player
            except Exception as error:  # as above
                contestants[name]["refusal"] = _message(error, self._paths[name].parent)
                device.synchronize()
        times = take_times(device, dict(players), inputs.draw, graph, self._effort)
        for name, values in times.items():
            contestants[name] |= summarize([value / case.nodes() for value in values])
        if "ours" in players:
            inputs.draw(0)
            players["ours"].run()
            device.synchronize()
            contestants["ours"]["same_bits"] = torch.equal(
                first["ours"].view(torch.int16), players["ours"].outputs.view(torch.int16)
            )
        floor, bound = case.floor_us(
            tokens,
            inputs.experts,
            self._limits["copy_bytes_per_s"],
            self._limits.get(f"{case.rate}_flop_per_s", self._limits["bfloat16_flop_per_s"]),
        )
        cell: Cell = {
            "case": case.name,
            "format": case.format,
            "dtype": case.dtype,
            "tokens": tokens,
            "graph": graph,
            "nodes": case.nodes(),
            "experts_read": round(inputs.experts, 2),
            "floor_us": round(floor, 3),
            "bound": bound,
            "kernels": self._kernels(tokens),
            **contestants,
        }
        if len(first) == 2 and (case.experts or not case.bias):  # the stock product has no bias
            cell["difference_rms"] = _difference(first["ours"], first["stock"])
        return cell

    def _kernels(self, tokens: int) -> list[str]:
        """What runs our node, without repetitions."""
        view = inspect(self._paths["ours"], sm=self._device.sm, tokens=tokens).nodes[0]
        return list(dict.fromkeys(choice.kernel for choice in view.kernels))

    def close(self) -> None:
        """Gives the sessions' memory back."""
        self._sessions.clear()
        gc.collect()
        if self._device.kind == "cuda":
            torch.cuda.empty_cache()


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Root mean square of the difference over that of b."""
    wide = [t.flatten()[: 1 << 24].float() for t in (a, b)]
    return float(((wide[0] - wide[1]).square().mean() / wide[1].square().mean()).sqrt())


def _message(error: Exception, folder: Path) -> str:
    return str(error).replace(str(folder), "...").strip()[:_MESSAGE]
