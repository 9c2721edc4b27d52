"""Limits on what waits and on how long it takes, and the token of a task that is to end."""

import concurrent.futures
import math
import os
import queue
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from running import assert_counts_add_up, in_forked_child, wait_until, wait_until_gone

from moirai import errors
from moirai.executor import Executor, ProcessExecutor, current_token

WAIT_SECONDS = 60


def test_time_limits_are_the_executors_and_reach_every_kind_of_submit():
    with Executor(1) as executor:
        futures = [
            executor.submit(pow, 2, 3, timeout_seconds=WAIT_SECONDS),
            *executor.submit_many(abs, [-8], deadline=time.monotonic() + WAIT_SECONDS),
            *executor.submit_group([(abs, -8)], timeout_seconds=WAIT_SECONDS),
        ]
        assert [future.result() for future in futures] == [8, 8, 8]


def shut_down_while(executor, submit):
    """Shut an executor down while another thread waits for room in it, or comes late: refused."""
    raised = []

    def run():
        try:
            submit()
        except errors.Closed as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    executor.shutdown(wait=False)
    wait_until_gone(thread)
    assert len(raised) == 1


# === how many wait ==============================================================================


def test_who_submits_one_more_is_refused(gate):
    with Executor(2, max_pending=3, when_full="raise") as executor:
        opened = gate(executor)
        waiting = executor.submit_many(abs, [1, 2])
        with pytest.raises(
            queue.Full, match="max_pending: 2 of 3 tasks wait already, no room for 2"
        ):
            executor.submit_many(abs, [3, 4])
        third = executor.submit(abs, 3)
        with pytest.raises(queue.Full, match="no room for 1"):
            executor.submit(abs, 4)
        assert third.cancel()
        waiting.append(executor.submit(abs, 5))
        opened.set()
        assert [future.result() for future in waiting] == [1, 2, 5]
    counts = assert_counts_add_up(executor)
    assert (counts.submitted, counts.refused, counts.cancelled) == (6, 3, 1)


def test_who_submits_one_more_waits_for_room(gate):
    with Executor(1, max_pending=1) as executor:
        opened = gate(executor)
        first = executor.submit(abs, 1)
        blocked = []
        thread = threading.Thread(target=lambda: blocked.append(executor.submit(abs, 2)))
        thread.start()
        assert first.cancel()  # makes room
        wait_until_gone(thread)
        assert not blocked[0].done()
        opened.set()
        assert blocked[0].result() == 2


def test_waiting_for_room_ends_at_the_deadline_and_at_the_end_of_the_executor(gate):
    executor = Executor(1, max_pending=1)
    opened = gate(executor)
    executor.submit(abs, 1)
    with pytest.raises(errors.Timeout, match="waited for room; nothing is queued"):
        executor.submit(abs, 2, deadline=time.monotonic() + 0.001)
    shut_down_while(executor, lambda: executor.submit(abs, 3))
    opened.set()
    executor.shutdown()
    assert assert_counts_add_up(executor).succeeded == 2


def test_submitter_runs_what_finds_no_room(gate):
    with Executor(1, max_pending=1, when_full="caller_runs") as executor:
        opened = gate(executor)
        queued = executor.submit(threading.get_ident)
        here = executor.submit(threading.get_ident)
        assert here.done()
        assert here.result() == threading.get_ident()
        many = executor.submit_many(abs, [1, 2])
        assert [future.result() for future in many] == [1, 2]
        failed = executor.submit(int, "x")
        assert isinstance(failed.exception(), ValueError)
        assert not queued.done()
        opened.set()
    counts = assert_counts_add_up(executor)
    assert counts.ran_by_submitter == 4


@pytest.mark.parametrize("when_full", ["block", "caller_runs"])
@pytest.mark.parametrize("workers", [1, 2])
def test_task_that_finds_no_room_runs_its_calls_itself(when_full, workers):
    def count(depth):
        if depth == 0:
            return 1
        futures = [executor.submit(count, depth - 1) for _ in range(2)]
        return 1 + sum(future.result() for future in futures)

    with Executor(workers, max_pending=1, when_full=when_full) as executor:
        assert executor.submit(count, 8).result(WAIT_SECONDS) == 2**9 - 1
    assert assert_counts_add_up(executor).succeeded == 2**9 - 1


