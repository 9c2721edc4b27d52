"""multiprocessing.Pipe on shared channels, for code that uses it already."""

from __future__ import annotations

import contextlib
import multiprocessing.connection
import os
import select
import socket
import time
from collections.abc import Iterable
from multiprocessing import BufferTooShort
from multiprocessing.reduction import DupFd
from typing import Any

from moirai.channels import parcels
from moirai.channels.closing import ClosesAtExit
from moirai.channels.shared import SharedChannel, SharedReceiver, SharedSender
from moirai.errors import Closed, Disconnected, Timeout

__all__ = ["Connection", "Pipe", "wait"]

_PATIENCE_SECONDS = 0.04
"""How often one who waits for a peer that has not come yet looks whether it still may."""


def Pipe(  # noqa: N802 - the name that multiprocessing gives it
    duplex: bool = True, *, capacity_bytes: int | str = "4 MiB"
) -> tuple[Connection, Connection]:
    """Make two connected ends, as `multiprocessing.Pipe` does.

    Args:
        duplex: Whether both ends send and receive; otherwise the first receives, the second sends.
        capacity_bytes: What may be on its way in each direction in long messages. Longer ones pass
            as well, more slowly; who sends one waits until it is received.

    Raises:
        OutOfMemory: The memory is not there.
        InvalidArgument: `capacity_bytes` is outside its range.
    """
    there = SharedChannel.create(capacity_bytes=capacity_bytes)
    back = SharedChannel.create(capacity_bytes=capacity_bytes) if duplex else None
    first, second = socket.socketpair()
    return Connection(first, there, back), Connection(second, back, there)


