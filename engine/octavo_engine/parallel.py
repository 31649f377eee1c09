"""What the ranks that share a model say to each other within a step, and what a rank says that is alone.

Used by models/decoder.py and the layers through Communicator, chosen once: they do not know how many ranks there are.
Each rank has its part of every weight (weights/shard.py) and computes with it on its own; three operations join what
they computed. ranks.py starts the other ranks and tells them what to compute.

Sums over gloo (on CPUs) are made in the order of the ranks, on each rank by itself: a ring's order would depend on how
many rows there are, and a request's float32 result on the batch it is in. NCCL sums as it likes.

Shapes: T tokens of the step, H hidden size, V rows of the vocabulary, W of them on each rank.
"""

from __future__ import annotations

import contextlib
import os
import sys
from datetime import timedelta
from typing import TYPE_CHECKING, Final, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812 - everyone's name for it

from octavo_engine.errors import RankLost

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# A rank that the others have awaited for so long is given up. They compute the same, so that they are never far apart;
# liveness.py tells of it after a quarter of this time.
LOST_SECONDS: Final = 20.0


class Communicator(Protocol):
    """How one rank's results become those of all."""

    @property
    def rank(self) -> int:
        """Of this process: 0 .. size - 1."""
        ...

    @property
    def size(self) -> int:
        """How many ranks share the model."""
        ...

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' `x`, on each of them; may be `x` itself, changed."""
        ...

    def embed(self, token_ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Look up int64 [T] in the ranks' rows of the embedding, [W, H] each: [T, H] on each of them."""
        ...

    def join(self, x: torch.Tensor, num_columns: int) -> torch.Tensor:
        """The first `num_columns` of the ranks' [T, W] side by side: [T, V] on rank 0, nothing of use elsewhere."""
        ...


class Alone:
    """A model on one device: there is nothing to join."""

    rank: Final = 0
    size: Final = 1

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """See Communicator."""
        return x

    def embed(self, token_ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """See Communicator."""
        return F.embedding(token_ids, rows)

    def join(self, x: torch.Tensor, num_columns: int) -> torch.Tensor:
        """See Communicator."""
        assert x.shape[1] == num_columns
        return x


ALONE: Final = Alone()


class Group:
    """The ranks of torch.distributed's group, which a process is in once.

    Every method raises RankLost where another rank is gone or does not answer.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank: Final = rank
        self.size: Final = size

    @classmethod
    def join_at(cls, folder: Path, rank: int, size: int, device: torch.device) -> Group:
        """Meet the other ranks: all must call this with the same folder, within LOST_SECONDS of each other.

        Args:
            folder: an empty one that all can write to, through which they find each other.
            rank: of this process.
            size: how many there are.
            device: what this rank computes on.

        Raises:
            RankLost: not all have come.
        """
        # The ranks are on one machine: nothing of theirs shall listen on its network.
        os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
        is_cuda = device.type == "cuda"
        if is_cuda:
            torch.cuda.set_device(device)  # kernels are started on the current one
        with _telling():
            dist.init_process_group(
                "nccl" if is_cuda else "gloo",
                store=dist.FileStore(str(folder / "store"), size),  # type: ignore[attr-defined] # its documentation has it
                rank=rank,
                world_size=size,
                timeout=timedelta(seconds=LOST_SECONDS),
                device_id=device if is_cuda else None,
            )
        return cls(rank, size)

    def leave(self) -> None:
        """End the group on this rank, which may then join another one."""
        dist.destroy_process_group()

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """See Communicator."""
        with _telling():
            if x.device.type == "cuda":
                dist.all_reduce(x)
                return x
            x = x.contiguous()
            parts = [torch.empty_like(x) for _ in range(self.size)]
            dist.all_gather(parts, x)
        total = parts[0].float()
        for part in parts[1:]:
            total += part
        return total.to(x.dtype)

    def embed(self, token_ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """See Communicator."""
        local = token_ids - self.rank * len(rows)
        elsewhere = (local < 0) | (local >= len(rows))
        found = F.embedding(local.masked_fill_(elsewhere, 0), rows)
        return self.sum(found.masked_fill_(elsewhere[:, None], 0))

    def join(self, x: torch.Tensor, num_columns: int) -> torch.Tensor:
        """See Communicator."""
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.size)] if self.rank == 0 else None
        with _telling():
            dist.gather(x, parts)
        return x if parts is None else torch.cat(parts, dim=1)[:, :num_columns].contiguous()


@contextlib.contextmanager
def _telling() -> Iterator[None]:
    """Tell what torch.distributed raises from all other errors."""
    try:
        yield
    except RuntimeError as error:
        raise RankLost(f"the ranks that share the model have lost each other: {error}") from error
