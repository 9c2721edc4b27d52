"""What each pool adds to the contract of tests/contracts/test_all_pools.py."""

import asyncio
import gc
import itertools
import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from running import wait_until

from moirai import memory, pools
from moirai.errors import Closed, InvalidArgument, OutOfMemory, Timeout

KIB = 1 << 10


class Thing:
    """Something to pool, that knows what happened to it."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def note(self, event: str) -> None:
        self.events.append(event)


def adds_up(pool: Any) -> pools.PoolStatistics:
    now: pools.PoolStatistics = pool.statistics()
    assert now.acquires == now.hits + now.misses
    alive = now.created - now.destroyed - now.leaked - now.detached
    assert alive == now.idle + now.in_use == now.permits
    return now


class Interrupt(BaseException):
    """A request to stop, as KeyboardInterrupt is one."""


class Functions:
    """Factory, reset, destroy and validate that fail when told to, and remember their calls."""

    def __init__(self) -> None:
        self.failing: dict[str, BaseException] = {}
        self.calls: list[tuple[str, Thing | None]] = []
        self.fit = True

    def call(self, name: str, item: Thing | None) -> None:
        self.calls.append((name, item))
        if name in self.failing:
            raise self.failing[name]

    def factory(self) -> Thing:
        self.call("factory", None)
        return Thing()

    def reset(self, item: Thing) -> None:
        self.call("reset", item)

    def destroy(self, item: Thing) -> None:
        self.call("destroy", item)

    def validate(self, item: Thing) -> bool:
        self.call("validate", item)
        return self.fit

    def pool(self, **options: Any) -> pools.ObjectPool[Thing]:
        return pools.ObjectPool(self.factory, self.reset, self.destroy, self.validate, **options)

    def called(self, name: str) -> list[Thing | None]:
        return [item for called, item in self.calls if called == name]


# --- ObjectPool ---------------------------------------------------------------------------------


def test_idle_objects_are_handed_out_last_in_first_out() -> None:
    pool = pools.ObjectPool(Thing)
    first, second = pool.acquire(), pool.acquire()
    pool.release(first)
    pool.release(second)
    assert pool.acquire() is second
    assert pool.acquire() is first


def test_functions_are_called_with_the_object_at_their_time() -> None:
    functions = Functions()
    pool = functions.pool()
    item = pool.acquire()
    pool.release(item)
    assert pool.acquire() is item
    pool.release(item)
    pool.close()
    assert [name for name, _ in functions.calls] == [
        "factory", "reset", "validate", "reset", "destroy",
    ]  # fmt: skip
    assert all(called is item for name, called in functions.calls if name != "factory")


def test_min_size_is_made_at_once_and_spared_by_age_and_trim() -> None:
    pool = pools.ObjectPool(Thing, min_size=2, idle_seconds=0)
    assert adds_up(pool).idle == 2
    items = [pool.acquire() for _ in range(4)]
    for item in items:
        pool.release(item)
    assert adds_up(pool).idle == 2
    assert pool.trim(0) == 0
    assert pool.clear() == 2


def test_factory_that_fails_at_once_fails_the_construction() -> None:
    functions = Functions()
    functions.failing["factory"] = OSError("no route")
    with pytest.raises(OSError, match="no route"):
        functions.pool(min_size=1)


def test_construction_that_fails_destroys_what_it_made() -> None:
    made: list[Thing] = []
    destroyed: list[Thing] = []

    def factory() -> Thing:
        if len(made) == 2:
            raise OSError("no route")
        made.append(Thing())
        return made[-1]

    with pytest.raises(OSError, match="no route"):
        pools.ObjectPool(factory, destroy=destroyed.append, min_size=3)
    assert len(destroyed) == 2
    assert {id(thing) for thing in destroyed} == {id(thing) for thing in made}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"min_size": -1}, InvalidArgument, r"min_size: must be from 0 to 64, got -1"),
        ({"min_size": 65}, InvalidArgument, r"min_size: must be from 0 to 64, got 65"),
        ({"min_size": True}, TypeError, r"min_size: must be an int, got bool"),
        ({"factory": 3}, TypeError, r"factory: must be callable, got int"),
        ({"reset": 3}, TypeError, r"reset: must be callable, got int"),
        ({"destroy": "x"}, TypeError, r"destroy: must be callable, got str"),
        ({"validate": []}, TypeError, r"validate: must be callable, got list"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_by_name(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        pools.ObjectPool(**{"factory": Thing, **options})


def test_factory_that_gives_an_object_twice_is_refused_and_takes_no_permit() -> None:
    shared = Thing()
    pool = pools.ObjectPool(lambda: shared, max_size=2)
    assert pool.acquire() is shared
    with pytest.raises(InvalidArgument, match=r"factory: must make a new object .* got a Thing"):
        pool.acquire()
    with pytest.raises(InvalidArgument, match=r"factory: must make a new object"):
        pool.prefill(1)
    assert pool.statistics().permits == 1
    pool.release(shared)
    assert adds_up(pool).factory_failures == 2


def test_any_object_can_be_pooled() -> None:
    for factory in (lambda: None, list, dict, object, lambda: 10**30, lambda: lambda: 0, set):
        pool = pools.ObjectPool(factory)
        item = pool.acquire()
        pool.release(item)
        assert pool.acquire() is item


def test_generic_aliases_exist_at_run_time() -> None:
    pool = pools.ObjectPool[Thing](Thing)
    assert isinstance(pool, pools.ObjectPool)
    assert isinstance(pool.acquire(), Thing)
    assert str(pools.Lease[int]) == "moirai.pools.Lease[int]"
    assert pools.AsyncLease[int] is not None


def test_pool_can_be_subclassed() -> None:
    class Connections(pools.ObjectPool[Thing]):
        def broken(self) -> int:
            return self.statistics().validation_failures

    pool = Connections(Thing, max_size=3)
    assert pool.broken() == 0
    assert repr(pool) == "Connections(in_use=0, idle=0, max_size=3)"


def test_statistics_are_data() -> None:
    pool = pools.ObjectPool(Thing, track_sites=True)
    before = pool.statistics()
    assert before == pool.statistics()
    assert before != pools.ObjectPool(Thing, min_size=1).statistics()
    with pool.lease():
        assert pool.statistics() != before
        assert pool.statistics().as_dict()["in_use"] == 1
        assert "in_use=1, peak_in_use=1" in repr(pool.statistics())
        (leak,) = pool.leaks()
        assert repr(leak).startswith("Acquisition(kind='Thing', site='")
    assert repr(pools.VectorPool().statistics()) == repr(before)


def test_idle_objects_live_as_long_as_the_pool() -> None:
    pool = pools.ObjectPool(Thing)
    item = pool.acquire()
    seen = weakref.ref(item)
    pool.release(item)
    del item
    assert seen() is not None
    del pool
    assert seen() is None


# --- ObjectPool: functions that fail ------------------------------------------------------------


def test_failing_factory_gives_its_permit_back_and_raises_what_it_raised() -> None:
    functions = Functions()
    pool = functions.pool(max_size=1)
    error = functions.failing["factory"] = OSError("no route")
    with pytest.raises(OSError, match="no route") as raised:
        pool.acquire()
    assert raised.value is error
    assert adds_up(pool).factory_failures == 1
    del functions.failing["factory"]
    pool.release(pool.acquire())


def test_permit_of_a_failing_factory_goes_to_the_one_who_waits() -> None:
    entered, go_on = threading.Event(), threading.Event()

    def factory() -> Thing:
        if not entered.is_set():
            entered.set()
            assert go_on.wait(60)
            raise OSError("no route")
        return Thing()

    pool = pools.ObjectPool(factory, max_size=1)
    outcomes: list[object] = []

    def acquire() -> None:
        try:
            outcomes.append(pool.acquire())
        except OSError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=acquire) for _ in range(2)]
    threads[0].start()
    assert entered.wait(60)
    threads[1].start()
    wait_until(lambda: pool.statistics().waiting == 1)
    go_on.set()
    for thread in threads:
        thread.join(60)
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["OSError", "Thing"]
    assert (pool.statistics().waits, pool.statistics().misses) == (1, 1)


def test_failing_reset_gives_the_object_up_and_the_release_succeeds(
    caplog: pytest.LogCaptureFixture,
) -> None:
    functions = Functions()
    pool = functions.pool(max_size=1)
    item = pool.acquire()
    functions.failing["reset"] = OSError("broken pipe")
    with caplog.at_level(logging.WARNING, "moirai.pools"):
        pool.release(item)
    assert functions.called("destroy") == [item]
    (record,) = caplog.records
    assert record.getMessage() == "reset raised; the object is given up"
    assert record.exc_info is not None
    assert record.exc_info[1] is functions.failing["reset"]
    now = adds_up(pool)
    assert (now.reset_failures, now.destroyed, now.idle) == (1, 1, 0)
    with pytest.raises(InvalidArgument, match="must come from this pool"):
        pool.release(item)
    assert pool.acquire() is not item


def test_failing_reset_at_the_end_of_a_lease_does_not_hide_the_exception() -> None:
    functions = Functions()
    pool = functions.pool()
    functions.failing["reset"] = OSError("broken pipe")
    with pytest.raises(ZeroDivisionError), pool.lease():
        raise ZeroDivisionError
    assert adds_up(pool).reset_failures == 1


def test_failing_destroy_is_logged_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    functions = Functions()
    pool = functions.pool()
    pool.prefill(3)
    functions.failing["destroy"] = OSError("gone")
    with caplog.at_level(logging.WARNING, "moirai.pools"):
        assert pool.clear() == 3
    assert [record.getMessage() for record in caplog.records] == [
        "destroy raised; the object is given up"
    ] * 3
    now = adds_up(pool)
    assert (now.destroy_failures, now.destroyed) == (3, 3)


@pytest.mark.parametrize("how", ["says no", "raises", "gives no truth"])
def test_unfit_object_is_destroyed_and_replaced(how: str) -> None:
    class Untrue:
        def __bool__(self) -> bool:
            raise OSError("no truth")

    functions = Functions()
    pool = functions.pool(max_size=1)
    item = pool.acquire()
    pool.release(item)
    if how == "says no":
        functions.fit = False
    elif how == "raises":
        functions.failing["validate"] = OSError("broken pipe")
    else:
        functions.fit = Untrue()  # type: ignore[assignment]
    replaced = pool.acquire()
    assert replaced is not item
    assert functions.called("destroy") == [item]
    now = adds_up(pool)
    assert (now.validation_failures, now.destroyed, now.hits, now.misses) == (1, 1, 0, 2)
    assert now.in_use == 1


def test_unfit_object_whose_replacement_cannot_be_made_leaves_its_permit() -> None:
    functions = Functions()
    pool = functions.pool(max_size=1)
    pool.prefill(1)
    functions.fit = False
    functions.failing["factory"] = OSError("no route")
    with pytest.raises(OSError, match="no route"):
        pool.acquire()
    now = adds_up(pool)
    assert (now.permits, now.validation_failures, now.factory_failures) == (0, 1, 1)


@pytest.mark.parametrize("stage", ["factory", "reset", "destroy", "validate"])
@pytest.mark.parametrize("leased", [False, True])
def test_request_to_stop_gets_through_and_no_permit_is_lost(stage: str, leased: bool) -> None:
    functions = Functions()
    pool = functions.pool(max_size=1)
    if stage != "factory":
        pool.prefill(1)
    functions.failing[stage] = Interrupt()

    def one_turn() -> None:
        if leased:
            with pool.lease():
                pass
        else:
            pool.release(pool.acquire())
        pool.clear()

    with pytest.raises(Interrupt):
        one_turn()
    functions.failing.clear()
    assert adds_up(pool).in_use == 0
    for _ in range(2):
        pool.release(pool.acquire(timeout_seconds=0))


def test_every_object_is_destroyed_though_the_first_asks_to_stop() -> None:
    functions = Functions()
    pool = functions.pool()
    pool.prefill(3)
    functions.failing["destroy"] = Interrupt()
    with pytest.raises(Interrupt):
        pool.close()
    assert len(functions.called("destroy")) == 3
    assert pool.closed


def test_object_released_after_the_close_is_reset_and_destroyed() -> None:
    functions = Functions()
    pool = functions.pool()
    with pool.lease() as item:
        pool.close()
        assert functions.called("destroy") == []
    assert functions.called("destroy") == [item]


# --- ObjectPool: functions that use the pool ----------------------------------------------------


def test_factory_may_acquire_from_its_own_pool() -> None:
    class Node:
        def __init__(self) -> None:
            depth = pool.statistics().permits
            self.child = pool.acquire() if depth < 3 else None

    pool: pools.ObjectPool[Node] = pools.ObjectPool(Node, max_size=3)
    node = pool.acquire()
    assert node.child is not None
    assert node.child.child is not None
    assert adds_up(pool).in_use == 3


def test_factory_that_waits_for_its_own_permit_can_be_timed_out() -> None:
    def factory() -> object:
        return pool.acquire(timeout_seconds=0.01)

    pool: pools.ObjectPool[object] = pools.ObjectPool(factory, max_size=1)
    with pytest.raises(Timeout, match=r"0 of at most 1 are in use"):
        pool.acquire()
    assert adds_up(pool).permits == 0


@pytest.mark.parametrize("stage", ["reset", "destroy", "validate"])
def test_functions_may_use_the_pool(stage: str) -> None:
    inside: list[Thing] = []

    def use(item: Thing) -> bool:
        if not inside:
            other = pool.acquire()
            inside.append(other)
            assert other is not item
            pool.statistics()
            pool.leaks()
            with pytest.raises(InvalidArgument, match=r"was released before|does not have"):
                pool.release(item)
            pool.release(other)
        return True

    pool = pools.ObjectPool(Thing, **{stage: use})  # type: ignore[arg-type]
    with pool.lease():
        pass
    with pool.lease():
        pass
    pool.clear()
    assert len(inside) == 1
    adds_up(pool)


def test_closing_in_the_factory_still_serves_who_asked_before() -> None:
    def factory() -> Thing:
        pool.close()
        return Thing()

    pool: pools.ObjectPool[Thing] = pools.ObjectPool(factory)
    item = pool.acquire()
    pool.release(item)
    assert adds_up(pool).idle == 0


def test_object_that_releases_itself_in_its_finaliser_is_kept() -> None:
    class Phoenix:
        def __del__(self) -> None:
            if not pool.closed:
                pool.release(self)

    pool: pools.ObjectPool[Phoenix] = pools.ObjectPool(Phoenix)
    item = pool.acquire()
    place = id(item)
    del item
    now = adds_up(pool)
    assert (now.idle, now.leaked) == (1, 0)
    item = pool.acquire()
    assert id(item) == place
    pool.close()
    pool.release(item)


# --- Lease --------------------------------------------------------------------------------------


def test_lease_gives_its_object_while_it_runs_and_not_before_or_after() -> None:
    pool = pools.ObjectPool(Thing)
    lease = pool.lease()
    with pytest.raises(Closed, match=r"lease: must be entered first"):
        _ = lease.value
    with lease as item:
        assert lease.value is item
        assert repr(lease) == "<Lease, running>"
        with pytest.raises(Closed, match=r"lease: was entered before; make a new one"):
            lease.__enter__()
    for use in (lambda: lease.value, lease.release, lease.detach, lease.__enter__):
        with pytest.raises(Closed, match=r"lease: was released; what it held belongs to the pool"):
            use()
    assert adds_up(pool).acquires == 1


def test_lease_that_is_not_entered_takes_nothing() -> None:
    pool = pools.ObjectPool(Thing, max_size=1)
    leases = [pool.lease() for _ in range(3)]
    for lease in leases:
        with lease:
            pass
    assert (pool.statistics().acquires, pool.statistics().created) == (3, 1)


def test_lease_that_could_not_be_entered_can_be_tried_again() -> None:
    pool = pools.ObjectPool(Thing, max_size=1, overflow="raise")
    lease = pool.lease()
    with pool.lease(), pytest.raises(Timeout):
        lease.__enter__()
    with lease:
        pass


def test_lease_may_be_released_inside_its_block() -> None:
    pool = pools.ObjectPool(Thing)
    lease = pool.lease()
    with lease as item:
        lease.release()
        assert pool.acquire() is item
    assert adds_up(pool).in_use == 1


def test_detached_object_is_out_for_good_and_its_permit_comes_back() -> None:
    functions = Functions()
    pool = functions.pool(max_size=1)
    lease = pool.lease()
    with lease as item:
        assert lease.detach() is item
        other = pool.acquire(timeout_seconds=0)
        assert other is not item
    for use in (lambda: lease.value, lease.release, lease.detach):
        with pytest.raises(Closed, match=r"lease: was detached"):
            use()
    with pytest.raises(InvalidArgument, match="must come from this pool"):
        pool.release(item)
    pool.release(other)
    assert functions.called("destroy") == []
    assert adds_up(pool).detached == 1


def test_leased_object_is_not_for_release() -> None:
    pool = pools.ObjectPool(Thing)
    with pool.lease() as item:
        with pytest.raises(InvalidArgument, match=r"got a Thing that a lease holds; leave"):
            pool.release(item)
        assert adds_up(pool).in_use == 1


def test_lease_keeps_its_object_alive() -> None:
    pool = pools.ObjectPool(Thing)
    lease = pool.lease()
    seen = weakref.ref(lease.__enter__())
    gc.collect()
    assert seen() is lease.value
    lease.__exit__(None, None, None)


def test_lease_that_is_dropped_inside_its_block_is_a_leak() -> None:
    functions = Functions()
    pool = functions.pool(max_size=1)
    lease = pool.lease()
    item = lease.__enter__()
    del lease
    now = adds_up(pool)
    assert (now.leaked, now.idle) == (1, 0)
    # Whoever has the object may go on with it.
    assert functions.called("destroy") == functions.called("reset") == []
    assert pool.acquire(timeout_seconds=0) is not item


def test_lease_of_an_abandoned_generator_is_left() -> None:
    def generator() -> Iterator[Thing]:
        with pool.lease() as item:
            yield item

    pool = pools.ObjectPool(Thing)
    running = generator()
    next(running)
    assert pool.statistics().in_use == 1
    del running
    assert (adds_up(pool).idle, pool.statistics().leaked) == (1, 0)


def test_exit_of_a_lease_by_two_threads_ends_it_once() -> None:
    pool = pools.ObjectPool(Thing)
    for _ in range(200):
        lease = pool.lease()
        lease.__enter__()
        barrier = threading.Barrier(2)
        outcomes: list[bool] = []

        def leave(
            lease: pools.Lease[Thing] = lease,
            barrier: threading.Barrier = barrier,
            outcomes: list[bool] = outcomes,
        ) -> None:
            barrier.wait(60)
            try:
                lease.release()
                outcomes.append(True)
            except Closed:
                outcomes.append(False)

        threads = [threading.Thread(target=leave) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert sorted(outcomes) == [False, True]
    assert adds_up(pool).idle == 1


# --- asyncio ------------------------------------------------------------------------------------


def test_async_lease_gives_back_at_the_end_of_its_block() -> None:
    async def main() -> None:
        async with pool.lease_async() as item:
            assert isinstance(item, Thing)
            assert pool.statistics().in_use == 1
            with pytest.raises(Timeout):
                async with pool.lease_async(timeout_seconds=0):
                    pass
        with pytest.raises(ZeroDivisionError):
            async with pool.lease_async():
                raise ZeroDivisionError

    pool = pools.ObjectPool(Thing, max_size=1)
    asyncio.run(main())
    assert adds_up(pool).in_use == 0


@pytest.mark.parametrize("stage", ["factory", "validate"])
def test_function_that_fails_for_a_task_loses_nothing(stage: str) -> None:
    async def main() -> None:
        item = pool.acquire()
        task = asyncio.create_task(pool.acquire_async())
        while pool.statistics().waiting == 0:
            await asyncio.sleep(0)
        if stage == "factory":
            # What it is granted is the permit of an object that could not be reset.
            functions.failing["reset"] = OSError("broken pipe")
        functions.failing[stage] = Interrupt() if stage == "validate" else OSError("no route")
        pool.release(item)
        with pytest.raises((OSError, Interrupt)):
            await task
        functions.failing.clear()
        pool.release(await pool.acquire_async(timeout_seconds=0))

    functions = Functions()
    pool = functions.pool(max_size=1)
    # A task that ends with a request to stop ends its loop too; this one is awaited inside.
    loop = asyncio.new_event_loop()
    try:
        with contextmanager_ignoring(Interrupt):
            loop.run_until_complete(main())
        functions.failing.clear()
        pool.release(pool.acquire(timeout_seconds=0))
    finally:
        loop.close()
    adds_up(pool)


@contextmanager
def contextmanager_ignoring(kind: type[BaseException]) -> Iterator[None]:
    try:
        yield
    except kind:
        return


# --- ObjectPool against a model -----------------------------------------------------------------


class PoolMachine(RuleBasedStateMachine):
    """One thread, every operation, with functions that fail now and then."""

    @initialize(
        max_size=st.integers(1, 4),
        min_size=st.integers(0, 4),
        overflow=st.sampled_from(["block", "raise", "create"]),
        weak=st.booleans(),
    )
    def make(self, max_size: int, min_size: int, overflow: pools.Overflow, weak: bool) -> None:
        self.made = 0
        self.failing: set[str] = set()
        self.destroyed: list[int] = []
        self.max_size, self.min_size = max_size, min(min_size, max_size)
        self.surplus = overflow == "create"
        # By number; the last of the idle ones is the next to be handed out.
        self.idle: list[int] = []
        self.out: list[tuple[int, Any]] = []
        self.leases: list[tuple[int, Any]] = []
        self.closed = False
        self.weak = weak
        self.counts = dict.fromkeys(
            ("hits", "misses", "created", "destroyed", "factory_failures", "reset_failures",
             "validation_failures", "leaked", "detached", "timeouts"), 0,
        )  # fmt: skip
        self.pool: pools.ObjectPool[Any] = pools.ObjectPool(
            self._factory,
            self._reset,
            self._destroy,
            self._validate,
            self.min_size,
            self.max_size,
            overflow,
        )
        for _ in range(self.min_size):
            self.idle.append(len(self.idle) + 1)
            self.counts["created"] += 1

    def _factory(self) -> Any:
        if "factory" in self.failing:
            raise OSError("no route")
        self.made += 1
        item = Thing() if self.weak else None
        if item is None:
            return [self.made]
        item.number = self.made  # type: ignore[attr-defined]
        return item

    def number(self, item: Any) -> int:
        found: int = item[0] if isinstance(item, list) else item.number
        return found

    def _reset(self, item: Any) -> None:
        if "reset" in self.failing:
            raise OSError

    def _destroy(self, item: Any) -> None:
        self.destroyed.append(self.number(item))

    def _validate(self, item: Any) -> bool:
        return "validate" not in self.failing

    @property
    def permits(self) -> int:
        return len(self.idle) + len(self.out) + len(self.leases)

    def expect_destroyed(self, numbers: list[int]) -> None:
        assert self.destroyed == numbers
        self.counts["destroyed"] += len(numbers)
        self.destroyed = []

    def expect_item(self, act: Callable[[], Any]) -> Any:
        """Run an acquire and check that it does what the model says; its item, or None."""
        unfit = []
        if self.idle and "validate" not in self.failing:
            item = act()
            assert self.number(item) == self.idle.pop()
            self.counts["hits"] += 1
            return item
        if self.idle:
            unfit = [self.idle.pop()]
            self.counts["validation_failures"] += 1
        elif self.closed:
            with pytest.raises(Closed):
                act()
            return None
        elif self.permits >= self.max_size and not self.surplus:
            with pytest.raises(Timeout):
                act()
            self.counts["timeouts"] += 1
            return None
        if "factory" in self.failing:
            with pytest.raises(OSError, match="no route"):
                act()
            self.counts["factory_failures"] += 1
            self.expect_destroyed(unfit)
            return None
        item = act()
        assert self.number(item) == self.made
        self.counts["misses"] += 1
        self.counts["created"] += 1
        self.expect_destroyed(unfit)
        return item

    def expect_return(self, number: int) -> None:
        """The model's side of a release; `permits` still counts the object."""
        surplus = self.permits + 1 > self.max_size
        if "reset" in self.failing:
            self.counts["reset_failures"] += 1
            self.expect_destroyed([number])
        elif self.closed or surplus:
            self.expect_destroyed([number])
        else:
            self.idle.append(number)

    @rule(stages=st.sets(st.sampled_from(["factory", "reset", "validate"]), max_size=2))
    def break_functions(self, stages: set[str]) -> None:
        self.failing = stages

    @rule()
    def mend_functions(self) -> None:
        self.failing = set()

    @rule()
    def acquire(self) -> None:
        item = self.expect_item(lambda: self.pool.acquire(timeout_seconds=0))
        if item is not None:
            self.out.append((self.number(item), item))

    @rule()
    def acquire_async(self) -> None:
        async def acquire() -> Any:
            return await self.pool.acquire_async(timeout_seconds=0)

        item = self.expect_item(lambda: asyncio.run(acquire()))
        if item is not None:
            self.out.append((self.number(item), item))

    @rule()
    def enter_lease(self) -> None:
        lease = self.pool.lease(timeout_seconds=0)
        item = self.expect_item(lease.__enter__)
        if item is not None:
            self.leases.append((self.number(item), lease))

    @precondition(lambda self: self.out)
    @rule(index=st.integers(0, 7), twice=st.booleans())
    def release(self, index: int, twice: bool) -> None:
        number, item = self.out.pop(index % len(self.out))
        self.pool.release(item)
        self.expect_return(number)
        if twice:
            with pytest.raises(InvalidArgument):
                self.pool.release(item)

    @precondition(lambda self: self.leases)
    @rule(index=st.integers(0, 7), how=st.sampled_from(["exit", "release", "detach", "drop"]))
    def end_lease(self, index: int, how: str) -> None:
        number, lease = self.leases.pop(index % len(self.leases))
        if how == "detach":
            assert self.number(lease.detach()) == number
            self.counts["detached"] += 1
        elif how == "drop":
            del lease
            self.counts["leaked"] += 1
        else:
            if how == "exit":
                lease.__exit__(None, None, None)
            else:
                lease.release()
            self.expect_return(number)

    @precondition(lambda self: self.out and self.weak)
    @rule(index=st.integers(0, 7))
    def forget(self, index: int) -> None:
        self.out.pop(index % len(self.out))
        self.counts["leaked"] += 1

    @precondition(lambda self: self.leases)
    @rule()
    def release_a_leased_object(self) -> None:
        with pytest.raises(InvalidArgument):
            self.pool.release(self.leases[0][1].value)

    @rule()
    def release_a_stranger(self) -> None:
        with pytest.raises(InvalidArgument):
            self.pool.release(Thing())

    @rule(count=st.integers(0, 4))
    def prefill(self, count: int) -> None:
        if count > self.max_size:
            with pytest.raises(InvalidArgument):
                self.pool.prefill(count)
            return
        if self.closed:
            with pytest.raises(Closed):
                self.pool.prefill(count)
            return
        wanted = max(0, min(count - len(self.idle), self.max_size - self.permits))
        if "factory" in self.failing and wanted:
            with pytest.raises(OSError, match="no route"):
                self.pool.prefill(count)
            self.counts["factory_failures"] += 1
            return
        first = self.made + 1
        assert self.pool.prefill(count) == wanted
        self.idle += range(first, first + wanted)
        self.counts["created"] += wanted

    @rule()
    def trim(self) -> None:
        count = min(len(self.idle), max(0, self.permits - self.min_size))
        assert self.pool.trim() == count
        gone, self.idle = self.idle[:count], self.idle[count:]
        self.expect_destroyed(gone)

    @rule()
    def clear(self) -> None:
        assert self.pool.clear() == len(self.idle)
        gone, self.idle = self.idle, []
        self.expect_destroyed(gone)

    @precondition(lambda self: self.counts["hits"] > 3)
    @rule()
    def close(self) -> None:
        self.pool.close()
        self.closed = True
        gone, self.idle = self.idle, []
        self.expect_destroyed(gone)

    @invariant()
    def adds_up(self) -> None:
        if not hasattr(self, "pool"):
            return
        now = adds_up(self.pool)
        assert {name: getattr(now, name) for name in self.counts} == self.counts
        assert (now.idle, now.in_use) == (len(self.idle), len(self.out) + len(self.leases))
        assert len(self.pool.leaks()) == now.in_use
        assert self.destroyed == []


PoolMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40)
TestObjectPoolIsWhatItsModelIs = PoolMachine.TestCase


# --- BufferPool ---------------------------------------------------------------------------------


@pytest.fixture
def resource() -> Iterator[memory.StatisticsAdaptor]:
    """A resource that must have all its blocks back at the end."""
    adaptor = memory.StatisticsAdaptor(memory.PoolResource())
    yield adaptor
    gc.collect()
    assert adaptor.statistics().current_count == 0
    assert adaptor.check().ok


def place(item: Any) -> int:
    return int(np.frombuffer(item, np.uint8).ctypes.data)


def test_buffer_comes_from_the_smallest_class_that_has_its_size() -> None:
    pool = pools.BufferPool(size_classes=["64 KiB", 1024, "4 KiB", 4096])
    assert pool.size_classes == (1 * KIB, 4 * KIB, 64 * KIB)
    for size, expected in [(0, 1), (1, 1), (1024, 1), (1025, 4), (4096, 4), (4097, 64)]:
        with pool.acquire(size) as buffer:
            assert (buffer.size_bytes, len(buffer)) == (size, size)
            assert buffer.block_bytes >= expected * KIB
            (size_class,) = [size for size, now in pool.class_statistics().items() if now.in_use]
            assert size_class == expected * KIB
    assert adds_up(pool).acquires == 6


