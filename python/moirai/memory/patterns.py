"""What a program asks of memory: how often, how much, for how long, from how many threads."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from moirai import _native

__all__ = ["ClassPattern", "PatternAdaptor"]


@dataclass(frozen=True, slots=True)
class ClassPattern:
    """What was asked for in one size class: one for each doubling, from 64 bytes.

    Requests, bytes and threads are exact; the rest is of the blocks that were sampled.

    Attributes:
        max_bytes: Largest size of the class; the smallest is half of it plus one.
        requests: Requests so far.
        bytes: Bytes asked for; up to 16 KiB each request is rounded up to a multiple of 64.
        threads: Threads that asked; threads one after another may count as one.
        ended: Sampled blocks that were freed.
        ended_elsewhere: Of those, freed by another thread than the one that asked.
        spans: (microseconds, count): freed blocks that lived for less than so long, and at least
            half of it.
        outlived: Sampled blocks that were still out when watching them ended.
        open: Sampled blocks that are out and watched.
    """

    max_bytes: int
    requests: int
    bytes: int
    threads: int
    ended: int
    ended_elsewhere: int
    spans: list[tuple[int, int]]
    outlived: int
    open: int

    @property
    def median_lifetime_seconds(self) -> float | None:
        """A time that half of the sampled blocks did not live to see, to within a factor of two.

        Blocks that are out count as longer-lived than any that ended. None if half of them are, or
        none was sampled.
        """
        half = (self.ended + self.outlived + self.open) / 2
        seen = 0
        for microseconds, count in self.spans:
            seen += count
            if seen >= half:
                return microseconds / 1e6
        return None


def class_patterns(noted: Iterable[dict[str, Any]]) -> list[ClassPattern]:
    """The native records as dataclasses."""
    return [ClassPattern(**record) for record in noted]


class PatternAdaptor(_native.PatternAdaptor):
    """Notes the pattern of what passes through it on the way to `upstream`.

    Every request is counted by size; samples, more of them while there is little traffic, show how
    long blocks live and which threads free them. `SlabResource.tune` takes what it saw.

    Args:
        upstream: The resource to draw from.
    """

    def classes(self) -> list[ClassPattern]:
        """Every size class that was asked for, the smallest first."""
        return class_patterns(self.class_patterns())
