"""Channels between processes: bytes, records, arrays and objects through shared memory."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import os
import pickle
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from multiprocessing import util
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from moirai import _native
from moirai._arguments import check_seconds
from moirai._native import ReceivedView, ReservedArray
from moirai.channels.closing import ClosesAtExit
from moirai.errors import Disconnected, InvalidArgument, Timeout
from moirai.memory import parse_bytes

__all__ = ["ReceivedView", "ReservedArray", "SharedChannel", "SharedReceiver", "SharedSender"]

_T = TypeVar("_T")

_OBJECT, _PICKLE, _LENT_OBJECT = 2, 3, 5

_LINGER_SECONDS = 10.0
"""How long a process that ends waits for others to receive what it sent by reference."""

_PROBE_SECONDS = 0.04
"""How often one who waits in an event loop looks whether the others are alive."""


class SharedChannel(_native.SharedChannel, ClosesAtExit):
    """A bounded channel between any number of processes, in shared memory.

    Made by `create`, found by `open`. A handle pickles to any process: a named one by its name, one
    without a name by its file descriptor, through multiprocessing. It belongs to the process that
    has it; a forked child that uses an inherited one is a process of its own to the channel.

    Any number of threads may use a handle and its ends at once. Nothing that a killed process had
    stays taken: its unfinished messages are left out, its blocks come back.
    """

    __slots__ = ("_bell",)

    _bell: _Bell | None

    @classmethod
    def create(cls, name: str | None = None, capacity_bytes: int | str = "64 MiB") -> Self:
        """Make a channel; all its memory is there when this returns.

        Args:
            name: How other processes find it: letters, digits, dots, dashes, underscores. Without
                one, it can only be pickled or inherited.
            capacity_bytes: Longest message, and how much of long messages may be on its way or
                viewed at once; an int or such as "64 MiB". Messages of up to `inline_bytes` lie in
                a ring beside it.

        Raises:
            InvalidArgument: An argument is outside its range, or a channel has that name.
            OutOfMemory: The memory is not there.
        """
        capacity = parse_bytes(capacity_bytes, argument="capacity_bytes")
        return cls(name=name, capacity_bytes=capacity)

    @classmethod
    def open(cls, name: str) -> Self:
        """Find the channel of this name.

        Raises:
            Disconnected: No channel has the name, or everybody who had it died.
            Corrupted: It is no channel, or not as long as its header says.
            Unsupported: Another version or build of Moirai made it, or it is another user's.
        """
        return cls(name=name)

    def sender(self) -> SharedSender:
        """Open a sending end; it is a context manager."""
        return SharedSender(self)

    def receiver(self) -> SharedReceiver:
        """Open a receiving end; it is a context manager."""
        return SharedReceiver(self)

    def __reduce__(self) -> tuple[Any, ...]:
        if self.name is not None:
            return type(self).open, (self.name,)
        from multiprocessing.reduction import DupFd

        return _adopt, (type(self), DupFd(self._fileno()))

    def __repr__(self) -> str:
        name = "" if self.name is None else f"name={self.name!r}, "
        return f"{type(self).__name__}({name}capacity_bytes={self.capacity_bytes})"

    def _get_bell(self) -> _Bell:
        try:
            bell = self._bell
        except AttributeError:
            bell = None
        # A forked child has a doorbell of its own; the descriptor of its parent's is closed there.
        if bell is None or bell.process_id != os.getpid():
            bell = self._bell = _Bell(self)
        return bell


def _adopt(kind: type[SharedChannel], descriptor: Any) -> SharedChannel:
    return kind(fd=descriptor.detach())


class SharedSender(_native.SharedSender, ClosesAtExit):
    """The sending end of a channel in this process; a context manager.

    When the last sender of all processes is closed, receivers get what was sent and are then told.
    """

    __slots__ = ("_channel",)

    _channel: SharedChannel

    def __new__(cls, channel: SharedChannel) -> Self:
        sender = super().__new__(cls, channel)
        sender._channel = channel
        _linger_at_exit()
        return sender

    def send(self, item: Any, timeout_seconds: float | None = None, *, give: bool = False) -> None:
        """Send any object that can be pickled; arrays in it are copied once, into shared memory.

        Arrays that lie in a `moirai.memory.SharedMemoryResource` are not copied at all: receivers
        get them read-only, and see what is written to them here afterwards.

        Args:
            item: What to send.
            timeout_seconds: How long to wait for room; None for ever, 0 not at all.
            give: Give the arrays in it away: they become read-only here, and one who receives them
                with ``writable=True`` may write to them where they are.

        Raises:
            Timeout: There was no room in time; nothing was sent.
            Disconnected: No receiver is left.
            InvalidArgument: It is longer than the channel's capacity, or is to be given away and is
                read-only.
        """
        if type(item) is np.ndarray:
            if give and not item.flags.writeable:
                raise _not_ours(item)
            if self._send_array(item, give, timeout_seconds):
                if give:
                    item.setflags(write=False)
                return
        buffers: list[pickle.PickleBuffer] = []
        data = pickle.dumps(item, protocol=5, buffer_callback=buffers.append)
        views = [buffer.raw() for buffer in buffers]
        if give and any(view.readonly for view in views):
            raise _not_ours(item)
        self._send_object(data, views, timeout_seconds, give=give)
        if give:
            for view in views:
                if isinstance(view.obj, np.ndarray):
                    view.obj.setflags(write=False)

    def send_batch(self, array: ArrayLike, timeout_seconds: float | None = None) -> int:
        """Send each item of an array as a message of its own; how many.

        Raises:
            Timeout: There was no room in time.
            Disconnected: No receiver is left.
                Of these two, `sent_count` says how many were sent.
            InvalidArgument: The items hold references, or are too long for the ring.
        """
        items = np.ascontiguousarray(array)
        _check_plain(items.dtype)
        data = items.reshape(-1).view(np.uint8) if items.size else b""
        return self._send_records(data, items.dtype.itemsize, timeout_seconds)

    async def send_async(self, item: Any, timeout_seconds: float | None = None) -> None:
        """Send as `send` does, while the event loop goes on."""
        await _until(self, functools.partial(self.send, item, 0), timeout_seconds)

    async def send_bytes_async(self, data: Any, timeout_seconds: float | None = None) -> None:
        """Send as `send_bytes` does, while the event loop goes on."""
        await _until(self, functools.partial(self.send_bytes, data, 0), timeout_seconds)


class SharedReceiver(_native.SharedReceiver, ClosesAtExit):
    """The receiving end of a channel in this process; a context manager and an iterator.

    Each message goes to one receiver. Iteration ends when every sender has closed; a sender that
    died raises `Disconnected` instead, after what it had sent.
    """

    __slots__ = ("_channel",)

    _channel: SharedChannel

    def __new__(cls, channel: SharedChannel) -> Self:
        receiver = super().__new__(cls, channel)
        receiver._channel = channel
        return receiver

    def receive(self, timeout_seconds: float | None = None, *, writable: bool = False) -> Any:
        """Receive any message: the bytes, array or object that was sent.

        Arrays in a large message are not copied: they lie in shared memory, which stays borrowed
        until they are gone. Those that were sent by reference are read-only.

        Args:
            timeout_seconds: How long to wait for a message; None for ever, 0 not at all.
            writable: Have arrays writable that were sent by reference: in place if they were given
                away, else as a copy.

        Raises:
            Timeout: No message came in time.
            Disconnected: No sender is left, and everything that was sent is received.
        """
        kind, item, parts = self._receive_any(timeout_seconds, writable=writable)
        if kind == _PICKLE:
            return pickle.loads(item)
        if kind == _LENT_OBJECT:
            data, blocks = item
            return _object_of(data, blocks, parts, writable)
        if kind != _OBJECT:
            return item
        view = memoryview(item)
        first, *others = [view[start:end] for start, end in parts]
        return pickle.loads(first, buffers=others)

    def receive_batch(
        self, max_count: int, dtype: DTypeLike, timeout_seconds: float | None = None
    ) -> NDArray[Any]:
        """Wait for a record, then receive up to `max_count` that are there, as one array.

        Raises:
            Timeout: No message came in time.
            Disconnected: No sender is left, and everything that was sent is received.
            InvalidArgument: The next message is not as long as an item; it stays in the channel.
        """
        dtype = np.dtype(dtype)
        _check_plain(dtype)
        if max_count < 1 or dtype.itemsize == 0:
            raise InvalidArgument(
                f"max_count: must be at least 1, of items with bytes, got {max_count} of {dtype}"
            )
        records = np.empty(max_count, dtype)
        place = records.view(np.uint8)
        return records[: self._receive_records(place, dtype.itemsize, timeout_seconds)]

    def __iter__(self) -> Iterator[Any]:
        while True:
            try:
                item = self.receive()
            except Disconnected as error:
                if error.args[0].endswith("was closed"):
                    return
                raise
            yield item

    async def receive_async(self, timeout_seconds: float | None = None) -> Any:
        """Receive as `receive` does, while the event loop goes on."""
        return await _until(self, functools.partial(self.receive, 0), timeout_seconds)

    async def receive_bytes_async(self, timeout_seconds: float | None = None) -> bytes:
        """Receive as `receive_bytes` does, while the event loop goes on."""
        return await _until(self, functools.partial(self.receive_bytes, 0), timeout_seconds)

    async def __aiter__(self) -> AsyncIterator[Any]:
        while True:
            try:
                item = await self.receive_async()
            except Disconnected as error:
                if error.args[0].endswith("was closed"):
                    return
                raise
            yield item


# === arrays =====================================================================================


def _check_plain(dtype: np.dtype[Any]) -> None:
    if dtype.hasobject:
        raise InvalidArgument(
            f"dtype: must hold plain values, got {dtype}: references stay in their process"
        )


# === memory that is lent =======================================================================


def _not_ours(item: object) -> InvalidArgument:
    return InvalidArgument(
        f"item: must be writable to be given away, got a read-only {type(item).__name__}: it was "
        "lent, or given away before"
    )


def _object_of(
    data: bytearray,
    blocks: list[tuple[int, Any]],
    parts: list[tuple[int, int]],
    writable: bool,
) -> Any:
    """The object whose pickle is the first part; some of its buffers lie in lent blocks."""
    view = memoryview(data)
    first, *buffers = [view[start:end] for start, end in parts]
    for index, block in blocks:
        buffer = memoryview(block)
        if not writable:
            buffer = buffer.toreadonly()
        elif not block.is_given:
            buffer = memoryview(bytearray(buffer))
        buffers[index - 1] = buffer
    return pickle.loads(first, buffers=buffers)


def _linger() -> None:
    _native.linger(_LINGER_SECONDS)


_lingering_process: int | None = None


def _linger_at_exit() -> None:
    """Have this process wait at its end; what it sent by reference ends with it."""
    global _lingering_process
    if _lingering_process == os.getpid():
        return
    if _lingering_process is None:
        atexit.register(_linger)
        # A child may send with what it inherited.
        util.register_after_fork(_linger, lambda _: _linger_at_exit())
    _lingering_process = os.getpid()
    # The children of multiprocessing end without `atexit`.
    util.Finalize(None, _linger, exitpriority=0)


# === asyncio ====================================================================================


class _Bell:
    """The event loops of this process that wait at a channel, and what wakes them."""

    def __init__(self, channel: SharedChannel) -> None:
        self.process_id = os.getpid()
        self._fd = channel._doorbell()
        self._drain = channel._drain_doorbell
        self._lock = threading.Lock()
        self._waiting: dict[asyncio.AbstractEventLoop, set[asyncio.Future[None]]] = {}

    def add(self, loop: asyncio.AbstractEventLoop) -> asyncio.Future[None]:
        future: asyncio.Future[None] = loop.create_future()
        with self._lock:
            futures = self._waiting.get(loop)
            if futures is None:
                futures = self._waiting[loop] = set()
                loop.add_reader(self._fd, self._ring)
            futures.add(future)
        return future

    def remove(self, loop: asyncio.AbstractEventLoop, future: asyncio.Future[None]) -> None:
        with self._lock:
            futures = self._waiting.get(loop, set())
            futures.discard(future)
            if not futures and self._waiting.pop(loop, None) is not None:
                loop.remove_reader(self._fd)

    def _ring(self) -> None:
        self._drain()
        with self._lock:
            waiting = [(loop, list(futures)) for loop, futures in self._waiting.items()]
        for loop, futures in waiting:
            with contextlib.suppress(RuntimeError):  # a loop that was closed
                loop.call_soon_threadsafe(_resolve, futures)


def _resolve(futures: list[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)


def _waited(error: Timeout, timeout_seconds: float | None) -> Timeout:
    """The error of a try that did not wait, for one who has waited so long."""
    return Timeout(str(error).replace(" within 0 s", f" within {timeout_seconds} s", 1))


async def _until(
    end: SharedSender | SharedReceiver, attempt: Callable[[], _T], timeout_seconds: float | None
) -> _T:
    """Try until it does not time out; in between, sleep until the doorbell rings, or a while."""
    check_seconds("timeout_seconds", timeout_seconds)
    deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
    with contextlib.suppress(Timeout):
        return attempt()
    channel = end._channel
    bell = channel._get_bell()
    loop = asyncio.get_running_loop()
    while True:
        future = bell.add(loop)
        try:
            end._arm()
            left = _PROBE_SECONDS if deadline is None else deadline - time.monotonic()
            try:
                return attempt()
            except Timeout as error:
                if left <= 0:
                    raise _waited(error, timeout_seconds) from None
            done, _ = await asyncio.wait([future], timeout=min(left, _PROBE_SECONDS))
            if not done:
                channel._probe()
        finally:
            bell.remove(loop, future)
