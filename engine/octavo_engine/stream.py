"""The updates of one request on their way from the engine (client.py puts them in) to its reader (who takes them out).

A reader slower than the engine finds several steps' updates merged into one for each choice.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from octavo_engine.errors import EngineDead

if TYPE_CHECKING:
    from octavo_engine.messages import AddRequest, RequestUpdate


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """Where the time of a request went, in seconds, and what it was for."""

    queue_seconds: float  # from being sent to the engine to its first step
    prefill_seconds: float  # from there to its first tokens
    decode_seconds: float  # from there to its last ones
    num_prompt_tokens: int
    num_cached_tokens: int  # of the prompt, that needed no computation
    num_tokens: int  # generated
    most_tokens: int  # generated for one of its answers
    max_tokens: int  # asked for
    num_choices: int
    num_preemptions: int  # of all of them


class UpdateStream:
    """One request's.

    Args:
        request: as it was sent to the engine.
        sent: when that was, in monotonic seconds, as all times here.

    Attributes:
        request, sent: as given.
        begun: when its first step began; set by the client.
        last_tokens: by choice, when its last tokens came.
    """

    def __init__(self, request: AddRequest, sent: float) -> None:
        self.request = request
        self.sent = sent
        self.begun: float | None = None
        self.last_tokens: dict[int, float] = {}
        self._first_tokens = sent  # when they came, of any choice
        self._num_tokens: Counter[int] = Counter()  # by choice
        self._num_cached_tokens = 0
        self._num_preemptions: dict[int, int] = {}  # by choice
        self._living = set(range(request.num_choices))  # choices that will have further updates for the reader
        self._waiting: dict[int, list[RequestUpdate]] = {}  # by choice
        self._failure: str | None = None  # how the engine process ended
        self._news = asyncio.Event()

    @property
    def is_finished(self) -> bool:
        """Whether the reader has had the last update of every choice."""
        return not self._living and not self._waiting

    def put(self, update: RequestUpdate, now: float) -> None:
        """Take an update from the engine."""
        if update.token_ids:
            self._first_tokens = self._first_tokens if self._num_tokens else now
            self._num_tokens[update.choice] += len(update.token_ids)
            self._num_cached_tokens = update.num_cached_tokens
            self._num_preemptions[update.choice] = update.num_preemptions
            self.last_tokens[update.choice] = now
        if update.choice not in self._living:  # dropped in the meantime
            return
        self._waiting.setdefault(update.choice, []).append(update)
        if update.finish_reason is not None:
            self._living.discard(update.choice)
        self._news.set()

    def answered(self) -> Answered | None:
        """Where its time went, if it got any tokens."""
        if self.begun is None or not self._num_tokens:
            return None
        return Answered(
            queue_seconds=max(0.0, self.begun - self.sent),
            prefill_seconds=self._first_tokens - self.begun,
            decode_seconds=max(self.last_tokens.values()) - self._first_tokens,
            num_prompt_tokens=len(self.request.prompt_token_ids),
            num_cached_tokens=self._num_cached_tokens,
            num_tokens=self._num_tokens.total(),
            most_tokens=max(self._num_tokens.values()),
            num_choices=self.request.num_choices,
            num_preemptions=sum(self._num_preemptions.values()),
            max_tokens=self.request.sampling.max_tokens,
        )

    def drop(self, choice: int) -> None:
        """Forget a choice, of which the reader wants no more."""
        self._living.discard(choice)
        self._waiting.pop(choice, None)
        self._news.set()

    def fail(self, reason: str) -> None:
        """Tell the reader that the engine process ended."""
        self._failure = reason
        self._news.set()

    async def take(self) -> list[RequestUpdate]:
        """Wait for news and return them, at most one update a choice.

        Raises:
            EngineDead: the engine process ended, and some choice had not.
        """
        await self._news.wait()
        self._news.clear()
        if self._failure is not None and self._living:
            raise EngineDead(self._failure)
        waiting, self._waiting = self._waiting, {}
        return [_merged(updates) for updates in waiting.values()]


def _merged(updates: list[RequestUpdate]) -> RequestUpdate:
    if len(updates) == 1:
        return updates[0]
    return msgspec.structs.replace(
        updates[-1],
        token_ids=tuple(token_id for update in updates for token_id in update.token_ids),
        logprobs=tuple(logprobs for update in updates for logprobs in update.logprobs),
        prompt_logprobs=tuple(logprobs for update in updates for logprobs in update.prompt_logprobs),
    )
