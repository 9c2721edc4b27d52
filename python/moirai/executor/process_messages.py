"""Calls and results as messages of a shared channel, their large parts in shared memory."""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from moirai.channels import parcels
from moirai.channels.shared import SharedReceiver, SharedSender
from moirai.errors import OutOfMemory
from moirai.memory import SharedMemoryResource, parse_bytes

__all__ = [
    "Content",
    "Head",
    "Packed",
    "Placer",
    "dump",
    "load",
    "receive",
    "send",
    "send_head",
]

# Of any message: what it is, who sends it, which call it is about; how its parts lie.
_HEAD = struct.Struct("<BIQBQI")
_PART = struct.Struct("<QQ")
_ALIGNMENT = 64

_BYTES, _OBJECT, _PICKLE, _LENT_OBJECT = 0, 2, 3, 5
_INLINE, _PACKED = 0, 1
# References in a message; the rest is copied. A message with more would not fit the ring.
_MOST_LENT = 64


class Head(NamedTuple):
    """What a message says before its contents: what it is, who sent it, which call it is about."""

    kind: int
    worker: int = 0
    call: int = 0


class Content(NamedTuple):
    """An object as a pickle and the buffers that it left out; `lent` are in shared memory."""

    pickle: bytes
    buffers: list[Any]
    lent: list[bool]

    @property
    def copied_bytes(self) -> int:
        """Bytes of buffers that are copied to be sent."""
        return sum(
            len(buffer)
            for buffer, is_lent in zip(self.buffers, self.lent, strict=True)
            if not is_lent
        )

    @property
    def lent_bytes(self) -> int:
        """Bytes of buffers that are not."""
        return sum(map(len, self.buffers)) - self.copied_bytes


def dump(item: object) -> Content:
    """Pickle an object, by cloudpickle if it is installed and nothing else can.

    Raises:
        Exception: What pickling raises.
    """
    found: list[pickle.PickleBuffer] = []
    try:
        data = pickle.dumps(item, 5, buffer_callback=found.append)
        buffers = [buffer.raw() for buffer in found]
    except Exception:
        data, buffers = _dump_otherwise(item)
    if not buffers:
        return Content(data, [], [])
    lent = [len(buffer) > 0 and SharedSender._lends(buffer) for buffer in buffers]
    if sum(lent) > _MOST_LENT:
        lent = [False] * len(buffers)
    return Content(data, buffers, lent)


def _dump_otherwise(item: object) -> tuple[bytes, list[memoryview]]:
    """By multiprocessing's reducers, which cost more, or by cloudpickle."""
    try:
        return parcels.dump(item)
    except Exception:
        try:
            import cloudpickle
        except ImportError:
            cloudpickle = None
        if cloudpickle is None:
            raise
        found: list[pickle.PickleBuffer] = []
        file = io.BytesIO()
        cloudpickle.Pickler(file, 5, buffer_callback=found.append).dump(item)
        return file.getvalue(), [buffer.raw() for buffer in found]


class Packed(NamedTuple):
    """What an object is made of where it was received."""

    pickle: memoryview
    buffers: list[memoryview]


