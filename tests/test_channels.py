"""moirai.channels: one thread's view, then threads, ends, select, garbage, fork."""

import gc
import math
import os
import queue
import random
import signal
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable
from itertools import chain
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from running import wait_until

from moirai import channels
from moirai.channels import Channel, Queue, Selected, select
from moirai.errors import Closed, Disconnected, InvalidArgument, Timeout

# What a test does not expect to wait for; a hang fails instead of stopping the suite.
LONG = 60.0


class Worker(threading.Thread):
    """A thread whose result or exception is asked for."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        super().__init__(daemon=True)
        self.call, self.arguments = call, arguments
        self.result: Any = None
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self.result = self.call(*self.arguments)
        except BaseException as error:
            self.error = error

    def get(self) -> Any:
        self.join(LONG)
        assert not self.is_alive(), "the thread hangs"
        if self.error is not None:
            raise self.error
        return self.result


def receivers_wait(channel: Channel[Any], count: int = 1) -> None:
    wait_until(lambda: channel.statistics().receivers_waiting == count)


def senders_wait(channel: Channel[Any], count: int = 1) -> None:
    wait_until(lambda: channel.statistics().senders_waiting == count)


# === one thread ==================================================================================


def test_messages_come_out_in_order_and_are_the_very_objects() -> None:
    channel: Channel[object] = Channel(3)
    sent = [object(), None, [1]]
    for item in sent:
        channel.send(item)
    assert len(channel) == 3
    assert [channel.receive() for _ in sent] == sent
    assert len(channel) == 0
    assert channel


@pytest.mark.parametrize("capacity", [1, 2, 3, 4, 5, 7, 8, 9])
def test_a_ring_of_any_capacity_wraps_around(capacity: int) -> None:
    channel: Channel[int] = Channel(capacity)
    for start in range(50):
        for number in range(capacity):
            assert channel.try_send(start + number)
        assert not channel.try_send(-1)
        assert [channel.receive() for _ in range(capacity)] == list(range(start, start + capacity))
    assert channel.statistics().total_sent == channel.statistics().total_received == 50 * capacity


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("send"), st.integers()),
        st.tuples(st.just("send_many"), st.lists(st.integers(), max_size=8)),
        st.tuples(st.just("receive"), st.none()),
        st.tuples(st.just("receive_many"), st.integers(1, 8)),
        st.tuples(st.just("close"), st.none()),
    ),
    max_size=60,
)


@given(capacity=st.integers(1, 9), operations=OPERATIONS)
def test_a_channel_behaves_like_a_bounded_deque(
    capacity: int, operations: list[tuple[str, Any]]
) -> None:
    channel: Channel[Any] = Channel(capacity)
    model: deque[Any] = deque()
    closed = False
    sent = 0
    for name, argument in operations:
        match name:
            case "send" if closed:
                with pytest.raises(Closed):
                    channel.try_send(argument)
            case "send":
                assert channel.try_send(argument) == (len(model) < capacity)
                if len(model) < capacity:
                    model.append(argument)
                    sent += 1
            case "send_many":
                room = 0 if closed else capacity - len(model)
                model.extend(argument[:room])
                sent += min(room, len(argument))
                if len(argument) <= room:
                    assert channel.send_many(argument, timeout_seconds=0) == len(argument)
                else:
                    with pytest.raises(Closed if closed else Timeout) as failed:
                        channel.send_many(argument, timeout_seconds=0)
                    assert failed.value.sent_count == room  # type: ignore[attr-defined]
            case "receive" if model:
                assert channel.receive(timeout_seconds=0) == model.popleft()
            case "receive":
                with pytest.raises(Closed if closed else Timeout):
                    channel.receive(timeout_seconds=0)
            case "receive_many" if model:
                taken = [model.popleft() for _ in range(min(argument, len(model)))]
                assert channel.receive_many(argument, timeout_seconds=0) == taken
            case "receive_many":
                with pytest.raises(Closed if closed else Timeout):
                    channel.receive_many(argument, timeout_seconds=0)
            case "close":
                channel.close()
                closed = True
        assert len(channel) == len(model)
        now = channel.statistics()
        assert (now.total_sent, now.current_count) == (sent, len(model))
        assert now.total_sent - now.total_received == now.current_count
    channel.close()
    assert list(channel) == list(model)


def test_arguments_are_checked_by_name() -> None:
    for capacity in (0, -1, 2**30 + 1):
        with pytest.raises(InvalidArgument, match=f"capacity: must be from 1 to .* got {capacity}"):
            Channel(capacity)
    with pytest.raises(TypeError, match="capacity: must be an int, got float"):
        Channel(1.0)  # type: ignore[arg-type]
    channel: Channel[int] = Channel(1)
    channel.send(1)
    with pytest.raises(InvalidArgument, match="timeout_seconds: must be None or a number from 0"):
        channel.send(1, timeout_seconds=-1)
    with pytest.raises(InvalidArgument, match="max_count: must be from 1"):
        channel.receive_many(0)
    with pytest.raises(TypeError, match="not iterable"):
        channel.send_many(3)  # type: ignore[arg-type]
    assert channel.receive() == 1


def test_timeouts_say_what_is_left_behind() -> None:
    channel: Channel[int] = Channel(2)
    with pytest.raises(Timeout, match=r"receive: nothing came within 0.01 s, 0 others wait; noth"):
        channel.receive(timeout_seconds=0.01)
    with pytest.raises(
        Timeout, match=r"send_many: no room within 0.01 s: 2 of at most 2 .* 2 of 3 were sent"
    ) as failed:
        channel.send_many(range(3), timeout_seconds=0.01)
    assert failed.value.sent_count == 2  # type: ignore[attr-defined]
    with pytest.raises(
        Timeout, match=r"send: no room within 0.01 s: 2 of at most 2 .* nothing was"
    ):
        channel.send(1, timeout_seconds=0.01)
    assert channel.receive_many() == [0, 1]
    now = channel.statistics()
    assert (now.receivers_waiting, now.senders_waiting) == (0, 0)


def test_try_receive_gives_its_default() -> None:
    channel: Channel[int] = Channel(1)
    nothing = object()
    assert channel.try_receive() is None
    assert channel.try_receive(nothing) is nothing
    channel.send(5)
    assert channel.try_receive(nothing) == 5


def test_send_many_takes_any_iterable_and_reads_it_first() -> None:
    channel: Channel[int] = Channel(10)
    assert channel.send_many(number for number in range(3)) == 3
    assert channel.send_many((3, 4)) == 2
    assert channel.send_many([]) == 0

    def broken() -> Any:
        yield 5
        raise KeyError("broken")

    with pytest.raises(KeyError):
        channel.send_many(broken())
    assert channel.receive_many(2) == [0, 1]
    assert channel.receive_many() == [2, 3, 4]


def test_statistics_and_representation_tell_the_state() -> None:
    channel: Channel[int] = Channel(4)
    channel.send_many([1, 2, 3])
    channel.receive()
    now = channel.statistics()
    assert (now.capacity, now.current_count, now.total_sent, now.total_received) == (4, 2, 3, 1)
    assert repr(channel) == "Channel(2 of 4 messages)"
    channel.close()
    assert repr(channel) == "Channel(2 of 4 messages, closed)"
    assert "total_sent=3" in repr(now)
    assert channel.statistics() == channel.statistics()
    assert now != 3
    assert Channel[int].__args__ == (int,)  # type: ignore[attr-defined]


# === threads =====================================================================================


@pytest.mark.parametrize("many", [False, True], ids=["one by one", "many"])
def test_every_message_arrives_once_and_each_senders_are_in_order(many: bool) -> None:
    channel: Channel[tuple[int, int]] = Channel(7)
    count = 2000

    def produce(who: int) -> None:
        with channel.sender() as sender:
            barrier.wait(LONG)
            items = [(who, number) for number in range(count)]
            if many:
                assert sender.send_many(items, timeout_seconds=LONG) == count
            else:
                for item in items:
                    sender.send(item, timeout_seconds=LONG)

    def consume() -> list[tuple[int, int]]:
        if not many:
            return list(channel)
        found = []
        try:
            while True:
                found += channel.receive_many(3, timeout_seconds=LONG)
        except Disconnected:
            return found

    barrier = threading.Barrier(3)
    producers = [Worker(produce, who) for who in range(3)]
    consumers = [Worker(consume) for _ in range(3)]
    found = [consumer.get() for consumer in consumers]
    for producer in producers:
        producer.get()
    assert sorted(chain(*found)) == [(who, n) for who in range(3) for n in range(count)]
    for one in found:
        for who in range(3):
            numbers = [number for sender, number in one if sender == who]
            assert numbers == sorted(numbers)


def test_a_waiting_receiver_is_woken_by_a_message() -> None:
    channel: Channel[str] = Channel(1)
    worker = Worker(channel.receive)
    receivers_wait(channel)
    channel.send("hello")
    assert worker.get() == "hello"


def test_a_waiting_sender_is_woken_by_room() -> None:
    channel: Channel[int] = Channel(1)
    channel.send(1)
    worker = Worker(channel.send, 2)
    senders_wait(channel)
    assert channel.receive() == 1
    worker.get()
    assert channel.receive() == 2


def test_those_who_wait_are_woken_in_order_of_arrival() -> None:
    channel: Channel[int] = Channel(10)
    woken: Channel[int] = Channel(10)
    workers = []
    for number in range(4):
        workers.append(Worker(lambda n=number: woken.send((channel.receive(), n))))  # type: ignore
        receivers_wait(channel, number + 1)
    for number in range(4):
        channel.send(number)
        assert woken.receive(timeout_seconds=LONG) == (number, number)
    for worker in workers:
        worker.get()


def test_one_message_wakes_one_and_the_others_wait_on() -> None:
    channel: Channel[int] = Channel(4)
    workers = [Worker(channel.receive) for _ in range(3)]
    receivers_wait(channel, 3)
    channel.send(1)
    wait_until(lambda: sum(worker.is_alive() for worker in workers) == 2)
    assert channel.statistics().receivers_waiting == 2
    channel.send_many([2, 3])
    assert sorted(worker.get() for worker in workers) == [1, 2, 3]


def test_a_wait_that_times_out_leaves_the_line() -> None:
    channel: Channel[int] = Channel(1)
    first = Worker(lambda: channel.receive(timeout_seconds=0.05))
    # On a busy machine its time is over before anybody looks.
    wait_until(lambda: channel.statistics().receivers_waiting == 1 or not first.is_alive())
    second = Worker(channel.receive)
    with pytest.raises(Timeout):
        first.get()
    receivers_wait(channel, 1)
    channel.send(1)
    assert second.get() == 1


def test_who_only_looks_for_room_takes_nobodys_turn() -> None:
    channel: Channel[int] = Channel(1)
    with channel.sender() as sender:
        channel.send(0)
        looking = Worker(sender.wait_for_room)
        senders_wait(channel)
        sending = Worker(channel.send, 1)
        senders_wait(channel, 2)
        assert channel.receive() == 0
        looking.get()
        sending.get()
        assert channel.receive() == 1


def test_close_wakes_everybody() -> None:
    channel: Channel[int] = Channel(1)
    receivers = [Worker(channel.receive) for _ in range(2)]
    receivers_wait(channel, 2)
    channel.close()
    channel.close()
    for worker in receivers:
        with pytest.raises(Closed, match="receive: this channel is closed"):
            worker.get()
    full: Channel[int] = Channel(1)
    full.send(1)
    senders = [Worker(full.send, 2) for _ in range(2)]
    senders_wait(full, 2)
    full.close()
    for worker in senders:
        with pytest.raises(Closed, match="send: this channel is closed"):
            worker.get()
    assert list(full) == [1]


def test_ctrl_c_ends_a_wait(run_python: Any) -> None:
    source = """
        import os, signal, threading, moirai.channels as channels
        channel = channels.Channel(1)
        full = channels.Channel(1)
        full.send(0)

        def interrupt(waiting):
            while not waiting():
                pass
            os.kill(os.getpid(), signal.SIGINT)

        for wait, waiting in [
            (channel.receive, lambda: channel.statistics().receivers_waiting),
            (channel.receive_many, lambda: channel.statistics().receivers_waiting),
            (lambda: full.send(1), lambda: full.statistics().senders_waiting),
            (lambda: channels.select([channel]), lambda: channel.statistics().receivers_waiting),
            (lambda: next(channel), lambda: channel.statistics().receivers_waiting),
        ]:
            thread = threading.Thread(target=interrupt, args=(waiting,))
            thread.start()
            try:
                wait()
            except KeyboardInterrupt:
                print("interrupted")
            thread.join()
        now = channel.statistics()
        assert (now.receivers_waiting, now.total_sent) == (0, 0), now
        half = channels.Channel(1)
        waiting = lambda: half.statistics().senders_waiting
        thread = threading.Thread(target=interrupt, args=(waiting,))
        thread.start()
        try:
            half.send_many([1, 2, 3])
        except KeyboardInterrupt as error:
            print("sent", error.sent_count)
        thread.join()
    """
    assert run_python(source).split() == ["interrupted"] * 5 + ["sent", "1"]


def test_a_handler_that_returns_does_not_end_a_wait() -> None:
    channel: Channel[int] = Channel(1)
    seen = []

    def handle(*_: object) -> None:
        seen.append(1)
        channel.send(7)

    before = signal.signal(signal.SIGUSR1, handle)
    try:
        me = threading.get_ident()

        def interrupt() -> None:
            receivers_wait(channel)
            signal.pthread_kill(me, signal.SIGUSR1)

        worker = Worker(interrupt)
        assert channel.receive(timeout_seconds=LONG) == 7
        worker.get()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert seen == [1]


# === ends ========================================================================================


def test_the_last_sender_ends_the_receivers() -> None:
    channel: Channel[int] = Channel(4)
    first, second = channel.sender(), channel.sender()
    worker = Worker(lambda: list(channel))
    with first:
        first.send(1)
    assert first.closed
    second.send(2)
    receivers_wait(channel)
    second.close()
    second.close()
    assert worker.get() == [1, 2]
    with pytest.raises(Disconnected, match="receive: every sender is closed, and what was sent"):
        channel.receive()
    with pytest.raises(Disconnected, match="try_receive: every sender"):
        channel.try_receive()
    with pytest.raises(Disconnected, match="receive_many: every sender"):
        channel.receive_many()
    with pytest.raises(Closed, match="send: every sender of this channel is closed"):
        channel.send(1)
    with pytest.raises(Closed, match="try_send: every sender"):
        channel.try_send(1)
    with pytest.raises(Closed, match="sender: this channel is closed, or every sender"):
        channel.sender()
    with pytest.raises(Closed, match="send: this handle is closed"):
        second.send(3)


def test_the_last_receiver_ends_the_senders_and_drops_what_is_left() -> None:
    channel: Channel[object] = Channel(1)

    class Message: ...

    message = Message()
    gone = weakref.ref(message)
    receiver = channel.receiver()
    channel.send(message)
    del message
    worker = Worker(channel.send, 1)
    senders_wait(channel)
    receiver.close()
    assert gone() is None
    with pytest.raises(Disconnected, match="send: every receiver is closed"):
        worker.get()
    with pytest.raises(Disconnected, match="try_send: every receiver is closed"):
        channel.try_send(1)
    with pytest.raises(Closed, match="receive: every receiver of this channel is closed"):
        channel.receive()
    with pytest.raises(Closed, match="receive: this handle is closed"):
        receiver.receive()
    with pytest.raises(Closed, match="receiver: this channel"):
        channel.receiver()
    assert list(receiver) == []


def test_a_handle_that_is_collected_is_closed() -> None:
    channel: Channel[int] = Channel(4)
    sender = channel.sender()
    sender.send(1)
    assert channel.statistics().current_senders == 1
    del sender
    gc.collect()
    assert list(channel) == [1]
    other: Channel[int] = Channel(4)
    receiver = other.receiver()
    del receiver
    gc.collect()
    with pytest.raises(Disconnected):
        other.send(1)


def test_handles_do_all_that_their_side_does() -> None:
    channel: Channel[int] = Channel(4)
    with channel.sender() as sender, channel.receiver() as receiver:
        sender.send(1)
        assert sender.try_send(2)
        assert sender.send_many([3, 4]) == 2
        with pytest.raises(Timeout):
            sender.wait_for_room(timeout_seconds=0)
        assert receiver.receive() == 1
        sender.wait_for_room()
        assert receiver.try_receive() == 2
        assert receiver.receive_many() == [3, 4]
        assert receiver.try_receive(7) == 7
        sender.send(5)
        assert next(receiver) == 5
        now = channel.statistics()
        assert (now.current_senders, now.current_receivers) == (1, 1)
    with pytest.raises(Closed, match="__enter__: this handle is closed"), sender:
        pass


def test_closing_the_channel_beats_the_handles() -> None:
    channel: Channel[int] = Channel(4)
    sender, receiver = channel.sender(), channel.receiver()
    sender.send(1)
    channel.close()
    with pytest.raises(Closed, match="send: this channel is closed"):
        sender.send(2)
    assert receiver.receive() == 1
    with pytest.raises(Closed, match="receive: this channel is closed, and what was sent"):
        receiver.receive()
    sender.close()
    receiver.close()
    with pytest.raises(Closed):
        channel.receive()


# === select ======================================================================================


def test_select_does_exactly_one_operation() -> None:
    first: Channel[str] = Channel(1)
    second: Channel[str] = Channel(1)
    second.send("two")
    assert select([first, second]) == Selected(1, "two")
    assert select([(first, "one"), second]) == Selected(0, None)
    with pytest.raises(Timeout, match="select: none of 2 operations could be done within 0 s"):
        select([(first, "more"), second], timeout_seconds=0)
    assert select([first, second]) == Selected(0, "one")
    assert len(first) == len(second) == 0


def test_select_waits_for_whichever_comes_first() -> None:
    inboxes: list[Channel[int]] = [Channel(1) for _ in range(3)]
    full: Channel[int] = Channel(1)
    full.send(0)
    operations = [*inboxes, (full, 9)]
    for index, inbox in enumerate(inboxes):
        worker = Worker(select, operations)
        receivers_wait(inbox)
        inbox.send(index)
        assert worker.get() == Selected(index, index)
        assert all(it.statistics().receivers_waiting == 0 for it in inboxes)
    worker = Worker(select, operations)
    senders_wait(full)
    assert full.receive() == 0
    assert worker.get() == Selected(3, None)
    assert full.receive() == 9


def test_select_passes_on_a_call_that_it_did_not_use() -> None:
    first: Channel[int] = Channel(4)
    second: Channel[int] = Channel(4)
    for _ in range(50):
        chooser = Worker(select, [first, second])
        receivers_wait(first)
        waiting = Worker(second.receive)
        receivers_wait(second, 2)
        first.send(1)
        second.send(2)
        chosen = chooser.get()
        if chosen.which == 1:  # it took what the other waits for
            assert first.receive() == 1
            second.send(2)
        assert waiting.get() == 2


def test_select_starves_no_channel() -> None:
    inboxes: list[Channel[int]] = [Channel(100) for _ in range(3)]
    for inbox in inboxes:
        inbox.send_many(range(100))
    counts = [0, 0, 0]
    for _ in range(90):
        counts[select(inboxes).which] += 1
    assert min(counts) >= 20


def test_select_leaves_out_what_has_ended() -> None:
    first: Channel[int] = Channel(1)
    second: Channel[int] = Channel(1)
    first.close()
    second.send(1)
    assert select([first, second]) == Selected(1, 1)
    with second.sender():
        pass
    with pytest.raises(Closed, match="receive: this channel is closed"):
        select([first, second])
    with pytest.raises(Disconnected):
        select([second, first])


def test_select_refuses_what_is_no_operation() -> None:
    with pytest.raises(InvalidArgument, match="operations: must be at least one, got none"):
        select([])
    with pytest.raises(TypeError, match=r"operations\[1\]: must be a Channel, .* got int"):
        select([Channel(1), 3])  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"operations\[0\]"):
        select([(3, 4)])  # type: ignore[list-item]
    channel: Channel[int] = Channel(2)
    with channel.sender() as sender, channel.receiver() as receiver:
        assert select([(sender, 3)]) == Selected(0, None)
        assert select([receiver]) == Selected(0, 3)
    with pytest.raises(Closed, match="select: this handle is closed"):
        select([receiver])


# === objects =====================================================================================


def test_a_finaliser_may_use_the_channel_its_object_came_from() -> None:
    channel: Channel[Any] = Channel(4)

    class Message:
        def __del__(self) -> None:
            channel.send("last words")

    channel.send(Message())
    channel.receive()
    assert channel.receive(timeout_seconds=LONG) == "last words"
    receiver = channel.receiver()
    channel.send(Message())
    receiver.close()  # drops the message, whose finaliser finds the channel disconnected


test_a_finaliser_may_use_the_channel_its_object_came_from = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)(test_a_finaliser_may_use_the_channel_its_object_came_from)


def test_a_cycle_through_a_channel_is_collected() -> None:
    class Holder:
        channel: Any = None

    def make(wrap: Callable[[Channel[Any]], Any]) -> weakref.ref[Holder]:
        holder = Holder()
        channel: Channel[Any] = Channel(5)
        for _ in range(7):  # the ring wraps
            channel.send(0)
            channel.receive()
        holder.channel = wrap(channel)
        channel.send_many([holder, 1, holder])
        return weakref.ref(holder)

    for wrap in (
        lambda channel: channel,
        lambda channel: channel.sender(),
        lambda channel: channel.receiver(),
        lambda channel: channel.receive_async(),
    ):
        gone = make(wrap)
        gc.collect()
        assert gone() is None

    holder = Holder()
    holder.channel = Queue()
    holder.channel.put(holder)
    gone = weakref.ref(holder)
    del holder
    gc.collect()
    assert gone() is None


def test_messages_are_dropped_with_the_channel() -> None:
    channel: Channel[Any] = Channel(5)
    item = object()
    before = sys.getrefcount(item)
    channel.send_many([item] * 5)
    channel.receive()
    assert sys.getrefcount(item) == before + 4
    del channel
    assert sys.getrefcount(item) == before


def test_references_are_counted_right_whatever_happens() -> None:
    item = object()
    before = sys.getrefcount(item)
    channel: Channel[Any] = Channel(2)
    channel.send_many([item, item])
    assert not channel.try_send(item)
    with pytest.raises(Timeout):
        channel.send(item, timeout_seconds=0)
    with pytest.raises(Timeout) as failed:
        channel.send_many([item] * 3, timeout_seconds=0)
    del failed
    with pytest.raises(Timeout):
        select([(channel, item)], timeout_seconds=0)
    assert len(channel.receive_many()) == 2
    channel.close()
    with pytest.raises(Closed):
        channel.send(item)
    gc.collect()
    assert sys.getrefcount(item) == before


def test_a_subclass_and_weak_references_work() -> None:
    class Named(Channel[int]):
        name = "jobs"

    named = Named(2)
    named.send(1)
    assert (named.name, named.receive()) == ("jobs", 1)
    assert weakref.ref(named)() is named


# === fork ========================================================================================


def in_child(check: Callable[[], None]) -> None:
    """Run in a forked child; its exit says whether the check passed."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            check()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    assert status == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_child_has_a_copy_and_nobody_waiting() -> None:
    channel: Channel[int] = Channel(2)
    empty: Channel[int] = Channel(2)
    waiting = Worker(empty.receive)
    receivers_wait(empty)
    channel.send_many([1, 2])
    blocked = Worker(channel.send, 3)
    senders_wait(channel)

    def child() -> None:
        assert empty.statistics().receivers_waiting == 0
        assert channel.statistics().senders_waiting == 0
        empty.send(5)
        assert empty.receive() == 5
        assert channel.receive_many() == [1, 2]
        worker = Worker(channel.receive)
        receivers_wait(channel)
        channel.send(6)
        assert worker.get() == 6
        channel.close()

    in_child(child)
    assert channel.receive_many(2) == [1, 2]
    blocked.get()
    assert channel.receive() == 3
    empty.send(4)
    assert waiting.get() == 4
    assert not channel.closed


