"""Choosing tokens on the GPU by the rules of sampler.py, without a sort and without a look by the host.

Tokens are in sampler.py's order: the most likely first, of equal ones the lower id. Each rule keeps a beginning of it:
min-p those near the first, top-k the first k, top-p the first whose mass before them is under its share of what the
others left. The last token that is kept is found by bisection over the bits of the logits, which can be brought into
the order of the numbers; each of its 32 steps is a pass over the row, and rows that do not ask for a rule skip it.

Of what is kept a token is drawn by the Gumbel-max trick, which has the same distribution as sampler.py's inversion, not
the same draws: with a random number for each token by Philox (Salmon et al. 2011), a function of the row's seed and the
token alone, so that no other row of the batch has a part in it.

Shapes: S rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
import triton
import triton.language as tl

from octavo_engine.kernels.launch import Kernel, Target, Variant

if TYPE_CHECKING:
    from collections.abc import Iterator

FAILED: Final = -1  # for a row that is not finite
_BLOCK: Final = 4096


@triton.jit
def _order_keys(logits):
    """uint32 in the order of float32 numbers; the two zeros are equal."""
    bits = (logits + 0.0).to(tl.uint32, bitcast=True)
    return tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def _count_and_mass(row, size, key, highest, inverse, least, BLOCK: tl.constexpr):
    """Of the tokens with `key` or a higher one, and weights of `least` or more: how many they are, and their mass."""
    count = 0
    mass = 0.0
    for start in range(0, size, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        logits = tl.load(row + ids, mask=ids < size, other=float("-inf"))
        weights = tl.exp((logits - highest) * inverse)
        is_counted = (_order_keys(logits) >= key) & (weights >= least) & (ids < size)
        count += tl.sum(is_counted.to(tl.int32), 0)
        mass += tl.sum(tl.where(is_counted, weights, 0.0), 0)
    return count, mass


@triton.jit
def _last_of_top_k(row, size, top_k, highest, inverse, BLOCK: tl.constexpr):
    """The key of the k-th token, and how many of those with this key are among the first k."""
    key = tl.full([], 0, tl.uint32)
    for step in range(32):
        candidate = key | (tl.full([], 0x80000000, tl.uint32) >> step)
        count, _ = _count_and_mass(row, size, candidate, highest, inverse, 0.0, BLOCK)
        key = tl.where(count >= top_k, candidate, key)
    before, _ = _count_and_mass(row, size, key + 1, highest, inverse, 0.0, BLOCK)
    return key, top_k - before


@triton.jit
def _weight_of(key, highest, inverse):
    """The weight of a token by its key."""
    bits = tl.where(key >= 0x80000000, key ^ 0x80000000, key ^ 0xFFFFFFFF)
    return tl.exp((bits.to(tl.float32, bitcast=True) - highest) * inverse)


@triton.jit
def _last_of_top_p(row, size, top_p, key, ties, highest, inverse, least, BLOCK: tl.constexpr):
    """The key of the last token of the nucleus of what is left up to `key`, and how many with this key are in it."""
    weight = _weight_of(key, highest, inverse)
    _, total = _count_and_mass(row, size, key + 1, highest, inverse, least, BLOCK)
    total += tl.where(weight >= least, ties * weight, 0.0)
    wanted = top_p * total
    last = tl.full([], 0, tl.uint32)
    for step in range(32):
        candidate = last | (tl.full([], 0x80000000, tl.uint32) >> step)
        _, mass = _count_and_mass(row, size, candidate, highest, inverse, least, BLOCK)
        last = tl.where((candidate <= key) | (mass >= wanted), candidate, last)
    _, before = _count_and_mass(row, size, last + 1, highest, inverse, least, BLOCK)
    needed = tl.ceil((wanted - before) / _weight_of(last, highest, inverse))
    return last, tl.where(last == key, tl.minimum(ties, needed), needed)


@triton.jit
def _draw(row, size, seed, key, ties, highest, inverse, least, BLOCK: tl.constexpr):
    """Draw one of the tokens before `key`, and the first `ties` that have it."""
    best = float("-inf")
    token = 0
    num_ties = 0
    for start in range(0, size, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        logits = tl.load(row + ids, mask=ids < size, other=float("-inf"))
        keys = _order_keys(logits)
        scores = (logits - highest) * inverse
        is_tie = ((keys == key) & (ids < size)).to(tl.int32)
        places = num_ties + tl.cumsum(is_tie, 0) - is_tie
        num_ties += tl.sum(is_tie, 0)
        weights = tl.exp(scores)
        is_kept = ((keys > key) | ((keys == key) & (places < ties))) & (weights >= least) & (weights > 0) & (ids < size)
        # 1 - u is uniform too; u has its finest steps near 0, where the logarithm of 1 - u is as good as -u.
        uniform = tl.randint(seed, ids).to(tl.uint32, bitcast=True).to(tl.float32) * 2.3283064e-10 + 1.1641532e-10
        exponential = tl.where(uniform < 0.001, uniform + 0.5 * uniform * uniform, -tl.log(1.0 - uniform))
        scores = tl.where(is_kept, scores - tl.log(exponential), float("-inf"))
        here = tl.max(scores, 0)
        first = tl.min(tl.where(scores == here, ids, size), 0)
        token = tl.where(here > best, first, token)
        best = tl.maximum(best, here)
    return token


@triton.jit(do_not_specialize=["size16", "stride16"])
def _sample(
    tokens,
    logprobs,
    logits,
    raw,
    inverse_temperatures,
    top_ks,
    top_ps,
    min_ps,
    seeds,
    size16,
    stride16,
    BLOCK: tl.constexpr,
):
    """One row a program."""
    which = tl.program_id(0)
    size = size16 * 16
    offset = which.to(tl.int64) * stride16 * 16
    row = logits + offset
    inverse = tl.load(inverse_temperatures + which)
    top_k = tl.load(top_ks + which)
    top_p = tl.load(top_ps + which)
    least = tl.load(min_ps + which)

    highest = float("-inf")
    token = 0
    num_bad = 0
    for start in range(0, size, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        numbers = tl.load(row + ids, mask=ids < size, other=float("-inf"))
        is_bad = (numbers != numbers) | (numbers == float("inf"))  # noqa: PLR0124 - NaN differs from itself
        num_bad += tl.sum(is_bad.to(tl.int32), 0)
        numbers = tl.where(is_bad, float("-inf"), numbers)
        here = tl.max(numbers, 0)
        first = tl.min(tl.where(numbers == here, ids, size), 0)
        token = tl.where(here > highest, first, token)
        highest = tl.maximum(here, highest)
    is_good = (num_bad == 0) & (highest > float("-inf"))

    if is_good & (inverse > 0):
        key = tl.full([], 0, tl.uint32)
        ties = size
        if (top_k > 0) & (top_k < size):
            key, ties = _last_of_top_k(row, size, top_k, highest, inverse, BLOCK)
        needed = ties.to(tl.float32)
        if top_p < 1:
            key, needed = _last_of_top_p(row, size, top_p, key, needed, highest, inverse, least, BLOCK)
        seed = tl.load(seeds + which)
        token = _draw(row, size, seed, key, needed, highest, inverse, least, BLOCK)
    tl.store(tokens + which, tl.where(is_good, token, -1))

    raw_highest = float("-inf")
    total = 0.0
    for start in range(0, size, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        numbers = tl.load(raw + offset + ids, mask=ids < size, other=float("-inf"))
        higher = tl.maximum(raw_highest, tl.max(numbers, 0))
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(raw_highest - finite) + tl.sum(tl.exp(numbers - finite), 0)
        raw_highest = higher
    own = tl.load(raw + offset + token)
    tl.store(logprobs + which, own - raw_highest - tl.log(total))


_VARIANT: Final = Variant(
    types=("*i32", "*fp32", "*fp32", "*fp32", "*fp32", "*i32", "*fp32", "*fp32", "*i64", "i32", "i32"),
    constants=(("BLOCK", _BLOCK),),
    num_warps=16,
)


def _variants(_target: Target) -> Iterator[Variant]:
    yield _VARIANT


SAMPLE: Final = Kernel(_sample, _variants)


@dataclass(frozen=True, slots=True)
class RowRules:
    """What each row asks for: tensors [S]."""

    inverse_temperatures: torch.Tensor  # float32; 0: the most likely token
    top_ks: torch.Tensor  # int32; 0: all
    top_ps: torch.Tensor  # float32
    min_ps: torch.Tensor  # float32
    seeds: torch.Tensor  # int64: made of seed, position and choice


def sample(logits: torch.Tensor, raw: torch.Tensor, rules: RowRules) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose a token for each row.

    Args:
        logits: float32 [S, V] after biases, penalties and grammars, each row contiguous; V is a multiple of 16.
        raw: the same before any rule, for the logprobs; of the same strides. It may be the same tensor.
        rules: of the rows.

    Returns:
        Tokens, int32 [S], FAILED where a row holds NaN, +inf or nothing but -inf; and their logprobs in the model's own
        distribution, float32 [S].
    """
    rows, size = logits.shape
    assert logits.stride() == raw.stride(), "rows lie alike"
    assert size % 16 == logits.stride(0) % 16 == 0, "loads of 16 bytes"
    tokens = torch.empty(rows, dtype=torch.int32, device=logits.device)
    logprobs = torch.empty(rows, dtype=torch.float32, device=logits.device)
    by_row = (rules.inverse_temperatures, rules.top_ks, rules.top_ps, rules.min_ps, rules.seeds)
    SAMPLE.launch(_VARIANT, (rows,), tokens, logprobs, logits, raw, *by_row, size // 16, logits.stride(0) // 16)
    return tokens, logprobs


def sample_twin(logits: torch.Tensor, raw: torch.Tensor, rules: RowRules) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in torch."""
    tokens = []
    for which, row in enumerate(logits):
        inverse = rules.inverse_temperatures[which]
        if not row.amax().isfinite():
            tokens.append(FAILED)
            continue
        scores = (row - row.amax()) * inverse
        if inverse > 0:
            kept = kept_twin(row, which, rules)
            exponentials = exponentials_twin(int(rules.seeds[which]), len(row))
            scores = (scores - exponentials.log()).masked_fill(~kept, -torch.inf)
        else:
            scores = row
        tokens.append(int((scores == scores.amax()).nonzero()[0]))
    chosen = torch.tensor(tokens, dtype=torch.int32, device=logits.device)
    own = raw.log_softmax(1).gather(1, chosen.long().clamp_min(0)[:, None])[:, 0]
    return chosen, own


def kept_twin(row: torch.Tensor, which: int, rules: RowRules) -> torch.Tensor:
    """What the rules of row `which` keep of it: bool [V]."""
    ordered, order = row.sort(descending=True, stable=True)
    weights = ((ordered - ordered[0]) * rules.inverse_temperatures[which]).exp()
    top_k = int(rules.top_ks[which]) or len(row)
    is_kept = (torch.arange(len(row), device=row.device) < top_k) & (weights >= rules.min_ps[which])
    mass = weights.double() * is_kept
    if rules.top_ps[which] < 1:
        is_kept &= mass.cumsum(0) - mass < rules.top_ps[which] * mass.sum()
    return torch.zeros_like(is_kept).scatter(0, order, is_kept & (weights > 0))


def exponentials_twin(seed: int, size: int) -> torch.Tensor:
    """A number of the exponential distribution for each token, from Philox4x32-10: float32 [V]."""
    mask = np.uint64(0xFFFFFFFF)
    counter = [np.arange(size, dtype=np.uint64), *(np.zeros(size, dtype=np.uint64) for _ in range(3))]
    keys = [np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32 & 0xFFFFFFFF)]
    for _ in range(10):
        first, second = counter[0] * np.uint64(0xD2511F53), counter[2] * np.uint64(0xCD9E8D57)
        counter = [
            (second >> np.uint64(32)) ^ counter[1] ^ keys[0],
            second & mask,
            (first >> np.uint64(32)) ^ counter[3] ^ keys[1],
            first & mask,
        ]
        keys = [(keys[0] + np.uint64(0x9E3779B9)) & mask, (keys[1] + np.uint64(0xBB67AE85)) & mask]
    uniform = torch.from_numpy(counter[0].astype(np.float32)) * 2.3283064e-10 + 1.1641532e-10
    return torch.where(uniform < 0.001, uniform + 0.5 * uniform * uniform, -torch.log(1.0 - uniform))
