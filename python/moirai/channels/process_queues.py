"""multiprocessing's queues on a shared channel, for code that uses them already."""

from __future__ import annotations

import collections
import functools
import multiprocessing
import multiprocessing.context
import multiprocessing.util
import os
import threading
import weakref
from collections.abc import Callable
from queue import Empty, Full
from typing import Any, Generic, TypeVar

from moirai.channels import parcels
from moirai.channels.shared import SharedChannel, SharedReceiver, SharedSender
from moirai.errors import Closed, Disconnected, Timeout

__all__ = ["Empty", "Full", "JoinableQueue", "Queue", "SimpleQueue"]

_Item = TypeVar("_Item")

_MAX_SIZE = 2**31 - 1
"""Items of a queue without a limit: what a semaphore can count."""


class _Line:
    """A channel of which this process has both ends open, so that no one else's going ends it."""

    def __init__(self, channel: SharedChannel) -> None:
        self.channel = channel
        self.is_closed = False
        self.open()

    def open(self) -> None:
        self.sender: SharedSender = self.channel.sender()
        self.receiver: SharedReceiver = self.channel.receiver()

    def try_put(self, data: bytes, buffers: list[Any]) -> bool:
        """Send without waiting; whether there was room."""
        if parcels.message_bytes(data, buffers) > self.channel.capacity_bytes:
            return False
        try:
            self.sender._send_object(data, buffers, 0, references=False)
        except Timeout:
            return False
        except Disconnected:  # a forked child whose parent, which opened the ends, is gone
            self.open()
            return self.try_put(data, buffers)
        return True

    def put(self, data: bytes, buffers: list[Any]) -> None:
        """Send, waiting while there is no room."""
        while True:
            try:
                parcels.send(self.channel, self.sender, data, buffers, _never)
                return
            except Closed:
                raise _closed_error() from None
            except Disconnected:
                self.open()

    def take(self, timeout: float | None) -> parcels.Parcel:
        """Receive.

        Raises:
            Empty: Nothing came in time.
        """
        while True:
            try:
                return parcels.take(self.receiver, timeout)
            except Timeout:
                raise Empty from None
            except Closed:
                raise _closed_error() from None
            except Disconnected:
                self.open()

    def is_empty(self) -> bool:
        while True:
            try:
                return not self.receiver._wait(0)
            except Closed:
                raise _closed_error() from None
            except Disconnected:
                self.open()

    def close(self) -> None:
        self.is_closed = True
        self.channel.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Line, (self.channel,)


def _closed_error() -> OSError:
    return OSError("this queue is closed")


def _never() -> None:
    """Nothing makes waiting in vain: somebody may come."""


class SimpleQueue(Generic[_Item]):
    """What `multiprocessing.SimpleQueue` is, without locks: `put` waits only for memory.

    May be pickled to any process at any time.

    Args:
        capacity_bytes: What may wait in it in long messages. Longer ones pass as well, more slowly;
            who puts one in waits until it is taken.
    """

    def __init__(self, *, ctx: Any = None, capacity_bytes: int | str = "8 MiB") -> None:
        del ctx  # what multiprocessing passes; nothing here depends on it
        self._line = _Line(SharedChannel.create(capacity_bytes=capacity_bytes))

    def put(self, obj: _Item) -> None:
        """Put an object in."""
        self._line.put(*parcels.dump(obj))

    def get(self) -> _Item:
        """Take the oldest object, waiting for one."""
        item: _Item = parcels.load(self._line.take(None))
        return item

    def empty(self) -> bool:
        """Whether it holds nothing now.

        Raises:
            OSError: This process closed it.
        """
        return self._line.is_empty()

    def close(self) -> None:
        """Close this process's end."""
        self._line.close()


