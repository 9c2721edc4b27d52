"""What does a turn cost: taking an object from a pool and giving it back, against a fresh one?

Everything runs in one process. In each round every subject runs its loop once, subjects in turn,
and the empty loop too, which is taken off. Three questions:

- one thread, a small object of Python, or 1 KiB or 64 KiB to write to: CPU time of a turn;
- 1, 2 and 8 threads, each with an object at hand: wall time over all turns of all threads;
- 8 threads that share 2 objects, so that who is interrupted with one makes the others wait: the
  same.

A pool package is used as its page shows, with the options that do least.
"""

from __future__ import annotations

import argparse
import collections
import queue
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import generic_pool
import object_pool
import objpool
import pond

import harness
from harness import BASELINE, MOIRAI, Goal
from moirai import memory, pools

QUESTION = __doc__.partition("\n")[0]
NAME = "bench_pools"

KIB = 1 << 10
PAIR_NS = 120
THREADS = (1, 2, 8)
SHARED = 2
SAMPLE_SECONDS = 0.01


class Small:
    """What a program would pool rather than make: a few attributes, one of them a container."""

    def __init__(self) -> None:
        self.name = ""
        self.count = 0
        self.parts: list[int] = []


# === what is compared ===========================================================================


@dataclass(frozen=True)
class Subject:
    """One way to have an object for a moment.

    Attributes:
        label: For people.
        turn: The statement that takes and gives back; `pool` is what `make` made.
        make: From how to make an object and how many there are, what `turn` uses.
        bounded: Whether one who finds no object waits, so that threads can share few.
    """

    label: str
    turn: str
    make: Callable[[Callable[[], Any], int], Any]
    bounded: bool = False


def _filled(container: Any, add: Callable[[Any], Any], factory: Callable[[], Any], n: int) -> Any:
    for _ in range(n):
        add(factory())
    return container


def _deque(factory: Callable[[], Any], count: int) -> Any:
    items: collections.deque[Any] = collections.deque()
    return _filled(items, items.append, factory, count)


def _lifo(factory: Callable[[], Any], count: int) -> Any:
    items: queue.LifoQueue[Any] = queue.LifoQueue()
    return _filled(items, items.put, factory, count)


def _moirai(factory: Callable[[], Any], count: int) -> pools.ObjectPool[Any]:
    return pools.ObjectPool(factory, min_size=count, max_size=count)


def _moirai_checked(factory: Callable[[], Any], count: int) -> pools.ObjectPool[Any]:
    return pools.ObjectPool(factory, reset=_nothing, validate=_true, min_size=count, max_size=count)


def _nothing(item: object) -> None:
    return None


def _true(item: object) -> bool:
    return True


class _Pond:
    """pondpond's factory in the shape of its examples; its recycling thread is off."""

    def __init__(self, factory: Callable[[], Any], count: int) -> None:
        class Factory(pond.PooledObjectFactory):
            def createInstance(self) -> pond.PooledObject:  # noqa: N802
                return pond.PooledObject(factory())

            def destroy(self, pooled_object: pond.PooledObject) -> None:
                del pooled_object.keeped_object

            def reset(self, pooled_object: pond.PooledObject, **_: Any) -> pond.PooledObject:
                return pooled_object

            def validate(self, pooled_object: pond.PooledObject) -> bool:
                return True

        self.factory = Factory(pooled_maxsize=count)
        self.pond = pond.Pond(time_between_eviction_runs=-1)
        self.pond.register(self.factory)
        self.borrow, self.recycle = self.pond.borrow, self.pond.recycle


class _GenericFactory(generic_pool.Factory):  # type: ignore[type-arg]
    def __init__(self, factory: Callable[[], Any]) -> None:
        self.create = factory  # type: ignore[method-assign]

    def create(self) -> Any:
        raise NotImplementedError


def _generic(factory: Callable[[], Any], count: int) -> Any:
    return generic_pool.Pool(_GenericFactory(factory), maxsize=count, eager=True)


ACQUIRE = "x = pool.acquire(); pool.release(x)"

SUBJECTS: dict[str, Subject] = {
    BASELINE: Subject("a fresh object", "x = pool()", lambda factory, count: factory),
    "deque": Subject("collections.deque", "x = pool.pop(); pool.append(x)", _deque),
    "lifo-queue": Subject("queue.LifoQueue", "x = pool.get(); pool.put(x)", _lifo, bounded=True),
    "pondpond": Subject(
        "pondpond",
        "y = pool.borrow(pool.factory); x = y.use(); pool.recycle(y, pool.factory)",
        _Pond,
    ),
    "object-pool": Subject(
        "object-pool",
        "x = pool.get(); pool.put(x)",
        lambda factory, count: object_pool.ObjectPool(factory, count),
        bounded=True,
    ),
    "objpool": Subject(
        "objpool",
        "x = pool.pool_get(); pool.pool_put(x)",
        lambda factory, count: objpool.ObjectPool(count, factory),
        bounded=True,
    ),
    "generic-pool": Subject("generic-pool", ACQUIRE, _generic),
    "moirai-checked": Subject(
        "Moirai, with reset and validate", ACQUIRE, _moirai_checked, bounded=True
    ),
    "moirai-lease": Subject(
        "Moirai, `with pool.lease()`", "with pool.lease() as x: pass", _moirai, bounded=True
    ),
    MOIRAI: Subject("Moirai", ACQUIRE, _moirai, bounded=True),
}
PACKAGES = ("pondpond", "object-pool", "objpool", "generic-pool")


