"""The first of several channels that is ready."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, TypeAlias

from moirai import _native

__all__ = ["Operation", "Selected", "select", "select_async"]

Operation: TypeAlias = (
    "_native.Channel[Any] | _native.Receiver[Any]"
    " | tuple[_native.Channel[Any] | _native.Sender[Any], Any]"
)
"""A channel or receiver to receive from, or where to send and what."""


class Selected(NamedTuple):
    """What `select` did.

    Attributes:
        which: The index of the operation that was done.
        item: What was received; None for an operation that sent.
    """

    which: int
    item: Any


def select(operations: Iterable[Operation], timeout_seconds: float | None = None) -> Selected:
    """Do exactly one of several operations: the first that can be done.

    Args:
        operations: What may be done; at least one. Operations of channels that have ended are left
            out. If several can be done, which one is tried first changes from call to call.
        timeout_seconds: How long to wait at most; >= 0. None waits for ever, 0 not at all.

    Raises:
        Timeout: None could be done in time; nothing was sent or received.
        Closed, Disconnected: All channels have ended; as the first of them says it.
        InvalidArgument: There is no operation, or `timeout_seconds` is negative.
        TypeError: An operation is none.
    """
    return Selected(*_native.select_channels(operations, timeout_seconds))


async def select_async(
    operations: Iterable[Operation], timeout_seconds: float | None = None
) -> Selected:
    """As `select`, but wait without blocking the event loop."""
    return Selected(*await _native.select_channels_async(operations, timeout_seconds))
