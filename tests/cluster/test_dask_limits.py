"""How long calls in a Dask cluster may take: when time starts, who is told, what is dropped."""

import asyncio
import concurrent.futures
import gc
import os
import queue
import signal
import time
import weakref

import pytest
from held import WAIT_SECONDS, executor_of_one_worker, hold
from running import in_forked_child, wait_until

from moirai import errors
from moirai.executor.time_limits import TimeLimits, time_limits

distributed = pytest.importorskip("distributed", reason="distributed is not installed")

from moirai.integrations import dask_limits  # noqa: E402
from moirai.integrations.dask import DistributedExecutor  # noqa: E402

BEGUN = "in the time it was given; its call goes on"
NOT_BEGUN = "before the task began; the task is not run"


def is_known(key, dask_scheduler):
    return key in dask_scheduler.tasks


def is_known_there(key, dask_worker):
    return key in dask_worker.state.tasks


def touch_and_hold(begun, path):
    begun.touch()
    return hold(path)


def raise_error(text):
    raise ValueError(text)


@pytest.fixture
def unannounced(monkeypatch):
    """What workers say is not heard."""
    monkeypatch.setattr(dask_limits.Watch, "begin", lambda *_: None)


def test_time_limits_reach_every_kind_of_submit(executor):
    futures = [
        executor.submit(pow, 2, 3, timeout_seconds=WAIT_SECONDS),
        executor.submit(int, "z", base=36, deadline=time.monotonic() + WAIT_SECONDS),
        executor.submit(dict, timeout_seconds=WAIT_SECONDS),
        *executor.submit_many(pow, [2, 3], [3, 2], deadline=time.monotonic() + WAIT_SECONDS),
        *executor.submit_group([(abs, -8), (dict,)], timeout_seconds=WAIT_SECONDS),
    ]
    assert [future.result(WAIT_SECONDS) for future in futures] == [8, 35, {}, 8, 9, 8, {}]
    failing = executor.submit(raise_error, "asked to fail", timeout_seconds=WAIT_SECONDS)
    with pytest.raises(ValueError, match="asked to fail"):
        failing.result(WAIT_SECONDS)
    counts = executor.statistics()
    assert (counts.submitted, counts.succeeded, counts.failed, counts.timed_out) == (8, 7, 1, 0)


def test_future_of_the_client_is_an_argument_of_a_call_with_a_limit(executor, client):
    first = client.submit(pow, 2, 5)
    assert executor.submit(abs, first, timeout_seconds=WAIT_SECONDS).result(WAIT_SECONDS) == 32


@pytest.mark.parametrize("limits", [{"timeout_seconds": -1}, {"deadline": float("nan")}])
def test_limits_out_of_range_send_nothing(executor, limits):
    for submit in (executor.submit, executor.submit_many):
        with pytest.raises(errors.InvalidArgument, match=next(iter(limits))):
            submit(dict, [], **limits)
    with pytest.raises(errors.InvalidArgument, match=next(iter(limits))):
        executor.submit_group([(dict,)], **limits)
    assert executor.statistics().submitted == 0


def test_call_that_takes_too_long_fails_and_the_cluster_drops_it(executor, client, gate):
    future = executor.submit(hold, str(gate), timeout_seconds=0.5)
    key = future.remote.key
    told = queue.SimpleQueue()
    future.add_done_callback(told.put)
    done, _ = concurrent.futures.wait([future], WAIT_SECONDS)
    assert done == {future}
    with pytest.raises(errors.Timeout, match=BEGUN):
        future.result(0)
    assert told.get(timeout=WAIT_SECONDS) is future
    wait_until(lambda: not client.run_on_scheduler(is_known, key))
    counts = executor.statistics()
    assert (counts.submitted, counts.failed, counts.timed_out) == (1, 1, 1)


def test_time_in_the_queue_counts_for_the_deadline_alone(executor, client, gate, tmp_path):
    workers_begun = [tmp_path / "first", tmp_path / "second"]
    held = executor.submit_many(touch_and_hold, workers_begun, [str(gate)] * 2)
    wait_until(lambda: all(path.exists() for path in workers_begun))
    begun = tmp_path / "begun"
    patient = executor.submit(abs, -2, timeout_seconds=1)
    late = executor.submit(touch_and_hold, begun, str(gate), deadline=time.monotonic() + 1.5)
    key = late.remote.key
    with pytest.raises(errors.Timeout, match=NOT_BEGUN):
        late.result(WAIT_SECONDS)
    wait_until(lambda: not client.run_on_scheduler(is_known, key))
    wait_until(lambda: not any(client.run(is_known_there, key).values()))
    gate.touch()
    assert patient.result(WAIT_SECONDS) == 2
    assert [future.result(WAIT_SECONDS) for future in held] == ["held"] * 2
    assert not begun.exists()
    assert executor.statistics().timed_out == 1


