"""`Executor`: calls run by threads of this process."""

from __future__ import annotations

import contextlib
import functools
import itertools
import operator
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar, cast

from moirai import _native
from moirai._arguments import check_bool, check_instance
from moirai.errors import Closed
from moirai.executor import backends, blas
from moirai.executor.arenas import TaskArenas
from moirai.executor.future import Future
from moirai.executor.interface import BaseExecutor
from moirai.executor.reporting import initializer_failed
from moirai.executor.room import WhenFull, check_when_full
from moirai.executor.sizing import (
    Affinity,
    Seats,
    check_initializer,
    checked_worker_count,
    cpu_quota,
    default_worker_count,
    node_of_cpu,
    seats_of,
)
from moirai.executor.statistics import (
    ExecutorStatistics,
    LatencyHistogram,
    WorkerStatistics,
    sum_by_node,
)
from moirai.memory import Priority, Resource, Topology, use

__all__ = ["Executor"]

_Result = TypeVar("_Result")

_MOST_WORKERS = 1 << 12
_numbers = itertools.count()
_executors: weakref.WeakSet[Executor] = weakref.WeakSet()
# Every thread that may still run, with how to end it: executors may go before their workers do.
_workers: weakref.WeakKeyDictionary[threading.Thread, _native.WorkerHandle | _native.TimerHandle]
_workers = weakref.WeakKeyDictionary()
_is_interpreter_ending = False


