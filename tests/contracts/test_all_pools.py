"""What every pool promises, whatever it is a pool of.

A new pool joins with a line in POOLS. `Subject` calls `acquire` with the arguments that the pool
wants, so that the tests read alike.
"""

import asyncio
import gc
import os
import signal
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from running import in_forked_child, wait_until

from moirai import pools
from moirai.errors import Closed, InvalidArgument, Timeout


class Thing:
    """Something to pool."""


@dataclass(frozen=True)
class Subject:
    """A pool, and what its `acquire` wants."""

    pool: Any
    arguments: tuple[Any, ...] = ()

    def acquire(self, **options: Any) -> Any:
        return self.pool.acquire(*self.arguments, **options)

    def lease(self, **options: Any) -> Any:
        return self.pool.lease(*self.arguments, **options)

    async def acquire_async(self, **options: Any) -> Any:
        return await self.pool.acquire_async(*self.arguments, **options)

    def release(self, item: Any) -> None:
        self.pool.release(item)

    def now(self) -> pools.PoolStatistics:
        found: pools.PoolStatistics = self.pool.statistics()
        return found


Make = Callable[..., Subject]

# The line from which every test here acquires.
ACQUIRE_LINE = Subject.acquire.__code__.co_firstlineno + 1


def objects(factory: Callable[[], Any], **functions: Any) -> Make:
    def make(*, max_count: int = 4, **options: Any) -> Subject:
        return Subject(pools.ObjectPool(factory, max_size=max_count, **functions, **options))

    return make


def accept(item: object) -> bool:
    return True


POOLS: dict[str, Make] = {
    "objects": objects(Thing),
    "objects, looked at and reset": objects(Thing, reset=accept, destroy=accept, validate=accept),
    "objects without weak references": objects(lambda: bytearray(8)),
    "buffers": lambda *, max_count=4, **options: Subject(
        pools.BufferPool(max_count=max_count, **options), (100,)
    ),
    "vectors": lambda *, max_count=4, **options: Subject(
        pools.VectorPool(max_count=max_count, **options)
    ),
}
# Those whose items are noticed when they are collected without a release.
NOTICED = {name: make for name, make in POOLS.items() if "without" not in name}

every_pool = pytest.mark.parametrize("make", POOLS.values(), ids=POOLS.keys())
every_noticing_pool = pytest.mark.parametrize("make", NOTICED.values(), ids=NOTICED.keys())


def assert_adds_up(subject: Subject, in_use: int = 0) -> pools.PoolStatistics:
    now = subject.now()
    assert now.acquires == now.hits + now.misses
    alive = now.created - now.destroyed - now.leaked - now.detached
    assert alive == now.idle + now.in_use == now.permits
    assert now.in_use == in_use <= now.peak_in_use
    assert now.waiting == 0
    assert len(subject.pool.leaks()) == in_use
    return now


@contextmanager
def checked(make: Make, **options: Any) -> Iterator[Subject]:
    """Give a fresh pool; when the caller has given everything back, its books must balance."""
    subject = make(**options)
    yield subject
    assert_adds_up(subject)
    subject.pool.close()
    assert assert_adds_up(subject).idle == 0


@contextmanager
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as executor:
        yield executor


def queued(executor: ThreadPoolExecutor, subject: Subject, **options: Any) -> Future[Any]:
    """Start a thread that waits for an item; return when it waits."""
    before = subject.now().waiting
    future = executor.submit(subject.acquire, **options)
    wait_until(lambda: subject.now().waiting == before + 1)
    return future


# --- turns --------------------------------------------------------------------------------------


@every_pool
def test_first_acquire_is_a_miss_and_the_next_a_hit(make: Make) -> None:
    with checked(make) as subject:
        item = subject.acquire()
        assert (subject.now().hits, subject.now().misses) == (0, 1)
        subject.release(item)
        del item
        item = subject.acquire()
        now = assert_adds_up(subject, in_use=1)
        assert (now.hits, now.misses, now.created) == (1, 1, 1)
        subject.release(item)


@every_pool
def test_lease_gives_back_at_the_end_of_its_block_whatever_happens(make: Make) -> None:
    with checked(make) as subject:
        with subject.lease():
            assert_adds_up(subject, in_use=1)
        with pytest.raises(ZeroDivisionError), subject.lease():
            raise ZeroDivisionError
        assert assert_adds_up(subject).hits == 1


