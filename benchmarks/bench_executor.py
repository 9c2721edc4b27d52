"""What does a task cost: queueing a call for a thread and having its result, by executor?

Everything runs in one process with two workers for each subject. In each round every subject runs
each workload once, subjects in turn. Garbage collection is off within a workload, for all.

- submit and gather: a future for each of many trivial calls, then all results;
- map: the results of many trivial calls, in order;
- fork-join: calls that submit two calls and wait for them; only where that does not hang;
- latency: one call, and waiting for its result, for many in turn; with other threads idle, and with
  one or two that run Python code. By `result()`, where who waits may run the call itself, and by
  `result(timeout)`, which leaves it to a worker;
- from asyncio: `run_in_executor`, gathered, and `asyncio.to_thread`, which has threads of its own;
- two workers that compress, which releases the GIL;
- urgent calls while many calls of low priority wait, all of which release the GIL.
"""

from __future__ import annotations

import argparse
import asyncio
import concurrent.futures
import contextlib
import gc
import itertools
import multiprocessing.pool
import sys
import threading
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import dask.threaded
import joblib
import tbb
import threadlet

import harness
from harness import BASELINE, MOIRAI, Goal
from moirai.executor import Executor, Priority

QUESTION = __doc__.partition("\n")[0]
NAME = "bench_executor"
WORKERS = 2
ASYNC_PEER, TO_THREAD = "hypertile", "to_thread"
Samples = dict[str, list[float]]

Submit = Callable[..., Callable[..., Any]]


def nothing() -> None:
    return None


def same(item: object) -> object:
    return item


# === what is compared ===========================================================================


@dataclass(frozen=True)
class Subject:
    """One way to run calls on two threads.

    Attributes:
        label: For people.
        make: Makes the executor.
        gather: From the executor and a count: so many calls, then their results.
        maps: By label, from the executor and items: a list of results.
        wait: From the executor and a function: one call, and its result by a worker.
        end: Ends the executor.
    """

    label: str
    make: Callable[[], Any]
    gather: Callable[[Any, int], None]
    maps: Mapping[str, Callable[[Any, Sequence[Any]], Any]]
    wait: Callable[[Any, Callable[[], Any]], Any] | None
    end: Callable[[Any], Any]


def _gather_futures(executor: Any, count: int) -> None:
    submit = executor.submit
    futures = [submit(nothing) for _ in range(count)]
    for future in futures:
        future.result()


def _gather_pool(pool: Any, count: int) -> None:
    results = [pool.apply_async(nothing) for _ in range(count)]
    for result in results:
        result.get()


def _gather_group(group: Any, count: int) -> None:
    for _ in range(count):
        group.run(nothing)
    group.wait()


def _gather_parallel(parallel: Any, count: int) -> None:
    parallel(joblib.delayed(nothing)() for _ in range(count))


def _gather_graph(_: Any, count: int) -> None:
    graph = dict.fromkeys(range(count), (nothing,))
    dask.threaded.get(graph, list(graph), num_workers=WORKERS)


def _submit_many(executor: Any, items: Sequence[Any]) -> Any:
    return [future.result() for future in executor.submit_many(same, items)]


def _shutdown(executor: Any) -> None:
    executor.shutdown()


def _nothing_to_end(executor: Any) -> None:
    return None


def _end_pool(pool: Any) -> None:
    pool.close()
    pool.join()


def _wait_or_give_up(executor: concurrent.futures.Executor, call: Callable[[], Any]) -> None:
    """Of a peer that now and then wakes no worker: such a call counts as the 2 s that it had."""
    with contextlib.suppress(concurrent.futures.TimeoutError):
        executor.submit(call).result(2)


