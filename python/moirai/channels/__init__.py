"""Messages from any thread, task or process to any other: bounded, closable, in order.

`Channel` is between the threads and event loops of one process and copies nothing; `SharedChannel`
is between processes. Every object here may be used by any number of threads at once, with or
without the GIL, and the channels by any number of event loops. What a forked child has is told in
docs/channels.md and docs/shared_channels.md.
"""

from __future__ import annotations

from moirai._native import Channel, ChannelStatistics, Receiver, Sender
from moirai.channels import processes
from moirai.channels.batching import BatchingSender, BatchingStatistics, TrafficClass
from moirai.channels.broadcast import Broadcast, SlowPolicy, Subscription
from moirai.channels.pipes import Connection, Pipe
from moirai.channels.queues import Empty, Full, Queue, ShutDown
from moirai.channels.selecting import Selected, select, select_async
from moirai.channels.shared import (
    ReceivedView,
    ReservedArray,
    SharedChannel,
    SharedReceiver,
    SharedSender,
)
from moirai.channels.shared_broadcast import SharedBroadcast, SharedSubscription

__all__ = [
    "BatchingSender",
    "BatchingStatistics",
    "Broadcast",
    "Channel",
    "ChannelStatistics",
    "Connection",
    "Empty",
    "Full",
    "Pipe",
    "Queue",
    "ReceivedView",
    "Receiver",
    "ReservedArray",
    "Selected",
    "Sender",
    "SharedBroadcast",
    "SharedChannel",
    "SharedReceiver",
    "SharedSender",
    "SharedSubscription",
    "ShutDown",
    "SlowPolicy",
    "Subscription",
    "TrafficClass",
    "processes",
    "select",
    "select_async",
]
