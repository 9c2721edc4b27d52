"""The processes of a `ProcessExecutor`: which of them gets which call, and what if one dies."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
import weakref
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool

from moirai import errors
from moirai._arguments import check_int
from moirai.channels import SharedChannel, SharedReceiver, SharedSender
from moirai.executor import process_messages as messages
from moirai.executor.process_backlog import Backlog
from moirai.executor.process_messages import Content, Head, Packed, Placer
from moirai.executor.process_parts import (
    Settings,
    Task,
    Worker,
    WorkerFailed,
    end_of,
    with_cause,
)
from moirai.executor.process_statistics import ProcessStatistics
from moirai.executor.process_watch import Watch
from moirai.executor.process_worker import (
    CALL,
    DIED,
    FAILED,
    READY,
    RETURNED,
    UNFIT,
    UNREADABLE,
    WAKE,
    Start,
    work,
)
from moirai.executor.progress import Counter

__all__ = ["ProcessPool"]

_CALLS_BYTES = 256 << 10
_RESULTS_BYTES = 1 << 20

_RESULTS_AT_ONCE = 16
"""Results that are taken, if they are there, until workers are given more."""

_MOST_EARLY_DEATHS = 3
"""Workers in a row that may end before they are ready, until the executor is broken."""

_MEMORY_SECONDS = 1.0
"""How long to wait for memory that processes which run nothing have."""

_MEMORY_PROBE_SECONDS = 0.005
"""How often to look for it meanwhile."""

_numbers = itertools.count()
_pools: weakref.WeakSet[ProcessPool] = weakref.WeakSet()
_is_interpreter_ending = False


class ProcessPool:
    """What is behind a `ProcessExecutor`, which may be dropped before it.

    One thread, the manager, has everything that belongs to workers. Others queue tasks and wake it
    by a message among the results.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.name = f"moirai-processes-{next(_numbers)}"
        self.counter = Counter()
        self._reset()
        _pools.add(self)

    def _reset(self) -> None:
        self.counter.reset()
        self.backlog = Backlog(self.settings, self.counter, self._wake)
        self._worker_counts = dict.fromkeys(("started", "lost"), 0)
        self._taken_back = self._copied_bytes = self._lent_bytes = 0
        self.workers: dict[int, Worker] = {}
        self.allowed_count = self.max_workers
        self._leaving: dict[int, Worker] = {}
        self._task_numbers = itertools.count(1)
        self._worker_numbers = itertools.count()
        self._early_deaths = 0
        self._short_since: float | None = None
        self._lingered = False
        self._placer = Placer(self.settings.memory_bytes)
        self.is_closed = False
        self.broken: str | None = None
        self._is_woken = False
        self._results: SharedChannel | None = None
        self._receiver: SharedReceiver
        self._waker: SharedSender
        self._watch: Watch | None = None
        self.manager: threading.Thread | None = None

    # === any thread =============================================================================

    def add(self, tasks: Sequence[Task], failed_count: int = 0) -> None:
        """Queue tasks: all or, if this raises, none.

        Args:
            tasks: What is to be queued.
            failed_count: How many more there were, that could not be pickled.

        Raises:
            Closed: After `close`.
            BrokenProcessPool: The initializer failed, or workers do not start.
        """
        with self.backlog.lock:
            self.check_open()
            self._begin()
            self.backlog.add(tasks, self._task_numbers, failed_count)
        self._wake()
        self.backlog.watch(tasks)

    def check_open(self) -> None:
        """Refuse tasks, as `add` does.

        Raises:
            Closed: After `close`.
            BrokenProcessPool: The initializer failed, or workers do not start.
        """
        if self.broken is not None:
            raise BrokenProcessPool(self.broken)
        if self.is_closed or _is_interpreter_ending:
            after = "interpreter shutdown" if _is_interpreter_ending else "shutdown"
            raise errors.Closed(f"cannot schedule new futures after {after}")

    def close(self) -> None:
        """Take no more tasks; the workers end when all that is queued is over."""
        self.is_closed = True
        self.backlog.room.close()
        self._wake()

    def cancel_queued(self) -> None:
        """Cancel what was not sent to a worker yet."""
        self.backlog.cancel()
        self._wake()

    def join(self) -> None:
        """Wait until the workers have ended."""
        manager = self.manager
        if manager is not None and manager is not threading.current_thread():
            manager.join()

    @property
    def max_workers(self) -> int:
        """How many tasks run at once, at most."""
        return self.settings.max_workers

    @property
    def running_count(self) -> int:
        """How many workers have tasks."""
        return sum(bool(worker.tasks) for worker in list(self.workers.values()))

    def allow(self, task_count: int) -> None:
        """Let so many workers have tasks from now on; what the others run goes on.

        Raises:
            InvalidArgument: It is not from 1 to as many as there are workers.
        """
        check_int("task_count", task_count)
        if not 1 <= task_count <= self.max_workers:
            raise errors.InvalidArgument(
                f"task_count: must be from 1 to {self.max_workers}, got {task_count}"
            )
        self.allowed_count = task_count
        self._wake()

    def statistics(self) -> ProcessStatistics:
        """Give the counts as they are."""
        with self.backlog.lock:
            return ProcessStatistics(
                **self.backlog.counts(),
                workers_started=self._worker_counts["started"],
                workers_lost=self._worker_counts["lost"],
                taken_back=self._taken_back,
                copied_bytes=self._copied_bytes,
                lent_bytes=self._lent_bytes,
            )

    def _wake(self) -> None:
        if self._results is None or self._is_woken:
            return
        try:
            self._is_woken = True
            # It has ended if nobody receives any more.
            with contextlib.suppress(errors.Disconnected, errors.Closed):
                messages.send_head(self._waker, Head(WAKE))
        except BaseException:
            self._is_woken = False
            raise

    def _tell_of_end(self, number: int) -> None:
        with contextlib.suppress(errors.Disconnected, errors.Closed):
            messages.send_head(self._waker, Head(DIED, number))

    def _begin(self) -> None:
        if self.manager is not None:
            return
        results = SharedChannel.create(capacity_bytes=_RESULTS_BYTES)
        self._receiver, self._waker = results.receiver(), results.sender()
        self._results = results
        try:
            if self.settings.context.get_start_method() == "fork":
                # All of them now, before this starts threads: a fork has only the thread it is in.
                for seat in range(self.settings.max_workers):
                    self._start_worker(seat)
            self._watch = Watch(self._tell_of_end, f"{self.name}-watch")
            for worker in self.workers.values():
                self._watch.add(worker.number, worker.process)
            manager = threading.Thread(target=self._manage, name=self.name)
            manager.start()
            self.manager = manager
        except BaseException:
            for worker in self.workers.values():
                worker.close()
            if self._watch is not None:
                self._watch.stop()
            results.close()
            self._results = self._watch = None
            self.workers.clear()
            raise

    # === the manager ============================================================================

    def _manage(self) -> None:
        try:
            while self._dispatch():
                patience = None if self._short_since is None else _MEMORY_PROBE_SECONDS
                with contextlib.suppress(errors.Timeout):
                    for _ in range(_RESULTS_AT_ONCE):
                        head, packed = messages.receive(self._receiver, patience)
                        self._handle(head, packed)
                        del packed
                        patience = 0
        except BaseException as error:
            self._break(f"the thread that manages the workers failed: {error!r}")
            raise
        finally:
            self._end()

    def _end(self) -> None:
        assert self._watch is not None
        assert self._results is not None
        workers = [*self.workers.values(), *self._leaving.values()]
        for worker in workers:
            worker.close()
        for worker in workers:
            worker.process.join()
        # Nobody receives what the watch says, so it must not wait for room.
        self._receiver.close()
        self._watch.stop()
        self._results.close()
        self.workers.clear()
        self._leaving.clear()

    def _dispatch(self) -> bool:
        """Send tasks to workers; whether there is, or may be, anything to do."""
        self._is_woken = False
        self.backlog.sweep()
        self._rein()
        with self.backlog.lock:
            waiting_count, is_closed = len(self.backlog), self.is_closed
        if self.broken is not None:
            return False
        if waiting_count:
            self._start_workers()
            self._feed()
        else:
            self._share()
        return not is_closed or len(self.backlog) > 0 or self._has_tasks()

    def _allowed(self) -> list[Worker]:
        """The workers that may be given tasks: those that have some first."""
        workers = list(self.workers.values())
        if self.allowed_count == self.max_workers:
            return workers
        return sorted(workers, key=lambda worker: not worker.tasks)[: self.allowed_count]

    def _rein(self) -> None:
        """Take what they have not begun from those that may not be given tasks."""
        if self.allowed_count == self.max_workers:
            return
        allowed = self._allowed()
        for worker in self.workers.values():
            if worker not in allowed and len(worker.tasks) > worker.is_ready:
                self.backlog.put_back(list(iter(worker.take_back, None)))

    def _has_tasks(self) -> bool:
        return any(worker.tasks for worker in self.workers.values())

    def _takes_more(self, worker: Worker) -> bool:
        most = self.settings.max_tasks_per_child
        return most is None or worker.given_count < most

    def _start_workers(self) -> None:
        """As many as there are tasks that no worker is free for."""
        if len(self.workers) >= self.allowed_count:
            return
        assert self._watch is not None
        for seat in self._seats_to_fill():
            try:
                worker = self._start_worker(seat)
            except Exception as error:
                if not self.workers:
                    self._break(f"no worker process could be started: {error!r}")
                return
            self._watch.add(worker.number, worker.process)

    def _seats_to_fill(self) -> list[int]:
        """First those at nodes that tasks wait for, then others."""
        lacking = self.backlog.waiting_by_place()
        for worker in self.workers.values():
            lacking[worker.place] -= not worker.tasks
        taken = {worker.seat for worker in self.workers.values()}
        free = [seat for seat in range(self.settings.max_workers) if seat not in taken]
        places = {seat: self.settings.seats.workers[seat].place for seat in free}
        near = []
        for seat in free:
            if lacking[places[seat]] > 0:
                lacking[places[seat]] -= 1
                near.append(seat)
        far = [seat for seat in free if seat not in near]
        return near + far[: max(0, sum(lacking))]

    def _start_worker(self, seat: int) -> Worker:
        settings, number = self.settings, next(self._worker_numbers)
        at = settings.seats.workers[seat]
        assert self._results is not None
        calls = SharedChannel.create(capacity_bytes=_CALLS_BYTES)
        start = Start(
            number,
            calls,
            self._results,
            settings.memory_bytes,
            settings.max_tasks_per_child,
            at.cpus,
            settings.seats.node_ids[at.place],
            settings.blas_threads,
            settings.initializer,
            settings.initargs,
        )
        process = settings.context.Process(  # type: ignore[attr-defined]
            target=work, args=(start,), name=f"{self.name}_{number}"
        )
        worker = Worker(number, seat, at.place, process, calls, calls.sender())
        # Before it starts: a signal's exception may come when it has.
        self.workers[number] = worker
        try:
            process.start()
        except Exception:
            del self.workers[number]
            worker.close()
            raise
        self._worker_counts["started"] += 1
        return worker

    def _feed(self) -> None:
        workers = [
            worker
            for worker in self._allowed()
            if len(worker.tasks) < worker.calls_ahead and self._takes_more(worker)
        ]
        if not workers:
            return
        least = min(len(worker.tasks) for worker in workers)
        for depth in range(least + 1, max(worker.calls_ahead for worker in workers) + 1):
            self._fill(workers, depth, is_idle=False)
            if depth == 1 and len(self.backlog):
                self._fill(workers, depth, is_idle=True)
            if not len(self.backlog):
                return

    def _fill(self, workers: Sequence[Worker], depth: int, *, is_idle: bool) -> None:
        """See to it that workers have so many tasks, if there are for their nodes or they idle."""
        for worker in workers:
            most = min(depth, worker.calls_ahead)
            while len(worker.tasks) < most and self._takes_more(worker):
                task = self.backlog.take(worker.place, is_idle=is_idle)
                if task is None or not self._give(worker, task):
                    break

    def _give(self, worker: Worker, task: Task) -> bool:
        """Send a task to a worker, or be done with it; false if it is queued again."""
        if not task.is_running and not self.backlog.begin(task):
            return True
        try:
            self._send(worker, task.content, task.number)
        except (errors.Timeout, errors.OutOfMemory, errors.Disconnected) as error:
            if isinstance(error, errors.OutOfMemory) and not self._may_get_memory():
                self.backlog.fail(task, error)
                return True
            self.backlog.put_back([task])
            return False
        except Exception as error:
            self.backlog.fail(task, error)
            return True
        self._short_since = None
        worker.give(task)
        return True

    def _may_get_memory(self) -> bool:
        """Whether there may soon be more of it than now."""
        if self._has_tasks():
            self._short_since = None
            return True
        # A worker may be letting go of what it just sent. Nothing tells when it has: what lingered
        # at the last look, or at the attempt before the first, may be there for the next attempt.
        now = time.monotonic()
        if self._short_since is None:
            self._short_since, self._lingered = now, True
        lingered, self._lingered = self._lingered, self._placer.lingering_bytes > 0
        may = (lingered or self._lingered) and now - self._short_since < _MEMORY_SECONDS
        if not may:
            self._short_since = None
        return may

    def _send(self, worker: Worker, content: Content, number: int) -> None:
        head, inline_bytes = Head(CALL, worker.number, number), worker.calls.inline_bytes
        try:
            messages.send(worker.sender, head, content, self._placer, inline_bytes, 0)
        except errors.Timeout:
            if self._has_tasks():  # which will make room
                raise
            # No reference is left to lend its memory by: others have them.
            content = content._replace(lent=[False] * len(content.lent))
            messages.send(worker.sender, head, content, self._placer, inline_bytes, 0)
        if content.buffers:
            self._copied_bytes += content.copied_bytes
            self._lent_bytes += content.lent_bytes

    def _share(self) -> None:
        """Give an idle worker what another one has not begun."""
        idle = [
            worker
            for worker in self._allowed()
            if worker.is_ready and not worker.tasks and self._takes_more(worker)
        ]
        if not idle:
            return
        for worker in list(self.workers.values()):
            if len(worker.tasks) > worker.is_ready:
                task = worker.take_back()
                if task is not None:
                    self._taken_back += 1
                    self._give(idle.pop(), task)
                    if not idle:
                        return

    def _handle(self, head: Head, packed: Packed) -> None:
        if head.kind == WAKE:
            return
        if head.kind == DIED:
            self._bury(head.worker)
            return
        worker = self.workers[head.worker]
        if head.kind == READY:
            worker.is_ready = True
            self._early_deaths = 0
        elif head.kind == UNFIT:
            worker.is_unfit = True  # and it ends, once what it logs has gone out
        else:
            self._conclude(head.kind, worker.end(head.call), packed)
            if not worker.tasks and not self._takes_more(worker):
                self._leaving[worker.number] = self.workers.pop(worker.number)

    def _conclude(self, kind: int, task: Task, packed: Packed) -> None:
        for buffer in packed.buffers:
            if buffer.readonly:
                self._lent_bytes += len(buffer)
            else:
                self._copied_bytes += len(buffer)
        try:
            value = messages.load(packed)
        except BaseException as error:
            self.backlog.fail(task, with_cause(f"the result cannot be read: {error!r}", error))
            return
        if kind == RETURNED:
            self.backlog.over(task, "succeeded")
            task.future.set_result(value)
        elif kind == UNREADABLE:
            self.backlog.fail(
                task, with_cause(f"the worker cannot read the call: {value!r}", value)
            )
        else:
            assert kind == FAILED
            self.backlog.fail(task, value)

    def _bury(self, number: int) -> None:
        """A process has ended, and all that it sent was received."""
        worker = self.workers.pop(number, None)
        if worker is None:
            worker = self._leaving.pop(number)
        worker.process.join()
        # What is still in its channel it has not begun.
        with contextlib.suppress(errors.Disconnected):
            unbegun = list(iter(worker.take_back, None))
        worker.close()
        self.backlog.put_back(unbegun)
        for task in worker.tasks.values():
            self.backlog.fail(
                task, WorkerFailed(f"{end_of(worker.process)} while it had this call")
            )
        if worker.given_count != self.settings.max_tasks_per_child or worker.tasks:
            self._worker_counts["lost"] += 1
        if worker.is_unfit:
            self._break("the initializer failed in a worker process")
        elif not worker.is_ready:
            self._early_deaths += 1
            if self._early_deaths == _MOST_EARLY_DEATHS:
                self._break(f"{end_of(worker.process)} before it was ready, as did those before it")

    def _break(self, message: str) -> None:
        """Run nothing more."""
        with self.backlog.lock:
            self.broken = message
            tasks = self.backlog.clear()
        self.backlog.room.close()
        workers = [*self.workers.values(), *self._leaving.values()]
        for worker in workers:
            tasks += worker.tasks.values()
            worker.tasks.clear()
            worker.process.terminate()
        for task in tasks:
            if task.is_running or task.future.set_running_or_notify_cancel():
                self.backlog.fail(task, BrokenProcessPool(message))
            else:
                self.backlog.over(task, "cancelled")

    # === fork ===================================================================================

    def after_fork(self) -> None:
        """In a child: nothing is queued, nothing runs."""
        tasks = list(self.backlog)
        for worker in [*self.workers.values(), *self._leaving.values()]:
            tasks += worker.tasks.values()
        self._reset()
        for task in tasks:
            task.future.disconnect()


def _end_all() -> None:
    """Before the interpreter waits for its threads: what is queued is run, then workers end."""
    global _is_interpreter_ending
    _is_interpreter_ending = True
    pools = list(_pools)
    for pool in pools:
        pool.close()
    for pool in pools:
        pool.join()


def _after_fork_in_child() -> None:
    for pool in list(_pools):
        pool.after_fork()


# As concurrent.futures does, for the same reason: atexit comes after the threads were joined.
threading._register_atexit(_end_all)  # type: ignore[attr-defined]
os.register_at_fork(after_in_child=_after_fork_in_child)