def test_presets_are_a_kibibyte_and_64() -> None:
    assert pools.BufferPool().size_classes == (pools.SMALL_BYTES, pools.LARGE_BYTES)
    assert (pools.SMALL_BYTES, pools.LARGE_BYTES) == (KIB, 64 * KIB)


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (
            lambda pool: pool.acquire(64 * KIB + 1),
            InvalidArgument,
            r"size_bytes: must be at most 65536 \(the largest size class\), got 65537",
        ),
        (lambda pool: pool.acquire(-1), InvalidArgument, r"size_bytes: must be at least 0, got -1"),
        (lambda pool: pool.acquire("1"), TypeError, r"size_bytes: must be an int, got str"),
        (lambda pool: pool.acquire(True), TypeError, r"size_bytes: must be an int, got bool"),
        (lambda pool: pool.prefill(1 << 20, 1), InvalidArgument, r"size_bytes: must be at most"),
    ],
    ids=range(5),
)
def test_bad_sizes_are_refused_by_name(
    act: Callable[[pools.BufferPool], object], error: type[Exception], message: str
) -> None:
    pool = pools.BufferPool()
    with pytest.raises(error, match=message):
        act(pool)
    assert adds_up(pool).acquires == 0


@pytest.mark.parametrize("sizes", [[], [0], [-1], ["-1"], ["many"]], ids=str)
def test_bad_size_classes_are_refused_by_name(sizes: list[Any]) -> None:
    with pytest.raises(InvalidArgument, match=r"size_classes: must "):
        pools.BufferPool(size_classes=sizes)


