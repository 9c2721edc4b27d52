"""Messages of any kind and length over a shared channel, as multiprocessing's code expects them."""

from __future__ import annotations

import collections
import contextlib
import copyreg
import io
import pickle
import time
import uuid
from collections.abc import Callable, Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any, TypeAlias, cast

from moirai.channels.shared import SharedChannel, SharedReceiver, SharedSender
from moirai.errors import Disconnected, Timeout

__all__ = ["Parcel", "bytes_of", "dump", "load", "message_bytes", "send", "send_apart", "take"]

BYTES, ARRAY, OBJECT, PICKLE = range(4)

Parcel: TypeAlias = tuple[int, Any, list[tuple[int, int]]]
"""A message as it came: its kind, the object that has its bytes, where its parts lie."""

# What begins a message whose contents lie in a channel of their own. No pickle begins so.
_APART = b"\0moirai"
_ROOM_SECONDS = 0.1
_PATIENCE_SECONDS = 0.04
_SLACK_BYTES = 1 << 16


class _Pickler(pickle.Pickler):
    """What multiprocessing's reducers need, without a table of its own for each message."""

    # A view of both: what is registered later counts too.
    dispatch_table = collections.ChainMap(  # noqa: RUF012 - looked up by the pickler as it is
        ForkingPickler._extra_reducers,  # type: ignore[attr-defined]
        cast("dict[type, Any]", copyreg.dispatch_table),
    )


def dump(item: Any) -> tuple[bytes, list[Any]]:
    """Pickle an object; the pickle, and the buffers that it left out."""
    buffers: list[pickle.PickleBuffer] = []
    file = io.BytesIO()
    _Pickler(file, 5, buffer_callback=buffers.append).dump(item)
    return file.getvalue(), [buffer.raw() for buffer in buffers] if buffers else buffers


def message_bytes(data: Any, buffers: Sequence[Any] | None) -> int:
    """How long a message of a pickle and its buffers is, or of bytes if `buffers` is None."""
    if not buffers:
        return len(data)
    # A table of where the parts are, then each at a multiple of 64 bytes.
    lengths = [len(data), *map(len, buffers)]
    return 8 + 16 * len(lengths) + sum(-(-length // 64) * 64 for length in lengths) + 64


def load(parcel: Parcel) -> Any:
    """Make the object that was sent; what was sent as bytes is taken for a pickle."""
    kind, item, parts = parcel
    if kind == OBJECT:
        view = memoryview(item)
        first, *others = [view[start:end] for start, end in parts]
        return pickle.loads(first, buffers=others)
    return pickle.loads(item)


def bytes_of(parcel: Parcel) -> bytes:
    """Give the bytes that were sent; of an object, its pickle."""
    if parcel[0] == OBJECT:
        return pickle.dumps(load(parcel))
    data: bytes = parcel[1]
    return data


def send(
    channel: SharedChannel,
    sender: SharedSender,
    data: Any,
    buffers: Sequence[Any] | None,
    check: Callable[[], None],
) -> None:
    """Send a pickle and its buffers, or bytes if `buffers` is None, however long.

    A message for which there is no room among the blocks, because it is too long or because others
    keep them, goes through a channel of its own.

    Args:
        channel: Where the sender belongs.
        sender: What sends.
        data: The pickle or the bytes.
        buffers: Contiguous buffers of bytes.
        check: Called now and then while this waits; raises if waiting is in vain.
    """
    length = message_bytes(data, buffers)
    if length > channel.capacity_bytes:
        send_apart(sender, data, buffers, length, check)
        return
    is_long = length > channel.inline_bytes
    while True:
        try:
            _send(sender, data, buffers, _ROOM_SECONDS if is_long else _PATIENCE_SECONDS)
            return
        except Timeout:
            check()
        if is_long:
            send_apart(sender, data, buffers, length, check)
            return


def _send(
    sender: SharedSender, data: Any, buffers: Sequence[Any] | None, timeout_seconds: float | None
) -> None:
    if buffers is None:
        sender.send_bytes(data, timeout_seconds)
    else:
        sender._send_object(data, list(buffers), timeout_seconds, references=False)


def send_apart(
    sender: SharedSender,
    data: Any,
    buffers: Sequence[Any] | None,
    length: int,
    check: Callable[[], None],
) -> None:
    """Send a message through a channel of its own, and wait until it is taken."""
    name = f"apart-{uuid.uuid4().hex}"
    with SharedChannel.create(name, length + _SLACK_BYTES) as apart:
        end = apart.sender()
        _send(end, data, buffers, None)
        while True:
            try:
                sender._send_object(_APART + name.encode(), [], _PATIENCE_SECONDS)
                break
            except Timeout:
                check()
        # Whoever takes it closes its end. To be told, this waits for room that never comes.
        filler = bytes(apart.inline_bytes)
        with contextlib.suppress(Disconnected):
            while True:
                try:
                    end.send_bytes(filler, _PATIENCE_SECONDS)
                except Timeout:
                    check()


def take(receiver: SharedReceiver, timeout_seconds: float | None) -> Parcel:
    """Receive a message.

    Raises:
        Timeout, Disconnected, Closed: As for `receive`.
    """
    deadline = None
    while True:
        parcel = receiver._receive_any(timeout_seconds)
        if parcel[0] != PICKLE or not parcel[1].startswith(_APART):
            return parcel
        found = _take_apart(parcel[1][len(_APART) :].decode())
        if found is not None:
            return found
        # Whoever sent it gave up, or died, before it was taken.
        if timeout_seconds is not None:
            now = time.monotonic()
            deadline = now + timeout_seconds if deadline is None else deadline
            timeout_seconds = max(0.0, deadline - now)


def _take_apart(name: str) -> Parcel | None:
    try:
        with SharedChannel.open(name) as apart, apart.receiver() as end:
            return end._receive_any(0)
    except (Disconnected, Timeout):
        return None
