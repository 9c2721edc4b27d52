"""What does an executor of threads gain on an interpreter without a GIL, and what does it cost?

The same workloads on two interpreters: the one that runs this script, and a free-threaded one that
has Moirai, which is `--python`, or the one that `make test-freethreaded` has made. Without it only
the first is measured. Each interpreter is a process of its own; they take turns in rounds, and
within a round so do the subjects.

- submit and gather: µs of a trivial call, against ThreadPoolExecutor of the same interpreter;
- two threads: a busy loop in each of two plain threads, over the same two loops in turn;
- fork-join: a tree of calls whose leaves are busy loops of so many µs, by executors of one and of
  two workers; each is compared with the same loops and calls without any executor.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import sys
import sysconfig
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import harness
from harness import BASELINE, MOIRAI, Goal
from moirai.executor import Executor

QUESTION = __doc__.partition("\n")[0]
NAME = "bench_free_threading"
WORKERS = 2
LEAF_MICROSECONDS = (50, 13)
WITH_GIL, WITHOUT_GIL = "with the GIL", "free-threaded"
MADE_BY_TESTS = harness.ROOT / "build" / "venv-freethreaded" / "bin" / "python"

Measured = dict[str, dict[str, float]]


# === one round, in the interpreter that is measured ==============================================


def nothing() -> None:
    return None


def spin(turns: int) -> None:
    for _ in range(turns):
        pass


def seconds(body: Callable[[], Any]) -> float:
    started = time.perf_counter()
    body()
    return time.perf_counter() - started


def turns_of(microseconds: float) -> int:
    """Turns of `spin` that take so long here."""
    turns = 20_000
    once = min(seconds(lambda: spin(turns)) for _ in range(5))
    return max(1, round(turns * microseconds / 1e6 / once))


def gather(executor: concurrent.futures.Executor, count: int) -> None:
    futures = [executor.submit(nothing) for _ in range(count)]
    for future in futures:
        future.result()


def tree(executor: Executor | None, depth: int, turns: int) -> None:
    """A call of a binary tree; without an executor, by plain calls."""
    if not depth:
        spin(turns)
    elif executor is None:
        tree(None, depth - 1, turns)
        tree(None, depth - 1, turns)
    else:
        first = executor.submit(tree, executor, depth - 1, turns)
        second = executor.submit(tree, executor, depth - 1, turns)
        first.result()
        second.result()


def in_threads(turns: int) -> None:
    threads = [threading.Thread(target=spin, args=(turns,)) for _ in range(WORKERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class Subject:
    """The workloads of this interpreter, its executors and loops made once."""

    def __init__(self, tasks: int, depth: int) -> None:
        self.tasks, self.depth = tasks, depth
        self.peer = concurrent.futures.ThreadPoolExecutor(WORKERS)
        self.one, self.two = Executor(1), Executor(WORKERS)
        self.turns = {leaf: turns_of(leaf) for leaf in LEAF_MICROSECONDS}
        self.long = turns_of(20_000)
        for executor in (self.peer, self.one, self.two):
            gather(executor, 100)

    def measure(self) -> Measured:
        """Microseconds of a call, seconds of the rest."""
        found: Measured = {
            "submit and gather": {
                BASELINE: seconds(lambda: gather(self.peer, self.tasks)) / self.tasks * 1e6,
                MOIRAI: seconds(lambda: gather(self.two, self.tasks)) / self.tasks * 1e6,
            },
            "two threads": {
                "one after the other": seconds(lambda: [spin(self.long) for _ in range(WORKERS)]),
                "at once": seconds(lambda: in_threads(self.long)),
            },
        }
        for leaf, turns in self.turns.items():
            found[f"{leaf} µs"] = self._join(turns)
        return found

    def _join(self, turns: int) -> dict[str, float]:
        def by(executor: Executor) -> None:
            executor.submit(tree, executor, self.depth, turns).result()

        return {
            "plain calls": seconds(lambda: tree(None, self.depth, turns)),
            "one worker": seconds(lambda: by(self.one)),
            "two workers": seconds(lambda: by(self.two)),
        }


_subjects: list[Subject] = []


def answer(request: Mapping[str, Any]) -> Any:
    """Say what interpreter this is and make its subject, or measure a round."""
    if request["what"] == "round":
        return _subjects[0].measure()
    _subjects.append(Subject(request["tasks"], request["depth"]))
    has_gil = not sysconfig.get_config_var("Py_GIL_DISABLED") or sys._is_gil_enabled()
    return {"has_gil": bool(has_gil), "version": sys.version.split()[0]}


# === all rounds ==================================================================================


def measure(arguments: argparse.Namespace) -> harness.Report:
    """The tables of the interpreters there are."""
    quick, rounds = arguments.quick, arguments.rounds
    tasks, depth = (200, 4) if quick else (5_000, 9)
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    versions: dict[str, str] = {}
    workers: dict[str, harness.Worker] = {}
    with contextlib.ExitStack() as stack:
        for interpreter in [sys.executable, *([arguments.python] if arguments.python else [])]:
            name = Path(interpreter).name
            worker = harness.Worker(harness.Configuration(name, name), __file__, interpreter)
            stack.callback(worker.close)
            head = worker.ask({"what": "begin", "tasks": tasks, "depth": depth})
            kind = WITH_GIL if head["has_gil"] else WITHOUT_GIL
            if kind in workers:
                raise ValueError(f"python: expected an interpreter that is not {kind} as well")
            workers[kind], versions[kind] = worker, head["version"]
            found[kind] = defaultdict(lambda: defaultdict(list))
        for index, kind in harness.interleaved(workers, rounds):
            harness.progress(f"round {index + 1} of {rounds}, {kind}")
            for workload, samples in workers[kind].ask({"what": "round"}).items():
                for name, value in samples.items():
                    found[kind][workload][name].append(value)
    parameters = {
        "rounds": rounds,
        "workers": WORKERS,
        "tasks": tasks,
        "leaves": 2**depth,
        "versions": versions,
        "quick": quick,
    }
    results = {
        kind: {key: dict(samples) for key, samples in its.items()} for kind, its in found.items()
    }
    text = render(results, versions)
    return harness.Report(NAME, QUESTION, parameters, results, text, goals(results))


def speedup(samples: Mapping[str, list[float]], over: str, name: str) -> float:
    """How many times faster, by the median of the rounds."""
    pairs = zip(samples[over], samples[name], strict=True)
    return harness.median(whole / part for whole, part in pairs)


def render(results: Mapping[str, Any], versions: Mapping[str, str]) -> str:
    """The table, as Markdown."""
    rows: dict[str, list[str]] = defaultdict(list)
    for its in results.values():
        calls = its["submit and gather"]
        gain = speedup(calls, BASELINE, MOIRAI)
        rows["ThreadPoolExecutor, µs of a call"].append(f"{harness.median(calls[BASELINE]):.2f}")
        rows["Moirai, µs of a call"].append(f"{harness.median(calls[MOIRAI]):.2f} ({gain:.1f})")
        threads = its["two threads"]
        rows["two plain threads, over one after the other"].append(
            f"({speedup(threads, 'one after the other', 'at once'):.2f})"
        )
        for leaf in LEAF_MICROSECONDS:
            joined = its[f"{leaf} µs"]
            for name in ("one worker", "two workers"):
                gain = speedup(joined, "plain calls", name)
                rows[f"fork-join, leaves of {leaf} µs, {name}, over plain calls"].append(
                    f"({gain:.2f})"
                )
    header = ["", *(f"{kind}, {versions[kind]}" for kind in results)]
    table = harness.markdown_table(header, [[name, *cells] for name, cells in rows.items()])
    return f"In brackets: how many times faster.\n\n{table}"


def goals(results: Mapping[str, Any]) -> list[Goal]:
    """The project's goals, which are those of free-threaded interpreters."""
    its = results.get(WITHOUT_GIL)
    names = ["submit and gather, over ThreadPoolExecutor"]
    names += [f"plain calls' speed, over fork-join of {leaf} µs" for leaf in LEAF_MICROSECONDS]
    if its is None:
        measured = [float("nan")] * len(names)
    else:
        measured = [1 / speedup(its["submit and gather"], BASELINE, MOIRAI)]
        for leaf in LEAF_MICROSECONDS:
            measured.append(1 / speedup(its[f"{leaf} µs"], "plain calls", "two workers"))
    limits = [1 / 15, 1 / 1.6, 1.0]
    return [Goal(*each) for each in zip(names, measured, limits, strict=True)]


def main() -> int:
    parser = harness.argument_parser(QUESTION)
    parser.add_argument("--rounds", type=int, help="samples of each subject (11; 2 when quick)")
    parser.add_argument("--python", help="another interpreter that has Moirai, free-threaded")
    arguments = parser.parse_args()
    if arguments.worker is not None:
        harness.serve(answer)
        return 0
    arguments.rounds = arguments.rounds or (2 if arguments.quick else 11)
    if arguments.python is None and MADE_BY_TESTS.exists() and not arguments.quick:
        arguments.python = str(MADE_BY_TESTS)
    if arguments.write_docs and arguments.python is None:
        parser.error("--write-docs: needs a free-threaded interpreter as --python")
    harness.publish(measure(arguments), arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