@every_pool
def test_peak_is_the_most_that_was_out_at_once(make: Make) -> None:
    with checked(make) as subject:
        for item in [subject.acquire() for _ in range(3)]:
            subject.release(item)
        subject.release(subject.acquire())
        assert subject.now().peak_in_use == 3


@every_pool
def test_second_release_is_refused_and_changes_nothing(make: Make) -> None:
    with checked(make) as subject:
        item = subject.acquire()
        subject.release(item)
        with pytest.raises(InvalidArgument, match=r"must be in use, got a \w+ that was released"):
            subject.release(item)
        assert assert_adds_up(subject).idle == 1


@every_pool
@pytest.mark.parametrize(
    "stranger", [None, 3, "x", Thing(), bytearray(8)], ids=lambda item: type(item).__name__
)
def test_release_of_a_stranger_is_refused_by_its_type(make: Make, stranger: object) -> None:
    with checked(make) as subject:
        kind = type(stranger).__name__
        message = rf"must come from this pool, got a {kind} that it does not have"
        with pytest.raises(InvalidArgument, match=message):
            subject.release(stranger)


@every_pool
def test_release_to_another_pool_is_refused(make: Make) -> None:
    with checked(make) as subject, checked(make) as other:
        item = subject.acquire()
        with pytest.raises(InvalidArgument, match=r"must come from this pool"):
            other.release(item)
        subject.release(item)


# --- permits ------------------------------------------------------------------------------------


@every_pool
def test_no_more_than_max_count_are_out_and_what_is_left_behind_is_said(make: Make) -> None:
    with checked(make, max_count=2) as subject:
        items = [subject.acquire(), subject.acquire()]
        message = (
            r"acquire: nothing was released within 0\.01 s: 2 of at most 2 are in use, "
            r"0 others wait; nothing was acquired"
        )
        with pytest.raises(Timeout, match=message):
            subject.acquire(timeout_seconds=0.01)
        with pytest.raises(TimeoutError, match=r"acquire: nothing is free: 2 of at most 2"):
            subject.acquire(timeout_seconds=0)
        now = assert_adds_up(subject, in_use=2)
        assert (now.timeouts, now.waits) == (2, 1)
        for item in items:
            subject.release(item)


@every_pool
def test_overflow_raise_does_not_wait(make: Make) -> None:
    with checked(make, max_count=1, overflow="raise") as subject:
        with subject.lease(), pytest.raises(Timeout, match=r"nothing is free: 1 of at most 1"):
            subject.acquire()
        assert (subject.now().waits, subject.now().timeouts) == (0, 1)


@every_pool
def test_overflow_create_makes_more_and_keeps_no_more(make: Make) -> None:
    with checked(make, max_count=1, overflow="create") as subject:
        items = [subject.acquire() for _ in range(3)]
        assert_adds_up(subject, in_use=3)
        for item in items:
            subject.release(item)
        now = assert_adds_up(subject)
        assert (now.idle, now.destroyed, now.created) == (1, 2, 3)


@every_pool
@pytest.mark.parametrize("seconds", [-1, -0.001, float("nan"), float("inf"), 1e10])
def test_timeout_out_of_range_is_refused(make: Make, seconds: float) -> None:
    with checked(make) as subject:
        message = r"timeout_seconds: must be None or a number from 0 to 1e9, got "
        with pytest.raises(InvalidArgument, match=message):
            subject.acquire(timeout_seconds=seconds)
        with pytest.raises(InvalidArgument, match=message):
            subject.lease(timeout_seconds=seconds)
        with pytest.raises(InvalidArgument, match=message):
            asyncio.run(subject.acquire_async(timeout_seconds=seconds))


@every_pool
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_count": 0}, r"max_(size|count): must be from 1 to 4294967295, got 0"),
        ({"max_count": -1}, r"max_(size|count): must be from 1 to 4294967295, got -1"),
        ({"max_count": 1 << 80}, r"max_(size|count): must be from 1 to 4294967295, got 12089"),
        ({"overflow": "wait"}, r'overflow: must be "block" or "raise" or "create", got "wait"'),
        ({"idle_seconds": -1}, r"idle_seconds: must be None or a number from 0 to 1e9, got -1"),
    ],
    ids=str,
)
def test_bounds_out_of_range_are_refused_by_name(
    make: Make, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidArgument, match=message):
        make(**options)


