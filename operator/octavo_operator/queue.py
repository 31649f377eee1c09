"""The work queue: which InferenceServices are to be reconciled, and when.

Filled by the watches (cache.py), emptied by the workers (reconcile.py). It has the guarantees of
client-go's workqueue: a key that is added ten times is worked on once; a key is with one worker at a time, and what is
added meanwhile runs after it; a key that failed waits, exponentially longer with each failure in a row.

`Backlog` is the whole logic, as plain data with the time as an argument; `WorkQueue` puts a clock and sleeping around
it. `TokenBucket` limits how fast all workers together write to the API server. Knows nothing of Kubernetes.
"""

import asyncio
import contextlib
import heapq
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from octavo_operator import metrics

K = TypeVar("K")  # the key of one unit of work; hashable


@dataclass
class Backlog(Generic[K]):
    """The keys that wait, with their due times, and the keys that are being worked on. All times are in seconds."""

    _due: dict[K, float] = field(default_factory=dict)  # waiting key -> when it is due
    _heap: list[tuple[float, int, K]] = field(
        default_factory=list
    )  # (due, order, key); stale where _due says otherwise
    _order: "itertools.count[int]" = field(default_factory=itertools.count)  # first in, first out at equal times
    _active: set[K] = field(default_factory=set)  # with a worker now
    _failures: dict[K, int] = field(default_factory=dict)  # failures in a row

    def __len__(self) -> int:
        """How many keys wait, due or not."""
        return len(self._due)

    def add(self, key: K, due: float) -> None:
        """Let the key be worked on at `due`, or earlier if it is waiting for an earlier time already."""
        if self._due.get(key, due + 1) > due:
            self._due[key] = due
            if key not in self._active:
                heapq.heappush(self._heap, (due, next(self._order), key))

    def pop(self, now: float) -> K | None:
        """The next key that is due, now active until `done`; None if there is none."""
        self._drop_stale()
        if not self._heap or self._heap[0][0] > now:
            return None
        _, _, key = heapq.heappop(self._heap)
        del self._due[key]
        self._active.add(key)
        return key

    def done(self, key: K) -> None:
        """The worker has let go of the key."""
        self._active.remove(key)
        if key in self._due:
            heapq.heappush(self._heap, (self._due[key], next(self._order), key))

    def next_due(self) -> float | None:
        """When `pop` will have a key, if nothing happens until then."""
        self._drop_stale()
        return self._heap[0][0] if self._heap else None

    def failed(self, key: K, now: float, *, first_delay: float, max_delay: float) -> float:
        """Let a key that failed be tried again; return after how many seconds."""
        failures = self._failures.get(key, 0)
        self._failures[key] = failures + 1
        delay = min(first_delay * 2.0 ** min(failures, 30), max_delay)
        self.add(key, now + delay)
        return delay

    def succeeded(self, key: K) -> None:
        """Forget the failures of the key."""
        self._failures.pop(key, None)

    def forgive(self, now: float) -> None:
        """Let what is overdue be due now: there was nobody to work on it."""
        for key, due in self._due.items():
            if due < now:
                self._due[key] = now
                heapq.heappush(self._heap, (now, next(self._order), key))

    def _drop_stale(self) -> None:
        """Drop heap entries whose key has been moved to an earlier time, popped, or taken by a worker."""
        while self._heap and (self._heap[0][2] in self._active or self._due.get(self._heap[0][2]) != self._heap[0][0]):
            heapq.heappop(self._heap)


class WorkQueue(Generic[K]):
    """A `Backlog` on a clock, for any number of asyncio workers of one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._backlog: Backlog[K] = Backlog()
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        """How many keys wait."""
        return len(self._backlog)

    def add(self, key: K, delay: float = 0.0) -> None:
        """Have the key worked on after `delay` seconds."""
        self._backlog.add(key, self._clock() + delay)
        self._changed.set()

    async def get(self) -> K:
        """Wait for a key that is due; the caller must hand it to `done`."""
        while True:
            now = self._clock()
            due = self._backlog.next_due()
            if due is not None and (key := self._backlog.pop(now)) is not None:
                metrics.QUEUE_SECONDS.observe(now - due)
                return key
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if due is None else max(due - now, 0.0)):
                    await self._changed.wait()

    def done(self, key: K) -> None:
        """The worker has let go of the key."""
        self._backlog.done(key)
        self._changed.set()

    def failed(self, key: K, *, first_delay: float, max_delay: float) -> float:
        """Have a key that failed tried again; return after how many seconds."""
        delay = self._backlog.failed(key, self._clock(), first_delay=first_delay, max_delay=max_delay)
        self._changed.set()
        return delay

    def succeeded(self, key: K) -> None:
        """Forget the failures of the key."""
        self._backlog.succeeded(key)

    def forgive(self) -> None:
        """Let what is overdue be due now, so that nobody is said to have been late."""
        self._backlog.forgive(self._clock())


class TokenBucket:
    """Lets `burst` calls pass at once and `rate` calls a second in the long run."""

    def __init__(self, *, rate: float, burst: float, now: float) -> None:
        self._rate = rate
        self._burst = burst
        self._tokens = burst  # negative: so many callers are waiting
        self._at = now

    def reserve(self, now: float) -> float:
        """Take one token; return how many seconds the caller must wait before it acts."""
        self._tokens = min(self._burst, self._tokens + (now - self._at) * self._rate) - 1.0
        self._at = now
        return max(0.0, -self._tokens / self._rate)
