"""How a plan is laid out as tensors."""

from __future__ import annotations

import pytest
import torch

from octavo_engine.batch import build_step
from octavo_engine.plan import SamplingParams, ScheduledRequest, StepPlan

SAMPLING = SamplingParams(max_tokens=1)
CPU = torch.device("cpu")


def test_tokens_of_all_requests_become_one_sequence_with_their_slots() -> None:
    decode = ScheduledRequest("a", (11,), 9, (5, 2, 7), needs_token=True, sampling=SAMPLING)
    piece = ScheduledRequest("b", (21, 22, 23), 2, (3, 0), needs_token=False, sampling=SAMPLING)
    prompt = ScheduledRequest("c", (31, 32), 0, (9,), needs_token=True, sampling=SAMPLING)

    step = build_step(StepPlan(0, (decode, piece, prompt)), block_size=4, device=CPU)

    assert step.input_ids.tolist() == [11, 21, 22, 23, 31, 32]
    assert step.positions.tolist() == [9, 2, 3, 4, 0, 1]
    assert step.attention.slot_mapping.tolist() == [7 * 4 + 1, 3 * 4 + 2, 3 * 4 + 3, 0, 9 * 4, 9 * 4 + 1]
    assert step.attention.block_tables[:, 0].tolist() == [5, 3, 9]
    assert step.attention.block_tables[0].tolist() == [5, 2, 7]
    assert step.attention.block_tables[1, :2].tolist() == [3, 0]
    assert step.attention.query_lens == (1, 3, 2)
    assert step.attention.context_lens == (10, 5, 2)
    assert step.logits_rows.tolist() == [0, 5]  # of those that need a token


def test_a_guess_has_a_row_of_its_own_after_the_newest_token() -> None:
    piece = ScheduledRequest("a", (21, 22), 0, (3,), needs_token=False, sampling=SAMPLING)
    guess = ScheduledRequest("b", (11, 12, 13), 9, (5, 2, 7), needs_token=True, sampling=SAMPLING, num_proposed=2)
    three = ScheduledRequest("c", (14,), 9, (5, 2, 7), needs_token=True, sampling=SAMPLING, num_choices=3)
    plan = StepPlan(0, (piece, guess, three))
    assert build_step(plan, block_size=4, device=CPU).logits_rows.tolist() == [2, 3, 4, 5]
    assert guess.proposed == (12, 13)
    assert [request.num_results for request in plan.requests] == [0, 3, 3]


def test_a_step_in_which_nobody_needs_a_token_has_no_rows() -> None:
    piece = ScheduledRequest("b", (21, 22), 0, (3,), needs_token=False, sampling=SAMPLING)
    assert build_step(StepPlan(0, (piece,)), block_size=4, device=CPU).logits_rows.tolist() == []


def test_a_block_table_too_short_for_the_tokens_is_a_bug_of_the_caller() -> None:
    request = ScheduledRequest("b", (21, 22), 3, (3,), needs_token=False, sampling=SAMPLING)
    with pytest.raises(AssertionError, match="too short"):
        build_step(StepPlan(0, (request,)), block_size=4, device=CPU)
