"""`python -m octavo_bench.structured`: what answers that keep to a JSON schema cost, through a real server.

First tokens, one user: requests without a schema, with one that the server has never seen, and with one that it knows,
in turns; what a schema adds is the difference of the medians. The first schema of all comes before and is told apart,
as it starts the process that tries schemas out. Speed, eight users: as many tokens of prompts and answers with a schema
and without, in turns. The schema is one whose answers are longer than any request takes, so that none ends early.
"""

from __future__ import annotations

import asyncio
import random
import statistics
from typing import TYPE_CHECKING, Any, Final

from octavo_bench import client, peers
from octavo_bench.client import Job, Seen, Work, ask, random_prompt
from octavo_bench.engines import MODEL_NAME, octavo, serving

if TYPE_CHECKING:
    from collections.abc import Mapping

# ruff: noqa: T201 - printing is what this is for

_NUM_USERS: Final = 8
_NUM_REQUESTS: Final = 64
_TURNS: Final = 3
_NUM_FIRST_TOKENS: Final = 20
_PROMPT_TOKENS: Final = 112
_ANSWER_TOKENS: Final = 64
_rng: Final = random.Random("structured")  # noqa: S311 - prompts, not secrets


def main() -> None:
    """Measure and print."""
    asyncio.run(_measure())


async def _measure() -> None:
    with serving(octavo(peers.weights())) as server:
        await _first_token(server.url, {})
        first_of_all = await _first_token(server.url, _keeping_to(_person("first")))
        known = _keeping_to(_person("known"))
        await _first_token(server.url, known)
        plain, new, again = [], [], []
        for number in range(_NUM_FIRST_TOKENS):
            plain.append(await _first_token(server.url, {}))
            new.append(await _first_token(server.url, _keeping_to(_person(f"field_{number}"))))
            again.append(await _first_token(server.url, known))
        _print_first_tokens(first_of_all, plain, new, again)
        ratios = [await _turn(server.url) for _ in range(_TURNS)]
    print(f"{_NUM_USERS} users: median {statistics.median(ratios):.3f} of the speed without a schema; bound 0.80")


def _print_first_tokens(first_of_all: float, plain: list[float], new: list[float], again: list[float]) -> None:
    base = statistics.median(plain)
    print(f"first token without a schema: median {1000 * base:.0f} ms")
    for name, seconds in (("a new schema", new), ("a known schema", again)):
        added = [1000 * (one - base) for one in seconds]
        print(f"{name} adds {statistics.median(added):.0f} ms (at most {max(added):.0f}); bound 100 ms")
    print(f"the first schema of all added {1000 * (first_of_all - base):.0f} ms")


async def _first_token(url: str, fields: Mapping[str, Any]) -> float:
    seen = Seen()
    await ask(url, MODEL_NAME, Job(random_prompt(_rng, _PROMPT_TOKENS), 4, fields), seen)
    return seen.first_token_seconds[0]


async def _turn(url: str) -> float:
    """Tokens per second with a schema over those without."""
    schema = {"type": "array", "items": _person("job"), "minItems": 100}
    free, kept = [await _speed(url, fields) for fields in ({}, _keeping_to(schema))]
    print(f"{_NUM_USERS} users: {kept:.1f} tokens/s with a schema, {free:.1f} without")
    return kept / free


async def _speed(url: str, fields: Mapping[str, Any]) -> float:
    jobs = [Job(random_prompt(_rng, _PROMPT_TOKENS), _ANSWER_TOKENS, fields) for _ in range(_NUM_REQUESTS)]
    seen = await client.run(url, MODEL_NAME, Work("structured", _NUM_USERS, jobs))
    return seen.num_output_tokens / seen.seconds


def _keeping_to(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a body; the schema says when an answer ends, and so nothing else may."""
    return {
        "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}},
        "ignore_eos": False,
    }


def _person(further: str) -> dict[str, Any]:
    """A usual schema: nested, with an enumeration, numbers, a pattern and a field of any name."""
    text = {"type": "string"}
    properties = {
        "name": text,
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "role": {"enum": ["admin", "editor", "reader"]},
        "email": {"type": "string", "pattern": "^[a-z.]+@[a-z]+\\.[a-z]{2,3}$"},
        "address": {
            "type": "object",
            "properties": {"street": text, "city": text, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}},
            "required": ["street", "city"],
            "additionalProperties": False,
        },
        "tags": {"type": "array", "items": text, "maxItems": 5},
        further: {"anyOf": [text, {"type": "null"}]},
    }
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


if __name__ == "__main__":
    main()
