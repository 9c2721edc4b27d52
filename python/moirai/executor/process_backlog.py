"""Tasks of a `ProcessExecutor` that no worker has yet, and counts of all of them."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

from moirai.errors import Timeout
from moirai.executor.lanes import NodeLanes
from moirai.executor.process_deadlines import Deadlines
from moirai.executor.process_parts import Settings, Task
from moirai.executor.progress import Counter
from moirai.executor.room import Room

__all__ = ["Backlog"]

_COUNTS = (
    "submitted",
    "succeeded",
    "failed",
    "cancelled",
    "timed_out",
    "ran_by_submitter",
    "refused",
)

_MANY_CANCELLED = 64
"""So many tasks that are over may lie in the lanes, or half as many as there are others."""


class Backlog:
    """Queues tasks and counts them. Any thread may use it; a forked child makes its own.

    Args:
        settings: Those of the executor.
        counter: What shows its progress.
        wake: A method, called when many of the tasks are over, for somebody to `sweep`.
    """

    def __init__(self, settings: Settings, counter: Counter, wake: Callable[[], None]) -> None:
        # Reentrant: dropping an object may call back in the thread that drops it.
        self.lock = threading.RLock()
        self.room = Room(settings.max_pending)
        self._is_bounded = settings.max_pending is not None
        self._counter = counter
        # Futures, which anybody may keep, have this to call back; it must not keep processes.
        self._wake = weakref.WeakMethod(wake)
        self._lanes: NodeLanes[Task] = NodeLanes(settings.seats.steal_order, settings.seats.places)
        self._cancelled_count = 0
        self._deadlines = Deadlines()
        self._counts = dict.fromkeys(_COUNTS, 0)

    # === waiting ================================================================================

    def add(self, tasks: Sequence[Task], numbers: Iterator[int], failed_count: int) -> None:
        """Queue tasks, with the lock held; `watch` them without.

        Args:
            tasks: What is to be queued.
            numbers: What to number them with.
            failed_count: How many more there were, that could not be pickled.
        """
        call_count = 0
        for task in tasks:
            task.number = next(numbers)
            if task.limits is not None:
                task.due = task.limits.deadline
                self._deadlines.put(task)
            task.place = self._lanes.append(task, task.priority, task.place)
            call_count += task.call_count
        self._counts["submitted"] += len(tasks) + failed_count
        self._counts["failed"] += failed_count
        self._counter.add(call_count)

    def watch(self, tasks: Sequence[Task]) -> None:
        """See to it that tasks which are cancelled give their room back, and are not waited for."""
        for task in tasks:
            if self._is_bounded or task.limits is not None:
                task.future.add_done_callback(functools.partial(self._note_cancelled, task))

    def put_back(self, tasks: Sequence[Task]) -> None:
        """Queue tasks that were taken before all others, the first of them first."""
        with self.lock:
            for task in reversed(tasks):
                assert task.place is not None, "it was queued before"
                self._lanes.put_back(task, task.priority, task.place)

    def take(self, place: int, *, is_idle: bool) -> Task | None:
        """Take the next task for a worker of a node, another node's only for one that is idle."""
        with self.lock:
            return self._lanes.pop(place, from_others=is_idle)

    def clear(self) -> list[Task]:
        """Take all of them."""
        with self.lock:
            return self._lanes.clear()

    def cancel(self) -> None:
        """Cancel all that can be."""
        with self.lock:
            tasks = self._lanes.clear()
            # Those that a worker gave back stay: the executor ends once nothing waits.
            for task in tasks:
                if task.is_running and not task.is_late:
                    self._lanes.append(task, task.priority, task.place)
        for task in tasks:
            if not task.is_running and task.future.cancel():
                self.drop(task)

    def sweep(self) -> None:
        """Take those that were cancelled, or are late, out of the lanes, if they are many."""
        if not self._cancelled_count:
            return
        with self.lock:
            if not self._are_many_cancelled():
                return
            self._cancelled_count = 0
            cancelled = []
            for task in self._lanes.clear():
                if task.future.cancelled():
                    cancelled.append(task)
                elif not task.is_late:
                    self._lanes.append(task, task.priority, task.place)
        for task in cancelled:
            self.drop(task)

    def waiting_by_place(self) -> list[int]:
        """How many wait at each node."""
        with self.lock:
            return list(map(len, self._lanes.by_place))

    def __iter__(self) -> Iterator[Task]:
        return iter(self._lanes)

    def __len__(self) -> int:
        return len(self._lanes)

    def _note_cancelled(self, task: Task, future: Future[Any]) -> None:
        """A task is over: if it was cancelled, nobody has to wait for its room."""
        if not future.cancelled():
            return
        self.give_back_room(task)
        with self.lock:
            self._deadlines.drop(task)
            self._cancelled_count += 1
            are_many = self._are_many_cancelled()
        wake = self._wake() if are_many else None
        if wake is not None:
            wake()

    def _are_many_cancelled(self) -> bool:
        return self._cancelled_count > max(_MANY_CANCELLED, len(self._lanes) // 2)

    def give_back_room(self, task: Task) -> None:
        """A task waits no more: others may."""
        with self.lock:
            had_room, task.has_room = task.has_room, False
        if had_room:
            self.room.give_back(1)

    # === time limits ============================================================================

    def note_begin(self, task: Task, begun: float) -> None:
        """A worker has begun a task that has time limits."""
        assert task.limits is not None, "nothing else is told of"
        task.is_begun = True
        with self.lock:
            task.due = task.limits.due(begun)
            if not task.is_late:
                self._deadlines.put(task)

    @property
    def has_time_limits(self) -> bool:
        """Whether any task is to end by some moment."""
        return len(self._deadlines) > 0

    def earliest_due(self) -> float:
        """When the time of the next task is over; infinity: none has a limit."""
        with self.lock:
            return self._deadlines.earliest()

    def take_due(self, now: float) -> Task | None:
        """Take a task whose time is over."""
        with self.lock:
            return self._deadlines.take(now)

    def expire(self, task: Task, error: Timeout) -> None:
        """The time of a task is over: it fails, now, whoever has it; not if it was cancelled."""
        if not task.is_running:
            if not task.future.set_running_or_notify_cancel():
                return  # and is counted when it comes out of its lane
            self.give_back_room(task)
            with self.lock:
                self._cancelled_count += 1  # no less in the way
        task.is_late = True
        self.count(timed_out=1)
        self.fail(task, error)

    # === counting ===============================================================================

    def count(self, **more: int) -> None:
        """Add to the counts."""
        with self.lock:
            for name, number in more.items():
                self._counts[name] += number

    def counts(self) -> dict[str, int]:
        """Give them as they are."""
        with self.lock:
            return {**self._counts, "queued": len(self._lanes)}

    def begin(self, task: Task) -> bool:
        """A worker is to get a task; false if it was cancelled."""
        self.give_back_room(task)
        task.is_running = task.future.set_running_or_notify_cancel()
        if not task.is_running:
            self.over(task, "cancelled")
        return task.is_running

    def drop(self, task: Task) -> None:
        """Tell those who wait for a task that was cancelled."""
        task.future.set_running_or_notify_cancel()
        self.over(task, "cancelled")

    def fail(self, task: Task, error: BaseException) -> None:
        """A task has failed."""
        self.over(task, "failed")
        task.future.set_exception(error)

    def over(self, task: Task, count: str) -> None:
        """Count a task that has ended."""
        with self.lock:
            self._counts[count] += 1
            if task.limits is not None:
                self._deadlines.drop(task)
        self._counter.complete(task.call_count)
