"""Pools of Python objects that a factory makes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import TracebackType
from typing import Any, Generic, Literal, TypeVar

from moirai import _native
from moirai.pools.records import Acquisition, PoolStatistics
from moirai.pools.waiting import acquire_async

__all__ = ["ObjectPool", "Overflow"]

_Item = TypeVar("_Item")

Overflow = Literal["block", "raise", "create"]

_log = logging.getLogger("moirai.pools")


def _report(stage: str, error: BaseException) -> None:
    _log.warning("%s failed, the object is dropped", stage, exc_info=error)


class ObjectPool(_native.ObjectPool, Generic[_Item]):
    """A bounded pool of objects."""

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
        return await acquire_async(
            lambda wake: self._acquire_or_queue(wake, timeout_seconds), timeout_seconds
        )

    def statistics(self) -> PoolStatistics:
        return PoolStatistics(**self._statistics())

    def leaks(self) -> list[Acquisition]:
        return [Acquisition(*found) for found in self._outstanding()]
