"""`python -m octavo_bench.speculation`: how much sooner answers end with guesses by prompt lookup, without a server.

The demo model by its own file, each work in turn without guesses and with several numbers of them: a text that repeats
one in the prompt, and a free one, for one user and for eight. Printed is the median over rounds of the time of
generation without guesses over that with them in the same round, on the wall and of the processors, which other
programs disturb less, and how many guesses were right. The tokens are checked to be the same.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from octavo_cluster.model import demo_model
from octavo_engine.config import EngineConfig, SpeculativeConfig
from octavo_engine.messages import AddRequest
from octavo_engine.plan import SamplingParams
from octavo_engine.runner import load_runner
from octavo_engine.scheduler import Scheduler
from octavo_engine.speculation import LookupProposer, Speculation
from octavo_engine.text.load import load_tokenizer
from octavo_engine.text.tokenizer import Segment

if TYPE_CHECKING:
    from octavo_engine.messages import DraftStats
    from octavo_engine.plan import LoadedModel

# ruff: noqa: T201 - printing is what this is for

_ROUNDS: Final = 5
_NUM_GUESSES: Final = (1, 3, 7)
_TOKENS: Final = 128
_TEXT: Final = Path(__file__).with_name("text.txt").read_text(encoding="utf-8").split("\n\n")[0]
_COPY: Final = f"{_TEXT}\n\n{_TEXT}\n\n"  # of which a third copy follows
_FREE: Final = "<|im_start|>user\nTell me a story about a ferry.<|im_end|>\n<|im_start|>assistant\n"
_GREEDY: Final = SamplingParams(max_tokens=_TOKENS, temperature=0.0, ignore_eos=True)
_RANDOM: Final = SamplingParams(max_tokens=_TOKENS, temperature=0.8, seed=1, ignore_eos=True)
_WORKS: Final = (
    ("repeated, 1 user", _COPY, _GREEDY, 1),
    ("repeated, 8 users", _COPY, _GREEDY, 8),
    ("free, 1 user", _FREE, _RANDOM, 1),
    ("free, 8 users", _FREE, _RANDOM, 8),
)


def main() -> None:
    """Measure and print."""
    path = demo_model()
    tokenizer = load_tokenizer(path)
    config = EngineConfig(
        model=path, served_model_names=("m",), device="cpu", max_model_len=1024, kv_cache_memory_bytes=2**28
    )
    model = load_runner(config, lambda *_: None)
    for name, text, sampling, num_users in _WORKS:
        prompt = tuple(tokenizer.encode([Segment(text, control_tokens=True)]))
        ratios: dict[int, list[tuple[float, float]]] = {number: [] for number in _NUM_GUESSES}
        told: dict[int, str] = {}
        for _ in range(_ROUNDS):
            alone, expected, _ = generate(model, prompt, sampling, num_users, 0)
            for number in _NUM_GUESSES:
                seconds, tokens, drafts = generate(model, prompt, sampling, num_users, number)
                assert tokens == expected, "guesses changed an answer"
                assert drafts is not None
                ratios[number].append((alone[0] / seconds[0], alone[1] / seconds[1]))
                right = sum(drafts.num_accepted_tokens_per_pos)
                told[number] = f"{right} of {drafts.num_draft_tokens} guesses right"
        for number, pairs in ratios.items():
            wall, processor = (statistics.median(column) for column in zip(*pairs, strict=True))
            print(f"{name}, {number} guesses: {wall:.2f} x, {processor:.2f} x by processor time, {told[number]}")


def generate(
    model: LoadedModel, prompt: tuple[int, ...], sampling: SamplingParams, num_users: int, num_guesses: int
) -> tuple[tuple[float, float], dict[str, list[int]], DraftStats | None]:
    """Seconds from the first token of all to the last, on the wall and of processors, the tokens, and the guesses."""
    lookup = SpeculativeConfig(num_speculative_tokens=max(1, num_guesses), prompt_lookup_min=2, prompt_lookup_max=4)
    scheduler = Scheduler(
        num_blocks=model.facts.num_blocks,
        block_size=model.facts.block_size,
        max_model_len=model.facts.max_model_len,
        max_num_seqs=64,
        max_num_batched_tokens=512,
        eos_token_ids=model.eos_token_ids,
        speculation=Speculation(lambda: LookupProposer(lookup)) if num_guesses else None,
    )
    tokens: dict[str, list[int]] = {f"user {number}": [] for number in range(num_users)}
    for number, name in enumerate(tokens):
        # Each begins with a token of its own, so that none finds another's KV.
        scheduler.add(AddRequest(request_id=name, prompt_token_ids=(100 + number, *prompt), sampling=sampling))
    started: tuple[float, float] | None = None
    while (plan := scheduler.schedule()) is not None:
        if started is None and all(tokens.values()):
            started = time.perf_counter(), time.process_time()
        for update in scheduler.update(plan, model.runner.execute(plan)):
            tokens[update.request_id] += update.token_ids
    assert started is not None
    seconds = time.perf_counter() - started[0], time.process_time() - started[1]
    return seconds, tokens, scheduler.stats().drafts


if __name__ == "__main__":
    main()
