"""Many small messages, sent in batches whose size follows the traffic."""

from __future__ import annotations

import collections
import threading
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any, Generic, Literal, Protocol, TypeVar

from moirai._arguments import check_int, check_number
from moirai.channels.closing import ClosesAtExit
from moirai.errors import Closed, InvalidArgument

__all__ = ["BatchingSender", "BatchingStatistics", "TrafficClass"]

_Item = TypeVar("_Item")

TrafficClass = Literal["low", "medium", "high", "burst"]
"""How much is sent: below 1 000 messages a second, below 100 000, from there on; or, whatever the
average, 4 times as much as it in the last tick."""

TICK_SECONDS = 0.1
"""How often the batch size is set anew."""
WEIGHT = 0.3
"""Share of the last tick in the average rate."""
MEDIUM_PER_SECOND = 1_000
HIGH_PER_SECOND = 100_000
BURST_RATIO = 4
MAX_BATCH = 1 << 20


class _Sink(Protocol[_Item]):
    def send_many(self, items: list[_Item], /) -> Any: ...


@dataclass(frozen=True)
class BatchingStatistics:
    """What went through a `BatchingSender`.

    Attributes:
        total_count: Messages passed on to the channel.
        total_batches: In so many batches.
        full_batches: Those that went because they were full.
        timed_batches: Those that went because their first message was `max_delay_seconds` old.
        pending_count: Messages that wait for their batch.
        batch_size: Messages that make a batch full, now.
        rate_per_second: Messages a second, on average.
        traffic: The class of the rate.
    """

    total_count: int
    total_batches: int
    full_batches: int
    timed_batches: int
    pending_count: int
    batch_size: int
    rate_per_second: float
    traffic: TrafficClass


def next_batch_size(rate_per_second: float, *, delay_seconds: float, low: int, high: int) -> int:
    """The batch size to go on with: the messages that come in the delay, within bounds."""
    return min(max(round(rate_per_second * delay_seconds), low), high)


def traffic_class(tick_per_second: float, average_per_second: float) -> TrafficClass:
    """The class of what was sent in the last tick, by the average before it."""
    if tick_per_second >= MEDIUM_PER_SECOND and (
        tick_per_second >= BURST_RATIO * average_per_second
    ):
        return "burst"
    if average_per_second < MEDIUM_PER_SECOND:
        return "low"
    return "medium" if average_per_second < HIGH_PER_SECOND else "high"


