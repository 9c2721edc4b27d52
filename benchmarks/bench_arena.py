"""What does an arena cost, block by block, beside an array each and slices of a bytearray?

One process, one thread; the ways to get a block take turns in rounds. A round makes the blocks of
one size and keeps them in a list that is there already, then drops them; both are timed, with the
loop that does it. "Nothing" is that loop around a built-in function that does next to nothing.
Arrays are of float64, which needs no conversion of a dtype.

A rollback is timed once a round, with so many blocks alive that are given up and left to their
views. Making them has emptied the caches, of the interpreter's code too, so that any first call is
slow: the control, in every other round, is the rollback of another arena with one block alive, in
the same state of the caches. "Again" is a second rollback right after the first, in an arena with
the same history. The core's figures are those of `crates/core/examples/arena_cost.rs`, without
Python.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import harness
from harness import BASELINE, MOIRAI, Goal

QUESTION = __doc__.partition("\n")[0]
NAME = "bench_arena"

KIB = 1 << 10
SIZES = (64, KIB, 16 * KIB)
BATCH_COUNT = 1000
NOTHING = "nothing"

LABELS = {
    NOTHING: "nothing: the loop and a call",
    BASELINE: "`np.empty`, on glibc",
    "bytearray": "`bytearray`",
    "slices": "slices of a `memoryview` of one bytearray",
    "pool": "Moirai, `pool.allocate`",
    "local": "Moirai, `ThreadLocalArena.allocate`",
    "array": "Moirai, `arena.array`",
    "batch": f"Moirai, `arena.allocate_batch({BATCH_COUNT}, …)`, each block",
    "items": "Moirai, the same and a buffer of each block",
    MOIRAI: "Moirai, `arena.allocate`",
}

Make = Callable[[int], Any]


# --- blocks -------------------------------------------------------------------------------------


class Slices:
    """Slices of a bytearray that is made anew when it is used up: what a program does by hand."""

    def __init__(self, size_bytes: int, count: int) -> None:
        self._size_bytes = size_bytes
        self._total_bytes = size_bytes * count
        self._offset = self._total_bytes
        self._view = memoryview(b"")

    def __call__(self, size_bytes: int) -> memoryview:
        start = self._offset
        if start + size_bytes > self._total_bytes:
            self._view = memoryview(bytearray(self._total_bytes))
            start = 0
        self._offset = start + size_bytes
        return self._view[start : start + size_bytes]


def one_by_one(size_bytes: int, count: int) -> dict[str, tuple[Make, int]]:
    """The ways that give one block a call, each with what to ask it for."""
    import numpy as np

    from moirai import memory

    items = size_bytes // 8
    return {
        NOTHING: (callable, size_bytes),
        BASELINE: (np.empty, items),
        "bytearray": (bytearray, size_bytes),
        "slices": (Slices(size_bytes, count), size_bytes),
        "pool": (memory.PoolResource().allocate, size_bytes),
        "local": (memory.ThreadLocalArena().allocate, size_bytes),
        "array": (memory.ArenaResource().array, items),
        MOIRAI: (memory.ArenaResource().allocate, size_bytes),
    }


def time_blocks(make: Make, size: int, slots: list[Any]) -> tuple[float, float]:
    """Nanoseconds a block to make, and to drop."""
    clock = time.perf_counter_ns
    indices = range(len(slots))
    start = clock()
    for index in indices:
        slots[index] = make(size)
    made = clock()
    for index in indices:
        slots[index] = None
    dropped = clock()
    return (made - start) / len(slots), (dropped - made) / len(slots)


def time_batch(arena: Any, size_bytes: int, *, items: bool) -> tuple[float, float]:
    """The same for a batch, with or without a buffer of each block."""
    clock = time.perf_counter_ns
    start = clock()
    batch = arena.allocate_batch(BATCH_COUNT, size_bytes)
    held = list(batch) if items else []
    made = clock()
    del batch, held
    dropped = clock()
    return (made - start) / BATCH_COUNT, (dropped - made) / BATCH_COUNT


def measure_blocks(names: Sequence[str], rounds: int, count: int) -> dict[str, Any]:
    """Samples by size and way."""
    from moirai import memory

    samples: dict[str, Any] = {}
    for size_bytes in SIZES:
        harness.progress(f"blocks of {harness.size_label(size_bytes)}")
        ways = one_by_one(size_bytes, count)
        batch_arena = memory.ArenaResource(chunk_bytes="32 MiB")
        slots = [None] * count
        found: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for _, name in harness.interleaved(names, rounds):
            gc.collect()
            if name in ways:
                found[name].append(time_blocks(*ways[name], slots))
            else:
                items = name == "items"
                found[name].append(time_batch(batch_arena, size_bytes, items=items))
        samples[str(size_bytes)] = found
    return samples


# --- rollbacks ----------------------------------------------------------------------------------


class Rollbacks:
    """Arenas of the same history: the one with the blocks, and one with a single block."""

    def __init__(self, live_count: int) -> None:
        from moirai import memory

        self._live_count = live_count
        self._arena = memory.ArenaResource()
        self._single = memory.ArenaResource()

    def time(self, *, control: bool) -> tuple[float, float]:
        """Microseconds of a rollback over live blocks, and of a second one right after it.

        The control times the arena with a single block first.
        """
        clock = time.perf_counter_ns
        savepoint, single_savepoint = self._arena.savepoint(), self._single.savepoint()
        kept = [self._single.allocate(64)]
        allocate = self._arena.allocate
        kept += [allocate(64) for _ in range(self._live_count)]
        order = [(self._arena, savepoint), (self._single, single_savepoint)]
        if control:
            order.reverse()
        (first, first_savepoint), (second, second_savepoint) = order
        start = clock()
        first.rollback(first_savepoint, retire=True)
        between = clock()
        second.rollback(second_savepoint, retire=True)
        end = clock()
        del kept
        return (between - start) / 1000, (end - between) / 1000


def measure_rollbacks(counts: Sequence[int], rounds: int) -> dict[str, Any]:
    """Samples by the number of live blocks."""
    samples: dict[str, Any] = {}
    for live_count in counts:
        harness.progress(f"rollback over {live_count} live blocks")
        rollbacks = Rollbacks(live_count)
        found: dict[str, list[float]] = defaultdict(list)
        fewer = min(rounds, 15 if live_count > 10_000 else rounds)
        for _, name in harness.interleaved(("arena", "control"), fewer):
            first, second = rollbacks.time(control=name == "control")
            # The second of one order is the other arena's.
            found[name].append(first)
            found["arena_again" if name == "control" else "control_again"].append(second)
        found["free_each"] = [time_free_each(live_count) for _ in range(min(rounds, 5))]
        samples[str(live_count)] = found
    return samples


def time_free_each(count: int) -> float:
    """Microseconds of dropping as many arrays of NumPy's own: the way without an arena."""
    import numpy as np

    arrays = [np.empty(64, np.uint8) for _ in range(count)]
    start = time.perf_counter_ns()
    arrays.clear()
    return (time.perf_counter_ns() - start) / 1000