def test_callback_that_submits_does_not_wait_for_its_own_worker():
    with Executor(1, max_pending=1) as executor:
        found = queue.SimpleQueue()

        def submit_more(_):
            for number in range(3):
                executor.submit(found.put, number)

        executor.submit(abs, 1).add_done_callback(submit_more)
        assert sorted(found.get(timeout=WAIT_SECONDS) for _ in range(3)) == [0, 1, 2]


@pytest.mark.parametrize("make", [Executor, ProcessExecutor])
def test_group_that_waits_for_room_does_not_keep_its_tasks_from_ending(make):
    with make(1, max_pending=1) as executor:
        with executor.group() as group:
            futures = [group.submit(abs, -number) for number in range(100)]
        assert [future.result(0) for future in futures] == list(range(100))


def test_block_of_a_group_waits_for_what_another_thread_submits(gate):
    with Executor(1, max_pending=1) as executor:
        opened = gate(executor)
        executor.submit(abs, 1)
        futures, has_begun = [], threading.Event()
        with executor.group() as group:

            def submit_more():
                has_begun.set()
                futures.append(group.submit(abs, -2))

            thread = threading.Thread(target=submit_more)
            thread.start()
            assert has_begun.wait(WAIT_SECONDS)
            wait_until(lambda: group._entering_count == 1)
            opened.set()
        thread.join()
        assert futures[0].result(0) == 2


def test_map_is_fed_as_there_is_room():
    with Executor(2, max_pending=2) as executor:
        assert list(executor.map(abs, range(100), chunksize=1)) == list(range(100))
        assert sorted(executor.map_unordered(abs, range(50), chunksize=3)) == list(range(50))
        futures = executor.submit_many(abs, range(100))
        assert [future.result() for future in futures] == list(range(100))


def test_many_that_cannot_all_be_queued_are_cancelled(gate):
    executor = Executor(1, max_pending=2)
    opened = gate(executor)
    shut_down_while(executor, lambda: executor.submit_many(abs, range(5)))
    opened.set()
    executor.shutdown()
    counts = assert_counts_add_up(executor)
    assert counts.cancelled == counts.submitted - 1


def test_group_of_calls_gets_room_for_all_or_none(gate):
    with Executor(1, max_pending=3) as executor:
        opened = gate(executor)
        first = executor.submit(abs, 1)
        groups = []
        calls = [(abs, -1), (pow, 2, 3), (max, [4, 5])]
        thread = threading.Thread(target=lambda: groups.extend(executor.submit_group(calls)))
        thread.start()
        assert first.cancel()  # makes room for the third
        wait_until_gone(thread)
        assert len(groups) == 3
        opened.set()
        assert [future.result() for future in groups] == [1, 8, 5]
        with pytest.raises(errors.InvalidArgument, match=r"calls: must be at most 3 .*got 4"):
            executor.submit_group([(abs, 1)] * 4)
        assert executor.submit_group([]) == []


def test_group_is_refused_as_a_whole(gate):
    with Executor(1, max_pending=2, when_full="raise") as executor:
        opened = gate(executor)
        executor.submit(abs, 1)
        with pytest.raises(queue.Full):
            executor.submit_group([(abs, 1), (abs, 2)])
        assert executor.statistics().submitted == 2
        executor.submit_group([(abs, 1)])
        with pytest.raises(queue.Full):
            executor.submit(abs, 1)
        opened.set()


@pytest.mark.parametrize("calls", [[abs], [()], [(3, 4)], [(abs, 1), "x"]])
def test_call_that_is_no_tuple_of_a_function_is_named(calls):
    with Executor(1) as executor:
        with pytest.raises(errors.InvalidArgument, match="calls: must be tuples of a function"):
            executor.submit_group(calls)
        assert executor.statistics().submitted == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_pending": 0}, "max_pending: must be .*, got 0"),
        ({"max_pending": True}, "max_pending"),
        (
            {"when_full": "drop"},
            'when_full: must be "block" or "raise" or "caller_runs", got \'drop\'',
        ),
        (
            {"max_pending": 1, "when_full": "caller_runs", "initializer": print},
            "with an initializer",
        ),
    ],
)
def test_wrong_limit_is_named(options, message):
    with pytest.raises((errors.InvalidArgument, TypeError), match=message):
        Executor(1, **options)


