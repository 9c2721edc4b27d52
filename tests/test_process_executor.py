"""What an executor of processes promises beyond what CPython's own tests ask of one."""

import asyncio
import concurrent.futures
import copyreg
import functools
import os
import pickle
import signal
import sys
import threading
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import psutil
import pytest
from running import in_forked_child, run_threads, wait_until
from worker_gate import CALLS_AT_WORKER, Gate, hold

from moirai import errors, memory
from moirai.executor import Priority, ProcessExecutor
from moirai.executor.process_messages import Placer
from moirai.executor.process_watch import Watch

# From 3.12 on forking is warned of where there are threads, as there are in every executor.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")

WAIT_SECONDS = 60
MIB = 1 << 20
# Calls that wait at a worker that is busy.
AHEAD = CALLS_AT_WORKER - 1


@pytest.fixture(autouse=True)
def nothing_left():
    before = set(psutil.Process().children())
    yield
    for child in set(psutil.Process().children()) - before:
        # Multiprocessing's own helpers stay until this process ends.
        try:
            command = " ".join(child.cmdline())
        except psutil.NoSuchProcess:
            continue  # It has ended by now, or is about to be waited for.
        assert "resource_tracker" in command or "forkserver" in command, command


@pytest.fixture
def executor():
    with ProcessExecutor(2) as made:
        yield made


@pytest.fixture
def one():
    """An executor with one worker."""
    with ProcessExecutor(1) as made:
        yield made


@pytest.fixture
def gate():
    """One for forked workers: they inherit its descriptors, so ask for it before the executor."""
    made = Gate()
    yield made
    made.close()


def same(item):
    return item


def raise_error(text):
    raise ValueError(text)


def kill_self():
    os.kill(os.getpid(), signal.SIGKILL)


def pids_of(executor):
    return [worker.process.pid for worker in list(executor._pool.workers.values())]


def is_gone(pid):
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


# === calls ======================================================================================


@pytest.mark.parametrize("context", ["fork", "spawn", "forkserver"])
def test_calls_run_in_other_processes_however_they_are_started(context):
    with ProcessExecutor(2, context) as executor:
        future = executor.submit(pow, 2, exp=5)
        assert isinstance(future, concurrent.futures.Future)
        assert future.result(WAIT_SECONDS) == 32
        assert executor.submit(os.getpid).result(WAIT_SECONDS) != os.getpid()
        large = np.arange(MIB, dtype="u1")
        assert (executor.submit(same, large).result(WAIT_SECONDS) == large).all()
        assert list(executor.map(abs, range(-3, 3))) == [3, 2, 1, 0, 1, 2]
        dead = executor.submit(kill_self)
        with pytest.raises(errors.WorkerFailed):
            dead.result(WAIT_SECONDS)
        assert executor.submit(abs, -1).result(WAIT_SECONDS) == 1


def test_failure_is_raised_with_the_traceback_of_the_worker(executor):
    with pytest.raises(ValueError, match="asked to fail") as caught:
        executor.submit(raise_error, "asked to fail").result(WAIT_SECONDS)
    assert "raise_error\n    raise ValueError(text)" in str(caught.value.__cause__)


def test_lambda_runs_where_cloudpickle_is(executor):
    pytest.importorskip("cloudpickle")
    number = 3
    assert executor.submit(lambda x: x + number, 4).result(WAIT_SECONDS) == 7
    made = executor.submit(lambda: lambda: 5).result(WAIT_SECONDS)
    assert made() == 5


def test_lambda_is_refused_where_cloudpickle_is_not(executor, monkeypatch):
    monkeypatch.setitem(sys.modules, "cloudpickle", None)
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        executor.submit(lambda: 1).result(WAIT_SECONDS)
    assert executor.statistics().failed == 1
    assert executor.submit(abs, -1).result(WAIT_SECONDS) == 1


class UnreadableThere:
    """A value that only the process in which it was made cannot make again."""

    def __init__(self, pid=None):
        self.pid = os.getpid()

    def __reduce__(self):
        return refuse_elsewhere, (self.pid,)


