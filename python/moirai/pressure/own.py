"""What Moirai itself holds: its pools and executors, found once the program has loaded them.

A guard must not import what the program does not use, so both are looked up among the loaded
modules. They register themselves there, weakly, when they are made.
"""

from __future__ import annotations

import sys
import weakref
from typing import TYPE_CHECKING, Any

from moirai.pressure.concurrency import Rhythm, adapt_executor

if TYPE_CHECKING:
    from moirai.pressure.concurrency import Cappable

__all__ = ["ExecutorCaps", "trim_idle_pools", "trim_pools"]

# What was used so recently stays while the level is low.
IDLE_SECONDS = 10.0


def trim_idle_pools(wanted_bytes: int) -> int | None:
    """Have pools give up what was idle for a while; 0 if nothing was, else None: who knows."""
    return None if _trim(IDLE_SECONDS) else 0


def trim_pools(wanted_bytes: int) -> int | None:
    """Have pools give up all that is idle, down to their least size."""
    return None if _trim(0.0) else 0


def _trim(idle_seconds: float) -> int:
    trim_all = _of_module("moirai.pools.live", "trim_all")
    return 0 if trim_all is None else int(trim_all(idle_seconds))


class ExecutorCaps:
    """How many tasks each executor, of threads or processes, may run; by one guard's stages.

    One thread at a time may use it: the guard's, and who stops the guard once that has ended.
    """

    def __init__(self) -> None:
        self._rhythms: weakref.WeakKeyDictionary[Cappable, Rhythm] = weakref.WeakKeyDictionary()

    def adapt(self, time_seconds: float, *, under_pressure: bool) -> None:
        """Take the state of the memory into account; a guard calls this at each sample."""
        if not under_pressure and not self._rhythms:
            return
        if under_pressure:
            for executor in _executors():
                if executor not in self._rhythms:
                    self._rhythms[executor] = Rhythm(executor.max_workers)
        for executor, rhythm in list(self._rhythms.items()):
            adapt_executor(rhythm, executor, time_seconds, under_pressure=under_pressure)
            if rhythm.limit == rhythm.maximum:
                del self._rhythms[executor]

    @property
    def is_capping(self) -> bool:
        """Whether any runs fewer than it has workers."""
        return bool(self._rhythms)

    def lift(self) -> None:
        """Let all run as many as they have workers."""
        for executor, rhythm in list(self._rhythms.items()):
            executor.allow(rhythm.maximum)
        self._rhythms.clear()

    def after_fork(self) -> None:
        """Forget the caps: a child's executors start without."""
        self._rhythms = weakref.WeakKeyDictionary()


def _executors() -> list[Cappable]:
    return [
        *_live("moirai.executor.threads", "_executors"),
        *_live("moirai.executor.process_pool", "_pools"),
    ]


def _live(module_name: str, name: str) -> list[Cappable]:
    """What is in a set of a module, if the program has loaded that."""
    while True:
        try:
            return list(_of_module(module_name, name) or ())
        except RuntimeError:  # One was made meanwhile.
            continue


def _of_module(module_name: str, name: str) -> Any:
    """What a module has under a name; None if the program has not loaded it, or is just at it."""
    return getattr(sys.modules.get(module_name), name, None)