def test_buffer_is_read_and_written_like_a_bytearray(resource: memory.Resource) -> None:
    pool = pools.BufferPool(resource)
    with pool.acquire(8, zeroed=True) as buffer:
        assert bytes(buffer) == bytes(8)
        buffer[:5] = b"hello"
        buffer[-1] = 33
        assert (buffer[0], buffer[-1], buffer[1:4]) == (ord("h"), 33, b"ell")
        assert buffer[::2] == b"hlo\0"
        with pytest.raises(IndexError):
            _ = buffer[8]
        with pytest.raises(ValueError, match="different structures"):
            buffer[:2] = b"long"
        with pytest.raises(TypeError, match=r"buffer: has a fixed length"):
            del buffer[0]
        view = memoryview(buffer)
        assert (view.format, view.shape, view.readonly) == ("B", (8,), False)
        view[0] = ord("j")
        assert buffer.numpy()[0] == ord("j")
        assert buffer.numpy("<u4").shape == (2,)
        view.release()
    pool.close()


def test_released_buffer_is_dead(resource: memory.Resource) -> None:
    pool = pools.BufferPool(resource)
    buffer = pool.acquire(8)
    pool.release(buffer)
    for use in (
        lambda: buffer[0],
        lambda: buffer[:],
        lambda: len(buffer),
        lambda: memoryview(buffer),
        lambda: buffer.numpy(),
        lambda: buffer.size_bytes,
        lambda: buffer.block_bytes,
        lambda: buffer.detach(),
        lambda: buffer.__enter__(),
    ):
        with pytest.raises(Closed, match=r"buffer: was released; its memory belongs to the pool"):
            use()
    with pytest.raises(InvalidArgument, match=r"buffer: must be in use, got a buffer that was"):
        buffer.release()
    assert repr(buffer) == "PooledBuffer(released)"
    pool.close()


