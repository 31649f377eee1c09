"""Paged attention on a GPU by the kernels in kernels/. Built by runner.py, which chooses the backend.

The cache is contiguous per layer, [blocks, slots, KV heads, head size], in the compute dtype or in codes of e4m3. All
that the host knows of a step goes to the device in one copy: where each request is, and the tiles of work. Requests
whose rows fit into the smallest tile (decodes, mostly) are computed with that one, the others with tall ones, so that a
step has one launch a layer or two.

A step of decodes alone can be captured in a CUDA graph (gpu/graphs.py): then the host knows only how many there are,
and where they are is read from the tensors that `begin_decodes` is given when the kernels run.

Blocks are not cleared: the kernels read what a request has written and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from octavo_engine.attention.base import AttentionBackend
from octavo_engine.errors import ModelUnsupported
from octavo_engine.kernels import attention
from octavo_engine.kernels.launch import num_processors, target_of
from octavo_engine.kernels.suite import LAUNCHED

if TYPE_CHECKING:
    from collections.abc import Sequence

    from octavo_engine.attention.base import AttentionMetadata, AttentionRules, CacheShape
    from octavo_engine.kernels.suite import Suite

_ALIGNMENT = 4  # int32 numbers in 16 bytes: where what is cut out of the one copy may begin


@dataclass(frozen=True, slots=True)
class _Step:
    """What `attend` reads of a step; see kernels/attention.py."""

    tables: torch.Tensor  # int64 [R, M]
    requests: torch.Tensor  # int32 [R, 3]
    tiles: list[attention.Tiles]


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
        kernels: Suite = LAUNCHED,
    ) -> None:
        """Reserve the cache.

        Args:
            shape: its size.
            rules: of the scores.
            dtype: of queries, keys and values, and of what comes out: float16 or bfloat16.
            device: a GPU, or a CPU under Triton's interpreter.
            cache_dtype: float8_e4m3fn to keep keys and values in one byte each, without scales; None: `dtype`.
            kernels: what computes; the tests have their twins.

        Raises:
            ModelUnsupported: there is no kernel for the head size or the block size.
            DeviceMissing: there is none for the device.
        """
        assert len(rules.windows) == shape.num_layers, "a window, or None, for every layer"
        assert dtype in kernels.dtypes, dtype
        if shape.head_dim not in attention.HEAD_DIMS:
            raise ModelUnsupported(
                f"heads of {shape.head_dim} numbers: the GPU kernels have {attention.HEAD_DIMS}; use --device cpu"
            )
        if shape.block_size not in attention.BLOCK_SIZES:
            raise ModelUnsupported(
                f"blocks of {shape.block_size} slots: the GPU kernels have {attention.BLOCK_SIZES}; set --block-size"
            )
        stored = torch.uint8 if cache_dtype == torch.float8_e4m3fn else cache_dtype or dtype
        self._shape, self._rules, self._device, self._kernels = shape, rules, device, kernels
        self._keys = self._values = torch.empty(0, dtype=stored, device=device)
        self.reserve(shape.num_blocks)
        self._scores = attention.Scores(rules.scale, rules.softcap)
        self._target, self._num_processors = target_of(device), num_processors(device)
        self._slots = torch.empty(0, dtype=torch.int64)
        self._metadata: AttentionMetadata | None = None
        self._step: _Step | None = None
        self._tiles_of_decodes: dict[int, list[attention.Tiles]] = {}  # by how many there are

    def reserve(self, num_blocks: int) -> None:
        """See AttentionBackend."""
        shape = self._shape = replace(self._shape, num_blocks=num_blocks)
        size = (shape.num_layers, shape.num_blocks, shape.block_size, shape.num_kv_heads, shape.head_dim)
        self._keys = self._values = self._keys.new_empty(0)  # the old ones are free before there are new ones
        self._keys, self._values = self._keys.new_empty(size), self._keys.new_empty(size)

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy all of them at once, layer by layer."""
        (pairs,) = self._send([np.array(copies, dtype=np.int32)])
        sources, destinations = pairs.long().unbind(1)
        for cache in (self._keys, self._values):
            for layer in cache:
                layer.index_copy_(0, destinations, layer.index_select(0, sources))

    def begin_step(self, metadata: AttentionMetadata) -> None:
        """Take the step; the tiles are laid out at the first `attend`, which tells how many query heads there are."""
        self._slots, self._metadata, self._step = metadata.slot_mapping, metadata, None

    def begin_decodes(self, slots: torch.Tensor, tables: torch.Tensor, requests: torch.Tensor) -> None:
        """Take a step of at most one token of each request, of which the host knows nothing more.

        It is laid out at its first `attend`, once for all steps of so many; after that nothing is sent to the device.

        Args:
            slots: int64 [R]: of each token; -1: it is stored nowhere.
            tables: int64 [R, M], contiguous; M blocks hold the longest context that there may be.
            requests: int32 [R, 3]: the row of each token, 1, and its context with it. 0, 0, 0 behind the last request:
                nothing is attended to, and any number may come out.
        """
        self._slots, self._metadata = slots, None
        self._step = _Step(tables, requests, self._tiles_of_decodes.setdefault(len(slots), []))

    def store(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Write every slot of the step."""
        self._kernels.store_kv(k, v, self._keys[layer], self._values[layer], self._slots)

    def attend(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        """Attend tiles of one height after the other."""
        step = self._laid_out(q.shape[1] // self._shape.num_kv_heads)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        for tiles in step.tiles:
            self._kernels.attend(
                out,
                q,
                self._keys[layer],
                self._values[layer],
                step.tables,
                step.requests,
                tiles,
                self._scores,
                window=self._rules.windows[layer],
            )
        return out

    def _laid_out(self, group: int) -> _Step:
        """The step, with its tiles; they are made by the first layer, which tells how many query heads there are."""
        if self._step is None:
            assert self._metadata is not None, "begin_step comes first"
            metadata = self._metadata
            query_lens = np.array(metadata.query_lens, dtype=np.int32)
            starts = np.cumsum(query_lens, dtype=np.int32) - query_lens
            requests = np.stack((starts, query_lens, np.array(metadata.context_lens, dtype=np.int32)), axis=1)
            on_device, tiles = self._lay_out(requests, metadata.query_lens, max(metadata.context_lens), group)
            self._step = _Step(metadata.block_tables, on_device, tiles)
        elif not self._step.tiles:
            num_requests, width = self._step.tables.shape
            longest = width * self._shape.block_size
            nothing = np.empty((0, 3), dtype=np.int32)
            self._step.tiles.extend(self._lay_out(nothing, (1,) * num_requests, longest, group)[1])
        return self._step

    def _lay_out(
        self, requests: np.ndarray, query_lens: Sequence[int], longest: int, group: int
    ) -> tuple[torch.Tensor, list[attention.Tiles]]:
        """Make the tiles of a step, and send them with what is known of the requests to the device in one copy."""
        tall = attention.tall_rows(self._target, self._shape.head_dim)
        heights = [(attention.SMALL_ROWS, False), (tall, True)]
        lists = [attention.tiles_of(query_lens, group=group, rows=rows, tall=is_tall) for rows, is_tall in heights]
        pieces = [requests, *(np.array(places, dtype=np.int32).reshape(-1, 2) for places in lists)]
        requests_on_device, *places_on_device = self._send(pieces)
        tiles = []
        for (rows, is_tall), places in zip(heights, places_on_device, strict=True):
            if len(places):
                num_programs = len(places) * self._shape.num_kv_heads
                parts = 1 if is_tall else attention.parts_for(num_programs, longest, self._num_processors)
                tiles.append(attention.Tiles(rows, places, parts))
        return requests_on_device, tiles

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
