"""A process killed at any instruction leaves nothing that blocks or misleads the others."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stepping import kill_after

from moirai import _native
from moirai.channels import SharedChannel
from moirai.errors import Disconnected, Timeout

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")

KIB = 1 << 10
WAIT = 60
QUICK_KILLS = 50
SHM = Path("/dev/shm")


@functools.cache
def message(number: int, size: int) -> bytes:
    return bytes([number]) * size


def spread(total: int, count: int) -> Iterator[int]:
    """So many numbers of steps, from the first to the last."""
    return (total * index // max(1, count - 1) for index in range(count))


class Story:
    """What the killed one does, and what the others must find afterwards."""

    name = ""

    def prepare(self, channel: SharedChannel) -> Any:
        raise NotImplementedError

    def act(self, end: Any) -> object:
        raise NotImplementedError

    def before(self, channel: SharedChannel) -> None:
        """In this process, before the other one lives."""

    def after(self, channel: SharedChannel) -> None:
        """In this process, after it died."""


class KilledSender(Story):
    size = 100

    def prepare(self, channel: SharedChannel) -> Any:
        sender = channel.sender()
        self.send(sender, 1)
        return sender

    def act(self, end: Any) -> object:
        return self.send(end, 2)

    def send(self, sender: Any, number: int) -> None:
        sender.send_bytes(message(number, self.size))

    def check(self, found: Any, number: int) -> None:
        assert found == message(number, self.size)

    def before(self, channel: SharedChannel) -> None:
        self.receiver = channel.receiver()

    def after(self, channel: SharedChannel) -> None:
        receiver = self.receiver
        self.check(receiver.receive(WAIT), 1)
        with contextlib.suppress(Disconnected):
            self.check(receiver.receive(WAIT), 2)
        with pytest.raises(Disconnected, match="died"):
            receiver.receive(WAIT)
        with channel.sender() as sender:  # a replacement
            self.send(sender, 3)
            self.check(receiver.receive(WAIT), 3)


class KilledSenderOfBlocks(KilledSender):
    size = 17 * KIB  # just too long for the ring of so small a channel


class KilledInPlace(KilledSender):
    def send(self, sender: Any, number: int) -> None:
        with sender.reserve(3, "i8") as slot:
            slot[:] = number

    def check(self, found: Any, number: int) -> None:
        assert (found == np.full(3, number)).all()


class KilledReceiver(Story):
    size = 100

    def before(self, channel: SharedChannel) -> None:
        self.sender = channel.sender()
        for number in (1, 2, 3):
            self.sender.send_bytes(message(number, self.size))

    def prepare(self, channel: SharedChannel) -> Any:
        receiver = channel.receiver()
        assert receiver.receive(0) == message(1, self.size)
        return receiver

    def act(self, end: Any) -> object:
        return end.receive(0)

    def after(self, channel: SharedChannel) -> None:
        channel._probe()
        with pytest.raises(Disconnected, match="died"):
            self.sender.send_bytes(b"")
        with channel.receiver() as receiver:  # a replacement
            found = []
            while True:
                try:
                    found.append(receiver.receive(0))
                except Timeout:
                    break
            assert found in (
                [message(2, self.size), message(3, self.size)],
                [message(3, self.size)],
            )
            self.sender.send_bytes(b"more")
            assert receiver.receive(0) == b"more"


class KilledReceiverOfBlocks(KilledReceiver):
    size = 17 * KIB  # just too long for the ring of so small a channel


class KilledComingAndGoing(Story):
    def before(self, channel: SharedChannel) -> None:
        self.keep = channel.receiver()

    def prepare(self, channel: SharedChannel) -> Any:
        return channel.name

    def act(self, end: Any) -> object:
        with SharedChannel.open(end) as channel, channel.sender(), channel.receiver():
            pass

    def after(self, channel: SharedChannel) -> None:
        with SharedChannel.open(str(channel.name)) as other:
            assert (other.sender_count, other.receiver_count) == (0, 1)
            other.sender().send("works")
            assert self.keep.receive(WAIT) == "works"


class KilledTrimmer(Story):
    """It gives memory of free blocks back; the next long message must find some there."""

    def before(self, channel: SharedChannel) -> None:
        self.receiver = channel.receiver()

    def prepare(self, channel: SharedChannel) -> Any:
        return channel.sender()

    def act(self, end: Any) -> object:
        return _native.trim_channels()

    def after(self, channel: SharedChannel) -> None:
        with channel.sender() as sender:
            longest = message(7, channel.capacity_bytes)
            sender.send_bytes(longest)
            blocks = os.fstat(channel._fileno()).st_blocks * 512
            assert blocks >= channel.capacity_bytes
            assert self.receiver.receive(WAIT) == longest


STORIES = [
    KilledSender,
    KilledSenderOfBlocks,
    KilledInPlace,
    KilledReceiver,
    KilledReceiverOfBlocks,
    KilledComingAndGoing,
    KilledTrimmer,
]


def tell(make: Callable[[], Story], steps: int | None) -> int:
    story = make()
    with SharedChannel.create(f"killed-{os.getpid()}", capacity_bytes="128 KiB") as channel:
        story.before(channel)
        done = kill_after(steps, lambda: story.prepare(channel), story.act)
        if done >= 0:
            channel._probe()
            story.after(channel)
            assert channel.used_block_bytes == 0
    assert not (SHM / f"moirai.killed-{os.getpid()}").exists()
    return done


def kill_often(make: Callable[[], Story], count: int) -> None:
    total = tell(make, None)
    if total < 0:
        pytest.skip("this machine does not let a process be traced")
    print(f"{total} instructions, {count} of them the last")
    for steps in spread(total, count):
        try:
            tell(make, steps)
        except BaseException:
            print("killed after", steps, "instructions")
            raise


@pytest.mark.parametrize("make", STORIES, ids=lambda make: make.__name__)
def test_a_process_killed_at_any_instruction_leaves_nothing(make: Callable[[], Story]) -> None:
    kill_often(make, QUICK_KILLS // len(STORIES) + 1)
