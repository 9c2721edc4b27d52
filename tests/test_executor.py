"""What an executor of threads promises beyond what CPython's own tests ask of one."""

import asyncio
import concurrent.futures
import contextvars
import functools
import gc
import math
import os
import signal
import sysconfig
import threading
import time
import traceback
import weakref

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from running import in_forked_child, run_threads

from moirai import errors
from moirai.executor import Executor, Future, LatencyHistogram, Priority

WAIT_SECONDS = 60


@pytest.fixture(params=[1, 2, 4])
def executor(request):
    with Executor(request.param) as made:
        yield made


def raise_error():
    raise ValueError("asked to fail")


# === futures ====================================================================================


def test_future_is_one_of_concurrent_futures(executor):
    future = executor.submit(pow, 2, exp=5)
    assert isinstance(future, Future)
    assert isinstance(future, concurrent.futures.Future)
    assert future.result() == 32
    assert future.done()
    assert not future.cancelled()
    assert "finished returned int" in repr(future).replace("state=", "")


def test_failure_is_raised_with_the_traceback_of_the_task(executor):
    future = executor.submit(raise_error)
    with pytest.raises(ValueError, match="asked to fail") as caught:
        future.result()
    names = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert names[-1] == "raise_error"
    assert future.exception() is caught.value


def test_timeout_says_that_the_task_goes_on(executor, gate):
    gate(executor)
    future = executor.submit(pow, 2, 2)
    with pytest.raises(errors.Timeout, match=r"timeout: the task has not ended within 0\.01 s"):
        future.result(0.01)
    with pytest.raises(concurrent.futures.TimeoutError):
        future.exception(timeout=0)


def test_queued_task_is_cancelled_and_dropped_at_once(executor, gate):
    class Argument:
        pass

    opened = gate(executor)
    argument = Argument()
    gone = weakref.ref(argument)
    future = executor.submit(print, argument)
    told = []
    future.add_done_callback(told.append)
    del argument
    assert future.cancel()
    assert future.cancel()
    assert told == [future]
    assert gone() is None
    with pytest.raises(concurrent.futures.CancelledError):
        future.result()
    opened.set()
    done, _ = concurrent.futures.wait([executor.submit(pow, 2, 2), future], WAIT_SECONDS)
    assert len(done) == 2


def test_cancelled_task_wakes_those_who_wait(executor, gate):
    gate(executor)
    future = executor.submit(pow, 2, 2)
    waiting = threading.Event()

    def wait():
        assert future._state == "PENDING"
        future._condition  # noqa: B018 - asks for the lock, as concurrent.futures.wait does
        waiting.set()
        done, _ = concurrent.futures.wait([future], WAIT_SECONDS)
        assert done == {future}

    def cancel():
        waiting.wait(WAIT_SECONDS)
        assert future.cancel()

    run_threads(wait, cancel)


def test_running_task_is_not_cancelled(executor):
    begun, opened = threading.Event(), threading.Event()

    def hold():
        begun.set()
        return opened.wait(WAIT_SECONDS)

    future = executor.submit(hold)
    begun.wait(WAIT_SECONDS)
    assert future.running()
    assert not future.cancel()
    opened.set()
    assert future.result(WAIT_SECONDS)


def test_callback_that_raises_is_logged_and_the_next_is_called(executor, gate, caplog):
    opened = gate(executor)
    future = executor.submit(pow, 2, 2)
    called = threading.Event()
    future.add_done_callback(lambda _: 1 / 0)
    future.add_done_callback(lambda _: called.set())
    opened.set()
    assert called.wait(WAIT_SECONDS)
    assert "exception calling callback for <Future" in caplog.text


def test_future_of_ones_own_is_set_by_hand():
    future = Future()
    assert future.set_running_or_notify_cancel()
    future.set_result(3)
    assert future.result() == 3
    with pytest.raises(concurrent.futures.InvalidStateError):
        future.set_result(4)


class Holder:
    """What refers to anything."""