SUBJECTS: dict[str, Subject] = {
    BASELINE: Subject(
        "ThreadPoolExecutor",
        lambda: concurrent.futures.ThreadPoolExecutor(WORKERS),
        _gather_futures,
        {"one by one": lambda executor, items: list(executor.map(same, items))},
        lambda executor, call: executor.submit(call).result(60),
        _shutdown,
    ),
    "threadlet": Subject(
        "threadlet",
        lambda: threadlet.ThreadPoolExecutor(WORKERS),
        _gather_futures,
        {"one by one": lambda executor, items: list(executor.map(same, items))},
        _wait_or_give_up,
        _shutdown,
    ),
    "thread-pool": Subject(
        "multiprocessing ThreadPool",
        lambda: multiprocessing.pool.ThreadPool(WORKERS),
        _gather_pool,
        {
            "one by one": lambda pool, items: pool.map(same, items, chunksize=1),
            "in chunks": lambda pool, items: pool.map(same, items),
        },
        lambda pool, call: pool.apply_async(call).get(60),
        _end_pool,
    ),
    "tbb": Subject("TBB task group", tbb.task_group, _gather_group, {}, None, _nothing_to_end),
    "joblib": Subject(
        "joblib, threads",
        lambda: joblib.Parallel(n_jobs=WORKERS, backend="threading"),
        _gather_parallel,
        {},
        None,
        _nothing_to_end,
    ),
    "tbb-pool": Subject(
        "TBB pool",
        lambda: tbb.Pool(WORKERS),
        _gather_pool,
        {"one by one": lambda pool, items: pool.map(same, items, chunksize=1)},
        lambda pool, call: pool.apply_async(call).get(60),
        _end_pool,
    ),
    "dask": Subject("Dask, threads", lambda: None, _gather_graph, {}, None, _nothing_to_end),
    MOIRAI: Subject(
        "Moirai",
        lambda: Executor(WORKERS),
        _gather_futures,
        {
            "one by one": _submit_many,
            "in chunks": lambda executor, items: list(executor.map(same, items)),
        },
        lambda executor, call: executor.submit(call).result(60),
        _shutdown,
    ),
}


@contextlib.contextmanager
def quiet_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def timed(body: Callable[[], Any], count: int) -> float:
    """Microseconds of wall time for each of `count`."""
    with quiet_collector():
        started = time.perf_counter()
        body()
        return (time.perf_counter() - started) / count * 1e6


@contextlib.contextmanager
def made(subjects: Mapping[str, Subject]) -> Iterator[dict[str, Any]]:
    """An executor of each subject, with its workers started."""
    executors = {name: subject.make() for name, subject in subjects.items()}
    try:
        for name, executor in executors.items():
            subjects[name].gather(executor, 100)
        yield executors
    finally:
        for name, executor in executors.items():
            subjects[name].end(executor)


# === workloads ==================================================================================


def gathered(subjects: Mapping[str, Subject], rounds: int, count: int) -> Samples:
    """Microseconds of a call, queued alone and gathered with the others."""
    found: Samples = defaultdict(list)
    with made(subjects) as executors:
        for _, name in harness.interleaved(subjects, rounds):
            gather, executor = subjects[name].gather, executors[name]
            body = lambda gather=gather, executor=executor: gather(executor, count)  # noqa: E731
            found[name].append(timed(body, count))
    return dict(found)


def mapped(subjects: Mapping[str, Subject], how: str, rounds: int, count: int) -> Samples:
    """Microseconds of a call of a map."""
    found: Samples = defaultdict(list)
    able = {name: subject for name, subject in subjects.items() if how in subject.maps}
    items = range(count)
    with made(able) as executors:
        for _, name in harness.interleaved(able, rounds):
            body, executor = able[name].maps[how], executors[name]
            found[name].append(
                timed(lambda body=body, executor=executor: body(executor, items), count)
            )
    return dict(found)


def fork_join(names: Sequence[str] | None, rounds: int, depth: int) -> Samples:
    """Microseconds of a call that submits two and waits for them."""

    def with_moirai(executor: Executor, depth: int) -> None:
        if depth:
            first = executor.submit(with_moirai, executor, depth - 1)
            second = executor.submit(with_moirai, executor, depth - 1)
            first.result()
            second.result()

    def with_tbb(depth: int) -> None:
        if depth:
            group = tbb.task_group()
            group.run(lambda: with_tbb(depth - 1))
            group.run(lambda: with_tbb(depth - 1))
            group.wait()

    with Executor(WORKERS) as executor:
        bodies = {
            "tbb": lambda: with_tbb(depth),
            MOIRAI: lambda: executor.submit(with_moirai, executor, depth).result(),
        }
        bodies = {name: body for name, body in bodies.items() if names is None or name in names}
        found: Samples = defaultdict(list)
        for _, name in harness.interleaved(bodies, rounds):
            found[name].append(timed(bodies[name], 2 ** (depth + 1) - 1))
    return dict(found)