def _buffer_pool(size_bytes: int) -> Callable[[Callable[[], Any], int], Any]:
    def make(factory: Callable[[], Any], count: int) -> pools.BufferPool:
        pool = pools.BufferPool(size_classes=[size_bytes], max_count=count)
        pool.prefill(size_bytes, count)
        return pool

    return make


def buffer_subjects(size_bytes: int) -> dict[str, Subject]:
    """Ways to have bytes to write to."""
    resource = memory.PoolResource()
    kept = ("deque", "lifo-queue", "object-pool")
    return {
        BASELINE: Subject("a fresh bytearray", "x = pool()", lambda factory, count: factory),
        **{name: SUBJECTS[name] for name in kept},
        "resource": Subject(
            "Moirai, a fresh block of a PoolResource",
            f"x = pool.allocate({size_bytes}); del x",
            lambda factory, count: resource,
        ),
        "moirai-objects": Subject("Moirai, ObjectPool of bytearrays", ACQUIRE, _moirai),
        MOIRAI: Subject(
            "Moirai, BufferPool",
            f"x = pool.acquire({size_bytes}); pool.release(x)",
            _buffer_pool(size_bytes),
        ),
    }


def chosen(subjects: Mapping[str, Subject], names: Sequence[str] | None) -> dict[str, Subject]:
    """Those asked for; all if `names` is None."""
    return {name: subject for name, subject in subjects.items() if names is None or name in names}


# === loops ======================================================================================


def loop_of(turn: str) -> Callable[[Any, int, Callable[[], int]], int]:
    """A function of (pool, count, clock) that runs `turn` so often; nanoseconds it took."""
    source = (
        "def loop(pool, count, clock):\n"
        "    started = clock()\n"
        "    for _ in range(count):\n"
        f"        {turn}\n"
        "    return clock() - started\n"
    )
    namespace: dict[str, Any] = {}
    exec(source, namespace)
    loop: Callable[[Any, int, Callable[[], int]], int] = namespace["loop"]
    return loop


def one_thread(
    subjects: Mapping[str, Subject], factory: Callable[[], Any], rounds: int, seconds: float
) -> dict[str, list[float]]:
    """CPU nanoseconds of a turn, by subject, one value a round."""
    clock = time.thread_time_ns
    empty = loop_of("pass")
    loops = {name: loop_of(subject.turn) for name, subject in subjects.items()}
    made = {name: subject.make(factory, 1) for name, subject in subjects.items()}
    counts = {}
    for name, loop in loops.items():
        loop(made[name], 100, clock)
        counts[name] = max(100, int(seconds * 1e9 / (loop(made[name], 1000, clock) / 1000)))
    found: dict[str, list[float]] = defaultdict(list)
    for _, name in harness.interleaved(subjects, rounds):
        count = counts[name]
        floor = empty(None, count, clock)
        found[name].append((loops[name](made[name], count, clock) - floor) / count)
    return dict(found)


def many_threads(
    subjects: Mapping[str, Subject], thread_count: int, item_count: int, rounds: int, turns: int
) -> dict[str, list[float]]:
    """Wall nanoseconds of a turn over all threads together, by subject, one value a round."""
    made = {name: subject.make(Small, item_count) for name, subject in subjects.items()}
    loops = {name: loop_of(subject.turn) for name, subject in subjects.items()}
    share = turns // thread_count
    found: dict[str, list[float]] = defaultdict(list)
    for _, name in harness.interleaved(subjects, rounds):
        loop, pool = loops[name], made[name]
        barrier = threading.Barrier(thread_count + 1)

        def work(loop: Any = loop, pool: Any = pool, barrier: Any = barrier) -> None:
            barrier.wait()
            loop(pool, share, time.perf_counter_ns)

        threads = [threading.Thread(target=work) for _ in range(thread_count)]
        for thread in threads:
            thread.start()
        barrier.wait()
        started = time.perf_counter_ns()
        for thread in threads:
            thread.join()
        found[name].append((time.perf_counter_ns() - started) / (share * thread_count))
    return dict(found)


# === report =====================================================================================