def raise_holding(holder):
    error = ValueError("asked to fail")
    error.holder = holder
    raise error


def ended(future):
    future.exception()
    return future


def refer_by_result(executor, holder):
    return ended(executor.submit(lambda: [holder]))


def refer_by_exception(executor, holder):
    return ended(executor.submit(raise_holding, holder))


def refer_by_attribute(executor, holder):
    future = ended(executor.submit(pow, 2, 3))
    future.holder = holder
    return future


def refer_by_callback(executor, holder):
    future = Future()
    future.add_done_callback(holder)
    return future


def refer_by_waiter(executor, holder):
    future = ended(executor.submit(pow, 2, 3))
    future._waiters.append(holder)
    return future


@pytest.mark.parametrize(
    "refer",
    [refer_by_result, refer_by_exception, refer_by_attribute, refer_by_callback, refer_by_waiter],
)
def test_future_in_a_cycle_is_collected(executor, refer):
    holder = Holder()
    gone = weakref.ref(holder)
    future = holder.future = refer(executor, holder)
    del future, holder
    gc.collect()
    assert gone() is None


def test_the_collector_has_nothing_to_do_with_a_future_that_refers_to_nothing(executor):
    plain = executor.submit(pow, 2, 3)
    assert plain.result() == 8
    # Without an interpreter lock the collector knows every object.
    assert gc.is_tracked(plain) == bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
    plain.note = []
    assert gc.is_tracked(plain)
    del plain.note
    with pytest.raises(AttributeError, match="note"):
        del plain.note
    with pytest.raises(AttributeError):
        plain._state = "RUNNING"


def test_asyncio_awaits_futures(executor):
    async def main():
        loop = asyncio.get_running_loop()
        first = asyncio.wrap_future(executor.submit(pow, 2, 3))
        second = loop.run_in_executor(executor, pow, 2, 4)
        with pytest.raises(ValueError, match="asked to fail"):
            await asyncio.wrap_future(executor.submit(raise_error))
        return await asyncio.gather(first, second)

    assert asyncio.run(main()) == [8, 16]


# === queueing ===================================================================================


def test_many_calls_are_queued_together(executor):
    futures = executor.submit_many(divmod, [7, 8, 9], (2, 3, 4))
    assert [future.result() for future in futures] == [(3, 1), (2, 2), (2, 1)]
    assert [future.result() for future in executor.submit_many(abs, range(-2, 1))] == [2, 1, 0]
    assert executor.submit_many(abs, []) == []


@given(
    st.lists(st.integers(-9, 9), max_size=40),
    st.one_of(st.just("auto"), st.integers(1, 50)),
    st.integers(1, 3),
)
@settings(max_examples=30)
def test_map_gives_what_the_builtin_gives(items, chunksize, workers):
    def invert(x):
        return 10 // x

    def collect(results):
        found = []
        try:
            found.extend(iter(functools.partial(next, results), None))
        except (StopIteration, ZeroDivisionError) as end:
            found.append(type(end))
        return found

    with Executor(workers) as executor:
        got = collect(iter(executor.map(invert, items, chunksize=chunksize)))
        assert got == collect(map(invert, items))
        if 0 not in items:
            results = executor.map_unordered(invert, items, chunksize=chunksize)
            assert sorted(results) == sorted(map(invert, items))


def test_map_refuses_a_chunk_of_nothing(executor):
    with pytest.raises(errors.InvalidArgument, match=r'chunksize: must be "auto" or an int .* 0'):
        executor.map(abs, [1], chunksize=0)


def test_map_without_order_times_out(executor, gate):
    gate(executor)
    with pytest.raises(errors.Timeout, match="2 of 2 tasks have not ended"):
        list(executor.map_unordered(abs, [1, 2], timeout=0.01))


def test_task_runs_in_the_context_it_was_submitted_in(executor):
    variable = contextvars.ContextVar("variable", default="none")
    variable.set("submitted")
    futures = [executor.submit(variable.get), *executor.submit_many(lambda _: variable.get(), [1])]
    results = executor.map(lambda _: variable.get(), range(3))
    variable.set("later")
    assert [future.result() for future in futures] == ["submitted", "submitted"]
    assert list(results) == ["submitted"] * 3
    executor.submit(variable.set, "inside").result()
    assert variable.get() == "later"


