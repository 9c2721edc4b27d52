"""Broadcast between processes: who sees what, and what happens to the slow."""

import multiprocessing
import pickle
import signal
from typing import Any

import numpy as np
import pytest

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
