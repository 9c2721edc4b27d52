"""How results of a real Dask cluster come to futures: who asks, who is called, what if it ends."""

import asyncio
import concurrent.futures
import contextlib
import gc
import os
import queue
import signal
import threading
import time
import weakref

import pytest
from held import WAIT_SECONDS, executor_of_one_worker, hold

from moirai import errors

distributed = pytest.importorskip("distributed", reason="distributed is not installed")

from moirai.integrations import dask_results  # noqa: E402
from moirai.integrations.dask import DistributedExecutor  # noqa: E402


@pytest.fixture
def unasked(monkeypatch):
    """Results that nobody asks for are not fetched."""
    monkeypatch.setattr(dask_results, "_LINGER_SECONDS", 1e6)


def raise_error(text):
    raise ValueError(text)


class Ending(BaseException):
    """What is no Exception."""


def cancel_within():
    raise asyncio.CancelledError


def end():
    raise Ending


class Unreadable:
    """What can be sent, and not be received."""

    def __reduce__(self):
        return raise_error, ("not to be read",)


def until(condition):
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline


def result_in_asyncio(future):
    async def wait():
        return await asyncio.wrap_future(future)

    return asyncio.run(wait())


def result_by_callback(future):
    ended = queue.SimpleQueue()
    future.add_done_callback(ended.put)
    return ended.get(timeout=WAIT_SECONDS).result(0)


def result_by_polling(future):
    until(future.done)
    return future.result(0)


def result_of_wait(future):
    done, _ = concurrent.futures.wait([future], WAIT_SECONDS)
    return done.pop().result(0)


def result_as_completed(future):
    return next(concurrent.futures.as_completed([future], WAIT_SECONDS)).result(0)


def result_without_failure(future):
    assert future.exception(WAIT_SECONDS) is None
    return future.result(0)


WAYS = [
    result_in_asyncio,
    result_by_callback,
    result_by_polling,
    result_of_wait,
    result_as_completed,
    result_without_failure,
    lambda future: future.result(WAIT_SECONDS),
]


