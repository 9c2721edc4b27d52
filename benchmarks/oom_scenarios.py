"""Programs that die at their memory limit unless something holds them: one a run, by name.

`python oom_scenarios.py SCENARIO MODE SEED LIMIT_BYTES COUNTED` with MODE one of none, static (the
level alone, no fence), forecast (odds as well) and forecast-fence (and the fence). COUNTED is group
(the limit is the control group's) or budget. Prints one JSON object: the share of the work that was
done, and whether the program ended by itself.

Each program does what a program of its kind would: it registers its cache, holds a slot for what is
in flight, asks before a large array, and catches MemoryError where it can go on.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import queue
import random
import sys
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

MIB = 1 << 20


# These programs do in seconds what real ones do in minutes: one second stands for ten, as in the
# recordings that the forecaster learnt from.
TIME_SCALE = 10


class Hastened:
    """A forecaster whose clock runs faster."""

    def __init__(self) -> None:
        from moirai import pressure

        self._forecaster = pressure.Forecaster()

    def observe(self, time_seconds: float, used_bytes: int, limit_bytes: int) -> None:
        self._forecaster.observe(TIME_SCALE * time_seconds, used_bytes, limit_bytes)

    def forecast(self) -> Any:
        return self._forecaster.forecast()

    def score(self) -> Any:
        """What came of its forecasts; times are by its own clock."""
        return self._forecaster.score()


class Leave(Exception):
    """The guard's last resort: end gracefully."""


class Program:
    """What a scenario knows of its run, and where it says how far it came."""

    def __init__(self, mode: str, seed: int, limit: int, counted: str) -> None:
        self.random = random.Random(seed)
        self.limit = limit
        self.done = 0.0
        self.leaving = threading.Event()
        self.guard: Any = None
        if mode != "none":
            from moirai import pressure

            options: dict[str, Any] = {
                "on_stall": lambda guard: self.leaving.set(),
                "forecaster": Hastened() if mode.startswith("forecast") else None,
                "forecast_seconds": 1 / TIME_SCALE,
            }
            self.guard = pressure.start(
                limit=limit if counted == "budget" else None,
                fence=mode.endswith("fence"),
                stall_seconds=1.0,
                **options,
            )

    def register(self, name: str, shrink: Callable[[int], int | None], **options: Any) -> None:
        if self.guard is not None:
            from moirai import pressure

            pressure.register(name, shrink, **options)

    def slots(self, maximum: int) -> Any:
        """A cap on work in flight; without a guard, one that never falls."""
        if self.guard is not None:
            return self.guard.cap(maximum)
        from moirai.pressure import ConcurrencyCap

        return ConcurrencyCap(maximum)

    def reserve(self, size: int) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext() if self.guard is None else self.guard.reserve(size)

    def breathe(self) -> None:
        """Wait for room after a MemoryError, so that the guard can make some."""
        gc.collect()
        time.sleep(0.02)


def block(program: Program, size: int) -> np.ndarray[Any, Any]:
    """An array whose pages are all touched."""
    return np.full(size, program.random.randrange(256), dtype=np.uint8)


def steps(program: Program, count: int) -> Iterator[int]:
    """Count the work that is done."""
    for number in range(count):
        if program.leaving.is_set():
            raise Leave
        yield number
        program.done = (number + 1) / count


