"""Counts of an executor and its workers."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

from moirai._arguments import check_number
from moirai.errors import InvalidArgument

__all__ = ["ExecutorStatistics", "LatencyHistogram", "NodeStatistics", "WorkerStatistics"]


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
        check_number("share", share)
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
        executed: Tasks that it began to run; what it took may be over already, or run by who waits.
        from_lanes: Tasks that it took from the lanes that outsiders queue in.
        from_own: Tasks that it took from its own deque.
        stolen_same_node: Steals from a worker of its node, a task each.
        stolen_cross_node: Steals from a worker of another node. Up to half of what that one has
            queued comes along into the thief's deque, and is counted when it is taken from there.
        failed_steals: Looks at all the other workers' deques that found nothing.
        parks: Times it went to sleep.
        wakes: Times it was woken.
        queued: Entries in its own deque now, those of tasks that are over included.
        waits: From the submission of a task that it ran to its start, if that is measured.
        runs: From the start of a task that it ran to its end, if that is measured.
    """

    node: int
    executed: int
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
class NodeStatistics:
    """What the workers of one node have done: the sums of their counts.

    Attributes:
        id: What the machine calls the node; its place is that of `WorkerStatistics.node`.
        worker_count: How many workers belong to it, started or not.
        executed: Tasks that they began to run.
        from_lanes: Tasks that they took from the lanes of any node.
        from_own: Tasks that they took from their own deques.
        stolen_same_node: Steals from each other.
        stolen_cross_node: Steals from workers of other nodes.
        failed_steals: Looks at all the other workers' deques that found nothing.
        parks: Times one of them went to sleep.
        wakes: Times one of them was woken.
        queued: Entries in its lanes and its workers' deques now, those of tasks that are over
            included.
    """

    id: int
    worker_count: int
    executed: int
    from_lanes: int
    from_own: int
    stolen_same_node: int
    stolen_cross_node: int
    failed_steals: int
    parks: int
    wakes: int
    queued: int

    @property
    def locality_ratio(self) -> float:
        """Share of its workers' steals that were from each other; 1.0 without steals."""
        return _share(self.stolen_same_node, self.stolen_cross_node)


def sum_by_node(
    ids: Sequence[int],
    workers: Iterable[WorkerStatistics],
    queued_by_node: Iterable[Iterable[int]],
) -> tuple[NodeStatistics, ...]:
    """The counts of each node, by the ids of the nodes in the order of their places."""
    nodes = []
    members = list(workers)
    for place, (id_, lanes) in enumerate(zip(ids, queued_by_node, strict=True)):
        own = [worker for worker in members if worker.node == place]
        sums = {name: sum(getattr(worker, name) for worker in own) for name in _SUMMED}
        sums["queued"] += sum(lanes)
        nodes.append(NodeStatistics(id=id_, worker_count=len(own), **sums))
    return tuple(nodes)


_SUMMED = tuple(
    field.name for field in fields(NodeStatistics) if field.name not in ("id", "worker_count")
)


def _share(same: int, cross: int) -> float:
    return same / (same + cross) if same + cross else 1.0


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
        nodes: What the workers of each node have done together.
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
    nodes: tuple[NodeStatistics, ...]

    @property
    def success_ratio(self) -> float:
        """Share of the tasks that were run, or whose time was over, that returned; 1.0 if none."""
        ended = self.succeeded + self.failed
        return self.succeeded / ended if ended else 1.0

    @property
    def locality_ratio(self) -> float:
        """Share of steals that were from the thief's own node; 1.0 without steals."""
        same = sum(worker.stolen_same_node for worker in self.workers)
        cross = sum(worker.stolen_cross_node for worker in self.workers)
        return _share(same, cross)
