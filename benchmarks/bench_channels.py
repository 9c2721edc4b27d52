"""What does a message cost between the threads and tasks of a process, against every other queue?

Everything runs in one process. In each round every subject runs once, subjects in turn. Messages
are small integers. Five questions:

- one thread, a message put in and taken out: CPU time of the pair, less the empty loop's;
- the same by 100 messages at once, for those that can, a message;
- one thread to another, and two threads to two: messages a second;
- a thread to an asyncio task: messages a second;
- batches that follow the traffic against batches of fixed size, into a sink that pickles each batch
  and writes it to /dev/null: messages a second of CPU when as many are sent as possible, and how
  old messages get when few are.

Bounded queues have room for 1024, and at least four times as many messages pass from thread to
thread or task: once aiologic's queue has run full or empty it hands over one by one, a change of
threads each, so fewer messages measure how many of them found room. It is there without a bound
too, where it is never full but as often empty. A package is used as its page shows.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import os
import pickle
import queue
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import aiologic
import culsans
import janus

import harness
from harness import MOIRAI, Goal
from moirai import channels

QUESTION = __doc__.partition("\n")[0]
NAME = "bench_channels"

CAPACITY = 1024
BATCH = 100
MAX_DELAY_SECONDS = 0.005
SAMPLE_SECONDS = 0.02
MIN_COUNT = 4 * CAPACITY

# Those whose rows the goals compare with.
SIMPLE, QUEUE = "simple-queue", "queue"


# === what is compared ===========================================================================


@dataclass(frozen=True)
class Subject:
    """One queue: how to make it, and its ends as functions of it.

    Attributes:
        label: For people.
        make: Makes one.
        put: The blocking put.
        get: The blocking get.
        threads: Whether its ends may be in two threads and wait there.
        put_many: Puts a list, if it can.
        get_many: Takes what is there, if it can.
    """

    label: str
    make: Callable[[], Any]
    put: Callable[[Any], Callable[[Any], Any]]
    get: Callable[[Any], Callable[[], Any]]
    threads: bool = True
    put_many: Callable[[Any], Callable[[list[Any]], Any]] | None = None
    get_many: Callable[[Any], Callable[[], Any]] | None = None


class _ConditionDeque:
    """What people write: a deque and a condition."""

    def __init__(self) -> None:
        self.items: collections.deque[Any] = collections.deque()
        self.changed = threading.Condition()

    def put(self, item: Any) -> None:
        with self.changed:
            while len(self.items) >= CAPACITY:
                self.changed.wait()
            self.items.append(item)
            self.changed.notify()

    def get(self) -> Any:
        with self.changed:
            while not self.items:
                self.changed.wait()
            self.changed.notify()
            return self.items.popleft()


def _drain(items: collections.deque[Any]) -> Callable[[], list[Any]]:
    def take() -> list[Any]:
        found = list(items)
        items.clear()
        return found

    return take


SUBJECTS: dict[str, Subject] = {
    SIMPLE: Subject(
        "queue.SimpleQueue, unbounded", queue.SimpleQueue, lambda q: q.put, lambda q: q.get
    ),
    QUEUE: Subject("queue.Queue", lambda: queue.Queue(CAPACITY), lambda q: q.put, lambda q: q.get),
    "deque": Subject(
        "collections.deque, never waits",
        collections.deque,
        lambda q: q.append,
        lambda q: q.popleft,
        threads=False,
        put_many=lambda q: q.extend,
        get_many=_drain,
    ),
    "condition": Subject("deque and Condition", _ConditionDeque, lambda q: q.put, lambda q: q.get),
    "janus": Subject(
        "janus", lambda: janus.Queue(CAPACITY), lambda q: q.sync_q.put, lambda q: q.sync_q.get
    ),
    "culsans": Subject(
        "culsans", lambda: culsans.Queue(CAPACITY), lambda q: q.sync_q.put, lambda q: q.sync_q.get
    ),
    "aiologic": Subject(
        "aiologic", lambda: aiologic.Queue(CAPACITY), lambda q: q.green_put, lambda q: q.green_get
    ),
    "aiologic-simple": Subject(
        "aiologic.SimpleQueue, unbounded",
        aiologic.SimpleQueue,
        lambda q: q.green_put,
        lambda q: q.green_get,
    ),
    "asyncio": Subject(
        "asyncio.Queue, one loop",
        lambda: asyncio.Queue(CAPACITY),
        lambda q: q.put_nowait,
        lambda q: q.get_nowait,
        threads=False,
    ),
    "moirai-queue": Subject(
        "Moirai, Queue", lambda: channels.Queue(CAPACITY), lambda q: q.put, lambda q: q.get
    ),
    MOIRAI: Subject(
        "Moirai, Channel",
        lambda: channels.Channel(CAPACITY),
        lambda q: q.send,
        lambda q: q.receive,
        put_many=lambda q: q.send_many,
        get_many=lambda q: q.receive_many,
    ),
}


class _LoopBound:
    """Runs a subject's part in an event loop: janus needs one to be made and to be closed."""

    def __enter__(self) -> _LoopBound:
        self.runner = asyncio.Runner()
        self.runner.__enter__()
        return self

    def make(self, subject: Subject) -> Any:
        async def build() -> Any:
            return subject.make()

        return self.runner.run(build())

    def unmake(self, made: Any) -> None:
        close = getattr(made, "aclose", None)
        if close is not None:
            self.runner.run(close())

    def __exit__(self, *exception: object) -> None:
        self.runner.__exit__(None, None, None)


