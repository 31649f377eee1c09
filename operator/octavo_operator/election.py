"""Which of several operators writes: the one that holds a Lease. The others watch, and wait for it.

Used by reconcile.py, which reconciles while `Election.run` lets it. Knows nothing of InferenceServices. The rules are
those of every Kubernetes controller (https://kubernetes.io/docs/concepts/architecture/leases/):

- The holder renews the lease every RENEW_SECONDS. Who sees it unchanged for as long as its holder has promised takes
  it, under the version that was seen, so that of two that try only one succeeds. What counts is how long one has seen
  it, never the time that is written in it: clocks may differ.
- Nobody can be told in time that a lease is lost: its holder may be stopped, or cut off. So the holder stops by itself.
  Every write passes `Kube.write_until`, which a renewal moves to WRITE_SECONDS after it was *sent*; a write that is not
  answered by then is broken off.
- A clean end gives the lease back, and the next operator takes it when it looks next.
"""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, Protocol

from octavo_operator import metrics
from octavo_operator.errors import ApiError, Conflict, NotFound
from octavo_operator.resources import LEASE, Json, Key, Resource

LEASE_SECONDS: Final = 12  # for which a renewal holds
WRITE_SECONDS: Final = 10.0  # for which its holder writes: aiohttp may end a request a second late, and clocks drift
RENEW_SECONDS: Final = 2.0  # between two renewals, and between two looks at another's lease
ANSWER_SECONDS: Final = 4.0  # for the API server to answer; two attempts fit into WRITE_SECONDS
CONFLICT_SECONDS: Final = 0.2  # somebody else has written: look again

_logger = logging.getLogger(__name__)


class Leases(Protocol):
    """The part of the client that an election uses."""

    write_until: float  # no write but that of a lease is sent later, by the clock of the election

    async def get(self, resource: Resource, namespace: str, name: str) -> Json:
        """Read the lease."""

    async def write_lease(self, lease: Json) -> Json:
        """Create the lease, or replace the version that it names."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A lease as it was read last."""

    body: Json
    since: float  # seconds on our clock; when this version of it was first seen

    @property
    def holder(self) -> str:
        """Who holds it; empty: nobody."""
        return self.body.get("spec", {}).get("holderIdentity") or ""

    @property
    def seconds(self) -> float:
        """For how long its holder has promised to come again."""
        return float(self.body.get("spec", {}).get("leaseDurationSeconds") or LEASE_SECONDS)


def decide(seen: Seen | None, now: float, me: str) -> float:
    """For how many seconds more the lease is another's; 0: we may write our name into it, to take it or to renew."""
    if seen is None or seen.holder in {"", me}:
        return 0.0
    return max(0.0, seen.since + seen.seconds - now)


def claim(seen: Seen | None, lease: Key, me: str, at: datetime) -> Json:
    """The lease with our name in it, from `at` on; what others have put into it stays."""
    body = {} if seen is None else seen.body
    spec = body.get("spec", {})
    time_ = at.isoformat(timespec="microseconds").replace("+00:00", "Z")
    ours = {"holderIdentity": me, "leaseDurationSeconds": LEASE_SECONDS, "renewTime": time_}
    if spec.get("holderIdentity") != me:
        ours |= {"acquireTime": time_, "leaseTransitions": spec.get("leaseTransitions", -1) + 1}
    return {
        "apiVersion": LEASE.api_version,
        "kind": LEASE.kind,
        "metadata": body.get("metadata", {"namespace": lease.namespace, "name": lease.name}),
        "spec": {**spec, **ours},
    }


def released(seen: Seen) -> Json:
    """The lease without a holder."""
    return {**seen.body, "spec": {key: value for key, value in seen.body["spec"].items() if key != "holderIdentity"}}


class Election:
    """One operator's part in it.

    Args:
        api: the client, whose writes are held up from now on until the lease is ours.
        lease: its namespace and name.
        me: what tells this process from every other, also from an earlier one in the same pod.
        clock: seconds.
    """

    def __init__(self, api: Leases, lease: Key, me: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._api = api
        self._lease = lease
        self._me = me
        self._clock = clock
        self._seen: Seen | None = None
        self._trouble = ""  # that was logged last
        self._metric = metrics.LEADER.labels(lease=str(lease))
        self._stop_writing()

    @property
    def leads(self) -> bool:
        """Whether this operator may write."""
        return self._clock() < self._api.write_until

    async def run(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Contend for the lease until cancelled; run `work` while it is ours, and cancel it when it is not any more."""
        term: asyncio.Task[None] | None = None
        try:
            while True:
                pause = await self.turn()
                if self.leads and term is None:
                    _logger.info("%s leads by the lease %s.", self._me, self._lease)
                    term = asyncio.create_task(work(), name="term")
                elif not self.leads and term is not None:
                    _logger.warning("%s does not lead any more: the lease %s was not renewed.", self._me, self._lease)
                    await _end(term)
                    term = None
                self._metric.set(self.leads)
                if term is None:
                    await asyncio.sleep(pause)
                elif (await asyncio.wait([term], timeout=pause))[0]:
                    return term.result()  # it ends by a fault only
        finally:
            if term is not None:
                await _end(term)
            await self._release()

    async def turn(self) -> float:
        """Look at the lease and write our name into it if we may; return after how many seconds to do so again."""
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                pause = await self._contend()
        except Conflict:
            self._seen = None
            return CONFLICT_SECONDS
        except (ApiError, TimeoutError) as error:
            trouble = str(error) or "no answer"
            if trouble != self._trouble:
                _logger.warning("The lease %s cannot be read or written: %s", self._lease, trouble)
            self._trouble = trouble
            return RENEW_SECONDS
        self._trouble = ""
        return pause

    async def _contend(self) -> float:
        if not self.leads or self._seen is None:
            await self._look()
        taken_for = decide(self._seen, self._clock(), self._me)
        if taken_for:
            self._stop_writing()
            return min(taken_for, RENEW_SECONDS)
        sent = self._clock()
        stored = await self._api.write_lease(claim(self._seen, self._lease, self._me, datetime.now(UTC)))
        self._seen = Seen(stored, self._clock())
        self._api.write_until = sent + WRITE_SECONDS
        return RENEW_SECONDS

    async def _look(self) -> None:
        try:
            body = await self._api.get(LEASE, *self._lease)
        except NotFound:
            self._seen = None
            return
        before = self._seen
        if before is None or before.body["metadata"] != body["metadata"]:
            self._seen = Seen(body, self._clock())
            if self._seen.holder not in {"", self._me} and (before is None or before.holder != self._seen.holder):
                _logger.info("%s holds the lease %s; %s waits for it.", self._seen.holder, self._lease, self._me)

    async def _release(self) -> None:
        """Give the lease back; nothing of ours writes any more."""
        if self.leads and self._seen is not None:
            with contextlib.suppress(ApiError, TimeoutError):  # then the others wait for its end
                async with asyncio.timeout(ANSWER_SECONDS):
                    await self._api.write_lease(released(self._seen))
        self._stop_writing()

    def _stop_writing(self) -> None:
        self._api.write_until = -math.inf
        self._metric.set(0)


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
