"""From the engine's updates of one choice to pieces of its text, with the logprobs of the tokens in them.

Called by generation.py. However the tokens are cut into updates, the pieces are the same in sum: text, logprobs, number
of tokens and why it ended. tests/engine/test_answer.py holds that.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Literal

from octavo_engine.text.detokenizer import Detokenizer
from octavo_engine.text.stop import StopStrings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from octavo_engine.messages import RequestUpdate
    from octavo_engine.plan import TokenLogprobs
    from octavo_engine.text.tokenizer import Tokenizer

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class TokenText:
    """A token of an answer, or one that was likely in its place, and how likely."""

    text: bytes  # what it stands for: a part of a character, maybe
    logprob: float
    token_id: int


@dataclass(frozen=True, slots=True)
class TextLogprobs:
    """One token of an answer."""

    token: TokenText
    top: tuple[TokenText, ...]  # the most likely ones, in order
    offset: int  # characters of the answer before it; below 0 in a prompt, at whose end the answer begins
    rank: int = 0  # in a prompt: from 1 on by how likely it is
    is_first: bool = False  # of its prompt, so that no logprob of it is known


@dataclass(frozen=True, slots=True)
class TextDelta:
    """The next piece of an answer; its text may be empty."""

    text: str
    num_tokens: int  # generated so far, those without text (EOS, a stop string) included
    finish_reason: FinishReason | None = None  # set on the last piece
    choice: int = 0  # which answer
    logprobs: tuple[TextLogprobs, ...] = ()  # of the tokens whose text is certain with this piece, if asked for
    num_cached_tokens: int = 0  # of the prompt, that needed no computation
    prompt_logprobs: tuple[TextLogprobs, ...] = ()  # the next of the prompt's tokens, if asked for; with any choice


class PromptTokens:
    """The tokens of a prompt, on their way to who asked for their logprobs.

    Args:
        tokenizer: of the model.
        token_ids: of the prompt.
    """

    def __init__(self, tokenizer: Tokenizer, token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._token_ids = token_ids
        self._num_told = 0
        detokenizer = Detokenizer(tokenizer.token_bytes, frozenset())
        lengths = [len(detokenizer.push((token_id,))) for token_id in token_ids]
        lengths[-1] += len(detokenizer.finish())
        self._offsets = list(accumulate(lengths, initial=-sum(lengths)))

    def take(self, logprobs: Sequence[TokenLogprobs]) -> tuple[TextLogprobs, ...]:
        """Return the next tokens, to which these belong; the first one, which has none, at the first call."""
        entries: list[TextLogprobs] = []
        if self._num_told == 0:
            first = TokenText(_bytes(self._tokenizer, self._token_ids[0]), 0.0, self._token_ids[0])
            entries.append(TextLogprobs(first, (), self._offsets[0], is_first=True))
        places = range(self._num_told + len(entries), len(self._token_ids))
        entries += [
            _as_text(self._tokenizer, self._token_ids[place], one, self._offsets[place])
            for place, one in zip(places, logprobs, strict=False)
        ]
        self._num_told += len(entries)
        return tuple(entries)


class Answer:
    """One choice of a request.

    Args:
        tokenizer: of the model.
        choice: which one.
        stop: strings that end the text, looked for in the text of the tokens after the first `min_tokens`.
        include_stop: what ended the text (a stop string or a stop token) is part of it.
        min_tokens: as SamplingParams.
        show_control: control tokens are text too.
        shown_ids: control tokens that are text whatever `show_control` says.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        choice: int = 0,
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
        show_control: bool = False,
        shown_ids: frozenset[int] = frozenset(),
    ) -> None:
        self.has_ended = False
        self._choice = choice
        self._tokenizer = tokenizer
        hidden_ids = frozenset[int]() if show_control else tokenizer.control_ids - shown_ids
        self._detokenizer = Detokenizer(tokenizer.token_bytes, hidden_ids)
        self._stop = StopStrings(stop, include=include_stop)
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._num_characters = 0  # decoded, those that are held back included
        self._num_certain = 0  # of them, that have left
        self._logprobs: deque[TextLogprobs] = deque()  # of tokens whose text has not left

    def take(self, update: RequestUpdate) -> TextDelta:
        """Take what a step brought, which is neither an error nor an abort."""
        text = ""
        last = len(update.token_ids) - 1
        for place, token_id in enumerate(update.token_ids):
            self._num_tokens += 1
            if place == last and update.finish_reason == "stop" and not self._include_stop:
                break  # the token that ended the request is no part of the text
            if update.logprobs:
                one = _as_text(self._tokenizer, token_id, update.logprobs[place], self._num_characters)
                self._logprobs.append(one)
            text += self._add(self._detokenizer.push((token_id,)))
            if self._stop.found:
                break  # whether there are more tokens is a matter of timing
        if update.finish_reason is not None:
            text += self._add(self._detokenizer.finish())
            text += self._stop.finish()
        self._num_certain += len(text)
        self.has_ended = self._stop.found or update.finish_reason is not None
        reason: FinishReason | None = None
        if self._stop.found or update.finish_reason == "stop":
            reason = "stop"
        elif update.finish_reason == "length":
            reason = "length"
        return TextDelta(
            text, self._num_tokens, reason, self._choice, self._certain_logprobs(), update.num_cached_tokens
        )

    def _add(self, characters: str) -> str:
        """Take new characters and return what is certain of all."""
        self._num_characters += len(characters)
        if self._num_tokens <= self._min_tokens:
            return characters
        return self._stop.push(characters)

    def _certain_logprobs(self) -> tuple[TextLogprobs, ...]:
        """Return those of the tokens that begin in the text which has left; at a natural end, of all that are left."""
        certain = []
        is_whole = self.has_ended and not self._stop.found
        while self._logprobs and (is_whole or self._logprobs[0].offset < self._num_certain):
            certain.append(self._logprobs.popleft())
        return tuple(certain)


def _as_text(tokenizer: Tokenizer, token_id: int, logprobs: TokenLogprobs, offset: int) -> TextLogprobs:
    return TextLogprobs(
        TokenText(_bytes(tokenizer, token_id), logprobs.logprob, token_id),
        tuple(TokenText(_bytes(tokenizer, other), logprob, other) for other, logprob in logprobs.top),
        offset,
        logprobs.rank,
    )


def _bytes(tokenizer: Tokenizer, token_id: int) -> bytes:
    """What a token stands for; nothing, where a model has more logits than its vocabulary has tokens."""
    return tokenizer.token_bytes[token_id] if token_id < len(tokenizer.token_bytes) else b""
