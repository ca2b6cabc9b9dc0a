"""Sessions of a case, bound to tensors on the device, and what they are fed with."""

from __future__ import annotations

import time
import zlib
from pathlib import Path

import onnxruntime as ort
import torch

import qmoe_plugin

from .cases import Case
from .device import Device
from .weights import TYPES

DRAWS = 8  # routings of each node that runs take in turn
_HOT = 20.0  # what the logit of a hot expert has more


class Inputs:
    """What all contestants of a case are fed with, at one number of tokens.

    Attributes:
        x: [T, hidden], of all nodes: in a model the op before has just written it.
        routers: [nodes, T, E] logits of the run at hand; None without experts.
        experts: How many experts a node reads, on average over nodes and draws; 1 without.
    """

    def __init__(self, device: Device, case: Case, tokens: int) -> None:
        """Draws them; the same ones for the same case and number of tokens."""
        generator = torch.Generator(device.kind)
        generator.manual_seed(zlib.crc32(f"{case.name} {tokens}".encode()))
        kind, dtype = {"device": device.kind, "generator": generator}, getattr(torch, case.dtype)
        self.x = torch.randn(tokens, case.hidden, **kind).to(dtype)
        self.routers: torch.Tensor | None = None
        self.experts = 1.0
        if not case.experts:
            return
        logits = 2 * torch.randn(DRAWS, case.nodes(), tokens, case.experts, **kind)
        if case.skewed:
            hot = torch.randint(case.experts, (DRAWS, case.nodes(), 1, 1), **kind)
            logits.scatter_add_(
                3, hot.expand(-1, -1, tokens, 1), torch.full_like(logits[..., :1], _HOT)
            )
        self.logits = logits.to(dtype)
        self.routers = self.logits[0].clone()
        chosen = self.logits.float().topk(case.topk).indices.flatten(2)
        hit = torch.zeros(DRAWS, case.nodes(), case.experts, device=device.kind)
        self.experts = float(hit.scatter_(2, chosen, 1.0).sum(-1).mean())

    def draw(self, number: int) -> None:
        """Puts the routing of a run into `routers`."""
        if self.routers is not None:
            self.routers.copy_(self.logits[number % DRAWS])


def open_session(path: Path, device: Device) -> tuple[ort.InferenceSession, float]:
    """A session of one of the models, and the seconds that making it took.

    Raises:
        SystemExit: If onnxruntime would run it elsewhere, as it does where it cannot use the GPU.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if path.stem == "ours":
        qmoe_plugin.register(options)
    started = time.perf_counter()
    session = ort.InferenceSession(str(path), options, providers=[device.provider])
    wanted = device.provider if isinstance(device.provider, str) else device.provider[0]
    if session.get_providers()[0] != wanted:
        raise SystemExit(f"onnxruntime has no {wanted} that works here")
    return session, time.perf_counter() - started


class Player:
    """A session that runs at one number of tokens.

    Attributes:
        outputs: [nodes, T, columns] of the last run.
    """

    def __init__(
        self, session: ort.InferenceSession, device: Device, case: Case, inputs: Inputs, graph: int
    ) -> None:
        """Binds inputs and outputs.

        Args:
            session: The session.
            device: Where it runs.
            case: What it runs.
            inputs: What it reads, kept by this object.
            graph: Number of its CUDA graph in the session; -1 to run without one.
        """
        tokens, columns = inputs.x.shape[0], case.hidden if case.experts else case.inter
        self._session, self._inputs = session, inputs
        self.outputs = torch.empty(
            case.nodes(), tokens, columns, device=device.kind, dtype=inputs.x.dtype
        )
        self._binding = session.io_binding()
        where = (device.kind, 0, TYPES[case.dtype])
        self._binding.bind_input("x", *where, list(inputs.x.shape), inputs.x.data_ptr())
        for i in range(case.nodes()):
            if inputs.routers is not None:
                router = inputs.routers[i]
                self._binding.bind_input(
                    f"router{i}", *where, list(router.shape), router.data_ptr()
                )
            y = self.outputs[i]
            self._binding.bind_output(f"y{i}", *where, list(y.shape), y.data_ptr())
        self._options = ort.RunOptions()
        self._options.add_run_config_entry("gpu_graph_id", str(graph))
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def run(self) -> None:
        """Starts a run; the first one captures the graph."""
        self._session.run_with_iobinding(self._binding, self._options)