# === one thread =================================================================================


def pairs(subjects: Mapping[str, Subject], rounds: int, seconds: float) -> dict[str, list[float]]:
    """CPU nanoseconds of a put and a get, by subject, one value a round."""
    clock = time.thread_time_ns

    def loop(put: Callable[[Any], Any], get: Callable[[], Any], count: int) -> int:
        started = clock()
        for _ in range(count):
            put(1)
            get()
        return clock() - started

    def empty(count: int) -> int:
        started = clock()
        for _ in range(count):
            pass
        return clock() - started

    found: dict[str, list[float]] = defaultdict(list)
    with _LoopBound() as bound:
        made = {name: bound.make(subject) for name, subject in subjects.items()}
        ends = {name: (s.put(made[name]), s.get(made[name])) for name, s in subjects.items()}
        counts = {}
        for name, (put, get) in ends.items():
            loop(put, get, 100)
            counts[name] = max(100, int(seconds * 1e9 / (loop(put, get, 1000) / 1000)))
        for _, name in harness.interleaved(subjects, rounds):
            count = counts[name]
            found[name].append((loop(*ends[name], count) - empty(count)) / count)
        for queue_made in made.values():
            bound.unmake(queue_made)
    return dict(found)


def batches(subjects: Mapping[str, Subject], rounds: int, count: int) -> dict[str, list[float]]:
    """CPU nanoseconds of a message that goes with 99 others, by subject, one value a round."""
    found: dict[str, list[float]] = defaultdict(list)
    able = {name: subject for name, subject in subjects.items() if subject.put_many}
    items = list(range(BATCH))
    for _, name in harness.interleaved(able, rounds):
        subject = able[name]
        made = subject.make()
        assert subject.put_many is not None
        assert subject.get_many is not None
        put, get = subject.put_many(made), subject.get_many(made)
        started = time.thread_time_ns()
        for _ in range(count // BATCH):
            put(items)
            get()
        found[name].append((time.thread_time_ns() - started) / count)
    return dict(found)


# === threads ====================================================================================


def threads(
    subjects: Mapping[str, Subject], pair_count: int, rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Messages a second from `pair_count` threads to as many, by subject, one value a round."""
    able = {name: subject for name, subject in subjects.items() if subject.threads}

    def run(bound: _LoopBound, subject: Subject, count: int) -> float:
        made = bound.make(subject)
        put, get = subject.put(made), subject.get(made)
        share = count // pair_count
        barrier = threading.Barrier(2 * pair_count + 1)

        def send() -> None:
            barrier.wait()
            for _ in range(share):
                put(1)

        def receive() -> None:
            barrier.wait()
            for _ in range(share):
                get()

        workers = [threading.Thread(target=it) for it in (send, receive) for _ in range(pair_count)]
        for worker in workers:
            worker.start()
        barrier.wait()
        started = time.perf_counter()
        for worker in workers:
            worker.join()
        elapsed = time.perf_counter() - started
        bound.unmake(made)
        return share * pair_count / elapsed

    found: dict[str, list[float]] = defaultdict(list)
    with _LoopBound() as bound:
        counts = {}
        for name, subject in able.items():
            counts[name] = max(MIN_COUNT, int(run(bound, subject, MIN_COUNT) * seconds))
        for _, name in harness.interleaved(able, rounds):
            found[name].append(run(bound, able[name], counts[name]))
    return dict(found)


# === asyncio ====================================================================================


@dataclass(frozen=True)
class Bridge:
    """A way from a thread to a task: the thread's put, the task's get, what ends it."""

    label: str
    make: Callable[[], tuple[Callable[[Any], Any], Callable[[], Awaitable[Any]], Any]]


def _threadsafe() -> Any:
    loop, received = asyncio.get_running_loop(), asyncio.Queue[Any]()

    def put(item: Any) -> None:
        loop.call_soon_threadsafe(received.put_nowait, item)

    return put, received.get, None


def _both(make: Callable[[], Any], put: str, get: str) -> Callable[[], Any]:
    def build() -> Any:
        made = make()

        def end(path: str) -> Any:
            found = made
            for part in path.split("."):
                found = getattr(found, part)
            return found

        return end(put), end(get), made

    return build


BRIDGES: dict[str, Bridge] = {
    "threadsafe": Bridge("call_soon_threadsafe, asyncio.Queue", _threadsafe),
    "janus": Bridge("janus", _both(lambda: janus.Queue(CAPACITY), "sync_q.put", "async_q.get")),
    "culsans": Bridge(
        "culsans", _both(lambda: culsans.Queue(CAPACITY), "sync_q.put", "async_q.get")
    ),
    "aiologic": Bridge(
        "aiologic", _both(lambda: aiologic.Queue(CAPACITY), "green_put", "async_get")
    ),
    "aiologic-simple": Bridge(
        "aiologic.SimpleQueue, unbounded", _both(aiologic.SimpleQueue, "green_put", "async_get")
    ),
    MOIRAI: Bridge(
        "Moirai, Channel", _both(lambda: channels.Channel(CAPACITY), "send", "receive_async")
    ),
    "moirai-many": Bridge(
        "Moirai, `receive_many_async`",
        _both(lambda: channels.Channel(CAPACITY), "send", "receive_many_async"),
    ),
}


def bridges(chosen: Iterable[str], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Messages a second from a thread to a task, by subject, one value a round."""

    async def run(name: str, count: int) -> float:
        put, get, made = BRIDGES[name].make()

        def send() -> None:
            for _ in range(count):
                put(1)

        sender = threading.Thread(target=send)
        started = time.perf_counter()
        sender.start()
        left = count
        while left:
            got = await get()
            left -= len(got) if isinstance(got, list) else 1
        elapsed = time.perf_counter() - started
        sender.join()
        close = getattr(made, "aclose", None)
        if close is not None:
            await close()
        return count / elapsed

    names = [name for name in BRIDGES if name in chosen]
    found: dict[str, list[float]] = defaultdict(list)
    counts = {
        name: max(MIN_COUNT, int(asyncio.run(run(name, MIN_COUNT)) * seconds)) for name in names
    }
    for _, name in harness.interleaved(names, rounds):
        found[name].append(asyncio.run(run(name, counts[name])))
    return dict(found)


# === batches that follow the traffic ============================================================


class Sink:
    """Pickles a batch and writes it to /dev/null, and notes how old its messages were."""

    def __init__(self) -> None:
        self.file = os.open(os.devnull, os.O_WRONLY)
        self.ages: list[float] = []
        self.timed = False

    def send_many(self, items: list[float]) -> int:
        os.write(self.file, pickle.dumps(items, protocol=5))
        if self.timed:
            now = time.perf_counter()
            self.ages.extend(now - sent for sent in items)
        return len(items)

    def close(self) -> None:
        os.close(self.file)


FIXED = (1, 4, 16, 64, 256, 1024)


def _sender(size: int | None, sink: Sink) -> channels.BatchingSender[float]:
    low, high = (1, FIXED[-1]) if size is None else (size, size)
    return channels.BatchingSender(
        sink, max_delay_seconds=MAX_DELAY_SECONDS, min_batch=low, max_batch=high
    )


def steady(rounds: int, seconds: float) -> dict[str, list[float]]:
    """Messages a second of CPU when as many as possible are sent, by batch size, once warm."""

    def run(size: int | None) -> float:
        sink = Sink()
        with _sender(size, sink) as sender:
            send = sender.send
            # As many ticks as the average needs to be what it will be.
            ends = time.perf_counter() + (0.8 if size is None else 0.1)
            while time.perf_counter() < ends:
                for _ in range(100):
                    send(1.0)
            before = sender.statistics()
            started = time.process_time()
            while time.process_time() - started < seconds:
                for _ in range(100):
                    send(1.0)
            after = sender.statistics()
            elapsed = time.process_time() - started
        sink.close()
        sent = after.total_count + after.pending_count
        return (sent - before.total_count - before.pending_count) / elapsed

    sizes = {str(size): size for size in FIXED} | {MOIRAI: None}
    found: dict[str, list[float]] = defaultdict(list)
    for _, name in harness.interleaved(sizes, rounds):
        found[name].append(run(sizes[name]))
    return dict(found)


def steps(seconds: float) -> dict[str, dict[str, float]]:
    """Ages of messages in milliseconds while the load steps up and down, by batch size and rate."""
    rates = (100, 10_000, 1_000, 50_000, 100)
    found: dict[str, dict[str, float]] = {}
    for name, size in ({str(size): size for size in FIXED} | {MOIRAI: None}).items():
        sink = Sink()
        sink.timed = True
        ages: dict[int, list[float]] = defaultdict(list)
        with _sender(size, sink) as sender:
            for rate in rates:
                started = time.perf_counter()
                sent = 0
                while (elapsed := time.perf_counter() - started) < seconds:
                    due = int(elapsed * rate)
                    while sent < due:
                        sender.send(time.perf_counter())
                        sent += 1
                    time.sleep(0.001)
                sender.flush()
                ages[rate] += sink.ages
                sink.ages = []
        sink.close()
        found[name] = {}
        for rate, values in sorted(ages.items()):
            for share in (0.5, 0.99):
                key = f"{rate} p{share * 100:.0f}"
                found[name][key] = 1000 * harness.percentile(values, share)
    return found


# === report =====================================================================================


def medians(found: Mapping[str, list[float]]) -> dict[str, float]:
    """Median by subject."""
    return {name: harness.median(values) for name, values in found.items()}


def render(results: Mapping[str, Any]) -> str:
    """The tables, as Markdown."""
    small, many = medians(results["pairs"]), medians(results["batches"])
    one, two = medians(results["threads"]["1"]), medians(results["threads"]["2"])
    rows = []
    for name, subject in SUBJECTS.items():
        if name not in small:
            continue
        cells = [subject.label, f"{small[name]:.0f}"]
        cells.append(f"{many[name]:.0f}" if name in many else "")
        for column in (one, two):
            cells.append(f"{column[name] / 1e6:.2f}" if name in column else "")
        rows.append(cells)
    bridge = [
        [BRIDGES[name].label, f"{value / 1e6:.2f}"]
        for name, value in medians(results["bridges"]).items()
    ]
    flow = medians(results["steady"])
    labels = {name: name for name in flow} | {MOIRAI: "follows the traffic"}
    ages = results["steps"]
    columns = list(next(iter(ages.values())))
    adaptive = [
        [labels[name], f"{flow[name] / 1e6:.2f}", *(f"{ages[name][it]:.1f}" for it in columns)]
        for name in flow
    ]
    return "\n\n".join(
        [
            "**In one process: CPU ns of a message put in and taken out, in one thread; millions"
            " of messages a second between threads**",
            harness.markdown_table(
                ["", "ns, one", f"ns, {BATCH} at once", "1 to 1, M/s", "2 to 2, M/s"], rows
            ),
            "**A thread to an asyncio task: millions of messages a second**",
            harness.markdown_table(["", "M/s"], bridge),
            "**`BatchingSender` by batch size: millions of messages a second of CPU at most; age of"
            f" messages in ms by load (messages a second), of {1000 * MAX_DELAY_SECONDS:.0f} ms"
            " allowed**",
            harness.markdown_table(["batch size", "M/s", *columns], adaptive),
        ]
    )


def goals(results: Mapping[str, Any]) -> list[Goal]:
    """The project's goals; empty without a Moirai row."""
    if MOIRAI not in results["pairs"]:
        return []

    def ratio(found: Mapping[str, list[float]], over: str, name: str = MOIRAI) -> float:
        return harness.median(harness.round_ratios(found, over)[name])

    one = results["threads"]["1"]
    found = []
    if SIMPLE in one:
        pair = ratio(results["pairs"], SIMPLE)
        found.append(Goal("a pair over SimpleQueue's", pair, 1.0))
        many = medians(results["batches"])[MOIRAI] / medians(results["pairs"])[SIMPLE]
        found.append(Goal("a message of a batch over SimpleQueue's", many, 1 / 1.5))
    if QUEUE in one:
        text = "thread to thread: time over queue.Queue's"
        found.append(Goal(text, ratio({n: one[n] for n in (QUEUE, MOIRAI)}, MOIRAI, QUEUE), 1 / 15))
    across = medians(results["bridges"])
    peers = [across[name] for name in BRIDGES if name in across and not name.startswith(MOIRAI)]
    if peers:
        text = "thread to task: time over the best peer's"
        found.append(Goal(text, max(peers) / across[MOIRAI], 1 / 6))
    flow = medians(results["steady"])
    best = max(value for name, value in flow.items() if name != MOIRAI)
    found.append(Goal("batches: time over the best fixed size's", best / flow[MOIRAI], 1 / 0.9))
    oldest = max(value for key, value in results["steps"][MOIRAI].items() if "p99" in key)
    allowed = 1000 * (MAX_DELAY_SECONDS + channels.batching.TICK_SECONDS)
    found.append(Goal("batches: oldest p99, ms, over delay and tick", oldest, allowed))
    return found


def measure(arguments: argparse.Namespace) -> harness.Report:
    """All tables."""
    names = arguments.configurations
    subjects = {name: s for name, s in SUBJECTS.items() if names is None or name in names}
    wanted = set(BRIDGES) if names is None else set(names)
    rounds = arguments.rounds
    quick = arguments.quick
    seconds = 0.001 if quick else SAMPLE_SECONDS
    results: dict[str, Any] = {"threads": {}}
    harness.progress("one thread")
    results["pairs"] = pairs(subjects, rounds, seconds)
    results["batches"] = batches(subjects, rounds, 2_000 if quick else 200_000)
    for count in (1, 2):
        harness.progress(f"{count} to {count} threads")
        results["threads"][str(count)] = threads(subjects, count, rounds, 10 * seconds)
    harness.progress("a thread to a task")
    results["bridges"] = bridges(wanted, rounds, 10 * seconds)
    harness.progress("batches")
    results["steady"] = steady(1 if quick else 5, 0.01 if quick else 0.3)
    results["steps"] = steps(0.05 if quick else 0.5)
    parameters = {
        "rounds": rounds,
        "capacity": CAPACITY,
        "batch": BATCH,
        "max_delay_seconds": MAX_DELAY_SECONDS,
        "quick": quick,
        "labels": {name: subject.label for name, subject in subjects.items()},
    }
    return harness.Report(NAME, QUESTION, parameters, results, render(results), goals(results))


if __name__ == "__main__":
    sys.exit(harness.main_of_rounds(QUESTION, measure, 11, 2))
