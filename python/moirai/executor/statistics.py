"""Counts of an executor and its workers."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ExecutorStatistics", "WorkerStatistics"]


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
    """

    node: int
    from_lanes: int
    from_own: int
    stolen_same_node: int
    stolen_cross_node: int
    failed_steals: int
    parks: int
    wakes: int


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
    workers: tuple[WorkerStatistics, ...]

    @property
    def locality_ratio(self) -> float:
        """Share of stolen tasks that came from the thief's own node; 1.0 if none was stolen."""
        same = sum(worker.stolen_same_node for worker in self.workers)
        cross = sum(worker.stolen_cross_node for worker in self.workers)
        return same / (same + cross) if same + cross else 1.0
