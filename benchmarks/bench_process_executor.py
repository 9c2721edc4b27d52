"""What does a call in another process cost, and what do 16 MiB arrays in it cost, by executor?

Two worker processes for each subject, all started by one process. In each round every subject runs
each workload once, subjects in turn. Garbage collection is off within a workload, for all.

- submit and gather: a future for each of many trivial calls, then all results (joblib puts calls
  into batches by itself);
- map: the results of many trivial calls, in chunks;
- latency: one call, and waiting for its result, for many in turn;
- arrays: eight calls at once, each with an array of its own to sum up, or that gives one back, or
  both. joblib hands arrays over in files that workers map (its memmapping), results as pickles.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import gc
import multiprocessing
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import joblib
import loky
import numpy as np

import harness
from harness import BASELINE, MOIRAI, Goal
from moirai import memory
from moirai.executor import ProcessExecutor

QUESTION = __doc__.partition("\n")[0]
NAME = "bench_process_executor"
WORKERS = 2
ARRAYS = 8
LENT = "moirai-lent"
Samples = dict[str, list[float]]


def nothing() -> None:
    return None


def same(item: object) -> object:
    return item


def total(array: Any) -> float:
    return float(array.sum())


def ones(length: int) -> Any:
    return np.ones(length)


def doubled(array: Any) -> Any:
    return array * 2


_lending: memory.SharedMemoryResource | None = None


def lending() -> memory.SharedMemoryResource:
    """Shared memory of this process, in a worker as well."""
    global _lending
    if _lending is None:
        _lending = memory.SharedMemoryResource("512 MiB")
    return _lending


def lent_ones(length: int) -> Any:
    with memory.use(lending()):
        return np.ones(length)


def lent_doubled(array: Any) -> Any:
    with memory.use(lending()):
        return array * 2


# === what is compared ===========================================================================


@dataclass(frozen=True)
class Subject:
    """One way to run calls in two processes.

    Attributes:
        label: For people.
        make: Makes the executor.
        gather: From the executor, a function and items: the results of a call for each.
        map: From the executor, a function and items: the same, in chunks; None: as gather.
        end: Ends the executor.
        is_lent: Whether arrays are made in shared memory.
    """

    label: str
    make: Callable[[], Any]
    gather: Callable[[Any, Callable[..., Any], Sequence[Any]], list[Any]]
    map: Callable[[Any, Callable[..., Any], Sequence[Any]], Any] | None
    end: Callable[[Any], Any]
    is_lent: bool = False


def _futures(executor: Any, function: Callable[..., Any], items: Sequence[Any]) -> list[Any]:
    futures = [executor.submit(function, item) for item in items]
    return [future.result() for future in futures]


def _pool(pool: Any, function: Callable[..., Any], items: Sequence[Any]) -> list[Any]:
    results = [pool.apply_async(function, (item,)) for item in items]
    return [result.get() for result in results]


def _parallel(parallel: Any, function: Callable[..., Any], items: Sequence[Any]) -> list[Any]:
    return parallel(joblib.delayed(function)(item) for item in items)


def _chunks_of_1000(executor: Any, function: Callable[..., Any], items: Sequence[Any]) -> Any:
    return list(executor.map(function, items, chunksize=1000))


def _map(executor: Any, function: Callable[..., Any], items: Sequence[Any]) -> Any:
    return list(executor.map(function, items))


def _shutdown(executor: Any) -> None:
    executor.shutdown()


def _end_pool(pool: Any) -> None:
    pool.close()
    pool.join()


def _parallel_of_joblib() -> Any:
    return joblib.Parallel(WORKERS, backend="loky", max_nbytes="1M").__enter__()


def _end_parallel(parallel: Any) -> None:
    parallel.__exit__(None, None, None)
    joblib.externals.loky.get_reusable_executor().shutdown(wait=True)


SUBJECTS: dict[str, Subject] = {
    BASELINE: Subject(
        "ProcessPoolExecutor",
        lambda: concurrent.futures.ProcessPoolExecutor(WORKERS),
        _futures,
        _chunks_of_1000,
        _shutdown,
    ),
    "mp-pool": Subject(
        "multiprocessing.Pool", lambda: multiprocessing.Pool(WORKERS), _pool, _map, _end_pool
    ),
    "loky": Subject(
        "loky", lambda: loky.ProcessPoolExecutor(WORKERS), _futures, _chunks_of_1000, _shutdown
    ),
    "joblib": Subject(
        "joblib, loky with memmapping", _parallel_of_joblib, _parallel, None, _end_parallel
    ),
    MOIRAI: Subject("Moirai", lambda: ProcessExecutor(WORKERS), _futures, _map, _shutdown),
    LENT: Subject(
        "Moirai, arrays in shared memory",
        lambda: ProcessExecutor(WORKERS),
        _futures,
        _map,
        _shutdown,
        is_lent=True,
    ),
}


@contextlib.contextmanager
def made(subjects: Mapping[str, Subject]) -> Iterator[dict[str, Any]]:
    """An executor of each subject, with its workers started."""
    executors = {}
    try:
        for name, subject in subjects.items():
            executors[name] = subject.make()
            subject.gather(executors[name], same, range(20))
        yield executors
    finally:
        for name, executor in executors.items():
            subjects[name].end(executor)


def timed(body: Callable[[], Any], count: int) -> float:
    """Seconds of wall time for each of `count`."""
    gc.collect()
    gc.disable()
    try:
        started = time.perf_counter()
        body()
        return (time.perf_counter() - started) / count
    finally:
        gc.enable()


# === workloads ==================================================================================


def small(
    executors: Mapping[str, Any],
    subjects: Mapping[str, Subject],
    rounds: int,
    run: Callable[[Subject, Any], Any],
    count: int,
) -> Samples:
    """Microseconds of a trivial call."""
    found: Samples = defaultdict(list)
    subjects = {name: subject for name, subject in subjects.items() if not subject.is_lent}
    for _, name in harness.interleaved(subjects, rounds):
        subject, executor = subjects[name], executors[name]
        body = lambda subject=subject, executor=executor: run(subject, executor)  # noqa: E731
        found[name].append(1e6 * timed(body, count))
    return dict(found)


def _latency(subject: Subject, executor: Any, count: int) -> None:
    for _ in range(count):
        subject.gather(executor, same, (None,))


def arrays(
    executors: Mapping[str, Any],
    subjects: Mapping[str, Subject],
    rounds: int,
    way: str,
    length: int,
) -> Samples:
    """Milliseconds of a call with an array; the first round is to warm up, and left out."""
    found: Samples = defaultdict(list)
    for index, name in harness.interleaved(subjects, rounds + 1):
        subject, executor = subjects[name], executors[name]
        make, double = (lent_ones, lent_doubled) if subject.is_lent else (ones, doubled)
        function: Callable[..., Any] = {"in": total, "out": make, "in and out": double}[way]
        items = [length] * ARRAYS if way == "out" else [make(length) for _ in range(ARRAYS)]

        def body(
            subject: Subject = subject,
            executor: Any = executor,
            function: Callable[..., Any] = function,
            items: Sequence[Any] = items,
        ) -> None:
            results = subject.gather(executor, function, items)
            expected = {"in": float(length), "out": 1.0, "in and out": 2.0}[way]
            for result in results:
                assert (result if way == "in" else result[-1]) == expected

        sample = 1e3 * timed(body, ARRAYS)
        del items
        if index > 0:
            found[name].append(sample)
    return dict(found)


# === report =====================================================================================


def _table(title: str, columns: Mapping[str, Samples], labels: Mapping[str, str]) -> str:
    rows = []
    for name, label in labels.items():
        if not any(name in column for column in columns.values()):
            continue
        cells = [label]
        for column in columns.values():
            if name not in column:
                cells.append("")
                continue
            cell = f"{harness.median(column[name]):.2f}"
            if BASELINE in column:
                ratio = harness.median(harness.round_ratios(column)[name])
                cell += f" ({1 / ratio:.1f})"
            cells.append(cell)
        rows.append(cells)
    return f"{title}\n\n{harness.markdown_table(['', *columns], rows)}"


def render(results: Mapping[str, Any], size_label: str) -> str:
    """The tables, as Markdown."""
    labels = {name: subject.label for name, subject in SUBJECTS.items()}
    speed = "(how many times faster than ProcessPoolExecutor)"
    calls = ("submit and gather", "map", "latency")
    ways = ("in", "out", "in and out")
    return "\n\n".join(
        [
            _table(
                f"**µs of a trivial call** {speed}", {name: results[name] for name in calls}, labels
            ),
            _table(
                f"**ms of a call with arrays of {size_label}** {speed}",
                {f"array {way}": results[way] for way in ways},
                labels,
            ),
        ]
    )


def digest(results: Mapping[str, Any], size_label: str) -> str:
    """One table: ours beside `ProcessPoolExecutor` and the fastest peer."""
    titles = {
        "submit and gather": "submit and gather",
        "map": "map",
        "latency": "one call and its result",
        "in": f"an array of {size_label} as argument",
        "out": f"an array of {size_label} as result",
        "in and out": "an array as both",
    }
    usual = SUBJECTS[BASELINE].label
    return harness.digest(
        [
            harness.Comparison(
                title,
                {subject.label: results[way].get(name, []) for name, subject in SUBJECTS.items()},
                usual,
                SUBJECTS[MOIRAI].label,
            )
            for way, title in titles.items()
        ],
        f"time of a call over `{usual}`'s",
    )


def goals(results: Mapping[str, Any]) -> list[Goal]:
    """The project's goals; empty without a Moirai row."""
    found = []

    def over(text: str, samples: Samples, peer: str, limit: float, ours: str = MOIRAI) -> None:
        if peer in samples and ours in samples:
            ratio = harness.median(harness.round_ratios(samples, peer)[ours])
            found.append(Goal(text, ratio, limit))

    over("submit and gather, over ProcessPoolExecutor", results["submit and gather"], BASELINE, 0.5)
    over("submit and gather, over Pool", results["submit and gather"], "mp-pool", 1 / 1.2)
    over("map, over Pool", results["map"], "mp-pool", 1.0)
    for way in ("in", "out", "in and out"):
        over(f"arrays {way}, over ProcessPoolExecutor", results[way], BASELINE, 0.1)
        over(f"arrays {way}, over loky", results[way], "loky", 0.1)
        over(f"arrays {way}, over joblib", results[way], "joblib", 1.0)
    return found