def latencies(body: Callable[[], Any], count: int) -> list[float]:
    """Microseconds of each of so many."""
    clock = time.perf_counter_ns
    found = []
    with quiet_collector():
        for _ in range(count):
            started = clock()
            body()
            found.append((clock() - started) / 1e3)
    return found


HELPING = "moirai-helping"
# How many other threads run Python code.
BUSY = {"one thread busy": 1, "two threads busy": 2}


def waited(subjects: Mapping[str, Subject], rounds: int, count: int, busy_count: int) -> Samples:
    """Microseconds from a call's submission to its result, one by one."""
    stop = threading.Event()

    def work() -> None:
        number = 0
        while not stop.is_set():
            for number in range(1000):
                number += 1

    found: Samples = defaultdict(list)
    able = {name: subject for name, subject in subjects.items() if subject.wait}
    with made(able) as executors:
        bodies = {
            name: (lambda wait=subject.wait, executor=executors[name]: wait(executor, nothing))
            for name, subject in able.items()
        }
        if MOIRAI in executors:
            executor = executors[MOIRAI]
            bodies[HELPING] = lambda: executor.submit(nothing).result()
        threads = [threading.Thread(target=work) for _ in range(busy_count)]
        for thread in threads:
            thread.start()
        try:
            for _, name in harness.interleaved(bodies, rounds):
                found[name].extend(latencies(bodies[name], count))
        finally:
            stop.set()
            for thread in threads:
                thread.join()
    return dict(found)


def bridged(names: Sequence[str] | None, rounds: int, count: int) -> Samples:
    """Microseconds of a call from asyncio, gathered with the others."""
    import hypertile

    async def in_executor(executor: Any) -> None:
        run = asyncio.get_running_loop().run_in_executor
        await asyncio.gather(*(run(executor, nothing) for _ in range(count)))

    async def to_thread() -> None:
        await asyncio.gather(*(asyncio.to_thread(nothing) for _ in range(count)))

    async def in_batch() -> None:
        await hypertile.gather_to_thread(same, range(count))

    async def many_at_once(executor: Executor) -> None:
        run = asyncio.get_running_loop().run_in_executor
        await run(executor, _submit_many, executor, range(count))

    peer = concurrent.futures.ThreadPoolExecutor(WORKERS)
    ours = Executor(WORKERS)
    mains = {
        BASELINE: lambda: in_executor(peer),
        MOIRAI: lambda: in_executor(ours),
        TO_THREAD: to_thread,
        ASYNC_PEER: in_batch,
        "moirai-batch": lambda: many_at_once(ours),
    }
    kept = {name: main for name, main in mains.items() if names is None or name in names}
    found: Samples = defaultdict(list)
    with peer, ours:
        for _, name in harness.interleaved(kept, rounds):
            main = kept[name]
            found[name].append(timed(lambda main=main: asyncio.run(main()), count))
    return dict(found)


def compressed(subjects: Mapping[str, Subject], rounds: int, count: int) -> Samples:
    """Milliseconds to compress so many blocks of 64 KiB on both cores."""
    block = bytes(itertools.islice(itertools.cycle(range(251)), 65536))

    def compress(_: object) -> int:
        return len(zlib.compress(block, 6))

    kept = [name for name in (BASELINE, MOIRAI) if name in subjects]
    found: Samples = defaultdict(list)
    with made({name: subjects[name] for name in kept}) as executors:
        for _, name in harness.interleaved(kept, rounds):
            executor = executors[name]
            body = lambda executor=executor: list(executor.map(compress, range(count)))  # noqa: E731
            found[name].append(timed(body, 1) / 1e3)
    return dict(found)


