"""One request inside the engine process.

Made and mutated by the scheduler (scheduler.py) and by nobody else; knows nothing of blocks' contents, tensors or HTTP.

There are no phases: `num_computed_tokens` chases `len(token_ids)`. A request that lags by one token decodes, one that
lags by more prefills, and preemption only sets `num_computed_tokens` back to zero.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from octavo_engine.messages import FinishReason
    from octavo_engine.plan import SamplingParams


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
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    stop_token_ids: frozenset[int]  # any of these ends the request with "stop"
    max_num_tokens: int  # prompt + output; reaching it ends the request with "length"
    status: RequestStatus = RequestStatus.WAITING
    token_ids: list[int] = field(init=False)  # the prompt, then the output
    num_computed_tokens: int = 0  # tokens whose KV is in the cache; below len(token_ids) until the request finishes
    block_ids: tuple[int, ...] = ()  # the block table; empty unless RUNNING

    def __post_init__(self) -> None:
        self.token_ids = list(self.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens known so far, prompt and output."""
        return len(self.token_ids)

    @property
    def num_uncomputed_tokens(self) -> int:
        """Known tokens whose KV is not in the cache: what the next steps have to compute."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def output_token_ids(self) -> tuple[int, ...]:
        """The tokens generated so far."""
        return tuple(self.token_ids[len(self.prompt_token_ids) :])

    def append(self, token_id: int) -> FinishReason | None:
        """Take a sampled token; return why the request ends with it, or None if it goes on."""
        self.token_ids.append(token_id)
        if token_id in self.stop_token_ids:
            return "stop"
        if len(self.token_ids) >= self.max_num_tokens:
            return "length"
        return None
