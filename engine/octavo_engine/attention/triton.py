"""Paged attention on a GPU by the kernels in kernels/. Built by runner.py, which chooses the backend.

The cache is contiguous per layer, [blocks, slots, KV heads, head size], in the compute dtype or in codes of e4m3. All
that the host knows of a step goes to the device in one copy: where each request is, and the tiles of work. Requests
whose rows fit into the smallest tile (decodes, mostly) are computed with that one, the others with tall ones, so that a
step has one launch a layer or two.

Blocks are not cleared: the kernels read what a request has written and nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from octavo_engine.attention.base import AttentionBackend
from octavo_engine.errors import ModelUnsupported
from octavo_engine.kernels import attention
from octavo_engine.kernels.cache import store_kv
from octavo_engine.kernels.launch import num_processors, target_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from octavo_engine.attention.base import AttentionMetadata, AttentionRules, CacheShape

_ALIGNMENT = 4  # int32 numbers in 16 bytes: where what is cut out of the one copy may begin


class TritonAttention(AttentionBackend):
    """Keys and values are read in place, each once for all query heads that share it."""

    def __init__(
        self,
        shape: CacheShape,
        rules: AttentionRules,
        *,
        dtype: torch.dtype,
        device: torch.device,
        cache_dtype: torch.dtype | None = None,
    ) -> None:
        """Reserve the cache.

        Args:
            shape: its size.
            rules: of the scores.
            dtype: of queries, keys and values, and of what comes out: float16 or bfloat16.
            device: a GPU, or a CPU under Triton's interpreter.
            cache_dtype: float8_e4m3fn to keep keys and values in one byte each, without scales; None: `dtype`.

        Raises:
            ModelUnsupported: there is no kernel for the head size or the block size.
            DeviceMissing: there is none for the device.
        """
        assert len(rules.windows) == shape.num_layers, "a window, or None, for every layer"
        assert dtype in attention.DTYPES, dtype
        if shape.head_dim not in attention.HEAD_DIMS:
            raise ModelUnsupported(
                f"heads of {shape.head_dim} numbers: the GPU kernels have {attention.HEAD_DIMS}; use --device cpu"
            )
        if shape.block_size not in attention.BLOCK_SIZES:
            raise ModelUnsupported(
                f"blocks of {shape.block_size} slots: the GPU kernels have {attention.BLOCK_SIZES}; set --block-size"
            )
        stored = torch.uint8 if cache_dtype == torch.float8_e4m3fn else cache_dtype or dtype
        size = (shape.num_layers, shape.num_blocks, shape.block_size, shape.num_kv_heads, shape.head_dim)
        self._keys = torch.empty(size, dtype=stored, device=device)
        self._values = torch.empty(size, dtype=stored, device=device)
        self._shape, self._rules, self._device = shape, rules, device
        self._scores = attention.Scores(rules.scale, rules.softcap)
        self._target, self._num_processors = target_of(device), num_processors(device)
        self._metadata: AttentionMetadata | None = None
        self._tiles: list[attention.Tiles] = []
        self._requests = torch.empty(0, dtype=torch.int32)

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy all of them at once, layer by layer."""
        sources, destinations = torch.tensor(copies, device=self._device).unbind(1)
        for cache in (self._keys, self._values):
            for layer in cache:
                layer.index_copy_(0, destinations, layer.index_select(0, sources))

    def begin_step(self, metadata: AttentionMetadata) -> None:
        """Take the step; the tiles are laid out at the first `attend`, which tells how many query heads there are."""
        self._metadata = metadata
        self._tiles = []

    def store(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Write every slot of the step."""
        assert self._metadata is not None, "begin_step comes first"
        store_kv(k, v, self._keys[layer], self._values[layer], self._metadata.slot_mapping)

    def attend(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        """Attend tiles of one height after the other."""
        assert self._metadata is not None, "begin_step comes first"
        if not self._tiles:
            self._lay_out(self._metadata, q.shape[1] // self._shape.num_kv_heads)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        for tiles in self._tiles:
            attention.attend(
                out,
                q,
                self._keys[layer],
                self._values[layer],
                self._metadata.block_tables,
                self._requests,
                tiles,
                self._scores,
                window=self._rules.windows[layer],
            )
        return out

    def _lay_out(self, metadata: AttentionMetadata, group: int) -> None:
        """Make the tiles of the step, and send them with the requests to the device in one copy."""
        query_lens = np.array(metadata.query_lens, dtype=np.int32)
        starts = np.cumsum(query_lens, dtype=np.int32) - query_lens
        requests = np.stack((starts, query_lens, np.array(metadata.context_lens, dtype=np.int32)), axis=1)
        tall = attention.tall_rows(self._target, self._shape.head_dim)
        heights = [(attention.SMALL_ROWS, False), (tall, True)]
        lists = [
            attention.tiles_of(metadata.query_lens, group=group, rows=rows, tall=is_tall) for rows, is_tall in heights
        ]
        pieces = [requests, *(np.array(places, dtype=np.int32).reshape(-1, 2) for places in lists)]
        on_device = iter(self._send(pieces))
        self._requests = next(on_device)
        for (rows, is_tall), places in zip(heights, on_device, strict=True):
            if len(places):
                num_programs = len(places) * self._shape.num_kv_heads
                parts = (
                    1
                    if is_tall
                    else attention.parts_for(num_programs, max(metadata.context_lens), self._num_processors)
                )
                self._tiles.append(attention.Tiles(rows, places, parts))

    def _send(self, pieces: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """Copy int32 arrays to the device at once, without waiting for it."""
        sizes = [-(-piece.size // _ALIGNMENT) * _ALIGNMENT for piece in pieces]
        packed = torch.empty(sum(sizes), dtype=torch.int32, pin_memory=self._device.type == "cuda")
        ends = np.cumsum(sizes)
        for piece, size, end in zip(pieces, sizes, ends, strict=True):
            packed[end - size : end - size + piece.size] = torch.from_numpy(piece.reshape(-1))
        sent = packed.to(self._device, non_blocking=True)
        return [
            sent[end - size : end - size + piece.size].view(piece.shape)
            for piece, size, end in zip(pieces, sizes, ends, strict=True)
        ]