class Executor(_native.BareExecutor, BaseExecutor):
    """A `concurrent.futures.Executor` over threads, with native queues, workers and futures.

    Any thread may use it, tasks of its own too: a task that waits for another runs it, if nobody
    has begun it, so nested submits do not wait for each other. A forked child has it empty, with
    workers of its own.

    Args:
        max_workers: How many tasks run at once, at most; None: one for each CPU that the process
            may use by affinity, cpuset and control group. Threads are started as they are needed.
        thread_name_prefix: What the threads' names begin with.
        initializer: Called in each worker's thread before its first task; when it raises, the
            executor is broken. With one, only workers run tasks, never a thread that waits.
        initargs: Its arguments.
        backend: What runs the tasks: "threads"; "processes" (a `ProcessExecutor`), which has no
            `memory` and `task_arena`; "dask" (the cluster of the current client), which has no
            `max_pending` and `blas_threads` either, and no say in where workers are; None: what the
            environment variable MOIRAI_EXECUTOR says, else threads. Subclasses are over threads.
        affinity: "node": each worker stays on the CPUs of its node; "core": on one CPU; None: where
            the kernel puts it; "auto": "node" where there are several nodes, else None.
        topology: The machine; None reads it.
        max_pending: How many tasks may wait to begin, at most; None: as many as memory holds.
        when_full: What whoever submits one more does: "block" until there is room, "raise"
            queue.Full, or "caller_runs": it runs the call itself, besides the workers. A task of
            the executor that would have to block runs the call itself too.
        memory: A resource that NumPy draws from in tasks; None: what it draws from where the task
            is submitted. If it has lanes, the priority of a task is that of its memory.
        task_arena: Whether each call has an arena, from `memory` if given, which is given back when
            the call ends, but for the chunks that hold its result.
        blas_threads: How many threads a call of BLAS or OpenMP may use, at most, in this process
            while workers of this executor run; "auto": the CPUs divided by the workers, at least 1;
            None: as many as it likes. Needs the package threadpoolctl.
        measure_latency: Whether `statistics` tells how long tasks waited and took.

    Raises:
        InvalidArgument: An argument is outside its range.
        Unsupported: `blas_threads` was given, and threadpoolctl is not installed.

    Source:
        Chase and Lev, Dynamic circular work-stealing deque, SPAA 2005; Wagner and Calder,
        Leapfrogging, PPoPP 1993, for what a worker does while it waits.
    """

    _max_workers: int
    _threads: set[threading.Thread]
    _timers: set[threading.Thread]
    _prefix: str
    _initializer: Callable[..., object] | None
    _initargs: tuple[Any, ...]
    _seats: Seats
    _blas_threads: int | None

    def __new__(
        cls,
        max_workers: int | None = None,
        thread_name_prefix: str = "",
        initializer: Callable[..., object] | None = None,
        initargs: tuple[Any, ...] = (),
        *,
        backend: str | None = None,
        affinity: Affinity = "auto",
        topology: Topology | None = None,
        max_pending: int | None = None,
        when_full: WhenFull = "block",
        memory: Resource | None = None,
        task_arena: bool = False,
        blas_threads: blas.BlasThreads = None,
        measure_latency: bool = False,
    ) -> Executor:
        check_instance("thread_name_prefix", thread_name_prefix, str)
        check_initializer(initializer, initargs)
        check_instance("topology", topology, Topology, or_none=True)
        check_when_full(when_full)
        check_instance("memory", memory, Resource, or_none=True)
        check_bool("task_arena", task_arena)
        check_bool("measure_latency", measure_latency)
        other = backends.find(backend) if cls is Executor else None
        if other is not None:
            # What is said of workers' places is left out by those that have no say in it.
            own: dict[str, Any] = {"affinity": affinity, "topology": topology}
            own = {name: value for name, value in own.items() if name in other.takes}
            asked = backends.check_taken(
                other,
                {
                    "max_pending": max_pending,
                    "when_full": None if max_pending is None else when_full,
                    "memory": memory,
                    "task_arena": task_arena or None,
                    "blas_threads": blas_threads,
                },
            )
            made = other.make(
                max_workers=max_workers, initializer=initializer, initargs=initargs, **own, **asked
            )
            return cast("Executor", made)
        machine = Topology.read() if topology is None else topology
        max_workers = checked_worker_count(max_workers, machine, _MOST_WORKERS)
        seats = seats_of(machine, max_workers, affinity)
        most = blas.share_of_cpus(
            blas.checked(blas_threads, needs_package=True),
            default_worker_count(machine, cpu_quota()),
            max_workers,
        )
        wrap = TaskArenas(memory).wrap if task_arena else None
        self = super().__new__(
            cls,
            Future,
            node_of_worker=[seat.place for seat in seats.workers],
            order=seats.steal_order,
            node_of_cpu=node_of_cpu(machine, max_workers),
            node_ids=seats.node_ids,
            outsiders_help=initializer is None,
            max_pending=max_pending,
            when_full=when_full,
            memory=None if memory is None else use(memory),
            wrap=wrap if most is None else blas.wrapper(wrap),
            measure_latency=measure_latency,
        )
        self._max_workers, self._blas_threads = max_workers, most
        self._prefix = thread_name_prefix or f"{cls.__name__}-{next(_numbers)}"
        self._initializer, self._initargs = initializer, initargs
        self._seats = seats
        self._reset_threads()
        _executors.add(self)
        return self

    def _reset_threads(self) -> None:
        self._threads = set()
        self._timers = set()
        self._lock = threading.Lock()

    @property
    def max_workers(self) -> int:
        """How many tasks run at once, at most."""
        return self._max_workers

    @property
    def _broken(self) -> bool:
        return self.is_broken

    @property
    def _shutdown(self) -> bool:
        return self.is_closed

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

        Cheaper than as many `submit`. With `max_pending`, they are queued as there is room; when
        the rest cannot be, those that were queued and have not begun are cancelled.

        Args:
            fn: The function.
            iterables: Where its arguments come from, one from each; the shortest ends it.
            priority: How urgent the tasks are; None: Priority.NORMAL.
            node: Id of the node whose workers are to take them first; None: the submitter's.
            timeout_seconds: How long each may run, from its start; then its future raises Timeout.
            deadline: The moment of `time.monotonic()` by which they are to have ended.

        Raises:
            Closed: After `shutdown`; a RuntimeError.
            Full: There is no room for all of them, and `when_full` is "raise".
            Timeout: The deadline passed while it waited for room.
        """
        star = len(iterables) != 1
        return self.queue_calls(
            fn,
            zip(*iterables, strict=False) if star else iterables[0],
            star=star,
            priority=priority,
            node=node,
            timeout_seconds=timeout_seconds,
            deadline=deadline,
        )

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
            priority: As in `submit_many`, and so are the others.
            node: The node.
            timeout_seconds: The time for each run.
            deadline: The moment for all ends.

        Raises:
            Closed: After `shutdown`; a RuntimeError.
            InvalidArgument: A call is not such a tuple, or there are more than `max_pending`.
            Full: There is no room for all of them, and `when_full` is "raise".
            Timeout: The deadline passed while it waited for room.
        """
        return self.queue_group(
            calls,
            priority=priority,
            node=node,
            timeout_seconds=timeout_seconds,
            deadline=deadline,
        )

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
        return self.queue_chunks(fn, items, size, star=star, priority=priority, node=node)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more calls; what is queued is still run, unless it is cancelled.

        Args:
            wait: Whether to wait until the workers have ended. Ctrl-C ends the wait.
            cancel_futures: Whether to cancel what has not begun.
        """
        self.close()
        if cancel_futures:
            self.cancel_queued()
        if wait:
            with self._lock:
                threads = [*self._threads, *self._timers]
            for thread in threads:
                _join(thread)

    def statistics(self) -> ExecutorStatistics:
        """Counts since the executor was made; taken one by one while it works."""
        whole, workers = self.counts()
        whole["queued_by_node"] = tuple(map(tuple, whole["queued_by_node"]))
        # Of each worker, and last of all other threads; nothing where that is not measured.
        measured = [
            (LatencyHistogram(tuple(wait)), LatencyHistogram(tuple(run)))
            for wait, run in self.latencies() or ()
        ]
        waits, runs = [
            functools.reduce(operator.add, kind) for kind in zip(*measured, strict=True)
        ] or (None, None)
        of_workers = measured or itertools.repeat((None, None))
        each = tuple(
            WorkerStatistics(**it, waits=wait, runs=run)
            for it, (wait, run) in zip(workers, of_workers, strict=False)
        )
        return ExecutorStatistics(
            **whole,
            waits=waits,
            runs=runs,
            workers=each,
            nodes=sum_by_node(self._seats.node_ids, each, whole["queued_by_node"]),
        )

    def _start_worker(self, handle: _native.WorkerHandle, who: int) -> None:
        """Called by the native part, in whichever thread queues a task that needs one."""
        thread = threading.Thread(
            name=f"{self._prefix}_{who}",
            target=_work,
            args=(
                handle,
                who,
                self._seats.workers[who].cpus,
                self._blas_threads,
                self._initializer,
                self._initargs,
            ),
        )
        self._start(thread, handle, self._threads)

    def _start_timer(self, handle: _native.TimerHandle) -> None:
        """Called by the native part when the first task with a time limit is queued."""
        thread = threading.Thread(name=f"{self._prefix}_timer", target=handle.work)
        self._start(thread, handle, self._timers)

    def _start(
        self,
        thread: threading.Thread,
        handle: _native.WorkerHandle | _native.TimerHandle,
        kept: set[threading.Thread],
    ) -> None:
        with self._lock:
            # Before it starts: a signal's exception may come when it has.
            kept.add(thread)
            _workers[thread] = handle
            try:
                if _is_interpreter_ending:  # Looked at after it was kept: nobody would end it.
                    raise Closed("cannot schedule new futures after interpreter shutdown")
                thread.start()
            except Exception:
                kept.discard(thread)
                del _workers[thread]
                raise

    def _after_fork(self) -> None:
        self.renew()
        self._reset_threads()


def _work(
    handle: _native.WorkerHandle,
    who: int,
    cpus: tuple[int, ...],
    blas_threads: int | None,
    initializer: Callable[..., object] | None,
    initargs: tuple[Any, ...],
) -> None:
    if cpus:
        os.sched_setaffinity(0, cpus)
    with contextlib.ExitStack() as until_it_ends:
        try:
            if blas_threads is not None:
                until_it_ends.enter_context(blas.held(blas_threads))
            if initializer is not None:
                initializer(*initargs)
        except BaseException as error:
            initializer_failed(error)
            handle.give_up()
        del initializer, initargs
        handle.work(who)


def _join(thread: threading.Thread) -> None:
    """Wait for the end of a thread; not of this one, nor of one whose start was interrupted."""
    if thread.ident is not None and thread is not threading.current_thread():
        thread.join()


def _end_all() -> None:
    """Before the interpreter waits for its threads: workers run what is queued, then end."""
    global _is_interpreter_ending
    _is_interpreter_ending = True
    workers = list(_workers.items())
    for _, handle in workers:
        handle.close()
    for thread, _ in workers:
        _join(thread)


def _after_fork_in_child() -> None:
    global _is_interpreter_ending
    _is_interpreter_ending = False  # the child's has just begun, a worker's for instance
    _workers.clear()
    for executor in list(_executors):
        executor._after_fork()


# As concurrent.futures does, for the same reason: atexit comes after the threads were joined.
threading._register_atexit(_end_all)  # type: ignore[attr-defined]
os.register_at_fork(after_in_child=_after_fork_in_child)
