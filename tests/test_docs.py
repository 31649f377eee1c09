"""The documentation: its links lead somewhere, its commands exist, the pages made of code are up to date."""

from __future__ import annotations

import itertools
import re
import shlex
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
import yaml

from octavo_cluster.__main__ import COMMANDS
from octavo_engine.arguments import build_parser
from octavo_operator import cli

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

ROOT: Final = Path(__file__).parents[1]
PAGES: Final = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").glob("*.md")])
VALUES: Final[dict[str, Any]] = yaml.safe_load((ROOT / "helm/octavo/values.yaml").read_text())
TARGETS: Final = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """What a link can name in a page after #, as forges make it of headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_to_a_file_leads_to_one(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!\w+:)([^)#\s]*)#?([^)\s]*)\)", prose(page)):
        file = page.parent / target if target else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), f"{target}#{anchor}"


def test_every_page_can_be_reached_from_the_first() -> None:
    reached: set[Path] = set()
    found = [ROOT / "README.md"]
    while found:
        page = found.pop()
        if page in reached:
            continue
        reached.add(page)
        links = re.findall(r"\]\((?!\w+:)([^)#\s]+\.md)", prose(page))
        found += [(page.parent / link).resolve() for link in links]
    assert {name_of(page) for page in PAGES if page.is_relative_to(ROOT / "docs")} <= {
        name_of(page) for page in reached
    }


# Commands


def commands(page: Path) -> list[list[str]]:
    """The words of every command in the page's blocks of shell; a pipe is two commands."""
    blocks = re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    found: list[list[str]] = []
    for block in blocks:
        pending = ""
        for line in block.replace("\\\n", " ").splitlines():
            pending += f"{line}\n"
            try:
                words = shlex.split(pending, comments=True)
            except ValueError:  # a quotation goes on in the next line
                continue
            pending = ""
            found += [list(part) for pipe, part in itertools.groupby(words, lambda word: word == "|") if not pipe]
        assert not pending, f"{page}: a quotation is not closed"
    return found


def files(words: list[str]) -> list[str]:
    """The words that are paths in the repository."""
    values = [word.partition("=")[2] if word.startswith("--") else word for word in words]
    return [value for value in values if re.match(r"(?:docs|e2e|helm|manifests|crds|tests)/", value)]


def _nothing(_: argparse.Namespace) -> None:
    pass


def check_make(words: list[str]) -> None:
    assert {word for word in words if "=" not in word} <= TARGETS


def check_helm(words: list[str]) -> None:
    assert words[0] in {"install", "upgrade", "uninstall", "test", "rollback", "template"}
    for option, value in itertools.pairwise(words):
        if option == "--set":
            for assignment in re.findall(r"(?:^|,)([\w.]+)=", value):
                part: Any = VALUES
                for key in assignment.split("."):
                    assert key in part, assignment
                    part = part[key]


def check_kubectl(words: list[str]) -> None:
    if words[0] == "octavo":
        cli._parser().parse_args(words[1:])
    else:
        assert words[0] in {"apply", "get", "logs", "wait", "describe", "delete", "explain", "annotate"}


def check_octavo(words: list[str]) -> None:
    build_parser(defaultdict(lambda: _nothing)).parse_args(words)


def check_cluster(words: list[str]) -> None:
    assert words[:2] == ["-m", "octavo_cluster"]
    assert words[2] in COMMANDS


def check_nothing(words: list[str]) -> None:
    """Somebody else's command, of which only the files are ours to know."""


CHECKS: Final[dict[str, Callable[[list[str]], None]]] = {
    "make": check_make,
    "helm": check_helm,
    "kubectl": check_kubectl,
    "octavo": check_octavo,
    ".venv/bin/python": check_cluster,
    "pip": check_nothing,
    "curl": check_nothing,
    "grep": check_nothing,
    "export": check_nothing,
}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_of_a_page_exists_with_its_options_and_files(page: Path) -> None:
    for program, *words in commands(page):
        assert program in CHECKS, program
        CHECKS[program](words)
        for file in files(words):
            assert (ROOT / file).exists(), file


def test_the_check_of_commands_sees_what_is_wrong(tmp_path: Path) -> None:
    for wrong in ("make demmo", "helm install octavo helm/octavo --set image.tga=1", "octavo serve m --prt 1"):
        page = tmp_path / "page.md"
        page.write_text(f"```sh\n{wrong}\n```\n")
        ((program, *words),) = commands(page)
        with pytest.raises((AssertionError, SystemExit)):
            CHECKS[program](words)


def test_the_pages_made_of_the_operators_tables_are_up_to_date() -> None:
    answer = subprocess.run(
        [sys.executable, ROOT / "docs/generate_operator.py", "--check"], capture_output=True, text=True, check=False
    )
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, "", "")
