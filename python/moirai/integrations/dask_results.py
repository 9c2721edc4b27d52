"""How results come from a Dask cluster to the futures of `DistributedExecutor`."""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import os
import queue
import threading
import weakref
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

import distributed

from moirai.errors import Closed, Disconnected, WorkerFailed
from moirai.executor.progress import Counter
from moirai.executor.remote import RemoteFuture
from moirai.executor.time_limits import late, not_begun
from moirai.integrations.dask_limits import Watch, has_told_late

__all__ = ["ClusterFuture", "Results"]

_Result = TypeVar("_Result")

# How long a result may stay in the cluster when nobody waits for it, and when it has been fetched.
# A client sends a message each 10 ms at most: what is released at once holds up the next call.
_LINGER_SECONDS = 0.1
# While most calls are still out: at most a quarter of the time goes into asking for results.
_RESTS_PER_FETCH = 3
_COUNTS = ("submitted", "succeeded", "failed", "cancelled", "timed_out")
# In place of the remote future of a call that is not sent.
_NOTHING = object()
_alive: weakref.WeakSet[Results] = weakref.WeakSet()


class ClusterFuture(RemoteFuture[_Result]):
    """A `concurrent.futures.Future` of a call in the cluster; any thread may use it.

    Its result is fetched when somebody asks for it, or a little later, with others.
    """

    # Of a call with a time limit; guarded as what follows is.
    watch: Watch | None = None

    def __init__(self, results: Results, remote: Any, call_count: int, is_wanted: bool) -> None:
        super().__init__()
        # What follows is guarded by the lock of the results, which are None once it has an end.
        self.results: Results | None = results
        self.remote = remote
        self.call_count = call_count
        self.is_wanted = is_wanted
        self.has_arrived = False
        # Where callbacks are called instead of in the event loop's thread.
        self.calls: Callable[[Callable[[], None]], None] | None = None
        self._waiters = _Waiters(self)

    def result(self, timeout: float | None = None) -> _Result:
        """As of any future; fetches it."""
        self.want()
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """As of any future; fetches it."""
        self.want()
        return super().exception(timeout)

    def done(self) -> bool:
        """Whether it has an end that is here; fetches it."""
        self.want()
        return super().done()

    def add_done_callback(self, fn: Callable[[concurrent.futures.Future[_Result]], object]) -> None:
        """As of any future; fetches it."""
        super().add_done_callback(fn)
        self.want()

    def want(self) -> None:
        """Somebody waits for it."""
        results = self.results
        if not self.is_wanted and results is not None:
            results.want(self)

    def disconnect(self) -> None:
        """In a forked child: nobody here will end it. No callback is called."""
        self.results = None
        super().disconnect()

    def _invoke_callbacks(self) -> None:
        results = self.results
        if results is not None:
            results.cancel(self)  # nobody else calls back before they have taken it
        invoke = super()._invoke_callbacks  # type: ignore[misc]
        if self.calls is None or not self._done_callbacks:
            invoke()
        else:
            self.calls(invoke)


class _Waiters(list[Any]):
    """Where `concurrent.futures.wait` and `as_completed` put themselves."""

    def __init__(self, future: ClusterFuture[Any]) -> None:
        super().__init__()
        self._future = weakref.ref(future)

    def append(self, waiter: Any) -> None:
        super().append(waiter)
        future = self._future()
        if future is not None:
            future.want()


