"""Every subscriber in every process sees every message of one sender."""

from __future__ import annotations

import pickle
import threading
from time import monotonic
from typing import Any

from moirai.channels.broadcast import SlowPolicy, check_policy
from moirai.channels.closing import ClosesAtExit
from moirai.channels.shared import SharedChannel, SharedReceiver
from moirai.errors import Closed, Disconnected, Timeout

__all__ = ["SharedBroadcast", "SharedSubscription"]


class SharedSubscription:
    """A subscriber's channel. Made by `SharedBroadcast.subscribe`, and given to any process.

    Attributes:
        channel: The channel: `subscription.receiver()` is `subscription.channel.receiver()`.
        slow: What happens when it is full.
    """

    def __init__(self, channel: SharedChannel, slow: SlowPolicy) -> None:
        self.channel = channel
        self.slow = slow
        self._sender = channel.sender()
        self._dropped_count = 0
        # Takes the oldest when there is no room. While it is open, nobody else says who left.
        self._dropper: SharedReceiver | None = None
        self._was_there = False

    @property
    def dropped_count(self) -> int:
        """Messages it lost because it was slow, as the sending process knows."""
        return self._dropped_count

    def receiver(self) -> SharedReceiver:
        """Open the receiving end in this process; a context manager."""
        return self.channel.receiver()

    def close(self) -> None:
        """End it, and leave its channel."""
        self.channel.close()

    def __reduce__(self) -> tuple[Any, ...]:
        # The sending end stays where it is.
        return _subscribed, (self.channel, self.slow)

    # === in the sending process =================================================================

    def _send(self, data: bytes, buffers: list[Any], timeout_seconds: float | None) -> bool:
        """Send one message as the policy says; whether it is still subscribed.

        Raises:
            Timeout: It makes the sender wait, and had no room in time.
        """
        sender = self._sender
        try:
            if self.slow == "block":
                sender._send_object(data, buffers, timeout_seconds)
                return True
            while True:
                if self._dropper is not None and self._has_left():
                    return False
                try:
                    sender._send_object(data, buffers, 0)
                    return True
                except Timeout:
                    if self.slow == "disconnect":
                        return False
                    self._dropped_count += 1
                    if not self._drop_oldest():
                        return True  # what has no room is the new one: the rest is being viewed
        except (Disconnected, Closed):
            return False

    def _has_left(self) -> bool:
        is_there = self.channel.receiver_count > 1
        self._was_there = self._was_there or is_there
        return self._was_there and not is_there

    def _drop_oldest(self) -> bool:
        if self._dropper is None:
            self._was_there = self.channel.receiver_count > 0
            self._dropper = self.channel.receiver()
        try:
            self._dropper._receive_any(0)
        except (Timeout, Disconnected):
            return False
        return True

    def _end(self) -> None:
        self._sender.close()
        if self._dropper is not None:
            self._dropper.close()


def _subscribed(channel: SharedChannel, slow: SlowPolicy) -> SharedSubscription:
    subscription = SharedSubscription.__new__(SharedSubscription)
    subscription.channel = channel
    subscription.slow = slow
    subscription._dropped_count = 0
    return subscription


class SharedBroadcast(ClosesAtExit):
    """Sends each message to every subscriber, whatever process it is in.

    Each subscriber has a channel of its own, so that what one does is no other's loss: a message is
    pickled once, and copied into each. One process sends, any number of its threads, one at a time;
    others send to it. A message for nobody is gone.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._subscriptions: tuple[SharedSubscription, ...] = ()
        self._closed = False

    def subscribe(
        self,
        capacity_bytes: int | str = "4 MiB",
        slow: SlowPolicy = "block",
        name: str | None = None,
    ) -> SharedSubscription:
        """Make a subscriber that sees every message from now on; pass it to its process.

        Args:
            capacity_bytes: What may wait for it in long messages, as of a `SharedChannel`.
            slow: What happens when its channel is full.
            name: Of its channel, for a process that opens it with `SharedChannel.open(name)`.

        Raises:
            Closed: The broadcast is closed.
            InvalidArgument: An argument is outside its range.
            OutOfMemory: The memory is not there.
        """
        check_policy(slow)
        with self._lock:
            if self._closed:
                raise Closed("subscribe: this broadcast is closed")
            channel = SharedChannel.create(name, capacity_bytes)
            subscription = SharedSubscription(channel, slow)
            self._subscriptions = (*self._subscriptions, subscription)
        return subscription

    def send(self, item: Any, timeout_seconds: float | None = None) -> int:
        """Send an object to every subscriber; returns how many there are.

        Args:
            item: Any object that can be pickled.
            timeout_seconds: How long to wait at most for subscribers that make the sender wait.

        Raises:
            Timeout: Some had no room in time. They did not get it and the others did:
                `sent_count` says how many.
            Closed: The broadcast is closed.
            InvalidArgument: It is longer than the capacity of a subscriber. Those that are in line
                before it have got it.
        """
        buffers: list[pickle.PickleBuffer] = []
        data = pickle.dumps(item, protocol=5, buffer_callback=buffers.append)
        raw = [buffer.raw() for buffer in buffers]
        deadline = None if timeout_seconds is None else monotonic() + timeout_seconds
        with self._lock:
            if self._closed:
                raise Closed("send: this broadcast is closed")
            kept, late = [], 0
            # Who makes this wait comes last: the others have the message meanwhile.
            for one in sorted(self._subscriptions, key=lambda it: it.slow == "block"):
                left = None if deadline is None else max(0.0, deadline - monotonic())
                try:
                    if one._send(data, raw, left):
                        kept.append(one)
                except Timeout:
                    late += 1
                    kept.append(one)
            gone = [it for it in self._subscriptions if it not in kept]
            self._subscriptions = tuple(it for it in self._subscriptions if it in kept)
        for one in gone:
            one._end()
        if late:
            error = Timeout(
                f"send: {late} of {len(kept)} subscribers had no room within {timeout_seconds} s; "
                "the others got the message"
            )
            error.sent_count = len(kept) - late  # type: ignore[attr-defined]
            raise error
        return len(kept)

    @property
    def subscriptions(self) -> tuple[SharedSubscription, ...]:
        """Those who were subscribed when the last message was sent."""
        return self._subscriptions

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._closed

    def close(self) -> None:
        """Send no more. Subscribers receive what they have, then Disconnected."""
        with self._lock:
            self._closed = True
            subscriptions, self._subscriptions = self._subscriptions, ()
        for subscription in subscriptions:
            subscription._end()