@every_pool
def test_bounds_of_the_wrong_type_are_refused_by_name(make: Make) -> None:
    with pytest.raises(TypeError, match=r"max_(size|count): must be an int, got float"):
        make(max_count=1.5)


# --- waiting ------------------------------------------------------------------------------------


@every_pool
def test_who_waits_is_served_in_order_of_arrival(make: Make) -> None:
    with checked(make, max_count=1) as subject, threads() as executor:
        item = subject.acquire()
        waiting = [queued(executor, subject) for _ in range(4)]
        assert subject.now().waiting == 4
        subject.release(item)
        for index, future in enumerate(waiting):
            item = future.result(60)
            # Handed over, so nobody behind it has got anything.
            assert not any(later.done() for later in waiting[index + 1 :])
            assert subject.now().in_use == 1
            subject.release(item)
        now = assert_adds_up(subject)
        assert (now.created, now.waits, now.hits) == (1, 4, 4)


@every_pool
def test_who_gave_up_waiting_is_passed_over(make: Make) -> None:
    with checked(make, max_count=1) as subject, threads() as executor:
        item = subject.acquire()
        first = executor.submit(subject.acquire, timeout_seconds=0.2)
        wait_until(lambda: subject.now().waits == 1)
        second = executor.submit(subject.acquire)
        wait_until(lambda: subject.now().waits == 2)
        with pytest.raises(Timeout):
            first.result(60)
        subject.release(item)
        subject.release(second.result(60))


@every_pool
def test_close_wakes_those_who_wait_and_takes_back_what_is_out(make: Make) -> None:
    subject = make(max_count=1)
    item = subject.acquire()
    with threads() as executor:
        waiting = [queued(executor, subject) for _ in range(3)]
        subject.pool.close()
        for future in waiting:
            with pytest.raises(Closed, match=r"acquire: this pool is closed"):
                future.result(60)
    assert_adds_up(subject, in_use=1)
    subject.release(item)
    now = assert_adds_up(subject)
    assert (now.idle, now.destroyed) == (0, 1)


@every_pool
def test_ctrl_c_ends_a_wait_and_leaves_the_queue(make: Make) -> None:
    with checked(make, max_count=1) as subject:
        item = subject.acquire()

        def interrupt() -> None:
            wait_until(lambda: subject.now().waiting == 1)
            os.kill(os.getpid(), signal.SIGINT)

        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            subject.acquire()
        thread.join()
        assert_adds_up(subject, in_use=1)
        subject.release(item)


@every_pool
def test_a_signal_handler_that_returns_does_not_end_a_wait(make: Make) -> None:
    with checked(make, max_count=1) as subject:
        item = subject.acquire()
        heard = threading.Event()
        old = signal.signal(signal.SIGUSR1, lambda *_: heard.set())

        def signal_then_release() -> None:
            wait_until(lambda: subject.now().waiting == 1)
            os.kill(os.getpid(), signal.SIGUSR1)
            assert heard.wait(60)
            subject.release(item)

        thread = threading.Thread(target=signal_then_release)
        thread.start()
        try:
            subject.release(subject.acquire())
        finally:
            thread.join()
            signal.signal(signal.SIGUSR1, old)


# --- keeping and giving up ----------------------------------------------------------------------


@every_pool
def test_prefilled_items_are_hits(make: Make) -> None:
    with checked(make, max_count=3) as subject:
        assert subject.pool.prefill(*subject.arguments, 2) == 2
        assert subject.pool.prefill(*subject.arguments, 2) == 0
        assert subject.pool.prefill(*subject.arguments, 3) == 1
        with subject.lease(), subject.lease():
            pass
        now = assert_adds_up(subject)
        assert (now.hits, now.misses, now.created) == (2, 0, 3)
        with pytest.raises(InvalidArgument, match=r"count: must be from 0 to 3, got 4"):
            subject.pool.prefill(*subject.arguments, 4)


