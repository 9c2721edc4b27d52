"""Which executor a program gets: threads, processes, or what other packages bring."""

from __future__ import annotations

import os
from collections.abc import Callable

from moirai.errors import InvalidArgument
from moirai.executor.interface import BaseExecutor

__all__ = ["find"]

VARIABLE = "MOIRAI_EXECUTOR"

_GROUP = "moirai.executors"
"""Entry points of this group give more: a function of max_workers, initializer and initargs."""


def find(backend: str | None) -> Callable[..., BaseExecutor] | None:
    """What makes the executor of this name, or None for threads.

    Args:
        backend: "threads", "processes", or what a package brings, as "dask"; None: what the
            environment variable MOIRAI_EXECUTOR says, else threads.

    Raises:
        InvalidArgument: Nothing has the name.
    """
    name = os.environ.get(VARIABLE) or "threads" if backend is None else backend
    if name == "threads":
        return None
    if name == "processes":
        from moirai.executor.processes import ProcessExecutor

        return ProcessExecutor
    from importlib import metadata  # slow, and not needed for those above

    others = metadata.entry_points(group=_GROUP)
    for entry in others:
        if entry.name == name:
            found: Callable[..., BaseExecutor] = entry.load()
            return found
    known = ", ".join(sorted({"threads", "processes", *(entry.name for entry in others)}))
    origin = "backend" if backend is not None else VARIABLE
    raise InvalidArgument(f"{origin}: must be one of {known}, got {name!r}")
