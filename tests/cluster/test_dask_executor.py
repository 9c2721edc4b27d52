"""An executor over a real Dask cluster of processes on this machine."""

import concurrent.futures
import os
import signal
import threading
import time

import pytest
from held import WAIT_SECONDS, executor_of_one_worker, hold
from running import in_forked_child

from moirai import errors
from moirai.executor import Priority

distributed = pytest.importorskip("distributed", reason="distributed is not installed")

from moirai.integrations.dask import DistributedExecutor, make_executor  # noqa: E402


def same(item, *, and_then=None):
    return and_then or item


def count_tasks(dask_scheduler):
    return len(dask_scheduler.tasks)


def raise_error(text):
    raise ValueError(text)


def test_calls_run_in_the_cluster(executor, client):
    future = executor.submit(pow, 2, exp=5)
    assert isinstance(future, concurrent.futures.Future)
    assert future.result(WAIT_SECONDS) == 32
    assert executor.submit(os.getpid).result(WAIT_SECONDS) != os.getpid()
    assert executor.submit(lambda x: x + 1, 2).result(WAIT_SECONDS) == 3
    assert executor.submit(same, 1, and_then=2).result(WAIT_SECONDS) == 2
    # A call with the same arguments is a call of its own.
    numbers = [executor.submit(os.urandom, 8) for _ in range(2)]
    assert numbers[0].result(WAIT_SECONDS) != numbers[1].result(WAIT_SECONDS)
    assert executor.max_workers == 2


def test_future_of_the_client_is_an_argument(executor, client):
    first = client.submit(pow, 2, 5)
    assert executor.submit(same, first).result(WAIT_SECONDS) == 32


def test_failure_is_raised_with_the_traceback_of_the_worker(executor):
    with pytest.raises(ValueError, match="asked to fail") as caught:
        executor.submit(raise_error, "asked to fail").result(WAIT_SECONDS)
    names = []
    frame = caught.value.__traceback__
    while frame is not None:
        names.append(frame.tb_frame.f_code.co_name)
        frame = frame.tb_next
    assert "raise_error" in names


def test_submit_many_and_maps_give_what_the_functions_give(executor):
    futures = executor.submit_many(divmod, [7, 8, 9], [2, 3, 4])
    assert [future.result(WAIT_SECONDS) for future in futures] == [(3, 1), (2, 2), (2, 1)]
    assert executor.submit_many(abs, []) == []
    items = list(range(300))
    assert list(executor.map(same, items)) == items
    assert sorted(executor.map_unordered(same, items, chunksize=7)) == items
    assert list(executor.map(pow, [2, 3], [3, 2])) == [8, 9]
    results = executor.map(raise_error, ["one", "two"], chunksize=2)
    with pytest.raises(ValueError, match="one") as caught:
        next(results)
    assert "raise_error" in caught.value.__notes__[0]


def test_group_of_calls_is_sent_at_once(executor, client):
    first = client.submit(pow, 2, 5)
    futures = executor.submit_group([(same, first), (pow, 2, 3), (max, [4, 5])])
    assert [future.result(WAIT_SECONDS) for future in futures] == [32, 8, 5]
    assert executor.submit_group([]) == []
    before = executor.statistics().submitted
    for calls in ([abs], [()], [(3, 4)], [(abs, 1), "x"]):
        with pytest.raises(errors.InvalidArgument, match="calls: must be tuples of a function"):
            executor.submit_group(calls)
    assert executor.statistics().submitted == before


def test_workers_need_not_have_moirai(run_python):
    """What is sent around a user's function says how it is made, not where it comes from."""
    import cloudpickle

    from moirai.integrations import dask

    sent = cloudpickle.dumps((dask._keyword_caller(), dask._chunk_runner(divmod, True)))
    told = run_python(f"""
        import pickle, sys
        sys.modules["moirai"] = None
        call, run = pickle.loads({sent!r})
        print(call(int, ["z"], {{"base": 36}}), run([(7, 2), (8, 0)]))
    """)
    assert told.startswith("35 ([(3, 1)], ZeroDivisionError(")


