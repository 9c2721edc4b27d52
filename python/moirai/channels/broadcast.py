"""Every subscriber sees every message."""

from __future__ import annotations

import collections
import threading
from abc import abstractmethod
from time import monotonic
from typing import Any, Generic, Literal, Protocol, TypeVar

from moirai import _native
from moirai._arguments import check_seconds
from moirai.channels.closing import ClosesAtExit
from moirai.errors import Closed, Disconnected, InvalidArgument, Timeout

__all__ = ["Broadcast", "BroadcastBase", "SlowPolicy", "Subscription", "check_policy"]

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


class _Closable(Protocol):
    def close(self) -> None: ...  # pragma: no cover


class _Subscribed(Protocol):
    @property
    def _sender(self) -> _Closable: ...  # pragma: no cover


_Subscriber = TypeVar("_Subscriber", bound=_Subscribed)
_Message = TypeVar("_Message")


class BroadcastBase(ClosesAtExit, Generic[_Subscriber, _Message]):
    """What broadcasts share: who may send and when, who is subscribed, and how the end is told."""

    def __init__(self) -> None:
        # Held by who sends. Reentrant, because a finaliser or a signal's handler may send while its
        # thread does.
        self._lock = threading.RLock()
        # What these sent meanwhile: next in line, so that all subscribers see the same order.
        self._following: collections.deque[_Message] = collections.deque()
        self._is_sending = False
        # Held for a moment, to change the next two; taken last.
        self._changing = threading.RLock()
        # Whom a sender may wait for: noted before it looks whether this is closed, as `close` does
        # the other way round, so that one of them sees the other.
        self._awaited: _Subscriber | None = None
        self._subscriptions: tuple[_Subscriber, ...] = ()
        self._closed = False

    @abstractmethod
    def _end(self, subscription: _Subscriber) -> None:
        """Send to it no more."""

    def _forget(self, *gone: _Subscriber) -> None:
        with self._changing:
            self._subscriptions = tuple(it for it in self._subscriptions if it not in gone)

    def close(self) -> None:
        """Send no more. Subscribers receive what they have, then Disconnected.

        A sender that waits for room is told.
        """
        self._closed = True
        awaited = self._awaited
        if awaited is not None:
            awaited._sender.close()
        # Who sends right now finishes first, so that all subscribers have the same messages.
        with self._lock, self._changing:
            subscriptions, self._subscriptions = self._subscriptions, ()
        for subscription in subscriptions:
            self._end(subscription)

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._closed

    @property
    def subscriptions(self) -> tuple[_Subscriber, ...]:
        """Those who are subscribed; who has left is known to have when a message is sent."""
        return self._subscriptions


class Broadcast(BroadcastBase[Subscription[_Item], _Item], Generic[_Item]):
    """Sends each message to every subscriber, in one order for all of them.

    Any number of threads may send; one at a time does. A message for nobody is gone.
    """

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
        with self._changing:
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
            Closed: The broadcast is closed, or was while this waited: the message was sent to
                nobody.
            InvalidArgument: `timeout_seconds` is outside its range.
        """
        check_seconds("timeout_seconds", timeout_seconds)
        deadline = None if timeout_seconds is None else monotonic() + timeout_seconds
        if not self._lock.acquire(timeout=-1 if timeout_seconds is None else timeout_seconds):
            raise Timeout(
                f"send: another sender was waiting for {timeout_seconds} s; nothing was sent"
            )
        try:
            if self._closed:
                raise Closed("send: this broadcast is closed")
            subscriptions = self._subscriptions
            if self._is_sending:
                self._following.append(item)
                return len(subscriptions)
            # Only this thread sends, so room that was found stays.
            for subscription in subscriptions:
                if subscription._slow == "block":
                    self._wait_for_room(subscription, deadline, timeout_seconds)
            return self._deliver_to_all(subscriptions, item)
        finally:
            self._lock.release()

    def _deliver_to_all(self, subscriptions: tuple[Subscription[_Item], ...], item: _Item) -> int:
        self._is_sending = True
        try:
            count = sum(self._deliver(subscription, item) for subscription in subscriptions)
            while self._following:
                following = self._following.popleft()
                for subscription in self._subscriptions:
                    self._deliver(subscription, following)
        finally:
            self._is_sending = False
        return count

    def _wait_for_room(
        self,
        subscription: Subscription[_Item],
        deadline: float | None,
        timeout_seconds: float | None,
    ) -> None:
        left = None if deadline is None else max(0.0, deadline - monotonic())
        outer, self._awaited = self._awaited, subscription
        try:
            if not self._closed:
                subscription._sender.wait_for_room(left)
        except Timeout:
            raise Timeout(
                f"send: a subscriber had no room within {timeout_seconds} s; nothing was sent"
            ) from None
        except (Disconnected, Closed):
            self._forget(subscription)
        finally:
            self._awaited = outer
        if self._closed:
            raise Closed("send: this broadcast was closed; nothing was sent")

    def _deliver(self, subscription: Subscription[_Item], item: _Item) -> bool:
        sender = subscription._sender
        try:
            while not sender.try_send(item):
                if subscription._slow != "drop_oldest":
                    # A finaliser's message, for which nobody waits until one that blocks has room.
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

    def _end(self, subscription: Subscription[_Item]) -> None:
        subscription._sender.close()
