"""The snippets of docs/clients/, each run as its reader would, with the real model behind another base URL."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from octavo_cluster import clients

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.engine.conftest import Serve, ServedModel

pytestmark = [pytest.mark.model, pytest.mark.timeout(400)]

PAGES: Final = Path(__file__).parents[2] / "docs" / "clients"
BASE_URL: Final = "http://localhost:8000"
SECONDS: Final = 300  # for one snippet; what takes them is importing the client on a busy machine

# What every snippet writes, in order of the pages: patterns, each found after the one before it.
WEATHER: Final = r"get_weather \{.*city.*\}"
CITY: Final = r"name='.+' country='(France|Spain)'"
WRITTEN: Final[dict[str, list[list[str]]]] = {
    "curl.md": [
        [r'"content":".*Paris'],
        ["chat.completion.chunk", "Paris", r"\[DONE\]"],
        ['"phase":"Ready"', "vllm:num_requests_running", "vllm:num_requests_waiting"],
    ],
    "instructor.md": [[CITY, CITY]],
    "langchain.md": [["Paris", "Paris"], [WEATHER, CITY]],
    "litellm.md": [["Paris", "Paris"]],
    "ollama-node.md": [["Paris", "Paris"]],
    "ollama-python.md": [["Paris", "Paris"], [WEATHER], [CITY]],
    "openai-node.md": [["Paris", "Paris"], [WEATHER]],
    "openai-python.md": [["Paris", "Paris"], ["Paris", "Madrid"], [WEATHER, r"\w"], [CITY], ["Paris", "576 True"]],
}


def snippets(page: Path) -> list[tuple[str, str]]:
    """Language and text of what a page has to run; YAML is not."""
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [(language, text) for language, text in blocks if language != "yaml"]


def run(client: str, language: str, text: str) -> str:
    """What a snippet of a client's page writes."""
    cwd = None
    command: list[str | Path]
    if language == "python":
        python = clients.python(client) if client in clients.PYTHON_CLIENTS else sys.executable
        command = [python, "-W", "ignore", "-"]
    elif language == "javascript":
        command, cwd = ["node", "--input-type=module", "-"], clients.node()
    else:
        assert language == "sh", language
        command = ["bash", "-euo", "pipefail"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=SECONDS, cwd=cwd, check=False)
    assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def served(serve: Serve, smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedModel]:
    """The server of docs/clients/README.md."""
    log = tmp_path_factory.mktemp("served") / "log"
    template = PAGES / "chatml-tools.jinja"
    with serve(smollm2_path, log, "--served-model-name", "smollm2", "--chat-template", str(template)) as served:
        yield served


def test_every_page_is_run_and_linked() -> None:
    pages = {page.name for page in PAGES.glob("*.md")} - {"README.md"}
    assert pages == set(WRITTEN)
    index = (PAGES / "README.md").read_text(encoding="utf-8")
    assert pages == set(re.findall(r"\(([\w-]+\.md)\)", index))


@pytest.mark.parametrize("page", WRITTEN)
def test_the_snippets_of_a_page_work(served: ServedModel, page: str) -> None:
    blocks = snippets(PAGES / page)
    assert len(blocks) == len(WRITTEN[page])
    for (language, text), patterns in zip(blocks, WRITTEN[page], strict=True):
        assert BASE_URL in text
        written = run(page.removesuffix(".md"), language, text.replace(BASE_URL, served.url))
        assert re.search(".*".join(patterns), written, re.DOTALL), written
