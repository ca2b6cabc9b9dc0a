"""The command line: ``python -m qmoe_plugin``. No logic here, only arguments and printing.

Exit codes: 0 if all is well, 1 if something is wrong (said on standard error), 2 for bad arguments,
130 if interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import qmoe_plugin
from qmoe_plugin import doctor
from qmoe_plugin.commands import add_commands
from qmoe_plugin.commands.output import add_output, check_output, show
from qmoe_plugin.graph.inspect import explain_model
from qmoe_plugin.graph.quantize_rules import parse_rule
from qmoe_plugin.graph.quantize_weights import SEARCHES
from qmoe_plugin.progress import Bar
from qmoe_plugin.tables import kernel_table, support_page

_INTERRUPTED = 130  # as shells have it


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a subcommand; returns the exit code."""
    options = parser().parse_args(arguments)
    level = logging.INFO if options.verbose else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s")
    try:
        code: int = options.run(options)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        if options.verbose:
            traceback.print_exc()
        print(f"qmoe_plugin: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("qmoe_plugin: interrupted", file=sys.stderr)
        return _INTERRUPTED
    return code


def parser() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    made = argparse.ArgumentParser(prog="python -m qmoe_plugin", description=qmoe_plugin.__doc__)
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    made.add_argument("--version", action="version", version=qmoe_plugin.__version__)
    commands = made.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("doctor", help="check the installation and try the ops out")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=_doctor)

    command = commands.add_parser("kernels", help="print the support table")
    style = command.add_mutually_exclusive_group()
    style.add_argument("--json", action="store_true", help="print JSON")
    style.add_argument("--markdown", action="store_true", help="print the page docs/support.md")
    command.set_defaults(run=_kernels)

    command = commands.add_parser("retarget", help="move a model's nodes to our domain")
    command.add_argument("input", type=Path, metavar="IN", help="ONNX model")
    add_output(command)
    command.add_argument("--back", action="store_true", help="move them back to com.microsoft")
    command.add_argument("--strict", action="store_true", help="fail if any node is left behind")
    command.add_argument("--json", action="store_true", help="print the report as JSON")
    _add_sm(command)
    command.set_defaults(run=_retarget)

    command = commands.add_parser("quantize", help="quantise MatMul, Gemm and MoE nodes")
    command.add_argument("input", type=Path, metavar="IN", help="ONNX model")
    add_output(command)
    command.add_argument("--format", default="int4", help="FORMAT[:BLOCK][:asymmetric] (int4)")
    command.add_argument(
        "--rule",
        action="append",
        default=[],
        type=_rule,
        metavar="REGEX=FORMAT",
        help="format of what the expression is found in, nodes or weights; or keep. The first "
        "that matches counts",
    )
    command.add_argument("--search", choices=SEARCHES, help="how scales are set (nearest)")
    command.add_argument(
        "--calibration", type=Path, metavar="FILE", help="made by calibrate; for --search mse"
    )
    command.add_argument("--json", action="store_true", help="print the report as JSON")
    command.set_defaults(run=_quantize)

    command = commands.add_parser("prepack", help="pack the weights, for a fast start")
    command.add_argument("input", type=Path, metavar="IN", help="ONNX model")
    add_output(command)
    device = command.add_mutually_exclusive_group()
    device.add_argument("--sm", type=int, help="for GPUs of this compute capability, as in 90")
    device.add_argument("--cpu", action="store_true", help="for the CPU (default)")
    command.add_argument("--strict", action="store_true", help="fail if any node is left unpacked")
    command.add_argument("--json", action="store_true", help="print the report as JSON")
    command.set_defaults(run=_prepack)

    command = commands.add_parser("explain", help="say which kernel runs each node, and why")
    command.add_argument("input", type=Path, metavar="MODEL", help="ONNX model")
    command.add_argument("--node", metavar="NAME", help="only the node of this name")
    command.add_argument("--tokens", type=int, default=1, metavar="T", help="tokens in a run (1)")
    command.add_argument("--json", action="store_true", help="print JSON")
    _add_sm(command)
    command.set_defaults(run=_explain)

    add_commands(commands)
    for command in commands.choices.values():
        command.add_argument(
            "-v", "--verbose", action="store_true", help="log what is done; trace errors"
        )
    return made


def _rule(text: str) -> tuple[str, str]:
    try:
        return parse_rule(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _add_sm(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--sm", type=int, help="compute capability, as in 90; 0 for the CPU (default: this machine)"
    )


def _doctor(options: argparse.Namespace) -> int:
    checks = []
    for check in doctor.examine():
        checks.append(check)
        if not options.json:
            print(check, flush=True)
    if options.json:
        print(json.dumps([dataclasses.asdict(check) for check in checks], indent=2))
    return int(any(check.status == "broken" for check in checks))


def _kernels(options: argparse.Namespace) -> int:
    kernels = qmoe_plugin.kernels()
    if options.json:
        print(json.dumps([dataclasses.asdict(kernel) for kernel in kernels], indent=2))
    elif options.markdown:
        print(support_page(kernels, qmoe_plugin.formats.FORMATS.values()))
    else:
        print(kernel_table(kernels))
    return 0


def _retarget(options: argparse.Namespace) -> int:
    check_output(options)
    paths, dry_run = (options.input, options.output), options.dry_run
    if options.back:
        report = qmoe_plugin.unretarget(*paths, dry_run=dry_run)
    else:
        report = qmoe_plugin.retarget(*paths, sm=options.sm, dry_run=dry_run)
    failed = show(
        report, as_json=options.json, done=bool(report.moved), nothing="no node was moved"
    )
    return int(failed or (options.strict and bool(report.kept)))


def _quantize(options: argparse.Namespace) -> int:
    check_output(options)
    with Bar("weights") as bar:
        report = qmoe_plugin.quantize(
            options.input,
            options.output,
            format=options.format,
            rules=options.rule,
            search=options.search,
            calibration=options.calibration,
            dry_run=options.dry_run,
            progress=bar,
        )
    done = bool(report.quantized)
    return show(report, as_json=options.json, done=done, nothing="no node was quantised")


def _prepack(options: argparse.Namespace) -> int:
    check_output(options)
    with Bar("nodes") as bar:
        report = qmoe_plugin.prepack(
            options.input,
            options.output,
            sm=options.sm,
            dry_run=options.dry_run,
            progress=bar,
        )
    failed = show(
        report, as_json=options.json, done=bool(report.packed), nothing="no node was packed"
    )
    return int(failed or (options.strict and bool(report.kept)))


def _explain(options: argparse.Namespace) -> int:
    answers = explain_model(options.input, sm=options.sm, tokens=options.tokens, name=options.node)
    if options.json:
        print(json.dumps([dataclasses.asdict(answer) for answer in answers], indent=2))
    else:
        print("\n".join(str(answer) for answer in answers))
    return int(not all(answer.runs for answer in answers))