def refuse_elsewhere(pid):
    if pid != os.getpid():
        raise OSError("not for this process")
    return UnreadableThere()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ((same, UnreadableThere()), "the worker cannot read the call: OSError"),
        ((UnreadableThere,), "the result cannot be read: OSError"),
    ],
    ids=["call", "result"],
)
def test_what_the_other_side_cannot_read_is_a_failure_that_says_so(executor, call, message):
    with pytest.raises(errors.WorkerFailed, match=message) as caught:
        executor.submit(*call).result(WAIT_SECONDS)
    assert isinstance(caught.value.__cause__, OSError)
    assert executor.submit(abs, -1).result(WAIT_SECONDS) == 1


def test_result_that_cannot_be_pickled_is_a_failure(executor):
    with pytest.raises((TypeError, pickle.PicklingError)):
        executor.submit(threading.Lock).result(WAIT_SECONDS)


def test_submit_many_and_maps_give_what_the_functions_give(executor):
    futures = executor.submit_many(divmod, [7, 8, 9], [2, 3, 4])
    assert [future.result(WAIT_SECONDS) for future in futures] == [(3, 1), (2, 2), (2, 1)]
    items = list(range(1000))
    assert list(executor.map(same, items)) == items
    assert sorted(executor.map_unordered(same, items, chunksize=7)) == items
    assert list(executor.map(pow, [2, 3], [3, 2])) == [8, 9]
    with pytest.raises(errors.InvalidArgument, match="chunksize"):
        executor.map(same, items, chunksize=0)


def test_map_gives_results_up_to_the_first_failure(executor):
    results = executor.map(functools.partial(divmod, 12), [1, 2, 0, 3], chunksize=4)
    assert next(results) == (12, 0)
    assert next(results) == (6, 0)
    with pytest.raises(ZeroDivisionError) as caught:
        next(results)
    assert "divmod" in str(caught.value.__cause__) or "run_chunk" in str(caught.value.__cause__)


def test_group_raises_all_failures_and_cancels_the_rest(gate, one):
    held = gate.shut(one)
    rest = []

    def fail():
        with one.group() as group:
            group.submit(raise_error, "first")
            rest.extend(group.submit(abs, -1) for _ in range(10))
            gate.open()

    with pytest.raises(ExceptionGroup) as caught:
        fail()
    assert [str(error) for error in caught.value.exceptions] == ["first"]
    assert held.result(WAIT_SECONDS) == b"x"
    assert all(future.done() for future in rest)


def test_event_loop_waits_for_calls(executor):
    async def run():
        loop = asyncio.get_running_loop()
        return await asyncio.gather(*(loop.run_in_executor(executor, abs, -n) for n in range(9)))

    assert asyncio.run(run()) == list(range(9))


def test_many_threads_submit(executor):
    found = []

    def use():
        found.extend(executor.submit(same, n).result(WAIT_SECONDS) for n in range(50))

    run_threads(use, use, use, use)
    assert sorted(found) == sorted(4 * list(range(50)))


# === arrays =====================================================================================


def describe(array):
    told = (array.flags.writeable, float(array.sum()))
    if array.flags.writeable:
        array[:] = 0
    return told


def test_array_is_copied_once_and_belongs_to_the_worker(one):
    array = np.ones(2 * MIB, "u1")
    assert one.submit(describe, array).result(WAIT_SECONDS) == (True, 2 * MIB)
    assert array.all()
    counts = one.statistics()
    assert (counts.copied_bytes, counts.lent_bytes) == (2 * MIB, 0)


def test_array_in_shared_memory_is_not_copied(one):
    shared = memory.SharedMemoryResource("8 MiB")
    with memory.use(shared):
        array = np.ones(2 * MIB, "u1")
    # What the worker gets is the memory itself: it sees what is written here while it holds it.
    assert one.submit(describe, array[::1]).result(WAIT_SECONDS) == (False, 2 * MIB)
    counts = one.statistics()
    assert (counts.copied_bytes, counts.lent_bytes) == (0, 2 * MIB)


_shared = None


def ones_in_shared_memory(count):
    global _shared
    _shared = _shared or memory.SharedMemoryResource("16 MiB")
    with memory.use(_shared):
        return {"ones": np.ones(count, "u1"), "few": np.arange(3)}


def test_result_in_shared_memory_is_not_copied(executor):
    for _ in range(20):
        found = executor.submit(ones_in_shared_memory, MIB).result(WAIT_SECONDS)
        assert found["ones"].sum() == MIB
        assert not found["ones"].flags.writeable
        assert found["few"].tolist() == [0, 1, 2]
    assert executor.statistics().copied_bytes == 0


