"""How many workers a machine is good for, and on which of its nodes they are."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moirai._arguments import check_int, wrong_type
from moirai.errors import InvalidArgument, WrongType
from moirai.memory import NumaNode, Topology

__all__ = [
    "Affinity",
    "Seat",
    "Seats",
    "check_initializer",
    "checked_worker_count",
    "cpu_of_workers",
    "cpu_quota",
    "default_worker_count",
    "node_of_cpu",
    "seats_of",
    "steal_order",
    "working_nodes",
]

Affinity = Literal["auto", "node", "core"] | None


def cpu_quota(root: str | Path = "/") -> float | None:
    """CPUs that the process's control group may use at once, or None if that is not limited.

    The least of what the group and those above it may, in either version of control groups.

    Args:
        root: Where the file system with ``proc`` and ``sys`` is mounted.
    """
    base = Path(root)
    try:
        groups = (base / "proc/self/cgroup").read_text("ascii", "replace").splitlines()
    except OSError:
        return None
    quotas = []
    for line in groups:
        _, controllers, path = [*line.split(":", 2), "", "", ""][:3]
        if controllers == "":
            mount, read = base / "sys/fs/cgroup", _quota_v2
        elif "cpu" in controllers.split(","):
            mount, read = base / "sys/fs/cgroup/cpu", _quota_v1
        else:
            continue
        group = mount / path.lstrip("/")
        while True:
            quotas.append(read(group))
            if group in (mount, group.parent):
                break
            group = group.parent
    return min((quota for quota in quotas if quota is not None), default=None)


def _quota_v2(group: Path) -> float | None:
    match = re.fullmatch(r"(\d+) (\d+)\s*", _text(group / "cpu.max"))
    return int(match[1]) / int(match[2]) if match else None


def _quota_v1(group: Path) -> float | None:
    quota = re.fullmatch(r"(\d+)\s*", _text(group / "cpu.cfs_quota_us"))
    period = re.fullmatch(r"(\d+)\s*", _text(group / "cpu.cfs_period_us"))
    return int(quota[1]) / int(period[1]) if quota and period else None


def _text(path: Path) -> str:
    try:
        return path.read_text("ascii", "replace")
    except OSError:
        return ""


def default_worker_count(topology: Topology, quota: float | None) -> int:
    """One for each CPU that the process may use at once, at least one."""
    cpus = len(topology.allowed_cpus) or 1
    return cpus if quota is None else max(1, min(cpus, math.ceil(quota)))


def checked_worker_count(max_workers: int | None, topology: Topology, most: int) -> int:
    """How many workers an executor gets that was made with `max_workers`.

    Args:
        max_workers: What was asked for; None: as many as the machine is good for.
        topology: The machine.
        most: More than these are refused.

    Raises:
        WrongType: It is no int.
        InvalidArgument: It is not between 1 and `most`.
    """
    if max_workers is None:
        return min(default_worker_count(topology, cpu_quota()), most)
    check_int("max_workers", max_workers, or_none=True)
    if not 1 <= max_workers <= most:
        # In concurrent.futures' words, which its tests look for.
        raise InvalidArgument(
            f"max_workers must be greater than 0, and at most {most}, got {max_workers}"
        )
    return max_workers


def check_initializer(initializer: object, initargs: object) -> None:
    """Refuse what no worker could call.

    Raises:
        WrongType: The first is neither None nor callable, or the second is not iterable.
    """
    if initializer is not None and not callable(initializer):
        # In concurrent.futures' words.
        raise WrongType(f"initializer must be a callable or None, got {type(initializer).__name__}")
    if not isinstance(initargs, Iterable):
        raise wrong_type("initargs", "a tuple", initargs)


def working_nodes(topology: Topology) -> list[NumaNode]:
    """The nodes that have CPUs for this process; one with all of them where there are no nodes."""
    allowed = set(topology.allowed_cpus)
    return [node for node in topology.nodes if allowed.intersection(node.cpus)] or [
        topology.nodes[0]
    ]


def cpu_of_workers(
    topology: Topology, worker_count: int
) -> list[tuple[int, int | None, tuple[int, ...]]]:
    """For each worker the place of its node among `working_nodes`, its CPU and its node's CPUs.

    Each CPU gets a worker before one gets a second, nodes in turn by their CPUs; CPU None where
    the system does not say.
    """
    allowed = set(topology.allowed_cpus)
    slots: list[tuple[int, int | None, tuple[int, ...]]] = []
    for place, node in enumerate(working_nodes(topology)):
        cpus = tuple(cpu for cpu in node.cpus if cpu in allowed)
        slots.extend((place, cpu, cpus) for cpu in cpus)
    slots = slots or [(0, None, ())]
    # Nodes in turn, so that few workers are spread over all nodes.
    ranks: dict[int, int] = {}
    keyed = []
    for slot in slots:
        rank = ranks[slot[0]] = ranks.get(slot[0], -1) + 1
        keyed.append((rank, slot))
    keyed.sort(key=lambda pair: (pair[0], pair[1][0]))
    return [keyed[worker % len(keyed)][1] for worker in range(worker_count)]


def node_of_cpu(topology: Topology, worker_count: int) -> list[int]:
    """By number of the CPU, the place of the nearest of `working_nodes` that has workers.

    Empty where that is always the first.
    """
    nodes = working_nodes(topology)
    places = sorted({place for place, _, _ in cpu_of_workers(topology, worker_count)})
    if places == [0]:
        return []
    found = [0] * (1 + max(cpu for node in topology.nodes for cpu in node.cpus))
    for node in topology.nodes:
        far = [
            (nodes[place] != node, node.distances.get(nodes[place].id, math.inf), place)
            for place in places
        ]
        for cpu in node.cpus:
            found[cpu] = min(far)[-1]
    return found


def steal_order(topology: Topology) -> list[list[int]]:
    """For each of `working_nodes`, the places of all of them by distance, itself first."""
    nodes = working_nodes(topology)
    order = []
    for place, node in enumerate(nodes):
        far = [
            (node.distances.get(other.id, math.inf), other_place)
            for other_place, other in enumerate(nodes)
            if other_place != place
        ]
        order.append([place, *(other for _, other in sorted(far))])
    return order


@dataclass(frozen=True)
class Seat:
    """Where one worker is.

    Attributes:
        place: The place of its node.
        cpus: The CPUs that it stays on; empty: where the kernel puts it.
    """

    place: int
    cpus: tuple[int, ...]


@dataclass(frozen=True)
class Seats:
    """Where the workers of an executor are.

    Attributes:
        node_ids: What the machine calls the nodes, by their places.
        steal_order: For each node, the places of all of them by distance, itself first.
        workers: For each worker.
    """

    node_ids: tuple[int, ...]
    steal_order: list[list[int]]
    workers: tuple[Seat, ...]

    @property
    def places(self) -> list[int]:
        """The places of the nodes that have a worker."""
        return sorted({seat.place for seat in self.workers})

    def place_of(self, node: object) -> int | None:
        """The place of the node with an id: of those that have a worker the nearest; None for None.

        Raises:
            InvalidArgument: None of the nodes has the id.
        """
        if node is None:
            return None
        if isinstance(node, bool) or node not in self.node_ids:
            raise InvalidArgument(
                f"node: must be one that has workers, of {list(self.node_ids)}, got {node!r}"
            )
        order = self.steal_order[self.node_ids.index(node)]
        return next(place for place in order if place in self.places)


def seats_of(topology: Topology, worker_count: int, affinity: Affinity) -> Seats:
    """Spread workers over a machine, as `cpu_of_workers` says.

    Args:
        topology: The machine.
        worker_count: How many there are.
        affinity: What each stays on: the CPUs of its "node", one CPU ("core"), or None; "auto":
            "node" where there are several, else None.

    Raises:
        InvalidArgument: `affinity` is none of these.
    """
    if affinity not in ("auto", "node", "core", None):
        raise InvalidArgument(f'affinity: must be "auto", "node", "core" or None, got {affinity!r}')
    nodes = working_nodes(topology)
    if affinity == "auto":
        affinity = "node" if len(nodes) > 1 else None
    workers = []
    for place, cpu, cpus in cpu_of_workers(topology, worker_count):
        if affinity is None or cpu is None:
            cpus = ()
        elif affinity == "core":
            cpus = (cpu,)
        workers.append(Seat(place, cpus))
    return Seats(tuple(node.id for node in nodes), steal_order(topology), tuple(workers))