def urgent(count: int, background_count: int) -> Samples:
    """Microseconds from an urgent call's submission to its start in a worker."""
    block = bytes(4096)

    def compress(_: object = None) -> None:
        zlib.crc32(block * 4)  # releases the GIL above 5 KiB

    clock = time.perf_counter_ns
    found: Samples = {}
    for name, waiting in (("idle", 0), ("while background tasks wait", background_count)):
        with Executor(WORKERS) as executor:
            executor.submit(nothing).result(60)
            queued = executor.submit_many(compress, range(waiting), priority=Priority.BACKGROUND)
            samples = []
            for _ in range(count):
                started = clock()
                begun = executor.submit(clock, priority=Priority.REALTIME).result(60)
                samples.append((begun - started) / 1e3)
            found[name] = samples
            left = sum(not future.done() for future in queued)
            executor.shutdown(cancel_futures=True)
            if waiting:
                found["background tasks left"] = [float(left)]
    return found


# === report =====================================================================================


def _table(title: str, columns: Mapping[str, Samples], labels: Mapping[str, str]) -> str:
    names = [name for name in labels if any(name in column for column in columns.values())]
    rows = []
    for name in names:
        cells = [labels[name]]
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


def _latency_table(title: str, samples: Samples, labels: Mapping[str, str]) -> str:
    shares = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999}
    rows = [
        [labels[name], *(f"{harness.percentile(samples[name], it):.1f}" for it in shares.values())]
        for name in labels
        if name in samples
    ]
    return f"{title}\n\n{harness.markdown_table(['', *shares], rows)}"


def _labels() -> dict[str, str]:
    return {
        **{name: subject.label for name, subject in SUBJECTS.items()},
        HELPING: "Moirai, who waits runs it",
        TO_THREAD: "asyncio.to_thread",
        ASYNC_PEER: "hypertile, one batch",
        "moirai-batch": "Moirai, submit_many in a task",
    }


def render(results: Mapping[str, Any]) -> str:
    """The tables, as Markdown."""
    labels = _labels()
    urgent_labels = {name: name for name in results["urgent"] if "left" not in name}
    speed = "(how many times faster than ThreadPoolExecutor)"
    tables = [
        _table(
            f"**µs of a trivial call** {speed}",
            {
                "submit and gather": results["gathered"],
                "map, a task each": results["mapped one by one"],
                "map": results["mapped in chunks"],
                "fork-join": results["forked"],
                "from asyncio": results["bridged"],
            },
            labels,
        ),
        _latency_table("**µs from submit to result**", results["waited"], labels),
        *(
            _latency_table(f"**µs from submit to result, {name} with Python code**", it, labels)
            for name, it in results.items()
            if name in BUSY
        ),
        _table(
            f"**ms to compress blocks with two workers** {speed}",
            {"zlib": results["compressed"]},
            labels,
        ),
        _latency_table(
            "**µs from an urgent submit to its start**", results["urgent"], urgent_labels
        ),
    ]
    left = results["urgent"]["background tasks left"][0]
    tables.append(f"{left:.0f} background tasks still waited when the last urgent one was done.")
    return "\n\n".join(tables)


def digest(results: Mapping[str, Any]) -> str:
    """One table: ours beside `ThreadPoolExecutor` and the fastest peer."""
    labels = _labels()
    usual = labels[BASELINE]
    rows = {
        "submit and gather": ("gathered", MOIRAI),
        "map, a task each": ("mapped one by one", MOIRAI),
        "one call and its result": ("waited", MOIRAI),
        "from asyncio": ("bridged", MOIRAI),
        "from asyncio, in a batch": ("bridged", "moirai-batch"),
        "compressing blocks": ("compressed", MOIRAI),
    }
    return harness.digest(
        [
            harness.Comparison(
                title,
                {
                    labels[name]: samples
                    for name, samples in results[key].items()
                    if ours != MOIRAI or name != ASYNC_PEER  # It takes all calls at once.
                },
                usual,
                labels[ours],
            )
            for title, (key, ours) in rows.items()
        ],
        f"time of a call over `{usual}`'s",
    )


