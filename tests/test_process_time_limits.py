"""How long a call in a worker process may take, and how it learns that it is to end."""

import concurrent.futures
import gc
import math
import multiprocessing
import os
import queue
import signal
import threading
import time
import weakref
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from running import assert_counts_add_up, in_forked_child, wait_until
from worker_gate import CALLS_AT_WORKER, Gate

from moirai import errors
from moirai.executor import CancelToken, Executor, ProcessExecutor, current_token
from moirai.executor.process_deadlines import Deadlines
from moirai.executor.process_numbers import SharedNumbers

# From 3.12 on forking is warned of where there are threads, as there are in every executor.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")

WAIT_SECONDS = 60
SOON_SECONDS = 0.01


@pytest.fixture
def gate():
    made = Gate()
    yield made
    made.close()


def until_cancelled(tell=None):
    """Poll the token until it says that this is to end."""
    token = current_token()
    if tell is not None:
        os.write(tell, b"x")
    while True:
        token.check()
        time.sleep(0)


def until_late():
    token = current_token()
    while not token.is_cancelled:
        time.sleep(0)
    return "late"


def left():
    token = current_token()
    return token.is_cancelled, token.remaining_seconds


def hold_the_gil(tell=None):
    """What nothing within the process can end."""
    if tell is not None:
        os.write(tell, b"x")
    return sum(iter(int, 1))


# === time limits ================================================================================


@pytest.mark.parametrize("work", [until_cancelled, until_late])
def test_call_that_takes_too_long_fails_and_learns_of_it(work):
    with ProcessExecutor(1, "fork") as executor:
        future = executor.submit(work, timeout_seconds=SOON_SECONDS)
        with pytest.raises(errors.Timeout, match=r"its call (goes on|has ended)"):
            future.result(WAIT_SECONDS)
        assert executor.submit(abs, -1).result(WAIT_SECONDS) == 1
        assert isinstance(future.exception(), errors.Timeout)
    counts = assert_counts_add_up(executor)
    assert (counts.succeeded, counts.failed, counts.timed_out) == (1, 1, 1)
    assert (counts.workers_started, counts.workers_killed) == (1, 0)


def test_everybody_is_told_while_the_call_hangs(gate):
    with ProcessExecutor(1, "fork") as executor:
        told = queue.SimpleQueue()
        future = gate.shut(executor, timeout_seconds=SOON_SECONDS)
        future.add_done_callback(told.put)
        done, _ = concurrent.futures.wait([future], WAIT_SECONDS)
        assert done == {future}
        assert told.get(timeout=WAIT_SECONDS) is future
        ahead = executor.submit(abs, -1)
        gate.open()
        assert ahead.result(WAIT_SECONDS) == 1
    counts = assert_counts_add_up(executor)
    assert (counts.succeeded, counts.timed_out) == (1, 1)
    assert [(now.completed, now.total) for now in executor.progress()] == [(2, 2)]


def test_time_runs_from_the_start_of_a_call(gate):
    with ProcessExecutor(1, "fork") as executor:
        gate.shut(executor)
        later = executor.submit(abs, -2, timeout_seconds=WAIT_SECONDS)
        soon = executor.submit(abs, 1, deadline=time.monotonic() + SOON_SECONDS)
        with pytest.raises(errors.Timeout, match="before the task began; the task is not run"):
            soon.result(WAIT_SECONDS)
        assert not later.done()
        gate.open()
        assert later.result(WAIT_SECONDS) == 2
    assert assert_counts_add_up(executor).timed_out == 1


def test_deadline_that_has_passed_begins_nothing(gate):
    read, write = os.pipe()
    with ProcessExecutor(1, "fork") as executor:
        gate.fill(executor)
        past = time.monotonic() - 1
        futures = [
            executor.submit(os.write, write, b"ran", deadline=past),
            *executor.submit_many(os.write, [write], [b"ran"], deadline=past),
            *executor.submit_group([(os.write, write, b"ran")], deadline=past),
        ]
        for future in futures:
            assert isinstance(future.exception(WAIT_SECONDS), errors.Timeout)
        gate.open()
        assert executor.submit(os.write, write, b"last").result(WAIT_SECONDS) == 4
    assert os.read(read, 100) == b"last"
    os.close(read)
    os.close(write)
    assert assert_counts_add_up(executor).timed_out == 3


