"""Things worth keeping for their next user: objects, buffers and vectors, bounded and counted.

Every object here may be used by any number of threads at once, with or without the GIL, and the
pools by any number of event loops. A forked child starts with empty pools.
"""

from __future__ import annotations

from moirai._native import Acquisition, Lease, PooledBuffer, PoolStatistics, Vector
from moirai._waiting import AsyncLease
from moirai.pools.buffers import LARGE_BYTES, SMALL_BYTES, BufferPool, Overflow
from moirai.pools.objects import ObjectPool
from moirai.pools.vectors import VectorPool

__all__ = [
    "LARGE_BYTES",
    "SMALL_BYTES",
    "Acquisition",
    "AsyncLease",
    "BufferPool",
    "Lease",
    "ObjectPool",
    "Overflow",
    "PoolStatistics",
    "PooledBuffer",
    "Vector",
    "VectorPool",
]
