"""Which pools there are, so that what they keep idle can be given up under pressure."""

from __future__ import annotations

import os
import threading
import weakref
from typing import Protocol, TypeVar

__all__ = ["known", "trim_all"]


class Trims(Protocol):
    """What every pool can do."""

    def trim(self, idle_seconds: float | None = None) -> int:
        """Give up what was idle for so long; how many that were."""
        ...  # pragma: no cover


_Pool = TypeVar("_Pool", bound=Trims)

_lock = threading.Lock()
_pools: weakref.WeakSet[Trims] = weakref.WeakSet()


def known(pool: _Pool) -> _Pool:
    """Count a pool in, for as long as it lives."""
    with _lock:
        _pools.add(pool)
    return pool


def trim_all(idle_seconds: float) -> int:
    """Have every pool of the process give up what was idle for so long; how many that were.

    Objects are destroyed in the calling thread, down to each pool's `min_size`.
    """
    with _lock:
        pools = list(_pools)
    return sum(pool.trim(idle_seconds) for pool in pools)


def _after_fork_in_child() -> None:
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork_in_child)