def medians(found: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Median by subject."""
    return {name: harness.median(values) for name, values in found.items()}


def _rows(
    labels: Mapping[str, str], columns: Sequence[Mapping[str, Sequence[float]]]
) -> list[list[str]]:
    ratios = [harness.round_ratios(column) if BASELINE in column else {} for column in columns]
    rows = []
    for name in labels:
        cells = [labels[name]]
        for column, ratio in zip(columns, ratios, strict=True):
            if name not in column:
                cells.append("")
                continue
            cell = f"{harness.median(column[name]):.0f}"
            if name in ratio:
                cell += f" ({harness.median(ratio[name]):.2f})"
            cells.append(cell)
        rows.append(cells)
    return rows


def render(results: Mapping[str, Any]) -> str:
    """The tables, as Markdown."""
    labels = {name: subject.label for name, subject in SUBJECTS.items()}
    kept = {name: label for name, label in labels.items() if name in results["small"]}
    buffers = {name: subject.label for name, subject in buffer_subjects(KIB).items()}
    kept_buffers = {k: v for k, v in buffers.items() if k in results["buffers"]["1024"]}
    shared = results["shared"]
    shared_rows = [
        [labels[name], f"{harness.median(values):.0f}"] for name, values in shared.items()
    ]
    sizes = [harness.size_label(int(size)) for size in results["buffers"]]
    tables = [
        "**A small object, one thread: CPU ns of a turn** (ratio to a fresh one)",
        harness.markdown_table(["", "ns"], _rows(kept, [results["small"]])),
        "**Bytes to write to, one thread: CPU ns of a turn** (ratio to a fresh bytearray)",
        harness.markdown_table(
            ["", *sizes], _rows(kept_buffers, list(results["buffers"].values()))
        ),
        "**A small object by thread count: wall ns over all turns**"
        " (ratio to fresh ones), an object for each thread",
        harness.markdown_table(
            ["", *(f"{count} threads" for count in results["threads"])],
            _rows(kept, list(results["threads"].values())),
        ),
        f"**{THREADS[-1]} threads share {SHARED} objects: wall ns over all turns**",
        harness.markdown_table(["", "ns"], shared_rows),
    ]
    return "\n\n".join(tables)


def goals(results: Mapping[str, Any]) -> list[Goal]:
    """The project's goals; empty without a Moirai row."""
    small = medians(results["small"])
    if MOIRAI not in small:
        return []
    found = [Goal("acquire and release, ns", small[MOIRAI], PAIR_NS)]
    ratios = {
        name: harness.median(harness.round_ratios(results["small"], MOIRAI)[name])
        for name in small
        if name != MOIRAI
    }
    for name in (BASELINE, "lifo-queue"):
        if name in ratios:
            text = f"a turn over {SUBJECTS[name].label}"
            found.append(Goal(text, 1 / ratios[name], 1.0))
    packages = [ratios[name] for name in PACKAGES if name in ratios]
    if packages:
        found.append(Goal("a turn over the fastest pool package", 1 / min(packages), 1.0))
    for size, column in results["buffers"].items():
        label = harness.size_label(int(size))
        if BASELINE in column:
            ratio = harness.median(harness.round_ratios(column)[MOIRAI])
            found.append(Goal(f"a buffer of {label} over a fresh bytearray", ratio, 1.0))
    for count, column in results["threads"].items():
        peers = {name: column[name] for name in (*PACKAGES, "lifo-queue") if name in column}
        if peers:
            best = min(harness.median(values) for values in peers.values())
            ratio = harness.median(column[MOIRAI]) / best
            found.append(Goal(f"{count} threads, over the fastest bounded peer", ratio, 1.0))
    return found


def measure(arguments: argparse.Namespace) -> harness.Report:
    """All tables."""
    names = arguments.configurations
    subjects = chosen(SUBJECTS, names)
    bounded = {name: subject for name, subject in subjects.items() if subject.bounded}
    rounds = arguments.rounds
    seconds = 0.0005 if arguments.quick else SAMPLE_SECONDS
    turns = 2_000 if arguments.quick else 100_000
    harness.progress("one thread, small objects")
    results: dict[str, Any] = {"small": one_thread(subjects, Small, rounds, seconds)}
    results["buffers"] = {}
    for size in (KIB, 64 * KIB):
        harness.progress(f"one thread, {harness.size_label(size)}")
        results["buffers"][str(size)] = one_thread(
            chosen(buffer_subjects(size), names),
            lambda size=size: bytearray(size),  # type: ignore[misc]
            rounds,
            seconds,
        )
    results["threads"] = {}
    for count in THREADS:
        harness.progress(f"{count} threads")
        results["threads"][str(count)] = many_threads(subjects, count, count, rounds, turns)
    harness.progress(f"{THREADS[-1]} threads, {SHARED} objects")
    results["shared"] = many_threads(bounded, THREADS[-1], SHARED, max(2, rounds // 3), turns // 10)
    parameters = {
        "rounds": rounds,
        "sample_seconds": seconds,
        "turns": turns,
        "threads": list(THREADS),
        "shared_objects": SHARED,
        "quick": arguments.quick,
        "labels": {name: subject.label for name, subject in subjects.items()},
    }
    return harness.Report(NAME, QUESTION, parameters, results, render(results), goals(results))


if __name__ == "__main__":
    sys.exit(harness.main_of_rounds(QUESTION, measure, 11, 2))