def unbounded_cache(program: Program) -> None:
    cache: OrderedDict[int, Any] = OrderedDict()
    lock = threading.Lock()
    size = MIB // 4

    def shrink(wanted: int) -> int:
        with lock:
            count = min(len(cache), wanted // size + 1)
            for _ in range(count):
                cache.popitem(last=False)
        return count * size

    program.register("cache", shrink, size=lambda: len(cache) * size)
    for _ in steps(program, 4 * program.limit // size):
        key = program.random.randrange(17 * program.limit // (10 * size))
        if key in cache:
            continue
        try:
            value = block(program, size)
        except MemoryError:
            shrink(program.limit // 4)
            program.breathe()
            value = block(program, size)
        with lock:
            cache[key] = value


def fast_queue(program: Program) -> None:
    """A producer that is faster than the one who consumes."""
    size = MIB // 2
    count = 8 * program.limit // (5 * size)
    waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
    slots = program.slots(count)

    def consume() -> None:
        for number in range(count):
            waiting.get()
            time.sleep(0.0015)
            slots.release()
            program.done = (number + 1) / count

    consumer = threading.Thread(target=consume, daemon=True)
    consumer.start()
    for _ in range(count):
        slots.acquire()
        while True:
            try:
                waiting.put(block(program, size))
                break
            except MemoryError:
                program.breathe()
    consumer.join()


def load_ramp(program: Program) -> None:
    """More and more requests at once, each with its working memory."""
    size = program.limit // 64
    count = 110
    slots = program.slots(count)
    served = []

    def serve() -> None:
        try:
            while True:
                try:
                    memory = block(program, size)
                    break
                except MemoryError:
                    program.breathe()
            time.sleep(0.8)
            del memory
            served.append(1)
            program.done = len(served) / count
        finally:
            slots.release()

    threads = []
    for number in range(count):
        slots.acquire()
        thread = threading.Thread(target=serve, daemon=True)
        while True:
            try:
                thread.start()
                break
            except (MemoryError, RuntimeError):
                program.breathe()
                thread = threading.Thread(target=serve, daemon=True)
        threads.append(thread)
        time.sleep(max(0.001, 0.02 - number * 0.0005))
    for thread in threads:
        thread.join()


def cyclic_garbage(program: Program) -> None:
    gc.disable()
    for _ in steps(program, 8 * program.limit // (5 * MIB)):
        while True:
            try:
                node: list[Any] = [block(program, MIB)]
                break
            except MemoryError:
                program.breathe()
        node.append(node)
        time.sleep(0.0005)


def heap_retention(program: Program) -> None:
    """Freed small blocks stay in libc's heap between those that live; then arrays are wanted."""
    small = [bytes(3000) for _ in range(int(program.limit * 0.6) // 3100)]
    few = small[::8]  # Too near each other for an array to fit between them.
    del small
    kept = []
    for _ in steps(program, int(program.limit * 0.6) // MIB):
        while True:
            try:
                kept.append(block(program, MIB))
                break
            except MemoryError:
                program.breathe()
        time.sleep(0.001)
    assert len(few) > 0


def refilled_heap(program: Program) -> None:
    """A heap that was large and was given back is filled again, when a cache is in its place."""
    cache: list[Any] = []
    lock = threading.Lock()
    record, size = 3000, MIB // 4
    batch = MIB // record

    def shrink(wanted: int) -> int:
        with lock:
            count = min(len(cache), wanted // size + 1)
            del cache[:count]
        return count * size

    def gentler(make: Callable[[], Any]) -> Any:
        try:
            return make()
        except MemoryError:
            shrink(program.limit // 4)
            program.breathe()
            return make()

    program.register("cache", shrink, size=lambda: len(cache) * size)
    filled = program.limit // (2 * MIB)
    cached = 4 * program.limit // (5 * size)
    records: list[list[bytes]] = []
    few: list[bytes] = []
    for number in steps(program, 2 * filled + cached):
        if number == filled:
            few = [each[0] for each in records]  # These keep libc from unmapping the heap.
            records.clear()
        if filled <= number < filled + cached:
            value = gentler(lambda: block(program, size))
            with lock:
                cache.append(value)
        else:
            records.append(gentler(lambda: [bytes(record) for _ in range(batch)]))
    assert len(few) > 0


def results_with_spill(program: Program) -> None:
    results: list[Any] = []
    lock = threading.Lock()
    file = tempfile.TemporaryFile()  # noqa: SIM115  open to the program's end

    def spill(wanted: int) -> int:
        freed = 0
        with lock:
            for index, result in enumerate(results):
                if freed >= wanted:
                    break
                if result is not None:
                    file.write(memoryview(result))
                    freed += result.nbytes
                    results[index] = None
            file.flush()
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return freed

    program.register("results", spill, irreversible=True)
    for _ in steps(program, 8 * program.limit // (5 * MIB)):
        try:
            result = block(program, MIB)
        except MemoryError:
            spill(program.limit // 4)
            result = block(program, MIB)
        with lock:
            results.append(result)
        time.sleep(0.001)


def pure_leak(program: Program) -> None:
    """Nothing can be freed: the best end is one that saves what there is."""
    leaked = []
    for _ in steps(program, 8 * program.limit // (5 * MIB)):
        try:
            leaked.append(block(program, MIB))
        except MemoryError:
            leaked.clear()
            raise Leave from None
        time.sleep(0.001)


def _in_chunks(program: Program, size: int) -> None:
    for _ in steps(program, 16):
        block(program, size // 16)


def huge_array(program: Program) -> None:
    size = 7 * program.limit // 5
    try:
        block(program, size)
    except MemoryError:
        _in_chunks(program, size)
    program.done = 1.0


def huge_reserved(program: Program) -> None:
    size = 7 * program.limit // 5
    try:
        with program.reserve(size):
            block(program, size)
    except MemoryError:
        _in_chunks(program, size)
    program.done = 1.0


def c_loop(program: Program) -> None:
    """One call into C that keeps the interpreter and grows all the while."""
    count = program.limit // 24
    try:
        numbers: Any = list(map(float, range(count)))
    except MemoryError:
        numbers = map(float, range(count))
    assert sum(numbers) == count * (count - 1) / 2
    program.done = 1.0


SCENARIOS = {
    scenario.__name__: scenario
    for scenario in (
        unbounded_cache,
        fast_queue,
        load_ramp,
        cyclic_garbage,
        heap_retention,
        refilled_heap,
        results_with_spill,
        pure_leak,
        huge_array,
        huge_reserved,
        c_loop,
    )
}


def main() -> None:
    name, mode, seed, limit, counted = sys.argv[1:]
    program = Program(mode, int(seed), int(limit), counted)
    outcome = "finished"
    try:
        SCENARIOS[name](program)
    except (Leave, MemoryError):
        outcome = "left"
    status = None if program.guard is None else program.guard.status()
    answer = {
        "outcome": outcome,
        "done": program.done,
        "stage": None if status is None else status.highest_stage.name.lower(),
    }
    print(json.dumps(answer), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
