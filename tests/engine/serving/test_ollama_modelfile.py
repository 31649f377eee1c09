"""A server of a model that a Modelfile makes of the fake one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from octavo_engine.modelfile import Modelfile, parse_modelfile
from octavo_engine.server.service import Service
from octavo_engine.store.local import Location
from octavo_engine.store.remote import Hub

if TYPE_CHECKING:
    import httpx
    from ollama import AsyncClient
    from tests.engine.serving.conftest import FakeEngine

    from octavo_engine.config import ServerConfig

MODELFILE = Modelfile(
    source="fake",
    system="Be brief.",
    template="{{ .System }}{{ range .Messages }}[{{ .Content }}]{{ end }}",
    messages=(("user", "1"), ("assistant", "2")),
    parameters={"temperature": 0.25, "stop": (" is",), "num_predict": 8, "num_ctx": 300},
)


@pytest.fixture
def service(engine: FakeEngine, config: ServerConfig) -> Service:
    location = Location(name="fake", path=config.engine.model, modelfile=MODELFILE)
    return Service(config, location, Hub(), spawn=engine.spawn)


async def test_both_apis_use_it_where_a_request_says_nothing(
    ollama: AsyncClient, ready: httpx.AsyncClient, engine: FakeEngine
) -> None:
    prompt = "Be brief.[Be brief.][1][2][Hi]"
    chat = await ollama.chat(model="fake", messages=[{"role": "user", "content": "Hi"}])
    assert (chat.message.content, chat.prompt_eval_count, chat.done_reason) == ("The answ", len(prompt), "length")
    assert engine.sampling is not None
    assert engine.sampling.temperature == 0.25
    body = {"model": "fake", "messages": [{"role": "user", "content": "Hi"}]}
    completion = (await ready.post("/v1/chat/completions", json=body)).json()
    assert completion["choices"][0]["message"]["content"] == "The answ"
    assert completion["usage"]["prompt_tokens"] == len(prompt)
    assert engine.sampling.temperature == 0.25


async def test_what_a_request_says_holds(ollama: AsyncClient, ready: httpx.AsyncClient, engine: FakeEngine) -> None:
    options = {"temperature": 0.5, "num_predict": 100}
    system = [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}]
    chat = await ollama.chat(model="fake", messages=system, options=options)
    assert (chat.message.content, chat.done_reason) == ("The answer", "stop")
    assert chat.prompt_eval_count == len("S[1][2][S][Hi]")
    assert engine.sampling is not None
    assert engine.sampling.temperature == 0.5
    body = {"model": "fake", "messages": system, "temperature": 1.5, "stop": ["42"], "max_tokens": 100}
    completion = (await ready.post("/v1/chat/completions", json=body)).json()
    assert completion["choices"][0]["message"]["content"] == "The answer is "
    assert engine.sampling.temperature == 1.5


async def test_it_is_shown_as_text_that_makes_it_again(ollama: AsyncClient) -> None:
    shown = await ollama.show("fake")
    assert parse_modelfile(shown.modelfile or "") == MODELFILE
    assert shown.template == MODELFILE.template
    assert "num_ctx" in (shown.parameters or "")