class BatchingSender(ClosesAtExit, Generic[_Item]):
    """Collects messages and passes them on by the channel's `send_many`.

    A batch goes when it is full, and at the latest when its first message is `max_delay_seconds`
    old, for which one thread keeps time. Any number of threads may send; order is kept. What waits
    here is bounded: beyond `max_batch`, who sends waits until a batch is in the channel. A forked
    child must not use it, since it has neither the thread nor a right to what waits.

    Args:
        channel: Anything with `send_many(list)`: a channel or a sender, of threads or processes.
            It is not closed by this.
        max_delay_seconds: The longest time a message waits for its batch; > 0, at most 3600.
        min_batch: The smallest batch that counts as full; >= 1.
        max_batch: The largest; at least `min_batch`.

    Raises:
        InvalidArgument: An argument is outside its range.
    """

    def __init__(
        self,
        channel: _Sink[_Item],
        max_delay_seconds: float = 0.005,
        min_batch: int = 1,
        max_batch: int = 1024,
    ) -> None:
        check_number("max_delay_seconds", max_delay_seconds)
        check_int("min_batch", min_batch)
        check_int("max_batch", max_batch)
        if not 0 < max_delay_seconds <= 3600:
            raise InvalidArgument(
                f"max_delay_seconds: must be more than 0 and at most 3600, got {max_delay_seconds}"
            )
        if not 1 <= min_batch <= MAX_BATCH:
            raise InvalidArgument(f"min_batch: must be from 1 to {MAX_BATCH}, got {min_batch}")
        if not min_batch <= max_batch <= MAX_BATCH:
            raise InvalidArgument(
                f"max_batch: must be from {min_batch} (min_batch) to {MAX_BATCH}, got {max_batch}"
            )
        self._channel = channel
        self._delay_seconds = max_delay_seconds
        self._min_batch = min_batch
        self._max_batch = max_batch
        self._batch_size = min_batch
        # Appended to by whoever sends, without a lock; taken from under the lock.
        self._pending: collections.deque[_Item] = collections.deque()
        # When the first of the batch that is being collected came; None if nobody noted it.
        self._first_at: float | None = None
        # Held while a batch goes, so that batches keep their order. Reentrant, because a finaliser
        # may send while its thread is inside; what it sends goes with a later batch.
        self._lock = threading.RLock()
        self._inside = False
        self._closed = False
        self._failure: Exception | None = None
        self._total_count = self._total_batches = self._full_batches = self._timed_batches = 0
        self._rate_per_second = 0.0
        self._traffic: TrafficClass = "low"
        self._resting = False
        self._wake = wake = threading.Event()

        def ring(_: object) -> None:
            wake.set()

        self._timer = threading.Thread(
            target=_keep_time,
            args=(weakref.ref(self, ring), wake, channel, self._pending),
            name="moirai-batching",
            daemon=True,
        )
        self._timer.start()

    def send(self, item: _Item) -> None:
        """Send a message with the next batch.

        Raises:
            Closed: This sender is closed.
            Exception: What the channel raised for an earlier batch or this one, such as Closed or
                Disconnected; its `unsent` has the messages that were not sent.
        """
        if self._closed or self._failure is not None:
            self._refuse("send")
        pending = self._pending
        pending.append(item)
        count = len(pending)
        if count >= self._batch_size:
            self._flush_full()
        elif count == 1:
            self._first_at = monotonic()
            if self._resting:
                self._wake.set()
        if self._closed:  # meanwhile, maybe after the last batch went
            self.flush()

    def send_many(self, items: Iterable[_Item]) -> None:
        """Send messages with the next batches; as `send` for each.

        Raises:
            Closed, Exception: As for `send`.
        """
        for item in items:
            self.send(item)

    def flush(self) -> None:
        """Pass on what waits for its batch, now.

        Raises:
            Exception: As for `send`.
        """
        with self._lock:
            while self._pending and self._failure is None and not self._inside:
                self._pass_on(len(self._pending))
            if self._failure is not None:
                self._refuse("flush")

    def close(self) -> None:
        """Pass on what waits, and take nothing any more. The channel stays open.

        Raises:
            Exception: As for `send`.
        """
        self._closed = True
        try:
            self.flush()
        finally:
            self._wake.set()
            if self._timer is not threading.current_thread():
                self._timer.join()

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._closed

    def statistics(self) -> BatchingStatistics:
        """What went through so far, and how much is sent now."""
        with self._lock:
            return BatchingStatistics(
                total_count=self._total_count,
                total_batches=self._total_batches,
                full_batches=self._full_batches,
                timed_batches=self._timed_batches,
                pending_count=len(self._pending),
                batch_size=self._batch_size,
                rate_per_second=self._rate_per_second,
                traffic=self._traffic,
            )

    def _flush_full(self) -> None:
        with self._lock:
            while (
                len(self._pending) >= self._batch_size
                and self._failure is None
                and not self._inside
            ):
                self._full_batches += 1
                self._pass_on(min(len(self._pending), self._max_batch))
            if self._failure is not None:
                self._refuse("send")

    def _pass_on(self, count: int) -> None:
        """Send a batch, with the lock held. What was not sent stays pending, or is in the error."""
        pending = self._pending
        batch = [pending.popleft() for _ in range(count)]
        self._first_at = None
        self._inside = True
        try:
            self._channel.send_many(batch)
        except Exception as error:
            sent = getattr(error, "sent_count", 0)
            self._count(sent)
            self._failure = error
            self._unsent: Sequence[_Item] = batch[sent:]
            self._wake.set()  # the timer's thread has nothing to do any more
            raise self._described(error) from None
        except BaseException as stop:  # Ctrl-C: what was not sent is still to be sent
            sent = getattr(stop, "sent_count", 0)
            self._count(sent)
            pending.extendleft(reversed(batch[sent:]))
            raise
        else:
            self._count(count)
        finally:
            self._inside = False

    def _count(self, count: int) -> None:
        self._total_count += count
        self._total_batches += 1

    def _described(self, error: Exception) -> Exception:
        error.unsent = [*self._unsent, *self._pending]  # type: ignore[attr-defined]
        return error

    def _refuse(self, method: str) -> None:
        if self._failure is not None:
            raise self._described(self._failure)
        raise Closed(f"{method}: this sender is closed")

    def _tick(self, elapsed_seconds: float, count: int) -> None:
        """Adapt to `count` messages that came in the time since the last tick."""
        rate = count / elapsed_seconds
        with self._lock:
            self._traffic = traffic_class(rate, self._rate_per_second)
            self._rate_per_second += WEIGHT * (rate - self._rate_per_second)
            self._batch_size = next_batch_size(
                self._rate_per_second,
                delay_seconds=self._delay_seconds,
                low=self._min_batch,
                high=self._max_batch,
            )

    def _flush_due(self, now: float) -> float:
        """Pass on a batch whose time has come; when to look again."""
        if not self._pending:
            return now + self._delay_seconds  # no batch that begins later is due before
        due = (self._first_at or 0.0) + self._delay_seconds
        if now < due:
            return due
        with self._lock:
            if self._pending and self._failure is None and not self._inside:
                self._timed_batches += 1
                self._pass_on(len(self._pending))
        return now + self._delay_seconds


def _keep_time(
    reference: weakref.ref[BatchingSender[Any]],
    wake: threading.Event,
    channel: _Sink[Any],
    pending: collections.deque[Any],
) -> None:
    """The timer's thread: flushes what is due, and adapts once a tick.

    After a tick in which nothing was sent it rests, and is woken by the next message. Once the
    average is down it rests without waking. The sender may be collected meanwhile; what waited in
    it goes then.
    """
    last_tick, last_count, quiet = monotonic(), 0, False
    while True:
        wake.clear()
        sender = reference()
        if sender is None:
            if pending:
                channel.send_many(list(pending))
            return
        sender._resting = False
        if sender._closed or sender._failure is not None:
            return
        now = monotonic()
        try:
            look_at = sender._flush_due(now)
        except Exception:  # kept, for the next who sends
            return
        count = sender._total_count + len(sender._pending)
        quiet = quiet and count == last_count
        if now - last_tick >= TICK_SECONDS:
            quiet = count == last_count
            sender._tick(now - last_tick, count - last_count)
            last_tick, last_count = now, count
        pause: float | None = min(look_at, last_tick + TICK_SECONDS) - monotonic()
        if quiet:
            sender._resting = True
            pause = None if sender._rate_per_second < 1 else TICK_SECONDS
            if sender._pending or sender._closed:
                pause = 0
        del sender
        if pause is None or pause > 0:
            wake.wait(pause)
            if quiet and pause is None:
                last_tick = monotonic()
