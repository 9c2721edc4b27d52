"""moirai.channels in event loops: asyncio's own and uvloop."""

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest
from running import wait_until

from moirai import channels
from moirai.channels import Channel, Selected
from moirai.errors import Closed, Disconnected, Timeout

LONG = 60.0

Run = Callable[[Coroutine[Any, Any, Any]], Any]


def loop_factory(name: str) -> Callable[[], asyncio.AbstractEventLoop]:
    if name == "asyncio":
        return asyncio.new_event_loop
    uvloop = pytest.importorskip("uvloop")
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    with asyncio.Runner(loop_factory=loop_factory(request.param)) as runner:
        yield lambda main: runner.run(asyncio.wait_for(main, LONG))


async def waiting(predicate: Callable[[], bool]) -> None:
    while not predicate():
        await asyncio.sleep(0.001)


def test_what_is_ready_needs_no_loop() -> None:
    channel: Channel[int] = Channel(2)
    coroutine = channel.send_async(5)
    assert len(channel) == 0, "nothing happens before it is awaited"
    with pytest.raises(StopIteration):
        coroutine.send(None)
    receiving = channel.receive_async()
    with pytest.raises(StopIteration) as stopped:
        receiving.send(None)
    assert stopped.value.value == 5
    with pytest.raises(RuntimeError, match="cannot reuse already awaited coroutine"):
        receiving.send(None)
    channel.receive_async().close()
    assert asyncio.iscoroutine(receiving)


def test_a_tuple_and_an_exception_come_through_as_they_are(run: Run) -> None:
    async def main() -> None:
        channel: Channel[Any] = Channel(4)
        error = StopIteration(3)
        for item in ((1, 2), (), error, None):
            await channel.send_async(item)
        assert await channel.receive_async() == (1, 2)
        assert await channel.receive_async() == ()
        assert await channel.receive_async() is error
        assert await channel.receive_async() is None
        task = asyncio.create_task(channel.receive_async())
        await asyncio.sleep(0)
        await channel.send_async((3, 4))
        assert await task == (3, 4)

    run(main())


def test_tasks_hand_over_to_tasks(run: Run) -> None:
    async def main() -> None:
        channel: Channel[int] = Channel(1)

        async def produce() -> None:
            with channel.sender() as sender:
                for number in range(500):
                    await sender.send_async(number)

        async def consume() -> list[int]:
            return [number async for number in channel]

        found, _ = await asyncio.gather(consume(), produce())
        assert found == list(range(500))

    run(main())


def test_threads_send_to_tasks(run: Run) -> None:
    channel: Channel[int] = Channel(3)

    def produce() -> None:
        for number in range(3000):
            channel.send(number, timeout_seconds=LONG)
        channel.close()

    async def main() -> int:
        receiver = channel.receiver()
        return sum([number async for number in receiver])

    thread = threading.Thread(target=produce)
    thread.start()
    assert run(main()) == sum(range(3000))
    thread.join(LONG)


def test_tasks_send_to_threads(run: Run) -> None:
    channel: Channel[int] = Channel(3)
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.extend(channel))
    thread.start()

    async def main() -> None:
        with channel.sender() as sender:
            assert await sender.send_many_async(range(1000)) == 1000
            for number in range(1000):
                await sender.send_async(number)

    run(main())
    thread.join(LONG)
    assert found == [*range(1000), *range(1000)]


def test_many_tasks_share_a_channel(run: Run) -> None:
    async def main() -> None:
        channel: Channel[int] = Channel(2)
        back: Channel[int] = Channel(1000)

        async def work() -> None:
            async for number in channel:
                await back.send_async(number)

        workers = [asyncio.create_task(work()) for _ in range(20)]
        for number in range(400):
            await channel.send_async(number)
        channel.close()
        await asyncio.gather(*workers)
        assert sorted(await back.receive_many_async()) == list(range(400))

    run(main())


def test_timeouts(run: Run) -> None:
    async def main() -> None:
        channel: Channel[int] = Channel(1)
        for seconds in (0, 0.01):
            with pytest.raises(Timeout, match=rf"receive: nothing came within {seconds} s"):
                await channel.receive_async(timeout_seconds=seconds)
        with pytest.raises(Timeout, match=r"send_many: no room .* 1 of 3 were sent") as failed:
            await channel.send_many_async([1, 2, 3], timeout_seconds=0.01)
        assert failed.value.sent_count == 1  # type: ignore[attr-defined]
        with pytest.raises(Timeout, match=r"send: no room within 0.01 s"):
            await channel.send_async(1, timeout_seconds=0.01)
        with pytest.raises(Timeout, match="select: none of 1 operations"):
            await channels.select_async([(channel, 3)], timeout_seconds=0.01)
        now = channel.statistics()
        assert (now.senders_waiting, now.receivers_waiting, now.current_count) == (0, 0, 1)

    run(main())


