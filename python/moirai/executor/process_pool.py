"""What is behind a `ProcessExecutor`: the thread that manages its workers, and how they end."""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import os
import signal
import threading
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from moirai import errors
from moirai._arguments import check_int
from moirai.channels import SharedChannel, SharedReceiver, SharedSender
from moirai.executor import process_messages as messages
from moirai.executor.process_backlog import Backlog
from moirai.executor.process_crew import Crew
from moirai.executor.process_dispatch import Dispatch
from moirai.executor.process_messages import Head, Packed
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
    ASKS,
    BEGAN,
    CANCELLED,
    DIED,
    FAILED,
    LATE,
    NOT_BEGUN,
    READY,
    RETURNED,
    UNFIT,
    UNREADABLE,
    WAKE,
)
from moirai.executor.progress import Counter
from moirai.executor.remote import not_run_here
from moirai.executor.time_limits import late, not_begun

__all__ = ["ProcessPool"]

_RESULTS_BYTES = 1 << 20

_RESULTS_AT_ONCE = 16
"""Results that are taken, if they are there, until workers are given more."""

_MOST_EARLY_DEATHS = 3
"""Workers in a row that may end before they are ready, until the executor is broken."""

_MEMORY_PROBE_SECONDS = 0.005
"""How often to look for memory that nobody tells of."""

