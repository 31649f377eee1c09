"""The contracts between scheduler, model runner and sampler: one step's work and one step's outcome.

The scheduler (scheduler.py) writes a StepPlan, the runner (runner.py) turns it into tensors and answers with a
StepResult, which the scheduler takes back. Everything here is frozen and free of torch, so that a plan can be built in
a test by hand. What of a plan concerns the other ranks of a model is sent to them (ranks.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

import msgspec

from octavo_engine.grammar import Grammar
from octavo_engine.past import PastTokens

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from octavo_engine.messages import EngineFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen and when it ends. Validated at the HTTP edge: every value is legal."""

    max_tokens: int  # generate at most this many tokens; > 0
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0  # keep the smallest set of tokens whose probability reaches this; 1: all
    top_k: int = 0  # keep this many most likely tokens; 0: all
    min_p: float = 0.0  # keep tokens at least this likely relative to the most likely; 0: all
    repetition_penalty: float = 1.0  # logits of tokens in prompt or output: / it if positive, * it if negative; > 0
    presence_penalty: float = 0.0  # off the logit of each token in the output
    frequency_penalty: float = 0.0  # the same for each time that it is there
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, added to its logit)
    min_tokens: int = 0  # before so many tokens nothing is chosen that would end the request
    num_logprobs: int | None = None  # tell the logprob of each token and of this many most likely; None: of none
    num_prompt_logprobs: int | None = None  # the same of the prompt's tokens, from the second on
    seed: int | None = None  # the draw depends on seed and position only; None: the engine's seed and the request id
    stop_token_ids: tuple[int, ...] = ()  # any of these ends the request with "stop", besides the model's own EOS
    ignore_eos: bool = False  # go on after EOS (benchmarks)
    grammar: str | None = None  # llguidance's text of what the answer keeps to; not with min_tokens or ignore_eos
    embed: bool = False  # generate nothing: tell the state after the prompt, with n = 1

    @property
    def has_penalties(self) -> bool:
        """Whether earlier tokens make themselves less likely, or more."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def looks_back(self) -> bool:
        """Whether the next token depends on earlier ones, besides through the model."""
        return self.has_penalties or self.min_tokens > 0


TO_BE_DRAFTED: Final = -1  # in the place of a guess: the runner's draft model is to make it


class ScheduledRequest(msgspec.Struct, frozen=True, gc=False):
    """One request's share of a step.

    A struct without garbage collection: made anew in every step, it costs a sixth of a frozen dataclass.
    """

    request_id: str
    token_ids: tuple[int, ...]  # the tokens to compute in this step; never empty
    num_computed_tokens: int  # tokens whose KV is already in the cache: the position of token_ids[0]
    block_ids: tuple[int, ...]  # the block table: block i holds positions [i * block_size, (i + 1) * block_size)
    needs_token: bool  # the request's newest token is among token_ids, so a next token is sampled after it
    sampling: SamplingParams
    choice: int = 0  # which of the request's n answers this is; the first of them while they share one entry
    num_choices: int = 1  # with needs_token: draw the first tokens of `choice` .. `choice + num_choices - 1` at once
    num_prompt_tokens: int = 0  # of all tokens of the request
    past: PastTokens | None = None  # set if sampling.looks_back; by reference, so it is read before the step's update()
    grammar: Grammar | None = None  # set if sampling.grammar; by reference too
    num_proposed: int = 0  # of token_ids, the last ones: guesses at what comes next, or TO_BE_DRAFTED; n is 1 then
    prompt_targets: tuple[int, ...] = ()  # the prompt's tokens after each of token_ids, if their logprobs are asked for
    adapter: int = 0  # the LoRA adapter that its tokens are computed with, which is loaded; 0: the model by itself

    @property
    def proposed(self) -> tuple[int, ...]:
        """The guesses. A token is drawn after each of them too, as if those up to it had come."""
        return self.token_ids[len(self.token_ids) - self.num_proposed :]

    @property
    def num_logits(self) -> int:
        """After how many of token_ids, the last ones, logits are computed."""
        if self.prompt_targets:
            return len(self.token_ids)
        return 1 + self.num_proposed if self.needs_token else 0

    @property
    def num_results(self) -> int:
        """How many tokens are drawn: one for each of the choices, or one after each of the last tokens."""
        return self.num_choices + self.num_proposed if self.needs_token else 0

    @property
    def choices(self) -> range:
        """The choices that a token is drawn for, if needs_token is set."""
        return range(self.choice, self.choice + self.num_choices)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """All the work of one step. Ragged: each request brings as many tokens as the budget gave it."""

    step: int  # counts from 0
    requests: tuple[ScheduledRequest, ...]
    copies: tuple[tuple[int, int], ...] = ()  # (source, destination) blocks, to be copied before anything is stored

    @property
    def num_tokens(self) -> int:
        """Tokens computed in this step, over all requests."""
        return sum(len(request.token_ids) for request in self.requests)

    @property
    def logits_rows(self) -> list[int]:
        """Which of the tokens, counted over all requests, logits are computed after."""
        rows: list[int] = []
        end = 0
        for request in self.requests:
            end += len(request.token_ids)
            rows.extend(range(end - request.num_logits, end))
        return rows


class TokenLogprobs(msgspec.Struct, frozen=True):
    """How likely a token was to the model itself, before temperature, penalties and all other rules; natural logs."""

    logprob: float  # of the token
    top: tuple[tuple[int, float], ...]  # (token id, logprob) of the most likely, in order; as many as were asked for
    rank: int = 0  # of the token, from 1 on by how likely it is; told of a prompt's tokens


class RequestResult(msgspec.Struct, frozen=True, gc=False):
    """What a step produced for one of ScheduledRequest.num_results: token_id, state or error is set."""

    token_id: int | None = None
    error: str | None = None  # why this request alone fails (NaN logits); the others are not touched
    logprobs: TokenLogprobs | None = None  # of token_id, if sampling.num_logprobs asks for them
    state: bytes | None = None  # with sampling.embed: the last layer's normed output, float32 little-endian


@dataclass(frozen=True, slots=True)
class StepResult:
    """The answer to a StepPlan."""

    step: int
    results: tuple[RequestResult, ...]  # in the order of the plan: as many for each request as its num_results
    drafted: tuple[tuple[int, ...], ...] = ()  # guesses of the requests whose guesses were TO_BE_DRAFTED, in order
    prompt_logprobs: tuple[tuple[TokenLogprobs, ...], ...] = ()  # of each request with prompt_targets, of each of them


class Runner(Protocol):
    """What computes a step: the model with its KV cache (runner.py), or a fake in the tests of the loop."""

    def execute(self, plan: StepPlan) -> StepResult:
        """Copy blocks, compute every token of the plan and draw the tokens that it asks for.

        What fails for one request alone is told in its RequestResult; what this raises ends the engine process.
        """
        ...


class Adapters(Protocol):
    """What takes LoRA adapters, between two steps."""

    def load(self, adapter: int, path: Path) -> None:
        """Read an adapter, which ScheduledRequest.adapter may name from then on.

        Raises:
            UserError: it is not for this model, is not what this engine computes, or there is no room for it.
        """
        ...

    def unload(self, adapter: int) -> None:
        """Forget an adapter that no request names any more."""
        ...


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """What `runner.load_runner(config, on_progress)` gives to the engine loop."""

    runner: Runner
    facts: EngineFacts  # block_size, num_blocks and max_model_len are what the scheduler works with
    eos_token_ids: frozenset[int]  # any of these ends a request, unless it asked for ignore_eos
    vocab_size: int  # rows of the embedding: the model knows token ids below this
    positions_a_token: int | None = None  # attending to so many takes as long as a token's other work; None: no matter
    adapters: Adapters | None = None  # None: the options ask for none
    check: Callable[[], None] = lambda: None  # called while idle: raises if what computes is not all there any more
