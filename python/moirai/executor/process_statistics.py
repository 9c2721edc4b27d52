"""Counts of an executor of processes."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ProcessStatistics"]


@dataclass(frozen=True)
class ProcessStatistics:
    """Counts since the executor was made, or since the fork in a child.

    When nothing is queued or running, ``submitted == succeeded + failed + cancelled``.

    Attributes:
        submitted: Tasks that were queued.
        succeeded: Tasks that returned; a chunk of `map` is one task.
        failed: Tasks that raised, or whose worker died.
        cancelled: Tasks that were cancelled before they were sent to a worker, or ended for that.
        timed_out: Tasks whose time was over, within those that failed.
        ran_by_submitter: Tasks that their submitter ran for want of room, within those that ended.
        refused: Tasks that were not queued for want of room.
        workers_started: Processes that were started.
        workers_lost: Processes that ended although nobody asked them to.
        workers_killed: Processes that were killed as a call did not end when its time was over.
        taken_back: Tasks that a worker had not begun when another one was idle, which got them.
        queued: Tasks that no worker has yet.
        copied_bytes: Bytes of arrays and other buffers in calls and results that were copied to
            be sent; again for a call that was taken back.
        lent_bytes: Bytes of those that were sent by reference.
    """

    submitted: int
    succeeded: int
    failed: int
    cancelled: int
    timed_out: int
    ran_by_submitter: int
    refused: int
    workers_started: int
    workers_lost: int
    workers_killed: int
    taken_back: int
    queued: int
    copied_bytes: int
    lent_bytes: int
