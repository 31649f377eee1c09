"""One request inside the engine process.

Made and mutated by the scheduler (scheduler.py) and by nobody else; knows nothing of blocks' contents, tensors or HTTP.

There are no phases: `num_computed_tokens` chases `len(token_ids)`. A request that lags by one token decodes, one that
lags by more prefills, and preemption only sets `num_computed_tokens` back to zero.

A request for several answers is one Request until its prompt is computed. Then it forks into its choices, each a
Request of its own from there on; they share the id and, at first, every block.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from itertools import takewhile
from typing import TYPE_CHECKING

from octavo_engine.past import PastTokens

if TYPE_CHECKING:
    from collections.abc import Sequence

    from octavo_engine.grammar import Grammar
    from octavo_engine.messages import FinishReason
    from octavo_engine.plan import SamplingParams
    from octavo_engine.speculation import Proposer


class RequestStatus(Enum):
    """Where a request is. A preempted request is WAITING again; what it has generated stays in its token_ids."""

    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass(slots=True, eq=False, kw_only=True)
class Request:
    """The state of one request: its tokens and how many of them have their KV in the cache."""

    request_id: str
    arrival: int  # place in the order in which requests were added
    priority: int = 0  # lower goes first
    choice: int = 0  # which of the request's answers
    num_choices: int = 1  # answers still to be forked off, this one included
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    stop_token_ids: frozenset[int]  # any of these ends the request with "stop"
    max_num_tokens: int  # prompt + output; reaching it ends the request with "length"
    order: tuple[int, int, int] = field(init=False)  # unique; who comes first is served first and preempted last
    status: RequestStatus = RequestStatus.WAITING
    num_prompt_tokens: int = field(init=False)  # kept, as each step's plan tells it
    token_ids: list[int] = field(init=False)  # the prompt, then the output
    num_computed_tokens: int = 0  # tokens whose KV is in the cache; below len(token_ids) until the request finishes
    block_ids: tuple[int, ...] = ()  # the block table; empty unless RUNNING
    shares_last_block: bool = False  # the last block has free slots and was other choices' too when this one forked
    block_hashes: list[bytes] = field(default_factory=list)  # names of the first blocks in the prefix cache, so far
    num_offered_tokens: int = 0  # tokens in full blocks that were offered to the prefix cache since the last admission
    num_cached_tokens: int | None = None  # prompt tokens that it had when this was first admitted; None: not yet
    num_preemptions: int = 0
    num_told: int = 0  # tokens of the prompt, from the second on, whose logprobs have been told, if they are asked for
    grammar: Grammar | None = None  # where the answer is in what it keeps to
    proposer: Proposer | None = None  # guesses at what comes next
    adapter: int = 0  # the LoRA adapter that computes it; 0: the model by itself
    past: PastTokens | None = field(init=False)  # what the sampler must know of token_ids, if anything

    def __post_init__(self) -> None:
        self.order = (self.priority, self.arrival, self.choice)
        self.num_prompt_tokens = len(self.prompt_token_ids)
        self.token_ids = list(self.prompt_token_ids)
        looks_back = self.sampling.looks_back
        self.past = PastTokens(self.prompt_token_ids, tuple(self.stop_token_ids)) if looks_back else None

    @property
    def num_tokens(self) -> int:
        """Tokens known so far, prompt and output."""
        return len(self.token_ids)

    @property
    def num_uncomputed_tokens(self) -> int:
        """Known tokens whose KV is not in the cache: what the next steps have to compute."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def tells_prompt(self) -> bool:
        """Whether logprobs of the prompt's tokens are still to be told, which takes the logits of all."""
        return self.sampling.num_prompt_logprobs is not None and self.num_told < self.num_prompt_tokens - 1

    def fork(self) -> list[Request]:
        """Split into the choices, this one first; they hold the same block table, which the caller has to count."""
        num_choices, self.num_choices = self.num_choices, 1
        others = [
            Request(
                request_id=self.request_id,
                arrival=self.arrival,
                priority=self.priority,
                choice=choice,
                prompt_token_ids=self.prompt_token_ids,
                sampling=self.sampling,
                stop_token_ids=self.stop_token_ids,
                max_num_tokens=self.max_num_tokens,
                status=self.status,
                num_computed_tokens=self.num_computed_tokens,
                block_ids=self.block_ids,
                shares_last_block=self.shares_last_block,
                block_hashes=list(self.block_hashes),
                num_offered_tokens=self.num_offered_tokens,
                num_cached_tokens=self.num_cached_tokens,
                num_told=self.num_told,
                grammar=None if self.grammar is None else self.grammar.fork(),
                adapter=self.adapter,
            )
            for choice in range(self.choice + 1, self.choice + num_choices)
        ]
        return [self, *others]

    def guess(self, most: int) -> tuple[int, ...]:
        """Guesses at the tokens that come next, at most so many."""
        assert self.proposer is not None
        return self.before_end(self.proposer.propose(self.token_ids, most))

    def before_end(self, guesses: Sequence[int]) -> tuple[int, ...]:
        """Guesses up to one that would end this, which is drawn as well without being guessed."""
        return tuple(takewhile(lambda token_id: token_id not in self.stop_token_ids, guesses))

    def append(self, token_id: int) -> FinishReason | None:
        """Take a sampled token; return why the request ends with it, or None if it goes on."""
        self.token_ids.append(token_id)
        if self.past is not None:
            self.past.add(token_id)
        if token_id in self.stop_token_ids:
            return "stop"
        if len(self.token_ids) >= self.max_num_tokens:
            return "length"
        if self.grammar is not None:
            self.grammar.accept(token_id)
        return None