def test_room_of_a_forked_child_is_its_own(gate):
    with Executor(1, max_pending=1, when_full="raise") as executor:
        opened = gate(executor)
        executor.submit(abs, 1)

        def child():
            assert executor.submit(abs, -2, timeout_seconds=WAIT_SECONDS).result() == 2

        in_forked_child(child)
        opened.set()


def test_ctrl_c_ends_the_wait_for_room(run_python):
    source = """
        import signal, threading
        from moirai.executor import Executor
        executor = Executor(1, max_pending=1)
        opened, begun = threading.Event(), threading.Event()
        executor.submit(lambda: (begun.set(), opened.wait(60)))
        begun.wait(60)
        executor.submit(abs, 1)
        main = threading.main_thread().ident
        threading.Timer(0.1, signal.pthread_kill, (main, signal.SIGINT)).start()
        try:
            executor.submit(abs, 2)
        except KeyboardInterrupt:
            print("interrupted")
        opened.set()
        print(executor.submit(abs, -3).result(60))
    """
    assert run_python(source).split() == ["interrupted", "3"]


@given(
    st.lists(st.integers(1, 4), max_size=30),
    st.integers(4, 6),
    st.sampled_from(["block", "raise", "caller_runs"]),
)
@settings(max_examples=30)
def test_every_call_is_made_once_or_refused(groups, limit, when_full):
    made = queue.SimpleQueue()
    futures, refused = [], 0
    with Executor(2, max_pending=limit, when_full=when_full) as executor:
        for index, count in enumerate(groups):
            try:
                futures += executor.submit_group([(made.put, index)] * count)
            except queue.Full:
                refused += count
        concurrent.futures.wait(futures)
    assert made.qsize() == len(futures) == sum(groups) - refused
    counts = assert_counts_add_up(executor)
    assert (counts.succeeded, counts.refused) == (len(futures), refused)


# === how long they take =========================================================================


def test_task_that_takes_too_long_fails_and_learns_of_it():
    ended = threading.Event()

    def work():
        token = current_token()
        while not token.is_cancelled:
            ended.wait(0.001)
        ended.set()
        return "late"

    with Executor(1) as executor:
        future = executor.submit(work, timeout_seconds=0.01)
        with pytest.raises(errors.Timeout, match=r"its call (goes on|has ended)"):
            future.result(WAIT_SECONDS)
        assert ended.wait(WAIT_SECONDS)
        assert executor.submit(abs, -1).result() == 1
        assert isinstance(future.exception(), errors.Timeout)
    counts = assert_counts_add_up(executor)
    assert (counts.succeeded, counts.failed, counts.timed_out) == (1, 1, 1)


def test_callbacks_are_called_when_the_time_is_over_while_the_task_hangs(gate):
    with Executor(1) as executor:
        opened, told = threading.Event(), queue.SimpleQueue()
        future = executor.submit(opened.wait, WAIT_SECONDS, timeout_seconds=0.01)
        future.add_done_callback(told.put)
        done, _ = concurrent.futures.wait([future], WAIT_SECONDS)
        assert done == {future}
        assert told.get(timeout=WAIT_SECONDS) is future
        opened.set()


def test_time_runs_from_the_start_of_a_task(gate):
    with Executor(1) as executor:
        opened = gate(executor)
        soon = executor.submit(abs, 1, deadline=time.monotonic() + 0.05)
        later = executor.submit(abs, -2, timeout_seconds=0.02)
        with pytest.raises(errors.Timeout, match="before the task began; the task is not run"):
            soon.result(WAIT_SECONDS)
        opened.set()
        assert later.result(WAIT_SECONDS) == 2
    assert assert_counts_add_up(executor).timed_out == 1


def test_deadline_that_has_passed_begins_nothing(gate):
    ran = []
    with Executor(1) as executor:
        opened = gate(executor)
        future = executor.submit(ran.append, 1, deadline=time.monotonic() - 1)
        assert isinstance(future.exception(WAIT_SECONDS), errors.Timeout)
        opened.set()
    assert ran == []