def test_priorities_reach_the_scheduler(executor, client, gate):
    held = [executor.submit(hold, str(gate)) for _ in range(2)]
    before = [executor.submit(time.monotonic, priority=Priority.BACKGROUND) for _ in range(8)]
    urgent = executor.submit(time.monotonic, priority=Priority.REALTIME)
    deadline = time.monotonic() + WAIT_SECONDS
    while client.run_on_scheduler(count_tasks) < 11:
        assert time.monotonic() < deadline
    gate.touch()
    times = [future.result(WAIT_SECONDS) for future in [urgent, *before]]
    # Some were sent to workers before it came; those that were not go after it.
    assert times[0] < max(times[1:])
    assert [future.result(WAIT_SECONDS) for future in held] == ["held"] * 2
    with pytest.raises(errors.InvalidArgument, match="priority: must be a Priority or None"):
        executor.submit(abs, -1, priority=7)


def test_group_raises_all_failures_and_cancels_the_rest(executor, gate):
    rest = []

    def fail():
        with executor.group() as group:
            group.submit(raise_error, "first")
            rest.extend(group.submit(hold, str(gate)) for _ in range(10))

    with pytest.raises(ExceptionGroup) as caught:
        fail()
    assert [str(error) for error in caught.value.exceptions] == ["first"]
    assert all(future.cancelled() for future in rest)


def test_cancelled_call_is_not_waited_for(client, gate):
    with DistributedExecutor(client) as executor:
        held = executor.submit(hold, str(gate))
        assert held.cancel()
        with pytest.raises(concurrent.futures.CancelledError):
            held.result(WAIT_SECONDS)
    counts = executor.statistics()
    assert (counts.submitted, counts.cancelled, counts.succeeded) == (1, 1, 0)


def test_shutdown_waits_for_calls_and_leaves_the_client(client):
    executor = DistributedExecutor(client)
    futures = executor.submit_many(same, range(20))
    executor.shutdown()
    assert all(future.done() for future in futures)
    with pytest.raises(errors.Closed, match="cannot schedule new futures after shutdown"):
        executor.submit(abs, -1)
    counts = executor.statistics()
    assert counts.submitted == counts.succeeded == 20
    assert client.submit(abs, -1).result() == 1
    assert not [it for it in threading.enumerate() if it.name == "moirai-dask-results"]


def test_progress_counts_calls_until_all_are_over(executor):
    results = executor.map(abs, range(100), chunksize=10)
    seen = list(executor.progress(interval_seconds=0))
    assert (seen[-1].completed, seen[-1].total) == (100, 100)
    assert list(results) == list(range(100))


def kill_self():
    os.kill(os.getpid(), signal.SIGKILL)


def test_call_that_kills_its_workers_fails_and_says_so(client):
    import dask

    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 0}),
        executor_of_one_worker() as (_, executor),
    ):
        with pytest.raises(errors.WorkerFailed, match="workers that had this call died"):
            executor.submit(kill_self).result(WAIT_SECONDS)
        assert executor.submit(abs, -1).result(WAIT_SECONDS) == 1


def test_forked_child_is_refused(executor, gate):
    held = executor.submit(hold, str(gate))

    def use():
        with pytest.raises(errors.Disconnected, match="queued in the parent process"):
            held.result(WAIT_SECONDS)
        with pytest.raises(errors.Disconnected, match="client: belongs to the parent process"):
            executor.submit(abs, -1)

    in_forked_child(use)
    gate.touch()
    assert held.result(WAIT_SECONDS) == "held"


def test_what_is_no_client_is_refused(client):
    with pytest.raises(errors.InvalidArgument, match="client: must be a synchronous"):
        DistributedExecutor("tcp://nowhere")
    with pytest.raises(errors.Unsupported, match="initializer"):
        make_executor(initializer=print)


def test_current_client_is_found(client):
    with make_executor() as executor:
        assert executor.submit(abs, -1).result(WAIT_SECONDS) == 1
