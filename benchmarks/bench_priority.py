"""How long can an array keep its maker waiting, and how often does it fault a page in?

An operation makes an array of 64 B to 1 MiB (five sizes at random), writes to each of its pages,
and frees an older one, picked at random among 32; each is timed by itself. There are two ways to
work: without a pause; and in bursts that begin and end with nothing, after pauses of 0.8 s, in
which what is kept goes back to the system. Sources take turns, burst by burst, in one process.
Time is the thread's CPU time: being put off by the scheduler is not the allocator's doing. Faults
are those of the thread, as the kernel counts them.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import random
import resource as limits
import sys
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import harness
from harness import Goal

QUESTION = __doc__.partition("\n")[0]
NAME = "bench_priority"

KIB, MIB = 1 << 10, 1 << 20
SIZES = (64, 4 * KIB, 64 * KIB, 256 * KIB, MIB)
LIVE_COUNT = 32
PAGE_BYTES = 4096
PAUSE_SECONDS = 0.8
QUANTILES = {"median": 0.5, "p99": 0.99, "p99.9": 0.999, "p99.99": 0.9999}
REALTIME, BASELINE = "realtime", "numpy"
WAYS = {"steady": "without a pause", "bursts": f"in bursts after pauses of {PAUSE_SECONDS} s"}


@dataclass
class Source:
    """One source of arrays, and what was measured with it."""

    label: str
    scope: Callable[[], contextlib.AbstractContextManager[Any]]
    live: list[Any] = field(default_factory=list)
    nanoseconds: dict[str, array[int]] = field(default_factory=dict)
    faults: dict[str, int] = field(default_factory=dict)


def sources() -> dict[str, Source]:
    """Every source, NumPy's own first."""
    from moirai import memory

    realtime = memory.RealtimeResource("64 MiB", allow_unlocked=True)
    system, pool = memory.SystemResource(), memory.PoolResource()
    return {
        BASELINE: Source("NumPy on glibc", contextlib.nullcontext),
        "system": Source("Moirai, `SystemResource`", lambda: memory.use(system)),
        "pool": Source("Moirai, `PoolResource`", lambda: memory.use(pool)),
        REALTIME: Source(
            f"Moirai, `RealtimeResource`, {'locked' if realtime.is_locked else 'not locked'}",
            lambda: memory.use(realtime),
        ),
    }


def minor_faults() -> int:
    return limits.getrusage(limits.RUSAGE_THREAD).ru_minflt


def burst(source: Source, way: str, plan: Sequence[tuple[int, int]]) -> None:
    """Carry a plan of (size, slot) out and note the time of each operation."""
    import numpy as np

    live, clock = source.live, time.thread_time_ns
    times = array("q", bytes(8 * len(plan)))
    with source.scope():
        faults = minor_faults()
        for turn, (size, slot) in enumerate(plan):
            start = clock()
            made = np.empty(size, np.uint8)
            made[::PAGE_BYTES] = 1
            live[slot] = made
            times[turn] = clock() - start
        source.faults[way] = source.faults.get(way, 0) + minor_faults() - faults
        if way == "bursts":
            live[:] = [None] * LIVE_COUNT
    source.nanoseconds.setdefault(way, array("q")).extend(times)


def measure_all(found: Mapping[str, Source], arguments: argparse.Namespace) -> None:
    chance = random.Random(1)

    def plan(count: int) -> list[tuple[int, int]]:
        return [(chance.choice(SIZES), chance.randrange(LIVE_COUNT)) for _ in range(count)]

    for source in found.values():
        source.live = [None] * LIVE_COUNT
        burst(source, "warm-up", plan(5_000))
    for turn, name in harness.interleaved(found, arguments.rounds):
        harness.progress(f"{WAYS['steady']}: round {turn}, {name}")
        burst(found[name], "steady", plan(arguments.operations))
    for source in found.values():
        source.live = [None] * LIVE_COUNT
    previous = -1
    for turn, name in harness.interleaved(found, 2 * arguments.rounds):
        if turn != previous:
            time.sleep(0.01 if arguments.quick else PAUSE_SECONDS)
            previous = turn
        harness.progress(f"{WAYS['bursts']}: round {turn}, {name}")
        burst(found[name], "bursts", plan(arguments.operations // 10))


def summarise(source: Source, way: str) -> dict[str, float]:
    """Quantiles in microseconds, and faults for 10^5 operations."""
    times = source.nanoseconds[way]
    figures = {name: harness.percentile(times, share) / 1e3 for name, share in QUANTILES.items()}
    return {
        **figures,
        "worst": max(times) / 1e3,
        "faults": source.faults[way],
        "operations": len(times),
    }


def render(results: Mapping[str, Mapping[str, Any]], labels: Mapping[str, str]) -> str:
    """A table for each way to work."""
    parts = []
    for way, title in WAYS.items():
        floor = results[BASELINE][way]
        rows = []
        for name, label in labels.items():
            row = results[name][way]
            ratios = [f"{row[key]:.1f} ({row[key] / floor[key]:.2f})" for key in QUANTILES]
            faults = row["faults"] * 1e5 / row["operations"]
            rows.append([label, *ratios, f"{row['worst']:.0f}", f"{faults:.0f}"])
        header = ["CPU µs (over NumPy on glibc)", *QUANTILES, "worst", "faults in 10^5"]
        count = floor["operations"]
        parts.append(f"**Work {title}**, {count} operations each")
        parts.append(harness.markdown_table(header, rows))
    return "\n\n".join(parts)


def goals(results: Mapping[str, Mapping[str, Any]]) -> list[Goal]:
    found = []
    for way, title in WAYS.items():
        row, peer = results[REALTIME][way], results[BASELINE][way]
        found.append(Goal(f"page faults with real-time memory, {title}", row["faults"], 0))
        found.append(
            Goal(f"p99.99 over that of glibc, {title}", row["p99.99"] / peer["p99.99"], 1.0)
        )
    return found


def measure(arguments: argparse.Namespace) -> harness.Report:
    found = sources()
    gc.collect()
    gc.disable()
    try:
        measure_all(found, arguments)
    finally:
        gc.enable()
    results = {
        name: {way: summarise(source, way) for way in WAYS} for name, source in found.items()
    }
    labels = {name: source.label for name, source in found.items()}
    parameters = {
        "rounds": arguments.rounds,
        "operations": arguments.operations,
        "sizes": list(SIZES),
        "live_count": LIVE_COUNT,
        "pause_seconds": PAUSE_SECONDS,
        "quick": arguments.quick,
        "labels": labels,
    }
    return harness.Report(
        NAME, QUESTION, parameters, results, render(results, labels), goals(results)
    )


def main() -> int:
    parser = harness.argument_parser(QUESTION)
    parser.add_argument("--rounds", type=int, help="rounds of each way (10; 2 when quick)")
    parser.add_argument(
        "--operations", type=int, help="operations a round and source (20000; 400 when quick)"
    )
    arguments = parser.parse_args()
    arguments.rounds = arguments.rounds or (2 if arguments.quick else 10)
    arguments.operations = arguments.operations or (400 if arguments.quick else 20_000)
    harness.publish(measure(arguments), arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
