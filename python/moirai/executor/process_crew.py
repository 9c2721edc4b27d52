"""The worker processes of a pool: how many there are, where, and which may have tasks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from moirai.channels import SharedChannel
from moirai.executor.process_numbers import SharedNumbers
from moirai.executor.process_parts import Settings, Worker
from moirai.executor.process_worker import Start, work

__all__ = ["Crew"]

_CALLS_BYTES = 256 << 10


class Crew:
    """Starts workers and knows them. For one thread at a time; any may read what is counted.

    A forked child makes its own.

    Args:
        settings: Those of the executor.
        name: What the processes' names begin with.
    """

    def __init__(self, settings: Settings, name: str) -> None:
        self._settings, self._name = settings, name
        self._numbers = itertools.count()
        # At each seat, the call that is asked to end, if the worker there runs it.
        self._asked: SharedNumbers | None = None
        self.workers: dict[int, Worker] = {}
        # Those that get no more tasks, and end.
        self._leaving: dict[int, Worker] = {}
        # Any thread may set it.
        self.allowed_count = settings.max_workers
        self.started_count = self.lost_count = self.killed_count = 0

    def __iter__(self) -> itertools.chain[Worker]:
        """All of them, those that leave last."""
        return itertools.chain(list(self.workers.values()), list(self._leaving.values()))

    @property
    def running_count(self) -> int:
        """How many have tasks."""
        return sum(bool(worker.tasks) for worker in list(self.workers.values()))

    @property
    def has_tasks(self) -> bool:
        """Whether any of them has."""
        return any(worker.tasks for worker in self.workers.values())

    @property
    def is_limited(self) -> bool:
        """Whether fewer may have tasks than there may be."""
        return self.allowed_count < self._settings.max_workers

    @property
    def is_complete(self) -> bool:
        """Whether there are as many as may have tasks."""
        return len(self.workers) >= self.allowed_count

    def allowed(self) -> list[Worker]:
        """Those that may be given tasks: those that have some first."""
        workers = list(self.workers.values())
        if not self.is_limited:
            return workers
        return sorted(workers, key=lambda worker: not worker.tasks)[: self.allowed_count]

    def takes_more(self, worker: Worker) -> bool:
        """Whether a worker has not had all the tasks that it is to have."""
        most = self._settings.max_tasks_per_child
        return most is None or worker.given_count < most

    def seats_to_fill(self, waiting: Sequence[int]) -> list[int]:
        """Where workers are to be started: first at nodes that tasks wait for, then elsewhere.

        Args:
            waiting: How many tasks wait at each node.
        """
        lacking = list(waiting)
        for worker in self.workers.values():
            lacking[worker.place] -= not worker.tasks
        taken = {worker.seat for worker in self.workers.values()}
        free = [seat for seat in range(self._settings.max_workers) if seat not in taken]
        places = {seat: self._settings.seats.workers[seat].place for seat in free}
        near = []
        for seat in free:
            if lacking[places[seat]] > 0:
                lacking[places[seat]] -= 1
                near.append(seat)
        far = [seat for seat in free if seat not in near]
        return near + far[: max(0, sum(lacking))]

    def start(self, seat: int, results: SharedChannel) -> Worker:
        """Start a process; what it gives comes by a channel that all have in common."""
        settings, number = self._settings, next(self._numbers)
        at = settings.seats.workers[seat]
        if self._asked is None:
            self._asked = SharedNumbers(settings.max_workers)
        calls = SharedChannel.create(capacity_bytes=_CALLS_BYTES)
        start = Start(
            number,
            calls,
            results,
            settings.memory_bytes,
            settings.max_tasks_per_child,
            at.cpus,
            settings.seats.node_ids[at.place],
            settings.blas_threads,
            self._asked,
            seat,
            settings.kill_after_seconds,
            settings.initializer,
            settings.initargs,
        )
        process = settings.context.Process(  # type: ignore[attr-defined]
            target=work, args=(start,), name=f"{self._name}_{number}"
        )
        worker = Worker(number, seat, at.place, process, calls, calls.sender())
        # Before it starts: a signal's exception may come when it has.
        self.workers[number] = worker
        try:
            process.start()
        except Exception:
            del self.workers[number]
            worker.close()
            raise
        self.started_count += 1
        return worker

    def let_go(self, worker: Worker) -> None:
        """A worker has had all its tasks, and ends."""
        self._leaving[worker.number] = self.workers.pop(worker.number)

    def ask(self, number: int, call: int) -> None:
        """Ask a worker to end a call, if it is at it."""
        worker = self.workers.get(number)
        if worker is not None and call in worker.tasks:
            assert self._asked is not None, "made with the first worker"
            self._asked[worker.seat] = call

    def take_out(self, number: int) -> Worker:
        """Forget a worker whose process has ended: it."""
        worker = self.workers.pop(number, None)
        return self._leaving.pop(number) if worker is None else worker

    def clear(self) -> None:
        """Forget all of them."""
        self.workers.clear()
        self._leaving.clear()
