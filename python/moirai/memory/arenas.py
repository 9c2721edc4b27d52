"""Arenas: blocks cut one after the other from chunks, given back by a reset or a rollback."""

from __future__ import annotations

from moirai import _native
from moirai._native import Resource
from moirai.memory.resources import PoolResource
from moirai.memory.sizes import parse_bytes

__all__ = ["ArenaResource", "ThreadLocalArena"]


class ArenaResource(_native.ArenaResource):
    """Cuts blocks one after the other from chunks, for what dies together.

    A chunk in which nothing is alive is used again. Blocks above half a chunk that do not fit into
    what is left of the current one get a chunk of their own. Any thread may allocate, free, reset
    and roll back; savepoints are the arena's, not a thread's.

    Args:
        upstream: Where chunks come from. None makes a `PoolResource`.
        chunk_bytes: Bytes of a chunk, as an int or such as "1 MiB"; from 1 to 512 MiB, rounded up
            to pages of 4 KiB. One byte of 64 is the chunk's own.

    Raises:
        InvalidArgument: `chunk_bytes` is outside its range.
    """

    def __new__(
        cls, upstream: Resource | None = None, *, chunk_bytes: int | str = "1 MiB"
    ) -> ArenaResource:
        source = PoolResource() if upstream is None else upstream
        chunk = parse_bytes(chunk_bytes, argument="chunk_bytes")
        return super().__new__(cls, source, chunk_bytes=chunk)


class ThreadLocalArena(_native.ThreadLocalArena):
    """An arena for each thread, made on first use and given back when the thread ends.

    Threads do not contend when they allocate. `savepoint`, `rollback` and `reset` are about the
    calling thread's arena. Blocks may be freed in any thread, and outlive the one that made them.
    The peaks in its statistics are the sum of the arenas' own, so an upper bound.

    Args:
        upstream: As for `ArenaResource`.
        chunk_bytes: As for `ArenaResource`.

    Raises:
        InvalidArgument: `chunk_bytes` is outside its range.
    """

    def __new__(
        cls, upstream: Resource | None = None, *, chunk_bytes: int | str = "1 MiB"
    ) -> ThreadLocalArena:
        source = PoolResource() if upstream is None else upstream
        chunk = parse_bytes(chunk_bytes, argument="chunk_bytes")
        return super().__new__(cls, source, chunk_bytes=chunk)
