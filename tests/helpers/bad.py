"""A node with one thing wrong, and what must be said of it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest

from helpers.cases import Case, QMoECase, Tensors
from helpers.models import ACTIVATION_INPUTS, one_node_model
from helpers.run import open_session, run

REMOVE = object()  # as an attribute's value


@dataclass(frozen=True)
class Bad:
    """One thing wrong with a node.

    Attributes:
        name: What is wrong.
        message: Regular expression that the error must match, over all of its lines.
        case: The node, right but for the following.
        attributes: Attributes that replace the case's.
        change: Changes the tensors.
        feed: Weights that become graph inputs.
        at_run: The session opens, and the run fails.
        by_onnxruntime: onnxruntime finds it before we are asked, in its own words.
    """

    name: str
    message: str
    case: Case = field(default_factory=QMoECase)
    attributes: dict[str, object] = field(default_factory=dict)
    change: Callable[[Tensors], None] = lambda tensors: None
    feed: tuple[str, ...] = ()
    at_run: bool = False
    by_onnxruntime: bool = False

    def check(self, device: str) -> None:
        """Asserts that the node is refused, in the message's words."""
        tensors = self.case.tensors()
        self.change(tensors)
        merged = {**self.case.attributes(), **self.attributes}
        attributes = {name: value for name, value in merged.items() if value is not REMOVE}
        feed = ACTIVATION_INPUTS | set(self.feed)
        model = one_node_model(self.case.op_type, tensors, attributes, feed=frozenset(feed))
        feeds = {name: tensor for name, tensor in tensors.items() if name in feed}

        session = None
        if self.at_run:
            session = open_session(model, device)
        with pytest.raises(Exception) as caught:  # noqa: PT011, the message is looked at below
            run(session or open_session(model, device), feeds)
        message = str(caught.value)
        assert re.search(self.message, message, re.DOTALL), message
        if not self.by_onnxruntime:
            assert f"{self.case.op_type} node 'node'" in message, message


def id_of(bad: Bad) -> str:
    return bad.name.replace(" ", "_")


def to(name: str, function: Callable[[np.ndarray], np.ndarray]) -> Callable[[Tensors], None]:
    """A change of one tensor."""

    def change(tensors: Tensors) -> None:
        tensors[name] = function(tensors[name])

    return change


def put(name: str, value: float, index: int = 5) -> Callable[[Tensors], None]:
    """One element of a tensor set to a value."""

    def change(tensors: Tensors) -> None:
        tensors[name].reshape(-1)[index] = value

    return change


def add(name: str, array: np.ndarray) -> Callable[[Tensors], None]:
    """Another tensor."""

    def change(tensors: Tensors) -> None:
        tensors[name] = array

    return change


def drop(*names: str) -> Callable[[Tensors], None]:
    """Tensors left out."""

    def change(tensors: Tensors) -> None:
        for name in names:
            del tensors[name]

    return change


def bytes_of(name: str, code: int, index: int = 5) -> Callable[[Tensors], None]:
    """One code of a tensor of small floats."""

    def change(tensors: Tensors) -> None:
        tensors[name].view(np.uint8).reshape(-1)[index] = code

    return change