@pytest.mark.parametrize("workers", [1, 2])
def test_who_waits_does_not_begin_what_is_late(workers):
    ran = []

    def wait_for_late():
        late = executor.submit(ran.append, 1, deadline=-math.inf)
        assert isinstance(late.exception(), errors.Timeout)

    with Executor(workers) as executor:
        for number in range(100):
            late = executor.submit(ran.append, number, deadline=time.monotonic())
            with pytest.raises(errors.Timeout, match="the task is not run"):
                late.result()
        executor.submit(wait_for_late).result(WAIT_SECONDS)
    assert ran == []
    counts = assert_counts_add_up(executor)
    assert (counts.timed_out, counts.succeeded) == (101, 1)


def test_submitter_does_not_run_what_is_late(gate):
    ran = []
    with Executor(1, max_pending=1, when_full="caller_runs") as executor:
        opened = gate(executor)
        executor.submit(abs, 1)
        late = executor.submit(ran.append, 1, deadline=time.monotonic() - 1)
        with pytest.raises(errors.Timeout, match="the task is not run"):
            late.result(0)
        opened.set()
    assert ran == []
    assert assert_counts_add_up(executor).timed_out == 1


@pytest.mark.parametrize("when_full", ["block", "caller_runs"])
def test_callback_of_a_late_task_does_not_wait_for_room(gate, when_full):
    threads = []
    with Executor(1, max_pending=1, when_full=when_full) as executor:
        opened, held = threading.Event(), threading.Event()
        told = queue.SimpleQueue()
        late = executor.submit(lambda: (held.set(), opened.wait(WAIT_SECONDS)), timeout_seconds=0.1)
        assert held.wait(WAIT_SECONDS)
        queued = executor.submit(abs, -1)

        def submit_more(_):
            more = [executor.submit(lambda: threads.append(threading.current_thread().name))]
            more += executor.submit_many(abs, [-2, -3])
            told.put(more)

        late.add_done_callback(submit_more)
        first, *others = told.get(timeout=WAIT_SECONDS)  # while the worker is busy
        assert not queued.done()
        opened.set()
        assert first.result(WAIT_SECONDS) is None
        assert [future.result(WAIT_SECONDS) for future in others] == [2, 3]
        assert executor.submit(abs, -4).result() == 4  # there is room again
    assert not threads[0].endswith("timer")
    assert assert_counts_add_up(executor).timed_out == 1


def test_token_tells_how_much_time_is_left():
    def left():
        token = current_token()
        return token.is_cancelled, token.remaining_seconds

    with Executor(1) as executor:
        assert executor.submit(left).result() == (False, None)
        cancelled, seconds = executor.submit(left, timeout_seconds=500).result()
        assert not cancelled
        assert 0 < seconds <= 500
        until = time.monotonic() + 300
        _, seconds = executor.submit(left, timeout_seconds=500, deadline=until).result()
        assert 0 < seconds <= 300
    assert left() == (False, None)
    current_token().check()


def test_cancelling_a_running_task_asks_it_to_end(gate):
    begun = threading.Event()

    def work():
        begun.set()
        token = current_token()
        while True:
            token.check()
            time.sleep(0)

    with Executor(1) as executor:
        future = executor.submit(work)
        assert begun.wait(WAIT_SECONDS)
        assert not future.cancel()
        with pytest.raises(concurrent.futures.CancelledError):
            future.result(WAIT_SECONDS)
        assert future.cancelled()
    assert assert_counts_add_up(executor).cancelled == 1


def test_cancelled_error_that_nobody_asked_for_is_a_failure():
    def fail():
        raise concurrent.futures.CancelledError

    with Executor(1) as executor:
        future = executor.submit(fail)
        assert isinstance(future.exception(WAIT_SECONDS), concurrent.futures.CancelledError)
        assert not future.cancelled()
    assert assert_counts_add_up(executor).failed == 1


def test_failure_in_a_group_is_told_by_the_token_of_the_rest():
    barrier = threading.Barrier(2)

    def fail():
        barrier.wait(WAIT_SECONDS)
        raise LookupError

    def work():
        token = current_token()
        barrier.wait(WAIT_SECONDS)
        while True:
            token.check()
            time.sleep(0)

    with Executor(2) as executor:
        futures = []

        def run():
            with executor.group() as group:
                futures.append(group.submit(work, timeout_seconds=WAIT_SECONDS))
                group.submit(fail)

        with pytest.raises(ExceptionGroup) as raised:
            run()
        assert [type(error) for error in raised.value.exceptions] == [LookupError]
        assert futures[0].cancelled()