def test_result_array_outlives_the_executor():
    with ProcessExecutor(1) as executor:
        found = executor.submit(np.ones, 2 * MIB, "u1").result(WAIT_SECONDS)
    assert found.sum() == 2 * MIB
    found += 1
    assert found.sum() == 4 * MIB


@pytest.mark.parametrize("length", [0, 1, 1000, 30_000, 33_000, 70_000, 3_000_000])
def test_objects_of_any_length_come_back_as_they_went(executor, length):
    shared = memory.SharedMemoryResource("16 MiB")
    with memory.use(shared):
        lent = np.arange(length, dtype="u4")
    item = {
        "bytes": os.urandom(length),
        "lent": lent,
        "own": [np.arange(length // 8, dtype="u8"), np.zeros(0), np.asfortranarray(np.eye(3))],
        "many": [np.full(8, number % 7, "u1") for number in range(min(length, 500))],
        "strided": np.arange(length)[::3],
    }
    found = executor.submit(same, item).result(WAIT_SECONDS)
    assert found["bytes"] == item["bytes"]
    assert (found["lent"] == lent).all()
    for name in ("own", "many"):
        for here, there in zip(found[name], item[name], strict=True):
            assert here.dtype == there.dtype
            assert (here == there).all()
            here[...] = 1  # the receiver's own
    assert (found["strided"] == item["strided"]).all()


def test_calls_wait_for_shared_memory_and_one_that_never_fits_fails():
    with ProcessExecutor(2, memory_bytes="6 MiB") as executor:
        arrays = [np.full(2 * MIB, number, "u1") for number in range(20)]
        futures = [executor.submit(np.max, array) for array in arrays]
        assert [future.result(WAIT_SECONDS) for future in futures] == list(range(20))
        with pytest.raises(errors.OutOfMemory):
            executor.submit(np.max, np.zeros(10 * MIB, "u1")).result(WAIT_SECONDS)
        with pytest.raises(errors.OutOfMemory):
            executor.submit(np.zeros, 10 * MIB, "u1").result(WAIT_SECONDS)
        assert executor.submit(abs, -1).result(WAIT_SECONDS) == 1


def fail_with(array):
    raise ValueError(len(array))


def test_memory_of_a_call_is_there_for_the_next():
    with ProcessExecutor(1, memory_bytes="4 MiB") as executor:
        array = np.ones(3 * MIB, "u1")
        for _ in range(20):  # two of them would not fit
            assert executor.submit(np.sum, array).result(WAIT_SECONDS) == 3 * MIB
            assert len(executor.submit(same, array).result(WAIT_SECONDS)) == 3 * MIB
            with pytest.raises(ValueError, match=str(3 * MIB)):
                executor.submit(fail_with, array).result(WAIT_SECONDS)


def test_memory_that_came_back_just_after_there_was_none_is_tried(monkeypatch):
    """A worker let go between the attempt and the look at what lingers: nothing does any more."""
    refusals = iter([errors.OutOfMemory("there was none")])
    place = Placer.place

    def refuse_once(self, parts):
        for refusal in refusals:
            raise refusal
        return place(self, parts)

    monkeypatch.setattr(Placer, "place", refuse_once)
    with ProcessExecutor(1, "fork", memory_bytes="4 MiB") as executor:
        array = np.ones(3 * MIB, "u1")
        assert executor.submit(np.sum, array).result(WAIT_SECONDS) == 3 * MIB
    assert next(refusals, None) is None


def test_failure_comes_back_whatever_is_registered_for_its_class(monkeypatch):
    monkeypatch.setitem(copyreg.dispatch_table, errors.OutOfMemory, refuse_to_pickle)
    with ProcessExecutor(1, "fork") as executor:
        with pytest.raises(errors.OutOfMemory, match="asked to"):
            executor.submit(raise_out_of_memory).result(WAIT_SECONDS)
        with pytest.raises(errors.OutOfMemory, match="of items"):
            list(executor.map(raise_out_of_memory, ["of items"], chunksize=1))


def refuse_to_pickle(error):
    raise TypeError("not this one")


def raise_out_of_memory(text="asked to"):
    raise errors.OutOfMemory(text)


class Unpicklable(Exception):
    def __reduce__(self):
        raise TypeError("not me")


def raise_unpicklable():
    raise Unpicklable("but these words")


def test_failure_that_cannot_be_pickled_keeps_its_words(executor):
    with pytest.raises(RuntimeError, match="Unpicklable: but these words: cannot be pickled"):
        executor.submit(raise_unpicklable).result(WAIT_SECONDS)


class Unspeakable(Unpicklable):
    def __str__(self):
        raise TypeError("no words")


def raise_unspeakable():
    raise Unspeakable


def test_failure_without_words_that_cannot_be_pickled_is_no_end_of_a_worker(executor):
    with pytest.raises(
        RuntimeError, match=r"Unspeakable: .*: cannot be pickled: TypeError: not me"
    ):
        executor.submit(raise_unspeakable).result(WAIT_SECONDS)


# === workers that die ===========================================================================


def test_killed_worker_fails_its_call_alone_and_is_replaced(gate, executor):
    held = gate.shut(executor)
    dead = executor.submit(kill_self)
    with pytest.raises(errors.WorkerFailed, match=r"the worker process \d+ was killed by SIGKILL"):
        dead.result(WAIT_SECONDS)
    assert isinstance(dead.exception(), BrokenProcessPool | errors.Disconnected)
    assert not held.done()
    assert executor.submit(abs, -1).result(WAIT_SECONDS) == 1
    gate.open()
    assert held.result(WAIT_SECONDS) == b"x"
    counts = executor.statistics()
    assert (counts.workers_started, counts.workers_lost) == (3, 1)
    assert (counts.submitted, counts.succeeded, counts.failed) == (3, 2, 1)


def test_calls_that_a_killed_worker_had_not_begun_run_elsewhere(gate, one):
    pid = one.submit(os.getpid).result(WAIT_SECONDS)
    held = gate.shut(one)
    rest = [one.submit(same, number) for number in range(5)]
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(errors.WorkerFailed, match=f"process {pid} was killed by SIGKILL"):
        held.result(WAIT_SECONDS)
    assert [future.result(WAIT_SECONDS) for future in rest] == list(range(5))


def test_idle_worker_that_is_killed_fails_nothing(one):
    pid = one.submit(os.getpid).result(WAIT_SECONDS)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: one.statistics().workers_lost == 1)
    assert one.submit(os.getpid).result(WAIT_SECONDS) != pid
    assert one.statistics().failed == 0


def test_worker_that_exits_says_with_what(executor):
    with pytest.raises(errors.WorkerFailed, match="ended with status 3 while it had this call"):
        executor.submit(os._exit, 3).result(WAIT_SECONDS)


def note(descriptor, number, array):
    os.write(descriptor, b"%d\n" % number)
    return number + int(array[-1])


def test_no_call_is_lost_or_run_twice_while_workers_are_killed(tmp_path):
    path = tmp_path / "calls"
    descriptor = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    array = np.zeros(200_000, "u1")
    futures = []
    with ProcessExecutor(2, "fork") as executor:
        for killed in range(12):
            first = len(futures)
            futures += [
                executor.submit(note, descriptor, number, array)
                for number in range(first, first + 30)
            ]
            futures[first + killed].exception(WAIT_SECONDS)
            os.kill(pids_of(executor)[0], signal.SIGKILL)
            wait_until(lambda killed=killed: executor.statistics().workers_lost == killed + 1)
        failed = [future for future in futures if future.exception(WAIT_SECONDS) is not None]
    os.close(descriptor)
    noted = [int(line) for line in path.read_text().split()]
    assert len(noted) == len(set(noted))
    for number, future in enumerate(futures):
        if future in failed:
            assert isinstance(future.exception(), errors.WorkerFailed)
        else:
            assert future.result() == number
            assert number in noted
    assert len(failed) <= 12
    counts = executor.statistics()
    assert counts.submitted == counts.succeeded + counts.failed == 360


def die_at_once():
    os._exit(7)


def test_workers_that_never_start_break_the_executor():
    with ProcessExecutor(2, initializer=die_at_once) as executor:
        future = executor.submit(abs, -1)
        with pytest.raises(BrokenProcessPool, match="status 7 before it was ready"):
            future.result(WAIT_SECONDS)
        with pytest.raises(BrokenProcessPool):
            executor.submit(abs, -1)


def test_failing_initializer_breaks_the_executor():
    with ProcessExecutor(1, initializer=raise_error, initargs=("no",)) as executor:
        future = executor.submit(abs, -1)
        with pytest.raises(BrokenProcessPool, match="initializer"):
            future.result(WAIT_SECONDS)


def test_results_of_other_workers_do_not_disturb_an_executor_that_breaks(gate, tmp_path):
    read, write = os.pipe()

    def initialize():
        try:
            (tmp_path / "first").mkdir()
        except FileExistsError:
            os.read(read, 1)
            raise

    executor = ProcessExecutor(2, "fork", initializer=initialize)
    busy, free, died = threading.Event(), threading.Event(), threading.Event()

    def hold_up(_):
        if not busy.is_set():
            busy.set()
            free.wait(WAIT_SECONDS)

    futures = [gate.shut(executor)]
    tell = executor._pool._watch._tell
    executor._pool._watch._tell = lambda number: (tell(number), died.set())
    futures += [executor.submit(hold, gate._tell, gate._hold) for _ in range(2 * AHEAD + 1)]
    for future in futures:
        wait_until(future.running)
        future.add_done_callback(hold_up)
    gate.open()
    assert busy.wait(WAIT_SECONDS)  # the manager is, with what the first call gave
    os.read(gate._told, 1)
    os.write(write, b"x")
    assert died.wait(WAIT_SECONDS)
    gate.open()
    os.read(gate._told, 1)  # the third was begun, so what the second gave was sent
    free.set()
    errors_of = [future.exception(WAIT_SECONDS) for future in futures]
    assert sorted(map(type, errors_of), key=str) == [type(None), *[BrokenProcessPool] * 5]
    executor.shutdown()
    assert executor._pool.broken == "the initializer failed in a worker process"
    os.close(read)
    os.close(write)


def test_initializer_runs_in_each_worker_before_its_calls():
    with ProcessExecutor(1, initializer=os.environ.update, initargs=({"BY": "me"},)) as executor:
        assert executor.submit(os.getenv, "BY").result(WAIT_SECONDS) == "me"


@pytest.mark.parametrize("context", ["fork", None])
def test_worker_is_replaced_after_so_many_tasks(context):
    with ProcessExecutor(1, context, max_tasks_per_child=3) as executor:
        futures = executor.submit_many(same, range(7))
        pids = [executor.submit(os.getpid) for _ in range(2)]
        assert [future.result(WAIT_SECONDS) for future in futures] == list(range(7))
        assert len({future.result(WAIT_SECONDS) for future in pids}) == 1
        counts = executor.statistics()
        assert (counts.workers_started, counts.workers_lost) == (3, 0)


# === order, cancelling, ends ====================================================================


def test_urgent_calls_go_first(gate, one, tmp_path):
    held = gate.shut(one)
    path = str(tmp_path / "order")
    ahead = [one.submit(append, path, "ahead") for _ in range(AHEAD)]
    wait_until(ahead[-1].running)  # on their way to the worker
    futures = [
        one.submit(append, path, priority.name, priority=priority)
        for priority in reversed(Priority)
    ]
    gate.open()
    for future in [held, *futures]:
        future.result(WAIT_SECONDS)
    words = (tmp_path / "order").read_text().split()
    assert words[:AHEAD] == ["ahead"] * AHEAD
    assert sorted(words[AHEAD:]) == sorted(priority.name for priority in Priority)
    assert words.index("REALTIME") < words.index("BACKGROUND")
    with pytest.raises(errors.InvalidArgument, match="priority: must be a Priority or None"):
        one.submit(abs, -1, priority=7)


def append(path, word):
    with open(path, "a") as file:
        file.write(word + "\n")


def test_queued_call_is_cancelled(gate, one):
    held = gate.shut(one)
    futures = [one.submit(abs, -1) for _ in range(5)]
    assert futures[-1].cancel()
    gate.open()
    assert held.result(WAIT_SECONDS) == b"x"
    assert [future.result(WAIT_SECONDS) for future in futures[:-1]] == [1] * 4
    one.shutdown()
    assert one.statistics().cancelled == 1


def test_call_given_to_a_busy_worker_goes_to_one_that_becomes_idle(gate, executor):
    first, second = gate.shut(executor), gate.shut(executor)
    rest = [executor.submit(same, number) for number in range(2)]  # one behind each
    wait_until(lambda: all(future.running() for future in rest))
    gate.open()
    # Whichever worker goes on runs both, although the other had one of them already.
    assert [future.result(WAIT_SECONDS) for future in rest] == [0, 1]
    assert first.done() != second.done()
    assert executor.statistics().taken_back == 1
    gate.open()


def test_timeout_says_that_the_task_goes_on(gate, one):
    held = gate.shut(one)
    with pytest.raises(errors.Timeout, match=r"timeout: the task has not ended within 0\.01 s"):
        held.result(0.01)
    with pytest.raises(concurrent.futures.TimeoutError):
        held.exception(timeout=0)
    gate.open()
    assert held.result(WAIT_SECONDS) == b"x"


def raise_timeout():
    raise TimeoutError("the task's own")


def test_timeout_of_the_call_itself_is_its_failure(one):
    with pytest.raises(TimeoutError, match="the task's own"):
        one.submit(raise_timeout).result(WAIT_SECONDS)


def test_shutdown_runs_or_cancels_what_is_queued(gate):
    executor = ProcessExecutor(1)
    held = gate.shut(executor)
    futures = [executor.submit(abs, -1) for _ in range(AHEAD + 4)]
    wait_until(futures[AHEAD - 1].running)  # on their way to the worker
    executor.shutdown(wait=False, cancel_futures=True)
    with pytest.raises(errors.Closed, match="cannot schedule new futures after shutdown"):
        executor.submit(abs, -1)
    gate.open()
    executor.shutdown()
    assert held.result(WAIT_SECONDS) == b"x"
    assert [future.cancelled() for future in futures] == [False] * AHEAD + [True] * 4
    assert futures[0].result(WAIT_SECONDS) == 1
    counts = executor.statistics()
    assert (counts.submitted, counts.succeeded, counts.cancelled) == (AHEAD + 5, AHEAD + 1, 4)


def test_calls_that_a_worker_gave_back_are_run_though_the_rest_is_cancelled(gate):
    with ProcessExecutor(2, "fork") as executor:
        held = [gate.shut(executor), gate.shut(executor)]
        ahead = executor.submit_many(abs, range(2 * AHEAD))
        for future in ahead:
            wait_until(future.running)
        urgent = executor.submit(abs, -1, priority=Priority.REALTIME)
        executor.allow(1)
        wait_until(lambda: executor.statistics().queued == AHEAD + 1)
        ended = []

        def wait_for_all(_):
            gate.open(2)
            ended.extend(future.result(WAIT_SECONDS) for future in (*held, *ahead))

        urgent.add_done_callback(wait_for_all)  # before those that were given back are come to
        executor.shutdown(wait=False, cancel_futures=True)
        assert urgent.cancelled()
        assert ended == [b"x", b"x", *range(2 * AHEAD)]


def test_executor_that_is_dropped_runs_what_is_queued_and_ends_its_workers():
    executor = ProcessExecutor(1)
    pid = executor.submit(os.getpid).result(WAIT_SECONDS)
    futures = [executor.submit(same, number) for number in range(10)]
    del executor
    assert [future.result(WAIT_SECONDS) for future in futures] == list(range(10))
    wait_until(lambda: is_gone(pid))


def test_progress_counts_calls_until_all_are_over(gate, executor):
    assert [(now.completed, now.total) for now in executor.progress()] == [(0, 0)]
    held = gate.shut(executor)
    seen = []
    opener = threading.Thread(target=gate.open)
    results = executor.map(abs, range(100), chunksize=10)
    for now in executor.progress(interval_seconds=0):
        seen.append(now)
        if now.completed == 100:
            opener.start()
    opener.join()
    assert list(results) == list(range(100))
    assert held.result(WAIT_SECONDS) == b"x"
    completed = [now.completed for now in seen]
    assert completed == sorted(set(completed))
    assert (seen[-1].completed, seen[-1].total, seen[-1].is_complete) == (101, 101, True)
    with pytest.raises(errors.InvalidArgument, match="interval_seconds"):
        executor.progress(interval_seconds=-1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_workers": 0}, "max_workers must be greater than 0"),
        ({"max_workers": 61}, "at most 60, got 61"),
        ({"max_tasks_per_child": 0}, "max_tasks_per_child: must be at least 1, got 0"),
        ({"mp_context": "thread"}, 'mp_context: must be a context, "fork"'),
    ],
)
def test_argument_outside_its_range_is_named(arguments, message):
    with pytest.raises(errors.InvalidArgument, match=message):
        ProcessExecutor(**arguments)


