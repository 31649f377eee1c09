"""What crosses the border between the API process and the engine process, as msgpack over a stream socket.

client.py (API side) and core.py (engine side) are the only users. Every message is a frozen struct with a tag; a frame
is a 4-byte big-endian length and the msgpack bytes. End of file on the socket tells each side that the other is gone.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from octavo_engine.errors import Facts
from octavo_engine.plan import SamplingParams, TokenLogprobs

FinishReason = Literal["stop", "length", "abort", "error"]


class Message(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """The base of every message; the tag is the class name."""


# API -> engine


class AddRequest(Message, frozen=True):
    """Start a request. The id is unique among living requests."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    num_choices: int = 1  # answers to generate, at most max_num_seqs; they share the prompt's KV
    priority: int = 0  # lower goes first in admission and is preempted last; of equal ones, who came first
    adapter: int = 0  # number of a loaded LoRA adapter; 0: the model by itself


class AbortRequest(Message, frozen=True):
    """Stop a request (client gone, or a stop string was found). Unknown ids are ignored: it may just have ended."""

    request_id: str
    choice: int | None = None  # stop this one alone; None: all of them


class LoadAdapter(Message, frozen=True):
    """Load a LoRA adapter; AdapterLoaded is the answer."""

    adapter: int  # what requests call it: a number above those of all adapters before
    path: str


class UnloadAdapter(Message, frozen=True):
    """Forget an adapter. The last request that names it has ended, or is aborted by a message before this one."""

    adapter: int


class Shutdown(Message, frozen=True):
    """End the engine process now; what still runs is dropped. Draining is the API process' work."""


# engine -> API


class Loading(Message, frozen=True):
    """Progress before the engine can serve."""

    phase: str  # CamelCase, such as "Loading" or "Warmup"
    done: int  # bytes
    total: int  # bytes


class EngineFacts(Message, frozen=True):
    """Sent once, when the engine is ready to serve."""

    max_model_len: int  # longest prompt + output, tokens
    block_size: int
    num_blocks: int
    dtype: str  # of the inputs of matrix products
    cache_dtype: str  # of the KV cache
    device: str
    num_parameters: int
    rank_pids: tuple[int, ...] = ()  # of the processes beside the engine's that share the model with it


class Refused(Message, frozen=True):
    """The engine cannot start; it ends after this message."""

    reason: str  # UserError.reason
    message: str
    facts: Facts


class AdapterLoaded(Message, frozen=True):
    """Requests may name the adapter now, unless there is an error."""

    adapter: int
    error: str | None = None
    reason: str = ""  # with an error: UserError.reason


class RequestUpdate(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """What one step brought one choice of a request. Each choice ends by itself."""

    request_id: str
    choice: int = 0  # 0 .. num_choices - 1
    token_ids: tuple[int, ...]  # new tokens in order; a final EOS or stop token is included
    finish_reason: FinishReason | None = None  # set on the last update
    error: str | None = None  # with finish_reason "error"
    num_cached_tokens: int = 0  # prompt tokens whose KV was found in the prefix cache; the same in every update
    num_preemptions: int = 0  # of this choice so far, or of all of them before they were told apart
    logprobs: tuple[TokenLogprobs, ...] = ()  # one for each of token_ids, if the request asks for them
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()  # the next of the prompt's tokens, from its second on; of choice 0
    state: bytes = b""  # with sampling.embed, which brings no tokens: see RequestResult


class DraftStats(msgspec.Struct, frozen=True, kw_only=True):
    """What became of the guesses of speculative decoding since the start."""

    num_drafts: int  # a request's guesses in one step, however many, are one
    num_draft_tokens: int  # guesses
    num_accepted_tokens_per_pos: tuple[int, ...]  # guesses that were right, by their place in the draft


class SchedulerStats(msgspec.Struct, frozen=True, kw_only=True):
    """The scheduler's gauges after a step, and counters since the start."""

    num_running: int
    num_waiting: int
    num_used_blocks: int
    num_blocks: int
    num_used_slots: int  # that hold a token, shared ones once; waste is 1 - num_used_slots / (blocks * block_size)
    num_preemptions: int  # since start
    num_prefix_cache_queries: int  # tokens that were looked up in the prefix cache, since start; each request once
    num_prefix_cache_hits: int  # those of them that were found
    step: int  # steps since start: that it moves while num_running > 0 is what liveness means
    drafts: DraftStats | None = None  # with speculative decoding


class StepOutputs(Message, frozen=True):
    """After each step, and at least every second while idle (then without updates) as a sign of life."""

    updates: tuple[RequestUpdate, ...]
    stats: SchedulerStats
    started: float = 0.0  # when the step began, by time.monotonic(), which the processes of a machine share
    num_tokens: int = 0  # computed in the step, over all requests; 0: this is no step but a sign of life
    prefilled: tuple[str, ...] = ()  # the requests of whose prompts the step computed a part


ToEngine = AddRequest | AbortRequest | LoadAdapter | UnloadAdapter | Shutdown
ToClient = Loading | EngineFacts | Refused | AdapterLoaded | StepOutputs