class Queue(Generic[_Item]):
    """What `multiprocessing.Queue` is, over shared memory.

    Objects are pickled by `put`, which raises what pickling raises; arrays in them are copied into
    shared memory, and lie there when they are received. While there is room no thread is needed.
    What finds none waits in this process, and a thread passes it on. It is inherited or given to
    `Process`, as multiprocessing's is.

    Args:
        maxsize: Objects it holds before `put` waits; 0 or less is no limit.
        ctx: The context of multiprocessing to take semaphores from; the default one if None.
        capacity_bytes: What may wait in shared memory in long messages.
    """

    def __init__(
        self, maxsize: int = 0, *, ctx: Any = None, capacity_bytes: int | str = "16 MiB"
    ) -> None:
        context = multiprocessing.get_context() if ctx is None else ctx
        self._maxsize = maxsize if maxsize > 0 else _MAX_SIZE
        self._room = context.BoundedSemaphore(self._maxsize)
        self._line = _Line(SharedChannel.create(capacity_bytes=capacity_bytes))
        self._reset()

    def _reset(self) -> None:
        """What belongs to one process; again after a fork, since its thread is not there."""
        self._process_id = os.getpid()
        self._closed = False
        self._join_cancelled = False
        # What found no room, oldest first; the one that the feeder sends is among them.
        self._backlog: collections.deque[tuple[bytes, list[Any]]] = collections.deque()
        self._changed = threading.Condition()
        self._feeder: threading.Thread | None = None
        self._join: multiprocessing.util.Finalize | None = None
        multiprocessing.util.register_after_fork(self, Queue._reset)

    def __getstate__(self) -> Any:
        multiprocessing.context.assert_spawning(self)
        return self._maxsize, self._room, self._line

    def __setstate__(self, state: Any) -> None:
        self._maxsize, self._room, self._line = state
        self._reset()

    def put(self, obj: _Item, block: bool = True, timeout: float | None = None) -> None:
        """Put an object in, waiting while it holds `maxsize`.

        Raises:
            Full: There was no room in time, or at once if not `block`.
            ValueError: This process closed the queue.
        """
        self._check_open()
        data, buffers = parcels.dump(obj)
        if not self._room.acquire(block, timeout):
            raise Full
        self._count_in()
        try:
            if self._backlog or not self._line.try_put(data, buffers):
                self._put_later(data, [bytes(buffer) for buffer in buffers])
        except Exception:  # such as OutOfMemory: nothing was put in
            self._losing()()
            raise

    def get(self, block: bool = True, timeout: float | None = None) -> _Item:
        """Take the oldest object, waiting for one.

        Raises:
            Empty: None came in time, or none is there if not `block`.
            ValueError: This process closed the queue.
        """
        self._check_open()
        if not block:
            timeout = 0.0
        elif timeout is not None:
            timeout = max(0.0, timeout)
        parcel = self._line.take(timeout)
        # Before the object is made, which may fail: it is taken all the same.
        self._room.release()
        item: _Item = parcels.load(parcel)
        return item

    def put_nowait(self, obj: _Item) -> None:
        """As `put(obj, block=False)`."""
        self.put(obj, False)

    def get_nowait(self) -> _Item:
        """As `get(block=False)`."""
        return self.get(False)

    def qsize(self) -> int:
        """Objects in it now."""
        return self._maxsize - int(self._room.get_value())

    def empty(self) -> bool:
        """Whether nothing can be taken now.

        Raises:
            OSError: This process closed the queue.
        """
        return self._line.is_empty()

    def full(self) -> bool:
        """Whether a `put` would wait now."""
        return int(self._room.get_value()) == 0

    def close(self) -> None:
        """Put and take nothing more in this process; what waits is passed on."""
        self._own()
        self._closed = True
        with self._changed:
            self._changed.notify_all()
            if self._feeder is None:
                self._line.close()

    def join_thread(self) -> None:
        """After `close`, wait until everything that was put in is in shared memory."""
        assert self._closed, f"{self!r} must be closed before its thread is joined"
        if self._join is not None:
            self._join()

    def cancel_join_thread(self) -> None:
        """Let the process end although something waits; that is lost then."""
        self._join_cancelled = True
        if self._join is not None:
            self._join.cancel()

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError(f"Queue {self!r} is closed")

    def _count_in(self) -> None:
        """An object is about to be put in."""

    def _losing(self) -> Callable[[], None]:
        """What counts an object out that was not put in after all; may outlive this queue."""
        return self._room.release

    def _own(self) -> None:
        if self._process_id != os.getpid():  # forked by other means than multiprocessing
            self._reset()

    def _put_later(self, data: bytes, buffers: list[Any]) -> None:
        self._own()
        with self._changed:
            if self._feeder is None:
                feeder = threading.Thread(
                    target=_feed,
                    args=(
                        self._line,
                        self._backlog,
                        self._changed,
                        weakref.ref(self, functools.partial(_notify, self._changed)),
                        self._losing(),
                    ),
                    name="moirai-queue-feeder",
                    daemon=True,
                )
                feeder.start()
                self._feeder = feeder
                if not self._join_cancelled:
                    self._join = multiprocessing.util.Finalize(
                        self._feeder, _join, [self._backlog, self._changed], exitpriority=-5
                    )
            self._backlog.append((data, buffers))
            self._changed.notify_all()


