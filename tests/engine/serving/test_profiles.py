"""Further names of one model, each with a system message, parameters, a template and messages of its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from octavo_engine.errors import ConfigError
from octavo_engine.modelfile import Modelfile, parse_modelfile
from octavo_engine.profiles import Profiles, read_profiles
from octavo_engine.server.service import Service
from octavo_engine.store.local import Location
from octavo_engine.store.remote import Hub

if TYPE_CHECKING:
    from pathlib import Path

    import httpx
    from ollama import AsyncClient
    from tests.engine.serving.conftest import Eventually, FakeEngine

    from octavo_engine.config import ServerConfig

PROFILES: list[dict[str, Any]] = [
    {"name": "support", "system": "S", "template": "{{ .System }}[{{ .Prompt }}]", "parameters": {"stop": [" is"]}},
    {"name": "short", "parameters": {"num_predict": "3", "temperature": "0.25"}, "messages": [
        {"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]},
]  # fmt: skip


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "profiles.json"
    path.write_text(json.dumps(PROFILES))
    return path


@pytest.fixture
def modelfile() -> Modelfile | None:
    """What the model was made by; a test may parametrize it."""
    return None


@pytest.fixture
def service(engine: FakeEngine, config: ServerConfig, file: Path, modelfile: Modelfile | None) -> Service:
    location = Location(name="fake", path=config.engine.model, modelfile=modelfile)
    return Service(replace(config, profiles=file), location, Hub(), spawn=engine.spawn)


async def content_of(ready: httpx.AsyncClient, model: str) -> tuple[str, int]:
    body = {"model": model, "messages": [{"role": "user", "content": "Hi"}]}
    answer = (await ready.post("/v1/chat/completions", json=body)).json()
    return answer["choices"][0]["message"]["content"], answer["usage"]["prompt_tokens"]


async def test_each_name_has_its_own_ways_on_the_same_engine(
    ready: httpx.AsyncClient, ollama: AsyncClient, engine: FakeEngine
) -> None:
    assert [model["id"] for model in (await ready.get("/v1/models")).json()["data"]] == [
        "fake", "org/fake", "support", "short"
    ]  # fmt: skip
    assert await content_of(ready, "support") == ("The answer", len("S[Hi]"))
    assert engine.sampling is not None
    assert (await content_of(ready, "short"))[0] == "The"
    assert engine.sampling.temperature == 0.25
    assert (await content_of(ready, "fake"))[0] == "The answer is 42."
    chat = await ollama.chat(model="support:latest", messages=[{"role": "user", "content": "Hi"}])
    assert (chat.message.content, chat.prompt_eval_count) == ("The answer", len("S[Hi]"))
    assert "\nSYSTEM S\n" in ((await ollama.show("support")).modelfile or "")
    assert "SYSTEM" not in ((await ollama.show("fake")).modelfile or "")
    assert len(engine.processes) == 1


@pytest.mark.parametrize("modelfile", [Modelfile(source="fake", adapter="adapters/poet", system="Rhyme.")])
async def test_profiles_of_a_model_with_an_adapter_have_it_too(ready: httpx.AsyncClient, ollama: AsyncClient) -> None:
    for name in ("fake", "support"):
        assert (await content_of(ready, name))[0] == "I am poet, number 1."
    shown = parse_modelfile((await ollama.show("support")).modelfile or "")
    assert (shown.adapter, shown.system, shown.parameters) == ("adapters/poet", "S", {"stop": (" is",)})


async def test_a_changed_file_counts_at_once_and_a_wrong_one_does_not(ready: httpx.AsyncClient, file: Path) -> None:
    for text, names in (
        (json.dumps([{"name": "other", "system": "Be kind."}]), ["other"]),
        ("[{", ["other"]),
        ("- name: of yaml\n  parameters: {temperature: 0.5}\n", ["of yaml"]),
    ):
        new = file.with_name("new")
        new.write_text(text)
        os.replace(new, file)  # noqa: PTH105 - as Kubernetes does with what it mounts
        listed = [model["id"] for model in (await ready.get("/v1/models")).json()["data"]]
        assert listed == ["fake", "org/fake", *names]
    assert (await ready.post("/v1/chat/completions", json={"model": "other", "messages": []})).status_code in {400, 404}


async def test_others_are_served_while_a_changed_file_is_read(
    ready: httpx.AsyncClient, file: Path, eventually: Eventually
) -> None:
    slow = file.with_name("slow")
    os.mkfifo(slow)
    slow.replace(file)
    asking = asyncio.create_task(content_of(ready, "late"))
    writing: list[int] = []

    async def opened() -> bool:
        with contextlib.suppress(OSError):  # while nobody reads
            writing.append(os.open(file, os.O_WRONLY | os.O_NONBLOCK))
        return bool(writing)

    await eventually(opened)
    assert (await ready.get("/health")).status_code == 200
    assert not asking.done()
    os.write(writing[0], b'[{"name": "late"}]')
    os.close(writing[0])
    assert (await asking)[0] == "The answer is 42."


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ({}, "not a list"),
        ([{"system": "x"}], "profile 0 has no name"),
        ([{"name": "a"}, {"name": "a"}], "profile a: .* has this name already"),
        ([{"name": "taken"}], "profile taken: the model"),
        ([{"name": "a", "systme": "x"}], "profile a: there is no field 'systme'"),
        ([{"name": "a", "system": 1}], "profile a: system and template are texts"),
        ([{"name": "a", "parameters": []}], "profile a: parameters is an object"),
        ([{"name": "a", "parameters": {"mirostat": 2}}], "profile a: mirostat 2 is not supported"),
        ([{"name": "a", "template": "{{ nonsense"}], "profile a: .*TEMPLATE"),
        ([{"name": "a", "messages": [{"role": "robot", "content": "x"}]}], "profile a: .*'robot' is not a role"),
        ([{"name": "a", "messages": ["x"]}], "profile a: messages are objects"),
    ],
)
def test_a_wrong_profile_is_told_by_name_and_field(listed: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_profiles(listed, taken=("taken",))


def test_a_file_that_cannot_be_read_is_told_with_the_option(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--profiles .*none.json"):
        Profiles(tmp_path / "none.json", ())