class Results:
    """Fetches what ended in the cluster, in the event loop of a client, and ends its futures.

    One message asks for all that has ended, and no second one before its answer: to ask for the
    result of each call on its own takes the cluster about as long as the calls themselves.
    """

    def __init__(self, client: Any, counter: Counter) -> None:
        self._client = client
        self._counter = counter
        self._counts = dict.fromkeys(_COUNTS, 0)
        # Those without an end. Dropping an object may call back in the thread that drops it, so
        # the lock is reentrant; no future's own lock is taken with it.
        self._futures: dict[ClusterFuture[Any], None] = {}
        self._lock = threading.RLock()
        self._is_closed = self._is_asked = False
        self._cancelled: list[Any] = []
        self._callbacks = _CallbackThread()
        # Of the event loop's thread alone.
        self._arrived: list[ClusterFuture[Any]] = []
        self._fetched: list[Any] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._is_due = asyncio.Event()
        self._is_fetching = self._is_urgent = False
        self._rests_until = 0.0
        self._out_count = 0  # sent, and not arrived
        _alive.add(self)

    def check_open(self) -> None:
        """Whether more may be sent.

        Raises:
            Closed: After `shutdown`.
        """
        if self._is_closed:
            raise Closed("cannot schedule new futures after shutdown")

    def follow(
        self,
        remotes: Sequence[Any],
        call_counts: Sequence[int],
        is_wanted: bool = False,
        watches: Sequence[Watch] = (),
    ) -> list[RemoteFuture[Any]]:
        """Futures of what was sent to the cluster, so many calls in each.

        Args:
            remotes: The client's own futures.
            call_counts: How many calls each is for.
            is_wanted: Whether to fetch the results without being asked for each.
            watches: Who keeps the time of each; empty: they may take as long as they like.

        Raises:
            Closed: After `shutdown`; the cluster drops the calls.
        """
        futures = [
            ClusterFuture[Any](self, remote, call_count, is_wanted)
            for remote, call_count in zip(remotes, call_counts, strict=True)
        ]
        if watches:
            for future, watch in zip(futures, watches, strict=True):
                future.watch = watch
        self._add(futures)
        self._client.loop.add_callback(self._follow_all, futures)
        if self._client.status == "closed":  # meanwhile: nobody may be there to follow
            for future in futures:
                self._end(future, None, _closed())
        return list[RemoteFuture[Any]](futures)

    def refuse(self, count: int) -> list[RemoteFuture[Any]]:
        """Futures of calls that are not sent, as their deadline has passed.

        Raises:
            Closed: After `shutdown`.
        """
        futures = [ClusterFuture[Any](self, _NOTHING, 1, False) for _ in range(count)]
        self._add(futures)
        for future in futures:
            self._end(future, None, not_begun(), is_late=True)
        return list[RemoteFuture[Any]](futures)

    def counts(self) -> dict[str, int]:
        """How many were submitted, and how they ended."""
        with self._lock:
            return dict(self._counts)

    def want(self, future: ClusterFuture[Any]) -> None:
        """Fetch a result as soon as it is there."""
        with self._lock:
            future.is_wanted = True
            if not future.has_arrived or self._is_asked:
                return
            self._is_asked = True
        self._client.loop.add_callback(self._fetch_wanted)

    def cancel(self, future: ClusterFuture[Any]) -> None:
        """Tell waiters and the cluster of a future that is cancelled."""
        remote = self._take(future)
        if remote is None:
            return
        self._settle(future, None, None)
        self._drop(remote)

    def shutdown(self, wait: bool, cancel_futures: bool) -> None:
        """Take no more; wait until all futures have ended and called back."""
        with self._lock:
            self._is_closed = True
            futures = list(self._futures)
            if not futures:
                self._callbacks.stop()
        self._client.loop.add_callback(self._release)
        if cancel_futures:
            for future in futures:
                future.cancel()
        if wait:
            concurrent.futures.wait(futures)
            self._callbacks.join()

    def after_fork(self) -> None:
        """In a forked child: everything is the parent's."""
        futures = list(self._futures)
        self._futures, self._lock = {}, threading.RLock()
        self._callbacks = _CallbackThread()
        self._counter.reset()
        for future in futures:
            future.disconnect()

    # --- in the event loop's thread -------------------------------------------------------------

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        # The loop itself keeps only weak references.
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._finish)

    def _finish(self, task: asyncio.Task[None]) -> None:
        self._tasks.remove(task)
        if task.cancelled():  # the loop ends
            with self._lock:
                futures = list(self._futures)
            for future in futures:
                self._end(future, None, _closed())

    def _follow_all(self, futures: Sequence[ClusterFuture[Any]]) -> None:
        for future in futures:
            remote = future.remote
            if remote is not None:
                self._out_count += 1
                self._start(self._follow(future, remote))

    async def _follow(self, future: ClusterFuture[Any], remote: Any) -> None:
        watch = future.watch
        if watch is not None:
            watch.start(functools.partial(self._check_time, future, watch))
        # Not by a callback of the remote future, which takes a thread of its own.
        await remote._state.wait()
        if watch is not None:
            watch.stop()
        self._out_count -= 1
        with self._lock:
            if future.results is None:
                return
            future.has_arrived = True
            is_wanted = future.is_wanted
        if not self._arrived and not self._is_fetching:
            self._start(self._fetch_arrived())
        self._arrived.append(future)
        self._schedule(is_wanted)

    def _check_time(self, future: ClusterFuture[Any], watch: Watch) -> None:
        remote = future.remote
        if remote is not None and remote.status not in ("finished", "error", "cancelled"):
            self._start(self._end_late(future, remote, watch))

    async def _end_late(self, future: ClusterFuture[Any], remote: Any, watch: Watch) -> None:
        error = await watch.verdict(self._client, remote.key)
        if error is not None and self._end(future, None, error, is_late=True):
            self._drop(remote)

    def _fetch_wanted(self) -> None:
        with self._lock:
            self._is_asked = False
        if self._arrived:
            self._schedule(is_urgent=True)

    def _schedule(self, is_urgent: bool) -> None:
        """Plan the next fetch: of what has arrived by then."""
        if self._is_fetching:
            self._is_urgent |= is_urgent
            return
        loop = asyncio.get_running_loop()
        delay = _LINGER_SECONDS
        if is_urgent:
            are_most_here = len(self._arrived) >= self._out_count
            rest = 0 if are_most_here else max(0, self._rests_until - loop.time())
            delay = min(delay, rest)
        if self._timer is not None:
            if self._timer.when() <= loop.time() + delay:
                return
            self._timer.cancel()
        # Even without a delay, after what ended in the same message has arrived.
        self._timer = loop.call_later(delay, self._is_due.set)

    async def _fetch_arrived(self) -> None:
        loop = asyncio.get_running_loop()
        while self._arrived:
            await self._is_due.wait()
            self._is_due.clear()
            self._timer = None
            self._is_fetching, self._is_urgent = True, False
            batch, self._arrived = self._arrived, []
            began = loop.time()
            try:
                await self._end_batch(batch)
            except Exception as error:  # no thread for callbacks, for instance
                for future in batch:
                    self._end(future, None, error)
            del batch
            now = loop.time()
            self._rests_until = now + _RESTS_PER_FETCH * (now - began)
            self._is_fetching = False
            if self._arrived:
                self._schedule(self._is_urgent)

    async def _end_batch(self, batch: Sequence[ClusterFuture[Any]]) -> None:
        finished = []
        for future in batch:
            remote = future.remote
            if remote is None:
                continue  # cancelled
            if remote.status == "finished":
                finished.append((future, remote))
            elif remote.status in ("error", "cancelled"):
                self._end(future, None, _error_of(remote._state))
            else:  # its worker is lost, and it is made again
                self._follow_all([future])
        if not finished:
            return
        outcomes = await _outcomes(self._client, [remote for _, remote in finished])
        for (future, _), (value, error) in zip(finished, outcomes, strict=True):
            self._end(future, value, error)
        if self._is_closed:
            return  # no next call that they could hold up
        if not self._fetched:
            asyncio.get_running_loop().call_later(_LINGER_SECONDS, self._release)
        self._fetched.extend(remote for _, remote in finished)

    def _release(self) -> None:
        self._fetched = []

    async def _cancel_remotes(self) -> None:
        with self._lock:
            remotes, self._cancelled = self._cancelled, []
        await self._client.cancel(remotes, asynchronous=True)

    # --- in any thread --------------------------------------------------------------------------

    def _add(self, futures: Sequence[ClusterFuture[Any]]) -> None:
        with self._lock:
            self.check_open()
            self._counts["submitted"] += len(futures)
            self._futures.update(dict.fromkeys(futures))
        self._counter.add(sum(future.call_count for future in futures))

    def _drop(self, remote: Any) -> None:
        """Tell the cluster that nobody wants it any more."""
        if remote is _NOTHING:
            return
        with self._lock:
            self._cancelled.append(remote)
            is_first = len(self._cancelled) == 1
        if is_first:
            self._client.loop.add_callback(self._cancel_remotes)

    def _take(self, future: ClusterFuture[Any]) -> Any:
        """For who ends a future: what it followed, or None if another did."""
        with self._lock:
            remote, future.remote, future.results = future.remote, None, None
            if future.watch is not None:
                future.watch.forget()
                future.watch = None
            return remote

    def _end(
        self,
        future: ClusterFuture[Any],
        value: Any,
        error: BaseException | None,
        *,
        is_late: bool = False,
    ) -> bool:
        """Give a future its end; whether nobody else has."""
        if future.watch is not None and has_told_late(error):
            error, is_late = late("its call has ended"), True
        if self._take(future) is None:
            return False
        self._settle(future, value, error, is_late)
        return True

    def _settle(
        self,
        future: ClusterFuture[Any],
        value: Any,
        error: BaseException | None,
        is_late: bool = False,
    ) -> None:
        """Of who took it: give it its end."""
        try:
            if not future.set_running_or_notify_cancel():
                self._count(future, "cancelled")
                return
            self._count(future, "succeeded" if error is None else "failed", is_late)
            future.calls = self._callbacks.call
            if error is None:
                future.set_result(value)
            else:
                future.set_exception(_as_ours(error))
        finally:
            with self._lock:
                del self._futures[future]
                if self._is_closed and not self._futures:
                    self._callbacks.stop()

    def _count(self, future: ClusterFuture[Any], end: str, is_late: bool = False) -> None:
        with self._lock:
            self._counts[end] += 1
            if is_late:
                self._counts["timed_out"] += 1
        self._counter.complete(future.call_count)


