"""Selections from rows of one number for each token of a vocabulary, without sorting the vocabulary.

Called by sampler.py; knows tensors, and nothing of requests or sampling parameters. Works on any device.

A row is cut into blocks of BLOCK tokens. One pass gives a number for each block (its highest value, or its sum); after
that only the few blocks that matter are looked into. Tokens are in one total order, from the most likely on, in which
of equal values the lower id comes first. What is computed for a row does not depend on how many rows there are.

Shapes: R rows, V tokens, a multiple of BLOCK; N = V / BLOCK blocks.
"""

from __future__ import annotations

import math
from typing import Final

import torch
import torch.nn.functional as F  # noqa: N812 - everyone's name for it

BLOCK: Final = 64


def padded(values: torch.Tensor) -> torch.Tensor:
    """Return [R, any] as [R, V], with tokens of -inf added at the end if need be."""
    missing = -values.shape[1] % BLOCK
    return F.pad(values, (0, missing), value=-torch.inf) if missing else values


def highest_of_blocks(values: torch.Tensor) -> torch.Tensor:
    """Return the highest value of each block, [R, N] of the dtype of `values` [R, V]; NaN where there is one."""
    return _blocks(values).amax(dim=-1)


def argmax(values: torch.Tensor, block_highest: torch.Tensor) -> torch.Tensor:
    """Return the first token in order: int64 [R]. Rows with NaN give any token.

    Args:
        values: [R, V].
        block_highest: what highest_of_blocks gives for it.
    """
    block = _first_highest(block_highest)
    return block * BLOCK + _first_highest(_take(_blocks(values), block))


def top(values: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first k <= V tokens in order: their values [R, k] and their ids, int64 [R, k]. Rows hold no NaN.

    No token outside of the k first blocks, by their first tokens, can be among the k first tokens. With blocks of about
    sqrt(V / k) tokens there are as many blocks as there are tokens in k of them.
    """
    block = min(BLOCK, 1 << (math.isqrt(values.shape[1] // k).bit_length() - 1))
    blocks = values.view(len(values), values.shape[1] // block, block)
    if block == 1:
        places = _order(values, k)
        return values.gather(1, places), places
    first_blocks = _order(blocks.amax(dim=-1), k).sort(dim=1).values  # by id, as equal values are in order of ids
    candidates = _take(blocks, first_blocks).flatten(1)
    places = _order(candidates, k)
    return candidates.gather(1, places), first_blocks.gather(1, places // block) * block + places % block


def total(weights: torch.Tensor) -> torch.Tensor:
    """Return the sum of each row of `weights`, float32 [R, V] >= 0: float64 [R]."""
    return _blocks(weights).sum(dim=-1).sum(dim=-1, dtype=torch.float64)


def invert(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Draw a token with a probability in proportion to its weight, by inversion: int64 [R].

    Args:
        weights: float32 [R, V] >= 0, and in each row one > 0.
        uniforms: float64 [R] in [0, 1 - 2**-52].
    """
    blocks = _blocks(weights)
    sums = blocks.sum(dim=-1).double()  # [R, N]
    ends = sums.cumsum(dim=-1)
    wanted = uniforms * ends[:, -1]
    block = torch.searchsorted(ends, wanted[:, None], right=True)  # [R, 1]; its sum is > 0
    inside = _take(blocks, block.squeeze(1)).double().cumsum(dim=-1)  # [R, BLOCK]
    block_sum = sums.gather(1, block)
    rest = (wanted[:, None] - (ends.gather(1, block) - block_sum)) / block_sum
    # Sums in another order round differently, so `rest` may leave [0, 1) by a hair.
    place = torch.searchsorted(inside, rest.clamp(0, 1 - 2**-52) * inside[:, -1:], right=True)
    return (block * BLOCK + place).squeeze(1)


def total_from(weights: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return the weight of all tokens as heavy as `tokens` [R] or heavier, them included: float64 [R]."""
    at_least = torch.empty_like(weights)  # 1 or 0: writing floats is four times as fast as booleans and their cast
    torch.ge(weights, weights.gather(1, tokens[:, None]), out=at_least)
    return total(at_least.mul_(weights))


def those_before(weights: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return the weights of the tokens that come in order before `tokens` [R], and 0 for the others: [R, V]."""
    own = weights.gather(1, tokens[:, None])
    before = torch.empty_like(weights)
    is_equal = torch.empty_like(weights)
    torch.gt(weights, own, out=before).mul_(weights)
    tied = (torch.eq(weights, own, out=is_equal).sum(dim=1) > 1).nonzero().squeeze(1)
    if len(tied):
        has_lower_id = torch.arange(weights.shape[1], device=weights.device) < tokens[tied, None]
        before[tied] += is_equal[tied] * has_lower_id * own[tied]
    return before


def _blocks(values: torch.Tensor) -> torch.Tensor:
    return values.view(len(values), values.shape[1] // BLOCK, BLOCK)


def _take(blocks: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return from each row of [R, N, B] the blocks of its index [R] or [R, K]: [R, B] or [R, K, B]."""
    rows = torch.arange(len(blocks), device=blocks.device)
    return blocks[rows if index.ndim == 1 else rows[:, None], index]


def _first_highest(values: torch.Tensor) -> torch.Tensor:
    """Return the lowest place of the highest value in each row; torch's own argmax promises none: int64 [R]."""
    places = torch.arange(values.shape[1], device=values.device)
    is_highest = values == values.amax(dim=1, keepdim=True)
    return torch.where(is_highest, places, values.shape[1] - 1).amin(dim=1)


def _order(values: torch.Tensor, k: int) -> torch.Tensor:
    """Return the first k places of each row of float32 [R, any] in the total order: int64 [R, k]."""
    bits = (values + 0.0).view(torch.int32)  # + 0.0: the two zeros are equal
    # Of negative numbers the greater one has the lesser bits below the sign.
    ascending = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    num_places = values.shape[1]
    places = torch.arange(num_places - 1, -1, -1, device=values.device)
    return (num_places - 1) - (ascending * 2**32 + places).topk(k, dim=1).values % 2**32
