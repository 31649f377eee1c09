"""Answers: the same text, logprobs, number of tokens and end, however the engine's tokens come."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, cast

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from octavo_engine.answer import Answer, TextDelta, TextLogprobs
from octavo_engine.messages import RequestUpdate
from octavo_engine.plan import TokenLogprobs
from octavo_engine.text.load import load_tokenizer
from octavo_engine.text.tokenizer import Segment

if TYPE_CHECKING:
    from pathlib import Path

    from octavo_engine.messages import FinishReason
    from octavo_engine.text.tokenizer import Tokenizer

EOS = 256


@dataclass
class ByteTokenizer:
    """What an Answer needs of a tokenizer: a token for each byte, some for two, and a control token."""

    token_bytes: tuple[bytes, ...] = (*(bytes([byte]) for byte in range(256)), b"<|end|>", b"ab", "\u65e5b".encode())
    control_ids: frozenset[int] = frozenset({EOS})


FAKE = cast("Tokenizer", ByteTokenizer())


def run(
    tokenizer: Tokenizer,
    tokens: list[int],
    reason: FinishReason,
    cuts: list[int],
    **options: object,
) -> tuple[str, list[TextLogprobs], int, str | None]:
    """Everything that comes out when the tokens come in updates between the cuts."""
    answer = Answer(tokenizer, **options)  # type: ignore[arg-type] # its own options
    borders = [0, *sorted(cut % len(tokens) for cut in cuts), len(tokens)]
    deltas: list[TextDelta] = []
    for start, end in pairwise(borders):
        if answer.has_ended:
            break
        deltas.append(
            answer.take(
                RequestUpdate(
                    request_id="a",
                    token_ids=tuple(tokens[start:end]),
                    logprobs=tuple(TokenLogprobs(-float(i), ((i, -1.0),)) for i in range(start, end)),
                    finish_reason=reason if end == len(tokens) else None,
                )
            )
        )
    assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
    return (
        "".join(delta.text for delta in deltas),
        [entry for delta in deltas for entry in delta.logprobs],
        deltas[-1].num_tokens,
        deltas[-1].finish_reason,
    )


@given(
    tokens=st.lists(st.sampled_from([*b"abc", 0xE6, 0x97, 0xA5, EOS, 257, 258]), min_size=1, max_size=12),
    reason=st.sampled_from(["stop", "length"]),
    stop=st.lists(st.text(st.sampled_from("abc\u65e5"), min_size=1, max_size=3), max_size=3),
    include=st.booleans(),
    min_tokens=st.integers(0, 4),
    cuts=st.lists(st.integers(0, 100), max_size=6),
)
def test_an_answer_is_the_same_however_its_tokens_come(
    tokens: list[int], reason: FinishReason, stop: list[str], cuts: list[int], min_tokens: int, *, include: bool
) -> None:
    options = {"stop": stop, "include_stop": include, "min_tokens": min_tokens}
    whole = run(FAKE, tokens, reason, [], **options)
    assert run(FAKE, tokens, reason, list(range(len(tokens))), **options) == whole
    assert run(FAKE, tokens, reason, cuts, **options) == whole
    text, logprobs, num_tokens, ended = whole
    assert num_tokens <= len(tokens)
    assert ended in {"stop", reason}
    offsets = [entry.offset for entry in logprobs]
    assert offsets == sorted(offsets)
    assert all(offset <= len(text) for offset in offsets)


@given(
    tokens=st.lists(st.sampled_from([*b"abc", 0xE6, 0x97, 0xA5, 257, 258]), min_size=1, max_size=12),
    stop=st.lists(st.text(st.sampled_from("abc\u65e5"), min_size=1, max_size=3), max_size=3),
)
def test_the_text_ends_at_the_stop_string_that_is_complete_first(tokens: list[int], stop: list[str]) -> None:
    full = b"".join(FAKE.token_bytes[token] for token in tokens).decode(errors="replace")
    text, _, _, reason = run(FAKE, tokens, "length", [], stop=stop)
    ends = [(full.find(string) + len(string), full.find(string)) for string in stop if string in full]
    assert text == (full[: min(ends)[1]] if ends else full)
    assert reason == ("stop" if ends else "length")


@pytest.mark.model
@given(
    text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30),
    cuts=st.lists(st.integers(0, 100), max_size=6),
    data=st.data(),
)
def test_with_the_real_tokenizer_a_stop_string_is_found_across_any_token_borders(
    smollm2_tokenizer: Tokenizer, text: str, cuts: list[int], data: st.DataObject
) -> None:
    tokens = smollm2_tokenizer.encode([Segment(text, control_tokens=False)])
    text = b"".join(smollm2_tokenizer.token_bytes[token] for token in tokens).decode(errors="replace")
    assume(text)  # some characters have no token
    start = data.draw(st.integers(0, len(text) - 1))
    stop = text[start : data.draw(st.integers(start + 1, len(text)))]
    found, *rest = run(smollm2_tokenizer, tokens, "length", cuts, stop=[stop])
    assert found == text[: text.find(stop)]
    assert rest[-1] == "stop"
    assert run(smollm2_tokenizer, tokens, "length", [], stop=[stop]) == (found, *rest)


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2_path: Path) -> Tokenizer:
    """The real model's."""
    return load_tokenizer(smollm2_path)