class _CallbackThread:
    """Calls back in a thread of its own, which begins with the first call; in order."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._is_stopped = threading.Event()
        # Whoever forgets to stop it does not keep it.
        self._end = weakref.finalize(self, self._calls.put, None)

    def call(self, function: Callable[[], None]) -> None:
        """From one thread alone."""
        self._calls.put(function)
        if self._thread is None:
            thread = threading.Thread(
                target=_call_all, args=(self._calls,), name="moirai-dask-results"
            )
            thread.start()
            self._thread = thread

    def stop(self) -> None:
        """Nothing more will be called: end when all that was given has been."""
        self._end()
        self._is_stopped.set()

    def join(self) -> None:
        """Wait until it is stopped and has ended; the thread itself does not wait for its end."""
        self._is_stopped.wait()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()


def _call_all(calls: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    while (function := calls.get()) is not None:
        function()
        del function


async def _outcomes(
    client: Any, remotes: Sequence[Any]
) -> Sequence[tuple[Any, BaseException | None]]:
    """What each gave, in one message unless one of them cannot be had.

    The traceback of an error keeps what this function sees: no future that keeps the error.
    """
    try:
        values = await client.gather(remotes, asynchronous=True)
        return [(value, None) for value in values]
    except BaseException as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        if len(remotes) == 1:
            return [(None, error)]
    # Not side by side: the client would ask for both at once, and neither be had.
    middle = len(remotes) // 2
    first = await _outcomes(client, remotes[:middle])
    return [*first, *await _outcomes(client, remotes[middle:])]


def _error_of(state: Any) -> BaseException:
    error: BaseException = state.exception or concurrent.futures.CancelledError(state.key)
    return error.with_traceback(state.traceback)


def _as_ours(error: BaseException) -> BaseException:
    if isinstance(error, distributed.KilledWorker):
        failed: Disconnected = WorkerFailed(f"workers that had this call died: {error}")
    elif isinstance(error, concurrent.futures.CancelledError):
        failed = Disconnected(f"the cluster dropped this call: {error}")
    else:
        return error
    failed.__cause__ = error
    return failed


def _closed() -> Disconnected:
    return Disconnected("the client was closed before the result of this call came")


def _end_all() -> None:
    """Before the interpreter waits for its threads: wait for what was sent."""
    for results in list(_alive):
        results.shutdown(wait=True, cancel_futures=False)


def _after_fork_in_child() -> None:
    for results in list(_alive):
        results.after_fork()


threading._register_atexit(_end_all)  # type: ignore[attr-defined]
os.register_at_fork(after_in_child=_after_fork_in_child)
