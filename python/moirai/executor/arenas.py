"""An arena for each task: what it allocates is given back when it ends, all at once."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from typing import Any

from moirai.memory import ArenaResource, Resource, use

__all__ = ["TaskArenas"]


class TaskArenas:
    """Arenas for the tasks of one executor, used again by later tasks. Any thread may use it.

    There are as many as tasks ran at once, those that a thread runs within each other included. A
    forked child has copies.

    Args:
        upstream: Where the arenas' chunks come from; None: as for `ArenaResource`.
    """

    def __init__(self, upstream: Resource | None) -> None:
        self._upstream = upstream
        self._free: deque[ArenaResource] = deque()

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with each of its calls in an arena of its own."""
        return functools.partial(self._run, function)

    def _run(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        try:
            arena = self._free.pop()
        except IndexError:
            arena = ArenaResource(self._upstream)
        try:
            with use(arena):
                return function(*args, **kwargs)
        finally:
            # The arguments of this frame may show blocks that die with it.
            del args, kwargs
            # Chunks that a result lies in are left to it, and are given back with it.
            arena.reset(retire=True)
            self._free.append(arena)
