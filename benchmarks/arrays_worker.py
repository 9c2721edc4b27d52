"""What one process measures for `bench_arrays.py`: times and faults under its own allocator.

Floor and operation are timed alternately. Times are thread CPU times; page faults are the
thread's own. Requests and answers: see `ArraysWorker`.
"""

from __future__ import annotations

import gc
import mmap
import random
import resource
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextvars import copy_context
from typing import Any

import harness

KIB, MIB = 1 << 10, 1 << 20
SMALL_SIZES = (8, 64, 256, 1024)
LARGE_PAGE = 2 * MIB
SAMPLE_NS = 4_000_000  # one timed sample lasts about this long, or one operation if that is longer
WARM_NS = 2_000_000


def _mapped(size_bytes: int) -> Any:
    """A float64 array in its own mapping: page aligned, huge pages as NumPy asks for them."""
    import numpy as np

    mapping = mmap.mmap(-1, size_bytes + LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if size_bytes >= 4 * MIB:
        mapping.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(mapping, dtype=np.uint8)
    skipped = -whole.ctypes.data % (LARGE_PAGE if size_bytes >= 4 * MIB else 4096)
    array = whole[skipped : skipped + size_bytes].view(np.float64)
    array.fill(1.5)
    return array


class Expression:
    """The operation and its floor at one size: arrays and calibrated repeat counts."""

    def __init__(self, size_bytes: int) -> None:
        import numpy as np

        count = size_bytes // 8
        self.aligned = tuple(_mapped(size_bytes) for _ in range(3))
        self.out = tuple(_mapped(size_bytes) for _ in range(2))
        self.natural = tuple(np.full(count, 1.5) for _ in range(3))
        self.floor_repeats = _repeats(lambda n: _run_floor(n, *self.aligned, *self.out))
        self.repeats = _repeats(lambda n: _run_expression(n, *self.natural))

    def visit(self, pair_count: int) -> list[dict[str, float]]:
        """Time floor and operation alternately; nanoseconds and faults per operation."""
        samples = []
        _warm(lambda n: _run_floor(n, *self.aligned, *self.out))
        _warm(lambda n: _run_expression(n, *self.natural))
        for _ in range(pair_count):
            floor, _ = _timed(self.floor_repeats, lambda n: _run_floor(n, *self.aligned, *self.out))
            if self.repeats == 1:
                # While so long a floor ran, what was idle may have gone back by age.
                _run_expression(1, *self.natural)
            aligned, _ = _timed(self.repeats, lambda n: _run_expression(n, *self.aligned))
            natural, faults = _timed(self.repeats, lambda n: _run_expression(n, *self.natural))
            samples.append(
                {"floor": floor, "aligned": aligned, "natural": natural, "faults": faults}
            )
        return samples


def _run_floor(repeats: int, a: Any, b: Any, c: Any, product: Any, total: Any) -> None:
    import numpy as np

    multiply, add = np.multiply, np.add
    for _ in range(repeats):
        add(multiply(a, b, out=product), c, out=total)


def _run_expression(repeats: int, a: Any, b: Any, c: Any) -> None:
    import numpy as np

    multiply, add = np.multiply, np.add
    for _ in range(repeats):
        add(multiply(a, b), c)


def _repeats(run: Callable[[int], object]) -> int:
    """How often to repeat so that a sample lasts about SAMPLE_NS."""
    run(2)
    repeats = 1
    while True:
        start = time.thread_time_ns()
        run(repeats)
        elapsed = time.thread_time_ns() - start
        if elapsed >= SAMPLE_NS / 4:
            return max(1, round(repeats * SAMPLE_NS / elapsed))
        repeats *= 4


def _warm(run: Callable[[int], object]) -> None:
    """Repeat until the operation has had WARM_NS, twice at least: a pool may have decayed."""
    start = time.thread_time_ns()
    run(2)
    while time.thread_time_ns() - start < WARM_NS:
        run(1)


def _median_time(repeats: int, run: Callable[[int], object]) -> float:
    """CPU ns per operation: the median of five samples."""
    return statistics.median(_timed(repeats, run)[0] for _ in range(5))


def _timed(repeats: int, run: Callable[[int], object]) -> tuple[float, float]:
    """(CPU ns, page faults) per operation of this thread."""
    faults = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    start = time.thread_time_ns()
    run(repeats)
    elapsed = time.thread_time_ns() - start
    faults = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - faults
    return elapsed / repeats, faults / repeats


def _run_zeros(repeats: int, count: int) -> None:
    import numpy as np

    zeros = np.zeros
    for _ in range(repeats):
        zeros(count)


def _run_zeros_touched(repeats: int, count: int) -> None:
    import numpy as np

    zeros = np.zeros
    for _ in range(repeats):
        zeros(count).fill(1.5)


def _run_empty(repeats: int, count: int) -> None:
    import numpy as np

    empty = np.empty
    for _ in range(repeats):
        empty(count)


def _run_empty_held(repeats: int, count: int) -> None:
    """A thousand arrays live at once: more than NumPy's cache of seven per size holds."""
    import numpy as np

    empty = np.empty
    for _ in range(max(1, repeats // 1000)):
        held = [empty(count) for _ in range(1000)]
        held.clear()


def _use_times(use: Callable[[Any], Any], pool: Any) -> tuple[float, float]:
    """Median ns of entering and of leaving `with use(pool)`, less the clock's own time."""
    now = time.perf_counter_ns
    entering, leaving, clock = [], [], []
    for _ in range(20_000):
        start = now()
        with use(pool):
            entered = now()
        left = now()
        clock.append(now() - left)
        entering.append(entered - start)
        leaving.append(left - entered)
    own = statistics.median(clock)
    return statistics.median(entering) - own, statistics.median(leaving) - own


class ArraysWorker:
    """Answers the driver's questions; keeps what it calibrated."""

    def __init__(self) -> None:
        self._expressions: dict[int, Expression] = {}
        self._counts: dict[Any, int] = {}
        self._neighbours: Any = None

    def answer(self, request: Mapping[str, Any]) -> Any:
        return getattr(self, "_do_" + request["do"])(request)

    def _do_expression(self, request: Mapping[str, Any]) -> list[dict[str, float]]:
        size, pair_count = request["size_bytes"], request["pair_count"]
        if size not in self._expressions:
            self._expressions[size] = Expression(size)
        samples = self._expressions[size].visit(pair_count)
        if request["transient"]:
            del self._expressions[size]
        return samples

    def _do_forget(self, request: Mapping[str, Any]) -> None:
        self._expressions.clear()
        gc.collect()

    def _calibrated(self, key: Any, run: Callable[[int], object]) -> int:
        if key not in self._counts:
            self._counts[key] = _repeats(run)
        return self._counts[key]

    def _do_zeros(self, request: Mapping[str, Any]) -> dict[str, float]:
        count = request["size_bytes"] // 8
        measured = {}
        for name, function in (("untouched", _run_zeros), ("touched", _run_zeros_touched)):
            run = lambda n, function=function: function(n, count)  # noqa: E731
            repeats = self._calibrated(("zeros", name, count), run)
            _warm(run)
            measured[name] = _median_time(repeats, run)
        return measured

    def _do_threads(self, request: Mapping[str, Any]) -> dict[str, float]:
        """CPU and wall ns per operation: alone, with two threads, and the floor of both."""
        import numpy as np

        count = request["size_bytes"] // 8
        inputs = [tuple(np.full(count, 1.5) for _ in range(3)) for _ in range(2)]
        outputs = [tuple(_mapped(count * 8) for _ in range(2)) for _ in range(2)]
        runs = {
            "operation": [lambda n, i=i: _run_expression(n, *inputs[i]) for i in range(2)],
            "floor": [lambda n, i=i: _run_floor(n, *inputs[i], *outputs[i]) for i in range(2)],
        }
        measured = {}
        for name, pair in runs.items():
            repeats = 4 * self._calibrated((name, count), pair[0])
            measured[f"{name} alone"], measured[f"{name} alone wall"] = _in_threads(
                repeats, pair[:1]
            )
            measured[f"{name} both"], measured[f"{name} both wall"] = _in_threads(repeats, pair)
        return measured

    def _do_tail(self, request: Mapping[str, Any]) -> dict[str, list[float]]:
        """µs of operations on 1 MiB; before each, one of 64 neighbours changes its size."""
        import numpy as np

        if self._neighbours is None:
            source = random.Random(7)
            arrays = tuple(np.full(MIB // 8, 1.5) for _ in range(3))
            self._neighbours = (source, arrays, [np.ones(MIB // 8) for _ in range(64)])
        source, (a, b, c), neighbours = self._neighbours
        multiply, add, empty = np.multiply, np.add, np.empty
        wall_now, cpu_now = time.perf_counter_ns, time.thread_time_ns
        wall, cpu = [], []
        for index in range(-64, request["operations"]):
            slot = source.randrange(64)
            count = int(source.uniform(0.25, 2.0) * MIB) // 8
            cpu_start, wall_start = cpu_now(), wall_now()
            neighbours[slot] = empty(count)
            add(multiply(a, b), c)
            wall_end, cpu_end = wall_now(), cpu_now()
            neighbours[slot].fill(0.5)
            if index >= 0:  # the first 64 only warm up
                wall.append((wall_end - wall_start) / 1000)
                cpu.append((cpu_end - cpu_start) / 1000)
        return {"wall": wall, "cpu": cpu}

    def _do_small(self, request: Mapping[str, Any]) -> dict[str, float]:
        count = request["size_bytes"] // 8
        measured = {}
        for name, function in (("single", _run_empty), ("held", _run_empty_held)):
            run = lambda n, function=function: function(n, count)  # noqa: E731
            repeats = max(1000, self._calibrated(("small", name, count), run) // 1000 * 1000)
            _warm(run)
            measured[name] = _median_time(repeats, run)
        return measured

    def _do_use(self, request: Mapping[str, Any]) -> dict[str, float]:
        """In one process without install(): np.empty plain and inside `use`; entering `use`."""
        from moirai import memory

        pool = memory.PoolResource()
        measured: dict[str, float] = {}

        measured["enter"], measured["leave"] = _use_times(memory.use, pool)
        for size in SMALL_SIZES:
            for name, function in (("single", _run_empty), ("held", _run_empty_held)):
                run = lambda n, f=function, size=size: f(n, size // 8)  # noqa: E731
                repeats = max(1000, self._calibrated(("use", name, size), run) // 1000 * 1000)
                _warm(run)
                measured[f"{name} {size} plain"] = _median_time(repeats, run)
                with memory.use(pool):
                    _warm(run)
                    measured[f"{name} {size} use"] = _median_time(repeats, run)
        return measured


def _in_threads(repeats: int, runs: Sequence[Callable[[int], object]]) -> tuple[float, float]:
    """(mean CPU ns, wall ns) per operation when each thread does `repeats` at the same time."""
    barrier = threading.Barrier(len(runs))
    cpu: list[float] = []
    spans: list[tuple[int, int]] = []

    def body(run: Callable[[int], object]) -> None:
        run(2)
        barrier.wait()
        wall_start = time.perf_counter_ns()
        elapsed, _ = _timed(repeats, run)
        spans.append((wall_start, time.perf_counter_ns()))
        cpu.append(elapsed)

    # A handler is a context variable: threads get a copy of this context, not an empty one.
    contexts = [copy_context() for _ in runs]
    threads = [
        threading.Thread(target=context.run, args=(body, run))
        for context, run in zip(contexts, runs, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wall = max(end for _, end in spans) - min(start for start, _ in spans)
    return sum(cpu) / len(cpu), wall / repeats


if __name__ == "__main__":  # python arrays_worker.py --worker HANDLER
    harness.enter_handler(sys.argv[2])
    harness.serve(ArraysWorker().answer)
