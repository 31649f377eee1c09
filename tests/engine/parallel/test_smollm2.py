"""The real model, which has nine heads and three KV heads, on three ranks: as on one, and served by its command."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch

from octavo_engine.models.checkpoint import read_checkpoint
from octavo_engine.plan import SamplingParams, ScheduledRequest, StepPlan
from octavo_engine.ranks import Ranks
from octavo_engine.runner import ModelRunner
from octavo_engine.sizing import MemoryPlan
from octavo_engine.steps import load_torch_steps

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.engine.conftest import Serve

pytestmark = [pytest.mark.model, pytest.mark.timeout(600)]

CPU = torch.device("cpu")
GREEDY = SamplingParams(max_tokens=1, temperature=0.0)
NUM_TOKENS = 16
PROMPT = (504, 3575, 282, 4649, 314, 253, 2079, 28, 1216, 4, 30, 260)  # any tokens
MEMORY = MemoryPlan(
    available_bytes=0,
    process_bytes=0,
    margin_bytes=0,
    weight_bytes=0,
    work_bytes=0,
    kv_bytes_per_token=0,
    block_size=8,
    num_blocks=8,
    max_model_len=64,
)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    """Three of them, of which this process is the first."""
    num_threads = torch.get_num_threads()
    ranks = Ranks(3, CPU)
    yield ranks
    ranks.close()
    torch.set_num_threads(num_threads)


def answer(runner: ModelRunner) -> tuple[list[int | None], torch.Tensor]:
    """Greedy tokens after PROMPT, and the logits after each of it and of them."""
    request = ScheduledRequest("a", PROMPT, 0, tuple(range(8)), needs_token=True, sampling=GREEDY)
    tokens: list[int | None] = []
    logits = [runner.forward(StepPlan(0, (request,)), every_token=True)]
    for step in range(NUM_TOKENS):
        (result,) = runner.execute(StepPlan(step, (request,))).results
        tokens.append(result.token_id)
        assert result.token_id is not None
        position = len(PROMPT) + step
        request = ScheduledRequest(
            "a", (result.token_id,), position, request.block_ids, needs_token=True, sampling=GREEDY
        )
        logits.append(runner.forward(StepPlan(0, (request,)), every_token=True))
    return tokens, torch.cat(logits).float()


def divergence(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest KL divergence of a row."""
    return (
        torch.nn.functional.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="none")
        .sum(-1)
        .max()
        .item()
    )


def test_three_ranks_say_what_one_says(smollm2_path: Path, ranks: Ranks) -> None:
    checkpoint = read_checkpoint(smollm2_path)
    expected: torch.Tensor | None = None
    for dtype in (torch.float32, torch.bfloat16):
        together = ModelRunner(
            ranks.load(checkpoint, MEMORY, dtype=dtype, num_threads=1, on_progress=lambda *_: None), seed=0
        )
        tokens, logits = answer(together)
        if expected is None:
            alone = load_torch_steps(checkpoint, MEMORY, dtype=dtype, device=CPU, on_progress=lambda *_: None)
            expected_tokens, expected = answer(ModelRunner(alone, seed=0))
            assert tokens == expected_tokens
            assert (logits - expected).abs().max().item() < 1e-3, "of logits up to 30"
        else:
            assert divergence(logits[: len(PROMPT)], expected[: len(PROMPT)]) < 0.02


def test_it_is_served_by_three_ranks(serve: Serve, smollm2_path: Path, tmp_path: Path) -> None:
    options = ("--device", "cpu", "--tensor-parallel-size", "3", "--max-model-len", "256", "--max-num-seqs", "4")
    with serve(smollm2_path, tmp_path / "log", *options, "--served-model-name", "smollm2") as served:
        with served.sync_client() as client:
            said = client.chat.completions.create(
                model="smollm2",
                messages=[{"role": "user", "content": "Where is the Eiffel Tower?"}],
                temperature=0,
                max_tokens=40,
            )
        assert "Paris" in (said.choices[0].message.content or "")
        assert "3 x cpu" in served.log.read_text()


def test_a_size_that_does_not_divide_it_is_refused_before_a_weight_is_read(smollm2_path: Path) -> None:
    command = [sys.executable, "-m", "octavo_engine", "serve", str(smollm2_path), "--port", "0"]
    refused = subprocess.run(
        [*command, "--tensor-parallel-size", "2"], capture_output=True, text=True, check=False, timeout=120
    )
    assert refused.returncode == 1
    assert "2 devices cannot share" in refused.stderr
    assert "9 query heads, 3 KV heads" in refused.stderr
    assert "use --tensor-parallel-size 1 or 3" in refused.stderr
