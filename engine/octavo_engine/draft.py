"""A draft model: a small one that guesses what the model draws next. Built and called by runner.py.

Its KV cache has the model's blocks: it computes every token that the model computes, at the same place of the same
block, so that whoever owns, shares, copies or finds a block has both models' keys and values in it. Nothing of any
request is kept here. (Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", ICML 2023; but a
guess is verified by the draw in its place, see speculation.py, so this only has to say what is likeliest.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
from msgspec.structs import replace

from octavo_engine import sampler
from octavo_engine.plan import SamplingParams, StepPlan

if TYPE_CHECKING:
    from collections.abc import Sequence

    from octavo_engine.plan import ScheduledRequest
    from octavo_engine.steps import Steps

_LIKELIEST: Final = sampler.Draw(SamplingParams(max_tokens=1, temperature=0.0), "")


class Drafter:
    """Fills plans with guesses."""

    def __init__(self, steps: Steps) -> None:
        """Take the loaded draft model; its KV cache has as many blocks as the model's."""
        self._steps = steps

    @torch.inference_mode()
    def complete(self, plan: StepPlan) -> tuple[StepPlan, tuple[tuple[int, ...], ...]]:
        """Return the plan with guesses where it leaves them open, and these, for each request that has any.

        One pass for all known tokens, which gives the first guesses, and one for each guess after that; the last one is
        computed for its keys and values alone.
        """
        if plan.copies:
            self._steps.copy_blocks(plan.copies)
        guesses: list[tuple[int, ...]] = [()] * len(plan.requests)
        places: Sequence[int] = range(len(plan.requests))
        while places:
            turn = tuple(_turn(plan.requests[place], guesses[place]) for place in places)
            logits = self._steps.forward(StepPlan(plan.step, turn))
            places = [place for place, request in zip(places, turn, strict=True) if request.needs_token]
            if places:
                rows = sampler.sample(logits, [_LIKELIEST] * len(places), self._steps.chooser)
                for place, row in zip(places, rows, strict=True):
                    guesses[place] += (row.token_id or 0,)  # any token will do where this model gives no number
        completed = tuple(
            replace(request, token_ids=(*_known(request), *guesses[place])) if guesses[place] else request
            for place, request in enumerate(plan.requests)
        )
        return StepPlan(plan.step, completed, plan.copies), tuple(filter(None, guesses))


def _known(request: ScheduledRequest) -> tuple[int, ...]:
    return request.token_ids[: len(request.token_ids) - request.num_proposed]


def _turn(request: ScheduledRequest, guesses: tuple[int, ...]) -> ScheduledRequest:
    """What of a request is computed after so many guesses, and whether there is one more to be made."""
    known = _known(request)
    return replace(
        request,
        token_ids=guesses[-1:] if guesses else known,
        num_computed_tokens=request.num_computed_tokens + (len(known) + len(guesses) - 1 if guesses else 0),
        needs_token=len(guesses) < request.num_proposed,
        num_choices=1,
        num_proposed=0,
        prompt_targets=(),
        adapter=0,  # they are the model's: one more reason for a guess to be wrong
    )