@pytest.mark.usefixtures("unasked")
@pytest.mark.parametrize("has_ended", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_whoever_asks_gets_the_result(executor, way, has_ended):
    future = executor.submit(abs, -3)
    if has_ended:
        until(lambda: future.has_arrived)
        assert not concurrent.futures.Future.done(future)
    assert way(future) == 3


def test_result_comes_without_being_asked_for(executor):
    future = executor.submit(abs, -3)
    assert [it.completed for it in executor.progress()][-1] == 1
    until(lambda: concurrent.futures.Future.done(future))


def count_of_gathers(dask_scheduler):
    return sum(
        isinstance(event, dict) and event.get("action") == "gather"
        for _, event in dask_scheduler.get_events("all")
    )


def test_many_results_come_in_one_message(executor, client):
    before = client.run_on_scheduler(count_of_gathers)
    futures = [executor.submit(abs, -item) for item in range(100)]
    assert [future.result(WAIT_SECONDS) for future in futures] == list(range(100))
    assert 0 < client.run_on_scheduler(count_of_gathers) - before < 50


def count_of_tasks(dask_scheduler):
    return len(dask_scheduler.tasks)


@pytest.mark.usefixtures("unasked")
def test_shutdown_has_the_cluster_forget_results(client):
    with DistributedExecutor(client) as executor:
        assert executor.submit(abs, -3).result(WAIT_SECONDS) == 3
        assert client.run_on_scheduler(count_of_tasks) > 0
        last = executor.submit(abs, -4)
    assert last.result(0) == 4
    until(lambda: client.run_on_scheduler(count_of_tasks) == 0)


def test_callbacks_may_wait_for_other_calls(executor):
    """So they do not run where results come in."""
    found = queue.SimpleQueue()

    def call_again(future):
        found.put(executor.submit(abs, -future.result() - 1).result(WAIT_SECONDS))
        found.put(threading.current_thread().name)

    executor.submit(abs, -3).add_done_callback(call_again)
    assert found.get(timeout=WAIT_SECONDS) == 4
    assert found.get() == "moirai-dask-results"


def test_shutdown_waits_until_callbacks_have_ended(client):
    order = []
    executor = DistributedExecutor(client)

    def end(future):
        executor.shutdown()  # what has called back does not wait for itself
        order.append(future.result())

    executor.submit(abs, -3).add_done_callback(end)
    executor.shutdown()
    assert order == [3]
    assert not [it for it in threading.enumerate() if it.name == "moirai-dask-results"]


def test_callback_of_a_cancelled_call_may_shut_down(executor, gate):
    futures = [executor.submit(hold, str(gate)) for _ in range(3)]
    called = []
    futures[0].add_done_callback(lambda _: executor.shutdown(cancel_futures=True))
    futures[2].add_done_callback(called.append)
    assert futures[0].cancel()
    assert called == [futures[2]]
    assert all(future.cancelled() for future in futures)
    assert executor.statistics().cancelled == 3


def test_results_come_after_a_shutdown_that_does_not_wait(client, gate):
    executor = DistributedExecutor(client)
    future = executor.submit(hold, str(gate))
    executor.shutdown(wait=False)
    ended = queue.SimpleQueue()
    future.add_done_callback(ended.put)
    gate.touch()
    assert ended.get(timeout=WAIT_SECONDS).result(0) == "held"
    assert executor.statistics().succeeded == 1


@pytest.mark.parametrize("has_own_loop", [False, True])
def test_client_that_is_closed_fails_what_it_sent(client, gate, has_own_loop):
    place = client.scheduler.address if has_own_loop else client.cluster
    own = distributed.Client(place, set_as_default=False)
    executor = DistributedExecutor(own)
    futures = [executor.submit(hold, str(gate)) for _ in range(2)]
    own.close()
    for future in futures:
        with pytest.raises(errors.Disconnected, match=r"dropped this call|client was closed"):
            future.result(WAIT_SECONDS)
    with pytest.raises(Exception, match=r"[Cc]lose"):
        executor.submit(abs, -1)
    executor.shutdown()
    assert executor.statistics().failed == 2


@pytest.mark.usefixtures("unasked")
def test_result_that_cannot_be_read_fails_alone(executor):
    futures = [executor.submit(Unreadable), executor.submit(abs, -3)]
    until(lambda: all(future.has_arrived for future in futures))
    assert futures[1].result(WAIT_SECONDS) == 3
    with pytest.raises(Exception, match="not to be read"):
        futures[0].result(WAIT_SECONDS)


@pytest.mark.parametrize(("function", "error"), [(end, Ending), (cancel_within, BaseException)])
def test_failure_may_be_no_exception(executor, function, error):
    with pytest.raises(error):
        executor.submit(function).result(WAIT_SECONDS)
    assert executor.submit(abs, -3).result(WAIT_SECONDS) == 3


@pytest.mark.usefixtures("unasked")
def test_result_whose_worker_died_is_made_again():
    with executor_of_one_worker() as (own, executor):
        future = executor.submit(os.getpid)
        until(lambda: future.has_arrived)
        (process_id,) = own.run(os.getpid).values()
        os.kill(process_id, signal.SIGKILL)
        assert future.result(WAIT_SECONDS) != process_id


def test_wait_for_a_result_can_be_interrupted(executor, gate):
    future = executor.submit(hold, str(gate))

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            future.result()
    finally:
        signal.signal(signal.SIGALRM, before)
    gate.touch()
    assert future.result(WAIT_SECONDS) == "held"


@pytest.mark.parametrize("function", [abs, raise_error])
def test_nothing_keeps_a_future_that_was_dropped(executor, function):
    future = executor.submit(function, -3)
    with contextlib.suppress(concurrent.futures.TimeoutError):
        future.exception(WAIT_SECONDS)
    left = weakref.ref(future)
    gc.disable()
    try:
        del future
        until(lambda: left() is None)
    finally:
        gc.enable()
