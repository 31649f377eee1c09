"""Speculative decoding: guesses at the next tokens of a request, which a step verifies all at once. No torch here.

Guesses are by prompt lookup, vLLM's method "ngram" (A. Saxena, "Prompt Lookup Decoding", 2023): where the last few
tokens of a request were there before, what followed them then may follow again. A guess is right if it is the token
that is drawn in its place, by that place's own random number: so the tokens are those without guesses, and not only
their distribution is the same. docs/speculation.md says what guesses cost and bring.

Used by scheduler.py, which knows nothing of how guesses are made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

from octavo_engine.messages import DraftStats
from octavo_engine.plan import TO_BE_DRAFTED

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from octavo_engine.config import SpeculativeConfig
    from octavo_engine.plan import RequestResult

_MAX_PAUSE: Final = 64  # tokens
# A long prompt is indexed over several steps, so that none of them waits for it: so many tokens take 1 ms a length.
_INDEXED_AT_ONCE: Final = 4096


class Proposer(Protocol):
    """Guesses for one request, or for one choice of it."""

    def propose(self, token_ids: Sequence[int], most: int) -> Sequence[int]:
        """Guess what comes next.

        Args:
            token_ids: all tokens of the request; those of the last call, and what has come since.
            most: how many guesses are of use, at least 1.
        """

    def learn(self, num_accepted: int) -> None:
        """Hear how many of the last guesses were right: those before the first that was not."""


class DraftProposer:
    """Leaves it to the runner's draft model to make the guesses: as many each time as there is room for."""

    def __init__(self, config: SpeculativeConfig) -> None:
        self._most = config.num_speculative_tokens

    def propose(self, token_ids: Sequence[int], most: int) -> Sequence[int]:
        """See Proposer."""
        del token_ids
        return (TO_BE_DRAFTED,) * min(most, self._most)

    def learn(self, num_accepted: int) -> None:
        """See Proposer."""


class Speculation:
    """What the scheduler has guesses from: makes a proposer for each request, and counts what became of its guesses."""

    def __init__(self, make_proposer: Callable[[], Proposer]) -> None:
        self.make_proposer = make_proposer
        self._num_drafts = 0
        self._num_guesses = 0
        self._num_right: list[int] = []  # by place

    def count(self, num_guesses: int, num_right: int) -> None:
        """Count the guesses of a request in one step, and those that were right, which come first."""
        self._num_drafts += 1
        self._num_guesses += num_guesses
        self._num_right += [0] * (num_right - len(self._num_right))
        for place in range(num_right):
            self._num_right[place] += 1

    def stats(self) -> DraftStats:
        """All that was counted."""
        return DraftStats(
            num_drafts=self._num_drafts,
            num_draft_tokens=self._num_guesses,
            num_accepted_tokens_per_pos=tuple(self._num_right),
        )


def count_right(guesses: Sequence[int], rows: Sequence[RequestResult]) -> int:
    """How many guesses, from the first on, were drawn.

    Args:
        guesses: what was guessed.
        rows: what was drawn in the place of each, given those before it, and after the last one. Where it has an error,
            the guess before it does not count: so the token is computed anew, and only a row without guesses fails.
    """
    for number, (guess, row, following) in enumerate(zip(guesses, rows, rows[1:], strict=False)):
        if row.token_id != guess or following.error is not None:
            return number
    return len(guesses)


class LookupProposer:
    """Guesses what followed the last tokens when they were there before, the longest run and the last time first.

    An index of where each run of tokens ended last grows with the request: O(1) a token and length of run, and about
    100 bytes. A request whose guesses are wrong pauses for more and more tokens, as guesses cost time.
    """

    def __init__(self, config: SpeculativeConfig) -> None:
        self._most = config.num_speculative_tokens
        # By length: the hash of a run to where it ended last. Two runs with one hash make a wrong guess, and no more.
        lengths = range(config.prompt_lookup_max, config.prompt_lookup_min - 1, -1)
        self._ends: dict[int, dict[int, int]] = {length: {} for length in lengths}
        self._num_indexed = 0  # runs within so many of the first tokens are in the index
        self._num_tokens = 0
        self._pause = 1  # tokens, after guesses of which none is right
        self._paused_until = 0  # the request has so many tokens

    def propose(self, token_ids: Sequence[int], most: int) -> Sequence[int]:
        """See Proposer."""
        self._index(token_ids)
        self._num_tokens = len(token_ids)
        if self._num_tokens < self._paused_until:
            return ()
        for length, ends in self._ends.items():
            end = ends.get(hash(tuple(token_ids[-length:])))
            if end is not None:
                most = min(most, self._most)
                following = token_ids[end : end + most]
                # What is shorter ends with the request's tokens, so a repetition is under way: it goes on.
                return [following[place % len(following)] for place in range(most)]
        return ()

    def learn(self, num_accepted: int) -> None:
        """See Proposer."""
        if num_accepted:
            self._pause = 1
        else:
            self._pause = min(2 * self._pause, _MAX_PAUSE)
            self._paused_until = self._num_tokens + self._pause

    def _index(self, token_ids: Sequence[int]) -> None:
        """Take in what has come, but for what ends with the last token: nothing follows it yet."""
        stop = min(len(token_ids), self._num_indexed + 1 + _INDEXED_AT_ONCE)
        for length, ends in self._ends.items():
            for end in range(max(self._num_indexed + 1, length), stop):
                ends[hash(tuple(token_ids[end - length : end]))] = end
        self._num_indexed = stop - 1
