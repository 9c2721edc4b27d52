"""Arrays that travel between processes without a copy: what `docs/shared_channels.md` promises."""

import contextlib
import ctypes
import errno
import gc
import multiprocessing
import os
import resource
import signal
import struct
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from running import in_forked_child, run_threads
from stepping import kill_after
from test_shared_channels import end_of, in_child
from test_shared_channels_killed import spread

from moirai import _native, memory
from moirai.channels import SharedChannel, SharedReceiver, SharedSender
from moirai.errors import Disconnected, InvalidArgument, OutOfMemory, Timeout, Unsupported
from moirai.memory import SharedMemoryResource

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")

KIB, MIB = 1 << 10, 1 << 20
PAGE = 4096
WAIT = 60
KILLS = 5


@pytest.fixture
def shared() -> SharedMemoryResource:
    return SharedMemoryResource("64 MiB")


@pytest.fixture
def ends() -> Iterator[tuple[SharedSender, SharedReceiver]]:
    with SharedChannel.create(capacity_bytes="1 MiB") as channel:
        yield channel.sender(), channel.receiver()


def used_bytes(shared: SharedMemoryResource) -> int:
    report = shared.check()
    assert report.ok, str(report)
    return int(report.counts["shared_memory.used_bytes"])


def filled(shared: SharedMemoryResource, value: int, count: int = 1000) -> np.ndarray:
    with memory.use(shared):
        return np.full(count, value)


# --- by reference -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "view_of",
    [
        lambda array: array,
        lambda array: array[3:-5],
        lambda array: array[::-3],
        lambda array: array.reshape(20, 30)[2:9, ::-2].T,
        lambda array: array[7:7],
        lambda array: array[5:6].reshape(()),
        lambda array: array.view("u1")[3:],
        lambda array: array.view([("a", "i4"), ("b", "f4")]),
        lambda array: np.broadcast_to(array[:, None], (600, 4)),
    ],
)
def test_any_view_arrives_as_the_same_memory(
    shared: SharedMemoryResource, ends: Any, view_of: Callable[[np.ndarray], np.ndarray]
) -> None:
    sender, receiver = ends
    with memory.use(shared):
        array = np.arange(600)
    view = view_of(array)
    sender.send(view)
    found = receiver.receive(0)
    assert found.dtype == view.dtype
    assert found.strides == view.strides
    np.testing.assert_array_equal(found, view)
    assert not found.flags.writeable
    if view.size:
        assert np.shares_memory(found, view)
    array[:] = 7
    np.testing.assert_array_equal(found, view)


def test_objects_carry_their_arrays_by_reference(shared: SharedMemoryResource, ends: Any) -> None:
    sender, receiver = ends
    array = filled(shared, 3, MIB)  # more than the channel itself could carry
    small = np.arange(5)
    sender.send({"large": array, "small": small, "again": [array[:10]], "text": "x"})
    found = receiver.receive(0)
    assert np.shares_memory(found["large"], array)
    assert np.shares_memory(found["again"][0], array)
    assert not found["large"].flags.writeable
    np.testing.assert_array_equal(found["small"], small)
    assert found["text"] == "x"


def test_buffers_and_adaptors_are_recognised(ends: Any) -> None:
    sender, receiver = ends
    shared = SharedMemoryResource("8 MiB")
    adaptor = memory.StatisticsAdaptor(memory.LimitAdaptor(shared, limit_bytes="4 MiB"))
    buffer = adaptor.allocate(1000)
    for array in (
        filled(adaptor, 5),
        buffer.numpy(),
        np.frombuffer(buffer, "u1"),
        np.frombuffer(memoryview(buffer), "u1"),
    ):
        sender.send(array)
        assert np.shares_memory(receiver.receive(0), array)
    plain = np.ones(1000)
    sender.send(plain)
    assert not np.shares_memory(receiver.receive(0), plain)


def test_arrays_of_references_are_pickled(shared: SharedMemoryResource, ends: Any) -> None:
    sender, receiver = ends
    with memory.use(shared):
        array = np.array([{"a": 1}, "b"], dtype=object)
    sender.send(array)
    assert receiver.receive(0).tolist() == [{"a": 1}, "b"]


