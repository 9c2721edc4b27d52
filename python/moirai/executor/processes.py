"""`ProcessExecutor`: calls run by other processes of this machine."""

from __future__ import annotations

import multiprocessing
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.context import BaseContext
from typing import Any, TypeVar

from moirai.errors import InvalidArgument
from moirai.executor import blas
from moirai.executor import process_messages as messages
from moirai.executor.interface import BaseExecutor, in_chunks
from moirai.executor.lanes import lane_of
from moirai.executor.process_parts import Settings, Task
from moirai.executor.process_pool import ProcessPool
from moirai.executor.process_statistics import ProcessStatistics
from moirai.executor.process_worker import run_chunk
from moirai.executor.progress import Progress
from moirai.executor.remote import RemoteFuture
from moirai.executor.sizing import (
    check_initializer,
    checked_worker_count,
    cpu_quota,
    default_worker_count,
)
from moirai.memory import Priority, Topology, parse_bytes

__all__ = ["ProcessExecutor"]

_Result = TypeVar("_Result")
# A function, its arguments, and how many calls of the user's it stands for.
_Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], int]

_MOST_WORKERS = 60
"""As many processes, and some more, can have blocks of one shared resource at once."""


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
        memory_bytes: How much shared memory calls on their way may take, and in each process its
            results, if they are copied; an int or such as "2 GiB". It is taken as it is needed.

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
        memory_bytes: int | str = "2 GiB",
    ) -> None:
        machine = Topology.read()
        worker_count = checked_worker_count(max_workers, machine, _MOST_WORKERS)
        check_initializer(initializer)
        _check_tasks_per_child(max_tasks_per_child)
        settings = Settings(
            worker_count,
            _context(mp_context, max_tasks_per_child),
            initializer,
            initargs,
            max_tasks_per_child,
            parse_bytes(memory_bytes, argument="memory_bytes"),
            blas.share_of_cpus(
                blas.checked(blas_threads, needs_package=False),
                default_worker_count(machine, cpu_quota()),
                worker_count,
            ),
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
        **kwargs: Any,
    ) -> RemoteFuture[_Result]:
        """Queue a call of a function; its future.

        The call is pickled at once, by cloudpickle if it is installed and nothing else can; what
        that raises, the future raises. Arrays in it must not be changed until it is over.

        Args:
            fn: What is called.
            args: Its arguments.
            priority: How urgent the task is; None: Priority.NORMAL.
            node: For executors of threads; here, processes run where the kernel puts them.
            kwargs: Its keyword arguments.

        Raises:
            Closed: After `shutdown`; a RuntimeError.
            BrokenProcessPool: The initializer failed, or workers do not start.
        """
        return self._queue([(fn, args, kwargs, 1)], priority)[0]

    def submit_many(
        self,
        fn: Callable[..., _Result],
        *iterables: Iterable[Any],
        priority: Priority | None = None,
        node: int | None = None,
    ) -> list[RemoteFuture[_Result]]:
        """Queue a call of a function for each item of the iterables; their futures, in order.

        As `submit`; all are queued or, after `shutdown`, none.
        """
        items = zip(*iterables, strict=False)
        return self._queue([(fn, arguments, {}, 1) for arguments in items], priority)

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
        calls: list[_Call] = [
            (run_chunk, (fn, chunk, star), {}, len(chunk)) for chunk in in_chunks(items, size)
        ]
        return self._queue(calls, priority)

    def _queue(
        self,
        calls: Iterable[_Call],
        priority: Priority | None,
    ) -> list[RemoteFuture[Any]]:
        lane = lane_of(priority)
        futures, tasks, failures = [], [], []
        for fn, args, kwargs, call_count in calls:
            future: RemoteFuture[Any] = RemoteFuture()
            futures.append(future)
            try:
                content = messages.dump((fn, args, kwargs))
            except BaseException as error:
                if not isinstance(error, Exception):
                    raise
                failures.append((future, error))
            else:
                tasks.append(Task(future, content, lane, call_count))
        self._pool.add(tasks, failed_count=len(failures))
        for failed, failure in failures:
            failed.set_running_or_notify_cancel()
            failed.set_exception(failure)
        return futures

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

    def progress(self, interval_seconds: float = 0.1) -> Iterator[Progress]:
        """Wait for what was given to the executor, counting: for progress bars.

        Gives the counts at once, then when calls are over, and ends with what was submitted, even
        meanwhile.

        Args:
            interval_seconds: How long at least from one to the next; the last is not held up.
        """
        return self._pool.counter.watch(interval_seconds)


def _check_tasks_per_child(count: object) -> None:
    if count is None:
        return
    if isinstance(count, bool) or not isinstance(count, int):
        kind = type(count).__name__
        raise TypeError(f"max_tasks_per_child: must be an int or None, got {kind}")
    if count < 1:
        raise InvalidArgument(f"max_tasks_per_child: must be at least 1, got {count}")


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
    return given
