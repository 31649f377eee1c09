"""A server of many models, by both APIs' own clients; engines that load, answer and end as the test says."""

from __future__ import annotations

import asyncio
import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from ollama import AsyncClient, ResponseError
from safetensors.numpy import save_file

from octavo_engine.config import EngineConfig, ServerConfig
from octavo_engine.server.shelf import Shelf
from octavo_engine.store.blobs import digest_of
from octavo_engine.store.remote import Hub

if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    import httpx
    from tests.engine.serving.conftest import FakeEngine, FakeProcess

    Eventually = Callable[[Callable[[], Awaitable[bool]]], Awaitable[None]]

ANSWER = "The answer is 42."
HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def store(tmp_path: Path, fake_model_path: Path) -> Path:
    """A store of three models."""
    for name in ("a", "b", "c"):
        shutil.copy(fake_model_path, tmp_path / f"{name}.gguf")
    return tmp_path


@pytest.fixture
def room() -> dict[str, int]:
    """How many models fit into the memory."""
    return {"models": 100}


@pytest.fixture
def spawned() -> list[str]:
    """The models whose engines were started."""
    return []


@pytest.fixture
def service(engine: FakeEngine, store: Path, room: dict[str, int], spawned: list[str]) -> Shelf:
    """What the fixtures of servers serve."""

    def spawn(config: EngineConfig) -> tuple[FakeProcess, socket.socket]:
        spawned.append(config.served_model_names[0])
        return engine.spawn(config)

    config = ServerConfig(engine=EngineConfig(model=store, served_model_names=()), shutdown_timeout=5)
    return Shelf(config, store, Hub(), spawn=spawn, measure=lambda _engine, _pids: (1, room["models"]))


async def ask(ollama: AsyncClient, model: str, **options: Any) -> str:
    return (await ollama.chat(model=model, messages=HI, **options)).message.content or ""


async def loaded(ollama: AsyncClient) -> list[str]:
    return [model.model or "" for model in (await ollama.ps()).models]


async def test_all_models_are_told_and_none_is_loaded(ollama: AsyncClient, http: httpx.AsyncClient) -> None:
    assert [model.model for model in (await ollama.list()).models] == ["a", "b", "c"]
    assert [model["id"] for model in (await http.get("/v1/models")).json()["data"]] == ["a", "b", "c"]
    assert (await http.get("/v1/models/b")).json()["id"] == "b"
    assert (await ollama.show("b")).modelfile is not None
    assert await loaded(ollama) == []


async def test_a_model_is_loaded_when_it_is_asked_for_by_either_api(
    ollama: AsyncClient, http: httpx.AsyncClient, spawned: list[str]
) -> None:
    assert await ask(ollama, "a:latest") == ANSWER
    body = {"model": "b", "messages": HI}
    completion = (await http.post("/v1/chat/completions", json=body)).json()
    assert completion["choices"][0]["message"]["content"] == ANSWER
    assert await ask(ollama, "a") == ANSWER
    assert spawned == ["a", "b"]
    assert sorted(await loaded(ollama)) == ["a", "b"]
    metrics = (await http.get("/metrics")).text
    assert metrics.count("# TYPE vllm:generation_tokens_total") == 1
    for name in ("a", "b"):
        assert f'vllm:request_success_total{{engine="0",finished_reason="stop",model_name="{name}"}}' in metrics


async def test_who_asks_for_a_model_that_is_being_loaded_waits(
    ollama: AsyncClient, engine: FakeEngine, spawned: list[str], eventually: Eventually
) -> None:
    engine.loaded.clear()
    asking = [asyncio.create_task(ask(ollama, "a")) for _ in range(3)]

    async def is_loading() -> bool:
        return bool(engine.processes)

    await eventually(is_loading)
    assert await loaded(ollama) == []
    assert not any(task.done() for task in asking)
    engine.loaded.set()
    assert await asyncio.gather(*asking) == [ANSWER] * 3
    assert spawned == ["a"]


