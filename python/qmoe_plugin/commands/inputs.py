"""The arguments that say what a model is fed with."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from qmoe_plugin.ort_values import Array
from qmoe_plugin.sample_inputs import Wanted


def add_inputs(command: argparse.ArgumentParser) -> None:
    """Adds the arguments that say what a model is fed with."""
    inputs = command.add_argument_group("inputs")
    inputs.add_argument(
        "--inputs", type=Path, metavar="FILE.npz", help="inputs by name (default: random tokens)"
    )
    inputs.add_argument("--tokens", type=int, default=8, metavar="T", help="random tokens (8)")
    inputs.add_argument("--seed", type=int, default=0, help="of random inputs (0)")
    inputs.add_argument(
        "--dim",
        action="append",
        default=[],
        type=_dim,
        metavar="NAME=SIZE",
        help="size of a dimension that the model leaves open",
    )


def wanted(options: argparse.Namespace) -> Wanted:
    """What `add_inputs` took."""
    if options.tokens < 1:
        raise ValueError(f"--tokens is {options.tokens}; at least 1 is needed")
    given: dict[str, Array] = {}
    if options.inputs is not None:
        try:
            with np.load(options.inputs, allow_pickle=False) as file:
                given = dict(file)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{options.inputs} is not a file of arrays (.npz): {error}") from None
    return Wanted(given, dict(options.dim), options.tokens, options.seed)


def _dim(text: str) -> tuple[str, int]:
    name, _, size = text.rpartition("=")
    if not name or not size.isdigit():
        raise argparse.ArgumentTypeError(f"'{text}' is not NAME=SIZE, as in batch_size=1")
    return name, int(size)