@every_pool
def test_prefill_stops_at_the_permits(make: Make) -> None:
    with checked(make, max_count=3) as subject:
        items = [subject.acquire(), subject.acquire()]
        assert subject.pool.prefill(*subject.arguments, 3) == 1
        for item in items:
            subject.release(item)


@every_pool
def test_clear_gives_up_what_is_idle_and_nothing_else(make: Make) -> None:
    with checked(make) as subject:
        item = subject.acquire()
        subject.pool.prefill(*subject.arguments, 2)
        assert subject.pool.clear() == 2
        assert subject.pool.clear() == 0
        assert assert_adds_up(subject, in_use=1).destroyed == 2
        subject.release(item)


@every_pool
def test_trim_spares_what_came_back_lately(make: Make) -> None:
    with checked(make) as subject:
        subject.pool.prefill(*subject.arguments, 3)
        assert subject.pool.trim(1000) == 0
        assert subject.pool.trim() == 3
        assert assert_adds_up(subject).idle == 0
        with pytest.raises(InvalidArgument, match=r"idle_seconds: must be None or a number"):
            subject.pool.trim(-1)


@every_pool
def test_what_is_too_old_is_given_up_at_the_next_operation(make: Make) -> None:
    # Everything that rests is too old at once, so no time has to pass.
    with checked(make, idle_seconds=0) as subject:
        subject.pool.prefill(*subject.arguments, 2)
        item = subject.acquire()
        now = assert_adds_up(subject, in_use=1)
        assert (now.idle, now.destroyed, now.misses) == (0, 2, 1)
        subject.release(item)


@every_pool
def test_what_is_young_is_kept(make: Make) -> None:
    with checked(make, idle_seconds=1000) as subject:
        for _ in range(3):
            subject.release(subject.acquire())
        assert subject.pool.trim() == 0
        assert subject.now().hits == 2


@every_pool
def test_closed_pool_hands_nothing_out(make: Make) -> None:
    subject = make()
    with subject.pool as entered:
        assert entered is subject.pool
        assert not subject.pool.closed
        subject.release(subject.acquire())
    assert subject.pool.closed
    assert "closed" in repr(subject.pool)
    for use in (
        subject.acquire,
        lambda: subject.acquire(timeout_seconds=0),
        lambda: asyncio.run(subject.acquire_async()),
        lambda: subject.pool.prefill(*subject.arguments, 1),
        lambda: subject.pool.__enter__(),
        lambda: subject.lease().__enter__(),
    ):
        with pytest.raises(Closed, match=r"this pool is closed"):
            use()
    subject.pool.close()
    assert assert_adds_up(subject).idle == 0


# --- items that are never released --------------------------------------------------------------


@every_noticing_pool
def test_collected_item_is_counted_and_its_permit_comes_back(make: Make) -> None:
    with checked(make, max_count=1) as subject:
        item = subject.acquire()
        del item
        gc.collect()
        now = assert_adds_up(subject)
        assert (now.leaked, now.idle) == (1, 0)
        subject.release(subject.acquire())


@every_noticing_pool
def test_item_collected_in_a_cycle_is_counted_too(make: Make) -> None:
    with checked(make) as subject:
        cycle: list[Any] = [subject.acquire()]
        cycle.append(cycle)
        del cycle
        gc.collect()
        assert assert_adds_up(subject).leaked == 1


@every_noticing_pool
def test_permit_of_a_collected_item_goes_to_the_one_who_waits(make: Make) -> None:
    with checked(make, max_count=1) as subject, threads() as executor:
        item = subject.acquire()
        future = queued(executor, subject)
        del item
        gc.collect()
        subject.release(future.result(60))
        del future
        assert (subject.now().leaked, subject.now().created) == (1, 2)


@every_pool
def test_leaks_name_the_line_that_acquired(make: Make) -> None:
    with checked(make, track_sites=True) as subject:
        item = subject.acquire()
        (found,) = subject.pool.leaks()
        assert found.site is not None
        assert found.site.endswith(f"test_all_pools.py:{ACQUIRE_LINE}"), found.site
        assert found.kind
        assert found.held_seconds is not None
        assert found.held_seconds >= 0
        subject.release(item)
        del item

        async def acquire() -> None:
            item = await subject.acquire_async()
            (found,) = subject.pool.leaks()
            assert "test_all_pools.py:" in str(found.site)
            subject.release(item)

        asyncio.run(acquire())