async def test_a_model_goes_when_its_time_is_over(
    ollama: AsyncClient, engine: FakeEngine, eventually: Eventually
) -> None:
    await ask(ollama, "a", keep_alive=-1)
    (model,) = (await ollama.ps()).models
    assert model.expires_at is not None
    assert model.expires_at.year == 9999
    await ask(ollama, "a", keep_alive="10ms")

    async def is_gone() -> bool:
        return await loaded(ollama) == []

    await eventually(is_gone)
    assert engine.processes[0].wait(5) is not None


async def test_who_says_no_time_leaves_it_as_it_was(ollama: AsyncClient, ready: httpx.AsyncClient) -> None:
    await ask(ollama, "a", keep_alive=-1)
    await ask(ollama, "a")
    assert (await ready.post("/v1/chat/completions", json={"model": "a", "messages": HI})).status_code == 200
    (model,) = (await ollama.ps()).models
    assert model.expires_at is not None
    assert model.expires_at.year == 9999


async def test_a_model_that_is_to_go_goes_when_its_last_answer_is_whole(
    ollama: AsyncClient, engine: FakeEngine, eventually: Eventually
) -> None:
    engine.steps.clear()
    asking = asyncio.create_task(ask(ollama, "a", keep_alive=None))

    async def has_begun() -> bool:
        return engine.num_steps > 0

    await eventually(has_begun)
    await ollama.generate(model="a", keep_alive=0)
    assert await loaded(ollama) == ["a"]
    engine.steps.set()
    assert await asking == ANSWER

    async def is_gone() -> bool:
        return await loaded(ollama) == []

    await eventually(is_gone)


async def test_a_model_can_be_loaded_and_unloaded_without_a_prompt(
    ollama: AsyncClient, spawned: list[str], eventually: Eventually
) -> None:
    assert (await ollama.generate(model="a")).done_reason == "load"
    assert await loaded(ollama) == ["a"]
    assert (await ollama.generate(model="a", keep_alive=0)).done_reason == "unload"

    async def is_gone() -> bool:
        return await loaded(ollama) == []

    await eventually(is_gone)
    assert spawned == ["a"]


async def test_the_least_recently_used_model_makes_room(
    ollama: AsyncClient, room: dict[str, int], spawned: list[str]
) -> None:
    room["models"] = 2
    for name in ("a", "b", "a", "c"):
        assert await ask(ollama, name) == ANSWER
    assert sorted(await loaded(ollama)) == ["a", "c"]
    assert await ask(ollama, "b") == ANSWER
    assert sorted(await loaded(ollama)) == ["b", "c"]
    assert spawned == ["a", "b", "c", "b"]


async def test_a_model_in_use_stays_and_who_needs_its_memory_waits(
    ollama: AsyncClient, engine: FakeEngine, room: dict[str, int], eventually: Eventually
) -> None:
    room["models"] = 1
    await ollama.generate(model="a")
    engine.steps.clear()
    before = engine.num_steps
    answering = asyncio.create_task(ask(ollama, "a"))

    async def is_answering() -> bool:
        return engine.num_steps > before

    await eventually(is_answering)
    waiting = asyncio.create_task(ask(ollama, "b"))
    assert await loaded(ollama) == ["a"]
    engine.steps.set()
    assert {await answering, await waiting} == {ANSWER}
    assert await loaded(ollama) == ["b"]


async def test_an_engine_that_has_died_is_started_anew(
    ollama: AsyncClient, engine: FakeEngine, spawned: list[str], eventually: Eventually
) -> None:
    await ask(ollama, "a")
    engine.processes[0].kill()

    async def is_gone() -> bool:
        return await loaded(ollama) == []

    await eventually(is_gone)
    assert await ask(ollama, "a") == ANSWER
    assert spawned == ["a", "a"]


async def test_a_model_that_cannot_be_loaded_is_told_to_all_who_wait_and_tried_again(
    ollama: AsyncClient, engine: FakeEngine
) -> None:
    engine.refusal = "it has no weights"
    results = await asyncio.gather(*(ask(ollama, "a") for _ in range(2)), return_exceptions=True)
    for result in results:
        assert isinstance(result, ResponseError)
        assert (result.status_code, result.error) == (500, "a cannot be loaded: it has no weights")
    engine.refusal = None
    assert await ask(ollama, "a") == ANSWER


