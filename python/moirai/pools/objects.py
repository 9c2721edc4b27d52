"""Pools of objects that are worth keeping."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from moirai import _native
from moirai.pools.buffers import Overflow
from moirai.pools.live import known

__all__ = ["ObjectPool"]

_Item = TypeVar("_Item")


class ObjectPool(_native.ObjectPool[_Item]):
    __doc__ = _native.ObjectPool.__doc__
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
        return known(
            super().__new__(
                cls,
                factory,
                reset,
                destroy,
                validate,
                min_size,
                max_size,
                overflow,
                idle_seconds,
                track_sites=track_sites,
            )
        )
