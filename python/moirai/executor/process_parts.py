"""What the pool of a `ProcessExecutor` keeps: its settings, its tasks, its workers."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Any

from moirai import errors
from moirai.channels import SharedChannel, SharedSender
from moirai.executor import process_messages as messages
from moirai.executor.future import Future
from moirai.executor.process_messages import Content
from moirai.executor.room import WhenFull
from moirai.executor.sizing import Seats
from moirai.executor.time_limits import TimeLimits
from moirai.memory import Priority

__all__ = ["Settings", "Task", "Worker", "WorkerFailed", "end_of", "with_cause"]


_LEAST_AHEAD = 3
_MOST_AHEAD = 32
_WORTH_SECONDS = 4e-3
"""Tasks that a worker has at once: so many, or what it runs in that time."""


class WorkerFailed(errors.WorkerFailed, BrokenProcessPool):
    """What `errors.WorkerFailed` is, for code that knows concurrent.futures' exception."""


@dataclass(frozen=True)
class Settings:
    """What a `ProcessExecutor` was made with."""

    seats: Seats
    context: BaseContext
    initializer: Callable[..., object] | None
    initargs: tuple[Any, ...]
    max_tasks_per_child: int | None
    memory_bytes: int
    blas_threads: int | None
    max_pending: int | None
    when_full: WhenFull
    kill_after_seconds: float | None

    @property
    def max_workers(self) -> int:
        """How many tasks run at once, at most."""
        return len(self.seats.workers)


@dataclass(eq=False, slots=True)
class Task:
    """A call, or several in a chunk, on the way to its result."""

    future: Future[Any]
    content: Content
    priority: Priority
    call_count: int = 1
    place: int | None = None
    number: int = 0
    limits: TimeLimits | None = None
    due: float = math.inf
    """When its time is over, as far as that is known: a worker says when it began."""
    is_running: bool = False
    """Whether it was sent to a worker, once at least."""
    is_begun: bool = False
    is_late: bool = False
    """Whether its time was over before its end was known: nothing more comes of it."""
    has_room: bool = False


@dataclass(eq=False)
class Worker:
    """A process, and the tasks that were sent to it and are not over."""

    number: int
    seat: int
    place: int
    process: BaseProcess
    calls: SharedChannel
    sender: SharedSender
    tasks: dict[int, Task] = field(default_factory=dict)
    given_count: int = 0
    is_ready: bool = False
    is_unfit: bool = False
    calls_ahead: int = _LEAST_AHEAD
    """Tasks that it is to have at once: more where they are so short that it would wait."""
    _since: float = 0.0
    _call_seconds: float = _WORTH_SECONDS

    def give(self, task: Task) -> None:
        """Note that a task was sent to it."""
        if not self.tasks:
            self._since = time.perf_counter()
        self.tasks[task.number] = task
        self.given_count += 1

    def end(self, number: int) -> Task:
        """Note that a task of its own is over: it."""
        now = time.perf_counter()
        self._call_seconds += (now - self._since - self._call_seconds) / 4
        self._since = now
        worth = _WORTH_SECONDS / max(self._call_seconds, _WORTH_SECONDS / _MOST_AHEAD)
        self.calls_ahead = max(_LEAST_AHEAD, int(worth))
        return self.tasks.pop(number)

    def take_back(self) -> Task | None:
        """Take the next task that the process has not taken out of its channel."""
        with self.calls.receiver() as receiver, contextlib.suppress(errors.Timeout):
            head, _ = messages.receive(receiver, 0)
            self.given_count -= 1
            return self.tasks.pop(head.call)
        return None

    def close(self) -> None:
        """Tell the process that nothing more will come."""
        self.calls.close()


def with_cause(message: str, cause: BaseException) -> WorkerFailed:
    """Make a failure that has a cause."""
    error = WorkerFailed(message)
    error.__cause__ = cause
    return error


def end_of(process: BaseProcess) -> str:
    """Say how a process that was joined has ended."""
    code = process.exitcode
    if code is not None and code < 0:
        try:
            how = f"was killed by {signal.Signals(-code).name}"
        except ValueError:
            how = f"was killed by signal {-code}"
    else:
        how = f"ended with status {code}"
    return f"the worker process {process.pid} {how}"
