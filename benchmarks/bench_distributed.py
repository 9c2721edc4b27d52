"""What does the executor over a Dask cluster add to what the cluster itself takes?

One cluster on this machine, of two workers in processes of their own, and one client. In each
round every subject runs each workload once, subjects in turn, each on a cluster that has forgotten
what came before: the client's futures are dropped when their results are there, and what it takes
the scheduler to forget them would be charged to the next subject. Garbage collection is off within
a workload.

- latency: one call, and waiting for its result, for many in turn;
- submit and gather: a future for each of many trivial calls, then all results;
- map: the results of many trivial calls; the client's own `map` makes each a task of the cluster,
  the executor's puts a hundred into a task.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import distributed

import harness
from bench_executor import Samples, latencies, nothing, same, timed
from harness import BASELINE, MOIRAI, Goal
from moirai.integrations.dask import DistributedExecutor

QUESTION = __doc__.partition("\n")[0]
NAME = "bench_distributed"
WORKERS = 2
CHUNK = 100
LABELS = {BASELINE: "distributed.Client", MOIRAI: "Moirai's executor over it"}


def workloads(
    client: Any, executor: DistributedExecutor
) -> dict[str, dict[str, Callable[[int], Any]]]:
    """By workload and subject: what runs so many calls."""
    return {
        "submit and gather": {
            BASELINE: lambda count: client.gather(
                [client.submit(nothing, pure=False) for _ in range(count)]
            ),
            MOIRAI: lambda count: [
                future.result() for future in [executor.submit(nothing) for _ in range(count)]
            ],
        },
        "map": {
            BASELINE: lambda count: client.gather(client.map(same, range(count), pure=False)),
            MOIRAI: lambda count: list(executor.map(same, range(count), chunksize=CHUNK)),
        },
    }


def count_tasks(dask_scheduler: Any) -> int:
    """How many the scheduler knows; run there."""
    return len(dask_scheduler.tasks)


def forget_all(client: Any) -> None:
    """Wait until nothing is left of what was sent."""
    while client.run_on_scheduler(count_tasks):
        time.sleep(0.05)


def measured(client: Any, rounds: int, waits: int, tasks: int) -> dict[str, Samples]:
    """Microseconds of a call, by workload, subject and round."""
    found: dict[str, Samples] = {}
    with DistributedExecutor(client) as executor:
        singles = {
            BASELINE: lambda: client.submit(nothing, pure=False).result(),
            MOIRAI: lambda: executor.submit(nothing).result(),
        }
        harness.progress("latency")
        waited: Samples = defaultdict(list)
        for _, name in harness.interleaved(singles, rounds):
            forget_all(client)
            waited[name].append(harness.median(latencies(singles[name], waits)))
        found["latency"] = dict(waited)
        for workload, bodies in workloads(client, executor).items():
            harness.progress(workload)
            samples: Samples = defaultdict(list)
            for _, name in harness.interleaved(bodies, rounds):
                body = bodies[name]
                forget_all(client)
                samples[name].append(timed(lambda body=body: body(tasks), tasks))
            found[workload] = dict(samples)
    return found


def render(results: Mapping[str, Samples]) -> str:
    """The table, as Markdown."""
    rows = []
    for name, label in LABELS.items():
        cells = [label]
        for samples in results.values():
            ratio = harness.median(harness.round_ratios(samples)[name])
            cells.append(f"{harness.median(samples[name]):.0f} ({ratio:.2f})")
        rows.append(cells)
    title = "**µs of a trivial call** (over the client's own)"
    return f"{title}\n\n{harness.markdown_table(['', *results], rows)}"


def goals(results: Mapping[str, Samples]) -> list[Goal]:
    """The project's goals."""

    def over(workload: str) -> float:
        return harness.median(harness.round_ratios(results[workload])[MOIRAI])

    found = [
        Goal(f"{workload}, over the client's own", over(workload), 1.1)
        for workload in ("latency", "submit and gather")
    ]
    batched = harness.median(results["map"][MOIRAI])
    single = harness.median(results["submit and gather"][BASELINE])
    found.append(Goal("a call in batches of 100, over a single one", batched / single, 1 / 20))
    return found


def measure(arguments: argparse.Namespace) -> harness.Report:
    """The table of a cluster of this machine."""
    quick, rounds = arguments.quick, arguments.rounds
    waits, tasks = (5, 100) if quick else (50, 1000)
    with (
        distributed.LocalCluster(
            n_workers=WORKERS, threads_per_worker=1, processes=True, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        client.wait_for_workers(WORKERS)
        client.gather(client.map(same, range(100), pure=False))
        results = measured(client, rounds, waits, tasks)
    parameters = {
        "rounds": rounds,
        "workers": WORKERS,
        "chunk": CHUNK,
        "waits": waits,
        "tasks": tasks,
        "distributed": distributed.__version__,
        "quick": quick,
    }
    return harness.Report(NAME, QUESTION, parameters, results, render(results), goals(results))


if __name__ == "__main__":
    sys.exit(harness.main_of_rounds(QUESTION, measure, 11, 2))
