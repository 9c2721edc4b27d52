"""Broadcast between processes: who sees what, and what happens to the slow."""

import multiprocessing
import pickle
import signal
import threading
from typing import Any

import numpy as np
import pytest
from running import wait_until

from moirai.channels import SharedBroadcast, SharedChannel
from moirai.errors import Closed, Disconnected, InvalidArgument, Timeout

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")

FORK = multiprocessing.get_context("fork")
WAIT = 60


def start(target: Any, *arguments: Any) -> Any:
    process = FORK.Process(target=target, args=arguments)
    process.start()
    return process


def collect(subscription: Any, result: Any) -> None:
    with subscription.receiver() as receiver:
        result.put(
            [item["sum"] if item["data"].sum() == item["sum"] else None for item in receiver]
        )


def test_every_process_sees_every_message_in_order() -> None:
    news = SharedBroadcast()
    results = [FORK.SimpleQueue() for _ in range(3)]
    workers = [start(collect, news.subscribe(), result) for result in results]
    for number in range(200):
        assert news.send({"data": np.full(number * 100, 1), "sum": number * 100}) == 3
    news.close()
    for worker, result in zip(workers, results, strict=True):
        assert result.get() == [number * 100 for number in range(200)]
        worker.join()
        assert worker.exitcode == 0


def fill(news: SharedBroadcast) -> int:
    """Send numbered messages until far more were sent than a small channel holds."""
    for number in range(2000):
        news.send((number, bytes(1000)))
    return 2000


def test_one_that_drops_keeps_the_newest() -> None:
    with SharedBroadcast() as news:
        slow = news.subscribe("128 KiB", "drop_oldest")
        with slow.receiver() as receiver:
            sent = fill(news)
            news.close()
            numbers = [number for number, _ in receiver]
    assert numbers == list(range(numbers[0], sent))
    assert slow.dropped_count == numbers[0] > 0


def test_one_that_views_all_its_memory_loses_the_newest() -> None:
    with SharedBroadcast() as news:
        slow = news.subscribe("256 KiB", "drop_oldest")
        receiver = slow.receiver()
        assert news.send(np.zeros(200_000, np.uint8)) == 1
        kept = receiver.receive(WAIT)
        assert news.send(np.ones(200_000, np.uint8)) == 1
        assert slow.dropped_count == 1
        assert not kept.any()
        with pytest.raises(Timeout):
            receiver.receive(0)
        del kept
        news.send(np.ones(200_000, np.uint8))
        assert receiver.receive(WAIT).all()


def test_one_that_catches_up_meanwhile_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with SharedBroadcast() as news:
        slow = news.subscribe("256 KiB", "drop_oldest")
        receiver = slow.receiver()
        news.send(bytes(200_000))

        def receive(_: object) -> bool:
            assert receiver.receive(0) == bytes(200_000)
            return False

        # It receives just before the sender would drop something of it.
        monkeypatch.setattr(type(slow), "_drop_oldest", receive)
        assert news.send(bytes(199_999)) == 1
        assert receiver.receive(0) == bytes(199_999)
        assert slow.dropped_count == 0


def test_one_that_is_disconnected_receives_what_it_has() -> None:
    with SharedBroadcast() as news:
        slow = news.subscribe("128 KiB", "disconnect")
        quick = news.subscribe("4 MiB", "drop_oldest")
        with slow.receiver() as receiver:
            fill(news)
            assert news.subscriptions == (quick,)
            numbers = [number for number, _ in receiver]
            assert numbers == list(range(len(numbers)))
            with pytest.raises(Disconnected):
                receiver.receive()


def test_one_that_blocks_says_who_got_the_message() -> None:
    with SharedBroadcast() as news:
        slow, quick = news.subscribe("128 KiB"), news.subscribe("128 KiB", "drop_oldest")
        sent = 0

        def send_until_full() -> None:
            nonlocal sent
            while True:
                news.send((sent, bytes(1000)), timeout_seconds=0)
                sent += 1

        with pytest.raises(Timeout, match="1 of 2 subscribers had no room within 0 s") as late:
            send_until_full()
        assert late.value.sent_count == 1  # type: ignore[attr-defined]
        with slow.receiver() as receiver:
            assert [receiver.receive(0)[0] for _ in range(sent)] == list(range(sent))
            assert news.send((sent + 1, b"")) == 2
            assert receiver.receive(WAIT)[0] == sent + 1
        with quick.receiver() as receiver:
            news.close()
            assert [number for number, _ in receiver][-3:] == [sent - 1, sent, sent + 1]