# === calls =======================================================================================


def test_every_way_to_call_send_and_receive_does_the_same() -> None:
    class Own(Channel[int]):
        pass

    for channel in (Channel[int](8), Own(8)):
        for sends, receives in ((channel, channel), (channel.sender(), channel.receiver())):
            sends.send(1)
            sends.send(2, 0)
            sends.send(item=3)
            sends.send(4, timeout_seconds=None)
            send = type(sends).send
            send(sends, 5)
            receive = type(receives).receive
            got = [receives.receive(), receives.receive(0), receives.receive(timeout_seconds=1)]
            assert [*got, receive(receives), receive(receives, None)] == [1, 2, 3, 4, 5]
            for call in (
                lambda sends=sends: sends.send(),
                lambda sends=sends: sends.send(1, 2, 3),
                lambda sends=sends: sends.send(1, item=1),
                lambda receives=receives: receives.receive(1, 2),
                lambda receives=receives: receives.receive(seconds=1),
                lambda send=send: send(object(), 1),
                lambda receive=receive: receive(object()),
            ):
                with pytest.raises(TypeError):
                    call()
            assert channel.statistics().current_count == 0


def test_the_quick_way_keeps_no_message() -> None:
    channel: Channel[object] = Channel(1)
    item = object()
    count = sys.getrefcount(item)
    channel.send(item)
    for _ in range(100):
        with pytest.raises(Timeout):
            channel.send(item, 0)
    worker = Worker(channel.send, item)
    wait_until(lambda: channel.statistics().senders_waiting == 1)
    assert channel.receive() is item
    worker.get()
    assert channel.receive() is item
    channel.close()
    for _ in range(100):
        with pytest.raises(Closed):
            channel.send(item)
    del worker
    gc.collect()
    assert sys.getrefcount(item) == count


