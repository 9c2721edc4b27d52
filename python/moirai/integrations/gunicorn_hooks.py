"""Hooks for gunicorn's configuration: each worker guards itself, and leaves when it is stuck."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from moirai import pressure
from moirai.errors import Closed, WrongType
from moirai.pressure.process import check_options

__all__ = ["guard_workers", "post_fork", "worker_exit"]

log = logging.getLogger("moirai.pressure")


def guard_workers(**options: Any) -> Callable[[Any, Any], None]:
    """Make a `post_fork` hook that starts a guard in each worker.

    A worker at which nothing helps ends as after `max_requests`: it finishes what it is at, and the
    arbiter starts another.

    Args:
        options: As those of `moirai.pressure.start`, but for `on_stall`.

    Raises:
        InvalidArgument: An option is outside its range, or there is none of that name.
    """
    if "on_stall" in options:
        raise WrongType(f"on_stall: must be left to the hook, got {options['on_stall']!r}")
    check_options(**options)

    def hook(arbiter: Any, worker: Any) -> None:
        def leave(guard: pressure.Guard) -> None:
            log.warning("worker %s leaves: %s", worker.pid, guard.status().sample)
            worker.alive = False

        try:
            pressure.current()  # Of the arbiter, goes on here.
            pressure.stop()
        except Closed:
            pass
        pressure.start(on_stall=leave, **options)

    return hook


post_fork = guard_workers()


def worker_exit(arbiter: Any, worker: Any) -> None:
    """End the worker's guard; a hook of gunicorn's."""
    pressure.stop()