def test_deadline_that_has_passed_sends_nothing(executor, client):
    passed = time.monotonic() - 1
    futures = [
        executor.submit(abs, -1, deadline=passed),
        *executor.submit_many(abs, [-1, -2], deadline=passed),
        *executor.submit_group([(abs, -1)], deadline=passed, timeout_seconds=WAIT_SECONDS),
    ]
    assert all(not hasattr(future.remote, "key") for future in futures)
    for future in futures:
        with pytest.raises(errors.Timeout, match=NOT_BEGUN):
            future.result(0)
    counts = executor.statistics()
    assert (counts.submitted, counts.failed, counts.timed_out) == (4, 4, 4)
    assert next(iter(executor.progress())).is_complete


@pytest.mark.usefixtures("unannounced")
def test_call_that_ended_late_has_failed_though_nobody_heard_it_begin(executor):
    for function, argument in ((abs, -1), (raise_error, "late")):
        with pytest.raises(errors.Timeout, match="in the time it was given; its call has ended"):
            executor.submit(function, argument, timeout_seconds=0).result(WAIT_SECONDS)
    assert executor.statistics().timed_out == 2


@pytest.mark.usefixtures("unannounced")
def test_deadline_is_kept_though_nobody_heard_the_call_begin(executor, gate):
    future = executor.submit(hold, str(gate), deadline=time.monotonic() + 0.01)
    assert isinstance(future.exception(WAIT_SECONDS), errors.Timeout)


def test_what_is_sent_needs_no_moirai(run_python):
    """Nor a worker that can say when it begins."""
    import cloudpickle

    sent = cloudpickle.dumps(
        [dask_limits.announcing(divmod, "topic", seconds) for seconds in (WAIT_SECONDS, 0)]
    )
    told = run_python(f"""
        import pickle, sys
        sys.modules["moirai"] = None
        in_time, late = pickle.loads({sent!r})
        print(in_time(1, 7, 2))
        try:
            late(1, 7, 2)
        except TimeoutError as error:
            print(repr(error))
    """)
    assert told.splitlines() == ["(3, 1)", repr(TimeoutError(dask_limits._LATE))]


def test_only_what_workers_say_is_taken_for_late():
    assert dask_limits.has_told_late(TimeoutError(dask_limits._LATE))
    for error in (None, TimeoutError(), TimeoutError("other"), ValueError(dask_limits._LATE)):
        assert not dask_limits.has_told_late(error)


def die_once(begun, path):
    """The process dies when it is told to; another one returns."""
    if begun.exists():
        return "again"
    begun.touch()
    hold(path)
    os.kill(os.getpid(), signal.SIGKILL)
    return None


def test_time_starts_anew_when_a_worker_dies(gate, tmp_path):
    begun = tmp_path / "begun"
    with executor_of_one_worker() as (_, executor):
        future = executor.submit(die_once, begun, str(gate), timeout_seconds=1)
        wait_until(lambda: future.watch.worker is not None)
        gate.touch()
        # Its time is over before the next worker is there.
        assert future.result(WAIT_SECONDS) == "again"
        assert executor.statistics().timed_out == 0


class Scheduler:
    """What answers a client that asks where calls are."""

    def __init__(self, answer):
        self.answer = answer
        self.asked = []

    async def processing(self, workers):
        self.asked.append(workers)
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer


@pytest.mark.parametrize(
    ("answer", "is_over"),
    [
        ({"tcp://a:1": ["other", "key"]}, True),
        (OSError("gone"), True),
        ({"tcp://a:1": ["other"]}, False),
        (KeyError("tcp://a:1"), False),
    ],
)
def test_time_is_over_where_the_call_still_runs(answer, is_over):
    scheduler = Scheduler(answer)

    async def ask():
        watch = dask_limits.Watch(time_limits(0, None))
        watch.begin("tcp://a:1")
        return await watch.verdict(scheduler, "key"), watch.worker

    error, worker = asyncio.run(ask())
    assert isinstance(error, errors.Timeout) is is_over
    assert worker == ("tcp://a:1" if is_over else None)
    assert scheduler.asked == [["tcp://a:1"]]


def test_deadline_of_a_call_that_runs_asks_nobody():
    async def ask():
        watch = dask_limits.Watch(time_limits(WAIT_SECONDS, time.monotonic()))
        watch.begin("tcp://a:1")
        return await watch.verdict(None, "key")

    assert BEGUN in str(asyncio.run(ask()))


def test_silent_scheduler_does_not_hold_up_the_end(monkeypatch):
    monkeypatch.setattr(dask_limits, "_ANSWER_SECONDS", 0.01)

    class Silent:
        async def processing(self, workers):
            await asyncio.Event().wait()

    async def ask():
        watch = dask_limits.Watch(time_limits(0, None))
        watch.begin("tcp://a:1")
        return await asyncio.wait_for(watch.verdict(Silent(), "key"), WAIT_SECONDS)

    assert BEGUN in str(asyncio.run(ask()))


def test_worker_may_begin_before_the_call_is_followed():
    async def follow():
        watch = dask_limits.Watch(time_limits(0.01, None))
        dask_limits._has_begun((0.0, (watch.number, "tcp://a:1")))
        is_over = asyncio.Event()
        watch.start(is_over.set)
        await asyncio.wait_for(is_over.wait(), WAIT_SECONDS)
        return watch.worker

    assert asyncio.run(follow()) == "tcp://a:1"