def test_one_worker_keeps_the_order_and_never_runs_two_at_once():
    order = []
    active = threading.Semaphore(1)

    def note(number):
        assert active.acquire(blocking=False)
        order.append(number)
        os.sched_yield()  # lets another thread have the interpreter
        active.release()
        return number

    with Executor(1) as executor:
        futures = [executor.submit(note, number) for number in range(500)]
        assert futures[250].result() == 250
        assert [future.result() for future in futures] == list(range(500))
    assert order == list(range(500))


def test_priorities_go_first_within_a_busy_executor(gate):
    for _ in range(100):
        order = []
        with Executor(1) as executor:
            opened = gate(executor)
            began_at = time.monotonic()
            for priority in reversed(Priority):
                executor.submit(order.append, priority, priority=priority)
            opened.set()
        # What waits for longer than 50 ms may go first, and on a loaded machine that may be any.
        if time.monotonic() - began_at < 0.04:
            break
    assert order == sorted(Priority)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"priority": "high"}, r"priority: must be a Priority, got 'high'"),
        ({"node": 4096}, r"node: must be one that has workers"),
        ({"node": -1}, r"node: must be from 0"),
    ],
)
def test_wrong_option_of_a_task_is_named(executor, options, message):
    with pytest.raises(errors.InvalidArgument, match=message):
        executor.submit(print, **options)
    with pytest.raises(errors.InvalidArgument, match=message):
        executor.submit_many(print, [1], **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_workers": 0}, errors.InvalidArgument, "greater than 0.* got 0"),
        ({"max_workers": 1 << 20}, errors.InvalidArgument, "at most 4096, got 1048576"),
        ({"max_workers": "2"}, TypeError, "max_workers: must be an int or None, got str"),
        ({"affinity": "socket"}, errors.InvalidArgument, "affinity: must be .* got 'socket'"),
        ({"initializer": 3}, TypeError, "initializer must be a callable"),
    ],
)
def test_wrong_argument_is_named(options, error, message):
    with pytest.raises(error, match=message):
        Executor(**options)


def test_worker_stays_on_its_cpu():
    with Executor(1, affinity="core") as executor:
        cpus = executor.submit(os.sched_getaffinity, 0).result(WAIT_SECONDS)
    assert len(cpus) == 1


# === waiting ====================================================================================


def fibonacci(executor, number):
    if number < 2:
        return number
    first = executor.submit(fibonacci, executor, number - 1)
    second = executor.submit(fibonacci, executor, number - 2)
    return first.result() + second.result()


def test_nested_tasks_do_not_wait_for_each_other(executor):
    assert executor.submit(fibonacci, executor, 13).result() == 233
    assert executor.submit(fibonacci, executor, 12).result(WAIT_SECONDS) == 144


@pytest.mark.parametrize("depth", [150, 300])
def test_one_worker_runs_tasks_that_wait_within_each_other_as_deep_as_calls_go(depth):
    with Executor(1) as executor:

        def deep(left):
            return 0 if left == 0 else 1 + executor.submit(deep, left - 1).result()

        assert executor.submit(deep, depth).result() == depth


def test_tasks_too_deep_within_each_other_fail_as_calls_do(run_python):
    # By Python's own limit, long before the stack ends; without it, while there is enough of that.
    run_python("""
        import sys
        from moirai.executor import Executor

        executor = Executor(1)
        def deep(left):
            return 0 if left == 0 else 1 + executor.submit(deep, left - 1).result()

        for limit in (1000, 500, 10 ** 6):
            sys.setrecursionlimit(limit)
            try:
                executor.submit(deep, 10_000).result()
            except RecursionError:
                continue
            raise SystemExit("no RecursionError")
        assert executor.submit(deep, 10).result() == 10
    """)


