"""Long mixed use of channels by threads, tasks and those who give up; bounded by count."""

import asyncio
import random
import threading
from itertools import chain
from typing import Any

import pytest

from moirai.channels import Channel, Queue, select
from moirai.errors import Disconnected, Timeout

pytestmark = pytest.mark.slow

SEED = 20260401
LONG = 120.0


def finish(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.join(LONG)
        assert not thread.is_alive(), "a thread hangs"


@pytest.mark.parametrize("capacity", [1, 2, 64])
def test_every_message_arrives_once_though_many_give_up(capacity: int) -> None:
    """Senders and receivers with all methods, short timeouts among them, over few places."""
    channel: Channel[tuple[int, int]] = Channel(capacity)
    count, senders_count, receivers_count = 4000, 3, 3
    found: list[list[tuple[int, int]]] = [[] for _ in range(receivers_count)]
    failures: list[BaseException] = []

    def guarded(body: Any, *arguments: Any) -> None:
        try:
            body(*arguments)
        except BaseException as error:
            failures.append(error)

    def send(who: int, sender: Any) -> None:
        rng = random.Random(SEED + who)
        with sender:
            number = 0
            while number < count:
                try:
                    match rng.randrange(5):
                        case 0:
                            sender.send((who, number), timeout_seconds=rng.choice([0, 1e-5, 1e-3]))
                            number += 1
                        case 1:
                            number += sender.try_send((who, number))
                        case 2:
                            items = [(who, it) for it in range(number, min(number + 9, count))]
                            try:
                                number += sender.send_many(items, timeout_seconds=1e-4)
                            except Timeout as error:
                                number += error.sent_count  # type: ignore[attr-defined]
                        case 3:
                            select([(sender, (who, number))], timeout_seconds=1e-4)
                            number += 1
                        case 4:
                            sender.send((who, number))
                            number += 1
                except Timeout:
                    pass

    def receive(who: int) -> None:
        rng = random.Random(SEED - who)
        mine = found[who]
        nothing = object()
        while True:
            try:
                match rng.randrange(5):
                    case 0:
                        mine.append(channel.receive(timeout_seconds=rng.choice([0, 1e-5, 1e-3])))
                    case 1:
                        item: Any = channel.try_receive(nothing)
                        if item is not nothing:
                            mine.append(item)
                    case 2:
                        mine.extend(channel.receive_many(3, timeout_seconds=1e-4))
                    case 3:
                        mine.append(select([channel], timeout_seconds=1e-4).item)
                    case 4:
                        mine.append(channel.receive())
            except Timeout:
                pass
            except Disconnected:
                return

    threads = [
        threading.Thread(target=guarded, args=(send, who, channel.sender()))
        for who in range(senders_count)
    ] + [threading.Thread(target=guarded, args=(receive, who)) for who in range(receivers_count)]
    for thread in threads:
        thread.start()
    finish(threads)
    assert failures == []
    everything = [(who, number) for who in range(senders_count) for number in range(count)]
    assert sorted(chain(*found)) == everything
    now = channel.statistics()
    assert (now.senders_waiting, now.receivers_waiting, now.current_count) == (0, 0, 0)


def test_two_threads_play_ping_pong_and_never_sleep_through_a_ball() -> None:
    there: Channel[int] = Channel(1)
    back: Channel[int] = Channel(1)
    count = 20_000

    def echo() -> None:
        for number in there:
            back.send(number)

    thread = threading.Thread(target=echo)
    thread.start()
    for number in range(count):
        there.send(number)
        assert back.receive(timeout_seconds=LONG) == number
    there.close()
    finish([thread])


def test_tasks_that_are_cancelled_at_random_lose_nothing() -> None:
    channel: Channel[int] = Channel(2)
    count = 3000

    async def consume(found: list[int], rng: random.Random) -> None:
        async def one() -> None:
            found.append(await channel.receive_async())

        while True:
            task = asyncio.create_task(one())
            if rng.random() < 0.5:
                await asyncio.sleep(0)
                task.cancel()
            try:
                await task
            except asyncio.CancelledError:
                pass
            except Disconnected:
                return

    async def main(seed: int) -> list[int]:
        found: list[int] = []
        rng = random.Random(seed)
        await asyncio.gather(*(consume(found, rng) for _ in range(5)))
        return found

    results: list[list[int]] = []
    threads = [
        threading.Thread(target=lambda n=n: results.append(asyncio.run(main(SEED + n))))
        for n in range(2)
    ]
    for thread in threads:
        thread.start()
    with channel.sender() as sender:
        for number in range(count):
            sender.send(number, timeout_seconds=LONG)
    finish(threads)
    assert sorted(chain(*results)) == list(range(count))


def test_selects_over_shared_channels_take_every_message_once() -> None:
    inboxes: list[Channel[int]] = [Channel(1) for _ in range(3)]
    senders = [inbox.sender() for inbox in inboxes]
    count = 3000
    found: list[list[int]] = [[] for _ in range(3)]

    def choose(mine: list[int]) -> None:
        try:
            while True:
                mine.append(select(inboxes).item)
        except Disconnected:
            return

    def feed(index: int) -> None:
        with senders[index] as sender:
            for number in range(count):
                sender.send(index * count + number)

    threads = [threading.Thread(target=choose, args=(mine,)) for mine in found]
    threads += [threading.Thread(target=feed, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    finish(threads)
    assert sorted(chain(*found)) == list(range(3 * count))


def test_a_queue_of_jobs_is_joined_again_and_again() -> None:
    jobs: Queue[int] = Queue(3)
    done = []

    def work() -> None:
        while (job := jobs.get()) >= 0:
            done.append(job)
            jobs.task_done()
        jobs.task_done()

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for start in range(0, 6000, 20):
        for job in range(start, start + 20):
            jobs.put(job)
        jobs.join()
        assert len(done) == start + 20
    for _ in threads:
        jobs.put(-1)
    jobs.join()
    finish(threads)
