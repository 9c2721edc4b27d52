"""Which executor a program gets: threads, processes, or what other packages bring."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from moirai.errors import InvalidArgument
from moirai.executor.interface import BaseExecutor

__all__ = ["find"]

VARIABLE = "MOIRAI_EXECUTOR"

_GROUP = "moirai.executors"
"""Entry points of this group give more: a function of max_workers, initializer and initargs."""


class Backend(NamedTuple):
    """What makes executors.

    Attributes:
        make: Called with max_workers, initializer and initargs, and with what it takes besides.
        takes: The names of that.
    """

    make: Callable[..., BaseExecutor]
    takes: frozenset[str] = frozenset()


_OF_PROCESSES = frozenset({"affinity", "topology", "max_pending", "when_full", "blas_threads"})


def find(backend: str | None) -> Backend | None:
    """What makes the executors of this name, or None for threads.

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

        return Backend(ProcessExecutor, _OF_PROCESSES)
    from importlib import metadata  # slow, and not needed for those above

    others = metadata.entry_points(group=_GROUP)
    for entry in others:
        if entry.name == name:
            return Backend(entry.load())
    known = ", ".join(sorted({"threads", "processes", *(entry.name for entry in others)}))
    origin = "backend" if backend is not None else VARIABLE
    raise InvalidArgument(f"{origin}: must be one of {known}, got {name!r}")


def check_taken(backend: Backend, given: Mapping[str, Any]) -> dict[str, Any]:
    """What a backend is given of an `Executor`'s own arguments: those that are not None.

    Raises:
        InvalidArgument: It does not take one of them.
    """
    for name, value in given.items():
        if value is not None and name not in backend.takes:
            others = " or processes" if name in _OF_PROCESSES else ""
            raise InvalidArgument(f"{name}: needs the backend threads{others}, got {value!r}")
    return {name: value for name, value in given.items() if value is not None}