class Connection(ClosesAtExit):
    """One end of a pipe: what `multiprocessing.connection.Connection` is, over shared memory.

    Every process that has it, by inheritance or by a pickle, has the same end. One thread of one
    process at a time should send, and one receive. The other end is gone when every copy of it in
    every process is closed or dead: then, what was sent is received, and EOFError is raised.
    """

    def __init__(
        self, life: socket.socket, incoming: SharedChannel | None, outgoing: SharedChannel | None
    ) -> None:
        # Nothing is written to this socket. The kernel knows who has the other one, copies on
        # their way to a process included, and says when nobody has.
        self._life = life
        self._incoming = incoming
        self._outgoing = outgoing
        self._receiver: SharedReceiver | None = None
        self._sender: SharedSender | None = None
        # Open while nobody else receives but somebody still may, so that sending goes on.
        self._placeholder: SharedReceiver | None = None
        self._watch: _Watch | None = None
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._closed

    @property
    def readable(self) -> bool:
        """Whether it receives."""
        return self._incoming is not None

    @property
    def writable(self) -> bool:
        """Whether it sends."""
        return self._outgoing is not None

    # === sending ================================================================================

    def send(self, obj: Any) -> None:
        """Send an object, waiting while there is no room.

        Raises:
            BrokenPipeError: The other end is gone.
            OSError: This end is closed, or only receives.
        """
        ends = self._ready_to_send()
        self._deliver(ends, *parcels.dump(obj))

    def send_bytes(self, buf: Any, offset: int = 0, size: int | None = None) -> None:
        """Send the bytes of an object, or `size` of them from `offset` on; as `send`.

        Raises:
            ValueError: It has no such bytes.
        """
        ends = self._ready_to_send()
        view = memoryview(buf)
        if view.itemsize > 1:
            view = view.cast("B")
        if offset < 0:
            raise ValueError(f"offset: must be at least 0, got {offset}")
        if offset > view.nbytes:
            raise ValueError(f"offset: must be at most {view.nbytes} (its length), got {offset}")
        left = view.nbytes - offset
        if size is None:
            size = left
        if not 0 <= size <= left:
            raise ValueError(f"size: must be from 0 to {left} (what is left), got {size}")
        whole = size == view.nbytes and isinstance(buf, bytes)
        self._deliver(ends, buf if whole else view[offset : offset + size], None)

    def _deliver(
        self, ends: tuple[SharedChannel, SharedSender], data: Any, buffers: list[Any] | None
    ) -> None:
        outgoing, sender = ends
        while True:
            if outgoing.receiver_count == 0 or self._placeholder is not None:
                self._make_sure_of_a_receiver(outgoing)
            try:
                parcels.send(outgoing, sender, data, buffers, self._check_peer)
                return
            except Disconnected:  # all who received left just now
                self._make_sure_of_a_receiver(outgoing)
            except Closed:
                raise self._closed_error() from None

    def _make_sure_of_a_receiver(self, outgoing: SharedChannel) -> None:
        """Nobody receives. If nobody ever will, say so; otherwise see to it that sending goes on.

        A copy of the other end may be on its way to a process, or in one that has not used it yet.
        """
        self._check_peer()
        if self._placeholder is None:
            self._placeholder = outgoing.receiver()
        elif outgoing.receiver_count > 1:
            self._placeholder.close()
            self._placeholder = None

    def _check_peer(self) -> None:
        if self._peer_is_gone():
            raise BrokenPipeError(32, "the other end of this connection is gone")

    def _ready_to_send(self) -> tuple[SharedChannel, SharedSender]:
        outgoing, sender = self._outgoing, self._sender
        if outgoing is None:
            if self._closed:
                raise self._closed_error()
            raise OSError("this connection only receives")
        if sender is None:
            sender = self._sender = outgoing.sender()
        return outgoing, sender

    # === receiving ==============================================================================

    def recv(self) -> Any:
        """Receive an object, waiting for it.

        Raises:
            EOFError: The other end is gone, and what it sent is received.
            OSError: This end is closed, or only sends.
        """
        return parcels.load(self._take())

    def recv_bytes(self, maxlength: int | None = None) -> bytes:
        """Receive bytes; of an object, its pickle. As `recv`.

        Raises:
            ValueError: `maxlength` is negative.
            OSError: The message is longer than `maxlength`; it is lost, and this end receives no
                more.
        """
        if maxlength is not None and maxlength < 0:
            raise ValueError(f"maxlength: must be at least 0, got {maxlength}")
        data = parcels.bytes_of(self._take())
        if maxlength is not None and len(data) > maxlength:
            if self._outgoing is None:
                self.close()
            else:
                self._stop_receiving()
            raise OSError(f"maxlength: the message has {len(data)} bytes, more than {maxlength}")
        return data

    def recv_bytes_into(self, buf: Any, offset: int = 0) -> int:
        """Receive bytes into a writable buffer, from `offset` on; how many. As `recv`.

        Raises:
            ValueError: The buffer has no such offset.
            BufferTooShort: The message is longer than what is left; it is in the exception.
        """
        with memoryview(buf) as view, view.cast("B") as place:
            if not 0 <= offset <= place.nbytes:
                raise ValueError(f"offset: must be from 0 to {place.nbytes}, got {offset}")
            data = parcels.bytes_of(self._take())
            if offset + len(data) > place.nbytes:
                raise BufferTooShort(data)
            place[offset : offset + len(data)] = data
            return len(data)

    def poll(self, timeout: float | None = 0.0) -> bool:
        """Wait up to `timeout` seconds, None for ever; whether `recv` would not wait.

        So it is also after the other end is gone.
        """
        incoming, receiver = self._ready_to_receive()
        deadline = None if timeout is None else time.monotonic() + max(0.0, timeout)
        try:
            found = self._wait(incoming, receiver, deadline)
        except EOFError:
            found = True
        self._refresh()
        return found

    def _ready_to_receive(self) -> tuple[SharedChannel, SharedReceiver]:
        incoming, receiver = self._incoming, self._receiver
        if incoming is None:
            if self._closed:
                raise self._closed_error()
            raise OSError("this connection only sends")
        if receiver is None:
            receiver = self._receiver = incoming.receiver()
        return incoming, receiver

    def _take(self) -> parcels.Parcel:
        incoming, receiver = self._ready_to_receive()
        while True:
            try:
                # A sender that goes tells those who wait. One that never came cannot.
                parcel = parcels.take(
                    receiver, None if incoming.sender_count else _PATIENCE_SECONDS
                )
            except (Timeout, Disconnected):
                parcel = None
            except Closed:
                raise self._closed_error() from None
            if parcel is not None:
                self._refresh()
                return parcel
            self._wait(incoming, receiver, None)

    def _wait(
        self, incoming: SharedChannel, receiver: SharedReceiver, deadline: float | None
    ) -> bool:
        """Wait for a message; whether there is one. Raises EOFError if none can come any more."""
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            try:
                if receiver._wait(left if incoming.sender_count else _shorter(left)):
                    return True
                is_gone = self._peer_is_gone()
            except Disconnected:
                # Those who sent are gone, but somebody may have a copy: wait until nobody has.
                is_gone = self._peer_is_gone(_shorter(left))
            except Closed:
                raise self._closed_error() from None
            if is_gone:
                # Asked in this order: whoever goes has sent before.
                with contextlib.suppress(Disconnected):
                    if receiver._wait(0):
                        return True
                raise EOFError("the other end of this connection is gone")
            if deadline is not None and time.monotonic() >= deadline:
                return False

    def _stop_receiving(self) -> None:
        if self._receiver is not None:
            self._receiver.close()
        if self._incoming is not None:
            self._incoming.close()
        self._incoming = self._receiver = None

    # === both ===================================================================================

    def _peer_is_gone(self, seconds: float = 0.0) -> bool:
        """Whether nobody has the other end any more, within a time."""
        poll = select.poll()
        try:
            poll.register(self._life, 0)
        except ValueError:
            raise self._closed_error() from None
        return bool(poll.poll(1000 * seconds))

    def fileno(self) -> int:
        """A descriptor that is readable when `recv` would not wait, for `wait`, select and asyncio.

        Of an end that only sends, one that is readable when the other end is gone.
        """
        if self._incoming is None and not self._closed:
            return self._life.fileno()
        incoming, receiver = self._ready_to_receive()
        watch = self._watch
        if watch is None or watch.process_id != os.getpid():
            watch = self._watch = _Watch(self._life, incoming, receiver)
        watch.refresh()
        return watch.fileno()

    def _refresh(self) -> None:
        watch = self._watch
        if watch is not None and watch.process_id == os.getpid():
            watch.refresh()

    def _closed_error(self) -> OSError:
        return OSError("this connection is closed")

    def close(self) -> None:
        """Close this process's copy of the end."""
        if self._closed:
            return
        self._closed = True
        # First what the others look at, then what tells them to look.
        self._life.close()
        for end in (self._sender, self._receiver, self._placeholder):
            if end is not None:
                end.close()
        if self._watch is not None:
            self._watch.close()
        # The channels are left when nobody in this process has them any more.
        self._incoming = self._outgoing = None
        self._sender = self._receiver = self._placeholder = self._watch = None

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # it was not made
            self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        if self._closed:
            raise self._closed_error()
        return _rebuild, (DupFd(self._life.fileno()), self._incoming, self._outgoing)


