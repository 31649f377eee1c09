"""Which prompt computes how many tokens in a step.

Called by the scheduler (scheduler.py) with the running requests that are more than one token behind; mutates none of
them, and knows nothing of blocks or of the step's other requests but their number.

Shares are counted in work: one for the linear layers of a token, and one more for each `positions_a_token` positions
that it looks back at. On a GPU a step's time hardly depends on either until its processors are filled, so there a token
is one unit of work, wherever it stands (`positions_a_token` is None). On a CPU a step takes as long as its work: a
token at position 7,000 of SmolLM2 takes ten times as long as the first, and without that count a step in the middle of
a long prompt would hold up everybody else for as much longer.

A step's budget of work goes to the shortest remaining first, of one priority, as far as they can be finished. If any
can, the others wait, but for the first in order, which is sure of one part in FIRST_PARTS and of one token. If none
can, the step is filled up with them.

On a CPU, prefills beside D decodes get PACED_WORK and PACED_WORK_A_DECODE * D at most, so that the decodes wait for
about three times what they need by themselves. Of this little, the first in order is sure of one part in
PACED_FIRST_PARTS. On a GPU more steps would cost more than they bring.

So a long prompt gets what short ones leave, neither makes the other's steps long, and nobody starves. With B =
`max_num_batched_tokens`, S = `max_num_seqs`, and F = ceil((B - S + 1) / FIRST_PARTS), paced at most
PACED_WORK / PACED_FIRST_PARTS:

- Long prompts cannot hold up short ones. Those that fit into what the decodes and F leave (and pacing allows) are
  computed in the step that admits them, and that step computes little of longer prompts beside them. So a short prompt
  waits for the step under way, and then for one that is hardly longer than its own.
- Short prompts cannot hold up long ones: the first unfinished prompt in order computes at least F in every step, and at
  least one token. Once admitted, a prompt is done after at most the sum, over itself and the unfinished prompts before
  it in order, of the steps that each needs at that rate, however many of its priority arrive later.
- Prompts whose logprobs are asked for take logits after each token: together at most NUM_PROMPT_ROWS in a step and one
  more for each free seat, of which the first in order is sure of half of the former. They find nothing in the prefix
  cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from typing import TYPE_CHECKING

from octavo_engine.sizing import NUM_PROMPT_ROWS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from octavo_engine.request import Request

FIRST_PARTS = 16
PACED_WORK = 16
PACED_WORK_A_DECODE = 2
PACED_FIRST_PARTS = 4


@dataclass(frozen=True, slots=True)
class PrefillRule:
    """How the prompts of a step are chosen, for one model on one machine."""

    positions_a_token: int | None  # see LoadedModel

    def share(
        self, prefills: Sequence[Request], budget: int, num_decodes: int, num_free_seats: int
    ) -> tuple[list[tuple[Request, int]], int]:
        """Share a step's work among the prefills.

        Args:
            prefills: in order, at least one.
            budget: tokens that the step has room for, > 0; no more work than that is shared.
            num_decodes: requests that decode in the same step.
            num_free_seats: answers that could run besides; each could have taken logits.

        Returns:
            (request, number of its next tokens) of those that compute any, and the work that is left.
        """
        parts = FIRST_PARTS
        if num_decodes and self.positions_a_token is not None:
            budget = min(budget, PACED_WORK + PACED_WORK_A_DECODE * num_decodes)
            parts = PACED_FIRST_PARTS
        first = prefills[0]
        sure = min(first.num_uncomputed_tokens, max(1, self.reach(first.num_computed_tokens, -(-budget // parts))))
        sure_work = self.work(first.num_computed_tokens, sure)
        budget -= sure_work
        sure_rows = min(sure, NUM_PROMPT_ROWS // 2) if first.tells_prompt else 0
        num_rows = NUM_PROMPT_ROWS + num_free_seats - sure_rows
        any_finishes = False
        shares = []
        for request in sorted(prefills, key=self._remaining):
            own, own_work, own_rows = (sure, sure_work, sure_rows) if request is first else (0, 0, 0)
            room = max(own, self.reach(request.num_computed_tokens, budget + own_work))
            if request.tells_prompt:
                room = min(room, num_rows + own_rows)
            if request.num_uncomputed_tokens <= room:
                num_tokens = request.num_uncomputed_tokens
                any_finishes = True
            else:
                num_tokens = min(own, room) if any_finishes else room
            if num_tokens == 0:
                continue
            budget -= self.work(request.num_computed_tokens, num_tokens) - own_work
            num_rows -= num_tokens - own_rows if request.tells_prompt else 0
            shares.append((request, num_tokens))
        return shares, max(0, budget)

    def _remaining(self, request: Request) -> tuple[int, int]:
        return request.priority, self.work(request.num_computed_tokens, request.num_uncomputed_tokens)

    def work(self, start: int, num_tokens: int) -> int:
        """The work of so many tokens from position `start` on, rounded up: the sum of 1 + position / P."""
        if self.positions_a_token is None:
            return num_tokens
        period = self.positions_a_token
        begin, end = start + period, start + num_tokens + period
        return -(-(end * end - begin * begin) // (2 * period))

    def reach(self, start: int, work: int) -> int:
        """The most tokens from position `start` on that are no more than so much work."""
        if self.positions_a_token is None or work <= 0:
            return max(0, work)
        period = self.positions_a_token
        begin = start + period
        return isqrt(begin * begin + 2 * period * work) - begin