def test_memory_is_reused_and_not_zeroed_unless_asked(resource: memory.Resource) -> None:
    pool = pools.BufferPool(resource)
    for size in (1000, 64 * KIB):
        with pool.acquire(size) as buffer:
            buffer[:] = b"\xab" * size
            first = place(buffer)
        with pool.acquire(size // 2) as buffer:
            assert place(buffer) == first
            assert bytes(buffer) == b"\xab" * (size // 2)
        with pool.acquire(size, zeroed=True) as buffer:
            assert place(buffer) == first
            assert bytes(buffer) == bytes(size)
    pool.close()


def test_new_buffer_is_zero_if_asked_also_where_a_dirty_block_lay(
    resource: memory.Resource,
) -> None:
    pool = pools.BufferPool(resource, size_classes=[KIB, "1 MiB"])
    for size in (KIB, 1 << 20):
        with pool.acquire(size) as buffer:
            buffer.numpy()[:] = 1
        pool.clear()
        with pool.acquire(size, zeroed=True) as buffer:
            assert not buffer.numpy().any()
    pool.close()


def test_buffer_with_views_is_not_reused_and_the_views_stay_valid(
    resource: memory.StatisticsAdaptor,
) -> None:
    pool = pools.BufferPool(resource, max_count=1)
    buffer = pool.acquire(100)
    views = [memoryview(buffer)[10:], buffer.numpy(), np.frombuffer(buffer, "u1")]
    views[1][:] = 7
    pool.release(buffer)
    now = adds_up(pool)
    assert (now.exported, now.destroyed, now.idle) == (1, 1, 0)
    with pool.acquire(100, timeout_seconds=0, zeroed=True) as other:
        assert place(other) != views[1].ctypes.data
    del buffer
    assert [bytes(view[:3]) for view in views] == [b"\7\7\7"] * 3
    assert resource.statistics().current_count == 2
    views.clear()
    assert resource.statistics().current_count == 1
    pool.close()


def test_consumer_that_keeps_the_buffer_but_no_view_never_has_freed_memory(
    resource: memory.StatisticsAdaptor,
) -> None:
    """NumPy's ndarray(buffer=...) ends its view at once and keeps the object only."""
    pool = pools.BufferPool(resource)
    buffer = pool.acquire(1000)
    array = np.ndarray((1000,), "u1", buffer=buffer)  # type: ignore[arg-type]
    pool.release(buffer)
    del buffer
    pool.close()
    assert resource.statistics().current_count == 1
    array[:] = 1
    del array
    assert resource.statistics().current_count == 0


def test_detached_buffer_lives_on_without_the_pool(resource: memory.StatisticsAdaptor) -> None:
    pool = pools.BufferPool(resource, max_count=1)
    with pool.acquire(10) as buffer:
        assert buffer.detach() is buffer
        assert buffer.detach() is buffer
        pool.release(pool.acquire(10, timeout_seconds=0))
    buffer[:] = b"0123456789"
    pool.close()
    assert bytes(buffer) == b"0123456789"
    assert "detached" in repr(buffer)
    with pytest.raises(InvalidArgument, match="released or detached before"):
        pool.release(buffer)
    assert adds_up(pool).detached == 1


@pytest.mark.parametrize(
    ("dtype", "message"),
    [("O", r"dtype: must hold plain values"), ("f8", r"dtype: its items must divide .* 10 bytes")],
)
def test_dtype_that_does_not_fit_a_buffer_is_refused(dtype: str, message: str) -> None:
    with (
        pools.BufferPool().acquire(10) as buffer,
        pytest.raises(InvalidArgument, match=message),
    ):
        buffer.numpy(dtype)


def test_resource_that_refuses_a_block_leaves_the_permit(resource: memory.Resource) -> None:
    limit = memory.LimitAdaptor(resource, limit_bytes="96 KiB")
    pool = pools.BufferPool(limit, max_count=2)
    buffer = pool.acquire(64 * KIB)
    with pytest.raises(OutOfMemory, match=r"cannot allocate 65536 bytes"):
        pool.acquire(64 * KIB)
    with pytest.raises(OutOfMemory):
        pool.prefill(64 * KIB, 1)
    now = adds_up(pool)
    assert (now.factory_failures, now.permits) == (2, 1)
    pool.release(buffer)
    del buffer
    pool.close()


def test_buffer_that_is_collected_gives_its_memory_back(resource: memory.StatisticsAdaptor) -> None:
    pool = pools.BufferPool(resource)
    buffer = pool.acquire(1000)
    seen = weakref.ref(buffer)
    del buffer
    assert seen() is None
    assert adds_up(pool).leaked == 1
    assert resource.statistics().current_count == 0


def test_statistics_are_the_sum_of_the_classes() -> None:
    pool = pools.BufferPool()
    with pool.acquire(10), pool.acquire(10), pool.acquire(2000):
        each = pool.class_statistics()
        assert {size: now.in_use for size, now in each.items()} == {KIB: 2, 64 * KIB: 1}
        assert pool.statistics().in_use == 3
        assert sorted(leak.kind for leak in pool.leaks()) == [
            "1024-byte buffer", "1024-byte buffer", "65536-byte buffer",
        ]  # fmt: skip


def test_buffer_pool_draws_from_the_resource_it_was_given(resource: memory.Resource) -> None:
    pool = pools.BufferPool(resource)
    assert pool.resource is resource
    pool.prefill(1000, 3)
    assert resource.statistics().current_count == 3
    pool.clear()


def test_files_read_into_a_buffer(tmp_path: Any, resource: memory.Resource) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"payload")
    pool = pools.BufferPool(resource)
    with open(path, "rb") as file, pool.acquire(64 * KIB) as buffer:
        count = file.readinto(buffer)  # type: ignore[arg-type]
        assert buffer[:count] == b"payload"
    assert adds_up(pool).idle == 1
    pool.close()


# --- VectorPool ---------------------------------------------------------------------------------

DTYPES = ["i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f4", "f8", "?"]


def values_of(dtype: str) -> st.SearchStrategy[Any]:
    kind = np.dtype(dtype).kind
    if kind == "b":
        return st.booleans()
    if kind == "f":
        return st.floats(width=32, allow_nan=False)
    info = np.iinfo(dtype)
    return st.integers(int(info.min), int(info.max))


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=40)
@given(data=st.data())
def test_vector_is_a_list_that_numpy_reads(dtype: str, data: st.DataObject) -> None:
    growth = data.draw(st.floats(1.5, 2.0))
    capacity = data.draw(st.integers(1, 20))
    pool = pools.VectorPool(dtype, capacity=capacity, growth=growth)
    model: list[Any] = []
    values = values_of(dtype)
    with pool.acquire() as vector:
        assert vector.dtype == np.dtype(dtype)
        for _ in range(data.draw(st.integers(0, 12))):
            match data.draw(st.sampled_from(["append", "extend", "array", "clear", "view"])):
                case "append":
                    model.append(data.draw(values))
                    vector.append(model[-1])
                case "extend":
                    more = data.draw(st.lists(values, max_size=40))
                    vector.extend(more)
                    model += more
                case "array":
                    more = data.draw(st.lists(values, max_size=40))
                    vector.extend(np.array(more, dtype)[::-1])
                    model += more[::-1]
                case "clear":
                    vector.clear()
                    model = []
                case "view":
                    view = memoryview(vector)
                    with pytest.raises(InvalidArgument, match=r"vector: must have no views .* 1 "):
                        vector.append(data.draw(values))
                    view.release()
            assert len(vector) == len(model) <= vector.capacity
            assert np.array_equal(vector.numpy(), np.array(model, dtype))
    assert adds_up(pool).idle == 1


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        ("c16", 1 + 2j),
        ("f2", 1.5),
        (">i4", 258),
        ("M8[s]", np.datetime64(3, "s")),
        ("S5", b"abc"),
        ("U3", "äöü"),
        ([("x", "i4"), ("y", "f8")], (1, 2.5)),
    ],
    ids=str,
)
def test_other_dtypes_go_through_numpy(dtype: Any, value: Any) -> None:
    with pools.VectorPool(dtype, capacity=1).acquire() as vector:
        vector.append(value)
        vector.extend([value, value])
        vector.extend(np.array([value], dtype))
        expected = np.array([value] * 4, dtype)
        assert vector.numpy().dtype == expected.dtype
        assert (vector.numpy() == expected).all()


