"""Every subscriber sees every message."""

from __future__ import annotations

import threading
from time import monotonic
from typing import Any, Generic, Literal, TypeVar

from moirai import _native
from moirai.channels.closing import ClosesAtExit
from moirai.errors import Closed, Disconnected, InvalidArgument, Timeout

__all__ = ["Broadcast", "SlowPolicy", "Subscription"]

_Item = TypeVar("_Item")

SlowPolicy = Literal["block", "drop_oldest", "disconnect"]
"""What happens to a subscriber whose channel is full: the sender waits for it, it loses its oldest
message, or it is disconnected."""
_POLICIES = ("block", "drop_oldest", "disconnect")


def check_policy(slow: str) -> None:
    """Refuse what is no policy."""
    if slow not in _POLICIES:
        choices = ", ".join(map(repr, _POLICIES))
        raise InvalidArgument(f"slow: must be one of {choices}, got {slow!r}")


class Subscription(_native.Receiver[_Item]):
    """A receiver of one broadcast's messages. Made by `Broadcast.subscribe`; closing it ends it."""

    __slots__ = ("_channel", "_dropped_count", "_sender", "_slow")
    _channel: _native.Channel[_Item]
    _dropped_count: int
    _sender: _native.Sender[_Item]
    _slow: SlowPolicy

    @property
    def dropped_count(self) -> int:
        """Messages it lost because it was slow."""
        return self._dropped_count

    @property
    def slow(self) -> SlowPolicy:
        """What happens when its channel is full."""
        return self._slow


class Broadcast(ClosesAtExit, Generic[_Item]):
    """Sends each message to every subscriber, in one order for all of them.

    Any number of threads may send; one at a time does. A message for nobody is gone.
    """

    def __init__(self) -> None:
        # Reentrant, because a finaliser may send while this thread does: its message is queued.
        self._lock = threading.RLock()
        self._subscriptions: tuple[Subscription[_Item], ...] = ()
        self._closed = False

    def subscribe(self, capacity: int = 1024, slow: SlowPolicy = "block") -> Subscription[_Item]:
        """See every message that is sent from now on.

        Args:
            capacity: Messages that may wait for this subscriber; >= 1.
            slow: What happens when so many wait.

        Raises:
            Closed: The broadcast is closed.
            InvalidArgument: An argument is outside its range.
        """
        check_policy(slow)
        channel: _native.Channel[_Item] = _native.Channel(capacity)
        subscription: Subscription[_Item] = Subscription(channel)
        subscription._channel = channel
        subscription._sender = channel.sender()
        subscription._slow = slow
        subscription._dropped_count = 0
        with self._lock:
            if self._closed:
                raise Closed("subscribe: this broadcast is closed")
            self._subscriptions = (*self._subscriptions, subscription)
        return subscription

    def send(self, item: _Item, timeout_seconds: float | None = None) -> int:
        """Send a message to every subscriber; returns how many there are.

        Args:
            item: The message.
            timeout_seconds: How long to wait at most for subscribers that make the sender wait;
                >= 0. None waits for ever.

        Raises:
            Timeout: One of them had no room in time; the message was sent to nobody.
            Closed: The broadcast is closed.
        """
        deadline = None if timeout_seconds is None else monotonic() + timeout_seconds
        if not self._lock.acquire(timeout=-1 if timeout_seconds is None else timeout_seconds):
            raise Timeout(
                f"send: another sender was waiting for {timeout_seconds} s; nothing was sent"
            )
        try:
            if self._closed:
                raise Closed("send: this broadcast is closed")
            subscriptions = self._subscriptions
            # Only this thread sends, so room that was found stays.
            for subscription in subscriptions:
                if subscription._slow == "block":
                    self._wait_for_room(subscription, deadline)
            return sum(self._deliver(subscription, item) for subscription in subscriptions)
        finally:
            self._lock.release()

    def _wait_for_room(self, subscription: Subscription[_Item], deadline: float | None) -> None:
        left = None if deadline is None else max(0.0, deadline - monotonic())
        try:
            subscription._sender.wait_for_room(left)
        except (Disconnected, Closed):
            self._forget(subscription)

    def _deliver(self, subscription: Subscription[_Item], item: _Item) -> bool:
        sender = subscription._sender
        try:
            while not sender.try_send(item):
                if subscription._slow != "drop_oldest":
                    # A finaliser's message took the room of one that blocks: as if it were slow.
                    sender.close()
                    break
                nothing: Any = sender
                if subscription._channel.try_receive(nothing) is not nothing:
                    subscription._dropped_count += 1
            else:
                return True
        except (Disconnected, Closed):
            pass
        self._forget(subscription)
        return False

    def _forget(self, subscription: Subscription[_Item]) -> None:
        with self._lock:
            self._subscriptions = tuple(it for it in self._subscriptions if it is not subscription)

    def close(self) -> None:
        """Send no more. Subscribers receive what they have, then Disconnected."""
        with self._lock:
            self._closed = True
            subscriptions, self._subscriptions = self._subscriptions, ()
        for subscription in subscriptions:
            subscription._sender.close()

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._closed

    @property
    def subscriptions(self) -> tuple[Subscription[_Item], ...]:
        """Those who are subscribed now."""
        return self._subscriptions