# === queue.Queue =================================================================================


def load_queue_tests() -> list[type]:
    """CPython's own tests of queue.Queue, with ours in its place."""
    import unittest

    found = pytest.importorskip("test.test_queue")
    names = ("Queue", "Full", "Empty", "ShutDown")
    module = SimpleNamespace(**{name: getattr(channels, name) for name in names})

    def on_ours(mixin: type, name: str) -> type:
        return type(name, (mixin, unittest.TestCase), {"queue": module, "__module__": __name__})

    tests = [
        on_ours(found.QueueTest, "TestQueueOfCPython"),
        on_ours(found.FailingQueueTest, "TestFailingQueueOfCPython"),
    ]
    return tests


TestQueueOfCPython, TestFailingQueueOfCPython = load_queue_tests()


def test_the_queue_is_native_unless_hooks_are_overridden() -> None:
    native: Queue[int] = Queue(3)
    assert isinstance(native, queue.Queue)
    assert not hasattr(native, "mutex")

    class Last(Queue[int]):
        def _get(self) -> int:
            return self.queue.pop()

    last = Last()
    for number in range(3):
        last.put(number)
    assert [last.get() for _ in range(3)] == [2, 1, 0]
    assert last.unfinished_tasks == 3

    class Renamed(Queue[int]):
        pass

    renamed = Renamed(1)
    renamed.put(1)
    assert renamed.full()
    assert renamed.unfinished_tasks == 1
    assert not hasattr(renamed, "mutex")