def test_a_dtype_that_only_pickle_can_write_is_no_hindrance(
    shared: SharedMemoryResource, ends: Any
) -> None:
    dtype = np.dtype({"names": ["a", "b"], "formats": ["i4", "i2"], "offsets": [8, 0]})
    with memory.use(shared):
        array = np.zeros(100, dtype)
    array["b"] = 7
    sender, receiver = ends
    sender.send(array)
    found = receiver.receive(0)
    assert found.dtype == dtype
    assert (found["b"] == 7).all()


def test_a_received_array_can_be_sent_on(shared: SharedMemoryResource, ends: Any) -> None:
    sender, receiver = ends
    array = filled(shared, 3)
    sender.send(array)
    first = receiver.receive(0)
    sender.send(first[10:])
    second = receiver.receive(0)
    assert np.shares_memory(second, array)
    del array, first
    assert used_bytes(shared) > 0
    assert (second == 3).all()
    del second
    assert used_bytes(shared) == 0


def test_receive_view_is_by_reference_too(shared: SharedMemoryResource, ends: Any) -> None:
    sender, receiver = ends
    array = filled(shared, 3)
    sender.send(array)
    with receiver.receive_view(0) as view:
        assert np.shares_memory(view, array)
        assert not view.flags.writeable


# --- giving away --------------------------------------------------------------------------------


def test_what_was_given_is_writable_in_place_on_request(
    shared: SharedMemoryResource, ends: Any
) -> None:
    sender, receiver = ends
    array = filled(shared, 3)
    sender.send(array, give=True)
    found = receiver.receive(0, writable=True)
    found[0] = 9
    assert np.shares_memory(found, array)
    assert not array.flags.writeable
    with pytest.raises(InvalidArgument, match="item: must be writable to be given away"):
        sender.send(array, give=True)
    sender.send({"a": array[:2].copy(), "b": found}, give=True)
    both = receiver.receive(0, writable=True)
    both["b"][1] = 8
    assert found[1] == 8
    assert not found.flags.writeable


def test_what_was_lent_is_copied_if_it_shall_be_writable(
    shared: SharedMemoryResource, ends: Any
) -> None:
    sender, receiver = ends
    array = filled(shared, 3)
    sender.send(array)
    sender.send([array])
    for found in (receiver.receive(0, writable=True), receiver.receive(0, writable=True)[0]):
        found[:] = 9
        assert (array == 3).all()


def test_what_was_given_is_read_only_unless_asked(shared: SharedMemoryResource, ends: Any) -> None:
    sender, receiver = ends
    sender.send(filled(shared, 3), give=True)
    assert not receiver.receive(0).flags.writeable


# --- who holds what -----------------------------------------------------------------------------


steps = st.one_of(
    st.tuples(st.just("make"), st.integers(1, 20 * KIB)),
    st.tuples(st.just("send"), st.integers(0, 9)),
    st.tuples(st.just("send object"), st.integers(0, 9)),
    st.tuples(st.just("receive"), st.just(0)),
    st.tuples(st.just("forget"), st.integers(0, 9)),
    st.tuples(st.just("forward"), st.integers(0, 9)),
    st.tuples(st.just("let go"), st.integers(0, 9)),
)


