"""Speculative decoding: what is guessed, and that no request can tell whether anything was. On the tiny model."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from octavo_engine.config import EngineConfig, SpeculativeConfig
from octavo_engine.errors import ConfigError
from octavo_engine.messages import AddRequest
from octavo_engine.models.checkpoint import read_checkpoint
from octavo_engine.plan import RequestResult, SamplingParams
from octavo_engine.planning import plan_ahead
from octavo_engine.runner import ModelRunner, load_runner
from octavo_engine.scheduler import Scheduler
from octavo_engine.sizing import MemoryPlan
from octavo_engine.speculation import DraftProposer, LookupProposer, Speculation, count_right
from octavo_engine.steps import load_torch_steps

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from octavo_engine.messages import DraftStats
    from octavo_engine.plan import Runner

EAGER = SpeculativeConfig(num_speculative_tokens=4, prompt_lookup_min=1, prompt_lookup_max=3)
BLOCK_SIZE = 8
EOS = 2


def proposer(*, most: int = 4, shortest: int = 2, longest: int = 3) -> LookupProposer:
    config = SpeculativeConfig(num_speculative_tokens=most, prompt_lookup_min=shortest, prompt_lookup_max=longest)
    return LookupProposer(config)


def look_up(token_ids: list[int], most: int, *, shortest: int, longest: int) -> list[int]:
    """What a LookupProposer that has not paused should guess: by looking at everything."""
    for length in range(longest, shortest - 1, -1):
        for end in range(len(token_ids) - 1, length - 1, -1):
            if token_ids[end - length : end] == token_ids[len(token_ids) - length :]:
                tokens = list(token_ids)
                for place in range(end, end + most):
                    tokens.append(tokens[place])
                return tokens[len(token_ids) :]
    return []


@given(
    pieces=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=8),
    most=st.integers(1, 5),
    lengths=st.tuples(st.integers(1, 3), st.integers(0, 2)),
)
def test_guesses_are_what_followed_the_longest_run_of_last_tokens_the_last_time(
    pieces: list[list[int]], most: int, lengths: tuple[int, int]
) -> None:
    shortest, longest = lengths[0], sum(lengths)
    guesses = proposer(most=most, shortest=shortest, longest=longest)
    token_ids: list[int] = []
    for piece in pieces:
        token_ids += piece
        expected = look_up(token_ids, most, shortest=shortest, longest=longest)
        assert list(guesses.propose(token_ids, 9)) == expected
        assert list(guesses.propose(token_ids, 1)) == expected[:1]


def test_a_repetition_that_is_under_way_goes_on() -> None:
    assert proposer(most=7).propose([9, 1, 2, 3, 1, 2], 7) == [3, 1, 2, 3, 1, 2, 3]
    assert proposer(most=3).propose([5, 5, 5, 5], 7) == [5, 5, 5]


def test_a_request_whose_guesses_are_wrong_pauses_for_more_and_more_tokens() -> None:
    guesses = proposer()
    token_ids = [1, 2, 3] * 3
    asked = []
    while len(token_ids) < 200:
        if guesses.propose(token_ids, 4):
            asked.append(len(token_ids))
            guesses.learn(0)
        token_ids.append(token_ids[-3])
    assert [after - before for before, after in pairwise(asked)] == [2, 4, 8, 16, 32, 64, 64]
    assert guesses.propose(token_ids, 4) == ()


def test_one_right_guess_ends_the_pauses() -> None:
    guesses = proposer()
    token_ids = [1, 2, 3] * 9
    for num_right in (0, 0, 1, 0):
        while not guesses.propose(token_ids, 4):
            token_ids.append(token_ids[-3])
        guesses.learn(num_right)
    num_tokens = len(token_ids)
    while not guesses.propose(token_ids, 4):
        token_ids.append(token_ids[-3])
    assert len(token_ids) - num_tokens == 2


def test_a_long_prompt_is_indexed_a_part_at_a_time_to_its_end() -> None:
    guesses = proposer()
    token_ids = list(range(10_000))
    token_ids += token_ids[9000:9003]
    asked = [guesses.propose(token_ids, 1) for _ in range(4)]
    assert asked == [(), (), [9003], [9003]]


def test_a_guess_is_right_if_it_is_drawn_and_all_before_it_are() -> None:
    def rows(*token_ids: int | None) -> list[RequestResult]:
        return [
            RequestResult(error="NaN") if token_id is None else RequestResult(token_id=token_id)
            for token_id in token_ids
        ]

    assert count_right((4, 5), rows(4, 5, 6)) == 2
    assert count_right((4, 5), rows(4, 6, 6)) == 1
    assert count_right((4, 5), rows(3, 5, 6)) == 0
    assert count_right((4, 5), rows(4, 5, None)) == 1
    assert count_right((4, 5), rows(None, 5, 6)) == 0


def test_more_guesses_than_a_step_has_room_for_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"'num_speculative_tokens' 4 .* --max-num-batched-tokens is 4"):
        EngineConfig(
            model="m.gguf",  # type: ignore[arg-type] # it is not looked at
            served_model_names=("m",),
            max_num_seqs=1,
            max_num_batched_tokens=4,
            speculative_config=EAGER,
        )


def run(
    runner: Runner, requests: Sequence[AddRequest], speculation: Speculation | None, **options: Any
) -> tuple[dict[tuple[str, int], dict[str, Any]], DraftStats | None]:
    """The updates of each choice put together, and what became of guesses."""
    defaults: dict[str, Any] = {"num_blocks": 60, "max_num_seqs": 8, "max_num_batched_tokens": 40}
    scheduler = Scheduler(
        block_size=BLOCK_SIZE,
        max_model_len=120,
        eos_token_ids=frozenset({EOS}),
        speculation=speculation,
        **defaults | options,
    )
    answers: dict[tuple[str, int], dict[str, Any]] = {}
    arrivals = iter(requests)
    while True:
        if (request := next(arrivals, None)) is not None:
            scheduler.add(request)
        plan = scheduler.schedule()
        if plan is None:
            return answers, scheduler.stats().drafts
        for update in scheduler.update(plan, runner.execute(plan)):
            answer = answers.setdefault((update.request_id, update.choice), {"tokens": [], "logprobs": []})
            answer["tokens"] += update.token_ids
            answer["logprobs"] += update.logprobs
            answer["end"] = (update.finish_reason, update.error)
        scheduler.check_integrity()


def lookup() -> Speculation:
    return Speculation(lambda: LookupProposer(EAGER))


VOCABULARY = [*map(chr, range(0x21, 0x7F)), "ab", "cd"]  # as many as the tiny model has
TOKENIZER = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": VOCABULARY,
    "tokenizer.ggml.token_type": [1] * len(VOCABULARY),
    "tokenizer.ggml.merges": ["a b", "c d"],
}


def config_of(path: Path, **options: Any) -> EngineConfig:
    """In C++, where the same token has the same logits bit by bit in any step."""
    defaults: dict[str, Any] = {"dtype": "float32", "block_size": BLOCK_SIZE, "kv_cache_memory_bytes": 2**22}
    return EngineConfig(model=path, served_model_names=("tiny",), device="cpu", **defaults | options)


@pytest.fixture
def runner(write_tiny_gguf: Any) -> Runner:
    return load_runner(config_of(write_tiny_gguf()), lambda *_: None).runner


def drafted(path: Path) -> SpeculativeConfig:
    return SpeculativeConfig(num_speculative_tokens=4, model=path)


@pytest.fixture
def write_draft(write_tiny_gguf: Any, tmp_path: Path) -> Any:
    """Writes a draft model as write_tiny_gguf does, beside what that writes next."""

    def write(**changes: Any) -> Path:
        path: Path = write_tiny_gguf(metadata=TOKENIZER | changes.get("metadata", {}), tensors=changes.get("tensors"))
        return path.rename(tmp_path / "draft.gguf")

    return write


SAMPLING = st.fixed_dictionaries(
    {
        "max_tokens": st.integers(1, 40),
        "temperature": st.sampled_from([0.0, 0.0, 0.2, 1.0]),
        "top_p": st.sampled_from([1.0, 0.7]),
        "top_k": st.sampled_from([0, 0, 3]),
        "min_p": st.sampled_from([0.0, 0.2]),
        "repetition_penalty": st.sampled_from([1.0, 1.0, 1.2]),
        "presence_penalty": st.sampled_from([0.0, 0.0, -0.5]),
        "frequency_penalty": st.sampled_from([0.0, 0.0, 0.3]),
        "logit_bias": st.sampled_from([(), (), ((7, 3.0), (EOS, 2.0)), ((11, -100.0),)]),
        "min_tokens": st.sampled_from([0, 0, 5]),
        "num_logprobs": st.sampled_from([None, None, 0, 3]),
        "seed": st.sampled_from([None, 1, 2]),
        "stop_token_ids": st.sampled_from([(), (), (7,), (7, 40)]),
        "ignore_eos": st.booleans(),
    }
)
REQUESTS = st.lists(
    st.tuples(
        st.lists(st.integers(3, 95), min_size=1, max_size=12),
        st.integers(1, 4),
        st.sampled_from([1, 1, 1, 2, 3]),
        SAMPLING,
    ),
    min_size=1,
    max_size=5,
)


def messages_of(requests: list[tuple[list[int], int, int, dict[str, Any]]]) -> list[AddRequest]:
    """What REQUESTS draws."""
    return [
        AddRequest(
            request_id=f"r{number}",
            prompt_token_ids=tuple(piece * times),
            sampling=SamplingParams(**sampling),
            num_choices=num_choices,
        )
        for number, (piece, times, num_choices, sampling) in enumerate(requests)
    ]


@given(requests=REQUESTS, num_blocks=st.sampled_from([16, 20, 60]), enable_prefix_caching=st.booleans())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_request_can_tell_whether_guesses_were_made(
    runner: Runner,
    requests: list[tuple[list[int], int, int, dict[str, Any]]],
    num_blocks: int,
    *,
    enable_prefix_caching: bool,
) -> None:
    messages = messages_of(requests)
    options = {"num_blocks": num_blocks, "enable_prefix_caching": enable_prefix_caching}
    assert run(runner, messages, lookup(), **options)[0] == run(runner, messages, None, **options)[0]


def test_guesses_are_made_and_some_are_right_and_some_wrong(runner: Runner) -> None:
    messages = [
        AddRequest(
            request_id=f"r{number}",
            prompt_token_ids=(5 + number, 9, 30, 41) * 5,
            sampling=SamplingParams(max_tokens=60, temperature=0.3 * (number % 2), seed=number, ignore_eos=True),
        )
        for number in range(6)
    ]
    answers, drafts = run(runner, messages, lookup(), num_blocks=40)
    assert answers == run(runner, messages, None, num_blocks=40)[0]
    assert drafts is not None
    assert 20 < sum(drafts.num_accepted_tokens_per_pos) < drafts.num_draft_tokens
    assert len(drafts.num_accepted_tokens_per_pos) == EAGER.num_speculative_tokens


def test_torch_gives_the_same_greedy_tokens_with_guesses(write_tiny_gguf: Any) -> None:
    path: Path = write_tiny_gguf()
    memory = MemoryPlan(
        available_bytes=0,
        process_bytes=0,
        margin_bytes=0,
        weight_bytes=0,
        work_bytes=0,
        kv_bytes_per_token=0,
        block_size=BLOCK_SIZE,
        num_blocks=60,
        max_model_len=120,
    )
    steps = load_torch_steps(
        read_checkpoint(path), memory, dtype=torch.float32, device=torch.device("cpu"), on_progress=lambda *_: None
    )
    draw = random.Random(3)  # noqa: S311 - test data
    messages = [
        AddRequest(
            request_id=f"r{number}",
            prompt_token_ids=tuple(draw.choices(range(3, 96), k=5)) * 3,
            sampling=SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True),
        )
        for number in range(4)
    ]
    answers, drafts = run(ModelRunner(steps, seed=0), messages, lookup())
    assert drafts is not None
    assert sum(drafts.num_accepted_tokens_per_pos) > 0
    assert answers == run(ModelRunner(steps, seed=0), messages, None)[0]


def greedy_requests() -> list[AddRequest]:
    return [
        AddRequest(
            request_id=f"r{number}",
            prompt_token_ids=(7, 30, 41, 55, 12, 9, 80, 6, 17)[number % 3 :] * 2,
            sampling=SamplingParams(max_tokens=30 + number, temperature=0.0, ignore_eos=True),
            num_choices=3 if number == 2 else 1,
        )
        for number in range(6)
    ]


def test_the_model_as_its_own_draft_is_always_right_whoever_had_its_blocks_before(
    write_tiny_gguf: Any, write_draft: Any
) -> None:
    speculation = drafted(write_draft())
    config = config_of(write_tiny_gguf(metadata=TOKENIZER), speculative_config=speculation)
    progress: list[str] = []
    loaded = load_runner(config, lambda phase, *_: progress.append(phase))
    assert "LoadingDraft" in progress
    answers, drafts = run(
        loaded.runner, greedy_requests(), Speculation(lambda: DraftProposer(speculation)), num_blocks=22
    )
    assert drafts is not None
    assert 50 < sum(drafts.num_accepted_tokens_per_pos) == drafts.num_draft_tokens
    assert answers == run(loaded.runner, greedy_requests(), None, num_blocks=22)[0]


@given(requests=REQUESTS, num_blocks=st.sampled_from([16, 20, 60]), enable_prefix_caching=st.booleans())
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_request_can_tell_whether_another_model_guessed(
    drafting: tuple[Runner, SpeculativeConfig],
    requests: list[tuple[list[int], int, int, dict[str, Any]]],
    num_blocks: int,
    *,
    enable_prefix_caching: bool,
) -> None:
    runner, speculation = drafting
    options = {"num_blocks": num_blocks, "enable_prefix_caching": enable_prefix_caching}
    messages = messages_of(requests)
    guessed, _ = run(runner, messages, Speculation(lambda: DraftProposer(speculation)), **options)
    assert guessed == run(runner, messages, None, **options)[0]


def test_another_models_guesses_are_right_and_wrong(drafting: tuple[Runner, SpeculativeConfig]) -> None:
    runner, speculation = drafting
    answers, drafts = run(runner, greedy_requests(), Speculation(lambda: DraftProposer(speculation)))
    assert drafts is not None
    assert 20 < sum(drafts.num_accepted_tokens_per_pos) < drafts.num_draft_tokens
    assert answers == run(runner, greedy_requests(), None)[0]


@pytest.fixture
def drafting(write_tiny_gguf: Any, write_draft: Any, tiny_llama: Any) -> tuple[Runner, SpeculativeConfig]:
    """The tiny model with a draft that is like it, but not quite."""
    embedding = tiny_llama.state_dict()["model.embed_tokens.weight"]
    noise = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(0))
    speculation = drafted(write_draft(tensors={"token_embd.weight": embedding + 0.05 * noise}))
    config = config_of(write_tiny_gguf(metadata=TOKENIZER), speculative_config=speculation)
    return load_runner(config, lambda *_: None).runner, speculation


@pytest.mark.parametrize(
    ("metadata", "options", "message"),
    [
        ({"tokenizer.ggml.tokens": [*VOCABULARY[:-1], "xy"], "tokenizer.ggml.merges": ["a b"]}, {}, "same vocabulary"),
        ({"llama.context_length": 64}, {}, "trained for 64 tokens: use --max-model-len 64"),
        ({}, {"tensor_parallel_size": 2}, r"cannot be split over --tensor-parallel-size 2 .* \"ngram\""),
    ],
)
def test_a_draft_model_that_cannot_guess_is_refused_before_a_weight_is_read(
    write_tiny_gguf: Any, write_draft: Any, metadata: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    speculation = drafted(write_draft(metadata=metadata))
    config = config_of(write_tiny_gguf(metadata=TOKENIZER), speculative_config=speculation, **options)
    progress: list[str] = []
    with pytest.raises(ConfigError, match=message):
        load_runner(config, lambda phase, *_: progress.append(phase))
    assert progress == []


def test_a_draft_model_is_in_the_plan(write_tiny_gguf: Any, write_draft: Any) -> None:
    speculation = drafted(write_draft())
    path = write_tiny_gguf(metadata=TOKENIZER)
    plan = plan_ahead(config_of(path, speculative_config=speculation))
    alone = plan_ahead(config_of(path))
    assert plan is not None
    assert alone is not None
    assert plan.memory.kv_bytes_per_token == 2 * alone.memory.kv_bytes_per_token
    assert plan.memory.weight_bytes == 2 * alone.memory.weight_bytes
    assert "draft.gguf, 0.1 M parameters, in float32" in plan.describe()
    assert plan.facts()["draftModel"] == "draft.gguf"
