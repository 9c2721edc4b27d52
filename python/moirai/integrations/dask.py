"""`DistributedExecutor`: calls run by a Dask cluster."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import distributed

from moirai.errors import Disconnected, InvalidArgument, Unsupported
from moirai.executor.interface import BaseExecutor, in_chunks, split_call
from moirai.executor.lanes import lane_of
from moirai.executor.progress import Counter, Progress
from moirai.executor.remote import RemoteFuture
from moirai.executor.time_limits import TimeLimits, time_limits
from moirai.integrations.dask_limits import Announcements, announcing
from moirai.integrations.dask_results import Results
from moirai.memory import Priority

__all__ = ["DistributedExecutor", "DistributedStatistics", "make_executor"]

_Result = TypeVar("_Result")

# Dask's are numbers of which the higher go first, and 0 is what says nothing.
_PRIORITIES = {
    Priority.REALTIME: 20,
    Priority.HIGH: 10,
    Priority.NORMAL: 0,
    Priority.BACKGROUND: -10,
}


@dataclass(frozen=True)
class DistributedStatistics:
    """Counts since the executor was made.

    When nothing is under way, ``submitted == succeeded + failed + cancelled``.

    Attributes:
        submitted: Tasks that were sent to the scheduler.
        succeeded: Tasks that returned; a chunk of `map` is one task.
        failed: Tasks that raised, or that the cluster lost.
        cancelled: Tasks that were cancelled.
        timed_out: Tasks whose time was over, within those that failed.
    """

    submitted: int
    succeeded: int
    failed: int
    cancelled: int
    timed_out: int


class DistributedExecutor(BaseExecutor):
    """A `concurrent.futures.Executor` over an existing client of a Dask cluster.

    Any thread may use it but the client's event loop's. A forked child must not. Shutting it down
    leaves the client and the cluster as they are. The workers need not have Moirai.

    Args:
        client: Where tasks go.

    Raises:
        InvalidArgument: It is no client, or is asynchronous.
    """

    def __init__(self, client: distributed.Client) -> None:
        if not isinstance(client, distributed.Client) or client.asynchronous:
            raise InvalidArgument(f"client: must be a synchronous distributed.Client, got {client}")
        self._client: Any = client
        self._process_id = os.getpid()
        self._counter = Counter()
        self._results = Results(client, self._counter)
        self._announcements = Announcements(client)

    @property
    def max_workers(self) -> int:
        """How many tasks the cluster runs at once now; asks the scheduler."""
        thread_counts: dict[str, int] = self._client.nthreads()
        return max(1, sum(thread_counts.values()))

    def submit(  # type: ignore[override]
        self,
        fn: Callable[..., _Result],
        /,
        *args: Any,
        priority: Priority | None = None,
        node: int | None = None,
        timeout_seconds: float | None = None,
        deadline: float | None = None,
        **kwargs: Any,
    ) -> RemoteFuture[_Result]:
        """Send a call of a function to the cluster; its future.

        Futures of the client among the arguments become dependencies.

        Args:
            fn: What is called.
            args: Its arguments.
            priority: How urgent the task is; None: Priority.NORMAL.
            node: For executors of threads; here, the scheduler chooses.
            timeout_seconds: How long it may run, from when a worker begins it; from 0 to 1e9; None:
                as long as it likes. Then its future fails with Timeout, and a worker that has begun
                it goes on.
            deadline: The moment of `time.monotonic()` of this machine by which it is to have ended;
                a call that was not begun by then is not run.
            kwargs: Its keyword arguments.

        Raises:
            InvalidArgument: A time limit is outside its range.
            Closed: After `shutdown`; a RuntimeError.
            Disconnected: In a forked child.
        """
        limits = time_limits(timeout_seconds, deadline)
        self._check_open()
        if limits is not None:
            call: list[list[Any]] = [[fn], [args], [kwargs]]
            return self._send_limited(limits, _keyword_caller(), call, 1, priority)[0]
        if kwargs:
            # Some names are those of the client's own arguments.
            remote = self._client.submit(
                _keyword_caller(),
                fn,
                args,
                kwargs,
                pure=False,
                priority=_PRIORITIES[lane_of(priority)],
            )
        else:
            remote = self._client.submit(
                fn, *args, pure=False, priority=_PRIORITIES[lane_of(priority)]
            )
        return self._results.follow([remote], [1])[0]

    def submit_many(
        self,
        fn: Callable[..., _Result],
        *iterables: Iterable[Any],
        priority: Priority | None = None,
        node: int | None = None,
        timeout_seconds: float | None = None,
        deadline: float | None = None,
    ) -> list[RemoteFuture[_Result]]:
        """Send a call for each item of the iterables, all in one message; their futures, in order.

        As `submit`.
        """
        limits = time_limits(timeout_seconds, deadline)
        self._check_open()
        items = list(zip(*iterables, strict=False))
        if not items:
            return []
        columns = [list(column) for column in zip(*items, strict=True)]
        if limits is not None:
            return self._send_limited(limits, fn, columns, len(items), priority)
        remotes = self._client.map(
            fn, *columns, pure=False, priority=_PRIORITIES[lane_of(priority)]
        )
        return self._results.follow(remotes, [1] * len(remotes))

    def submit_group(
        self,
        calls: Iterable[tuple[Any, ...]],
        *,
        priority: Priority | None = None,
        node: int | None = None,
        timeout_seconds: float | None = None,
        deadline: float | None = None,
    ) -> list[RemoteFuture[Any]]:
        """Send calls of any functions, all in one message; their futures, in order.

        As `submit`; none is sent if one of them is no call, or cannot be pickled.

        Args:
            calls: Tuples of a function and its arguments.
            priority: As in `submit`, and so are the others.
            node: The node.
            timeout_seconds: For each call on its own.
            deadline: For all of them.

        Raises:
            InvalidArgument: A call is not such a tuple.
        """
        limits = time_limits(timeout_seconds, deadline)
        self._check_open()
        found = [split_call(call) for call in calls]
        if not found:
            return []
        columns: list[list[Any]] = [
            [fn for fn, _ in found],
            [args for _, args in found],
            [{}] * len(found),
        ]
        if limits is not None:
            return self._send_limited(limits, _keyword_caller(), columns, len(found), priority)
        remotes = self._client.map(
            _keyword_caller(), *columns, pure=False, priority=_PRIORITIES[lane_of(priority)]
        )
        return self._results.follow(remotes, [1] * len(found))

    def _send_limited(
        self,
        limits: TimeLimits,
        fn: Callable[..., Any],
        columns: Sequence[Sequence[Any]],
        count: int,
        priority: Priority | None,
    ) -> list[RemoteFuture[Any]]:
        """Send so many calls, each with an item of each column."""
        lane = _PRIORITIES[lane_of(priority)]
        if limits.has_passed:
            return self._results.refuse(count)
        watches = self._announcements.watch(limits, count)
        remotes = self._client.map(
            announcing(fn, self._announcements.topic, limits.timeout_seconds),
            [watch.number for watch in watches],
            *columns,
            pure=False,
            priority=lane,
        )
        return self._results.follow(remotes, [1] * count, watches=watches)

    def _queue_chunks(
        self,
        fn: Callable[..., Any],
        items: Sequence[Any],
        size: int,
        *,
        star: bool,
        priority: Priority | None,
        node: int | None,
    ) -> Sequence[RemoteFuture[Any]]:
        self._check_open()
        chunks = in_chunks(items, size)
        run = _chunk_runner(fn, star)
        remotes = self._client.map(run, chunks, pure=False, priority=_PRIORITIES[lane_of(priority)])
        # Who reads the results in order waits for all of them.
        return self._results.follow(remotes, list(map(len, chunks)), is_wanted=True)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more calls; those that were sent still run, unless they are cancelled.

        Args:
            wait: Whether to wait until they have ended. Ctrl-C ends the wait.
            cancel_futures: Whether to cancel what has not ended.
        """
        self._results.shutdown(wait, cancel_futures)

    def statistics(self) -> DistributedStatistics:
        """Counts since the executor was made."""
        return DistributedStatistics(**self._results.counts())

    def progress(self, interval_seconds: float = 0.1) -> Iterator[Progress]:
        """Wait for what was given to the executor, counting: for progress bars.

        Gives the counts at once, then when calls are over, and ends with what was submitted, even
        meanwhile.

        Args:
            interval_seconds: How long at least from one to the next; the last is not held up.
        """
        return self._counter.watch(interval_seconds)

    def _check_open(self) -> None:
        if os.getpid() != self._process_id:
            raise Disconnected("client: belongs to the parent process; a child makes its own")
        self._results.check_open()


