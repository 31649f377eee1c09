"""How far an engine's probabilities are from float32's, on a fixed text that it is made to follow.

The text is cut into windows. For each token of a window but the first, the engine tells its log probability after those
before it, and those of the likeliest NUM_TOP: all of a window at once where its server has prompt_logprobs, else one
after the other, made to generate the text's own token. Several requests are sent at once, so that the numbers come from
the code paths that the speeds come from.

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
    divergences, logprobs = [], []

    async def user(window: int) -> None:
        tokens = truth.token_ids[window].tolist()
        position = 1
        for body in server.engine.dialect.bodies(tokens, NUM_TOP):
            for told in await _ask(server.url, server.engine.dialect, body, tokens[position:]):
                known = {**told.top, tokens[position]: told.logprob}
                divergences.append(coarse_kl(truth.logprobs[window, position - 1], known))
                logprobs.append(told.logprob)
                position += 1
        assert position == len(tokens)

    await asyncio.gather(*map(user, range(WINDOWS)))
    return Quality(len(logprobs), float(np.mean(divergences)), math.exp(-float(np.mean(logprobs))))


async def _ask(url: str, dialect: Dialect, body: dict[str, Any], tokens: list[int]) -> list[NextToken]:
    answer = await client.post(url + dialect.path, body)
    try:
        return dialect.read(answer, tokens)
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