def _rebuild(
    life: Any, incoming: SharedChannel | None, outgoing: SharedChannel | None
) -> Connection:
    return Connection(socket.socket(fileno=life.detach()), incoming, outgoing)


def _shorter(seconds: float | None) -> float:
    return _PATIENCE_SECONDS if seconds is None else min(seconds, _PATIENCE_SECONDS)


class _Watch:
    """A descriptor that is readable while there is a message, or nobody who could send one."""

    def __init__(
        self, life: socket.socket, channel: SharedChannel, receiver: SharedReceiver
    ) -> None:
        self.process_id = os.getpid()
        self._channel = channel
        self._receiver = receiver
        self._is_set = False
        self._epoll = select.epoll()
        self._epoll.register(channel._doorbell(), select.EPOLLIN)
        self._epoll.register(life, 0)  # which asks for nothing but its end
        # Last, since what fails after this would leave it open.
        self._flag = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._flag, select.EPOLLIN)

    def fileno(self) -> int:
        return self._epoll.fileno()

    def refresh(self) -> None:
        """Ask to be rung, and look whether that is needless."""
        with contextlib.suppress(Closed):
            self._channel._drain_doorbell()
            self._receiver._arm()
            is_there = False
            with contextlib.suppress(Disconnected):
                is_there = self._receiver._wait(0)
            if is_there and not self._is_set:
                os.eventfd_write(self._flag, 1)
            elif self._is_set and not is_there:
                os.eventfd_read(self._flag)
            self._is_set = is_there

    def close(self) -> None:
        if self.process_id == os.getpid():
            self._epoll.close()
            os.close(self._flag)


def wait(object_list: Iterable[Any], timeout: float | None = None) -> list[Any]:
    """Wait until some of the objects are ready, as `multiprocessing.connection.wait` does.

    That one works with these connections too, but may name one whose message another process took
    meanwhile.

    Args:
        object_list: Connections of either kind, sockets, sentinels of processes.
        timeout: How many seconds to wait at most; None waits for ever.
    """
    objects = list(object_list)
    deadline = None if timeout is None else time.monotonic() + timeout
    while True:
        left = None if deadline is None else deadline - time.monotonic()
        found = multiprocessing.connection.wait(objects, left)
        ready = [it for it in found if not isinstance(it, Connection) or it.poll()]
        if ready or not found:
            return ready