def test_whoever_waits_runs_the_task_that_nobody_has_begun(gate):
    with Executor(2) as executor:
        opened = threading.Event()
        begun = threading.Event()

        def hold():
            begun.set()
            opened.wait(WAIT_SECONDS)

        executor.submit(hold)
        begun.wait(WAIT_SECONDS)
        before = executor.statistics().helped
        # Whether a worker or this thread runs it: both are asked often enough to have had a turn.
        threads = {executor.submit(threading.get_ident).result() for _ in range(2000)}
        assert threading.get_ident() in threads
        assert executor.statistics().helped > before
        opened.set()


def test_with_an_initializer_only_workers_run_tasks():
    ready = threading.local()

    def prepare(value):
        ready.value = value

    with Executor(2, initializer=prepare, initargs=(7,)) as executor:
        found = [executor.submit(lambda: ready.value).result() for _ in range(200)]
    assert found == [7] * 200


def test_no_more_tasks_run_at_once_than_there_are_workers():
    lock = threading.Lock()
    active = peak = 0

    def count():
        nonlocal active, peak
        with lock:
            active += 1
            peak = max(peak, active)
        os.sched_yield()
        with lock:
            active -= 1

    with Executor(2) as executor:

        def use():
            for _ in range(300):
                executor.submit(count).result()

        run_threads(use, use, use, use)
    assert peak <= 2


# A task is a list of those it submits and waits for.
TREES = st.recursive(
    st.just([]), lambda inner: st.lists(inner, min_size=1, max_size=4), max_leaves=40
)


@given(TREES, st.integers(1, 3), st.sampled_from([1, -1]))
@settings(max_examples=40)
def test_random_trees_of_tasks_end_as_they_would_one_by_one(tree, workers, step):
    def serial(node):
        return 1 + sum(map(serial, node))

    def parallel(node):
        futures = [executor.submit(parallel, child) for child in node]
        return 1 + sum(future.result() for future in futures[::step])

    with Executor(workers) as executor:
        assert executor.submit(parallel, tree).result() == serial(tree)
    counts = executor.statistics()
    assert counts.submitted == counts.succeeded == serial(tree)
    assert counts.queued == 0


# For each task: which earlier ones it waits for, its priority, and whether it fails.
GRAPHS = st.lists(
    st.tuples(
        st.frozensets(st.integers(0, 30), max_size=4), st.sampled_from(Priority), st.booleans()
    ),
    max_size=30,
)


@given(GRAPHS, st.integers(1, 3), st.sampled_from([None, 1, 4]))
@settings(max_examples=40)
def test_random_graphs_of_tasks_give_what_a_serial_executor_gives(graph, workers, max_pending):
    def call(index, needed, fails):
        found = index + sum(future.result() for future in needed)
        if fails:
            raise LookupError(index, found)
        return found

    def run(submit):
        futures = []
        for index, (needed, priority, fails) in enumerate(graph):
            before = [futures[it] for it in sorted(needed) if it < index]
            futures.append(submit(priority, call, index, before, fails and index % 5 == 0))
        return [repr(it.exception() or it.result()) for it in futures]

    def serially(_, function, *args):
        future = concurrent.futures.Future()
        try:
            future.set_result(function(*args))
        except LookupError as error:
            future.set_exception(error)
        return future

    with Executor(workers, max_pending=max_pending) as executor:
        found = run(lambda priority, *call: executor.submit(*call, priority=priority))
        assert found == run(serially)
    counts = executor.statistics()
    assert counts.submitted == counts.succeeded + counts.failed == len(graph)


INTERRUPTED = """
    import os, signal, threading
    from moirai.executor import Executor
    executor = Executor(2)
    opened = threading.Event()
    def hold():
        {signal}
        opened.wait(60)
    future = None
    try:
        {before}
        future = executor.submit(hold)
        future.result({timeout})
    except KeyboardInterrupt:
        print("interrupted")
    opened.set()
    print(executor.submit(pow, 2, 3).result(60))
    executor.shutdown()
    print(future is None or future.done())
"""


