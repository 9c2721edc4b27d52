"""Channels: bounded queues between processes."""

from __future__ import annotations

from moirai.channels.shared import (
    ReceivedView,
    ReservedArray,
    SharedChannel,
    SharedReceiver,
    SharedSender,
)

__all__ = [
    "ReceivedView",
    "ReservedArray",
    "SharedChannel",
    "SharedReceiver",
    "SharedSender",
]
