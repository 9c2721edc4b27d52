"""Guards for Celery's workers: one in each process that runs tasks."""

from __future__ import annotations

from typing import Any

from celery import signals  # type: ignore[import-not-found, import-untyped, unused-ignore]

from moirai import pressure
from moirai.errors import Closed
from moirai.pressure.process import check_options

__all__ = ["guard_workers"]


def guard_workers(**options: Any) -> None:
    """Have each process of the prefork pool guard itself from its start to its end.

    Call it where the application is defined. The other pools run tasks in the worker's own process,
    which `moirai.pressure.start` guards as any other.

    Args:
        options: As those of `moirai.pressure.start`.

    Raises:
        InvalidArgument: An option is outside its range, or there is none of that name.
    """
    check_options(**options)

    def start(**_: Any) -> None:
        try:
            pressure.current()  # The worker's own goes on in its children.
        except Closed:
            pressure.start(**options)

    def stop(**_: Any) -> None:
        pressure.stop()

    signals.worker_process_init.connect(start, weak=False, dispatch_uid="moirai-pressure-start")
    signals.worker_process_shutdown.connect(stop, weak=False, dispatch_uid="moirai-pressure-stop")
