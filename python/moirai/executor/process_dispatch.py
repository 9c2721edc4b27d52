"""Which worker process gets which call, and when."""

from __future__ import annotations

import time
from collections.abc import Sequence

from moirai import errors
from moirai.executor import process_messages as messages
from moirai.executor.process_backlog import Backlog
from moirai.executor.process_crew import Crew
from moirai.executor.process_messages import Content, Head, Placer
from moirai.executor.process_parts import Task, Worker
from moirai.executor.process_worker import CALL

__all__ = ["Dispatch"]

_MEMORY_SECONDS = 1.0
"""How long to wait for memory that processes which run nothing have."""


class Dispatch:
    """Gives the tasks of a backlog to the workers of a crew. For one thread at a time.

    A forked child makes its own.

    Args:
        backlog: What waits.
        crew: Who may get it.
        memory_bytes: How much shared memory calls on their way may take.
    """

    def __init__(self, backlog: Backlog, crew: Crew, memory_bytes: int) -> None:
        self._backlog, self._crew = backlog, crew
        self._placer = Placer(memory_bytes)
        self._short_since: float | None = None
        self._lingered = False
        self.taken_back = self.copied_bytes = self.lent_bytes = 0

    @property
    def is_short_of_memory(self) -> bool:
        """Whether a call waits for memory that nobody tells of when it is there."""
        return self._short_since is not None

    def rein(self) -> None:
        """Take what they have not begun from those that may not be given tasks."""
        if not self._crew.is_limited:
            return
        allowed = self._crew.allowed()
        for worker in self._crew.workers.values():
            if worker not in allowed and len(worker.tasks) > worker.is_ready:
                self._backlog.put_back(list(iter(worker.take_back, None)))

    def feed(self) -> None:
        """Send tasks that wait, to those that have the fewest first."""
        workers = [
            worker
            for worker in self._crew.allowed()
            if len(worker.tasks) < worker.calls_ahead and self._crew.takes_more(worker)
        ]
        if not workers:
            return
        least = min(len(worker.tasks) for worker in workers)
        for depth in range(least + 1, max(worker.calls_ahead for worker in workers) + 1):
            self._fill(workers, depth, is_idle=False)
            if depth == 1 and len(self._backlog):
                self._fill(workers, depth, is_idle=True)
            if not len(self._backlog):
                return

    def share(self) -> None:
        """Give an idle worker what another one has not begun."""
        idle = [
            worker
            for worker in self._crew.allowed()
            if worker.is_ready and not worker.tasks and self._crew.takes_more(worker)
        ]
        if not idle:
            return
        for worker in list(self._crew.workers.values()):
            if len(worker.tasks) > worker.is_ready:
                task = worker.take_back()
                if task is not None:
                    self.taken_back += 1
                    self._give(idle.pop(), task)
                    if not idle:
                        return

    def _fill(self, workers: Sequence[Worker], depth: int, *, is_idle: bool) -> None:
        """See to it that workers have so many tasks, if there are for their nodes or they idle."""
        for worker in workers:
            most = min(depth, worker.calls_ahead)
            while len(worker.tasks) < most and self._crew.takes_more(worker):
                task = self._backlog.take(worker.place, is_idle=is_idle)
                if task is None or not self._give(worker, task):
                    break

    def _give(self, worker: Worker, task: Task) -> bool:
        """Send a task to a worker, or be done with it; false if it is queued again."""
        if task.is_late or (not task.is_running and not self._backlog.begin(task)):
            return True
        try:
            self._send(worker, task.content, task.number)
        except (errors.Timeout, errors.OutOfMemory, errors.Disconnected) as error:
            if isinstance(error, errors.OutOfMemory) and not self._may_get_memory():
                self._backlog.fail(task, error)
                return True
            self._backlog.put_back([task])
            return False
        except Exception as error:
            self._backlog.fail(task, error)
            return True
        self._short_since = None
        worker.give(task)
        return True

    def _may_get_memory(self) -> bool:
        """Whether there may soon be more of it than now."""
        if self._crew.has_tasks:
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
            if self._crew.has_tasks:  # which will make room
                raise
            # No reference is left to lend its memory by: others have them.
            content = content._replace(lent=[False] * len(content.lent))
            messages.send(worker.sender, head, content, self._placer, inline_bytes, 0)
        if content.buffers:
            self.copied_bytes += content.copied_bytes
            self.lent_bytes += content.lent_bytes