@pytest.mark.parametrize(
    ("dtype", "value", "error", "message"),
    [
        ("i1", 128, InvalidArgument, r"value: must be from -128 to 127, got 128"),
        ("i1", -129, InvalidArgument, r"value: must be from -128 to 127, got -129"),
        ("u1", -1, InvalidArgument, r"value: must be from 0 to 255, got -1"),
        (
            "u8",
            1 << 64,
            InvalidArgument,
            r"value: must be from 0 to 18446744073709551615, got 1844",
        ),
        ("i8", 1 << 63, InvalidArgument, r"value: must be from -9223372036854775808 to 9223"),
        ("i8", 1.5, TypeError, r"value: must be an int, got float"),
        ("i8", "1", TypeError, r"value: must be an int, got str"),
        ("f8", "1", TypeError, r"value: must be a number, got str"),
        ("f4", None, TypeError, r"value: must be a number, got NoneType"),
        ("?", 1, TypeError, r"value: must be a bool, got int"),
        (">i4", 1.5, InvalidArgument, r"values: must be of the kind of >i4, got float64"),
        ("f4", 1e300, InvalidArgument, r"value: must fit float32, got 1e\+300"),
        ("f8", 10**400, InvalidArgument, r"value: must fit float64, got 1000"),
        ("f2", 1e6, InvalidArgument, r"values: must fit float16, got 1000000.0"),
        ("S3", b"abcd", InvalidArgument, r"values: must fit \|S3, got b'abcd'"),
        ("U3", "abcd", InvalidArgument, r"values: must fit <U3, got abcd"),
        ("M8[s]", np.datetime64(1500, "ms"), InvalidArgument, r"fit datetime64\[s\], got 1970"),
        ([("x", "i4")], (1.5,), InvalidArgument, r"values: must fit int32, got 1.5"),
        ([("x", "u1")], (-1,), InvalidArgument, r"values: must fit .*uint8"),
        ([("x", "i4"), ("y", "S2")], (1, b"abc"), InvalidArgument, r"must fit \|S2, got b'abc'"),
        ([("x", "f4", 2)], ([1, 1e300],), InvalidArgument, r"must fit float32, got 1e\+300"),
    ],
    ids=repr,
)
def test_value_that_does_not_fit_is_refused(
    dtype: Any, value: Any, error: type[Exception], message: str
) -> None:
    with pools.VectorPool(dtype).acquire() as vector:
        with pytest.raises(error, match=message):
            vector.append(value)
        assert len(vector) == 0


