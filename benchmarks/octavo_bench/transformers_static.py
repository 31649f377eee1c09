"""transformers' generate on the spread work in static batches: what serving looks like without an engine.

    python -m octavo_bench.transformers_static HF_FOLDER DTYPE < jobs.json

Reads a list of [prompt token ids, number of tokens wanted], takes 32 at a time, pads the prompts on the left and
generates until the longest answer of the batch is done, as a static batch must. Counts only the tokens that were wanted
and prints {"tokens", "seconds"}. No server and no client stand between: that favours it.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM

_BATCH = 32


def main() -> None:
    """Generate for all jobs and print how long it took."""
    folder, dtype = sys.argv[1], sys.argv[2]
    jobs: list[tuple[list[int], int]] = json.load(sys.stdin)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    generate(model, [(prompt, 4) for prompt, _ in jobs[:2]])
    started = time.perf_counter()
    for first in range(0, len(jobs), _BATCH):
        generate(model, jobs[first : first + _BATCH])
    seconds = time.perf_counter() - started
    print(json.dumps({"tokens": sum(wanted for _, wanted in jobs), "seconds": seconds}))  # noqa: T201


def generate(model: Any, jobs: list[tuple[list[int], int]]) -> None:
    """One static batch, greedily."""
    width = max(len(prompt) for prompt, _ in jobs)
    prompts = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt, _ in jobs])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt, _ in jobs])
    longest = max(wanted for _, wanted in jobs)
    with torch.inference_mode():
        model.generate(
            prompts,
            attention_mask=mask,
            do_sample=False,
            min_new_tokens=longest,
            max_new_tokens=longest,
            pad_token_id=0,
        )


if __name__ == "__main__":
    main()