@pytest.mark.parametrize("name", ["llama3", "{store}/a.gguf", "../a", "hf://org/repo:a.gguf", "partial/x"])
async def test_what_is_not_in_the_store_is_not_found_and_paths_are_no_names(
    ollama: AsyncClient, store: Path, name: str
) -> None:
    with pytest.raises(ResponseError) as told:
        await ask(ollama, name.format(store=store))
    assert told.value.status_code == 404


async def test_models_are_made_copied_and_deleted(ollama: AsyncClient, spawned: list[str]) -> None:
    made = await ollama.create("mario", from_="a", system="You are Mario.", parameters={"stop": [" is"]})
    assert made.status == "success"
    await ollama.copy("mario", "team/luigi:v1")
    assert [model.model for model in (await ollama.list()).models] == ["a", "b", "c", "mario", "team/luigi:v1"]
    assert (await ollama.show("team/luigi:v1")).modelfile == (await ollama.show("mario")).modelfile
    assert await ask(ollama, "team/luigi:v1") == "The answer"
    assert await ask(ollama, "mario:latest") == "The answer"
    await ollama.delete("mario")
    with pytest.raises(ResponseError, match="not found"):
        await ollama.delete("mario")
    assert await ask(ollama, "team/luigi:v1") == "The answer"
    assert spawned == ["team/luigi:v1", "mario"]


async def test_a_model_is_made_of_an_uploaded_file(
    ollama: AsyncClient, store: Path, fake_model_path: Path, http: httpx.AsyncClient, spawned: list[str]
) -> None:
    digest = await ollama.create_blob(fake_model_path)
    assert digest == f"sha256:{digest_of(fake_model_path)}"
    assert (await http.head(f"/api/blobs/{digest}")).status_code == 200
    for system in ("First.", "Second."):  # the second one replaces the first, also where that is loaded
        await ollama.create("mine", files={"any.gguf": digest}, system=system)
        assert await ask(ollama, "mine") == ANSWER
    assert (
        await ollama.show("mine")
    ).modelfile == "FROM ollama://registry.ollama.ai/library/mine:latest\nSYSTEM Second.\n"
    assert spawned == ["mine", "mine"]
    assert len(list((store / "blobs").iterdir())) == 1
    await ollama.delete("mine")
    assert list((store / "blobs").iterdir()) == []
    assert list((store / "partial").iterdir()) == []


def write_adapter(folder: Path, hidden_size: int) -> list[Path]:
    """The files of an adapter of a model of one layer with so many inputs."""
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    a, b = np.zeros((4, hidden_size), np.float32), np.zeros((8, 4), np.float32)
    save_file({f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}, folder / "adapter_model.safetensors")
    return list(folder.iterdir())


async def test_a_model_is_made_with_an_uploaded_adapter(ollama: AsyncClient, store: Path, tmp_path: Path) -> None:
    files = write_adapter(tmp_path / "files", hidden_size=8)
    adapters = {path.name: await ollama.create_blob(path) for path in files}
    await ollama.create("poet", from_="a", adapters=adapters)
    text = (await ollama.show("poet")).modelfile or ""
    (placed,) = (store / "adapters").iterdir()
    assert text == f"FROM {store / 'a.gguf'}\nADAPTER {placed}\n"
    assert await ask(ollama, "poet") == f"I am {placed.name}, number 1."
    await ollama.create("kind-poet", from_="poet", system="Be kind.")
    await ollama.delete("poet")
    assert await ask(ollama, "kind-poet") == f"I am {placed.name}, number 1."
    await ollama.delete("kind-poet")
    assert not (store / "adapters").exists()
    assert list((store / "blobs").iterdir()) == []


async def test_an_uploaded_adapter_of_another_model_is_refused(
    ollama: AsyncClient, store: Path, tmp_path: Path
) -> None:
    files = write_adapter(tmp_path / "files", hidden_size=16)
    adapters = {path.name: await ollama.create_blob(path) for path in files}
    with pytest.raises(ResponseError, match=r"q_proj.lora_A.weight has shape \[4, 16\]"):
        await ollama.create("poet", from_="a", adapters=adapters)
    assert list((store / "adapters").glob("*")) == []


