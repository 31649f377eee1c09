"""One of the ranks 1 .. N - 1: a process beside the engine process that computes its part of every step.

Started by ranks.py as `python -m octavo_engine.worker FD RANK SIZE DEVICE FOLDER`: the number of an inherited socket to
rank 0, which rank this is of how many, "cpu" or "cuda", and the folder in which the ranks meet. It knows nothing of
requests: it does what rank 0 says, in that order, until the socket is closed.
"""

from __future__ import annotations

import faulthandler
import logging
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import torch

from octavo_engine import device as devices
from octavo_engine.errors import RankLost
from octavo_engine.models.checkpoint import read_checkpoint
from octavo_engine.parallel import Group
from octavo_engine.process import bind_to_parent
from octavo_engine.ranks import DONE, Beat, CopyBlocks, Forward, Load, ToRank
from octavo_engine.steps import load_torch_steps

if TYPE_CHECKING:
    from octavo_engine.parallel import Communicator
    from octavo_engine.steps import Steps

logger = logging.getLogger(__name__)


@torch.inference_mode()
def serve(connection: Connection, ranks: Communicator, device: torch.device) -> None:
    """Do what rank 0 says until it is gone.

    Raises:
        EOFError: it is.
        RankLost: another rank is.
    """
    decoder = msgspec.msgpack.Decoder(ToRank)
    steps: Steps | None = None
    while True:
        message = decoder.decode(connection.recv_bytes())
        if isinstance(message, Load):
            steps = _load(message, ranks, device)
            connection.send_bytes(DONE)
        elif isinstance(message, Beat):
            connection.send_bytes(DONE)
        else:
            assert steps is not None, "rank 0 loads the model first"
            _compute(message, steps)


def _compute(message: CopyBlocks | Forward, steps: Steps) -> None:
    match message:
        case CopyBlocks(copies):
            steps.copy_blocks(copies)
        case Forward(every_token=every_token):
            steps.forward(message.plan, every_token=every_token)


def _load(message: Load, ranks: Communicator, device: torch.device) -> Steps:
    torch.set_num_threads(message.num_threads)
    return load_torch_steps(
        read_checkpoint(Path(message.path)),
        message.memory,
        dtype=devices.torch_dtype(message.dtype),
        device=device,
        on_progress=lambda *_: None,  # rank 0's is told, and all are about as far
        ranks=ranks,
    )


def main(arguments: list[str]) -> int:
    """One rank's process from its arguments on; its exit status is 1 where other ranks are gone but rank 0 is not."""
    fd, rank, size, kind, folder = arguments
    bind_to_parent(f"octavo-rank-{rank}".encode())
    faulthandler.enable()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    connection = Connection(int(fd))
    device = devices.of_rank(kind, int(rank))
    try:
        connection.send_bytes(DONE)  # torch is imported: from now on this rank is as fast as rank 0
        serve(connection, Group.join_at(Path(folder), int(rank), int(size), device), device)
    except (EOFError, ConnectionError):
        return 0
    except RankLost as error:
        logger.error("rank %s ends: %s", rank, error)  # noqa: TRY400 - where it happened says nothing
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
