"""The state after a prompt: that of transformers, by torch and by the C++ library, alone and beside generation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from octavo_engine.config import EngineConfig
from octavo_engine.messages import AddRequest
from octavo_engine.plan import SamplingParams, ScheduledRequest, StepPlan
from octavo_engine.runner import load_runner
from octavo_engine.scheduler import Scheduler

if TYPE_CHECKING:
    from pathlib import Path

    from octavo_engine.messages import RequestUpdate
    from octavo_engine.plan import Runner

EMBED = SamplingParams(max_tokens=1, temperature=0, embed=True)
DRAW = SamplingParams(max_tokens=3, temperature=1, seed=1, ignore_eos=True)
PROMPT = tuple(range(3, 40))


def load(path: Path, *, native: bool = True) -> Runner:
    config = EngineConfig(
        model=path,
        served_model_names=("tiny",),
        device="cpu",
        dtype="float32" if native else "float16",  # which the C++ library does not compute in
        block_size=8,
        kv_cache_memory_bytes=2**22,
    )
    return load_runner(config, lambda *_: None).runner


def run(runner: Runner, *requests: AddRequest) -> dict[tuple[str, int], list[RequestUpdate]]:
    """Every update, by request and choice, with prompts cut into steps of 16 tokens."""
    scheduler = Scheduler(
        block_size=8,
        num_blocks=60,
        max_model_len=120,
        max_num_seqs=8,
        max_num_batched_tokens=16,
        eos_token_ids=frozenset(),
    )
    for request in requests:
        scheduler.add(request)
    updates: dict[tuple[str, int], list[RequestUpdate]] = {}
    while (plan := scheduler.schedule()) is not None:
        for update in scheduler.update(plan, runner.execute(plan)):
            updates.setdefault((update.request_id, update.choice), []).append(update)
        scheduler.check_integrity()
    return updates


@pytest.mark.parametrize(("native", "tolerance"), [(True, 1e-4), (False, 0.1)])
def test_the_state_is_the_last_one_of_transformers(
    write_tiny_gguf: Any, tiny_llama: Any, *, native: bool, tolerance: float
) -> None:
    updates = run(
        load(write_tiny_gguf(), native=native),
        AddRequest(request_id="drawn", prompt_token_ids=PROMPT[:9], sampling=DRAW, num_choices=2),
        AddRequest(request_id="embedded", prompt_token_ids=PROMPT, sampling=EMBED),
    )
    (update,) = updates["embedded", 0]
    assert (update.token_ids, update.finish_reason, update.error) == ((), "stop", None)
    with torch.inference_mode():
        expected = tiny_llama.model(torch.tensor([PROMPT])).last_hidden_state[0, -1]
    state = torch.from_numpy(np.frombuffer(update.state, dtype="<f4").copy())
    torch.testing.assert_close(state, expected, atol=tolerance, rtol=tolerance)


def test_who_generates_beside_it_gets_what_it_gets_alone(write_tiny_gguf: Any) -> None:
    runner = load(write_tiny_gguf())
    drawn = AddRequest(request_id="drawn", prompt_token_ids=PROMPT[:9], sampling=DRAW, num_choices=3)
    embedded = AddRequest(request_id="embedded", prompt_token_ids=PROMPT[:5], sampling=EMBED)
    alone, together = run(runner, drawn), run(runner, embedded, drawn, embedded_again(embedded))
    assert {key: together[key] for key in alone} == alone
    assert together["embedded", 0][0].state == together["again", 0][0].state


def embedded_again(request: AddRequest) -> AddRequest:
    return AddRequest(request_id="again", prompt_token_ids=request.prompt_token_ids, sampling=EMBED)


def test_a_state_that_is_not_a_number_is_an_error_of_that_request(write_tiny_gguf: Any, tiny_llama: Any) -> None:
    embedding = tiny_llama.model.embed_tokens.weight.detach().clone()
    embedding[7] = float("nan")
    runner = load(write_tiny_gguf(tensors={"token_embd.weight": embedding}))
    good = ScheduledRequest("good", (5,), 0, (0,), needs_token=True, sampling=EMBED)
    bad = ScheduledRequest("bad", (7,), 0, (1,), needs_token=True, sampling=EMBED)
    results = runner.execute(StepPlan(0, (good, bad))).results
    assert [result.error is None for result in results] == [True, False]
    assert [result.state is None for result in results] == [False, True]