def test_call_that_was_sent_ahead_is_not_begun_after_its_deadline(gate):
    read, write = os.pipe()
    with ProcessExecutor(1, "fork") as executor:
        gate.shut(executor)
        ahead = executor.submit(
            os.write, write, b"ran", deadline=time.monotonic() + 10 * SOON_SECONDS
        )
        wait_until(ahead.running)
        with pytest.raises(errors.Timeout, match="before the task began"):
            ahead.result(WAIT_SECONDS)
        gate.open()
        assert executor.submit(os.write, write, b"last").result(WAIT_SECONDS) == 4
    assert os.read(read, 100) == b"last"
    os.close(read)
    os.close(write)
    assert assert_counts_add_up(executor).timed_out == 1


def test_calls_that_end_in_time_give_what_they_return():
    deadline = time.monotonic() + WAIT_SECONDS
    with ProcessExecutor(2, "fork") as executor:
        futures = [
            executor.submit(pow, 2, 3, timeout_seconds=WAIT_SECONDS),
            *executor.submit_many(abs, [-8], deadline=deadline),
            *executor.submit_group([(abs, -8)], timeout_seconds=WAIT_SECONDS, deadline=math.inf),
        ]
        assert [future.result(WAIT_SECONDS) for future in futures] == [8, 8, 8]
        failed = executor.submit(int, "x", timeout_seconds=WAIT_SECONDS)
        assert isinstance(failed.exception(WAIT_SECONDS), ValueError)
    assert assert_counts_add_up(executor).timed_out == 0


def test_late_calls_do_not_pile_up_behind_a_busy_worker(gate):
    with ProcessExecutor(1, "fork", max_pending=300) as executor:
        gate.fill(executor)
        futures = executor.submit_many(abs, range(300), deadline=time.monotonic() - 1)
        for future in futures:
            assert isinstance(future.exception(WAIT_SECONDS), errors.Timeout)
        more = executor.submit_many(abs, range(200))  # there is room again
        wait_until(lambda: executor.statistics().queued < 400)
        gate.open()
        assert [future.result(WAIT_SECONDS) for future in more] == list(range(200))
    assert assert_counts_add_up(executor).timed_out == 300


def test_calls_that_have_ended_are_not_kept_until_they_are_due(gate):
    with ProcessExecutor(1, "fork") as executor:
        gone = weakref.ref(executor.submit(abs, -1, timeout_seconds=3600))
        wait_until(lambda: executor.statistics().succeeded == 1)
        held = gate.shut(executor)
        cancelled = executor.submit_many(abs, range(10), deadline=time.monotonic() + 3600)
        cancelled[-1].cancel()
        wait_until(lambda: gc.collect() >= 0 and gone() is None)
        deadlines = executor._pool.backlog._deadlines
        assert len(deadlines._tasks) == 9
        gate.open()
        assert held.result(WAIT_SECONDS) == b"x"
        assert [future.result(WAIT_SECONDS) for future in cancelled[:-1]] == list(range(9))
        assert not deadlines._tasks


def test_executor_ends_while_calls_have_time_left(run_python):
    told = run_python("""
        import time
        from moirai.executor import ProcessExecutor
        executor = ProcessExecutor(1, "fork")
        executor.submit(print, "ran", flush=True, timeout_seconds=3600)
        executor.submit(print, "too", flush=True, deadline=time.monotonic() + 3600)
        # The interpreter ends now, not in an hour.
    """)
    assert told.split() == ["ran", "too"]


@pytest.mark.parametrize("make", [Executor, ProcessExecutor])
def test_deadline_that_no_float_holds_is_far_away_or_has_passed(make):
    with make(1) as executor:
        assert executor.submit(abs, -1, deadline=10**400).result(WAIT_SECONDS) == 1
        with pytest.raises(errors.Timeout, match="the task is not run"):
            executor.submit(abs, -1, deadline=-(10**400)).result(WAIT_SECONDS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timeout_seconds": -1}, "timeout_seconds: must be None or .* 0 to 1e9, got -1"),
        ({"timeout_seconds": math.nan}, "timeout_seconds: .* got nan"),
        ({"timeout_seconds": []}, "timeout_seconds: must be a number or None, got list"),
        ({"deadline": math.nan}, "deadline: must be a moment of"),
        ({"deadline": "soon"}, "deadline: must be a number or None, got str"),
    ],
)
def test_wrong_time_is_named(options, message):
    with ProcessExecutor(1, "fork") as executor:
        for submit in (executor.submit, executor.submit_many):
            with pytest.raises(errors.InvalidArgument, match=message):
                submit(abs, [1], **options)
        with pytest.raises(errors.InvalidArgument, match=message):
            executor.submit_group([(abs, 1)], **options)
        assert executor.statistics().submitted == 0


# === room =======================================================================================