def send_until_full(news: SharedBroadcast) -> None:
    while True:
        news.send(bytes(1000), timeout_seconds=0)


def test_a_send_that_waits_hinders_neither_new_subscribers_nor_the_end() -> None:
    news = SharedBroadcast()
    slow, quick = news.subscribe("128 KiB"), news.subscribe("1 MiB", "drop_oldest")
    with pytest.raises(Timeout):
        send_until_full(news)
    errors: list[Any] = []

    def send() -> None:
        try:
            news.send("last")
        except Closed as error:
            errors.append(error)

    sending = threading.Thread(target=send, daemon=True)
    sending.start()
    wait_until(lambda: news._awaited is slow)
    late = news.subscribe("128 KiB")
    with pytest.raises(
        Timeout, match=r"another thread was sending for 0 s; nothing was sent"
    ) as no:
        news.send("no", timeout_seconds=0)
    assert no.value.sent_count == 0  # type: ignore[attr-defined]
    news.close()
    sending.join(WAIT)
    assert not sending.is_alive()
    assert "closed meanwhile; 1 subscribers got it" in str(errors[0])
    assert errors[0].sent_count == 1
    for subscription, last in ((slow, bytes(1000)), (quick, "last"), (late, None)):
        with subscription.receiver() as receiver:
            assert [None, *receiver][-1] == last
    with slow.receiver() as receiver, pytest.raises(Disconnected):
        receiver.receive(0)


def test_what_a_handler_sends_meanwhile_goes_next() -> None:
    news = SharedBroadcast()
    slow = news.subscribe("128 KiB")
    with pytest.raises(Timeout):
        send_until_full(news)
    counts: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda *_: counts.append(news.send("from the handler")))
    found: list[Any] = []

    def receive() -> None:
        wait_until(lambda: news._awaited is slow)
        signal.pthread_kill(main, signal.SIGUSR1)
        wait_until(lambda: bool(counts))
        with slow.receiver() as receiver:
            found.extend(receiver)

    main = threading.get_ident()
    receiving = threading.Thread(target=receive, daemon=True)
    receiving.start()
    try:
        assert news.send("first") == 1
    finally:
        signal.signal(signal.SIGUSR1, before)
        news.close()
    receiving.join(WAIT)
    assert counts == [1]
    assert found[-2:] == ["first", "from the handler"]


@pytest.mark.parametrize("seconds", [-1, float("nan"), float("inf"), 1e10])
def test_a_broadcast_waits_no_time_that_is_none(seconds: float) -> None:
    with (
        SharedBroadcast() as news,
        pytest.raises(InvalidArgument, match="timeout_seconds: must be None or a number from 0"),
    ):
        news.send(1, timeout_seconds=seconds)


@pytest.mark.parametrize("slow", ["block", "drop_oldest", "disconnect"])
def test_one_that_is_killed_is_forgotten(slow: Any) -> None:
    def view(subscription: Any, ready: Any) -> None:
        receiver = subscription.receiver()
        ready.put(receiver.receive())
        signal.pause()

    with SharedBroadcast() as news:
        ready = FORK.SimpleQueue()
        process = start(view, news.subscribe("128 KiB", slow), ready)
        news.send(1)
        assert ready.get() == 1
        process.kill()
        process.join()
        deaths = 0
        while news.send(bytes(100), WAIT):
            deaths += 1
            assert deaths < 100_000
        assert news.subscriptions == ()
        assert news.send(2) == 0


def test_a_subscription_has_a_name_or_is_pickled() -> None:
    with SharedBroadcast() as news:
        named = news.subscribe(name=f"test-news-{id(news)}")
        copy = pickle.loads(pickle.dumps(named))
        with SharedChannel.open(named.channel.name).receiver() as receiver:
            news.send("seen")
            assert receiver.receive(WAIT) == "seen"
        copy.close()
        named.close()
        assert news.send("nobody") == 0


def test_what_is_wrong_is_said() -> None:
    news = SharedBroadcast()
    with pytest.raises(InvalidArgument, match=r"slow: must be one of 'block', .*, got 'late'"):
        news.subscribe(slow="late")  # type: ignore[arg-type]
    news.close()
    news.close()
    assert news.closed
    for call in (news.subscribe, lambda: news.send(1)):
        with pytest.raises(Closed, match="this broadcast is closed"):
            call()