def test_the_queue_joins_and_counts_tasks() -> None:
    jobs: Queue[int] = Queue()
    jobs.join()
    jobs.put_nowait(1)
    jobs.put(2)
    worker = Worker(jobs.join)
    assert [jobs.get(), jobs.get_nowait()] == [1, 2]
    jobs.task_done()
    assert worker.is_alive()
    jobs.task_done()
    worker.get()
    with pytest.raises(ValueError, match="called too many times"):
        jobs.task_done()
    full: Queue[int] = Queue(1)
    full.put(1)
    with pytest.raises(queue.Full):
        full.put(2, timeout=0)
    assert full.unfinished_tasks == 1


def test_a_queue_that_is_shut_down_refuses_and_drains() -> None:
    jobs: Queue[int] = Queue(2)
    jobs.put(1)
    jobs.put(2)
    blocked = Worker(jobs.put, 3)
    joining = Worker(jobs.join)
    jobs.shutdown()
    with pytest.raises(channels.ShutDown):
        blocked.get()
    with pytest.raises(channels.ShutDown):
        jobs.put(3)
    assert [jobs.get(), jobs.get()] == [1, 2]
    with pytest.raises(channels.ShutDown):
        jobs.get()
    jobs.shutdown(immediate=True)
    joining.get()


@pytest.mark.parametrize("seconds", [0.0, 1e-320, 5, threading.TIMEOUT_MAX, math.inf])
def test_the_queue_waits_as_long_as_it_is_told(seconds: float) -> None:
    jobs: Queue[int] = Queue(1)
    jobs.put(1, timeout=seconds)
    assert jobs.get(timeout=seconds) == 1
    if seconds < 1:
        with pytest.raises(queue.Empty):
            jobs.get(timeout=seconds)
    else:
        waiting = Worker(jobs.get, True, seconds)
        jobs.put(2)
        assert waiting.get() == 2


