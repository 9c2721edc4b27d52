"""Pipes and queues in place of multiprocessing's: CPython's own tests of those, and what we add."""

import asyncio
import gc
import multiprocessing
import multiprocessing.connection
import os
import pickle
import queue
import signal
import socket
import threading
import time
import unittest
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from running import run_threads

from moirai import channels
from moirai.channels import SharedChannel, processes
from moirai.errors import InvalidArgument, OutOfMemory

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")

FORK = multiprocessing.get_context("fork")
WAIT = 60
MIB = 1 << 20


# === CPython's own tests ========================================================================

# Put raises what pickling raises, so that nothing fails later in a thread; closing closes a queue
# that was not used too; and what looks into multiprocessing's objects.
NOT_OURS = {
    "test_queue_feeder_donot_stop_onexc",
    "test_queue_feeder_on_queue_feeder_error",
    "test_closed_queue_empty_exceptions",
    "test_fd_transfer",
    "test_large_fd_transfer",
    "test_missing_fd_transfer",
    "test_closed",
}


def load_tests_of_cpython() -> dict[str, type]:
    """CPython's tests of multiprocessing's pipes and queues, with ours in their place."""
    found = pytest.importorskip("test._test_multiprocessing")

    class InPlace:
        TYPE = "processes"
        Process = FORK.Process
        Event = staticmethod(FORK.Event)
        Queue = processes.Queue
        JoinableQueue = processes.JoinableQueue
        Pipe = staticmethod(processes.Pipe)

        def setUp(self) -> None:
            self.replaced = found.multiprocessing
            found.multiprocessing = processes
            self.method = multiprocessing.get_start_method()
            multiprocessing.set_start_method("fork", force=True)

        def tearDown(self) -> None:
            found.multiprocessing = self.replaced
            multiprocessing.set_start_method(self.method, force=True)

    tests = {}
    for name in ("_TestQueue", "_TestConnection", "_TestPoll", "TestWait", "TestSimpleQueue"):
        base = getattr(found, name)
        bases = (InPlace, base)
        if not issubclass(base, unittest.TestCase):
            bases = (InPlace, base, unittest.TestCase)
        hidden = dict.fromkeys(NOT_OURS & set(dir(base)))
        made = type(f"{name.strip('_')}OfCPython", bases, {**hidden, "__module__": __name__})
        tests[made.__name__] = made
    return tests


globals().update(load_tests_of_cpython())


# === helpers ====================================================================================


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    def names() -> set[str]:
        return {path.name for path in Path("/dev/shm").glob("*apart-*")}

    before = names()
    yield
    gc.collect()
    # Tests beside this one make some too, which are soon gone.
    left = names() - before
    deadline = time.monotonic() + WAIT
    while left & names():
        assert time.monotonic() < deadline, left & names()
        os.sched_yield()
    assert multiprocessing.active_children() == []


def start(target: Callable[..., Any], *arguments: Any) -> Any:
    process = FORK.Process(target=target, args=arguments)
    process.start()
    return process


def end(process: Any, status: int = 0) -> None:
    process.join(WAIT)
    assert process.exitcode == status
    process.close()


# === pipes ======================================================================================


def echo(connection: processes.Connection, *others: processes.Connection) -> None:
    for other in others:
        other.close()
    while True:
        try:
            connection.send(connection.recv())
        except EOFError:
            return


def test_large_arrays_are_received_where_they_lie() -> None:
    ours, theirs = processes.Pipe()
    process = start(echo, theirs, ours)
    theirs.close()
    sent = {"frame": np.arange(1 << 17), "name": "one"}
    ours.send(sent)
    received = ours.recv()
    assert np.array_equal(received["frame"], sent["frame"])
    assert received["name"] == "one"
    received["frame"][:] = 1  # nobody else has it
    ours.close()
    end(process)


def test_messages_longer_than_the_pipe_pass_and_leave_nothing() -> None:
    ours, theirs = processes.Pipe(capacity_bytes="1 MiB")
    process = start(echo, theirs, ours)
    theirs.close()
    for size in (10, 3 * MIB, 20, 5 * MIB):
        ours.send(np.full(size, 7, np.uint8))
        assert int(ours.recv().sum()) == 7 * size
    ours.send_bytes(pickle.dumps(bytes(4 * MIB)))
    assert ours.recv() == bytes(4 * MIB)
    ours.close()
    end(process)


