"""Requests that are poison to model or sampler, in one batch with others: they end alone; the others do not notice.

The poison is real: a token whose embedding is NaN goes through the real kernels of a real engine process, and what the
server refuses (token ids that the model does not have, rules that are none) is sent straight to that process.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import pytest

from octavo_engine.client import EngineClient
from octavo_engine.config import EngineConfig
from octavo_engine.plan import SamplingParams
from octavo_engine.transport import spawn

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

pytestmark = pytest.mark.timeout(400)

NUM_GOOD = 31
BLOCKS = 128 * 8 * 512  # bytes: 128 blocks of 8 tokens, so that each wave of requests gets the blocks of the one before

Prompt = tuple[int, ...]
Answer = tuple[tuple[int, ...], str | None, str | None]  # tokens, finish reason, error

GOOD = [tuple(10 + (7 * request + token) % 200 for token in range(3 + request % 9)) for request in range(NUM_GOOD)]
WRONG_RULES = {
    "a bias beyond int64": SamplingParams(max_tokens=16, temperature=0, logit_bias=((2**63, 1.0),)),
    "a nucleus of nothing": SamplingParams(max_tokens=16, top_k=8, top_p=0.0),
    "a stop token beyond int64": SamplingParams(max_tokens=16, min_tokens=1, stop_token_ids=(2**63,)),
}
UNKNOWN: dict[str, Prompt] = {"beyond the vocabulary": (20, 100_000), "negative": (-1, 20), "beyond int64": (2**63,)}


@contextlib.asynccontextmanager
async def engine(model: Path) -> AsyncIterator[EngineClient]:
    """An engine process."""
    config = EngineConfig(
        model=model, served_model_names=("tiny",), dtype="float32", block_size=8, kv_cache_memory_bytes=BLOCKS
    )
    client = await EngineClient.start(*spawn(config))
    try:
        await client.ready()
        yield client
    finally:
        await client.close()


async def answer(client: EngineClient, request_id: str, prompt: Prompt, sampling: SamplingParams) -> Answer:
    """All that a request is told."""
    tokens: tuple[int, ...] = ()
    async for update in client.generate(request_id, prompt, sampling):
        tokens += update.token_ids
    return tokens, update.finish_reason, update.error


async def answers(client: EngineClient, wave: str, prompts: Sequence[Prompt]) -> list[Answer]:
    """What requests get that run together; every other one is sampled with a seed of its own."""
    return await asyncio.gather(
        *(
            answer(
                client,
                f"{wave}-{number}",
                prompt,
                SamplingParams(max_tokens=16, temperature=float(number % 2), top_k=8, seed=number, ignore_eos=True),
            )
            for number, prompt in enumerate(prompts)
        )
    )


async def test_poison_ends_alone_and_the_others_get_the_tokens_that_they_would_have_had(
    tiny_model: Path, nan_token: int
) -> None:
    not_numbers = {"NaN at the end": (20, 21, nan_token), "NaN at the start": (nan_token, *range(20, 60))}
    async with engine(tiny_model) as client:
        expected = await answers(client, "good", GOOD)
        assert {(len(tokens), reason, error) for tokens, reason, error in expected} == {(16, "length", None)}
        assert len({tokens for tokens, _, _ in expected}) > NUM_GOOD // 2, "the model says different things"
        for name, poison in (not_numbers | UNKNOWN).items():
            *others, poisoned = await answers(client, name, [*GOOD, poison])
            assert others == expected, name
            tokens, reason, error = poisoned
            assert (tokens, reason) == ((), "error"), name
            assert ("NaN" if name in not_numbers else "token id") in str(error), name
        for name, sampling in WRONG_RULES.items():
            poisoned, others = await asyncio.gather(
                answer(client, name, (20, 21), sampling), answers(client, f"beside {name}", GOOD)
            )
            assert others == expected, name
            tokens, reason, error = poisoned
            assert (tokens, reason) == ((), "error"), name
            assert "by the request's rules" in str(error), name
        # Where poison was, others are now.
        assert await answers(client, "again", GOOD) == expected
        assert client.problem is None
