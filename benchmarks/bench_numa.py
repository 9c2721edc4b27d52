"""Whose tasks do idle workers take on a machine with several memory nodes?

A simulation: the machines are recorded ones of `tests/fixtures/numa`, the clock is simulated,
and what each call takes is drawn from a seeded generator. Who takes which task, who is started
and who is woken is decided by the executor's own queues and workers, called step by step from
one thread (`moirai.executor.rehearsal`); nothing of that is written again here. Which worker a
task came from is known because each task is followed from the queue it was put in, and these
counts have to agree with those of the executor's statistics. Lanes do not age here, so that two
runs count the same. What a worker leaves to another node's for a while it waits for by that clock.

Calls are trees: each splits its part in two and queues both halves, down to single calls that
take exponentially distributed times. In each round the roots are queued from outside, at each
node as many as it has workers, times a factor (balanced), or all at the first node (skewed), or
one tree of as many calls at the first node (one tree); a round begins when the one before has
ended, so that each ends with workers that have nothing left but others' tasks.

The subject without nodes is the same executor, told that all CPUs are of one node.

What a simulation cannot show is where pages lie and what distance costs: `make numa-guest`
boots a machine of two nodes in an emulator for that.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import math
import random
import sys
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

import harness
from harness import MOIRAI, Goal
from moirai.executor.rehearsal import Rehearsal, rehearse
from moirai.executor.sizing import cpu_of_workers, working_nodes
from moirai.memory import Topology

QUESTION = __doc__.partition("\n")[0]
NAME = "bench_numa"
FIXTURES = harness.ROOT / "tests" / "fixtures" / "numa"
# Recorded machines whose nodes have more than one CPU each.
MACHINES = ("memory-only", "four-nodes", "cpus-without-memory", "eight-nodes", "sparse-ids")
LOADS = ("balanced", "skewed", "one tree")
SUBJECTS = {MOIRAI: "Moirai", "flat": "without nodes"}

LEAF_SECONDS = 1e-4
SPLIT_SECONDS = 1e-6
WAKE_SECONDS = 5e-6
FROM_OUTSIDE = -1


@dataclass(frozen=True)
class Machine:
    """What the simulation needs of a topology; nodes and workers by their places."""

    topology: Topology
    node_of_worker: tuple[int, ...]
    distances: tuple[tuple[float, ...], ...]

    @classmethod
    def read(cls, name: str) -> Machine:
        topology = Topology.read(FIXTURES / name)
        nodes = working_nodes(topology)
        cpus = sum(len(set(node.cpus) & set(topology.allowed_cpus)) for node in nodes)
        places = cpu_of_workers(topology, cpus)
        far = max(distance for node in nodes for distance in node.distances.values())
        distances = tuple(
            tuple(node.distances.get(other.id, far) for other in nodes) for node in nodes
        )
        return cls(topology, tuple(place for place, _, _ in places), distances)

    @property
    def node_count(self) -> int:
        return len(self.distances)

    def rehearsal(self, subject: str) -> Rehearsal:
        """The workers of an executor on this machine."""
        count = len(self.node_of_worker)
        if subject == MOIRAI:
            return rehearse(self.topology, count)
        return Rehearsal(node_of_worker=[0] * count, order=[[0]])


@dataclass
class Task:
    """A part of a tree: so many single calls, where they were queued, and where they are now."""

    leaves: int
    queued_at: int
    worker: int  # FROM_OUTSIDE: a lane
    node: int


class Wait:
    """The end of a sleep in which a worker leaves to others what it has seen."""


@dataclass
class Simulation:
    """One run: a machine, a subject, a load."""

    machine: Machine
    subject: str
    load: str
    leaves: int
    roots_per_worker: int
    rounds: int
    seed: int

    counts: Counter[str] = field(default_factory=Counter)
    busy_seconds: float = 0.0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._rehearsal = self.machine.rehearsal(self.subject)
        self._tasks: dict[int, Task] = {}
        self._ids = itertools.count()
        # What is in each worker's deque, the oldest first, and in those of each node.
        self._deques: list[deque[int]] = [deque() for _ in self.machine.node_of_worker]
        self._held = [0] * self.machine.node_count
        self._events: list[tuple[float, int, int, Task | Wait | None]] = []
        self._order = itertools.count()
        # What each waits for, or waited for last.
        self._waits: list[Wait | None] = [None] * len(self.machine.node_of_worker)

    def run(self) -> dict[str, Any]:
        """All rounds; what was counted."""
        for _ in range(self.rounds):
            self._queue_roots()
            while self._events:
                self.seconds, _, worker, done = heapq.heappop(self._events)
                if isinstance(done, Wait):
                    is_over = self._waits[worker] is done and self._rehearsal.stop_waiting(worker)
                    if not is_over:
                        continue
                elif done is not None and done.leaves > 1:
                    self._split(worker, done)
                self._look(worker)
        self._check()
        return self._result()

    def _queue_roots(self) -> None:
        machine = self.machine
        roots = [node for node in machine.node_of_worker for _ in range(self.roots_per_worker)]
        leaves = self.leaves
        if self.load == "skewed":
            roots = [0] * len(roots)
        elif self.load == "one tree":
            roots, leaves = [0], leaves * len(roots)
        self.counts["roots"] += len(roots)
        self.counts["leaves"] += leaves * len(roots)
        for node in roots:
            task = self._task(leaves, FROM_OUTSIDE, node)
            self._rouse(self._rehearsal.queue(node if self.subject == MOIRAI else 0, task))

    def _split(self, worker: int, task: Task) -> None:
        first = self._random.randint(1, task.leaves - 1)
        node = self.machine.node_of_worker[worker]
        for leaves in (first, task.leaves - first):
            number = self._task(leaves, worker, node)
            self._deques[worker].append(number)
            self._held[node] += 1
            self._rouse(self._rehearsal.push(worker, number))

    def _look(self, worker: int) -> None:
        while True:
            number, brought, roused = self._rehearsal.take(worker)
            if number is not None:
                task = self._tasks.pop(number)
                self._note(worker, number, task, brought)
                self._rouse(roused)
                mean = LEAF_SECONDS if task.leaves == 1 else SPLIT_SECONDS
                took = self._random.expovariate(1 / mean)
                self.busy_seconds += took
                self._at(self.seconds + took, worker, task)
                return
            seconds, roused = self._rehearsal.rest(worker)
            self._rouse(roused)
            if seconds == 0:
                continue
            if seconds < math.inf:
                self._waits[worker] = wait = Wait()
                wake = self._random.expovariate(1 / WAKE_SECONDS)
                self._at(self.seconds + seconds + wake, worker, wait)
            return

    def _task(self, leaves: int, worker: int, node: int) -> int:
        number = next(self._ids)
        self._tasks[number] = Task(leaves, node, worker, node)
        return number

    def _rouse(self, workers: list[int]) -> None:
        for worker in workers:
            wake = self._random.expovariate(1 / WAKE_SECONDS)
            self._at(self.seconds + wake, worker, None)

    def _at(self, when: float, worker: int, done: Task | Wait | None) -> None:
        heapq.heappush(self._events, (when, next(self._order), worker, done))

    def _note(self, thief: int, number: int, task: Task, brought: int) -> None:
        """Count where a task came from, and what could have been taken in its place."""
        machine, counts = self.machine, self.counts
        here = machine.node_of_worker[thief]
        counts["tasks"] += 1
        counts["tasks of own node"] += task.queued_at == here
        own_node_has = self._held[here] > len(self._deques[thief])
        if task.worker == FROM_OUTSIDE:
            if task.node != here:
                counts["lane of another node"] += 1
                counts["lane of another node passed own"] += own_node_has
            return
        if task.worker != thief:
            counts["steals"] += 1
            far = machine.distances[here]
            counts["distance"] += far[task.node]
            if task.node == here:
                counts["steals of own node"] += 1
            else:
                counts["tasks that changed node"] += 1 + brought
                counts["steals that passed own node"] += own_node_has
                # No more than a node's workers take at once, and one, is left to them for a while.
                workers = Counter(machine.node_of_worker)
                counts["steals that passed a nearer node"] += any(
                    held > workers[node] + 1 and far[node] < far[task.node]
                    for node, held in enumerate(self._held)
                    if node != here
                )
        self._remove(thief, number, task, brought)

    def _remove(self, thief: int, number: int, task: Task, brought: int) -> None:
        """The deques after a task left one, the older ones that came along with it too."""
        held = self._deques[task.worker]
        self._held[task.node] -= 1
        if task.worker == thief:
            assert (held.pop(), brought) == (number, 0)
            return
        here = self.machine.node_of_worker[thief]
        depths = [worker["queued"] for worker in self._rehearsal.counts()] if brought else []
        # First of the deque that the task was in, its last one; then of its neighbours.
        moved = (
            [held.popleft() for _ in range(len(held) - 1 - depths[task.worker])] if brought else []
        )
        assert held.popleft() == number
        for who, depth in enumerate(depths):
            if who != thief and self.machine.node_of_worker[who] == task.node:
                theirs = self._deques[who]
                moved += [theirs.popleft() for _ in range(len(theirs) - depth)]
        assert len(moved) == brought
        for each in moved:
            other = self._tasks[each]
            other.worker, other.node = thief, here
        self._deques[thief].extend(moved)
        self._held[task.node] -= brought
        self._held[here] += brought

    def _check(self) -> None:
        """The executor's own counts are the same, and nothing was lost."""
        workers = self._rehearsal.counts()
        same = sum(worker["stolen_same_node"] for worker in workers)
        stolen = same + sum(worker["stolen_cross_node"] for worker in workers)
        expected = self.counts["steals of own node" if self.subject == MOIRAI else "steals"]
        assert (stolen, same) == (self.counts["steals"], expected), (stolen, same, self.counts)
        assert self.counts["tasks"] == 2 * self.counts["leaves"] - self.counts["roots"]
        assert not self._tasks
        assert not any(self._deques)

    def _result(self) -> dict[str, Any]:
        counts = self.counts
        steals = counts["steals"]
        return {
            **dict(counts),
            "locality": counts["steals of own node"] / steals if steals else 1.0,
            "tasks_locality": counts["tasks of own node"] / counts["tasks"],
            "mean_distance": counts["distance"] / steals if steals else 0.0,
            "use": self.busy_seconds / self.seconds / len(self.machine.node_of_worker),
        }