@pytest.mark.parametrize(
    ("dtype", "values", "message"),
    [
        ("i8", [1.5], r"values: must be of the kind of int64, got float64"),
        ("i8", np.array([1.5]), r"values: must be of the kind of int64, got float64"),
        ("u1", np.array([1]), r"values: must be of the kind of uint8, got int64"),
        ("u1", [256], r"values: must be from 0 to 255, got 256"),
        ("u1", [1, -1], r"values: must be from 0 to 255, got -1"),
        ("i8", [[1], [2]], r"values: must have one dimension, got 2"),
        ("f8", ["x"], r"values: must be of the kind of float64, got <U1"),
        ("f8", np.zeros((2, 2)), r"values: must have one dimension, got 2"),
        ("f8", [[1.0], [1.0, 2.0]], r"values: must "),
        ("f8", 3.0, r"values: must be iterable, got float"),
        ("i1", np.array([1, 300]), r"values: must fit int8, got 300"),
        ("i1", memoryview(np.array([300])), r"values: must fit int8, got 300"),
        ("u1", np.array([256], "u2"), r"values: must fit uint8, got 256"),
        ("i8", np.array([1 << 63], "u8"), r"values: must fit int64, got 9223372036854775808"),
        ("f4", [1.0, -1e300], r"values: must fit float32, got -1e\+300"),
        ("f4", np.array([1e300]), r"values: must fit float32, got 1e\+300"),
    ],
    ids=range(16),
)
def test_values_that_do_not_fit_are_refused_and_none_is_appended(
    dtype: str, values: Any, message: str
) -> None:
    with pools.VectorPool(dtype).acquire() as vector:
        vector.append(1)
        with pytest.raises((InvalidArgument, TypeError), match=message):
            vector.extend(values)
        assert len(vector) == 1


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        ("i1", np.array([-128, 127])),
        ("i8", np.array([1, 2], "u8")),
        ("f4", [0.1, np.inf, -np.inf, np.nan]),
        ("f2", np.array([1, 2])),
        ("c8", [1, 2.5, 1j]),
        ("S3", [b"a", b"abc"]),
        ("U3", ["", "abc"]),
        ("M8[s]", np.array([2000, "NaT"], "M8[ms]")),
        ("V3", [b"abc"]),
        ([("x", "u1"), ("y", "U3"), ("z", "M8[D]")], [(1, "abc", "2020-01-01"), (2, "", "NaT")]),
        ([("x", "u1"), ("y", [("z", "f4"), ("w", "i2", 2)])], [(1, (0.1, [3, 4])), (2, (3, 5))]),
        ([("x", "i4"), ("y", "f4")], np.array([(1, 0.1)], [("a", "i8"), ("b", "f8")])),
        ([("x", "i4"), ("y", "f4")], [1, 2]),
    ],
    ids=str,
)
def test_values_that_fit_another_type_are_as_numpy_has_them(dtype: Any, values: Any) -> None:
    with pools.VectorPool(dtype).acquire() as vector:
        vector.extend(values)
        expected = np.array(values, dtype)
        assert vector.numpy().tobytes() == expected.tobytes()


def test_vector_takes_every_kind_of_sequence() -> None:
    with pools.VectorPool("i8").acquire() as vector:
        for values in ([1], (2,), range(3, 5), {5}, (x for x in (6,)), b"\7", np.int64([8])):
            vector.extend(values)  # type: ignore[arg-type]
        vector.extend([])
        assert vector.numpy().tolist() == list(range(1, 9))


def test_vector_shows_its_type_in_the_buffer_protocol() -> None:
    with pools.VectorPool("f4").acquire() as vector:
        vector.extend([1, 2, 3])
        view = memoryview(vector)
        assert (view.format, view.itemsize, view.shape, view.strides) == ("f", 4, (3,), (4,))
        assert view.tolist() == [1.0, 2.0, 3.0]
        view[0] = 9.0
        view.release()
        assert np.asarray(vector).tolist() == [9.0, 2.0, 3.0]


