"""LoRA adapters as models of their own: from the start, loaded and unloaded at run time, also while requests run."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from octavo_engine.config import EngineConfig, LoraModule
from octavo_engine.errors import ConfigError
from octavo_engine.modelfile import parse_modelfile
from octavo_engine.server.service import Service
from octavo_engine.store.local import Location
from octavo_engine.store.remote import Hub

if TYPE_CHECKING:
    import httpx
    from ollama import AsyncClient
    from tests.engine.serving.conftest import Eventually, FakeEngine

    from octavo_engine.config import ServerConfig

HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def options() -> dict[str, Any]:
    """Of the engine: one adapter, and room for more."""
    return {"enable_lora": True, "lora_modules": (LoraModule("poet", Path("adapters/poet")),), "max_loras": 3}


@pytest.fixture
def api_key() -> tuple[str, ...]:
    """The keys of the server."""
    return ()


@pytest.fixture
def config(config: ServerConfig, options: dict[str, Any], api_key: tuple[str, ...]) -> ServerConfig:
    return replace(config, engine=replace(config.engine, **options), api_key=api_key)


@pytest.fixture
def service(engine: FakeEngine, config: ServerConfig) -> Service:
    return Service(config, Location(name="fake", path=config.engine.model), Hub(), spawn=engine.spawn)


async def say(http: httpx.AsyncClient, model: str) -> str:
    answer = await http.post("/v1/chat/completions", json={"model": model, "messages": HI})
    body = answer.json()
    text: str = body["choices"][0]["message"]["content"] if answer.status_code == 200 else body["error"]["message"]
    return text


async def load(http: httpx.AsyncClient, name: str, path: str) -> tuple[int, str]:
    answer = await http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path})
    return answer.status_code, answer.text


async def unload(http: httpx.AsyncClient, name: str) -> tuple[int, str]:
    answer = await http.post("/v1/unload_lora_adapter", json={"lora_name": name})
    return answer.status_code, answer.text


async def test_an_adapter_is_a_model_whose_parent_is_the_model(ready: httpx.AsyncClient, ollama: AsyncClient) -> None:
    models = (await ready.get("/v1/models")).json()["data"]
    assert [(model["id"], model.get("parent")) for model in models] == [
        ("fake", None), ("org/fake", None), ("poet", "fake")
    ]  # fmt: skip
    assert await say(ready, "poet") == "I am poet, number 1."
    assert await say(ready, "fake") == "The answer is 42."
    assert (await ollama.chat("poet:latest", HI)).message.content == "I am poet, number 1."
    shown = [parse_modelfile((await ollama.show(name)).modelfile or "") for name in ("poet", "fake")]
    assert shown[0] == replace(shown[1], adapter="adapters/poet")


async def test_adapters_are_loaded_and_unloaded_at_run_time(
    ready: httpx.AsyncClient, engine: FakeEngine, eventually: Eventually
) -> None:
    assert await load(ready, "judge", "adapters/judge") == (200, "Success: LoRA adapter 'judge' added successfully.")
    assert await say(ready, "judge") == "I am judge, number 2."
    assert await unload(ready, "judge") == (200, "Success: LoRA adapter 'judge' removed successfully.")
    assert "model 'judge' not found; served here: fake, org/fake, poet" in await say(ready, "judge")

    async def is_forgotten() -> bool:
        return list(engine.adapters) == [1]

    await eventually(is_forgotten)
    await load(ready, "judge", "adapters/another")  # under a number of its own, which names its KV
    assert await say(ready, "judge") == "I am another, number 3."


async def test_what_cannot_be_loaded_is_told(ready: httpx.AsyncClient) -> None:
    for name, path, status, message in (
        ("poet", "adapters/judge", 400, "'poet' is served already"),
        ("fake", "adapters/judge", 400, "'fake' is served already"),
        ("judge", "adapters/wrong", 400, "wrong: tensor x has shape [1, 2]"),
        ("judge", "adapters/none", 404, "there is no adapter at none"),
        ("", "adapters/judge", 400, "lora_name"),
        ("judge", "a\0b", 400, "lora_path"),
    ):
        code, text = await load(ready, name, path)
        assert (code, message in text) == (status, True), text
    assert (await unload(ready, "judge"))[0] == 404
    assert (await unload(ready, "fake"))[0] == 404
    answer = await ready.post("/v1/load_lora_adapter", json={"lora_name": "a", "lora_path": "b", "load_inplace": True})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "load_inplace")
    assert await say(ready, "poet") == "I am poet, number 1."


async def test_requests_that_run_when_their_adapter_is_unloaded_are_answered_to_their_end(
    ready: httpx.AsyncClient, engine: FakeEngine, eventually: Eventually
) -> None:
    engine.steps.clear()
    asking = asyncio.create_task(say(ready, "poet"))

    async def has_begun() -> bool:
        return engine.num_steps > 0

    await eventually(has_begun)
    assert (await unload(ready, "poet"))[0] == 200
    assert "not found" in await say(ready, "poet")
    assert list(engine.adapters) == [1]
    engine.steps.set()
    assert await asking == "I am poet, number 1."

    async def is_forgotten() -> bool:
        return not engine.adapters

    await eventually(is_forgotten)


async def test_metrics_tell_which_adapters_run(
    ready: httpx.AsyncClient, engine: FakeEngine, eventually: Eventually
) -> None:
    async def info() -> str:
        lines = (await ready.get("/metrics")).text.splitlines()
        (line,) = (line for line in lines if line.startswith("vllm:lora_requests_info{"))
        return line.partition("{")[2].partition("}")[0]

    assert await info() == 'max_lora="3",running_lora_adapters="",waiting_lora_adapters=""'
    engine.steps.clear()
    asking = asyncio.create_task(say(ready, "poet"))

    async def is_told() -> bool:
        return 'waiting_lora_adapters="poet"' in await info()

    await eventually(is_told)
    engine.steps.set()
    await asking


async def test_an_embedding_is_the_adapters_too(ready: httpx.AsyncClient, engine: FakeEngine) -> None:
    answer = await ready.post("/v1/embeddings", json={"model": "poet", "input": "Hi"})
    assert answer.status_code == 200


@pytest.mark.parametrize("api_key", [("secret",)])
async def test_a_key_guards_them(unstarted: httpx.AsyncClient) -> None:
    assert (await load(unstarted, "judge", "adapters/judge"))[0] == 401
    assert (await unload(unstarted, "poet"))[0] == 401


async def test_a_server_that_is_loading_says_so(unstarted: httpx.AsyncClient) -> None:
    assert (await load(unstarted, "judge", "adapters/judge"))[0] == 503


@pytest.mark.parametrize("options", [{}])
async def test_a_server_that_was_not_started_for_adapters_takes_none(ready: httpx.AsyncClient) -> None:
    status, text = await load(ready, "judge", "adapters/judge")
    assert (status, "start it for one model, with --enable-lora" in text) == (400, True)
    assert "lora_requests_info" not in (await ready.get("/metrics")).text


@pytest.mark.parametrize("options", [{"adapter": Path("adapters/own")}])
async def test_the_adapter_of_a_modelfile_is_the_models_own(ready: httpx.AsyncClient) -> None:
    assert await say(ready, "fake") == "I am own, number 1."
    assert len((await ready.get("/v1/models")).json()["data"]) == 2


@pytest.mark.parametrize(
    ("contradiction", "message"),
    [
        ({"lora_modules": (LoraModule("a", Path("a")),)}, "--lora-modules has no effect without --enable-lora"),
        ({"max_loras": 3}, "--max-loras has no effect without --enable-lora"),
        ({"max_lora_rank": 8}, "--max-lora-rank has no effect without --enable-lora"),
        ({"enable_lora": True, "tensor_parallel_size": 2}, "--enable-lora: LoRA adapters are not split over devices"),
        ({"adapter": Path("a"), "tensor_parallel_size": 2}, "the ADAPTER of this model's Modelfile: LoRA adapters"),
        (
            {"enable_lora": True, "max_loras": 1, "lora_modules": (LoraModule("a", Path()), LoraModule("b", Path()))},
            "--max-loras 1 is less than the 2 of --lora-modules",
        ),
        ({"enable_lora": True, "lora_modules": (LoraModule("m", Path()),)}, "m would be the name of two"),
    ],
)
def test_options_that_contradict_are_refused(contradiction: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig(model=Path("m.gguf"), served_model_names=("m",), **contradiction)
