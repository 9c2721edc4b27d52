"""The executor's decisions without its threads, for simulations of other machines."""

from __future__ import annotations

from moirai._native import Rehearsal
from moirai.executor.sizing import cpu_of_workers, steal_order
from moirai.memory import Topology

__all__ = ["Rehearsal", "rehearse"]


def rehearse(topology: Topology, worker_count: int) -> Rehearsal:
    """The workers that an executor would have on a machine, to be asked who takes what."""
    places = cpu_of_workers(topology, worker_count)
    return Rehearsal(node_of_worker=[place for place, _, _ in places], order=steal_order(topology))