@every_pool
def test_leaks_are_the_longest_held_first_and_without_sites_unless_asked(make: Make) -> None:
    with checked(make) as subject:
        items = [subject.acquire() for _ in range(3)]
        found = subject.pool.leaks()
        assert [(leak.site, leak.held_seconds) for leak in found] == [(None, None)] * 3
        for item in items:
            subject.release(item)


# --- asyncio ------------------------------------------------------------------------------------


@every_pool
def test_async_acquire_is_at_once_when_something_is_free(make: Make) -> None:
    async def main() -> None:
        item = await subject.acquire_async()
        subject.release(item)
        item = await subject.acquire_async(timeout_seconds=0)
        subject.release(item)

    with checked(make) as subject:
        asyncio.run(main())
        assert (subject.now().hits, subject.now().waits) == (1, 0)


async def settled(condition: Callable[[], bool]) -> None:
    """Let the other tasks run until the condition holds."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        await asyncio.sleep(0)


@every_pool
def test_tasks_and_threads_wait_in_one_queue(make: Make) -> None:
    async def main() -> None:
        order: list[str] = []

        async def task(name: str) -> None:
            item = await subject.acquire_async()
            order.append(name)
            subject.release(item)

        def thread() -> None:
            item = subject.acquire()
            order.append("thread")
            subject.release(item)

        item = subject.acquire()
        first = asyncio.create_task(task("first"))
        await settled(lambda: subject.now().waiting == 1)
        between = asyncio.to_thread(thread)
        between_task = asyncio.create_task(between)
        await settled(lambda: subject.now().waiting == 2)
        last = asyncio.create_task(task("last"))
        await settled(lambda: subject.now().waiting == 3)
        subject.release(item)
        await asyncio.gather(first, between_task, last)
        assert order == ["first", "thread", "last"]

    with checked(make, max_count=1) as subject:
        asyncio.run(main())


@every_pool
def test_async_acquire_that_times_out_leaves_the_queue(make: Make) -> None:
    async def main() -> None:
        item = subject.acquire()
        with pytest.raises(Timeout, match=r"within 0\.01 s: 1 of at most 1 are in use"):
            await subject.acquire_async(timeout_seconds=0.01)
        with pytest.raises(Timeout, match=r"nothing is free"):
            await subject.acquire_async(timeout_seconds=0)
        assert subject.now().waiting == 0
        subject.release(item)

    with checked(make, max_count=1) as subject:
        asyncio.run(main())
        assert subject.now().timeouts == 2


@every_pool
def test_cancelled_wait_leaves_the_queue(make: Make) -> None:
    async def main() -> None:
        item = subject.acquire()
        task = asyncio.create_task(subject.acquire_async())
        await settled(lambda: subject.now().waiting == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert subject.now().waiting == 0
        subject.release(item)

    with checked(make, max_count=1) as subject:
        asyncio.run(main())


@every_pool
@pytest.mark.parametrize("turns_of_the_loop", [0, 1, 2, 3])
def test_grant_to_a_cancelled_task_is_not_lost(make: Make, turns_of_the_loop: int) -> None:
    """Cancelled after the release that served it, before it ran: the next one gets the item."""

    async def main() -> None:
        item = subject.acquire()
        first = asyncio.create_task(subject.acquire_async())
        await settled(lambda: subject.now().waiting == 1)
        second = asyncio.create_task(subject.acquire_async())
        await settled(lambda: subject.now().waiting == 2)
        subject.release(item)
        for _ in range(turns_of_the_loop):
            await asyncio.sleep(0)
        cancelled = first.cancel()
        results = await asyncio.gather(first, return_exceptions=True)
        if isinstance(results[0], asyncio.CancelledError):
            assert cancelled
        else:
            # It had its item before the cancellation reached it.
            subject.release(results[0])
        del results
        subject.release(await second)

    with checked(make, max_count=1) as subject:
        asyncio.run(main())
        assert subject.now().leaked == 0


@every_pool
def test_task_that_is_cancelled_before_it_starts_takes_nothing(make: Make) -> None:
    async def main() -> None:
        task = asyncio.create_task(subject.acquire_async())
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with checked(make) as subject:
        asyncio.run(main())
        assert subject.now().acquires == 0


@every_pool
def test_loops_in_several_threads_share_a_pool(make: Make) -> None:
    def loop() -> int:
        async def one() -> None:
            for _ in range(20):
                item = await subject.acquire_async()
                await asyncio.sleep(0)
                subject.release(item)
                del item

        async def main() -> None:
            await asyncio.gather(*(one() for _ in range(4)))

        asyncio.run(main())
        return 1

    with checked(make, max_count=2) as subject:
        with threads() as executor:
            assert sum(executor.map(lambda _: loop(), range(3))) == 3
        assert subject.now().acquires == 3 * 4 * 20
        assert subject.now().peak_in_use <= 2


@every_pool
def test_waiter_of_a_closed_loop_is_passed_over(make: Make) -> None:
    with checked(make, max_count=1) as subject, threads() as executor:
        item = subject.acquire()
        loop = asyncio.new_event_loop()
        coroutine = subject.acquire_async()
        task = loop.create_task(coroutine)
        while subject.now().waiting == 0:
            loop.run_until_complete(asyncio.sleep(0))
        behind = queued(executor, subject)
        # Closed without the cancellation that asyncio.run would bring.
        loop.close()
        subject.release(item)
        subject.release(behind.result(60))
        assert not task.done()
        task._log_destroy_pending = False  # type: ignore[attr-defined]
        coroutine.close()


@every_pool
def test_dropped_ticket_gives_its_grant_to_the_next_one(make: Make) -> None:
    with checked(make, max_count=1) as subject, threads() as executor:
        item = subject.acquire()
        woken = threading.Event()
        arguments = (*subject.arguments, False) if subject.arguments else ()
        _, ticket = subject.pool._acquire_or_queue(woken.set, None, *arguments)
        behind = queued(executor, subject)
        subject.release(item)
        assert woken.is_set()
        del ticket
        subject.release(behind.result(60))


@every_pool
def test_close_wakes_tasks_that_wait(make: Make) -> None:
    async def main() -> None:
        task = asyncio.create_task(subject.acquire_async())
        await settled(lambda: subject.now().waiting == 1)
        subject.pool.close()
        with pytest.raises(Closed, match=r"acquire: this pool is closed"):
            await task

    subject = make(max_count=1)
    item = subject.acquire()
    asyncio.run(main())
    subject.release(item)


# --- threads and processes ----------------------------------------------------------------------


@every_pool
def test_threads_never_share_an_item(make: Make) -> None:
    owners: dict[int, int] = {}
    failures: list[str] = []

    def churn(name: int) -> None:
        for turn in range(200):
            if turn % 3:
                item = subject.acquire(timeout_seconds=60)
                use(item, name)
                subject.release(item)
            else:
                with subject.lease(timeout_seconds=60) as item:
                    use(item, name)
            del item

    def use(item: object, name: int) -> None:
        if owners.setdefault(id(item), name) != name:
            failures.append(f"{item} was given to {name} too")
        time.sleep(0)
        del owners[id(item)]

    with checked(make, max_count=3) as subject, threads() as executor:
        list(executor.map(churn, range(8)))
        now = subject.now()
        assert failures == []
        assert now.acquires == 8 * 200
        assert now.peak_in_use <= 3
        assert now.created <= 3


@every_pool
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_forked_child_starts_with_an_empty_pool_and_all_permits(make: Make) -> None:
    def child() -> None:
        # What is out came with the fork, and is nobody's business here.
        subject.release(held)
        leased.__exit__(None, None, None)
        assert_adds_up(subject)
        assert subject.now() == make(max_count=3).now()
        items = [subject.acquire() for _ in range(3)]
        assert_adds_up(subject, in_use=3)
        with pytest.raises(Timeout):
            subject.acquire(timeout_seconds=0)
        for item in items:
            subject.release(item)
        subject.pool.close()

    with checked(make, max_count=3) as subject:
        subject.release(subject.acquire())
        held = subject.acquire()
        leased = subject.lease()
        leased.__enter__()
        before = subject.now()
        in_forked_child(child)
        assert subject.now() == before
        subject.release(held)
        leased.__exit__(None, None, None)


@every_pool
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_forking_while_threads_use_a_pool_never_hangs(make: Make) -> None:
    def child() -> None:
        for _ in range(10):
            subject.release(subject.acquire(timeout_seconds=0))
        subject.pool.clear()
        assert_adds_up(subject)

    stop = threading.Event()

    def churn() -> None:
        while not stop.is_set():
            subject.release(subject.acquire())

    with checked(make, max_count=1) as subject, threads() as executor:
        running = [executor.submit(churn) for _ in range(3)]
        wait_until(lambda: subject.now().acquires > 10)
        try:
            for _ in range(5):
                in_forked_child(child)
        finally:
            stop.set()
        for future in running:
            future.result(60)


@every_pool
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_closed_pool_stays_closed_in_a_child(make: Make) -> None:
    def child() -> None:
        with pytest.raises(Closed):
            subject.acquire()

    subject = make()
    subject.pool.close()
    in_forked_child(child)


EXIT = """
import atexit, threading, time
from moirai import pools