def _feed(
    line: _Line,
    backlog: collections.deque[tuple[bytes, list[Any]]],
    changed: threading.Condition,
    queue: weakref.ref[Queue[Any]],
    lose: Callable[[], None],
) -> None:
    """The feeder's thread: passes on what waits, and ends with its queue.

    What cannot be passed on, as when there is no memory for it, is reported and left out.
    """
    while True:
        with changed:
            while not backlog:
                owner = queue()
                if owner is None or owner._closed:
                    line.close()
                    changed.notify_all()
                    return
                del owner
                changed.wait()
        try:
            line.put(*backlog[0])
        except Exception as error:
            about = (type(error), error, error.__traceback__, threading.current_thread())
            threading.excepthook(threading.ExceptHookArgs(about))
            lose()
        with changed:
            backlog.popleft()
            changed.notify_all()


def _notify(changed: threading.Condition, _: object) -> None:
    with changed:
        changed.notify_all()


def _join(
    backlog: collections.deque[tuple[bytes, list[Any]]], changed: threading.Condition
) -> None:
    with changed:
        changed.wait_for(lambda: not backlog)


class JoinableQueue(Queue[_Item]):
    """What `multiprocessing.JoinableQueue` is: a `Queue` that counts what is not dealt with yet."""

    def __init__(
        self, maxsize: int = 0, *, ctx: Any = None, capacity_bytes: int | str = "16 MiB"
    ) -> None:
        context = multiprocessing.get_context() if ctx is None else ctx
        super().__init__(maxsize, ctx=context, capacity_bytes=capacity_bytes)
        self._unfinished = context.Semaphore(0)
        self._finished = context.Condition()

    def __getstate__(self) -> Any:
        return super().__getstate__(), self._unfinished, self._finished

    def __setstate__(self, state: Any) -> None:
        state, self._unfinished, self._finished = state
        super().__setstate__(state)

    def _count_in(self) -> None:
        with self._finished:
            self._unfinished.release()

    def _losing(self) -> Callable[[], None]:
        return functools.partial(_lose, self._room, self._unfinished, self._finished)

    def task_done(self) -> None:
        """Say that an object that was taken has been dealt with.

        Raises:
            ValueError: More were dealt with than were put in.
        """
        _finish_one(self._unfinished, self._finished)

    def join(self) -> None:
        """Wait until every object that was put in has been dealt with."""
        with self._finished:
            if self._unfinished.get_value() != 0:
                self._finished.wait()


def _finish_one(unfinished: Any, finished: Any) -> None:
    with finished:
        if not unfinished.acquire(False):
            raise ValueError("task_done() called too many times")
        if unfinished.get_value() == 0:
            finished.notify_all()


def _lose(room: Any, unfinished: Any, finished: Any) -> None:
    _finish_one(unfinished, finished)
    room.release()