def test_ended_call_leaves_no_timer_that_tells():
    async def end():
        loop = asyncio.get_running_loop()
        watch = dask_limits.Watch(TimeLimits(1000, time.monotonic() + 1000))
        watch.start(lambda: pytest.fail("it has ended"))
        watch.begin("tcp://a:1")
        watch.stop()
        return [timer for timer in loop._scheduled if not timer.cancelled()]

    assert asyncio.run(end()) == []


def test_waiting_and_shutdown_end_when_the_time_is_over(client, gate):
    told = queue.SimpleQueue()
    with DistributedExecutor(client) as executor:
        for future in executor.submit_many(hold, [str(gate)] * 4, timeout_seconds=WAIT_SECONDS):
            future.add_done_callback(told.put)
            assert future.cancel()
        future = executor.submit(hold, str(gate), deadline=time.monotonic() + 0.01)
    assert isinstance(future.exception(0), errors.Timeout)
    counts = executor.statistics()
    assert (counts.submitted, counts.cancelled, counts.timed_out) == (5, 4, 1)
    assert told.qsize() == 4


def test_group_does_not_wait_for_what_takes_too_long(executor, gate):
    def run():
        with executor.group() as group:
            group.submit(hold, str(gate), timeout_seconds=0.01)

    with pytest.raises(ExceptionGroup) as raised:
        run()
    assert [type(error) for error in raised.value.exceptions] == [errors.Timeout]


@pytest.mark.parametrize("has_own_loop", [False, True])
def test_client_that_is_closed_fails_calls_with_limits(client, gate, has_own_loop):
    place = client.scheduler.address if has_own_loop else client.cluster
    own = distributed.Client(place, set_as_default=False)
    executor = DistributedExecutor(own)
    limits = {"timeout_seconds": WAIT_SECONDS, "deadline": time.monotonic() + 2 * WAIT_SECONDS}
    futures = [executor.submit(hold, str(gate), **limits) for _ in range(2)]
    own.close()
    for future in futures:
        with pytest.raises(errors.Disconnected, match=r"dropped this call|client was closed"):
            future.result(WAIT_SECONDS)
    with pytest.raises(Exception, match=r"[Cc]lose"):
        executor.submit(abs, -1, **limits)
    executor.shutdown()
    counts = executor.statistics()
    assert (counts.failed, counts.timed_out) == (2, 0)


def test_client_that_lost_its_connection_is_told_again(client, gate):
    with (
        distributed.Client(client.scheduler.address, set_as_default=False) as own,
        DistributedExecutor(own) as executor,
    ):
        lost = executor.submit(hold, str(gate), timeout_seconds=WAIT_SECONDS)
        before = own.scheduler_comm
        own.loop.add_callback(before.comm.abort)
        with pytest.raises(errors.Disconnected):
            lost.result(WAIT_SECONDS)
        wait_until(lambda: own.scheduler_comm not in (None, before) and own.status == "running")
        with pytest.raises(errors.Timeout, match=BEGUN):
            executor.submit(hold, str(gate), timeout_seconds=0.01).result(WAIT_SECONDS)


def test_forked_child_is_refused_with_limits(executor, gate):
    held = executor.submit(hold, str(gate), timeout_seconds=WAIT_SECONDS)

    def use():
        with pytest.raises(errors.Disconnected, match="queued in the parent process"):
            held.result(WAIT_SECONDS)
        with pytest.raises(errors.Disconnected, match="client: belongs to the parent process"):
            executor.submit(abs, -1, timeout_seconds=1)

    in_forked_child(use)
    gate.touch()
    assert held.result(WAIT_SECONDS) == "held"


def test_closed_executor_takes_no_calls_with_limits(client):
    executor = DistributedExecutor(client)
    executor.shutdown()
    for deadline in (0, time.monotonic() + WAIT_SECONDS):
        with pytest.raises(errors.Closed, match="cannot schedule new futures after shutdown"):
            executor.submit(abs, -1, deadline=deadline)


def test_nothing_keeps_a_future_with_limits_that_was_dropped(executor, gate):
    limits = {"timeout_seconds": WAIT_SECONDS, "deadline": time.monotonic() + WAIT_SECONDS}
    futures = [executor.submit(abs, -1, **limits), executor.submit(abs, -1, timeout_seconds=0)]
    for future in futures:
        future.exception(WAIT_SECONDS)
    left = [weakref.ref(future) for future in futures]
    gc.disable()
    try:
        del futures, future
        wait_until(lambda: [each() for each in left] == [None, None])
        wait_until(lambda: not dask_limits._watches)
    finally:
        gc.enable()


def test_executors_of_a_client_share_a_topic(client):
    def topics(dask_scheduler):
        return [name for name in dask_scheduler._broker._topics if name.startswith("moirai-")]

    for _ in range(3):
        with DistributedExecutor(client) as executor:
            assert executor.submit(abs, -1).result(WAIT_SECONDS) == 1
            assert executor.submit(abs, -1, timeout_seconds=60).result(WAIT_SECONDS) == 1
    assert client.run_on_scheduler(topics).count(f"moirai-begun-{client.id}") == 1
