"""Processes of a benchmark: forked, each on a core of its own, and never left behind."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

CORES = sorted(os.sched_getaffinity(0))
LIMIT_SECONDS = 12
"""How long one run of one subject may take."""

_children: list[int] = []


def pinned(core: int) -> None:
    """Stay on one of the cores there are."""
    os.sched_setaffinity(0, {CORES[core % len(CORES)]})


def unpinned() -> None:
    """Run on any core there is."""
    os.sched_setaffinity(0, CORES)


def in_child(body: Callable[[], None], core: int | None = None) -> int:
    """Run a function in a forked process, on a core if one is given; the process's id."""
    child = os.fork()
    if child:
        _children.append(child)
        return child
    status = 1
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(2 * LIMIT_SECONDS)
        if core is not None:
            pinned(core)
        body()
        status = 0
    finally:
        os._exit(status)


def end_children() -> None:
    """End what a run that failed left, so that it does not disturb the next."""
    while _children:
        child = _children.pop()
        try:
            done, _ = os.waitpid(child, os.WNOHANG)
        except ChildProcessError:
            continue  # it was waited for, and its number may be another's
        if not done:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
