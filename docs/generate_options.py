# ruff: noqa: INP001 - a script that nobody imports
"""Writes docs/options.md from the parser of the `octavo` command.

    python docs/generate_options.py           writes it
    python docs/generate_options.py --check   only compares

Run by `make generate` and, with --check, by tests/engine/test_arguments.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from octavo_engine.arguments import build_parser

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE: Final = Path(__file__).with_name("options.md")
COMMAND: Final = "python docs/generate_options.py"
NAMES: Final = ("serve", "run", "plan", "pull", "push", "create", "show", "list", "cp", "rm", "ps", "completion")
HEAD: Final = f"""\
# Options of `octavo`

Written by `{COMMAND}` from the parser itself; `octavo COMMAND --help` says the same. Flags have vLLM's names and
meanings where vLLM has them. Amounts of memory are written as 4GiB, 512MiB, 4.3GB or in bytes; a bare 4G is refused, as
Kubernetes and vLLM read it differently. A flag that would have no effect is refused by name.
"""


def page() -> str:
    """The whole of docs/options.md."""
    parser = build_parser({name: lambda _: None for name in NAMES})
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))  # noqa: SLF001 - argparse has no public way to list what it takes
    return "\n".join((HEAD, *(line for name in NAMES for line in section(name, commands.choices[name]))))


def section(name: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    """The lines about one command."""
    yield from (f"## octavo {name}", "", parser.description or "", "")
    for group in parser._action_groups:  # noqa: SLF001 - as above
        actions = [action for action in group._group_actions if action.dest != "help"]  # noqa: SLF001 - as above
        if actions:
            yield from (f"| {group.title} | |", "|---|---|")
            yield from (f"| {invocation(action)} | {meaning(action, parser)} |" for action in actions)
            yield ""
    if parser.epilog:
        yield from (f"{parser.epilog[0].upper()}{parser.epilog[1:]}.", "")


def invocation(action: argparse.Action) -> str:
    """How an option is written, such as `--port PORT`."""
    if not action.option_strings:
        return f"`{action.metavar or action.dest.upper()}`"
    value = ""
    if action.nargs != 0:
        name = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
        value = f" {name}" if action.choices is None else f" {{{','.join(action.choices)}}}"
        value += " ..." if action.nargs == "+" else ""
    return ", ".join(f"`{flag}{value}`" for flag in action.option_strings)


def meaning(action: argparse.Action, parser: argparse.ArgumentParser) -> str:
    """The help text with its defaults filled in."""
    return ((action.help or "") % (vars(action) | {"prog": parser.prog})).replace("|", "\\|")


def main() -> None:
    """Write or compare; 1 when the page is out of date."""
    arguments = argparse.ArgumentParser(description="Writes docs/options.md.")
    arguments.add_argument("--check", action="store_true", help="only compare")
    text = page()
    if not arguments.parse_args().check:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
        sys.exit(f"{PAGE.name} is out of date: run {COMMAND}")


if __name__ == "__main__":
    main()
