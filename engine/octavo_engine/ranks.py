"""Rank 0's hold on the other ranks of a model: starts their processes, tells them what to compute, misses them.

Built by runner.py where several devices share a model; rank 0 is the engine process itself. Each other rank is a
process beside it (worker.py), at the end of a socket pair. They do all that rank 0 does but scheduling and sampling:
load their part of the weights, copy blocks, compute steps. What ranks say to each other within a step is parallel.py's.

A rank that ends closes its socket; one that hangs does not answer. While a step runs the others wait for it in vain;
between steps `check` asks. Both end in RankLost and so end the engine process, and with it all ranks: the kernel kills
them when rank 0 is gone, also those that are stopped (process.py).
"""

from __future__ import annotations

import socket
import struct
import subprocess
import sys
import tempfile
import time
import weakref
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias

import msgspec

from octavo_engine import liveness
from octavo_engine.errors import RankLost
from octavo_engine.parallel import LOST_SECONDS, Group
from octavo_engine.plan import SamplingParams, ScheduledRequest, StepPlan
from octavo_engine.process import how_it_ended
from octavo_engine.sizing import MemoryPlan
from octavo_engine.steps import load_torch_steps

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from octavo_engine.models.checkpoint import Checkpoint
    from octavo_engine.steps import Steps

_END_SECONDS: Final = 2.0  # how long the system may take to tell that a process has ended
_POLL_SECONDS: Final = 0.05
_NO_SAMPLING: Final = SamplingParams(max_tokens=1)  # rank 0 samples


class Load(msgspec.Struct, frozen=True, tag=True):
    """Load this rank's part of a model, instead of the one before; answered."""

    path: str
    dtype: str  # torch's name
    memory: MemoryPlan
    num_threads: int


class CopyBlocks(msgspec.Struct, frozen=True, tag=True):
    """Copy the KV of whole blocks."""

    copies: tuple[tuple[int, int], ...]  # source, destination


class Forward(msgspec.Struct, frozen=True, tag=True):
    """Compute a step."""

    # As `of` takes them from the plan.
    requests: tuple[tuple[tuple[int, ...], int, tuple[int, ...], bool, int, tuple[int, ...]], ...]
    every_token: bool

    @classmethod
    def of(cls, plan: StepPlan, *, every_token: bool) -> Forward:
        """What of a plan concerns the other ranks: nothing of sampling."""
        return cls(
            tuple(
                (r.token_ids, r.num_computed_tokens, r.block_ids, r.needs_token, r.num_proposed, r.prompt_targets)
                for r in plan.requests
            ),
            every_token,
        )

    @property
    def plan(self) -> StepPlan:
        """The same as a plan."""
        return StepPlan(
            0,
            tuple(
                ScheduledRequest(
                    "",
                    token_ids,
                    num_computed,
                    block_ids,
                    needs_token,
                    _NO_SAMPLING,
                    num_proposed=num_proposed,
                    prompt_targets=prompt_targets,
                )
                for token_ids, num_computed, block_ids, needs_token, num_proposed, prompt_targets in self.requests
            ),
        )


class Beat(msgspec.Struct, frozen=True, tag=True):
    """Answer, to show that you are there."""


ToRank: TypeAlias = Load | CopyBlocks | Forward | Beat
DONE: Final = b"done"  # the answer


@dataclass(frozen=True, slots=True)
class _Other:
    """A rank that is not this process."""

    rank: int
    process: subprocess.Popen[bytes]
    connection: Connection

    def __str__(self) -> str:
        return f"rank {self.rank} (pid {self.process.pid})"


