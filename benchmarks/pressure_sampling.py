"""What sampling memory use costs, and how long it is deaf while C code keeps the interpreter."""

from __future__ import annotations

import itertools
import os
import pickle
import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import harness
from moirai.pressure import Sampler

PERIOD_SECONDS = 0.02


def gaps(times: Sequence[float], start: float, end: float) -> float:
    """The longest time without a sample between two moments, in milliseconds."""
    inside = [start, *(each for each in times if start < each < end), end]
    return 1e3 * max(after - before for before, after in itertools.pairwise(inside))


def by_native_thread(work: Callable[[], object]) -> float:
    """Longest gap of a `Sampler` while some work goes on."""
    sampler = Sampler(shortest_seconds=PERIOD_SECONDS, longest_seconds=PERIOD_SECONDS)
    with sampler:
        sampler.next(timeout_seconds=10)
        start = time.monotonic()
        work()
        end = time.monotonic()
        return gaps([each.time_seconds for each in sampler.history()], start, end)


def by_python_thread(work: Callable[[], object]) -> float:
    """The same of a thread that does so in Python, as guards without native code do."""
    times: list[float] = []
    stopping, began = threading.Event(), threading.Event()

    def watch() -> None:
        statm = os.open("/proc/self/statm", os.O_RDONLY)
        while not stopping.wait(PERIOD_SECONDS):
            os.pread(statm, 100, 0)
            times.append(time.monotonic())
            began.set()
        os.close(statm)

    thread = threading.Thread(target=watch)
    thread.start()
    began.wait()
    start = time.monotonic()
    work()
    end = time.monotonic()
    stopping.set()
    thread.join()
    return gaps(times, start, end)


def reading_microseconds(rate: int, seconds: float) -> float:
    """Time that reading a sample takes, by the `Sampler`'s own count."""
    with Sampler(shortest_seconds=1 / rate, longest_seconds=1 / rate) as sampler:
        time.sleep(seconds)
        found = sampler.statistics()
    return 1e6 * found.reading_seconds / found.sample_count


def idle_microseconds(rate: int, seconds: float) -> float:
    """CPU time of each waking of a thread in Python that only sleeps."""
    stopping = threading.Event()
    found: list[float] = []

    def body() -> None:
        count = 0
        start = time.thread_time_ns()
        while not stopping.is_set():
            time.sleep(1 / rate)
            count += 1
        found.append((time.thread_time_ns() - start) / 1e3 / count)

    thread = threading.Thread(target=body)
    thread.start()
    time.sleep(seconds)
    stopping.set()
    thread.join()
    return found[0]


def cpu_microseconds(rate: int, seconds: float) -> float:
    """CPU time of a sample of a `Sampler` in a process at rest, its thread's waking included."""
    before = set(os.listdir("/proc/self/task"))
    with Sampler(shortest_seconds=1 / rate, longest_seconds=1 / rate) as sampler:
        (thread,) = set(os.listdir("/proc/self/task")) - before
        time.sleep(seconds)
        count = sampler.statistics().sample_count
        with open(f"/proc/self/task/{thread}/schedstat") as file:
            return int(file.read().split()[0]) / 1e3 / count


def measure(*, quick: bool) -> dict[str, Any]:
    """Everything above; medians of the rounds."""
    count = 100_000 if quick else 3_000_000
    rounds = 1 if quick else 3
    numbers = [random.Random(1).random() for _ in range(count)]
    nested = [[number] for number in numbers]
    works: dict[str, Callable[[], object]] = {
        "pickle": lambda: pickle.dumps(nested),
        "sort": lambda: sorted(numbers),
    }
    found: dict[str, Any] = {
        "often_us": reading_microseconds(2000, 0.2 if quick else 3),
        "seldom_us": cpu_microseconds(10, 1 if quick else 10),
        "idle_us": idle_microseconds(10, 1 if quick else 10),
    }
    found["processor_percent"] = 100 * 10 * found["seldom_us"] / 1e6
    for name, work in works.items():
        pairs = [(by_native_thread(work), by_python_thread(work)) for _ in range(rounds)]
        found[f"{name}_gap_ms"] = harness.median([native for native, _ in pairs])
        found[f"{name}_gap_python_ms"] = harness.median([python for _, python in pairs])
    return found


def render(found: dict[str, Any]) -> str:
    """The table, as Markdown."""
    rows = [
        ["reading a sample, 2000 a second, µs", f"{found['often_us']:.1f}", ""],
        [
            "CPU time of a sample, ten a second, waking included, µs",
            f"{found['seldom_us']:.1f}",
            "",
        ],
        ["of a thread that only sleeps and wakes as often, µs", "", f"{found['idle_us']:.1f}"],
        ["share of a processor then, %", f"{found['processor_percent']:.3f}", ""],
    ]
    for name, label in (("pickle", "pickles"), ("sort", "sorts")):
        rows.append(
            [
                f"longest gap while the program {label}, ms (asked for: 20)",
                f"{found[f'{name}_gap_ms']:.0f}",
                f"{found[f'{name}_gap_python_ms']:.0f}",
            ]
        )
    return harness.markdown_table(["", "`Sampler`", "a thread in Python"], rows)


def goals(found: dict[str, Any]) -> list[harness.Goal]:
    """The project's goals."""
    return [
        harness.Goal("reading a sample, µs", found["often_us"], 15),
        harness.Goal("sampler at ten a second, % CPU", found["processor_percent"], 0.02),
        harness.Goal("sampler's gap while pickling, ms", found["pickle_gap_ms"], 50),
        harness.Goal("sampler's gap while sorting, ms", found["sort_gap_ms"], 50),
    ]
