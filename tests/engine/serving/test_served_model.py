"""The whole engine as users start it: `octavo serve` with the real model, driven by the unchanged openai client."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pytest
from pydantic import BaseModel, Field

if TYPE_CHECKING:
    from collections.abc import Iterator

    from openai.types.chat import ChatCompletionMessageParam
    from tests.engine.conftest import Serve, ServedModel

pytestmark = [pytest.mark.model, pytest.mark.timeout(400)]

PARIS: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Where is the Eiffel Tower?"}]


@pytest.fixture(scope="module")
def served(serve: Serve, smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedModel]:
    """One server for every test, which leaves it as it was."""
    log = tmp_path_factory.mktemp("served") / "log"
    with serve(smollm2_path, log, "--served-model-name", "smollm2", "smollm2-135m") as served:
        yield served


def test_the_api_process_holds_no_torch_and_the_engine_is_another_process(served: ServedModel) -> None:
    api, engine = (Path(f"/proc/{pid}/maps").read_text() for pid in (served.process.pid, served.engine_pid))
    assert "libtorch" not in api
    assert "libtorch" in engine


def test_streamed_and_whole_answers_are_the_same_text(served: ServedModel) -> None:
    with served.sync_client() as client:
        whole = client.chat.completions.create(model="smollm2", messages=PARIS, temperature=0, max_tokens=40)
        stream = client.chat.completions.create(
            model="smollm2-135m",
            messages=PARIS,
            temperature=0,
            max_tokens=40,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
    assert "Paris" in (whole.choices[0].message.content or "")
    assert whole.choices[0].finish_reason == "stop"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    usage = chunks[-1].usage
    assert usage is not None
    assert whole.usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (whole.usage.prompt_tokens, whole.usage.completion_tokens)


def test_a_seed_gives_the_same_text_again(served: ServedModel) -> None:
    with served.sync_client() as client:
        texts = {
            client.completions.create(
                model="smollm2", prompt="Once upon a time", seed=seed, temperature=1, max_tokens=24
            )
            .choices[0]
            .text
            for seed in (1, 1, 2)
        }
    assert len(texts) == 2


async def test_eight_at_a_time_are_all_answered_in_one_running_batch(served: ServedModel) -> None:
    running: list[float] = []

    async def watch() -> None:
        while True:
            running.append(await asyncio.to_thread(served.metric, "vllm:num_requests_running"))
            await asyncio.sleep(0.05)

    async with served.async_client() as client:
        watching = asyncio.create_task(watch())
        requests = [
            client.completions.create(model="smollm2", prompt=f"{number} is a", max_tokens=48, temperature=0)
            for number in range(8)
        ]
        completions = await asyncio.gather(*requests)
        watching.cancel()
    assert all(completion.usage is not None and completion.usage.completion_tokens > 0 for completion in completions)
    assert max(running) > 1


def test_answers_keep_to_a_schema_greedy_and_drawn_streamed_and_whole(served: ServedModel) -> None:
    class City(BaseModel):
        name: str = Field(max_length=20)
        country: Literal["France", "Spain"]
        population: int = Field(ge=0, le=99_999_999)

    question: list[ChatCompletionMessageParam] = [
        {"role": "user", "content": "Tell me of Paris as JSON with name, country and population."}
    ]
    with served.sync_client() as client:
        for temperature in (0.0, 1.0):
            parsed = client.chat.completions.parse(
                model="smollm2",
                messages=question,
                response_format=City,
                temperature=temperature,
                max_tokens=120,
                seed=1,
            )
            assert parsed.choices[0].finish_reason == "stop"
            assert parsed.choices[0].message.parsed is not None
        stream = client.chat.completions.create(
            model="smollm2",
            messages=question,
            temperature=0,
            max_tokens=20,
            stream=True,
            extra_body={"structured_outputs": {"choice": ["It is in France.", "It is in Spain."]}},
        )
        chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text in {"It is in France.", "It is in Spain."}
    assert chunks[-1].choices[0].finish_reason == "stop"