@pytest.mark.parametrize("seconds", [-1, math.nan])
def test_the_queue_refuses_what_is_no_time(seconds: float) -> None:
    jobs: Queue[int] = Queue(1)
    for call in (lambda: jobs.put(1, timeout=seconds), lambda: jobs.get(timeout=seconds)):
        with pytest.raises(ValueError, match="'timeout' must be a non-negative number"):
            call()
    # As with the standard one: who never waits may say anything.
    jobs.put(1, block=False, timeout=seconds)
    assert jobs.get(block=False, timeout=seconds) == 1
    Queue[int]().put(1, timeout=seconds)


def test_raising_maxsize_lets_senders_go_on() -> None:
    jobs: Queue[int] = Queue(1)
    jobs.put(1)
    blocked = Worker(jobs.put, 2)
    wait_until(lambda: jobs.unfinished_tasks == 2)
    jobs.maxsize = 2
    blocked.get()
    assert jobs.qsize() == 2
    jobs.maxsize = 0
    for number in range(100):
        jobs.put(number, block=False)


def test_random_use_of_the_queue_is_like_the_standard_one() -> None:
    rng = random.Random(7)
    ours: Queue[int] = Queue(4)
    theirs: queue.Queue[int] = queue.Queue(4)

    def call(target: Any, name: str, *arguments: Any) -> Any:
        try:
            return getattr(target, name)(*arguments)
        except Exception as error:
            return type(error)

    for step in range(3000):
        name, *arguments = rng.choice(
            [
                ("put_nowait", step),
                ("get_nowait",),
                ("qsize",),
                ("full",),
                ("empty",),
                ("task_done",),
            ]
        )
        assert call(ours, name, *arguments) == call(theirs, name, *arguments)
        assert ours.unfinished_tasks == theirs.unfinished_tasks
