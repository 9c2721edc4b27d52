"""Waiting for a turn without blocking the thread: the part that asyncio plays."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

from moirai._native import Ticket

__all__ = ["acquire_async"]

_Item = TypeVar("_Item")


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


async def acquire_async(
    acquire_or_queue: Callable[[Callable[[], Any]], tuple[_Item | None, Ticket | None]],
    timeout_seconds: float | None,
) -> _Item:
    """Acquire at once, or wait in the pool's queue while the event loop goes on.

    Whatever ends the wait, a place in the queue, and what was granted to it, is never lost: it is
    taken here, or goes to the next one.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        # In the thread that releases. A closed loop raises, and the pool grants to the next one.
        loop.call_soon_threadsafe(_resolve, future)

    item, ticket = acquire_or_queue(wake)
    if ticket is None:
        return item  # type: ignore[return-value]  # a pool may hold None
    try:
        async with asyncio.timeout(timeout_seconds):
            await future
    except TimeoutError:
        return ticket.time_out(timeout_seconds or 0.0)  # type: ignore[no-any-return]
    except BaseException:
        ticket.cancel()
        raise
    return ticket.take()  # type: ignore[no-any-return]
