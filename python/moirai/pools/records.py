"""What pools report, as data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

__all__ = ["Acquisition", "PoolStatistics"]


@dataclass(frozen=True)
class PoolStatistics:
    """A snapshot of a pool's counters, taken at one moment.

    ``acquires == hits + misses``, always. When nothing is being made, reset or handed over at the
    moment, ``created - destroyed - leaked - detached == idle + in_use == permits``.

    Attributes:
        acquires: Items handed out.
        hits: Of those, items that were idle or came back just then.
        misses: Of those, items made for the caller.
        created: Items made, those of `prefill` included.
        destroyed: Items the pool gave up: trimmed, too old, unfit, or in surplus.
        factory_failures: Items that could not be made.
        reset_failures: Items given up because they could not be reset.
        validation_failures: Items given up because they were found unfit for another turn.
        destroy_failures: Items given up whose destruction raised; they are gone all the same.
        leaked: Items collected without having been released; their permits came back.
        detached: Items taken out for good by their users.
        exported: Buffers and vectors given up because they came back with views of them alive.
        oversize: Vectors given up because they had grown beyond their cap.
        waits: Acquires that had to wait.
        timeouts: Acquires that gave up, after a wait or at once.
        idle: Items at rest now.
        in_use: Items out now.
        peak_in_use: Most items out at once; of a pool with several size classes, the sum of their
            peaks.
        waiting: Callers that wait now.
        permits: Permits taken now.
    """

    acquires: int
    hits: int
    misses: int
    created: int
    destroyed: int
    factory_failures: int
    reset_failures: int
    validation_failures: int
    destroy_failures: int
    leaked: int
    detached: int
    exported: int
    oversize: int
    waits: int
    timeouts: int
    idle: int
    in_use: int
    peak_in_use: int
    waiting: int
    permits: int


def total(each: Iterable[PoolStatistics]) -> PoolStatistics:
    """Add the counters of several pools up."""
    found = list(each)
    return PoolStatistics(
        **{
            field.name: sum(getattr(statistics, field.name) for statistics in found)
            for field in fields(PoolStatistics)
        }
    )


@dataclass(frozen=True)
class Acquisition:
    """One item that is out.

    Attributes:
        kind: Name of the object's type; for a buffer, its size class.
        site: "file:line" that acquired it, outside installed packages where there is such a line;
            None unless the pool was made with ``track_sites=True``.
        held_seconds: How long it is out; None as for `site`.
    """

    kind: str
    site: str | None
    held_seconds: float | None