def make_executor(
    *, max_workers: int | None = None, initializer: object = None, initargs: object = ()
) -> DistributedExecutor:
    """What `moirai.executor.Executor(backend="dask")` gives: over Dask's current client.

    Args:
        max_workers: Left out: the cluster decides.
        initializer: None: a cluster's workers are set up by plugins of Dask.
        initargs: Its arguments.

    Raises:
        InvalidArgument: There is no client.
        Unsupported: There is an initializer.
    """
    if initializer is not None:
        raise Unsupported("initializer: a cluster's workers are set up by client.register_plugin")
    try:
        client = distributed.get_client()
    except ValueError:
        raise InvalidArgument(
            'backend: "dask" needs a client: make a distributed.Client first'
        ) from None
    return DistributedExecutor(client)


def _chunk_runner(fn: Callable[..., Any], star: bool) -> Callable[[Sequence[Any]], Any]:
    # A function within a function is pickled with its code, so that workers need not have Moirai.
    def run(items: Sequence[Any]) -> tuple[list[Any], BaseException | None]:
        results: list[Any] = []
        try:
            for item in items:
                results.append(fn(*item) if star else fn(item))
        except Exception as error:
            # A traceback cannot be pickled.
            error.add_note("".join(traceback.format_exception(error)))
            return results, error
        return results, None

    return run


def _keyword_caller() -> Callable[..., Any]:
    # As above.
    def call(fn: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        return fn(*args, **kwargs)

    return call