def test_token_is_that_of_the_innermost_task():
    def inner():
        return current_token().remaining_seconds is not None

    def outer():
        nested = executor.submit(inner, timeout_seconds=WAIT_SECONDS).result()
        return nested, current_token().remaining_seconds

    with Executor(1) as executor:
        assert executor.submit(outer).result() == (True, None)


def test_ended_tasks_leave_the_timer(run_python):
    source = """
        import gc, weakref
        from moirai.executor import Executor
        class Thing: pass
        executor = Executor(1)
        thing = Thing()
        gone = weakref.ref(thing)
        future = executor.submit(lambda it: it, thing, timeout_seconds=3600)
        assert future.result(60) is thing
        cancelled = executor.submit(abs, 1, deadline=1e8)
        cancelled.cancel()
        del thing, future
        executor.submit(abs, 1).result(60)
        gc.collect()
        print(gone() is None)
        executor.shutdown()
        late = Executor(1)
        late.submit(abs, 1, timeout_seconds=3600)
        # The interpreter ends now, not in an hour.
    """
    assert run_python(source).split() == ["True"]


class Interrupted(Executor):
    """Ctrl-C comes just after the first thread that keeps time limits was started."""

    is_interrupted = False

    def _start_timer(self, handle):
        super()._start_timer(handle)
        if not self.is_interrupted:
            self.is_interrupted = True
            raise KeyboardInterrupt


def test_ctrl_c_at_the_first_time_limit_does_not_hold_up_the_end():
    executor = Interrupted(1)
    with pytest.raises(KeyboardInterrupt):
        executor.submit(abs, -1, timeout_seconds=WAIT_SECONDS)
    assert executor.submit(abs, -1, timeout_seconds=WAIT_SECONDS).result(WAIT_SECONDS) == 1
    late = executor.submit(time.sleep, 0.1, timeout_seconds=0.01)
    assert isinstance(late.exception(WAIT_SECONDS), errors.Timeout)
    shutdown = threading.Thread(target=executor.shutdown)
    shutdown.start()
    shutdown.join(WAIT_SECONDS)
    assert not shutdown.is_alive()
    assert assert_counts_add_up(executor).timed_out == 1


def test_nothing_is_left_of_a_call_that_ctrl_c_kept_from_being_queued():
    """Its deadline has passed: the thread that was started must not come to it."""

    class InterruptedLater(Interrupted):
        def _start_timer(self, handle):
            try:
                super()._start_timer(handle)
            except KeyboardInterrupt:
                for _ in range(200):  # The thread has time to look for what is due.
                    os.sched_yield()
                    threading.Event().wait(0)
                raise

    def hold(has_begun, go_on):
        has_begun.set()
        go_on.wait(WAIT_SECONDS)

    for _ in range(20):
        with InterruptedLater(1, max_pending=1, when_full="raise") as executor:
            with pytest.raises(KeyboardInterrupt):
                executor.submit(abs, -1, deadline=time.monotonic())
            statistics = assert_counts_add_up(executor)
            assert (statistics.submitted, statistics.failed, statistics.timed_out) == (0, 0, 0)
            go_on, has_begun = threading.Event(), threading.Event()
            executor.submit(hold, has_begun, go_on)
            assert has_begun.wait(WAIT_SECONDS)
            executor.submit(abs, -1)
            with pytest.raises(queue.Full):  # There is room for one, not for two.
                executor.submit(abs, -1)
            go_on.set()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timeout_seconds": -1}, "timeout_seconds: must be None or .* 0 to 1e9, got -1"),
        ({"timeout_seconds": math.nan}, "timeout_seconds"),
        ({"deadline": math.nan}, "deadline: must be a moment of"),
        ({"deadline": "soon"}, "deadline: must be a number, got str"),
        ({"timeout_seconds": []}, "timeout_seconds: must be a number, got list"),
    ],
)
def test_wrong_time_is_named(options, message):
    with Executor(1) as executor:
        with pytest.raises((errors.InvalidArgument, TypeError), match=message):
            executor.submit(abs, 1, **options)
        assert executor.statistics().submitted == 0
