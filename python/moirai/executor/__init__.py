"""Calls of functions by a set of workers: queued, stolen, awaited, cancelled and counted.

`Executor` is a `concurrent.futures.Executor` over threads, whose queues, workers and futures are
native; `ProcessExecutor` is one over processes, with calls and results in shared memory. Every
object here may be used by any number of threads at once, with or without the GIL. What a forked
child has is told in docs/executor.md.

`ProcessExecutor` and `ProcessStatistics` are looked up when asked for: processes need NumPy,
multiprocessing and shared channels, which an executor of threads does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moirai.executor.future import Future
from moirai.executor.group import TaskGroup
from moirai.executor.progress import Progress
from moirai.executor.statistics import (
    ExecutorStatistics,
    LatencyHistogram,
    NodeStatistics,
    WorkerStatistics,
)
from moirai.executor.threads import Executor
from moirai.executor.token import CancelToken, current_token
from moirai.memory import Priority

if TYPE_CHECKING:
    from moirai.executor.process_statistics import ProcessStatistics
    from moirai.executor.processes import ProcessExecutor

__all__ = [
    "CancelToken",
    "Executor",
    "ExecutorStatistics",
    "Future",
    "LatencyHistogram",
    "NodeStatistics",
    "Priority",
    "ProcessExecutor",
    "ProcessStatistics",
    "Progress",
    "TaskGroup",
    "WorkerStatistics",
    "current_token",
]


def __getattr__(name: str) -> Any:
    if name == "ProcessExecutor":
        from moirai.executor.processes import ProcessExecutor

        return ProcessExecutor
    if name == "ProcessStatistics":
        from moirai.executor.process_statistics import ProcessStatistics

        return ProcessStatistics
    raise AttributeError(f"module 'moirai.executor' has no attribute {name!r}")
