"""Counts of an executor and its workers."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass

from moirai.errors import InvalidArgument

__all__ = ["ExecutorStatistics", "LatencyHistogram", "WorkerStatistics"]


@dataclass(frozen=True)
class LatencyHistogram:
    """How often something took how long.

    Attributes:
        counts: Place n has how many took from ``2**(n-1)`` to below ``2**n`` nanoseconds; the last
            place all that took longer.
    """

    counts: tuple[int, ...]

    @property
    def total(self) -> int:
        """How many were counted."""
        return sum(self.counts)

    def at_most_seconds(self, share: float) -> float:
        """Within which time so many were over: the upper end of the place that reaches the share.

        Args:
            share: Of all that were counted, in [0, 1].

        Returns:
            Seconds, up to twice the exact quantile; infinity in the last place, 0.0 without counts.

        Raises:
            InvalidArgument: `share` is outside its range.
        """
        if not 0.0 <= share <= 1.0:
            raise InvalidArgument(f"share: must be from 0 to 1, got {share}")
        wanted, seen = share * self.total, 0
        for place, count in enumerate(self.counts):
            seen += count
            if count and seen >= wanted:
                return math.inf if place == len(self.counts) - 1 else 2**place / 1e9
        return 0.0

    def __add__(self, other: LatencyHistogram) -> LatencyHistogram:
        return LatencyHistogram(tuple(map(operator.add, self.counts, other.counts)))


@dataclass(frozen=True)
class WorkerStatistics:
    """What one worker has done, and how it came by it.

    Attributes:
        node: The node it belongs to, by its place among the executor's nodes.
        from_lanes: Tasks that it took from the lanes that outsiders queue in.
        from_own: Tasks that it took from its own deque.
        stolen_same_node: Tasks stolen from a worker of its node.
        stolen_cross_node: Tasks stolen from a worker of another node.
        failed_steals: Looks at all the other workers' deques that found nothing.
        parks: Times it went to sleep.
        wakes: Times it was woken.
        queued: Entries in its own deque now, those of tasks that are over included.
        waits: From the submission of a task that it ran to its start, if that is measured.
        runs: From the start of a task that it ran to its end, if that is measured.
    """

    node: int
    from_lanes: int
    from_own: int
    stolen_same_node: int
    stolen_cross_node: int
    failed_steals: int
    parks: int
    wakes: int
    queued: int
    waits: LatencyHistogram | None
    runs: LatencyHistogram | None


@dataclass(frozen=True)
class ExecutorStatistics:
    """Counts since the executor was made, or since the fork in a child.

    When nothing is queued or running, ``submitted == succeeded + failed + cancelled``.

    Attributes:
        submitted: Tasks that were queued.
        succeeded: Tasks that returned; a chunk of `map` is one task.
        failed: Tasks that raised.
        cancelled: Tasks that were cancelled before they began.
        helped: Tasks that ran in a thread that waited, within those that ended.
        timed_out: Tasks whose time was over, within those that failed.
        ran_by_submitter: Tasks that their submitter ran for want of room, within those that ended.
        refused: Tasks that were not queued for want of room.
        workers_started: Threads that were started.
        queued: Entries in the queues now, those of tasks that are over included.
        queued_by_node: The same in the lanes of each node, one for each priority.
        waits: From a task's submission to its start, over all threads, if that is measured.
        runs: From a task's start to its end, likewise.
        workers: What each worker has done.
    """

    submitted: int
    succeeded: int
    failed: int
    cancelled: int
    helped: int
    timed_out: int
    ran_by_submitter: int
    refused: int
    workers_started: int
    queued: int
    queued_by_node: tuple[tuple[int, ...], ...]
    waits: LatencyHistogram | None
    runs: LatencyHistogram | None
    workers: tuple[WorkerStatistics, ...]

    @property
    def success_ratio(self) -> float:
        """Share of the tasks that were run, or whose time was over, that returned; 1.0 if none."""
        ended = self.succeeded + self.failed
        return self.succeeded / ended if ended else 1.0

    @property
    def locality_ratio(self) -> float:
        """Share of stolen tasks that came from the thief's own node; 1.0 if none was stolen."""
        same = sum(worker.stolen_same_node for worker in self.workers)
        cross = sum(worker.stolen_cross_node for worker in self.workers)
        return same / (same + cross) if same + cross else 1.0