@pytest.mark.parametrize("timeout", ["", "60"])
def test_interrupt_ends_a_wait(run_python, timeout):
    # It may also come while the first worker is started, within `submit`.
    source = INTERRUPTED.format(
        signal="os.kill(os.getpid(), signal.SIGINT)", before="", timeout=timeout
    )
    assert run_python(source).split() == ["interrupted", "8", "True"]
    source = INTERRUPTED.format(
        signal="os.kill(os.getpid(), signal.SIGINT)",
        before="executor.submit(abs, 1).result(60)",
        timeout=timeout,
    )
    assert run_python(source).split() == ["interrupted", "8", "True"]


# === groups =====================================================================================


def test_group_ends_when_all_of_its_tasks_have_ended(executor):
    done = []

    def grow(group, depth):
        if depth:
            group.submit(grow, group, depth - 1)
            group.submit(grow, group, depth - 1)
        done.append(depth)

    with executor.group() as group:
        future = group.submit(grow, group, 4)
    assert len(done) == 2**5 - 1
    assert future.done()
    assert not group.is_cancelled
    with pytest.raises(errors.Closed, match="the block of this group has ended"):
        group.submit(abs, 1)


def test_first_failure_cancels_the_rest_and_all_are_raised():
    begun, failed = threading.Event(), threading.Event()

    def watch(group):
        begun.set()
        failed.wait(WAIT_SECONDS)
        while not group.is_cancelled:
            os.sched_yield()
        raise KeyError("told")

    def fail():
        begun.wait(WAIT_SECONDS)
        failed.set()
        raise_error()

    later = []

    def use(executor):
        with executor.group() as group:
            group.submit(watch, group)
            begun.wait(WAIT_SECONDS)
            group.submit(fail)
            # The two workers are taken, or this one finds the group cancelled.
            later.extend(group.submit(failed.wait, WAIT_SECONDS) for _ in range(3))

    with Executor(2) as executor, pytest.raises(ExceptionGroup) as caught:
        use(executor)
    assert [type(error) for error in caught.value.exceptions] == [ValueError, KeyError]
    assert all(future.done() for future in later)


@pytest.mark.parametrize(
    ("error", "raised"), [(ValueError, ExceptionGroup), (KeyboardInterrupt, KeyboardInterrupt)]
)
def test_failure_of_the_block_cancels_the_group(gate, error, raised):
    futures = []

    def use(executor):
        with executor.group() as group:
            futures.append(group.submit(abs, 1))
            raise error("asked to fail")

    with Executor(1) as executor:
        opened = gate(executor)
        with pytest.raises(raised, match=r"raised|asked to fail"):
            use(executor)
        assert futures[0].cancelled()
        opened.set()


def test_group_that_was_cancelled_runs_nothing_more(gate):
    with Executor(1) as executor:
        opened = gate(executor)
        with executor.group() as group:
            before = group.submit(abs, 1)
            group.cancel()
            after = group.submit(abs, 1)
        assert before.cancelled()
        assert after.cancelled()
        opened.set()


# === the end ====================================================================================


def test_nothing_is_queued_after_the_end(executor):
    executor.shutdown()
    with pytest.raises(errors.Closed, match="cannot schedule new futures after shutdown"):
        executor.submit(pow, 2, 2)
    with pytest.raises(RuntimeError):
        executor.submit_many(abs, [1])
    executor.shutdown()


def test_what_is_queued_is_run_or_cancelled(gate):
    for cancel in (False, True):
        executor = Executor(2)
        opened = gate(executor)
        futures = executor.submit_many(abs, range(100))
        executor.shutdown(wait=False, cancel_futures=cancel)
        assert all(future.cancelled() == cancel for future in futures)
        opened.set()
        executor.shutdown()
        assert all(future.done() for future in futures)
        opened.clear()
        counts = executor.statistics()
        assert counts.submitted == counts.succeeded + counts.cancelled