# === processes around it ========================================================================


def test_forked_child_has_an_empty_executor_with_workers_of_its_own(gate, executor):
    held = gate.shut(executor)

    def use():
        assert executor.statistics().submitted == 0
        with pytest.raises(errors.Disconnected, match="queued in the parent process"):
            held.result(WAIT_SECONDS)
        assert executor.submit(os.getppid).result(WAIT_SECONDS) == os.getpid()
        executor.shutdown()

    in_forked_child(use)
    gate.open()
    assert held.result(WAIT_SECONDS) == b"x"
    assert executor.submit(os.getppid).result(WAIT_SECONDS) == os.getpid()


def test_workers_end_with_a_parent_that_is_killed():
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        executor = ProcessExecutor(2)
        pids = {executor.submit(os.getpid).result(WAIT_SECONDS) for _ in range(1)}
        os.write(tell, repr([*pids, *[it.pid for it in psutil.Process().children()]]).encode())
        signal.pause()
        os._exit(1)
    pids = eval(os.read(told, 1000))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    wait_until(lambda: all(map(is_gone, pids)))
    for descriptor in (told, tell):
        os.close(descriptor)


def test_no_shared_memory_has_a_name(executor):
    """So that nothing can be left in /dev/shm, whoever is killed."""
    large = np.ones(MIB)
    for future in [executor.submit(same, large) for _ in range(4)]:
        future.result(WAIT_SECONDS)
    for pid in [os.getpid(), *pids_of(executor)]:
        with open(f"/proc/{pid}/maps") as maps:
            shared = [line.split(maxsplit=5)[5] for line in maps if " rw-s " in line]
        assert shared
        assert not [name for name in shared if "/dev/shm" in name]


