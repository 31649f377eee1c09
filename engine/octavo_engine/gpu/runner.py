"""Steps ahead of their plans: the GPU has the next decode to do while the host makes the plan for it.

A Runner (plan.py) around ModelRunner. A plan can only be made when the tokens of the step before are known: meanwhile
the device would wait. But mostly the next plan is known but for its tokens: the same requests, each one further. So
that step is queued at once, with the tokens that the device is drawing, before the host waits for them. When the plan
comes, the requests that were foreseen have their results; only what else is in it is computed (a prompt that came in).
Of a request that ended meanwhile the result is dropped.

Nothing is foreseen where a prompt is still being computed, where a request has no block yet for its next token, or
where that token depends on the one before by more than the model: penalties, min_tokens, grammars, guesses.

Why a step that was foreseen in vain does no harm: it writes one slot of each request, behind all that it has computed,
in a block that no other table holds (kvcache/manager.py). If the request ends, nobody finds the block in the prefix
cache, where only blocks full of computed tokens are; and whoever gets it next writes the slot later in the device's
queue, before reading it. What is drawn depends on seed, position and choice alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import torch
from msgspec.structs import replace

from octavo_engine.gpu.graphs import Drawn
from octavo_engine.gpu.sampling import DeviceDraws
from octavo_engine.plan import StepPlan, StepResult
from octavo_engine.sampler import draws_for

if TYPE_CHECKING:
    from octavo_engine.gpu.sampling import DeviceSampler
    from octavo_engine.gpu.steps import GpuSteps
    from octavo_engine.plan import RequestResult, ScheduledRequest
    from octavo_engine.runner import Launched, ModelRunner


@dataclass(frozen=True, slots=True)
class _Ahead:
    """A step that was queued before its plan was made."""

    requests: tuple[ScheduledRequest, ...]  # as foreseen; with no token
    tokens: tuple[int | None, ...]  # of each, that it was computed with
    draws: DeviceDraws

    def places_of(self, plan: StepPlan) -> dict[int, int]:
        """Which requests of a plan it has computed: their place in the plan, and here."""
        foreseen = {(request.request_id, request.choice): place for place, request in enumerate(self.requests)}
        return {
            place: own
            for place, request in enumerate(plan.requests)
            if (own := foreseen.get((request.request_id, request.choice))) is not None and self._is(own, request)
        }

    def _is(self, own: int, request: ScheduledRequest) -> bool:
        """Whether a request is what was foreseen; its block table may have grown."""
        foreseen = self.requests[own]
        return (
            request.token_ids == (self.tokens[own],)
            and request.num_computed_tokens == foreseen.num_computed_tokens
            and request.needs_token
            and request.num_choices == 1
            and request.block_ids[: len(foreseen.block_ids)] == foreseen.block_ids
        )


class AheadRunner:
    """See plan.Runner."""

    def __init__(
        self, runner: ModelRunner, steps: GpuSteps, sampler: DeviceSampler, *, seed: int, block_size: int
    ) -> None:
        """Look one step ahead.

        Args:
            runner: computes what was not foreseen, by the same steps, sampler and seed.
            steps: the model.
            sampler: chooses tokens.
            seed: of requests that bring none.
            block_size: KV slots in a block.
        """
        self._runner, self._steps, self._sampler = runner, steps, sampler
        self._seed, self._block_size = seed, block_size
        self._ahead: _Ahead | None = None

    def execute(self, plan: StepPlan) -> StepResult:
        """See plan.Runner."""
        ahead, self._ahead = self._ahead, None
        places = {} if ahead is None else ahead.places_of(plan)
        rest = tuple(request for place, request in enumerate(plan.requests) if place not in places)
        assert rest or not plan.copies, "who is given a copy has another table than was foreseen"
        launched = self._runner.launch(StepPlan(plan.step, rest, plan.copies)) if rest else None
        foreseen = self._foresee(plan)
        draws = self._launch(foreseen, plan, places, ahead, launched) if foreseen else None

        computed = [] if ahead is None or not places else ahead.draws.results()
        result = StepResult(plan.step, ()) if launched is None else launched.result()
        others = iter(result.results)
        results: list[list[RequestResult]] = [
            [computed[places[place]]] if place in places else list(islice(others, request.num_results))
            for place, request in enumerate(plan.requests)
        ]
        if draws is not None:
            tokens = tuple(results[place][0].token_id for place in foreseen)
            self._ahead = _Ahead(tuple(foreseen.values()), tokens, draws)
        flat = tuple(one for of_request in results for one in of_request)
        return StepResult(plan.step, flat, prompt_logprobs=result.prompt_logprobs)

    def _foresee(self, plan: StepPlan) -> dict[int, ScheduledRequest]:
        """The next step of those requests of a plan that go on, by their place in it; none if it cannot be known."""
        foreseen = {}
        for place, request in enumerate(plan.requests):
            if not request.needs_token:
                return {}
            sampling = request.sampling
            position = request.num_computed_tokens + len(request.token_ids)
            if sampling.embed or position + 1 - request.num_prompt_tokens >= sampling.max_tokens:
                continue  # it ends
            is_known = request.num_choices == 1 and not (
                request.num_proposed or sampling.looks_back or sampling.grammar is not None
            )
            if not is_known or position >= len(request.block_ids) * self._block_size:
                return {}
            foreseen[place] = replace(request, token_ids=(0,), num_computed_tokens=position, prompt_targets=())
        return foreseen

    @torch.inference_mode()
    def _launch(
        self,
        foreseen: dict[int, ScheduledRequest],
        plan: StepPlan,
        places: dict[int, int],
        ahead: _Ahead | None,
        launched: Launched | None,
    ) -> DeviceDraws | None:
        """Queue the next step on the tokens that the step before is drawing; None if they are not on the device."""
        tokens = []
        if ahead is not None and places:
            tokens.append(ahead.draws.tokens)
        first = sum(len(one) for one in tokens)  # of the draws of `launched`
        if launched is not None:
            if not isinstance(launched.draws, DeviceDraws):
                return None
            tokens.append(launched.draws.tokens)
        row_of = dict(places)
        for place, request in enumerate(plan.requests):
            if place not in places:
                row_of[place] = first
                first += request.num_results
        drawn = Drawn(torch.cat(tokens) if len(tokens) > 1 else tokens[0], [row_of[place] for place in foreseen])
        requests = tuple(foreseen.values())
        logits = self._steps.forward(StepPlan(plan.step + 1, requests), drawn=drawn)
        return self._sampler.begin(logits, [draw for request in requests for draw in draws_for(request, self._seed)])
