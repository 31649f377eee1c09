import asyncio

from hypothesis import given
from hypothesis import strategies as st

from octavo_operator.queue import Backlog, TokenBucket, WorkQueue


def test_a_key_added_many_times_is_worked_on_once() -> None:
    backlog = Backlog[str]()
    for _ in range(10):
        backlog.add("a", 0.0)
    assert backlog.pop(0.0) == "a"
    backlog.done("a")
    assert backlog.pop(100.0) is None


def test_keys_come_in_the_order_in_which_they_were_added() -> None:
    backlog = Backlog[str]()
    for key in "cab":
        backlog.add(key, 0.0)
    assert [backlog.pop(0.0) for _ in range(3)] == ["c", "a", "b"]


def test_a_key_is_with_one_worker_at_a_time_and_runs_again_if_it_was_added_meanwhile() -> None:
    backlog = Backlog[str]()
    backlog.add("a", 0.0)
    assert backlog.pop(0.0) == "a"
    backlog.add("a", 0.0)
    assert backlog.pop(0.0) is None
    assert backlog.next_due() is None
    backlog.done("a")
    assert backlog.pop(0.0) == "a"


def test_a_delayed_key_waits_and_an_earlier_time_wins() -> None:
    backlog = Backlog[str]()
    backlog.add("a", 30.0)
    backlog.add("a", 5.0)
    backlog.add("a", 60.0)
    assert backlog.pop(4.9) is None
    assert backlog.next_due() == 5.0
    assert backlog.pop(5.0) == "a"
    backlog.done("a")
    assert backlog.next_due() is None


def test_failures_wait_exponentially_longer_up_to_a_cap_and_success_forgets_them() -> None:
    backlog = Backlog[str]()

    def fail() -> float:
        return backlog.failed("a", 0.0, first_delay=1.0, max_delay=10.0)

    assert [fail() for _ in range(6)] == [1.0, 2.0, 4.0, 8.0, 10.0, 10.0]
    backlog.succeeded("a")
    assert fail() == 1.0


def test_what_nobody_could_work_on_is_not_overdue_and_keeps_its_order() -> None:
    backlog = Backlog[str]()
    for key, due in (("b", 2.0), ("a", 1.0), ("later", 90.0)):
        backlog.add(key, due)
    backlog.forgive(60.0)
    assert backlog.next_due() == 60.0
    assert {backlog.pop(60.0), backlog.pop(60.0)} == {"a", "b"}
    assert backlog.pop(60.0) is None
    assert backlog.next_due() == 90.0


def test_a_thousand_failures_do_not_overflow() -> None:
    backlog = Backlog[str]()
    delays = [backlog.failed("a", 0.0, first_delay=1.0, max_delay=60.0) for _ in range(2000)]
    assert delays[-1] == 60.0


def test_an_event_cuts_the_wait_of_a_failed_key_short() -> None:
    backlog = Backlog[str]()
    backlog.failed("a", 0.0, first_delay=60.0, max_delay=60.0)
    backlog.add("a", 1.0)
    assert backlog.pop(1.0) == "a"


@given(
    st.lists(st.tuples(st.sampled_from(["add", "pop", "done"]), st.sampled_from("abc"), st.integers(0, 5)), max_size=60)
)
def test_no_key_is_ever_lost_or_handed_out_twice(steps: list[tuple[str, str, int]]) -> None:
    backlog = Backlog[str]()
    waiting: dict[str, float] = {}
    active: set[str] = set()
    for now, (step, key, delay) in enumerate(steps):
        if step == "add":
            backlog.add(key, now + delay)
            waiting[key] = min(waiting.get(key, now + delay), now + delay)
        elif step == "done" and key in active:
            backlog.done(key)
            active.remove(key)
        elif step == "pop":
            due = {waiter for waiter, at in waiting.items() if at <= now and waiter not in active}
            popped = backlog.pop(now)
            assert (popped in due) if due else (popped is None)
            if popped is not None:
                del waiting[popped]
                active.add(popped)
        assert len(backlog) == len(waiting)
        assert backlog.next_due() == min((at for waiter, at in waiting.items() if waiter not in active), default=None)


async def test_a_waiting_worker_is_woken_by_a_key_and_by_its_due_time() -> None:
    queue = WorkQueue[str]()
    worker = asyncio.create_task(queue.get())
    await asyncio.sleep(0)
    queue.add("later", delay=0.01)
    assert await worker == "later"
    worker = asyncio.create_task(queue.get())
    await asyncio.sleep(0)
    queue.add("now")
    assert await worker == "now"
    queue.add("now")
    worker = asyncio.create_task(queue.get())
    await asyncio.sleep(0)
    assert not worker.done()
    queue.done("now")
    assert await worker == "now"


async def test_every_key_reaches_one_of_many_workers() -> None:
    queue = WorkQueue[int]()
    seen: list[int] = []
    all_seen = asyncio.Event()

    async def work() -> None:
        while True:
            key = await queue.get()
            await asyncio.sleep(0)
            seen.append(key)
            queue.done(key)
            if len(seen) == 100:
                all_seen.set()

    workers = [asyncio.create_task(work()) for _ in range(4)]
    for key in range(100):
        queue.add(key)
    async with asyncio.timeout(10):
        await all_seen.wait()
    for worker in workers:
        worker.cancel()
    await asyncio.gather(*workers, return_exceptions=True)
    assert sorted(seen) == list(range(100))


def test_a_bucket_lets_a_burst_pass_and_then_holds_the_rate() -> None:
    bucket = TokenBucket(rate=10.0, burst=3.0, now=0.0)
    assert [bucket.reserve(0.0) for _ in range(5)] == [0.0, 0.0, 0.0, 0.1, 0.2]
    assert bucket.reserve(10.0) == 0.0


def test_an_idle_bucket_saves_no_more_than_its_burst() -> None:
    bucket = TokenBucket(rate=1.0, burst=2.0, now=0.0)
    assert [bucket.reserve(1000.0) for _ in range(3)] == [0.0, 0.0, 1.0]