def test_waiting_for_room_ends_at_the_deadline(gate):
    with ProcessExecutor(1, "fork", max_pending=1) as executor:
        gate.fill(executor)
        queued = executor.submit(abs, 1)
        with pytest.raises(errors.Timeout, match="waited for room; nothing is queued"):
            executor.submit(abs, 2, deadline=time.monotonic() + SOON_SECONDS)
        with pytest.raises(errors.Timeout, match="waited for room"):
            executor.submit_group([(abs, 2)], deadline=-math.inf)
        assert executor._pool.backlog.room._line == type(executor._pool.backlog.room._line)()
        gate.open()
        assert queued.result(WAIT_SECONDS) == 1
        assert executor.submit(abs, 2, deadline=time.monotonic() + WAIT_SECONDS).result() == 2
    assert assert_counts_add_up(executor).submitted == CALLS_AT_WORKER + 2


def test_call_that_its_submitter_runs_has_limits_too(gate):
    with ProcessExecutor(1, "fork", max_pending=1, when_full="caller_runs") as executor:
        gate.fill(executor)
        queued = executor.submit(abs, 1)
        with pytest.raises(errors.Timeout, match="its call has ended"):
            executor.submit(until_late, timeout_seconds=SOON_SECONDS).result(0)
        with pytest.raises(errors.Timeout, match="its call has ended"):
            executor.submit(until_cancelled, timeout_seconds=SOON_SECONDS).result(0)
        with pytest.raises(errors.Timeout, match="the task is not run"):
            executor.submit(until_cancelled, deadline=-math.inf).result(0)
        cancelled, seconds = executor.submit(left, timeout_seconds=500).result(0)
        assert not cancelled
        assert 0 < seconds <= 500
        with pytest.raises(ValueError, match="invalid literal"):
            executor.submit(int, "x", timeout_seconds=500).result(0)
        with Executor(1) as threads:  # whose task is not what the call is at
            given = threads.submit(lambda: executor.submit(left, timeout_seconds=500).result(0))
            assert given.result(WAIT_SECONDS)[1] <= 500
            given = threads.submit(
                lambda: executor.submit(left).result(0), timeout_seconds=WAIT_SECONDS
            )
            assert given.result(WAIT_SECONDS) == (False, None)
        assert left() == (False, None)
        gate.open()
        assert queued.result(WAIT_SECONDS) == 1
    counts = assert_counts_add_up(executor)
    assert (counts.ran_by_submitter, counts.timed_out, counts.failed) == (7, 3, 4)


# === the token ==================================================================================


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_token_tells_how_much_time_is_left(method):
    with ProcessExecutor(1, method) as executor:
        assert executor.submit(left).result(WAIT_SECONDS) == (False, None)
        cancelled, seconds = executor.submit(left, timeout_seconds=500).result(WAIT_SECONDS)
        assert not cancelled
        assert 0 < seconds <= 500
        until = time.monotonic() + 300
        future = executor.submit(left, timeout_seconds=500, deadline=until)
        assert 0 < future.result(WAIT_SECONDS)[1] <= 300
        assert executor.submit(left).result(WAIT_SECONDS) == (False, None)