class Ranks:
    """All ranks of a model, in the hand of rank 0."""

    def __init__(self, size: int, device: torch.device) -> None:
        """Start the others and meet them; from the main thread, as their lives end with that of the calling thread.

        Raises:
            RankLost: one did not come.
        """
        self._encoder = msgspec.msgpack.Encoder()
        self._folder = tempfile.TemporaryDirectory(prefix="octavo-ranks-")
        self._others = [_spawn(rank, size, device, self._folder.name) for rank in range(1, size)]
        self._end = weakref.finalize(self, _end, self._others)  # at the latest when this process ends
        self._device = device
        self._await_answers(None)
        self._group = Group.join_at(Path(self._folder.name), 0, size, device)

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of the other ranks."""
        return tuple(other.process.pid for other in self._others)

    def load(
        self,
        checkpoint: Checkpoint,
        memory: MemoryPlan,
        *,
        dtype: torch.dtype,
        num_threads: int,
        on_progress: Callable[[int, int], None],
    ) -> SharedSteps:
        """Load a model, each rank its part.

        Raises:
            ModelInvalid, ModelUnsupported: as load_torch_steps.
            RankLost: another rank could not.
        """
        name = str(dtype).removeprefix("torch.")
        self.tell(Load(str(checkpoint.path), name, memory, num_threads))
        own = load_torch_steps(
            checkpoint, memory, dtype=dtype, device=self._device, on_progress=on_progress, ranks=self._group
        )
        self._await_answers(None)
        return SharedSteps(self, own)

    def tell(self, message: ToRank) -> None:
        """Send every other rank a message.

        Raises:
            RankLost: one is gone, or has read nothing for LOST_SECONDS.
        """
        frame = self._encoder.encode(message)
        for other in self._others:
            try:
                other.connection.send_bytes(frame)
            except OSError as error:
                raise self.blame() from error

    def check(self) -> None:
        """Ask every other rank whether it is there, and wait for the answers.

        Raises:
            RankLost: one is gone, or has said nothing for LOST_SECONDS.
        """
        self.tell(Beat())
        self._await_answers(LOST_SECONDS)

    def blame(self) -> RankLost:
        """Say which rank is at fault, after something failed that takes all of them."""
        deadline = time.monotonic() + _END_SECONDS
        while not (ended := self._ended()) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        if ended:
            # One that ends takes the others with it: these end with an error, and the first one mostly by a signal.
            code, culprit = min(ended)
            return RankLost(f"{culprit} ended {how_it_ended(code)}: its part of the model is gone")
        stopped = [
            f"{other} is {what}"
            for other in self._others
            if (seen := liveness.look_at(other.process.pid)) and (what := liveness.STATES.get(seen.state))
        ]
        return RankLost(f"not every rank has answered for {LOST_SECONDS:g} s{': ' * bool(stopped)}{', '.join(stopped)}")

    def close(self) -> None:
        """End the other ranks."""
        self._end()
        self._group.leave()
        self._folder.cleanup()

    def _ended(self) -> list[tuple[int, str]]:
        """Exit codes and names of those that have ended."""
        return [(code, str(other)) for other in self._others if (code := other.process.poll()) is not None]

    def _await_answers(self, seconds: float | None) -> None:
        for other in self._others:
            try:
                if not other.connection.poll(seconds):
                    raise self.blame()
                other.connection.recv_bytes()
            except (EOFError, OSError) as error:
                raise self.blame() from error


class SharedSteps:
    """Steps that all ranks compute: told to the others, then computed here. See Steps."""

    chooser: Final = None
    adapters: Final = None

    def __init__(self, ranks: Ranks, own: Steps) -> None:
        self._ranks = ranks
        self._own = own

    @property
    def hidden_size(self) -> int:
        """See Steps."""
        return self._own.hidden_size

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """See Steps."""
        self._ranks.tell(CopyBlocks(tuple(copies)))
        self._own.copy_blocks(copies)

    def forward(self, plan: StepPlan, *, every_token: bool = False, states: torch.Tensor | None = None) -> torch.Tensor:
        """See Steps.

        Raises:
            RankLost: another rank ended or does not answer; says which.
        """
        self._ranks.tell(Forward.of(plan, every_token=every_token))
        try:
            return self._own.forward(plan, every_token=every_token, states=states)
        except RankLost as error:
            raise self._ranks.blame() from error


def _spawn(rank: int, size: int, device: torch.device, folder: str) -> _Other:
    ours, theirs = socket.socketpair()
    # A rank that reads nothing shall not stop this one for ever.
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", round(LOST_SECONDS), 0))
    with theirs:
        arguments = [str(theirs.fileno()), str(rank), str(size), device.type, folder]
        process = subprocess.Popen(
            [sys.executable, "-m", "octavo_engine.worker", *arguments],
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
        )
    return _Other(rank, process, Connection(ours.detach()))


def _end(others: list[_Other]) -> None:
    for other in others:
        other.process.kill()
        other.process.wait()
        other.connection.close()