_LONGEST_WAIT_SECONDS = 3600.0

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
        self._crew = Crew(self.settings, self.name)
        self._dispatch = Dispatch(self.backlog, self._crew, self.settings.memory_bytes)
        self._task_numbers = itertools.count(1)
        self._early_deaths = 0
        self.is_closed = False
        self.broken: str | None = None
        self._is_woken = False
        # Workers and their calls, which somebody has cancelled after they began.
        self._asked: collections.deque[tuple[int, int]] = collections.deque()
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
        return self._crew.running_count

    @property
    def allowed_count(self) -> int:
        """How many workers may have tasks."""
        return self._crew.allowed_count

    @property
    def workers(self) -> dict[int, Worker]:
        """Those that may get tasks, by their numbers."""
        return self._crew.workers

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
        self._crew.allowed_count = task_count
        self._wake()

    def statistics(self) -> ProcessStatistics:
        """Give the counts as they are."""
        with self.backlog.lock:
            return ProcessStatistics(
                **self.backlog.counts(),
                workers_started=self._crew.started_count,
                workers_lost=self._crew.lost_count,
                workers_killed=self._crew.killed_count,
                taken_back=self._dispatch.taken_back,
                copied_bytes=self._dispatch.copied_bytes,
                lent_bytes=self._dispatch.lent_bytes,
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
                    self._crew.start(seat, results)
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
            self._crew.clear()
            raise

    # === the manager ============================================================================

    def _manage(self) -> None:
        try:
            while self._go_on():
                patience = self._patience()
                with contextlib.suppress(errors.Timeout):
                    for _ in range(_RESULTS_AT_ONCE):
                        head, packed = messages.receive(self._receiver, patience)
                        self._handle(head, packed)
                        del packed
                        if self.broken is not None:
                            break  # nobody has the tasks that the rest is about
                        patience = 0
        except BaseException as error:
            self._break(f"the thread that manages the workers failed: {error!r}")
            raise
        finally:
            self._end()

    def _end(self) -> None:
        assert self._watch is not None
        assert self._results is not None
        workers = list(self._crew)
        for worker in workers:
            worker.close()
        for worker in workers:
            worker.process.join()
        # Nobody receives what the watch says, so it must not wait for room.
        self._receiver.close()
        self._watch.stop()
        self._results.close()
        self._crew.clear()

    def _patience(self) -> float | None:
        """How long to wait for something to do; None: until it comes."""
        if self._dispatch.is_short_of_memory:
            return _MEMORY_PROBE_SECONDS
        if not self.backlog.has_time_limits:
            return None
        due = self.backlog.earliest_due()
        return min(max(due - time.monotonic(), 0.0), _LONGEST_WAIT_SECONDS)

    def _go_on(self) -> bool:
        """Send tasks to workers; whether there is, or may be, anything to do."""
        self._is_woken = False
        self._expire()
        self._ask()
        self.backlog.sweep()
        self._dispatch.rein()
        with self.backlog.lock:
            waiting_count, is_closed = len(self.backlog), self.is_closed
        if self.broken is not None:
            return False
        if waiting_count:
            self._start_workers()
            self._dispatch.feed()
        else:
            self._dispatch.share()
        return not is_closed or len(self.backlog) > 0 or self._crew.has_tasks

    def _start_workers(self) -> None:
        """As many as there are tasks that no worker is free for."""
        if self._crew.is_complete:
            return
        assert self._watch is not None
        assert self._results is not None
        for seat in self._crew.seats_to_fill(self.backlog.waiting_by_place()):
            try:
                worker = self._crew.start(seat, self._results)
            except Exception as error:
                if not self.workers:
                    self._break(f"no worker process could be started: {error!r}")
                return
            self._watch.add(worker.number, worker.process)

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
        elif head.kind == BEGAN:
            self.backlog.note_begin(worker.tasks[head.call], messages.load(packed))
        elif head.kind == ASKS:
            note = functools.partial(self._note_asked, worker.number, head.call)
            worker.tasks[head.call].future.call_when_asked(note)
        elif head.kind == UNFIT:
            worker.is_unfit = True  # and it ends, once what it logs has gone out
        else:
            self._conclude(head.kind, worker.end(head.call), packed)
            if not worker.tasks and not self._crew.takes_more(worker):
                self._crew.let_go(worker)

    def _conclude(self, kind: int, task: Task, packed: Packed) -> None:
        for buffer in packed.buffers:
            if buffer.readonly:
                self._dispatch.lent_bytes += len(buffer)
            else:
                self._dispatch.copied_bytes += len(buffer)
        if task.is_late:
            return
        if kind == LATE:
            self.backlog.expire(task, late("its call has ended"))
            return
        if kind == NOT_BEGUN:
            self.backlog.expire(task, not_begun())
            return
        if kind == CANCELLED:
            self.backlog.over(task, "cancelled")
            task.future.set_cancelled()
            return
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
        worker = self._crew.take_out(number)
        worker.process.join()
        # What is still in its channel it has not begun.
        with contextlib.suppress(errors.Disconnected):
            unbegun = list(iter(worker.take_back, None))
        worker.close()
        self.backlog.put_back(unbegun)
        is_killed = (
            worker.process.exitcode == -signal.SIGALRM
            and self.settings.kill_after_seconds is not None
            and any(task.is_begun for task in worker.tasks.values())
        )
        for task in worker.tasks.values():
            if is_killed and not task.is_late:
                self.backlog.expire(task, late(self._what_then()))
            elif not task.is_late:
                self.backlog.fail(
                    task, WorkerFailed(f"{end_of(worker.process)} while it had this call")
                )
        if is_killed:
            self._crew.killed_count += 1
        elif worker.given_count != self.settings.max_tasks_per_child or worker.tasks:
            self._crew.lost_count += 1
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
        for worker in self._crew:
            tasks += worker.tasks.values()
            worker.tasks.clear()
            worker.process.terminate()
        for task in tasks:
            if task.is_late:
                continue
            if task.is_running or task.future.set_running_or_notify_cancel():
                self.backlog.fail(task, BrokenProcessPool(message))
            else:
                self.backlog.over(task, "cancelled")

    # === time limits, and asking to end =========================================================

    def _expire(self) -> None:
        """Fail those tasks whose time is over."""
        if not self.backlog.has_time_limits:
            return
        now = time.monotonic()
        while (task := self.backlog.take_due(now)) is not None:
            # A worker may have begun its first without having said so yet.
            firsts = [next(iter(worker.tasks.values()), None) for worker in self._crew]
            if task.is_begun:
                error = late(self._what_then())
            elif task in firsts:
                error = late("its call is not begun, or goes on")
            else:
                error = not_begun()
            self.backlog.expire(task, error)

    def _what_then(self) -> str:
        seconds = self.settings.kill_after_seconds
        if seconds is None:
            return "its call goes on"
        return "its worker is killed" if not seconds else f"its worker is killed in {seconds} s"

    def _note_asked(self, number: int, call: int, future: Future[Any]) -> None:
        """Somebody has cancelled a call that a worker has begun."""
        self._asked.append((number, call))
        self._wake()

    def _ask(self) -> None:
        while self._asked:
            self._crew.ask(*self._asked.popleft())

    # === fork ===================================================================================

    def after_fork(self) -> None:
        """In a child: nothing is queued, nothing runs."""
        tasks = list(self.backlog)
        for worker in self._crew:
            tasks += worker.tasks.values()
        self._reset()
        for task in tasks:
            task.future.disconnect(not_run_here())


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
    global _is_interpreter_ending
    _is_interpreter_ending = False  # the child's has just begun, a worker's for instance
    for pool in list(_pools):
        pool.after_fork()


# As concurrent.futures does, for the same reason: atexit comes after the threads were joined.
threading._register_atexit(_end_all)  # type: ignore[attr-defined]
os.register_at_fork(after_in_child=_after_fork_in_child)