class Thing: pass

make = {make}
pool, arguments = make
held = pool.acquire(*arguments)
leased = pool.lease(*arguments)
leased.__enter__()
pool.prefill(*arguments, 1)
pool.acquire(*arguments)
rest = pool.acquire(*arguments)
threading.Thread(target=lambda: pool.acquire(*arguments), daemon=True).start()
deadline = time.monotonic() + 60
while pool.statistics().waiting == 0:
    assert time.monotonic() < deadline
    threading.Event().wait(0.001)

class Late:
    def __del__(self):
        pool.release(held)

atexit.register(lambda: print("left", flush=True))
late = Late()
late.itself = late
"""


@pytest.mark.skipif(
    bool(sysconfig.get_config_var("Py_GIL_DISABLED")) and sys.version_info < (3, 14),
    reason="such a build needs an old PyO3, which aborts in threads that the exit wakes",
)
@pytest.mark.parametrize(
    "make",
    [
        "(pools.ObjectPool(Thing, max_size=3), ())",
        "(pools.BufferPool(max_count=3), (10,))",
        "(pools.VectorPool(max_count=3), ())",
    ],
)
def test_interpreter_ends_though_all_is_out_and_a_thread_waits(
    make: str, run_python: Callable[..., str]
) -> None:
    assert run_python(EXIT.format(make=make)) == "left\n"


# --- the collector ------------------------------------------------------------------------------


@every_pool
def test_finaliser_may_use_the_pool_wherever_the_collector_strikes(make: Make) -> None:
    """The collector runs at almost every allocation, and what it collects calls the pool."""

    class Finalised:
        def __init__(self) -> None:
            self.cycle = self
            self.item = subject.acquire() if subject.now().in_use < 2 else None

        def __del__(self) -> None:
            finalised.append(1)
            subject.now()
            subject.pool.leaks()
            if self.item is not None:
                kept.append(self.item)

    finalised: list[int] = []
    kept: list[Any] = []

    def churn() -> None:
        for _ in range(60):
            Finalised()
            with subject.lease():
                subject.pool.trim(1000)
            while kept:
                drop(kept.pop())

    def drop(item: Any) -> None:
        # Collected with its holder, it was counted as leaked before the finaliser ran.
        try:
            subject.release(item)
        except (InvalidArgument, Closed):
            return

    threshold = gc.get_threshold()
    with checked(make, max_count=40) as subject:
        gc.set_threshold(1)
        try:
            with threads() as executor:
                for future in [executor.submit(churn) for _ in range(4)]:
                    future.result(120)
        finally:
            gc.set_threshold(*threshold)
        gc.collect()
        while kept:
            drop(kept.pop())
        assert len(finalised) == 4 * 60


@every_pool
def test_pool_in_a_cycle_is_collected(make: Make) -> None:
    import weakref

    class Holder:
        def __init__(self) -> None:
            self.subject = make()
            self.item = self.subject.acquire()
            self.lease = self.subject.lease()
            self.subject.release(self.subject.acquire())

    holder = Holder()
    pool = weakref.ref(holder.subject.pool)
    gone = weakref.ref(holder)
    if hasattr(holder.item, "__dict__"):
        holder.item.holder = holder
    del holder
    gc.collect()
    assert (gone(), pool()) == (None, None)
