"""Writes the pages of docs/ that are generated: python ci/pages.py [--check]

docs/command-line.md says what the parser of the command line knows, docs/benchmarks.md, a part of
docs/performance.md, pictures and the numbers in README.md what the files of ci/bench/results hold.
With --check nothing is written, and the exit code says whether the pages are current.
(docs/support.md is written by `python -m qmoe_plugin kernels --markdown`.)
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import cpu_pages
import gpu_pages

from qmoe_plugin.cli import parser

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "ci" / "bench" / "results"
MARKS = ("<!-- written by ci/pages.py -->\n", "<!-- end -->\n")


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--check", action="store_true", help="only compare")
    check = options.parse_args().check
    stale = []
    pages = {"command-line.md": command_line(), "benchmarks.md": benchmarks()}
    pages |= {"performance.md": performance(), **gpu_pages.pictures(RESULTS)}
    pages = {f"docs/{name}": text for name, text in pages.items()}
    readme = gpu_pages.readme(RESULTS, (ROOT / "README.md").read_text())
    pages["README.md"] = cpu_pages.readme(RESULTS, readme)
    for name, text in pages.items():
        page = ROOT / name
        if not check:
            page.write_text(text)
        elif not page.exists() or page.read_text() != text:
            stale.append(str(page.relative_to(ROOT)))
    if stale:
        print(f"{' and '.join(stale)} must be written again: python ci/pages.py", file=sys.stderr)
    return int(bool(stale))


def command_line() -> str:
    """A section for each verb: usage, and a table of its arguments."""
    made = parser()
    (verbs,) = (a for a in made._actions if isinstance(a, argparse._SubParsersAction))
    helps = {choice.dest: choice.help for choice in verbs._choices_actions}
    lines = [
        "# Command line",
        "",
        "Generated from the program's own parser by `python ci/pages.py`; do not edit.",
        "",
        "`python -m qmoe_plugin VERB ...`, or `qmoe-plugin VERB ...` where it is installed.",
        "Exit codes: 0 if all is well, 1 if something is wrong (one line on standard error says",
        "what; with `-v` the trace too), 2 for arguments that the verb does not take.",
        "",
    ]
    for name, verb in verbs.choices.items():
        actions = [action for action in verb._actions if action.dest != "help"]
        usage = " ".join([name, *_usage(verb, actions)])
        lines += [f"## {name}", "", f"{_sentence(helps[name])}", "", "```", usage, "```", ""]
        lines += ["| argument | meaning |", "|---|---|"]
        lines += [f"| `{_invocation(a)}` | {_cell(a)} |" for a in actions]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _usage(verb: argparse.ArgumentParser, actions: list[argparse.Action]) -> list[str]:
    """The arguments, those that exclude each other together."""
    groups = {id(a): group for group in verb._mutually_exclusive_groups for a in
              group._group_actions}  # fmt: skip
    words, done = [], set()
    for action in [*_positional(actions), *_optional(actions)]:
        group = groups.get(id(action))
        if group is None:
            words.append(_word(action))
        elif id(group) not in done:
            done.add(id(group))
            words.append(f"[{' | '.join(_bare(a) for a in group._group_actions)}]")
    return words


def _positional(actions: list[argparse.Action]) -> list[argparse.Action]:
    return [action for action in actions if not action.option_strings]


def _optional(actions: list[argparse.Action]) -> list[argparse.Action]:
    return [action for action in actions if action.option_strings]


def _word(action: argparse.Action) -> str:
    optional = action.option_strings or action.nargs == "?"
    return f"[{_bare(action)}]" if optional else _bare(action)


def _bare(action: argparse.Action) -> str:
    """As in "--sm SM", "-v" or "MODEL"."""
    if not action.option_strings:
        return _value(action)
    flag = action.option_strings[0]
    return flag if action.nargs == 0 else f"{flag} {_value(action)}"


def _invocation(action: argparse.Action) -> str:
    if not action.option_strings:
        return _value(action)
    flags = ", ".join(action.option_strings)
    return flags if action.nargs == 0 else f"{flags} {_value(action)}"


def _value(action: argparse.Action) -> str:
    if action.metavar is not None:
        return str(action.metavar)
    if action.choices is not None:
        return "{" + ",".join(map(str, action.choices)) + "}"
    return action.dest.upper()


def _cell(action: argparse.Action) -> str:
    return _sentence(action.help or "").replace("|", "\\|").replace("<", "&lt;").rstrip(".")


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def benchmarks() -> str:
    """A table for each file of results."""
    lines = [
        "# Benchmarks",
        "",
        "Generated from `ci/bench/results/` by `python ci/pages.py`; do not edit. How the numbers",
        "come about is said in `ci/bench/bench_gpu.py` and `ci/bench/bench_cpu.py`, why they are",
        "what they are in the [performance log](performance-log.md).",
        "",
    ]
    lines += gpu_pages.sections(RESULTS)
    lines += cpu_pages.sections(RESULTS)
    return "\n".join(lines).rstrip() + "\n"


def performance() -> str:
    """The page as it is, its part between MARKS new."""
    page = (ROOT / "docs" / "performance.md").read_text()
    return gpu_pages.between(MARKS, page, gpu_pages.overview(RESULTS))


if __name__ == "__main__":
    sys.exit(main())