def measure(arguments: argparse.Namespace) -> harness.Report:
    size = (
        {"leaves": 16, "roots_per_worker": 1, "rounds": 2}
        if arguments.quick
        else {"leaves": 32, "roots_per_worker": 4, "rounds": 5}
    )
    seeds = range(2 if arguments.quick else 3)
    machines = {name: Machine.read(name) for name in MACHINES}
    results: dict[str, Any] = {}
    for name, load, subject in itertools.product(machines, LOADS, SUBJECTS):
        harness.progress(f"{name}, {load}, {SUBJECTS[subject]}")
        results.setdefault(name, {}).setdefault(load, {})[subject] = [
            Simulation(machines[name], subject, load, **size, seed=seed).run() for seed in seeds
        ]
    parameters = {
        **size,
        "seeds": len(seeds),
        "leaf_seconds": LEAF_SECONDS,
        "split_seconds": SPLIT_SECONDS,
        "wake_seconds": WAKE_SECONDS,
    }
    return harness.Report(
        name=NAME,
        question=QUESTION,
        parameters=parameters,
        results=results,
        markdown=tables(machines, results),
        goals=goals(results),
    )


def total(runs: list[dict[str, Any]], key: str) -> int:
    return sum(run.get(key, 0) for run in runs)


def tables(machines: dict[str, Machine], results: dict[str, Any]) -> str:
    parts = []
    for load in LOADS:
        rows = []
        for name, machine in machines.items():
            for subject, label in SUBJECTS.items():
                runs = results[name][load][subject]
                rows.append(
                    [
                        f"{name}: {machine.node_count} nodes, "
                        f"{len(machine.node_of_worker)} CPUs; {label}",
                        f"{total(runs, 'steals')}",
                        f"{harness.median(run['locality'] for run in runs):.1%}",
                        f"{harness.median(run['mean_distance'] for run in runs):.1f}",
                        f"{total(runs, 'tasks that changed node')}",
                        f"{harness.median(run['tasks_locality'] for run in runs):.1%}",
                        f"{total(runs, 'steals that passed own node')}",
                        f"{total(runs, 'steals that passed a nearer node')}",
                        f"{total(runs, 'lane of another node passed own')}",
                        f"{harness.median(run['use'] for run in runs):.1%}",
                    ]
                )
        header = [
            f"{load} load", "steals", "of own node", "mean distance", "tasks moved",
            "tasks of own node", "passed own node", "passed a nearer node", "lane passed own node",
            "workers busy",
        ]  # fmt: skip
        parts.append(harness.markdown_table(header, rows))
    return "\n\n".join(parts)


def goals(results: dict[str, Any]) -> list[Goal]:
    four = results["four-nodes"]["balanced"][MOIRAI]
    ours = [run for name in results for load in LOADS for run in results[name][load][MOIRAI]]
    return [
        Goal(
            "four nodes, balanced: share of steals from another node",
            harness.median(1 - run["locality"] for run in four),
            0.2,
        ),
        Goal("steals from another node while the own one had tasks",
             total(ours, "steals that passed own node"), 0),
        Goal("steals from a node while a nearer one had more than is left to its workers",
             total(ours, "steals that passed a nearer node"), 0),
        Goal("tasks from another node's lanes while workers of the own one had some to steal",
             total(ours, "lane of another node passed own"), 0),
    ]  # fmt: skip


def main() -> int:
    arguments = harness.argument_parser(QUESTION).parse_args()
    harness.publish(measure(arguments), arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