def test_interpreter_that_ends_runs_what_is_queued(run_python):
    told = run_python(
        """
        import os
        from moirai.executor import ProcessExecutor
        executor = ProcessExecutor(2, "fork")
        for number in range(20):
            executor.submit(os.write, 1, b"ran\\n")
        """
    )
    assert told.split() == ["ran"] * 20


def test_worker_that_is_started_at_the_interpreters_end_may_have_executors(run_python):
    told = run_python("""
        from moirai.executor import Executor, ProcessExecutor

        def nested(make, *arguments):
            with make(1, *arguments) as executor:
                return executor.submit(abs, -1).result()

        executor = ProcessExecutor(1, "fork", max_tasks_per_child=1)
        futures = [executor.submit(abs, -1)]
        futures += [executor.submit(nested, Executor) for _ in range(2)]
        futures += [executor.submit(nested, ProcessExecutor, "fork") for _ in range(2)]
        for future in futures:
            future.add_done_callback(lambda it: print(it.result(), flush=True))
        # The interpreter ends now: all but the first worker are started meanwhile.
    """)
    assert told.split() == ["1"] * 5


def test_ctrl_c_ends_the_wait_and_the_call(run_python):
    told = run_python(
        """
        import os, signal, threading
        from moirai.executor import ProcessExecutor

        def hold(tell):
            os.write(tell, b"x")
            signal.pause()

        os.setpgid(0, 0)
        told, tell = os.pipe()
        executor = ProcessExecutor(2, "fork")
        future = executor.submit(hold, tell)
        def interrupt():
            os.read(told, 1)
            os.killpg(0, signal.SIGINT)  # as a terminal does
        thread = threading.Thread(target=interrupt)
        try:
            thread.start()
            future.exception()
            threading.Event().wait(60)  # the worker's may have come first
        except KeyboardInterrupt:
            print("interrupted")
        print(repr(future.exception(60)))
        print(executor.submit(abs, -1).result(60), executor.statistics().workers_lost)
        """
    )
    assert told.splitlines() == ["interrupted", "KeyboardInterrupt()", "1 0"]


def test_watch_whose_thread_ended_before_it_was_told_is_stopped():
    watch = Watch(lambda number: None, "watch")
    watch._is_over = True
    os.eventfd_write(watch._changed, 1)
    watch._thread.join()
    watch.stop()
