"""Who leads: the rule by itself, and several contenders around one lease, whatever becomes of them."""

import asyncio
import copy
import math
from datetime import UTC, datetime
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo_operator import election
from octavo_operator.election import (
    LEASE_SECONDS,
    RENEW_SECONDS,
    WRITE_SECONDS,
    Election,
    Seen,
    claim,
    decide,
    released,
)
from octavo_operator.errors import ApiUnavailable, Conflict, Forbidden, NotFound
from octavo_operator.resources import Json, Key, Resource

LEASE: Final = Key("octavo-system", "octavo")
AT: Final = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


class Server:
    """One lease, as the API server keeps it."""

    def __init__(self) -> None:
        self.lease: Json | None = None
        self._version = 0

    def write(self, lease: Json) -> Json:
        """Store it if nobody was first."""
        current = None if self.lease is None else self.lease["metadata"]["resourceVersion"]
        if lease["metadata"].get("resourceVersion") != current:
            raise Conflict("the object has been modified", status=409)
        self._version += 1
        self.lease = copy.deepcopy(lease)
        self.lease["metadata"]["resourceVersion"] = str(self._version)
        return copy.deepcopy(self.lease)


class Client:
    """A contender's way to the server: it may be cut, before a request arrives or before its answer does."""

    def __init__(self, server: Server, clock: list[float]) -> None:
        self.write_until = math.inf
        self.server = server
        self.cut: str | None = None  # "request", "answer" or "right"
        self.delay = 0.0  # seconds that a request is on its way
        self._clock = clock

    async def get(self, resource: Resource, namespace: str, name: str) -> Json:
        """Read it."""
        assert (resource.kind, namespace, name) == ("Lease", *LEASE)
        self._travel()
        if self.server.lease is None:
            raise NotFound("no such lease", status=404)
        return copy.deepcopy(self.server.lease)

    async def write_lease(self, lease: Json) -> Json:
        """Write it."""
        self._travel()
        stored = self.server.write(lease)
        if self.cut == "answer":
            raise ApiUnavailable("the answer is lost")
        return stored

    def _travel(self) -> None:
        self._clock[0] += self.delay
        if self.cut == "request":
            raise ApiUnavailable("no route")
        if self.cut == "right":
            raise Forbidden("leases is forbidden", status=403)


def contender(server: Server, name: str, clock: list[float]) -> tuple[Election, Client]:
    client = Client(server, clock)
    return Election(client, LEASE, name, clock=lambda: clock[0]), client


def seen(holder: str | None, since: float = 0.0, **spec: Any) -> Seen:
    named = {} if holder is None else {"holderIdentity": holder}
    return Seen({"metadata": {}, "spec": {"leaseDurationSeconds": 12, **named, **spec}}, since)


@pytest.mark.parametrize(
    ("lease", "now", "wait"),
    [
        (None, 5.0, 0.0),  # nobody has made one
        (seen(None), 5.0, 0.0),  # given back
        (seen(""), 5.0, 0.0),
        (seen("me"), 5.0, 0.0),  # to be renewed
        (seen("other"), 5.0, 7.0),
        (seen("other", since=4.0), 5.0, 11.0),
        (seen("other"), 12.0, 0.0),  # not renewed while we were looking
        (seen("other", leaseDurationSeconds=60), 12.0, 48.0),  # what its holder has promised, not what we would
        (Seen({"metadata": {}}, 0.0), 0.0, 0.0),
    ],
)
def test_a_lease_is_anothers_until_it_was_seen_unchanged_for_as_long_as_promised(
    lease: Seen | None, now: float, wait: float
) -> None:
    assert decide(lease, now, "me") == wait


def test_the_lease_says_who_holds_it_since_when_and_how_often_it_changed_hands() -> None:
    first = claim(None, LEASE, "a", AT)
    assert first["metadata"] == {"namespace": "octavo-system", "name": "octavo"}
    time = "2026-01-02T03:04:05.000000Z"
    held = {"holderIdentity": "a", "leaseDurationSeconds": LEASE_SECONDS, "renewTime": time}
    assert first["spec"] == {**held, "acquireTime": time, "leaseTransitions": 0}
    later = claim(Seen(first, 0.0), LEASE, "a", AT.replace(second=9))
    assert later["spec"] == {**first["spec"], "renewTime": "2026-01-02T03:04:09.000000Z"}
    given_back = released(Seen(later, 0.0))
    assert "holderIdentity" not in given_back["spec"]
    other = claim(Seen(given_back, 0.0), LEASE, "b", AT.replace(second=10))["spec"]
    assert (other["leaseTransitions"], other["acquireTime"]) == (1, "2026-01-02T03:04:10.000000Z")


