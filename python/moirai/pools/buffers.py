"""Pools of writable bytes, by size class."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from moirai import _native
from moirai.memory import PoolResource, Resource, parse_bytes
from moirai.pools.live import known

__all__ = ["LARGE_BYTES", "SMALL_BYTES", "BufferPool", "Overflow"]

Overflow = Literal["block", "raise", "create"]
"""What an acquire does when all permits are taken."""

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
        made = super().__new__(
            cls,
            PoolResource() if resource is None else resource,
            size_classes=[parse_bytes(size, argument="size_classes") for size in size_classes],
            max_count=max_count,
            overflow=overflow,
            idle_seconds=idle_seconds,
            track_sites=track_sites,
        )
        return known(made)

    lease = _native.BufferPool.acquire