def test_workers_end_with_their_executor():
    executor = Executor(2)
    executor.submit_many(abs, range(100))
    threads = list(executor._threads)
    assert threads
    del executor
    gc.collect()
    for thread in threads:
        thread.join(WAIT_SECONDS)
        assert not thread.is_alive()


def test_queued_tasks_run_before_the_interpreter_ends(run_python):
    source = """
        import os
        from moirai.executor import Executor
        executor = Executor(2)
        for number in range(100):
            executor.submit(os.write, 1, b"%d " % number)
        {end}
    """
    for end in ("", "del executor", "executor.shutdown(wait=False)"):
        lines = run_python(source.format(end=end)).split()
        assert sorted(map(int, lines)) == list(range(100))


def test_a_thread_that_submits_while_the_interpreter_ends_is_refused(run_python):
    lines = run_python("""
        import threading
        from moirai.errors import Closed
        from moirai.executor import Executor

        executor = Executor(2)

        def submit_late():
            threading.main_thread().join()
            for late in (executor, Executor(1)):
                for limits in ({}, {"timeout_seconds": 5}):
                    try:
                        late.submit(abs, -7, **limits)
                    except Closed as error:
                        print(error)

        threading.Thread(target=submit_late).start()
    """).splitlines()
    assert lines == ["cannot schedule new futures after interpreter shutdown"] * 4


def test_task_that_shuts_its_executor_down_ends():
    executor = Executor(2)
    executor.submit(executor.shutdown).result(WAIT_SECONDS)
    executor.shutdown()


def test_forked_child_has_an_empty_executor_of_its_own(executor, gate):
    opened = gate(executor)
    done = executor.submit_many(abs, [])
    queued = executor.submit(pow, 2, 2)

    def child():
        with pytest.raises(errors.Disconnected, match="queued by the parent of this process"):
            queued.result(1)
        assert executor.statistics().queued == 0
        assert executor.submit(pow, 2, 5).result(WAIT_SECONDS) == 32
        assert list(executor.map(abs, range(10))) == list(range(10))
        executor.shutdown()

    in_forked_child(child)
    opened.set()
    assert queued.result(WAIT_SECONDS) == 4
    assert done == []


def test_forked_child_of_a_task_may_use_the_executor(executor):
    def fork():
        in_forked_child(lambda: executor.submit(pow, 2, 3).result(WAIT_SECONDS))
        return True

    assert executor.submit(fork).result(WAIT_SECONDS)


# === counts =====================================================================================


def test_counts_add_up(executor):
    futures = [executor.submit(abs, 1), executor.submit(raise_error)]
    concurrent.futures.wait(futures)
    executor.shutdown()
    counts = executor.statistics()
    assert (counts.submitted, counts.succeeded, counts.failed) == (2, 1, 1)
    assert counts.queued == counts.cancelled == 0
    assert counts.locality_ratio == 1.0
    assert len(counts.workers) == executor.max_workers
    assert 1 <= counts.workers_started <= executor.max_workers


def test_latencies_are_counted_for_each_task_that_ran(gate):
    with Executor(2, measure_latency=True) as executor:
        opened = gate(executor)
        cancelled = executor.submit(abs, 1)
        waiting = executor.submit_many(abs, range(10), priority=Priority.HIGH)
        assert sum(executor.statistics().queued_by_node[0]) == 11
        cancelled.cancel()
        opened.set()
        concurrent.futures.wait(waiting)
        assert executor.submit(raise_error).exception() is not None
    counts = executor.statistics()
    assert counts.waits.total == counts.runs.total == counts.succeeded + counts.failed == 13
    assert sum(worker.runs.total for worker in counts.workers) == 13 - counts.helped
    assert 0 < counts.runs.at_most_seconds(0.5) <= counts.runs.at_most_seconds(1.0) < math.inf
    assert counts.success_ratio == 12 / 13
    assert all(worker.queued == 0 for worker in counts.workers)