# --- the core -----------------------------------------------------------------------------------


def measure_core(count: int) -> dict[str, float]:
    """The core's own figures; empty where there is no cargo to build them with."""
    if shutil.which("cargo") is None:
        harness.progress("no cargo: the core is left out")
        return {}
    harness.progress("the core, without Python")
    command = ["cargo", "run", "--quiet", "--release", "-p", "moirai-core", "--example"]
    command += ["arena_cost", "--", str(count)]
    run = subprocess.run(command, cwd=harness.ROOT, capture_output=True, text=True, check=True)
    figures: dict[str, float] = json.loads(run.stdout)
    return figures


# --- text ---------------------------------------------------------------------------------------


def summarise_blocks(samples: Mapping[str, Any]) -> dict[str, Any]:
    """Medians by size and way: (make, drop) in nanoseconds."""
    return {
        size: {
            name: tuple(harness.median(column) for column in zip(*pairs, strict=True))
            for name, pairs in ways.items()
        }
        for size, ways in samples.items()
    }


def summarise_rollbacks(samples: Mapping[str, Any]) -> dict[str, Any]:
    """Medians by the number of live blocks, in microseconds."""
    return {
        count: {name: harness.median(values) for name, values in found.items()}
        for count, found in samples.items()
    }


def render(summary: Mapping[str, Any]) -> str:
    """The tables, as Markdown."""
    blocks, rollbacks, core = summary["blocks"], summary["rollbacks"], summary["core"]
    names = list(next(iter(blocks.values())))
    sizes = [harness.size_label(int(size)) for size in blocks]
    rows = [
        [LABELS[name], *("{:.3g} / {:.3g}".format(*ways[name]) for ways in blocks.values())]
        for name in names
    ]
    parts = [
        "**A block, ns: to make and keep / to drop**, the loop included",
        harness.markdown_table(["", *sizes], rows),
    ]
    if rollbacks:
        rows = [
            [
                f"{int(count):,}",
                f"{found['arena']:.2f}",
                f"{found['control']:.2f}",
                f"{found['arena'] / found['control']:.2f}",
                f"{found['arena_again']:.2f} / {found['control_again']:.2f}",
                f"{found['free_each']:.3g}",
            ]
            for count, found in rollbacks.items()
        ]
        header = ["live blocks", "rollback", "control: one block", "ratio", "again / control again"]
        parts += [
            "**`arena.rollback(savepoint, retire=True)`, µs**, by the blocks that live and are "
            "given up; the last column drops as many arrays of NumPy's own",
            harness.markdown_table([*header, "arrays dropped"], rows),
        ]
    if core:
        parts += [
            "**The core, without Python, ns**, blocks of 64 bytes",
            harness.markdown_table(["", "ns"], core_rows(core)),
        ]
    return "\n\n".join(parts)


