"""Channels between processes: what `docs/shared_channels.md` promises, killed processes apart."""

import asyncio
import collections
import contextlib
import fcntl
import gc
import multiprocessing
import os
import pickle
import resource
import signal
import struct
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from running import wait_until

from moirai.channels import SharedChannel, SharedReceiver, SharedSender
from moirai.errors import (
    Closed,
    Corrupted,
    Disconnected,
    InvalidArgument,
    Timeout,
    Unsupported,
    WrongType,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")

KIB = 1 << 10
MIB = 1 << 20
SHM = Path("/dev/shm")
WAIT = 60  # seconds until a test that hangs fails


@pytest.fixture
def channel() -> Iterator[SharedChannel]:
    with SharedChannel.create(capacity_bytes="2 MiB") as channel:
        yield channel


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    return f"test-{os.getpid()}-{abs(hash(request.node.name))}"


def in_child(body: Callable[[], Any]) -> int:
    """Run a function in a forked child, which exits with 0 if it returns; its process id."""
    child = os.fork()
    if child:
        return child
    try:
        signal.alarm(WAIT)
        body()
    except BaseException as error:
        print("child:", repr(error), file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def end_of(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# === messages ===================================================================================


@pytest.mark.parametrize("size", [0, 1, 2, 63, 64, 65, 4096, 64 * KIB, 64 * KIB + 1, 2 * MIB])
def test_bytes_arrive_as_they_were_sent(channel: SharedChannel, size: int) -> None:
    message = bytes(index * 7 % 251 for index in range(min(size, 5000))) * (size // 5000 + 1)
    message = message[:size]
    with channel.sender() as sender, channel.receiver() as receiver:
        for source in (message, bytearray(message), memoryview(message)):
            sender.send_bytes(source)
            received = receiver.receive_bytes(WAIT)
            assert type(received) is bytes
            assert received == message
    assert channel.used_block_bytes == 0


def test_a_message_longer_than_the_capacity_is_refused(channel: SharedChannel) -> None:
    with channel.sender() as sender, pytest.raises(InvalidArgument, match=r"at most \d+ bytes"):
        sender.send_bytes(bytes(3 * MIB))


@given(steps=st.lists(st.tuples(st.booleans(), st.integers(0, 200 * KIB)), max_size=60))
def test_a_channel_is_a_queue(steps: list[tuple[bool, int]]) -> None:
    model: collections.deque[bytes] = collections.deque()
    with SharedChannel.create(capacity_bytes="400 KiB") as channel:
        sender, receiver = channel.sender(), channel.receiver()
        for index, (sends, size) in enumerate(steps):
            if sends:
                message = bytes([index % 256]) * size
                try:
                    sender.send_bytes(message, 0)
                except Timeout:
                    assert model  # an empty channel has room
                else:
                    model.append(message)
            elif model:
                assert receiver.receive_bytes(0) == model.popleft()
            else:
                with pytest.raises(Timeout, match="nothing was received"):
                    receiver.receive_bytes(0)
        for message in model:
            assert receiver.receive_bytes(0) == message
        assert channel.used_block_bytes == 0


def test_a_full_channel_says_that_nothing_was_sent(channel: SharedChannel) -> None:
    sender = channel.sender()
    sent = 0
    with contextlib.suppress(Timeout):
        while True:
            sender.send_bytes(bytes(1000), 0)
            sent += 1
    with pytest.raises(Timeout, match="no room for the message within 0 s; nothing was sent"):
        sender.send_bytes(bytes(1000), 0)
    receiver = channel.receiver()
    assert len(receiver.receive_many(sent + 1)) == sent


def test_many_are_sent_and_received_at_once(channel: SharedChannel) -> None:
    messages = [b"%d" % index for index in range(1000)]
    with channel.sender() as sender, channel.receiver() as receiver:
        assert sender.send_many(messages) == 1000
        assert receiver.receive_many(600, WAIT) == messages[:600]
        assert receiver.receive_many(600, WAIT) == messages[600:]
        with pytest.raises(InvalidArgument, match="max_count: must be from 1"):
            receiver.receive_many(0)


def test_records_arrive_as_a_structured_array(channel: SharedChannel) -> None:
    dtype = np.dtype([("time", "f8"), ("level", "i4"), ("name", "S12")])
    records = np.zeros(500, dtype)
    records["time"] = np.arange(500) / 3
    records["name"] = b"abc"
    with channel.sender() as sender, channel.receiver() as receiver:
        assert sender.send_batch(records) == 500
        first = receiver.receive_batch(300, dtype, WAIT)
        rest = receiver.receive_batch(1000, dtype, WAIT)
        assert first.dtype == dtype
        assert (np.concatenate([first, rest]) == records).all()
        sender.send_bytes(b"short")
        with pytest.raises(InvalidArgument, match="next message, which has 5 bytes"):
            receiver.receive_batch(1, dtype)
        assert receiver.receive_bytes(0) == b"short"
        with pytest.raises(InvalidArgument, match="must hold plain values"):
            sender.send_batch(np.array([None]))


@pytest.mark.parametrize(
    "item",
    [
        None,
        {"a": 1, "b": [1.5, "x"]},
        np.arange(5),
        np.arange(210_000).reshape(3, -1),
        np.zeros((0, 4)),
        {"frames": [np.full(50_000, index) for index in range(5)]},
        b"x" * 200_000,
        bytearray(100_000),
    ],
    ids=lambda item: type(item).__name__,
)
def test_objects_arrive_as_they_were_sent(channel: SharedChannel, item: Any) -> None:
    with channel.sender() as sender, channel.receiver() as receiver:
        sender.send(item)
        received = receiver.receive(WAIT)
        assert type(received) is type(item)
        assert repr(received) == repr(item)
        if isinstance(item, np.ndarray):
            assert np.array_equal(received, item)
        sender.send_bytes(b"plain")
        assert receiver.receive(WAIT) == b"plain"
    del received
    gc.collect()
    assert channel.used_block_bytes == 0


def test_an_object_is_no_bytes_and_stays(channel: SharedChannel) -> None:
    with channel.sender() as sender, channel.receiver() as receiver:
        sender.send([1])
        with pytest.raises(InvalidArgument, match="got an object, which stays in the channel"):
            receiver.receive_bytes(0)
        assert receiver.receive(0) == [1]


# === views ======================================================================================


@pytest.mark.parametrize("dtype", ["f4", "i8", "c16", "S7", [("a", "u1"), ("b", "f8", (2,))]])
@pytest.mark.parametrize("shape", [(), 7, (3, 4), (300, 200), (0, 3)])
def test_an_array_written_in_place_arrives(channel: SharedChannel, shape: Any, dtype: Any) -> None:
    with channel.sender() as sender, channel.receiver() as receiver:
        with sender.reserve(shape, dtype) as slot:
            slot[...] = np.ones((), "u1").astype(slot.dtype) if slot.dtype.names is None else 1
            expected = slot.copy()
        with receiver.receive_view(WAIT) as array:
            assert array.shape == expected.shape
            assert array.dtype == expected.dtype
            assert (array == expected).all()


def test_a_view_keeps_its_block_from_being_overwritten(channel: SharedChannel) -> None:
    with channel.sender() as sender, channel.receiver() as receiver:
        kept = []
        for value in range(5):
            with sender.reserve(100_000, "u1") as slot:
                slot[:] = value
            with receiver.receive_view(WAIT) as array:
                kept.append(array[1000:2000])
            del array
        for value, view in enumerate(kept):
            assert (view == value).all()
        assert channel.used_block_bytes == 5 * 128 * KIB
        kept.clear()
        del view
        assert channel.used_block_bytes == 0


def test_a_slot_cannot_be_written_to_after_it_was_sent(channel: SharedChannel) -> None:
    with channel.sender() as sender, channel.receiver() as receiver:
        with sender.reserve(10, "u1") as slot:
            slot[:] = 1
        with pytest.raises(ValueError, match="read-only"):
            slot[:] = 2
        assert (receiver.receive(WAIT) == 1).all()


def test_an_exception_in_the_block_sends_nothing(channel: SharedChannel) -> None:
    with channel.sender() as sender, channel.receiver() as receiver:
        with pytest.raises(ZeroDivisionError), sender.reserve(10) as slot:
            slot[0] = 1 / 0
        with pytest.raises(Timeout):
            receiver.receive(0)
        assert channel.used_block_bytes == 0


def test_views_outlive_the_channel() -> None:
    channel = SharedChannel.create(capacity_bytes="1 MiB")
    sender, receiver = channel.sender(), channel.receiver()
    sender.send(np.arange(50_000))
    array = receiver.receive(WAIT)
    channel.close()
    del channel, sender, receiver
    gc.collect()
    assert (array == np.arange(50_000)).all()


def test_borrowed_blocks_make_senders_wait(channel: SharedChannel) -> None:
    with channel.sender() as sender, channel.receiver() as receiver:
        sender.send_bytes(bytes(2 * MIB))
        view = receiver.receive_view(WAIT)
        with pytest.raises(Timeout):
            sender.send_bytes(bytes(MIB), 0)
        thread = threading.Thread(target=sender.send_bytes, args=(b"x" * MIB, WAIT))
        thread.start()
        del view
        assert receiver.receive_bytes(WAIT) == b"x" * MIB
        thread.join()


# === coming and going ===========================================================================


def test_iteration_ends_when_the_last_sender_has_closed(channel: SharedChannel) -> None:
    first, second, receiver = channel.sender(), channel.sender(), channel.receiver()
    first.send(1)
    first.close()
    second.send(2)
    second.close()
    assert list(receiver) == [1, 2]
    with pytest.raises(Disconnected, match=f"of process {os.getpid()}, was closed"):
        receiver.receive()
    with channel.sender() as third:
        third.send(3)
        assert receiver.receive(WAIT) == 3


def test_sending_fails_when_the_last_receiver_has_closed(channel: SharedChannel) -> None:
    sender = channel.sender()
    sender.send_bytes(b"before anybody receives")
    receiver = channel.receiver()
    receiver.close()
    for send in (sender.send_bytes, sender.send):
        with pytest.raises(Disconnected, match="the last receiver"):
            send(b"x")
    with pytest.raises(Disconnected), sender.reserve(5):
        pass
    with channel.receiver() as receiver:
        assert receiver.receive_bytes(0) == b"before anybody receives"
        sender.send_bytes(b"x")


def test_a_closed_end_says_so(channel: SharedChannel) -> None:
    sender, receiver = channel.sender(), channel.receiver()
    for end in (sender, receiver):
        end.close()
        end.close()
        assert end.closed
    with pytest.raises(Closed, match="this sender is closed"):
        sender.send_bytes(b"")
    with pytest.raises(Closed, match="this receiver is closed"):
        receiver.receive_bytes()
    channel.close()
    with pytest.raises(Closed, match="this handle of the channel is closed"):
        channel.sender()


def test_who_uses_a_closed_end_takes_no_other_away(channel: SharedChannel) -> None:
    senders, receivers = ([make() for _ in range(2)] for make in (channel.sender, channel.receiver))
    for end in (senders[0], receivers[0]):
        end.close()
    for _ in range(5):
        with pytest.raises(Closed):
            senders[0].send_bytes(b"x")
        with pytest.raises(Closed):
            receivers[0].receive_bytes()
    assert (channel.sender_count, channel.receiver_count) == (1, 1)
    senders[1].send_bytes(b"y")
    assert receivers[1].receive_bytes(0) == b"y"


def test_closing_ends_a_wait_in_another_thread(channel: SharedChannel) -> None:
    receiver = channel.receiver()
    found: list[BaseException] = []
    waiting = threading.Event()

    def wait() -> None:
        waiting.set()
        try:
            receiver.receive_bytes(WAIT)
        except Closed as error:
            found.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    waiting.wait()
    channel.close()
    thread.join()
    assert len(found) == 1


def test_roles_are_counted_over_all_processes(channel: SharedChannel) -> None:
    assert (channel.sender_count, channel.receiver_count) == (0, 0)
    with channel.sender(), channel.sender(), channel.receiver() as receiver:
        assert (channel.sender_count, channel.receiver_count) == (2, 1)

        def child() -> None:
            with channel.sender() as sender:
                sender.send(channel.sender_count)

        process = in_child(child)
        assert receiver.receive(WAIT) == 3
        assert end_of(process) == 0
    assert (channel.sender_count, channel.receiver_count) == (0, 0)


@pytest.mark.parametrize("size", [2, 100_000])
def test_who_sends_many_is_told_how_many_went(channel: SharedChannel, size: int) -> None:
    with channel.sender() as sender, channel.receiver() as receiver:
        with pytest.raises(Timeout, match=r"within 0 s; \d+ messages were sent") as late:
            sender.send_many([bytes(size)] * 100_000, timeout_seconds=0)
        count = late.value.sent_count  # type: ignore[attr-defined]
        assert f"; {count} messages were sent" in str(late.value)
        for _ in range(count):
            assert len(receiver.receive_bytes(0)) == size
        with pytest.raises(TypeError) as wrong:
            sender.send_many([b"one", b"two", 3])
        assert wrong.value.sent_count == 2  # type: ignore[attr-defined]
        assert receiver.receive_many(10, 0) == [b"one", b"two"]
        with pytest.raises(Timeout, match="records were sent") as late:
            sender.send_batch(np.zeros(1 << 20, "u8"), timeout_seconds=0)
        count = late.value.sent_count  # type: ignore[attr-defined]
        assert len(receiver.receive_batch(1 << 20, "u8", 0)) == count > 0


def test_ctrl_c_ends_a_wait(run_python: Callable[..., str]) -> None:
    out = run_python("""
        import os, signal, threading
        from moirai.channels import SharedChannel
        channel = SharedChannel.create(capacity_bytes="1 MiB")
        receiver, sender = channel.receiver(), channel.sender()
        def fill():
            while True:
                sender.send_bytes(b"x" * 1000)
        for wait in (receiver.receive_bytes, receiver.receive, fill):
            timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
            timer.start()
            try:
                wait()
            except KeyboardInterrupt:
                print("interrupted")
    """)
    assert out.split() == ["interrupted"] * 3


# === names ======================================================================================


def test_a_name_leads_to_the_channel_from_any_process(name: str) -> None:
    program = """
        import sys
        from moirai.channels import SharedChannel
        channel = SharedChannel.open(sys.argv[1])
        with channel.sender() as sender:
            sender.send({"from": "another program"})
    """
    with SharedChannel.create(name, capacity_bytes="1 MiB") as channel:
        assert (SHM / f"moirai.{name}").stat().st_mode & 0o777 == 0o600
        receiver = channel.receiver()
        subprocess.run([sys.executable, "-c", textwrap.dedent(program), name], check=True)
        assert list(receiver) == [{"from": "another program"}]
    assert not (SHM / f"moirai.{name}").exists()


def test_a_name_goes_when_the_last_process_has_closed(name: str) -> None:
    first = SharedChannel.create(name, capacity_bytes="1 MiB")
    second = SharedChannel.open(name)
    third = pickle.loads(pickle.dumps(second))
    assert third.name == name
    first.close()
    second.close()
    assert (SHM / f"moirai.{name}").exists()
    third.close()
    assert not (SHM / f"moirai.{name}").exists()
    with pytest.raises(Disconnected, match="no channel has the name"):
        SharedChannel.open(name)


def test_a_named_channel_needs_no_more_descriptors_once_it_is_open(name: str) -> None:
    def child() -> None:
        channel = SharedChannel.create(name, "1 MiB")
        sender, receiver = channel.sender(), channel.receiver()
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
        with pytest.raises(Unsupported, match="Too many open files"):
            SharedChannel.open(name)
        channel._probe()
        sender.send_bytes(b"x")
        assert receiver.receive_bytes(0) == b"x"
        with pytest.raises(Timeout):
            receiver.receive_bytes(0.1)
        channel.close()
        assert not (SHM / f"moirai.{name}").exists()

    assert end_of(in_child(child)) == 0


def test_a_name_is_not_given_twice(name: str) -> None:
    with SharedChannel.create(name, capacity_bytes="1 MiB") as channel:
        with pytest.raises(InvalidArgument, match="must be a name that no channel has"):
            SharedChannel.create(name)
        with SharedChannel.open(name) as other, other.sender() as sender:
            sender.send_bytes(b"still works")
        assert channel.receiver().receive_bytes(0) == b"still works"


@pytest.mark.parametrize("bad", ["", "a/b", "ä", "x" * 300, "a b"])
def test_a_name_that_is_no_plain_word_is_refused(bad: str) -> None:
    for make in (SharedChannel.create, SharedChannel.open):
        with pytest.raises(InvalidArgument, match="name: must be 1 to 200 letters"):
            make(bad)


def test_names_of_the_dead_are_taken_away(name: str) -> None:
    def child() -> None:
        channel = SharedChannel.create(name, capacity_bytes="1 MiB")
        sender = channel.sender()
        sender.send(1)
        os.kill(os.getpid(), signal.SIGKILL)

    assert end_of(in_child(child)) == -signal.SIGKILL
    assert (SHM / f"moirai.{name}").exists()
    with SharedChannel.create(name + "-next", capacity_bytes="1 MiB"):
        assert not (SHM / f"moirai.{name}").exists()


@pytest.mark.parametrize("capacity", [0, -1, "0 B", 1 << 60])
def test_a_capacity_out_of_range_is_refused(capacity: Any) -> None:
    with pytest.raises(InvalidArgument, match="capacity_bytes: must be"):
        SharedChannel.create(capacity_bytes=capacity)


def test_memory_that_is_not_there_is_an_exception_at_creation(run_python: Any) -> None:
    run_python("""
        import resource
        from moirai.channels import SharedChannel
        from moirai.errors import OutOfMemory
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        import signal
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        for name in (None, "no-room"):
            try:
                SharedChannel.create(name, capacity_bytes="64 MiB")
            except OutOfMemory as error:
                assert "shared memory for the channel is not there" in str(error), error
            else:
                raise SystemExit("no exception")
    """)
    assert not (SHM / "moirai.no-room").exists()


# === other versions, damage =====================================================================

MAGIC_AT, VERSION_AT, ABI_AT, BYTES_AT, CAPACITY_AT, RING_AT = 0, 8, 16, 24, 32, 72


@pytest.mark.parametrize(
    ("offset", "value", "error", "words"),
    [
        (MAGIC_AT, b"SOMEBODY", Corrupted, "must begin with MOIRAISC, found SOMEBODY"),
        (VERSION_AT, struct.pack("<I", 9), Unsupported, "has layout version 9, this build"),
        (ABI_AT, struct.pack("<Q", 5), Unsupported, "ABI hash 0000000000000005, here "),
        (BYTES_AT, struct.pack("<Q", 4096), Corrupted, "must be 4096 bytes long"),
        (CAPACITY_AT, struct.pack("<Q", 0), Corrupted, "capacity_bytes is 0"),
        (RING_AT, struct.pack("<Q", 4096), Corrupted, "ring_offset must be"),
    ],
)
def test_a_header_that_differs_is_refused_by_name(
    name: str, offset: int, value: bytes, error: type[Exception], words: str
) -> None:
    with SharedChannel.create(name, capacity_bytes="1 MiB"):
        with (SHM / f"moirai.{name}").open("r+b") as file:
            file.seek(offset)
            before = file.read(len(value))
            file.seek(offset)
            file.write(value)
        with pytest.raises(error, match=words):
            SharedChannel.open(name)
        with (SHM / f"moirai.{name}").open("r+b") as file:
            file.seek(offset)
            file.write(before)
        SharedChannel.open(name).close()


@pytest.mark.parametrize("size", [0, 100, 8192, 500_000])
def test_a_truncated_segment_is_refused(name: str, size: int) -> None:
    with SharedChannel.create(name, capacity_bytes="1 MiB"):
        content = (SHM / f"moirai.{name}").read_bytes()
    path = SHM / f"moirai.{name}"
    path.write_bytes(content[:size])
    try:
        with path.open("r+b") as file:
            # As its owner would, so that it is not taken for one that nobody has.
            lock = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 1, 0)
            fcntl.fcntl(file, fcntl.F_OFD_SETLK, lock)
            with pytest.raises(Corrupted, match="truncated"):
                SharedChannel.open(name)
    finally:
        path.unlink()


def test_a_segment_truncated_under_a_reader_is_noticed(name: str, run_python: Any) -> None:
    run_python(f"""
        import os
        from moirai.channels import SharedChannel
        from moirai.errors import Corrupted
        channel = SharedChannel.create("{name}", capacity_bytes="1 MiB")
        receiver = channel.receiver()
        os.truncate("/dev/shm/moirai.{name}", 400_000)
        try:
            receiver.receive_bytes({WAIT})
        except Corrupted as error:
            assert "truncated" in str(error)
        else:
            raise SystemExit("no exception")
        channel.close()
    """)
    assert not (SHM / f"moirai.{name}").exists()


def test_an_anonymous_segment_cannot_be_truncated(channel: SharedChannel) -> None:
    with pytest.raises(PermissionError):
        os.ftruncate(channel._fileno(), 4096)


def test_words_that_no_sender_wrote_are_reported(name: str) -> None:
    with SharedChannel.create(name, capacity_bytes="1 MiB") as channel:
        sender, receiver = channel.sender(), channel.receiver()
        sender.send_bytes(b"x")
        with (SHM / f"moirai.{name}").open("r+b") as file:
            file.seek(4096 + 128 * 64)
            (word,) = struct.unpack("<Q", file.read(8))
            file.seek(4096 + 128 * 64)
            file.write(struct.pack("<Q", word | 7))
        with pytest.raises(Corrupted, match="record at granule 0"):
            receiver.receive_bytes(0)


# === processes ==================================================================================


def _echo(requests: SharedChannel, replies: SharedChannel) -> None:
    with replies.sender() as sender, requests.receiver() as receiver:
        for item in receiver:
            sender.send(item)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
@pytest.mark.parametrize("named", [False, True])
def test_handles_go_to_processes_however_they_start(method: str, named: bool, name: str) -> None:
    context = multiprocessing.get_context(method)
    names = (f"{name}-1", f"{name}-2") if named else (None, None)
    with (
        SharedChannel.create(names[0], capacity_bytes="1 MiB") as requests,
        SharedChannel.create(names[1], capacity_bytes="1 MiB") as replies,
    ):
        process = context.Process(target=_echo, args=(requests, replies))
        process.start()
        with requests.sender() as sender, replies.receiver() as receiver:
            for item in (b"x", np.arange(30_000), {"a": None}):
                sender.send(item)
                assert pickle.dumps(receiver.receive(WAIT)) == pickle.dumps(item)
        process.join()
        assert process.exitcode == 0


def _send_handle_back(inbox: Any) -> None:
    with inbox.get().sender() as sender:
        sender.send("got it")


def test_a_handle_goes_through_a_queue_to_a_process_that_runs() -> None:
    context = multiprocessing.get_context("spawn")
    inbox = context.Queue()
    process = context.Process(target=_send_handle_back, args=(inbox,))
    process.start()
    with SharedChannel.create(capacity_bytes="1 MiB") as channel:
        inbox.put(channel)
        receiver = channel.receiver()
        assert receiver.receive(WAIT) == "got it"
        process.join()
    inbox.close()
    inbox.join_thread()


def test_several_senders_and_receivers_share_the_work(channel: SharedChannel) -> None:
    each = 2000
    with SharedChannel.create(capacity_bytes="1 MiB") as results:

        def send(start: int) -> None:
            with channel.sender() as sender:
                for number in range(start, start + each):
                    sender.send_bytes(b"%d" % number + bytes(number % 300))

        def receive() -> None:
            with channel.receiver() as receiver, results.sender() as sender:
                for message in receiver:
                    sender.send(int(message.rstrip(b"\0")))

        # Held open until all are here, so that nobody finds the channel at its end before.
        gate = channel.sender()
        with results.receiver() as receiver:
            ends = [in_child(receive) for _ in range(2)]
            starts = [in_child(lambda index=index: send(index * each)) for index in range(3)]
            assert [end_of(process) for process in starts] == [0] * 3
            gate.close()
            found = list(receiver)
            assert [end_of(process) for process in ends] == [0] * 2
    assert sorted(found) == list(range(3 * each))


def test_order_of_each_sender_is_kept(channel: SharedChannel) -> None:
    gate = channel.sender()

    def send(who: int) -> None:
        with channel.sender() as sender:
            sender.send_many(struct.pack("<II", who, number) for number in range(3000))

    with channel.receiver() as receiver:
        processes = [in_child(lambda who=who: send(who)) for who in range(3)]
        found: list[list[int]] = [[], [], []]
        for _ in range(9000):
            who, number = struct.unpack("<II", receiver.receive_bytes(WAIT))
            found[who].append(number)
        assert found == [list(range(3000))] * 3
        assert [end_of(process) for process in processes] == [0] * 3
    gate.close()


# === fork =======================================================================================


def test_a_child_uses_what_it_inherited_as_itself(channel: SharedChannel) -> None:
    sender, receiver = channel.sender(), channel.receiver()

    def child() -> None:
        sender.send("child")
        sender.send(channel.sender_count)

    assert end_of(in_child(child)) == 0
    assert receiver.receive(WAIT) == "child"
    assert receiver.receive(WAIT) == 2
    channel._probe()
    assert channel.sender_count == 1
    sender.send("parent")
    assert receiver.receive(WAIT) == "parent"


def test_a_child_that_drops_what_it_inherited_takes_nothing_away(channel: SharedChannel) -> None:
    sender, receiver = channel.sender(), channel.receiver()
    sender.send(np.arange(50_000))
    array = receiver.receive(WAIT)

    def child() -> None:
        nonlocal array
        del array
        gc.collect()
        sender.close()
        receiver.close()
        channel.close()

    before = channel.used_block_bytes
    assert end_of(in_child(child)) == 0
    assert channel.used_block_bytes == before > 0
    assert (array == np.arange(50_000)).all()
    sender.send(1)
    assert receiver.receive(WAIT) == 1


def test_a_parent_that_dies_is_missed_though_its_child_lives(name: str) -> None:
    ready, stay = os.pipe(), os.pipe()

    def parent() -> None:
        channel = SharedChannel.open(name)
        sender = channel.sender()
        if os.fork() == 0:  # inherits everything, uses nothing
            os.close(stay[1])
            os.read(stay[0], 1)
            os._exit(0)
        sender.send("here")
        os.write(ready[1], b"x")
        signal.pause()

    with SharedChannel.create(name, capacity_bytes="1 MiB") as channel:
        receiver = channel.receiver()
        process = in_child(parent)
        assert receiver.receive(WAIT) == "here"
        os.read(ready[0], 1)
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        with pytest.raises(Disconnected, match=f"of process {process}, died"):
            receiver.receive(WAIT)
    for fd in (*ready, *stay):
        os.close(fd)


# === asyncio ====================================================================================


def test_both_ends_wait_in_event_loops(channel: SharedChannel) -> None:
    def child() -> None:
        async def send() -> None:
            with channel.sender() as sender:
                for number in range(300):
                    await sender.send_async((number, bytes(50_000)), WAIT)

        asyncio.run(send())

    async def receive() -> list[int]:
        found = []
        with channel.receiver() as receiver:
            async for number, _ in receiver:
                found.append(number)
                await asyncio.sleep(0)
        return found

    process = in_child(child)
    assert asyncio.run(receive()) == list(range(300))
    assert end_of(process) == 0


def test_a_timeout_and_a_cancellation_leave_the_message(channel: SharedChannel) -> None:
    async def main(sender: SharedSender, receiver: SharedReceiver) -> None:
        with pytest.raises(Timeout):
            await receiver.receive_async(0.01)
        task = asyncio.create_task(receiver.receive_async())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        waiting = asyncio.create_task(receiver.receive_bytes_async(WAIT))
        await asyncio.sleep(0)
        await sender.send_bytes_async(b"x")
        assert await waiting == b"x"

    with channel.sender() as sender, channel.receiver() as receiver:
        asyncio.run(main(sender, receiver))
        sender.send_bytes(b"y")
        assert receiver.receive_bytes(0) == b"y"


def test_an_event_loop_is_told_that_the_sender_died(channel: SharedChannel) -> None:
    def child() -> None:
        sender = channel.sender()
        sender.send("here")
        signal.pause()

    async def main() -> None:
        with channel.receiver() as receiver:
            process = in_child(child)
            assert await receiver.receive_async(WAIT) == "here"
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            with pytest.raises(Disconnected, match="died"):
                await receiver.receive_async(WAIT)

    asyncio.run(main())


def test_a_receiver_that_never_waits_is_told_that_the_sender_died(channel: SharedChannel) -> None:
    def child() -> None:
        sender = channel.sender()
        sender.send("here")
        signal.pause()

    with channel.receiver() as receiver:
        process = in_child(child)
        assert receiver.receive(WAIT) == "here"
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)

        def is_told() -> bool:
            try:
                receiver.receive(0)
            except Disconnected as error:
                return "died" in str(error)
            except Timeout:
                pass
            return False

        wait_until(is_told)


def test_a_forked_child_has_event_loops_of_its_own(channel: SharedChannel) -> None:
    sender, receiver = channel.sender(), channel.receiver()

    async def receive() -> None:
        waiting = asyncio.create_task(receiver.receive_async(WAIT))
        await asyncio.sleep(0)
        sender.send("here")
        assert await waiting == "here"

    asyncio.run(receive())
    assert end_of(in_child(lambda: asyncio.run(receive()))) == 0
    asyncio.run(receive())


def test_an_event_loop_waits_as_long_as_it_is_told(channel: SharedChannel) -> None:
    async def main() -> None:
        with channel.receiver() as receiver:
            for wrong in (-1, float("nan"), float("inf"), 1e10):
                with pytest.raises(InvalidArgument, match="timeout_seconds: must be None or a num"):
                    await receiver.receive_async(wrong)
            with pytest.raises(WrongType, match="timeout_seconds: must be a number or None"):
                await receiver.receive_async("1")  # type: ignore[arg-type]
            with pytest.raises(Timeout, match=r"receive: no message came within 0 s; nothing"):
                await receiver.receive_async(0)
            with pytest.raises(Timeout, match=r"receive_bytes: no message came within 0.05 s; no"):
                await receiver.receive_bytes_async(0.05)

    asyncio.run(main())