def test_a_cancelled_task_takes_nothing_and_passes_its_call_on(run: Run) -> None:
    async def main() -> None:
        channel: Channel[int] = Channel(4)
        first = asyncio.create_task(channel.receive_async())
        second = asyncio.create_task(channel.receive_async())
        await waiting(lambda: channel.statistics().receivers_waiting == 2)
        channel.send(1)  # calls the first
        first.cancel()
        assert await second == 1
        with pytest.raises(asyncio.CancelledError):
            await first
        third = asyncio.create_task(channel.receive_async())
        await waiting(lambda: channel.statistics().receivers_waiting == 1)
        third.cancel()
        with pytest.raises(asyncio.CancelledError):
            await third
        assert channel.statistics().receivers_waiting == 0
        never_begun = asyncio.create_task(channel.receive_async())
        never_begun.cancel()
        with pytest.raises(asyncio.CancelledError):
            await never_begun
        sending = asyncio.create_task(channel.send_many_async(range(10)))
        await waiting(lambda: channel.statistics().senders_waiting == 1)
        sending.cancel()
        with pytest.raises(asyncio.CancelledError) as stopped:
            await sending
        assert stopped.value.sent_count == 4  # type: ignore[attr-defined]
        assert channel.receive_many() == [0, 1, 2, 3]

    run(main())


def test_the_end_of_a_channel_reaches_tasks(run: Run) -> None:
    async def main() -> None:
        channel: Channel[int] = Channel(1)
        loops = asyncio.create_task(anext(channel, "end"))  # type: ignore[arg-type]
        receives = asyncio.create_task(channel.receive_async())
        await waiting(lambda: channel.statistics().receivers_waiting == 2)
        channel.sender().close()
        assert await loops == "end"
        with pytest.raises(Disconnected, match="receive: every sender is closed"):
            await receives
        with pytest.raises(StopAsyncIteration):
            await anext(channel)
        full: Channel[int] = Channel(1)
        full.send(1)
        sends = asyncio.create_task(full.send_async(2))
        await waiting(lambda: full.statistics().senders_waiting == 1)
        full.close()
        with pytest.raises(Closed, match="send: this channel is closed"):
            await sends

    run(main())


def test_select_in_a_task(run: Run) -> None:
    async def main() -> None:
        first: Channel[int] = Channel(1)
        second: Channel[int] = Channel(1)
        choosing = asyncio.create_task(channels.select_async([first, second]))
        await waiting(lambda: second.statistics().receivers_waiting == 1)
        await second.send_async(7)
        assert await choosing == Selected(1, 7)
        assert first.statistics().receivers_waiting == 0
        assert await channels.select_async([(first, 1)]) == Selected(0, None)
        assert await channels.select_async([first, second]) == Selected(0, 1)

    run(main())


def test_a_closed_loop_does_not_keep_a_call() -> None:
    channel: Channel[int] = Channel(1)
    loop = asyncio.new_event_loop()
    task = loop.create_task(channel.receive_async())
    loop.run_until_complete(waiting(lambda: channel.statistics().receivers_waiting == 1))
    loop.close()
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(channel.receive()))
    thread.start()
    wait_until(lambda: channel.statistics().receivers_waiting == 2)
    channel.send(5)
    thread.join(LONG)
    assert found == [5]
    task._log_destroy_pending = False  # type: ignore[attr-defined]


def test_loops_and_what_waited_in_them_are_collected() -> None:
    channel: Channel[int] = Channel(1)

    async def main() -> weakref.ref[asyncio.AbstractEventLoop]:
        task = asyncio.create_task(channel.receive_async())
        await waiting(lambda: channel.statistics().receivers_waiting == 1)
        channel.send(1)
        assert await task == 1
        return weakref.ref(asyncio.get_running_loop())

    gone = asyncio.run(main())
    gc.collect()
    assert gone() is None


def test_several_loops_share_a_channel() -> None:
    channel: Channel[int] = Channel(2)
    found: Channel[int] = Channel(2000)

    async def consume() -> None:
        async for number in channel:
            found.send(number)

    threads = [threading.Thread(target=asyncio.run, args=(consume(),)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in range(1500):
        channel.send(number, timeout_seconds=LONG)
    channel.close()
    for thread in threads:
        thread.join(LONG)
    assert sorted(found.receive_many()) == list(range(1500))


def test_pending_operations_are_collected_with_their_item() -> None:
    class Message: ...

    message = Message()
    gone = weakref.ref(message)
    channel: Channel[Any] = Channel(1)
    pending = channel.send_async(message)
    message.pending = pending  # type: ignore[attr-defined]
    del message, pending
    gc.collect()
    assert gone() is None
