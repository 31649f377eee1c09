"""Paged attention in plain torch: the truth that other backends are tested against, on any device.

Blocks are gathered by block table into contiguous keys and values, on which scaled_dot_product_attention works.
Requests that bring one token (decodes) go together, in groups of similar length so that padding at most doubles the
work; a request that brings several (a prefill chunk) goes alone.

Padding costs no correctness, but what is read there must be a number: a weight of 0 times NaN is NaN. So short block
tables are filled up with a block of zeros that no request owns, and a block is zeroed when its first slot is written,
lest a request sees the NaN of one that used the block before.

A float32 cache is attended to in float64. The kernels sum in an order that depends on the shapes they are called with,
and so on the other requests of the step; in float64 those differences vanish when the result is rounded to float32.
Hence a request gets the same result in any company and however its prompt is cut. Half precision makes no such promise.

Layers with a sliding window gather the same blocks and mask more of them. torch's own attention knows no soft cap, so
that with one the three steps (scores, softmax, sum) are spelled out.

Shapes: T tokens of the step, B requests in a group, N query heads, K KV heads, D head size, S slots gathered for each
request (a multiple of the block size), Q tokens of each request in a group (1 for decodes).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812 - everyone's name for it

from octavo_engine.attention.base import AttentionBackend

if TYPE_CHECKING:
    from collections.abc import Sequence

    from octavo_engine.attention.base import AttentionMetadata, AttentionRules, CacheShape

# Keys of one group are gathered into at most so many bytes (more only if one request needs them), the values likewise.
_MAX_GATHER_BYTES = 32 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class _Group:
    """Requests that attend in one call: several with one query token each, or one with several."""

    tokens: torch.Tensor  # int64 [B] or [Q]: rows of the step's tensors
    blocks: torch.Tensor  # int64 [B * S / block_size]: the blocks to gather, request by request
    masks: dict[int | None, torch.Tensor]  # by window, [B, 1, 1, S] or [1, 1, Q, S]: 0 where a query may look, or -inf
    num_requests: int
    num_queries: int  # of each request


class ReferenceAttention(AttentionBackend):
    """Gathers blocks, then calls torch's own attention."""

    def __init__(self, shape: CacheShape, rules: AttentionRules, *, dtype: torch.dtype, device: torch.device) -> None:
        """Reserve the cache."""
        assert len(rules.windows) == shape.num_layers, "a window, or None, for every layer"
        self._rules = rules
        self._windows = tuple(dict.fromkeys(rules.windows))  # each that occurs
        self._dtype = dtype
        self._device = device
        self._slot_elements = shape.num_kv_heads * shape.head_dim
        self._keys = self._values = torch.empty(0, dtype=dtype, device=device)
        self._shape = shape
        self.reserve(shape.num_blocks)
        self._compute_dtype = torch.float64 if dtype == torch.float32 else dtype
        self._workspace = torch.empty((2, 0), dtype=self._compute_dtype, device=device)
        self._slots = torch.empty(0, dtype=torch.int64, device=device)
        self._fresh_blocks = torch.empty(0, dtype=torch.int64, device=device)
        self._groups: list[_Group] = []

    def reserve(self, num_blocks: int) -> None:
        """Reserve them, plus one block of zeros for padding."""
        shape = self._shape = replace(self._shape, num_blocks=num_blocks)
        size = (shape.num_layers, shape.num_blocks + 1, shape.block_size, self._slot_elements)
        self._keys = self._values = self._keys.new_empty(0)  # the old ones are free before there are new ones
        # Not zeroed as a whole: memory of blocks that are never used is never touched, and so costs nothing on a CPU.
        self._keys, self._values = self._keys.new_empty(size), self._keys.new_empty(size)
        for cache in (self._keys, self._values):
            cache[:, shape.num_blocks] = 0

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy all of them at once, layer by layer."""
        sources, destinations = torch.tensor(copies, device=self._device).unbind(1)
        for cache in (self._keys, self._values):
            for layer in cache:
                layer.index_copy_(0, destinations, layer.index_select(0, sources))

    def begin_step(self, metadata: AttentionMetadata) -> None:
        """Group the requests and build their masks."""
        block_size = self._shape.block_size
        self._slots = metadata.slot_mapping
        self._fresh_blocks = self._slots[self._slots % block_size == 0] // block_size
        starts = [0]
        for query_len in metadata.query_lens:
            starts.append(starts[-1] + query_len)
        decodes: dict[int, list[int]] = {}  # requests by the power of two that holds their blocks
        self._groups = []
        for request, query_len in enumerate(metadata.query_lens):
            if query_len == 1:
                num_blocks = -(-metadata.context_lens[request] // block_size)
                decodes.setdefault((num_blocks - 1).bit_length(), []).append(request)
            else:
                self._groups.append(self._prefill_group(metadata, request, starts[request]))
        for _, requests in sorted(decodes.items()):
            self._groups += self._decode_groups(metadata, requests, starts)
        gathered = max(group.blocks.numel() for group in self._groups) * block_size * self._slot_elements
        if gathered > self._workspace.shape[1]:
            self._workspace = torch.empty((2, gathered), dtype=self._compute_dtype, device=self._device)

    def store(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Zero the blocks that are begun, then write every slot of the step."""
        for cache, new in ((self._keys[layer], k), (self._values[layer], v)):
            if len(self._fresh_blocks):
                cache.index_fill_(0, self._fresh_blocks, 0)
            cache.view(-1, self._slot_elements).index_copy_(0, self._slots, new.reshape(-1, self._slot_elements))

    def attend(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        """Attend group by group."""
        out = torch.empty_like(q)
        for group in self._groups:
            keys, values = self._gather(self._keys[layer], group, 0), self._gather(self._values[layer], group, 1)
            queries = q[group.tokens].to(self._compute_dtype)
            queries = queries.view(group.num_requests, group.num_queries, *q.shape[1:]).transpose(1, 2)
            attended = self._attend(queries, keys, values, group.masks[self._rules.windows[layer]])
            out[group.tokens] = attended.transpose(1, 2).reshape(-1, *q.shape[1:]).to(q.dtype)
        return out

    def _attend(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """Queries [B, N, Q, D], keys and values [B, K, S, D] -> [B, N, Q, D]."""
        rules = self._rules
        if rules.softcap is None:
            return F.scaled_dot_product_attention(
                queries, keys, values, attn_mask=mask, scale=rules.scale, enable_gqa=True
            )
        in_groups = queries.reshape(len(queries), keys.shape[1], -1, *queries.shape[2:])  # [B, K, N / K, Q, D]
        scores = (in_groups @ keys.unsqueeze(2).mT).to(torch.promote_types(queries.dtype, torch.float32))
        scores = scores.mul_(rules.scale / rules.softcap).tanh_().mul_(rules.softcap)
        weights = (scores + mask.unsqueeze(1)).softmax(-1).to(values.dtype)  # [B, K, N / K, Q, S]
        attended: torch.Tensor = (weights @ values.unsqueeze(2)).flatten(1, 2)
        return attended

    def _gather(self, cache: torch.Tensor, group: _Group, which: int) -> torch.Tensor:
        """One layer's cache -> [B, K, S, D], a view of the workspace."""
        gathered = self._workspace[which, : group.blocks.numel() * cache[0].numel()].view(-1, *cache.shape[1:])
        if cache.dtype == gathered.dtype:
            torch.index_select(cache, 0, group.blocks, out=gathered)
        else:
            gathered.copy_(cache.index_select(0, group.blocks))
        per_request = gathered.view(group.num_requests, -1, self._shape.num_kv_heads, self._shape.head_dim)
        return per_request.transpose(1, 2)

    def _decode_groups(self, metadata: AttentionMetadata, requests: list[int], starts: list[int]) -> list[_Group]:
        """Decodes of similar length, split so that what they gather keeps within bounds."""
        width = max(-(-metadata.context_lens[request] // self._shape.block_size) for request in requests)
        block_bytes = self._shape.block_size * self._slot_elements * self._compute_dtype.itemsize
        at_once = max(1, _MAX_GATHER_BYTES // (width * block_bytes))
        return [
            self._decode_group(metadata, requests[first : first + at_once], starts)
            for first in range(0, len(requests), at_once)
        ]

    def _decode_group(self, metadata: AttentionMetadata, requests: list[int], starts: list[int]) -> _Group:
        context_lens = torch.tensor([metadata.context_lens[request] for request in requests], device=self._device)
        width = -(-max(metadata.context_lens[request] for request in requests) // self._shape.block_size)
        blocks = metadata.block_tables[requests, :width]
        first_slots = torch.arange(width, device=self._device) * self._shape.block_size
        blocks = blocks.masked_fill(first_slots >= context_lens[:, None], self._shape.num_blocks)
        slots = torch.arange(width * self._shape.block_size, device=self._device)
        masks = self._masks(slots, context_lens[:, None] - 1, (-1, 1, 1, len(slots)))
        tokens = torch.tensor([starts[request] for request in requests], device=self._device)
        return _Group(tokens, blocks.flatten(), masks, num_requests=len(requests), num_queries=1)

    def _prefill_group(self, metadata: AttentionMetadata, request: int, start: int) -> _Group:
        query_len, context_len = metadata.query_lens[request], metadata.context_lens[request]
        width = -(-context_len // self._shape.block_size)
        blocks = metadata.block_tables[request, :width]
        positions = torch.arange(context_len - query_len, context_len, device=self._device)
        slots = torch.arange(width * self._shape.block_size, device=self._device)
        masks = self._masks(slots, positions[:, None], (1, 1, query_len, len(slots)))
        tokens = torch.arange(start, start + query_len, device=self._device)
        return _Group(tokens, blocks, masks, num_requests=1, num_queries=query_len)

    def _masks(
        self, slots: torch.Tensor, positions: torch.Tensor, shape: tuple[int, int, int, int]
    ) -> dict[int | None, torch.Tensor]:
        """What is added to the scores of queries at `positions` [rows, 1], for every window of the model."""
        masks: dict[int | None, torch.Tensor] = {}
        for window in self._windows:
            hidden = slots > positions
            if window is not None:
                hidden |= slots <= positions - window
            zeros = torch.zeros_like(hidden, dtype=self._compute_dtype)
            masks[window] = zeros.masked_fill_(hidden, float("-inf")).view(shape)
        return masks
