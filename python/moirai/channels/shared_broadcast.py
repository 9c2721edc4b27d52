"""Every subscriber in every process sees every message of one sender."""

from __future__ import annotations

import pickle
from time import monotonic
from typing import Any

from moirai._arguments import check_seconds
from moirai.channels.broadcast import BroadcastBase, SlowPolicy, check_policy
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
            has_dropped = True
            while True:
                if self._dropper is not None and self._has_left():
                    return False
                try:
                    sender._send_object(data, buffers, 0)
                    return True
                except Timeout:
                    if self.slow == "disconnect":
                        return False
                if not has_dropped:
                    self._dropped_count += 1
                    return True  # what has no room is the new one: the rest is being viewed
                # If there is nothing to drop, it may have been received just now: once more, then.
                has_dropped = self._drop_oldest()
                self._dropped_count += has_dropped
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


class SharedBroadcast(BroadcastBase[SharedSubscription, tuple[bytes, list[Any]]]):
    """Sends each message to every subscriber, whatever process it is in.

    Each subscriber has a channel of its own, so that what one does is no other's loss: a message is
    pickled once, and copied into each. One process sends, any number of its threads, one at a time;
    others send to it. What a signal's handler sends while its thread does goes next. A message for
    nobody is gone.
    """

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
        if self._closed:
            raise Closed("subscribe: this broadcast is closed")
        subscription = SharedSubscription(SharedChannel.create(name, capacity_bytes), slow)
        with self._changing:
            if not self._closed:
                self._subscriptions = (*self._subscriptions, subscription)
                return subscription
        subscription.close()
        raise Closed("subscribe: this broadcast is closed")

    def send(self, item: Any, timeout_seconds: float | None = None) -> int:
        """Send an object to every subscriber; returns how many there are.

        Args:
            item: Any object that can be pickled.
            timeout_seconds: How long to wait at most for subscribers that make the sender wait, and
                for another thread that sends; >= 0. None waits for ever.

        Raises:
            Timeout: Some had no room in time. They did not get it and the others did:
                `sent_count` says how many.
            Closed: The broadcast is closed. If it was while this waited, `sent_count` says how many
                had got the message.
            InvalidArgument: It is longer than the capacity of a subscriber. Those that are in line
                before it have got it. Or `timeout_seconds` is outside its range.
        """
        check_seconds("timeout_seconds", timeout_seconds)
        buffers: list[pickle.PickleBuffer] = []
        data = pickle.dumps(item, protocol=5, buffer_callback=buffers.append)
        raw = [buffer.raw() for buffer in buffers]
        deadline = None if timeout_seconds is None else monotonic() + timeout_seconds
        if not self._lock.acquire(timeout=-1 if timeout_seconds is None else timeout_seconds):
            text = f"send: another thread was sending for {timeout_seconds} s; nothing was sent"
            raise _told(Timeout(text), 0)
        try:
            if self._is_sending and not self._closed:
                self._following.append((data, [bytes(buffer) for buffer in raw]))
                return len(self._subscriptions)
            sent_count, late_count = self._send_in_turn(data, raw, deadline)
        finally:
            self._lock.release()
        if self._closed and late_count:
            text = f"send: this broadcast was closed meanwhile; {sent_count} subscribers got it"
            raise _told(Closed(text), sent_count)
        if late_count:
            text = (
                f"send: {late_count} of {sent_count + late_count} subscribers had no room within "
                f"{timeout_seconds} s; the others got the message"
            )
            raise _told(Timeout(text), sent_count)
        return sent_count

    def _send_in_turn(
        self, data: bytes, buffers: list[Any], deadline: float | None
    ) -> tuple[int, int]:
        self._is_sending = True
        try:
            counts = self._send_to_all(data, buffers, deadline)
            while self._following and not self._closed:
                self._send_to_all(*self._following.popleft(), None)
        finally:
            self._is_sending = False
            self._awaited = None
        return counts

    def _send_to_all(
        self, data: bytes, buffers: list[Any], deadline: float | None
    ) -> tuple[int, int]:
        """Send to each subscriber; how many got it, and how many still want it."""
        if self._closed:
            raise Closed("send: this broadcast is closed")
        sent_count = late_count = 0
        gone = []
        # Who makes this wait comes last: the others have the message meanwhile.
        for one in sorted(self._subscriptions, key=lambda it: it.slow == "block"):
            left = None if deadline is None else max(0.0, deadline - monotonic())
            self._awaited = one if one.slow == "block" else None
            try:
                if not self._closed and one._send(data, buffers, left):
                    sent_count += 1
                elif self._closed:
                    late_count += 1
                else:
                    gone.append(one)
            except Timeout:
                late_count += 1
        self._forget(*gone)
        for one in gone:
            one._end()
        return sent_count, late_count

    def _end(self, subscription: SharedSubscription) -> None:
        subscription._end()


def _told(error: Exception, sent_count: int) -> Exception:
    """An exception of `send` with how many subscribers got the message."""
    error.sent_count = sent_count  # type: ignore[attr-defined]
    return error
