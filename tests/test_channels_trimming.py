"""Channels give memory back that no message needs, and lose none: what a guard does with them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable

import numpy as np
import pytest

from moirai import _native
from moirai.channels import Channel, Queue, SharedChannel
from moirai.pressure import Action, Guard, Registry, Sample, Stage, TraceSource
from moirai.pressure.actions import built_in_actions

MIB = 1 << 20


def backed_bytes(channel: SharedChannel) -> int:
    return os.fstat(channel._fileno()).st_blocks * 512


def trim() -> Action:
    return {each.name: each for each in built_in_actions()}["channels"]


def test_free_blocks_of_a_shared_channel_go_back_to_the_kernel() -> None:
    with SharedChannel.create(capacity_bytes="16 MiB") as channel:
        sender, receiver = channel.sender(), channel.receiver()
        before = backed_bytes(channel)
        held = np.arange(MIB // 8)
        sender.send(held)  # in a block, on its way
        lent = receiver.receive()  # in the same one, viewed
        sender.send(2 * held)  # in another
        idle = _native.idle_channel_bytes()
        assert idle >= 12 * MIB
        freed = trim().run(1)
        assert freed is not None
        assert freed >= idle
        assert before - backed_bytes(channel) == freed
        assert trim().size() == 0
        assert np.array_equal(lent, held)
        assert np.array_equal(receiver.receive(), 2 * held)


def test_long_messages_get_the_memory_again() -> None:
    with SharedChannel.create(capacity_bytes="4 MiB") as channel:
        sender, receiver = channel.sender(), channel.receiver()
        for round_ in range(3):
            trim().run(1)
            trimmed = backed_bytes(channel)
            assert trimmed < MIB
            message = np.full(4 * MIB - 4096, round_, dtype=np.uint8)
            sender.send(message)
            assert backed_bytes(channel) - trimmed >= message.nbytes
            assert np.array_equal(receiver.receive(), message)


def test_who_attaches_to_a_trimmed_channel_can_use_it() -> None:
    name = f"test-trimmed-{os.getpid()}"
    with SharedChannel.create(name, capacity_bytes="2 MiB") as channel:
        trim().run(1)
        with SharedChannel.open(name) as other:
            other.sender().send_bytes(bytes(range(256)) * 4096)
            assert channel.receiver().receive_bytes() == bytes(range(256)) * 4096


def test_trimming_while_messages_flow_loses_none() -> None:
    count = 300
    stopping = threading.Event()
    with SharedChannel.create(capacity_bytes="1 MiB") as channel:
        sender, receiver = channel.sender(), channel.receiver()

        def send() -> None:
            for number in range(count):
                sender.send(np.full(200_000, number % 256, dtype=np.uint8))

        def keep_trimming() -> None:
            while not stopping.is_set():
                _native.trim_channels()

        threads = [threading.Thread(target=send), threading.Thread(target=keep_trimming)]
        for thread in threads:
            thread.start()
        try:
            for number in range(count):
                array = receiver.receive(timeout_seconds=60)
                assert array[0] == array[-1] == number % 256
        finally:
            stopping.set()
            for thread in threads:
                thread.join()


def test_a_closed_channel_and_a_child_that_never_used_one_are_left_alone(
    run_python: Callable[..., str],
) -> None:
    run_python("""
        import os
        from moirai import _native
        from moirai.channels import SharedChannel
        closed = SharedChannel.create(capacity_bytes="1 MiB")
        closed.close()
        assert _native.trim_channels() == 0
        channel = SharedChannel.create(capacity_bytes="1 MiB")
        if (child := os.fork()) == 0:
            os._exit(0 if _native.idle_channel_bytes() == _native.trim_channels() == 0 else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert _native.trim_channels() >= 1 << 20
    """)


def can_mount() -> bool:
    unshare = shutil.which("unshare")
    if unshare is None:
        return False
    mount = [unshare, "-m", "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", "/dev/shm"]
    return subprocess.run(mount, capture_output=True).returncode == 0


@pytest.mark.skipif(not can_mount(), reason="a small /dev/shm needs the right to mount one")
def test_memory_that_is_not_there_any_more_is_an_exception_and_nothing_is_sent() -> None:
    program = textwrap.dedent("""
        import os
        from moirai import _native
        from moirai.channels import SharedChannel
        from moirai.errors import OutOfMemory
        with SharedChannel.create("small", capacity_bytes="2 MiB") as channel:
            sender, receiver = channel.sender(), channel.receiver()
            assert _native.trim_channels() >= 2 << 20
            room = os.statvfs("/dev/shm")
            with open("/dev/shm/other", "wb") as other:  # takes all that is left
                os.posix_fallocate(other.fileno(), 0, room.f_bavail * room.f_frsize)
            for attempt in range(3):
                try:
                    sender.send_bytes(bytes(1 << 20))
                except OutOfMemory as error:
                    assert "shared memory for the channel is not there" in str(error), error
                else:
                    raise SystemExit("no exception")
            sender.send_bytes(b"short")
            assert receiver.receive_bytes() == b"short"
            os.unlink("/dev/shm/other")
            sender.send_bytes(b"x" * (1 << 20))
            assert receiver.receive_bytes() == b"x" * (1 << 20)
    """)
    script = 'mount -t tmpfs -o size=4m tmpfs /dev/shm && exec "$0" -c "$1"'
    command = ["unshare", "-m", "sh", "-c", script, sys.executable, program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_queue_gives_up_the_places_of_a_long_line() -> None:
    queue: Queue[int] = Queue()
    for number in range(100_000):
        queue.put(number)
    for number in range(99_000):
        assert queue.get() == number
    idle = _native.idle_channel_bytes()
    assert idle >= 8 * 99_000
    freed = trim().run(1)
    assert freed is not None
    assert 8 * 99_000 <= freed <= idle
    assert [queue.get() for _ in range(1000)] == list(range(99_000, 100_000))


def test_a_ring_stays_as_it_was_made() -> None:
    channel: Channel[int] = Channel(capacity=100_000)
    channel.send(1)
    trim().run(1)
    channel.send_many(range(99_999))
    assert channel.try_send(2) is False


def test_a_guard_has_channels_trimmed_from_gentle_on() -> None:
    with SharedChannel.create(capacity_bytes="8 MiB") as channel:
        before = backed_bytes(channel)
        source = TraceSource(os.devnull)
        guard = Guard(source, forecaster=None, registry=Registry(), built_in=[trim()])
        guard.step(Sample(0.0, 500, 1000))
        assert backed_bytes(channel) == before
        assert guard.step(Sample(1.0, 850, 1000)) is Stage.GENTLE
        (record,) = guard.records()
        assert record.name == "channels"
        assert record.freed_bytes == before - backed_bytes(channel) >= 8 * MIB