class Placer:
    """Puts what is too long for a channel's ring into shared memory that is made when needed.

    For one thread at a time. A forked child makes its own.
    """

    def __init__(self, capacity_bytes: int | str) -> None:
        self._capacity_bytes = parse_bytes(capacity_bytes, argument="memory_bytes")
        self._resource: SharedMemoryResource | None = None

    @property
    def lingering_bytes(self) -> int:
        """Bytes that were let go here, but not yet by those who received them."""
        return 0 if self._resource is None else self._resource.lingering_bytes

    def place(self, parts: Sequence[Any]) -> tuple[Any, int]:
        """Copy parts into one block: it, and where in it the table of the parts is.

        Raises:
            OutOfMemory: There is no room.
        """
        if self._resource is None:
            self._resource = SharedMemoryResource(self._capacity_bytes)
        table, end = bytearray(), 0
        for part in parts:
            start = -(-end // _ALIGNMENT) * _ALIGNMENT
            end = start + len(part)
            table += _PART.pack(start, end)
        block: Any
        try:
            block = self._resource.allocate(end + len(table))
        except OutOfMemory:
            self._resource.trim()  # takes back what killed processes had
            block = self._resource.allocate(end + len(table))
        place = np.frombuffer(block, np.uint8)
        for part, (start, stop) in zip(parts, _PART.iter_unpack(table), strict=True):
            if stop > start:  # NumPy's copy: it lets other threads run
                place[start:stop] = np.frombuffer(part, np.uint8)
        place[end:] = np.frombuffer(table, np.uint8)
        return block, end


def send(
    sender: SharedSender,
    head: Head,
    content: Content,
    placer: Placer,
    inline_bytes: int,
    timeout_seconds: float | None,
) -> None:
    """Send a message.

    Args:
        sender: Where to.
        head: What it is.
        content: Its contents.
        placer: What copies that do not fit the ring go to.
        inline_bytes: How much fits the ring.
        timeout_seconds: How long to wait for room; None for ever, 0 not at all.

    Raises:
        Timeout: There was no room in time; nothing was sent.
        OutOfMemory: There is no room in the placer's memory.
        Disconnected: The receiver is gone.
    """
    data, buffers, lent = content
    if not buffers and len(data) + _HEAD.size <= inline_bytes:
        sender._send_object(_HEAD.pack(*head, _INLINE, 0, 0) + data, buffers, timeout_seconds)
        return
    kept = [buffer for buffer, is_lent in zip(buffers, lent, strict=True) if not is_lent]
    flags = bytes(lent)
    # A reference takes 48 bytes, a part 16 in the table and 1 among the flags.
    around = 1024 + 17 * len(buffers) + 48 * sum(lent)
    if len(data) + sum(map(len, kept)) + around <= inline_bytes:
        front = _HEAD.pack(*head, _INLINE, 0, len(flags)) + flags
        sender._send_object(front + data, list(buffers), timeout_seconds)
        return
    block, table = placer.place([data, flags, *kept])
    front = _HEAD.pack(*head, _PACKED, table, 0)
    references = [buffer for buffer, is_lent in zip(buffers, lent, strict=True) if is_lent]
    sender._send_object(front, [memoryview(block), *references], timeout_seconds)


def send_head(sender: SharedSender, head: Head) -> None:
    """Send a message without contents, waiting for room.

    Raises:
        Disconnected: The receiver is gone.
    """
    sender.send_bytes(_HEAD.pack(*head, _INLINE, 0, 0))


def receive(receiver: SharedReceiver, timeout_seconds: float | None) -> tuple[Head, Packed]:
    """Receive a message: its head, and what `load` makes an object of.

    Raises:
        Timeout: None came in time.
        Disconnected: Nobody is left to send one.
    """
    kind, item, parts = receiver._receive_any(timeout_seconds)
    if kind in (_PICKLE, _BYTES):
        what, worker, call, _, _, _ = _HEAD.unpack_from(item)
        return Head(what, worker, call), Packed(memoryview(item)[_HEAD.size :], [])
    if kind == _OBJECT:
        view = memoryview(item)
        front, *buffers = [view[start:end] for start, end in parts]
    else:
        assert kind == _LENT_OBJECT
        view = memoryview(item[0])
        front, *buffers = [view[start:end] for start, end in parts]
        for index, block in item[1]:
            buffers[index - 1] = memoryview(block)
    *head, layout, table, flag_count = _HEAD.unpack_from(front)
    flags = front[_HEAD.size : _HEAD.size + flag_count]
    data = front[_HEAD.size + flag_count :]
    if layout == _PACKED:
        block, *references = buffers
        places = [block[start:end] for start, end in _PART.iter_unpack(block[table:])]
        data, flags, *kept = places
        ours, theirs = iter(kept), iter(references)
        buffers = [next(theirs) if is_lent else next(ours) for is_lent in flags]
    # What is lent is its sender's to write to; what was copied is the receiver's.
    buffers = [
        buffer.toreadonly() if is_lent else buffer
        for buffer, is_lent in zip(buffers, flags, strict=True)
    ]
    return Head(*head), Packed(data, buffers)


def load(packed: Packed) -> Any:
    """Make the object that was sent.

    Raises:
        BaseException: What unpickling raises.
    """
    return pickle.loads(packed.pickle, buffers=packed.buffers)
