"""Pools of Python objects that a factory makes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import TracebackType
from typing import Any, Generic, Literal, TypeVar

from moirai import _native
from moirai.pools.records import Acquisition, PoolStatistics
from moirai.pools.waiting import acquire_async

__all__ = ["AsyncLease", "ObjectPool", "Overflow"]

_Item = TypeVar("_Item")

Overflow = Literal["block", "raise", "create"]

_log = logging.getLogger("moirai.pools")


def _report(stage: str, error: BaseException) -> None:
    _log.warning("%s raised; the object is given up", stage, exc_info=error)


class ObjectPool(_native.ObjectPool[_Item]):
    """A bounded pool of objects that are worth keeping: connections, parsers, large structures.

    Idle objects are handed out last in, first out. Who finds none, and no permit to make one,
    waits in order of arrival. Any number of threads and event loops may use a pool at once; the
    four functions run in the thread that calls, with no lock held, and may use the pool
    themselves. In a forked child the pool is empty and has all its permits: inherited objects are
    dropped without `destroy`, and a release of one that was out does nothing.

    Args:
        factory: Makes an object, a new one at each call. What it raises reaches who acquires.
        reset: Makes an object ready for its next user, at its release. If it raises, the object is
            destroyed and counted, the error logged, and the release succeeds.
        destroy: Takes leave of an object that the pool gives up. What it raises is logged.
        validate: Says, before an idle object is handed out, whether it is fit. If it says no or
            raises, the object is destroyed and a new one made.
        min_size: Objects made at once, and left alive by age and by `trim`; >= 0.
        max_size: Permits: the most objects alive or being made; >= 1.
        overflow: What an acquire does when all permits are taken: wait ("block"), raise Timeout
            ("raise"), or make an object that is destroyed at its release ("create").
        idle_seconds: Objects idle for at least so long are destroyed at the next acquire or
            release, or by `trim`; None keeps them.
        track_sites: Whether to note which line acquires, for `leaks`; costs one to two
            microseconds.

    Raises:
        InvalidArgument: An argument is outside its range.
        TypeError: A function is not callable.
    """

    __slots__ = ()

    def __new__(
        cls,
        factory: Callable[[], _Item],
        reset: Callable[[_Item], Any] | None = None,
        destroy: Callable[[_Item], Any] | None = None,
        validate: Callable[[_Item], Any] | None = None,
        min_size: int = 0,
        max_size: int = 64,
        overflow: Overflow = "block",
        idle_seconds: float | None = None,
        *,
        track_sites: bool = False,
    ) -> ObjectPool[_Item]:
        self = super().__new__(
            cls,
            factory,
            reset,
            destroy,
            validate,
            report=_report,
            min_size=min_size,
            max_size=max_size,
            overflow=overflow,
            idle_seconds=idle_seconds,
            track_sites=track_sites,
        )
        self.prefill(min_size)
        return self

    async def acquire_async(self, timeout_seconds: float | None = None) -> _Item:
        """As `acquire`, but wait without blocking the event loop.

        Works from any number of event loops. A cancelled wait gives its place, and what was granted
        to it, to the next one. `factory` and `validate` run in the event loop's thread.

        Args:
            timeout_seconds: As for `acquire`.

        Raises:
            Timeout, Closed: As for `acquire`.
        """
        return await acquire_async(
            lambda wake: self._acquire_or_queue(wake, timeout_seconds), timeout_seconds
        )

    def lease_async(self, timeout_seconds: float | None = None) -> AsyncLease[_Item]:
        """As `lease`, for `async with`."""
        return AsyncLease(self, timeout_seconds)

    def statistics(self) -> PoolStatistics:
        """What happened so far."""
        return PoolStatistics(**self._statistics())

    def leaks(self) -> list[Acquisition]:
        """Every object that is out, the longest held first.

        Called when nothing should be out, it names what was forgotten and, with
        ``track_sites=True``, where.
        """
        return [Acquisition(*found) for found in self._outstanding()]


class AsyncLease(Generic[_Item]):
    """An object of a pool for the length of an `async with` block."""

    __slots__ = ("_item", "_pool", "_timeout_seconds")

    def __init__(self, pool: ObjectPool[_Item], timeout_seconds: float | None) -> None:
        self._pool = pool
        self._timeout_seconds = timeout_seconds
        self._item: list[_Item] = []

    async def __aenter__(self) -> _Item:
        item = await self._pool.acquire_async(self._timeout_seconds)
        self._item.append(item)
        return item

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._pool.release(self._item.pop())
