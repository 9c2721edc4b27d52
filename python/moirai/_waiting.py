"""Waiting for a turn without blocking the thread: asyncio's part, which the compiled pools call."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar

__all__ = ["AsyncLease", "acquire_async"]

_Item = TypeVar("_Item")


class _Ticket(Protocol):
    def take(self) -> Any: ...
    def time_out(self, waited_seconds: float, /) -> Any: ...
    def cancel(self) -> None: ...


class _Pool(Protocol[_Item]):
    async def acquire_async(self, timeout_seconds: float | None) -> _Item: ...
    def release(self, item: _Item) -> None: ...


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


async def acquire_async(
    acquire_or_queue: Callable[..., tuple[Any, _Ticket | None]],
    timeout_seconds: float | None,
    *arguments: Any,
) -> Any:
    """Acquire at once, or wait in the pool's queue while the event loop goes on.

    Whatever ends the wait, a place in the queue, and what was granted to it, is never lost: it is
    taken here, or goes to the next one.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        # In the thread that releases. A closed loop raises, and the pool grants to the next one.
        loop.call_soon_threadsafe(_resolve, future)

    item, ticket = acquire_or_queue(wake, timeout_seconds, *arguments)
    if ticket is None:
        return item
    try:
        async with asyncio.timeout(timeout_seconds):
            await future
    except TimeoutError:
        return ticket.time_out(timeout_seconds or 0.0)
    except BaseException:
        ticket.cancel()
        raise
    return ticket.take()


class AsyncLease(Generic[_Item]):
    """An object of a pool for the length of an `async with` block. Made by `lease_async`."""

    __slots__ = ("_items", "_pool", "_timeout_seconds")

    def __init__(self, pool: _Pool[_Item], timeout_seconds: float | None) -> None:
        self._pool = pool
        self._timeout_seconds = timeout_seconds
        self._items: list[_Item] = []

    async def __aenter__(self) -> _Item:
        item = await self._pool.acquire_async(self._timeout_seconds)
        self._items.append(item)
        return item

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._pool.release(self._items.pop())