def core_rows(core: Mapping[str, float]) -> list[list[str]]:
    """The core's figures with words to them."""
    words = {
        "cut": "cut a block",
        "free": "free a block",
        "kept_arena": "arena: allocate, and keep the address in a list",
        "kept_thread_local_arena": "thread-local arena: the same",
        "kept_pool": "pool: the same",
        "kept_malloc": "malloc, 64-byte aligned: the same",
        "two_threads_arena": "arena: allocate and free, two threads at once",
        "two_threads_thread_local_arena": "thread-local arena: the same",
        "two_threads_pool": "pool: the same",
        "two_threads_malloc": "malloc: the same",
    }
    rows = [[text, f"{core[key]:.3g}"] for key, text in words.items()]
    rollbacks = [(key, value) for key, value in core.items() if key.startswith("rollback_")]
    return rows + [
        [f"rollback over {int(key.removeprefix('rollback_')):,} live blocks", f"{value:.3g}"]
        for key, value in rollbacks
    ]


def goals(summary: Mapping[str, Any]) -> list[Goal]:
    """The project's goals; empty without a row of Moirai's."""
    blocks, rollbacks, core = summary["blocks"], summary["rollbacks"], summary["core"]
    small = blocks[str(SIZES[0])]
    if MOIRAI not in small:
        return []
    found = [Goal("allocate 64 B from Python, ns", small[MOIRAI][0], 100)]
    if "batch" in small:
        found.append(Goal("each block of a batch of 1000, ns", small["batch"][0], 10))
    found.append(Goal("cut a block in the core, ns", core.get("cut", float("nan")), 5))
    most = max(rollbacks, key=int)
    for count in (min(rollbacks, key=int), most):
        text = f"rollback over {int(count):,} live blocks, µs"
        found.append(Goal(text, rollbacks[count]["arena"], 1))
        text = f"rollback over {int(count):,} live blocks, the second in a row, µs"
        found.append(Goal(text, rollbacks[count]["arena_again"], 1))
    flat = rollbacks[most]["arena"] / rollbacks[most]["control"]
    found.append(Goal(f"rollback over {int(most):,} live blocks, over one", flat, 1.2))
    return found


def measure(arguments: argparse.Namespace) -> harness.Report:
    """Everything, in this process and thread."""
    known = {name: harness.Configuration(name, label) for name, label in LABELS.items()}
    chosen = harness.select_configurations(known, arguments.configurations)
    counts = [10**power for power in range(1, 4 if arguments.quick else 7)]
    samples = measure_blocks(list(chosen), arguments.rounds, 200 if arguments.quick else 1000)
    rollbacks = measure_rollbacks(counts, arguments.rounds)
    document = {
        "blocks": summarise_blocks(samples),
        "rollbacks": summarise_rollbacks(rollbacks),
        "core": measure_core(1000 if arguments.quick else 10_000),
        "samples": {"blocks": samples, "rollbacks": rollbacks},
    }
    parameters = {"rounds": arguments.rounds, "quick": arguments.quick, "labels": LABELS}
    return harness.Report(NAME, QUESTION, parameters, document, render(document), goals(document))


if __name__ == "__main__":
    sys.exit(harness.main_of_rounds(QUESTION, measure, 101, 5, "rounds"))
