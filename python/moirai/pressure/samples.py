"""What one reading of memory use says, and what may stand in for the kernel."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from moirai._arguments import LARGEST_FLOAT, check_number, path_text
from moirai.errors import InvalidArgument

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator
    from pathlib import Path

__all__ = ["Bound", "ReadsSamples", "Sample", "TraceSource"]

_BYTES_END = 1 << 64


@dataclass(frozen=True)
class Sample:
    """One reading: how much is used of the limit with the least room left.

    Attributes:
        time_seconds: When, by the monotonic clock (or the recording's).
        used_bytes: Bytes in use of that limit, without the file cache that the kernel drops first
            (the working set); the resident set if nothing is limited.
        limit_bytes: Bytes it allows; None if nothing is limited.
        bound: What sets it: "cgroup", "cgroup high" (where the kernel slows the group down),
            "address space", "data", "host", "budget" or None.
        without_cache_bytes: As `used_bytes`, without any file cache.
        resident_bytes: The process's resident set.
        anonymous_bytes: Of it, what is no file.
        data_bytes: Private writable memory that the process has mapped, touched or not.
        children_bytes: What its children use, shared pages counted once; 0 without a budget.
        total_faults: Page faults without disk since the process started.
        stalled_ratio: Share of the last ten seconds in which a thread waited for memory, or None.
        total_limit_hits: Times that the own group ran into its limit, or None.
        total_kills: Times that the kernel killed in the own group, or None.

    Raises:
        InvalidArgument: A number that stages depend on is outside its range.
        WrongType: It is no number.
    """

    time_seconds: float
    used_bytes: int
    limit_bytes: int | None
    bound: str | None = None
    without_cache_bytes: int = -1
    resident_bytes: int = 0
    anonymous_bytes: int = 0
    data_bytes: int = 0
    children_bytes: int = 0
    total_faults: int = 0
    stalled_ratio: float | None = None
    total_limit_hits: int | None = None
    total_kills: int | None = None

    def __post_init__(self) -> None:
        check_number("time_seconds", self.time_seconds)
        check_number("used_bytes", self.used_bytes)
        check_number("limit_bytes", self.limit_bytes, or_none=True)
        check_number("without_cache_bytes", self.without_cache_bytes)
        check_number("stalled_ratio", self.stalled_ratio, or_none=True)
        check_number("total_limit_hits", self.total_limit_hits, or_none=True)
        if not -LARGEST_FLOAT <= self.time_seconds <= LARGEST_FLOAT:
            raise InvalidArgument(f"time_seconds: must be finite, got {self.time_seconds}")
        if not 0 <= self.used_bytes < _BYTES_END:
            raise InvalidArgument(f"used_bytes: must be from 0 to 2**64 - 1, got {self.used_bytes}")
        if self.limit_bytes is not None and not 0 <= self.limit_bytes < _BYTES_END:
            raise InvalidArgument(
                f"limit_bytes: must be None or from 0 to 2**64 - 1, got {self.limit_bytes}"
            )
        if not self.without_cache_bytes < _BYTES_END:
            raise InvalidArgument(
                f"without_cache_bytes: must be below 2**64, got {self.without_cache_bytes}"
            )
        if self.without_cache_bytes < 0:
            object.__setattr__(self, "without_cache_bytes", self.used_bytes)

    @property
    def used_ratio(self) -> float:
        """Share of the limit in use; 0 without a limit."""
        return self.used_bytes / self.limit_bytes if self.limit_bytes else 0.0

    @property
    def without_cache_ratio(self) -> float:
        """Share of the limit in use without any file cache; 0 without a limit."""
        return self.without_cache_bytes / self.limit_bytes if self.limit_bytes else 0.0

    @property
    def room_bytes(self) -> int | None:
        """Bytes left; None without a limit."""
        return None if self.limit_bytes is None else max(0, self.limit_bytes - self.used_bytes)


@dataclass(frozen=True)
class Bound:
    """One limit and what is used of it.

    Attributes:
        kind: As `Sample.bound`.
        folder: The control group's folder, or None.
        used_bytes: As `Sample.used_bytes`.
        without_cache_bytes: As `Sample.without_cache_bytes`.
        limit_bytes: Bytes that may be used.
    """

    kind: str
    folder: Path | None
    used_bytes: int
    without_cache_bytes: int
    limit_bytes: int


class ReadsSamples(Protocol):
    """Anything that can say how much memory is used: the kernel, a recording, a test."""

    def read(self) -> Sample:
        """Read now. Raises `Closed` when there is nothing more to read."""
        ...  # pragma: no cover


class TraceSource:
    """A recording: iterate over its samples, or read them one by one.

    One thread at a time may read; iterating starts at the first sample each time.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Load a CSV file with the columns t_seconds, rss_bytes and limit_bytes.

        Raises:
            InvalidArgument: A column is missing, or a value is no number or negative.
            OSError: The file cannot be read.
        """
        name = path_text("path", path)
        with open(name, newline="", encoding="utf-8-sig", errors="replace") as file:
            try:
                self._samples = tuple(_recorded(csv.DictReader(file), path))
            except csv.Error as problem:
                raise InvalidArgument(f"path: {path} must be CSV: {problem}") from None
        self._next = 0

    def __iter__(self) -> Iterator[Sample]:
        return iter(self._samples)

    def __len__(self) -> int:
        return len(self._samples)

    def read(self) -> Sample:
        """Give the next sample.

        Raises:
            Closed: The recording is over.
        """
        from moirai.errors import Closed

        if self._next == len(self._samples):
            raise Closed(f"the recording is over: all {self._next} samples were read")
        self._next += 1
        return self._samples[self._next - 1]


def _recorded(rows: Iterable[dict[str, str]], path: str | os.PathLike[str]) -> Iterator[Sample]:
    for number, row in enumerate(rows, start=2):
        try:
            used = int(float(row["rss_bytes"]))
            yield Sample(
                float(row["t_seconds"]),
                used,
                int(float(row["limit_bytes"])),
                "recording",
                resident_bytes=used,
                anonymous_bytes=used,
            )
        except (KeyError, OverflowError, TypeError, ValueError):
            raise InvalidArgument(
                f"path: line {number} of {path} must have numbers as t_seconds, rss_bytes and "
                f"limit_bytes, the two last of at least 0, got {row}"
            ) from None