def goals(results: Mapping[str, Any]) -> list[Goal]:
    """The project's goals; empty without a Moirai row."""
    if MOIRAI not in results["gathered"]:
        return []
    found = []

    def over(text: str, samples: Samples, peer: str, limit: float, ours: str = MOIRAI) -> None:
        if peer in samples and ours in samples:
            ratio = harness.median(samples[ours]) / harness.median(samples[peer])
            found.append(Goal(text, ratio, limit))

    over("submit and gather, over ThreadPoolExecutor", results["gathered"], BASELINE, 1 / 15)
    singles, chunks = results["mapped one by one"], results["mapped in chunks"]
    over("submit_many, over ThreadPool.map of single calls", singles, "thread-pool", 1 / 10)
    over("submit_many, over hypertile's batch", results["bridged"], ASYNC_PEER, 1.0, "moirai-batch")
    over("map, over ThreadPool.map", chunks, "thread-pool", 1.0)
    both = {BASELINE: singles.get(BASELINE, []), MOIRAI: chunks[MOIRAI]}
    if both[BASELINE]:
        over("map, over ThreadPoolExecutor.map", both, BASELINE, 1 / 100)
    over("fork-join, over TBB", results["forked"], "tbb", 1 / 20)
    over("latency by a worker, over ThreadPoolExecutor", results["waited"], BASELINE, 1 / 2.5)
    helping = harness.median(results["waited"][HELPING])
    found.append(Goal("latency where who waits runs it, µs", helping, 2.0))
    busy = results["one thread busy"]
    over("the same under a busy thread, over ThreadPoolExecutor", busy, BASELINE, 1 / 100, HELPING)
    two = results["two threads busy"]
    over("the same under two, over ThreadPoolExecutor", two, BASELINE, 1 / 100, HELPING)
    over("by a worker under a busy thread, over ThreadPoolExecutor", busy, BASELINE, 1.1)
    over("from asyncio, over ThreadPoolExecutor", results["bridged"], BASELINE, 1 / 2)
    over("compressing, over ThreadPoolExecutor", results["compressed"], BASELINE, 1.0)
    tails = [
        harness.percentile(results["urgent"][name], 0.999)
        for name in ("while background tasks wait", "idle")
    ]
    found.append(Goal("urgent p99.9 while others wait, over idle", tails[0] / tails[1], 2.0))
    return found


def measure(arguments: argparse.Namespace) -> harness.Report:
    """All tables."""
    names = arguments.configurations
    subjects = {
        name: subject for name, subject in SUBJECTS.items() if names is None or name in names
    }
    rounds, quick = arguments.rounds, arguments.quick
    tasks = 200 if quick else 5_000
    items = 1_000 if quick else 50_000
    waits = 20 if quick else 500
    results: dict[str, Any] = {}
    harness.progress("submit and gather")
    results["gathered"] = gathered(subjects, rounds, tasks)
    for how, count in (("one by one", tasks), ("in chunks", items)):
        harness.progress(f"map {how}")
        results[f"mapped {how}"] = mapped(subjects, how, rounds, count)
    harness.progress("fork-join")
    results["forked"] = fork_join(names, rounds, 5 if quick else 11)
    harness.progress("latency")
    results["waited"] = waited(subjects, rounds, waits, 0)
    for name, busy_count in BUSY.items():
        harness.progress(f"latency, {name}")
        results[name] = waited(subjects, min(rounds, 5), max(2, waits // 10), busy_count)
    harness.progress("asyncio")
    results["bridged"] = bridged(names, rounds, tasks)
    harness.progress("compression")
    results["compressed"] = compressed(subjects, rounds, 20 if quick else 200)
    harness.progress("urgent tasks")
    results["urgent"] = urgent(50 if quick else 3_000, 1_000 if quick else 100_000)
    parameters = {
        "rounds": rounds,
        "workers": WORKERS,
        "tasks": tasks,
        "items": items,
        "waits": waits,
        "quick": quick,
        "labels": {name: subject.label for name, subject in subjects.items()},
    }
    return harness.Report(
        NAME, QUESTION, parameters, results, render(results), goals(results), digest(results)
    )


if __name__ == "__main__":
    sys.exit(harness.main_of_rounds(QUESTION, measure, 11, 2))