@settings(max_examples=40)
@given(steps=st.lists(steps, max_size=60))
def test_a_block_lives_as_long_as_somebody_has_it(steps: list[tuple[str, int]]) -> None:
    """A model in plain Python: which block each array, message and received array is of."""
    shared = SharedMemoryResource("16 MiB")
    made: list[tuple[int, np.ndarray]] = []
    on_their_way: list[int] = []
    received: list[tuple[int, np.ndarray]] = []
    sizes: dict[int, int] = {}
    with SharedChannel.create(capacity_bytes="1 MiB") as channel:
        sender, receiver = channel.sender(), channel.receiver()
        for step, number in steps:
            if step == "make":
                block = len(sizes)
                made.append((block, filled(shared, block, number)))
                sizes[block] = -(-8 * number // PAGE) * PAGE
            elif step == "receive" and on_their_way:
                block = on_their_way.pop(0)
                found = receiver.receive(0)
                received.append((block, found[0] if isinstance(found, list) else found))
            elif step in ("send", "send object") and made:
                block, array = made[number % len(made)]
                sender.send(array if step == "send" else [array])
                on_their_way.append(block)
            elif step == "forget" and made:
                made.pop(number % len(made))
            elif step == "forward" and received:
                block, array = received[number % len(received)]
                sender.send(array)
                on_their_way.append(block)
            elif step == "let go" and received:
                received.pop(number % len(received))
            array = found = None
            alive = {block for block, _ in made + received} | set(on_their_way)
            assert used_bytes(shared) == sum(sizes[block] for block in alive)
            for block, there in made + received:
                assert (there == block).all()
        made.clear()
        received.clear()
        array = found = there = None
    assert used_bytes(shared) == 0


def test_messages_that_nobody_can_receive_free_what_they_carried(
    shared: SharedMemoryResource,
) -> None:
    with SharedChannel.create(capacity_bytes="1 MiB") as channel:
        sender, receiver = channel.sender(), channel.receiver()
        sender.send(filled(shared, 1))
        assert used_bytes(shared) > 0
        receiver.close()
    assert used_bytes(shared) == 0


def test_more_messages_than_there_are_parcels_wait(shared: SharedMemoryResource) -> None:
    array = filled(shared, 1)
    with SharedChannel.create(capacity_bytes="16 MiB") as channel:
        sender, receiver = channel.sender(), channel.receiver()
        sent = 0
        with contextlib.suppress(Timeout):
            while True:
                sender.send(array, 0)
                sent += 1
        assert sent == 1024
        receiver.receive(0)
        sender.send(array, 0)
        for _ in range(sent):
            assert (receiver.receive(0) == 1).all()
    del array
    assert used_bytes(shared) == 0


def test_who_waits_for_a_parcel_is_woken(shared: SharedMemoryResource) -> None:
    array = filled(shared, 1)
    with SharedChannel.create(capacity_bytes="16 MiB") as channel:
        sender, receiver = channel.sender(), channel.receiver()
        for _ in range(1024):
            sender.send(array, 0)
        run_threads(
            lambda: sender.send(array, WAIT),
            lambda: [receiver.receive(WAIT) for _ in range(1025)] and None,
        )


def test_ctrl_c_ends_a_wait_for_a_parcel(run_python: Callable[..., str]) -> None:
    out = run_python("""
        import os, signal, threading
        import numpy as np
        from moirai import memory
        from moirai.channels import SharedChannel
        channel = SharedChannel.create(capacity_bytes="16 MiB")
        receiver, sender = channel.receiver(), channel.sender()
        with memory.use(memory.SharedMemoryResource("4 MiB")):
            array = np.ones(1000)
        for _ in range(1024):
            sender.send(array, 0)
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
        try:
            sender.send(array)
        except KeyboardInterrupt:
            print("interrupted")
        for _ in range(1024):
            receiver.receive(0)
    """)
    assert out.split() == ["interrupted"]


def test_more_arrays_than_there_are_parcels_are_copied(
    shared: SharedMemoryResource, ends: Any
) -> None:
    sender, receiver = ends
    arrays = [filled(shared, number, 1) for number in range(1100)]
    sender.send(arrays, WAIT)
    found = receiver.receive(0)
    assert [int(array[0]) for array in found] == list(range(1100))
    assert not np.shares_memory(found[0], arrays[0])


def test_the_memory_outlives_its_resource(ends: Any) -> None:
    sender, receiver = ends
    shared = SharedMemoryResource("8 MiB")
    sender.send(filled(shared, 4))
    del shared
    gc.collect()
    found = receiver.receive(0)
    assert (found == 4).all()


# --- processes ----------------------------------------------------------------------------------


def work(requests: SharedChannel, replies: SharedChannel) -> None:
    """Send back what comes, and an array of its own."""
    shared = SharedMemoryResource("8 MiB")
    with requests.receiver() as receiver, replies.sender() as sender:
        array = receiver.receive(WAIT)
        sender.send({"back": array, "sum": int(array.sum())})
        with memory.use(shared):
            sender.send(np.full(5000, 11), give=True)
    # The process ends now; it waits until this is received.


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_processes_started_in_any_way_share_arrays(
    shared: SharedMemoryResource, method: str
) -> None:
    context = multiprocessing.get_context(method)
    requests = SharedChannel.create(capacity_bytes="1 MiB")
    replies = SharedChannel.create(capacity_bytes="1 MiB")
    with requests, replies, requests.sender() as sender, replies.receiver() as receiver:
        process = context.Process(target=work, args=(requests, replies))
        process.start()
        array = filled(shared, 2)
        sender.send(array)
        found = receiver.receive(WAIT)
        assert found["sum"] == 2000
        assert np.shares_memory(found["back"], array)
        given = receiver.receive(WAIT, writable=True)
        given[:] += 1
        process.join(WAIT)
        assert process.exitcode == 0
        # Its maker is gone, the memory is not.
        assert (given == 12).all()
        del found, array
        assert used_bytes(shared) == 0


def test_a_resource_does_not_pickle(shared: SharedMemoryResource) -> None:
    import pickle

    with pytest.raises(TypeError, match="SharedMemoryResource"):
        pickle.dumps(shared)


def test_a_forked_child_shares_what_it_inherited_and_keeps_it(
    shared: SharedMemoryResource,
) -> None:
    arrays = [filled(shared, 3)]
    go, done = os.pipe(), os.pipe()

    def child() -> None:
        arrays[0][1] = 8
        os.write(done[1], b"x")
        os.read(go[0], 1)
        # The parent has let go of it, and filled as much again.
        assert arrays[0][:3].tolist() == [3, 8, 5]
        mine = filled(shared, 4)
        assert not np.shares_memory(mine, arrays[0])
        assert shared.check().ok

    process = in_child(child)
    os.read(done[0], 1)
    assert arrays[0][1] == 8
    arrays[0][2] = 5
    arrays.clear()
    assert used_bytes(shared) > 0
    others = [filled(shared, 9) for _ in range(100)]
    os.write(go[1], b"x")
    assert end_of(process) == 0
    del others
    assert used_bytes(shared) == 0


def test_what_a_child_frees_stays_its_parents(shared: SharedMemoryResource) -> None:
    arrays = [filled(shared, 3)]

    def child() -> None:
        arrays.clear()
        for _ in range(3):
            filled(shared, 9)

    in_forked_child(child)
    assert (arrays[0] == 3).all()


def test_grandchildren_hold_what_they_inherited(shared: SharedMemoryResource) -> None:
    arrays = [filled(shared, 3)]

    def grandchild() -> None:
        assert (arrays[0] == 3).all()
        arrays[0][0] = 1

    def child() -> None:
        in_forked_child(grandchild)
        assert arrays[0][0] == 1

    in_forked_child(child)
    assert arrays[0][0] == 1
    arrays.clear()
    assert used_bytes(shared) == 0


def test_a_child_that_found_no_slot_keeps_its_memory_for_good() -> None:
    shared = SharedMemoryResource("4 MiB")
    array = filled(shared, 3)
    go = os.pipe()
    children = [in_child(lambda: os.read(go[0], 1)) for _ in range(64)]
    del array
    held = used_bytes(shared)
    os.write(go[1], b"x" * 64)
    for child in children:
        assert end_of(child) == 0
    assert used_bytes(shared) == held > 0


def test_a_message_whose_memory_cannot_be_attached_to_stays() -> None:
    with SharedChannel.create(capacity_bytes="1 MiB") as channel:
        go = os.pipe()

        def child() -> None:
            receiver = channel.receiver()
            os.read(go[0], 1)
            limits = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
            for _ in range(2):
                with pytest.raises(Unsupported, match="Too many open files"):
                    receiver.receive(WAIT)
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            assert (receiver.receive(0) == 3).all()

        process = in_child(child)
        shared = SharedMemoryResource("4 MiB")
        sender = channel.sender()
        sender.send(filled(shared, 3))
        os.write(go[1], b"x")
        assert end_of(process) == 0
        assert used_bytes(shared) == 0


def test_a_child_that_sends_with_what_it_inherited_waits_until_it_is_received() -> None:
    with SharedChannel.create(capacity_bytes="1 MiB") as channel:
        sender, receiver = channel.sender(), channel.receiver()
        here, there = os.pipe()

        def child() -> None:
            linger = _native.linger

            def lingering(seconds: float) -> int:
                os.write(there, b"x")
                return linger(seconds)

            _native.linger = lingering
            sender.send(filled(SharedMemoryResource("4 MiB"), 3))

        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        os.close(there)
        assert os.read(here, 1) == b"x"
        assert (receiver.receive(WAIT) == 3).all()
        process.join(WAIT)
        assert process.exitcode == 0
        os.close(here)


def test_a_killed_process_gives_back_what_it_held(shared: SharedMemoryResource) -> None:
    with SharedChannel.create(capacity_bytes="1 MiB") as channel:
        ready = os.pipe()

        def child() -> None:
            receiver = channel.receiver()
            kept = [receiver.receive(WAIT) for _ in range(3)]
            os.write(ready[1], b"x")
            signal.pause()
            del kept

        process = in_child(child)
        sender = channel.sender()
        for number in range(3):
            sender.send(filled(shared, number))
        os.read(ready[0], 1)
        assert used_bytes(shared) == shared.lingering_bytes > 0
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        assert used_bytes(shared) == shared.lingering_bytes == 0


# --- killed at any instruction ------------------------------------------------------------------


class Lender:
    """The killed one sends arrays that it inherited."""

    def __init__(self, channel: SharedChannel, shared: SharedMemoryResource) -> None:
        self.channel, self.arrays = channel, [filled(shared, number) for number in range(2)]
        self.receiver = channel.receiver()

    def prepare(self) -> Any:
        sender = self.channel.sender()
        sender.send(self.arrays[0])
        return sender

    def act(self, end: Any) -> object:
        return end.send(self.arrays[1])

    def after(self) -> None:
        found = self.received()
        assert [int(array[0]) for array in found] in ([0, 1], [0])

    def received(self) -> list[Any]:
        """What comes before it is told that the sender died."""
        found = []
        with contextlib.suppress(Disconnected):
            while True:
                found.append(self.receiver.receive(WAIT))
        return found


class LenderOfObjects(Lender):
    def prepare(self) -> Any:
        sender = self.channel.sender()
        self.act(sender)
        return sender

    def act(self, end: Any) -> object:
        return end.send([self.arrays[1], self.arrays[1][:5]])

    def after(self) -> None:
        for long, short in self.received():
            assert (long == 1).all()
            assert np.shares_memory(long, short)


class Borrower:
    """The killed one receives, and was attached before."""

    def __init__(self, channel: SharedChannel, shared: SharedMemoryResource) -> None:
        self.channel = channel
        sender = channel.sender()
        for number in range(3):
            array = filled(shared, number)
            sender.send(array if number != 1 else [array, array])
        self.sender = sender

    def prepare(self) -> Any:
        receiver = self.channel.receiver()
        return receiver, receiver.receive(0)

    def act(self, state: Any) -> object:
        return state[0].receive(0)

    def after(self) -> None:
        self.channel._probe()
        with self.channel.receiver() as receiver:  # a replacement
            found = []
            with contextlib.suppress(Timeout):
                while True:
                    found.append(receiver.receive(0))
        assert (found[-1] == 2).all()
        assert len(found) <= 3


class NewBorrower(Borrower):
    """The killed one attaches."""

    def prepare(self) -> Any:
        return (self.channel.receiver(),)


class LettingGo(Borrower):
    """The killed one lets go of what it held."""

    def prepare(self) -> Any:
        receiver = self.channel.receiver()
        return [receiver, receiver.receive(0)]

    def act(self, state: Any) -> object:
        state.pop()
        return None


STORIES = [Lender, LenderOfObjects, Borrower, NewBorrower, LettingGo]


def tell(make: Callable[..., Any], steps: int | None) -> int:
    shared = SharedMemoryResource("8 MiB")
    with SharedChannel.create(capacity_bytes="128 KiB") as channel:
        story = make(channel, shared)
        done = kill_after(steps, story.prepare, story.act)
        if done >= 0:
            channel._probe()
            story.after()
        del story
    if done >= 0:
        assert used_bytes(shared) == 0
    return done


@pytest.mark.parametrize("make", STORIES, ids=lambda make: make.__name__)
def test_a_process_killed_at_any_instruction_gives_all_back(make: Callable[..., Any]) -> None:
    total = tell(make, None)
    if total < 0:
        pytest.skip("this machine does not let a process be traced")
    for steps in spread(total, KILLS):
        try:
            tell(make, steps)
        except BaseException:
            print("killed after", steps, "of", total, "instructions")
            raise


# --- what cannot be -----------------------------------------------------------------------------


@pytest.mark.parametrize("capacity", [0, -1, "0 MiB", 1 << 60])
def test_a_capacity_that_cannot_be_is_refused_by_name(capacity: int | str) -> None:
    with pytest.raises(InvalidArgument, match="capacity_bytes"):
        SharedMemoryResource(capacity)


@pytest.mark.parametrize(
    "divide", [memory.SlabResource, memory.ArenaResource, memory.ThreadLocalArena]
)
def test_resources_that_cut_blocks_up_refuse_it(
    shared: SharedMemoryResource, divide: Callable[[memory.Resource], object]
) -> None:
    for upstream in (shared, memory.StatisticsAdaptor(shared)):
        with pytest.raises(InvalidArgument, match="upstream: must not be a SharedMemoryResource"):
            divide(upstream)


def refuse_memory() -> None:
    """From here on the kernel has no memory for files: `fallocate` fails with ENOSPC."""

    class Program(ctypes.Structure):
        _fields_ = [("count", ctypes.c_ushort), ("code", ctypes.c_char_p)]

    fallocate, no_space = 285, 0x00050000 | errno.ENOSPC
    code = b"".join(
        struct.pack("HBBI", *line)
        for line in [
            (0x20, 0, 0, 0),  # which call
            (0x15, 0, 1, fallocate),
            (0x06, 0, 0, no_space),
            (0x06, 0, 0, 0x7FFF0000),  # allowed
        ]
    )
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    assert prctl(38, 1, 0, 0, 0) == 0
    program = Program(4, code)
    assert prctl(22, 2, ctypes.byref(program), 0, 0) == 0, os.strerror(ctypes.get_errno())


def test_no_room_for_more_is_an_exception_when_it_is_asked_for() -> None:
    def child() -> None:
        shared = SharedMemoryResource("64 MiB")
        small = filled(shared, 3)
        refuse_memory()
        with pytest.raises(OutOfMemory, match="No space left"):
            shared.allocate(8 * MIB)
        with memory.use(shared), pytest.raises(MemoryError):
            np.ones(MIB)
        # What is there is still good for something.
        assert (filled(shared, 4) == 4).all()
        assert (small == 3).all()
        assert shared.check().ok

    in_forked_child(child)


def test_no_room_at_all_is_an_exception_at_creation() -> None:
    def child() -> None:
        refuse_memory()
        with pytest.raises(OutOfMemory, match="No space left"):
            SharedMemoryResource("64 MiB")

    in_forked_child(child)


def test_the_error_says_that_others_hold_the_memory() -> None:
    shared = SharedMemoryResource("2 MiB")
    with SharedChannel.create(capacity_bytes="1 MiB") as channel:
        sender, receiver = channel.sender(), channel.receiver()
        sender.send(np.frombuffer(shared.allocate(MIB + 1), "u1"))
        with pytest.raises(OutOfMemory, match="1 blocks were given back here"):
            shared.allocate(MIB)
        receiver.receive(0)
        assert shared.allocate(MIB).size_bytes == MIB


def test_nothing_is_left_and_nobody_else_may_open_it() -> None:
    shared = SharedMemoryResource("2 MiB")
    array = filled(shared, 1)
    mine = [fd for fd in os.listdir("/proc/self/fd") if is_ours(int(fd))]
    assert mine
    assert all(os.stat(f"/proc/self/fd/{fd}").st_mode & 0o777 == 0o600 for fd in mine)
    assert all(os.stat(f"/proc/self/fd/{fd}").st_nlink == 0 for fd in mine)  # it has no name
    del array, shared
    gc.collect()
    _native.linger(0.0)


def is_ours(fd: int) -> bool:
    with contextlib.suppress(OSError):
        return "moirai-memory" in os.readlink(f"/proc/self/fd/{fd}")
    return False
