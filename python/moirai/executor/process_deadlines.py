"""The moments at which the time of tasks is over."""

from __future__ import annotations

import heapq
import math

from moirai.executor.process_parts import Task

__all__ = ["Deadlines"]

_SPARE_ENTRIES = 64


class Deadlines:
    """Keeps tasks until their time is over. For one thread at a time."""

    def __init__(self) -> None:
        self._tasks: dict[int, Task] = {}
        # Moments and tasks' numbers; those of tasks that were dropped or moved are left there.
        self._entries: list[tuple[float, int]] = []

    def __len__(self) -> int:
        return len(self._tasks)

    def put(self, task: Task) -> None:
        """Keep a task until it is due, which may have changed."""
        if task.due == math.inf:
            return
        self._tasks[task.number] = task
        heapq.heappush(self._entries, (task.due, task.number))
        if len(self._entries) > 2 * len(self._tasks) + _SPARE_ENTRIES:
            self._entries = [(kept.due, number) for number, kept in self._tasks.items()]
            heapq.heapify(self._entries)

    def drop(self, task: Task) -> None:
        """A task has ended."""
        self._tasks.pop(task.number, None)

    def earliest(self) -> float:
        """When the next of them is due; infinity: none is."""
        while self._entries:
            due, number = self._entries[0]
            task = self._tasks.get(number)
            if task is not None and task.due == due:
                return due
            heapq.heappop(self._entries)
        return math.inf

    def take(self, until: float) -> Task | None:
        """Take one that is due by a moment."""
        if self.earliest() > until:
            return None
        _, number = heapq.heappop(self._entries)
        return self._tasks.pop(number)