async def test_the_first_leads_and_the_second_waits_until_the_first_is_silent() -> None:
    clock, server = [0.0], Server()
    first, _ = contender(server, "a", clock)
    second, _ = contender(server, "b", clock)
    await first.turn()
    await second.turn()
    assert (first.leads, second.leads) == (True, False)
    clock[0] += LEASE_SECONDS
    assert not first.leads  # by its own clock, before anybody else may lead
    await second.turn()
    assert second.leads
    await first.turn()
    assert not first.leads


async def test_who_was_cut_off_and_is_still_the_holder_leads_again() -> None:
    clock, server = [0.0], Server()
    only, client = contender(server, "a", clock)
    await only.turn()
    client.cut = "request"
    clock[0] += 100.0
    await only.turn()
    assert not only.leads
    client.cut = None
    await only.turn()
    assert only.leads


async def test_a_renewal_holds_from_when_it_was_sent_not_from_its_answer() -> None:
    clock, server = [0.0], Server()
    only, client = contender(server, "a", clock)
    client.delay = 1.5
    await only.turn()  # asks first, and then writes
    assert clock == [3.0]
    assert client.write_until == 1.5 + WRITE_SECONDS


async def test_a_renewal_whose_answer_was_lost_is_found_out_about() -> None:
    clock, server = [0.0], Server()
    only, client = contender(server, "a", clock)
    await only.turn()
    client.cut = "answer"
    clock[0] += RENEW_SECONDS
    await only.turn()
    client.cut = None
    await only.turn()  # a conflict with itself
    await only.turn()
    assert client.write_until == clock[0] + WRITE_SECONDS


async def test_who_may_not_read_the_lease_does_not_lead_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    clock = [0.0]
    contest, client = contender(Server(), "a", clock)
    client.cut = "right"
    for _ in range(3):
        await contest.turn()
    assert not contest.leads
    assert [record.message for record in caplog.records] == [
        "The lease octavo-system/octavo cannot be read or written: leases is forbidden"
    ]


async def test_work_runs_while_we_lead_is_ended_when_we_do_not_and_the_lease_is_given_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(election, "RENEW_SECONDS", 0.001)
    clock, server, told = [0.0], Server(), asyncio.Queue[str]()
    contest, client = contender(server, "a", clock)

    async def work() -> None:
        told.put_nowait("begins")
        try:
            await asyncio.Event().wait()
        finally:
            told.put_nowait("ends")

    running = asyncio.create_task(contest.run(work))
    async with asyncio.timeout(10):
        assert await told.get() == "begins"
        client.cut = "request"
        clock[0] += WRITE_SECONDS
        assert await told.get() == "ends"
        client.cut = None
        assert await told.get() == "begins"
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        assert await told.get() == "ends"
    assert server.lease is not None
    assert "holderIdentity" not in server.lease["spec"]
    assert client.write_until == -math.inf


async def test_a_fault_of_the_work_ends_the_election_and_gives_the_lease_back() -> None:
    server = Server()
    contest, _ = contender(server, "a", [0.0])

    async def work() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await contest.run(work)
    assert server.lease is not None
    assert "holderIdentity" not in server.lease["spec"]


CONTENDERS: Final = 3
STEPS: Final = st.lists(
    st.tuples(
        st.integers(0, CONTENDERS - 1),  # whose turn it is; who has none is stopped
        st.floats(0.0, 2 * LEASE_SECONDS),  # seconds until then
        st.sampled_from([None, None, "request", "answer"]),
        st.floats(0.0, 3.0),  # seconds that each of its requests takes
    ),
    max_size=40,
)


@given(STEPS)
def test_never_do_two_lead_at_once(steps: list[tuple[int, float, str | None, float]]) -> None:
    clock, server = [0.0], Server()
    contenders = [contender(server, str(number), clock) for number in range(CONTENDERS)]

    async def play() -> None:
        for number, pause, cut, delay in steps:
            clock[0] += pause
            contest, client = contenders[number]
            client.cut, client.delay = cut, delay
            await contest.turn()
            assert sum(each.leads for each, _ in contenders) <= 1

    asyncio.run(play())