def test_views_that_are_kept_do_not_stop_the_sender() -> None:
    ours, theirs = processes.Pipe(capacity_bytes="1 MiB")
    process = start(echo, theirs, ours)
    theirs.close()
    kept = []
    for number in range(6):
        ours.send(np.full(MIB // 2, number, np.uint8))
        kept.append(ours.recv())
    assert [int(array[-1]) for array in kept] == list(range(6))
    ours.close()
    end(process)


def test_a_killed_peer_is_the_end() -> None:
    ours, theirs = processes.Pipe()
    process = start(echo, theirs, ours)
    theirs.close()
    ours.send(1)
    assert ours.recv() == 1
    process.kill()
    with pytest.raises(EOFError, match="other end of this connection is gone"):
        ours.recv()
    assert ours.poll()
    with pytest.raises(BrokenPipeError):
        ours.send(1)
    end(process, -signal.SIGKILL)


def test_a_sender_that_waits_for_room_is_told_of_the_end() -> None:
    ours, theirs = processes.Pipe(capacity_bytes="256 KiB")

    def fill() -> None:
        while True:
            ours.send_bytes(bytes(1000))

    def close_the_other() -> None:
        assert theirs.poll(WAIT)
        theirs.close()

    def be_told() -> None:
        with pytest.raises(BrokenPipeError):
            fill()

    run_threads(be_told, close_the_other)


def test_what_was_sent_is_received_after_the_other_end_is_closed() -> None:
    ours, theirs = processes.Pipe()
    theirs.send("last")
    theirs.close()
    assert ours.recv() == "last"
    with pytest.raises(EOFError):
        ours.recv()
    with pytest.raises(EOFError):
        ours.recv_bytes()


def test_an_end_that_comes_later_gets_what_was_sent_when_nobody_was_there() -> None:
    ours, theirs = processes.Pipe()
    ours.send(1)
    assert theirs.recv() == 1  # so that its receiver was there, and goes

    def body() -> None:
        ours.close()
        theirs.send([theirs.recv(), theirs.recv()])

    go, wait = FORK.Pipe()

    def child() -> None:
        wait.recv()
        body()

    process = start(child)
    theirs.close()
    ours.send(2)
    ours.send(3)
    go.send(None)
    assert ours.recv() == [2, 3]
    end(process)
    with pytest.raises(EOFError):
        ours.recv()


def test_ends_are_given_away_over_pipes_of_either_kind() -> None:
    for pipe in (processes.Pipe, FORK.Pipe):
        ours, theirs = pipe()
        first, second = processes.Pipe()

        def body(theirs: Any = theirs) -> None:
            theirs.recv().send("here")
            theirs.close()

        process = start(body)
        if pipe is FORK.Pipe:
            theirs.close()
        ours.send(second)
        assert first.recv() == "here"
        end(process)
        ours.close()
        theirs.close()
        second.close()
        with pytest.raises(EOFError):
            first.recv()
        first.close()


def test_what_multiprocessing_can_send_is_sent() -> None:
    ours, theirs = processes.Pipe()
    left, right = socket.socketpair()
    process = start(lambda: theirs.recv().sendall(b"here"))
    with left, right:
        ours.send(right)
        assert left.recv(4) == b"here"
    end(process)


def test_bytes_and_objects_are_received_either_way() -> None:
    ours, theirs = processes.Pipe()
    ours.send_bytes(pickle.dumps([1, 2]))
    assert theirs.recv() == [1, 2]
    ours.send([1, 2])
    assert pickle.loads(theirs.recv_bytes()) == [1, 2]
    ours.send(np.arange(1 << 15))
    assert pickle.loads(theirs.recv_bytes()).shape == (1 << 15,)


def test_a_message_that_is_too_long_for_the_caller_ends_the_receiving() -> None:
    reader, writer = processes.Pipe(duplex=False)
    writer.send_bytes(b"123")
    with pytest.raises(OSError, match="has 3 bytes, more than 2"):
        reader.recv_bytes(2)
    assert reader.closed
    ours, theirs = processes.Pipe()
    theirs.send_bytes(b"123")
    with pytest.raises(OSError, match="has 3 bytes, more than 2"):
        ours.recv_bytes(2)
    assert (ours.readable, ours.writable) == (False, True)
    with pytest.raises(ValueError, match="maxlength: must be at least 0, got -1"):
        theirs.recv_bytes(-1)


def test_arguments_are_named_when_refused() -> None:
    with pytest.raises(InvalidArgument, match="capacity_bytes"):
        processes.Pipe(capacity_bytes=-1)
    ours, theirs = processes.Pipe()
    for arguments, message in (
        ((b"123", 4), "offset: must be at most 3 .*, got 4"),
        ((b"123", 1, 3), r"size: must be from 0 to 2 \(what is left\), got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            ours.send_bytes(*arguments)
    theirs.send_bytes(b"123")
    with pytest.raises(ValueError, match="offset: must be from 0 to 2, got 3"):
        ours.recv_bytes_into(bytearray(2), 3)
    ours.close()
    ours.close()
    for call in (ours.recv, ours.fileno, ours.poll, lambda: ours.send(1)):
        with pytest.raises(OSError, match="this connection is closed"):
            call()


def test_an_event_loop_watches_an_end() -> None:
    ours, theirs = processes.Pipe()
    received: list[Any] = []

    async def main() -> None:
        loop, done = asyncio.get_running_loop(), asyncio.Event()

        def readable() -> None:
            while ours.poll():
                try:
                    received.append(ours.recv())
                except EOFError:
                    loop.remove_reader(fd)
                    done.set()
                    return

        fd = ours.fileno()
        loop.add_reader(fd, readable)
        process = start(lambda: [ours.close(), *map(theirs.send, range(1000))])
        theirs.close()
        await asyncio.wait_for(done.wait(), WAIT)
        end(process)

    asyncio.run(main())
    assert received == list(range(1000))


def test_wait_tells_who_is_ready() -> None:
    ours, theirs = processes.Pipe()
    standard, other = FORK.Pipe()
    process = start(lambda: theirs.recv())
    everybody = [ours, standard, process.sentinel]
    assert processes.wait(everybody, 0.01) == []
    other.send(1)
    assert processes.wait(everybody, WAIT) == [standard]
    standard.recv()
    ours.send(1)
    assert processes.wait(everybody, WAIT) == [process.sentinel]
    end(process)
    theirs.send(1)
    assert processes.wait([ours, standard], WAIT) == [ours]
    assert ours.recv() == 1
    theirs.close()
    assert processes.wait([ours, standard], WAIT) == [ours]
    with pytest.raises(EOFError):
        ours.recv()


# === queues =====================================================================================


def test_the_module_has_everything_else_from_multiprocessing() -> None:
    assert processes.Process is multiprocessing.Process
    assert processes.cpu_count() == multiprocessing.cpu_count()
    assert processes.Queue is not multiprocessing.Queue
    assert channels.processes is processes
    with pytest.raises(AttributeError):
        _ = processes.nothing


def test_what_finds_no_room_waits_in_the_process_and_keeps_its_order() -> None:
    jobs: Any = processes.Queue(ctx=FORK, capacity_bytes="256 KiB")

    def body() -> None:
        for number in range(20_000):
            jobs.put(number)
        jobs.put(np.arange(100_000))

    process = start(body)
    assert [jobs.get(timeout=WAIT) for _ in range(20_000)] == list(range(20_000))
    assert jobs.get(timeout=WAIT)[-1] == 99_999
    end(process)
    assert (jobs.qsize(), jobs.empty()) == (0, True)


def test_what_waits_is_as_it_was_put_in() -> None:
    jobs: Any = processes.Queue(capacity_bytes="256 KiB")
    array = np.zeros(50_000)
    for number in range(20):
        array[:] = number
        jobs.put(array)
    assert [jobs.get(timeout=WAIT)[-1] for _ in range(20)] == list(range(20))
    jobs.close()
    jobs.join_thread()


def test_a_process_may_end_although_something_waits() -> None:
    jobs: Any = processes.Queue(ctx=FORK, capacity_bytes="256 KiB")

    def body() -> None:
        for _ in range(20_000):
            jobs.put(bytes(100))
        jobs.cancel_join_thread()

    end(start(body))
    assert jobs.get(timeout=WAIT) == bytes(100)


def take_forever(jobs: Any, ready: Any) -> None:
    ready.send(None)
    while True:
        jobs.get()


def put_forever(jobs: Any, ready: Any) -> None:
    ready.send(None)
    while True:
        jobs.put(bytes(50_000))


@pytest.mark.parametrize("body", [take_forever, put_forever])
def test_a_killed_process_stops_nobody(body: Callable[[Any, Any], None]) -> None:
    jobs: Any = processes.SimpleQueue(capacity_bytes="1 MiB")
    for _ in range(5):
        here, there = FORK.Pipe()
        process = start(body, jobs, there)
        here.recv()
        for _ in range(20):
            if body is take_forever:
                jobs.put(bytes(50_000))
            else:
                assert len(jobs.get()) == 50_000
        process.kill()
        end(process, -signal.SIGKILL)
        while not jobs.empty():
            jobs.get()
        jobs.put("after")
        assert jobs.get() == "after"
        here.close()
        there.close()


def test_a_queue_outlives_those_who_made_it() -> None:
    jobs: Any = processes.Queue(ctx=FORK)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        grandchild = os.fork()
        if grandchild == 0:
            jobs.put("from the grandchild")
            jobs.put(jobs.get())
            os.write(writer, b"1")
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 1) == b"1"
    assert jobs.get(timeout=WAIT) == "from the grandchild"
    os.close(reader)
    os.close(writer)


def test_a_queue_is_closed_before_its_process_comes() -> None:
    jobs: Any = processes.Queue(ctx=FORK)
    answers: Any = processes.SimpleQueue()
    go, wait = FORK.Pipe()

    def body() -> None:
        wait.recv()
        answers.put(jobs.get())

    process = start(body)
    jobs.put("early")
    jobs.close()
    jobs.join_thread()
    go.send(None)
    assert answers.get() == "early"
    end(process)
    for call in (lambda: jobs.put(1), jobs.get):
        with pytest.raises(ValueError, match="is closed"):
            call()
    with pytest.raises(OSError, match="is closed"):
        jobs.empty()


def test_what_cannot_be_pickled_is_refused_at_once() -> None:
    jobs: Any = processes.JoinableQueue(1)
    with pytest.raises((AttributeError, pickle.PicklingError, TypeError)):
        jobs.put(lambda: None)
    assert jobs.qsize() == 0
    jobs.put(1)
    assert jobs.full()
    with pytest.raises(queue.Full):
        jobs.put_nowait(2)
    assert jobs.get_nowait() == 1
    jobs.task_done()
    jobs.join()
    with pytest.raises(ValueError, match="too many times"):
        jobs.task_done()


class Explosive:
    """What is pickled, but cannot be made again."""

    def __reduce__(self) -> tuple[Any, ...]:
        return int, ("no number",)


def test_what_cannot_be_unpickled_is_taken_all_the_same() -> None:
    jobs: Any = processes.JoinableQueue(1)
    simple: Any = processes.SimpleQueue()
    for queue_of in (jobs, simple):
        queue_of.put(Explosive())
        with pytest.raises(ValueError, match="no number"):
            queue_of.get()
        queue_of.put("after")
        assert queue_of.get() == "after"
    assert jobs.qsize() == 0


def test_an_object_that_was_not_put_in_takes_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: Any = processes.JoinableQueue(1)

    def refuse(*_: object) -> bool:
        raise OutOfMemory("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(jobs._line, "try_put", refuse)
        with pytest.raises(OutOfMemory):
            jobs.put(1)
    jobs.join()
    jobs.put(2, timeout=WAIT)
    assert jobs.get() == 2


def test_what_cannot_be_passed_on_is_reported_and_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reports: Any = queue.SimpleQueue()
    monkeypatch.setattr(threading, "excepthook", lambda about: reports.put(about.exc_value))

    def refuse(*_: object) -> None:
        raise OutOfMemory("no memory")

    monkeypatch.setattr(channels.parcels, "send_apart", refuse)
    jobs: Any = processes.JoinableQueue(2, capacity_bytes="256 KiB")
    jobs.put(bytes(MIB))  # more than there is room for
    assert isinstance(reports.get(timeout=WAIT), OutOfMemory)
    jobs.join()
    for number in range(2):
        jobs.put(number, timeout=WAIT)
    assert [jobs.get(timeout=WAIT) for _ in range(2)] == [0, 1]
    jobs.close()
    jobs.join_thread()


@pytest.mark.parametrize("size", [0, 1000, 60_000])
def test_what_fits_a_small_pipe_needs_nobody_to_receive_it(size: int) -> None:
    ours, theirs = processes.Pipe(capacity_bytes="64 KiB")
    ours.send_bytes(bytes(size))
    assert theirs.recv_bytes() == bytes(size)
    ours.close()
    theirs.close()


@pytest.mark.parametrize("count", [500, 5_000, 20_000])
def test_a_message_of_many_small_arrays_passes(count: int) -> None:
    arrays = [np.full(1, number) for number in range(count)]
    jobs: Any = processes.Queue(capacity_bytes="1 MiB")
    ours, theirs = processes.Pipe(capacity_bytes="1 MiB")
    jobs.put(arrays)
    assert [int(it[0]) for it in jobs.get(timeout=WAIT)] == list(range(count))
    run_threads(
        lambda: ours.send(arrays),
        lambda: np.testing.assert_array_equal(np.concatenate(theirs.recv()), np.arange(count)),
    )
    jobs.close()
    ours.close()
    theirs.close()


def test_queues_are_inherited_only_but_the_simple_one_is_sent() -> None:
    with pytest.raises(RuntimeError, match="inheritance"):
        pickle.dumps(processes.Queue())
    jobs: Any = processes.SimpleQueue()
    other: Any = processes.SimpleQueue()
    process = start(lambda: jobs.get().put("through"))
    jobs.put(other)
    assert other.get() == "through"
    end(process)
    jobs.close()
    for call in (lambda: jobs.put(1), jobs.get, jobs.empty):
        with pytest.raises(OSError, match="this queue is closed"):
            call()


def test_threads_of_several_processes_share_a_queue() -> None:
    jobs: Any = processes.Queue(ctx=FORK, maxsize=50)
    results: Any = processes.Queue(ctx=FORK)

    def work() -> None:
        def take() -> None:
            for item in iter(jobs.get, None):
                results.put(item * 2)

        threads = [threading.Thread(target=take) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    workers = [start(work) for _ in range(2)]
    for number in range(2000):
        jobs.put(number)
    for _ in range(4):
        jobs.put(None)
    assert sorted(results.get(timeout=WAIT) for _ in range(2000)) == list(range(0, 4000, 2))
    for worker in workers:
        end(worker)


def test_spawned_processes_get_them_as_arguments(run_python: Any, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        """\
from moirai.channels import processes as mp

def work(end, jobs, done):
    end.send(end.recv() + 1)
    for item in iter(jobs.get, None):
        done.put(item * 2)
        jobs.task_done()
    jobs.task_done()

if __name__ == "__main__":
    context = mp.get_context("spawn")
    ours, theirs = mp.Pipe()
    jobs, done = mp.JoinableQueue(ctx=context), mp.SimpleQueue()
    process = context.Process(target=work, args=(theirs, jobs, done))
    process.start()
    theirs.close()
    ours.send(41)
    assert ours.recv() == 42
    for number in (1, 2, None):
        jobs.put(number)
    jobs.join()
    assert [done.get(), done.get()] == [2, 4]
    process.join()
    assert process.exitcode == 0
    try:
        ours.recv()
    except EOFError:
        print("the end")
"""
    )
    assert run_python(f"import runpy; runpy.run_path({str(program)!r}, run_name='__main__')") == (
        "the end\n"
    )


def test_a_channel_itself_says_nothing_of_messages_apart() -> None:
    # A pickle cannot begin as the note does that says where a long message lies.
    with SharedChannel.create(capacity_bytes="1 MiB") as channel:
        sender, receiver = channel.sender(), channel.receiver()
        sender.send(b"\0moirai")
        assert receiver.receive() == b"\0moirai"
