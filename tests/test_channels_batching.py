"""BatchingSender and Broadcast."""

import gc
import threading
from collections import Counter
from itertools import chain
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from running import wait_until

from moirai import channels
from moirai.channels import BatchingSender, Broadcast, Channel
from moirai.channels.batching import next_batch_size, traffic_class
from moirai.errors import Closed, Disconnected, InvalidArgument, Timeout, WrongType

LONG = 60.0
HOUR = 3600.0


class Recorder:
    """A channel that keeps every batch, and may refuse or block."""

    def __init__(self) -> None:
        self.batches: list[list[Any]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.arrived = threading.Semaphore(0)
        self.entered = threading.Semaphore(0)

    def send_many(self, items: list[Any]) -> int:
        self.entered.release()
        assert self.gate.wait(LONG)
        self.batches.append(items)
        self.arrived.release()
        return len(items)

    @property
    def items(self) -> list[Any]:
        return list(chain(*self.batches))


def settled(sender: BatchingSender[Any], size: int) -> None:
    """Have the batch size as after traffic of that size."""
    sender._batch_size = size


# === batching ====================================================================================


def test_a_full_batch_goes_at_once() -> None:
    sink = Recorder()
    with BatchingSender(sink, max_delay_seconds=HOUR, min_batch=3) as sender:
        for number in range(7):
            sender.send(number)
        assert sink.batches == [[0, 1, 2], [3, 4, 5]]
        assert sender.statistics().pending_count == 1
    assert sink.batches == [[0, 1, 2], [3, 4, 5], [6]]
    now = sender.statistics()
    assert (now.total_count, now.total_batches, now.full_batches, now.pending_count) == (7, 3, 2, 0)


def test_a_batch_that_does_not_fill_goes_in_time() -> None:
    sink = Recorder()
    sender = BatchingSender(sink, max_delay_seconds=0.001, min_batch=100)
    for number in range(3):
        sender.send(number)
        assert sink.arrived.acquire(timeout=LONG)
    sender.send_many(["a", "b"])
    assert sink.arrived.acquire(timeout=LONG)
    sender.close()
    assert sink.items == [0, 1, 2, "a", "b"]
    assert sender.statistics().timed_batches >= 4


def test_a_sender_that_rested_wakes_for_the_next_message() -> None:
    sink = Recorder()
    sender = BatchingSender(sink, max_delay_seconds=0.001, min_batch=100)
    sender.send(1)
    assert sink.arrived.acquire(timeout=LONG)
    event = threading.Event()
    for _ in range(6000):
        if sender._resting and sender._rate_per_second < 1:
            break
        event.wait(0.01)
    else:
        raise AssertionError("it never rested")
    sender.send(2)
    assert sink.arrived.acquire(timeout=LONG)
    sender.close()
    assert sink.batches == [[1], [2]]


def test_order_is_kept_by_thread_and_nothing_is_lost() -> None:
    channel: Channel[tuple[int, int]] = Channel(64)
    sender = BatchingSender(channel, max_delay_seconds=0.002, max_batch=50)
    found: list[tuple[int, int]] = []
    receiving = threading.Thread(target=lambda: found.extend(channel))
    receiving.start()

    def produce(who: int) -> None:
        for number in range(3000):
            sender.send((who, number))

    threads = [threading.Thread(target=produce, args=(who,)) for who in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    sender.close()
    channel.close()
    receiving.join(LONG)
    assert Counter(who for who, _ in found) == {0: 3000, 1: 3000, 2: 3000}
    for who in range(3):
        assert [number for sender, number in found if sender == who] == list(range(3000))
    assert sender.statistics().total_count == 9000


def test_what_waits_is_bounded_while_the_channel_is_full() -> None:
    sink = Recorder()
    sender = BatchingSender(sink, max_delay_seconds=HOUR, min_batch=4, max_batch=4)
    sink.gate.clear()
    sent = []

    def produce(who: int) -> None:
        for number in range(100):
            sender.send((who, number))
            sent.append(1)

    threads = [threading.Thread(target=produce, args=(who,)) for who in range(2)]
    for thread in threads:
        thread.start()
    assert sink.entered.acquire(timeout=LONG)
    event = threading.Event()
    before = -1
    while before != len(sent):  # until both wait
        before = len(sent)
        event.wait(0.05)
    assert len(sent) <= 4 + 4 + 2
    sink.gate.set()
    for thread in threads:
        thread.join(LONG)
    sender.close()
    assert len(sink.items) == 200
    assert all(len(batch) <= 4 for batch in sink.batches)


def test_a_closed_sender_refuses() -> None:
    sink = Recorder()
    sender = BatchingSender(sink)
    sender.close()
    sender.close()
    assert sender.closed
    with pytest.raises(Closed, match="send: this sender is closed"):
        sender.send(1)
    assert not any(thread.name == "moirai-batching" for thread in threading.enumerate())


def test_a_channel_that_fails_is_told_to_who_sends_next() -> None:
    channel: Channel[int] = Channel(2)
    sender = BatchingSender(channel, max_delay_seconds=HOUR, min_batch=100)
    sender.send_many([1, 2, 3])
    channel.close()
    with pytest.raises(Closed, match="send_many: this channel is closed") as failed:
        sender.flush()
    assert failed.value.unsent == [1, 2, 3]  # type: ignore[attr-defined]
    for call in (lambda: sender.send(4), sender.flush, sender.close):
        with pytest.raises(Closed) as again:
            call()
        assert again.value is failed.value

    receiver_gone: Channel[int] = Channel(2)
    late = BatchingSender(receiver_gone, max_delay_seconds=0.001, min_batch=100)
    receiver_gone.receiver().close()
    late.send(1)
    late._timer.join(LONG)  # it met the error, and kept it
    with pytest.raises(Disconnected):
        late.send(2)
    with pytest.raises(Disconnected):
        late.close()


def test_an_interrupted_flush_loses_nothing() -> None:
    class Interrupts(Recorder):
        def send_many(self, items: list[Any]) -> int:
            if not self.batches:
                self.batches.append(items[:2])
                stop = KeyboardInterrupt()
                stop.sent_count = 2  # type: ignore[attr-defined]
                raise stop
            return super().send_many(items)

    sink = Interrupts()
    sender = BatchingSender(sink, max_delay_seconds=HOUR, min_batch=5)
    with pytest.raises(KeyboardInterrupt):
        sender.send_many(range(5))
    sender.send_many([5, 6])
    sender.close()
    assert sink.items == list(range(7))


def test_a_finaliser_may_send_while_a_batch_goes() -> None:
    class Reentrant(Recorder):
        def send_many(self, items: list[Any]) -> int:
            if not self.batches:
                sender.send("inner")
            return super().send_many(items)

    sink = Reentrant()
    sender: BatchingSender[Any] = BatchingSender(sink, max_delay_seconds=HOUR, min_batch=2)
    sender.send_many(["a", "b", "c"])
    sender.close()
    assert sink.batches == [["a", "b"], ["inner", "c"]]


def test_a_forgotten_sender_ends_its_thread() -> None:
    sender: Any = BatchingSender(Recorder())
    thread = sender._timer
    del sender
    for _ in range(600):
        gc.collect()
        thread.join(0.1)
        if not thread.is_alive():
            return
    raise AssertionError("the timer lives on")


def test_what_waits_in_a_forgotten_sender_goes() -> None:
    sink = Recorder()
    sender: Any = BatchingSender(sink, max_delay_seconds=HOUR, min_batch=10)
    thread = sender._timer
    sender.send_many(range(3))
    del sender
    gc.collect()
    assert sink.arrived.acquire(timeout=LONG)
    thread.join(LONG)
    assert sink.batches == [[0, 1, 2]]
    assert not thread.is_alive()


def test_a_sender_that_failed_and_is_forgotten_sends_nothing_more() -> None:
    class Failing(Recorder):
        def send_many(self, items: list[Any]) -> int:
            super().send_many(items)
            raise OSError("no")

    sink = Failing()
    sender: Any = BatchingSender(sink, max_delay_seconds=HOUR, min_batch=2)
    thread = sender._timer
    with pytest.raises(OSError, match="no"):
        sender.send_many(range(5))
    thread.join(LONG)
    assert not thread.is_alive()
    del sender
    gc.collect()
    assert sink.batches == [[0, 1]]


@given(
    rate=st.floats(0, 1e9),
    delay=st.floats(1e-6, 10),
    low=st.integers(1, 100),
    span=st.integers(0, 1000),
)
def test_the_batch_size_is_what_comes_in_the_delay(
    rate: float, delay: float, low: int, span: int
) -> None:
    size = next_batch_size(rate, delay_seconds=delay, low=low, high=low + span)
    assert low <= size <= low + span
    if low < size < low + span:
        assert abs(size - rate * delay) <= 0.5


def test_the_batch_size_follows_the_traffic() -> None:
    sender: BatchingSender[int] = BatchingSender(Recorder(), max_delay_seconds=0.01, max_batch=500)
    sizes = []
    for _ in range(30):
        sender._tick(0.1, 2000)  # 20 000 a second: 200 in 10 ms
        sizes.append(sender.statistics().batch_size)
    assert sizes == sorted(sizes)
    assert sizes[-1] == 200
    assert sender.statistics().traffic == "medium"
    for _ in range(60):
        sender._tick(0.1, 0)
    assert sender.statistics().batch_size == 1
    sender.close()


def test_the_class_of_traffic_is_told() -> None:
    assert traffic_class(10, 10) == "low"
    assert traffic_class(5_000, 5_000) == "medium"
    assert traffic_class(200_000, 200_000) == "high"
    assert traffic_class(50_000, 5_000) == "burst"
    assert traffic_class(999, 0) == "low"


def test_batching_arguments_are_checked() -> None:
    sink = Recorder()
    for wrong in (0, -1, 3601, float("nan")):
        with pytest.raises(InvalidArgument, match="max_delay_seconds: must be more than 0"):
            BatchingSender(sink, max_delay_seconds=wrong)
    with pytest.raises(InvalidArgument, match="min_batch: must be from 1 to"):
        BatchingSender(sink, min_batch=0)
    with pytest.raises(InvalidArgument, match=r"max_batch: must be from 5 \(min_batch\) to"):
        BatchingSender(sink, min_batch=5, max_batch=4)
    with pytest.raises(WrongType, match="max_delay_seconds: must be a number, got str"):
        BatchingSender(sink, max_delay_seconds="1")  # type: ignore[arg-type]
    for name in ("min_batch", "max_batch"):
        with pytest.raises(WrongType, match=f"{name}: must be an int, got float"):
            BatchingSender(sink, **{name: 8.5})  # type: ignore[arg-type]


# === broadcast ===================================================================================


def test_every_subscriber_sees_every_message_in_one_order() -> None:
    news: Broadcast[tuple[int, int]] = Broadcast()
    subscribers = [news.subscribe(capacity=3) for _ in range(3)]
    found: list[list[tuple[int, int]]] = [[], [], []]
    readers = [
        threading.Thread(target=lambda n=n: found[n].extend(subscribers[n]))  # type: ignore[misc]
        for n in range(3)
    ]

    def write(who: int) -> None:
        for number in range(300):
            assert news.send((who, number)) == 3

    writers = [threading.Thread(target=write, args=(who,)) for who in range(2)]
    for thread in (*readers, *writers):
        thread.start()
    for thread in writers:
        thread.join(LONG)
    news.close()
    for thread in readers:
        thread.join(LONG)
    assert found[0] == found[1] == found[2]
    assert sorted(found[0]) == [(who, number) for who in range(2) for number in range(300)]


def test_a_slow_subscriber_may_lose_its_oldest_messages() -> None:
    news: Broadcast[int] = Broadcast()
    slow = news.subscribe(capacity=2, slow="drop_oldest")
    for number in range(5):
        assert news.send(number) == 1
    assert slow.receive_many() == [3, 4]
    assert (slow.dropped_count, slow.slow) == (3, "drop_oldest")


def test_what_a_finaliser_sends_keeps_the_order() -> None:
    news: Broadcast[Any] = Broadcast()

    class Leaving:
        def __del__(self) -> None:
            news.send("left")

    quick, slow = news.subscribe(), news.subscribe(capacity=2, slow="drop_oldest")
    news.send(Leaving())
    quick.receive()
    for message in "ab":
        news.send(message)  # at the second one, the slow one loses the last that is to be had
    news.close()
    assert list(quick) == ["a", "b", "left"]
    assert list(slow) == ["b", "left"]


def test_a_slow_subscriber_may_be_disconnected() -> None:
    news: Broadcast[int] = Broadcast()
    slow = news.subscribe(capacity=2, slow="disconnect")
    quick = news.subscribe(capacity=10)
    assert [news.send(number) for number in range(4)] == [2, 2, 1, 1]
    assert list(slow) == [0, 1]
    with pytest.raises(Disconnected):
        slow.receive()
    assert quick.receive_many() == [0, 1, 2, 3]
    assert news.subscriptions == (quick,)


def test_a_blocked_send_reaches_nobody_when_it_times_out() -> None:
    news: Broadcast[int] = Broadcast()
    quick = news.subscribe(capacity=10)
    slow = news.subscribe(capacity=1)
    news.send(1)
    with pytest.raises(Timeout, match=r"send: a subscriber had no room within 0.01 s"):
        news.send(2, timeout_seconds=0.01)
    assert quick.receive_many() == [1]
    assert slow.receive() == 1
    assert news.send(3, timeout_seconds=0) == 2
    assert quick.receive() == slow.receive() == 3


def test_a_send_that_waits_hinders_neither_new_subscribers_nor_the_end() -> None:
    news: Broadcast[int] = Broadcast()
    quick, slow = news.subscribe(capacity=10), news.subscribe(capacity=1)
    news.send(1)
    errors: list[Exception] = []

    def send() -> None:
        try:
            news.send(2)
        except Closed as error:
            errors.append(error)

    sending = threading.Thread(target=send, daemon=True)
    sending.start()
    wait_until(lambda: slow._channel.statistics().senders_waiting == 1)
    late = news.subscribe()
    with pytest.raises(Timeout, match=r"another sender was waiting for 0.0 s; nothing was sent"):
        news.send(3, timeout_seconds=0.0)
    news.close()
    sending.join(LONG)
    assert "this broadcast was closed; nothing was sent" in str(errors[0])
    assert [list(it) for it in (quick, slow, late)] == [[1], [1], []]


@pytest.mark.parametrize("seconds", [-1, float("nan"), float("inf"), 1e10])
def test_a_broadcast_waits_no_time_that_is_none(seconds: float) -> None:
    news: Broadcast[int] = Broadcast()
    with pytest.raises(InvalidArgument, match="timeout_seconds: must be None or a number from 0"):
        news.send(1, timeout_seconds=seconds)


def test_a_subscriber_that_leaves_is_forgotten() -> None:
    news: Broadcast[int] = Broadcast()
    with news.subscribe(capacity=1) as leaving:
        assert news.send(1) == 1
        assert leaving.receive() == 1
    assert news.send(2) == 0
    assert news.subscriptions == ()


def test_a_closed_broadcast_ends_its_subscribers() -> None:
    with Broadcast[int]() as news:
        subscriber = news.subscribe()
        news.send(1)
    assert list(subscriber) == [1]
    assert news.closed
    with pytest.raises(Closed, match="send: this broadcast is closed"):
        news.send(1)
    with pytest.raises(Closed, match="subscribe: this broadcast is closed"):
        news.subscribe()


def test_a_subscription_can_be_selected() -> None:
    news: Broadcast[int] = Broadcast()
    subscriber = news.subscribe()
    other: Channel[int] = Channel(1)
    news.send(4)
    assert channels.select([other, subscriber]) == (1, 4)


def test_the_policy_is_checked() -> None:
    with pytest.raises(InvalidArgument, match=r"slow: must be one of 'block', .* got 'wait'"):
        Broadcast[int]().subscribe(slow="wait")  # type: ignore[arg-type]


def test_batches_go_between_processes_too() -> None:
    numbers = [b"%d" % number for number in range(95)]
    with (
        channels.SharedChannel.create(capacity_bytes="1 MiB") as channel,
        channel.sender() as sender,
        channel.receiver() as receiver,
    ):
        with BatchingSender(sender, max_delay_seconds=60, max_batch=10) as batching:
            for number in numbers:
                batching.send(number)
        assert [receiver.receive_bytes(timeout_seconds=60) for _ in numbers] == numbers


def test_a_batch_that_fails_half_way_tells_what_was_not_sent() -> None:
    with (
        channels.SharedChannel.create(capacity_bytes="1 MiB") as channel,
        channel.sender() as sender,
        channel.receiver() as receiver,
    ):
        batching = BatchingSender[Any](sender, max_delay_seconds=HOUR, min_batch=4)
        with pytest.raises(TypeError) as failed:
            batching.send_many([b"0", b"1", 2, b"3"])
        assert failed.value.unsent == [2, b"3"]  # type: ignore[attr-defined]
        assert receiver.receive_many(10, timeout_seconds=0) == [b"0", b"1"]