async def test_an_upload_that_is_something_else_is_refused(http: httpx.AsyncClient, store: Path) -> None:
    digest = f"sha256:{'0' * 64}"
    assert (await http.head(f"/api/blobs/{digest}")).status_code == 404
    refused = await http.post(f"/api/blobs/{digest}", content=b"x" * 10_000_000)  # more than other bodies may have
    assert refused.status_code == 400
    assert "the body's digest is sha256:" in refused.json()["error"]
    assert list((store / "partial").iterdir()) == []
    assert (await http.post("/api/blobs/..%2fx", content=b"x")).status_code in {400, 404}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"model": "m"}, "either from or files"),
        ({"model": "m", "from": "none"}, "'none' not found"),
        ({"model": "../m", "from": "a"}, "cannot name a model"),
        ({"model": "m", "from": "a", "quantize": "q4_0"}, "quantise the GGUF file before"),
        ({"model": "m", "from": "a", "adapters": {"x": "y"}}, "is not of the form"),
        ({"model": "m", "from": "a", "adapters": {"x": f"sha256:{'0' * 64}"}}, "there is no blob"),
        ({"model": "m", "files": {"x": "y"}, "adapters": {"x": "y"}}, "adapters are for a model that is there"),
        ({"model": "m", "from": "a", "template": "{{ .X | y }}"}, "TEMPLATE"),
        ({"model": "m", "from": "a", "parameters": {"mirostat": 1}}, "mirostat"),
        ({"model": "m", "files": {"m.gguf": f"sha256:{'0' * 64}"}}, "there is no blob"),
        ({"model": "m", "files": {"config.json": "x", "..": f"sha256:{'0' * 64}"}}, "is not of the form"),
        ({"model": "m", "files": {"a/..": f"sha256:{'0' * 64}"}}, "'..' cannot be the name of a model's file"),
        ({"model": "m", "files": {"Modelfile": f"sha256:{'0' * 64}"}}, "'Modelfile' cannot be the name"),
        ({"model": "m", "files": {"m.gguf": "x"}}, "is not of the form"),
    ],
)
async def test_a_model_that_cannot_be_made_is_told(http: httpx.AsyncClient, body: dict[str, Any], message: str) -> None:
    answer = await http.post("/api/create", json=body)
    assert answer.status_code in {400, 404}
    assert message in answer.json()["error"]


async def test_a_model_goes_to_a_registry_and_comes_back(ollama: AsyncClient, registry: str, store: Path) -> None:
    name = f"{registry}/team/mario:v1"
    await ollama.create(name, from_="a", system="You are Mario.")
    told = [line.status async for line in await ollama.push(name, stream=True)]
    assert told[-1] == "success"
    await ollama.delete(name)
    with pytest.raises(ResponseError, match="not found, try pulling it first"):
        await ask(ollama, name)
    lines = [line async for line in await ollama.pull(name, stream=True)]
    assert lines[-1].status == "success"
    assert [line.completed for line in lines if line.completed] == [(store / "a.gguf").stat().st_size]
    assert (await ollama.show(name)).modelfile == f"FROM ollama://{name}\nSYSTEM You are Mario.\n"
    assert await ask(ollama, name) == ANSWER
    with pytest.raises(ResponseError, match="is not there"):
        await ollama.pull(f"{registry}/team/none")
    lines = [line async for line in await ollama.pull(name, stream=True)]  # it is there already
    assert lines[-1].status == "success"


async def test_texts_are_embedded_by_the_model_that_is_named(ollama: AsyncClient, spawned: list[str]) -> None:
    several = await ollama.embed(model="a", input=["abc", "d"])
    one = await ollama.embeddings(model="b", prompt="abc")
    assert several.embeddings[0] == one.embedding
    assert len(several.embeddings) == 2
    assert several.prompt_eval_count == len("abcd")
    assert spawned == ["a", "b"]
    with pytest.raises(ResponseError, match="an overlong text is an error"):
        await ollama.embed(model="a", input="abc", truncate=True)
    with pytest.raises(ResponseError, match=r"input has 3000 tokens|context"):
        await ollama.embed(model="a", input="abc" * 1000)
