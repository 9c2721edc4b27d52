"""`ProcessExecutor`: calls run by other processes of this machine."""

from __future__ import annotations

import contextvars
import functools
import math
import multiprocessing
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.context import BaseContext
from typing import Any, TypeVar

from moirai._arguments import check_instance, check_int, check_seconds, wrong_type
from moirai._native import call_outside_tasks
from moirai.errors import InvalidArgument
from moirai.executor import blas
from moirai.executor import process_messages as messages
from moirai.executor.future import Future
from moirai.executor.interface import BaseExecutor, in_chunks, split_call
from moirai.executor.lanes import lane_of
from moirai.executor.process_parts import Settings, Task
from moirai.executor.process_pool import ProcessPool
from moirai.executor.process_statistics import ProcessStatistics
from moirai.executor.process_worker import run_chunk
from moirai.executor.progress import Progress
from moirai.executor.room import WhenFull, check_limit
from moirai.executor.sizing import (
    Affinity,
    check_initializer,
    checked_worker_count,
    cpu_quota,
    default_worker_count,
    seats_of,
)
from moirai.executor.time_limits import TimeLimits, late, not_begun, time_limits
from moirai.executor.token import CancelToken, call_token
from moirai.memory import Priority, Topology, parse_bytes

__all__ = ["ProcessExecutor"]

_Result = TypeVar("_Result")
# A function, its arguments, and how many calls of the user's it stands for.
_Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], int]

_MOST_WORKERS = 60
"""As many processes, and some more, can have blocks of one shared resource at once."""

_MOST_MEMORY_BYTES = 1 << 39
"""What a shared resource can have at most."""