def test_latency_is_given_by_the_upper_end_of_its_place():
    histogram = LatencyHistogram((0, 0, 3, 0, 1, 0))
    assert [histogram.at_most_seconds(share) for share in (0.0, 0.75, 0.76, 1.0)] == [
        4e-9, 4e-9, 16e-9, 16e-9,
    ]  # fmt: skip
    assert (histogram + histogram).total == 8
    assert LatencyHistogram((0, 1)).at_most_seconds(1.0) == math.inf
    assert LatencyHistogram((0, 0)).at_most_seconds(0.5) == 0.0
    with pytest.raises(errors.InvalidArgument, match="share: must be from 0 to 1, got 2"):
        histogram.at_most_seconds(2)
    with Executor(1) as executor:
        assert executor.statistics().waits is None


def test_task_that_was_awaited_leaves_no_entry_behind(gate):
    with Executor(3) as executor:
        opened, begun = threading.Event(), threading.Semaphore(0)

        def hold():
            begun.release()
            opened.wait(WAIT_SECONDS)

        for _ in range(2):
            executor.submit(hold)
            assert begun.acquire(timeout=WAIT_SECONDS)
        for _ in range(20_000):
            executor.submit(abs, 1).result()
        assert executor.statistics().queued < 5_000
        opened.set()


@pytest.mark.slow
def test_queued_task_takes_little_memory(run_python):
    source = """
        import gc, sys, threading
        import psutil
        from moirai.executor import Executor
        gc.disable()
        executor = Executor(1)
        opened, begun = threading.Event(), threading.Event()
        executor.submit(lambda: (begun.set(), opened.wait(60)))
        begun.wait(60)
        count = 10**6
        executor.submit_many(abs, [1] * 1000)
        futures = [None] * count
        import contextvars
        before = psutil.Process().memory_info().rss
        for index in range(count):
            futures[index] = executor.submit(abs, 1)
        grown = (psutil.Process().memory_info().rss - before) / count
        objects = sum(map(sys.getsizeof, ((1,), contextvars.copy_context(), futures[0])))
        for future in futures:
            future.cancel()
        opened.set()
        print(grown - objects)
    """
    assert float(run_python(source)) <= 200


def test_interrupted_system_calls_do_not_disturb_workers(executor):
    # A handler makes the kernel interrupt what any thread sleeps in.
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        executor.submit(abs, 1).result(WAIT_SECONDS)
        for thread in executor._threads:
            signal.pthread_kill(thread.ident, signal.SIGUSR1)
        assert executor.submit(abs, -1).result(WAIT_SECONDS) == 1
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_fewer_tasks_run_at_once_than_there_are_workers() -> None:
    with Executor(4) as executor:
        running, most, lock = 0, 0, threading.Lock()

        def task(_: int) -> None:
            nonlocal running, most
            with lock:
                running += 1
                most = max(most, running)
            time.sleep(0.001)  # so that others come in if they may
            with lock:
                running -= 1

        list(executor.map(task, range(16), chunksize=1))
        executor.allow(2)
        most = 0
        list(executor.map(task, range(32), chunksize=1))
        assert 1 <= most <= 3  # the third: who waits for a result may run a task itself
        executor.allow(4)
        assert executor.allowed_count == 4
        gate = threading.Barrier(4)
        assert list(executor.map(lambda _: gate.wait(60) >= 0, range(4), chunksize=1)) == [True] * 4


def test_tasks_that_wait_for_tasks_end_when_one_may_run() -> None:
    with Executor(4) as executor:
        executor.allow(1)

        def nested(depth: int) -> int:
            if depth == 0:
                return 1
            return sum(child.result() for child in executor.submit_many(nested, [depth - 1] * 3))

        assert executor.submit(nested, 4).result(60) == 81


@pytest.mark.parametrize("count", [0, 5, -1])
def test_at_least_one_task_may_run_and_at_most_one_a_worker(count: int) -> None:
    with (
        Executor(4) as executor,
        pytest.raises(
            errors.InvalidArgument, match=f"task_count: must be from 1 to 4, got {count}"
        ),
    ):
        executor.allow(count)
