"""Every sampling field through the unchanged openai client: what reaches the engine, and what comes back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from openai import APIStatusError, AsyncOpenAI

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    import httpx
    from tests.engine.serving.conftest import Eventually, FakeEngine

    from octavo_engine.config import ServerConfig

FIRST_BYTE = 3  # the fake model's token of byte 0
ANSWERS: dict[int, str | bytes] = {0: "One.", 1: "Two, and more", 2: "Thr\u00e9e \u65e5!"}


@pytest.fixture
async def openai(ready: httpx.AsyncClient) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{ready.base_url}/v1", api_key="none", max_retries=0) as client:
        yield client


async def chat(openai: AsyncOpenAI, **fields: Any) -> Any:
    return await openai.chat.completions.create(model="fake", messages=[{"role": "user", "content": "Hi"}], **fields)


async def complete(openai: AsyncOpenAI, **fields: Any) -> Any:
    return await openai.completions.create(model="fake", prompt="ab", **{"max_tokens": 50} | fields)


def joined(chunks: Sequence[Any], index: int) -> tuple[str, list[Any], list[str]]:
    """Text, entries of logprobs and finish reasons of one choice of a streamed chat."""
    choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
    return (
        "".join(choice.delta.content or "" for choice in choices),
        [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content],
        [choice.finish_reason for choice in choices if choice.finish_reason],
    )


async def test_every_field_reaches_the_engine(openai: AsyncOpenAI, engine: FakeEngine) -> None:
    fields = {
        "temperature": 0.7,
        "top_p": 0.9,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "logit_bias": {"65": -100, "66": 1.5},
        "seed": 11,
    }
    extra = {
        "top_k": 40,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "min_tokens": 2,
        "stop_token_ids": [7],
        "ignore_eos": True,
    }
    await chat(openai, **fields, logprobs=True, top_logprobs=5, max_completion_tokens=9, extra_body=extra)
    seen = engine.sampling
    assert seen is not None
    expected = fields | extra | {"max_tokens": 9, "num_logprobs": 5, "stop_token_ids": (7,)}
    expected["logit_bias"] = ((65, -100.0), (66, 1.5))
    assert {name: getattr(seen, name) for name in expected} == expected

    await complete(openai, **fields, logprobs=2, max_tokens=9, extra_body=extra)
    assert engine.sampling is not None
    assert {name: getattr(engine.sampling, name) for name in expected} == expected | {"num_logprobs": 2}


async def test_several_choices_come_with_their_index_and_usage_counts_them_all(
    openai: AsyncOpenAI, engine: FakeEngine
) -> None:
    engine.answers = ANSWERS
    whole = await chat(openai, n=3)
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert [choice.message.content for choice in whole.choices] == list(ANSWERS.values())
    assert {choice.finish_reason for choice in whole.choices} == {"stop"}
    num_tokens = sum(len(str(answer).encode()) + 1 for answer in ANSWERS.values())  # and EOS
    assert whole.usage.completion_tokens == num_tokens
    assert whole.usage.prompt_tokens_details.cached_tokens == 0

    stream = await chat(openai, n=3, stream=True, stream_options={"include_usage": True})
    chunks = [chunk async for chunk in stream]
    assert [joined(chunks, index)[0] for index in range(3)] == list(ANSWERS.values())
    assert [joined(chunks, index)[2] for index in range(3)] == [["stop"]] * 3
    usage = chunks[-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (whole.usage.prompt_tokens, num_tokens)
    assert 0 < usage.prompt_tokens_details.cached_tokens < usage.prompt_tokens, "the prompt was there before"


async def test_several_completions_come_with_their_index(openai: AsyncOpenAI, engine: FakeEngine) -> None:
    engine.answers = ANSWERS
    whole = await complete(openai, n=3)
    assert [(choice.index, choice.text) for choice in whole.choices] == list(ANSWERS.items())
    texts = {0: "", 1: "", 2: ""}
    async for chunk in await complete(openai, n=3, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == ANSWERS


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_ends_one_choice_and_leaves_the_others(
    openai: AsyncOpenAI, engine: FakeEngine, ready: httpx.AsyncClient, eventually: Eventually, *, stream: bool
) -> None:
    engine.answers = ANSWERS
    response = await chat(openai, n=3, stop=[", a"], stream=stream)
    if stream:
        chunks = [chunk async for chunk in response]
        texts = [joined(chunks, index)[0] for index in range(3)]
    else:
        texts = [choice.message.content for choice in response.choices]
        # The choice ended with the token that completed its stop string.
        num_tokens = len("Two, a") + sum(len(str(ANSWERS[index]).encode()) + 1 for index in (0, 2))
        assert response.usage.completion_tokens == num_tokens
    assert texts == [ANSWERS[0], "Two", ANSWERS[2]]

    async def nothing_runs() -> bool:
        metrics = (await ready.get("/metrics")).text
        return 'vllm:num_requests_running{engine="0",model_name="fake"} 0.0' in metrics

    await eventually(nothing_runs)
    assert 'finished_reason="stop",model_name="fake"} 1.0' in (await ready.get("/metrics")).text


async def test_more_choices_than_may_run_at_once_are_refused_by_name(openai: AsyncOpenAI, config: ServerConfig) -> None:
    most = config.engine.max_num_seqs
    assert len((await complete(openai, n=most, max_tokens=1)).choices) == most
    with pytest.raises(APIStatusError, match=f"lets {most} answers") as error:
        await complete(openai, n=most + 1)
    assert (error.value.status_code, error.value.param) == (400, "n")


async def test_a_stop_string_is_part_of_the_text_if_asked_for(openai: AsyncOpenAI) -> None:
    kept = await chat(openai, stop=[" is"], extra_body={"include_stop_str_in_output": True})
    assert kept.choices[0].message.content == "The answer is"
    by_token = {"include_stop_str_in_output": True, "stop_token_ids": [FIRST_BYTE + ord("4")]}
    assert (await chat(openai, extra_body=by_token)).choices[0].message.content == "The answer is 4"


async def test_a_stop_string_does_not_count_before_the_minimum_of_tokens(openai: AsyncOpenAI) -> None:
    early = await chat(openai, stop=["e"], extra_body={"min_tokens": 3})
    assert early.choices[0].message.content == "The answ"


async def test_a_minimum_above_the_maximum_is_refused_by_name(openai: AsyncOpenAI) -> None:
    with pytest.raises(APIStatusError) as error:
        await chat(openai, max_tokens=3, extra_body={"min_tokens": 4})
    assert (error.value.status_code, error.value.param) == (400, "min_tokens")


@pytest.mark.parametrize(("key", "param"), [("300", "logit_bias"), ("-1", "logit_bias"), ("x" * 99, "logit_bias")])
async def test_a_bias_for_what_is_no_token_is_refused_by_name(openai: AsyncOpenAI, key: str, param: str) -> None:
    with pytest.raises(APIStatusError, match=key[:20]) as error:
        await chat(openai, logit_bias={key: 1})
    assert (error.value.status_code, (error.value.param or "").split(".")[0]) == (400, param)
    assert len(error.value.response.content) < 500


async def test_a_chat_tells_the_logprob_of_each_token_with_its_bytes(openai: AsyncOpenAI, engine: FakeEngine) -> None:
    engine.answer = "a\u00e9"
    logprobs = (await chat(openai, logprobs=True, top_logprobs=2)).choices[0].logprobs
    assert [(entry.token, entry.bytes, entry.logprob) for entry in logprobs.content] == [
        ("a", [0x61], -0.5),
        ("\ufffd", [0xC3], -0.5),  # half of a character
        ("\ufffd", [0xA9], -0.5),
    ]
    assert [(top.token, top.bytes, top.logprob) for top in logprobs.content[0].top_logprobs] == [
        ("a", [0x61], -0.5),
        ("b", [0x62], -1),
    ]
    assert (await chat(openai, logprobs=True)).choices[0].logprobs.content[0].top_logprobs == []
    assert (await chat(openai)).choices[0].logprobs is None


async def test_a_completion_tells_logprobs_in_its_own_format(openai: AsyncOpenAI, engine: FakeEngine) -> None:
    engine.answer = "a\u00e9b"
    logprobs = (await complete(openai, logprobs=2)).choices[0].logprobs
    assert logprobs.tokens == ["a", "bytes:\\xc3", "bytes:\\xa9", "b"]
    assert logprobs.token_logprobs == [-0.5] * 4
    assert logprobs.top_logprobs[0] == {"a": -0.5, "b": -1.0}
    assert logprobs.text_offset == [0, 1, 1, 2]
    assert (await complete(openai, logprobs=0)).choices[0].logprobs.top_logprobs[0] == {"a": -0.5}


@pytest.mark.parametrize("stop", [None, ["e\u65e5x", "swer"]])
async def test_streamed_logprobs_are_the_whole_ones(
    openai: AsyncOpenAI, engine: FakeEngine, stop: list[str] | None
) -> None:
    engine.answer = "The \u00e9\u65e5 answer \u65e5".encode() + b"\xe6\x97"
    fields = {"logprobs": True, "top_logprobs": 3, "stop": stop}
    whole = (await chat(openai, **fields)).choices[0]
    chunks = [chunk async for chunk in await chat(openai, **fields, stream=True)]
    text, entries, reasons = joined(chunks, 0)
    assert (text, entries, reasons) == (whole.message.content, whole.logprobs.content, [whole.finish_reason])
    data = b"".join(bytes(entry.bytes) for entry in entries)
    assert data.decode(errors="replace") == text, "the tokens are those of the text"


async def test_minus_infinity_is_written_as_a_number(openai: AsyncOpenAI) -> None:
    completion = await complete(openai, logprobs=20, max_tokens=1)
    assert min(completion.choices[0].logprobs.top_logprobs[0].values()) == -9999
    chat_entry = (await chat(openai, logprobs=True, top_logprobs=20, max_tokens=1)).choices[0].logprobs.content[0]
    assert chat_entry.top_logprobs[-1].logprob == -9999
