"""Pools of writable bytes, by size class."""

from __future__ import annotations

from collections.abc import Iterable

from moirai import _native
from moirai._native import PooledBuffer
from moirai.memory import PoolResource, Resource, parse_bytes
from moirai.pools.objects import Overflow
from moirai.pools.records import Acquisition, PoolStatistics, total
from moirai.pools.waiting import acquire_async

__all__ = ["LARGE_BYTES", "SMALL_BYTES", "BufferPool"]

SMALL_BYTES = 1 << 10
"""The smaller preset size class: a line, a header, a message."""
LARGE_BYTES = 1 << 16
"""The larger preset size class: what a read from a file or a socket fills."""


class BufferPool(_native.BufferPool):
    """Writable bytes by size class, for reading into: sockets, files, decoders.

    A buffer comes from the smallest class that has its size, and holds whatever its last user
    left, unless it is asked to be zero. It is a context manager, and exports the buffer protocol.
    One that comes back while views of it are alive is not handed out again: its memory lives as
    long as the views, its permit comes back at once. Threads and fork: as for `ObjectPool`.

    Args:
        resource: Where blocks come from; None makes a `moirai.memory.PoolResource`.
        size_classes: The classes, as ints or such as "64 KiB".
        max_count: Permits of each class; >= 1.
        overflow: As for `ObjectPool`.
        idle_seconds: As for `ObjectPool`; what is given up goes back to the resource.
        track_sites: As for `ObjectPool`.

    Raises:
        InvalidArgument: An argument is outside its range.
    """

    __slots__ = ()

    def __new__(
        cls,
        resource: Resource | None = None,
        *,
        size_classes: Iterable[int | str] = (SMALL_BYTES, LARGE_BYTES),
        max_count: int = 64,
        overflow: Overflow = "block",
        idle_seconds: float | None = None,
        track_sites: bool = False,
    ) -> BufferPool:
        return super().__new__(
            cls,
            PoolResource() if resource is None else resource,
            size_classes=[parse_bytes(size, argument="size_classes") for size in size_classes],
            max_count=max_count,
            overflow=overflow,
            idle_seconds=idle_seconds,
            track_sites=track_sites,
        )

    lease = _native.BufferPool.acquire

    async def acquire_async(
        self, size_bytes: int, *, zeroed: bool = False, timeout_seconds: float | None = None
    ) -> PooledBuffer:
        """As `acquire`, but wait without blocking the event loop."""
        return await acquire_async(
            lambda wake: self._acquire_or_queue(wake, size_bytes, zeroed, timeout_seconds),
            timeout_seconds,
        )

    def statistics(self) -> PoolStatistics:
        """What happened so far, in all classes."""
        return total(self.class_statistics().values())

    def class_statistics(self) -> dict[int, PoolStatistics]:
        """What happened so far, by size class."""
        return {size: PoolStatistics(**counts) for size, counts in self._statistics()}

    def leaks(self) -> list[Acquisition]:
        """Every buffer that is out; in each class the longest held first."""
        return [Acquisition(*found) for found in self._outstanding()]
