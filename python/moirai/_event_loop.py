"""Waiting for a channel in an event loop: asyncio's part, which the compiled channels call."""

from __future__ import annotations

import asyncio
import itertools
import weakref
from collections.abc import Callable
from typing import Any, Protocol

__all__ = ["complete"]


class _Waiting(Protocol):
    def join(self, bell: Any, who: int, /) -> tuple[Any] | None: ...
    def attempt(self) -> tuple[Any] | None: ...
    def time_out(self, waited_seconds: float, /) -> Any: ...
    def leave(self) -> None: ...
    def tell(self, error: BaseException, /) -> None: ...


class _Bell(Protocol):
    def fileno(self) -> int: ...
    def answer(self) -> list[int]: ...


_MakeBell = Callable[[Callable[[], bool]], _Bell]


class _Door:
    """Where the tasks of one event loop wait. Used by the loop's thread only."""

    def __init__(self, loop: asyncio.AbstractEventLoop, make_bell: _MakeBell) -> None:
        reference = weakref.ref(loop)

        def is_closed() -> bool:
            loop = reference()
            return loop is None or loop.is_closed()

        self.bell = make_bell(is_closed)
        self.futures: dict[int, asyncio.Future[None]] = {}
        self.numbers = itertools.count()
        loop.add_reader(self.bell.fileno(), self.answer)

    def answer(self) -> None:
        for number in self.bell.answer():
            future = self.futures.pop(number, None)
            if future is not None and not future.done():
                future.set_result(None)


_DOORS: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Door] = weakref.WeakKeyDictionary()


def _door(loop: asyncio.AbstractEventLoop, make_bell: _MakeBell) -> _Door:
    door = _DOORS.get(loop)
    if door is None:
        door = _DOORS[loop] = _Door(loop, make_bell)
    return door


async def complete(waiting: _Waiting, make_bell: _MakeBell, timeout_seconds: float | None) -> Any:
    """Do an operation that cannot be done now, waiting while the event loop goes on.

    Whatever ends the wait, a call that was not used goes to the next in line.
    """
    if timeout_seconds == 0:
        return waiting.time_out(0.0)
    try:
        if timeout_seconds is None:
            return await _complete(waiting, make_bell)
        try:
            async with asyncio.timeout(timeout_seconds) as limit:
                return await _complete(waiting, make_bell)
        except TimeoutError:
            if not limit.expired():
                raise
            return waiting.time_out(timeout_seconds)
    except asyncio.CancelledError as error:
        waiting.tell(error)
        raise
    finally:
        waiting.leave()


async def _complete(waiting: _Waiting, make_bell: _MakeBell) -> Any:
    loop = asyncio.get_running_loop()
    door = _door(loop, make_bell)
    while True:
        number = next(door.numbers)
        future = door.futures[number] = loop.create_future()
        try:
            done = waiting.join(door.bell, number)
            if done is None:
                await future
                done = waiting.attempt()
        finally:
            door.futures.pop(number, None)
        if done is not None:
            return done[0]