class ProcessExecutor(BaseExecutor):
    """A `concurrent.futures.Executor` over processes; calls and results go through shared memory.

    Any thread may use it. A forked child has it empty, with workers of its own. A worker that dies
    fails the call that it had with `moirai.errors.WorkerFailed`; another takes its place.

    Args:
        max_workers: How many tasks run at once, at most 60; None: one for each CPU that the process
            may use by affinity, cpuset and control group. Processes are started as they are needed;
            if they are forked, all with the first task.
        mp_context: How they are started: a context of multiprocessing, or "fork", "spawn" or
            "forkserver"; None: multiprocessing's default, or spawn with `max_tasks_per_child`.
        initializer: Called in each process before its first task; when it raises, the executor is
            broken.
        initargs: Its arguments.
        max_tasks_per_child: Tasks after which a process is replaced by a new one; None: never.
        blas_threads: How many threads a call of BLAS or OpenMP may use in a worker, at most;
            "auto": the CPUs divided by the workers, at least 1; None: as many as it likes. A number
            needs the package threadpoolctl; without it, "auto" reaches what workers load later.
        affinity: "node": each worker stays on the CPUs of its node, and its memory comes from there
            while there is some; "core": the same on one CPU; None: where the kernel puts it;
            "auto": "node" where there are several nodes, else None.
        topology: The machine; None reads it.
        max_pending: How many calls may wait that no worker has yet, at most; None: as many as
            memory holds.
        when_full: What whoever submits one more does: "block" until there is room, "raise"
            queue.Full, or "caller_runs": it runs the call itself, in this process, besides the
            workers. What is called back at a call's end never waits for room.
        memory_bytes: How much shared memory calls on their way may take, and in each process its
            results, if they are copied; an int or such as "2 GiB". It is taken as it is needed.
        kill_after_seconds: How long a call may still run when its time is over (`timeout_seconds`,
            `deadline`), until its worker is killed and replaced; None: as long as it likes.

    Raises:
        InvalidArgument: An argument is outside its range.
        Unsupported: `blas_threads` is a number, and threadpoolctl is not installed.
    """

    def __init__(
        self,
        max_workers: int | None = None,
        mp_context: BaseContext | str | None = None,
        initializer: Callable[..., object] | None = None,
        initargs: tuple[Any, ...] = (),
        *,
        max_tasks_per_child: int | None = None,
        blas_threads: blas.BlasThreads = "auto",
        affinity: Affinity = "auto",
        topology: Topology | None = None,
        max_pending: int | None = None,
        when_full: WhenFull = "block",
        memory_bytes: int | str = "2 GiB",
        kill_after_seconds: float | None = None,
    ) -> None:
        check_instance("topology", topology, Topology, or_none=True)
        check_initializer(initializer, initargs)
        machine = Topology.read() if topology is None else topology
        worker_count = checked_worker_count(max_workers, machine, _MOST_WORKERS)
        _check_tasks_per_child(max_tasks_per_child)
        check_seconds("kill_after_seconds", kill_after_seconds)
        check_limit(max_pending, when_full, has_initializer=initializer is not None)
        settings = Settings(
            seats_of(machine, worker_count, affinity),
            _context(mp_context, max_tasks_per_child),
            initializer,
            initargs,
            max_tasks_per_child,
            _checked_memory(memory_bytes),
            blas.share_of_cpus(
                blas.checked(blas_threads, needs_package=False),
                default_worker_count(machine, cpu_quota()),
                worker_count,
            ),
            max_pending,
            when_full,
            kill_after_seconds,
        )
        self._pool = pool = ProcessPool(settings)
        # One that is dropped ends its workers, once they have run what is queued.
        weakref.finalize(self, pool.close).atexit = False

    @property
    def max_workers(self) -> int:
        """How many tasks run at once, at most."""
        return self._pool.settings.max_workers

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
    ) -> Future[_Result]:
        """Queue a call of a function; its future.

        The call is pickled at once, by cloudpickle if it is installed and nothing else can; what
        that raises, the future raises. Arrays in it must not be changed until it is over.

        Args:
            fn: What is called.
            args: Its arguments.
            priority: How urgent the task is; None: Priority.NORMAL.
            node: Id of the node whose workers are to take it first; None: any.
            timeout_seconds: How long it may run, from its start; then its future raises Timeout.
            deadline: The moment of `time.monotonic()` by which it is to have ended.
            kwargs: Its keyword arguments.

        Raises:
            Closed: After `shutdown`; a RuntimeError.
            BrokenProcessPool: The initializer failed, or workers do not start.
            Full: There is no room, and `when_full` is "raise".
            Timeout: The deadline passed while it waited for room.
        """
        limits = time_limits(timeout_seconds, deadline)
        return self._queue([(fn, args, kwargs, 1)], priority, node, limits)[0]

    def submit_many(
        self,
        fn: Callable[..., _Result],
        *iterables: Iterable[Any],
        priority: Priority | None = None,
        node: int | None = None,
        timeout_seconds: float | None = None,
        deadline: float | None = None,
    ) -> list[Future[_Result]]:
        """Queue a call of a function for each item of the iterables; their futures, in order.

        As `submit`; all are queued or, after `shutdown`, none. With `max_pending`, they are queued
        as there is room; when the rest cannot be, those that were queued and have not begun are
        cancelled.
        """
        limits = time_limits(timeout_seconds, deadline)
        items = zip(*iterables, strict=False)
        return self._queue([(fn, arguments, {}, 1) for arguments in items], priority, node, limits)

    def submit_group(
        self,
        calls: Iterable[tuple[Any, ...]],
        *,
        priority: Priority | None = None,
        node: int | None = None,
        timeout_seconds: float | None = None,
        deadline: float | None = None,
    ) -> list[Future[Any]]:
        """Queue calls of any functions, all of them at once or none; their futures, in order.

        With `max_pending`, room for all of them is taken in one step, and who waits for it is
        not passed by those who need less.

        Args:
            calls: Tuples of a function and its arguments.
            priority: As in `submit`, and so are the others.
            node: The node.
            timeout_seconds: The time for each run.
            deadline: The moment for all ends.

        Raises:
            Closed: After `shutdown`; a RuntimeError.
            InvalidArgument: A call is not such a tuple, or there are more than `max_pending`.
            Full: There is no room for all of them, and `when_full` is "raise".
            Timeout: The deadline passed while it waited for room.
        """
        limits = time_limits(timeout_seconds, deadline)
        found: list[_Call] = [(fn, args, {}, 1) for fn, args in map(split_call, calls)]
        return self._queue(found, priority, node, limits, is_whole=True)

    def _queue_chunks(
        self,
        fn: Callable[..., Any],
        items: Sequence[Any],
        size: int,
        *,
        star: bool,
        priority: Priority | None,
        node: int | None,
    ) -> Sequence[Future[Any]]:
        calls: list[_Call] = [
            (run_chunk, (fn, chunk, star), {}, len(chunk)) for chunk in in_chunks(items, size)
        ]
        return self._queue(calls, priority, node, None)

    def _queue(
        self,
        calls: Sequence[_Call],
        priority: Priority | None,
        node: int | None,
        limits: TimeLimits | None,
        *,
        is_whole: bool = False,
    ) -> list[Future[Any]]:
        lane, settings = lane_of(priority), self._pool.settings
        place = settings.seats.place_of(node)
        if settings.max_pending is None or settings.when_full == "raise" or is_whole:
            return self._queue_whole(calls, lane, place, limits)
        futures: list[Future[Any]] = []
        try:
            for call in calls:
                futures += self._queue_whole([call], lane, place, limits)
        except BaseException:
            for future in futures:
                future.cancel()
            raise
        return futures

    def _queue_whole(
        self,
        calls: Sequence[_Call],
        lane: Priority,
        place: int | None,
        limits: TimeLimits | None,
    ) -> list[Future[Any]]:
        """Queue all of the calls or none; or run them, if there is no room and they are to be."""
        pool, has_room = self._pool, self._pool.settings.max_pending is not None
        pool.check_open()
        deadline = math.inf if limits is None else limits.deadline
        if has_room and not self._take_room(len(calls), deadline):
            return [self._run_here(call, limits) for call in calls]
        after = () if limits is None else (limits,)
        futures, tasks, failures = [], [], []
        try:
            for fn, args, kwargs, call_count in calls:
                future: Future[Any] = Future()
                futures.append(future)
                try:
                    content = messages.dump((fn, args, kwargs, *after))
                except Exception as error:
                    failures.append((future, error))
                else:
                    task = Task(future, content, lane, call_count, place, has_room=has_room)
                    task.limits = limits
                    tasks.append(task)
            pool.add(tasks, failed_count=len(failures))
        except BaseException:
            if has_room:
                for task in tasks:  # which may have been queued
                    pool.backlog.give_back_room(task)
                pool.backlog.room.give_back(len(calls) - len(tasks))
            raise
        if has_room and failures:
            pool.backlog.room.give_back(len(failures))
        for failed, failure in failures:
            failed.set_running_or_notify_cancel()
            failed.set_exception(failure)
        return futures

    def _take_room(self, count: int, deadline: float) -> bool:
        """Take room for calls, waiting until a moment; false if they are to be run here."""
        pool, room = self._pool, self._pool.backlog.room
        when_full = pool.settings.when_full
        # The manager calls back at the end of calls: it makes room, so it does not wait for any.
        is_manager = threading.current_thread() is pool.manager
        if room.take(count, must=is_manager and when_full != "raise"):
            return True
        if when_full == "caller_runs":
            return False
        if when_full == "raise":
            pool.backlog.count(refused=count)
            raise room.full(count)
        if count > room.most:
            raise InvalidArgument(f"calls: must be at most {room.most} (max_pending), got {count}")
        room.wait(count, deadline)
        return True

    def _run_here(self, call: _Call, limits: TimeLimits | None) -> Future[Any]:
        pool, call_count = self._pool, call[3]
        future: Future[Any] = Future()
        pool.backlog.count(submitted=1, ran_by_submitter=1)
        pool.counter.add(call_count)
        future.set_running_or_notify_cancel()
        try:
            value = self._result_here(call, limits)
        except BaseException as error:
            pool.backlog.count(failed=1)
            future.set_exception(error)
            if not isinstance(error, Exception):
                raise
        else:
            pool.backlog.count(succeeded=1)
            future.set_result(value)
        finally:
            pool.counter.complete(call_count)
        return future

    def _result_here(self, call: _Call, limits: TimeLimits | None) -> Any:
        fn, args, kwargs, _ = call
        if fn is run_chunk:
            kwargs = {"is_sent": False}
        if limits is not None and limits.has_passed:
            self._pool.backlog.count(timed_out=1)
            raise not_begun()
        due = math.inf if limits is None else limits.due(time.monotonic())
        context = contextvars.copy_context()
        # Its own, whatever task its submitter is at.
        context.run(call_token.set, functools.partial(CancelToken, None, due))
        try:
            value = context.run(call_outside_tasks, fn, *args, **kwargs)
        except Exception:
            if due > time.monotonic():
                raise
        else:
            if due > time.monotonic():
                return value
        self._pool.backlog.count(timed_out=1)
        raise late("its call has ended")

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more calls; what is queued is still run, unless it is cancelled.

        Args:
            wait: Whether to wait until the workers have ended. Ctrl-C ends the wait.
            cancel_futures: Whether to cancel what was not sent to a worker yet.
        """
        self._pool.close()
        if cancel_futures:
            self._pool.cancel_queued()
        if wait:
            self._pool.join()

    def statistics(self) -> ProcessStatistics:
        """Counts since the executor was made."""
        return self._pool.statistics()

    def allow(self, task_count: int) -> None:
        """Let so many tasks run at once from now on; from 1 to as many as there are workers.

        Those that run are not interrupted; what comes after them waits. A guard of
        `moirai.pressure` calls this.

        Raises:
            InvalidArgument: `task_count` is outside its range.
        """
        self._pool.allow(task_count)

    @property
    def allowed_count(self) -> int:
        """How many tasks may run at once."""
        return self._pool.allowed_count

    @property
    def running_count(self) -> int:
        """How many workers have tasks."""
        return self._pool.running_count

    def progress(self, interval_seconds: float = 0.1) -> Iterator[Progress]:
        """Wait for what was given to the executor, counting: for progress bars.

        Gives the counts at once, then when calls are over, and ends with what was submitted, even
        meanwhile.

        Args:
            interval_seconds: How long at least from one to the next; the last is not held up.
        """
        return self._pool.counter.watch(interval_seconds)


def _check_tasks_per_child(count: int | None) -> None:
    check_int("max_tasks_per_child", count, or_none=True)
    if count is not None and count < 1:
        raise InvalidArgument(f"max_tasks_per_child: must be at least 1, got {count}")


def _checked_memory(size: int | str) -> int:
    size_bytes = parse_bytes(size, argument="memory_bytes")
    if not 1 <= size_bytes <= _MOST_MEMORY_BYTES:
        raise InvalidArgument(
            f"memory_bytes: must be from 1 to {_MOST_MEMORY_BYTES}, got {size_bytes}"
        )
    return size_bytes


def _context(given: BaseContext | str | None, max_tasks_per_child: int | None) -> BaseContext:
    if given is None:
        # A process that is replaced is started from a thread, where forking is not as safe.
        given = None if max_tasks_per_child is None else "spawn"
    if given is None or isinstance(given, str):
        try:
            return multiprocessing.get_context(given)
        except ValueError:
            raise InvalidArgument(
                'mp_context: must be a context, "fork", "spawn", "forkserver" or None, '
                f"got {given!r}"
            ) from None
    if not isinstance(given, BaseContext):
        raise wrong_type("mp_context", "a context, a str or None", given)
    return given