def test_initializer_has_a_token_that_nobody_cancels():
    def initialize():
        assert left() == (False, None)

    with ProcessExecutor(1, "fork", initializer=initialize) as executor:
        assert executor.submit(abs, -1).result(WAIT_SECONDS) == 1


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_cancelling_a_call_that_runs_asks_it_to_end(method, tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with ProcessExecutor(1, method) as executor:
        future = executor.submit(until_cancelled_with_word, str(fifo))
        with open(fifo):  # it has begun
            pass
        assert not future.cancel()
        with pytest.raises(concurrent.futures.CancelledError):
            future.result(WAIT_SECONDS)
        assert future.cancelled()
        assert executor.submit(left).result(WAIT_SECONDS) == (False, None)
    counts = assert_counts_add_up(executor)
    assert (counts.cancelled, counts.failed) == (1, 0)


def until_cancelled_with_word(fifo):
    with open(fifo, "w"):
        pass
    until_cancelled()


def test_call_that_was_cancelled_before_it_looked_is_told(gate):
    with ProcessExecutor(1, "fork") as executor:
        gate.shut(executor)
        ahead = executor.submit(until_cancelled)
        wait_until(ahead.running)
        assert not ahead.cancel()  # it was sent
        gate.open()
        with pytest.raises(concurrent.futures.CancelledError):
            ahead.result(WAIT_SECONDS)
    assert assert_counts_add_up(executor).cancelled == 1


def be_cancelled():
    current_token()
    raise concurrent.futures.CancelledError


def test_cancelled_error_that_nobody_asked_for_is_a_failure():
    with ProcessExecutor(1, "fork") as executor:
        future = executor.submit(be_cancelled)
        assert isinstance(future.exception(WAIT_SECONDS), concurrent.futures.CancelledError)
        assert not future.cancelled()
    assert assert_counts_add_up(executor).failed == 1


def fail_when_told(read):
    os.read(read, 1)
    raise LookupError


def test_failure_in_a_group_is_told_by_the_token_of_the_rest():
    read, write = os.pipe()
    with ProcessExecutor(2, "fork") as executor:
        futures = []

        def run():
            with executor.group() as group:
                futures.append(group.submit(until_cancelled, write, timeout_seconds=WAIT_SECONDS))
                group.submit(fail_when_told, read)

        with pytest.raises(ExceptionGroup) as raised:
            run()
        assert [type(error) for error in raised.value.exceptions] == [LookupError]
        assert futures[0].cancelled()
    os.close(read)
    os.close(write)


def return_or_wait(number, tell):
    return number if number == 0 else until_cancelled(tell)


def test_map_that_is_closed_tells_the_calls_that_run():
    read, write = os.pipe()
    with ProcessExecutor(2, "fork") as executor:
        results = executor.map(return_or_wait, range(2), [write] * 2, chunksize=1)
        assert next(results) == 0
        os.read(read, 1)
        results.close()
    os.close(read)
    os.close(write)
    assert_counts_add_up(executor)


def left_in_a_thread_and_here():
    with Executor(1) as threads:
        return threads.submit(left).result(), left()


def test_token_is_that_of_the_innermost_task():
    with ProcessExecutor(1, "fork") as executor:
        future = executor.submit(left_in_a_thread_and_here, timeout_seconds=WAIT_SECONDS)
        nested, own = future.result(WAIT_SECONDS)
        assert nested == (False, None)
        assert 0 < own[1] <= WAIT_SECONDS


def test_token_asks_whom_it_is_given():
    answers = iter([False, True, True])
    token = CancelToken(lambda: next(answers), time.monotonic() + WAIT_SECONDS)
    assert not token.is_cancelled
    assert token.is_cancelled
    with pytest.raises(concurrent.futures.CancelledError):
        token.check()
    with pytest.raises(StopIteration):
        token.check()
    with pytest.raises(errors.Timeout):
        CancelToken(None, -math.inf).check()
    assert CancelToken(None, math.inf).remaining_seconds is None
    with pytest.raises(errors.InvalidArgument, match="deadline"):
        CancelToken(None, math.nan)


# === killing ====================================================================================


def test_call_that_nothing_ends_is_killed_and_its_worker_replaced():
    with ProcessExecutor(1, "fork", kill_after_seconds=0) as executor:
        pid = executor.submit(os.getpid).result(WAIT_SECONDS)
        hung = executor.submit(hold_the_gil, timeout_seconds=10 * SOON_SECONDS)
        ahead = executor.submit_many(abs, range(CALLS_AT_WORKER + 3))
        with pytest.raises(errors.Timeout, match="its worker is killed"):
            hung.result(WAIT_SECONDS)
        assert [it.result(WAIT_SECONDS) for it in ahead] == list(range(CALLS_AT_WORKER + 3))
        assert executor.submit(os.getpid).result(WAIT_SECONDS) != pid
    counts = assert_counts_add_up(executor)
    assert (counts.timed_out, counts.failed) == (1, 1)
    assert (counts.workers_killed, counts.workers_lost) == (1, 0)


class Endless:
    """It never ends being pickled."""

    def __reduce__(self):
        return hold_the_gil()


def test_call_whose_result_is_pickled_for_too_long_is_killed():
    with ProcessExecutor(1, "fork", kill_after_seconds=0) as executor:
        hung = executor.submit(Endless, timeout_seconds=10 * SOON_SECONDS)
        with pytest.raises(errors.Timeout, match="its worker is killed"):
            hung.result(WAIT_SECONDS)
        assert executor.submit(abs, -1).result(WAIT_SECONDS) == 1
    assert assert_counts_add_up(executor).workers_killed == 1


def test_call_that_ends_at_its_token_is_not_killed():
    with ProcessExecutor(1, "fork", kill_after_seconds=WAIT_SECONDS) as executor:
        late = executor.submit(until_cancelled, timeout_seconds=SOON_SECONDS)
        with pytest.raises(errors.Timeout, match=r"killed in 60 s|its call has ended"):
            late.result(WAIT_SECONDS)
        assert executor.submit(signal.getitimer, signal.ITIMER_REAL).result()[0] == 0
    counts = assert_counts_add_up(executor)
    assert (counts.workers_killed, counts.workers_started) == (0, 1)


def test_what_ended_in_time_calls_its_killing_off():
    with ProcessExecutor(1, "fork", kill_after_seconds=0) as executor:
        assert executor.submit(abs, -1, timeout_seconds=20 * SOON_SECONDS).result() == 1
        assert executor.submit(time.sleep, 40 * SOON_SECONDS).result(WAIT_SECONDS) is None
    assert assert_counts_add_up(executor).workers_killed == 0


def test_worker_that_dies_otherwise_is_lost():
    with ProcessExecutor(1, "fork", kill_after_seconds=WAIT_SECONDS) as executor:
        future = executor.submit(os.kill, 0, 0, timeout_seconds=WAIT_SECONDS)
        assert future.result(WAIT_SECONDS) is None
        died = executor.submit(os._exit, 3, timeout_seconds=WAIT_SECONDS)
        with pytest.raises(errors.WorkerFailed, match="ended with status 3"):
            died.result(WAIT_SECONDS)
        assert executor.submit(abs, -1).result(WAIT_SECONDS) == 1
    counts = assert_counts_add_up(executor)
    assert (counts.workers_lost, counts.workers_killed, counts.timed_out) == (1, 0, 0)


@pytest.mark.parametrize(("seconds", "got"), [(-1, "-1"), (math.nan, "nan"), ("1", "str")])
def test_wrong_patience_is_named(seconds, got):
    with pytest.raises(errors.InvalidArgument, match=f"kill_after_seconds: must be .* got {got}"):
        ProcessExecutor(1, kill_after_seconds=seconds)


# === fork =======================================================================================


def test_forked_child_keeps_no_time_of_its_parents_calls(gate):
    with ProcessExecutor(1, "fork") as executor:
        held = gate.shut(executor, timeout_seconds=3600)
        queued = executor.submit_many(abs, range(5), deadline=time.monotonic() + 3600)

        def child():
            for future in (held, *queued):
                assert isinstance(future.exception(WAIT_SECONDS), errors.Disconnected)
            late = executor.submit(until_late, timeout_seconds=SOON_SECONDS)
            assert isinstance(late.exception(WAIT_SECONDS), errors.Timeout)
            executor.shutdown()

        in_forked_child(child)
        gate.open()
        assert [future.result(WAIT_SECONDS) for future in queued] == list(range(5))


# === the parts ==================================================================================

_MOMENTS = st.integers(0, 20).map(float) | st.just(math.inf)


@given(
    st.lists(
        st.tuples(st.sampled_from(["put", "drop", "take"]), st.integers(0, 9), _MOMENTS),
        max_size=60,
    )
)
def test_deadlines_are_those_of_a_plain_model(steps):
    deadlines, kept = Deadlines(), {}
    tasks = [SimpleNamespace(number=number, due=math.inf) for number in range(10)]
    for what, number, moment in steps:
        task = tasks[number]
        if what == "put":
            task.due = min(task.due, moment) if number in kept else moment
            deadlines.put(task)
            if task.due < math.inf:
                kept[number] = task
        elif what == "drop":
            deadlines.drop(task)
            kept.pop(number, None)
        elif moment < math.inf:
            taken = deadlines.take(moment)
            due = [it.due for it in kept.values() if it.due <= moment]
            assert (taken is None) == (not due)
            if taken is not None:
                assert taken.due == min(due)
                del kept[taken.number]
        assert deadlines.earliest() == min((it.due for it in kept.values()), default=math.inf)
    assert len(deadlines._entries) <= 2 * len(kept) + 65


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_numbers_are_those_of_a_process_that_is_started(method):
    numbers = SharedNumbers(3)
    numbers[1] = (1 << 64) - 1
    process = multiprocessing.get_context(method).Process(target=copy_number, args=(numbers,))
    process.start()
    process.join(WAIT_SECONDS)
    assert process.exitcode == 0
    assert [numbers[0], numbers[2]] == [0, (1 << 64) - 1]


def copy_number(numbers):
    numbers[2] = numbers[1]


def test_numbers_leave_no_descriptor():
    before = len(os.listdir("/proc/self/fd"))
    threading.Thread(target=SharedNumbers, args=(1,)).start()
    del_later = SharedNumbers(60)
    del del_later
    wait_until(lambda: len(os.listdir("/proc/self/fd")) == before)