def measure(arguments: argparse.Namespace) -> harness.Report:
    """All tables."""
    names = arguments.configurations
    subjects = {
        name: subject for name, subject in SUBJECTS.items() if names is None or name in names
    }
    rounds, quick = arguments.rounds, arguments.quick
    calls = 100 if quick else 2_000
    items = 2_000 if quick else 50_000
    waits = 20 if quick else 300
    size_bytes = 1 << 20 if quick else 16 << 20
    results: dict[str, Any] = {}
    with made(subjects) as executors:
        harness.progress("submit and gather")
        results["submit and gather"] = small(
            executors,
            subjects,
            rounds,
            lambda subject, executor: subject.gather(executor, same, range(calls)),
            calls,
        )
        harness.progress("map")
        results["map"] = small(
            executors,
            subjects,
            rounds,
            lambda subject, executor: (subject.map or subject.gather)(executor, same, range(items)),
            items,
        )
        harness.progress("latency")
        able = {name: subject for name, subject in subjects.items() if name != "joblib"}
        results["latency"] = small(
            executors,
            able,
            rounds,
            lambda subject, executor: _latency(subject, executor, waits),
            waits,
        )
        for way in ("in", "out", "in and out"):
            harness.progress(f"arrays {way}")
            results[way] = arrays(executors, subjects, rounds, way, size_bytes // 8)
    parameters = {
        "rounds": rounds,
        "workers": WORKERS,
        "calls": calls,
        "items": items,
        "waits": waits,
        "size_bytes": size_bytes,
        "quick": quick,
        "labels": {name: subject.label for name, subject in subjects.items()},
    }
    label = harness.size_label(size_bytes)
    return harness.Report(
        NAME,
        QUESTION,
        parameters,
        results,
        render(results, label),
        goals(results),
        digest(results, label),
    )


if __name__ == "__main__":
    sys.exit(harness.main_of_rounds(QUESTION, measure, 7, 2))