@pytest.mark.parametrize("growth", [1.5, 2.0])
def test_vector_grows_by_its_factor(growth: float) -> None:
    with pools.VectorPool("u1", capacity=1024, growth=growth).acquire() as vector:
        capacities = [vector.capacity]
        while vector.capacity < 300_000:
            vector.append(1)
            if vector.capacity != capacities[-1]:
                capacities.append(vector.capacity)
    # The resource rounds blocks up, to a size class or to 64 bytes.
    for before, after in itertools.pairwise(capacities):
        assert before * growth - 1 <= after <= before * growth * 1.25 + 64
    assert len(capacities) > 8


def test_vector_comes_back_empty_and_with_its_memory(resource: memory.Resource) -> None:
    pool = pools.VectorPool("f8", capacity=8, resource=resource)
    with pool.acquire() as vector:
        vector.extend(np.ones(1000))
        capacity = vector.capacity
    with pool.acquire() as vector:
        assert (len(vector), vector.capacity) == (0, capacity)
        assert vector.numpy().tolist() == []
    pool.close()


def test_vector_that_grew_past_its_cap_is_not_kept(resource: memory.Resource) -> None:
    pool = pools.VectorPool("u1", capacity=1024, cap_bytes="1 KiB", resource=resource)
    with pool.acquire() as vector:
        vector.extend(bytes(1024))
    assert adds_up(pool).idle == 1
    with pool.acquire() as vector:
        vector.extend(bytes(64 * KIB))
    now = adds_up(pool)
    assert (now.oversize, now.destroyed, now.idle) == (1, 1, 0)
    del vector
    assert resource.statistics().current_count == 0


@pytest.mark.parametrize("change", ["append", "extend", "clear"])
def test_length_does_not_change_while_a_view_is_alive(change: str) -> None:
    with pools.VectorPool("i8").acquire() as vector:
        vector.extend([1, 2])
        view, array = memoryview(vector), vector.numpy()
        act: Callable[[], None] = {
            "append": lambda: vector.append(3),
            "extend": lambda: vector.extend([3]),
            "clear": vector.clear,
        }[change]
        message = r"vector: must have no views while its length changes, got 2 \(memoryviews"
        with pytest.raises(InvalidArgument, match=message):
            act()
        assert vector.numpy().tolist() == [1, 2]
        view.release()
        del array
        act()


def test_vector_extended_by_itself_is_refused() -> None:
    with pools.VectorPool("i8").acquire() as vector:
        vector.extend([1, 2])
        with pytest.raises(InvalidArgument, match=r"must have no views"):
            vector.extend(vector.numpy())
        assert len(vector) == 2


def test_growth_under_a_consumer_without_a_view_frees_nothing_it_has(
    resource: memory.StatisticsAdaptor,
) -> None:
    """NumPy's ndarray(buffer=...) ends its view at once and keeps the object only."""
    pool = pools.VectorPool("u1", capacity=64, resource=resource)
    vector = pool.acquire()
    vector.extend(b"\5" * 64)
    array = np.ndarray((64,), "u1", buffer=vector)  # type: ignore[arg-type]
    for _ in range(10):
        vector.extend(bytes(len(vector)))
    other = pool.resource.allocate(64)
    assert (array == 5).all()
    assert not np.shares_memory(array, np.frombuffer(other, "u1"))
    del array, other
    pool.release(vector)
    del vector
    pool.close()


def test_vector_that_cannot_grow_is_unchanged(resource: memory.Resource) -> None:
    limit = memory.LimitAdaptor(resource, limit_bytes="16 KiB")
    pool = pools.VectorPool("u1", capacity=4096, resource=limit)
    with pool.acquire() as vector:
        vector.extend(bytes(4096))
        with pytest.raises(OutOfMemory, match=r"cannot allocate 104096 bytes"):
            vector.extend(bytes(100_000))
        assert len(vector) == 4096
    pool.close()


def test_released_vector_is_dead() -> None:
    pool = pools.VectorPool("i8")
    vector = pool.acquire()
    vector.release()
    for use in (
        lambda: vector.append(1),
        lambda: vector.extend([1]),
        lambda: vector.clear(),
        lambda: vector.numpy(),
        lambda: len(vector),
        lambda: vector.capacity,
        lambda: memoryview(vector),
        lambda: vector.detach(),
    ):
        with pytest.raises(Closed, match=r"vector: was released; its memory belongs to the pool"):
            use()
    assert repr(vector) == "Vector(dtype=int64, released)"


def test_detached_vector_grows_on_without_the_pool(resource: memory.Resource) -> None:
    pool = pools.VectorPool("i8", max_count=1, resource=resource)
    with pool.acquire() as vector:
        vector.extend(range(10))
        vector.detach()
    pool.close()
    vector.extend(range(10_000))
    assert vector.numpy()[-1] == 9999


def test_large_vectors_are_copied_whole(resource: memory.Resource) -> None:
    """Above 64 KiB the interpreter is released while bytes are moved."""
    pool = pools.VectorPool("i8", capacity=1, resource=resource)
    with pool.acquire() as vector:
        expected = np.arange(300_000)
        for part in np.array_split(expected, 7):
            vector.extend(part)
        vector.append(-1)
        assert np.array_equal(vector.numpy()[:-1], expected)
    pool.close()


def test_threads_append_to_one_vector() -> None:
    pool = pools.VectorPool("i8", capacity=1)
    with pool.acquire() as vector:

        def append(start: int) -> None:
            for value in range(start, start + 500):
                vector.append(value)
            vector.extend(range(start + 500, start + 20_000))

        threads = [threading.Thread(target=append, args=(k * 20_000,)) for k in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert np.array_equal(np.sort(vector.numpy()), np.arange(80_000))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "O"}, r"dtype: must hold plain values of a size, got object"),
        ({"dtype": "V0"}, r"dtype: must hold plain values of a size, got \|V0"),
        ({"dtype": "(2,3)f4"}, r"dtype: must hold plain values of a size, got \('<f4', \(2, 3\)\)"),
        ({"capacity": 0}, r"capacity: must be from 1 to 131072, got 0"),
        ({"capacity": 131_073}, r"capacity: must be from 1 to 131072, got 131073"),
        ({"cap_bytes": 7}, r"cap_bytes: must be at least one item of 8 bytes, got 7"),
        ({"cap_bytes": "much"}, r"cap_bytes: must be a number of bytes"),
        ({"growth": 1.4}, r"growth: must be from 1\.5 to 2\.0, got 1\.4"),
        ({"growth": float("nan")}, r"growth: must be from 1\.5 to 2\.0, got NaN"),
    ],
    ids=str,
)
def test_bad_vector_options_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        pools.VectorPool(**options)
