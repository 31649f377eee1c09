"""How far an engine's probabilities are from float32's, on a fixed text that it is made to follow.

The text is cut into windows. For each position of each window the engine gets the tokens so far as a prompt and is made
to generate the text's own next token; it tells that token's log probability and those of the likeliest NUM_TOP. All
engines are asked in the same way, through their servers, with as many requests at once as the busiest cell has, so that
the numbers come from the code paths that the speeds come from.

Two figures come of it:

- perplexity of the text: exp of the mean negative log probability of its tokens;
- mean KL divergence of the engine's distribution from the reference's, in nats. An engine does not tell all of its
  distribution, so both are made coarser in the same way first: the told tokens, the text's own among them, stay, and
  all others become one. That never makes a divergence larger (data processing inequality), so the figure is a lower
  bound, for every engine alike.

The reference is transformers in float32 on the numbers that Octavo's file holds. An engine that quantises further than
that file pays for it here.
"""

from __future__ import annotations

import asyncio
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from octavo_bench import client
from octavo_bench.engines import NUM_USERS
from octavo_cluster import shell

if TYPE_CHECKING:
    from collections.abc import Mapping

    from octavo_bench.engines import Dialect, NextToken, Server
    from octavo_bench.peers import Weights

TEXT: Final = Path(__file__).with_name("text.txt")
WINDOWS: Final = 8
WINDOW: Final = 126  # tokens; 8 windows have 1,000 positions with a next token
NUM_TOP: Final = 20  # the most that OpenAI's API, and so every engine, gives


@dataclass(frozen=True)
class Reference:
    """What float32 says."""

    token_ids: np.ndarray  # int64 [WINDOWS, WINDOW]
    logprobs: np.ndarray  # float32 [WINDOWS, WINDOW - 1, V]

    @property
    def perplexity(self) -> float:
        """Of the fixed text."""
        targets = self.token_ids[:, 1:, None]
        return math.exp(-float(np.take_along_axis(self.logprobs, targets, axis=-1).mean(dtype=np.float64)))


@dataclass(frozen=True)
class Quality:
    """What one engine says of the fixed text."""

    num_tokens: int
    kl: float  # mean, nats
    perplexity: float


def reference(weights: Weights) -> Reference:
    """Compute it, or take it from the cache if it is newer than the text."""
    path = weights.reference_logprobs
    if not path.exists() or path.stat().st_mtime < TEXT.stat().st_mtime:
        shell.run(
            ["nice", "-n", "10", sys.executable, "-m", "octavo_bench.reference", weights.transformers, path],
            env=dict(os.environ),
        )
    return Reference(np.load(path.with_suffix(".tokens.npy")), np.load(path, mmap_mode="r"))


async def measure(server: Server, truth: Reference) -> Quality:
    """Ask an engine about every position.

    Raises:
        RequestFailed: it does not answer, or gives no log probabilities.
    """
    places = iter([(window, position) for position in range(1, WINDOW) for window in range(WINDOWS)])
    dialect, divergences, logprobs = server.engine.dialect, [], []

    async def user() -> None:
        for window, position in places:
            tokens = truth.token_ids[window]
            told = await _ask(server.url, dialect, tokens[:position].tolist(), int(tokens[position]))
            known = {**told.top, int(tokens[position]): told.logprob}
            divergences.append(coarse_kl(truth.logprobs[window, position - 1], known))
            logprobs.append(told.logprob)

    await asyncio.gather(*(user() for _ in range(NUM_USERS)))
    return Quality(len(logprobs), float(np.mean(divergences)), math.exp(-float(np.mean(logprobs))))


async def _ask(url: str, dialect: Dialect, prompt: list[int], target: int) -> NextToken:
    answer: dict[str, Any] = await client.post(url + dialect.path, dialect.body(prompt, target, NUM_TOP))
    try:
        return dialect.read(answer)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise client.RequestFailed(f"{url}: no log probabilities in {str(answer)[:300]}") from error


def coarse_kl(reference_logprobs: np.ndarray, told: Mapping[int, float]) -> float:
    """KL(reference || engine) in nats, with every token that the engine told nothing of taken as one.

    Args:
        reference_logprobs: float32 [V].
        told: token ids -> log probabilities by the engine.
    """
    ids = np.array(list(told))
    ours = np.array(list(told.values()), dtype=np.float64)
    theirs = reference_logprobs[ids].astype(np.float64)
    rest, reference_rest = (max(1 - float(np.exp(known).sum()), 1e-12) for known in (ours, theirs))
    within = float((np.exp(theirs) * (theirs - ours)).sum())
    return within + reference_rest * math.log(reference_rest / rest)
